"""The words a model is asked in: the toy's, English, a constitution from a file; how the judge's
reply begins; and what depends on the model besides: defaults of flags, prompts."""
from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import CHAT_TEMPLATE, make_tiny_model, make_tiny_tokenizer

from virtue import VirtueError
from virtue.ethics import ENGLISH, LENSES, VIRTUES
from virtue.judge import judge_log_odds, label_ids, questions
from virtue.plumbing import flags
from virtue.plumbing.artefacts import write_manifest
from virtue.plumbing.loading import load_model, load_tokenizer, words_hash, words_of
from virtue.plumbing.records import SITUATIONS, load_prompts, with_system
from virtue.toy.words import WORDS

COURAGE = {"courage": {"asks": " be brave and stay ", "deficiency": "flee", "excess": "rush in"},
           "thrift": {"asks": "spend with care", "deficiency": "waste", "excess": "hoard"}}
NO_SPACE = CHAT_TEMPLATE.replace("' ' + message", "message")  # "[/INST]A": no space before a reply


def call(script: str, *argv) -> None:
    importlib.import_module(script).main([str(a) for a in argv])


def parse(script: str, *argv):
    return importlib.import_module(script).parse([str(a) for a in argv])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def constitution(folder: Path, content) -> Path:
    path = folder / "constitution.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base"), max_position_embeddings=4096)


# ---- the toy's words


def talk(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def test_the_toys_words_are_those_that_its_model_was_trained_on():
    """The digests were made with virtue/ethics.py of commit 609aa05, by its own templates."""
    asked = [text for wording in ("trained", "other") for lens in LENSES for text in questions(
        WORDS, talk("Hm?", "Yes."), talk("Hm?", "No."), lens,
        [*VIRTUES, "helpfulness", "sincerity", "rules"], wording)]
    assert len(asked) == 48
    assert digest(asked) == "d80df5ddfb61e047da0e7a9231806cdb3a9b3e6568015d004717001c8a961176"
    told = []
    for virtue, (asks, deficiency, excess) in WORDS.constitution.items():
        told += [WORDS.critique.format(virtue=virtue, asks=asks, deficiency=deficiency,
                                       excess=excess), WORDS.revision.format(virtue=virtue)]
    assert digest(told) == "a5fd671f322e9a46e0f787c6d1c7fb451b1de1b273af629de3e01962f5e11b1f"
    assert WORDS.reply == "" and WORDS.virtues == VIRTUES == ENGLISH.virtues


def test_which_model_gets_which_words(base, tmp_path):
    assert words_of("toy") == WORDS and words_of(base) == words_of("smollm2") == ENGLISH
    other = words_of("toy", constitution(tmp_path, COURAGE))
    assert other._replace(constitution=WORDS.constitution) == WORDS
    assert len({words_hash(words) for words in (WORDS, ENGLISH, other)}) == 3


# ---- --constitution


def test_a_constitution_of_a_file(tmp_path):
    words = words_of("smollm2", constitution(tmp_path, COURAGE))
    assert words.virtues == ("courage", "thrift")
    assert words.constitution == {"courage": ("be brave and stay", "flee", "rush in"),
                                  "thrift": ("spend with care", "waste", "hoard")}
    assert words._replace(constitution=ENGLISH.constitution) == ENGLISH


def changed(**fields) -> dict:
    """Courage's fields, some of them others (None: left out)."""
    told = {**COURAGE["courage"], **fields}
    return {"courage": {name: text for name, text in told.items() if text is not None}}


@pytest.mark.parametrize("content", [
    None, "", "{", "[]", "{}", "3", '"courage"', [COURAGE], {"courage": "be brave"},
    changed(excess=None), changed(more="x"), changed(asks=""), changed(asks=" \n"),
    changed(deficiency=3), {"courage": ["a", "b", "c"]}, {"": COURAGE["courage"]},
    {" ": COURAGE["courage"]}, *({name: COURAGE["courage"]} for name in ENGLISH.extra),
    COURAGE | changed(excess=None), "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass"),
    {f"virtue {i}": COURAGE["courage"] for i in range(21)}], ids=lambda c: repr(c)[:40])
def test_what_is_no_constitution(tmp_path, content):
    path = tmp_path / "constitution.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:  # no such file
        constitution(tmp_path, content)
    with pytest.raises(VirtueError, match="not a constitution") as error:
        words_of("toy", path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


@pytest.mark.parametrize("content", [changed(asks="be \ud800"), {"\ud800": COURAGE["courage"]}])
def test_half_of_a_surrogate_pair_is_no_text(tmp_path, content):
    with pytest.raises(VirtueError, match="not a constitution"):
        words_of("toy", constitution(tmp_path, content))


def test_preferences_by_a_constitution_of_two_virtues(base, tmp_path):
    """The names, and for each pair of one lens the probabilities, read from whole prompts."""
    path, out = constitution(tmp_path, COURAGE), tmp_path / "p"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What about {i}?"}) + "\n"
                               for i in range(24)))
    call("run_data", "preferences", "--model", base, "--out", out, "--prompts", prompts,
         "--constitution", path, "--limit", 4, "--max-new-tokens", 6, "--truncated", "keep",
         "--any-judge", "--max-prompt-tokens", 64)
    for lens in LENSES:
        records = lines(out / f"{lens}.jsonl")
        assert records
        for record in records:
            assert [*record["virtues"]] == ["courage", "thrift"]
            assert 0 <= record["votes"] <= 2 and 0 <= record["position_flips"] <= 2
            assert record["label"] == pytest.approx(sum(record["virtues"].values()) / 2)
    plain = whole(base)
    for record in lines(out / "motivation.jsonl"):
        sides = record["chosen"], record["rejected"]
        for virtue, asks in (("courage", "be brave and stay"), ("thrift", "spend with care")):
            a, b = (plain.odds(pair, "motivation", virtue, asks) for pair in (sides, sides[::-1]))
            expected = torch.tensor((a - b) / 2).sigmoid().item()
            assert record["virtues"][virtue] == pytest.approx(expected, abs=2e-5)
    manifest = json.loads((out / "virtue.json").read_text())
    assert manifest["base"]["virtues"] == "courage, thrift"
    assert manifest["base"]["words"] == words_hash(words_of(base, path))
    assert manifest["settings"]["constitution"] == str(path)
    call("run_eval", "judge", "--model", base, "--constitution", path, "--pairs",
         out / "motivation.jsonl", "--out", tmp_path / "j")
    shares = json.loads((tmp_path / "j/judge.json").read_text())["motivation"]["agreement"]
    records = lines(out / "motivation.jsonl")  # the same judge said how it chose them
    assert [*shares] == ["majority", "mean", "one_order", "courage", "thrift"]
    for virtue in COURAGE:
        right = [record["virtues"][virtue] > 0.5 for record in records]
        assert shares[virtue]["share"] == pytest.approx(sum(right) / len(right))
    again = ["--model", base, "--out", out, "--prompts", prompts, "--constitution", path, "--limit",
             4, "--max-new-tokens", 6, "--truncated", "keep", "--any-judge", "--max-prompt-tokens",
             64, "--resume"]
    call("run_data", "preferences", *again)  # it is finished
    constitution(tmp_path, COURAGE | changed(asks="be braver"))
    with pytest.raises(VirtueError, match="the file behind words"):
        call("run_data", "preferences", *again)


def test_a_dry_run_reads_the_constitution(tmp_path, capsys):
    path, out = constitution(tmp_path, COURAGE), tmp_path / "out"
    dry = ["run_data", "revisions", "--out", out, "--dry-run", "--constitution", path]
    call(*dry)
    assert f"reads constitution: {path}, courage, thrift\n" in capsys.readouterr().out
    constitution(tmp_path, changed(excess=None))
    with pytest.raises(VirtueError, match="not a constitution"):
        call(*dry)
    assert not out.exists()


# ---- a judge whose reply has begun


def whole(folder: Path):
    """Transformers in float64, a whole prompt at a time, with the reply's beginning in English."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = [tokenizer.convert_tokens_to_ids(token) for token in ("ĠA", "ĠB")]

    def next_token(pair, lens: str, virtue: str, asks: str) -> torch.Tensor:
        """Logits (V) after "I choose conversation"."""
        sides = ["\n".join(f"{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}"
                           for m in side) for side in pair]
        text = (f"Here are two conversations between a human and an assistant.\n\nConversation A:\n"
                f"{sides[0]}\n\nConversation B:\n{sides[1]}\n\n{ENGLISH.about[lens]} In which one "
                f"does the assistant show more {virtue}, which is to {asks}? Reply with one "
                "letter, A or B.")
        ids = tokenizer.encode(f"<s>[INST] {text}[/INST]", add_special_tokens=False)
        ids += tokenizer.encode(" I choose conversation", add_special_tokens=False)
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1]

    def odds(*asked) -> float:
        a, b = next_token(*asked)[labels].tolist()
        return a - b

    def mass(*asked) -> float:
        return next_token(*asked).softmax(0)[labels].sum().item()

    return SimpleNamespace(odds=odds, mass=mass)


def test_log_odds_after_the_beginning_of_a_reply(base):
    """English: each virtue's own prompt and the reply's words, both orders, and the label mass."""
    model, tokenizer, plain = load_model(base), load_tokenizer(base), whole(base)
    pairs = [(talk("What of it?", "I give it back."), talk("What of it?", "I keep it.")),
             (talk("a", "b", "c", "yes yes"), talk("a", "e", "c", "no"))]
    odds, mass = judge_log_odds(model, tokenizer, ENGLISH, pairs, "motivation", batch_size=3)
    assert odds.shape == (2, 2, 5)
    masses = []
    for i, pair in enumerate(pairs):
        for v, (virtue, (asks, *_)) in enumerate(ENGLISH.constitution.items()):
            first, second = (plain.odds(shown, "motivation", virtue, asks)
                             for shown in (pair, pair[::-1]))
            assert odds[i, 0, v].item() == pytest.approx(first, abs=2e-5)
            assert odds[i, 1, v].item() == pytest.approx(-second, abs=2e-5)
            masses += [plain.mass(shown, "motivation", virtue, asks)
                       for shown in (pair, pair[::-1])]
    assert mass == pytest.approx(sum(masses) / 20, abs=1e-6)


def test_labels_go_on_after_the_reply(tmp_path):
    make_tiny_tokenizer(tmp_path, template=NO_SPACE)
    tokenizer = load_tokenizer(tmp_path)
    first, second, spaced, other = tokenizer.convert_tokens_to_ids(["A", "B", "ĠA", "ĠB"])
    assert len({first, second, spaced, other}) == 4
    assert label_ids(tokenizer, WORDS) == (first, second)
    assert label_ids(tokenizer, ENGLISH) == (spaced, other)


def test_a_label_of_two_tokens_is_refused(tmp_path):
    make_tiny_tokenizer(tmp_path, vocab_size=262, template=NO_SPACE)  # bytes and hardly a merge
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(" A", add_special_tokens=False) == tokenizer.convert_tokens_to_ids(
        ["Ġ", "A"])
    assert label_ids(tokenizer, WORDS) == tuple(tokenizer.convert_tokens_to_ids(["A", "B"]))
    with pytest.raises(VirtueError, match="label 'A' is 2 tokens"):
        label_ids(tokenizer, ENGLISH)


# ---- flags


def earlier(folder: Path, stage: str, **settings) -> Path:
    """A folder with the virtue.json of an earlier stage, made with these settings."""
    folder.mkdir(parents=True)
    extra = {"lens": "action", "score_mean": 0.0, "score_std": 1.0} if stage == "rm" else {}
    write_manifest(folder, stage=stage, base={"id": "x"}, template="", parents={}, seed=0,
                   settings=settings, extra=extra)
    return folder


def test_defaults_of_the_toy_and_of_other_models(base):
    """For both commands: temperature, new tokens, prompts; the command line wins."""
    def found(*argv):
        args = parse("run_data", *argv, "--out", "x")
        return args.temperature, args.max_new_tokens, args.prompts

    for command in ("revisions", "preferences"):
        assert found(command) == found(command, "--model", "toy") == (1.0, 64, "toy")
        assert found(command, "--model", "smollm2") == (0.6, 128, "situations")
        assert found(command, "--model", base) == (0.6, 128, "situations")
        assert found(command, "--model", base, "--temperature", 1, "--max-new-tokens", 64,
                     "--prompts", "toy") == (1.0, 64, "toy")  # the toy's own values, too
        assert found(command, "--prompts", "a.jsonl") == (1.0, 64, "a.jsonl")
    assert found("revisions") == (1.0, 64, "toy")  # nothing stays from the call before


@pytest.mark.parametrize(("script", "flag", "stage", "toy", "real"), [
    ("run_sft", "--data", "revisions", 1e-3, 1e-4),
    ("run_rm", "--data", "preferences", 2e-3, 1e-4),
    ("run_ppo", "--rm", "rm", 2e-3, 1e-5)])
def test_learning_rates_of_the_toy_and_of_other_models(tmp_path, script, flag, stage, toy, real):
    def found(folder: Path, *argv):
        inside = folder / "action" if stage == "rm" else folder
        earlier(inside, stage, model=folder.name)
        return parse(script, flag, folder, "--out", "x", *argv)

    assert found(tmp_path / "toy").lr == toy
    assert found(tmp_path / "smollm2").lr == real  # the model was inherited
    assert parse(script, flag, tmp_path / "smollm2", "--out", "x", "--lr", toy).lr == toy
    assert parse(script, flag, tmp_path / "toy", "--out", "x", "--model", "other").lr == real
    if script == "run_ppo":
        assert parse(script, flag, tmp_path / "toy", "--out", "x").value_lr == 4e-3
        assert parse(script, flag, tmp_path / "smollm2", "--out", "x").value_lr == 1e-4


def test_what_an_earlier_stage_says_wins_over_the_models_defaults(tmp_path):
    """Temperature 1 is the toy's default, and here a decision about another model."""
    told = earlier(tmp_path / "told", "sft", model="smollm2", temperature=1.0, max_new_tokens=33,
                   constitution=None)
    args = parse("run_data", "preferences", "--sft", told, "--out", "x")
    assert (args.model, args.temperature, args.max_new_tokens) == ("smollm2", 1.0, 33)
    assert args.prompts == "situations" and args.constitution is None  # said nothing of them
    args = parse("run_data", "preferences", "--sft", told, "--out", "x", "--temperature", 0.8)
    assert (args.temperature, args.max_new_tokens) == (0.8, 33)
    on_toy = earlier(tmp_path / "toy", "sft", model="toy")
    args = parse("run_data", "preferences", "--sft", on_toy, "--out", "x")
    assert (args.temperature, args.max_new_tokens, args.prompts) == (1.0, 64, "toy")


def test_a_system_message_and_a_constitution_are_inherited(tmp_path):
    """From stage to stage, by those too that have no such flag of their own; a flag wins."""
    said = dict(model="toy", system="Be brief.", constitution="virtues.json")
    for stage in ("revisions", "sft", "preferences", "policy"):
        earlier(tmp_path / stage, stage, **said, rm=str(tmp_path / "rm"))
    earlier(tmp_path / "rm/action", "rm", **said)
    for script, *argv in (
            ("run_sft", "--data", tmp_path / "revisions"),
            ("run_data", "preferences", "--sft", tmp_path / "sft"),
            ("run_rm", "--data", tmp_path / "preferences"), ("run_ppo", "--rm", tmp_path / "rm"),
            ("run_eval", "models", "--policy", tmp_path / "policy"),
            ("run_eval", "best-of-n", "--rm", tmp_path / "rm"),
            ("run_eval", "chat", "--policy", tmp_path / "policy")):
        out = [] if "chat" in argv else ["--out", "x"]
        args = parse(script, *argv, *out)
        assert args.system == "Be brief." and str(args.constitution) == "virtues.json", argv
        if script in ("run_data", "run_ppo") or argv[0] in ("models", "best-of-n"):
            assert parse(script, *argv, *out, "--system", "Be kind.").system == "Be kind."


def test_parse_with_parent_by_itself(tmp_path):
    def found(*argv):
        parser = flags.make_parser("x")
        flags.add_common_flags(parser)
        flags.add_sampling_flags(parser)
        parser.add_argument("--data", type=Path)
        return flags.parse_with_parent(parser, ["--out", "x", *map(str, argv)], "sft", "data")

    told = earlier(tmp_path / "sft", "sft", model="smollm2", temperature=0.25)
    for argv, temperature, new in [
            ([], 1.0, 64), (["--model", "m"], 0.6, 128), (["--data", told], 0.25, 128),
            (["--data", told, "--model", "toy"], 0.25, 64),
            (["--data", told, "--temperature", 2], 2.0, 128)]:
        args = found(*argv)
        assert (args.temperature, args.max_new_tokens) == (temperature, new), argv
    parser = flags.make_parser("x")
    with pytest.raises(KeyError):
        flags.on_real_models(parser, no_such_flag=1)


def helped(capsys, script: str, *command: str) -> str:
    with pytest.raises(SystemExit) as end:
        parse(script, *command, "--help")
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("script", "said"), [
    ("run_sft", "(default: 0.001 on the toy, else 0.0001)"),
    ("run_rm", "(default: 0.002 on the toy, else 0.0001)"),
    ("run_ppo", "(default: 0.002 on the toy, else 1e-05)"),
    ("run_ppo", "(default: 0.004 on the toy, else 0.0001)")])
def test_help_shows_both_learning_rates(capsys, script, said):
    assert said in helped(capsys, script)


@pytest.mark.parametrize("command", ["revisions", "preferences"])
def test_help_shows_both_values_beside_what_is_inherited(capsys, command):
    text = helped(capsys, "run_data", command)
    for both in ("1.0 on the toy, else 0.6", "64 on the toy, else 128",
                 "toy on the toy, else situations"):
        assert both in text


# ---- prompts


def test_situations():
    """400 lines in four disjoint splits; every one is a message of a person, not a fragment."""
    texts = SITUATIONS.read_text(encoding="utf-8").splitlines()
    assert len(texts) == len({text.lower() for text in texts}) == 400
    found = {}
    for part, low, high in (("sft", 0, 0.25), ("rm", 0.25, 0.6), ("ppo", 0.6, 0.9),
                            ("eval", 0.9, 1)):
        for record in load_prompts("situations", part):
            (message,) = record["prompt"]
            canonical = f'[{{"content":{json.dumps(message["content"])},"role":"user"}}]'
            assert message["role"] == "user"
            assert record["id"] == hashlib.sha256(canonical.encode()).hexdigest()[:16]
            assert low <= int(record["id"], 16) / 16 ** 16 < high
            assert record["id"] not in found
            found[record["id"]] = message["content"]
    assert sorted(found.values()) == sorted(texts)
    for text in texts:
        assert 8 <= len(text.split()) <= 40, text
        assert text[-1] in ".?" and text == text.strip(), text
    few = load_prompts("situations", "rm", 3)
    assert few == load_prompts("situations", "rm")[:3]


def test_a_system_message_for_prompts_that_have_none():
    bare = {"id": "0123456789abcdef", "prompt": talk("Hm?")}
    own = {"id": "f" * 16, "prompt": [{"role": "system", "content": "Mine."}, *talk("Hm?")]}
    told = with_system(bare, "Be brief.")
    assert told == {"id": bare["id"], "prompt": [{"role": "system", "content": "Be brief."},
                                                 *talk("Hm?")]}
    assert bare["prompt"] == talk("Hm?")  # a copy was made
    assert with_system(own, "Be brief.") == own
    assert with_system(bare, None) == with_system(bare, "") == bare
    plain, given = (load_prompts("situations", "eval", 5, system) for system in (None, "Be brief."))
    assert [p["id"] for p in plain] == [p["id"] for p in given]  # so the split is the same
    assert all(g["prompt"] == [{"role": "system", "content": "Be brief."}, *p["prompt"]]
               for p, g in zip(plain, given))
