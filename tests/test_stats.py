"""pytest tests/test_stats.py: enumeration, tables, quadrature and simulated coverage."""
import itertools
import math

import numpy as np
import pytest

from virtue.ensemble import study_score
from virtue.stats import effect_size, paired_bootstrap, permutation_test, t_interval

A = np.array([1.0, 2.0, 4.0, 3.0, 5.0])
B = np.array([2.5, 2.0, 6.0, 3.5, 8.0])  # differences 1.5, 0, 2, .5, 3: mean 1.4


def test_bootstrap_of_the_mean_against_full_enumeration():
    """All 5^5 resamples of the pairs give the exact percentiles that the draws approach."""
    d = B - A
    means = [d[list(rows)].mean() for rows in itertools.product(range(5), repeat=5)]
    low, high = np.quantile(means, [0.025, 0.975])
    got = paired_bootstrap(A, B, resamples=20000)
    assert got[0] == pytest.approx(1.4)
    # the exact law lives on a grid of 0.1: the draws' quantile is at most one step off
    assert abs(got[1] - low) < 0.101 and abs(got[2] - high) < 0.101


def test_bootstrap_keeps_pairs_together():
    rng = np.random.default_rng(1)
    a = rng.normal(0, 100, 200)
    assert paired_bootstrap(a, a + 1, resamples=50) == pytest.approx((1, 1, 1))  # no spread at all


def test_bootstrap_width_equals_the_normal_one():
    rng = np.random.default_rng(2)
    a, b = rng.normal(0, 1, 400), rng.normal(0.5, 1, 400)
    diff, low, high = paired_bootstrap(a, b, resamples=4000)
    half = 1.959964 * (b - a).std() / 20
    # Monte Carlo error of a quantile at 4000 draws is about 2 % of the half-width; 8 % is 4 sigma
    assert [diff - low, high - diff] == pytest.approx([half, half], rel=0.08)
    inner = paired_bootstrap(a, b, resamples=4000, level=0.5)
    assert inner[2] - inner[1] == pytest.approx(2 * 0.674490 * half / 1.959964, rel=0.08)


def test_bootstrap_of_the_study_score_over_rows():
    rng = np.random.default_rng(3)
    a = rng.normal(0, 1, (150, 3))
    b = a + [1.0, 1.0, 1.0]  # a shift of all scores: every resample differs by exactly 1
    assert paired_bootstrap(a, b, resamples=50, statistic=study_score) == pytest.approx((1, 1, 1))
    wide = paired_bootstrap(a, 3 * a, resamples=200, statistic=study_score)
    assert wide[0] == pytest.approx(3 * (a.mean() - 0.5 * a.std()) - a.mean() + 0.5 * a.std())
    assert wide[1] < wide[0] < wide[2]
    assert paired_bootstrap(a, b, resamples=20) == pytest.approx((1, 1, 1))  # default: mean of all


def test_bootstrap_is_seeded():
    a, b = np.random.default_rng(9).normal(0, 1, (2, 40))
    one, same, other = (paired_bootstrap(a, b, resamples=999, seed=s) for s in (7, 7, 8))
    assert one == same and one[0] == other[0] and one != other


@pytest.mark.parametrize("a, b", [(A, B), (A, A), (A, A[::-1]), (B, A), (A[:2], B[:2])])
def test_permutation_exact_equals_enumeration(a, b):
    d = b - a
    flips = [abs(np.dot(signs, d)) for signs in itertools.product((1, -1), repeat=len(d))]
    expected = sum(f >= abs(d.sum()) - 1e-9 for f in flips) / len(flips)
    assert permutation_test(a, b) == pytest.approx(expected, abs=1e-12)


def test_permutation_by_hand():
    # d = 1, 2, 3, 4 all positive: only ++++ and ---- reach 10, of 16
    assert permutation_test(np.zeros(4), np.array([1.0, 2, 3, 4])) == 2 / 16
    assert permutation_test(A, A) == 1
    # .1 + .2 - .3 + .7 is 2e-16 above its tie -.1 - .2 + .3 + .7; integers have no such trouble
    for d in itertools.product((1, 2, -3, 7, 6), repeat=4):
        tenths = permutation_test(np.zeros(4), np.array(d) / 10)
        assert tenths == permutation_test(np.zeros(4), np.array(d))


def test_permutation_sampled_agrees_with_exact_and_is_never_zero():
    rng = np.random.default_rng(4)
    a, b = rng.normal(0, 1, 12), rng.normal(0.6, 1, 12)
    exact = permutation_test(a, b, resamples=4096)
    sampled = permutation_test(a, b, resamples=4095, seed=1)
    assert exact * 4096 == int(exact * 4096) and 0.005 < exact < 0.5
    assert abs(sampled - exact) < 4 * math.sqrt(exact * (1 - exact) / 4095) and sampled != exact
    assert permutation_test(np.zeros(50), np.ones(50), resamples=99) == 1 / 100
    assert permutation_test(np.zeros(2000), np.ones(2000), resamples=9) == 1 / 10  # 2^n > any float


def test_permutation_holds_its_level():
    rng = np.random.default_rng(5)
    p = [permutation_test(np.zeros(8), rng.normal(0, 1, 8)) for _ in range(400)]
    rate = np.mean(np.array(p) <= 0.05)
    assert 0.02 < rate < 0.085  # exact rate 12/256 = .047, sigma at 400 trials .0106


def test_effect_size():
    # differences 1.5, 0, 2, .5, 3: squares of deviation .01 + 1.96 + .36 + .81 + 2.56 = 5.7
    assert effect_size(A, B) == pytest.approx(1.4 / math.sqrt(5.7 / 4))
    assert effect_size(B, A) == pytest.approx(-effect_size(A, B))
    assert effect_size(A, A) == 0
    assert effect_size(A, A + 1) == math.inf and effect_size(A, A - 1) == -math.inf


# Two-sided quantiles as in printed tables of Student's distribution.
@pytest.mark.parametrize("n, level, t", [
    (2, 0.95, 12.7062047), (3, 0.95, 4.3026527), (4, 0.95, 3.1824463), (5, 0.95, 2.7764451),
    (6, 0.99, 4.0321430), (10, 0.95, 2.2621572), (11, 0.90, 1.8124611), (31, 0.95, 2.0422725),
])
def test_t_interval_against_the_table(n, level, t):
    x = np.arange(n) * 1.0
    mean, low, high = t_interval(x, level)
    half = t * x.std(ddof=1) / math.sqrt(n)
    assert mean == (n - 1) / 2
    assert [high - mean, mean - low] == pytest.approx([half, half], rel=1e-7)


@pytest.mark.parametrize("n, level", [(3, 0.5), (8, 0.95), (9, 0.8), (201, 0.95), (200, 0.999)])
def test_t_interval_against_quadrature(n, level):
    """The density, integrated by Simpson's rule over the interval found, must give the level."""
    x, df = np.random.default_rng(n).normal(0, 1, n), n - 1
    mean, low, high = t_interval(x, level)
    t = (high - mean) / (x.std(ddof=1) / math.sqrt(n))
    u = np.linspace(-t, t, 4001)
    log_norm = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    density = np.exp(log_norm - (df + 1) / 2 * np.log1p(u * u / df))
    simpson = density[0] + density[-1] + 4 * density[1::2].sum() + 2 * density[2:-1:2].sum()
    simpson *= (u[1] - u[0]) / 3
    assert simpson == pytest.approx(level, abs=1e-8)


def test_t_interval_limits():
    assert t_interval(np.full(4, 2.0)) == (2.0, 2.0, 2.0)
    x = np.random.default_rng(6).normal(0, 1, 20001)
    mean, _, high = t_interval(x)  # many seeds: the normal quantile
    assert (high - mean) / (x.std(ddof=1) / math.sqrt(20001)) == pytest.approx(1.959964, abs=2e-4)


def test_inputs_unchanged():
    a, b = A.copy(), B.copy()
    paired_bootstrap(a, b, resamples=9), permutation_test(a, b), permutation_test(a, b, resamples=9)
    effect_size(a, b), t_interval(a)
    assert (a == A).all() and (b == B).all()


@pytest.mark.parametrize("f", [paired_bootstrap, permutation_test, effect_size])
def test_bad_input(f):
    for a, b in ((A, B[:4]), (A[:1], B[:1]), (A[:0], B[:0]), (1.0, 2.0)):
        with pytest.raises(ValueError, match="2 rows"):
            f(a, b)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            f(A, np.where(A == 4, bad, B))
    if f is not paired_bootstrap:
        with pytest.raises(ValueError, match="2 rows"):
            f(np.ones((5, 3)), np.ones((5, 3)))


def test_bad_settings():
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match="level"):
            t_interval(A, level)
        with pytest.raises(ValueError, match="level"):
            paired_bootstrap(A, B, level=level)
    for f in (paired_bootstrap, permutation_test):
        with pytest.raises(ValueError, match="resamples"):
            f(A, B, resamples=0)
    for bad in ([1.0], [[1.0, 2.0], [3.0, 4.0]]):
        with pytest.raises(ValueError, match="2 rows"):
            t_interval(bad)
    with pytest.raises(ValueError, match="finite"):
        t_interval([1.0, math.nan])
