"""What the scripts must write, computed another way: the oracle of tests/test_wiring_*.py.

Plain transformers in float64, one row at a time and without padding; adapters are folded into the
weights by hand from their safetensors; loops instead of batches; torch.optim in float64. Of the
package it takes the keyed random numbers, the words of ethics.py, and `buckets`, all of which have
tests of their own. `make_world` and its kin write the inputs: a tiny random base, another model as
the judge, and adapters whose B is not zero, so that each stack of adapters has logits of its own.
"""

from __future__ import annotations

import importlib
import json
import math
import random
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import make_tiny_model, make_tiny_tokenizer
from torch.func import functional_call

from virtue import TARGETS
from virtue.dialogue import buckets
from virtue.ethics import ENGLISH, FOLLOW_UPS, LENSES, VIRTUES
from virtue.randomness import stream

FOLLOWING = tuple(FOLLOW_UPS.values())
FINAL_RATE = 0.1  # of the linear schedule
ANY_JUDGE = ["--any-judge"]  # flags by which run_data.py takes labels of a judge that knows nothing
CONTEXT = 665  # of the judge that is another model: some pairs are too long for it


def call(script: str, *flags) -> None:
    importlib.import_module(script).main([str(flag) for flag in flags])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- conventions, one line each


def rate(step: int, steps: int, schedule: str) -> float:
    """What the learning rate is multiplied by at a step, counted from 0."""
    return 1.0 if schedule == "constant" else 1 + (FINAL_RATE - 1) * step / max(1, steps - 1)


def combine(probs: torch.Tensor) -> torch.Tensor:
    """P(first is better) of both orders, (orders, questions), as one opinion (questions)."""
    return probs.logit().mean(0).sigmoid()


# ---- plain models


class Plain:
    """A folder as transformers opens it, in float64; and stacks of adapter folders upon it."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.model.requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.eos = self.tokenizer.eos_token_id

    def stack(self, *folders: Path) -> dict[str, torch.Tensor]:
        """The weights with W + alpha / r B A for each adapter, under the model's own names."""
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for folder in folders:
            config = json.loads((folder / "adapter_config.json").read_text())
            state = load_file(folder / "adapter_model.safetensors")
            for name in [name for name in state if ".lora_A." in name]:
                A, B = state[name].double(), state[name.replace("lora_A", "lora_B")].double()
                path = name.removeprefix("base_model.model.").replace("lora_A.", "")
                weights[path] += config["lora_alpha"] / config["r"] * B @ A
        return weights

    def read(self, weights: dict, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(L, D) after the final norm, and logits (L, V), of one row."""
        out = functional_call(
            self.model,
            weights,
            (torch.tensor([ids]),),
            dict(output_hidden_states=True, use_cache=False),
        )
        return out.hidden_states[-1][0], out.logits[0]

    @torch.no_grad()
    def score(self, weights: dict, head: torch.Tensor, ids: list[int]) -> float:
        """The head (D) at the last token of a row."""
        return float(self.read(weights, ids)[0][-1] @ head)

    @torch.no_grad()
    def logprobs(self, weights: dict, ids: list[int], spans, temperature: float) -> torch.Tensor:
        """log p of each token in the spans [start, end), at a temperature, one after another."""
        logp = (self.read(weights, ids)[1] / temperature).log_softmax(-1)
        return torch.stack([logp[t - 1, ids[t]] for start, end in spans for t in range(start, end)])

    def encode(self, messages: list[dict], reply: bool = False) -> list[int]:
        """The chat template's ids of stripped texts; `reply`: up to where the assistant begins."""
        messages = [m | {"content": m["content"].strip()} for m in messages]
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=reply, return_dict=False
        )

    @torch.no_grad()
    def dialogue(
        self,
        weights: dict,
        record: dict,
        seed: int,
        stage: str,
        *,
        copy: int = 0,
        new: int,
        temperature: float,
        questions=FOLLOWING,
    ) -> dict:
        """Three answers, each token the inverse of the cumulative distribution at its number.

        {"id", "prompt", "ids", "turns": [[start, end, truncated]], "texts"}
        """
        ids, turns, texts = self.encode(record["prompt"], reply=True), [], []
        for turn in range(3):
            if turn:
                ids += self.tokenizer.encode(f"[INST] {questions[turn - 1]}[/INST]")
            start = len(ids)
            for u in stream(seed, stage, 0, record["id"], copy, turn).random(new):
                p = (self.read(weights, ids)[1][-1] / temperature).softmax(-1).cumsum(-1)
                ids.append(int((p <= u).sum()))
                if ids[-1] == self.eos:
                    break
            turns.append([start, len(ids), ids[-1] != self.eos])
            texts.append(self.tokenizer.decode(ids[start:], skip_special_tokens=True).strip())
            if turns[-1][2]:
                ids.append(self.eos)
        return {
            "id": record["id"],
            "prompt": record["prompt"],
            "ids": ids,
            "turns": turns,
            "texts": texts,
        }

    @torch.no_grad()
    def judge(
        self,
        weights: dict,
        first: list[dict],
        second: list[dict],
        lens: str,
        *,
        orders=2,
        asked=VIRTUES,
        wording="trained",
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """P(first is better) and the mass on both labels, (orders, questions): a prompt for each;
        None where one does not fit into the context."""
        probs, mass = torch.zeros(2, orders, len(asked), dtype=torch.float64)
        begun = self.tokenizer.encode(f" {ENGLISH.reply}")  # of the reply
        A, B = (self.tokenizer.encode(f" {ENGLISH.reply} {label}")[-1:] for label in "AB")
        for order in range(orders):
            shown = (first, second) if order == 0 else (second, first)
            text = ENGLISH.pairs[wording].format(
                first_label="A",
                second_label="B",
                about=ENGLISH.about[lens],
                first=transcript(shown[0]),
                second=transcript(shown[1]),
            )
            for q, name in enumerate(asked):
                question = ENGLISH.extra.get(name, ENGLISH.questions[wording]).format(
                    virtue=name,
                    asks=ENGLISH.constitution.get(name, ("",))[0],
                    first_label="A",
                    second_label="B",
                )
                ids = self.encode([{"role": "user", "content": text + question}], reply=True)
                ids = ids + begun
                if len(ids) >= self.model.config.max_position_embeddings:
                    return None
                a, b = self.read(weights, ids)[1][-1].softmax(-1)[[*A, *B]]
                mass[order, q] = a + b
                probs[order, q] = (a if order == 0 else b) / (a + b)
        return probs, mass


def transcript(messages: list[dict]) -> str:
    names = {"system": "System", "user": "Human", "assistant": "Assistant"}
    return "\n".join(f"{names[m['role']]}: {m['content']}" for m in messages)


def up_to(dialogue: dict, k: int, questions=FOLLOWING) -> list[dict]:
    """A dialogue as messages, up to the answer of lens k."""
    messages = [*dialogue["prompt"], {"role": "assistant", "content": dialogue["texts"][0]}]
    for turn in range(1, k + 1):
        messages += [
            {"role": "user", "content": questions[turn - 1]},
            {"role": "assistant", "content": dialogue["texts"][turn]},
        ]
    return messages


def read_up_to(dialogue: dict, k: int) -> list[int]:
    """A dialogue's ids up to the EOS of lens k's turn, sampled or forced."""
    _, end, truncated = dialogue["turns"][k]
    return dialogue["ids"][: end + truncated]


def head_of(folder: Path) -> torch.Tensor:
    state = load_file(folder / "adapter_model.safetensors")
    return state["base_model.model.score.weight"][0].double()


# ---- training


class Trained:
    """An adapter under training, in float64: the weights below it, and A and B of each layer."""

    def __init__(self, plain: Plain, below: dict, rank: int, alpha: float, seed: int):
        self.plain, self.below, self.scale, self.layers = plain, below, alpha / rank, {}
        generator = torch.Generator().manual_seed(seed)
        for path, module in plain.model.named_modules():
            if path.rpartition(".")[2] in TARGETS:
                bound = module.in_features**-0.5
                A = torch.empty(rank, module.in_features).uniform_(
                    -bound, bound, generator=generator
                )
                B = torch.zeros(module.out_features, rank)
                self.layers[path] = A.double().requires_grad_(), B.double().requires_grad_()
        self.first = self.tensors()

    def read(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        changed = {
            f"{path}.weight": self.below[f"{path}.weight"] + self.scale * B @ A
            for path, (A, B) in self.layers.items()
        }
        return self.plain.read({**self.below, **changed}, ids)

    def tensors(self) -> torch.Tensor:
        """All of A and B in one vector, in the order of the layers' names."""
        return torch.cat(
            [
                half.detach().flatten().clone()
                for path in sorted(self.layers)
                for half in self.layers[path]
            ]
        )

    def moved(self, folder: Path) -> float:
        """How far the saved adapter lies from this one, in units of the way that training went."""
        state = load_file(folder / "adapter_model.safetensors")
        saved = torch.cat(
            [
                state[f"base_model.model.{path}.lora_{half}.weight"].double().flatten()
                for path in sorted(self.layers)
                for half in "AB"
            ]
        )
        return float((saved - self.tensors()).norm() / (self.tensors() - self.first).norm())


def descend(parameters: list, losses, *, lr: float, clip: float, schedule: str, steps: int):
    """AdamW over losses, each made in its turn; yields (loss, gradient's norm) of each step."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for step, loss in enumerate(losses):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in parameters))
        for p in parameters:
            p.grad *= min(1.0, clip / norm)
        optimizer.param_groups[0]["lr"] = lr * rate(step, steps, schedule)
        optimizer.step()
        yield value.item(), norm


def batches(rows: int, lengths: list[int], size: int, epochs: int, *key):
    """Row numbers of each step, epoch by epoch."""
    orders = [stream(*key, epoch).permutation(rows).tolist() for epoch in range(epochs)]
    return [buckets(order, lengths, size) for order in orders]


# ---- inputs


def make_world(folder: Path) -> dict:
    """{"base", "judge", "prompts"}: two tiny models, a file of prompts of one and two turns."""
    made = {
        "base": make_tiny_model(folder / "base", initializer_range=0.15),
        "judge": make_tiny_model(
            folder / "judge", seed=5, initializer_range=0.25, max_position_embeddings=CONTEXT
        ),
    }
    make_tiny_tokenizer(made["judge"], 288)  # twelve merges fewer: other ids for the same text
    for name in ("base", "judge"):
        often(made[name])
    records = []
    for i in (*range(64), 66, 99):  # the last two are long, and for evaluation
        talk = [{"role": "user", "content": f"What should I do about letter {i}?" + " A" * (i % 5)}]
        if i % 3 == 0:
            talk += [
                {"role": "assistant", "content": "Which " + "one? " * (1 + i % 8)},
                {"role": "user", "content": f"The letter to the owner, {i}."},
            ]
        records.append({"prompt": talk})
    made["prompts"] = folder / "prompts.jsonl"
    made["prompts"].write_text("".join(json.dumps(r) + "\n" for r in records))
    return made


def often(folder: Path, factor: float = 4.0) -> None:
    """Makes EOS likely in some states and not in others: its row of lm_head times a factor."""
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    state = load_file(path)
    state["lm_head.weight"][2] *= factor
    save_file(state, path, metadata={"format": "pt"})


def identity(base: Path) -> dict:
    """What artefacts say of their base and its tokenizer: the keywords of the writers."""
    from virtue.plumbing.loading import base_fingerprint, load_tokenizer, template_fingerprint

    return {
        "base": {"id": str(base), "fingerprint": base_fingerprint(base)},
        "template": template_fingerprint(load_tokenizer(base)),
    }


def make_adapter(
    world: dict,
    folder: Path,
    stage: str,
    seed: int,
    *,
    head: bool = False,
    parents=(),
    settings=(),
    extra=(),
) -> Path:
    """An artefact as the scripts leave one, with random A, B and head."""
    from virtue.plumbing.artefacts import save_artifact
    from virtue.lora import adapter_parameters, add_adapter
    from virtue.models import ScalarHead
    from virtue.plumbing.loading import load_model

    base, rank, generator = world["base"], 2 + seed % 2, torch.Generator().manual_seed(seed)
    model = load_model(base)
    add_adapter(model, "made", rank=rank, alpha=1.5 * rank, seed=seed)
    for parameter in adapter_parameters(model, "made"):
        if parameter.shape[1] == rank:  # B
            parameter.data.normal_(std=0.25, generator=generator)
    folder.mkdir(parents=True)
    save_artifact(
        folder,
        stage=stage,
        model=model,
        adapter="made",
        parents=dict(parents),
        seed=0,
        head=ScalarHead(model.config.hidden_size, seed=seed) if head else None,
        **identity(base),
        settings={"model": str(base), "out": str(folder), **dict(settings)},
        extra=extra,
    )
    return folder


WORDS = "I would give the letter back to owner What is motivation utility of action".split()


def make_preferences(world: dict, plain: Plain, folder: Path, prompts: int) -> Path:
    """A folder as run_data.py preferences leaves one: two dialogues of each prompt, some cut, and
    pairs of them, of other prompts and with other labels in each lens."""
    from virtue.plumbing.artefacts import data_hash, write_jsonl, write_manifest
    from virtue.plumbing.records import read_prompts

    rng, dialogues, files = random.Random(prompts), [], {lens: [] for lens in LENSES}
    for n, record in enumerate(read_prompts(world["prompts"])[:prompts]):
        pair = []
        for _ in range(2):
            texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 7))) for _ in LENSES]
            ids, turns = plain.encode(record["prompt"], True), []
            for turn, text in enumerate(texts):
                if turn:
                    ids += plain.tokenizer.encode(f"[INST] {FOLLOWING[turn - 1]}[/INST]")
                start, cut = len(ids), rng.random() < 0.3
                ids += [*plain.tokenizer.encode(f" {text}"), plain.eos]
                turns.append([start, len(ids) - cut, cut])
            pair.append({**record, "ids": ids, "turns": turns, "texts": texts})
        dialogues.append(pair)
        for k, lens in enumerate(LENSES):
            if (n + k) % 5 == 0 or up_to(pair[0], k) == up_to(pair[1], k):
                continue  # a pair that was dropped: what was sampled stays
            level = rng.choice((0.25, 0.4, 0.7, 0.85))
            virtues = {virtue: level + rng.uniform(-0.12, 0.12) for virtue in VIRTUES}
            a, b = (up_to(d, k) for d in rng.sample(pair, 2))
            files[lens].append(
                {
                    "id": record["id"],
                    "lens": lens,
                    "chosen": a,
                    "rejected": b,
                    "virtues": virtues,
                    "label": sum(virtues.values()) / 5,
                    "votes": 3,
                    "position_flips": 0,
                    "truncated": any(t[2] for d in pair for t in d["turns"][: k + 1]),
                }
            )
    folder.mkdir(parents=True)
    for lens, records in files.items():
        write_jsonl(folder / f"{lens}.jsonl", records)
    write_jsonl(
        folder / "dialogues.jsonl",
        (
            {key: d[key] for key in ("id", "prompt", "ids", "turns")}
            for copy in zip(*dialogues)
            for d in copy
        ),
    )
    written = [*(f"{lens}.jsonl" for lens in LENSES), "dialogues.jsonl"]
    write_manifest(
        folder,
        stage="preferences",
        **identity(world["base"]),
        seed=0,
        settings={"model": str(world["base"]), "sft": str(world["sft"]), "out": str(folder)},
        parents={"sft": world["sft"]},
        sha256=data_hash(folder, written),
    )
    return folder
