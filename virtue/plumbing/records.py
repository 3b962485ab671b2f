"""Data files: prompts, revisions, preferences and dialogues as JSON Lines, ours and other people's.

Errors name file, line and remedy. The splits of prompts by stage are here, too.
"""
from __future__ import annotations

import csv
import functools
import gzip
import json
import re
import reprlib
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from virtue import VirtueError
from virtue.dialogue import Dialogue, Messages, Turn, prompt_record, split
from virtue.ethics import LENSES
from virtue.judge import transcript
from virtue.plumbing.runtime import main_rank

SITUATIONS = Path(__file__).parents[1] / "real" / "situations.txt"  # one a line
LONGEST = 64 << 20  # bytes of a line: a small .gz can hold one that fills the memory


def is_number(value: object) -> bool:
    """Whether a value from a JSON file is a number that arithmetic can take, as no bool, NaN or
    infinity is."""
    return type(value) in (int, float) and abs(value) < 1e18


def _need(ok: object, problem: str) -> None:
    if not ok:
        raise ValueError(problem)


def _text(value: object, where: str) -> None:
    _need(isinstance(value, str), f"{where} must be a text")
    _need(not re.search("[\ud800-\udfff]", value), f"{where} must have no half of a surrogate pair")


def check_messages(messages: object, where: str, last: str) -> None:
    """Raises a ValueError that names `where` unless `messages` are turns of user and assistant, the
    last of role `last`, whose contents hold more than white space and can be UTF-8. One system
    message may come first; whether the chat template has a place for it shows when it is encoded.
    """
    _need(isinstance(messages, list) and messages, f"{where} must be a non-empty list of messages")
    first = messages[0]
    system = isinstance(first, dict) and first.get("role") == "system"
    for i, message in enumerate(messages):
        role, place = ("user", "assistant")[(i - system) % 2], f"{where} message {i + 1}"
        if i or not system:
            _need(isinstance(message, dict) and message.get("role") == role,
                  f"{place} must have the role {role!r} (user and assistant alternate)")
        content = message.get("content")
        _need(isinstance(content, str) and content.strip(),
              f"{place} must have a non-empty text as content")
        _text(content, place)
    _need(messages[-1]["role"] == last, f"{where} must end with a message of the {last}")


_LINES = ("python -c \"import pandas; pandas.read_{read}({path!r}).to_json('rows.jsonl', "
          "orient='records', lines=True)\"")


def _parquet(path: Path) -> Iterator[tuple[int, dict]]:
    """Yields the rows of a parquet file, numbered from 1. Raises VirtueError if the file is
    damaged, or if no library reads it here."""
    try:
        import pyarrow.parquet
    except ImportError:
        command = _LINES.format(read="parquet", path=str(path))
        raise VirtueError(f"{path}: a parquet file, for which pyarrow is needed: pip install "
                          f"pyarrow; or, where pandas is, {command}") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as e:
        raise VirtueError(f"{path}: a damaged parquet file ({str(e).splitlines()[0][:200]}): "
                          "fetch it again") from None
    yield from enumerate(rows, 1)


def _csv(path: Path) -> Iterator[tuple[int, dict]]:
    """Yields the rows of a CSV file whose first line names its columns, by the line each ends on.
    Raises VirtueError if it is damaged."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for row in rows:
                yield rows.line_num, {str(name): value for name, value in row.items()}
        except (csv.Error, UnicodeDecodeError) as e:
            raise VirtueError(f"{path}, after line {rows.line_num}: not CSV in UTF-8 ({e}): "
                              "convert the file") from None


def read_jsonl(path: str | Path, foreign: bool = False) -> Iterator[tuple[int, dict]]:
    """Yields (line number from 1, object) of a JSON Lines file, UTF-8, plain or gzip, or of
    parquet's rows, which the file's first bytes tell; or the rows of a .csv.

    Blank lines are passed over. Raises a VirtueError that names file, line and remedy if the file
    is missing, unreadable or empty, or if a line is not one JSON object in UTF-8. Of a `foreign`
    file a line that holds another JSON value (null, a number) is a bad row like others, yielded for
    who counts them; one that is no JSON at all is a damaged file.
    """
    path, number, empty = Path(path), 0, True
    try:
        if path.is_fifo():
            raise OSError(0, "a pipe, which waits for its other end and can be read only once")
        with open(path, "rb") as file:
            magic = file.read(4)  # its bytes tell, not its name
        if magic == b"PAR1":
            yield from _parquet(path)
            return
        if path.suffix == ".csv":
            yield from _csv(path)
            return
        with (gzip.open if magic[:2] == b"\x1f\x8b" else open)(path, "rb") as file:
            lines = iter(lambda: file.readline(LONGEST + 1), b"")  # bytes: only \n ends a line
            for number, raw in enumerate(lines, 1):
                _need(len(raw) <= LONGEST, f"longer than {LONGEST >> 20} MiB")
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    _need(not empty or text.lstrip()[0] != "[", "an array, of which this command "
                          f"makes lines: {_LINES.format(read='json', path=str(path))}")
                    record, empty = json.loads(text), False
                    _need(isinstance(record, dict) or foreign, "a bare value")
                    yield number, record
    except FileNotFoundError:
        problem = ": no such file: check the path, or run the stage that writes it"
        if not path.suffix and len(path.parts) == 2:  # owner/name
            problem += ("; a data set of the hub becomes a file by datasets: "
                        f'load_dataset("{path}", split="train").to_json("pairs.jsonl")')
    except UnicodeDecodeError:
        problem = f", line {number}: not UTF-8: convert the file to UTF-8"
    except (ValueError, RecursionError) as e:  # the second: brackets nested a thousand deep
        reason = str(e) if "an array" in str(e) else str(e).split(":")[0]
        problem = (f", line {number}: not a JSON object ({reason}): write one "
                   '{"field": value, ...} a line, or remove the line')
    except (EOFError, zlib.error, gzip.BadGzipFile):
        problem = f", after line {number}: damaged gzip: fetch the file again"
    except OSError as e:
        problem = f": cannot be read ({e.strerror}): give a readable file"
    else:
        if not empty:
            return
        problem = ": empty: give a file with one JSON object a line"
    raise VirtueError(f"{path}{problem}")


# ---- other people's rows


_SIDES = ("chosen", "rejected")
# The markers of a transcript, from the strictest form to that in which the study prints them.
_MARKERS = [re.compile(before + r"(Human|Assistant):(?=\s|$)")
            for before in (r"(?:^|\n\n)", r"(?:^|\n)", r"(?:^|\s)")]


def _is_transcript(text: str) -> bool:
    """Whether a text is a dialogue with markers, as `parse_hh` reads it."""
    return text.startswith("\n\nHuman:") or bool(
        re.match(r"\s*Human:\s.*?\sAssistant:(\s|$)", text, re.S))


def _no_markers(text: str, what: str) -> None:
    _need(not re.search(r"\r?\n\r?\n(Human|Assistant):(\s|$)", text),
          f"{what} holds the markers of a transcript, but does not begin as one")


def parse_hh(text: str) -> Messages:
    """Reads a transcript as messages: hh-rlhf's, by its ``\\n\\nHuman:`` and ``\\n\\nAssistant:``
    markers, or one whose markers stand at the beginnings of lines, or, as the study prints its
    records, behind any white space; those two must alternate, since an answer may quote such a
    word.

    The data holds empty turns, left out here, and two of one role in a row, joined by a blank
    line. Raises ValueError if the transcript does not start with a Human turn.
    """
    _need(_is_transcript(text), "a transcript must start with '\\n\\nHuman: '")
    parts = _MARKERS[0].split(text)
    if "Assistant" not in parts[1::2] and not text.startswith("\n\n"):
        splits = (marker.split(text.strip()) for marker in _MARKERS[1:])
        parts = next(parts for parts in splits if "Assistant" in parts[1::2])
        _need(all(a != b for a, b in zip(parts[1::2], parts[3::2])),
              "the markers of a transcript must alternate")
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


_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


def _talk(value: object) -> object:
    """Messages of any spelling: {"from", "value"} as ShareGPT has them, or one message alone."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value
    return [{"role": _ROLES.get(m["from"], m["from"]), "content": m["value"]}
            if isinstance(m, dict) and isinstance(m.get("from"), str) and "value" in m else m
            for m in value]


def prompt_of(record: dict) -> Messages:
    """The prompt of a record: ``{"prompt": text or messages}``, or ``{"chosen"}``, hh-rlhf's
    transcript or TRL's messages, or ``{"messages"}``, ShareGPT's ``{"conversations"}`` or SHP's
    ``{"history"}``, read up to and with the last user turn. Raises a ValueError that says what is
    wrong."""
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
    elif name != "prompt" and isinstance(value, list):
        answered = value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant"
        if name == "chosen" or answered:
            check_messages(value, f'"{name}"', "assistant")
            value = value[:-1]
    check_messages(value, f'"{name}"', "user")
    return value


class PassedOver(int):
    """How many rows were passed over; `reasons` maps each reason to (rows, line of the first)."""

    reasons: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, lines: dict[str, list[int]]) -> PassedOver:
        """Counts rows whose line numbers are listed by reason."""
        passed = cls(sum(map(len, lines.values())))
        passed.reasons = {reason: (len(numbers), numbers[0]) for reason, numbers in lines.items()}
        return passed

    def __str__(self) -> str:
        return "; ".join(f"{rows} from line {first} on: {reason}"
                         for reason, (rows, first) in self.reasons.items())


def _collect(path: str | Path, what: str, limit: int | None,
             convert: Callable[[int, dict], tuple[object, dict]]) -> tuple[list[dict], PassedOver]:
    """The first `limit` rows of different keys, where convert(line, row) is (key, row), and what
    was passed over, which are the rows of which it raises ValueError. Raises VirtueError if the
    file is unreadable, or if no row is left."""
    rows: dict[object, dict] = {}
    reasons: dict[str, list[int]] = {}
    for number, record in read_jsonl(path, foreign=True):
        try:
            _need(isinstance(record, dict), "is no JSON object")
            key, row = convert(number, record)
            rows.setdefault(key, row)
        except (ValueError, TypeError, RecursionError) as e:
            reasons.setdefault(str(e), []).append(number)
        if len(rows) == limit:
            break
    passed = PassedOver.of(reasons)
    if not rows and not reasons:
        raise VirtueError(f"{path}: has no rows: give a file with at least one {what}")
    if not rows:
        first = min(line for _, line in passed.reasons.values())
        raise VirtueError(f"{path}, line {first}: no {what} of the file can be used: {passed}: "
                          "correct the rows, or give another file")
    return list(rows.values()), passed


def read_prompts(path: str | Path, limit: int | None = None) -> list[dict]:
    """Reads the file's first `limit` different prompts (None: all) as records ``{"id", "prompt"}``.
    Rows without a sound prompt are passed over, and one line on stderr counts them by reason.
    Raises VirtueError if the file is unreadable, or if no prompt is left."""
    def convert(_: int, row: dict) -> tuple[str, dict]:
        record = prompt_record(prompt_of(row))
        return record["id"], record

    records, passed = _collect(path, "prompt", limit, convert)
    if passed and main_rank():
        print(f"{path}: {int(passed)} rows passed over: {passed}", file=sys.stderr)
    return records


def with_system(record: dict, system: str | None) -> dict:
    """The prompt record with a system message, if one is given and it has none; its id stays."""
    if not system or record["prompt"][0]["role"] == "system":
        return record
    return record | {"prompt": [{"role": "system", "content": system}, *record["prompt"]]}


def load_prompts(name: str, part: str, limit: int | None = None,
                 system: str | None = None) -> list[dict]:
    """The first `limit` prompts of a split: of the toy world ("toy"), of this project's own in
    English ("situations") or of a file; see `with_system`. Raises
    VirtueError as `read_prompts` does, and if no prompt falls into the split."""
    if name == "toy":
        from virtue.toy.grammar import split_prompts
        prompts = split_prompts(part)
    else:
        lines = SITUATIONS.read_text(encoding="utf-8").splitlines() if name == "situations" else ()
        found = ([prompt_record([{"role": "user", "content": line}]) for line in lines]
                 or read_prompts(name))
        prompts = [record for record in found if split(record["id"]) == part]
    if not prompts:
        raise VirtueError(f"{name}: no prompt falls into the split {part}: give more prompts")
    return [with_system(record, system) for record in prompts[:limit]]


def _sides(record: dict) -> dict:
    """A pair of any form as {"chosen", "rejected"}, and "prompt" where it has one: TRL's and
    hh-rlhf's as they are; ShareGPT's conversations, PKU's two responses, the HHH evaluation's two
    forms, Stanford's SHP. Raises ValueError for a record of no such form."""
    def pair(chosen: object, rejected: object, *asking: str) -> dict:
        prompt = next(({"prompt": record[name]} for name in asking if name in record), {})
        return {"chosen": chosen, "rejected": rejected, **prompt}

    def better(name: str) -> int:  # 1.0 where pandas met a gap in the column, or true
        _need(record[name] in (0, 1), f'"{name}" must be 0 or 1')
        return int(record[name])

    fields, targets = record.keys(), record.get("targets")
    if "chosen" in record or "rejected" in record:
        _need("chosen" in record and "rejected" in record, 'lacks "chosen" or "rejected"')
        return pair(record["chosen"], record["rejected"], "prompt", "conversations")
    if {"response_0", "response_1", "better_response_id"} <= fields:
        i = better("better_response_id")
        return pair(record[f"response_{i}"], record[f"response_{1 - i}"], "prompt")
    if {"corrects", "incorrects"} <= fields:
        sides = record["corrects"], record["incorrects"]
        _need(all(isinstance(side, list) and side for side in sides),
              '"corrects" and "incorrects" must be lists')
        return pair(sides[0][0], sides[1][0], "prompt")
    if {"history", "human_ref_A", "human_ref_B", "labels"} <= fields:
        sides = [record["human_ref_B"], record["human_ref_A"]]
        i = better("labels")
        return pair(sides[i], sides[1 - i], "history")
    if isinstance(targets, dict) and {"choices", "labels"} <= targets.keys():
        ranked = sorted(zip(targets["labels"], targets["choices"]), key=lambda pair: -pair[0])
        _need(len(ranked) == 2 and ranked[0][0] > ranked[1][0],
              '"targets" must tell one of two choices')
        return pair(ranked[0][1], ranked[1][1], "input")
    raise ValueError('lacks "chosen" or "rejected", and has no other form that is read; '
                     + _fields(record))


def _side(value: object, prompt: Messages | None) -> Messages:
    """One side of a pair as a whole conversation; `prompt` is what stands before it, if the row
    says."""
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
    repeats = len(value) > len(prompt) and all(  # a whole conversation
        role == asked["role"] and isinstance(m.get("content"), str)
        and m["content"].strip() == asked["content"].strip()
        for role, asked, m in zip(roles, prompt, value))
    _need(repeats, "a side is a conversation that does not begin with the row's prompt")
    return value


def _pair(record: dict, lens: str) -> dict:
    """A row as {"chosen", "rejected": lists of what should be messages, "lens"}. Raises ValueError
    or TypeError for a row of no form that is read."""
    lens = record.get("lens", lens)
    _known("lens", lens, LENSES)
    row = _sides(record)
    _need("prompt" in row or not isinstance(row["chosen"], str) or _is_transcript(row["chosen"]),
          'has no "prompt", and "chosen" is no transcript, which starts with "Human:"; '
          + _fields(record))
    prompt = prompt_of({"prompt": row["prompt"]}) if "prompt" in row else None
    return {**{side: _side(row[side], prompt) for side in _SIDES}, "lens": lens}


def _groups(row: dict) -> list[str]:
    """What the row says that it belongs to: "group", or VirtueBench's "virtue" and "variant"."""
    found = row.get("group", [row[name] for name in ("virtue", "variant") if row.get(name)])
    found = [found] if isinstance(found, str) else found
    _need(isinstance(found, list) and all(isinstance(name, str) for name in found),
          '"group" must be a text or a list of texts')
    _need("all" not in found, 'no "group" may be called all, which are all items')
    return found


def read_items(path: str | Path, limit: int | None = None) -> tuple[list[dict], PassedOver]:
    """Reads questions with two options as records {"line", "text", "options": (right one, wrong
    one), "groups"}, and counts what it passes over: {"text", "options": [2 texts], "right": 0 or
    1}, "scenario_a" (right) and "scenario_b" as VirtueBench has them, or any pair of `read_pairs`,
    whose chosen side is right. A row may name its "group". Raises VirtueError as `read_prompts`
    does."""
    def convert(number: int, row: dict) -> tuple[int, dict]:
        text, options = row.get("text", ""), row.get("options")
        if {"scenario_a", "scenario_b"} <= row.keys():
            options = [row["scenario_a"], row["scenario_b"]]
        elif options is not None:
            _need(row.get("right") in (0, 1), '"right" must be 0 or 1')
            _need(isinstance(options, list) and len(options) == 2, '"options" must be two texts')
            options = options[::-1] if row["right"] else options
        else:
            pair = _pair(row, "action")
            for side in _SIDES:
                check_messages(pair[side], f'"{side}"', "assistant")
            before = [pair[side][:-1] for side in _SIDES]
            _need(before[0] == before[1], "the sides differ before their last answers")
            text, options = transcript(before[0]), [pair[side][-1]["content"] for side in _SIDES]
        for value in (text, *options):
            _text(value, "a text")
        options = tuple(option.strip() for option in options)
        _need(all(options) and options[0] != options[1], "an option is empty, or both are one")
        return number, {"line": number, "text": text.strip(), "options": options,
                        "groups": _groups(row)}

    return _collect(path, "item", limit, convert)


_ANSWERS = ("answer", "response", "completion", "output")


def read_answers(path: str | Path, limit: int | None = None) -> tuple[list[dict], PassedOver]:
    """Reads answers of anybody as records {"line", "messages"}, conversations that end with the
    assistant, and counts what it passes over: a prompt (see `prompt_of`) beside an "answer",
    "response", "completion" or "output", or a whole conversation as "messages", "conversations" or
    a transcript in "text". Raises VirtueError as `read_prompts` does."""
    def convert(number: int, row: dict) -> tuple[int, dict]:
        answer = next((name for name in _ANSWERS if "prompt" in row and name in row), None)
        whole = next((name for name in ("messages", "conversations", "text") if name in row), None)
        _need(answer or whole, 'has neither "prompt" and "answer" nor "messages"; ' + _fields(row))
        messages = (_side(row[answer], prompt_of({"prompt": row["prompt"]})) if answer
                    else _side(row[whole], None))
        check_messages(messages, f'"{answer or whole}"', "assistant")
        return number, {"line": number, "messages": messages}

    return _collect(path, "answer", limit, convert)


def read_pairs(path: str | Path, limit: int | None = None,
               lens: str = "action") -> tuple[list[dict], PassedOver]:
    """Reads any preference file as records {"chosen", "rejected": messages, "lens"}, and counts
    what it passes over.

    Takes this project's own files, hh-rlhf's transcripts, the study's, and rows with or without a
    prompt beside the sides (see `_sides`), each a text, messages or a whole conversation. Where a
    row names no lens, `lens` counts. A row that is unfit, identical on both sides, or does not end
    with the assistant's text is passed over and counted by its reason. Raises VirtueError if no
    pair is left, or if a file of this project's own has a bad row.
    """
    def convert(number: int, record: dict) -> tuple[int, dict]:
        own = "virtues" in record
        try:
            pair = _pair(record, lens)
        except (ValueError, TypeError, RecursionError) as e:
            if own:
                raise VirtueError(f"{path}, line {number}: {e}: correct or remove it") from None
            raise
        for side in _SIDES:
            check_messages(pair[side], f'"{side}"', "assistant")
            if not own:  # a model of ours may have said so
                _no_markers(pair[side][-1]["content"], "an answer")
        chosen, rejected = ([m["content"].strip() for m in pair[side]] for side in _SIDES)
        _need(chosen != rejected, "identical")
        return number, pair

    return _collect(path, "pair", limit, convert)


# ---- this project's own records: for each field a check(value, where), which raises ValueError


def _check(test: Callable[[object], object], words: str) -> Callable[[object, str], None]:
    return lambda value, where: _need(test(value), f"{where} {words}, not {reprlib.repr(value)}")


def _known(what: str, value: object, names: Sequence[str]) -> None:
    _need(value in names, f"unknown {what} {reprlib.repr(value)}, known are {', '.join(names)}")


_any = _check(lambda v: True, "")
_flag = _check(lambda v: isinstance(v, bool), "must be true or false")
_probability = _check(lambda v: is_number(v) and 0 <= v <= 1, "must be a probability")
_votes = _check(lambda v: type(v) is int and v >= 0, "must be a whole number of at least 0")
_dialogue = functools.partial(check_messages, last="assistant")
_ITEM = {"id": _check(lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{16}", v),
                      "must be 16 hex digits")}
_ASKED = {**_ITEM, "prompt": functools.partial(check_messages, last="user")}


def _records(path: str | Path, fields: Mapping[str, Callable], remedy: str,
             check: Callable[[dict], None] = lambda record: None) -> list[dict]:
    """Reads a file's records. Raises VirtueError unless each of the `fields` is there and passes
    its check, and the record as a whole passes `check`."""
    records = []
    for number, record in read_jsonl(path):
        try:
            missing = [name for name in fields if name not in record]
            _need(not missing, f"lacks {', '.join(missing)}")
            for name, sound in fields.items():
                sound(record[name], f'"{name}"')
            check(record)
        except (ValueError, RecursionError) as e:
            raise VirtueError(f"{path}, line {number}: {e}: {remedy}") from None
        records.append(record)
    return records


def read_revisions(path: str | Path) -> list[dict]:
    """Reads records {id, prompt (messages), initial, critique, revision, virtue, truncated (bool)}.

    Like all readers of this file it raises VirtueError if the file is unreadable, or holds a bad
    record, which is named by file and line.
    """
    fields = {**_ASKED, "initial": _text, "critique": _text, "revision": _text,
              "virtue": _text, "truncated": _flag}
    return _records(path, fields, "correct it, or run run_data.py revisions again",
                    lambda record: _need(record["revision"].strip(), '"revision" is empty'))


def _virtues(value: object, where: str) -> None:
    _need(isinstance(value, dict) and value, f"{where} must map each virtue to a probability")
    for name, probability in value.items():
        _probability(probability, f'"{name}"')


def read_preferences(path: str | Path, lens: str) -> list[dict]:
    """Reads records {id, lens, chosen, rejected, virtues, label, votes, position_flips, truncated}.

    `chosen` and `rejected` share their prompt and end with the lens's turn; `virtues` maps each
    virtue to P(chosen better); `label` is a probability too, votes and flips count virtues.
    position_flips is None where the judge was asked in one order.
    """
    def of_lens(value: object, where: str) -> None:
        _need(value == lens, f"lens {reprlib.repr(value)} where {lens!r} is asked for, give the "
                             "file of that lens")

    def check(record: dict) -> None:
        chosen, rejected = record["chosen"], record["rejected"]
        shared = len(chosen) - 1 - 2 * LENSES.index(lens)  # the prompt's messages
        _need(shared > 0 and len(chosen) == len(rejected) and chosen[:shared] == rejected[:shared],
              f'"chosen" and "rejected" must be one prompt, each continued up to the {lens}')
        most = len(record["virtues"])
        _need(record["votes"] <= most and (record["position_flips"] or 0) <= most,
              f'"votes" and "position_flips" must be at most {most}, the number of "virtues"')
        copy = record.get("chosen_copy")  # which of the two dialogues in dialogues.jsonl
        _need(copy is None or type(copy) is int and copy in (0, 1), '"chosen_copy" must be 0 or 1')

    fields = {**_ITEM, "lens": of_lens, "chosen": _dialogue, "rejected": _dialogue,
              "virtues": _virtues, "label": _probability, "votes": _votes, "truncated": _flag,
              "position_flips": lambda value, where: value is None or _votes(value, where)}
    return _records(path, fields, "correct it, or run run_data.py preferences again", check)


def read_dialogues(path: str | Path) -> list[Dialogue]:
    """Reads dialogues as run_data.py samples them: {id, prompt, ids, turns [[start, end,
    truncated]]}."""
    def is_id(value: object) -> bool:
        return type(value) is int and 0 <= value < 1 << 31

    def is_span(value: object, length: int) -> bool:
        if not isinstance(value, list) or [*map(type, value)] != [int, int, bool]:
            return False
        start, end, truncated = value
        return 0 < start < end <= length - truncated

    def check(record: dict) -> None:
        ids, turns = record["ids"], record["turns"]
        _need(isinstance(ids, list) and all(map(is_id, ids)), '"ids" must be token ids')
        spans = (isinstance(turns, list) and len(turns) == len(LENSES)
                 and all(is_span(turn, len(ids)) for turn in turns))
        _need(spans and all(first[1] <= then[0] for first, then in zip(turns, turns[1:])),
              f'"turns" must be {len(LENSES)} spans [start, end, truncated] within the ids, '
              "in order")

    fields = {**_ASKED, "ids": _any, "turns": _any}
    return [Dialogue(r["id"], r["prompt"], r["ids"], tuple(Turn(*t) for t in r["turns"]))
            for r in _records(path, fields, "run run_data.py preferences again", check)]


def check_ids(dialogues: Sequence[Dialogue], vocab_size: int, folder: Path) -> None:
    """Raises VirtueError where a token id lies beyond the model's vocabulary."""
    for d in dialogues:
        if max(d.ids) >= vocab_size:
            raise VirtueError(f"{folder / 'dialogues.jsonl'}: record {d.id} has the token id "
                              f"{max(d.ids)}, but the model knows {vocab_size}: give the --model "
                              "that sampled it, or sample again")


def read_metrics(path: str | Path) -> list[dict]:
    """Reads the lines of a MetricsLog that holds numbers only, as a training's metrics.jsonl does:
    each value is a number, or None for nan."""
    def check(record: dict) -> None:
        for name, value in record.items():
            _need(value is None or is_number(value), f"{reprlib.repr(name)} must be a number or "
                                                     f"null, not {reprlib.repr(value)}")
    return _records(path, {}, "correct or remove it", check)


def read_rollouts(path: str | Path) -> list[dict]:
    """Reads the lines of run_ppo.py's rollouts.jsonl: {iteration, id, prompt (text), kl, scores
    (one a lens), turns {lens: text}}."""
    def check(record: dict) -> None:
        scores, turns = record["scores"], record["turns"]
        _need(type(record["iteration"]) is int and is_number(record["kl"]),
              '"iteration" and "kl" must be numbers')
        _need(isinstance(scores, list) and [*map(is_number, scores)] == [True] * len(LENSES),
              f'"scores" must be {len(LENSES)} numbers')
        _need(isinstance(turns, dict) and set(turns) <= set(LENSES),
              '"turns" must map lenses to texts')
        for text in turns.values():
            _text(text, 'each of "turns"')

    fields = {"prompt": _text, **dict.fromkeys(("iteration", "kl", "scores", "turns"), _any)}
    return _records(path, fields, "correct or remove it", check)
