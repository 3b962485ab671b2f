"""Data files: prompts, revisions, preferences and dialogues as JSON Lines, ours and other people's.

Errors name file, line and remedy. The splits of prompts by stage are here, too.
"""
from __future__ import annotations

import gzip
import json
import re
import reprlib
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from virtue import VirtueError
from virtue.dialogue import Dialogue, Messages, Turn, prompt_record, split
from virtue.ethics import LENSES, VIRTUES
from virtue.plumbing.runtime import main_rank

LONGEST = 64 << 20  # bytes of a line: a small .gz can hold one that fills the memory


def is_number(value: object) -> bool:
    """Whether a value from a JSON file is a number that arithmetic can take: no bool, NaN, infinity."""
    return type(value) in (int, float) and abs(value) < 1e18


def _need(ok: object, problem: str) -> None:
    if not ok:
        raise ValueError(problem)


def _need_text(value: object, what: str) -> None:
    _need(isinstance(value, str), f"{what} must be a text")
    _need(not re.search("[\ud800-\udfff]", value), f"{what} must have no half of a surrogate pair")


def _need_id(value: object) -> None:
    _need(isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value), '"id" must be 16 hex digits')


def check_messages(messages: object, name: str, last: str) -> None:
    """ValueError unless `messages` are turns of user and assistant, the last of role `last`, whose
    contents hold more than white space and can be UTF-8. One system message may come first; whether
    the chat template has a place for it shows when it is encoded."""
    _need(isinstance(messages, list) and messages, f'"{name}" must be a non-empty list of messages')
    first = messages[0]
    system = isinstance(first, dict) and first.get("role") == "system"
    for i, message in enumerate(messages):
        role, where = ("user", "assistant")[(i - system) % 2], f'"{name}" message {i + 1}'
        if i or not system:
            _need(isinstance(message, dict) and message.get("role") == role,
                  f"{where} must have the role {role!r} (user and assistant alternate)")
        content = message.get("content")
        _need(isinstance(content, str) and content.strip(), f"{where} must have a non-empty text as content")
        _need_text(content, where)
    _need(messages[-1]["role"] == last, f'"{name}" must end with a message of the {last}')


_LINES = 'python -c "import pandas; pandas.read_{read}({path!r}).to_json(\'rows.jsonl\', orient=\'records\', lines=True)"'


def _parquet(path: Path) -> Iterator[tuple[int, dict]]:
    """Rows of a parquet file, numbered from 1. VirtueError: damaged, or no library reads it here."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise VirtueError(f"{path}: a parquet file, for which pyarrow is needed: pip install pyarrow; or, where pandas "
                          f"is, {_LINES.format(read='parquet', path=str(path))}") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as e:
        raise VirtueError(f"{path}: a damaged parquet file ({str(e).splitlines()[0][:200]}): fetch it again") from None
    yield from enumerate(rows, 1)


def read_jsonl(path: str | Path, foreign: bool = False) -> Iterator[tuple[int, dict]]:
    """Yields (line number from 1, object) of a JSON Lines file, UTF-8, plain or gzip, or of parquet's
    rows; the file's first bytes tell which.

    Blank lines are passed over. VirtueError that names file, line and remedy: a file missing,
    unreadable or empty, a line that is not one JSON object in UTF-8. Of a `foreign` file a line that
    holds another JSON value (null, a number) is a bad row like others, yielded for who counts them;
    one that is no JSON at all is a damaged file.
    """
    path, number, found = Path(path), 0, False
    try:
        if path.is_fifo():
            raise OSError(0, "a pipe, which waits for its other end and can be read only once")
        with open(path, "rb") as file:
            magic = file.read(4)  # its bytes tell, not its name
        zipped = magic[:2] == b"\x1f\x8b"
        if magic == b"PAR1":
            yield from _parquet(path)
            return
        with (gzip.open if zipped else open)(path, "rb") as lines:
            for number, raw in enumerate(iter(lambda: lines.readline(LONGEST + 1), b""), 1):  # of bytes: only \n ends a line
                _need(len(raw) <= LONGEST, f"longer than {LONGEST >> 20} MiB")
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    _need(found or not text.lstrip().startswith("["), "an array, of which this "
                          f"command makes lines: {_LINES.format(read='json', path=str(path))}")
                    record, found = json.loads(text), True
                    _need(isinstance(record, dict) or foreign, "a bare value")
                    yield number, record
    except FileNotFoundError:
        hub = not path.suffix and len(path.parts) == 2  # owner/name
        problem = ": no such file: check the path, or run the stage that writes it" + (
            f'; a data set of the hub becomes a file by datasets: load_dataset("{path}", split="train").to_json("pairs.jsonl")' if hub else "")
    except UnicodeDecodeError:
        problem = f", line {number}: not UTF-8: convert the file to UTF-8"
    except (ValueError, RecursionError) as e:  # the second: brackets nested a thousand deep
        why = str(e) if "an array" in str(e) else str(e).split(":")[0]
        problem = (f", line {number}: not a JSON object ({why}): write one "
                   '{"field": value, ...} a line, or remove the line')
    except (EOFError, zlib.error, gzip.BadGzipFile):
        problem = f", after line {number}: damaged gzip: fetch the file again"
    except OSError as e:
        problem = f": cannot be read ({e.strerror}): give a readable file"
    else:
        problem = "" if found else ": empty: give a file with one JSON object a line"
    if problem:
        raise VirtueError(f"{path}{problem}")


# The markers of a transcript, from the strictest form to that in which the study prints its records.
_MARKERS = [re.compile(before + r"(Human|Assistant):(?=\s|$)") for before in (r"(?:^|\n\n)", r"(?:^|\n)", r"(?:^|\s)")]


def _is_transcript(text: str) -> bool:
    """Whether a text is a dialogue with markers, as `parse_hh` reads it."""
    return text.startswith("\n\nHuman:") or bool(re.match(r"\s*Human:\s.*?\sAssistant:(\s|$)", text, re.S))


def _no_markers(text: str, what: str) -> None:
    _need(not re.search(r"\r?\n\r?\n(Human|Assistant):(\s|$)", text),
          f"{what} holds the markers of a transcript, but does not begin as one")


def parse_hh(text: str) -> Messages:
    """A transcript as messages: hh-rlhf's, by its ``\\n\\nHuman:`` and ``\\n\\nAssistant:`` markers, or
    one whose markers stand at the beginnings of lines, or, as the study prints its records, behind
    any white space; those two must alternate, since an answer may quote such a word.

    The data holds empty turns, left out here, and two of one role in a row, joined by a blank
    line. ValueError: it does not start with a Human turn.
    """
    _need(_is_transcript(text), "a transcript must start with '\\n\\nHuman: '")
    strict, *loose = (marker.split(text if marker is _MARKERS[0] else text.strip()) for marker in _MARKERS)
    parts = strict
    if "Assistant" not in strict[1::2] and not text.startswith("\n\n"):
        parts = next(found for found in loose if "Assistant" in found[1::2])
        _need(all(a != b for a, b in zip(parts[1::2], parts[3::2])), "the markers of a transcript must alternate")
    _need(not parts[0].strip() and parts[1:2] == ["Human"],
          "a transcript must start with '\\n\\nHuman: '")
    messages: Messages = []
    for marker, content in zip(parts[1::2], parts[2::2], strict=True):
        role, content = {"Human": "user", "Assistant": "assistant"}[marker], content.strip()
        if content and messages and messages[-1]["role"] == role:
            content = f"{messages.pop()['content']}\n\n{content}"
        if content:
            messages.append({"role": role, "content": content})
    return messages


def _fields(record: dict) -> str:
    return "its fields are " + ", ".join(reprlib.repr(name)[1:-1] for name in [*record][:9])


_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


def _talk(value: object) -> object:
    """Messages of any spelling: {"from", "value"} as ShareGPT has them, or one message alone."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value
    return [{"role": _ROLES.get(m["from"], m["from"]), "content": m["value"]}
            if isinstance(m, dict) and isinstance(m.get("from"), str) and "value" in m else m for m in value]


def prompt_of(record: dict) -> Messages:
    """The prompt of a record: ``{"prompt": text or messages}``, or ``{"chosen"}``, hh-rlhf's transcript or
    TRL's messages, or ``{"messages"}``, ShareGPT's ``{"conversations"}`` or SHP's ``{"history"}``, read
    up to and with the last user turn. ValueError: says what is wrong."""
    names = ("prompt", "conversations", "chosen", "messages", "history")
    name = next((n for n in names if n in record), None)
    _need(name, 'has neither "prompt" (a text or messages) nor "chosen" (hh-rlhf), "messages", '
                f'"conversations" or "history"; {_fields(record)}')
    value = _talk(record[name])
    if isinstance(value, str) and (name == "chosen" or _is_transcript(value)):
        value = parse_hh(value)
        if value and value[-1]["role"] == "assistant":
            value.pop()
    elif isinstance(value, str):
        _no_markers(value, "the prompt")
        value = [{"role": "user", "content": value}]
    elif name != "prompt" and isinstance(value, list) and (name == "chosen" or value[-1:] and isinstance(value[-1], dict)
                                                           and value[-1].get("role") == "assistant"):
        check_messages(value, name, "assistant")
        value = value[:-1]
    check_messages(value, name, "user")
    return value


def _records(path: str | Path, convert: Callable[[dict], dict], remedy: str) -> Iterator[dict]:
    for number, record in read_jsonl(path):
        try:
            yield convert(record)
        except (ValueError, RecursionError) as e:
            raise VirtueError(f"{path}, line {number}: {e}: {remedy}") from None


class PassedOver(int):
    """How many rows were passed over; `reasons` maps each reason to (rows, line of the first)."""

    reasons: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, lines: dict[str, list[int]]) -> PassedOver:
        """From reason -> line numbers."""
        found = cls(sum(map(len, lines.values())))
        found.reasons = {reason: (len(of), of[0]) for reason, of in lines.items()}
        return found

    def __str__(self) -> str:
        return "; ".join(f"{n} from line {first} on: {why}" for why, (n, first) in self.reasons.items())


def _none_left(path: str | Path, what: str, passed: PassedOver) -> VirtueError:
    first = min(line for _, line in passed.reasons.values())
    return VirtueError(f"{path}, line {first}: no {what} of the file can be used: {passed}: correct the rows, "
                       "or give another file")


def read_prompts(path: str | Path, limit: int | None = None) -> list[dict]:
    """The file's first `limit` (None: all) different prompts, as records ``{"id", "prompt"}``. Rows
    without a sound prompt are passed over, and one line on stderr counts them by reason.
    VirtueError: unreadable, or no prompt is left."""
    found: dict[str, dict] = {}
    reasons: dict[str, list[int]] = {}
    for number, row in read_jsonl(path, foreign=True):
        try:
            _need(isinstance(row, dict), "is no JSON object")
            record = prompt_record(prompt_of(row))
            found.setdefault(record["id"], record)
        except (ValueError, RecursionError) as e:
            reasons.setdefault(str(e), []).append(number)
        if len(found) == limit:
            break
    passed = PassedOver.of(reasons)
    if not found:
        raise _none_left(path, "prompt", passed)
    if passed and main_rank():
        print(f"{path}: {int(passed)} rows passed over: {passed}", file=sys.stderr)
    return list(found.values())


def _stage_record(record: dict, fields: Sequence[str]) -> None:
    missing = [name for name in ("id", *fields, "truncated") if name not in record]
    _need(not missing, f"lacks {', '.join(missing)}")
    _need_id(record["id"])
    _need(isinstance(record["truncated"], bool), '"truncated" must be true or false')


def _revision(record: dict) -> dict:
    _stage_record(record, ("prompt", "initial", "critique", "revision", "virtue"))
    check_messages(record["prompt"], "prompt", "user")
    for name in ("initial", "critique", "revision"):
        _need_text(record[name], f'"{name}"')
    _need(record["revision"].strip(), '"revision" is empty')
    _need(record["virtue"] in VIRTUES,
          f"unknown virtue {reprlib.repr(record['virtue'])}, known are {', '.join(VIRTUES)}")
    return record


def _preference(record: dict, lens: str) -> dict:
    _stage_record(record, ("lens", "chosen", "rejected", "virtues", "label", "votes",
                           "position_flips"))
    _need(record["lens"] == lens, f"lens {reprlib.repr(record['lens'])} where {lens!r} is asked for, give the "
                                  "file of that lens")
    chosen, rejected, virtues = record["chosen"], record["rejected"], record["virtues"]
    check_messages(chosen, "chosen", "assistant")
    check_messages(rejected, "rejected", "assistant")
    shared = len(chosen) - 1 - 2 * LENSES.index(lens)  # the prompt's messages
    _need(shared > 0 and len(chosen) == len(rejected) and chosen[:shared] == rejected[:shared],
          f'"chosen" and "rejected" must be one prompt, each continued up to the {lens}')
    _need(isinstance(virtues, dict), '"virtues" must map each virtue to a probability')
    odd = ", ".join(reprlib.repr(name)[1:-1] for name in sorted(set(virtues) ^ set(VIRTUES))[:9])
    _need(not odd, f'"virtues" with unknown or missing {odd}, it must have {", ".join(VIRTUES)}')
    for name, value in [*virtues.items(), ("label", record["label"])]:
        _need(type(value) in (int, float) and 0 <= value <= 1,  # nan is not, True is no number
              f'"{name}" must be a probability, not {reprlib.repr(value)}')
    for name in ("votes", "position_flips"):
        if name == "position_flips" and record[name] is None:  # the judge was asked in one order
            continue
        _need(type(record[name]) is int and 0 <= record[name] <= len(VIRTUES),
              f'"{name}" must be a whole number from 0 to {len(VIRTUES)}')
    copy = record.get("chosen_copy")  # which of the two dialogues in dialogues.jsonl
    _need(copy is None or type(copy) is int and copy in (0, 1), '"chosen_copy" must be 0 or 1')
    return record


def read_revisions(path: str | Path) -> list[dict]:
    """Records {id, prompt (messages), initial, critique, revision, virtue, truncated (bool)}.
    VirtueError, here and in all readers of this file: unreadable, or a bad record, named by file and line."""
    return list(_records(path, _revision, "correct it, or run run_data.py revisions again"))


def read_preferences(path: str | Path, lens: str) -> list[dict]:
    """Records {id, lens, chosen, rejected, virtues, label, votes, position_flips, truncated}.

    `chosen` and `rejected` share their prompt and end with the lens's turn; `virtues` maps each
    virtue to P(chosen better); `label` is a probability too, votes and flips count virtues
    (position_flips None: not measured).
    """
    remedy = "correct it, or run run_data.py preferences again"
    return list(_records(path, lambda record: _preference(record, lens), remedy))


def _sides(record: dict) -> dict:
    """A pair of any form as {"chosen", "rejected"}, and "prompt" where it has one: TRL's and hh-rlhf's as
    they are; ShareGPT's conversations, PKU's two responses, the HHH evaluation's two forms, Stanford's
    SHP. ValueError: of no such form."""
    def ask(*names: str) -> dict:
        return next(({"prompt": record[name]} for name in names if name in record), {})

    if "chosen" in record or "rejected" in record:
        _need("chosen" in record and "rejected" in record, 'lacks "chosen" or "rejected"')
        return {"chosen": record["chosen"], "rejected": record["rejected"], **ask("prompt", "conversations")}
    if {"response_0", "response_1", "better_response_id"} <= record.keys():
        better = record["better_response_id"]
        _need(better in (0, 1), '"better_response_id" must be 0 or 1')
        better = int(better)  # 1.0 where pandas met a gap in the column, or true
        return {"chosen": record[f"response_{better}"], "rejected": record[f"response_{1 - better}"], **ask("prompt")}
    if {"corrects", "incorrects"} <= record.keys():
        sides = record["corrects"], record["incorrects"]
        _need(all(isinstance(side, list) and side for side in sides), '"corrects" and "incorrects" must be lists')
        return {"chosen": sides[0][0], "rejected": sides[1][0], **ask("prompt")}
    if {"history", "human_ref_A", "human_ref_B", "labels"} <= record.keys():
        _need(record["labels"] in (0, 1), '"labels" must be 0 or 1')
        sides, better = (record["human_ref_B"], record["human_ref_A"]), int(record["labels"])
        return {"chosen": sides[better], "rejected": sides[1 - better], **ask("history")}
    if isinstance(targets := record.get("targets"), dict) and {"choices", "labels"} <= targets.keys():
        ranked = sorted(zip(targets["labels"], targets["choices"]), key=lambda pair: -pair[0])
        _need(len(ranked) == 2 and ranked[0][0] > ranked[1][0], '"targets" must tell one of two choices')
        return {"chosen": ranked[0][1], "rejected": ranked[1][1], **ask("input")}
    raise ValueError('lacks "chosen" or "rejected", and has no other form that is read; '
                     + _fields(record))


def _side(value: object, prompt: Messages | None) -> Messages:
    """One side of a pair as a whole conversation; `prompt` is what stands before it, if the row says."""
    value = _talk("" if value is None else value)  # a null answer is an empty one
    if isinstance(value, str):
        if prompt is None or _is_transcript(value):
            value = parse_hh(value)
        else:
            _no_markers(value, "an answer")
            value = [{"role": "assistant", "content": value.strip()}]
    _need(isinstance(value, list), "a side must be a text or messages")
    roles = [m.get("role") if isinstance(m, dict) else None for m in value]
    if prompt is None or roles[:1] == ["assistant"]:
        return [*(prompt or []), *value]
    begins = len(value) > len(prompt) and all(  # a whole conversation, which repeats the prompt
        role == p["role"] and isinstance(m.get("content"), str) and m["content"].strip() == p["content"].strip()
        for role, p, m in zip(roles, prompt, value))
    _need(begins, "a side is a conversation that does not begin with the row's prompt")
    return value


def read_pairs(path: str | Path, limit: int | None = None, lens: str = "action") -> tuple[list[dict], PassedOver]:
    """Any preference file as records {"chosen", "rejected": messages, "lens"}; and what was passed over.

    Takes this project's own files, hh-rlhf's transcripts, the study's, and rows with or without a
    prompt beside the sides (see `_sides`), each a text, messages or a whole conversation. Where a row
    names no lens, `lens` counts. A row that is unfit, identical on both sides, or does not end with
    the assistant's text is passed over and counted by its reason. VirtueError: no pair is left, or a
    file of this project's own has a bad row.
    """
    found: list[dict] = []
    reasons: dict[str, list[int]] = {}
    for number, record in read_jsonl(path, foreign=True):
        try:
            _need(isinstance(record, dict), "is no JSON object")
            own = record.get("lens", lens)
            _need(own in LENSES, f"unknown lens {reprlib.repr(own)}, known are {', '.join(LENSES)}")
            row = _sides(record)
            text = isinstance(row["chosen"], str)
            _need("prompt" in row or not text or _is_transcript(row["chosen"]),
                  'has no "prompt", and "chosen" is no transcript, which starts with "Human:"; '
                  + _fields(record))
            prompt = prompt_of({"prompt": row["prompt"]}) if "prompt" in row else None
            pair = {side: _side(row[side], prompt) for side in ("chosen", "rejected")}
        except (ValueError, TypeError, RecursionError) as e:
            if isinstance(record, dict) and "virtues" in record:  # a file of ours
                raise VirtueError(f"{path}, line {number}: {e}: correct or remove it") from None
            reasons.setdefault(str(e), []).append(number)
            continue
        try:
            for name in ("chosen", "rejected"):
                check_messages(pair[name], name, "assistant")
                if "virtues" not in record:  # a model of ours may have said so
                    _no_markers(pair[name][-1]["content"], "an answer")
            _need([m["content"].strip() for m in pair["chosen"]]
                  != [m["content"].strip() for m in pair["rejected"]], "identical")
            found.append({**pair, "lens": own})
        except ValueError as e:
            reasons.setdefault(str(e), []).append(number)
        if len(found) == limit:
            break
    passed = PassedOver.of(reasons)
    if not found:
        raise _none_left(path, "pair", passed)
    return found, passed


def load_prompts(name: str, part: str, limit: int | None = None) -> list[dict]:
    """The first `limit` prompts of a split: of the toy world ("toy") or of a file. VirtueError: as `read_prompts`; none falls into the split."""
    if name == "toy":
        from virtue.toy.grammar import split_prompts
        found = split_prompts(part)
    else:
        found = [record for record in read_prompts(name) if split(record["id"]) == part]
    if not found:
        raise VirtueError(f"{name}: no prompt falls into the split {part}: give more prompts")
    return found[:limit]


def read_dialogues(path: str | Path) -> list[Dialogue]:
    """Dialogues as run_data.py samples them: {id, prompt, ids, turns [[start, end, truncated]]}. VirtueError: see `read_revisions`."""
    def convert(record: dict) -> dict:
        missing = [name for name in ("id", "prompt", "ids", "turns") if name not in record]
        _need(not missing, f"lacks {', '.join(missing)}")
        check_messages(record["prompt"], "prompt", "user")
        _need_id(record["id"])
        ids, turns = record["ids"], record["turns"]
        _need(isinstance(ids, list) and all(type(i) is int and 0 <= i < 1 << 31 for i in ids), '"ids" must be token ids')
        _need(isinstance(turns, list) and len(turns) == len(LENSES) and all(
            isinstance(t, list) and len(t) == 3 and all(type(x) is int for x in t[:2]) and type(t[2]) is bool
            and 0 < t[0] < t[1] <= len(ids) - t[2] for t in turns) and all(a[1] <= b[0] for a, b in zip(turns, turns[1:])),
            f'"turns" must be {len(LENSES)} spans [start, end, truncated] within the ids, one after the other')
        return record
    return [Dialogue(r["id"], r["prompt"], r["ids"], tuple(Turn(*t) for t in r["turns"]))
            for r in _records(path, convert, "run run_data.py preferences again")]


def read_metrics(path: str | Path) -> list[dict]:
    """Lines of a MetricsLog that holds numbers only, as a training's metrics.jsonl: numbers, or None for nan. VirtueError: see `read_revisions`."""
    def convert(record: dict) -> dict:
        for name, value in record.items():
            _need(value is None or is_number(value), f"{reprlib.repr(name)} must be a number or null, not {reprlib.repr(value)}")
        return record
    return list(_records(path, convert, "correct or remove it"))


def check_ids(dialogues: Sequence[Dialogue], vocab_size: int, folder: Path) -> None:
    """VirtueError where a token id lies beyond the model's vocabulary."""
    for d in dialogues:
        if max(d.ids) >= vocab_size:
            raise VirtueError(f"{folder / 'dialogues.jsonl'}: record {d.id} has the token id {max(d.ids)}, but the model knows {vocab_size}: "
                              "give the --model that sampled it, or sample again")


def read_rollouts(path: str | Path) -> list[dict]:
    """Lines of run_ppo.py's rollouts.jsonl: {iteration, id, prompt (text), kl, scores (one a lens), turns {lens: text}}. VirtueError: see `read_revisions`."""
    def convert(record: dict) -> dict:
        scores, turns = record.get("scores"), record.get("turns")
        _need(type(record.get("iteration")) is int and is_number(record.get("kl")), '"iteration" and "kl" must be numbers')
        _need(isinstance(scores, list) and len(scores) == len(LENSES) and all(map(is_number, scores)), f'"scores" must be {len(LENSES)} numbers')
        _need(isinstance(turns, dict) and set(turns) <= set(LENSES), '"turns" must map lenses to texts')
        for text in (record.get("prompt"), *turns.values()):
            _need_text(text, '"prompt" and each of "turns"')
        return record
    return list(_records(path, convert, "correct or remove it"))
