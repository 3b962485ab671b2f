"""run_eval.py best-of-n: what choosing the best of 1, 2, 4, ... answers would gain."""
from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from virtue import AGGREGATORS
from virtue.dialogue import Dialogue, messages_of
from virtue.ensemble import aggregate
from virtue.ethics import LENSES
from virtue.evaluation import feedback, plots, setup, stats
from virtue.lora import use_stack
from virtue.plumbing import artefacts, loading, memory, records, resume
from virtue.plumbing.preview import preview
from virtue.toy import gold as toy

SETTINGS = dict(coef=0.5, use_variance=False, reference=1.0)  # of uwo and lsc
MEASURES = {  # of a row -> names of the ends of its interval, what it is
    "gold": (("low", "high"), "gold"),
    "judge": (("judge_low", "judge_high"),
              "the judge's P(better than another answer of the same model)"),
    "reward": ((), "mean standardised reward")}


def evaluate(args: argparse.Namespace) -> None:
    """The command, with its parsed flags. VirtueError: an input that does not fit the others."""
    prompts = records.load_prompts(args.prompts, "eval", args.limit, args.system)
    out = resume.may_write(args, args.out, [args.rm, args.sft])
    judging = {"judging": setup.judging_plan(args)} if args.judge_limit else {}
    if preview(args, {"prompts": f"{args.prompts}, {len(prompts)} records"},
               "best_of_n.json, best_of_n.svg", flat=[["sft"]],
               sampling=setup.sampling_plan(args, len(prompts)), **judging):
        return

    # Build
    base = loading.open_base(args)
    loaded = setup.load(args, base)
    kept = setup.fitting(prompts, args, base, ": give more")
    state = resume.start(args, out, base=base.info["fingerprint"],
                         prompts=artefacts.prompts_hash(args.prompts),
                         **{lens: artefacts.file_hash(args.rm / lens) for lens in LENSES})
    if state is None:
        return

    # Sample n dialogues for each prompt, and for those that are judged one more
    judged = kept[:args.judge_limit]
    copies = [*[kept] * args.n, *[judged] * bool(judged)]
    stack, answers = setup.flat(base.model, loaded.sft), []
    for copy, asked in enumerate(copies):
        spread = resume.spread(f"answers {copy + 1} of {len(copies)}", state / f"{copy}.jsonl")
        answers.append(setup.sample(args, base, stack, asked, "best-of-n", spread, copy))

    # Score and judge
    scores = torch.stack([loaded.rewards.standardise(
        setup.raw_scores(loaded, loaded.rewards, dialogues, args.batch_size))
        for dialogues in answers[:args.n]], 2)  # (K, P, n)
    gold = gold_of(base, answers[:args.n]) if args.prompts == "toy" else None
    wins, which = judge(args, base, answers, len(judged), state) if judged else (None, [])
    rows = gains(scores, gold, wins, which, args.seed)

    # Write and show
    artefacts.write_json(out / "best_of_n.json", {
        "prompts": len(kept), "judged": len(which), "n": args.n, "seed": args.seed, "rows": rows})
    if plots.available():
        artefacts.write_atomic(out / "best_of_n.svg", plots.best_of_n(rows).encode())
    else:
        print(plots.MISSING)
    resume.finish(out)
    show(rows, {"judge": len(which)}, len(kept), args.n)
    print(f"wrote best_of_n.json in {out}{memory.used(base.model.device)}")


def gold_of(base: loading.Base, answers: Sequence[Sequence[Dialogue]]) -> np.ndarray:
    """Gold (P, n) of n toy dialogues for each of P prompts."""
    def one(d: Dialogue) -> float:
        turns = [m["content"] for m in messages_of(base.tokenizer, d)[len(d.prompt)::2]]
        return toy.gold(d.prompt[-1]["content"], turns).overall

    return np.array([[one(d) for d in dialogues] for dialogues in answers]).T


def judge(args: argparse.Namespace, base: loading.Base, answers: Sequence[Sequence[Dialogue]],
          prompts: int, state: Path) -> tuple[np.ndarray, list[int]]:
    """The base, adapters off, compares the answers to the first prompts with the last one each:
    P(an answer is better) (prompts judged, n), and which those prompts are."""
    *talks, others = [[messages_of(base.tokenizer, d) for d in dialogues[:prompts]]
                      for dialogues in answers]
    with use_stack(base.model):
        return feedback.versus(
            base.model, base.tokenizer, base.words, talks, others, batch_size=args.judge_batch_size,
            each_batch=lambda lens: resume.spread(f"judge {lens}",
                                                  state / f"log-odds-{lens}.jsonl"))


def gains(scores: Tensor, gold: np.ndarray | None, wins: np.ndarray | None,
          which: Sequence[int], seed: int) -> list[dict]:
    """The rows of best_of_n.json: for each aggregator and m = 1, 2, 4, ... n what the best of m
    would be worth. scores (K, P, n) standardised; gold (P, n); wins of the prompts `which`."""
    average, n = scores.mean(0).double().numpy(), scores.shape[2]
    rows = []
    for name in AGGREGATORS:
        if name == "weighted":  # without weights it is the mean
            continue
        proxy = aggregate(scores.flatten(1), name, **SETTINGS).view(scores.shape[1:])
        proxy = proxy.double().numpy()
        for m in (2 ** i for i in range(n.bit_length())):
            row = {"aggregator": name, "n": m, "kl_bound": stats.best_of_n_kl(m),
                   "reward": stats.best_of_n(proxy, average, m)}
            if gold is not None:
                row |= estimate("gold", proxy, gold, m, seed)
            if len(which) > 1:
                row |= estimate("judge", proxy[which], wins, m, seed)
            rows.append(row)
    return rows


def estimate(name: str, proxy: np.ndarray, values: np.ndarray, m: int, seed: int) -> dict:
    """Mean over prompts of the value of the best of m by proxy, both (P, n), with its interval."""
    each = np.array([stats.best_of_n(p[None], v[None], m) for p, v in zip(proxy, values)])
    interval = stats.paired_bootstrap(np.zeros(len(each)), each, resamples=2000, seed=seed)
    return dict(zip((name, *MEASURES[name][0]), interval))


def show(rows: Sequence[dict], prompts: Mapping[str, int], kept: int, n: int) -> None:
    """Prints a table for each measure; prompts: how many it is based on, if not on all kept."""
    sizes = list(dict.fromkeys(row["n"] for row in rows))
    for measure, (_, title) in MEASURES.items():
        if measure not in rows[0]:
            continue
        print(f"{title}: of the best of n, {prompts.get(measure, kept)} held-out prompts, {n} "
              f"answers each\n{'':10}" + "".join(f"{m:>8}" for m in sizes))
        for name in dict.fromkeys(row["aggregator"] for row in rows):
            values = [row[measure] for row in rows if row["aggregator"] == name]
            print(f"{name:10}" + "".join(f"{value:8.3f}" for value in values))
