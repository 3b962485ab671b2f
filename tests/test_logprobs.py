"""pytest tests/test_logprobs.py: against loops in NumPy float64."""
import math

import numpy as np
import pytest
import torch

from virtue.logprobs import (
    entropy,
    gather_logprobs,
    kl_k1,
    kl_k3,
    logprobs_and_entropy,
    scatter,
    select_next,
)

B, L, D, V = 3, 5, 4, 11
MASK = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1]], dtype=torch.bool)


def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, L, D, generator=g), torch.randint(0, V, (B, L), generator=g)


def softmax64(row, temperature):
    e = np.exp((row - row.max()) / temperature)
    return e / e.sum()


def test_column_j_speaks_of_token_j_plus_1():
    hidden, ids = batch()
    h, t = select_next(hidden, ids, MASK)
    pairs = [(b, j) for b in range(B) for j in range(L - 1) if MASK[b, j]]  # row-major
    assert h.shape == (5, D)
    for n, (b, j) in enumerate(pairs):
        assert torch.equal(h[n], hidden[b, j])  # the state at position j ...
        assert t[n] == ids[b, j + 1]            # ... predicts token j+1


def test_whole_path_equals_a_loop_and_its_gradient():
    """select, lm_head, gather, scatter against p(next) of every position, one by one."""
    hidden, ids = batch()
    hidden.requires_grad_()
    head = torch.randn(V, D)
    h, t = select_next(hidden, ids, MASK)
    out = scatter(gather_logprobs(h @ head.T, t, temperature=0.7), MASK)
    expected, grad = np.zeros((B, L - 1)), np.zeros((B, L, D))
    W, x = head.double().numpy(), hidden.detach().double().numpy()
    weight = np.arange(B * (L - 1)).reshape(B, L - 1) + 1.0
    for b in range(B):
        for j in range(L - 1):
            if MASK[b, j]:
                p, target = softmax64(W @ x[b, j], 0.7), int(ids[b, j + 1])
                expected[b, j] = math.log(p[target])
                grad[b, j] = weight[b, j] * (W[target] - p @ W) / 0.7
    np.testing.assert_allclose(out.detach(), expected, rtol=1e-5, atol=1e-6)
    (out * torch.tensor(weight, dtype=torch.float32)).sum().backward()
    np.testing.assert_allclose(hidden.grad, grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gather_and_entropy_equal_numpy(temperature):
    logits, targets = torch.randn(6, V) * 3, torch.randint(0, V, (6,))
    p = np.stack([softmax64(row, temperature) for row in logits.double().numpy()])
    np.testing.assert_allclose(gather_logprobs(logits, targets, temperature),
                               np.log(p[np.arange(6), targets]), rtol=1e-5)
    np.testing.assert_allclose(entropy(logits, temperature), -(p * np.log(p)).sum(1), rtol=1e-5)


def test_both_of_one_softmax_are_what_they_are_alone():
    logits, targets = torch.randn(6, V, requires_grad=True), torch.randint(0, V, (6,))
    for train in (False, True):
        logprobs, entropies = logprobs_and_entropy(logits, targets, 0.7, train)
        assert torch.equal(logprobs, gather_logprobs(logits, targets, 0.7))
        assert torch.equal(entropies, entropy(logits, 0.7))
        assert logprobs.requires_grad and entropies.requires_grad == train


def test_entropy_gradient_equals_closed_form():
    # dH/dx_v = -p_v (log p_v + H) at temperature 1
    logits = torch.randn(4, V, requires_grad=True)
    entropy(logits).sum().backward()
    p = np.stack([softmax64(row, 1.0) for row in logits.detach().double().numpy()])
    H = -(p * np.log(p)).sum(1, keepdims=True)
    np.testing.assert_allclose(logits.grad, -p * (np.log(p) + H), atol=1e-6)


def test_limits():
    targets = torch.arange(4)
    torch.testing.assert_close(gather_logprobs(torch.zeros(4, V), targets),
                               torch.full((4,), -math.log(V)))
    torch.testing.assert_close(entropy(torch.zeros(4, V)), torch.full((4,), math.log(V)))
    sure = torch.eye(4) * 1e4
    assert (gather_logprobs(sure, targets) == 0).all() and (entropy(sure) == 0).all()
    assert torch.isfinite(gather_logprobs(-sure, targets)).all()
    logits = torch.randn(4, V)  # temperature is a division of the logits, nothing else
    torch.testing.assert_close(gather_logprobs(logits, targets, 0.25),
                               gather_logprobs(logits * 4, targets))
    torch.testing.assert_close(entropy(logits, 0.25), entropy(logits * 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_results_are_fp32_and_computed_in_fp32(dtype):
    logits, targets = torch.randn(5, V).to(dtype), torch.randint(0, V, (5,))
    for f in (lambda x: gather_logprobs(x, targets), entropy):
        value, exact = f(logits), f(logits.float())
        assert value.dtype == torch.float32 and torch.equal(value, exact)


def test_scatter_places_in_row_major_order_and_carries_the_gradient():
    values = torch.arange(1.0, 6.0, requires_grad=True)
    out = scatter(values, MASK)
    assert out.tolist() == [[0, 1, 2, 0], [3, 0, 0, 4], [0, 0, 0, 5]]
    (out * torch.arange(12.0).reshape(3, 4)).sum().backward()
    assert values.grad.tolist() == [1, 2, 4, 7, 11]  # flat places of the True entries
    assert scatter(torch.zeros(0), torch.zeros_like(MASK)).tolist() == [[0.0] * 4] * 3


@pytest.mark.parametrize("p, q", [((0.7, 0.2, 0.1), (0.3, 0.3, 0.4)), ((0.5, 0.5), (0.9, 0.1))])
def test_k1_and_k3_are_unbiased_for_kl_of_first_from_second(p, q):
    """The exact expectation under p, by enumeration; KL(q || p) is another number."""
    p, q = np.array(p), np.array(q)
    kl, reverse = (p * np.log(p / q)).sum(), (q * np.log(q / p)).sum()
    assert abs(kl - reverse) > 1e-3
    log_p, log_q = torch.tensor(np.log(p)), torch.tensor(np.log(q))
    assert float((torch.tensor(p) * kl_k1(log_p, log_q)).sum()) == pytest.approx(kl, abs=1e-9)
    assert float((torch.tensor(p) * kl_k3(log_p, log_q)).sum()) == pytest.approx(kl, abs=1e-9)
    assert (kl_k3(log_p, log_q) >= 0).all() and (kl_k1(log_p, log_q) < 0).any()


def test_kl_limits():
    x = torch.tensor([-3.0, -1.0])
    assert (kl_k1(x, x) == 0).all() and (kl_k3(x, x) == 0).all()
    assert kl_k1(torch.tensor([-1.0]), torch.tensor([-3.0])).tolist() == [2.0]
    # log r = 1: e - 1 - 1
    k3 = kl_k3(torch.tensor([-2.0]), torch.tensor([-1.0]))
    assert k3.item() == pytest.approx(math.e - 2, 1e-6)
    far = kl_k3(torch.tensor([-200.0, 0.0]), torch.tensor([0.0, -200.0]))
    assert far.tolist() == pytest.approx([math.expm1(20) - 200, 199.0])  # cut at 20, not infinite


def test_inputs_unchanged():
    hidden, ids = batch()
    logits, targets, logp = torch.randn(5, V), torch.randint(0, V, (5,)), torch.randn(5)
    tensors = (hidden, ids, MASK, logits, targets, logp)
    before = [t.clone() for t in tensors]
    select_next(hidden, ids, MASK), gather_logprobs(logits, targets, 0.5), entropy(logits, 0.5)
    scatter(logp, MASK), kl_k1(logp, logp), kl_k3(logp, logp)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors))


def test_bad_input():
    hidden, ids = batch()
    for h, m in ((hidden[:, 1:], MASK), (hidden, torch.ones(B, L).bool()), (hidden, MASK.long())):
        with pytest.raises(ValueError, match="need hidden"):
            select_next(h, ids, m)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            gather_logprobs(torch.zeros(2, V), torch.zeros(2).long(), temperature)
        with pytest.raises(ValueError, match="temperature"):
            entropy(torch.zeros(2, V), temperature)
    with pytest.raises(ValueError, match="logits"):
        gather_logprobs(torch.zeros(2, V), torch.zeros(3).long())
    for n in (4, 6):  # too many values would otherwise be cut silently
        with pytest.raises(ValueError, match="values"):
            scatter(torch.zeros(n), MASK)
    for f in (kl_k1, kl_k3):
        with pytest.raises(ValueError, match="shapes"):
            f(torch.zeros(2, 2), torch.zeros(2))
