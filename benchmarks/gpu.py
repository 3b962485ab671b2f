"""The Mistral-7B path on one GPU, on random weights of the true shape: loading, decoding, every
stage's script, the toy's gold.

    python benchmarks/gpu.py --out runs/gpu                                      # an H100 or H200:
    about 35 minutes, 15 GB of disk python benchmarks/gpu.py --out runs/gpu --part decode sft
    # some parts only; weights and artefacts of earlier calls are kept python benchmarks/gpu.py
    --out runs/gpu-small --shape small --device cpu     # the same path at a size for any machine:
    does it run?

Prints tables in Markdown, and adds them to OUT/results.md. Each part is a process of its own; one
that fails leaves the others be. rm reads what sft wrote, ppo, ppo-copy and trl what rm wrote, eval
what ppo wrote. trl needs --trl-python: an interpreter that imports TRL 1.12.0 (see ppo_step.py).

Random weights answer nothing and (nearly) never stop: every turn is as long as --max-new-tokens
allows, the worst case. In the tokenizer each id beyond the bytes is one Chinese or Korean
character, so whatever is sampled reads back as the same tokens.

The floor of a decode step is the bytes that it must read (weights, adapters, keys and values) over
the measured rate of a copy in memory. Model-FLOP utilisation (MFU): 2 N a token forward, 4 N
forward and back to the inputs (the base is frozen), with N the weights of the linear layers that
the pass runs through; attention, the adapters' own products and what checkpointing computes again
are left out; over the measured rate of a large product.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import re
import runpy
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from workload import HERE, ROOT, peak_mib

SHAPES = {
    "7b": dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
    ),
    "small": dict(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
    ),
}
# 7b: README's flags for 24 GB. decode: rows; steps: new tokens of ours and of what is launched one
# by one; data: how many prompts are sampled from; sft, rm: (rows a pass, passes a step, steps);
# ppo: (batch, rollout, minibatch, micro-batch); trl: (rows, micro-batch)
SIZES = {
    "7b": dict(
        prompt=256,
        new=128,
        decode=(1, 16, 64, 256),
        steps=(98, 18),
        sft=(4, 4, 4),
        rm=(4, 8, 3),
        ppo=(32, 64, 16, 8),
        judge=4,
        data=32,
        trl=(32, 2),
    ),
    "small": dict(
        prompt=48,
        new=8,
        decode=(1, 4),
        steps=(6, 4),
        sft=(2, 2, 2),
        rm=(2, 2, 2),
        ppo=(8, 16, 8, 4),
        judge=4,
        data=4,
        trl=(8, 4),
    ),
}
PARTS = ("same", "decode", "sft", "rm", "ppo", "ppo-copy", "eval", "data", "demo", "trl")
# GiB that torch may reserve in the stages said to fit 24 GB: CUDA itself takes up to one
CAP = 23.0
SPECIAL = ("<pad>", "<s>", "</s>", "[INST]", "[/INST]")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "[INST]{{ m['content'] }}[/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
# 32,164: one for each id
CHARACTERS = "".join(map(chr, (*range(0x4E00, 0xA000), *range(0xAC00, 0xD7A4))))
DEMO = (
    ("run_data.py", "revisions"),
    ("run_sft.py",),
    ("run_data.py", "preferences"),
    ("run_rm.py",),
    ("run_ppo.py",),
    ("run_eval.py", "models"),
)  # the Makefile's
DEMO_FLAGS = (
    "--out {}/revisions",
    "--data {}/revisions --out {}/sft",
    "--sft {}/sft --out {}/preferences",
    "--data {}/preferences --out {}/rm",
    "--rm {}/rm --out {}/policy",
    "--policy {}/policy --out {}/report",
)
DEMO_SMALL = (
    "--limit 24",
    "--epochs 1",
    "--limit 12 --any-judge",
    "--epochs 1",
    "--iterations 1 --value-warmup 0 --rollout-size 8 --minibatch-size 8",
    "--limit 8 --judge-limit 2",
)


class Bench:
    """What all parts share: the flags, the folders, the report."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device, self.out, self.size = (
            args,
            args.device,
            args.out.resolve(),
            dict(SIZES[args.shape]),
        )
        if args.micro_batch:  # as many rows a step, in fewer and larger passes
            for part in ("sft", "rm"):
                rows, passes, steps = self.size[part]
                micro = min(args.micro_batch, rows * passes)
                self.size[part] = micro, rows * passes // micro, steps
            self.size["ppo"] = (*self.size["ppo"][:3], min(args.micro_batch, self.size["ppo"][2]))
        # On a CPU bf16 is a hundred times slower
        self.dtype = "bf16" if self.device == "cuda" else "fp32"
        self.model = self.out / "model"

    def say(self, *lines: str) -> None:
        text = "\n".join(lines)
        print(text, flush=True)
        with open(self.out / "results.md", "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def script(self, *command, cap: bool = True) -> dict:
        """Runs one of the scripts as a user does, by `inside`; says what it took -> its peaks,
        seconds and plan (GiB)."""
        cap = cap and not self.args.micro_batch
        words = [*map(str, command), "--device", self.device, "--overwrite"]
        result, start = self.out / "peak.json", time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, "inside", str(CAP if cap else 0), str(result), *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode and cap and "out of memory" in done.stderr:
            self.say(f"\n**{words[0]} does not fit into {CAP:.0f} GiB**; again without that limit:")
            return self.script(*command, cap=False)
        if done.returncode:
            sys.exit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
        found = {"seconds": time.perf_counter() - start} | json.loads(result.read_text())
        plan = re.search(r"greatest +(\w+) +([\d.]+)", done.stdout)
        self.say(
            "",
            f"    {' '.join(words)}",
            "",
            *(f"    {line}"[:200] for line in done.stdout.splitlines()[-3:]),
            "",
            f"{found['seconds']:.0f} s in all, with loading. Host memory: at most "
            f"{found['host']:.1f} GiB. "
            + (
                f"On the device: at most {found['allocated']:.2f} GiB allocated, "
                f"{found['reserved']:.2f} reserved"
                if "reserved" in found
                else "No CUDA, so no device memory"
            )
            + (f"; planned {plan[2]} ({plan[1]})." if plan else "."),
        )
        if "reserved" in found:
            fits = found["reserved"] <= CAP
            self.say(
                f"Fits a card of 24 GB ({CAP:.0f} GiB beside CUDA's own): "
                f"{'yes' if fits else 'no'}{', and ran under that limit' if cap else ''}."
            )
        return found

    def lines(self, folder: str) -> list[dict]:
        return [
            json.loads(line)
            for line in (self.out / folder / "metrics.jsonl").read_text().splitlines()
        ]

    def rates(self) -> tuple[float, float]:
        """Bytes a second of a copy in memory, read and written; operations a second of a large
        product: best of 5, after one that warms up."""
        import torch
        cuda = self.device == "cuda"
        source = torch.ones(2**30 if cuda else 2**26, dtype=torch.uint8, device=self.device)
        target, n = torch.empty_like(source), 8192 if cuda else 1024
        a, b = torch.randn(
            2, n, n, device=self.device, dtype=torch.bfloat16 if cuda else torch.float32
        )
        c = torch.empty_like(a)
        copy, product = (
            min(self.clocked(lambda f=f: [f() for _ in range(10)]) for _ in range(6)) / 10
            for f in (lambda: target.copy_(source), lambda: torch.mm(a, b, out=c))
        )
        return 2 * source.nbytes / copy, 2 * n**3 / product

    def clocked(self, function) -> float:
        import torch
        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        function()
        wait()
        return time.perf_counter() - start

    def weights_of(self) -> tuple[int, int]:
        """Weights of all decoder layers' linears, and of lm_head."""
        from virtue.plumbing.memory import linears
        from virtue.plumbing.loading import read_config
        sizes = {name: i * o * n for name, (i, o, n) in linears(read_config(self.model)).items()}
        return sum(sizes.values()) - sizes["lm_head"], sizes["lm_head"]

    def table(self, rows: list[tuple[str, float, float]]) -> None:
        """(part, seconds, operations) as a table with MFU."""
        _, rate = self.rates()
        self.say(
            "",
            f"A large product in {self.dtype}: {rate / 1e12:.3g} TFLOP/s.",
            "",
            "| part | s | model TFLOP | TFLOP/s | MFU |",
            "|---|---:|---:|---:|---:|",
            *(
                f"| {name} | {seconds:.2f} | {work / 1e12:.3g} | {work / seconds / 1e12:.3g} "
                f"| {work / seconds / rate:.1%} |"
                for name, seconds, work in rows
            ),
        )


def inside(cap: str, result: str, script: str, *flags: str) -> None:
    """One of the scripts in this process, with at most `cap` GiB of the device (0: all of it); its
    peaks go to the file `result`."""
    import torch
    cuda, code = flags[flags.index("--device") + 1] == "cuda", 0
    if cuda and float(cap):
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, float(cap) * 2**30 / torch.cuda.get_device_properties(0).total_memory))
    sys.argv = [script, *flags]
    sys.path.insert(0, str(ROOT))
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:  # as each script ends
        code = end.code
    peaks = {"allocated": torch.cuda.max_memory_allocated() / 2**30,
             "reserved": torch.cuda.max_memory_reserved() / 2**30} if cuda else {}
    Path(result).write_text(json.dumps({"host": peak_mib() / 1024} | peaks))
    sys.exit(code)


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """Bytes, the words of the method's own questions, and one character for each id that is left:
    every id of these is a text, and that text this id."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {word
             for word, _ in level.pre_tokenize_str((ROOT / "virtue/ethics.py").read_text("utf-8"))
             if word.removeprefix("Ġ").isascii() and word.removeprefix("Ġ").isalpha()}
    tokens = [*SPECIAL, *sorted(level.alphabet()), *sorted(words - set(level.alphabet()))]
    spelled = level.pre_tokenize_str(CHARACTERS)
    spelled = "".join(piece for piece, _ in spelled)  # three bytes each
    tokens += [spelled[i:i + 3] for i in range(0, len(spelled), 3)][:vocab_size - len(tokens)]
    assert len(set(tokens)) == vocab_size, f"{len(set(tokens))} tokens, not {vocab_size}"
    # a piece that is a token stays one; others become bytes
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[\u4e00-\u9fff\uac00-\ud7a3]"), "isolated"), level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>",
                            eos_token="</s>", padding_side="left",
                            chat_template=TEMPLATE).save_pretrained(folder)


def make_weights(b: Bench) -> None:
    """A random bf16 model, one file a layer, never held whole, and its tokenizer, made once."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, MistralConfig

    shape, index = SHAPES[b.args.shape], b.model / "model.safetensors.index.json"
    if index.exists():
        return
    b.model.mkdir(exist_ok=True)
    config = MistralConfig(**shape, sliding_window=None, rope_theta=1e6, pad_token_id=0,
                           bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
                           dtype="bfloat16", architectures=["MistralForCausalLM"])
    config.save_pretrained(b.model)
    make_tokenizer(b.model, shape["vocab_size"])
    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(config).state_dict()
    files, place = {}, {}
    for name, tensor in wanted.items():
        part = f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors"
        files.setdefault(part, {})[name] = tensor.shape
    torch.manual_seed(0)
    # drawn on the device, since a CPU needs minutes for 7 billion numbers
    for part, shapes in files.items():
        made = {n: torch.ones(s) if "norm" in n
                else torch.empty(s, device=b.device).normal_(std=0.02) for n, s in shapes.items()}
        save_file({n: t.to("cpu", torch.bfloat16) for n, t in made.items()}, b.model / part,
                  metadata={"format": "pt"})
        place |= dict.fromkeys(shapes, part)
    index.write_text(
        json.dumps({"metadata": {"total_size": 2 * sum(t.numel() for t in wanted.values())},
                    "weight_map": place}))  # last: without it all is made again


def same(b: Bench) -> None:
    """The toy in fp32 on the device and on the CPU, the dialogues of the CPU's policy read on both:
    what the tests hold on a CPU alone."""
    import torch
    from virtue.dialogue import messages_of, right_pad
    from virtue.plumbing.records import load_prompts
    from virtue.generate import sample_dialogues
    from virtue.judge import judge_pairs
    from virtue.toy.words import WORDS
    from virtue.lora import LoRALinear, adapter_parameters, add_adapter, use_stack
    from virtue.models import logprobs_at
    from virtue.plumbing.loading import load_model, load_tokenizer

    tokenizer, prompts, found = load_tokenizer("toy"), load_prompts("toy", "eval", 16), []
    dialogues = []
    for device in ("cpu", b.device):
        model = load_model("toy", device=device)
        add_adapter(model, "policy", rank=16, alpha=32)
        policy = adapter_parameters(model, "policy")
        optimizer = torch.optim.Adam(policy, lr=1e-3)
        sampling = dict(seed=0, stage="same", max_new_tokens=48, temperature=1.0, batch_size=16)
        with use_stack(model, "policy"):
            # B is zero, so these are the base's
            dialogues.append(sample_dialogues(model, tokenizer, prompts, **sampling))
            ids, attention = (t.to(device) for t in right_pad([d.ids for d in dialogues[0]], 0))
            for _ in range(3):
                read = logprobs_at(model, ids, attention, attention[:, 1:].bool())
                read.mean().backward()
                gradient = torch.cat([p.grad.flatten() for p in policy])
                optimizer.step(), optimizer.zero_grad()
            with torch.no_grad():
                folded = logprobs_at(model, ids, attention, attention[:, 1:].bool())
                model.apply(lambda m: setattr(m, "folded", m.plain)
                            if isinstance(m, LoRALinear) else None)
                plain = logprobs_at(model, ids, attention, attention[:, 1:].bool())
        texts = [messages_of(tokenizer, d) for d in dialogues[0]]
        with use_stack(model):
            judged, _ = judge_pairs(model, tokenizer, WORDS, list(zip(texts[::2], texts[1::2])),
                                    "consequence")
        found.append({"log-probs after three optimiser steps, nats": folded.cpu(),
                      "the same by the plain path": plain.cpu(),
                      "gradients of the third step, over the greatest": gradient.cpu(),
                      "the judge's probabilities": judged})
    scale = found[0]["gradients of the third step, over the greatest"].abs().max()
    equal = sum(x.ids == y.ids for x, y in zip(*dialogues))
    gaps_of = {name: (found[0][name] - found[1][name]).abs().max()
               / (scale if "gradients" in name else 1) for name in found[0]}
    b.say("", f"Sampled from the same random numbers: {equal} of {len(prompts)} dialogues have the "
              "same tokens.", "",
          f"| fp32, toy | cpu against {b.device}, greatest difference |", "|---|---:|",
          *(f"| {name} | {gap:.1e} |" for name, gap in gaps_of.items()),
          f"| folded against plain, both on {b.device} | {(folded - plain).abs().max():.1e} |")


def decode(b: Bench) -> None:
    import numpy as np
    import torch
    import transformers
    from virtue.dialogue import left_pad
    from virtue.generate import sample
    from virtue.lora import adapter_parameters, add_adapter, flatten, sampling_copy, use_stack
    from virtue.models import DTYPES
    from virtue.plumbing.loading import load_model

    transformers.logging.set_verbosity_error()
    import bitsandbytes  # noqa: F401 (imports and CUDA's start are no part of loading)
    from transformers.models.mistral import modeling_mistral  # noqa: F401
    torch.zeros(1, device=b.device)
    made = []
    seconds = b.clocked(lambda: made.append(load_model(b.model, quantize="nf4", dtype=b.dtype,
                                                       device=b.device)))
    model, = made
    held = (f"on the device {torch.cuda.memory_allocated() / 2**30:.2f} GiB, at most "
            f"{torch.cuda.max_memory_allocated() / 2**30:.2f}; " if b.device == "cuda" else "")
    b.say("", f"Loaded and quantised to NF4 in {seconds:.1f} s (files just written, so mostly from "
          f"the page cache); {held}host memory at most {peak_mib() / 1024:.2f} GiB.")
    torch.manual_seed(0)
    for seed, name in enumerate(("sft", "policy")):  # as PPO samples: both, flattened to rank 32
        add_adapter(model, name, rank=16, alpha=32, seed=seed)
        # like trained ones they must change the output
        for B in adapter_parameters(model, name)[1::2]:
            B.data.normal_(std=0.002)
    flatten(model, ("sft", "policy"), "rollout", DTYPES[b.dtype])
    copy, config, rng = sampling_copy(model, DTYPES[b.dtype]), model.config, random.Random(0)
    rate, _ = b.rates()
    floors = {"NF4": weights_read(model), (copied := f"{b.dtype} copy"): weights_read(copy)}
    linears = [m.weight for m in model.modules()
               if getattr(getattr(m, "weight", None), "quant_state", None) is not None]
    from bitsandbytes.functional import dequantize_4bit

    def dequantise():
        for w in linears:
            dequantize_4bit(w.data, w.quant_state)
    once = min(b.clocked(dequantise) for _ in range(4))  # the first warms up
    read = " and ".join(f"{n / 1e9:.3g} GB ({name})" for name, n in floors.items())
    b.say(f"Memory is copied at {rate / 1e9:.0f} GB/s. A step reads {read} of weights and "
          f"adapters. Dequantising all {len(linears)} NF4 weights once takes {once:.4f} s.", "",
          f"Prompts of {b.size['prompt']} tokens and up to a quarter less; medians of 3. One by "
          "one: its kernels launched without the graph. Recorded in: what the graph costs each "
          "call. Own kernel: how many of the products bitsandbytes does from 4 bits; it "
          "dequantises the weight first for the others. Busy: the GPU's own time in one step "
          "(profiler), and of it dequantising.", "",
          "| rows | weights | s a step | over its floor | without LoRA | one by one | recorded in, "
          "s | generate, s a step | generate / ours | own kernel | busy, s | dequantising, s | "
          "kernels |", "|---:|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|")
    found, (many, few) = {}, b.size["steps"]
    for rows in b.size["decode"]:
        # unequal prompts, the first whole: of equal ones `generate` may leave out its mask,
        # which dialogues never let it
        lengths = [b.size["prompt"] - 7 * i % (b.size["prompt"] // 4) for i in range(rows)]
        batch = [[rng.randrange(300, config.vocab_size) for _ in range(length)]
                 for length in lengths]
        ids, mask = (t.to(b.device) for t in left_pad(batch, 0))
        for name, which in (("NF4", model), (copied, copy)):
            def ours(n, stack=("rollout",), one_shape=True, which=which, batch=batch):
                with use_stack(which, *stack):
                    sample(which, batch, np.random.default_rng(0).random((len(batch), n)),
                           eos_id=-1, pad_id=0, one_shape=one_shape)

            def theirs(n, which=which, ids=ids, mask=mask):
                with use_stack(which, "rollout"), torch.no_grad():
                    which.generate(input_ids=ids, attention_mask=mask.long(), do_sample=True,
                                   top_k=0, top_p=1.0, max_new_tokens=n, min_new_tokens=n,
                                   pad_token_id=0)

            def step(run, n, repeats=3):  # both runs hold the prompt's pass, and the recording
                run(2)
                return statistics.median((b.clocked(lambda: run(n)) - b.clocked(lambda: run(2)))
                                         / (n - 2) for _ in range(repeats))

            each, bare = step(ours, many), step(lambda n, ours=ours: ours(n, ()), many, 1)
            recorded = statistics.median(b.clocked(lambda: ours(2)) - b.clocked(lambda: ours(1))
                                         for _ in range(3)) - each
            plain, other = (step(lambda n, ours=ours: ours(n, one_shape=False), few, 1),
                            step(theirs, few)) if rows <= 64 else (float("nan"),) * 2
            cache = (2 * rows * config.num_key_value_heads * config.head_dim
                     * config.num_hidden_layers * (b.size["prompt"] + many)
                     * DTYPES[b.dtype].itemsize)
            over = each / ((floors[name] + cache) / rate)
            with use_stack(which, "rollout"):
                busy = profiled(which, ids, mask) if b.device == "cuda" else ("", "", "")
            found[rows, name] = over, other / each
            own = own_kernel(linears, rows, DTYPES[b.dtype]) if name == "NF4" else ""
            b.say(f"| {rows} | {name} | {each:.4f} | {over:.2f} | {bare:.4f} | {plain:.4f} | "
                  f"{recorded:.2f} | {other:.4f} | {other / each:.2f} | {own} | "
                  f"{' | '.join(busy)} |")
    if (64, copied) in found:
        over = found[64, copied][0]
        ratios = ", ".join(f"{rows} {name} {verdict(ratio >= 3)} ({ratio:.2f})"
                           for (rows, name), (_, ratio) in found.items() if rows <= 16)
        b.say("", f"Targets: the {copied} at 64 rows at most 2 times its floor: "
              f"{verdict(over <= 2)} ({over:.2f}); generate / ours at least 3 at 16 rows and "
              f"below: {ratios}.")
    by_copy = {"NF4": gaps(model, config.vocab_size), copied: gaps(copy, config.vocab_size)}
    differ = "; ".join(f"{name} mean {gap.mean():.4f}, at most {gap.max():.4f}"
                       for name, gap in by_copy.items())
    b.say("", "Log-probs of 16 x 32 sampled tokens, read by the decode steps and by a plain "
          f"forward pass of the two adapters in fp32, differ in nats by: {differ}.")


def gaps(model, vocab_size: int, rows: int = 16, width: int = 64, steps: int = 32):
    """|log p of decode steps of one shape - log p of one plain forward pass|, (rows, steps), nats,
    of the same tokens after prompts of unequal length."""
    import torch
    from virtue.generate import cache_with_room, steps_of_one_shape
    from virtue.lora import use_stack
    from virtue.models import logprobs_at

    device = model.model.embed_tokens.weight.device
    ids = torch.randint(300, vocab_size, (rows, width + steps),
                        generator=torch.Generator().manual_seed(0)).to(device)
    # padded on the left
    mask = torch.arange(width + steps, device=device) >= torch.arange(rows, device=device)[:, None]
    position, column = (mask.cumsum(1) - 1).clamp(min=0), torch.tensor([width], device=device)
    cache, found = cache_with_room(model.config, steps, column), []
    with torch.no_grad(), use_stack(model, "rollout"):
        logits = model(input_ids=ids[:, :width], attention_mask=mask[:, :width],
                       position_ids=position[:, :width], past_key_values=cache, use_cache=True,
                       logits_to_keep=1).logits[:, -1]
        step = steps_of_one_shape(model, cache, column, mask, position[:, width - 1:width])
        for k in range(steps):
            found.append(logits.float().log_softmax(-1).gather(1, ids[:, width + k, None]))
            logits = step(ids[:, width + k])
    sampled = torch.zeros(rows, width + steps - 1, dtype=torch.bool, device=device)
    sampled[:, width - 1:] = True
    with torch.no_grad(), use_stack(model, "sft", "policy"):
        plain = logprobs_at(model, ids, mask, sampled)[:, width - 1:]
    return (torch.cat(found, 1) - plain).abs().cpu()


def verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def weights_read(model) -> int:
    """Bytes that a decode step reads: all weights but the embeddings, 4-bit ones with their scales,
    and the adapter "rollout"."""
    total = 0
    for name, p in model.named_parameters():
        if "embed_tokens" in name or "lora_" in name and not name.endswith(".rollout"):
            continue
        state = getattr(p, "quant_state", None)
        total += p.nbytes + (0 if state is None else state.absmax.nbytes
                             + (state.state2.absmax.nbytes if state.nested else 0))
    return total


def own_kernel(weights: list, rows: int, dtype) -> str:
    """Of how many 4-bit products of so many rows bitsandbytes (0.50) uses its own kernel."""
    try:
        from bitsandbytes.backends.cuda import ops
        shapes = [w.quant_state.shape for w in weights]
        own = sum(rows <= ops._gemm_4bit_custom_max_m
                  and bool(ops._gemm_4bit_use_custom_fn(0, dtype, rows, n, k)) for n, k in shapes)
        return f"{own} of {len(shapes)}"
    except Exception:  # no GPU, or another version: its names are private
        return "not read"


def profiled(model, ids, mask) -> tuple[str, str, str]:
    """The GPU's seconds in one decode step, those of dequantising, and the number of kernels."""
    try:
        import torch
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile
        from virtue.generate import cache_with_room, steps_of_one_shape

        width, position = ids.shape[1], (mask.cumsum(1) - 1).clamp(min=0)
        column = torch.tensor([width], device=ids.device)
        cache = cache_with_room(model.config, 2, column)
        whole = torch.cat([mask, mask.new_ones(len(mask), 2)], 1).bool()
        with torch.no_grad():  # as `generate.sample` does
            model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache,
                  use_cache=True, logits_to_keep=1)
            step = steps_of_one_shape(model, cache, column, whole, position[:, -1:])
            step(ids[:, -1])
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
                step(ids[:, -1])
                torch.cuda.synchronize()
        kernels = [e for e in record.key_averages() if e.device_type == DeviceType.CUDA]

        def time_of(events):
            return sum(e.self_device_time_total for e in events) / 1e6  # microseconds
        return (f"{time_of(kernels):.4f}",
                f"{time_of(e for e in kernels if 'dequant' in e.key.lower()):.4f}",
                str(sum(e.count for e in kernels)))
    except Exception as error:  # CUPTI may be closed to this user: the timings above are worth more
        return f"not read ({type(error).__name__})", "", ""


def text(rng: random.Random, tokens: int, vocab_size: int) -> str:
    """A text of so many tokens."""
    known = CHARACTERS[:vocab_size - 700]  # at least so many ids are characters
    return "".join(rng.choices(known, k=tokens))


def made_prompts(b: Bench) -> Path:
    """A file of prompts of full length, enough in every split that is sampled from."""
    from virtue.dialogue import prompt_record, split
    from virtue.plumbing.artefacts import write_jsonl

    rng, path = random.Random(1), b.out / "prompts.jsonl"
    want, found = {"rm": b.size["data"], "ppo": b.size["ppo"][1], "eval": b.size["data"]}, []
    while any(want.values()):
        # 3 tokens are BOS, [INST] and [/INST]
        record = {"prompt": text(rng, b.size["prompt"] - 3, SHAPES[b.args.shape]["vocab_size"])}
        part = split(prompt_record([{"role": "user", "content": record["prompt"]}])["id"])
        if want.get(part):
            want[part] -= 1
            found.append(record)
    write_jsonl(path, found)
    return path


def common(b: Bench) -> list:
    return ["--model", b.model, "--quantize", "nf4", "--dtype", b.dtype,
            "--prompts", made_prompts(b), "--max-new-tokens", b.size["new"],
            "--max-prompt-tokens", b.size["prompt"]]


def made_data(b: Bench, stage: str, n: int) -> Path:
    """Revisions or preferences as run_data.py leaves them, n records of full length (a lens)."""
    from virtue.plumbing.artefacts import data_hash, write_jsonl, write_manifest
    from virtue.dialogue import QUESTIONS, encode_conversation
    from virtue.dialogue import prompt_record
    from virtue.ethics import LENSES, VIRTUES
    from virtue.plumbing.loading import base_fingerprint, load_tokenizer, template_fingerprint

    rng, tokenizer, new = random.Random(2), load_tokenizer(b.model), b.size["new"]
    vocab_size = SHAPES[b.args.shape]["vocab_size"]
    folder = b.out / f"made-{stage}"
    folder.mkdir(exist_ok=True)
    def said(role: str, tokens: int) -> dict:
        return {"role": role, "content": text(rng, tokens, vocab_size)}

    prompts = [prompt_record([said("user", b.size["prompt"] - 3)]) for _ in range(n)]
    parents, files = {}, {}
    if stage == "revisions":
        files["revisions.jsonl"] = [{**p, "initial": "a", "critique": "b",
                                     "revision": text(rng, new, vocab_size), "virtue": VIRTUES[0],
                                     "truncated": True} for p in prompts]
    else:
        parents, dialogues = {"sft": b.out / "sft"}, []

        def dialogue(p):
            turns = [said("assistant", new)]
            for question in QUESTIONS:
                turns += [{"role": "user", "content": question}, said("assistant", new)]
            return p["prompt"] + turns
        pairs = [(p, dialogue(p), dialogue(p)) for p in prompts]
        for k, lens in enumerate(LENSES):
            files[f"{lens}.jsonl"] = [
                {"id": p["id"], "lens": lens, "chosen": x[:2 * k + 2], "rejected": y[:2 * k + 2],
                 "virtues": dict.fromkeys(VIRTUES, 0.7), "label": 0.7, "votes": 5,
                 "position_flips": 0, "truncated": True} for p, x, y in pairs]
        for p, *sides in pairs:
            for side in sides:
                ids, spans = encode_conversation(tokenizer, side)
                assert [end - start for start, end in spans] == [new + 1] * 3
                assert spans[0][0] == b.size["prompt"]  # a character a token, and EOS
                dialogues.append({"id": p["id"], "prompt": p["prompt"], "ids": ids,
                                  "turns": [[start, end - 1, True] for start, end in spans]})
        files["dialogues.jsonl"] = dialogues
    for name, records in files.items():
        write_jsonl(folder / name, records)
    settings = {"model": str(b.model), "quantize": "nf4", "dtype": b.dtype,
                "prompts": str(made_prompts(b)), "max_prompt_tokens": b.size["prompt"],
                "max_new_tokens": new, "temperature": 1.0, "out": str(folder),
                **{role: str(path) for role, path in parents.items()}}
    write_manifest(folder, stage=stage,
                   base={"id": str(b.model), "fingerprint": base_fingerprint(b.model)},
                   template=template_fingerprint(tokenizer), parents=parents,
                   settings=settings, seed=0, sha256=data_hash(folder, files))
    return folder


def of_full_steps(rows: int, share: float) -> int:
    """The least number of records of which `rows` are left to train on beside the share."""
    return next(n for n in range(rows, 3 * rows) if n - round(n * share) == rows)


def sft(b: Bench) -> None:
    rows, passes, steps = b.size["sft"]
    b.script("run_sft.py",
             "--data", made_data(b, "revisions", of_full_steps(rows * passes * steps, 0.1)),
             "--out", b.out / "sft", "--lr", "1e-5", "--epochs", 1,
             "--batch-size", rows, "--accumulation", passes,
             "--gradient-checkpointing", "--max-tokens", b.size["prompt"] + b.size["new"] + 1)
    layers, head = b.weights_of()
    step = [m for m in b.lines("sft") if "time/seconds" in m][1:]
    read = statistics.median(m["tokens/read"] for m in step)
    answered = rows * passes * (b.size["new"] + 1)
    b.table([(f"one SFT step, {rows * passes} conversations, {read:.0f} tokens",
              statistics.median(m["time/seconds"] for m in step),
              4 * (layers * read + head * answered))])


def rm(b: Bench) -> None:
    from virtue.ethics import LENSES
    from virtue.generate import longest

    rows, passes, steps = b.size["rm"]
    b.script("run_rm.py",
             "--data", made_data(b, "preferences", of_full_steps(rows * passes * steps, 0.15)),
             "--sft", b.out / "sft", "--out", b.out / "rm", "--lr", "1e-5",
             "--epochs", 1, "--batch-size", rows, "--accumulation", passes,
             "--gradient-checkpointing", "--max-tokens", longest(b.size["prompt"], b.size["new"]))
    layers, _ = b.weights_of()
    found = []
    for lens in LENSES:
        step = [m for m in b.lines(f"rm/{lens}") if "time/seconds" in m][1:]
        read = statistics.median(m["tokens/read"] for m in step)
        found.append((f"one reward-model step, {lens}, {rows * passes} pairs, {read:.0f} tokens",
                      statistics.median(m["time/seconds"] for m in step), 4 * layers * read))
    b.table(found)


def ppo(b: Bench, copy: bool = False) -> None:
    """README's flags for 24 GB; with `copy` sampling from dequantised weights,
    which takes 14.5 GB more and is for larger cards."""
    from virtue.dialogue import QUESTIONS, followup_ids
    from virtue.plumbing.loading import load_tokenizer

    batch, rollout, minibatch, micro = b.size["ppo"]
    folder, epochs, new = "policy-copy" if copy else "policy", 2, b.size["new"]
    b.script("run_ppo.py", "--rm", b.out / "rm", "--out", b.out / folder, "--lr", "1e-5",
             "--value-lr", "1e-5", "--lam", "1.0", "--batch-size", batch, "--rollout-size", rollout,
             "--minibatch-size", minibatch, "--micro-batch-size", micro, "--gradient-checkpointing",
             "--iterations", 2, "--value-warmup", 0, "--ppo-epochs", epochs,
             *(["--rollout-dtype", b.dtype] if copy else []), cap=not copy)
    m, tokenizer, (layers, head) = b.lines(folder)[-1], load_tokenizer(b.model), b.weights_of()
    asked = [len(followup_ids(tokenizer, question)) for question in QUESTIONS]
    before = [b.size["prompt"] + k * (new + 1) + sum(asked[:k]) for k in range(3)]
    read, answered = m["tokens/read"], m["tokens/length"] * rollout
    # each reward model reads up to its own turn; sampling reads each token once
    scored = sum(start + new + 1 for start in before) * rollout
    work = {"sample": 2 * layers * read + 2 * head * answered,
            "score": 2 * layers * (scored + 3 * read) + 4 * head * answered,
            "update": epochs * (2 * 4 * layers * read + 4 * head * answered)}
    b.table([*((f"PPO, {name}", m[f"time/{name}"], operations)
               for name, operations in work.items()),
             ("PPO, one iteration", m["time/seconds"], sum(work.values()))])
    b.say("",
          f"{rollout} dialogues of three turns, {m['tokens/length']:.0f} sampled tokens each (at "
          f"most {3 * new}), {read:.0f} tokens read, three reward models, the second iteration.")


def evaluation(b: Bench) -> None:
    b.script("run_eval.py", "models", "--policy", b.out / "policy", "--out", b.out / "report",
             "--batch-size", b.size["ppo"][0], "--judge-batch-size", b.size["judge"],
             "--limit", b.size["data"], "--judge-limit", b.size["judge"] * 2, "--show", 1)


def data(b: Bench) -> None:
    """Sampling and judging of preferences; of revisions only the sampling is the same."""
    b.script("run_data.py", "preferences", *common(b), "--sft", b.out / "sft",
             "--truncated", "keep", "--limit", b.size["data"], "--batch-size", b.size["ppo"][0],
             "--judge-batch-size", b.size["judge"], "--any-judge", "--out", b.out / "preferences")


def demo(b: Bench) -> None:
    """The Makefile's demo, one process a chain, on the device and on the CPU, all chains at once;
    a call that was killed goes on."""
    seeds, devices = b.args.seeds, [*dict.fromkeys((b.device, "cpu"))]
    free = (os.cpu_count() or 1) - (len(seeds) if b.device == "cuda" else 0)
    threads = {"cuda": 1, "cpu": max(1, free // len(seeds))}
    small = DEMO_SMALL if b.args.shape == "small" else [""] * len(DEMO)

    def chain(device: str, seed: int) -> tuple[dict, float]:
        folder, start = b.out / f"demo-{device}-{seed}", time.perf_counter()
        done = (folder / "report/scores.json").exists()  # an earlier call's, or another machine's
        for words, flags, less in [] if done else zip(DEMO, DEMO_FLAGS, small):
            command = [sys.executable, str(ROOT / words[0]), *words[1:],
                       *flags.format(folder, folder).split(), *less.split(), "--seed", str(seed),
                       "--device", device, "--resume"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                                  env=os.environ | {"OMP_NUM_THREADS": str(threads[device])})
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        models = json.loads((folder / "report/scores.json").read_text())["models"]
        return ({name: models[name]["gold"] for name in ("base", "sft", "ppo")},
                time.perf_counter() - start)

    keys = [(device, seed) for device in devices for seed in seeds]
    with ThreadPoolExecutor(len(keys)) as pool:
        found = dict(zip(keys, pool.map(lambda key: chain(*key), keys)))
    b.say("", f"Seconds of each chain, {len(keys)} at once: "
          + ", ".join(f"{device} seed {seed} {seconds:.0f}"
                      for (device, seed), (_, seconds) in found.items()) + ".")
    b.say(*gold_table({key: gold for key, (gold, _) in found.items()}, devices, seeds))


def gold_table(found: dict, devices: list[str], seeds: list[int]) -> list[str]:
    """Gold by device, and the devices' difference with Student's interval over seeds:
    a difference is not seen where it holds zero, and none larger than its ends is excluded."""
    from virtue.evaluation.stats import t_interval
    lines = ["", "| gold | " + " | ".join(f"{device}, seeds {' '.join(map(str, seeds))}"
                                          for device in devices)
             + " | difference, 95 % | holds zero |", f"|---|{'---:|' * (len(devices) + 2)}"]
    for name in ("base", "sft", "ppo"):
        each = [[found[device, seed][name] for seed in seeds] for device in devices]
        means = [statistics.mean(values) for values in each]
        cells = [f"{statistics.mean(v):.3f} ({', '.join(f'{x:.3f}' for x in v)})" for v in each]
        rest = ["", ""]
        if len(devices) > 1:
            mean, low, high = (t_interval([a - b for a, b in zip(*each)]) if len(seeds) > 1
                               else (means[0] - means[1], float("nan"), float("nan")))
            rest = [f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]",
                    ("yes" if low <= 0 <= high else "**no**") if len(seeds) > 1
                    else "needs two seeds"]
        lines.append(f"| {name} | {' | '.join([*cells, *rest])} |")
    return lines


def trl(b: Bench) -> None:
    """One PPO step of one turn, neither quantised nor checkpointed, by TRL (one reward model,
    value by LoRA) and by run_ppo.py (three)."""
    if not b.args.trl_python:
        b.say("", "Not run: give --trl-python.")
        return
    rows, micro = b.size["trl"]
    ours = b.script("run_ppo.py", "--rm", b.out / "rm", "--out", b.out / "policy-trl", "--quantize",
                    "none", "--reward-turns", "answer", "--lr", "1e-5", "--value-lr", "1e-5",
                    "--batch-size", rows, "--rollout-size", rows, "--minibatch-size", rows,
                    "--micro-batch-size", micro, "--ppo-epochs", 4, "--iterations", 4,
                    "--value-warmup", 0, cap=False)
    command = [b.args.trl_python, str(HERE / "trl_peer.py"), "ppo", "--value", "lora",
               "--steps", "4", "--folder", str(b.model), "--device", b.device, "--rows", str(rows),
               "--micro", str(micro),
               "--prompt-tokens", str(b.size["prompt"]), "--new-tokens", str(b.size["new"])]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    theirs = json.loads(done.stdout.splitlines()[-1])
    mine = statistics.median(m["time/seconds"] for m in b.lines("policy-trl")[1:])
    b.say("", f"{rows} prompts of {b.size['prompt']} tokens, {b.size['new']} new, 4 epochs of one "
          f"minibatch in parts of {micro}, {b.dtype}.",
          "", "| program | s a step | TRL / it | peak, GiB |",
          "|---|---:|---:|---:|", f"| ours, 3 reward models | {mine:.2f} | "
          f"{theirs['step'] / mine:.2f} | {ours.get('allocated', ours['host']):.1f} |",
          f"| TRL, 1 reward model, LoRA value | {theirs['step']:.2f} | 1.00 | "
          f"{theirs['peak_mib'] / 1024:.1f} |")


RUN = {"weights": make_weights, "same": same, "decode": decode, "sft": sft, "rm": rm, "ppo": ppo,
       "ppo-copy": lambda b: ppo(b, copy=True), "eval": evaluation, "data": data,
       "demo": demo, "trl": trl}


def main() -> None:
    if sys.argv[1:2] == ["inside"]:
        inside(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True,
                        help="folder for the model, the runs and results.md")
    parser.add_argument("--shape", choices=SHAPES, default="7b",
                        help="7b: Mistral's; small: to see that all runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu: with --shape small only")
    parser.add_argument("--part", nargs="+", choices=RUN, default=list(PARTS), metavar="PART",
                        help=f"{', '.join(PARTS)} (default: all, in this order)")
    parser.add_argument("--micro-batch", type=int, metavar="N",
                        help="rows a pass in sft, rm (pairs) and ppo, for cards larger than 24 GB "
                        "(default: README's for 24 GB)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the toy demo")
    parser.add_argument("--trl-python", help="an interpreter that imports TRL")
    args = parser.parse_args()
    if args.device == "cpu" and args.shape != "small" and set(args.part) - {"same", "demo"}:
        parser.error("--device cpu wants --shape small: the 7B shape is for a GPU")
    sys.path.insert(0, str(ROOT))
    args.out.mkdir(parents=True, exist_ok=True)
    alone = args.part[0] if len(args.part) == 1 else None
    again = [sys.executable, __file__, *sys.argv[1:], "--part"]  # the last --part counts
    # a process of its own makes the weights, so that its memory is not counted as loading's
    if (alone not in ("weights", "same", "demo")
        and not (args.out / "model/model.safetensors.index.json").exists()):
        subprocess.run([*again, "weights"], check=True)
    if not alone:
        failed = [part for part in args.part if subprocess.run([*again, part]).returncode]
        sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
    b = Bench(args)
    if alone != "weights":
        import torch
        from importlib import import_module
        where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
        b.say("", f"## {alone} ({args.shape}; {where}; "
              + ", ".join(f"{name} {import_module(name).__version__}"
                          for name in ("torch", "transformers", "bitsandbytes")) + ")")
    RUN[alone](b)


if __name__ == "__main__":
    main()
