"""PPO on token sequences, as pure functions. To change the objective, edit `ppo_loss`.

Shapes: B rows, L tokens, T = L-1 columns; column j speaks of token j+1. `mask` (B, T) bool, True =
a sampled token that the loss covers; it may have gaps (the user's turns). What lies outside never
reaches a loss, a statistic or a gradient. Log-probs in nats; losses are minimised. ValueError:
shapes that differ, a mask that is not bool, settings out of range.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from virtue.logprobs import LOG_RATIO_LIMIT, kl_k1, kl_k3
from virtue.masked import check_shapes, masked_var, rounding_variance

Loss = tuple[Tensor, dict[str, Tensor]]  # 0-d with gradient; detached 0-d by metric name


class Rollout(NamedTuple):
    """Scored samples of one iteration; immutable, all tensors detached."""

    input_ids: Tensor     # (B, L) int64, right-padded
    mask: Tensor          # (B, L-1) bool
    old_logprobs: Tensor  # (B, L-1) policy before the update
    ref_logprobs: Tensor  # (B, L-1) reference policy
    values: Tensor        # (B, L-1) value function before the update
    rewards: Tensor       # (B, L-1) per token, KL penalty included

    def index(self, idx: Tensor | list[int] | slice) -> Rollout:
        """The rows `idx` of every field: a minibatch. (It hides tuple.index, which is of no use
        here.)"""
        return Rollout(*(field[idx] for field in self))


def place_rewards(mask: Tensor, positions: Tensor, amounts: Tensor) -> Tensor:
    """Pay each amount at the last True column at or before its position; sums are kept.

    mask (B, T); positions (columns in [0, T)) and amounts both (B,) or (K, B) -> (B, T), zero where
    nothing is paid. ValueError: position out of range; no True column at or before it.
    """
    check_shapes(positions=positions, amounts=amounts)
    B, T = mask.shape
    if mask.dtype != torch.bool or positions.dim() not in (1, 2) or positions.shape[-1] != B:
        raise ValueError(f"positions {tuple(positions.shape)} unfit for {mask.dtype} mask {(B, T)}")
    if not bool(((positions >= 0) & (positions < T)).all()):
        raise ValueError(f"positions must be columns in [0, {T})")
    columns = torch.arange(T, device=mask.device).expand(B, T)
    last_true = torch.where(mask, columns, -1).cummax(1).values  # (B, T), -1: none so far
    landing = last_true.gather(1, positions.reshape(-1, B).T)  # (B, K)
    if bool((landing < 0).any()):
        rows = (landing < 0).any(1).nonzero().flatten().tolist()
        raise ValueError(f"no trained token at or before the position in rows {rows}")
    return amounts.new_zeros(B, T).scatter_add(1, landing, amounts.reshape(-1, B).T)


def token_rewards(rewards: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor,
                  kl_coef: float) -> Tensor:
    """R_t = r_t - kl_coef * (log pi(a_t) - log ref(a_t)); all (B, T), zero outside the mask.

    Ziegler et al. 2019 (arXiv:1909.08593, eq. 2), per token, with k1: signed, not clamped.
    """
    check_shapes(rewards=rewards, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, mask=mask)
    penalised = rewards - kl_coef * kl_k1(old_logprobs, ref_logprobs)
    return torch.where(mask, penalised, 0)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float,
        lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: (B, T) -> raw advantages and returns, 0 outside the mask.

        A_t = sum_l (gamma lam)^l delta_{t+l},   delta_t = r_t + gamma V_{t+1} - V_t,   V_end = 0

    and returns = A + V. Schulman et al. 2015 (arXiv:1506.02438, eq. 16); r_t is here the reward for
    token t itself. t+1 is the next *masked* token: the recursion carries across a gap unchanged, so
    the user's turns cost no discount. No gradient. ValueError: gamma or lam outside [0, 1].
    """
    check_shapes(rewards=rewards, values=values, mask=mask)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam must be in [0, 1], got {gamma}, {lam}")
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])  # (B,) of the next masked token
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    return torch.where(mask, advantages, 0), torch.where(mask, advantages + values, 0)


def _mean_over(mask: Tensor, num_tokens: int | None) -> Callable[[Tensor], Tensor]:
    """(B, T) -> 0-d: sum over the mask / num_tokens, so that micro-batches add up to their step."""
    count = int(mask.sum()) if num_tokens is None else num_tokens
    if not count > 0:
        raise ValueError(f"no tokens to average over: num_tokens = {count}")
    return lambda x: torch.where(mask, x, 0).sum() / count


def policy_loss(new_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
                clip_range: float, num_tokens: int | None = None) -> Loss:
    """L = mean_t max(-rho_t A_t, -clip(rho_t, 1 - eps, 1 + eps) A_t), rho = pi_new / pi_old.

    Schulman et al. 2017 (arXiv:1707.06347, eq. 7), sign turned. Departure: log rho clamped at +-20.
    All (B, T). `num_tokens`: tokens in the whole optimiser step, default mask.sum(). Stats have the
    same mask and divisor: policy/loss, policy/clip_frac (where the clip changes the loss),
    policy/approx_kl (k3 of old against new), policy/ratio. ValueError: clip_range <= 0; no tokens.
    """
    check_shapes(new_logprobs=new_logprobs, old_logprobs=old_logprobs, advantages=advantages,
                 mask=mask)
    if not clip_range > 0:
        raise ValueError(f"clip_range must be positive, got {clip_range}")
    mean = _mean_over(mask, num_tokens)
    log_ratio = torch.where(mask, new_logprobs - old_logprobs, 0)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = mean(torch.maximum(unclipped, clipped))
    return loss, {"policy/loss": loss.detach(),
                  "policy/clip_frac": mean((clipped > unclipped).to(loss.dtype)),
                  "policy/approx_kl": mean(kl_k3(torch.zeros_like(ratio), log_ratio.detach())),
                  "policy/ratio": mean(ratio.detach())}


def value_loss(new_values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor,
               value_clip_range: float, num_tokens: int | None = None) -> Loss:
    """L = 0.5 mean_t max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2).

    Not in the PPO paper: from OpenAI's baselines (ppo2). All (B, T); eps = inf turns the clip off;
    `num_tokens` as in `policy_loss`. Stats: value/loss, value/clip_frac (where the clip changes the
    loss). ValueError: value_clip_range <= 0; no tokens.
    """
    check_shapes(new_values=new_values, old_values=old_values, returns=returns, mask=mask)
    if not value_clip_range > 0:
        raise ValueError(f"value_clip_range must be positive, got {value_clip_range}")
    mean = _mean_over(mask, num_tokens)
    # Masked first: the gradient of the square of a NaN is NaN, even times 0.
    new_values = torch.where(mask, new_values, 0)
    # Not old + clamp(new - old): its rounding would be counted as clipping.
    clipped = torch.clamp(new_values, old_values - value_clip_range, old_values + value_clip_range)
    plain_error, clipped_error = (new_values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * mean(torch.maximum(plain_error, clipped_error))
    return loss, {"value/loss": loss.detach(),
                  "value/clip_frac": mean((clipped_error > plain_error).to(loss.dtype))}


def ppo_loss(new_logprobs: Tensor, new_values: Tensor, entropy: Tensor | None, rollout: Rollout,
             advantages: Tensor, returns: Tensor, *, clip_range: float, value_clip_range: float,
             vf_coef: float, entropy_coef: float = 0.0, num_tokens: int | None = None) -> Loss:
    """The objective of one minibatch, L = L_policy + vf_coef L_value - entropy_coef mean_t H_t.

    Schulman et al. 2017 (arXiv:1707.06347, eq. 9), sign turned. THE function to edit to train for
    something else. The clip is in `policy_loss`; the KL penalty is not here: `token_rewards` took
    it from the rewards that advantages and returns were made of. new_logprobs, new_values (B, T)
    with gradient; entropy H (B, T), or None if not wanted; rollout: the same B rows; advantages
    (B, T), whitened over the whole batch; returns (B, T), raw. Stats: those of both losses, and
    policy/entropy where `entropy` is given. ValueError also for entropy_coef without `entropy`.
    """
    if entropy is None and entropy_coef != 0:
        raise ValueError(f"entropy_coef = {entropy_coef} needs entropy")
    loss, stats = policy_loss(new_logprobs, rollout.old_logprobs, advantages, rollout.mask,
                              clip_range, num_tokens)
    loss_of_values, value_stats = value_loss(new_values, rollout.values, returns, rollout.mask,
                                             value_clip_range, num_tokens)
    loss = loss + vf_coef * loss_of_values
    stats |= value_stats
    if entropy is not None:
        check_shapes(entropy=entropy, mask=rollout.mask)
        mean_entropy = _mean_over(rollout.mask, num_tokens)(entropy)
        if entropy_coef:  # else no time is spent on a gradient of zeros
            loss = loss - entropy_coef * mean_entropy
        stats["policy/entropy"] = mean_entropy.detach()
    return loss, stats


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) under the mask; all (B, T). 1 = perfect, 0 = blind.

    Where the returns are constant up to rounding, the result is 1 if the residual is constant too
    and 0 otherwise, never NaN.
    """
    check_shapes(values=values, returns=returns, mask=mask)
    total, rest = masked_var(returns, mask).item(), masked_var(returns - values, mask).item()
    noise = rounding_variance(mask, values, returns).item()
    return 1 - rest / total if total > noise else float(rest <= noise)


def update_kl_coef(kl_coef: float, kl: float, target: float, n: int, horizon: int) -> float:
    """kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon): a proportional controller.

    Ziegler et al. 2019 (arXiv:1909.08593, section 2.2); their constant gain of 0.1 is n / horizon
    here, as in their published code. kl, target: nats per dialogue; n: dialogues
    in this iteration; horizon: in dialogues, above n / 5, or the coefficient could reach zero.
    """
    if not (math.isfinite(kl) and kl_coef >= 0 and target > 0 and 0 < n < 5 * horizon):
        raise ValueError(f"need finite kl, kl_coef >= 0, target > 0, 0 < n < 5 horizon; got "
                         f"{kl}, {kl_coef}, {target}, {n}, {horizon}")
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)
