"""Sampling of dialogues: batched, with a KV cache, from each row's own random numbers.

No top-k and no top-p: the log-probs of filtered samples are not those of the policy, and KL
estimates from them are biased. A token is the inverse of the cumulative distribution at the row's
uniform number, so neither batch size nor order changes what a row draws.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from virtue import VirtueError
from virtue.dialogue import QUESTIONS, Dialogue, Messages, Turn
from virtue.dialogue import encode_prompt, followup_ids, left_pad
from virtue.randomness import stream

# The built-in map, or what spreads and keeps batches
EachBatch = Callable[[Callable, Sequence], Iterable]

DROP = 8  # finished rows leave the cache when they are at least 1/DROP of the batch


def fits(tokenizer, messages: Messages, max_prompt_tokens: int) -> bool:
    """Whether the prompt is short enough; callers drop and count the others, never cut them.
    Errors: as `encode_prompt`."""
    return len(encode_prompt(tokenizer, messages)) <= max_prompt_tokens


def longest(max_prompt_tokens: int, max_new_tokens: int, turns: int = 3) -> int:
    """Tokens of the longest dialogue of `turns` answers that the flags allow, follow-up questions
    included."""
    return max_prompt_tokens + turns * (max_new_tokens + 64)  # 64: a follow-up question


def check_context(model: nn.Module, max_prompt_tokens: int, max_new_tokens: int,
                  turns: int = 3) -> None:
    """VirtueError where the longest dialogue that the flags allow does not fit into the context."""
    need = longest(max_prompt_tokens, max_new_tokens, turns)
    have = model.config.max_position_embeddings
    if need > have:
        raise VirtueError(f"--max-prompt-tokens {max_prompt_tokens} and {turns} turns of "
                          f"--max-new-tokens {max_new_tokens} may need {need} positions, but the "
                          f"model has {have}: lower them")


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """For each row of ``logits (B, V)`` the first token whose cumulative probability exceeds
    ``uniforms (B,)`` in [0, 1), float64 as NumPy draws them; temperature 0 takes the most probable.
    Returns ``(B,)``. VirtueError: logits that are not finite."""
    if temperature == 0:
        return logits.argmax(-1)
    # Near 1 numbers of 32 bits are 6e-8 apart: a token less probable than that could never be
    # drawn.
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]  # 1 to rounding, and kept above the threshold, or no token would be
    if not bool(total.isfinite().all()):
        raise VirtueError("the model's logits are not finite: train again with a lower --lr, or "
                          "use another --dtype")
    threshold = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1)


def cache_with_room(config, steps: int, column: Tensor | None = None):
    """A KV cache with room for ``steps`` tokens after the first ones: each token is written in its
    place, whereas transformers' own cache is copied as a whole for every token. With ``column
    (1,)``, an index on the device, each later token is written to that column and the whole room is
    read, so that all steps have one shape."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Layer(DynamicLayer):
        def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
            start = self.get_seq_length()
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
                B, H, L, D = keys.shape
                # a column that the mask hides must be finite all the same
                self.room = keys.new_zeros(2, B, H, L + steps, D)
            elif column is not None:
                return tuple(room.index_copy_(2, column, part)
                             for room, part in zip(self.room, (keys, values)))
            end = start + keys.shape[2]
            self.room[0, :, :, start:end], self.room[1, :, :, start:end] = keys, values
            self.keys, self.values = self.room[:, :, :, :end]
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            end, self.room = self.get_seq_length(), self.room[:, indices]
            self.keys, self.values = self.room[:, :, :, :end]

    cache = DynamicCache(config=config)
    cache.layers = [Layer() for _ in cache.layers]
    return cache


def steps_of_one_shape(model: nn.Module, cache, column: Tensor, mask: Tensor,
                       position: Tensor) -> Callable[[Tensor], Tensor]:
    """The decode steps after a prompt's pass as ``step(tokens (B,)) -> logits (B, V)``; each call
    takes the next column.

    ``cache`` from ``cache_with_room`` with ``column (1,)``, the first one to be written; ``mask (B,
    L + steps)`` of all columns; ``position (B, 1)`` of the token before. On a GPU the step is
    recorded as one CUDA graph: a host needs several times as long to launch its 2,000 kernels one
    by one as the GPU needs to run them. The logits are overwritten by the next call.
    """
    ids, position, seen = torch.zeros_like(position), position.clone(), mask.clone()[:, None, None]
    seen[..., column.item():] = False

    def forward() -> Tensor:
        return model(input_ids=ids, attention_mask=seen, use_cache=True, position_ids=position,
                     past_key_values=cache, logits_to_keep=1).logits[:, -1]

    if ids.is_cuda:
        # a first run outside the graph: libraries allocate and choose kernels in it
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            forward()  # writes to a column that the first step writes anew
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = forward()

    def step(tokens: Tensor) -> Tensor:  # holds on to all that the graph reads
        ids.copy_(tokens[:, None])
        position.add_(1)
        seen.index_fill_(3, column, True)
        if not ids.is_cuda:
            found = forward()
        else:
            graph.replay()
            found = logits
        column.add_(1)
        return found
    return step


def sample(model: nn.Module, rows: list[list[int]], uniforms: np.ndarray,
           **settings) -> list[tuple[list[int], bool]]:
    """``sample_turns`` of one turn: ``uniforms (n, max_new_tokens)`` -> for each row its new ids
    and whether they were truncated."""
    turns = sample_turns(model, rows, uniforms[:, None], [[] for _ in rows], **settings)
    return [turn for (turn,) in turns]


@torch.no_grad()
def sample_turns(model: nn.Module, rows: list[list[int]], uniforms: np.ndarray,
                 questions: Sequence[Sequence[list[int]]], *, eos_id: int, pad_id: int,
                 temperature: float = 1.0, one_shape: bool | None = None
                 ) -> list[list[tuple[list[int], bool]]]:
    """Continues each row of ids up to EOS, or up to ``max_new_tokens`` tokens, then reads the row's
    next question and answers it likewise.

    `model` is in eval mode, its stack of adapters set by the caller; `uniforms` are ``(n, turns,
    max_new_tokens)`` numbers in [0, 1); `questions` the ids of each row's turns - 1 questions. A
    row feeds one token a step, drawn or of a question (after an EOS that did not come), so that
    rows at different turns share a batch and nothing is read twice. Returns for each row and turn
    the new ids, EOS included, and whether they were truncated (no EOS came). ``one_shape`` (the
    default on a GPU): see ``steps_of_one_shape``. Finished rows then stay in the batch; this costs
    little, since the weights, which all rows share, are most of what a step reads. ValueError: a
    negative temperature, or not as many rows of uniforms, or questions, as rows of ids.
    """
    n, turns, steps = uniforms.shape
    if temperature < 0 or not len(rows) == n == len(questions) or any(
            len(of_row) != turns - 1 for of_row in questions):
        raise ValueError(f"temperature {temperature}, {len(rows)} rows, uniforms {uniforms.shape}, "
                         f"{[len(of_row) for of_row in questions]} questions")
    device = next(model.parameters()).device
    total = turns * steps + max(sum(len(q) + 1 for q in of_row) for of_row in questions)
    ids, mask = (t.to(device) for t in left_pad(rows, pad_id))
    width, mask = ids.shape[1], torch.cat([mask, mask.new_ones(n, total)], dim=1).bool()
    position = (mask.cumsum(1) - 1).clamp(min=0)[:, :width]
    if model.config.sliding_window:  # it is in transformers' own mask only
        one_shape = False
    elif one_shape is None:
        one_shape = device.type == "cuda"
    column = torch.full((1,), width, device=device) if one_shape else None
    cache = cache_with_room(model.config, total, column)
    logits = model(input_ids=ids, attention_mask=mask[:, :width], use_cache=True,
                   position_ids=position, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    position, decode = position[:, -1:], None
    new = torch.full((n, total), pad_id, device=device)
    follow = _next_token(uniforms, questions, eos_id, temperature, device)
    alive = torch.arange(n, device=device)  # rows still in the batch
    turn = place = torch.zeros_like(alive)
    for step in range(total):
        token, turn, place = follow(logits, alive, turn, place)
        new[alive, step] = token
        done = turn == turns
        finished = int(done.sum())
        if finished == len(done):
            break
        if one_shape:
            decode = decode or steps_of_one_shape(model, cache, column, mask, position)
            logits = decode(token)
            continue
        position = position + 1
        if finished * DROP >= len(done):
            keep = (~done).nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            token, position, mask, alive, turn, place = (
                t[keep] for t in (token, position, mask, alive, turn, place))
        seen = mask[:, :width + step + 1]
        if not model.config.sliding_window:
            # transformers takes (B, 1, 1, L) as it is; for (B, L) it would look through the values,
            # and a GPU must wait for that
            seen = seen[:, None, None]
        logits = model(input_ids=token[:, None], attention_mask=seen, use_cache=True,
                       position_ids=position, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    return [_turns_of(row, [len(q) for q in of_row], steps, eos_id)
            for row, of_row in zip(new.tolist(), questions)]


def _next_token(uniforms: np.ndarray, questions: Sequence[Sequence[list[int]]], eos_id: int,
                temperature: float, device) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """``follow(logits (B, V), rows (B,), turn (B,), place (B,)) -> (token, turn, place)``: each
    row's next token, and where the row then stands. ``place`` counts what a turn has drawn; below
    zero, what must be read before the first draw. A row is finished in the turn after its last."""
    n, turns, steps = uniforms.shape
    draws = torch.as_tensor(uniforms, dtype=torch.float64, device=device)
    wide = 1 + max((len(q) for of_row in questions for q in of_row), default=0)
    # Read before turn t + 1, aligned to the right: place -1 is the last token of a question
    read = torch.full((n, turns, wide), eos_id)
    length = torch.zeros(n, turns + 1, dtype=torch.long)
    for i, of_row in enumerate(questions):
        for t, ids in enumerate(of_row, start=1):
            length[i, t] = len(ids)
            read[i, t, wide - len(ids):] = torch.tensor(ids, dtype=torch.long)
    read, length = read.to(device), length.to(device)

    def follow(logits: Tensor, rows: Tensor, turn: Tensor, place: Tensor):
        now = turn.clamp(max=turns - 1)  # of finished rows, whose tokens nobody reads
        drawn = draw(logits, draws[rows, now, place.clamp(0, steps - 1)], temperature)
        token = torch.where(place < 0, read[rows, now, place.clamp(max=-1)], drawn)
        ends = (place >= 0) & (turn < turns) & ((token == eos_id) | (place == steps - 1))
        cut, turn = token != eos_id, turn + ends
        return token, turn, torch.where(ends, -length[rows, turn] - cut.long(), place + 1)
    return follow


def _turns_of(row: list[int], lengths: list[int], steps: int,
              eos_id: int) -> list[tuple[list[int], bool]]:
    """What was drawn in each turn, of all that a row was fed: questions of these lengths come
    between."""
    found, start = [], 0
    for length in (*lengths, 0):
        ids = row[start:start + steps]
        truncated = eos_id not in ids
        found.append((ids if truncated else ids[:ids.index(eos_id) + 1], truncated))
        start += len(found[-1][0]) + truncated + length
    return found


def sample_dialogues(model: nn.Module, tokenizer, prompts: Sequence[dict], *, seed: int, stage: str,
                     step: int = 0, max_new_tokens: int, temperature: float, batch_size: int,
                     questions: Sequence[str] | Mapping[str, Sequence[str]] = QUESTIONS,
                     turns: int = 3, copy: int = 0,
                     each_batch: EachBatch = map) -> list[Dialogue]:
    """One dialogue for each prompt record, in their order: the answer, and `turns` - 1 follow-ups.

    Draws are keyed by (seed, stage, step, prompt id, copy, turn): another `copy` is an independent
    second dialogue. `questions` are the follow-ups of all, or by prompt id.
    `each_batch(compute, batches)` gives each batch's result, in order, as lists and numbers:
    ``map``, or ``plumbing.resume.spread``. ValueError: more turns than questions + 1, or none.
    VirtueError: logits that are not finite; it names the records.
    """
    own = questions if isinstance(questions, Mapping) else dict.fromkeys(
        (record["id"] for record in prompts), questions)
    if not all(1 <= turns <= len(asked) + 1 for asked in own.values()):
        raise ValueError(f"{turns} turns with the follow-up questions {questions}")
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = [encode_prompt(tokenizer, record["prompt"]) for record in prompts]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding in a batch
    batches = [by_length[i : i + batch_size] for i in range(0, len(rows), batch_size)]

    def dialogues_of(batch: list[int]) -> list[tuple[list[int], list[Turn]]]:
        uniforms = np.stack([[stream(seed, stage, step, prompts[i]["id"], copy, turn).random(
            max_new_tokens) for turn in range(turns)] for i in batch])
        asked = [[[*followup_ids(tokenizer, q)] for q in own[prompts[i]["id"]][:turns - 1]]
                 for i in batch]
        try:
            sampled = sample_turns(model, [rows[i] for i in batch], uniforms, asked, eos_id=eos_id,
                                   pad_id=pad_id, temperature=temperature)
        except VirtueError as error:
            names = ", ".join(prompts[i]["id"] for i in batch[:4])
            raise VirtueError(f"sampling for {stage}, step {step}, a batch with records "
                              f"{names}: {error}") from None
        found = []
        for i, questions_of, answers in zip(batch, asked, sampled, strict=True):
            ids, spans = [*rows[i]], []
            for (new, truncated), question in zip(answers, (*questions_of, [])):
                spans.append(Turn(len(ids), len(ids) + len(new), truncated))
                ids += new + [eos_id] * truncated + question
            found.append((ids, spans))
        return found

    done: dict[int, Dialogue] = {}
    for batch, found in zip(batches, each_batch(dialogues_of, batches), strict=True):
        for i, (ids, of_turns) in zip(batch, found, strict=True):
            done[i] = Dialogue(prompts[i]["id"], prompts[i]["prompt"], ids,
                               tuple(Turn(*turn) for turn in of_turns))
    return [done[i] for i in range(len(prompts))]
