"""The loop of supervised training, which SFT and the reward models share: steps over shuffled
batches of like length, gradients summed over passes and processes, checkpoints, the log.

An example is a NamedTuple of the script's own. The loop reads two of its fields: `rows`, the lists
of token ids that a pass reads, and `record`, its name in error messages.
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from virtue.dialogue import buckets
from virtue.plumbing import parallel, resume, runtime
from virtue.randomness import stream

MAX_GRAD_NORM = 1.0  # longer gradients of a step are cut to this
LAST_LR = 0.1  # of --lr, at the last step; 1.0: no fall


def train(args: argparse.Namespace, folder: Path, state: Path, parameters: list[Tensor],
          examples: Sequence, loss: Callable[[list, list], Tensor], evaluate: Callable[[], dict], *,
          name: str, key: Sequence[str]) -> tuple[dict, dict]:
    """Trains `parameters` in place for `args.epochs` epochs -> (`evaluate()` before, after).

    ``loss(part, step)`` is a scalar: what the examples `part`, one forward pass, add to the loss of
    all examples of the `step`, so that neither --accumulation nor the number of processes changes
    the gradient. What ``evaluate()`` returns, names and numbers, is logged before the first step
    and after each epoch. `folder` gets metrics.jsonl, `state` (see ``resume.start``) the
    checkpoints, from which a killed run goes on. `name` is the run's name in messages; the order of
    the examples is keyed by (seed, *key, epoch). VirtueError: a gradient that is not finite.
    """
    size = args.batch_size * args.accumulation
    steps = args.epochs * -(-len(examples) // size)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, LAST_LR, max(1, steps - 1))
    log = runtime.MetricsLog(folder / "metrics.jsonl")
    saved = resume.load_checkpoint(state, parameters, optimizer, schedule, [log.path], ["before"])
    before = after = saved["before"] if saved else evaluate()
    if not saved:
        log.write({"step": 0, **before})
    step, resumed = 0, saved["step"] if saved else 0
    lengths = [max(map(len, example.rows)) for example in examples]
    with runtime.progress(None, name, total=steps) as bar:
        for epoch in range(args.epochs):
            order = stream(args.seed, *key, epoch).permutation(len(examples)).tolist()
            for numbers in buckets(order, lengths, size):
                step += 1
                bar.update()
                if step <= resumed:
                    continue
                started, batch, total = time.perf_counter(), [examples[i] for i in numbers], 0.0
                mine = parallel.share(batch)
                for i in range(0, len(mine), args.batch_size):
                    part = loss(mine[i:i + args.batch_size], batch)
                    part.backward()
                    total += part.item()
                parallel.sum_gradients(parameters)
                total = parallel.total(torch.tensor(total, dtype=torch.float64)).item()
                norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
                runtime.check_finite(norm, f"{name}, step {step}", "the gradient", "lower --lr",
                                     [example.record for example in batch], state)
                optimizer.step(), optimizer.zero_grad(), schedule.step()
                read = sum(len(row) for example in batch for row in example.rows)
                log.write({"step": step, "loss/train": total, "grad_norm": norm.item(),
                           "tokens/read": read, "time/seconds": time.perf_counter() - started})
                bar.set_postfix(loss=f"{total:.3f}", refresh=False)
                if step % args.save_every == 0:
                    resume.save_checkpoint(state, step, parameters, optimizer, schedule,
                                           [log.path], before=before)
            if step >= resumed:
                after = evaluate()
                log.write({"step": step, "epoch": epoch + 1, **after})
    return before, after
