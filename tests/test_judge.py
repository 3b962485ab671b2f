"""The judge: one packed pass equals ten prompts in float64; verdicts against hand counts."""
from __future__ import annotations

import pytest
import torch
from tiny import make_tiny_model

from virtue import VirtueError
from virtue.dialogue import encode_prompt
from virtue.ethics import LENSES, VIRTUES
from virtue.evaluation.feedback import versus, win_rates
from virtue.judge import (
    encode_questions,
    judge_log_odds,
    judge_pairs,
    label_ids,
    opinion,
    pack,
    preferred,
    questions,
    transcript,
    verdict,
)
from virtue.plumbing.loading import load_model, load_tokenizer
from virtue.evaluation.stats import wilson
from virtue.toy.words import WORDS


def pair(a: str, b: str, turns: int = 1) -> tuple[list[dict], list[dict]]:
    def talk(text):
        return [{"role": ("user", "assistant")[i % 2],
                 "content": text if i % 2 else f"question {i}?"} for i in range(2 * turns)]
    return talk(a), talk(b)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("judge"), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def tiny(folder):
    return load_model(folder), load_tokenizer(folder)


def test_packed_questions_equal_ten_separate_prompts(tiny, folder):
    """Against transformers in float64, a prompt a question: the labels' log-odds and mass."""
    from transformers import AutoModelForCausalLM
    model, tokenizer = tiny
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    pairs = [pair("I give it back.", "I keep the letter, and I say nothing of it."),
             pair("x", "yes yes", turns=2)]
    labels = list(label_ids(tokenizer, WORDS))
    for lens in ("action", "motivation"):
        odds, mass = judge_log_odds(model, tokenizer, WORDS, pairs, lens, batch_size=3)
        masses = []
        for i, (first, second) in enumerate(pairs):
            for order, shown in enumerate([(first, second), (second, first)]):
                for v, text in enumerate(questions(WORDS, *shown, lens)):
                    prompt = [{"role": "user", "content": text}]
                    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
                    with torch.no_grad():
                        logits = oracle(ids).logits[0, -1]
                    a, b = logits[labels].tolist()
                    masses.append(logits.softmax(0)[labels].sum().item())
                    expected = a - b if order == 0 else b - a
                    assert odds[i, order, v].item() == pytest.approx(expected, abs=2e-5)
        assert mass == pytest.approx(sum(masses) / len(masses), abs=1e-6)


def test_a_sliding_window_is_that_of_transformers_question_by_question(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(tmp_path, max_position_embeddings=4096, sliding_window=32)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    labels = list(label_ids(tokenizer, WORDS))
    pairs = [pair("I give it back.", "I keep the letter, and I say nothing of it."),
             pair("x", "yes yes", turns=2)]
    prefix, endings = encode_questions(tokenizer, WORDS, *pairs[0], "action")
    # the window reaches into the prefix
    assert 32 < len(prefix) and min(map(len, endings)) < 32 < sum(map(len, endings))
    probs, _ = judge_pairs(model, tokenizer, WORDS, pairs, "action", batch_size=3)
    for i, (first, second) in enumerate(pairs):
        for order, shown in enumerate([(first, second), (second, first)]):
            for v, text in enumerate(questions(WORDS, *shown, "action")):
                with torch.no_grad():
                    ids = encode_prompt(tokenizer, [{"role": "user", "content": text}])
                    logits = plain(torch.tensor([ids])).logits[0, -1, labels]
                first_better = logits.softmax(0)[order].item()
                assert probs[i, order, v].item() == pytest.approx(first_better, abs=1e-5)


def test_log_odds_keep_what_probabilities_round_away(tiny):
    """Log-odds of about 200 are p = 1 in fp32; the two orders' difference must survive."""
    model, tokenizer = tiny
    pairs = [pair("I give it back.", "I keep it.")]
    before, _ = judge_log_odds(model, tokenizer, WORDS, pairs, "action")
    a, _ = label_ids(tokenizer, WORDS)
    handle = model.lm_head.register_forward_hook(
        lambda module, given, logits: logits + 200 * (torch.arange(logits.shape[-1]) == a))
    after, mass = judge_log_odds(model, tokenizer, WORDS, pairs, "action")
    handle.remove()
    assert mass == pytest.approx(1) and (after[:, 0] > 150).all() and (after[:, 1] < -150).all()
    assert torch.allclose(after.mean(1), before.mean(1), atol=1e-4)  # what adds to a place cancels
    assert torch.allclose(opinion(after), opinion(before), atol=1e-4)


def test_each_batch_computes_the_batches_in_any_place_and_order(tiny):
    pairs = [
        pair("I give it back.", "I keep it."),
        pair("No.", "I say where the letter is."),
        pair("a", "b"),
    ]

    def backwards(compute, batches):
        return [compute(batch) for batch in list(batches)[::-1]][::-1]

    assert torch.equal(*(judge_log_odds(*tiny, WORDS, pairs, "action", 2, each_batch=run)[0]
                         for run in (map, backwards)))


def test_questions_share_their_prefix_and_name_the_virtue_last(tiny):
    first, second = pair("good", "bad")
    prefix, endings = encode_questions(tiny[1], WORDS, first, second, "action")
    text = tiny[1].decode(prefix)
    assert transcript(first) in text and transcript(second) in text
    assert not any(v in text for v in VIRTUES)
    assert all(v in tiny[1].decode(e) for v, e in zip(VIRTUES, endings, strict=True))


def test_other_questions_wordings_and_orders(tiny):
    model, tokenizer = tiny
    pairs = [pair("I give it back.", "I keep it."), pair("I ask.", "I wait for the answer.")]
    everything, _ = judge_log_odds(model, tokenizer, WORDS, pairs, "action",
                                   asked=(*VIRTUES, "helpfulness"))
    alone, _ = judge_log_odds(model, tokenizer, WORDS, pairs, "action", asked=("helpfulness",),
                              orders=1)
    five, _ = judge_log_odds(model, tokenizer, WORDS, pairs, "action")
    other, _ = judge_log_odds(model, tokenizer, WORDS, pairs, "action", wording="other")
    assert everything.shape == (2, 2, 6) and alone.shape == (2, 1, 1)
    assert torch.allclose(everything[:, :1, 5:], alone, atol=1e-5)
    assert torch.allclose(everything[..., :5], five, atol=1e-5)
    assert (other - five).abs().max() > 1e-3
    texts = questions(WORDS, *pairs[0], "action", ("honesty", "rules"), "other")
    assert "is honesty" in texts[0] and "fewer rules" in texts[1]


def test_win_rates_of_equal_models_are_ties(tiny):
    talks = [pair("I give it back.", "x")[0], pair("I ask.", "x")[0]]
    found = win_rates(*tiny, WORDS, talks, talks, "action", batch_size=4)
    assert [found[key] for key in ("rate", "low", "high", "pairs")] == pytest.approx(
        [0.5, *wilson(1, 2)[1:], 2])
    assert all(p == pytest.approx(0.5, abs=1e-6) for p in found["questions"].values())
    assert "sincerity" not in found["questions"]
    forth = win_rates(*tiny, WORDS, talks, talks[::-1], "action", batch_size=4)
    back = win_rates(*tiny, WORDS, talks[::-1], talks, "action", batch_size=4)
    honest, other = (found["questions"]["honesty"] for found in (forth, back))
    assert honest == pytest.approx(1 - other, abs=1e-5)


def test_answers_versus_another_are_judged_pair_by_pair_up_to_each_lens(tiny, monkeypatch):
    def talk(*answers):
        return [m for a in answers for m in ({"role": "user", "content": "What do you do?"},
                                             {"role": "assistant", "content": a})]
    answers = [[talk("I ask.", "Care.", "Trust."), talk("I lie.", "Gain.", "None.")],
               [talk("I give it back.", "Care.", "None."), talk("I wait.", "Fear.", "Doubt.")]]
    others = [talk("I keep it.", "Greed.", "Loss."), talk("I go.", "Peace.", "Rest.")]
    found, which = versus(*tiny, WORDS, answers, others, batch_size=3)
    assert found.shape == (2, 2) and which == [0, 1]  # prompts, answers
    for i in range(2):
        for c in range(2):
            sides = [(answers[c][i][:2 * k + 2], others[i][:2 * k + 2]) for k in range(3)]
            by_lens = [judge_log_odds(*tiny, WORDS, [pair], lens)[0][0].mean(0).sigmoid().mean()
                       for lens, pair in zip(LENSES, sides)]
            assert found[i, c] == pytest.approx(float(sum(by_lens)) / 3, abs=1e-5)
    monkeypatch.setattr(
        "virtue.evaluation.feedback.pair_fits",
        lambda model, tokenizer, words, first, second, lens: "I lie" not in first[1]["content"])
    # a prompt whose pairs do not all fit is left out
    assert versus(*tiny, WORDS, answers, others, batch_size=3)[1] == [0]
    monkeypatch.setattr("virtue.evaluation.feedback.pair_fits", lambda *_: False)
    none, which = versus(*tiny, WORDS, answers, others, batch_size=3)
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
        label_ids(tiny[1], WORDS)


def logit(p) -> torch.Tensor:
    p = torch.tensor(p, dtype=torch.float64)
    return (p / (1 - p)).log()


def test_verdict_by_hand():
    # odds of the first in both orders, multiplied and rooted:
    # 9, 4, 1/4, 3/2, 1/9 -> p .9 .8 .2 .6 .1
    odds = torch.tensor([[27.0, 4.0, 0.5, 0.5, 1 / 9], [3.0, 4.0, 0.125, 4.5, 1 / 9]]).log()
    said = verdict(odds)
    assert said["first_is_chosen"] and said["votes"] == 3 and said["position_flips"] == 1
    assert list(said["virtues"].values()) == pytest.approx([0.9, 0.8, 0.2, 0.6, 0.1], abs=1e-6)
    assert said["label"] == pytest.approx(2.6 / 5) and list(said["virtues"]) == list(VIRTUES)


def test_verdict_of_the_swapped_pair_is_its_mirror():
    for preference in ("votes", "mean"):
        odds = torch.randn(2, 5)
        odds[:, 2] = 0  # a tie stays one
        one, other = verdict(odds, preference), verdict(-odds, preference)
        assert {one.pop("first_is_chosen"), other.pop("first_is_chosen")} == {True, False}
        assert one.pop("virtues") == pytest.approx(other.pop("virtues"))
        assert one == pytest.approx(other)


def test_votes_and_mean_may_disagree():
    odds = logit([[0.55, 0.55, 0.55, 1e-9, 1e-9]] * 2)
    assert verdict(odds)["first_is_chosen"] and not verdict(odds, "mean")["first_is_chosen"]
    # the majority's choice may have a label below 1/2
    assert verdict(odds)["label"] == pytest.approx(0.33)
    assert verdict(odds, "mean")["votes"] == 2


def test_a_bias_that_adds_to_the_logits_of_a_place_cancels_exactly():
    opinions = torch.randint(-64, 65, (50, 1, 5)) / 16  # exact in fp32
    for bias in (0.0, 0.5, 3.0, 40.0):
        odds = torch.cat([opinions + bias, opinions - bias], 1)
        assert torch.equal(opinion(odds), opinion(opinions))
        for shown, bare in zip(odds, opinions):
            found, want = verdict(shown), verdict(bare)
            assert found == want | {"position_flips": found["position_flips"]}
            if bias == 40:
                assert found["position_flips"] == 5  # every answer went to the place
    # this is what averaged probabilities keep of it
    squeezed = torch.stack([opinions[:, 0] + 40, opinions[:, 0] - 40], 1).sigmoid().mean(1)
    assert (squeezed - 0.5).abs().max() < 1e-6 and (opinion(opinions) - 0.5).abs().max() > 0.4


def test_ties_vote_for_neither():
    places = torch.tensor([[2.0] * 5, [-2.0] * 5])  # knows places only
    odds = torch.tensor([0.0, 1e-6, -1e-6, 0.01, -0.01, 40.0])
    assert preferred(odds).tolist() == [0.5, 0.5, 0.5, 1, 0, 1]
    for said in (verdict(places), verdict(places, "mean"), verdict(-places)):
        assert said["first_is_chosen"] is None and said["votes"] == 0 and said["label"] == 0.5
        assert said["position_flips"] == 5
    none = torch.zeros(2, 5)
    # a tie takes no side
    assert verdict(none)["first_is_chosen"] is None and verdict(none)["position_flips"] == 0
    # where both sides have as many votes the mean decides
    for row, first, votes in (
            ([1.0, 0, 0, 0, 0], True, 1),  # one virtue, and four that tie
            ([3.0, -1.0, -0.5, 0, 0], False, 2), ([-0.1, -0.1, 0.2, 0, 0], False, 2),
            ([2.0, 2.0, -1.0, -1.0, 0], True, 2), ([0.5, 0.5, -1.0, -1.0, 0], False, 2)):
        for sign in (1, -1):
            said = verdict(sign * torch.tensor([row] * 2))
            assert said["first_is_chosen"] is (first == (sign == 1)) and said["votes"] == votes
    assert verdict(torch.tensor([[3.0, -1.0, -0.5, 0, 0]] * 2), "mean")["first_is_chosen"] is True


def test_one_order_measures_no_flips():
    said = verdict(torch.tensor([[2.0, 2.0, 2.0, -1.0, 0.0]]))
    assert said["first_is_chosen"] and said["votes"] == 3 and said["position_flips"] is None
