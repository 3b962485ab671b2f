"""Statistics over the real entries of padded tensors.

`mask` is bool with the shape of `x`; True = real token. What lies outside never reaches a result,
not even NaN or infinity, and its gradient is zero. ValueError: shapes that differ, a mask that is
not bool, an empty mask (an average over nothing cannot be reported).
"""
from __future__ import annotations

import torch
from torch import Tensor


def check_shapes(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have one shape and the one named `mask` is bool.

    (B,) against (B, T) broadcasts silently whenever B == T; here that is always an error.
    """
    if len({tuple(t.shape) for t in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"shapes must be equal: {shapes}")
    if "mask" in tensors and tensors["mask"].dtype != torch.bool:
        raise ValueError(f"mask must be bool (True = real token), not {tensors['mask'].dtype}")


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """sum_i m_i x_i / sum_i m_i. x, mask: any one shape -> 0-d, or without dimension `dim`."""
    check_shapes(x=x, mask=mask)
    count = mask.sum() if dim is None else mask.sum(dim)
    if bool((count == 0).any()):
        raise ValueError(f"empty mask: no True entry to average over (shape {tuple(mask.shape)})")
    kept = torch.where(mask, x, 0)  # not x * mask: NaN * 0 is NaN
    return (kept.sum() if dim is None else kept.sum(dim)) / count


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = False) -> Tensor:
    """sum_i m_i (x_i - mean)^2 / n, or / (n - 1) if `unbiased`. x, mask: any one shape -> 0-d.

    ValueError: `unbiased` with fewer than two entries.
    """
    # Masked before the square, too: its gradient is 0 * 2x, and 0 * NaN is NaN.
    deviation = torch.where(mask, x - masked_mean(x, mask), 0)
    variance = masked_mean(deviation**2, mask)
    n = int(mask.sum())
    if unbiased and n < 2:
        raise ValueError(f"the unbiased variance needs at least 2 masked entries, got {n}")
    return variance * n / (n - 1) if unbiased else variance


def rounding_variance(mask: Tensor, *tensors: Tensor) -> Tensor:
    """The variance that rounding alone may give to what is constant: (8 eps max |x|)^2 -> 0-d.

    The largest entry under `mask` of all `tensors` counts, and their type's eps: of numbers that
    were computed from one another, each carries the rounding of the largest.
    """
    largest = torch.stack([torch.where(mask, x, 0).abs().max() for x in tensors]).max()
    return (8 * torch.finfo(largest.dtype).eps * largest) ** 2


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) under the mask, 0 outside. x, mask: any one shape -> the same.

    Variance with divisor n. Entries that are constant to rounding give 0, not NaN and no rounding
    made large. After the public code of Ziegler et al. 2019 (arXiv:1909.08593), with a mask. Give
    it the whole batch, not a minibatch.
    """
    mean, variance = masked_mean(x, mask), masked_var(x, mask)
    varies = mask & (variance > rounding_variance(mask, x))
    return torch.where(varies, x - mean, 0) * torch.rsqrt(variance + 1e-8)
