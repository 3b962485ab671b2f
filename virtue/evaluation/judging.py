"""run_eval.py judge: how often the judge agrees with a file's choices, or with gold."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from virtue import VirtueError
from virtue.ethics import LENSES, VIRTUES
from virtue.evaluation import feedback, report
from virtue.evaluation.setup import JUDGE_TOKENS
from virtue.judge import judge_log_odds, label_ids, pair_fits, unanswered
from virtue.plumbing import artefacts, loading, memory, records, resume
from virtue.plumbing.preview import preview

SIDES = ("chosen", "rejected")


def evaluate(args: argparse.Namespace) -> None:
    """The command, with its parsed flags. VirtueError: fewer than 2 pairs are left."""
    pairs, skipped = records.read_pairs(args.pairs, args.limit)
    out = resume.may_write(args, args.out)
    told = f"{args.pairs}, {len(pairs)} pairs, {int(skipped)} passed over"
    if preview(args, {"pairs": told}, "judge.json",
               judging=dict(rows=args.batch_size, tokens=JUDGE_TOKENS + most_tokens(pairs))):
        return

    # Build
    base = loading.open_base(args)
    label_ids(base.tokenizer, base.words)
    kept = [p for p in pairs
            if pair_fits(base.model, base.tokenizer, base.words, p["chosen"], p["rejected"],
                      p["lens"])]
    too_long = len(pairs) - len(kept)
    if len(kept) < 2:
        raise VirtueError(f"{args.pairs}: {len(kept)} pairs are left ({int(skipped)} passed over, "
                          f"{too_long} too long): give more pairs, or raise --limit")
    state = resume.start(args, out, base=base.info["fingerprint"],
                         pairs=artefacts.sha256_file(args.pairs))
    if state is None:
        return

    # Judge
    result = {"pairs": len(kept), "skipped": int(skipped), "too_long": too_long,
              "wording": args.wording, "model": args.model}
    for lens in LENSES:
        of_lens = [p for p in kept if p["lens"] == lens]
        if len(of_lens) > 1:
            result[lens] = judged(base, of_lens, lens, args.wording, args.batch_size, state)

    # Write and show
    artefacts.write_json(out / "judge.json", result)
    resume.finish(out)
    print(f"{len(kept)} pairs ({int(skipped)} passed over, {too_long} too long), judge "
          f"{args.model}, {args.wording} wording" + f"\npassed over: {skipped}" * bool(skipped))
    for lens in LENSES:
        if lens in result:
            show(lens, result[lens])
    print(f"\nwrote judge.json in {out}{memory.used(base.model.device)}")


def most_tokens(pairs: Sequence[dict], sides: Sequence[str] = SIDES) -> int:
    """About how many tokens the longest pair has, at three characters a token."""
    return max((sum(len(m["content"]) for side in sides for m in p[side]) for p in pairs),
               default=0) // 3


def judged(base: loading.Base, pairs: Sequence[dict], lens: str, wording: str, batch_size: int,
           state: Path) -> dict:
    """What judge.json says of one lens: `feedback.agreement` with gold, or with the file's choice
    where any prompt is not the toy world's."""
    odds, mass = judge_log_odds(
        base.model, base.tokenizer, base.words, [(p["chosen"], p["rejected"]) for p in pairs], lens,
        batch_size, wording=wording,
        each_batch=resume.spread(f"judge {lens}", state / f"log-odds-{lens}.jsonl"))
    truths = [feedback.truth(p) for p in pairs]
    against, signs = "the file's choice", {"overall": np.ones(len(pairs))}
    if all(truths):
        against = "gold"
        signs = {name: np.array([t[name] for t in truths]) for name in (*VIRTUES, "overall")}
    return {"against": against, "label_mass": mass,
            **feedback.agreement(odds, signs, base.words.virtues)}


def show(lens: str, result: dict) -> None:
    """Prints what judge.json says of one lens."""
    print(f"\n{lens}, against {result['against']}; right on")
    for name, row in result["agreement"].items():
        share = report.with_interval(row, "share", ".1%") + f" of {row['n']}"
        print(f"  {name:12}" + ("too few pairs decide" if row["share"] is None else share))
    if unanswered(result["label_mass"]):
        print(f"  warning: {unanswered(result['label_mass'])}")
    halo = "n/a" if result["halo"] is None else f"{result['halo']:.2f}"
    print(f"  correlation between virtues (halo) {halo}\n  {feedback.worth(result)}")
