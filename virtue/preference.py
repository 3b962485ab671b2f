"""Pairwise preference: the loss that trains a reward model and the measures that judge it.

A label is P(first of the pair is better) in [0, 1], from the judge. Swapping a pair (scores
exchanged, label 1 - label) changes no result here. All tensors are (B,). ValueError: shapes that
differ, an empty batch, probabilities outside [0, 1].
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from virtue.masked import check_shapes


def _check_probabilities(**tensors: Tensor) -> None:
    for name, p in tensors.items():
        if p.numel() == 0 or not bool(((p >= 0) & (p <= 1)).all()):
            raise ValueError(f"{name} must be probabilities in [0, 1], at least one")


def pairwise_loss(chosen_scores: Tensor, rejected_scores: Tensor,
                  label: Tensor | None = None) -> Tensor:
    """Bradley-Terry loss of each pair, (B,) -> (B,), in nats, finite for all finite scores.

        L = -p log sigmoid(d) - (1 - p) log sigmoid(-d),   d = chosen - rejected

    p = `label`, 1 unless given: Ouyang et al. 2022, arXiv:2203.02155, eq. 1. Departure: soft
    labels, as Lee et al. 2023, arXiv:2309.00267.
    """
    label = torch.ones_like(chosen_scores) if label is None else label
    check_shapes(chosen_scores=chosen_scores, rejected_scores=rejected_scores, label=label)
    _check_probabilities(label=label)
    d = chosen_scores - rejected_scores
    return -label * F.logsigmoid(d) - (1 - label) * F.logsigmoid(-d)


def accuracy(margins: Tensor, labels: Tensor) -> float:
    """Share of pairs whose score difference `margins` has the label's sign; both (B,) -> [0, 1].

    A label of 0.5 is left out; a difference of exactly 0 counts one half: a zero head scores 0.5.
    ValueError: no pair is left; shapes that differ, labels outside [0, 1].
    """
    check_shapes(margins=margins, labels=labels)
    _check_probabilities(labels=labels)
    decided = labels != 0.5
    if not bool(decided.any()):
        raise ValueError("no decided pair: every label is exactly 0.5")
    agree = torch.sign(margins[decided]) * torch.sign(labels[decided] - 0.5)  # -1, 0, 1
    return ((agree.double() + 1) / 2).mean().item()


def log_loss(margins: Tensor, labels: Tensor) -> float:
    """Mean `pairwise_loss` of score differences (B,) under soft labels (B,), in nats; log 2 = 0.693
    where nothing is known. ValueError: no pair; shapes or labels as in `accuracy`."""
    margins, labels = margins.double(), labels.double()
    return pairwise_loss(margins, torch.zeros_like(margins), labels).mean().item()


def _binned(probs: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each pair, (B,): confidence in the preferred side, the label's probability of that side,
    and the number of the bin on [0.5, 1] in which the confidence falls."""
    check_shapes(probs=probs, labels=labels)
    _check_probabilities(probs=probs, labels=labels)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    p, y = probs.double(), labels.double()
    confidence = torch.maximum(p, 1 - p)
    agreement = 0.5 + torch.sign(p - 0.5) * (y - 0.5)
    index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    return confidence, agreement, index


def calibration_error(probs: Tensor, labels: Tensor, bins: int = 10) -> float:
    """Expected calibration error: sum_b n_b / n |confidence_b - agreement_b|, `bins` on [0.5, 1].

    Guo et al. 2017 (arXiv:1706.04599, eq. 3), two classes: confidence max(p, 1 - p), agreement the
    label's probability of the side that the model prefers (0.5 where p = 0.5). So the order within
    pairs does not matter, even where all list the chosen one first. 0 = calibrated.
    """
    confidence, agreement, index = _binned(probs, labels, bins)
    gaps = confidence.new_zeros(bins).index_add(0, index, confidence - agreement)
    return gaps.abs().sum().item() / len(probs)  # n_b * |mean gap| = |sum of gaps|


def calibration_bins(probs: Tensor, labels: Tensor, bins: int = 5) -> list[dict[str, float]]:
    """The reliability diagram behind `calibration_error`: of each bin {"predicted", "label",
    "pairs"}, its mean confidence, mean agreement and size; empty bins are left out.

    probs, labels: (B,), of "the first is better". ValueError: as `calibration_error`.
    """
    confidence, agreement, index = _binned(probs, labels, bins)
    return [{"predicted": confidence[index == b].mean().item(),
             "label": agreement[index == b].mean().item(), "pairs": int((index == b).sum())}
            for b in index.unique().tolist()]
