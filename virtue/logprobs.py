"""Token log-probabilities: the shift by one and the temperature of all training and scoring.

Column j of every (B, L-1) tensor speaks of token j+1 of `input_ids` (B, L). Log-probs are fp32, in
nats. Old, new and reference log-probs must be taken at the temperature at which the tokens were
sampled, or the KL estimates are of other distributions; the sampler's own division by the
temperature is in `generate.draw`. Shapes that do not fit raise ValueError.
"""
from __future__ import annotations

import torch
from torch import Tensor

from virtue.masked import check_shapes

LOG_RATIO_LIMIT = 20.0  # exp(20) = 5e8: past any meaningful ratio; fp32 overflows at exp(88)


def select_next(hidden: Tensor, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The positions that predict masked tokens, and those tokens: `lm_head` need run on no others.

    hidden (B, L, D), input_ids (B, L), mask (B, L-1) -> (N, D) and (N,), N = mask.sum(), row-major.
    """
    B, L = input_ids.shape
    if hidden.shape[:2] != (B, L) or mask.shape != (B, L - 1) or mask.dtype != torch.bool:
        raise ValueError(f"need hidden (B, L, D), input_ids (B, L), bool mask (B, L-1); got "
                         f"{tuple(hidden.shape)}, {(B, L)}, {mask.dtype} {tuple(mask.shape)}")
    return hidden[:, :-1][mask], input_ids[:, 1:][mask]


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return torch.log_softmax(logits.float() / temperature, dim=-1)


def _pick(logp: Tensor, targets: Tensor) -> Tensor:
    if logp.dim() != 2 or targets.shape != logp.shape[:1]:
        raise ValueError(f"logits {tuple(logp.shape)} unfit for targets {tuple(targets.shape)}")
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _entropy(logp: Tensor) -> Tensor:
    return -(logp.exp() * logp).sum(-1)


def gather_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[target]. logits (N, V), targets (N,) -> (N,) fp32.
    ValueError: temperature <= 0, here and in `entropy`."""
    return _pick(_log_softmax(logits, temperature), targets)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum_v p_v log p_v, p = softmax(logits / temperature). finite (N, V) -> (N,) fp32, nats."""
    return _entropy(_log_softmax(logits, temperature))


def logprobs_and_entropy(logits: Tensor, targets: Tensor, temperature: float = 1.0,
                         train_entropy: bool = False) -> tuple[Tensor, Tensor]:
    """`gather_logprobs` and `entropy` of one softmax, two (N,). Without `train_entropy` the entropy
    has no gradient, and nothing of size (N, V) is kept for one."""
    logp = _log_softmax(logits, temperature)
    return _pick(logp, targets), _entropy(logp if train_entropy else logp.detach())


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Undo `select_next`'s flattening: values (N,), mask (B, L-1) with N True entries -> (B, L-1).

    Zero outside the mask; differentiable in `values`.
    """
    if mask.dtype != torch.bool or values.shape != (int(mask.sum()),):
        raise ValueError(f"values {tuple(values.shape)} for {mask.dtype} mask of {mask.sum()}")
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k1 = log p(x) - log ref(x), x ~ p: unbiased for KL(p || ref); single terms may be negative.

    Elementwise. The estimator for the reward; clamping it at 0 would bias it. Schulman 2020,
    "Approximating KL divergence" (joschu.net/blog/kl-approx.html).
    """
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = (r - 1) - log r, r = ref(x) / p(x), x ~ p: unbiased for KL(p || ref), never negative.

    Elementwise. Reported beside k1: as a reward, its gradient is not that of the KL. Schulman 2020,
    as `kl_k1`. Departure: log r is cut at +20 inside the exponential, so a report never overflows.
    """
    k1 = kl_k1(logprobs, ref_logprobs)
    return torch.expm1((-k1).clamp(max=LOG_RATIO_LIMIT)) + k1
