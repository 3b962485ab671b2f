"""How sure is a difference? Paired statistics in NumPy float64, seeded.

`a` and `b` hold one row for each held-out prompt, in the same order; differences are b - a. Arrays
of unlike shape, fewer than 2 rows, values not finite, and settings out of range raise ValueError.
"""
from __future__ import annotations

import math
from typing import Callable

import numpy as np
from numpy.typing import ArrayLike


def _paired(a: ArrayLike, b: ArrayLike, max_dim: int = 1) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or not 1 <= a.ndim <= max_dim or len(a) < 2:
        raise ValueError(f"need arrays of one shape with 2 rows or more, got {a.shape}, {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("scores must be finite")
    return a, b


def _in_range(level: float = 0.5, resamples: int = 1) -> None:
    if not (0 < level < 1 and resamples >= 1):
        raise ValueError(f"need 0 < level < 1, resamples >= 1; got {level}, {resamples}")


def paired_bootstrap(a: ArrayLike, b: ArrayLike, *, resamples: int = 10000, level: float = 0.95,
                     seed: int = 0, statistic: Callable[[np.ndarray], float] | None = None,
                     ) -> tuple[float, float, float]:
    """statistic(b) - statistic(a) with its percentile interval -> (difference, low, high).

    Rows of both are resampled together. a, b (n,) or (n, K); statistic: rows -> scalar, default the
    mean. Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    a, b = _paired(a, b, max_dim=2)
    _in_range(level, resamples)
    statistic, rng, draws = statistic or np.mean, np.random.default_rng(seed), np.empty(resamples)
    for i in range(resamples):
        rows = rng.integers(0, len(a), len(a))
        draws[i] = statistic(b[rows]) - statistic(a[rows])
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(statistic(b) - statistic(a)), float(low), float(high)


def permutation_test(a: ArrayLike, b: ArrayLike, *, resamples: int = 10000, seed: int = 0) -> float:
    """Two-sided p of "no difference": share of sign flips of b - a with |mean| at least as large.

    a, b (n,) -> p in (0, 1]. All flips if 2^n <= resamples, else (1 + hits) / (1 + resamples):
    never 0 (Phipson and Smyth 2010, doi:10.2202/1544-6115.1585).
    """
    a, b = _paired(a, b)
    _in_range(resamples=resamples)
    d, n = b - a, len(a)
    reach = abs(d.sum()) - 1e-12 * np.abs(d).sum()  # flips that tie but for rounding are hits
    if n < 32 and 2**n <= resamples:
        flips = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)  # (2^n, n) of +-1
        return float((np.abs(flips @ d) >= reach).mean())
    rng = np.random.default_rng(seed)
    hits = sum(abs((1 - 2 * rng.integers(0, 2, n)) @ d) >= reach for _ in range(resamples))
    return float((1 + hits) / (1 + resamples))


def effect_size(a: ArrayLike, b: ArrayLike) -> float:
    """Cohen's d_z = mean(b - a) / std(b - a), divisor n - 1. a, b (n,).

    0 when all differences are 0, +-inf when they are another constant. Cohen 1988, section 2.3.5.
    """
    a, b = _paired(a, b)
    mean, std = (b - a).mean(), (b - a).std(ddof=1)
    if std > 0:
        return float(mean / std)
    return math.copysign(math.inf, mean) if mean else 0.0


def _t_within(theta: float, df: int) -> float:
    """P(|T| < sqrt(df) tan(theta)), T Student's: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4."""
    c, odd = math.cos(theta), df % 2
    term, total = (c if odd else 1.0), 0.0
    for k in range(odd, df - 1, 2):
        total += term
        term *= c * c * (k + 1) / (k + 2)
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total


def t_interval(x: ArrayLike, level: float = 0.95) -> tuple[float, float, float]:
    """mean +- t_{n-1} std / sqrt(n), std with divisor n - 1. Seeds x (n,) -> (mean, low, high).

    Student 1908, "The probable error of a mean".
    """
    x, _ = _paired(x, x)
    _in_range(level)
    df, low, high = len(x) - 1, 0.0, math.pi / 2
    for _ in range(80):  # bisection on the angle, where the probability is monotone and bounded
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, df) < level else (low, middle)
    half = math.sqrt(df) * math.tan(low) * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)
