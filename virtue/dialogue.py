"""Text and tokens: the chat template, turn spans, padding.

A dialogue is one token sequence: the prompt through the chat template, then for each turn the
sampled ids and those the template puts before the next turn. Nothing sampled is tokenised again.

Shell: imports core and modules; scripts may import it, the core may not.
"""
from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from virtue import VirtueError
from virtue.ethics import FOLLOW_UPS

Messages = list[dict[str, str]]
QUESTIONS = tuple(FOLLOW_UPS.values())


class Turn(NamedTuple):
    """One assistant turn: its sampled tokens are ``ids[start:end]`` of the dialogue.

    If `truncated` (no EOS came), ``ids[end]`` is a forced EOS, outside the loss, so that template
    and score position match training.
    """

    start: int
    end: int
    truncated: bool

    @property
    def score_position(self) -> int:
        """Index in the dialogue's ids of the turn's EOS, where a reward model is read."""
        return self.end if self.truncated else self.end - 1


class Dialogue(NamedTuple):
    """A prompt and the assistant's turns, with the token ids they were sampled as."""

    id: str
    prompt: Messages
    ids: list[int]
    turns: tuple[Turn, ...]


@functools.lru_cache(maxsize=8)
def _control(tokenizer) -> re.Pattern[str]:
    added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    words = {*tokenizer.all_special_tokens, *added, "[INST]", "[/INST]"}
    return re.compile("|".join(re.escape(w) for w in sorted(words, reverse=True) if len(w) > 1))


def sanitize(tokenizer, text: str) -> str:
    """`text` with a space inside every control token, so that none can open or close a turn."""
    control = _control(tokenizer)
    while control.search(text):  # again, for one control token may overlap another
        text = control.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)
    return text


def _render(tokenizer, messages: Messages, add_generation_prompt: bool) -> list[int]:
    clean = [{"role": m["role"], "content": sanitize(tokenizer, m["content"])} for m in messages]
    return tokenizer.apply_chat_template(
        clean, add_generation_prompt=add_generation_prompt, return_dict=False)


def encode_prompt(tokenizer, messages: Messages) -> list[int]:
    """Ids of `messages` (ending with the user's) up to where the assistant's turn starts. jinja2.TemplateError: the template refuses them."""
    return _render(tokenizer, messages, add_generation_prompt=True)


def encode_conversation(tokenizer, messages: Messages) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a whole conversation, and the span ``[start, end)`` of each assistant turn.

    A span holds what the model is to produce: the text and its EOS. What the template adds after
    the last EOS is left off, so that ids end as a sampled dialogue ends.

    VirtueError: the template renders the beginning of a conversation otherwise than alone, or
    ends assistant turns without EOS; spans would then point at wrong tokens.
    """
    ids, spans = _render(tokenizer, messages, add_generation_prompt=False), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = encode_prompt(tokenizer, messages[:i])
        if ids[: len(prompt)] != prompt:
            raise VirtueError("the chat template does not render the messages before the answer "
                              f"{message['content'][:40]!r} as a prefix of the whole: use a "
                              "tokenizer whose template does, as Mistral's")
        if tokenizer.eos_token_id not in ids[len(prompt):]:
            raise VirtueError("the chat template does not end assistant turns with eos_token "
                              f"{tokenizer.eos_token!r}: use a tokenizer whose template does")
        spans.append((len(prompt), ids.index(tokenizer.eos_token_id, len(prompt)) + 1))
    return (ids[: spans[-1][1]] if messages[-1]["role"] == "assistant" else ids), spans


@functools.lru_cache(maxsize=64)
def followup_ids(tokenizer, question: str) -> tuple[int, ...]:
    """Ids between an assistant turn's EOS and the next, where the user asks `question`.
    VirtueError: a template that writes earlier turns otherwise when others follow."""
    before: Messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, _ = encode_conversation(tokenizer, before)
    whole = encode_prompt(tokenizer, [*before, {"role": "user", "content": question}])
    if whole[: len(ids)] != ids:
        raise VirtueError("the chat template changes turns when others follow: use a tokenizer "
                          "whose template only appends, as Mistral's")
    return tuple(whole[len(ids):])  # the same after any text, for EOS is a token of its own


def messages_of(tokenizer, dialogue: Dialogue, turns: int = 3,
                questions: Sequence[str] = QUESTIONS) -> Messages:
    """The dialogue's first `turns` assistant turns as messages: decoded, stripped, maybe empty."""
    messages = list(dialogue.prompt)
    for i, turn in enumerate(dialogue.turns[:turns]):
        if i:
            messages.append({"role": "user", "content": questions[i - 1]})
        text = tokenizer.decode(dialogue.ids[turn.start:turn.end], skip_special_tokens=True,
                                clean_up_tokenization_spaces=False)
        messages.append({"role": "assistant", "content": text.strip()})
    return messages


def _pad(rows: Sequence[Sequence[int]], pad_id: int, left: bool) -> tuple[Tensor, Tensor]:
    lengths = np.array([len(row) for row in rows])
    if lengths.size == 0 or lengths.min() == 0:
        raise ValueError("padding needs at least one row and no empty row")
    columns, width = np.arange(lengths.max()), lengths.max()
    mask = (columns >= width - lengths[:, None]) if left else (columns < lengths[:, None])
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return torch.from_numpy(ids), torch.from_numpy(mask)


def buckets(order: Sequence[int], lengths: Sequence[int], size: int, window: int = 8) -> list[list[int]]:
    """Batches of `size` rows of like length, from a shuffled `order` of row numbers: padding costs time.

    Each `window` batches' worth of rows is sorted by `lengths`, cut into batches, and these stand in the order
    in which their shortest rows stood. ceil(len(order) / size) batches; every row once.
    """
    batches = []
    for start in range(0, len(order), window * size):
        place = {row: n for n, row in enumerate(order[start:start + window * size])}
        ordered = sorted(place, key=lambda row: lengths[row])
        batches += sorted((ordered[i:i + size] for i in range(0, len(ordered), size)), key=lambda batch: place[batch[0]])
    return batches


def right_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of ids as ``input_ids (B, L)`` and bool ``attention_mask (B, L)``, pads at the right.
    ValueError: no row, or an empty one."""
    return _pad(rows, pad_id, left=False)


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """As `right_pad`, pads at the left: for sampling, where all rows go on from the last column."""
    return _pad(rows, pad_id, left=True)
