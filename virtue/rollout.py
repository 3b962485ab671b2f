"""From sampled dialogues to what PPO learns from: masks, scores of the reward models, placed
rewards.

Sampled ids are used as they are; nothing is tokenised again. Each reward model reads the dialogue
up to the end of the turn it was trained on (``answer``: all read the answer alone).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from virtue.dialogue import Dialogue, right_pad
from virtue.ensemble import ADDITIVE, aggregate, shares
from virtue.generate import EachBatch
from virtue.logprobs import scatter
from virtue.lora import use_stack
from virtue.models import hidden_states, logprobs_at, score_at, used_columns
from virtue.ppo import place_rewards


def span_mask(spans: Sequence[Sequence[tuple[int, int]]], length: int) -> Tensor:
    """(B, length - 1) bool, True where the next token lies in one of the row's spans [start,
    end)."""
    mask = torch.zeros(len(spans), length - 1, dtype=torch.bool)
    for row, row_spans in enumerate(spans):
        for start, end in row_spans:
            mask[row, start - 1: end - 1] = True  # column j speaks of token j + 1
    return mask


def loss_mask(dialogues: Sequence[Dialogue], length: int) -> Tensor:
    """(B, length - 1) bool, True where the next token was sampled. A forced EOS is never
    covered."""
    return span_mask([[(t.start, t.end) for t in d.turns] for d in dialogues], length)


@torch.no_grad()
def in_chunks(function: Callable[..., Tensor], size: int, *tensors: Tensor,
              each_batch: EachBatch = map) -> Tensor:
    """``function`` over chunks of ``size`` rows of all tensors, without gradient, on the CPU.

    Its result has the shape of the last tensor's chunk, the mask (B, L-1). Rows of like length (of
    the mask) share a chunk. ``each_batch`` as in ``generate.sample_dialogues``.
    """
    mask = tensors[-1]
    result = torch.zeros(mask.shape)
    chunks = by_length(mask).split(size)
    # Lists, since each_batch may send results from one process to another
    computed = each_batch(lambda rows: function(*(t[rows] for t in tensors)).tolist(), chunks)
    for rows, values in zip(chunks, computed, strict=True):
        result[rows] = torch.tensor(values)
    return result


def by_length(mask: Tensor) -> Tensor:
    """Rows of ``mask`` (B, L-1), the ones that end early first: batches of neighbours hold little
    padding."""
    return (mask * torch.arange(1, mask.shape[1] + 1)).amax(1).argsort(stable=True)


def values_at(model, head: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor,
              mask: Tensor) -> Tensor:
    """Values (B, L-1), zero outside the mask: column j is the value before token j+1 is chosen."""
    width = used_columns(mask)
    hidden = hidden_states(model, input_ids[:, :width], attention_mask[:, :width])
    return scatter(head(hidden[:, :-1][mask[:, : width - 1]]), mask)


def score_dialogues(model, reward_models: Sequence[tuple[tuple[str, ...], torch.nn.Module]],
                    dialogues: Sequence[Dialogue], turns: Sequence[int], pad_id: int, *,
                    batch_size: int, each_batch: EachBatch = map) -> Tensor:
    """Raw scores (K, B) of K reward models, each a (stack of adapters, head).

    Model k is read at the end of turn ``turns[k]``, and the rows are cut there, so that no model
    pays for tokens it does not see. ``each_batch`` as in ``generate.sample_dialogues``.
    """
    return torch.stack([_scores(model, stack, head, dialogues, turn, pad_id, batch_size, each_batch)
                        for (stack, head), turn in zip(reward_models, turns, strict=True)])


@torch.no_grad()
def _scores(model, stack: tuple[str, ...], head: torch.nn.Module, dialogues: Sequence[Dialogue],
            turn: int, pad_id: int, batch_size: int, each_batch: EachBatch) -> Tensor:
    device, scores = model.device, torch.zeros(len(dialogues))
    ends = [d.turns[turn].score_position for d in dialogues]

    def read(rows: list[int]) -> list[float]:
        ids, mask = right_pad([dialogues[i].ids[:ends[i] + 1] for i in rows], pad_id)
        positions = torch.tensor([[ends[i]] for i in rows], device=device)
        return score_at(model, head, ids.to(device), mask.to(device), positions)[:, 0].tolist()

    order = sorted(range(len(dialogues)), key=lambda i: ends[i])  # little padding in a batch
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    with use_stack(model, *stack):
        for rows, values in zip(batches, each_batch(read, batches), strict=True):
            scores[rows] = torch.tensor(values)
    return scores


def dialogue_logprobs(model, stack: Sequence[str], dialogues: Sequence[Dialogue], pad_id: int, *,
                      batch_size: int, temperature: float = 1.0,
                      each_batch: EachBatch = map) -> tuple[Tensor, Tensor]:
    """Log-probs (B, L-1) of all sampled tokens under a stack, and their mask; nats."""
    ids, attention = right_pad([d.ids for d in dialogues], pad_id)
    mask = loss_mask(dialogues, ids.shape[1])
    device = model.device
    with use_stack(model, *stack):
        logprobs = in_chunks(
            lambda *chunk: logprobs_at(model, *(t.to(device) for t in chunk), temperature),
            batch_size, ids, attention, mask, each_batch=each_batch)
    return logprobs, mask


def place_scores(scores: Tensor, dialogues: Sequence[Dialogue], mask: Tensor, method: str, *,
                 eos_penalty: float = 0.0, **settings) -> Tensor:
    """Rewards (B, L-1) from standardised scores (K, B), before the KL penalty.

    Additive aggregators pay each lens at the last sampled token of its own turn. The others pay one
    scalar at the dialogue's last sampled token (an earlier one where the loss ends earlier: see
    ``place_rewards``). A truncated turn under the loss pays ``eos_penalty`` at its last token.
    ``settings`` go to ``ensemble.aggregate``. ValueError: as there, and as ``place_rewards``.
    """
    # (B, turns): the column of each turn's last sampled token; token end - 1 is column end - 2
    ends = torch.tensor([[turn.end - 2 for turn in d.turns] for d in dialogues])
    if method in ADDITIVE:
        parts = shares(scores, method, settings.get("weights"))
        turns = [min(k, ends.shape[1] - 1) for k in range(len(parts))]
        positions = torch.stack([ends[:, turn] for turn in turns])  # (K, B)
        rewards = place_rewards(mask, positions, parts)
    else:
        rewards = place_rewards(mask, ends[:, -1], aggregate(scores, method, **settings))
    cut = torch.tensor([[turn.truncated for turn in d.turns] for d in dialogues])
    cut &= mask.gather(1, ends)
    for turn in range(ends.shape[1]):
        rewards[cut[:, turn], ends[cut[:, turn], turn]] -= eos_penalty
    return rewards


def ended_share(dialogues: Sequence[Dialogue]) -> float:
    """Share of all turns that ended with a sampled EOS, in [0, 1]; the others met
    --max-new-tokens."""
    turns = [turn for d in dialogues for turn in d.turns]
    return 1.0 - sum(turn.truncated for turn in turns) / len(turns)
