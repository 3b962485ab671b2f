"""run_ppo.py against an oracle of its own: plain transformers in float64, loops and explicit sums.

The script runs in this process on a tiny random Mistral, with an SFT adapter and reward models that
change it much. Its dialogues are taken as given, and each of their tokens is checked against the
keyed random number that drew it; all else, from the scores to the adapters after the last update,
is computed anew. Of the package the oracle takes the keyed random numbers, the words of ethics.py,
and what writes the inputs. tests/mutants/run_ppo.txt lists faults that this file sees.
"""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model
from torch.func import functional_call

import run_ppo
import virtue.generate
from virtue import AGGREGATORS, TARGETS
from virtue.plumbing.artefacts import save_artifact
from virtue.ethics import FOLLOW_UPS, LENSES
from virtue.lora import add_adapter, adapter_parameters
from virtue.models import ScalarHead
from virtue.plumbing.loading import (base_fingerprint, load_model, load_tokenizer,
                                     template_fingerprint)
from virtue.dialogue import prompt_record, split
from virtue.randomness import stream, torch_seed

EOS, NEW, N_PROMPTS = 2, 7, 17
MEAN, STD = (
    (0.3, -0.5, 1.1),
    (1.6, 0.7, 1.2),
)  # of the reward models' scores, as their manifests have them


# ---- the inputs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders base, sft, rm (upon sft), bare (reward models upon the base), and prompts.jsonl."""
    at = tmp_path_factory.mktemp("world")
    make_tiny_model(at / "base", hidden_size=32, intermediate_size=64, head_dim=8)
    weights = load_file(at / "base/model.safetensors")
    weights["lm_head.weight"][EOS] *= 3.2  # some turns end, some are cut
    save_file(weights, at / "base/model.safetensors", metadata={"format": "pt"})
    model, tokenizer = load_model(at / "base"), load_tokenizer(at / "base")
    known = dict(
        model=model,
        base={"id": str(at / "base"), "fingerprint": base_fingerprint(at / "base")},
        template=template_fingerprint(tokenizer),
        seed=0,
    )

    def adapter(folder, name, seed, **settings):
        add_adapter(model, name, seed=seed, **settings)
        with torch.no_grad():
            for B in adapter_parameters(model, name)[1::2]:
                B.normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
        folder.mkdir(parents=True)
        return dict(folder=folder, adapter=name, **known)

    save_artifact(
        **adapter(at / "sft", "sft", 1, rank=3, alpha=5), stage="sft", parents={}, settings={}
    )
    for group, parents in (("rm", {"sft": at / "sft"}), ("bare", {})):
        for k, lens in enumerate(LENSES):
            head = ScalarHead(32, seed=k + 7)
            save_artifact(
                **adapter(
                    at / group / lens,
                    f"{group}{lens}",
                    k + 20,
                    rank=2,
                    alpha=3,
                    targets=("q_proj", "v_proj", "up_proj"),
                ),
                stage="rm",
                parents=parents,
                head=head,
                settings={"model": str(at / "base")},
                extra={"lens": lens, "score_mean": MEAN[k], "score_std": STD[k]},
            )
    texts = (
        f"What should I do about the letter{' or the owner' * (i % 3)} {i}?" for i in range(1000)
    )
    found = [
        t for t in texts if split(prompt_record([{"role": "user", "content": t}])["id"]) == "ppo"
    ][: N_PROMPTS + 3]
    found.insert(
        4,
        next(
            t
            for i in range(1000)
            if split(
                prompt_record([{"role": "user", "content": (t := f"{i} letters " * 30)}])["id"]
            )
            == "ppo"
        ),
    )  # too long
    (at / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": t}) + "\n" for t in ["Another split's, perhaps", *found])
    )
    return SimpleNamespace(
        at=at,
        tokenizer=tokenizer,
        prompts=[prompt_record([{"role": "user", "content": t}]) for t in found],
    )


# ---- the oracle: models


def adapter_of(folder):
    """{weight's name: (A, B, alpha / r)} of an artefact, in float64."""
    config, state = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    return {
        name[len("base_model.model.") : -len("lora_A.weight")] + "weight": (
            state[name].double(),
            state[name.replace("lora_A", "lora_B")].double(),
            config["lora_alpha"] / config["r"],
        )
        for name in state
        if "lora_A" in name
    }


def new_adapter(model, name, o):
    """What run_ppo.py trains: A uniform in +-1/sqrt(in), drawn in fp32 from its key, B zero."""
    generator, found = torch.Generator().manual_seed(torch_seed(o.seed, name)), {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in TARGETS:
            bound = module.in_features**-0.5
            A = (
                torch.empty(o.rank, module.in_features)
                .uniform_(-bound, bound, generator=generator)
                .double()
            )
            found[f"{path}.weight"] = (
                A.requires_grad_(),
                torch.zeros(module.out_features, o.rank, dtype=torch.float64, requires_grad=True),
                2.0,  # alpha / r
            )
    return found


def fold(weights, *adapters):
    """W + sum of alpha / r B A, by name."""
    weights = dict(weights)
    for adapter in adapters:
        for name, (A, B, scale) in adapter.items():
            weights[name] = weights[name] + scale * B @ A
    return weights


# ---- the oracle: PPO


def aggregates(s, o):
    """All aggregators of one dialogue's standardised scores, three numbers."""
    mean, middle = sum(s) / 3, sorted(s)[1]
    variance = sum((x - mean) ** 2 for x in s) / 3
    return {
        "mean": mean,
        "weighted": sum(w * x for w, x in zip(o.weights or (1 / 3,) * 3, s)),
        "min": min(s),
        "median": middle,
        "uwo": mean - 0.5 * math.sqrt(variance),
        "lsc": -sum(math.log1p(math.exp(1 - x)) for x in s),
    }


class Oracle:
    """What run_ppo.py with the flags `o` has to write, given the dialogues it sampled."""

    def __init__(self, world, o, standardise_on=None):
        from transformers import AutoModelForCausalLM

        self.world, self.o = world, o
        self.prompts = [
            p for p in world.prompts[: o.limit] if len(p["prompt"][0]["content"]) < 90
        ]  # a letter or more is a token
        self.model = AutoModelForCausalLM.from_pretrained(
            world.at / "base", dtype=torch.float64, attn_implementation="eager"
        ).eval()
        base = {name: t.detach() for name, t in self.model.state_dict().items()}
        self.reference = fold(base, adapter_of(world.at / "sft")) if o.sft else base
        group = world.at / ("rm" if o.sft else "bare")
        self.reward_models = [
            (
                fold(self.reference, adapter_of(group / lens)),
                load_file(group / lens / "adapter_model.safetensors")[
                    "base_model.model.score.weight"
                ].double()[0],
            )
            for lens in LENSES
        ]
        self.policy, self.value = (new_adapter(self.model, name, o) for name in ("policy", "value"))
        self.head = [
            torch.zeros(1, 32, dtype=torch.float64, requires_grad=True),
            torch.zeros(1, dtype=torch.float64, requires_grad=True),
        ]
        self.trained = {
            "policy": [t for A, B, _ in self.policy.values() for t in (A, B)],
            "value": [t for A, B, _ in self.value.values() for t in (A, B)] + self.head,
        }
        self.adam = torch.optim.Adam(
            [{"params": self.trained["policy"]}, {"params": self.trained["value"]}], eps=1e-5
        )
        self.kl_coef, self.best, self.best_iteration, self.kept = o.kl_coef, -math.inf, None, None
        self.mean, self.std = MEAN, STD
        if standardise_on:
            raw = torch.tensor([self.raw_scores(d) for d in standardise_on], dtype=torch.float64)
            self.mean, self.std = raw.mean(0).tolist(), raw.std(0, correction=0).tolist()

    def hidden(self, weights, ids):
        return functional_call(
            self.model,
            weights,
            (torch.tensor([ids]),),
            dict(output_hidden_states=True, use_cache=False),
        ).hidden_states[-1][0]

    def logp(self, weights, d):
        """(L-1, V): row j is of token j + 1, at the temperature that samples."""
        return (
            self.hidden(weights, d.ids) @ weights["lm_head.weight"].T / self.o.temperature
        ).log_softmax(-1)[:-1]

    def values(self, d):
        return (
            self.hidden(fold(self.reference, self.value), d.ids)[:-1] @ self.head[0][0]
            + self.head[1]
        )

    @torch.no_grad()
    def raw_scores(self, d):
        found = []
        for k, (weights, head) in enumerate(self.reward_models):
            turn = d.turns[0 if self.o.reward_turns == "answer" else k]
            end = (
                turn.end if turn.truncated else turn.end - 1
            )  # where EOS stands, sampled or put there
            found.append(float(self.hidden(weights, d.ids[: end + 1])[-1] @ head))
        return found

    @torch.no_grad()
    def check_samples(self, records, dialogues, step):
        """Each token is the one in whose interval of the distribution its random number lies."""
        tokenizer = self.world.tokenizer
        policy = fold(self.reference, self.policy)
        for record, d in zip(records, dialogues, strict=True):
            ids = tokenizer.apply_chat_template(
                record["prompt"], add_generation_prompt=True, return_dict=False
            )
            assert d.id == record["id"] and len(d.turns) == (
                1 if self.o.reward_turns == "answer" else 3
            )
            cumulative = self.logp(policy, d).exp().cumsum(-1)
            for n, turn in enumerate(d.turns):
                if n:
                    ids = ids + tokenizer.encode(
                        f"[INST] {list(FOLLOW_UPS.values())[n - 1]}[/INST]",
                        add_special_tokens=False,
                    )
                assert d.ids[: turn.start] == ids
                uniforms = stream(self.o.seed, "ppo", step, d.id, 0, n).random(NEW)
                for t, u in zip(range(turn.start, turn.end), uniforms):
                    token, edges = d.ids[t], cumulative[t - 1]
                    assert (edges[token - 1] if token else 0) - 1e-4 < u < edges[token] + 1e-4, (
                        d.id,
                        n,
                        t,
                    )
                spoken = d.ids[turn.start : turn.end]
                assert (
                    (EOS in spoken) == (not turn.truncated)
                    and EOS not in spoken[:-1]
                    and (len(spoken) == NEW or not turn.truncated)
                )
                ids = ids + spoken + [EOS] * turn.truncated
            assert d.ids == ids

    def records(self, iteration):
        """The prompts in an order of their own for each pass over them."""
        size, prompts = self.o.rollout_size, self.prompts
        per_pass = len(prompts) // size
        order = stream(self.o.seed, "ppo", "order", (iteration - 1) // per_pass).permutation(
            len(prompts)
        )
        at = (iteration - 1) % per_pass * size
        return [prompts[i] for i in order[at : at + size]]

    def iterate(self, iteration, dialogues):
        """One iteration -> (metrics without times, rows of rollouts.jsonl)."""
        o, n = self.o, len(dialogues)
        self.check_samples(self.records(iteration), dialogues, iteration)
        with torch.no_grad():
            sampler = fold(self.reference, self.policy)
            rows = [
                SimpleNamespace(
                    d=d,
                    logp=self.logp(sampler, d),
                    ref=self.logp(self.reference, d),
                    v=self.values(d),
                )
                for d in dialogues
            ]
        scores, summed, penalised, advantages = [], [], [], []
        for row in rows:
            d = row.d
            row.spoken = [t for turn in d.turns for t in range(turn.start, turn.end)]
            row.old = {t: float(row.logp[t - 1, d.ids[t]]) for t in row.spoken}
            row.k1 = {t: row.old[t] - float(row.ref[t - 1, d.ids[t]]) for t in row.spoken}
            row.k3 = sum(math.exp(-k) - 1 + k for k in row.k1.values())
            s = [
                max(-o.score_clip, min(o.score_clip, (x - m) / sd))
                for x, m, sd in zip(self.raw_scores(d), self.mean, self.std)
            ]
            scores.append(s)
            pay = dict.fromkeys(row.spoken, 0.0)  # by token
            if o.aggregate in ("mean", "weighted"):
                for k, (x, w) in enumerate(
                    zip(s, o.weights if o.aggregate == "weighted" else (1 / 3,) * 3)
                ):
                    last = d.turns[min(k, len(d.turns) - 1)].end - 1
                    pay[max(t for t in row.spoken if t <= last)] += w * x
            else:
                pay[row.spoken[-1]] += aggregates(s, o)[o.aggregate]
            for turn in d.turns:
                pay[turn.end - 1] -= o.eos_penalty * turn.truncated
            row.reward = {t: pay[t] - self.kl_coef * row.k1[t] for t in row.spoken}
            summed.append(sum(row.reward.values()))
            penalised.append(sum(pay[t] - o.kl_coef * row.k1[t] for t in row.spoken))
            # A_i = sum_j (gamma lambda)^(j-i) delta_j over the trained tokens
            v = [float(row.v[t - 1]) for t in row.spoken] + [0.0]
            delta = [row.reward[t] + o.gamma * v[i + 1] - v[i] for i, t in enumerate(row.spoken)]
            row.adv = [
                sum((o.gamma * o.lam) ** (j - i) * delta[j] for j in range(i, len(delta)))
                for i in range(len(delta))
            ]
            row.returns = [a + x for a, x in zip(row.adv, v)]
            advantages += row.adv
        every = torch.tensor(advantages, dtype=torch.float64)
        spread = (every.var(correction=0) + 1e-8).sqrt()
        for row in rows:
            row.adv = [float((a - every.mean()) / spread) for a in row.adv]
        returns = torch.tensor([g for row in rows for g in row.returns], dtype=torch.float64)
        values = torch.tensor(
            [float(row.v[t - 1]) for row in rows for t in row.spoken], dtype=torch.float64
        )

        k1 = sum(sum(row.k1.values()) for row in rows) / n
        each = {name: sum(aggregates(s, o)[name] for s in scores) / n for name in AGGREGATORS}
        turns = [turn for d in dialogues for turn in d.turns]
        metrics = {
            "iteration": iteration,
            "objective/kl": k1,
            "objective/kl_k3": sum(row.k3 for row in rows) / n,
            "objective/kl_coef": self.kl_coef,
            "objective/score": each[o.aggregate],
            "objective/rlhf_reward": sum(summed) / n,
            "objective/selection": sum(penalised) / n,
            **{
                f"objective/score/{lens}": sum(s[k] for s in scores) / n
                for k, lens in enumerate(LENSES)
            },
            **{f"objective/aggregate/{name}": x for name, x in each.items()},
            "val/explained_variance": float(
                1 - (returns - values).var(correction=0) / returns.var(correction=0)
            ),
            "tokens/eos_rate": 1 - sum(turn.truncated for turn in turns) / len(turns),
            "tokens/length": sum(len(row.spoken) for row in rows) / n,
            "tokens/read": sum(len(d.ids) for d in dialogues),
        }
        if metrics["objective/selection"] > self.best:
            self.best, self.best_iteration = metrics["objective/selection"], iteration
            self.kept = {
                name: (A.detach().clone(), B.detach().clone(), s)
                for name, (A, B, s) in self.policy.items()
            }
        self.clipped_share = sum(abs(x) == o.score_clip for s in scores for x in s) / n / 3
        metrics |= self.update(iteration, rows)
        if o.kl_target:
            self.kl_coef *= 1 + max(-0.2, min(0.2, k1 / o.kl_target - 1)) * n / o.kl_horizon
        texts = [
            [
                self.world.tokenizer.decode(
                    d.ids[turn.start : turn.end], skip_special_tokens=True
                ).strip()
                for turn in d.turns
            ]
            for d in dialogues
        ]
        return metrics, [
            {
                "iteration": iteration,
                "id": row.d.id,
                "prompt": row.d.prompt[-1]["content"],
                "kl": sum(row.k1.values()),
                "scores": s,
                "turns": dict(zip(LENSES, t)),
            }
            for row, s, t in zip(rows, scores, texts)
        ]

    def update(self, iteration, rows):
        o, stats, steps = self.o, {}, 0
        rate = 1 - 0.9 * (iteration - 1) / max(1, o.iterations - 1)
        for group, lr in zip(self.adam.param_groups, (o.lr, o.value_lr)):
            group["lr"] = lr * rate
        for epoch in range(o.ppo_epochs):
            order = stream(o.seed, "ppo", iteration, epoch).permutation(len(rows)).tolist()
            for at in range(0, len(rows), o.minibatch_size):
                batch = [rows[i] for i in order[at : at + o.minibatch_size]]
                tokens, steps = sum(len(row.spoken) for row in batch), steps + 1
                weights, found = (
                    fold(self.reference, self.policy),
                    dict.fromkeys(
                        (
                            "policy/loss",
                            "value/loss",
                            "policy/entropy",
                            "policy/clip_frac",
                            "value/clip_frac",
                            "policy/approx_kl",
                            "policy/ratio",
                        ),
                        0.0,
                    ),
                )
                for row in batch:
                    logp, v = self.logp(weights, row.d), self.values(row.d)
                    for t, a, g in zip(row.spoken, row.adv, row.returns):
                        new, old, was = logp[t - 1, row.d.ids[t]], row.old[t], float(row.v[t - 1])
                        ratio = (new - old).exp()
                        plain, cut = (
                            -a * ratio,
                            -a * ratio.clamp(1 - o.clip_range, 1 + o.clip_range),
                        )
                        error, cut_error = (
                            (v[t - 1] - g) ** 2,
                            (v[t - 1].clamp(was - o.value_clip_range, was + o.value_clip_range) - g)
                            ** 2,
                        )
                        for name, x in {
                            "policy/loss": torch.maximum(plain, cut),
                            "value/loss": torch.maximum(error, cut_error) / 2,
                            "policy/entropy": -(logp[t - 1].exp() * logp[t - 1]).sum(),
                            "policy/clip_frac": float(cut > plain),
                            "value/clip_frac": float(cut_error > error),
                            "policy/approx_kl": (ratio - 1 - (new - old)).detach(),
                            "policy/ratio": ratio.detach(),
                        }.items():
                            found[name] = found[name] + x / tokens
                self.adam.zero_grad()
                (
                    found["policy/loss"]
                    + o.vf_coef * found["value/loss"]
                    - o.entropy_coef * found["policy/entropy"]
                ).backward()
                for name, parameters in self.trained.items():
                    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in parameters))
                    found[f"{name}/grad_norm"] = norm
                    for p in parameters:
                        p.grad *= min(1.0, o.max_grad_norm / (norm + 1e-6))
                if iteration <= o.value_warmup:
                    for p in self.trained["policy"]:
                        p.grad = None
                self.adam.step()
                for name, x in found.items():
                    stats[name] = stats.get(name, 0.0) + float(torch.as_tensor(x).detach())
        return {name: x / steps for name, x in stats.items()}


# ---- the comparison


CONSTANTS = dict(GAMMA=0.9, VF_COEF=0.3, VALUE_CLIP_RANGE=0.1, MAX_GRAD_NORM=0.06, SCORE_CLIP=0.9,
                 KL_HORIZON=8)


def run(world, out, monkeypatch, flags, *, die_at=None):
    """Runs the script -> (its flags and constants, the dialogues by step). It is stopped where it
    samples for the iteration `die_at`, and goes on with --resume."""
    for name, value in CONSTANTS.items():
        monkeypatch.setattr(run_ppo, name, value)
    taken, real = {}, virtue.generate.sample_dialogues

    def sample_dialogues(*args, **kwargs):
        nonlocal die_at
        if kwargs["step"] == die_at:
            die_at = None
            raise InterruptedError
        taken[kwargs["step"]] = real(*args, **kwargs)
        return taken[kwargs["step"]]

    monkeypatch.setattr(virtue.generate, "sample_dialogues", sample_dialogues)
    monkeypatch.setattr("virtue.evaluation.plots.available", lambda: False)
    flags = f"""--out {out} --model {world.at}/base --prompts {world.at}/prompts.jsonl {PPO}
        --limit {N_PROMPTS + 1} --max-new-tokens {NEW} {flags}""".split()
    if die_at:
        with pytest.raises(InterruptedError):
            run_ppo.main(flags)
        flags.append("--resume")
    run_ppo.main(flags)
    o = run_ppo.parse(flags)
    vars(o).update({name.lower(): value for name, value in CONSTANTS.items()})
    return o, taken


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compare(world, out, o, taken):
    """All that the script wrote against the oracle -> (the oracle at the end, its metrics)."""
    assert (-1 in taken) == (o.reward_turns == "answer")  # then it standardises anew
    oracle = Oracle(world, o, taken.get(-1))
    if -1 in taken:
        oracle.check_samples(oracle.prompts[: 4 * o.rollout_size], taken[-1], -1)
    logged, rollouts, wrote = lines(out / "metrics.jsonl"), lines(out / "rollouts.jsonl"), []
    for iteration, got in enumerate(logged, 1):
        want, rows = oracle.iterate(iteration, taken[iteration])
        wrote.append(want)
        got = {name: x for name, x in got.items() if not name.startswith("time/")}
        assert got == pytest.approx(want, rel=1e-3, abs=2e-4), iteration
        for want_row, got_row in zip(
            rows, rollouts[(iteration - 1) * o.rollout_size :], strict=False
        ):
            assert got_row.pop("scores") == pytest.approx(
                want_row.pop("scores"), abs=1e-4
            )
            assert (
                got_row.pop("kl") == pytest.approx(want_row.pop("kl"), abs=1e-3)
                and got_row == want_row
            )
        if o.stop_kl and want["objective/kl"] > o.stop_kl:
            break
    assert len(logged) == iteration and len(rollouts) == iteration * o.rollout_size
    assert iteration == o.iterations or o.stop_kl and want["objective/kl"] > o.stop_kl
    for folder, adapter in (
        (out, oracle.policy),
        (out / "value", oracle.value),
        (out / "best", oracle.kept),
    ):
        saved = adapter_of(folder)
        assert saved.keys() == adapter.keys()
        for name, (A, B, scale) in adapter.items():
            for got, want in (
                (saved[name][0], A),
                (saved[name][1] * saved[name][2], B * scale),
            ):  # best/ has alpha / r in its B
                torch.testing.assert_close(
                    got,
                    want.detach(),
                    rtol=0,
                    atol=0.02 * o.lr,
                    msg=lambda m, where=(folder, name): f"{where}: {m}",
                )
    state = load_file(out / "value/adapter_model.safetensors")
    for name, want in zip(("weight", "bias"), oracle.head):
        torch.testing.assert_close(
            state[f"base_model.model.score.{name}"].double(),
            want.detach(),
            rtol=0,
            atol=0.02 * o.value_lr,
        )
    extra, kept = (
        json.loads((folder / "virtue.json").read_text())["extra"] for folder in (out, out / "best")
    )
    assert extra["iterations"] == iteration and kept["iterations"] == oracle.best_iteration - 1
    assert (
        extra["kl_coef"] == pytest.approx(oracle.kl_coef, rel=1e-4)
        and extra["score_mean"] == pytest.approx(oracle.mean, abs=1e-3)
        and extra["score_std"] == pytest.approx(oracle.std, abs=1e-3)
    )
    return oracle, wrote


# a later flag overrides an earlier one
PPO = """
    --rollout-size 7 --minibatch-size 3 --micro-batch-size 2 --ppo-epochs 2 --rank 4 --lam 0.7
    --temperature 1.3 --lr 0.01 --value-lr 0.03 --entropy-coef 0.05 --clip-range 0.15
    --eos-penalty 0.2 --kl-coef 0.3 --max-prompt-tokens 90 --batch-size 5"""


# the short ones first


def test_mean_without_sft(world, tmp_path, monkeypatch):
    flags = f"""--rm {world.at}/bare --seed 7 --iterations 2 --value-warmup 0
        --rollout-size 4"""
    compare(world, tmp_path / "out", *run(world, tmp_path / "out", monkeypatch, flags))


def test_a_system_message_before_every_prompt(world, tmp_path, monkeypatch):
    """It is sampled from, at every step, and the ids, which key the random numbers, stay."""
    flags = f"""--rm {world.at}/bare --seed 1 --iterations 1 --value-warmup 0 --ppo-epochs 1
        --reward-turns answer --rollout-size 3 --system Brief. --limit 3"""
    _, taken = run(world, tmp_path / "out", monkeypatch, flags)
    texts = {p["id"]: p["prompt"][0]["content"] for p in world.prompts}
    assert {*taken} == {-1, 1}
    for d in (*taken[-1], *taken[1]):
        assert d.prompt == [
            {"role": "system", "content": "Brief."},
            {"role": "user", "content": texts[d.id]},
        ]
        read = world.tokenizer.decode(d.ids[: d.turns[0].start])
        assert read == f"<s> Brief.</s>[INST] {texts[d.id]}[/INST]"
    assert {row["prompt"] for row in lines(tmp_path / "out/rollouts.jsonl")} <= {*texts.values()}


def test_answers_alone_standardised_anew(world, tmp_path, monkeypatch):
    flags = f"""--sft {world.at}/sft --rm {world.at}/rm --seed 6 --iterations 2 --value-warmup 0
        --aggregate uwo --reward-turns answer --rollout-size 4"""
    compare(world, tmp_path / "out", *run(world, tmp_path / "out", monkeypatch, flags))


def test_min_killed_resumed_and_stopped(world, tmp_path, monkeypatch):
    flags = f"""--sft {world.at}/sft --rm {world.at}/rm --seed 0 --iterations 6 --value-warmup 0
        --aggregate min --save-every 1 --rollout-dtype fp32 --stop-kl 0.42 --limit 8 --kl-coef 0.11
        --lr 0.003"""
    o, taken = run(world, tmp_path / "out", monkeypatch, flags, die_at=3)
    oracle, wrote = compare(world, tmp_path / "out", o, taken)
    assert wrote[3]["objective/kl_k3"] < 0.42 < wrote[3]["objective/kl"] and len(wrote) == 4
    assert oracle.best_iteration == 2  # best/ was kept over the interruption


def test_weighted_paid_at_the_turns_with_warm_up_and_an_adaptive_coefficient(
    world, tmp_path, monkeypatch, capsys
):
    flags = f"""--sft {world.at}/sft --rm {world.at}/rm --seed 2 --iterations 4 --value-warmup 1
        --aggregate weighted --weights 0.2 0.7 0.4 --kl-target 0.35
        --eos-penalty 0.05 --kl-coef 0.05 --lr 0.006"""
    oracle, wrote = compare(
        world, tmp_path / "out", *run(world, tmp_path / "out", monkeypatch, flags)
    )
    # The settings leave no fault unseen: cut and ended turns, clipped scores and gradients, a KL
    # whose two estimates lie on two sides of the target, a best policy that is not the last.
    assert 0 < wrote[-1]["tokens/eos_rate"] < 1 and 0 < oracle.clipped_share < 1
    assert wrote[-1]["policy/grad_norm"] > 0.06 < wrote[0]["value/grad_norm"]
    assert wrote[2]["objective/kl_k3"] < 0.35 < wrote[2]["objective/kl"]
    assert oracle.best_iteration == 3 and wrote[1]["policy/ratio"] != 1
    said = r"score (\S+) -> .*penalties \((\S+), before iteration (\d)"
    found = re.search(said, capsys.readouterr().out, re.DOTALL).groups()
    expected = wrote[0]["objective/score"], oracle.best, 3
    assert tuple(map(float, found)) == pytest.approx(expected, abs=1e-3)
