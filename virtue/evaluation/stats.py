"""How sure is a difference? Paired statistics in NumPy float64, seeded.

`a` and `b` hold one row for each held-out prompt, in the same order; differences are b - a. Arrays
of unlike shape, fewer than 2 rows, values not finite, and settings out of range raise ValueError.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


Interval = tuple[float, float, float]  # estimate, low, high


def _paired(a: ArrayLike, b: ArrayLike, max_dim: int = 1, rows: int = 2) -> tuple[np.ndarray, ...]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or not 1 <= a.ndim <= max_dim or len(a) < rows:
        raise ValueError(f"need arrays of one shape with {rows} rows or more, "
                         f"got {a.shape}, {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("scores must be finite")
    return a, b


def _in_range(level: float = 0.5, resamples: int = 1) -> None:
    if not (0 < level < 1 and resamples >= 1):
        raise ValueError(f"need 0 < level < 1, resamples >= 1; got {level}, {resamples}")


def paired_bootstrap(a: ArrayLike, b: ArrayLike, *, resamples: int = 10000, level: float = 0.95,
                     seed: int = 0, statistic: Callable[[np.ndarray], float] | None = None,
                     ) -> Interval:
    """statistic(b) - statistic(a) with its percentile interval.

    Rows of both are resampled together. a, b (n,) or (n, K); statistic: rows -> scalar, default the
    mean. Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    a, b = _paired(a, b, max_dim=2)
    _in_range(level, resamples)
    rows = _resampled(len(a), resamples, seed)
    if statistic is None:
        d = (b - a).reshape(len(a), -1).mean(1)
        difference, draws = d.mean(), d[rows].mean(1)
    else:
        difference = statistic(b) - statistic(a)
        draws = np.array([statistic(b[r]) - statistic(a[r]) for r in rows])
    return _interval(difference, draws, level)


def _resampled(n: int, resamples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n, (resamples, n))


def _interval(difference: float, draws: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(difference), float(low), float(high)


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


def t_interval(x: ArrayLike, level: float = 0.95) -> Interval:
    """mean +- t_{n-1} std / sqrt(n), std with divisor n - 1, of seeds x (n,).

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


def wilson(right: float, n: int, level: float = 0.95) -> Interval:
    """A share with its interval, for counts that a bootstrap cannot resample, such as 0 of 4
    -> (right / n, low, high).

    right of n >= 1 pairs, a tie counting one half. The shares p with |right / n - p| <=
    z sqrt(p (1 - p) / n). Wilson 1927, "Probable inference, the law of succession, and statistical
    inference". ValueError: right not in [0, n].
    """
    if not (n >= 1 and 0 <= right <= n):
        raise ValueError(f"need 0 <= right <= n, n >= 1, got {right} of {n}")
    _in_range(level)
    share, z2 = right / n, NormalDist().inv_cdf((1 + level) / 2) ** 2
    middle, half = share + z2 / (2 * n), math.sqrt(z2 * (share * (1 - share) + z2 / (4 * n)) / n)
    return share, max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


def hierarchical_bootstrap(a: Sequence[ArrayLike], b: Sequence[ArrayLike], *,
                           crossed: bool = False, resamples: int = 2000, level: float = 0.95,
                           seed: int = 0) -> Interval:
    """Mean over seeds of the mean over prompts of b - a, with its percentile interval.

    a[s], b[s] (n_s,), n_s >= 1: seed s, paired; 2 seeds or more. Draws seeds with replacement, then
    prompts: anew within each drawn seed (nested), or with `crossed` the same ones in all of them,
    which is necessary where every seed was asked the same n prompts in this order: many seeds then
    do not average out what is hard in a prompt. Where seeds differ most, the variance is
    (S - 1) / S of the true one: for few seeds see also `t_interval`. Davison and Hinkley 1997,
    "Bootstrap Methods", section 3.8; crossed: Owen 2007, "The pigeonhole bootstrap". ValueError
    also for `crossed` with unequal n_s.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"need the same 2 seeds or more in a and b, got {len(a)}, {len(b)}")
    _in_range(level, resamples)
    d = [y - x for x, y in (_paired(x, y, rows=1) for x, y in zip(a, b))]
    if crossed and len({len(x) for x in d}) > 1:
        raise ValueError(f"crossed: every seed needs the same prompts, got {[len(x) for x in d]}")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(d), (resamples, len(d)))
    if crossed:
        prompts = rng.integers(0, len(d[0]), (resamples, 1, len(d[0])))
        means = np.stack(d)[drawn[:, :, None], prompts].mean(2)
    else:
        means = np.empty(drawn.shape)
        for s, x in enumerate(d):  # each time that seed s was drawn it gets prompts of its own
            means[drawn == s] = x[rng.integers(0, len(x), ((drawn == s).sum(), len(x)))].mean(1)
    return _interval(np.mean([x.mean() for x in d]), means.mean(1), level)


def holm(p: ArrayLike) -> np.ndarray:
    """Adjusted p (m,) in the input's order: reject all <= alpha, then P(any false one) <= alpha.

    max over j <= i of (m - j + 1) p_(j), at most 1. p (m,) in [0, 1], else ValueError. Needs no
    independence. Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    p = np.asarray(p, np.float64)
    if p.ndim != 1 or not len(p) or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"need p values (m,) in [0, 1], got {p}")
    order, adjusted = np.argsort(p), np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order]), 1)
    return adjusted


def _intercept(d: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Of the least-squares lines of d on x, both (..., n) -> (...,)."""
    constant = np.ptp(x, axis=-1) <= 1e-9 * np.abs(x).max(-1)  # but for rounding, as lengths + 0.1
    mean, centred = x.mean(-1), x - x.mean(-1, keepdims=True)
    slope = (centred * d).sum(-1) / np.where(constant, 1, (centred * centred).sum(-1))
    of_constant = np.where(x[..., 0] == 0, d.mean(-1), math.nan)
    return np.where(constant, of_constant, d.mean(-1) - slope * mean)


def _differences(a: ArrayLike, b: ArrayLike, length_a: ArrayLike, length_b: ArrayLike,
                 ) -> tuple[np.ndarray, np.ndarray]:
    (a, b), (length_a, length_b) = _paired(a, b), _paired(length_a, length_b)
    if len(a) != len(length_a):
        raise ValueError(f"need one length for each score, got {len(length_a)} for {len(a)}")
    return b - a, length_b - length_a


def length_controlled(a: ArrayLike, b: ArrayLike, length_a: ArrayLike, length_b: ArrayLike,
                      ) -> float:
    """Mean of b - a at equal length, all (n,): intercept of the line of b - a on the difference of
    length.

    The mean where lengths are equal in every row. NaN where they differ by one constant: what
    length does cannot then be told from what the model does. Dubois et al. 2024
    (arXiv:2404.04475), in linear form.
    """
    return float(_intercept(*_differences(a, b, length_a, length_b)))


def length_controlled_interval(a: ArrayLike, b: ArrayLike, length_a: ArrayLike,
                               length_b: ArrayLike, *, resamples: int = 2000, level: float = 0.95,
                               seed: int = 0) -> Interval:
    """`length_controlled` with a `paired_bootstrap` interval over rows.

    low and high are NaN if any resample gives NaN, which happens where the difference of length
    varies in too few rows.
    """
    (d, x), _ = _differences(a, b, length_a, length_b), _in_range(level, resamples)
    rows = _resampled(len(d), resamples, seed)
    return _interval(_intercept(d, x), _intercept(d[rows], x[rows]), level)


def best_of_n(proxy: ArrayLike, gold: ArrayLike, n: int) -> float:
    """E[gold of the best of n by proxy], mean over P prompts; unbiased. proxy, gold (P, N),
    1 <= n <= N.

    sum_i C(i - 1, n - 1) / C(N, n) gold_(i), i the rank by proxy: the mean over all subsets of n
    of the N samples, ties broken at random. Nakano et al. 2021 (arXiv:2112.09332), Gao et al. 2022
    (arXiv:2210.10760).
    """
    proxy, gold = _paired(proxy, gold, max_dim=2, rows=1)
    if proxy.ndim != 2 or n not in range(1, proxy.shape[1] + 1):
        raise ValueError("need (prompts, samples) and 1 <= n <= samples, "
                         f"got {proxy.shape}, n = {n}")
    N, total = proxy.shape[1], 0.0
    weights = np.array([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)])
    for x, y in zip(proxy, gold):
        _, tied, sizes = np.unique(x, return_inverse=True, return_counts=True)
        total += weights @ np.repeat(np.bincount(tied, y) / sizes, sizes)  # of ties their mean
    return float(total / len(proxy))


def best_of_n_kl(n: int) -> float:
    """The largest KL, in nats, of best of n from its model: log n - (n - 1) / n. Beirami et al.
    2024 (arXiv:2401.01879)."""
    if n < 1:
        raise ValueError(f"need n >= 1, got {n}")
    return math.log(n) - (n - 1) / n


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rho: Pearson's correlation of ranks, ties at their mean. x, y (n,) -> [-1, 1].

    NaN where one of them is constant. Spearman 1904.
    """
    x, y = _paired(x, y)

    def ranks(values: np.ndarray) -> np.ndarray:
        _, group, count = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[group]
    a, b = (r - r.mean() for r in (ranks(x), ranks(y)))
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else math.nan
