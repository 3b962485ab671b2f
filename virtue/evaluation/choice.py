"""run_eval.py choice: other people's questions with two options, of which one is right."""
from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from virtue import VirtueError
from virtue.dialogue import encode_prompt
from virtue.ethics import CHOICE, CHOICE_REPLY, JUDGE_LABELS
from virtue.evaluation import report, setup
from virtue.evaluation.stats import paired_bootstrap, wilson
from virtue.judge import flipped, label_ids, opinion, preferred, read_labels, reply_ids
from virtue.lora import use_stack
from virtue.plumbing import artefacts, loading, memory, records, resume
from virtue.plumbing.preview import preview

Items = Sequence[dict]  # of records.read_items


def evaluate(args: argparse.Namespace) -> None:
    """The command, with its parsed flags. VirtueError: fewer than 2 items are left."""
    items, passed = records.read_items(args.items, args.limit)
    out = resume.may_write(args, args.out, [args.policy, args.sft] if args.policy else [])
    longest = max(sum(map(len, [item["text"], *item["options"]])) for item in items) // 3
    if preview(args, {"items": f"{args.items}, {len(items)}, {int(passed)} passed over"},
               "choice.json", judging=dict(rows=args.batch_size, tokens=longest + 100)):
        return

    # Build
    base = loading.open_base(args)
    stacks = {"base": ()}
    if args.policy:
        loaded = setup.load(args, base)
        setup.load_policy(loaded, args.policy, args.rm)
        stacks |= {"sft": loaded.sft} if loaded.sft else {}
        stacks["ppo"] = (*loaded.sft, "policy")
    encoded = encode(base, items)
    context = base.model.config.max_position_embeddings
    fit = [i for i, orders in enumerate(encoded) if max(map(len, orders)) <= context]
    if len(fit) < 2:
        raise VirtueError(f"{args.items}: {len(fit)} items are left ({int(passed)} passed over, "
                          f"{len(items) - len(fit)} beyond the context of {context} tokens): give "
                          "more, or raise --limit")
    kept, rows = [items[i] for i in fit], [encoded[i] for i in fit]
    inputs = {"policy": artefacts.file_hash(args.policy)} if args.policy else {}
    state = resume.start(args, out, base=base.info["fingerprint"],
                         items=artefacts.sha256_file(args.items), **inputs)
    if state is None:
        return

    # Ask each model, compare, write, show
    odds, mass = {}, {}
    for name, stack in stacks.items():
        with use_stack(base.model, *stack):
            odds[name], mass[name] = ask(base, rows, args.batch_size, resume.spread(
                f"{name} chooses", state / f"log-odds-{name}.jsonl"))
    result = {"items": len(kept), "passed_over": int(passed), "too_long": len(items) - len(kept),
              "models": {name: measure(kept, odds[name], mass[name]) for name in stacks},
              "differences": compare(odds, args.seed)}
    artefacts.write_json(out / "choice.json", result)
    resume.finish(out)
    if passed:
        print(f"{args.items}: {int(passed)} rows passed over: {passed}")
    show(result)
    print(f"\nwrote choice.json in {out}{memory.used(base.model.device)}")


def encode(base: loading.Base, items: Items) -> list[list[list[int]]]:
    """The ids of each item's question, the right option first and second, with the beginning of
    the reply."""
    reply, encoded = reply_ids(base.tokenizer, CHOICE_REPLY), []
    for item in items:
        texts = (CHOICE.format(text=item["text"], first=first, second=second,
                               first_label=JUDGE_LABELS[0], second_label=JUDGE_LABELS[1]).strip()
                 for first, second in (item["options"], item["options"][::-1]))
        encoded.append([encode_prompt(base.tokenizer, [{"role": "user", "content": text}]) + reply
                        for text in texts])
    return encoded


def ask(base: loading.Base, encoded: Sequence[Sequence[list[int]]], batch_size: int,
        each_batch) -> tuple[Tensor, float]:
    """Log-odds (n, 2), nats, that a model chooses the right option, shown first and second; and the
    mean probability that it names one of the two labels at all."""
    labels = label_ids(base.tokenizer, base.words._replace(reply=CHOICE_REPLY))
    jobs = sorted(((i, order) for i in range(len(encoded)) for order in (0, 1)),
                  key=lambda job: len(encoded[job[0]][job[1]]))
    batches = [jobs[start:start + batch_size] for start in range(0, len(jobs), batch_size)]

    def read(batch) -> tuple[list[float], float]:
        rows = [encoded[i][order] for i, order in batch]
        odds, on_labels = read_labels(base.model, [(row[:-1], [row[-1:]]) for row in rows], labels,
                                      base.tokenizer.pad_token_id)
        if not odds.isfinite().all():
            raise VirtueError(f"items {sorted({i for i, _ in batch})}: the model's logits are not "
                              "finite: use another --dtype")
        return odds[:, 0].tolist(), on_labels.sum().item()

    result, mass = torch.zeros(len(encoded), 2), 0.0
    for batch, (odds, on_labels) in zip(batches, each_batch(read, batches), strict=True):
        mass += on_labels
        for (i, order), first in zip(batch, odds):
            result[i, order] = first if order == 0 else -first
    return result, mass / len(jobs)


def right(odds: Tensor) -> np.ndarray:
    """Which items a model gets right, by the mean of both orders: 1, 0, or 0.5 for a tie."""
    return preferred(odds.double().mean(1)).numpy()


def measure(items: Items, odds: Tensor, label_mass: float) -> dict:
    """What choice.json says of one model: the share that it gets right, of all and by group."""
    sides, flips = right(odds), flipped(odds[..., None])[:, 0]
    groups = {"all": np.ones(len(items), bool)}
    for name in dict.fromkeys(group for item in items for group in item["groups"]):
        groups[name] = np.array([name in item["groups"] for item in items])

    def share(of_group: np.ndarray) -> dict:
        found = wilson(sides[of_group].sum(), int(of_group.sum()))
        return dict(zip(("share", "low", "high"), found), n=int(of_group.sum()))

    return {"right": {name: share(of_group) for name, of_group in groups.items()},
            "probability": opinion(odds[..., None]).mean().item(),
            "position_flips": flips.double().mean().item(), "label_mass": label_mass}


def compare(odds: Mapping[str, Tensor], seed: int) -> dict:
    """Paired differences of neighbouring models, and of the last one from the first: in the share
    of right items, and in the mean probability of the right option."""
    names, found = list(odds), {}
    for before, after in dict.fromkeys([*zip(names, names[1:]), *[(names[0], names[-1])]]):
        if before == after:
            continue
        measures = {"right": right, "probability": lambda x: opinion(x[..., None])[:, 0].numpy()}
        found[f"{after} - {before}"] = {
            name: dict(zip(("difference", "low", "high"), paired_bootstrap(
                of(odds[before]), of(odds[after]), seed=seed))) for name, of in measures.items()}
    return found


def show(result: dict) -> None:
    """Prints what choice.json says."""
    models = result["models"]
    print(f"{result['items']} items in both orders, {result['too_long']} too long; share right\n")
    groups = list(next(iter(models.values()))["right"])
    wide = max(map(len, groups)) + 2
    print(" " * wide + "".join(f"{name:>26}" for name in models))
    for group in groups:
        rows = [of_model["right"][group] for of_model in models.values()]
        print(f"{group:{wide}}" + "".join(
            f"{report.with_interval(row, 'share', '.1%'):>26}" for row in rows)
            + f"  of {rows[0]['n']}")
    for name, of_model in models.items():
        print(f"{name}: changes sides with the order on {of_model['position_flips']:.0%}, mean "
              f"probability of the right option {of_model['probability']:.3f}")
        if of_model["label_mass"] < 0.1:
            print(f"warning: {name} gives the two labels {of_model['label_mass']:.3f} of the "
                  "probability: it does not answer the question")
    for pair, rows in result["differences"].items():
        print(f"{pair}: " + ", ".join(
            f"{name} {report.with_interval(row)}" for name, row in rows.items()))
