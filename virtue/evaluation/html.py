"""The report as one page of HTML for a person: no script, nothing loaded from elsewhere, for light
and dark, phone and print.

This module turns scores.json and its kin into plain values; page/report.html says where they stand.
All that is shown goes through `clean`. Without matplotlib the page lacks its figures only.
"""
from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from virtue.ethics import VIRTUES
from virtue.evaluation import plots
from virtue.evaluation.feedback import judge_tests
from virtue.evaluation.report import (ROWS, command_line, in_order, is_finite, number, title,
                                      with_interval)

SHOWN, EXTREMES = 12, 3  # dialogues from the top; those of the largest rises and falls
PRINTED = 3  # of each group of dialogues, on paper
LONGEST = 160  # characters of a question that stands in one line
SECTIONS = {"scores": "Scores", "virtues": "Virtues by lens",
            "judges": "How good are judge and reward models?", "training": "Training",
            "differences": "Differences", "dialogues": "Dialogues",
            "repeat": "Settings to repeat it"}
OPTIONAL = {"scores": ("scores",), "virtues": ("virtues", "wins"), "judges": ("judges",),
            "differences": ("differences",), "dialogues": ("dialogues",)}
FIGURES = (
    (plots.ppo_loss, "Loss of PPO: policy above, value below. The study's first figure."),
    (plots.mean_reward, "Mean reward and its three lenses, standardised. The study's second "
                        "figure."),
    (plots.kl_and_entropy, "KL to the reference (two estimates) and entropy of the policy"),
    (plots.overoptimisation, "What is trained for (proxy) and gold, on PPO's own prompts, as the "
                             "policy leaves its reference. Proxy up and gold down is "
                             "over-optimisation. What is kept in best/ has the highest reward "
                             "less its penalties, for KL by the first coefficient and for turns "
                             "that did not end."))
TITLES = {"sft": "SFT", "ppo": "PPO"}
MINUS = "\N{MINUS SIGN}"
BLUE, ORANGE = "0,114,178", "213,94,0"
UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control characters, bidi overrides among them


def clean(value: object) -> Markup:
    """Safe inside an element or a quoted attribute; control characters are shown, not sent.

    What is Markup already stays as it is: the figures, and what a macro has made.
    """
    if isinstance(value, Markup):
        return value
    shown = (c if c in "\n\t\u200c\u200d" or unicodedata.category(c) not in UNSAFE
             else ascii(c)[1:-1] for c in str(value))
    return escape("".join(shown))


@functools.cache
def _template():
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent / "page"), autoescape=True,
                        finalize=clean, undefined=StrictUndefined, trim_blocks=True,
                        lstrip_blocks=True)
    return pages.get_template("report.html")


def render(scores: Mapping, samples: Sequence[dict], metrics: Sequence[dict],
           manifest: Mapping) -> str:
    """The whole page, from scores.json, the lines of samples.jsonl and of the policy's
    metrics.jsonl, and the report's virtue.json."""
    models, pairs = scores.get("models", {}), scores.get("differences", {})
    step = pairs.get(" - ".join(list(models)[:-3:-1]), {})  # the last model over the one before it
    reward = step.get("study_score_standardised") if "gold" in step else None
    direction, sentence = verdict(scores)
    metrics = [row for row in metrics if "iteration" in row]  # PPO's, not those of SFT
    parts = {
        "intro": _intro(scores, manifest), "direction": direction, "verdict": sentence,
        "coherence": coherence(scores), "tiles": _tiles(models),
        "reward": f"{title('study_score_standardised')}: {_interval(reward)}" if reward else "",
        "warnings": [warning["text"] for warning in scores.get("warnings") or []],
        "scores": _scores(models, step, scores.get("reward_models", [])),
        "virtues": _virtues(scores.get("virtues") or {}), "wins": _wins(scores.get("wins") or {}),
        "judges": _judges(scores), "differences": _differences(pairs),
        "figures": _figures(metrics, scores.get("curve")), "drawn": plots.available(),
        "dialogues": _dialogues(samples, list(models)), "interval": scores.get("interval", ""),
        "command": command_line(manifest), "commands": scores.get("commands", []),
        "settings": _texts(manifest.get("settings") or {}), "made_by": _made_by(manifest)}
    parts["sections"] = {name: words for name, words in SECTIONS.items()
                         if name not in OPTIONAL or any(parts[part] for part in OPTIONAL[name])}
    return _template().render(parts)


# ---- numbers and names


def _number(value: object, form: str = ".3f") -> str:
    return number(value, form).replace("-", MINUS)


def _interval(row: Mapping, key: str = "difference", form: str = "+.3f") -> str:
    return with_interval(row, key, form).replace("-", MINUS)


def _split(row: Mapping | None, key: str = "difference", form: str = "+.3f") -> dict[str, str]:
    """A number of a row and, apart from it, its interval; nothing where there is no row."""
    if not row:
        return {"direction": "", key: "", "interval": ""}
    value, interval = _interval(row, key, form).split(" ", 1)
    return {"direction": _direction(row), key: value, "interval": interval}


def _direction(row: Mapping) -> str:
    """rose or fell, if the interval is on one side of zero."""
    low, high = row.get("low"), row.get("high")
    return "rose" if is_finite(low) and low > 0 else "fell" if is_finite(high) and high < 0 else ""


def _model(name: str) -> str:
    name, comma, more = name.partition(", ")
    return TITLES.get(name, name) + comma + more


def _models(names: str, by: str, between: str) -> str:
    return between.join(map(_model, names.split(by)))


def _key_row(rows: Mapping) -> str:
    """The row that a report is about: gold, or where it is not known the study's Score."""
    return next((key for key in ("gold", "study_score_standardised") if key in rows),
                next(iter(rows), ""))


def _texts(rows: Mapping) -> list[tuple[str, str]]:
    """Values of a JSON object as texts."""
    return [(name, value if isinstance(value, str) else
             json.dumps(value, ensure_ascii=False, default=str)) for name, value in rows.items()]


# ---- the head of the page


def verdict(scores: Mapping) -> tuple[str, str]:
    """("rose", "fell" or "", one sentence) on the last model against the one before it; where its
    training stood on labels of a judge that may be a coin, a second sentence says so."""
    direction, sentence = _change(scores)
    coins = [lens for lens, test in judge_tests(scores).items() if test.get("coin") is True]
    if coins:
        sentence += (" But it was trained on labels of a judge that cannot be told from a coin "
                     f"that knows places ({', '.join(coins)}).")
    return direction, sentence


def _change(scores: Mapping) -> tuple[str, str]:
    names = list(scores.get("models", {}))
    rows = scores.get("differences", {}).get(" - ".join(names[:-3:-1]), {})
    key = _key_row(rows) if len(names) > 1 else ""
    if not key:
        return "", "No two models were compared."
    what = "gold" if key == "gold" else f"the {title(key)} (by its own reward models),"
    after, before = _model(names[-1]), _model(names[-2])
    direction, change = _direction(rows[key]), _interval(rows[key])
    if direction == "rose":
        return direction, f"{after} raised {what} by {change} over {before}."
    if direction == "fell":
        return direction, f"{what[0].upper()}{what[1:]} of {after} fell against {before}: {change}."
    return direction, f"No reliable difference in {what} between {after} and {before}: {change}."


def coherence(scores: Mapping) -> str:
    """One sentence: does the last model still write as the base does?"""
    models = scores.get("models", {})
    if len(models) < 2:
        return ""
    (base, old), (after, new) = list(models.items())[::len(models) - 1]
    doubtful = any(w["about"] == "coherence" for w in scores.get("warnings", []))

    def both(key: str) -> bool:
        return is_finite(old.get(key)) and is_finite(new.get(key))
    facts = []
    if both("perplexity") and old["perplexity"] > 0:
        facts.append(f"its perplexity under the base is {new['perplexity'] / old['perplexity']:.2f}"
                     f" times that of the {_model(base)}'s own answers")
    if both("ended"):
        facts.append(f"{new['ended']:.1%} of its turns ended properly "
                     f"({_model(base)}: {old['ended']:.1%})")
    if is_finite(new.get("kl")):
        facts.append(f"its KL to the reference is {_number(new['kl'], '.2f')} nats a dialogue")
    facts += ["see the warnings"] * doubtful
    judgement = (f"Coherence of {_model(after)} is doubtful" if doubtful
                 else f"{_model(after)} stays coherent")
    return judgement + (f": {', '.join(facts)}." if facts else ".")


def _intro(scores: Mapping, manifest: Mapping) -> str:
    facts = [f"{scores['prompts']} held-out prompts" if "prompts" in scores else "",
             f"{scores['prompts_too_long']} too long and dropped"
             if scores.get("prompts_too_long") else "",
             f"seed {scores['seed']}" if "seed" in scores else "",
             f"base {(manifest.get('base') or {}).get('id', 'unknown')}"]
    return ", ".join(filter(None, facts))


def _tiles(models: Mapping) -> dict:
    key = _key_row(next(iter(models.values()), {}))
    return {"title": title(key), "numbers": [(_model(name), _number(column.get(key)))
                                             for name, column in models.items()]} if key else {}


# ---- its sections


def _scores(models: Mapping, step: Mapping, reward_models: Sequence[dict]) -> dict:
    """The table; step: the differences of the last model from the one before it."""
    if not models:
        return {}
    columns, names = list(models.values()), list(map(_model, models))
    rows = [{"title": title(key), "sub": ROWS.get(key, "").startswith(" "),
             "numbers": [_number(column.get(key), ".1f" if key == "length" else ".3f")
                         for column in columns], "gain": _split(step.get(key))}
            for key in in_order(set().union(*columns))]
    before, after = (column.get("gold") for column in (columns * 2)[-2:])
    closed = len(columns) > 1 and is_finite(before) and is_finite(after) and before < 1
    return {"names": names, "rows": rows, "gained": bool(step), "before": (names * 2)[-2],
            "after": names[-1], "gold": is_finite(after),
            "closed": _number(100 * (after - before) / (1 - before), ".0f") if closed else "",
            "second": any(key.startswith("eval_reward/") for key in columns[-1]),
            "seen": any(m.get("seen") for m in reward_models)}  # known pairs of PPO's own


def shade(value: object, middle: float = 0.5, full: float = 0.3) -> str:
    """A colour, blue above the middle and orange below; `full` away from it it is deepest."""
    away, depth = value - middle if is_finite(value) else 0, 0.0
    if round(away, 2):
        depth = 0.1 + 0.65 * min(abs(away) / full, 1)  # 0.44 and 0.49 must differ on black too
    return f"rgba({BLUE if away >= 0 else ORANGE},{depth:.2f})"


def _cell(value: object, *scale: float) -> dict:
    return {"number": _number(value, ".2f"), "interval": "", "colour": shade(value, *scale)}


def _virtues(virtues: Mapping) -> list[dict]:
    """Toy only: the points of each virtue, a table for each lens with the models side by side."""
    lenses = next(iter(virtues.values()), {})
    return [{"caption": lens, "columns": list(map(_model, virtues)),
             "rows": [(virtue, [_cell(points[lens].get(virtue), 0, 0.8)
                                for points in virtues.values()]) for virtue in lenses[lens]]}
            for lens in lenses]


def _wins(wins: Mapping) -> dict:
    """Virtues by lenses, a table for each pair of models; a lens holds its questions, or them with
    the share of prompts won."""
    tables, judged = [], 0
    for pair, lenses in wins.items():
        lenses = {lens: row for lens, row in lenses.items() if row}
        judged = max([judged, *(row.get("pairs", 0) for row in lenses.values())])
        asked = [row.get("questions", row) for row in lenses.values()]
        questions = [v for v in VIRTUES if any(v in row for row in asked)]
        questions += dict.fromkeys(v for row in asked for v in row if v not in VIRTUES)
        rows = [(question, [_cell(row.get(question)) for row in asked]) for question in questions]
        if any("rate" in row for row in lenses.values()):
            shares = [_split(row, "rate", ".2f") for row in lenses.values()]
            rows.append(("share of prompts won", [
                {"number": share["rate"], "interval": share["interval"], "colour": ""}
                for share in shares]))
        tables.append({"caption": _models(pair, " vs ", " against "), "columns": list(lenses),
                       "rows": rows})
    return {"tables": tables, "judged": judged} if tables else {}


def _judges(scores: Mapping) -> dict:
    """How far what guided the training can be trusted: the reward models on pairs held out, the
    judge against gold."""
    rows = [(m["lens"] + ("" if m["of"] == "PPO" else ", second"),
             [_number(m["accuracy"]), _number(m["calibration_error"]), m["pairs"]])
            for m in scores.get("reward_models", [])]
    golds = {lens: row["gold"] for lens, row in next(iter(scores.get("wins", {}).values()), {}).items()
             if row and row.get("gold", {}).get("share") is not None}
    shares = [f"{lens} {100 * gold['share']:.0f} % [{100 * gold['low']:.0f}, "
              f"{100 * gold['high']:.0f}] of {gold['n']}" for lens, gold in golds.items()]
    return {"rows": rows, "gold": ", ".join(shares)} if rows else {}


def _figures(metrics: Sequence[dict], curve: Sequence[dict] | None) -> list[tuple[Markup, str]]:
    """Drawings with their captions, empty ones where matplotlib is missing."""
    rows_of = [curve if draw is plots.overoptimisation else metrics for draw, _ in FIGURES]
    return [(Markup(draw(rows) if plots.available() else ""), caption)
            for (draw, caption), rows in zip(FIGURES, rows_of) if rows]


def _bar(row: Mapping, most: float) -> dict:
    """The interval about zero, which is at 50 of 100, and the difference, `most` at the edge."""
    ends = [row.get(key) for key in ("low", "difference", "high")]
    if not all(map(is_finite, ends)):
        return {}
    low, at, high = (50 + 48 * end / most for end in ends)
    return {"low": f"{low:.1f}", "width": f"{high - low:.1f}", "at": f"{at - 0.6:.1f}",
            "direction": _direction(row)}


def _differences(pairs: Mapping) -> dict:
    """Every row that any pair of models was compared by, with those pairs below each other."""
    if not pairs:
        return {}
    every = [row for rows in pairs.values() for row in rows.values()]
    p = next((key for key in ("p_holm", "p") if any(r.get(key) is not None for r in every)), "")
    sizes = any(row.get("d_z") is not None for row in every)
    keys, groups = in_order(key for rows in pairs.values() for key in rows), []
    for key in keys:
        own = {pair: rows[key] for pair, rows in pairs.items() if key in rows}
        ends = [row.get(end) for row in own.values() for end in ("low", "high")]
        most = max((abs(end) for end in ends if is_finite(end)), default=0) or 1
        groups.append({"title": title(key), "rows": [
            {"pair": _models(pair, " - ", f" {MINUS} "), **_split(row), "bar": _bar(row, most),
             "p": _p(row.get(p)), "d_z": _number(row.get("d_z"), "+.2f")}
            for pair, row in own.items()]})
    return {"p": p, "sizes": sizes, "width": 3 + bool(p) + sizes, "groups": groups,
            "at_equal_length": any("at equal length" in key for key in keys)}


def _p(value: object) -> str:
    return "<0.001" if is_finite(value) and value < 0.001 else _number(value)


# ---- dialogues


def _dialogues(samples: Sequence[dict], models: Sequence[str]) -> dict:
    """The groups of dialogues that are shown, and in how many of all the reward fell."""
    changes = [(_rise(sample, models), sample) for sample in samples]
    changed = sorted((c for c in changes if c[0] is not None), key=lambda c: c[0])
    falls = [sample for rise, sample in changed if rise < 0]
    rises = [sample for rise, sample in reversed(changed) if rise > 0]
    bare = [s for s in samples if all(_reward(s[name]) is None for name in _named(s, models))]
    bare = bare if changed else []
    scored = [sample for sample in samples if sample not in bare]
    groups = {"The largest falls": falls[:EXTREMES], "The largest rises": rises[:EXTREMES],
              f"The first {min(SHOWN, len(scored))} of {len(scored)}": scored[:SHOWN],
              "Without scores, such as the study's probes": bare[:SHOWN]}
    shown = [(words, [{**_dialogue(sample, _named(sample, models)), "open": i == 0,
                       "printed": i < PRINTED} for i, sample in enumerate(group)])
             for words, group in groups.items() if group]
    return {"groups": shown, "fell": len(falls), "changed": len(changed)} if shown else {}


def _named(sample: Mapping, models: Sequence[str]) -> list[str]:
    """The models that answered: the report's, in their order, then others."""
    own = [name for name, value in sample.items() if isinstance(value, dict) and "turns" in value]
    return [name for name in models if name in own] + [name for name in own if name not in models]


def _reward(answer: Mapping) -> float | None:
    """The sum of the standardised scores, if all are known."""
    scores = answer.get("scores")
    return sum(scores) if scores and all(map(is_finite, scores)) else None


def _rise(sample: Mapping, models: Sequence[str]) -> float | None:
    """By how much the reward rose from the first model to the last."""
    rewards = [_reward(sample[name]) for name in _named(sample, models)]
    known = len(rewards) > 1 and None not in (rewards[0], rewards[-1])
    return rewards[-1] - rewards[0] if known else None


def _dialogue(sample: Mapping, names: Sequence[str]) -> dict:
    """One prompt and what each model says to it."""
    messages = sample.get("prompt") or [{"role": "user", "content": ""}]
    last, change = str(messages[-1]["content"]), ""
    rewards = [_reward(sample[name]) for name in names]
    if rewards and None not in (rewards[0], rewards[-1]):
        first, final, rise = (_number(value, "+.2f")
                              for value in (rewards[0], rewards[-1], rewards[-1] - rewards[0]))
        change = f"{first} \N{RIGHTWARDS ARROW} {final} ({rise})"
    long = len(last) > LONGEST
    asked = [(m["role"], m["content"]) for m in messages] if len(messages) > 1 or long else []
    return {"question": last[:LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}" if long else last,
            "change": change, "asked": asked,
            "answers": [_answer(name, sample[name]) for name in names]}


def _answer(name: str, answer: Mapping) -> dict:
    """What one model says: the turns with their scores, its reward and its gold."""
    gold = answer["gold"].get("overall") if isinstance(answer.get("gold"), dict) else None
    values = {"reward": (_reward(answer), "+.2f"), "gold": (gold, ".2f")}
    scores, turns = answer.get("scores") or [], answer["turns"]
    scores = [_number(score, "+.2f") for score in scores]
    beside = scores if len(scores) == len(turns) else [""] * len(turns)
    return {"name": _model(name),
            "facts": ", ".join(f"{what} {_number(value, form)}"
                               for what, (value, form) in values.items() if value is not None),
            "turns": [(lens, score, text) for (lens, text), score in zip(turns.items(), beside)]}


# ---- where it came from


def _made_by(manifest: Mapping) -> list[tuple[str, str]]:
    def named(what: Mapping, name: str, digest: str) -> str:
        return f"{what.get(name)} ({str(what.get(digest))[:12]})"
    parents = {f"from {role}": named(parent, "folder", "sha256") if isinstance(parent, dict)
               else parent for role, parent in (manifest.get("parents") or {}).items()}
    return _texts({"base": named(manifest.get("base") or {}, "id", "fingerprint"), **parents,
                   **(manifest.get("versions") or {})})
