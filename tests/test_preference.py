"""pytest tests/test_preference.py: closed forms with math, by hand."""
import math

import numpy as np
import pytest
import torch

from virtue.preference import accuracy, calibration_bins, calibration_error, log_loss, pairwise_loss

T = lambda *v: torch.tensor(v, dtype=torch.float64)  # noqa: E731


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


C, R = T(1.5, -0.3, 0.0, 2.0), T(0.2, 0.9, 0.0, -1.0)
P = T(1.0, 0.25, 0.8, 0.5)


def test_log_2_at_equal_scores():
    for label in (None, T(0.0, 0.3, 0.5, 1.0)):
        assert pairwise_loss(C, C, label).tolist() == pytest.approx([math.log(2)] * 4, abs=1e-12)


@pytest.mark.parametrize("label", [None, P])
def test_value_and_gradient_equal_closed_form(label):
    c, r = C.clone().requires_grad_(), R.clone().requires_grad_()
    loss = pairwise_loss(c, r, label)
    p = np.ones(4) if label is None else P.numpy()
    d = (C - R).numpy()
    expected = -p * np.log(sigmoid(d)) - (1 - p) * np.log(sigmoid(-d))
    np.testing.assert_allclose(loss.detach(), expected, atol=1e-9)
    loss.mean().backward()
    slope = (-p * sigmoid(-d) + (1 - p) * sigmoid(d)) / 4
    np.testing.assert_allclose(c.grad, slope, atol=1e-9)
    np.testing.assert_allclose(r.grad, -slope, atol=1e-9)


def test_hard_gradient_is_minus_sigmoid_of_minus_d_over_B():
    c = C.clone().requires_grad_()
    pairwise_loss(c, R).mean().backward()
    np.testing.assert_allclose(c.grad, -sigmoid(-(C - R).numpy()) / 4, atol=1e-12)


def test_invariant_to_a_common_shift_and_to_swapping_the_pair():
    base = pairwise_loss(C, R, P)
    torch.testing.assert_close(pairwise_loss(C + 7, R + 7, P), base)
    torch.testing.assert_close(pairwise_loss(R, C, 1 - P), base)


def test_soft_label_is_the_minimum():
    logits = torch.linspace(-6, 6, 2401, dtype=torch.float64)
    for p in (0.1, 0.5, 0.9):
        loss = pairwise_loss(logits, torch.zeros_like(logits), torch.full_like(logits, p))
        best = torch.sigmoid(logits[loss.argmin()]).item()
        assert best == pytest.approx(p, abs=2e-3)  # the grid's step of 0.005, times 1/4


def test_finite_at_extremes_with_gradient():
    c = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = pairwise_loss(c, -c.detach(), torch.tensor([0.5, 0.5]))
    loss.sum().backward()
    assert loss.tolist() == [1e4, 1e4] and torch.isfinite(c.grad).all()
    assert pairwise_loss(torch.tensor([-1e4]), torch.tensor([1e4])).tolist() == [2e4]


def test_accuracy_by_hand():
    # right, wrong, left out (label .5), right (label < .5, margin < 0), half (margin 0): 2.5 of 4
    assert accuracy(T(1.0, -1.0, 5.0, -2.0, 0.0), T(1.0, 0.9, 0.5, 0.2, 1.0)) == 0.625
    assert accuracy(T(0.1), T(0.51)) == 1.0 and accuracy(T(-0.1), T(0.51)) == 0.0


def test_log_loss_by_hand_and_by_pairwise():
    margins, labels = T(0.0, math.log(3)), T(1.0, 0.25)  # sigmoid(log 3) = 3/4
    expected = (math.log(2) - 0.25 * math.log(0.75) - 0.75 * math.log(0.25)) / 2
    assert log_loss(margins, labels) == pytest.approx(expected, abs=1e-12)
    assert log_loss(torch.zeros(3), torch.ones(3)) == pytest.approx(math.log(2), abs=1e-12)


def test_calibration_by_hand():
    # confidences .9 .9 .6 .6 (p = .4 prefers the second); agreements 1, 0, 1, 1
    probs, labels = T(0.9, 0.9, 0.6, 0.4), T(1.0, 0.0, 1.0, 0.0)
    # bins of .05 on [.5, 1]: |.9 - .5| * 2/4 + |.6 - 1| * 2/4 = .4
    assert calibration_error(probs, labels) == pytest.approx(0.4, abs=1e-12)
    # one bin: |.75 - .75| = 0: gaps of one bin cancel
    assert calibration_error(probs, labels, bins=1) == pytest.approx(0.0, abs=1e-12)


def test_calibration_equals_a_loop():
    rng = np.random.default_rng(0)
    p, y = rng.random(60), rng.integers(0, 2, 60) * 1.0  # few: gaps of both signs, bins matter
    expected = 0.0
    for low in np.arange(10) * 0.05 + 0.5:
        conf, agree = [], []
        for pi, yi in zip(p, y):
            q, t = (pi, yi) if pi >= 0.5 else (1 - pi, 1 - yi)
            if low <= q < low + 0.05:
                conf.append(q), agree.append(t)
        if conf:
            expected += len(conf) / 60 * abs(np.mean(conf) - np.mean(agree))
    assert calibration_error(torch.tensor(p), torch.tensor(y)) == pytest.approx(expected, abs=1e-9)


def test_calibration_limits_and_symmetry():
    assert calibration_error(P, P) == pytest.approx(0.0, abs=1e-12)  # soft labels met exactly
    assert calibration_error(T(1.0, 0.0), T(1.0, 0.0)) == 0  # p = 1 falls in the last bin
    assert calibration_error(T(1.0), T(0.0)) == 1
    assert calibration_error(T(0.5), T(1.0)) == 0  # no preference, half agreement
    probs, labels = torch.rand(50).double(), torch.rand(50).double()
    flip = torch.rand(50) < 0.5
    swapped = torch.where(flip, 1 - probs, probs), torch.where(flip, 1 - labels, labels)
    assert calibration_error(*swapped) == pytest.approx(calibration_error(probs, labels), abs=1e-9)


def test_calibration_bins_sum_to_the_error():
    rng = torch.Generator().manual_seed(3)
    p, y = torch.rand(400, generator=rng), torch.rand(400, generator=rng)
    for bins in (1, 5, 10):
        found = calibration_bins(p, y, bins)
        assert sum(b["pairs"] for b in found) == 400
        assert sum(b["pairs"] * abs(b["predicted"] - b["label"])
                   for b in found) / 400 == pytest.approx(calibration_error(p, y, bins))
    by_hand = calibration_bins(torch.tensor([0.95, 0.05, 0.6]), torch.tensor([1.0, 0.5, 1.0]), 2)
    assert [(b["predicted"], b["label"], b["pairs"])
            for b in by_hand] == [pytest.approx((0.6, 1.0, 1)), pytest.approx((0.95, 0.75, 2))]


def test_inputs_unchanged():
    before = [t.clone() for t in (C, R, P)]
    pairwise_loss(C, R, P), accuracy(C, P), log_loss(C, P), calibration_error(P, P)
    assert all(torch.equal(a, b) for a, b in zip(before, (C, R, P)))


def test_bad_input():
    with pytest.raises(ValueError, match="shapes"):
        pairwise_loss(C, R.unsqueeze(1))
    with pytest.raises(ValueError, match="shapes"):
        pairwise_loss(C, R, P[:1])
    for bad in (T(1.1, 0, 0, 0), T(-0.1, 0, 0, 0), T(math.nan, 0, 0, 0)):
        for f in (lambda b: pairwise_loss(C, R, b), lambda b: accuracy(C, b),
                  lambda b: log_loss(C, b), lambda b: calibration_error(P, b),
                  lambda b: calibration_error(b, P)):
            with pytest.raises(ValueError, match="probabilities"):
                f(bad)
    with pytest.raises(ValueError, match="no decided pair"):
        accuracy(C, torch.full_like(C, 0.5))
    with pytest.raises(ValueError, match="bins"):
        calibration_error(P, P, bins=0)
    for f in (accuracy, log_loss, calibration_error):
        with pytest.raises(ValueError):
            f(torch.zeros(0), torch.zeros(0))
        with pytest.raises(ValueError, match="shapes"):
            f(torch.zeros(3), torch.zeros(2))
