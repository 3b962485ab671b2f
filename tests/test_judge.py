"""The judge: one packed pass equals ten separate prompts; verdicts against counting by hand."""
from __future__ import annotations

import pytest
import torch
from tiny import make_tiny_model

from virtue import VirtueError
from virtue.dialogue import encode_prompt
from virtue.ethics import LENSES, VIRTUES
from virtue.feedback import versus, win_rates
from virtue.judge import encode_questions, judge_pairs, label_ids, pack, questions, transcript, verdict
from virtue.models import hidden_states, load_model, load_tokenizer
from virtue.stats import wilson


def pair(a: str, b: str, turns: int = 1) -> tuple[list[dict], list[dict]]:
    def talk(text):
        return [{"role": ("user", "assistant")[i % 2], "content": text if i % 2 else f"question {i}?"} for i in range(2 * turns)]
    return talk(a), talk(b)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("judge"), max_position_embeddings=4096)
    return load_model(folder), load_tokenizer(folder)


def test_its_bar_ends(tiny, capsys):
    judge_pairs(*tiny, [pair("a", "b")] * 5, "action", batch_size=4)
    assert "judge action: 100%" in capsys.readouterr().err.splitlines()[-1]


def test_packed_questions_equal_ten_separate_prompts(tiny):
    model, tokenizer = tiny
    pairs = [pair("I give it back.", "I keep the letter, and I say nothing of it."), pair("x", "yes yes", turns=2)]
    labels = list(label_ids(tokenizer))
    for lens in ("action", "motivation"):
        probs, mass = judge_pairs(model, tokenizer, pairs, lens, batch_size=3)
        masses = []
        for i, (first, second) in enumerate(pairs):
            for order, shown in enumerate([(first, second), (second, first)]):
                for v, text in enumerate(questions(*shown, lens)):
                    ids = torch.tensor([encode_prompt(tokenizer, [{"role": "user", "content": text}])])
                    with torch.no_grad():
                        logits = model.lm_head(hidden_states(model, ids, torch.ones_like(ids))[0, -1])
                    p = logits[labels].softmax(0)[0]
                    masses.append(logits.softmax(0)[labels].sum().item())
                    assert probs[i, order, v].item() == pytest.approx((p if order == 0 else 1 - p).item(), abs=1e-5)
        assert mass == pytest.approx(sum(masses) / len(masses), abs=1e-6)


def test_a_sliding_window_is_that_of_transformers_question_by_question(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(tmp_path, max_position_embeddings=4096, sliding_window=32)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    plain, labels = AutoModelForCausalLM.from_pretrained(folder).eval(), list(label_ids(tokenizer))
    pairs = [pair("I give it back.", "I keep the letter, and I say nothing of it."), pair("x", "yes yes", turns=2)]
    prefix, endings = encode_questions(tokenizer, *pairs[0], "action")
    assert 32 < len(prefix) and min(map(len, endings)) < 32 < sum(map(len, endings))  # it reaches into the prefix
    probs, _ = judge_pairs(model, tokenizer, pairs, "action", batch_size=3)
    for i, (first, second) in enumerate(pairs):
        for order, shown in enumerate([(first, second), (second, first)]):
            for v, text in enumerate(questions(*shown, "action")):
                with torch.no_grad():
                    logits = plain(torch.tensor([encode_prompt(tokenizer, [{"role": "user", "content": text}])])).logits[0, -1]
                p = logits[labels].softmax(0)[0]
                assert probs[i, order, v].item() == pytest.approx((p if order == 0 else 1 - p).item(), abs=1e-5)


def test_questions_share_their_prefix_and_name_the_virtue_last(tiny):
    first, second = pair("good", "bad")
    prefix, endings = encode_questions(tiny[1], first, second, "action")
    text = tiny[1].decode(prefix)
    assert transcript(first) in text and transcript(second) in text and not any(v in text for v in VIRTUES)
    assert all(v in tiny[1].decode(e) for v, e in zip(VIRTUES, endings, strict=True))


def test_other_questions_wordings_and_orders(tiny):
    model, tokenizer = tiny
    pairs = [pair("I give it back.", "I keep it."), pair("I ask.", "I wait for the answer.")]
    everything, _ = judge_pairs(model, tokenizer, pairs, "action", asked=(*VIRTUES, "helpfulness"))
    alone, _ = judge_pairs(model, tokenizer, pairs, "action", asked=("helpfulness",), orders=1)
    five, _ = judge_pairs(model, tokenizer, pairs, "action")
    other, _ = judge_pairs(model, tokenizer, pairs, "action", wording="other")
    assert everything.shape == (2, 2, 6) and alone.shape == (2, 1, 1)
    assert torch.allclose(everything[:, :1, 5:], alone, atol=1e-5) and torch.allclose(everything[..., :5], five, atol=1e-5)
    assert (other - five).abs().max() > 1e-3
    texts = questions(*pairs[0], "action", ("honesty", "rules"), "other")
    assert "is honesty" in texts[0] and "fewer rules" in texts[1]


def test_win_rates_of_equal_models_are_ties(tiny):
    talks = [pair("I give it back.", "x")[0], pair("I ask.", "x")[0]]
    found = win_rates(*tiny, talks, talks, "action", batch_size=4)
    assert [found[key] for key in ("rate", "low", "high", "pairs")] == pytest.approx([0.5, *wilson(1, 2)[1:], 2])
    assert all(p == pytest.approx(0.5, abs=1e-6) for p in found["questions"].values()) and "sincerity" not in found["questions"]
    forth = win_rates(*tiny, talks, talks[::-1], "action", batch_size=4)
    back = win_rates(*tiny, talks[::-1], talks, "action", batch_size=4)
    assert forth["questions"]["honesty"] == pytest.approx(1 - back["questions"]["honesty"], abs=1e-5)


def test_answers_versus_another_are_judged_pair_by_pair_up_to_each_lens(tiny, monkeypatch):
    def talk(*answers):
        return [m for a in answers for m in ({"role": "user", "content": "What do you do?"}, {"role": "assistant", "content": a})]
    answers = [[talk("I ask.", "Care.", "Trust."), talk("I lie.", "Gain.", "None.")], [talk("I give it back.", "Care.", "None."), talk("I wait.", "Fear.", "Doubt.")]]
    others = [talk("I keep it.", "Greed.", "Loss."), talk("I go.", "Peace.", "Rest.")]
    found, which = versus(*tiny, answers, others, batch_size=3)
    assert found.shape == (2, 2) and which == [0, 1]  # prompts, answers
    for i in range(2):
        for c in range(2):
            by_lens = [judge_pairs(*tiny, [(answers[c][i][:2 * k + 2], others[i][:2 * k + 2])], lens)[0].mean() for k, lens in enumerate(LENSES)]
            assert found[i, c] == pytest.approx(float(sum(by_lens)) / 3, abs=1e-5)
    monkeypatch.setattr("virtue.feedback.pair_fits", lambda model, tokenizer, first, second, lens: "I lie" not in first[1]["content"])
    assert versus(*tiny, answers, others, batch_size=3)[1] == [0]  # a prompt whose pairs do not all fit is left out
    monkeypatch.setattr("virtue.feedback.pair_fits", lambda *_: False)
    none, which = versus(*tiny, answers, others, batch_size=3)
    assert none.shape == (0, 2) and which == []


def test_an_ending_sees_the_prefix_and_itself_only():
    ids, mask, positions, ends = pack([([5, 6], [[7], [8, 9]]), ([5], [[6], [7]])], pad_id=0)
    assert ids.tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]]
    assert positions[0].tolist() == [0, 1, 2, 2, 3] and ends.tolist() == [[2, 4], [1, 2]]
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    assert mask[0, 0].int().tolist() == expected


def test_labels_must_be_single_tokens(tiny, monkeypatch):
    monkeypatch.setattr("virtue.judge.JUDGE_LABELS", ("First", "Second"))
    with pytest.raises(VirtueError, match="JUDGE_LABELS"):
        label_ids(tiny[1])


def test_verdict_by_hand():
    # virtues by first order and second order; means: .9 .8 .3 .6 .2 -> votes 3 of 5 for the first, mean .56
    probs = torch.tensor([[0.9, 0.9, 0.4, 0.4, 0.1], [0.9, 0.7, 0.2, 0.8, 0.3]])
    said = verdict(probs)
    assert said["first_is_chosen"] and said["votes"] == 3 and said["position_flips"] == 1
    assert said["label"] == pytest.approx(0.56) and said["virtues"]["compassion"] == pytest.approx(0.3)


def test_verdict_of_the_swapped_pair_is_its_mirror():
    probs = torch.rand(2, 5)
    one, other = verdict(probs), verdict(1 - probs)
    assert one.pop("first_is_chosen") != other.pop("first_is_chosen")
    assert one.pop("virtues") == pytest.approx(other.pop("virtues")) and one == pytest.approx(other)


def test_votes_and_mean_may_disagree():
    probs = torch.tensor([[0.55, 0.55, 0.55, 0.0, 0.0]] * 2)
    assert verdict(probs)["first_is_chosen"] and not verdict(probs, "mean")["first_is_chosen"]
    assert verdict(probs)["label"] == pytest.approx(0.33)  # the majority's choice may have a label below 1/2
