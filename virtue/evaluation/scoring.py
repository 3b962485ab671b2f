"""run_eval.py score: what the reward models say of anybody's answers."""
from __future__ import annotations

import argparse

import torch

from virtue import VirtueError
from virtue.dialogue import Messages
from virtue.ensemble import aggregate
from virtue.ethics import FOLLOW_UPS, LENSES
from virtue.evaluation import setup
from virtue.evaluation.judging import most_tokens
from virtue.evaluation.rewards import Scorer
from virtue.plumbing import artefacts, loading, memory, records, resume
from virtue.plumbing.preview import preview


def evaluate(args: argparse.Namespace) -> None:
    """The command, with its parsed flags. VirtueError: no answer of the file can be scored."""
    answers, passed = records.read_answers(args.answers, args.limit)
    out = resume.may_write(args, args.out, [args.rm, args.sft])
    if preview(args, {"answers": f"{args.answers}, {len(answers)}, {int(passed)} passed over"},
               "scores.jsonl",
               scoring=dict(rows=args.batch_size, tokens=most_tokens(answers, ["messages"]))):
        return

    # Build
    base = loading.open_base(args)
    ensemble = setup.load(args, base).rewards
    if resume.start(args, out, base=base.info["fingerprint"],
                    answers=artefacts.sha256_file(args.answers),
                    **{lens: artefacts.file_hash(args.rm / lens) for lens in LENSES}) is None:
        return

    # Score: (3, n), NaN where a conversation is beyond the model's context
    scores = torch.stack([
        Scorer(base, lens, *ensemble.models[k], ensemble.mean[k], ensemble.std[k], args.batch_size)
        .score_conversations([up_to(a["messages"], k) for a in answers])
        for k, lens in enumerate(LENSES)])
    total = aggregate(scores, args.aggregate)
    fit = ~scores.isnan().any(0)
    if not fit.any():
        raise VirtueError(f"{args.answers}: none of {len(answers)} answers fits the model's "
                          f"context of {base.model.config.max_position_embeddings} tokens: give "
                          "shorter ones")

    # Write and show
    artefacts.write_jsonl(out / "scores.jsonl", (
        {"line": a["line"], **dict(zip(LENSES, of_lenses)), args.aggregate: one} if ok
        else {"line": a["line"], "too_long": True}
        for a, of_lenses, one, ok in zip(answers, scores.T.tolist(), total.tolist(), fit.tolist())))
    resume.finish(out)
    if passed:
        print(f"{args.answers}: {int(passed)} rows passed over: {passed}")
    print(f"{int(fit.sum())} answers, {int((~fit).sum())} too long; mean standardised score "
          "(0 and 1: mean and std of the dialogues that the reward models were made from)")
    for name, row in (*zip(LENSES, scores), (args.aggregate, total)):
        print(f"  {name:12}{row[fit].mean():+.3f}, from {row[fit].min():+.2f} to "
              f"{row[fit].max():+.2f}")
    best = total.where(fit, -torch.inf).argmax().item()
    worst = total.where(fit, torch.inf).argmin().item()
    print(f"  greatest in line {answers[best]['line']}, least in line {answers[worst]['line']}")
    print(f"wrote scores.jsonl in {out}{memory.used(base.model.device)}")


def up_to(messages: Messages, k: int) -> Messages:
    """What the k-th lens reads: of a conversation that ends with both follow-up questions and their
    answers, what goes up to its own turn, as in training; else all of it, to the last answer."""
    asked = [m["content"].strip() for m in messages[-4::2]]
    return messages[:len(messages) - 2 * (2 - k)] if asked == [*FOLLOW_UPS.values()] else messages
