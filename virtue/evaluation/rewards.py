"""run_eval.py rewards: each reward model on held-out pairs, lengths, degenerate answers, a file."""
from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from virtue import VirtueError, preference
from virtue.dialogue import (Dialogue, Turn, copies_of, encode_conversation, messages_of,
                             pair_rows)
from virtue.ensemble import standardize
from virtue.ethics import LENSES
from virtue.evaluation import setup
from virtue.evaluation.stats import rank_correlation
from virtue.evaluation.textstats import degenerate
from virtue.plumbing import artefacts, loading, memory, records, resume
from virtue.plumbing.preview import preview
from virtue.randomness import held_out_ids
from virtue.rollout import score_dialogues

SIDES = ("chosen", "rejected")
DEGENERATE = 32  # dialogues whose answers are replaced


class Scorer(NamedTuple):
    """One reward model on its base, with the mean and std of its scores."""

    base: loading.Base
    lens: str
    stack: setup.Stack
    head: torch.nn.Module
    mean: Tensor
    std: Tensor
    batch_size: int

    def raw(self, dialogues: Sequence[Dialogue], k: int, name: str | None = None) -> Tensor:
        """Raw scores (n,) at the end of turn k; `name` labels the progress bar."""
        return score_dialogues(
            self.base.model, [(self.stack, self.head)], dialogues, [k],
            self.base.tokenizer.pad_token_id, batch_size=self.batch_size,
            each_batch=resume.spread(name))[0]

    def score(self, rows: Sequence[list[int]]) -> Tensor:
        """Standardised scores (n,) at the end of n rows of ids; NaN where one is beyond the
        model's context."""
        scores = torch.full((len(rows),), torch.nan)
        limit = self.base.model.config.max_position_embeddings
        fit = [i for i, row in enumerate(rows) if len(row) <= limit]
        turns = [Dialogue("", [], rows[i], (Turn(0, len(rows[i]), False),)) for i in fit]
        scores[fit] = self.raw(turns, 0, f"score {self.lens}")
        return standardize(scores[None], self.mean[None], self.std[None])[0]

    def score_conversations(self, conversations: Sequence[list[dict]]) -> Tensor:
        """`score` of conversations as messages."""
        return self.score([encode_conversation(self.base.tokenizer, c)[0] for c in conversations])


def evaluate(args: argparse.Namespace) -> None:
    """The command, with its parsed flags. VirtueError: data or an artefact that does not fit."""
    data = {lens: records.read_preferences(args.data / f"{lens}.jsonl", lens) for lens in LENSES}
    dialogues = records.read_dialogues(args.data / "dialogues.jsonl")
    external, skipped = records.read_pairs(args.pairs, args.limit) if args.pairs else ([], 0)
    if skipped:
        print(f"{args.pairs}: {int(skipped)} pairs passed over: {skipped}")
    out = resume.may_write(args, args.out, [args.rm, args.data, args.sft])
    reads = {"data": f"{args.data}, {len(dialogues)} dialogues",
             **{f"pairs of {lens}": len(data[lens]) for lens in LENSES},
             **({"pairs": f"{args.pairs}, {len(external)}"} if args.pairs else {})}
    longest = max((len(d.ids) for d in dialogues), default=0)
    if preview(args, reads, "rewards.json", scoring=dict(rows=args.batch_size, tokens=longest)):
        return

    # Build
    base = loading.open_base(args)
    records.check_ids(dialogues, base.model.config.vocab_size, args.data)
    artefacts.check_made_by(args.data, base.info, base.template, args.sft)
    ensemble = setup.load(args, base).rewards
    unseen = held_out(args, dialogues, data)
    if not start(args, base):
        return

    # Measure
    talks, copies, result = [d for d in dialogues if d.id in unseen], copies_of(dialogues), {}
    for k, lens in enumerate(LENSES):
        scorer = Scorer(base, lens, *ensemble.models[k], ensemble.mean[k], ensemble.std[k],
                        args.batch_size)
        pairs = [r for r in data[lens] if r["id"] in unseen]
        result[lens] = {**on_pairs(scorer, pairs, copies, f"{args.data}"),
                        "length_correlation": with_length(scorer, talks, k),
                        "degenerate": on_degenerate(scorer, talks, k)}
        if external:
            result[lens]["external"] = on_file(scorer, external, int(skipped))

    # Write and show
    artefacts.write_json(out / "rewards.json", result)
    resume.finish(out)
    for lens in LENSES:
        show(lens, result[lens], f"{args.pairs}")
    print(f"\nwrote rewards.json in {out}{memory.used(base.model.device)}")


def held_out(args: argparse.Namespace, dialogues: Sequence[Dialogue],
             data: Mapping[str, list[dict]]) -> set[str]:
    """Ids of the prompts that the reward models did not train on. VirtueError: too few."""
    settings = artefacts.read_manifest(args.rm / "action", "rm")["settings"]
    ids = held_out_ids((d.id for d in dialogues), settings["seed"], settings["held_out"])
    few = sum(d.id in ids for d in dialogues) < 3
    for lens in LENSES:
        if few or all(r["id"] not in ids for r in data[lens]):
            raise VirtueError(f"{args.data}: no pair of lens {lens} was held out from {args.rm}: "
                              "give the preferences that it was trained on")
    return ids


def start(args: argparse.Namespace, base: loading.Base) -> bool:
    """Begins the run, or goes on with it; False where it is finished."""
    files = [*(f"{lens}.jsonl" for lens in LENSES), "dialogues.jsonl"]
    return resume.start(
        args, args.out, base=base.info["fingerprint"], data=artefacts.data_hash(args.data, files),
        pairs=artefacts.sha256_file(args.pairs) if args.pairs else None,
        **{lens: artefacts.file_hash(args.rm / lens) for lens in LENSES}) is not None


def on_pairs(scorer: Scorer, pairs: Sequence[dict], copies: Mapping, data: str) -> dict:
    """Accuracy and calibration on held-out pairs. VirtueError: none has a label that decides."""
    sides = zip(*(pair_rows(scorer.base.tokenizer, r, copies.get(r["id"], ()), scorer.lens)[0]
                  for r in pairs))
    chosen, rejected = (scorer.score(rows) for rows in sides)
    margins = (chosen - rejected) * scorer.std
    labels = torch.tensor([r["label"] for r in pairs])[~margins.isnan()]
    margins = margins[~margins.isnan()]
    if not (labels != 0.5).any():
        raise VirtueError(
            f"{data}: of {len(pairs)} held-out pairs of lens {scorer.lens}, {len(labels)} fit the "
            "model's context, and none has a label other than 0.5: give preferences that decide")
    probs = margins.sigmoid()
    return {"pairs": len(margins), "accuracy": preference.accuracy(margins, labels),
            "log_loss": preference.log_loss(margins, labels),
            "calibration_error": preference.calibration_error(probs, labels),
            "calibration": preference.calibration_bins(probs, labels)}


def with_length(scorer: Scorer, dialogues: Sequence[Dialogue], k: int) -> float | None:
    """Rank correlation of score and length of turn k, as sampled; None where all are of one."""
    lengths = np.array([d.turns[k].end - d.turns[k].start for d in dialogues])
    correlation = rank_correlation(lengths, scorer.raw(dialogues, k).double().numpy())
    return correlation if np.isfinite(correlation) else None


def on_degenerate(scorer: Scorer, dialogues: Sequence[Dialogue], k: int) -> dict[str, float]:
    """Mean score of turn k as sampled and of `textstats.degenerate` answers in its place. A kind of
    which no answer fits is left out; {} where no turn ended."""
    variants: dict[str, list] = {}
    for d in dialogues[:DEGENERATE]:
        if not d.turns[k].truncated:
            *before, answer = messages_of(scorer.base.tokenizer, d, turns=k + 1)
            texts = degenerate(before[-1]["content"], answer["content"])
            for kind, text in {"as sampled": answer["content"], **texts}.items():
                turn = {"role": "assistant", "content": text}
                variants.setdefault(kind, []).append([*before, turn])
    means = {kind: scorer.score_conversations(conversations).nanmean().item()
             for kind, conversations in variants.items()}
    return {kind: mean for kind, mean in means.items() if np.isfinite(mean)}


def on_file(scorer: Scorer, pairs: Sequence[dict], skipped: int) -> dict:
    """Accuracy on the pairs of a file, each read at its last answer."""
    chosen, rejected = (scorer.score_conversations([p[side] for p in pairs]) for side in SIDES)
    margins = chosen - rejected
    fit = margins[~margins.isnan()]
    right = preference.accuracy(fit, torch.ones(len(fit))) if len(fit) else None
    return {"pairs": len(fit), "too_long": len(pairs) - len(fit), "skipped": skipped,
            "accuracy": right}


def show(lens: str, result: dict, file: str) -> None:
    """Prints what rewards.json says of one lens; file: that of the external pairs."""
    correlation, scores = result["length_correlation"], result["degenerate"]
    print(f"\n{lens}: {result['pairs']} held-out pairs, accuracy {result['accuracy']:.3f}, "
          f"log-loss {result['log_loss']:.3f}, calibration error "
          f"{result['calibration_error']:.3f}; rank correlation of score and length "
          + ("n/a" if correlation is None else f"{correlation:+.2f}"))
    print("  predicted -> judged: " + ", ".join(
        f"{b['predicted']:.2f} -> {b['label']:.2f} ({b['pairs']})" for b in result["calibration"]))
    print("  standardised score: " + ", ".join(f"{kind} {z:+.2f}" for kind, z in scores.items()))
    real = scores.get("as sampled", np.inf)
    if paid := [kind for kind, z in scores.items() if kind != "as sampled" and z >= real]:
        print(f"warning: {lens}: pays {', '.join(paid)} as well as real answers: PPO may find out")
    if external := result.get("external"):
        right = external["accuracy"]
        print(f"  {file}: " + ("no pair fits" if right is None else
                               f"accuracy {right:.3f} on {external['pairs']} pairs"))
