"""Data files, ours and other people's: what is read, and what a bad line is told."""
from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys

import pytest

from virtue import VirtueError, dialogue
from virtue.plumbing import records
from virtue.ethics import FOLLOW_UPS, LENSES, VIRTUES


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


CHAT = [user("What should I do?"), assistant("Give it back."),
        user("Why?"), assistant("Honesty é.")]


def test_prompt_id_and_split():
    record = dialogue.prompt_record([user("Hi é") | {"extra": 1}])
    canonical = r'[{"content":"Hi \u00e9","role":"user"}]'
    assert record == {"id": hashlib.sha256(canonical.encode()).hexdigest()[:16],
                      "prompt": [user("Hi é")]}
    bounds = {"0" * 16: "sft", "3fff000000000000": "sft", "4000000000000000": "rm",
              "9999000000000000": "rm", "999a000000000000": "ppo", "e666000000000000": "ppo",
              "e667000000000000": "eval", "f" * 16: "eval"}  # .25, .6 = 0x.9999.., .9 = 0x.e666..
    assert {i: dialogue.split(i) for i in bounds} == bounds


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
    ("a.jsonl", None, "no such file"), ("a.jsonl", b"", "empty"), ("a.jsonl", b"\n \n", "empty"),
    ("a.jsonl", GOOD + b"{oops\n", "line 2: not a JSON object"),
    ("a.jsonl", b"\nnull\n3\n",
     "line 2: no prompt of the file can be used: 2 from line 2 on: is no JSON object"),
    ("a.jsonl", GOOD + b"[" * 200_000, "line 2: not a JSON object"),
    ("a.jsonl", GOOD + b'{"prompt": "\xff"}', "line 2: not UTF-8"),
    ("a.jsonl.gz", gzip.compress(GOOD * 999, mtime=0)[:-9], "damaged gzip"),
    ("a.jsonl.gz", gzip.compress(GOOD, mtime=0)[:10] + b"\xff" * 30, "damaged gzip"),
    ("a.jsonl", b'{"text": "a"}', 'line 1: .*has neither "prompt".*its fields are text'),
    ("a.jsonl", b"\n" + b'{"prompt": null}', 'line 2: .*"prompt" must be'),
    ("a.jsonl", b'{"prompt": " "}', "line 1: .*non-empty"),
    ("a.jsonl", b'{"prompt": "\\ud800"}', "line 1: .*surrogate"),
    ("a.jsonl", b'{"chosen": "a"}', 'line 1: .*a transcript must start with'),
    ("a.jsonl", lines({"prompt": CHAT}), "line 1: .*end with a message of the user"),
    ("a.jsonl", lines({"prompt": CHAT[1:]}), "line 1: .*role 'user'"),
    ("a.jsonl", b'[{"prompt": "a"}]',
     "an array, of which this command makes lines: python -c .*read_json"),
    ("a.parquet", b"PAR1 and no more", "parquet")])
def test_bad_files_name_file_line_and_remedy(tmp_path, name, raw, words):
    path = tmp_path / name
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(VirtueError, match=words) as caught:
        records.read_prompts(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert any(w in message
               for w in ("check", "give", "write", "fetch", "convert", "correct", "install"))


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
    for change, words in (({"virtue": 1}, "text"),
                          ({"revision": " "}, "empty"), ({"initial": 1}, "text"),
                          ({"id": 7}, "id"), ({"id": "0x"}, "id"),
                          ({"truncated": 0}, "truncated"), ({"prompt": CHAT}, "of the user")):
        yield REVISION | change, words


def bad_preferences():
    good = preference("motivation")
    for name in good:
        yield {k: v for k, v in good.items() if k != name}, f"lacks {name}"
    yield preference("action"), "lens 'action' where 'motivation'"
    for change, words in (
        ({"virtues": {}}, "virtues"), ({"virtues": {"courage": 1.0}}, "at most 1"),
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
    rows = [{"chosen": talk + "Yes.", "rejected": talk + "No."},
            {"chosen": talk, "rejected": talk + "No."},
            {"chosen": talk + "Yes.", "rejected": talk + "Yes."},
            {"chosen": message, "rejected": [*message[:1], {"role": "assistant", "content": "b"}],
             "lens": "motivation"},
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"prompt": message[:1], "chosen": message[1:],
             "rejected": [{"role": "assistant", "content": "b"}]}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    pairs, skipped = records.read_pairs(path)
    assert skipped == 2
    assert [p["lens"] for p in pairs] == ["action", "motivation", "action", "action"]
    assert pairs[0]["chosen"] == [{"role": "user", "content": "Why: now?"},
                                  {"role": "assistant", "content": "Yes."}]
    assert pairs[2] == pairs[3] and pairs[2]["chosen"] == message
    assert len(records.read_pairs(path, 1)[0]) == 1
    with pytest.raises(VirtueError, match="Anthropic/hh-rlhf: no such file: "
                       ".*load_dataset.\"Anthropic/hh-rlhf\", split=\"train\"..to_json"):
        records.read_pairs("Anthropic/hh-rlhf")
    with pytest.raises(VirtueError, match="stage that writes it$"):
        records.read_pairs("runs/none.jsonl")
    for bad in ({"chosen": "x"}, {"chosen": talk, "rejected": 3},
                {"chosen": "no markers", "rejected": talk},
                {"chosen": message, "rejected": message, "lens": "virtue"}):
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


TEXT = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: May I?\n\nAssistant:"
TALK = [user("Hi"), assistant("Hello."), user("May I?")]
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(("row", "prompt"), [
    # one row of the true shape of: ultrafeedback_binarized, TRL's implicit and explicit prompts,
    # rm-static
    ({"prompt": "May I?", "prompt_id": "1", "messages": [user("May I?"), assistant("Yes.")],
      "score_chosen": 9.0, "chosen": [user("May I?"), assistant("Yes.")],
      "rejected": [user("May I?"), assistant("No.")]}, TALK[2:]),
    ({"chosen": [*TALK, assistant("Yes.")], "rejected": [*TALK, assistant("No.")]}, TALK),
    ({"prompt": TALK, "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}, TALK),
    ({"prompt": TEXT, "response": " Yes.", "chosen": " Yes.", "rejected": " No."}, TALK),
    # whole transcripts beside the prompt; a system message
    ({"prompt": TEXT, "chosen": TEXT + " Yes.", "rejected": TEXT + " No."}, TALK),
    ({"chosen": [SYSTEM, *TALK, assistant("Yes.")], "rejected": [SYSTEM, *TALK, assistant("No.")]},
     [SYSTEM, *TALK]),
    ({"prompt": [SYSTEM, *TALK], "chosen": "Yes.", "rejected": "No."}, [SYSTEM, *TALK]),
    # LLaMA-Factory's ShareGPT, PKU-SafeRLHF, the HHH evaluation twice, SHP
    ({"conversations": [{"from": "human", "value": "May I?"}],
      "chosen": {"from": "gpt", "value": "Yes."}, "rejected": {"from": "gpt", "value": "No."}},
     TALK[2:]),
    ({"prompt": "May I?", "response_0": "No.", "response_1": "Yes.", "better_response_id": 1,
      "is_response_0_safe": True}, TALK[2:]),
    ({"prompt": TEXT, "corrects": ["Yes.", "Sure."], "incorrects": ["No."]}, TALK),
    ({"input": TEXT, "targets": {"choices": ["No.", "Yes."], "labels": [0, 1]}}, TALK),
    ({"prompt": "May I?", "response_0": "No.", "response_1": "Yes.", "better_response_id": 1.0},
     TALK[2:]),
    ({"prompt": "May I?", "response_0": "Yes.", "response_1": "No.", "better_response_id": False},
     TALK[2:]),
    ({"history": "May I?", "human_ref_A": "Yes.", "human_ref_B": "No.", "labels": 1.0}, TALK[2:]),
    ({"history": "May I?", "human_ref_A": "Yes.", "human_ref_B": "No.", "labels": 1,
      "seconds_difference": 2.0}, TALK[2:]),
    # the study's: as its code writes a record, and as its report prints one, of the third lens
    ({"chosen": "\n\nHuman: May I?\n\nAssistant: Yes.\n",
      "rejected": "\n\nHuman: May I?\n\nAssistant: No.\n"}, TALK[2:]),
    ({"chosen": "Human: Hi Assistant: Hello. Human: May I? Assistant: Yes.",
      "rejected": "Human: Hi Assistant: Hello. Human: May I? Assistant: No."}, TALK)])
def test_pairs_of_each_public_form(tmp_path, row, prompt):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row))
    (pair,), passed = records.read_pairs(path)
    assert pair == {"chosen": [*prompt, assistant("Yes.")], "rejected": [*prompt, assistant("No.")],
                    "lens": "action"}
    assert passed == 0


@pytest.mark.parametrize(("row", "reason"), [
    ({"prompt": "q", "chosen": "Yes.\n\nHuman: And?\n\nAssistant: No.", "rejected": "No."},
     "holds the markers"),
    ({"prompt": "x\n\nHuman: q\n\nAssistant:", "chosen": "Yes.", "rejected": "No."},
     "the prompt holds the markers"),
    ({"prompt": "q", "chosen": [user("r"), assistant("a")],
      "rejected": [user("r"), assistant("b")]}, "does not begin with"),
    (None, "is no JSON object"), (3, "is no JSON object"), ("virtues", "is no JSON object"),
    ({"prompt": "q", "chosen": None, "rejected": "b"}, "non-empty text"),
    ({"question": "q", "answer": "a"}, "fields are question"),
    ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 2}, "0 or 1"),
    ({"prompt": "q", "chosen": "Yes.\n\nHuman:", "rejected": "No."}, "holds the markers"),
    ({"prompt": "q", "chosen": "Yes.\r\n\r\nHuman: And?", "rejected": "No."}, "holds the markers"),
    ({"chosen": [user("q"), assistant("Yes.\n\nHuman: And?")],
      "rejected": [user("q"), assistant("b")]}, "holds the markers"),
    ({"system": "", "question": "q", "chosen": "a", "rejected": "b"},
     "fields are system, question, chosen, rejected"),
    ({"response_0": "a", "response_1": "b", "better_response_id": 0},
     "fields are response_0, response_1, better"),
    ({"prompt": "q", "corrects": [], "incorrects": ["b"]}, "must be lists"),
    ({"input": "q", "targets": {"choices": ["a", "b"], "labels": [0, 0]}}, "one of two"),
    ({"input": "q", "targets": {"choices": "ab", "labels": 3}}, "not iterable"),
    ({"chosen": "Human: a Assistant: he said Assistant: twice",
      "rejected": "Human: a Assistant: b"}, "alternate"),
    ({"prompt": [user("a"), SYSTEM, user("b")], "chosen": "c", "rejected": "d"},
     "must have the role")])
def test_a_row_that_is_passed_over_says_why(tmp_path, row, reason):
    path = tmp_path / "pairs.jsonl"
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path.write_text("\n".join(map(json.dumps, (good, row, row))))
    pairs, passed = records.read_pairs(path)
    assert len(pairs) == 1 and passed == 2 and reason in str(passed)
    assert str(passed).startswith("2 from line 2 on: ")
    path.write_text(json.dumps(row))
    with pytest.raises(VirtueError, match="line 1: no pair of the file can be used: 1 from line 1 "
                       f"on: .*{reason}"):
        records.read_pairs(path)


def test_prompts_of_strangers(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": TEXT}, {"messages": [*TALK, assistant("Yes.")]},
            {"conversations": [{"from": "human", "value": "a"}]},
            {"prompt": "x\n\nHuman: y\n\nAssistant:"}, {"text": 3},
            {"history": "a", "human_ref_A": "Yes."},
            {"conversations": [{"from": "human", "value": "c"}],
             "chosen": {"from": "gpt", "value": "Yes."}},
            {"prompt": [SYSTEM, user("b")]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = [r["prompt"] for r in records.read_prompts(path)]
    assert found == [TALK, [user("a")], [user("c")], [SYSTEM, user("b")]]
    said = capsys.readouterr().err
    assert "2 rows passed over: 1 from line 4 on: the prompt holds" in said
    assert "1 from line 5 on: has neither" in said
    assert dialogue.prompt_record([SYSTEM,
                                  user("b")])["id"] != dialogue.prompt_record([user("b")])["id"]


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_told_its_command(tmp_path, indent):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    (tmp_path / "a.json").write_text("\n" + json.dumps(rows, indent=indent))
    with pytest.raises(VirtueError, match="line 2: .*an array, of which this command.*read_json"):
        records.read_pairs(tmp_path / "a.json")


def test_parquet(tmp_path, monkeypatch):
    row = {"prompt": TALK, "chosen": "Yes.", "rejected": "No."}
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "pairs.bin")
    (pair,), _ = records.read_pairs(tmp_path / "pairs.bin")
    assert pair["chosen"] == [*TALK, assistant("Yes.")]


def test_parquet_without_a_library(tmp_path, monkeypatch):
    (tmp_path / "p").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(VirtueError,
                       match="p: a parquet file, for which pyarrow is needed.*read_parquet"):
        records.read_pairs(tmp_path / "p")


def test_a_pipe_is_refused_before_it_blocks(tmp_path):
    os.mkfifo(tmp_path / "p.jsonl")
    with pytest.raises(VirtueError, match="p.jsonl: cannot be read .a pipe, which waits"):
        next(records.read_jsonl(tmp_path / "p.jsonl"))


def test_a_csv_of_prompts_and_what_is_wrong_with_one(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('id,prompt,label\n1,"How do I kill a\nPython process?",safe\n2,Why?,safe\n')
    assert [r["prompt"][0]["content"] for r in records.read_prompts(file)] == [
        "How do I kill a\nPython process?", "Why?"]
    for text, words in ((b"prompt\n", "rows.csv: has no rows: give a file"), (b"", "has no rows"),
                        (b'prompt\nWhy?\n"cut', "after line 2: not CSV"),
                        (b"prompt\n\xff\n", "not CSV in UTF-8"), (b"a\nb\n", "has neither")):
        file.write_bytes(text)
        with pytest.raises(VirtueError, match=words):
            records.read_prompts(file)
    file.write_text("scenario_a,scenario_b,virtue\na,,courage\na,b,all\nStay.,Run.,courage\n")
    items, passed = records.read_items(file)
    assert items == [{"line": 4, "text": "", "options": ("Stay.", "Run."), "groups": ["courage"]}]
    assert int(passed) == 2 and 'no "group" may be called all' in str(passed)
