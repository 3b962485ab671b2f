"""Data files, ours and other people's: what is read, and what a bad line is told."""
from __future__ import annotations

import gzip
import hashlib
import json
import os

import pytest

from virtue import VirtueError, records
from virtue.ethics import FOLLOW_UPS, LENSES, VIRTUES


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


CHAT = [user("What should I do?"), assistant("Give it back."),
        user("Why?"), assistant("Honesty é.")]


def test_prompt_id_and_split():
    record = records.prompt_record([user("Hi é") | {"extra": 1}])
    canonical = r'[{"content":"Hi \u00e9","role":"user"}]'
    assert record == {"id": hashlib.sha256(canonical.encode()).hexdigest()[:16],
                      "prompt": [user("Hi é")]}
    bounds = {"0" * 16: "sft", "3fff000000000000": "sft", "4000000000000000": "rm",
              "9999000000000000": "rm", "999a000000000000": "ppo", "e666000000000000": "ppo",
              "e667000000000000": "eval", "f" * 16: "eval"}  # .25, .6 = 0x.9999.., .9 = 0x.e666..
    assert {i: records.split(i) for i in bounds} == bounds


def test_hh_transcripts():
    text = ("\n\nHuman: Who: me?\n\nsecond paragraph\n\nAssistant: Human: you"
            "\n\nHuman: Go\n\nAssistant: No")
    assert records.parse_hh(text) == [
        user("Who: me?\n\nsecond paragraph"), assistant("Human: you"), user("Go"), assistant("No")]
    assert records.parse_hh("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c") == [
        user("a"), assistant("b\n\nc")]
    empty = "\n\nHuman: a\n\nAssistant: \n\nHuman: b\n\nAssistant:"
    assert records.parse_hh(empty) == [user("a\n\nb")]
    assert records.prompt_of({"chosen": text, "rejected": ""}) == records.parse_hh(text)[:3]
    assert records.prompt_of({"prompt": text}) == records.parse_hh(text)[:3]
    assert records.prompt_of({"prompt": "Human: hi"}) == [user("Human: hi")]
    for bad in ("Human: a", "\n\nAssistant: a", "x\n\nHuman: a"):
        with pytest.raises(ValueError, match="Human"):
            records.parse_hh(bad)


def lines(*rows) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in rows)


def test_read_prompts(tmp_path):
    chosen = "\n\nHuman: \u2028one\n\nAssistant: x"
    rows = [{"prompt": "one"}, {"prompt": [user("two")]}, {"prompt": [user("one")]},
               {"chosen": chosen, "rejected": "y"}, {"prompt": CHAT[:3]}]
    raw = b"\xef\xbb\xbf" + lines(*rows[:3]) + b"\n  \n" + lines(*rows[3:])
    (tmp_path / "p.jsonl").write_bytes(raw)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(raw))
    prompts = records.read_prompts(tmp_path / "p.jsonl")
    assert [p["prompt"][0]["content"] for p in prompts] == ["one", "two", "What should I do?"]
    assert records.read_prompts(tmp_path / "p.jsonl.gz") == prompts
    assert records.read_prompts(tmp_path / "p.jsonl", limit=2) == prompts[:2]
    text = json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False)  # U+2028 ends no line
    (tmp_path / "u.jsonl").write_text(text, "utf-8")
    assert records.read_prompts(tmp_path / "u.jsonl")[0]["prompt"] == [user("a\u2028b")]


GOOD = b'{"prompt": "a"}\n'


@pytest.mark.parametrize(("name", "raw", "words"), [
    ("a.jsonl", None, "no such file"),
    ("a.jsonl", b"", "empty"),
    ("a.jsonl", b"\n \n", "empty"),
    ("a.jsonl", GOOD + b"{oops\n", "line 2: not a JSON object"),
    ("a.jsonl", GOOD + b"\n[1]\n", "line 3: not a JSON object"),
    ("a.jsonl", GOOD + b"[" * 200_000, "line 2: not a JSON object"),
    ("a.jsonl", GOOD + b'{"prompt": "\xff"}', "line 2: not UTF-8"),
    ("a.jsonl.gz", gzip.compress(GOOD * 999, mtime=0)[:-9], "damaged gzip"),
    ("a.jsonl.gz", gzip.compress(GOOD, mtime=0)[:10] + b"\xff" * 30, "damaged gzip"),
    ("a.jsonl", GOOD + b'{"text": "a"}', 'line 2: has neither "prompt"'),
    ("a.jsonl", GOOD + b'{"prompt": null}', 'line 2: "prompt" must be'),
    ("a.jsonl", GOOD + b'{"prompt": " "}', "line 2: .*non-empty"),
    ("a.jsonl", GOOD + b'{"prompt": "\\ud800"}', "line 2: .*surrogate"),
    ("a.jsonl", GOOD + b'{"chosen": "a"}', 'line 2: a transcript must start with'),
    ("a.jsonl", GOOD + lines({"prompt": CHAT}), "line 2: .*end with a message of the user"),
    ("a.jsonl", GOOD + lines({"prompt": CHAT[1:]}), "line 2: .*role 'user'"),
])
def test_bad_files_name_file_line_and_remedy(tmp_path, name, raw, words):
    path = tmp_path / name
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(VirtueError, match=words) as caught:
        records.read_prompts(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert any(w in message for w in ("check", "give", "write", "fetch", "convert", "correct"))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(VirtueError, match="cannot be read"):
        records.read_prompts(tmp_path)


REVISION = {"id": "0" * 16, "prompt": CHAT[:1], "initial": "a", "critique": "", "revision": "b",
            "virtue": "honesty", "truncated": False}


def preference(lens: str, **changes) -> dict:
    tail = sum(([user(q), assistant("m")] for q in list(FOLLOW_UPS.values())), [])
    tail = tail[: 2 * LENSES.index(lens)]
    return {"id": "0" * 16, "lens": lens, "chosen": [*CHAT, *tail],
            "rejected": [*CHAT[:3], assistant("no"), *tail], "virtues": dict.fromkeys(VIRTUES, 0.7),
            "label": 0.7, "votes": 5, "position_flips": 1, "truncated": False} | changes


def bad_revisions():
    for name in REVISION:
        yield {k: v for k, v in REVISION.items() if k != name}, f"lacks {name}"
    for change, words in (({"virtue": "courage"}, "unknown virtue 'courage'"),
                          ({"revision": " "}, "empty"), ({"initial": 1}, "text"),
                          ({"id": 7}, "id"), ({"id": "0x"}, "id"),
                          ({"truncated": 0}, "truncated"), ({"prompt": CHAT}, "of the user")):
        yield REVISION | change, words


def bad_preferences():
    good = preference("motivation")
    for name in good:
        yield {k: v for k, v in good.items() if k != name}, f"lacks {name}"
    yield preference("action"), "lens 'action' where 'motivation'"
    seven = dict.fromkeys([*VIRTUES, "courage"], 0.5)
    for change, words in (
        ({"virtues": seven}, "courage"), ({"virtues": {"honesty": 1.0}}, "missing"),
        ({"virtues": dict.fromkeys(VIRTUES, 1.5)}, "probability"), ({"virtues": [1]}, "virtues"),
        ({"label": float("nan")}, "probability"), ({"label": True}, "probability"),
        ({"votes": 6}, "votes"), ({"votes": 2.5}, "votes"), ({"position_flips": -1}, "flips"),
        ({"chosen": CHAT}, "up to the motivation"), ({"chosen": CHAT[:3]}, "assistant"),
        ({"rejected": [user("other"), *good["rejected"][1:]]}, "one prompt"),
        ({"chosen": CHAT[:2], "rejected": CHAT[:2]}, "up to the motivation"),
    ):
        yield preference("motivation", **change), words


def test_stage_records(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(lines(REVISION, REVISION))
    assert records.read_revisions(path) == [REVISION, REVISION]
    for lens in LENSES:
        path.write_bytes(lines(preference(lens)))
        assert records.read_preferences(path, lens) == [preference(lens)]


@pytest.mark.parametrize(("kind", "record", "words"), [
    *(("revision", *case) for case in bad_revisions()),
    *(("preference", *case) for case in bad_preferences())])
def test_bad_stage_records(tmp_path, kind, record, words):
    path = tmp_path / "r.jsonl"
    path.write_bytes(lines(REVISION if kind == "revision" else preference("motivation"), record))
    with pytest.raises(VirtueError, match=words) as caught:
        if kind == "revision":
            records.read_revisions(path)
        else:
            records.read_preferences(path, "motivation")
    assert f"{path}, line 2: " in str(caught.value) and "run_data.py" in str(caught.value)


def test_pairs_of_any_kind(tmp_path):
    talk, path = "\n\nHuman: Why: now?\n\nAssistant: ", tmp_path / "pairs.jsonl"
    message = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"chosen": talk + "Yes.", "rejected": talk + "No."}, {"chosen": talk, "rejected": talk + "No."}, {"chosen": talk + "Yes.", "rejected": talk + "Yes."},
               {"chosen": message, "rejected": [*message[:1], {"role": "assistant", "content": "b"}], "lens": "motivation"},
               {"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": message[:1], "chosen": message[1:], "rejected": [{"role": "assistant", "content": "b"}]}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    pairs, skipped = records.read_pairs(path)
    assert skipped == 2 and [p["lens"] for p in pairs] == ["action", "motivation", "action", "action"]
    assert pairs[0]["chosen"] == [{"role": "user", "content": "Why: now?"}, {"role": "assistant", "content": "Yes."}]
    assert pairs[2] == pairs[3] and pairs[2]["chosen"] == message
    assert len(records.read_pairs(path, 1)[0]) == 1
    system = [{"role": "system", "content": "Be good."}]
    for record in ({"chosen": system + message, "rejected": system + message[:1]}, {"prompt": system + message[:1], "chosen": "a", "rejected": "b"}):
        path.write_text(json.dumps(record) + "\n")  # all of such a file would be passed over
        with pytest.raises(VirtueError, match="line 1: .*leave system messages out"):
            records.read_pairs(path)
    with pytest.raises(VirtueError, match="Anthropic/hh-rlhf: no such file: .*load_dataset.\"Anthropic/hh-rlhf\", split=\"train\"..to_json"):
        records.read_pairs("Anthropic/hh-rlhf")
    with pytest.raises(VirtueError, match="stage that writes it$"):
        records.read_pairs("runs/none.jsonl")
    for bad in ({"chosen": "x"}, {"chosen": talk, "rejected": 3}, {"chosen": "no markers", "rejected": talk}, {"chosen": message, "rejected": message, "lens": "virtue"}):
        path.write_text(json.dumps(rows[0]) + "\n" + json.dumps(bad) + "\n")
        pairs, skipped = records.read_pairs(path)
        assert len(pairs) == 1 and list(skipped.reasons.values()) == [(1, 2)]  # one row, line 2


def test_pairs_of_strangers(tmp_path):
    path, ask = tmp_path / "pairs.jsonl", user("May I?")
    want = [[ask, assistant("Yes.")], [ask, assistant("No.")]]
    for form in ("\n\nHuman: May I?\n\nAssistant: {}", "\n\nHuman: May I?\n\nAssistant:\n{}",
                 "Human: May I? Assistant: {}", "Human: May I?\nAssistant: {}"):
        for prompt in ({}, {"prompt": form.format("")}):
            row = prompt | {"chosen": form.format("Yes."), "rejected": form.format("No.")}
            null, other = {**row, "chosen": None}, {**row, "prompt": "Else?"}
            path.write_bytes(gzip.compress("\n".join(map(json.dumps, (row, null, other))).encode()))
            (pair,), skipped = records.read_pairs(path, lens="motivation")
            assert [pair["chosen"], pair["rejected"]] == want and pair["lens"] == "motivation"
            assert sorted(skipped.reasons.values()) in ([(1, 2), (1, 3)], [(2, 2)])
    row = {"prompt": "May I?", "chosen": want[0], "rejected": want[1]}  # ultrafeedback's
    spaces = {"prompt": "May I?", "chosen": " Yes.", "rejected": "Yes."}
    path.write_text(json.dumps(row) + "\n" + json.dumps(spaces))
    (pair,), skipped = records.read_pairs(path)
    assert [pair["chosen"], pair["rejected"]] == want and skipped.reasons == {"identical": (1, 2)}


def test_a_pipe_is_refused_before_it_blocks(tmp_path):
    os.mkfifo(tmp_path / "p.jsonl")
    with pytest.raises(VirtueError, match="p.jsonl: cannot be read .a pipe, which waits"):
        next(records.read_jsonl(tmp_path / "p.jsonl"))
