"""Reading a base model: hidden states, log-probs of sampled tokens, scores of a scalar head.

Log-probs and scores are read at chosen positions only, so that ``lm_head`` (V = 32,000) never runs
over a whole batch. Letters: B batch, L sequence, V vocabulary, D hidden.
"""
from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from virtue.logprobs import gather_logprobs, logprobs_and_entropy, scatter, select_next
from virtue.lora import active_stack, adapter_names, use_stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOGITS_AT_ONCE = 1 << 26  # numbers: logits of more are computed part by part


def checkpoint_layers(model: PreTrainedModel) -> None:
    """From now on forwards with gradients keep each decoder layer's input only; the backward pass
    computes the rest again, under the stack of adapters of the forward. Less memory for a third
    more arithmetic."""
    for layer in model.model.layers:
        layer.forward = functools.partial(_checkpointed, layer, layer.forward)


def _checkpointed(layer: nn.Module, forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    known = adapter_names(layer)
    # The backward comes when another may act
    stack = [name for name in active_stack(layer) if name in known]

    def again(*args, **kwargs):
        with use_stack(layer, *stack):
            return forward(*args, **kwargs)
    # Nothing here is random
    return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor,
    position_ids: Tensor | None = None,
) -> Tensor:
    """(B, L, D) after the final norm, for ``input_ids`` (B, L), padded on either side.

    ``attention_mask`` (B, L), True or 1 = real token, or (B, 1, L, L) True = attends, which needs
    ``position_ids`` (B, L); by default a token's position is the number of real ones before it.
    Where config.json has a sliding window of W, a token sees itself and the W - 1 positions before
    it. What stands at padding means nothing. ValueError: a mask of another shape, or of four
    dimensions without ``position_ids``.
    """
    if position_ids is None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(f"a mask of shape {tuple(attention_mask.shape)} needs position_ids")
        if bool((attention_mask.long().diff(dim=1) <= 0).all()):
            # Padding comes last, so no real token sees it: attention is causal, and without a mask
            # its kernels are faster. (Positions without a mask transformers reads as packed
            # sequences: it must make its own.)
            attention_mask = None
        else:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    elif attention_mask.ndim == 4 and (window := model.config.sliding_window):
        # transformers takes such a mask as it is, without the window
        key, query = position_ids[:, None, None], position_ids[:, None, :, None]
        attention_mask = attention_mask & (key > query - window)
    return model.model(
        input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state


def logprobs_at(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, mask: Tensor,
    temperature: float = 1.0, with_entropy: bool = False, train_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """fp32 log-probs (B, L-1) of the tokens under ``mask`` (B, L-1), zero elsewhere; column j
    speaks of token j+1. ``with_entropy``: also the entropies (B, L-1), in nats, with a gradient
    where ``train_entropy``.

    ``lm_head`` runs on the N = mask.sum() positions only, and where they are many, on a part at a
    time, whose logits are computed again in the backward pass: 2,000 rows of 32,000 are 256 MB.
    """
    def read(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logits = model.lm_head(hidden)  # (n, V)
        if with_entropy:
            return logprobs_and_entropy(logits, targets, temperature, train_entropy)
        return (gather_logprobs(logits, targets, temperature),)

    width = used_columns(mask)
    hidden = hidden_states(model, input_ids[:, :width], attention_mask[:, :width])
    hidden, targets = select_next(hidden, input_ids[:, :width], mask[:, : width - 1])
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    if len(targets) <= size:
        found = read(hidden, targets)
    else:
        parts = zip(hidden.split(size), targets.split(size))
        found = map(torch.cat, zip(*(_checkpointed(model.lm_head, read, *part) for part in parts)))
    logprobs, *rest = (scatter(values, mask) for values in found)
    return (logprobs, *rest) if with_entropy else logprobs


def used_columns(mask: Tensor) -> int:
    """Columns of a batch (B, L) up to the last token under ``mask`` (B, L-1): no other token sees
    those after it, which are padding or turns that the loss leaves out."""
    return int((mask.any(0) * torch.arange(mask.shape[1], device=mask.device)).max()) + 2


class ScalarHead(nn.Module):
    """Score of a hidden state: fp32 ``weight`` (1, D), and a ``bias`` (1,) if asked for.

    Zeros, as the scripts use it; with ``seed`` normal with std 1/sqrt(D + 1) (Stiennon et al. 2020,
    arXiv:2009.01325, app. B.1, reward model).
    """

    def __init__(self, dim: int, *, bias: bool = False, seed: int | None = None):
        super().__init__()
        weight = torch.zeros(1, dim)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            weight.normal_(std=(dim + 1) ** -0.5, generator=generator)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(1)) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) of any dtype -> fp32 scores (...)."""
        return F.linear(hidden.float(), self.weight, self.bias).squeeze(-1)


def score_at(
    model: PreTrainedModel, head: ScalarHead, input_ids: Tensor, attention_mask: Tensor,
    positions: Tensor,
) -> Tensor:
    """fp32 scores (B, P) read at token indices ``positions`` (B, P). ValueError: one on padding."""
    if not attention_mask.gather(1, positions).all():
        raise ValueError("a score position lies on padding")
    hidden = hidden_states(model, input_ids, attention_mask)
    index = positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])  # (B, P, D)
    return head(hidden.gather(1, index))
