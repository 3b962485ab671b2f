"""The Mistral-7B path on one GPU, on random weights of the true shape: loading, decoding, one step of each stage.

    python benchmarks/gpu.py --out runs/gpu                               # 15 GB of disk; an H100 or H200, about 20 minutes
    python benchmarks/gpu.py --out runs/gpu-small --shape small --device cpu    # the same path at a size for any machine, two minutes

Random weights answer nothing and never stop: every turn is as long as --max-new-tokens allows, the worst case. Prints
tables in Markdown. The floor of a decode step is the bytes that it must read (weights, and keys and values) over the
measured rate of a copy in memory.
"""
from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from pathlib import Path

from workload import ROOT, make_model, peak_mib, prompts

SHAPES = {
    "7b": dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
               max_position_embeddings=32768),
    "small": dict(vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
                  max_position_embeddings=8192),
}


def make_weights(folder: Path, shape: dict) -> Path:
    """A random model in bf16, one file a layer, written without ever holding it whole -> the folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    if (folder / "model.safetensors.index.json").exists():
        return folder
    tiny = make_model(folder, **shape | {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64})  # for its tokenizer and config.json
    config = AutoConfig.from_pretrained(tiny)
    config.update(shape | {"dtype": "bfloat16"})
    (folder / "model.safetensors").unlink()
    config.save_pretrained(folder)
    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(config).state_dict()
    files, index = {}, {}
    for name, tensor in wanted.items():
        part = f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors"
        files.setdefault(part, {})[name] = tensor.shape
    for part, shapes in files.items():
        save_file({n: torch.ones(s, dtype=torch.bfloat16) if "norm" in n else torch.empty(s, dtype=torch.bfloat16).normal_(std=0.02) for n, s in shapes.items()}, folder / part)
        index |= dict.fromkeys(shapes, part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def clocked(function, device: str) -> float:
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def decode(folder: Path, device: str, dtype: str, batches: list[int]) -> None:
    import numpy as np
    import torch
    from virtue.dialogue import left_pad
    from virtue.generate import sample
    from virtue.lora import add_adapter, flatten, sampling_copy, use_stack
    from virtue.models import DTYPES, load_model

    seconds = clocked(lambda: globals().__setitem__("loaded", load_model(folder, quantize="nf4", dtype=dtype, device=device)), device)
    model = globals().pop("loaded")
    used = torch.cuda.memory_allocated() / 2**30 if device == "cuda" else float("nan")
    most = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
    print(f"loaded and quantised in {seconds:.1f} s; on the device {used:.2f} GiB, at most {most:.2f}; host memory at most {peak_mib() / 1024:.2f} GiB\n", flush=True)
    add_adapter(model, "policy", rank=16, alpha=32)
    flatten(model, ("policy",), "rollout")
    copy = sampling_copy(model, DTYPES[dtype])
    block = torch.empty(2**28 if device == "cuda" else 2**26, dtype=torch.bfloat16, device=device)
    rate = 2 * block.nbytes * 10 / clocked(lambda: [block.clone() for _ in range(10)], device)  # read and written
    config, steps, width = model.config, 32, 24
    read = sum(p.nbytes for n, p in copy.named_parameters() if "embed" not in n and "lora" not in n)
    print(f"memory is copied at {rate / 1e9:.0f} GB/s; weights to read in {dtype}: {read / 1e9:.2f} GB\n\n"
          f"| rows | weights | s a step | over its floor | s a step, generate | generate / ours |\n|---:|---|---:|---:|---:|---:|")
    for rows in batches:
        batch = prompts(rows, config.vocab_size)
        for name, which in (("NF4", model), (f"{dtype} copy", copy)):
            ids, mask = (t.to(device) for t in left_pad(batch, 0))

            def ours(n, which=which, batch=batch):
                with use_stack(which, "rollout"):
                    sample(which, batch, np.random.default_rng(0).random((len(batch), n)), eos_id=-1, pad_id=0)

            def theirs(n, which=which, ids=ids, mask=mask):
                with use_stack(which, "rollout"), torch.no_grad():
                    which.generate(input_ids=ids, attention_mask=mask.long(), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=n, min_new_tokens=n, pad_token_id=0)

            each = []
            for run in (ours, theirs):
                run(2)
                each.append((clocked(functools.partial(run, steps), device) - clocked(functools.partial(run, 1), device)) / (steps - 1))
            cache = 2 * rows * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * (width + steps / 2) * torch.finfo(DTYPES[dtype]).bits / 8
            print(f"| {rows} | {name} | {each[0]:.4f} | {each[0] / ((read + cache) / rate):.2f} | {each[1]:.4f} | {each[1] / each[0]:.2f} |", flush=True)


def stages(folder: Path, out: Path, device: str, dtype: str, tokens: int, rollout: int) -> None:
    """The scripts themselves, as a user runs them."""
    base = ["--model", folder, "--quantize", "nf4", "--dtype", dtype, "--device", device, "--overwrite"]
    sampling = ["--max-new-tokens", tokens, "--truncated", "keep", "--limit", rollout]
    runs = [("run_data.py", "revisions", *base, *sampling, "--out", out / "revisions"),
            ("run_sft.py", "--data", out / "revisions", "--out", out / "sft", "--batch-size", 4, "--epochs", 1, "--gradient-checkpointing"),
            ("run_data.py", "preferences", *base, *sampling, "--sft", out / "sft", "--out", out / "preferences", "--judge-batch-size", 2),
            ("run_rm.py", "--data", out / "preferences", "--sft", out / "sft", "--out", out / "rm", "--batch-size", 4, "--epochs", 1, "--gradient-checkpointing"),
            *((("run_ppo.py", "--rm", out / "rm", "--out", out / name, "--iterations", 3, "--value-warmup", 0, "--rollout-size", rollout, "--minibatch-size", rollout // 2,
                "--micro-batch-size", 2, "--lr", 1e-5, "--gradient-checkpointing", *more)) for name, more in (("policy", ()), ("policy-copy", ("--rollout-dtype", dtype))))]
    for command in runs:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *(str(ROOT / c) if i == 0 else str(c) for i, c in enumerate(command))], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
        print(f"\n{' '.join(map(str, command))}\n  {time.perf_counter() - start:.0f} s in all\n  " + "\n  ".join(done.stdout.splitlines()[-6:]), flush=True)
    for name in ("policy", "policy-copy"):
        metrics = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        print(f"\n{name}: one PPO iteration of {rollout} dialogues, {metrics[-1]['tokens/length']:.0f} tokens each, takes {metrics[-1]['time/seconds']:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--part", choices=("all", "decode", "stages"), default="all")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    large = args.shape == "7b"
    dtype = "bf16" if args.device == "cuda" else "fp32"  # on a CPU bf16 is a hundred times slower
    args.out.mkdir(parents=True, exist_ok=True)
    folder = make_weights((args.out / "model").resolve(), SHAPES[args.shape])
    if args.part != "stages":
        decode(folder, args.device, dtype, [1, 16, 64, 256] if large else [1, 16])
    if args.part != "decode":
        stages(folder, args.out.resolve(), args.device, dtype, 128 if large else 16, 64 if large else 16)


if __name__ == "__main__":
    main()
