"""pytest tests/test_ensemble.py: by hand and by loops over dialogues in NumPy float64."""
import inspect
import math

import numpy as np
import pytest
import torch

import virtue.ensemble
from virtue import AGGREGATORS
from virtue.ensemble import ADDITIVE, aggregate, shares, standardize, study_score

K, B = 3, 6
W = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


def scores(k=K, b=B):
    return torch.randn(k, b, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


ORACLES = {
    "mean": lambda s: s.sum() / len(s),
    "weighted": lambda s: sum(w * x for w, x in zip((0.5, 0.2, 0.3), s)),
    "min": lambda s: sorted(s)[0],
    "uwo": lambda s: s.sum() / 3 - 0.5 * math.sqrt(sum((x - s.sum() / 3) ** 2 for x in s) / 3),
    "median": lambda s: sorted(s)[1],
    "lsc": lambda s: sum(-math.log(1 + math.exp(1 - x)) for x in s),
}


def test_every_aggregator_equals_its_oracle():
    assert tuple(ORACLES) == AGGREGATORS and set(ADDITIVE) < set(AGGREGATORS)
    s = scores()
    for method, oracle in ORACLES.items():
        expected = [oracle(column) for column in s.numpy().T]
        np.testing.assert_allclose(aggregate(s, method, weights=W), expected, atol=1e-9)


def test_by_hand():
    s = torch.tensor([[1.0], [2.0], [6.0]])
    # mean 3, variance (4 + 1 + 9) / 3 = 14/3
    assert float(aggregate(s, "mean")) == pytest.approx(3)
    assert float(aggregate(s, "uwo")) == pytest.approx(3 - 0.5 * math.sqrt(14 / 3))
    assert float(aggregate(s, "uwo", coef=0.1, use_variance=True)) == pytest.approx(3 - 1.4 / 3)
    assert float(aggregate(s, "median")) == 2 and float(aggregate(s, "min")) == 1
    assert float(aggregate(s[:2], "median")) == 1.5
    ref = torch.tensor([1.0, 2.0, 6.0])
    assert float(aggregate(s, "lsc", reference=ref)) == pytest.approx(-3 * math.log(2))
    assert float(aggregate(s, "lsc", reference=2.0)) == pytest.approx(
        -math.log(1 + math.e) - math.log(2) - math.log(1 + math.exp(-4)))


def test_one_model_is_the_identity():
    s = scores(k=1)
    for method in set(AGGREGATORS) - {"lsc"}:
        torch.testing.assert_close(aggregate(s, method), s[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(aggregate(s, "lsc"), torch.log(torch.sigmoid(s[0] - 1)))


def test_order_of_models_and_limits():
    s, order = scores(), [2, 0, 1]
    for method in AGGREGATORS:
        torch.testing.assert_close(aggregate(s[order], method, weights=W[order]),
                                   aggregate(s, method, weights=W))
    assert (aggregate(s, "min") <= aggregate(s, "mean")).all()
    assert (aggregate(s, "uwo") < aggregate(s, "mean")).all()
    torch.testing.assert_close(aggregate(s, "uwo", coef=0.0), aggregate(s, "mean"))
    torch.testing.assert_close(aggregate(s, "weighted"), aggregate(s, "mean"))
    equal = s[:1].expand(3, -1)
    for method in ("mean", "min", "uwo", "median"):
        torch.testing.assert_close(aggregate(equal, method), s[0])


def test_shift_of_all_models_moves_the_aggregate_and_lsc_saturates():
    s = scores()
    for method in ("mean", "min", "uwo", "median"):
        torch.testing.assert_close(aggregate(s + 2, method), aggregate(s, method) + 2)
    assert (aggregate(s + 2, "lsc") > aggregate(s, "lsc")).all()
    # a soft AND
    assert aggregate(torch.tensor([[1e4], [1e4], [-1e4]]), "lsc", reference=0.0).tolist() == [-1e4]


def test_shares_sum_to_the_aggregate():
    s = scores()
    for method in ADDITIVE:
        torch.testing.assert_close(shares(s, method, W).sum(0), aggregate(s, method, weights=W))
    torch.testing.assert_close(shares(s, "mean"), s / 3)
    torch.testing.assert_close(shares(s, "weighted", W)[1], 0.2 * s[1])
    assert torch.equal(shares(s, "mean", W), shares(s, "mean"))  # weights are of "weighted" alone


@pytest.mark.parametrize("method", AGGREGATORS)
def test_gradient(method):
    s = scores().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: aggregate(x, method, weights=W), s)


def test_standardize_equals_numpy():
    s, mean = scores(), torch.tensor([1.0, -2.0, 0.5]).double()
    std = torch.tensor([2.0, 0.1, 1.0]).double()
    x, m, d = s.numpy(), mean.numpy(), std.numpy()
    expected = [[(x[k, b] - m[k]) / d[k] for b in range(B)] for k in range(K)]
    np.testing.assert_allclose(standardize(s, mean, std), expected, atol=1e-9)
    own = standardize(s, s.mean(1), s.std(1, correction=0))
    torch.testing.assert_close(own.mean(1), torch.zeros(3).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(own.std(1, correction=0), torch.ones(3).double())


def test_a_constant_model_gives_no_nan():
    s = torch.tensor([[4.0, 4.0], [1.0, 3.0]])
    z = standardize(s, s.mean(1), s.std(1, correction=0))
    assert z.tolist() == [[0.0, 0.0], [-1.0, 1.0]]
    for method in AGGREGATORS:
        assert torch.isfinite(aggregate(z, method)).all()
    noise = standardize(torch.tensor([[4.0 + 1e-6]]), torch.tensor([4.0]), torch.tensor([1e-9]))
    assert abs(float(noise)) < 1e-5  # rounding noise is not blown up


def test_study_score_by_hand_and_in_both_libraries():
    s = torch.tensor([[1.0, 3.0], [5.0, 7.0]])  # mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    assert float(study_score(s)) == pytest.approx(4 - 0.5 * math.sqrt(5))
    assert float(study_score(s, coef=0.0)) == 4
    wide = scores()
    expected = wide.numpy().mean() - 0.5 * wide.numpy().std()
    for x in (wide, wide.T, wide.numpy(), wide.numpy().T):
        assert float(study_score(x)) == pytest.approx(expected, abs=1e-9)
    # the std runs over all K*n scores: offsets between models count, unlike in `uwo` averaged
    offset = torch.tensor([[0.0, 0.0], [10.0, 10.0]])
    assert float(study_score(offset)) == pytest.approx(2.5)


def test_the_meaning_of_the_spread_is_written_where_it_is_offered():
    for text in (virtue.ensemble.__doc__, inspect.getdoc(aggregate)):
        assert "conflict" in text and "epistemic" in text


def test_inputs_unchanged():
    s, mean, std, w = scores(), torch.zeros(3).double(), torch.ones(3).double(), W.clone()
    before = [t.clone() for t in (s, mean, std, w)]
    standardize(s, mean, std), study_score(s), shares(s, "weighted", w)
    for method in AGGREGATORS:
        aggregate(s, method, weights=w, reference=mean)
    assert all(torch.equal(a, b) for a, b in zip(before, (s, mean, std, w)))


def test_bad_input():
    s, one = scores(), torch.ones(3).double()
    with pytest.raises(ValueError, match="unknown aggregator 'max'.*lsc"):
        aggregate(s, "max")
    with pytest.raises(ValueError, match="no shares"):
        shares(s, "min")
    for method in AGGREGATORS:
        for bad in (s[0], s[:0]):
            with pytest.raises(ValueError, match="scores must be"):
                aggregate(bad, method)
    for bad in (one[:2], one * math.nan, one.unsqueeze(1)):
        with pytest.raises(ValueError, match="weights"):
            aggregate(s, "weighted", weights=bad)
    with pytest.raises(ValueError, match="reference"):
        aggregate(s, "lsc", reference=torch.zeros(B))
    with pytest.raises(ValueError, match="need"):
        standardize(s, one[:1], one)
    with pytest.raises(ValueError, match="need"):
        standardize(s[:, 0], one, one)  # (K,) would broadcast to (K, K)
    for bad in (-one, one * math.inf, one * math.nan):
        with pytest.raises(ValueError, match="std"):
            standardize(s, one, bad)
    for bad in (s[0], s[:, :0]):
        with pytest.raises(ValueError, match="scores must be"):
            study_score(bad)
