"""The report as one page of HTML for people to read. It has no script, loads nothing from
elsewhere, and suits light and dark screens, phones and print.

page/report.html is the template, and this module supplies what it asks for. All that the page shows
goes through `clean`. Without matplotlib only the figures are missing.
"""
from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from virtue.evaluation import plots
from virtue.evaluation.feedback import judge_tests
from virtue.evaluation.report import (ROWS, command_line, in_order, is_finite, number, title,
                                      with_interval)

SHOWN, EXTREMES = 12, 3  # dialogues from the top; those of the largest rises and falls
PRINTED = 3  # of each group of dialogues, on paper
TITLES = {"prompted": "base, prompted", "sft": "SFT", "ppo": "PPO"}
BLUE, ORANGE = "0,114,178", "213,94,0"
UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control characters, bidi overrides among them
FIGURES = {
    "ppo_loss": "Loss of PPO: policy above, value below. The study's first figure.",
    "mean_reward": "Mean reward and its three lenses, standardised. The study's second figure.",
    "kl_and_entropy": "KL to the reference (two estimates) and entropy of the policy",
    "overoptimisation": "The reward that is trained for (proxy) and gold, on PPO's own prompts, as "
                        "the policy leaves its reference. If the proxy rises while gold falls, "
                        "the policy is over-optimised. The policy kept in best/ has the highest "
                        "reward less its penalties, for KL by the first coefficient and for turns "
                        "that did not end."}


def render(scores: Mapping, samples: Sequence[dict], metrics: Sequence[dict],
           manifest: Mapping) -> str:
    """The whole page, from scores.json, the lines of samples.jsonl and of the policy's
    metrics.jsonl, and the report's virtue.json."""
    models, pairs = scores.get("models", {}), scores.get("differences", {})
    return _pages().get_template("report.html").render(
        scores=scores, manifest=manifest, models=models, pairs=pairs, step=_last_step(scores),
        verdict=verdict(scores), coherence=coherence(scores), key=_key_row(*models.values()),
        rows=in_order(key for column in models.values() for key in column),
        figures=_figures(metrics, scores.get("curve")), drawn=plots.available(),
        dialogues=_dialogues(samples, list(models)), printed=PRINTED,
        command=command_line(manifest), made_by=_made_by(manifest), **_compared(pairs),
        **_judged(scores.get("wins") or {}))


@functools.cache
def _pages() -> Environment:
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent / "page"), autoescape=True,
                        finalize=clean, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {
        "model": _model, "row": title, "number": _number, "interval": _interval, "shade": shade,
        "direction": _direction, "bar": _bar, "reward": _reward, "text": _text}
    pages.tests |= {"part": lambda key: ROWS.get(key, "").startswith(" "), "finite": is_finite}
    return pages


# ---- how values are shown


def clean(value: object) -> Markup:
    """Safe inside an element or a quoted attribute; control characters are shown, not sent.

    What is Markup already stays as it is: the figures, and what a macro has made.
    """
    if isinstance(value, Markup):
        return value
    shown = (c if c in "\n\t\u200c\u200d" or unicodedata.category(c) not in UNSAFE
             else ascii(c)[1:-1] for c in str(value))
    return escape("".join(shown))


def _number(value: object, form: str = ".3f") -> str:
    return number(value, form).replace("-", "\N{MINUS SIGN}")


def _interval(row: Mapping, key: str = "difference", form: str = "+.3f") -> str:
    return with_interval(row, key, form).replace("-", "\N{MINUS SIGN}")


def _direction(row: Mapping) -> str:
    """rose or fell, if the interval is on one side of zero."""
    low, high = row.get("low"), row.get("high")
    return "rose" if is_finite(low) and low > 0 else "fell" if is_finite(high) and high < 0 else ""


def _model(names: str, between: str = "") -> str:
    """The title of a model, or a list of titles where `between`, such as " vs ", separates several
    names."""
    if between:
        return [_model(name) for name in names.split(between)]
    name, comma, more = names.partition(", ")
    return TITLES.get(name, name) + comma + more


def _text(value: object) -> str:
    """A value of a JSON file."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def shade(value: object, middle: float = 0.5, full: float = 0.3) -> str:
    """A colour, blue above the middle and orange below; `full` away from it it is deepest."""
    away, depth = value - middle if is_finite(value) else 0, 0.0
    if round(away, 2):
        depth = 0.1 + 0.65 * min(abs(away) / full, 1)  # 0.44 and 0.49 must differ on black too
    return f"rgba({BLUE if away >= 0 else ORANGE},{depth:.2f})"


def _bar(row: Mapping, rows: Sequence[Mapping]) -> Mapping[str, str]:
    """A row's interval about zero, which is at 50 of 100, on the scale of all `rows`."""
    ends = [abs(r[end]) for r in rows for end in ("low", "high") if is_finite(r.get(end))]
    values = [row.get(key) for key in ("low", "difference", "high")]
    if not all(map(is_finite, values)):
        return {}
    low, at, high = (50 + 48 * value / (max(ends) or 1) for value in values)
    return {"low": f"{low:.1f}", "width": f"{high - low:.1f}", "at": f"{at - 0.6:.1f}"}


# ---- the head of the page


def _last_step(scores: Mapping) -> dict:
    """The differences of the last model from the one before it."""
    names = [name for name in scores.get("models", {}) if name != "prompted"]
    return scores.get("differences", {}).get(" - ".join(names[:-3:-1]), {})


def _key_row(rows: Mapping = (), *_: Mapping) -> str:
    """The row that a report is about: gold, or where it is not known the study's Score."""
    preferred = [key for key in ("gold", "study_score_standardised") if key in rows]
    return next(iter([*preferred, *rows]), "")


def verdict(scores: Mapping) -> tuple[str, str]:
    """("rose", "fell" or "", one sentence) on the last model against the one before it; where its
    training stood on labels of a judge that may be a coin, a second sentence says so."""
    direction, sentence = "", "No two models were compared."
    if rows := _last_step(scores):
        names = [name for name in scores["models"] if name != "prompted"]
        after, before = map(_model, names[:-3:-1])
        key = _key_row(rows)
        direction, change = _direction(rows[key]), _interval(rows[key])
        what = "gold" if key == "gold" else f"the {title(key)} (by its own reward models),"
        sentence = {"rose": f"{after} raised {what} by {change} over {before}.",
                    "fell": f"{what[0].upper()}{what[1:]} of {after} fell against {before}: "
                            f"{change}.",
                    "": f"No reliable difference in {what} between {after} and {before}: "
                        f"{change}."}[direction]
    coins = [lens for lens, test in judge_tests(scores).items() if test.get("coin") is True]
    if coins:
        sentence += (" But it was trained on labels of a judge that cannot be told from a coin "
                     f"that knows places ({', '.join(coins)}).")
    return direction, sentence


def coherence(scores: Mapping) -> str:
    """One sentence: does the last model still write as the base does?"""
    models, facts = scores.get("models", {}), []
    if len(models) < 2:
        return ""
    (base, old), (after, new) = list(models.items())[::len(models) - 1]
    base, after = _model(base), _model(after)

    def have(*columns: Mapping, key: str) -> bool:
        return all(is_finite(column.get(key)) for column in columns)
    if have(old, new, key="perplexity") and old["perplexity"] > 0:
        facts.append(f"its perplexity under the base is {new['perplexity'] / old['perplexity']:.2f}"
                     f" times that of the {base}'s own answers")
    if have(old, new, key="ended"):
        facts.append(f"{new['ended']:.1%} of its turns ended properly ({base}: {old['ended']:.1%})")
    if have(new, key="kl"):
        facts.append(f"its KL to the reference is {_number(new['kl'], '.2f')} nats a dialogue")
    judgement = f"{after} stays coherent"
    if any(warning["about"] == "coherence" for warning in scores.get("warnings", [])):
        facts.append("see the warnings")
        judgement = f"Coherence of {after} is doubtful"
    return judgement + f": {', '.join(facts)}" * bool(facts) + "."


# ---- its sections


def _compared(pairs: Mapping) -> dict:
    """Every row that models were compared by -> pair -> difference; what tests they have."""
    keys = in_order(key for rows in pairs.values() for key in rows)
    every = [row for rows in pairs.values() for row in rows.values()]
    tests = [name for name in ("p_holm", "p", "d_z") if any(r.get(name) is not None for r in every)]
    return {"compared": {key: {pair: rows[key] for pair, rows in pairs.items() if key in rows}
                         for key in keys},
            "p": next((name for name in tests if name != "d_z"), ""), "sizes": "d_z" in tests}


def _judged(wins: Mapping) -> dict:
    """The judge's tables: pair of models -> its lenses that were judged, and the questions of any;
    on how many prompts; and on which share of them it was right, in words."""
    wins = {pair: {lens: row for lens, row in lenses.items() if row}
            for pair, lenses in wins.items()}
    tables, every = {}, [row for lenses in wins.values() for row in lenses.values()]
    for pair, lenses in wins.items():
        asked = {lens: row.get("questions", row) for lens, row in lenses.items()}
        names = [*dict.fromkeys(name for row in asked.values() for name in row)]
        shares = any("rate" in row for row in lenses.values())
        tables[pair] = {"lenses": lenses, "asked": asked, "questions": names, "shares": shares}
    golds = [(lens, row["gold"]) for lens, row in next(iter(wins.values()), {}).items()
             if row.get("gold", {}).get("share") is not None]
    right = [f"{lens} {100 * gold['share']:.0f} % [{100 * gold['low']:.0f}, "
             f"{100 * gold['high']:.0f}] of {gold['n']}" for lens, gold in golds]
    return {"wins": tables, "judged": max((row.get("pairs", 0) for row in every), default=0),
            "judge_right": ", ".join(right)}


def _figures(metrics: Sequence[dict], curve: Sequence[dict] | None) -> list[tuple[Markup, str]]:
    """Drawings with their captions, empty ones where matplotlib is missing."""
    metrics = [row for row in metrics if "iteration" in row]  # PPO's, not those of SFT
    figures = []
    for name, caption in FIGURES.items():
        if rows := curve if name == "overoptimisation" else metrics:
            drawing = getattr(plots, name)(rows) if plots.available() else ""
            figures.append((Markup(drawing), caption))
    return figures


def _reward(answer: Mapping) -> float | None:
    """The sum of the standardised scores, if all are known."""
    scores = answer.get("scores")
    return sum(scores) if scores and all(map(is_finite, scores)) else None


def _dialogues(samples: Sequence[dict], models: Sequence[str]) -> dict:
    """The groups of dialogues that are shown, and in how many of all the reward fell."""
    talks = []
    for sample in samples:
        answers = {name: value for name, value in sample.items()
                   if isinstance(value, dict) and "turns" in value}
        order = [name for name in models if name in answers]
        answers = {name: answers[name] for name in dict.fromkeys([*order, *answers])}
        rewards = [_reward(answer) for answer in answers.values()] or [None]
        scored = None not in (rewards[0], rewards[-1])
        talks.append({"messages": sample.get("prompt") or [{"role": "user", "content": ""}],
                      "answers": answers, "ends": (rewards[0], rewards[-1]) if scored else (),
                      "rise": rewards[-1] - rewards[0] if scored and len(rewards) > 1 else None,
                      "scored": any(reward is not None for reward in rewards)})
    changed = sorted((t for t in talks if t["rise"] is not None), key=lambda t: t["rise"])
    falls = [talk for talk in changed if talk["rise"] < 0]
    rises = [talk for talk in reversed(changed) if talk["rise"] > 0]
    scored = [talk for talk in talks if talk["scored"] or not changed]
    bare = [talk for talk in talks if not talk["scored"] and changed]
    groups = {"The largest falls": falls[:EXTREMES], "The largest rises": rises[:EXTREMES],
              f"The first {min(SHOWN, len(scored))} of {len(scored)}": scored[:SHOWN],
              "Without scores, such as the study's probes": bare[:SHOWN]}
    groups = {words: group for words, group in groups.items() if group}
    return {"groups": groups, "fell": len(falls), "changed": len(changed)} if groups else {}


def _made_by(manifest: Mapping) -> dict[str, object]:
    """The base, the parents and the versions of a virtue.json."""
    def named(what: Mapping, name: str, digest: str) -> str:
        return f"{what.get(name)} ({str(what.get(digest))[:12]})"
    parents = {f"from {role}": named(parent, "folder", "sha256") if isinstance(parent, dict)
               else parent for role, parent in (manifest.get("parents") or {}).items()}
    return {"base": named(manifest.get("base") or {}, "id", "fingerprint"), **parents,
            **(manifest.get("versions") or {})}
