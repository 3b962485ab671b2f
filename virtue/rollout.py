"""From sampled dialogues to what PPO learns from: masks, scores of the reward models, placed rewards.

Sampled ids are used as they are; nothing is tokenised again. Each reward model reads the dialogue up
to the end of the turn it was trained on (``answer``: all read the answer alone).

Shell: imports core and modules; scripts may import it, the core may not.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from virtue.plumbing.checkpoint import load_artifact
from virtue.dialogue import Dialogue, right_pad
from virtue.ensemble import ADDITIVE, aggregate, shares
from virtue.ethics import LENSES
from virtue.logprobs import scatter
from virtue.lora import use_stack
from virtue.models import hidden_states, logprobs_at, score_at, used_columns
from virtue.plumbing.parallel import share, total
from virtue.ppo import place_rewards


def load_sft(folder: Path | None, model, **known) -> tuple[tuple[str, ...], dict[str, Path]]:
    """Puts the SFT adapter on the model, if there is one -> (its stack, the parents that artefacts upon it record). VirtueError: as ``load_artifact``."""
    if folder is None:
        return (), {}
    load_artifact(folder, model, "sft", stage="sft", **known)
    return ("sft",), {"sft": folder}


def load_reward_models(folder: Path, model, sft: tuple[str, ...], parents: Mapping[str, Path], prefix: str = "", **known,
                       ) -> tuple[list[tuple[tuple[str, ...], torch.nn.Module]], Tensor, Tensor]:
    """The reward models of run_rm.py, as (stack, head) in the order of LENSES, and their scores' mean and std.

    mean and std (K,) are those of the starting policy's dialogues. ``parents`` and ``known`` (base,
    template) must be what the models were trained upon: see ``checkpoint.load_artifact``. ``prefix`` keeps
    a second ensemble's adapters apart. VirtueError: one is missing or does not match.
    """
    found = [(lens, *load_artifact(folder / lens, model, prefix + lens, stage="rm", lens=lens, parents=parents, **known)) for lens in LENSES]
    mean, std = torch.tensor([[manifest["extra"][key] for _, manifest, _ in found] for key in ("score_mean", "score_std")])
    return [((*sft, prefix + lens), head) for lens, _, head in found], mean, std


def span_mask(spans: Sequence[Sequence[tuple[int, int]]], length: int) -> Tensor:
    """(B, length - 1) bool, True where the next token lies in one of the row's spans [start, end)."""
    mask = torch.zeros(len(spans), length - 1, dtype=torch.bool)
    for row, row_spans in enumerate(spans):
        for start, end in row_spans:
            mask[row, start - 1: end - 1] = True  # column j speaks of token j + 1
    return mask


def loss_mask(dialogues: Sequence[Dialogue], length: int, train_turns: str = "all") -> Tensor:
    """(B, length - 1) bool, True where the next token was sampled in a turn that the loss covers.

    ``train_turns``: "all", or "action" for the first turn only. A forced EOS is never covered.
    """
    covered = slice(0, 1 if train_turns == "action" else None)
    return span_mask([[(t.start, t.end) for t in d.turns[covered]] for d in dialogues], length)


@torch.no_grad()
def in_chunks(function: Callable[..., Tensor], size: int, *tensors: Tensor) -> Tensor:
    """``function`` over chunks of ``size`` rows of all tensors, without gradient, on the CPU.

    Its result has the shape of the last tensor's chunk, the mask (B, L-1). Rows of like length (of the
    mask) share a chunk, and ranks share the chunks.
    """
    mask = tensors[-1]
    result = torch.zeros(mask.shape)
    for rows in share(by_length(mask).split(size)):
        result[rows] = function(*(t[rows] for t in tensors)).cpu()
    return total(result)


def by_length(mask: Tensor) -> Tensor:
    """Rows of ``mask`` (B, L-1), the ones that end early first: batches of neighbours hold little padding."""
    return (mask * torch.arange(1, mask.shape[1] + 1)).amax(1).argsort(stable=True)


def values_at(model, head: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
    """Values (B, L-1), zero outside the mask: column j is the value before token j+1 is chosen."""
    width = used_columns(mask)
    hidden = hidden_states(model, input_ids[:, :width], attention_mask[:, :width])
    return scatter(head(hidden[:, :-1][mask[:, : width - 1]]), mask)


@torch.no_grad()
def score_dialogues(model, reward_models: Sequence[tuple[tuple[str, ...], torch.nn.Module]],
                    dialogues: Sequence[Dialogue], turns: Sequence[int], pad_id: int, *, batch_size: int) -> Tensor:
    """Raw scores (K, B) of K reward models, each a (stack of adapters, head).

    Model k is read at the end of turn ``turns[k]``, and the rows are cut there, so that no model pays
    for tokens it does not see.
    """
    device, scores = model.device, torch.zeros(len(reward_models), len(dialogues))
    for k, (stack, head) in enumerate(reward_models):
        ends = [d.turns[turns[k]].score_position for d in dialogues]
        order = sorted(range(len(dialogues)), key=lambda i: ends[i])  # little padding in a batch
        with use_stack(model, *stack):
            for start in share(range(0, len(order), batch_size)):
                rows = order[start:start + batch_size]
                ids, mask = right_pad([dialogues[i].ids[: ends[i] + 1] for i in rows], pad_id)
                positions = torch.tensor([[ends[i]] for i in rows], device=device)
                scores[k, rows] = score_at(model, head, ids.to(device), mask.to(device), positions)[:, 0].cpu()
    return total(scores)


def dialogue_logprobs(model, stack: Sequence[str], dialogues: Sequence[Dialogue], pad_id: int, *,
                      batch_size: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs (B, L-1) of all sampled tokens under a stack, and their mask; nats."""
    ids, attention = right_pad([d.ids for d in dialogues], pad_id)
    mask = loss_mask(dialogues, ids.shape[1])
    device = model.device
    with use_stack(model, *stack):
        logprobs = in_chunks(lambda i, a, m: logprobs_at(model, i.to(device), a.to(device), m.to(device), temperature),
                             batch_size, ids, attention, mask)
    return logprobs, mask


def place_scores(scores: Tensor, dialogues: Sequence[Dialogue], mask: Tensor, method: str, *,
                 pay_at: str = "turns", eos_penalty: float = 0.0, **settings) -> Tensor:
    """Rewards (B, L-1) from standardised scores (K, B), before the KL penalty.

    Additive aggregators pay each lens at the last sampled token of its own turn; the others, and those
    with ``pay_at`` "end", one scalar at the dialogue's last sampled token (an earlier one where the loss
    ends earlier: see ``place_rewards``). A truncated turn under the loss pays ``eos_penalty`` at its last token.
    ``settings`` go to ``ensemble.aggregate``. ValueError: as there, and as ``place_rewards``.
    """
    ends = torch.tensor([[turn.end - 2 for turn in d.turns] for d in dialogues])  # columns (B, turns)
    if method in ADDITIVE and pay_at == "turns":
        parts = shares(scores, method, settings.get("weights"))
        positions = torch.stack([ends[:, min(k, ends.shape[1] - 1)] for k in range(len(parts))])  # (K, B)
        rewards = place_rewards(mask, positions, parts)
    else:
        rewards = place_rewards(mask, ends[:, -1], aggregate(scores, method, **settings))
    cut = torch.tensor([[turn.truncated for turn in d.turns] for d in dialogues])
    cut &= mask.gather(1, ends)
    for turn in range(ends.shape[1]):
        rewards[cut[:, turn], ends[cut[:, turn], turn]] -= eos_penalty
    return rewards


def ended_share(dialogues: Sequence[Dialogue]) -> float:
    """Share of all turns that ended with a sampled EOS, in [0, 1]; the others met --max-new-tokens."""
    turns = [turn for d in dialogues for turn in d.turns]
    return 1.0 - sum(turn.truncated for turn in turns) / len(turns)
