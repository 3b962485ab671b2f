"""pytest tests/test_stats.py: enumeration, tables, quadrature and simulated coverage."""
import itertools
import math

import numpy as np
import pytest

from virtue.ensemble import study_score
from virtue.evaluation.stats import (
    best_of_n,
    best_of_n_kl,
    effect_size,
    hierarchical_bootstrap,
    holm,
    length_controlled,
    length_controlled_interval,
    paired_bootstrap,
    permutation_test,
    rank_correlation,
    t_interval,
    wilson,
)

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


def test_wilson_against_closed_forms():
    z = 1.9599639845400545
    assert wilson(0, 4) == pytest.approx((0, 0, z * z / (4 + z * z)))
    assert wilson(4, 4) == pytest.approx((1, 4 / (4 + z * z), 1))
    half = z / 2 / math.sqrt(6 + z * z)
    assert wilson(3, 6) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    # at its ends the score test just rejects; a tie is half a success
    for p in wilson(2.5, 9, 0.8)[1:]:
        assert abs(2.5 / 9 - p) / math.sqrt(p * (1 - p) / 9) == pytest.approx(1.2815515655446004)
    for bad in ((5, 4), (-1, 4), (0, 0), (1, 2, 1.0)):
        with pytest.raises(ValueError):
            wilson(*bad)


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


def test_hierarchical_against_full_enumeration():
    """Seeds of 1, 2, 3 prompts: every draw of seeds and of their prompts, with its probability."""
    b = [np.array([0.3]), np.array([1.0, 2.7]), np.array([-1.1, 0.6, 2.2])]
    a = [np.full(len(x), 5.0) for x in b]
    # the means of one seed, all equally likely
    one = [[np.mean(c) for c in itertools.product(x, repeat=len(x))] for x in b]
    values, odds = [], []
    for seeds in itertools.product(range(3), repeat=3):
        for means in itertools.product(*(one[s] for s in seeds)):
            values.append(np.mean(means) - 5)
            odds.append(1 / 27 / math.prod(len(one[s]) for s in seeds))
    values, odds = np.array(values), np.array(odds)
    for level in (0.2, 0.5, 0.8, 0.95):
        got = hierarchical_bootstrap(a, b, resamples=20000, level=level)
        assert got[0] == pytest.approx(np.mean([x.mean() for x in b]) - 5)
        for q, x in zip(((1 - level) / 2, (1 + level) / 2), got[1:]):
            slack = 4 * math.sqrt(q * (1 - q) / 20000)
            assert odds[values < x - 1e-9].sum() <= q + slack
            assert odds[values <= x + 1e-9].sum() >= q - slack


def test_crossed_against_full_enumeration():
    """Two seeds with three common prompts: every draw of seeds and, for all of them, of prompts."""
    b = np.array([[0.3, 1.0, -2.7], [1.1, 0.6, 2.2]])
    values = np.array([np.mean([b[s, list(prompts)].mean() for s in seeds])
                       for seeds in itertools.product(range(2), repeat=2)
                       for prompts in itertools.product(range(3), repeat=3)])  # equally likely
    for level in (0.2, 0.5, 0.8, 0.95):
        got = hierarchical_bootstrap(0 * b, b, crossed=True, resamples=20000, level=level)
        assert got[0] == pytest.approx(b.mean())
        for q, x in zip(((1 - level) / 2, (1 + level) / 2), got[1:]):
            slack = 4 * math.sqrt(q * (1 - q) / 20000)
            assert (values < x - 1e-9).mean() <= q + slack
            assert (values <= x + 1e-9).mean() >= q - slack


def test_crossed_coverage_where_prompts_are_shared():
    """A prompt is hard for all seeds: nested draws divide that by their number, and miss."""
    rng, hits, nested = np.random.default_rng(16), 0, 0
    for trial in range(200):
        d = 0.3 + rng.normal(0, 0.02, (8, 1)) + rng.normal(0, 1, (1, 40))
        d = d + rng.normal(0, 1, (8, 40))
        for crossed in (True, False):
            _, low, high = hierarchical_bootstrap(0 * d, d, crossed=crossed,
                                                  resamples=300, seed=trial)
            hits = hits + (crossed and low <= 0.3 <= high)
            nested = nested + (not crossed and low <= 0.3 <= high)
    assert 0.90 < hits / 200 and nested / 200 < 0.80


def test_hierarchical_of_one_prompt_is_the_plain_bootstrap_over_seeds():
    a, b = np.random.default_rng(11).normal(0, 1, (2, 12))
    got = hierarchical_bootstrap(a[:, None], b[:, None], resamples=8000)
    plain = paired_bootstrap(a, b, resamples=8000)
    assert got[0] == pytest.approx(plain[0])
    assert got[1:] == pytest.approx(plain[1:], abs=0.06 * (plain[2] - plain[1]))


def test_hierarchical_width_is_that_of_both_levels():
    """Given the data a draw has variance (between + mean within / n) / S, divisors S and n."""
    rng = np.random.default_rng(12)
    d = rng.normal(0, 1, (30, 1)) + rng.normal(0, 5, (30, 25))
    _, low, high = hierarchical_bootstrap(0 * d, d, resamples=8000)
    half = 1.959964 * math.sqrt((d.mean(1).var() + d.var(1).mean() / 25) / 30)
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)
    # the prompts of one seed agree, so pooling counts each 40 times
    only_seeds = np.repeat(rng.normal(0, 1, (6, 1)), 40, 1)
    wide, pooled = (f(0 * x, x, resamples=1000)
                    for f, x in ((hierarchical_bootstrap, only_seeds),
                                 (paired_bootstrap, only_seeds.ravel())))
    assert wide[0] == pytest.approx(pooled[0])
    # without the sampling error the ratio is sqrt(40) = 6.3
    assert wide[2] - wide[1] > 4 * (pooled[2] - pooled[1])


def test_hierarchical_coverage():
    """Ten seeds of 20 prompts, spread by seeds: near 95 %, less the 9/10 of the docstring;
    pooled rows know nothing of it."""
    rng, hits, pooled = np.random.default_rng(13), 0, 0
    for trial in range(200):
        a = rng.normal(0, 1, (10, 20))
        b = a + 0.3 + rng.normal(0, 1, (10, 1)) + rng.normal(0, 1, (10, 20))
        _, low, high = hierarchical_bootstrap(a, b, resamples=300, seed=trial)
        hits += low <= 0.3 <= high
        _, low, high = paired_bootstrap(a.ravel(), b.ravel(), resamples=100, seed=trial)
        pooled += low <= 0.3 <= high
    assert 0.86 < hits / 200 < 0.98 and pooled / 200 < 0.75  # sigma .019 at .92


def test_hierarchical_keeps_pairs_and_is_seeded():
    rng = np.random.default_rng(14)
    a = [rng.normal(0, 100, n) for n in (5, 9)]
    assert hierarchical_bootstrap(a, [x + 1 for x in a], resamples=50) == pytest.approx((1, 1, 1))
    b = [rng.normal(0, 100, n) for n in (5, 9)]
    one, same, other = (hierarchical_bootstrap(a, b, seed=s) for s in (7, 7, 8))
    assert one == same and one[0] == other[0] and one != other


def test_hierarchical_bad_input():
    for a, b in (([A], [B]), ([A, A], [B]), ([], [])):
        with pytest.raises(ValueError, match="2 seeds"):
            hierarchical_bootstrap(a, b)
    for bad in (B[:4], [], np.ones((5, 2)), 1.0):
        with pytest.raises(ValueError, match="1 rows"):
            hierarchical_bootstrap([A, A], [B, bad])
    with pytest.raises(ValueError, match="finite"):
        hierarchical_bootstrap([A, A], [B, np.where(B == 2, math.nan, B)])
    with pytest.raises(ValueError, match="same prompts"):
        hierarchical_bootstrap([A, A[:3]], [B, B[:3]], crossed=True)
    for bad in ({"level": 1.0}, {"resamples": 0}):
        with pytest.raises(ValueError, match="level"):
            hierarchical_bootstrap([A, A], [B, B], **bad)


def test_holm_by_hand():
    # sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04;
    # the last is raised to .06, before it in order
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == pytest.approx([0.2]) and holm([0.6, 0.5, 0.0]) == pytest.approx([1, 1, 0])
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])


def test_holm_rejects_what_the_step_down_procedure_rejects():
    rng = np.random.default_rng(15)
    for _ in range(100):
        p = rng.random(6) ** 3
        adjusted = holm(p)
        for alpha in (0.01, 0.05, 0.2):
            # Holm's own words: smallest first, stop at the first that fails
            left, rejected = set(range(6)), set()
            while left and p[best := min(left, key=lambda i: p[i])] <= alpha / len(left):
                left.remove(best), rejected.add(best)
            assert set(np.flatnonzero(adjusted <= alpha)) == rejected


@pytest.mark.parametrize("p", [[], [0.1, 1.1], [-0.1], [math.nan, 0.1], [[0.1, 0.2]], 0.1])
def test_holm_bad_input(p):
    with pytest.raises(ValueError, match="p values"):
        holm(p)


def test_length_controlled_against_polyfit():
    rng = np.random.default_rng(16)
    a, length_a = rng.normal(0, 1, 60), rng.integers(5, 50, 60)
    b, length_b = rng.normal(1, 1, 60), rng.integers(5, 90, 60)
    got = length_controlled(a, b, length_a, length_b)
    assert got == pytest.approx(np.polyfit(length_b - length_a, b - a, 1)[1])
    assert abs(got - (b - a).mean()) > 0.01
    # a judge that pays .02 a token and nothing else: all of the difference is length
    assert length_controlled(0 * a, 0.02 * (length_b - length_a), length_a,
                             length_b) == pytest.approx(0, abs=1e-12)


def test_length_controlled_without_spread_of_lengths():
    assert length_controlled(A, B, A, A) == pytest.approx(1.4)
    assert math.isnan(length_controlled(A, B, A, A + 3))
    assert math.isnan(length_controlled(A, B, A, A + 0.1))  # not quite constant in float64
    assert length_controlled_interval(A, B, A, A) == pytest.approx(
        paired_bootstrap(A, B, resamples=2000))
    assert all(map(math.isnan, length_controlled_interval(A, B, A, A + 3)))
    # a third of the resamples see only 1
    diff, low, high = length_controlled_interval(A, B, A, A + [1, 1, 1, 1, 2])
    assert diff == pytest.approx(0.0 + 1 - 2) and math.isnan(low) and math.isnan(high)


def test_length_controlled_interval_width_equals_the_normal_one():
    """The line's textbook standard error at 0; lengths that differ far from 0 widen it."""
    rng = np.random.default_rng(17)
    x = rng.normal(2, 1, 300)
    d = 0.5 + 0.3 * x + rng.normal(0, 1, 300)
    diff, low, high = length_controlled_interval(0 * d, d, 0 * x, x, resamples=4000)
    line = np.polyfit(x, d, 1)
    sigma = math.sqrt(((d - np.polyval(line, x)) ** 2).sum() / 298)
    half = 1.959964 * sigma * math.sqrt(1 / 300 + x.mean() ** 2 / ((x - x.mean()) ** 2).sum())
    assert diff == pytest.approx(line[1]) and low < 0.5 < high
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    inner, again, other = (length_controlled_interval(0 * d, d, 0 * x, x, resamples=200, level=0.5,
                                                      seed=s) for s in (1, 1, 2))
    assert inner == again != other and inner[2] - inner[1] < 0.5 * (high - low)


@pytest.mark.parametrize("f", [length_controlled, length_controlled_interval])
def test_length_controlled_bad_input(f):
    for args in ((A, B[:4], A, A), (A, B, A, A[:4]), (A[:1], B[:1], A[:1], A[:1]),
                 (A, B, A[:4], A[:4])):
        with pytest.raises(ValueError, match="2 rows|one length"):
            f(*args)
    with pytest.raises(ValueError, match="finite"):
        f(A, B, A, A * math.inf)


def test_length_controlled_interval_bad_settings():
    for bad in ({"level": 0.0}, {"resamples": 0}):
        with pytest.raises(ValueError, match="level"):
            length_controlled_interval(A, B, A, A, **bad)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_best_of_n_against_all_subsets(n, ties):
    """Mean over all C(7, n) subsets of the gold of the best, or of all that tie for best."""
    rng = np.random.default_rng(18)
    gold = rng.normal(0, 1, (4, 7))
    proxy = rng.integers(0, 3, (4, 7)) * 1.0 if ties else rng.normal(0, 1, (4, 7))
    means = []
    for x, y in zip(proxy, gold):
        for rows in map(list, itertools.combinations(range(7), n)):
            means.append(y[rows][x[rows] == x[rows].max()].mean())
    assert best_of_n(proxy, gold, n) == pytest.approx(np.mean(means), abs=1e-12)


def test_best_of_n_is_unbiased_and_knows_its_ends():
    rng = np.random.default_rng(19)
    gold = rng.normal(0, 1, (2000, 6))
    # the expected greatest of three standard normals is 3 / (2 sqrt(pi)) (David and Nagaraja 2003)
    assert best_of_n(gold, gold, 3) == pytest.approx(1.5 / math.sqrt(math.pi),
                                                     abs=4 * 0.6 / math.sqrt(2000))
    assert best_of_n(-gold, gold, 6) == pytest.approx(gold.min(1).mean())
    assert best_of_n(gold, gold, 6) == pytest.approx(gold.max(1).mean())
    assert best_of_n(gold, gold, 1) == pytest.approx(gold.mean()) == best_of_n(0 * gold, gold, 4)
    assert best_of_n([[1.0, 2.0]], [[5.0, 6.0]], 2) == 6  # one prompt is enough
    x = rng.normal(0, 1, (1, 2000))
    # C(2000, 1000) is past float64, but the ratio is not
    assert x.mean() < best_of_n(x, x, 1000) < x.max()


def test_best_of_n_bad_input():
    ok = np.ones((3, 4))
    for n in (0, 5, -1, 1.5):
        with pytest.raises(ValueError, match="n <= samples"):
            best_of_n(ok, ok, n)
    with pytest.raises(ValueError, match="samples"):
        best_of_n(ok[0], ok[0], 1)
    for bad in (ok[:2], ok[:, :3], ok[0]):
        with pytest.raises(ValueError, match="one shape"):
            best_of_n(ok, bad, 1)
    with pytest.raises(ValueError, match="1 rows"):
        best_of_n(ok[:0], ok[:0], 1)
    with pytest.raises(ValueError, match="finite"):
        best_of_n(ok, ok * math.inf, 1)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_best_of_n_kl_against_quadrature(n):
    """The best of n of a uniform variable has density n u^(n - 1): its KL by the midpoint rule."""
    u = (np.arange(200000) + 0.5) / 200000
    density = n * u ** (n - 1)
    assert best_of_n_kl(n) == pytest.approx((density * np.log(density)).mean(), abs=1e-4)


def test_best_of_n_kl_bad_input():
    with pytest.raises(ValueError, match="n >= 1"):
        best_of_n_kl(0)


def test_new_inputs_unchanged():
    a, b = A.copy(), B.copy()
    hierarchical_bootstrap([a, a], [b, b], resamples=9), length_controlled(a, b, b, a)
    length_controlled_interval(a, b, b, a, resamples=9), best_of_n(a[None], b[None], 2)
    best_of_n(np.stack([a, b]), np.stack([b, a]), 3), holm(p := a / 10)
    assert (a == A).all() and (b == B).all() and (p == A / 10).all()


def test_rank_correlation():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=40), rng.normal(size=40)
    n = len(x)
    rank = [np.array([(v > values).sum() for v in values]) for values in (x, y)]
    assert rank_correlation(x, y) == pytest.approx(
        1 - 6 * ((rank[0] - rank[1]) ** 2).sum() / (n * (n * n - 1)))  # no ties: Spearman's formula
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1)
    assert rank_correlation(x, -x) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(
        np.corrcoef([1.5, 1.5, 3, 4], [1, 2, 3, 4])[0, 1])
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
