"""From K reward models to one reward.

The three reward models (action, motivation, consequence) are three objectives, not three seeds of
one. Where Coste et al. read the spread of an ensemble as epistemic uncertainty, here it is conflict
of values: `uwo` prefers what all lenses like equally to what shines in one lens only, and says
nothing of how sure any model is. K is the whole population, so spreads divide by K.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from virtue import AGGREGATORS

ADDITIVE = ("mean", "weighted")  # each model's share can be paid where its own turn ends


def standardize(scores: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """z_k = (s_k - mean_k) / std_k, as Bradley-Terry leaves offset and scale free. (K, B) -> same.

    mean, std (K,): of held-out dialogues of the starting policy. A constant model (std < 1e-6) is
    centred only: division would give NaN or amplified noise. ValueError: std negative, not finite.
    """
    if scores.dim() != 2 or mean.shape != scores.shape[:1] or std.shape != scores.shape[:1]:
        raise ValueError(f"need (K, B), (K,), (K,); got {scores.shape}, {mean.shape}, {std.shape}")
    if not bool((torch.isfinite(std) & (std >= 0)).all()):
        raise ValueError(f"std must be finite and not negative, got {std.tolist()}")
    scale = torch.where(std > 1e-6, std, torch.ones_like(std))
    return (scores - mean.unsqueeze(-1)) / scale.unsqueeze(-1)


def shares(scores: Tensor, method: str, weights: Tensor | None = None) -> Tensor:
    """Each model's part of an ADDITIVE aggregate; they sum over K to it. (K, B) -> (K, B).

    mean: s_k / K. weighted: w_k s_k, weights (K,) as given, not normalised, None = 1/K (Wu et al.
    2023, arXiv:2306.01693). ValueError: another method; weights not finite.
    """
    if scores.dim() != 2 or scores.shape[0] == 0:
        raise ValueError(f"scores must be (K, B) with K >= 1, got {tuple(scores.shape)}")
    if method not in ADDITIVE:
        raise ValueError(f"{method!r} has no shares; additive are {', '.join(ADDITIVE)}")
    if method == "mean" or weights is None:
        return scores / scores.shape[0]
    if weights.shape != scores.shape[:1] or not bool(torch.isfinite(weights).all()):
        raise ValueError(f"weights must be {scores.shape[0]} finite numbers: {weights.tolist()}")
    return weights.to(scores).unsqueeze(-1) * scores


def aggregate(scores: Tensor, method: str, weights: Tensor | None = None, coef: float = 0.5,
              use_variance: bool = False, reference: float | Tensor = 1.0) -> Tensor:
    """One reward per dialogue, higher is better, from standardised scores (K, B) -> (B,).

        mean      sum_k s_k / K
        weighted  sum_k w_k s_k                   Wu et al. 2023 (arXiv:2306.01693)
        min       min_k s_k                       "WCO", Coste et al. 2023 (arXiv:2310.02743)
        uwo       mean - coef * std (divisor K)   "UWO", ibid., with the variance: use_variance
        median    middle score or mean of two     Eisenstein et al. 2023 (arXiv:2312.09244)
        lsc       sum_k log sigmoid(s_k - ref_k)  soft AND: Wang et al. 2024 (arXiv:2402.00742)

    For `uwo` the spread is conflict of values, not epistemic uncertainty: see the top of this file.
    `reference`, scalar or (K,), is the score that counts as good: one for all prompts, where Wang
    et al. take one of each prompt, from samples of the policy before RL. Each method ignores the
    settings of the others, so that one call with all of them can run over AGGREGATORS. ValueError:
    unknown.
    """
    if method not in AGGREGATORS:
        raise ValueError(f"unknown aggregator {method!r}; known are {', '.join(AGGREGATORS)}")
    if method in ADDITIVE:
        return shares(scores, method, weights).sum(0)
    if scores.dim() != 2 or scores.shape[0] == 0:
        raise ValueError(f"scores must be (K, B) with K >= 1, got {tuple(scores.shape)}")
    if method == "min":
        return scores.amin(0)
    if method == "uwo":
        variance = scores.var(0, correction=0)
        return scores.mean(0) - coef * (variance if use_variance else variance.sqrt())
    K = scores.shape[0]
    if method == "median":  # torch.median would take the lower of two middle scores
        ranked = scores.sort(0).values
        return (ranked[(K - 1) // 2] + ranked[K // 2]) / 2
    assert method == "lsc", method  # the last of AGGREGATORS
    reference = torch.as_tensor(reference, dtype=scores.dtype, device=scores.device)
    if reference.shape not in ((), (K,)):
        raise ValueError(f"reference must be a scalar or ({K},), got {tuple(reference.shape)}")
    return F.logsigmoid(scores - reference.reshape(-1, 1)).sum(0)


def study_score(scores, coef: float = 0.5):
    """The study's Score: mean - coef * population std, both over all K*n scores at once -> scalar.

    H. Li, "Virtue Ethics Guidance of LLMs with RLAIF and Ensemble of Reward Models" (EPFL, 2024).
    scores (K, n) or (n, K), torch or NumPy (a `statistic` for `virtue.evaluation.stats`). On raw
    scores, std holds the arbitrary offsets between the models; standardise to be rid of them.
    ValueError: not two dimensions, or empty.
    """
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores must be (K, n) and not empty, got {tuple(scores.shape)}")
    mean = scores.mean()
    return mean - coef * ((scores - mean) ** 2).mean() ** 0.5
