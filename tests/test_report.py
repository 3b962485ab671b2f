"""The evaluation's and the feedback's reports against hand counts; flags handed on."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from virtue import VirtueError
from virtue.evaluation import feedback
from virtue.dialogue import Dialogue, Turn
from virtue.plumbing.records import read_dialogues
from virtue.ethics import ENGLISH, LENSES, VIRTUES
from virtue.evaluation.feedback import (
    agreement,
    coin_test,
    doubts,
    gold_agreement,
    points,
    summarize,
    truth,
    virtue_agreement,
    win_rates,
    worth,
)
from virtue.evaluation.stats import wilson
from virtue.evaluation.report import (
    command_line, correct, curve_of, differences, distinct_share, made_by, mask_names, measure,
    reward_model_facts, run_away, same_pairs, side_by_side, table, warnings_of)
from virtue.plumbing.flags import add_common_flags, make_parser, parse_with_parent


def test_measure_by_hand():
    d = Dialogue("0" * 16, [], list(range(12)),
                 (Turn(1, 3, False), Turn(4, 6, True), Turn(7, 11, False)))  # 8 sampled tokens
    texts = [["a", "x", "p"], ["a", "y", "p"]]
    raw = np.array([[0.0, 2.0], [4.0, 6.0], [8.0, 10.0]])
    column = measure([d, d], texts, raw, raw / 2, np.array([1.0, 3.0]),
                     np.array([-8 * np.log(2), -8 * np.log(8)]))
    # the squared deviations are 25 9 1 1 9 25
    assert column["study_score"] == pytest.approx(5 - 0.5 * np.sqrt(35 / 3))
    assert column["reward/motivation"] == 2.5 and column["kl"] == 2.0 and column["length"] == 8.0
    assert column["ended"] == pytest.approx(2 / 3)
    assert column["perplexity"] == pytest.approx(4.0)  # the geometric mean of 2 and 8
    assert [column[f"distinct/{lens}"] for lens in LENSES] == [0.5, 1.0, 0.5]
    assert "gold" not in column and "perplexity" in table({"base": column})
    assert distinct_share(["a", "b", "a", "a"]) == 0.5


def test_masking_names_shows_the_stock_phrase():
    texts = [["I help Mia.", "Mia and the map.", ""], ["I help Ben.", "Ben and the map.", ""]]
    slots = [("Mia", "map"), ("Ben", "cake")]
    assert mask_names(texts, slots) == [["I help {p}.", "{p} and the {t}.", ""],
                                        ["I help {p}.", "{p} and the map.", ""]]


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    before = {"raw": rng.normal(size=(3, 50)), "gold": rng.normal(size=50),
              "eval": rng.normal(size=(3, 50))}
    before["standardised"] = before["raw"]
    # every prompt gains the same, so there is no spread
    after = {name: value + 0.25 for name, value in before.items()}
    before["length"], after["length"] = rng.normal(60, 5, 50), rng.normal(70, 5, 50)
    found = differences(before, after, 0)
    assert all((f["difference"], f["low"], f["high"]) == pytest.approx((0.25, 0.25, 0.25))
               for f in found.values())
    assert found["gold"]["p"] < 0.01 and "p" not in found["study_score"]
    assert "gold, at equal length" in found and "eval_reward/action" in found
    correct({"a": found, "b": differences(before, after, 0)})
    assert found["gold"]["p_holm"] == pytest.approx(14 * found["gold"]["p"])
    assert "p_holm" not in found["study_score"]  # twice seven rows, all of one p


def test_a_gain_that_length_explains_is_none_at_equal_length():
    rng = np.random.default_rng(1)
    before = {"raw": rng.normal(size=(3, 80)), "gold": None, "length": rng.normal(60, 5, 80)}
    longer = rng.normal(10, 4, 80)
    after = {"raw": before["raw"] + 0.05 * longer, "gold": None,
             "length": before["length"] + longer}
    for side in (before, after):
        side["standardised"] = side["raw"]
    found = differences(before, after, 0)
    assert found["reward/action"]["low"] > 0.3
    assert found["mean reward, at equal length"]["difference"] == pytest.approx(0, abs=1e-9)


def test_curve_by_hand():
    def line(i, kl, scores, gold):
        return {"iteration": i, "kl": kl, "scores": scores, "prompt": "p",
                "turns": dict.fromkeys(LENSES, gold)}
    lines = [line(2, 3.0, [1, 2, 3], "0.5"), line(1, 0.0, [0, 0, 0], "0.25"),
             line(2, 5.0, [1, 1, 1], "1.0")]

    class Found:
        def __init__(self, overall):
            self.overall = overall
    curve = curve_of(lines, lambda prompt, turns: Found(float(turns[0])))
    assert curve == [{"iteration": 1, "kl": 0.0, "proxy": 0.0, "gold": 0.25, "kept": False},
                     {"iteration": 2, "kl": 4.0, "proxy": 1.5, "gold": 0.75, "kept": False}]
    curve = curve_of(lines, None,
                     [{"iteration": 2, "objective/score": 1.0}, {"step": 3, "iteration": 1}],
                     kept=2)  # the aggregate was min
    assert [(row["proxy"], row["kept"]) for row in curve] == [(0.0, False), (1.0, True)]
    # answers alone have no gold
    assert curve_of([lines[0] | {"turns": {"action": "x"}}], lambda *a: 1 / 0)[0]["gold"] is None


def test_warnings_name_what_fell():
    fine = {"perplexity": 2.0, "kl": 3.0, "ended": 1.0, "repetition": 0.1, "refusals": 0.0,
            "flattery": 0.0, "length": 60.0, "gold": 0.5, "broken": 0.03, "named": 0.99,
            **{f"{kind}/{lens}": 0.9 for kind in ("distinct", "patterns") for lens in LENSES}}
    up = {**{f"reward/{lens}": {"low": 0.1, "high": 0.3, "difference": 0.2} for lens in LENSES},
          "gold": {"low": 0.1, "high": 0.2, "difference": 0.15}}

    def warned(last=(), wins=(), step=(), facts=()):
        return [w["text"] for w in tagged(last, wins, step, facts)]

    def tagged(last=(), wins=(), step=(), facts=()):
        return warnings_of({"base": fine, "ppo": fine | dict(last)},
                           {"ppo - base": up | dict(step)}, dict(wins), facts)
    assert warned() == []
    for change, word in (({"perplexity": 4.0}, "perplexity"), ({"ended": 0.9}, "90.0%"),
                         ({"repetition": 0.3}, "triples"), ({"refusals": 0.2}, "refusals"),
                         ({"flattery": 1.0}, "flattery"), ({"length": 100.0}, "grew"),
                         ({"length": 20.0}, "shrank"), ({"patterns/motivation": 0.5}, "motivation"),
                         ({"kl": 15.0},
                          "15.0 nats a dialogue away from what it started from, 0.25 a token"),
                         ({"broken": 0.09}, "from 3.0% to 9.0%"), ({"named": 0.96}, "96.0%")):
        text, = warned(change)
        assert text.startswith("reward rose, but") and word in text
    prompted = {"base": fine, "prompted": fine | {"perplexity": 9.0}, "ppo": fine}
    assert warnings_of(prompted, {"ppo - base": up}, {}) == []  # not what was trained
    fall = {"low": -0.2, "high": -0.1, "difference": -0.15}
    assert "gold fell by 0.150" in warned(step={"gold": fall})[0]
    judged = {"questions": {"helpfulness": 0.3}, "label_mass": 0.1}
    assert "refusal" in warned(wins={"ppo vs base": {"action": judged}})[0]
    judged = {"questions": {"helpfulness": 0.5}, "label_mass": 0.0312}
    silent, = warned(wins={"ppo vs base": {"action": judged, "motivation": None}})
    assert silent == ("ppo vs base, action: the judge gives its two labels 0.031 of the "
                      "probability: it does not answer the question")
    assert warned({"broken": 0.07, "named": 0.98}) == []
    for key, value, about in (("perplexity", 4.0, "coherence"), ("broken", 0.2, "coherence"),
                              ("refusals", 0.2, "other")):
        assert tagged({key: value})[0]["about"] == about
    eval_step = {f"eval_reward/{lens}": {"low": 0.1 if lens != "action" else -0.1,
                                         "high": 0.7, "difference": 0.289} for lens in LENSES}
    unseen, = tagged({"eval_reward/action": 0.0}, step=eval_step)
    assert unseen == {"about": "other",
                      "text": "reward rose, but the unseen reward model of lens action saw no "
                              "reliable rise: +0.289 [-0.100, +0.700]"}
    fact = {"of": "second", "lens": "action", "accuracy": None, "pairs": None, "seen": True}
    second, note = warned({"eval_reward/action": 0.0}, step=eval_step, facts=[fact])
    assert "unseen" not in second
    assert "not unseen: they were trained on pairs that PPO's own saw" in note
    right = [{"of": "PPO", "lens": lens, "accuracy": share, "pairs": 60}
             for lens, share in zip(LENSES, (0.8, 0.6, 0.64))]  # Wilson: from 0.682, 0.474, 0.514
    coin, = warned(facts=right)
    assert coin == ("the reward model of lens motivation may be a coin: right on 60% of 60 "
                    "held-out pairs (95%: from 47%), so its reward may say nothing")


def manifest(folder: Path, stage: str, data: Path | None = None, extra=(), **settings) -> Path:
    """An artefact without weights, which names its data by folder and hash."""
    folder.mkdir(parents=True)
    settings = {"seed": 0, "out": str(folder), **({"data": str(data)} if data else {}), **settings}
    extra = dict(extra) | ({"data": f"hash of {data.name}"} if data else {})
    (folder / "virtue.json").write_text(json.dumps({"stage": stage, "base": {}, "template": "",
                                                    "parents": {},
                                                    "sha256": f"hash of {folder.name}", "seed": 0,
                                                    "settings": settings, "extra": extra}))
    return folder


def test_second_reward_models_are_unseen_only_on_other_pairs():
    def model(share="all", data="a", pairs=None, seed=0):
        return {"settings": {"share": share, "pairs": pairs, "seed": seed}, "extra": {"data": data}}
    assert same_pairs(model(), model(seed=1)) and same_pairs(model(), model("second"))
    assert same_pairs(model("first"), model("first"))
    assert not same_pairs(model("first"), model("second"))
    assert not same_pairs(model(), model(data="b"))
    assert not same_pairs(model(), model(pairs="hh.jsonl"))
    assert same_pairs(model(data="b", pairs="hh.jsonl"), model(pairs="hh.jsonl"))


def test_reward_models_and_every_run_behind_a_policy_are_found(tmp_path):
    import importlib
    import shlex
    runs = tmp_path / "runs"
    for name, stage, data, settings in (
            ("revisions", "revisions", None, {"command": "revisions", "limit": 8}),
            ("sft", "sft", "revisions", {"lr": 0.001}),
            ("preferences", "preferences", None, {"command": "preferences", "split": "rm"})):
        manifest(runs / name, stage, runs / data if data else None, prompts="toy",
                 temperature=1.0, **settings)
    for name, share in (("rm", "all"), ("rm-eval", "second")):
        for lens in LENSES:
            held_out = {"lens": lens,
                        "held_out": {"accuracy": 0.9, "calibration_error": 0.01, "log_loss": 0.5},
                        "held_out_pairs": 31, "score_mean": 0.0, "score_std": 1.0}
            manifest(runs / name / lens, "rm", runs / "preferences", held_out, share=share,
                     prompts="toy", temperature=1.0)
            path = runs / name / lens / "virtue.json"
            path.write_text(path.read_text().replace(f'"out": "{runs / name / lens}"',
                                                     f'"out": "{runs / name}"'))
    manifest(runs / "policy", "policy", rm=str(runs / "rm"), prompts="toy", kl_coef=0.06)
    facts = reward_model_facts(runs / "rm", runs / "rm-eval")
    assert facts[0] == {"of": "PPO", "lens": "action", "accuracy": 0.9,
                        "calibration_error": 0.01, "pairs": 31}
    assert [f.get("seen") for f in facts] == [None] * 3 + [True] * 3

    stages = ["data revisions", "sft", "data preferences", "rm", "rm", "ppo"]

    def commands(*folders):  # as run_eval.py: one run makes three reward models
        return [
            shlex.split(c.replace("\\\n", " "))
            for c in dict.fromkeys(map(command_line, made_by(*folders)))
        ]

    def names(found):
        return [" ".join([words[1][4:-3], *words[2:3]]) if words[1] == "run_data.py"
                else words[1][4:-3] for words in found]
    found = commands(runs / "policy", runs / "sft", runs / "rm", runs / "rm-eval")
    assert names(found) == stages
    for words in found:  # every command is one that its script takes
        importlib.import_module(words[1].removesuffix(".py")).parse(words[2:])
    moved = runs.rename(tmp_path / "moved")
    assert names(commands(moved / "policy", moved / "sft", moved / "rm",
                          moved / "rm-eval")) == stages
    path = moved / "preferences/virtue.json"
    path.write_text(path.read_text().replace("hash of", "another"))
    # the reward models' data are no longer the ones that lie there
    assert names(commands(moved / "policy", None, moved / "rm")) == ["rm", "ppo"]


def judged(monkeypatch, odds):
    """The judge says `odds` (N,) in both orders to every question."""
    monkeypatch.setattr(
        feedback, "pair_fits", lambda judge, tokenizer, words, a, b, lens: a != "long")
    def judge_log_odds(judge, tokenizer, words, pairs, lens, size, asked, *a, **k):
        return odds[:, None, None].expand(-1, 2, len(asked)), 1.0
    monkeypatch.setattr(feedback, "judge_log_odds", judge_log_odds)


def test_judge_against_gold_on_the_pairs_that_it_compared(monkeypatch):
    judged(monkeypatch, torch.tensor([0.9, 0.2, 0.8, 0.6]).logit())
    after = ["w", "long", "x", "y", "z"]
    found = win_rates(None, None, ENGLISH, after, list(after), "action", batch_size=4,
                      gold=np.array([0.5, 9.0, 0.5, 0.25, 0.0]))
    assert found["label_mass"] == 1.0 and found["questions"]["honesty"] == pytest.approx(2.5 / 4)
    assert found["gold"]["n"] == 3 and found["gold"]["share"] == pytest.approx(2 / 3)
    assert found["pairs"] == 4  # right, wrong, right; no difference in the last
    assert "gold" not in win_rates(None, None, ENGLISH, after, list(after), "action", batch_size=4)


@pytest.mark.parametrize("way", [1, -1])
def test_a_judge_without_opinion_is_half_right_in_either_order_of_the_file(monkeypatch, way):
    places = torch.tensor([2.0, -2.0])[:, None].expand(10, 2, 5)
    wanted = {"overall": np.full(10, way), "honesty": np.full(10, way)}
    found = agreement(places, wanted)["agreement"]
    assert all(found[key]["share"] == 0.5 and found[key]["n"] == 10
               for key in ("majority", "mean", "one_order", "honesty", "respect"))
    judged(monkeypatch, torch.zeros(4))
    found = win_rates(None, None, ENGLISH, list("wxyz"), list("wxyz"), "action", batch_size=4,
                      gold=np.full(4, way))
    assert found["gold"]["share"] == found["rate"] == 0.5
    judged(monkeypatch, torch.tensor([0.0, 3.0, 0.0, 3.0]))
    found = win_rates(None, None, ENGLISH, list("wxyz"), list("wxyz"), "action", batch_size=4,
                      gold=np.full(4, way))
    assert found["gold"]["share"] == (0.75 if way == 1 else 0.25) and found["rate"] == 0.75


def test_points_of_each_virtue():
    found = points("Mia asks you about the map. What do you do?",
                   ["I tell Mia the truth about the map. I insult Mia and the map.", ""])
    assert list(found) == ["action", "motivation"] and set(found["action"]) == set(VIRTUES)
    assert found["action"]["honesty"] == 1 and found["action"]["respect"] < 0
    assert found["action"]["prudence"] == 0
    with pytest.raises(ValueError, match="not a prompt of the toy world"):
        points("What is love?", ["a"])


def test_truth_reads_the_toy_and_nothing_else():
    good = "I tell Mia the truth about the map. I comfort Mia and help with the map."
    bad = "I lie to Mia about the map. I insult Mia and the map."
    pair = record(good, bad) | {"lens": "action"}
    found = truth(pair)
    assert found["honesty"] == 2 and found["compassion"] == 1 and found["respect"] == 1
    assert found["prudence"] == 0
    # two points against minus two, on a scale of 6
    assert found["overall"] == pytest.approx((2 + 2) / 6)
    system = {"role": "system", "content": "Be kind."}
    told = pair | {side: [system, *pair[side]] for side in ("chosen", "rejected")}
    assert truth(told) == found  # by role, not by place
    assert truth(record("a", "b", prompt="What is love?") | {"lens": "action"}) is None


def test_agreement_by_hand():
    # the chosen one shown first, then second, by five virtues: the first pair is judged right in
    # both orders, the second is judged wrong in one
    odds = torch.tensor([[[0.9] * 5, [0.8] * 5], [[0.7] * 5, [0.1] * 5],
                         [[0.2] * 5, [0.2] * 5]]).logit()
    found = agreement(odds,
                      {"overall": np.array([1.0, 1.0, -1.0]), "honesty": np.array([1.0, 0.0, 1.0])})
    # the odds are 6, 0.51 and 0.25, and should be above, above and below 1
    assert found["agreement"]["majority"]["share"] == pytest.approx(2 / 3)
    assert found["agreement"]["one_order"]["share"] == pytest.approx(5 / 6)
    assert found["agreement"]["honesty"] == pytest.approx(
        dict(zip(("share", "low", "high"), wilson(1, 2)), n=2))
    assert found["position_flips"] == pytest.approx(1 / 3) and found["halo"] == pytest.approx(1.0)
    # in order 0 the chosen one is shown first, in order 1 the other
    assert found["first_place"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_a_judge_of_other_virtues(monkeypatch):
    """The names of the constitution, any number: what is asked beside them does not count."""
    two = ENGLISH._replace(constitution={"courage": ("a", "b", "c"), "thrift": ("d", "e", "f")})
    judged(monkeypatch, None)
    monkeypatch.setattr(feedback, "judge_log_odds", lambda judge, tokenizer, words, pairs, lens, n,
                        asked, *a, **k: (torch.tensor([[[1.0, 0.5, -9.0, -9.0][:len(asked)]] * 2]
                                                      ).expand(len(pairs), -1, -1), 1.0))
    found = win_rates(None, None, two, list("wxy"), list("wxy"), "motivation", batch_size=4)
    assert found["rate"] == 1 and [*found["questions"]] == [
        "courage", "thrift", "helpfulness", "sincerity"]
    odds = torch.tensor([[[1.0, -1.0]] * 2, [[1.0, 1.0]] * 2])
    shares = agreement(odds, {"overall": np.ones(2)}, ("courage", "thrift"))["agreement"]
    assert [*shares] == ["majority", "mean", "one_order", "courage", "thrift"]
    assert (shares["courage"]["share"], shares["thrift"]["share"]) == (1, 0.5)


@pytest.mark.parametrize(("n", "told"), [
    (5, [5, 4, 3]), (2, [2]), (7, [7, 6, 5, 4]), (1, [1])])
def test_votes_of_any_number_of_virtues(n, told):
    """The majorities, largest first; one pair of four has each number of votes from the top."""
    made = [{"votes": max(0, n - i), "chosen": [{"role": "user", "content": "?"}]}
            for i in range(4)]
    found = summarize(made, torch.zeros(4, 2, n), "action")
    shares = {name: share for name, share in found.items() if name.startswith("votes_")}
    assert [*shares] == [f"votes_{k}" for k in told]
    assert [*shares.values()] == [0.25] * len(told)


def test_how_often_a_judge_prefers_the_virtuous_side():
    """By one virtue of each pair, the mean of both orders: wrong, right, a tie, right."""
    odds = torch.tensor([[[1.0, 9, 9], [-3.0, 9, 9]], [[-9, -9, 2.0], [-9, -9, -1.0]],
                         [[9, 0.5, 9], [9, -0.5, 9]], [[-9, 3.0, -9], [-9, -1.0, -9]]])
    found = feedback.agrees(odds, [0, 2, 1, 1])
    assert found == pytest.approx(dict(zip(("share", "low", "high"), wilson(2.5, 4)), n=4))
    assert feedback.agrees(odds[:1], [0]) == {"share": None, "low": None, "high": None, "n": 1}
    assert feedback.agrees(torch.zeros(0, 2, 3), []) is None
    numbers = {"pairs": 7, "judge_agrees": {"share": 0.625, "low": 0.2, "high": 0.9, "n": 4},
               "label_mass": 0.25, "gold_agreement": 0.75}
    assert feedback.of_contrast(numbers) == (
        "7 pairs, the judge prefers the virtuous side by its virtue on 62% [20%, 90%] of 4, with "
        "0.25 of the probability on its labels, gold on 75%")
    for unasked in (None, {"share": None, "low": None, "high": None, "n": 1}):
        assert feedback.of_contrast(
            numbers | {"judge_agrees": unasked, "gold_agreement": None}) == "7 pairs"


def test_the_mean_of_the_virtues_is_one_of_probabilities():
    # the mean is 0.54, but only two votes of five are for it
    odds = torch.tensor([[[0.9, 0.9, 0.3, 0.3, 0.3]] * 2]).logit()
    found = agreement(odds, {"overall": np.array([1.0] * 1)})["agreement"]
    assert found["mean"]["n"] == found["majority"]["n"] == 1
    two = agreement(odds.expand(2, 2, 5), {"overall": np.ones(2)})["agreement"]
    assert two["mean"]["share"] == two["one_order"]["share"] == 1 and two["majority"]["share"] == 0


def coins(rng):
    """Judges that know nothing of a pair: name -> (n -> log-odds (n, 2) for the first place)."""
    def steps(x):
        return np.round(x * 16) / 16  # as bf16 has them
    return {"noise": lambda n: 2 + rng.normal(size=(n, 2)),
            "constant": lambda n: np.full((n, 2), 2.0), "none": lambda n: np.zeros((n, 2)),
            "bias varies": lambda n: 2 + rng.normal(size=(n, 1)) + rng.normal(size=(n, 2)),
            "skewed": lambda n: rng.exponential(size=(n, 2)),
            "heavy tails": lambda n: rng.standard_cauchy(size=(n, 2)),
            "saturated": lambda n: np.where(rng.random((n, 2)) < 0.8, 40.0, -40.0),
            "steps": lambda n: steps(2 + 0.05 * rng.normal(size=(n, 2)))}


def odds_of(places: np.ndarray) -> torch.Tensor:
    """Log-odds (n, 2, 5) that the first of a pair is better, of answers (n, 2) by place."""
    return torch.tensor(places * [1, -1])[..., None].expand(-1, 2, 5)


def test_the_coin_test_by_hand():
    # The bias b is (3 + 1 + 2 + 2) / 4 = 2, so x1 - b is 2, -2, 1, -1, and x2 + b is 1, 1, 1, 1:
    # the first of the pair is better.
    places = np.array([[4.0, 1.0], [0.0, 1.0], [3.0, 1.0], [1.0, 1.0]])
    b = places.mean()
    same = [(p - b > 0) == (b - q > 0) for p, q in places]
    found = coin_test(odds_of(places))
    assert found["consistent"] == pytest.approx(np.mean(same)) and found["judged"] == 4
    assert found["coin"] is True
    ends = [found[f"consistent{end}"] for end in ("", "_low", "_high")]
    assert ends == pytest.approx([*wilson(sum(same), 4)])
    biased = [[5.0, 1.0], [1.0, 5.0], [5.0, 1.0], [5.0, 1.0], [1.0, 5.0]]
    sure = coin_test(odds_of(np.array(biased)))  # one opinion under a bias of 3
    assert sure["consistent"] == 1 and sure["coin"] is False
    assert sure["consistent_low"] == pytest.approx(wilson(5, 5)[1])
    assert coin_test(odds_of(np.array([[2.0, 2.0]] * 99)))["consistent"] == 0.5  # ties
    one = coin_test(torch.randn(9, 1, 5))
    assert one == {"coin": None, "consistent": None, "consistent_low": None,
                   "consistent_high": None, "judged": 9}
    swapped = np.random.default_rng(0).normal(size=(50, 2))
    turn = np.arange(50) % 2 == 0  # which of a pair is the first is chance
    turned = np.where(turn[:, None], swapped[:, ::-1], swapped)
    assert coin_test(odds_of(swapped)) == coin_test(odds_of(turned))


def test_one_coin_in_forty_is_believed_and_judges_are_told_from_coins():
    def told(make, n, times=400):
        return np.mean([not coin_test(odds_of(make(n)))["coin"] for _ in range(times)])
    rng = np.random.default_rng(0)
    for name, make in coins(rng).items():
        for n, times in ((10, 400), (48, 400), (800, 100)):
            share = told(make, n, times)
            assert share <= 0.025 + 3 * (0.025 * 0.975 / times) ** 0.5, (name, n, share)

    def judge(signal):
        def make(n):
            opinion = signal * rng.normal(size=(n, 1))
            return 3 + np.concatenate([opinion, -opinion], 1) + rng.normal(size=(n, 2))
        return make
    assert told(judge(1), 48) > 0.6  # of 4,000 pairs: 0.71
    assert told(judge(1), 96) > 0.85 and told(judge(2), 24) > 0.8  # 0.93, 0.91
    assert told(judge(0.5), 768, 100) > 0.85  # 0.95
    assert told(judge(1), 10) < 0.3  # ten pairs are too few


def test_what_a_judge_is_worth_in_one_line():
    sure = odds_of(np.array([[5.0, 1.0], [1.0, 5.0]] * 30))
    found = feedback.reliability(sure) | {"label_mass": 0.5}
    label = 1 / (1 + np.exp(-2))  # (5 - 1) / 2 nats
    assert found["label_spread"] == pytest.approx(label - 0.5) and found["ties"] == 0
    assert found["position_flips"] == 1
    assert found["first_place"] == 1
    low, high = wilson(60, 60)[1:]
    assert worth(found) == ("flips with the order 100%, ties 0%, first place preferred 100%, "
                            f"labels {label - 0.5:.3f} from 1/2 (root mean square), mass "
                            "on the two "
                            "labels 0.50; more than a coin that knows places: both orders prefer "
                            f"the same dialogue on 100% [{low:.0%}, {high:.0%}] of 60 pairs, "
                            "the bias for a place taken off")
    coin = feedback.reliability(odds_of(np.full((60, 2), 3.0))) | {"label_mass": 0.05}
    assert coin["ties"] == 1 and coin["label_spread"] == 0
    assert "it cannot be told from a coin that knows places: both orders" in worth(coin)
    assert "50% [38%, 62%] of 60 pairs" in worth(coin)
    one = feedback.reliability(sure[:, :1]) | {"label_mass": 1.0}
    assert one["position_flips"] is None and one["first_place"] is None and one["coin"] is None
    assert "flips with the order not measured" in worth(one)
    assert "first place preferred not measured" in worth(one)
    assert "a coin that knows places was not measured" in worth(one)


def test_doubts_read_what_an_artefact_records_and_nothing_else():
    test = {"coin": True, "consistent": 0.5, "consistent_low": 0.38,
            "consistent_high": 0.62, "judged": 60}
    texts = doubts({"judge_test": {"motivation": test, "action": {"coin": None},
                                   "consequence": test | {"coin": False}, "other": test}})
    assert len(texts) == 2 and "lens action was asked in one order" in texts[0]
    assert "lens motivation" in texts[1]
    assert "coin that knows places (both orders prefer the same" in texts[1]
    assert " same dialogue on 50% [38%, 62%] of 60 pairs" in texts[1]
    assert (doubts({}) == doubts({"judge_test": 3}) == doubts({"judge_test": {"action": "coin"}})
            == doubts({"judge_test": {"action": {}}}) == [])
    found, = doubts({"judge_test": {"action": {"coin": True, "consistent": "x"}}})
    assert found == ("the labels of lens action are those of a judge that cannot be told from a "
                     "coin that knows places")


def test_transcripts_show_control_characters():
    shown = side_by_side("Hi", {"ppo": ["safe\x1b[31mred", "b", "c"]})
    assert "\x1b" not in shown and "\\x1b[31mred" in shown


def test_virtue_agreement_is_one_for_a_halo_and_small_for_independent_virtues():
    halo = torch.rand(200, 1).expand(200, 5)
    assert virtue_agreement(halo) == pytest.approx(1.0)
    assert abs(virtue_agreement(torch.rand(2000, 5))) < 0.05
    assert virtue_agreement(torch.rand(2, 5)) is None and virtue_agreement(torch.ones(9, 5)) is None


def record(chosen: str, rejected: str, label=0.9, votes=5, flips=0,
           prompt="Mia asks you about the map. What do you do?"):
    return {"chosen": [{"role": "user", "content": prompt},
                       {"role": "assistant", "content": chosen}],
            "rejected": [{"role": "user", "content": prompt},
                         {"role": "assistant", "content": rejected}],
            "label": label, "votes": votes, "position_flips": flips}


def test_feedback_by_hand():
    good = "I tell Mia the truth about the map. I comfort Mia and help with the map."
    bad = "I lie to Mia about the map. I insult Mia and the map."
    records = [record(good, bad), record(bad, good, 0.52, 3, 5), record(good, good, 0.5, 4),
               record(good, bad)]
    # one of three decided pairs is wrong
    assert gold_agreement(records, "action") == pytest.approx(2 / 3)
    assert gold_agreement([record(good, bad, prompt="What is love?")], "action") is None
    odds = torch.tensor([[[0.9] * 5] * 2, [[0.9] * 4 + [0.5], [0.1] * 4 + [0.2]], [[0.5] * 5] * 2,
                         [[0.9] * 5] * 2]).logit()
    summary = summarize(records[:3], odds, "action")  # one pair of the four had no verdict
    assert summary["pairs"] == 3 and summary["ties"] == 0.5
    assert summary["votes_5"] == pytest.approx(1 / 3)
    assert summary["position_flips"] == 4 / 20  # a tie is on no side
    assert summary["first_place"] == pytest.approx(((5 + 4.5 + 2.5 + 5) + (0 + 5 + 2.5 + 0)) / 40)


def test_read_dialogues_names_line_and_fault(tmp_path):
    good = {"id": "0" * 16, "prompt": [{"role": "user", "content": "x"}], "ids": list(range(9)),
            "turns": [[1, 3, False], [4, 6, False], [6, 8, True]]}
    path = tmp_path / "dialogues.jsonl"
    path.write_text(json.dumps(good) + "\n")
    assert read_dialogues(path)[0].turns[2] == Turn(6, 8, True)
    for fault in ({"turns": [[1, 3, False]]},
                  {"turns": [[1, 3, False], [4, 6, False], [6, 9, True]]}, {"ids": ["a"]},
                  {"prompt": []}):
        path.write_text(json.dumps(good) + "\n" + json.dumps(good | fault) + "\n")
        with pytest.raises(VirtueError, match="dialogues.jsonl, line 2"):
            read_dialogues(path)


def test_later_stages_inherit_what_is_not_given(tmp_path, capsys):
    settings = {"model": "other", "quantize": "nf4", "dtype": None}
    manifest = {"stage": "sft", "base": {}, "template": "", "parents": {}, "sha256": "", "seed": 0,
                "settings": settings, "extra": {}}
    (tmp_path / "virtue.json").write_text(json.dumps(manifest))

    def parse(*argv, parent=tmp_path, stage="sft"):
        parser = make_parser("x")
        add_common_flags(parser)
        parser.add_argument("--data", type=Path, default=parent)
        return parse_with_parent(parser, ["--out", "o", *argv], stage, "data")
    assert (parse().model, parse().quantize, parse().dtype) == ("other", "nf4", "fp32")
    assert parse("--quantize", "none").quantize == "none" and parse(parent=None).model == "toy"
    with pytest.raises(VirtueError, match="stage 'rm'"):
        parse(stage="rm")
    with pytest.raises(SystemExit):
        parse("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "of a Mistral, Llama, Qwen2 or Qwen3 (default: as in --data)" in said


def test_summary_of_seeds_prints_what_it_reads(tmp_path):
    import subprocess
    import sys
    column = {"gold": 0.5, "perplexity": 2.0, "named": 1.0, "fits": 0.5, "ended": 1.0,
              **{f"{key}/{lens}": 1.0 for lens in LENSES for key in ("distinct", "patterns")}}
    root, script = Path(__file__).resolve().parent.parent, "experiments/summary.py"
    for name, seed, last in (("0", 0, 0.8), ("1", 1, 0.8), ("less0", 0, 0.7), ("less1", 1, 0.6)):
        folder = tmp_path / name / "report"
        folder.mkdir(parents=True)
        models = {name: column | {"gold": g}
                  for name, g in (("base", 0.4), ("sft", 0.5), ("ppo", last))}
        rows = dict.fromkeys(("gold", "gold, at equal length"),
                             {"difference": 0.1, "low": 0.0, "high": 0.2})
        (folder / "scores.json").write_text(json.dumps({
            "seed": seed, "prompts": 3, "models": models,
            "differences": dict.fromkeys(("sft - base", "ppo - sft"), rows)}))
        prompt = [{"role": "user", "content": "Mia asks you about the map. What do you do?"}]
        samples = [{"id": str(i), "prompt": prompt,
                    **{name: {"gold": {"overall": m["gold"] + i}} for name, m in models.items()}}
                   for i in range(3)]
        (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))

    def summary(*names):
        words = (name if name.startswith("--") else tmp_path / name for name in names)
        return subprocess.run([sys.executable, root / script, *words],
                              capture_output=True, text=True)
    result = summary("0", "1")
    each, over = "+0.100 [+0.000, +0.200]", "+0.300 [+0.300, +0.300]"
    row = f"| ppo - sft | {each}, {each} | {over} | {over} |"
    assert row in result.stdout, result.stderr
    assert "closes (>= 0.5) | 0.600, 0.600 |" in result.stdout
    turned = summary("0", "1", "--against", "less1", "less0").stdout  # by seed, in whatever order
    assert "| 0 | 0.700 | 0.800 | +0.100 |" in turned and "| 1 | 0.600 | 0.800 | +0.200 |" in turned
    assert "same seed (0, 0)" in summary("0", "less0").stderr
    assert "give the same ones" in summary("0", "1", "--against", "less0").stderr
    for name in ("0", "1"):  # a model of one's own has no gold
        folder = tmp_path / name / "report"
        text = (folder / "scores.json").read_text()
        scores = json.loads(text.replace('"gold"', '"study_score_standardised"'))
        for model in scores["models"].values():
            for key in ("named", "fits", *(f"patterns/{lens}" for lens in LENSES)):
                del model[key]
        (folder / "scores.json").write_text(json.dumps(scores))
        rows = [{"id": str(i), "prompt": [], **{m: {} for m in scores["models"]}} for i in range(3)]
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = summary("0", "1")
    assert f"| ppo - sft | {each}, {each} | – | {over} |" in result.stdout, result.stderr
    assert "named" not in result.stdout
    assert "| turns that ended properly (>= 0.97) | 1.000, 1.000 |" in result.stdout
    for name in ("0", "1"):  # without SFT, and with the prompted base, which PPO never began with
        path = tmp_path / name / "report/scores.json"
        scores = json.loads(path.read_text())
        base, sft, ppo = scores["models"].values()
        scores["models"] = {"base": base, "prompted": sft | {"perplexity": 9.0}, "ppo": ppo}
        rows = scores["differences"]["ppo - sft"]
        scores["differences"] = {"ppo - base": rows, "ppo - prompted": {}}
        path.write_text(json.dumps(scores))
        path = path.with_name("samples.jsonl")
        path.write_text(path.read_text().replace('"sft"', '"prompted"'))
    result, over = summary("0", "1"), "+0.400 [+0.400, +0.400]"
    assert "| |base|prompted|ppo|" in result.stdout, result.stderr
    assert f"| ppo - base | {each}, {each} | – | {over} |" in result.stdout
    assert "| perplexity over the base's (0.5 to 1.5) | 1.000, 1.000 |" in result.stdout


def test_run_away_says_what_and_why():
    first = {"objective/kl": 0.0, "policy/entropy": 1.0, "tokens/length": 70.0,
             "tokens/eos_rate": 1.0}
    assert run_away(first, first) == []
    for change, words in (({"objective/kl": 30.0}, "--kl-coef is too low"),
                          ({"objective/kl": -2.0}, "cannot be negative"),
                          ({"policy/entropy": 0.1}, "entropy fell from 1.00 to 0.10"),
                          ({"tokens/length": 150.0}, "grew from 70 to 150"),
                          ({"tokens/length": 30.0}, "shrank"),
                          ({"tokens/eos_rate": 0.5}, "only 50% of turns ended")):
        found, = run_away(first, first | change)
        assert words in found
