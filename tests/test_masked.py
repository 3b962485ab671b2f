"""pytest tests/test_masked.py: against NumPy on the compacted rows, which know nothing of masks."""
import numpy as np
import pytest
import torch

from virtue.masked import check_shapes, masked_mean, masked_var, whiten

X = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, False, False]])


def random_case(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((4, 7)) < 0.6
    mask[:, 3] = True
    return rng.normal(2, 3, (4, 7)), mask


def test_values_by_hand():
    # kept 1, 2, 4: mean 7/3; squares of deviation 16/9 + 1/9 + 25/9 = 42/9
    assert float(masked_mean(X, MASK)) == pytest.approx(7 / 3, abs=1e-12)
    assert masked_mean(X, MASK, dim=1).tolist() == [1.5, 4.0]
    assert float(masked_var(X, MASK)) == pytest.approx(42 / 27, abs=1e-12)
    assert float(masked_var(X, MASK, unbiased=True)) == pytest.approx(42 / 18, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_equals_numpy_on_the_kept_entries(seed):
    x, mask = random_case(seed)
    kept, tx, tm = x[mask], torch.tensor(x), torch.tensor(mask)
    assert float(masked_mean(tx, tm)) == pytest.approx(kept.mean(), abs=1e-9)
    assert float(masked_var(tx, tm)) == pytest.approx(kept.var(), abs=1e-9)
    assert float(masked_var(tx, tm, unbiased=True)) == pytest.approx(kept.var(ddof=1), abs=1e-9)
    rows = [x[i, mask[i]].mean() for i in range(4)]
    np.testing.assert_allclose(masked_mean(tx, tm, dim=1), rows, atol=1e-9)
    np.testing.assert_allclose(masked_mean(tx, tm, dim=-1), rows, atol=1e-9)
    columns = [x[mask[:, j], j].mean() if mask[:, j].any() else None for j in range(7)]
    if None not in columns:
        np.testing.assert_allclose(masked_mean(tx, tm, dim=0), columns, atol=1e-9)
    expected = (kept - kept.mean()) / np.sqrt(kept.var() + 1e-8)
    np.testing.assert_allclose(whiten(tx, tm)[tm], expected, atol=1e-9)


@pytest.mark.parametrize("f", [masked_mean, masked_var, whiten])
def test_mask_property(f):
    """f(x, mask) == f(x[mask]); value and gradient blind to what lies outside, even to NaN."""
    x, mask = (torch.tensor(a) for a in random_case(5))
    compact = f(x[mask], torch.ones(int(mask.sum()), dtype=torch.bool))
    weight = torch.randn(x.shape, dtype=x.dtype)
    dirty = torch.where(mask, x, torch.nan).requires_grad_()
    out = f(dirty, mask)
    torch.testing.assert_close(out[mask] if out.dim() else out, compact, atol=1e-12, rtol=0)
    (out * (weight if out.dim() else 1.0)).sum().backward()
    assert torch.isfinite(dirty.grad).all() and (dirty.grad[~mask] == 0).all()
    assert (dirty.grad[mask] != 0).all()
    clean = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: f(v, mask), clean)


def test_whiten_centres_scales_and_clears():
    x, mask = (torch.tensor(a) for a in random_case(7))
    white = whiten(x, mask)
    # var + 1e-8 in the root: the variance falls short of 1 by about 1e-9
    assert float(white[mask].mean()) == pytest.approx(0, abs=1e-12)
    assert float(white[mask].var(correction=0)) == pytest.approx(1, abs=1e-8)
    assert (white[~mask] == 0).all()


def test_whiten_constant_is_zero_not_nan():
    x = torch.full((2, 3), 5.0)
    assert (whiten(x, MASK) == 0).all()


@pytest.mark.parametrize("constant", [0.1, 1 / 3, 1000.1, -1e6 / 7])  # fp32 means differ
def test_whiten_of_what_is_constant_to_rounding(constant):
    mask = torch.rand(100, 100) < 0.8
    x = torch.full((100, 100), constant)
    assert (whiten(x, mask) == 0).all()
    spread = x * (1 + 1e-4 * torch.randn(100, 100))  # little, but no rounding
    kept = spread[mask].double()
    expected = (kept - kept.mean()) / (kept.var(correction=0) + 1e-8).sqrt()
    torch.testing.assert_close(whiten(spread, mask)[mask].double(), expected, rtol=0.01, atol=0.01)


def test_inputs_unchanged():
    x, mask = X.clone(), MASK.clone()
    masked_mean(x, mask), masked_var(x, mask, True), whiten(x, mask)
    assert torch.equal(x, X) and torch.equal(mask, MASK)


@pytest.mark.parametrize("f", [masked_mean, masked_var, whiten])
def test_bad_input(f):
    with pytest.raises(ValueError, match="empty mask"):
        f(X, torch.zeros_like(MASK))
    with pytest.raises(ValueError, match=r"x \(2, 3\), mask \(3,\)"):
        f(X, MASK[0])
    with pytest.raises(ValueError, match="bool"):
        f(X, MASK.long())


def test_bad_input_of_one_slice_and_one_entry():
    with pytest.raises(ValueError, match="empty mask"):
        masked_mean(X, MASK, dim=0)  # column 2 is empty
    one = torch.tensor([[True, False, False], [False, False, False]])
    assert float(masked_var(X, one)) == 0
    with pytest.raises(ValueError, match="at least 2"):
        masked_var(X, one, unbiased=True)


def test_check_shapes_takes_equal_shapes():
    check_shapes(a=X, b=X, mask=MASK)
    with pytest.raises(ValueError, match=r"a \(2, 3\), b \(3, 2\)"):
        check_shapes(a=X, b=X.T)
