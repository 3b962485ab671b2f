"""One reward-model step against TRL's RewardTrainer on the same pairs:
LoRA of rank 16, 16 pairs a step. Processor seconds.

    # alternating, 5 times: about 3 minutes (ppo_step.py says how to make .venv-trl)
    python benchmarks/rm_step.py compare --trl-python .venv-trl/bin/python
    python benchmarks/rm_step.py ours
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

from workload import (
    ALPHA,
    HERE,
    PAIR_BATCH,
    PAIR_LR,
    RANK,
    ROOT,
    TARGETS,
    alternate,
    make_model,
    median,
    pairs,
    peak_mib,
    ratio,
    resident_mib,
    scratch,
)


def ours(steps: int) -> dict:
    sys.path.insert(0, str(ROOT))
    import torch
    import transformers  # noqa: F401 (the bare imports count for nothing)
    from transformers.models.mistral import modeling_mistral  # noqa: F401
    from virtue.dialogue import right_pad
    from virtue.lora import adapter_parameters, add_adapter, use_stack
    from virtue.models import ScalarHead, score_at
    from virtue.plumbing.loading import load_model
    from virtue.preference import pairwise_loss

    torch.set_num_threads(1)
    imports = resident_mib()
    model = load_model(make_model(scratch() / "v1024"))
    add_adapter(model, "reward", rank=RANK, alpha=ALPHA, targets=TARGETS)
    head = ScalarHead(model.config.hidden_size, seed=0)
    parameters = [*adapter_parameters(model, "reward"), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PAIR_LR, weight_decay=0.0)
    data, times = pairs(), []
    for step in range(steps):
        start = time.process_time()
        batch = [data[(step * PAIR_BATCH + i) % len(data)] for i in range(PAIR_BATCH)]
        tokens, attention = right_pad(
            [pair[side] for pair in batch for side in ("chosen_ids", "rejected_ids")], 0)
        last = attention.long().sum(1, keepdim=True) - 1
        with use_stack(model, "reward"):
            scores = score_at(model, head, tokens, attention, last)[:, 0].view(-1, 2)
        d = scores[:, 0] - scores[:, 1]
        loss = pairwise_loss(d, torch.zeros_like(d), torch.ones_like(d)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(), optimizer.zero_grad()
        times.append(time.process_time() - start)
    return {"step": statistics.median(times[1:]), "peak_mib": peak_mib() - imports}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("ours", "compare"):
        add = commands.add_parser(name).add_argument
        add("--steps", type=int, default=16,
            help="optimiser steps a run; the first warms up (default: %(default)s)")
        if name == "compare":
            add("--repeats", type=int, default=5)
            add("--trl-python", required=True, help="interpreter with TRL 1.12.0")
    args = parser.parse_args()
    if args.command == "ours":
        return print(json.dumps(ours(args.steps)))
    found = alternate(
        {"ours": [sys.executable, str(HERE / "rm_step.py"), "ours", "--steps", str(args.steps)],
         "TRL": [args.trl_python, str(HERE / "trl_peer.py"), "rm", "--steps", str(args.steps)]},
        args.repeats)
    steps = {name: [run["step"] for run in runs] for name, runs in found.items()}
    print("| program | s a step | TRL / it | peak MiB above the imports |\n|---|---:|---:|---:|")
    for name, runs in found.items():
        print(f"| {name} | {median(runs, 'step'):.3f} | {ratio(steps['TRL'], steps[name])} | "
              f"{median(runs, 'peak_mib'):.0f} |")


if __name__ == "__main__":
    main()
