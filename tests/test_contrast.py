"""Answers under an instruction to have a virtue or a vice: --feedback contrast, --prompted, the
log-odds of virtues to vices; how instructions get into a prompt and out of it; the tables."""
from __future__ import annotations

import importlib
import json
import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import CHAT_TEMPLATE, SYSTEM_TEMPLATE, make_tiny_model, make_tiny_tokenizer

from virtue import contrast, generate, lora
from virtue.dialogue import Dialogue, Turn, instructed, with_prompt
from virtue.ethics import ENGLISH, FOLLOW_UPS, LENSES, VIRTUES
from virtue.evaluation import models
from virtue.evaluation.models import distances, guided, trait_odds
from virtue.evaluation.setup import Loaded
from virtue.judge import judge_log_odds
from virtue.plumbing.loading import Base, load_model, load_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import tables

SEED, NEW, LIMIT, TEMPERATURE = 3, 10, 12, 0.7
REFUSES = CHAT_TEMPLATE.replace("{% else %}", (  # as Mistral's: no place for a system message
    "{% elif message['role'] == 'system' %}{{ raise_exception('Only user and assistant roles') }}"
    "{% else %}"), 1)
TRAIT = "You are an assistant who is known to "  # how an instruction begins


def call(script: str, *argv) -> None:
    importlib.import_module(script).main([str(a) for a in argv])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What about {i}?"}) + "\n" for i in range(80)))
    return path


def opened(folder: Path, template: str) -> SimpleNamespace:
    """A tiny model, and what else a test needs of it."""
    make_tiny_model(folder, template=template, max_position_embeddings=4096)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer,
                           base=Base(model, tokenizer, {}, "", ENGLISH))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("bare"), REFUSES)


@pytest.fixture(scope="module")
def placed(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("placed"), SYSTEM_TEMPLATE)


# ---- instructions in prompts


def test_an_instruction_in_a_template_with_a_place_for_it(placed):
    talk = [user("Hm?"), {"role": "assistant", "content": "Yes."}, user("So?")]
    assert instructed(placed.tokenizer, talk, "Be kind.") == [system("Be kind."), *talk]
    told = [system("Be brief."), *talk]
    assert instructed(placed.tokenizer, told, "Be kind.") == [
        system("Be brief.\n\nBe kind."), *talk]
    assert told[0] == system("Be brief.") and len(talk) == 3  # the prompts themselves stay


def test_an_instruction_in_a_template_without_a_place_for_it(bare):
    talk = [user("Hm?"), {"role": "assistant", "content": "Yes."}, user("So?")]
    assert instructed(bare.tokenizer, talk, "Be kind.") == [user("Be kind.\n\nHm?"), *talk[1:]]
    assert talk[0] == user("Hm?")


def test_a_template_that_leaves_a_system_message_out_has_no_place(tmp_path):
    make_tiny_tokenizer(tmp_path, template=CHAT_TEMPLATE.replace(
        "{% else %}", "{% elif message['role'] == 'assistant' %}", 1))
    found = instructed(load_tokenizer(tmp_path), [user("Hm?")], "Be kind.")
    assert found == [user("Be kind.\n\nHm?")]


def test_with_prompt_keeps_the_answers_tokens(placed):
    """Spans move by the difference of the prompts' lengths, to a longer prompt and back."""
    short, long = (placed.tokenizer.encode(text, add_special_tokens=False) for text in (
        "<s>[INST] Hm?[/INST]", "<s><<Be kind.>>[INST] Hm?[/INST]"))
    shift = len(long) - len(short)
    assert shift > 3
    tail, at = [70, 71, 2, 3, 80, 4, 90, 91, 92, 2], len(short)
    turns = (Turn(at, at + 3, False), Turn(at + 6, at + 9, True))
    dialogue = Dialogue("f" * 16, [user("Hm?")], short + tail, turns)
    told = [system("Be kind."), user("Hm?")]
    moved = with_prompt(placed.tokenizer, dialogue, told)
    assert moved == Dialogue("f" * 16, told, long + tail, (
        Turn(at + shift, at + shift + 3, False), Turn(at + shift + 6, at + shift + 9, True)))
    for turn, span in zip(moved.turns, ([70, 71, 2], [90, 91, 92])):
        assert moved.ids[turn.start:turn.end] == span
    assert moved.ids[moved.turns[1].score_position] == 2
    assert with_prompt(placed.tokenizer, moved, [user("Hm?")]) == dialogue
    assert with_prompt(placed.tokenizer, dialogue, [user("Hm?")]) == dialogue


@pytest.mark.parametrize(("text", "told", "run", "found"), [
    ("Well, I will be brave and go.", "be brave and stay", 3, True),
    ("Well, I will BE: brave; And_go.", "be brave and stay", 3, True),
    ("I will be brave but stay.", "be brave and stay", 3, False),
    ("I will be brave but stay.", "be brave and stay", 2, True),
    ("and brave be stay", "be brave and stay", 3, False),
    ("brave be", "be brave and stay", 3, False),
    ("And stay!", "be brave and stay", 3, True),  # shorter than the run, and all of it is there
    ("brave", "be brave and stay", 8, True),
    ("bravery", "be brave and stay", 8, False),
    ("be brave and stay", "be brave and stay", 8, True),
    ("be brave and stay here", "be brave and stay", 8, False),  # five words of which four are there
    ("brave and", "be brave and stay", math.inf, True),  # of a critique: nothing but its words
    ("brave and so", "be brave and stay", math.inf, False),
    ("be brave and", "be brave", 3, False),
    ("Être bon, c'est ça", "ÊTRE BON C EST", 4, True),
    ("", "be brave", 3, False), ("?! ...", "be brave", 3, False), ("be brave", "", 3, False),
])
def test_what_echoes(text, told, run, found):
    assert contrast.echoes(text, told, run) is found


# ---- revisions


def test_each_prompt_is_asked_its_own_questions_in_one_batch(bare, prompts, tmp_path, monkeypatch):
    real, calls = generate.sample_dialogues, []

    def spy(model, tokenizer, records, **settings):
        calls.append((records, settings, real(model, tokenizer, records, **settings)))
        return calls[-1][2]

    monkeypatch.setattr(generate, "sample_dialogues", spy)
    call("run_data", "revisions", "--model", bare.folder, "--out", tmp_path / "r", "--prompts",
         prompts, "--limit", LIMIT, "--max-new-tokens", NEW, "--seed", SEED, "--temperature",
         TEMPERATURE, "--truncated", "keep", "--batch-size", 64)
    ((records, settings, found),) = calls
    assert settings["batch_size"] >= len(records) == LIMIT
    written = {r["id"]: r for r in lines(tmp_path / "r/revisions.jsonl")}
    assert len({r["virtue"] for r in written.values()}) > 2
    virtues = {}
    for d in found:
        between = [bare.tokenizer.decode(d.ids[a.end + a.truncated:b.start])
                   for a, b in zip(d.turns, d.turns[1:])]
        (virtues[d.id],) = [v for v in VIRTUES if f"one virtue in mind: {v}." in between[0]]
        asks, little, much = ENGLISH.constitution[virtues[d.id]]
        for text in (asks, little, much):
            assert text in between[0]
        assert between[0].startswith("[INST] Look at your last answer again")
        assert between[1].startswith("[INST] Now write your answer to the original message again")
        assert f"so that it shows {virtues[d.id]}, " in between[1]
    assert all(record["virtue"] == virtues[i] for i, record in written.items())
    assert len(written) > LIMIT / 2
    d = found[4]  # alone, with its own questions: the same
    (alone,) = real(bare.model, bare.tokenizer, [records[4]], seed=SEED, stage="revisions",
                    max_new_tokens=NEW, temperature=TEMPERATURE, batch_size=1,
                    questions=settings["questions"][d.id])
    assert alone == d


def told_by_hand(model, prompt: list[dict], trait: str) -> list[dict]:
    """The prompt with an instruction, in the way of the model's template."""
    text = f"{TRAIT}{trait}."
    if model.tokenizer.chat_template == REFUSES:
        assert len(prompt) == 1
        return [user(f"{text}\n\n{prompt[0]['content']}")]
    if prompt[0]["role"] == "system":
        return [system(f"{prompt[0]['content']}\n\n{text}"), *prompt[1:]]
    return [system(text), *prompt]


def answers(model, stage: str, records: list[dict], copy: int, turns: int = 3) -> list[list[str]]:
    """What the model says to each of the records, turn by turn, as texts."""
    found = generate.sample_dialogues(
        model.model, model.tokenizer, records, seed=SEED, stage=stage, max_new_tokens=NEW,
        temperature=TEMPERATURE, batch_size=16, copy=copy, turns=turns)
    return [[model.tokenizer.decode(d.ids[t.start:t.end], skip_special_tokens=True).strip()
             for t in d.turns] for d in found]


def sampling(model, prompts: Path, out: Path) -> list:
    return ["--model", model.folder, "--prompts", prompts, "--out", out, "--seed", SEED,
            "--max-new-tokens", NEW, "--temperature", TEMPERATURE, "--batch-size", 5,
            "--limit", LIMIT, "--truncated", "keep", "--feedback", "contrast"]


def test_revisions_by_contrast(bare, prompts, tmp_path):
    """The answer is the plain one, the revision the one under the instruction, which is not in the
    prompt; two virtues a prompt, each from random numbers of its own."""
    call("run_data", "revisions", *sampling(bare, prompts, tmp_path / "r"), "--contrasts", 2)
    records = lines(tmp_path / "r/revisions.jsonl")
    summary = json.loads((tmp_path / "r/summary.json").read_text())
    assert summary["revisions"] == len(records) == 2 * LIMIT  # else the copies below are wrong
    assert [r["id"] for r in records] == sorted(r["id"] for r in records)
    by_id = {}
    for record in records:
        by_id.setdefault(record["id"], []).append(record)
    assert len(by_id) == LIMIT
    for key, of_prompt in by_id.items():
        (prompt,) = {r["prompt"][0]["content"] for r in of_prompt}
        assert prompt.startswith("What about ") and [len(r["prompt"]) for r in of_prompt] == [1, 1]
        asked = {"id": key, "prompt": [user(prompt)]}
        ((plain,),) = answers(bare, "revisions", [asked], 0, 1)
        assert of_prompt[0]["virtue"] != of_prompt[1]["virtue"]
        for copy, record in enumerate(of_prompt, 1):
            asks = ENGLISH.constitution[record["virtue"]][0]
            told = asked | {"prompt": told_by_hand(bare, asked["prompt"], asks)}
            assert record["initial"] == plain
            assert record["critique"] == asks
            assert [[record["revision"]]] == answers(bare, "revisions", [told], copy, 1)
    assert len({r["virtue"] for r in records}) == 5


def test_sft_learns_the_answer_without_the_instruction(bare, prompts, tmp_path, monkeypatch):
    """Context distillation: what was said under an instruction is learned after the bare prompt."""
    call("run_data", "revisions", *sampling(bare, prompts, tmp_path / "r"))
    learned = []
    monkeypatch.setattr("virtue.plumbing.training.train", lambda args, out, state, parameters,
                        examples, *_, **__: learned.extend(examples) or ({"loss/held_out": 0},) * 2)
    call("run_sft", "--data", tmp_path / "r", "--out", tmp_path / "sft", "--rank", 2,
         "--held-out", 0.2)
    by_id = {r["id"]: r for r in lines(tmp_path / "r/revisions.jsonl")}
    assert len(by_id) > len(learned) > LIMIT / 2
    for example in learned:
        record, ((start, end),) = by_id[example.prompt], *example.spans
        (ids,) = example.rows
        said = bare.tokenizer.decode(ids[start:end], skip_special_tokens=True).strip()
        assert said == record["revision"] != record["initial"]
        assert bare.tokenizer.decode(ids[:start]).count(record["prompt"][0]["content"]) == 1
        assert TRAIT not in bare.tokenizer.decode(ids)


# ---- preferences


@pytest.fixture(scope="module")
def contrasted(placed, prompts, tmp_path_factory):
    """Two contrasts a prompt; all prompts have a system message."""
    out = tmp_path_factory.mktemp("contrasted") / "p"
    call("run_data", "preferences", *sampling(placed, prompts, out), "--contrasts", 2,
         "--judge-limit", 3, "--system", "Be brief.")
    return out


@pytest.fixture(scope="module")
def contrasted_once(bare, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("once") / "p"
    call("run_data", "preferences", *sampling(bare, prompts, out), "--judge-limit", 0)
    return out


def sides_by_hand(model, records: list[dict], length: int, copies: int) -> dict:
    """(id, virtue, "chosen" or "rejected") -> the three texts of that side. `length`: messages of a
    prompt; the n-th virtue of a prompt is sampled as its n-th copy."""
    told, seen = [[] for _ in range(copies)], Counter()
    for record in records:
        ((virtue, _),) = record["virtues"].items()
        poles = dict(zip(("asks", "deficiency", "excess"), ENGLISH.constitution[virtue]))
        for side, trait in (("chosen", poles["asks"]), ("rejected", poles[record["vice"]])):
            prompt = told_by_hand(model, record["chosen"][:length], trait)
            told[seen[record["id"]]].append(((record["id"], virtue, side), prompt))
        seen[record["id"]] += 1
    return {key: texts for copy, asked in enumerate(told, 1) for (key, _), texts in zip(
        asked, answers(model, "preferences", [{"id": key[0], "prompt": prompt}
                                              for key, prompt in asked], copy))}


def check_sides(model, out: Path, before: list[dict], copies: int) -> list[dict]:
    """Every record of every lens: which side was sampled under which instruction."""
    asked, length = [user(text) for text in FOLLOW_UPS.values()], len(before) + 1
    summary = json.loads((out / "summary.json").read_text())
    of_action = lines(out / "action.jsonl")
    assert len(of_action) == copies * LIMIT  # none is dropped, or copies would be wrong
    assert set(Counter(r["id"] for r in of_action).values()) == {copies}
    expected = sides_by_hand(model, of_action, length, copies)
    vices = {(r["id"], *r["virtues"]): r["vice"] for r in of_action}
    for k, lens in enumerate(LENSES):
        records, numbers = lines(out / f"{lens}.jsonl"), summary[lens]
        assert numbers["pairs"] == len(records) > LIMIT / 2
        assert len(records) + sum(v for name, v in numbers.items()
                                  if name.startswith("dropped_")) == copies * LIMIT
        for record in records:
            prompt = record["chosen"][:length]
            assert prompt[:-1] == before and prompt[-1]["content"].startswith("What about ")
            assert prompt == record["rejected"][:length] and TRAIT not in json.dumps(record)
            ((virtue, label),) = record["virtues"].items()
            assert label == record["label"] == record["votes"] == 1
            assert record["position_flips"] is None and record["lens"] == lens
            assert record["vice"] == vices[record["id"], virtue]  # one drawing for all lenses
            for side in ("chosen", "rejected"):
                talk = list(prompt)
                for i, text in enumerate(expected[record["id"], virtue, side][:k + 1]):
                    talk += asked[i - 1:i] + [{"role": "assistant", "content": text}]
                assert record[side] == talk, side
            assert record["chosen"] != record["rejected"]  # so a swap would show above
    return of_action


def test_both_sides_of_two_contrasts(placed, contrasted):
    records = check_sides(placed, contrasted, [system("Be brief.")], 2)
    of_prompt = {}
    for record in records:
        of_prompt.setdefault(record["id"], []).append(*record["virtues"])
    assert all(len(set(virtues)) == 2 for virtues in of_prompt.values())
    assert {r["vice"] for r in records} == {"deficiency", "excess"}


def test_both_sides_in_the_users_message(bare, contrasted_once):
    check_sides(bare, contrasted_once, [], 1)


def test_a_plain_dialogue_of_each_prompt(placed, contrasted):
    """For the score statistics: without an instruction, from the numbers of copy 0."""
    found = lines(contrasted / "dialogues.jsonl")
    assert len({d["id"] for d in found}) == len(found) == LIMIT
    plain = generate.sample_dialogues(
        placed.model, placed.tokenizer, [{"id": d["id"], "prompt": d["prompt"]} for d in found],
        seed=SEED, stage="preferences", max_new_tokens=NEW, temperature=TEMPERATURE, batch_size=4)
    for row, dialogue in zip(found, plain):
        assert row["prompt"][0] == system("Be brief.") and len(row["prompt"]) == 2
        assert row["ids"] == dialogue.ids
        assert row["turns"] == [list(turn) for turn in dialogue.turns]
        text = placed.tokenizer.decode(row["ids"][:row["turns"][0][0]])
        assert text == f"<s><<Be brief.>>[INST] {row['prompt'][1]['content']}[/INST]"


def test_how_often_the_judge_agrees(placed, contrasted, contrasted_once):
    """Of the first three pairs, by the virtue of each alone."""
    summary = json.loads((contrasted / "summary.json").read_text())
    for lens in LENSES:
        right = []
        for record in lines(contrasted / f"{lens}.jsonl")[:3]:
            odds, _ = judge_log_odds(placed.model, placed.tokenizer, ENGLISH,
                                     [(record["chosen"], record["rejected"])], lens,
                                     asked=[*record["virtues"]])
            right.append(float(odds.mean() > 0))
        assert summary[lens]["judge_agrees"]["n"] == 3
        assert summary[lens]["judge_agrees"]["share"] == pytest.approx(sum(right) / 3)
    unasked = json.loads((contrasted_once / "summary.json").read_text())
    assert all(unasked[lens]["judge_agrees"] is None for lens in LENSES)


def test_a_killed_run_by_contrast_goes_on(placed, contrasted, prompts, tmp_path, monkeypatch):
    """Killed in its second contrast: --resume samples only what is missing and ends the same."""
    real, calls = generate.sample_turns, []

    def killed(*args, **settings):
        calls.append(args)
        if len(calls) == 10:  # 3 batches of plain dialogues, 5 of the first contrast, 2
            raise KeyboardInterrupt
        return real(*args, **settings)

    flags = [*sampling(placed, prompts, tmp_path / "p"), "--contrasts", 2, "--judge-limit", 3,
             "--system", "Be brief."]
    monkeypatch.setattr(generate, "sample_turns", killed)
    with pytest.raises(KeyboardInterrupt):
        call("run_data", "preferences", *flags)
    call("run_data", "preferences", *flags, "--resume")
    assert len(calls) == 3 + 5 + 5 + 1  # the one that was killed twice
    for name in (*LENSES, "dialogues"):
        file = f"{name}.jsonl"
        assert (tmp_path / "p" / file).read_bytes() == (contrasted / file).read_bytes()


def test_reward_models_train_on_contrasts(contrasted, tmp_path, monkeypatch):
    monkeypatch.setattr("run_rm.HELD_OUT", 0.25)
    call("run_rm", "--data", contrasted, "--out", tmp_path / "rm", "--lens", "motivation",
         "--epochs", 1, "--batch-size", 64, "--rank", 2)
    made = json.loads((tmp_path / "rm/motivation/virtue.json").read_text())
    assert made["extra"]["score_std"] > 0
    steps = [m for m in lines(tmp_path / "rm/motivation/metrics.jsonl") if "loss/train" in m]
    assert len(steps) == 1


# ---- echoes of the instruction


SAID = {"talk": dict(asks="to e a o i", deficiency="t s r n l", excess="c b d f g")}  # by chance


def echoing(bare, prompts, tmp_path, monkeypatch, command: str) -> tuple[Path, Path]:
    """The command under a constitution whose words the tiny model says by chance: with no answer
    taken for an echo, and with every one that says any word of its instruction."""
    (tmp_path / "constitution.json").write_text(json.dumps(SAID))
    flags = [*sampling(bare, prompts, tmp_path / "all"), "--constitution",
             tmp_path / "constitution.json", "--limit", 24]
    if command == "preferences":
        flags += ["--judge-limit", 0]
    with monkeypatch.context() as patched:
        patched.setattr(contrast, "echoes", lambda *told: False)
        call("run_data", command, *flags)
    monkeypatch.setattr("run_data.ECHO", 1)
    call("run_data", command, *flags, "--out", tmp_path / "some")
    return tmp_path / "all", tmp_path / "some"


def words_in(text: str) -> set[str]:
    return {*"".join(c if c.isalnum() else " " for c in text.lower()).split()}


def test_pairs_of_which_a_side_says_its_instruction_are_dropped(bare, prompts, tmp_path,
                                                                monkeypatch):
    every, some = echoing(bare, prompts, tmp_path, monkeypatch, "preferences")
    numbers, sides = json.loads((some / "summary.json").read_text()), Counter()
    for k, lens in enumerate(LENSES):
        kept = []
        for record in (records := lines(every / f"{lens}.jsonl")):
            traits = {"chosen": "to e a o i", "rejected": SAID["talk"][record["vice"]]}
            echo = [side for side, trait in traits.items() for m in record[side][1::2]
                    if words_in(trait) & words_in(m["content"])]
            assert len(record["chosen"][1::2]) == k + 1  # every turn up to the lens's
            sides.update(echo)
            if not echo:
                kept.append(record)
        assert lines(some / f"{lens}.jsonl") == kept and kept
        assert numbers[lens]["dropped_echoed"] == len(records) - len(kept) > 0
        assert numbers[lens]["pairs"] == len(kept)
    assert min(sides["chosen"], sides["rejected"]) > 1  # either side has its own instruction
    assert lines(every / "dialogues.jsonl") == lines(some / "dialogues.jsonl")  # of all prompts


def test_revisions_that_say_their_instruction_are_dropped(bare, prompts, tmp_path, monkeypatch):
    every, some = echoing(bare, prompts, tmp_path, monkeypatch, "revisions")
    told = words_in("to e a o i")
    kept = [r for r in lines(every / "revisions.jsonl") if not told & words_in(r["revision"])]
    assert lines(some / "revisions.jsonl") == kept and kept
    numbers = json.loads((some / "summary.json").read_text())
    assert numbers["echoed"] == len(lines(every / "revisions.jsonl")) - len(kept) > 0


# ---- which virtue, which vice


def contrasts(args, name):
    return contrast.contrasts_of(ENGLISH, args.seed, name, args.contrasts)


def test_virtue_and_vice_are_drawn_for_each_prompt():
    args = SimpleNamespace(seed=SEED, contrasts=2)
    names, drawn = [f"{i:016x}" for i in range(400)], Counter()
    for name in names:
        first, second = found = contrasts(args, name)
        assert first[0] != second[0] and found == contrasts(args, name)
        for virtue, vice, asked, other in found:
            asks, deficiency, excess = ENGLISH.constitution[virtue]
            assert asked == asks
            assert other == {"deficiency": deficiency, "excess": excess}[vice]
        drawn.update((place, virtue, vice) for place, (virtue, vice, *_) in enumerate(found))
    # 2 places, 5 virtues, 2 vices: 40 each, with a standard deviation of 6
    assert len(drawn) == 20 and 15 <= min(drawn.values()) and max(drawn.values()) <= 65
    alone = SimpleNamespace(seed=SEED, contrasts=1)
    assert all(contrasts(alone, name) == contrasts(
        args, name)[:1] for name in names[:20])
    more = SimpleNamespace(seed=SEED, contrasts=9)  # than there are virtues
    assert {t[0] for t in contrasts(more, names[0])} == {*VIRTUES}
    other = SimpleNamespace(seed=SEED + 1, contrasts=2)
    assert any(contrasts(other, name) != contrasts(args, name)
               for name in names[:20])


# ---- run_eval.py models


TWO = ENGLISH._replace(constitution={"courage": ("be brave", "flee", "rush in"),
                                     "thrift": ("spend with care", "waste", "hoard")})


def test_the_whole_constitution_before_each_prompt(bare, placed):
    asked = [{"id": "1" * 16, "prompt": [user("Hm?")]}, {"id": "2" * 16, "prompt": [user("So?")]}]
    text = ("You are an assistant of good character. In all that you say, be brave; spend with "
            "care. Do each in the right measure, neither too little nor too much.")
    found = guided(placed.base._replace(words=TWO), asked)
    assert found == [{"id": p["id"], "prompt": [system(text), *p["prompt"]]} for p in asked]
    found = guided(bare.base._replace(words=TWO), asked)
    assert found == [{"id": p["id"], "prompt": [user(f"{text}\n\n{p['prompt'][0]['content']}")]}
                     for p in asked]
    (told,) = guided(placed.base, asked[:1])
    assert all(asks in told["prompt"][0]["content"] for asks, *_ in ENGLISH.constitution.values())


@pytest.fixture(scope="module")
def prompted(placed):
    """Dialogues that the base wrote under its constitution, the same after the bare prompts, and
    an adapter "sft", which is the reference."""
    model, tokenizer = placed.model, placed.tokenizer
    base = placed.base._replace(words=TWO)
    asked = [{"id": f"{i:016x}", "prompt": [user(f"What of {'it ' * i}?")]} for i in range(5)]
    sampled = generate.sample_dialogues(
        model, tokenizer, guided(base, asked), seed=SEED, stage="eval", max_new_tokens=NEW,
        temperature=TEMPERATURE, batch_size=2)
    lora.add_adapter(model, "sft", rank=4, alpha=8)
    for layer in model.modules():
        if isinstance(layer, lora.LoRALinear):
            torch.nn.init.normal_(layer.lora_B["sft"], std=0.2)
    dialogues = [with_prompt(tokenizer, d, p["prompt"]) for d, p in zip(sampled, asked)]
    return SimpleNamespace(loaded=Loaded(base, ("sft",), {}, None), asked=asked, sampled=sampled,
                           dialogues=dialogues)


@torch.no_grad()
def log_prob(placed, stack: tuple[str, ...], dialogue: Dialogue, before: str,
             temperature: float) -> float:
    """Of all sampled tokens after the text `before` as the prompt: a row alone, token by token."""
    shift = dialogue.turns[0].start
    prompt = placed.tokenizer.encode(before, add_special_tokens=False)
    ids, total = prompt + dialogue.ids[shift:], 0.0
    with lora.use_stack(placed.model, *stack):
        logits = placed.model(torch.tensor([ids])).logits[0].double()
    for turn in dialogue.turns:
        for t in range(turn.start, turn.end):
            at = t - shift + len(prompt)
            assert ids[at] == dialogue.ids[t]
            p = (logits[at - 1] / temperature).exp()
            total += float((p[ids[at]] / p.sum()).log())
    return total


def texts_before(question: str, told: str | None = None) -> str:
    guide = f"<<{TWO.guide.format(all_asks=told)}>>" if told else ""
    return f"<s>{guide}[INST] {question}[/INST]"


VIRTUOUS, VICIOUS = "be brave; spend with care", "flee; waste"


def test_kl_of_the_prompted_base(placed, prompted):
    """Its own log-probs are those under the instruction, the reference's those without it."""
    kl, base_sums = distances(prompted.loaded, (), prompted.sampled, prompted.dialogues,
                              TEMPERATURE, 2)
    for i, (d, p) in enumerate(zip(prompted.sampled, prompted.asked)):
        question = p["prompt"][0]["content"]
        own = log_prob(placed, (), d, texts_before(question, VIRTUOUS), TEMPERATURE)
        reference = log_prob(placed, ("sft",), d, texts_before(question), TEMPERATURE)
        assert kl[i].item() == pytest.approx(own - reference, abs=1e-3)
        assert base_sums[i].item() == pytest.approx(
            log_prob(placed, (), d, texts_before(question), 1.0), abs=1e-3)
        without = log_prob(placed, (), d, texts_before(question), TEMPERATURE)
        assert abs(own - without) > 0.1  # the instruction is part of it
    # the base without an instruction; and the reference itself, which is no distance away
    loaded, dialogues = prompted.loaded, prompted.dialogues
    kl, _ = distances(loaded, (), dialogues, dialogues, TEMPERATURE, 3)
    question = prompted.asked[1]["prompt"][0]["content"]
    assert kl[1].item() == pytest.approx(
        log_prob(placed, (), dialogues[1], texts_before(question), TEMPERATURE)
        - log_prob(placed, ("sft",), dialogues[1], texts_before(question), TEMPERATURE), abs=1e-3)
    assert distances(loaded, ("sft",), dialogues, dialogues, 1.0, 3)[0].abs().max() == 0
    bare_base = loaded._replace(sft=())  # the prompted base has the reference's stack, ()
    kl, _ = distances(bare_base, (), prompted.sampled, dialogues, TEMPERATURE, 3)
    assert kl.abs().min() > 0.1


def test_log_odds_of_virtues_to_vices(placed, prompted):
    found = trait_odds(prompted.loaded, prompted.dialogues, prompted.asked, 2)
    assert found.shape == (5,)
    for odds, d, p in zip(found, prompted.dialogues, prompted.asked):
        question = p["prompt"][0]["content"]
        good, bad = (log_prob(placed, (), d, "<s><<You are an assistant who is known to "
                              f"{told}.>>[INST] {question}[/INST]", 1.0)
                     for told in (VIRTUOUS, VICIOUS))
        assert odds == pytest.approx(
            (good - bad) / sum(t.end - t.start for t in d.turns), abs=1e-4)
        assert abs(odds) > 1e-3
    again = trait_odds(prompted.loaded, prompted.sampled, prompted.asked, 5)
    assert again == pytest.approx(found, abs=1e-5)  # the prompt they had before does not count


@pytest.mark.parametrize("started", ["base", "sft"])
def test_whom_the_judge_compares(placed, monkeypatch, started):
    """The last model with what training began with, in both wordings, the base and the prompted
    base, which training never began with."""
    monkeypatch.setattr(models, "contest", lambda judge, after, before, prompts, wording, size,
                        keep: (after, before, wording, keep.name))
    names = ("base", "prompted", *(["sft"] if started == "sft" else []), "ppo")
    wins = models.judge_models(placed.base, {name: name for name in names}, [], 1, Path("x"))
    pairs = [(started, "trained"), (started, "other"), ("base", "trained"),
             ("prompted", "trained")]
    assert [*wins.values()] == [("ppo", other, wording, f"log-odds-{i}") for i, (other, wording)
                                in enumerate(dict.fromkeys(pairs), 1)]
    assert [*wins] == [f"ppo vs {other}" + ", other wording" * (wording == "other")
                       for other, wording in dict.fromkeys(pairs)]


# ---- tables


def test_tables_without_gold():
    """By hand. Of two seeds Student's t has one degree of freedom: the half-width of the interval
    of d1 and d2 is 12.7062 |d1 - d2| / 2."""
    def run(likelihood, rewards, wins) -> tables.Run:
        models = {name: {"likelihood": odds, **{f"reward/{lens}": r for lens, r in zip(
            LENSES, reward)}} for name, odds, reward in zip(
                ("base", "prompted", "sft", "ppo"), likelihood,
                ((0, 0, 0), (1, 1, 1), (0, 0, 0), rewards))}
        for name in ("prompted", "sft", "ppo"):
            models[name]["kl"] = 4.0
        models["base"]["perplexity"] = 2.0  # of the final model it is not known
        return tables.Run("sft", "ppo", models, {}, [], {}, float("nan"), wins, [0.9, 0.8, 0.7])

    zero = run((0.0, 0.05, 0.01, 0.03), (1, 2, 3), [0.75, 0.5, 0.25])
    one = run((0.002, 0.05, 0.02, 0.05), (2, 3, 4), [0.25, 0.5, 0.75])
    text = tables.plain_tables({"arm": {0: zero, 4: one}, "none": {}, "single": {1: zero}})
    table, said, alone, said_alone = text.split("\n\n")
    assert [row.strip("| ").split(" | ") for row in table.splitlines()] == [
        ["arm, mean of seeds 0 4", "base", "prompted", "sft", "ppo", "ppo − sft",
         "ppo − prompted"],
        ["---"] * 7,
        ["reward of the models that PPO saw", "0.000", "1.000", "0.000", "2.500",
         "+2.500 [-3.853, +8.853]", "+1.500 [-4.853, +7.853]"],
        ["log-odds of virtues to vices, nats a token", "0.0010", "0.0500", "0.0150", "0.0400",
         "+0.0250 [-0.0385, +0.0885]", "-0.0100 [-0.1371, +0.1171]"],
        ["KL to the reference, nats a dialogue", "–", "4.00", "4.00", "4.00",
         "+0.00 [+0.00, +0.00]", "+0.00 [+0.00, +0.00]"]]
    assert said == (
        "By lens: the judge prefers ppo to sft on 0.50 [-2.68, 3.68] / 0.50 [0.50, 0.50] / "
        "0.50 [-2.68, 3.68]; the reward models are right on 0.90 [0.90, 0.90] / "
        "0.80 [0.80, 0.80] / 0.70 [0.70, 0.70] of held-out pairs.")
    assert alone.splitlines()[0].startswith("| single, mean of seeds 1 | base |")
    assert alone.splitlines()[3].endswith("| 0.0300 | +0.0200 | -0.0200 |")
    assert "on 0.75 / 0.50 / 0.25; the reward models are right on 0.90" in said_alone
