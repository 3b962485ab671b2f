"""Text and tokens: the chat template, turn spans, padding.

A dialogue is one token sequence: the prompt through the chat template, then for each turn the
sampled ids and those the template puts before the next turn. Nothing sampled is tokenised again.
"""
from __future__ import annotations

import datetime
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from virtue import VirtueError
from virtue.ethics import FOLLOW_UPS, LENSES

Messages = list[dict[str, str]]
QUESTIONS = tuple(FOLLOW_UPS.values())
SPLITS = (("sft", 0.25), ("rm", 0.60), ("ppo", 0.90), ("eval", 1.00))  # cumulative shares


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


def prompt_record(messages: Messages) -> dict:
    """``{"id", "prompt"}``: the id is 16 hex digits of the sha256 of the messages' JSON."""
    prompt = [{"role": m["role"], "content": m["content"]} for m in messages]
    canonical = json.dumps(prompt, sort_keys=True, separators=(",", ":"))
    return {"id": hashlib.sha256(canonical.encode()).hexdigest()[:16], "prompt": prompt}


def split(prompt_id: str) -> str:
    """The stage that may use a prompt: sft 25 %, rm 35 %, ppo 30 %, eval 10 %, by its id."""
    share = int(prompt_id, 16) / 16 ** len(prompt_id)
    return next((name for name, bound in SPLITS if share < bound), "eval")


# A template may write today's date into every prompt, and prompts would then change over night.
# Here it always writes this one, which Llama 3's template names as its own default.
TODAY = datetime.date(2024, 7, 26)
PLACES = ("zq0qz", "zq1qz", "zq2qz", "zq3qz")  # contents whose places show a template's structure
_PLACE = re.compile("zq[0-3]qz")
_MARKER = re.compile(r"<+[^<>\s]+>+|\[+[^\[\]\s]+\]+|\{+[^{}\s]+\}+|[^\s\w]*[#@|<>\[\]{}]+[^\s\w]*")


def dated(template: str | dict) -> str | dict:
    """The chat template with `TODAY` in the place of today's date. VirtueError: the template asks
    for the date in another way than by strftime_now with a format that is written out there."""
    if not isinstance(template, str) or "strftime_now" not in template:
        return template
    frozen = re.sub(r"""\bstrftime_now\(\s*(['"])((?:(?!\1).)*)\1\s*\)""",
                    lambda found: json.dumps(TODAY.strftime(found[2])), template)
    if re.search(r"\bstrftime_now\b(?!\s+is\s+(not\s+)?defined)", frozen):
        raise VirtueError("the chat template writes today's date in a way that cannot be frozen, "
                          "so prompts would change over night: write a fixed date into "
                          "chat_template.jinja")
    return frozen


def _text(tokenizer, messages: Messages, add_generation_prompt: bool) -> str:
    """`messages` through the template as text, contents as they are. VirtueError: it refuses
    them."""
    import jinja2  # torch brings it; a fifth of a second

    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=dated(tokenizer.get_chat_template()),
            add_generation_prompt=add_generation_prompt, tokenize=False)
    except jinja2.TemplateError as error:
        system = messages[0]["role"] == "system"
        remedy = ("leave the system message out, or take a model whose template has a place for one"
                  if system else "correct or remove them")
        raise VirtueError(
            f"the chat template refuses the messages that begin {messages[0]['content'][:40]!r} "
            f"({' '.join(str(error).split())[:200]}): {remedy}") from None


@functools.lru_cache(maxsize=8)
def _control(tokenizer) -> re.Pattern[str]:
    """Finds what would act as structure in a text: see `sanitize`."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": PLACES[i]} for i in range(3)]
    texts = [_text(tokenizer, turns, True)]
    try:
        texts.append(_text(tokenizer, [{"role": "system", "content": PLACES[3]}, *turns], True))
    except VirtueError:
        pass
    parts_of = [_PLACE.split(text) for text in texts]
    parts = [part for split in parts_of for part in split]
    added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
    words = {*tokenizer.all_special_tokens,
             *(word for word, special in added.items() if special or any(word in p for p in parts))}
    for part in parts:
        for word in sorted(added, key=len, reverse=True):
            part = part.replace(word, " ")
        words |= set(_MARKER.findall(part))
        if (last := part.rstrip().rpartition("\n")[2].split()[-1:]) and last[0].endswith(":"):
            words.add(last[0])  # "ASSISTANT:" right before an answer
    words = sorted((w for w in words if len(w.strip()) > 1), reverse=True)
    found = [*map(re.escape, words)]
    for part in parts_of[0][-2:]:  # before a later question and its answer: no system prompt in it
        line = part.rstrip().rpartition("\n")[2].rpartition(tokenizer.eos_token)[2].strip()
        if len(line) > 1:
            if re.search(r"[^\w\s]", line):  # "=== assistant ==="
                found.append(re.escape(line))
            elif part.rstrip(" ").endswith("\n"):  # "assistant", with a line of its own
                found.append(rf"(?m:^[ \t]*{re.escape(line)}[ \t\r]*$)")
    return re.compile("|".join(found) or "(?!)")


def sanitize(tokenizer, text: str) -> str:
    """`text` with a space inside each word that could open or close a turn.

    These are the tokenizer's special tokens, its other added tokens where the template writes them,
    and the template's own plain-text markers: words in brackets or with signs such as # and |, a
    word with a colon that stands right before a content, and the line that the template writes
    before a turn ("=== assistant ==="; "assistant", where it has a line of its own). Not protected:
    markers that are ordinary words within a line; a single character and white space, which a space
    cannot split; what becomes a marker only through the tokenizer's own normalisation; and words
    that act as structure for the model but that the template never writes in a conversation of
    system, user and assistant, such as those of tool calls.
    """
    control = _control(tokenizer)
    while control.search(text):  # again, for one control token may overlap another
        # behind the first character that is not white space: before it, " A:" remains in "  A:"
        text = control.sub(lambda m: re.sub(r"\S", r"\g<0> ", m[0], count=1), text)
    return text


def _clean(tokenizer, messages: Messages) -> Messages:
    """The one form in which texts of all sources are encoded: stripped, and without structure."""
    return [{"role": m["role"], "content": sanitize(tokenizer, m["content"].strip())}
            for m in messages]


def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_prompt(tokenizer, messages: Messages) -> list[int]:
    """Ids of `messages` (ending with the user's) up to where the assistant's turn starts.

    After an earlier answer they go on as `encode_conversation` does. VirtueError: the template
    refuses the messages, has no place for their system message, or hides the turns.
    """
    return encode_conversation(tokenizer, messages)[0]


def encode_conversation(tokenizer, messages: Messages) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a whole conversation, and the span ``[start, end)`` of each assistant turn.

    It is encoded turn by turn, as a dialogue is sampled: what the template writes up to an answer,
    the answer, EOS. A span holds what the model is to produce: the text and its EOS. What the
    template adds after the last EOS is left off, so that ids end as a sampled dialogue ends. Where
    the last message is the user's, ids end where the next answer starts.

    The answer's tokens are taken from the tokens of the whole text. But where a token spans the
    beginning of the answer, or the template writes the answer right behind a word of its own
    ("[/INST]Yes"), the answer is encoded alone, since no sampled answer begins in the middle of a
    word.

    VirtueError: as `encode_prompt`; the template renders the beginning of a conversation
    differently when more follows, or ends assistant turns without EOS; spans would then point at
    wrong tokens.
    """
    clean, eos = _clean(tokenizer, messages), tokenizer.eos_token_id
    answers = [i for i, message in enumerate(clean) if message["role"] == "assistant"]
    ends_in_answer = answers[-1:] == [len(clean) - 1]
    text = _text(tokenizer, clean, not ends_in_answer)
    if clean[0]["role"] == "system":  # of a prompt, too: once its answers are there it is too late
        answer = [] if ends_in_answer else [{"role": "assistant", "content": PLACES[1]}]
        before = _text(tokenizer, clean[:2], True)
        if clean[0]["content"] not in before or not _text(
                tokenizer, [*clean, *answer], False).startswith(before):
            raise VirtueError("the chat template leaves out or moves the system message "
                              f"{clean[0]['content'][:40]!r}: leave it out, or take a model whose "
                              "template keeps one in its place")
    whole, ids, spans, read = _encode(tokenizer, text), [], [], 0  # whole[:read] is in ids
    for i in answers:
        before = _text(tokenizer, clean[:i], True)
        if not text.startswith(before):
            raise VirtueError("the chat template does not render the messages before the answer "
                              f"{clean[i]['content'][:40]!r} as a prefix of the whole: use a "
                              "tokenizer whose template does, as Mistral's")
        prompt = _encode(tokenizer, before)
        if prompt[:read] != whole[:read]:
            raise VirtueError("the chat template changes turns when others follow: use a tokenizer "
                              "whose template only appends, as Mistral's")
        end = [j for j, token in enumerate(whole) if token == eos][prompt.count(eos):][:1]
        if not end:
            raise VirtueError("the chat template does not end assistant turns with eos_token "
                              f"{tokenizer.eos_token!r}: use a tokenizer whose template does")
        answer = whole[len(prompt):end[0]]
        controls = tuple(map(str, tokenizer.added_tokens_decoder.values()))
        behind_a_word = not (before[-1:].isspace() or text[len(before):][:1].isspace()
                             or before.endswith(controls))
        if behind_a_word or whole[:len(prompt)] != prompt:
            answer = _encode(tokenizer, text[len(before):].partition(tokenizer.eos_token)[0])
        ids += prompt[read:]
        spans.append((len(ids), len(ids) + len(answer) + 1))
        ids += [*answer, eos]
        read = end[0] + 1
    return (ids if ends_in_answer else ids + whole[read:]), spans


def instructed(tokenizer, messages: Messages, text: str) -> Messages:
    """`messages` with an instruction before them: in the system message if the template has a place
    for one, else at the head of the user's first message. VirtueError: as `encode_prompt`."""
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    with_system = [{"role": "system", "content": text}, *messages]
    try:
        encode_prompt(tokenizer, with_system)
    except VirtueError:
        first = messages[0] | {"content": f"{text}\n\n{messages[0]['content']}"}
        return [first, *messages[1:]]
    return with_system


def with_prompt(tokenizer, dialogue: Dialogue, prompt: Messages) -> Dialogue:
    """The dialogue as if its answers had followed another prompt: the same tokens after it."""
    ids, shift = encode_prompt(tokenizer, prompt), dialogue.turns[0].start
    turns = (turn._replace(start=turn.start + len(ids) - shift, end=turn.end + len(ids) - shift)
             for turn in dialogue.turns)
    return Dialogue(dialogue.id, prompt, ids + dialogue.ids[shift:], tuple(turns))


@functools.lru_cache(maxsize=64)
def followup_ids(tokenizer, question: str) -> tuple[int, ...]:
    """Ids between an assistant turn's EOS and the next, where the user asks `question`.
    VirtueError: the template changes earlier turns when others follow."""
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


def sampled_pair(tokenizer, record: dict, copies: Sequence[Dialogue],
                 lens: str) -> tuple[Dialogue, Dialogue] | None:
    """The dialogues (chosen, rejected) whose texts a preference record holds, cut after the turn of
    `lens`, so that a reward model learns from the very tokens that PPO will show it.

    `copies` are the record's two dialogues as they were sampled, of which its "chosen_copy" says
    which was chosen. None where it does not say, or where its texts have changed since.
    """
    k = LENSES.index(lens)
    if record.get("chosen_copy") is None or len(copies) != 2:
        return None
    pair = [copies[record["chosen_copy"]], copies[1 - record["chosen_copy"]]]
    if any(messages_of(tokenizer, d, turns=k + 1) != record[side]
           for d, side in zip(pair, ("chosen", "rejected"))):
        return None
    chosen, rejected = (d._replace(ids=d.ids[:d.turns[k].score_position + 1], turns=d.turns[:k + 1])
                        for d in pair)
    return chosen, rejected


def pair_rows(tokenizer, record: dict, copies: Sequence[Dialogue],
              lens: str) -> tuple[list[list[int]], bool]:
    """Ids of a preference record's two sides, chosen first, and whether they are those that were
    sampled (`sampled_pair`); else its texts are encoded."""
    if pair := sampled_pair(tokenizer, record, copies, lens):
        return [d.ids for d in pair], True
    return [encode_conversation(tokenizer, record[s])[0] for s in ("chosen", "rejected")], False


def copies_of(dialogues: Sequence[Dialogue]) -> dict[str, list[Dialogue]]:
    """Prompt id -> its dialogues, in their order: the copies of `sampled_pair`."""
    found: dict[str, list[Dialogue]] = {}
    for dialogue in dialogues:
        found.setdefault(dialogue.id, []).append(dialogue)
    return found


def _pad(rows: Sequence[Sequence[int]], pad_id: int, left: bool) -> tuple[Tensor, Tensor]:
    lengths = np.array([len(row) for row in rows])
    if lengths.size == 0 or lengths.min() == 0:
        raise ValueError("padding needs at least one row and no empty row")
    columns, width = np.arange(lengths.max()), lengths.max()
    mask = (columns >= width - lengths[:, None]) if left else (columns < lengths[:, None])
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return torch.from_numpy(ids), torch.from_numpy(mask)


def buckets(order: Sequence[int], lengths: Sequence[int], size: int,
            window: int = 8) -> list[list[int]]:
    """Batches of `size` rows of like length, to save padding, from a shuffled `order` of rows.

    Each `window` batches' worth of rows is sorted by `lengths`, cut into batches, and these keep
    the order in which their shortest rows stood. ceil(len(order) / size) batches; every row once.
    """
    batches = []
    for start in range(0, len(order), window * size):
        place = {row: n for n, row in enumerate(order[start:start + window * size])}
        ordered = sorted(place, key=lambda row: lengths[row])
        cut = [ordered[i:i + size] for i in range(0, len(ordered), size)]
        batches += sorted(cut, key=lambda batch: place[batch[0]])
    return batches


def right_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of ids as ``input_ids (B, L)`` and bool ``attention_mask (B, L)``, pads at the right.
    ValueError: no row, or an empty one."""
    return _pad(rows, pad_id, left=False)


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """As `right_pad`, pads at the left: for sampling, where all rows go on from the last column."""
    return _pad(rows, pad_id, left=True)
