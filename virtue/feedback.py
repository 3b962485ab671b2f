"""What the judge's verdicts say about the judge: ties, flips, votes, halo; on toy, agreement with gold."""
from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from virtue.ethics import LENSES, VIRTUES


def virtue_agreement(probs: Tensor) -> float | None:
    """Mean correlation, over the ten pairs of virtues, of P(first is better); probs (N, 5).

    Near 1 the five questions are one halo judgement; near 0 they are five. None below three pairs of
    dialogues, or where a virtue's answers never vary.
    """
    if len(probs) < 3 or (probs.std(0) < 1e-6).any():
        return None
    correlation = torch.corrcoef(probs.double().T)
    return correlation[torch.ones_like(correlation, dtype=torch.bool).triu(1)].mean().item()


def gold_agreement(records: list[dict], lens: str) -> float | None:
    """Share of toy pairs whose chosen dialogue has the higher gold for the lens; equal ones left out.

    For reports only. None where the prompts are not the toy world's.
    """
    from virtue.toy.gold import gold
    k, right, clear = LENSES.index(lens), 0, 0
    for record in records:
        try:
            chosen, rejected = (gold(record[side][0]["content"], [m["content"] for m in record[side][1::2]]
                                     + [""] * (2 - k)).lenses[lens] for side in ("chosen", "rejected"))
        except ValueError:
            return None
        right, clear = right + (chosen > rejected), clear + (chosen != rejected)
    return right / clear if clear else None


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
