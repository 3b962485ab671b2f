"""The chat: what it prints are the scores of the very dialogue, /why is a branch,
Ctrl-C and bad input end nothing but the answer."""
from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import virtue.generate
import virtue.plumbing.loading
from virtue import VirtueError
from virtue.evaluation.chat import HELP, TOY_QUESTION, chat, columns
from virtue.plumbing.artefacts import save_artifact
from virtue.dialogue import encode_conversation
from virtue.ethics import FOLLOW_UPS, LENSES
from virtue.lora import adapter_parameters, add_adapter, use_stack
from virtue.models import ScalarHead, score_at
from virtue.plumbing.loading import open_base
from virtue.toy.grammar import prompts as toy_prompts

MOTIVATION, CONSEQUENCE = FOLLOW_UPS.values()


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A policy upon SFT and three reward models on the toy base, random, saved as by the stages."""
    out = tmp_path_factory.mktemp("chat")
    args = Namespace(model="toy", quantize="none", dtype="fp32", device="cpu", threads=1, seed=0,
                     policy=out / "policy", sft=out / "sft", rm=out / "rm",
                     max_new_tokens=24, max_prompt_tokens=100, temperature=1.0, batch_size=4)
    base = open_base(args)
    heads = {}
    for seed, (name, folder, stage) in enumerate(
            (("sft", args.sft, "sft"), *((lens, args.rm / lens, "rm") for lens in LENSES),
             ("policy", args.policy, "policy"))):
        folder.mkdir(parents=True)
        add_adapter(base.model, name, rank=4, alpha=8, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter_parameters(base.model, name):
            parameter.data = torch.randn(parameter.shape,
                                         generator=generator) * (0.1 if stage == "policy" else 0.03)
        heads[name] = (ScalarHead(base.model.config.hidden_size, seed=seed)
                       if stage == "rm" else None)
        extra = ({"lens": name, "score_mean": 0.5 * seed, "score_std": 1.0 + seed}
                 if stage == "rm" else {})
        save_artifact(folder, stage=stage, model=base.model, adapter=name, head=heads[name],
                      base=base.info, template=base.template, parents={"sft": args.sft}
                      if name != "sft" else {}, seed=0, settings={"rm": args.rm}, extra=extra)
    return args, base, heads


@pytest.fixture
def talk(chain, monkeypatch, capsys):
    """talk(*lines) -> what the program prints, when a person types the lines;
    an exception among them is raised at the prompt."""
    def run(*lines, **changes):
        typed = iter(lines)

        def read(prompt):
            line = next(typed)
            if isinstance(line, type):
                raise line
            return line
        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setenv("COLUMNS", "240")
        chat(Namespace(**{**vars(chain[0]), **changes}))
        assert next(typed, None) is None  # all was read
        return capsys.readouterr().out
    return run


@pytest.fixture
def said(chain, monkeypatch):
    """Both models say what is put into this list, word for word; a class is raised.
    Rows that they were given are in `said.rows`."""
    class Said(list):
        rows: list[list[int]] = []
    said, tokenizer = Said(), chain[1].tokenizer
    said.rows = []

    def sample(model, rows, uniforms, **kwargs):
        said.rows.append(rows[0])
        text = said.pop(0)
        if isinstance(text, type):
            raise text
        return [(tokenizer.encode(" " + text, add_special_tokens=False)
                 + [tokenizer.eos_token_id] * (not text.endswith("...")), text.endswith("..."))]
    monkeypatch.setattr(virtue.generate, "sample", sample)
    return said


def numbers(text):
    """All printed rewards, in the order of the page: [(lens, score, whether in brackets)]."""
    return [(lens, float(score), bracket == "(") for bracket, lens, score in re.findall(
        r"(\(?)(action|motivation|consequence) ([+-]\d+\.\d\d)", text)]


@torch.no_grad()
def rewards(chain, *texts):
    """The same by another way: each reward model at the end of the messages, tokenised anew."""
    _, base, heads = chain
    messages = [{"role": ("user", "assistant")[i % 2], "content": text}
                for i, text in enumerate(texts)]
    ids = torch.tensor([encode_conversation(base.tokenizer, messages)[0]])
    found = []
    for k, lens in enumerate(LENSES, 1):
        with use_stack(base.model, "sft", lens):
            score = score_at(base.model, heads[lens], ids, torch.ones_like(ids),
                             torch.tensor([[ids.shape[1] - 1]])).item()
        found.append((score - 0.5 * k) / (1.0 + k))
    return found


def check(found, expected, lens):
    assert [name for name, *_ in found] == [*LENSES]
    assert [score for _, score, _ in found] == pytest.approx(expected, abs=0.006)
    # only the lens that was trained to read this turn has no brackets
    assert [name for name, _, bracket in found if not bracket] == [lens]


def test_rewards_are_those_of_the_dialogue_so_far(chain, talk, said):
    said += ["I give it back.", "I keep it.", "Honesty.", "Greed.", "It makes me honest.",
             "It makes me cold.", "Yes.", "No."]
    out = talk("What about the letter?", "/why", "", "And the dog?", "/quit")
    found = numbers(out)
    assert len(found) == 4 * 2 * 3
    base = (rewards(chain, "What about the letter?", "I give it back."),
            rewards(chain, "What about the letter?", "I keep it."))
    check(found[0:3], base[0], "action")
    check(found[3:6], base[1], "action")
    check(found[6:9],
          rewards(chain, "What about the letter?", "I give it back.", MOTIVATION, "Honesty."),
          "motivation")
    check(found[15:18], rewards(chain, "What about the letter?", "I keep it.", MOTIVATION, "Greed.",
                                CONSEQUENCE, "It makes me cold."),
          "consequence")
    check(found[18:21],
          rewards(chain, "What about the letter?", "I give it back.", "And the dog?", "Yes."),
          "action")  # /why left no trace
    assert abs(base[0][0] - base[1][0]) > 0.05
    places = [out.index(t) for t in (MOTIVATION, "Honesty.", CONSEQUENCE, "It makes me honest.")]
    assert places == sorted(places)
    first = next(line for line in out.splitlines() if "I give it back." in line)
    assert first.index("I give it back.") < first.index("I keep it.")  # side by side: base, tuned


def test_new_forgets(talk, said):
    said += ["a.", "b.", "c.", "d."]
    talk("What about the letter?", "/new", "/why", "What about the letter?", "/quit")
    assert said.rows[0] == said.rows[1] == said.rows[2] == said.rows[3] and not said


def test_a_system_message_begins_every_conversation(chain, talk, said):
    tokenizer = chain[1].tokenizer
    said += ["a.", "b.", "c.", "d.", "e.", "f."]
    talk("One?", "Two?", "/new", "Three?", "/quit", system="Be kind.")
    begun = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "One?"}],
        add_generation_prompt=True, return_dict=False)
    assert said.rows[0] == said.rows[1] == begun
    told = [tokenizer.decode(row).count("Be kind.") for row in said.rows]
    assert told == [1] * 6  # once, at the beginning; after /new again
    said += ["a.", "b."]
    talk("One?", "/quit")
    assert "Be kind." not in tokenizer.decode(said.rows[6])


def test_the_system_message_counts_among_the_prompts_tokens(chain, talk, said):
    said += ["a.", "b."]
    told = "longer than --max-prompt-tokens 100"
    assert told not in talk("word " * 60, "/quit")
    assert told in talk("word " * 60, "/quit", system="word " * 60)


def test_ctrl_c_ends_an_answer_and_then_the_program(talk, said):
    said += ["a.", "b.", "c.", KeyboardInterrupt, "e.", "f."]
    out = talk("One?", "Two?", "Two?", KeyboardInterrupt)
    assert "stopped; the question is forgotten" in out and out.endswith("bye\n")
    assert len(numbers(out)) == 2 * 2 * 3
    # asked again as if for the first time
    assert said.rows[4] == said.rows[2] and said.rows[5] == said.rows[3]
    assert talk(EOFError).endswith("bye\n")


def test_the_toy_says_what_it_knows(talk):
    assert TOY_QUESTION in {p["prompt"][0]["content"] for p in toy_prompts()}
    assert TOY_QUESTION in talk("/quit")
    assert TOY_QUESTION not in talk("/quit", model=str(Path(virtue.__file__).parent / "toy/model"))


def test_what_cannot_be_answered_ends_nothing(chain, talk, said):
    said += ["a.", "b."]
    out = talk("/why", "/what", "word " * 101, "One\udcff?", "/quit")
    assert "there is no answer yet" in out and out.count(HELP) == 2
    assert "longer than --max-prompt-tokens 100" in out and len(numbers(out)) == 6


def test_a_conversation_that_fills_the_context_is_told(talk, said, monkeypatch):
    def small(args):
        base = open_base(args)
        base.model.config.max_position_embeddings = 400
        return base
    monkeypatch.setattr(virtue.plumbing.loading, "open_base", small)
    said += ["a..."] * 20  # cut answers: an EOS is forced after each
    out = talk(*["word " * 90] * 5, "/new", "One?", "/quit")
    assert out.count("too long for the model: /new") == 2 and "a... ..." in out
    assert len(said) == 20 - 2 * (3 + 1)
    assert 250 < max(map(len, said.rows)) <= 400 - 24


def test_real_answers_differ_and_are_drawn_again_from_the_same_seed(talk):
    """Nothing is put into the models' mouths here."""
    first, again, other = (talk("Lena lost the letter. What do you do?", "/why", "/quit", seed=seed)
                           for seed in (3, 3, 4))
    assert first == again != other and len(numbers(first)) == 18
    found = numbers(first)
    assert [score for _, score, _ in found[:3]] != [score for _, score, _ in found[3:6]]


def test_a_policy_upon_another_sft_adapter_is_refused(chain, talk, tmp_path):
    base = open_base(chain[0])
    parents, args = {}, dict(sft=tmp_path / "sft", rm=tmp_path / "rm")  # in order among themselves
    for name, folder, stage in (("sft", args["sft"], "sft"),
                                *((lens, args["rm"] / lens, "rm") for lens in LENSES)):
        folder.mkdir(parents=True)
        add_adapter(base.model, name, rank=4, alpha=8, seed=9)
        head = ScalarHead(base.model.config.hidden_size, seed=9) if stage == "rm" else None
        save_artifact(folder, stage=stage, model=base.model, adapter=name, head=head,
                      base=base.info, template=base.template, parents=parents, seed=9, settings={},
                      extra={"lens": name, "score_mean": 0.0, "score_std": 1.0}
                      if stage == "rm" else {})
        parents = parents or {"sft": folder}
    with pytest.raises(VirtueError, match="sft"):
        talk("/quit", **args)


def test_the_command_takes_what_the_policy_was_made_with(chain, monkeypatch):
    import run_eval
    seen = []
    monkeypatch.setattr("virtue.evaluation.chat.chat", seen.append)
    args = chain[0]
    run_eval.main(["chat", "--policy", str(args.policy), "--max-new-tokens", "7"])
    assert (seen[0].policy, seen[0].max_new_tokens, seen[0].rm) == (args.policy, 7, args.rm)
    assert not hasattr(seen[0], "out")


def test_columns():
    shown = columns({"base": "one two three four five six\nx", "tuned": "\x1b[2J"}, 44)
    assert shown.splitlines() == ["base                  tuned", "one two three four    \\x1b[2J",
                                  "five six", "x"]
