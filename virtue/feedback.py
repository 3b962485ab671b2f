"""What the judge's verdicts say about the judge: ties, flips, votes, halo; on toy, agreement with gold.

Shell: imports core and modules; scripts may import it, the core may not.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from virtue.ethics import LENSES, VIRTUES
from virtue.judge import judge_pairs, pair_fits
from virtue.stats import wilson


def virtue_agreement(probs: Tensor) -> float | None:
    """Mean correlation, over the ten pairs of virtues, of P(first is better); probs (N, 5).

    Near 1 the five questions are one halo judgement; near 0 they are five. None below three pairs of
    dialogues, or where a virtue's answers never vary.
    """
    if len(probs) < 3 or (probs.std(0) < 1e-6).any():
        return None
    correlation = torch.corrcoef(probs.double().T)
    return correlation[torch.ones_like(correlation, dtype=torch.bool).triu(1)].mean().item()


def points(prompt: str, turns: Sequence[str]) -> dict[str, dict[str, float]]:
    """Toy only, for reports: lens -> virtue -> points of its turn (`toy.grammar.worth`), of as many turns as are given.

    ValueError where the prompt is not the toy world's.
    """
    from virtue.toy.gold import parse, slots
    from virtue.toy.grammar import worth
    latent = {lens: list(parse(text, lens, *slots(prompt))) for lens, text in zip(LENSES, turns)}
    return {lens: worth(latent, lens) for lens in latent}


def truth(pair: dict) -> dict[str, float] | None:
    """Toy only, for reports: by how much the chosen one is better, in gold ("overall") and in each virtue's points.

    pair: {"chosen", "rejected": messages, "lens"}. None where the prompt is not the toy world's.
    """
    from virtue.toy.gold import gold, slots
    prompt, lens, sides = pair["chosen"][0]["content"], pair["lens"], []
    try:
        slots(prompt)
    except ValueError:
        return None
    for name in ("chosen", "rejected"):
        turns = [m["content"] for m in pair[name][1::2]]
        golden = gold(prompt, turns + [""] * (len(LENSES) - len(turns))).lenses[lens]
        sides.append({**points(prompt, turns)[lens], "overall": golden})
    return {name: sides[0][name] - sides[1][name] for name in sides[0]}


def gold_agreement(records: list[dict], lens: str) -> float | None:
    """Share of toy pairs whose chosen dialogue has the higher gold for the lens; equal ones left out.

    None where the prompts are not the toy world's.
    """
    truths = [truth({**record, "lens": lens}) for record in records]
    if not all(truths):
        return None
    clear = [t["overall"] > 0 for t in truths if t["overall"]]
    return sum(clear) / len(clear) if clear else None


def _share(right: np.ndarray) -> dict:
    """Mean of right (n,), each in [0, 1], with Wilson's interval; None below two."""
    found = wilson(float(right.sum()), len(right)) if len(right) > 1 else (None, None, None)
    return dict(zip(("share", "low", "high"), found), n=len(right))


def agreement(probs: Tensor, signs: dict[str, np.ndarray]) -> dict:
    """How often the judge is right: probs (N, 2, 5) that the chosen is better; signs: what decides, > 0 chosen, 0 left out.

    signs has "overall" and, where each virtue has a truth of its own, the virtues. Shares carry Wilson's 95 % intervals; "one_order" asks the mean of
    the five virtues in one order, and is the mean over both.
    Returns "agreement": {"majority", "mean", "one_order", each virtue: {"share", "low", "high", "n"}}, "position_flips" and "first_place" (shares),
    "halo" (mean correlation between two virtues' answers, or None).
    """
    both = probs.double().mean(1).numpy()  # (N, 5)
    found = {"majority": _share((((both > 0.5).sum(1) * 2 > len(VIRTUES)) == (signs["overall"] > 0))[signs["overall"] != 0]),
             "mean": _share(((both.mean(1) > 0.5) == (signs["overall"] > 0))[signs["overall"] != 0]),
             "one_order": _share(((probs.double().mean(2).numpy() > 0.5) == (signs["overall"] > 0)[:, None]).mean(1)[signs["overall"] != 0])}
    for i, virtue in enumerate(VIRTUES):
        sign = signs.get(virtue, signs["overall"])
        found[virtue] = _share(((both[:, i] > 0.5) == (sign > 0))[sign != 0])
    flips = (probs[:, 0] > 0.5) != (probs[:, 1] > 0.5)
    return {"agreement": found, "position_flips": flips.double().mean().item(),
            "first_place": ((probs[:, 0] > 0.5).double().mean().item() + (probs[:, 1] < 0.5).double().mean().item()) / 2,
            "halo": virtue_agreement(probs.mean(1))}


def win_rates(judge, tokenizer, after: list[list[dict]], before: list[list[dict]], lens: str, *, batch_size: int,
              wording: str = "trained", keep: Path | None = None, gold: np.ndarray | None = None) -> dict | None:
    """The judge's comparison of two models' dialogues, prompt by prompt, both orders; None if no pair fits its context.

    Returns {"rate", "low", "high", "pairs", "questions", "label_mass"}: the share of prompts on which ``after`` is preferred (mean of the five virtues; a
    tie counts half), Wilson's interval; "pairs": how many were judged; "questions": {name: mean P(after preferred)};
    "label_mass": as ``judge_pairs`` has it. With gold (n,), by how
    much ``after`` is better, also "gold": {"share", "low", "high", "n"}, the share of the n pairs with a difference on which the judge prefers the better.
    """
    asked = (*VIRTUES, "helpfulness") if lens == "action" else (*VIRTUES, "helpfulness", "sincerity")
    kept = [i for i, pair in enumerate(zip(after, before, strict=True)) if pair_fits(judge, tokenizer, *pair, lens)]
    if len(kept) < 2:
        return None
    pairs = [(after[i], before[i]) for i in kept]
    probs, label_mass = judge_pairs(judge, tokenizer, pairs, lens, batch_size, asked, wording, keep=keep)
    probs = probs.double().mean(1).numpy()
    margin = probs[:, :len(VIRTUES)].mean(1) - 0.5
    won = np.where(np.abs(margin) < 1e-6, 0.5, margin > 0)
    rate = dict(zip(("rate", "low", "high"), wilson(float(won.sum()), len(won))))
    if gold is not None:
        gold = gold[kept]
        rate["gold"] = _share(((margin > 0) == (gold > 0))[gold != 0])
    return {**rate, "pairs": len(pairs), "questions": dict(zip(asked, probs.mean(0).tolist())), "label_mass": label_mass}


def versus(judge, tokenizer, answers: list[list[list[dict]]], others: list[list[dict]], *, batch_size: int, keep: Path | None = None) -> tuple[np.ndarray, list[int]]:
    """P(answer better than the prompt's other one), mean of the lenses, virtues and both orders: (P, n); and the indices of the P prompts.

    answers: n lists of dialogues as messages, prompt by prompt; others: one dialogue a prompt. A prompt of which a pair does not fit the judge's context is left
    out. ``keep``: a folder for finished batches. VirtueError: as ``judge_pairs``.
    """
    def cut(messages: list[dict], k: int) -> list[dict]:  # up to the turn of lens k of three
        return messages[:len(messages) - 2 * (len(LENSES) - 1 - k)]

    pairs = {lens: [[(cut(side[i], k), cut(other, k)) for side in answers] for i, other in enumerate(others)] for k, lens in enumerate(LENSES)}
    kept = [i for i in range(len(others)) if all(pair_fits(judge, tokenizer, *pair, lens) for lens in LENSES for pair in pairs[lens][i])]
    probs = [judge_pairs(judge, tokenizer, [pair for i in kept for pair in pairs[lens][i]], lens, batch_size, keep=keep and keep / f"judge-{lens}.jsonl")[0]
             for lens in LENSES if kept]
    return (sum(p.double().mean((1, 2)) for p in probs) / len(LENSES)).view(len(kept), -1).numpy() if kept else np.zeros((0, len(answers))), kept


def summarize(records: list[dict], probs: Tensor, lens: str) -> dict:
    """Numbers of one preference set: records as written, probs (N, 2, 5) as judged."""
    n = len(records)
    votes = Counter(r["votes"] for r in records)
    return {
        "pairs": n,
        "ties": sum(abs(r["label"] - 0.5) < 0.05 for r in records) / max(1, n),  # label within 0.05 of 1/2
        "position_flips": sum(r["position_flips"] for r in records) / max(1, n * len(VIRTUES)),  # share of questions
        "first_place": probs[:, 0].mean().item() / 2 + (1 - probs[:, 1]).mean().item() / 2 if n else None,
        "votes_5": votes[5] / max(1, n), "votes_4": votes[4] / max(1, n), "votes_3": votes[3] / max(1, n),
        "virtue_agreement": virtue_agreement(probs.mean(1)),
        "gold_agreement": gold_agreement(records, lens),
    }
