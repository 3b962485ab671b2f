"""The HTML report: escaping, well-formedness, the verdict, and what may be left out."""
from __future__ import annotations

import copy
import re
import shlex
import tomllib
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from virtue.evaluation import html, plots, report
from virtue.ethics import LENSES, VIRTUES

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Collects tags, ids and text; asserts that tags close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.text = [], [], [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [v for k, v in attrs if k == "id"]
        self.links += [v for k, v in attrs if k in ("href", "xlink:href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


TITLES = {"base": "base", "sft": "SFT"}


def column(shift: float) -> dict:
    return {"gold": 0.5 + shift, "study_score_standardised": shift, "reward/action": shift,
            "ended": 1.0, "perplexity": 1.4, "brand new": 2.5}


def scores(difference=0.149, low=0.12, high=0.18) -> dict:
    found = {"gold": {"difference": difference, "low": low, "high": high, "p": 0.0004,
                      "p_holm": 0.02, "d_z": None},
             "study_score_standardised": {"difference": 1.2, "low": 1.0, "high": 1.4}}
    wins = {lens: dict.fromkeys((*VIRTUES, "helpfulness"), 0.71) for lens in LENSES}
    wins["consequence"] = {"rate": 0.64, "low": 0.5, "high": 0.75, "pairs": 9,
                           "questions": {"honesty": 0.31, "sincerity": 0.5}}
    return {"prompts": 240, "prompts_too_long": 3, "seed": 7, "interval": "paired bootstrap",
            "models": {"base": column(0.0), "sft": column(0.1), "ppo": column(0.3)},
            "differences": {"sft - base": copy.deepcopy(found), "ppo - sft": found},
            "wins": {"ppo vs base": wins, "ppo vs sft, other wording": {**wins, "action": None}},
            "warnings": [], "curve": CURVE}


def sample(i: int, change: float = 0.0, text: str = "I help.") -> dict:
    def answer(score):
        return {"turns": dict.fromkeys(LENSES, text), "scores": [score, 0.0, 0.0],
                "gold": {"overall": 0.5, "lenses": {}}}
    return {"id": str(i), "prompt": [{"role": "user", "content": f"Prompt number {i}."}],
            "base": answer(0.0), "sft": answer(0.0), "ppo": answer(change)}


METRICS = [
    {"iteration": i, "objective/kl": 0.1 * i, "objective/kl_k3": 0.1 * i,
     "objective/aggregate/mean": 0.1 * i, **{f"objective/score/{lens}": 0.1 * i for lens in LENSES},
     "policy/loss": 0.01 / i, "value/loss": None if i == 2 else 0.1 / i, "policy/entropy": 0.3,
     "tokens/eos_rate": 1.0, "tokens/length": 60.0 + i} for i in range(1, 5)]
CURVE = [{"iteration": i, "kl": 0.5 * i, "proxy": 0.1 * i, "gold": 0.6 - 0.05 * (i - 2) ** 2,
          "kept": i == 3} for i in range(4)]
MANIFEST = {"stage": "eval", "base": {"id": "toy", "fingerprint": "f" * 64}, "seed": 7,
            "versions": {"torch": "2.13.0"},
            "parents": {"policy": {"folder": "runs/demo/policy", "sha256": "a" * 64}},
            "settings": {"command": "models", "policy": "runs/my demo", "sft": None,
                         "overwrite": True, "quick": False, "batch_size": 64,
                         "targets": ["q_proj", "v_proj"], "shift": -1.5}}


def render(s=None, samples=None, metrics=METRICS, manifest=MANIFEST) -> str:
    return html.render(scores() if s is None else s, [sample(i, i - 2) for i in range(30)]
                       if samples is None else samples, metrics, manifest)


@pytest.fixture
def without_figures(monkeypatch):
    """For tests of words: matplotlib takes half a second a page."""
    monkeypatch.setattr(plots, "available", lambda: False)


def test_everything_foreign_is_escaped_and_control_characters_are_shown():
    bad = "<script>alert('1')</script>\"><img src=x> & \u202eflipped\u2066 \x1b[31m \ud800"
    s = scores()
    s["models"] = {name + bad: c | {bad: 1.0} for name, c in s["models"].items()}
    s["differences"] = {" - ".join(name + bad for name in pair.split(" - ")): rows
                        | {bad: rows["gold"]} for pair, rows in s["differences"].items()}
    s |= {"warnings": [{"about": "other", "text": bad}], "interval": bad,
          "wins": {bad: {bad: {bad: 0.5}}}, "seed": bad, "prompts": bad,
          "virtues": {bad: {bad: {bad: 0.5}}},
          "reward_models": [{"of": bad, "lens": bad, "accuracy": 0.5, "calibration_error": None,
                             "pairs": bad}],
          "commands": [bad]}
    foreign = {"id": bad, "prompt": [{"role": bad, "content": bad}] * 2,
               bad: {"turns": {bad: bad}, "scores": [1.0, 2.0, 3.0], "gold": {"overall": bad}}}
    manifest = {"stage": bad, "base": {"id": bad, "fingerprint": bad}, "versions": {bad: bad},
                "parents": {bad: {"folder": bad, "sha256": bad}, "b": bad}, "settings": {bad: bad}}
    text = render(s, [foreign, foreign], METRICS, manifest)
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    assert page.text.count("\\u202eflipped\\u2066 \\x1b[31m \\ud800") > 20
    assert page.text.count("<script>alert('1')</script>") > 20
    text.encode("utf-8")
    assert html.clean("a\u200db\tc\nמ") == "a\u200db\tc\nמ" and html.clean("'") == "&#39;"


def test_no_template_marks_a_value_as_safe_and_all_are_packaged():
    folder = Path(html.__file__).parent / "page"
    assert not [
        p.name for p in folder.iterdir() if re.search(r"\| *safe|autoescape", p.read_text())
    ]
    project = tomllib.loads((folder.parents[2] / "pyproject.toml").read_text())
    packaged = project["tool"]["setuptools"]["package-data"]["virtue.evaluation"]
    assert {p.name for pattern in packaged for p in folder.parent.glob(pattern)} == {
        "macros.html", "report.html", "style.css"}


def test_page_stands_alone_and_links_inside_itself():
    text = render()
    page = Page(text)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"url\((?!#)|@import|\bsrc=|<link|<script", text)
    # the only addresses are names of SVG's namespaces
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/", "")
    metas = [attributes for tag, attributes in page.tags if tag == "meta"]
    assert {"name": "color-scheme", "content": "light dark"} in metas
    assert "prefers-color-scheme:dark" in text
    for shown in ("240 held-out prompts", "3 too long", "brand new", "2.500", "0.020", "0.71",
                  "0.31", "PPO against SFT, other wording", "[0.50, 0.75]", "sincerity"):
        assert shown in page.text, shown
    assert render() == text


@pytest.mark.parametrize("found, direction, sentence", [
    ((0.149, 0.12, 0.18), "rose", "PPO raised gold by +0.149 [+0.120, +0.180] over SFT."),
    ((0.01, -0.02, 0.04), "",
     "No reliable difference in gold between PPO and SFT: +0.010 [−0.020, +0.040]."),
    ((0.02, 0.0, 0.04), "",
     "No reliable difference in gold between PPO and SFT: +0.020 [+0.000, +0.040]."),
    ((-0.1, -0.15, -0.05), "fell", "Gold of PPO fell against SFT: −0.100 [−0.150, −0.050].")])
def test_verdict(without_figures, found, direction, sentence):
    assert html.verdict(scores(*found)) == (direction, sentence)
    text = Page(render(scores(*found))).text
    assert sentence in text
    assert ("What its reward models say, as the study's Score, standardised: +1.200 "
            "[+1.000, +1.400]." in text)


@pytest.mark.parametrize("before", ["sft", "base"])
def test_the_prompted_base_is_a_column_and_not_what_training_began_with(without_figures, before):
    s, expected = scores(), html.verdict(scores())[1].replace("SFT", TITLES[before])
    kept = ("base", "prompted", "sft", "ppo") if before == "sft" else ("base", "prompted", "ppo")
    s["models"] = {name: s["models"].get(name, column(0.7)) for name in kept}
    found = s["differences"]["ppo - sft"]
    s["differences"] = {f"ppo - {before}": found, "ppo - prompted": {
        "gold": found["gold"] | dict(difference=-0.4, low=-0.5, high=-0.3)}}
    assert html.verdict(s) == ("rose", expected)
    text = Page(render(s)).text
    assert expected in text and "base, prompted" in text
    assert f"PPO − {TITLES[before]} [95 %]" in text
    assert "− base, prompted [95 %]" not in text
    closed = (0.8 - s["models"][before]["gold"]) / (1 - s["models"][before]["gold"])
    assert f"from {TITLES[before]} to the oracle, PPO closes {100 * closed:.0f} %" in text


def test_verdict_without_gold_without_pairs_and_with_base_alone(without_figures):
    s = scores()
    del s["differences"]["ppo - sft"]["gold"]
    assert (
        html.verdict(s)[1]
        == "PPO raised the study's Score, standardised (by its own reward models), "
        "by +1.200 [+1.000, +1.400] over SFT."
    )
    assert (
        html.verdict({"models": s["models"]})
        == html.verdict({})
        == ("", "No two models were compared.")
    )
    Page(render({"models": {"base": column(0.0)}}))


def test_coherence_and_warnings(without_figures):
    s = scores()
    s["models"]["base"]["perplexity"], s["models"]["ppo"]["kl"] = 2.8, 2.766
    fine = ("its perplexity under the base is 0.50 times that of the base's own answers, 100.0% of "
            "its turns ended properly (base: 100.0%), its KL to the reference is 2.77 "
            "nats a dialogue")
    assert html.coherence(s) == f"PPO stays coherent: {fine}."
    assert "Warnings" not in Page(render(s)).text
    s["warnings"] = [{"about": "other", "text": "reward rose, but gold fell"}]
    assert html.coherence(s) == f"PPO stays coherent: {fine}."  # gold is no matter of coherence
    text = Page(render(s)).text
    assert text.index("reward rose, but gold fell") < text.index("Scores")
    s["warnings"].append({"about": "coherence", "text": "broken sentences rose"})
    assert html.coherence(s) == f"Coherence of PPO is doubtful: {fine}, see the warnings."


def test_page_says_what_one_run_can_and_how_good_its_judges_are(without_figures):
    s = scores()
    text = Page(render(s)).text
    assert "another seed may differ" in text and "experiments/summary.py" in text
    assert "held-out pairs" not in text
    assert "PPO − SFT [95 %]" in text and "0.5000.6000.800+0.149 [+0.120, +0.180]" in text
    s["reward_models"] = [{"of": of, "lens": "action", "accuracy": 0.9, "calibration_error": 0.012,
                           "pairs": 31, **seen}
                          for of, seen in (("PPO", {}), ("second", {"seen": True}))]
    s["wins"]["ppo vs base"]["action"] = {"rate": 0.6, "low": 0.5, "high": 0.7, "pairs": 9,
                                          "questions": {},
                                          "gold": {"share": 0.75, "low": 0.5, "high": 1.0, "n": 8}}
    for model in s["models"].values():
        model["eval_reward/action"] = 0.1
    s["virtues"] = {name: {"action": {"honesty": points}}
                    for name, points in (("base", -0.25), ("sft", 0.0), ("ppo", 0.625))}
    text = Page(render(s)).text
    for shown in ("action, second", "0.012", "31", "action 75 % [50, 100] of 8 pairs",
                  "run_eval.py judge", "so they are not unseen", "honesty−0.250.000.62"):
        assert shown in text, shown
    s["differences"]["ppo - sft"]["gold, at equal length"] = s["differences"]["ppo - sft"]["gold"]
    assert "least-squares line" in Page(render(s)).text and "least-squares line" not in text


def test_cells_near_the_middle_can_be_told_apart():
    def depth(value, *scale):
        return float(re.search(r"([\d.]+)\)", html.shade(value, *scale))[1])

    assert (
        depth(0.5) == depth(None) == 0
        and depth(0.44) - depth(0.49) >= 0.1
        and depth(0.9) == depth(0.0, 0.8, 0.8) == 0.75
    )
    assert (
        "213,94,0" in html.shade(0.44)
        and "0,114,178" in html.shade(0.56)
        and "0,114,178" in html.shade(0.1, 0)
    )


def test_page_explains_its_columns(without_figures):
    s = scores()
    s["models"]["ppo"]["length"] = 72.361
    text = Page(render(s)).text
    # without figures there are no captions
    assert "tokens a dialogue––72.4" in text and "The study's" not in text
    assert "from SFT to the oracle, PPO closes 50 %" in text
    assert "both orders averaged, on 9 prompts." in text  # 0.6 -> 0.8 of 1
    without = scores()
    for model in without["models"].values():
        del model["gold"]
    without["wins"] = {"ppo vs base": {"action": {"honesty": 0.7}}}
    text = Page(render(without)).text
    assert "to the oracle" not in text and "both orders averaged. Blue" in text
    assert "Perplexity: how little" in text


def test_extremes_and_the_first_dialogues_are_shown(without_figures):
    text = render(
        samples=[sample(i, {5: 9.0, 6: -9.0, 7: -8.0}.get(i, 0.0)) for i in range(300)]
        + [
            {
                "id": "p",
                "prompt": [{"role": "user", "content": "A probe"}],
                "ppo": {"turns": {"action": "No."}},
            }
        ]
    )
    groups = dict(part.split("</h3>", 1) for part in unescape(text).split("<h3>")[1:])
    assert (
        re.findall(r"number (\d+)", groups["The largest falls"]) == ["6", "7"]
        and "(−9.00)" in groups["The largest falls"]
    )
    assert (
        re.findall(r"number (\d+)", groups["The largest rises"]) == ["5"]
        and "(+9.00)" in groups["The largest rises"]
    )
    assert re.findall(r"number (\d+)", groups["The first 12 of 300"]) == [str(i) for i in range(12)]
    assert groups["The first 12 of 300"].count("<details open") == 1
    assert "it fell in 2 of 300" in text
    assert "A probe" in groups["Without scores, such as the study's probes"]


def test_each_turn_has_its_lens_score_and_paper_shows_few_dialogues(without_figures):
    one = sample(0)
    one["ppo"]["scores"] = [1.25, -0.5, 0.75]
    text = Page(render(samples=[one] + [sample(i) for i in range(1, 9)])).text
    assert "action +1.25" in text and "motivation −0.50" in text and "consequence +0.75" in text
    assert "reward +1.50" in text
    page = render(samples=[sample(i) for i in range(9)])
    assert page.count(' class="screen"') == 9 - html.PRINTED
    assert "details.paper::details-content{content-visibility:visible" in page


def test_command_line_can_be_typed_again():
    words = shlex.split(report.command_line(MANIFEST).replace("\\\n", " "))
    assert words == [
        "python",
        "run_eval.py",
        "models",
        "--policy",
        "runs/my demo",
        "--overwrite",
        "--batch-size",
        "64",
        "--targets",
        "q_proj",
        "v_proj",
        "--shift=-1.5",
    ]
    assert report.command_line({"stage": "preferences", "settings": {}}) == "python run_data.py"
    handed_on = {"data": "runs/p", "prompts": "toy", "temperature": 1.0}  # no flags of run_rm.py
    assert (
        report.command_line({"stage": "rm", "settings": handed_on})
        == "python run_rm.py --data runs/p"
    )
    assert (
        report.command_line({"stage": "policy", "settings": handed_on})
        == "python run_sft.py --data runs/p"
    )
    assert (
        report.command_line({"stage": "policy", "settings": {"rm": "runs/rm", "prompts": "toy"}})
        == "python run_ppo.py --rm runs/rm --prompts toy"
    )
    s = scores() | {"commands": ["python run_rm.py --data <p>"]}
    assert "python run_rm.py --data <p>" in Page(html.render(s, [], [], MANIFEST)).text


def test_page_with_little_to_show(without_figures):
    page = Page(render())
    assert 'pip install ".[report]"' in page.text and page.text.count("pip install") == 1
    assert "honesty" in page.text
    assert "path" not in {tag for tag, _ in page.tags}
    bare = scores()
    del bare["wins"], bare["warnings"], bare["models"]["ppo"]["perplexity"]
    del bare["curve"]
    page = Page(render(bare, [], [], {}))
    assert "There are no metrics" in page.text and "Virtues by lens" not in page.text
    assert "pip install" not in page.text
    # these metrics are of SFT on preferences, not of PPO
    assert "There are no metrics" in Page(render(bare, [], [{"step": 1, "loss": 0.5}], {})).text
    Page(render({}, [], [], {}))


DRAWINGS = [("ppo_loss", METRICS), ("mean_reward", METRICS), ("kl_and_entropy", METRICS),
            ("overoptimisation", CURVE), ("training_curves", METRICS),
            ("best_of_n", [{"aggregator": a, "n": n, "gold": 0.5 + n / 50, "low": 0.4, "high": 0.9}
                           for a in ("mean", "min", "$x$") for n in (1, 4)])]


@pytest.mark.parametrize("name, rows", DRAWINGS)
def test_figures(name, rows):
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    svg = getattr(plots, name)(rows)
    page = Page(svg)
    assert svg.startswith("<svg") and svg == getattr(plots, name)(rows)
    assert dict(matplotlib.rcParams) == before
    attributes = page.tags[0][1]
    assert attributes["width"] == "100%" and "height" not in attributes
    assert attributes["viewbox"].startswith("0 0 ")
    assert "currentColor" in svg and plots.INK not in svg and "#000000" not in svg
    assert "<style" not in svg and "metadata" not in svg
    assert all(link[1:] in page.ids for link in page.links)
    assert set(re.findall(r"url\(#(.*?)\)", svg)) <= set(page.ids)
    Page(getattr(plots, name)(rows[:1]))
    Page(getattr(plots, name)([]))


def test_figures_of_one_page_share_no_id_and_mark_the_best():
    pytest.importorskip("matplotlib")
    page = Page(render())
    assert len(page.ids) == len(set(page.ids)) and sum(tag == "figure" for tag, _ in page.tags) == 4
    again = Page(plots.ppo_loss(METRICS) + plots.ppo_loss(METRICS[:3]))
    assert len(again.ids) == len(set(again.ids))
    best = "highest gold, noisy: 0.600, iteration 2; kept in best/: iteration 3"
    assert best in Page(plots.overoptimisation(CURVE)).text
    text = Page(plots.overoptimisation([row | {"gold": None} for row in CURVE])).text
    # the proxy is what it is trained for, so it has no best
    assert "kept in best/: iteration 3" in text and "highest" not in text
    assert "policy loss" in Page(plots.ppo_loss(METRICS)).text
    assert "$x$" in Page(plots.best_of_n(DRAWINGS[-1][1])).text
