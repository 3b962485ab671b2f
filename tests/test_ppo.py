"""pytest tests/test_ppo.py: estimators from their definitions in float64, losses from tables."""
import math

import numpy as np
import pytest
import torch

from virtue.ppo import (Rollout, explained_variance, gae, place_rewards, policy_loss, ppo_loss,
                        token_rewards, update_kl_coef, value_loss)

NAN = math.nan
# Rows of different length, with a gap (the user's turn), with a late start, and an empty one.
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 0, 0],
                     [0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def columns(row):
    return [t for t in range(row.shape[0]) if row[t]]


# ---- rewards ------------------------------------------------------------------------------------

def test_place_rewards_lands_on_the_last_trained_token_of_each_length():
    positions, amounts = torch.tensor([6, 6, 4]), torch.tensor([1.0, 2.0, 3.0])
    out = place_rewards(MASK[:3], positions, amounts)
    assert out.tolist() == [[0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 2, 0], [0, 0, 0, 0, 3, 0, 0]]


def test_place_rewards_of_several_lenses():
    positions = torch.tensor([[2, 2], [5, 4], [6, 6]])  # (K, B): three turns of two rows
    amounts = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    out = place_rewards(MASK[:2], positions, amounts)
    assert out.tolist() == [[0, 0, 1, 0, 0, 2, 4], [0, 0, 30, 0, 0, 40, 0]]
    # trained on the action only: all later turns pay the action's last token
    action = torch.tensor([[True, True, True, False, False, False, False]] * 2)
    assert place_rewards(action, positions, amounts)[:, 2].tolist() == [7, 70]


def test_place_rewards_keeps_sums_and_carries_the_gradient():
    positions = torch.randint(4, 7, (3, 3))
    amounts = randn(3, 3).requires_grad_()
    out = place_rewards(MASK[:3], positions, amounts)
    torch.testing.assert_close(out.sum(1), amounts.sum(0))
    assert (out[~MASK[:3]] == 0).all()
    out.sum().backward()
    assert (amounts.grad == 1).all()


def test_place_rewards_bad_input():
    with pytest.raises(ValueError, match=r"no trained token .* rows \[1, 3\]"):
        place_rewards(MASK, torch.tensor([0, 0, 3, 6]), torch.ones(4))
    for bad in (-1, 7):
        with pytest.raises(ValueError, match="columns in"):
            place_rewards(MASK[:1], torch.tensor([bad]), torch.ones(1))
    with pytest.raises(ValueError, match="shapes"):
        place_rewards(MASK[:3], torch.tensor([6, 6, 6]), torch.ones(2, 3))
    with pytest.raises(ValueError, match="positions"):
        place_rewards(MASK[:3], torch.tensor([6, 6]), torch.ones(2))
    with pytest.raises(ValueError, match="positions"):
        place_rewards(MASK[:1].long(), torch.tensor([6]), torch.ones(1))
    with pytest.raises(ValueError, match="positions"):
        place_rewards(MASK[:3], torch.full((2, 2, 3), 6), torch.ones(2, 2, 3))


def test_token_rewards_sum_to_score_minus_kl():
    old, ref = randn(4, 7, seed=1), randn(4, 7, seed=2)
    amounts = torch.tensor([1.0, -2.0, 3.0]).double()
    score = place_rewards(MASK[:3], torch.tensor([6, 6, 6]), amounts)
    score = torch.cat([score, torch.zeros(1, 7).double()])
    out = token_rewards(score, old, ref, MASK, 0.1)
    for b, s in enumerate((1.0, -2.0, 3.0, 0.0)):
        kl = sum(old[b, t].item() - ref[b, t].item() for t in columns(MASK[b]))
        assert float(out[b].sum()) == pytest.approx(s - 0.1 * kl, abs=1e-9)
        for t in columns(MASK[b]):  # the penalty is per token, signed, never clamped
            expected = score[b, t].item() - 0.1 * (old[b, t].item() - ref[b, t].item())
            assert float(out[b, t]) == pytest.approx(expected, abs=1e-12)
    assert (out[~MASK] == 0).all()
    assert torch.equal(token_rewards(score, old, ref, MASK, 0.0), score)
    dirty = torch.where(MASK, old, NAN)
    assert torch.equal(token_rewards(score, dirty, ref, MASK, 0.1), out)


# ---- GAE ----------------------------------------------------------------------------------------

def gae_by_definition(rewards, values, mask, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l} over each row's kept tokens: O(T^2), no recursion."""
    r, v = rewards.numpy(), values.numpy()
    A, G = np.zeros(r.shape), np.zeros(r.shape)
    for b in range(len(r)):
        keep = columns(mask[b])
        delta = [r[b, t] + gamma * (v[b, keep[i + 1]] if i + 1 < len(keep) else 0.0) - v[b, t]
                 for i, t in enumerate(keep)]
        for i, t in enumerate(keep):
            A[b, t] = sum((gamma * lam) ** k * delta[i + k] for k in range(len(keep) - i))
            G[b, t] = A[b, t] + v[b, t]
    return A, G


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_gae_equals_its_definition(gamma, lam):
    rewards, values = randn(4, 7, seed=3), randn(4, 7, seed=4)
    A, G = gae(rewards, values, MASK, gamma, lam)
    expected_A, expected_G = gae_by_definition(rewards, values, MASK, gamma, lam)
    np.testing.assert_allclose(A, expected_A, atol=1e-9)
    np.testing.assert_allclose(G, expected_G, atol=1e-9)


def test_gae_by_hand():
    # deltas: 0 + .5*2 - 1 = 0;  0 + .5*3 - 2 = -.5;  4 - 3 = 1.  gamma lam = .25
    A, G = gae(torch.tensor([[0.0, 0.0, 4.0]]), torch.tensor([[1.0, 2.0, 3.0]]),
               torch.ones(1, 3).bool(), 0.5, 0.5)
    assert A.tolist() == [[0.25 * -0.25, -0.25, 1.0]]  # A_1 = -.5 + .25 * 1; A_0 = 0 + .25 * A_1
    assert G.tolist() == [[1 - 0.0625, 1.75, 4.0]]


def test_gae_limits():
    rewards, values = randn(4, 7, seed=5), randn(4, 7, seed=6)
    full = torch.ones_like(MASK)
    td = rewards + 0.9 * torch.cat([values[:, 1:], torch.zeros(4, 1)], 1) - values
    torch.testing.assert_close(gae(rewards, values, full, 0.9, 0.0)[0], td)
    to_go = rewards.flip(1).cumsum(1).flip(1)  # lam = gamma = 1: rewards to go, less the value
    A, G = gae(rewards, values, full, 1.0, 1.0)
    torch.testing.assert_close(G, to_go)
    torch.testing.assert_close(A, to_go - values)


@pytest.mark.parametrize("row", [1, 2])
def test_gae_of_a_masked_row_equals_the_row_without_its_gaps(row):
    rewards, values, keep = randn(4, 7, seed=7), randn(4, 7, seed=8), MASK[row]
    A, G = gae(rewards, values, MASK, 0.9, 0.8)
    short_A, short_G = gae(rewards[row:row + 1, keep], values[row:row + 1, keep],
                           torch.ones(1, int(keep.sum())).bool(), 0.9, 0.8)
    torch.testing.assert_close(A[row, keep], short_A[0])
    torch.testing.assert_close(G[row, keep], short_G[0])


def test_gae_ignores_what_lies_outside():
    rewards, values = randn(4, 7, seed=9), randn(4, 7, seed=10)
    A, G = gae(rewards, values, MASK, 1.0, 0.95)
    dirty = torch.where(MASK, rewards, 1e9), torch.where(MASK, values, NAN)
    dirty_A, dirty_G = gae(*dirty, MASK, 1.0, 0.95)
    assert torch.equal(A, dirty_A) and torch.equal(G, dirty_G)
    assert (A[~MASK] == 0).all() and (G[~MASK] == 0).all()
    assert not gae(rewards, values.requires_grad_(), MASK, 1.0, 0.95)[1].requires_grad


# ---- policy loss --------------------------------------------------------------------------------

def one(x):
    return torch.tensor([[x]], dtype=torch.float64)


@pytest.mark.parametrize("advantage, ratio, loss, slope, clipped", [
    # slope = d loss / d log pi_new = -A rho where live, 0 where clipped and unprofitable
    (2.0, 0.5, -1.0, -1.0, 0),    # good token made rarer: not clipped, pull back
    (2.0, 1.1, -2.2, -2.2, 0),
    (2.0, 1.5, -2.4, 0.0, 1),     # already far enough: -2 * 1.2
    (-2.0, 0.5, 1.6, 0.0, 1),     # already rare enough: 2 * .8
    (-2.0, 1.1, 2.2, 2.2, 0),
    (-2.0, 1.5, 3.0, 3.0, 0),     # bad token made likelier: not clipped
])
def test_policy_loss_table(advantage, ratio, loss, slope, clipped):
    new = one(math.log(ratio) - 1.0).requires_grad_()
    value, stats = policy_loss(new, one(-1.0), one(advantage), one(1.0).bool(), 0.2)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-9)
    assert float(new.grad) == pytest.approx(slope, abs=1e-9)
    assert float(stats["policy/clip_frac"]) == clipped
    assert float(stats["policy/ratio"]) == pytest.approx(ratio, abs=1e-9)
    # k3 of old against new at a sample of old: (rho - 1) - log rho
    assert float(stats["policy/approx_kl"]) == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-9)
    assert float(stats["policy/loss"]) == value.item()


def test_policy_loss_at_ratio_one_is_plain_policy_gradient():
    old, adv = randn(4, 7, seed=11), randn(4, 7, seed=12)
    new = old.clone().requires_grad_()
    loss, stats = policy_loss(new, old, adv, MASK, 0.2)
    loss.backward()
    kept = adv[MASK].numpy()
    assert loss.item() == pytest.approx(-kept.mean(), abs=1e-9)
    np.testing.assert_allclose(new.grad[MASK], -kept / len(kept), atol=1e-9)
    assert [float(stats[f"policy/{k}"]) for k in ("clip_frac", "approx_kl", "ratio")] == [0, 0, 1]


def test_policy_loss_clamps_the_log_ratio():
    for log_ratio, advantage in ((100.0, -1.0), (-100.0, 1.0)):
        expected = -advantage * math.exp(20 * np.sign(log_ratio))
        new = one(log_ratio).requires_grad_()
        loss, stats = policy_loss(new, one(0.0), one(advantage), one(1.0).bool(), 0.2)
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-9) and float(new.grad) == 0
        assert all(torch.isfinite(s) for s in stats.values())


# ---- value loss ---------------------------------------------------------------------------------

@pytest.mark.parametrize("new, old, ret, loss, slope, clipped", [
    # slope = V - R where the plain error is the larger, 0 where the clipped one is
    (1.1, 1.0, 2.0, 0.405, -0.9, 0),   # inside the range: .5 * .9^2
    (1.5, 1.0, 2.0, 0.32, 0.0, 1),     # moved towards R beyond 1.2: .5 * .8^2, no more pull
    (0.5, 1.0, 2.0, 1.125, -1.5, 0),   # moved away: .5 * 1.5^2, pulled back
    (0.5, 1.0, 0.0, 0.32, 0.0, 1),     # towards R, downwards: .5 * .8^2
    (1.5, 1.0, 0.0, 1.125, 1.5, 0),
    (1.5, 1.0, 1.3, 0.02, 0.2, 0),     # overshot: plain .5 * .2^2 beats clipped .5 * .1^2
])
def test_value_loss_table(new, old, ret, loss, slope, clipped):
    v = one(new).requires_grad_()
    value, stats = value_loss(v, one(old), one(ret), one(1.0).bool(), 0.2)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-9)
    assert float(v.grad) == pytest.approx(slope, abs=1e-9)
    assert float(stats["value/clip_frac"]) == clipped and float(stats["value/loss"]) == value.item()


def test_value_loss_without_clip_is_half_the_squared_error():
    new, old, ret = (randn(4, 7, seed=s) for s in (13, 14, 15))
    loss, stats = value_loss(new, old, ret, MASK, math.inf)
    expected = 0.5 * ((new - ret)[MASK].numpy() ** 2).mean()
    assert loss.item() == pytest.approx(expected, abs=1e-9) and float(stats["value/clip_frac"]) == 0


def test_value_rounding_is_not_counted_as_clipping():
    old, new = torch.randn(2, 64, 64) * 0.02  # fp32: old + (new - old) is not new
    assert (old + (new - old) != new).any()
    _, stats = value_loss(new, old, torch.randn(64, 64), torch.ones(64, 64).bool(), 0.2)
    assert float(stats["value/clip_frac"]) == 0


# ---- the objective ------------------------------------------------------------------------------

SETTINGS = dict(clip_range=0.2, value_clip_range=0.2, vf_coef=0.3, entropy_coef=0.05)


def case():
    old = randn(4, 7, seed=20)
    rollout = Rollout(torch.randint(0, 9, (4, 8)), MASK, old, randn(4, 7, seed=21),
                      randn(4, 7, seed=22), randn(4, 7, seed=23))
    new, values, ent = old + 0.3 * randn(4, 7, seed=24), randn(4, 7, seed=25), randn(4, 7, seed=26)
    return [new, values, ent], rollout, randn(4, 7, seed=27), randn(4, 7, seed=28)


def run(live, rollout, adv, ret, num_tokens=None):
    live = [x.detach().clone().requires_grad_() for x in live]
    loss, stats = ppo_loss(*live, rollout, adv, ret, **SETTINGS, num_tokens=num_tokens)
    loss.backward()
    return loss.detach(), stats, [x.grad for x in live]


def test_ppo_loss_equals_a_loop_with_gradient():
    live, rollout, adv, ret = case()
    loss, stats, grads = run(live, rollout, adv, ret)
    new, values, ent = (x.numpy() for x in live)
    n, total = int(MASK.sum()), dict(p=0.0, v=0.0, h=0.0, pc=0, vc=0, kl=0.0, r=0.0)
    expected = [np.zeros((4, 7)) for _ in range(3)]
    for b, t in MASK.nonzero().tolist():
        rho = math.exp(new[b, t] - rollout.old_logprobs[b, t].item())
        a, v0, g = adv[b, t].item(), rollout.values[b, t].item(), ret[b, t].item()
        dead = (a > 0 and rho > 1.2) or (a < 0 and rho < 0.8)
        total["p"] += -a * (min(max(rho, 0.8), 1.2) if dead else rho) / n
        expected[0][b, t] = 0.0 if dead else -a * rho / n
        v = values[b, t]
        cut = min(max(v, v0 - 0.2), v0 + 0.2)
        v_dead = (cut - g) ** 2 > (v - g) ** 2
        total["v"] += 0.5 * max((v - g) ** 2, (cut - g) ** 2) / n
        expected[1][b, t] = 0.3 * (0.0 if v_dead else v - g) / n
        total["h"] += ent[b, t] / n
        expected[2][b, t] = -0.05 / n
        total["pc"] += dead / n
        total["vc"] += v_dead / n
        total["kl"] += (rho - 1 - math.log(rho)) / n
        total["r"] += rho / n
    assert 0 < total["pc"] < 1 and 0 < total["vc"] < 1  # the case exercises both sides
    assert loss.item() == pytest.approx(total["p"] + 0.3 * total["v"] - 0.05 * total["h"], abs=1e-9)
    for got, want in zip(grads, expected):
        np.testing.assert_allclose(got, want, atol=1e-9)
    names = {"policy/loss": "p", "value/loss": "v", "policy/entropy": "h", "policy/clip_frac": "pc",
             "value/clip_frac": "vc", "policy/approx_kl": "kl", "policy/ratio": "r"}
    assert set(stats) == set(names)
    for name, key in names.items():
        assert float(stats[name]) == pytest.approx(total[key], abs=1e-9), name
        assert not stats[name].requires_grad and stats[name].dim() == 0


def test_mask_property_of_loss_stats_and_gradient():
    live, rollout, adv, ret = case()
    loss, stats, grads = run(live, rollout, adv, ret)
    compact = Rollout(rollout.input_ids, *(f[MASK].unsqueeze(0) for f in rollout[1:]))
    c_loss, c_stats, c_grads = run([x[MASK].unsqueeze(0) for x in live], compact,
                                   adv[MASK].unsqueeze(0), ret[MASK].unsqueeze(0))
    soil = lambda x: torch.where(MASK, x, NAN)  # noqa: E731
    dirty = rollout._replace(old_logprobs=soil(rollout.old_logprobs), values=soil(rollout.values))
    d_loss, d_stats, d_grads = run([soil(x) for x in live], dirty, soil(adv), soil(ret))
    e_loss, e_stats, e_grads = run(live, rollout, soil(adv), soil(ret))
    for other, other_stats in ((c_loss, c_stats), (d_loss, d_stats), (e_loss, e_stats)):
        torch.testing.assert_close(other, loss)
        for name in stats:
            torch.testing.assert_close(other_stats[name], stats[name])
    for g, c, d, e in zip(grads, c_grads, d_grads, e_grads):
        torch.testing.assert_close(g[MASK], c[0])
        torch.testing.assert_close(d, g)
        torch.testing.assert_close(e, g)
        assert (d[~MASK] == 0).all()


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0], [1], [2], [3]]])
def test_micro_batches_add_up_to_the_step(parts):
    """Loss, stats and gradient of the whole; row 3 has no token, the others 7, 3 and 2."""
    live, rollout, adv, ret = case()
    loss, stats, grads = run(live, rollout, adv, ret)
    n, pieces = int(MASK.sum()), []
    for idx in parts:
        pieces.append(run([x[idx] for x in live], rollout.index(idx), adv[idx], ret[idx], n))
    torch.testing.assert_close(sum(p[0] for p in pieces), loss)
    for name in stats:
        torch.testing.assert_close(sum(p[1][name] for p in pieces), stats[name])
    for i, g in enumerate(grads):
        torch.testing.assert_close(torch.cat([p[2][i] for p in pieces]), g)


def test_ppo_loss_without_entropy():
    (new, values, _), rollout, adv, ret = case()
    settings = SETTINGS | dict(entropy_coef=0.0)
    loss, stats = ppo_loss(new, values, None, rollout, adv, ret, **settings)
    assert "policy/entropy" not in stats
    p, v = stats["policy/loss"], stats["value/loss"]
    torch.testing.assert_close(loss, p + 0.3 * v)
    with pytest.raises(ValueError, match="needs entropy"):
        ppo_loss(new, values, None, rollout, adv, ret, **SETTINGS)


def test_inputs_unchanged():
    live, rollout, adv, ret = case()
    tensors = [*live, *rollout, adv, ret]
    before = [t.clone() for t in tensors]
    ppo_loss(*live, rollout, adv, ret, **SETTINGS)
    gae(rollout.rewards, rollout.values, MASK, 1.0, 0.95)
    token_rewards(rollout.rewards, rollout.old_logprobs, rollout.ref_logprobs, MASK, 0.1)
    place_rewards(MASK[:1], torch.tensor([6]), torch.ones(1))
    explained_variance(rollout.values, ret, MASK)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors))


def test_losses_bad_input():
    x, m = randn(2, 3), torch.ones(2, 3).bool()
    for f in (policy_loss, value_loss):
        with pytest.raises(ValueError, match="shapes"):
            f(x, x, x[:, :1], m, 0.2)
        with pytest.raises(ValueError, match="bool"):
            f(x, x, x, m.double(), 0.2)
        with pytest.raises(ValueError, match="no tokens"):
            f(x, x, x, ~m, 0.2)
        with pytest.raises(ValueError, match="no tokens"):
            f(x, x, x, m, 0.2, 0)
        assert float(f(x, x, x, ~m, 0.2, 5)[0]) == 0  # an empty micro-batch of a step is fine
        for bad in (0.0, -0.2, NAN):
            with pytest.raises(ValueError, match="clip_range"):
                f(x, x, x, m, bad)
    for gamma, lam in ((1.1, 1.0), (1.0, -0.1), (NAN, 1.0)):
        with pytest.raises(ValueError, match="gamma"):
            gae(x, x, m, gamma, lam)
    with pytest.raises(ValueError, match="shapes"):
        gae(x, x[:1], m, 1.0, 1.0)
    with pytest.raises(ValueError, match="shapes"):
        token_rewards(x, x, x[:, :1], m, 0.1)
    live, rollout, adv, ret = case()
    with pytest.raises(ValueError, match="shapes"):
        ppo_loss(live[0], live[1], live[2][:1], rollout, adv, ret, **SETTINGS)


# ---- rollout, explained variance, KL controller -------------------------------------------------

@pytest.mark.parametrize("idx", [torch.tensor([2, 0]), [2, 0], slice(1, 3)])
def test_rollout_index_takes_rows_of_every_field(idx):
    rollout = case()[1]
    part = rollout.index(idx)
    rows = [1, 2] if isinstance(idx, slice) else [2, 0]
    assert isinstance(part, Rollout)
    for whole, piece in zip(rollout, part):
        assert torch.equal(piece, torch.stack([whole[r] for r in rows]))
    with pytest.raises(AttributeError):
        rollout.values = None


def test_explained_variance():
    values, returns = randn(4, 7, seed=30), randn(4, 7, seed=31)
    v, r = values[MASK].numpy(), returns[MASK].numpy()
    expected = 1 - (r - v).var() / r.var()
    assert explained_variance(values, returns, MASK) == pytest.approx(expected, abs=1e-9)
    dirty = torch.where(MASK, values, NAN), torch.where(MASK, returns, NAN)
    assert explained_variance(*dirty, MASK) == pytest.approx(expected, abs=1e-9)
    assert explained_variance(returns, returns, MASK) == 1
    assert explained_variance(returns + 3, returns, MASK) == pytest.approx(1)  # blind to an offset
    assert explained_variance(torch.zeros_like(returns), returns, MASK) == pytest.approx(0)
    flat = torch.ones_like(returns)
    assert explained_variance(values, flat, MASK) == 0 and explained_variance(flat, flat, MASK) == 1


@pytest.mark.parametrize("constant", [0.1, 1 / 3, 1000.1, 1e-6, -1e6 / 7])
def test_explained_variance_of_returns_that_are_constant_to_rounding(constant):
    torch.manual_seed(0)
    values, mask = 5 * torch.randn(100, 100), torch.rand(100, 100) < 0.8
    flat = torch.full_like(values, constant)
    assert explained_variance(values * constant, flat, mask) == 0
    assert explained_variance(flat + 2 * constant, flat, mask) == 1
    values *= constant
    rounded = (flat - values) + values  # as gae takes values off and adds them again
    assert (rounded[mask] != flat[mask]).any() and explained_variance(values, rounded, mask) == 0


@pytest.mark.parametrize("kl, expected", [
    (6.0, 0.1),                       # on target
    (6.6, 0.1 * (1 + 0.1 * 0.05)),    # 10 % above, n / horizon = 64 / 1280 = .05
    (5.4, 0.1 * (1 - 0.1 * 0.05)),
    (60.0, 0.1 * (1 + 0.2 * 0.05)),   # clipped at +-20 %
    (-3.0, 0.1 * (1 - 0.2 * 0.05)),
])
def test_update_kl_coef(kl, expected):
    assert update_kl_coef(0.1, kl, 6.0, 64, 1280) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bad", [(0.1, NAN, 6, 64, 1280), (0.1, 6, 0, 64, 1280), (0.1, 6, 6, 0, 10),
                                 (0.1, 6, 6, 64, 0), (-0.1, 6, 6, 64, 1280), (0.1, 6, 6, 50, 10)])
def test_update_kl_coef_bad_input(bad):
    with pytest.raises(ValueError, match="target"):
        update_kl_coef(*bad)
