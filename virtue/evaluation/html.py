"""The report as one page of HTML for a person: no script, nothing loaded from elsewhere, light, dark, phone and print.

What comes from models, data or paths goes through `clean`. Without matplotlib the page lacks its figures only.
"""
from __future__ import annotations

import json
import math
import shlex
import unicodedata
from collections.abc import Sequence
from html import escape

from virtue.evaluation import plots
from virtue.ethics import VIRTUES
from virtue.evaluation.feedback import judge_tests
from virtue.evaluation.report import ROWS

SHOWN, EXTREMES, PRINTED = 12, 3, 3  # transcripts from the top, of the largest rises and falls, and of each group on paper
_MINUS = "\N{MINUS SIGN}"
_TITLES = {"sft": "SFT", "ppo": "PPO"}
_SCRIPTS = {"policy": "ppo", "value": "ppo", "revisions": "data", "preferences": "data"}  # stage of a manifest: run_*.py, if not the same
_HANDED_ON = ("prompts", "max_prompt_tokens", "max_new_tokens", "temperature")  # in their settings for later stages, no flags of run_sft.py and run_rm.py
_CSS = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1d21;--soft:#5c626b;--line:#d9dce1;--card:#f5f6f8;--up:#0072b2;--down:#c25400;--warn:#fff1dc}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14161a;--fg:#e6e7ea;--soft:#a2a8b2;--line:#353942;--card:#1d2026;--up:#56b4e9;--down:#f0954f;--warn:#3a2a12}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem;background:var(--bg);color:var(--fg);font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.2rem;margin:2.2rem 0 .4rem}h3{font-size:1rem;margin:1.2rem 0 .4rem}h4{font-size:.95rem;margin:0}
p{margin:.4rem 0;max-width:46rem}small,.soft,caption,figcaption{color:var(--soft);font-size:.85rem}a{color:inherit}nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem}
.verdict{font-size:1.3rem;line-height:1.35;font-weight:600;border-left:.35rem solid var(--soft);padding-left:.8rem;margin:1rem 0}
.up{border-color:var(--up)}.down{border-color:var(--down)}
.warnings{background:var(--warn);border:2px solid var(--down);border-radius:.5rem;padding:.6rem 1rem;margin:1rem 0}.warnings ul{margin:.2rem 0;padding-left:1.2rem}
.tiles,.turns,.figures{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,15rem),1fr))}
.tiles{grid-template-columns:repeat(auto-fit,minmax(6rem,1fr))}.figures{grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr))}
.tiles div,.turns section{background:var(--card);border-radius:.5rem;padding:.6rem .8rem}.tiles b{display:block;font-size:1.6rem;line-height:1.2}
figure{margin:.4rem 0}svg{display:block;max-width:100%;height:auto}
.scroll{overflow-x:auto;overflow-wrap:normal}table{border-collapse:collapse;font-variant-numeric:tabular-nums}caption{text-align:left;padding:.2rem 0}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top;white-space:nowrap}th:first-child,td.left{text-align:left;white-space:normal}
tbody th{font-weight:400}tbody th.sub{padding-left:1.6rem;color:var(--soft)}tbody th.pair{white-space:nowrap}thead th,tbody th.group{font-weight:600}td small{display:block}
td.interval{vertical-align:middle}.interval svg{width:16rem;max-width:none;height:.9rem}.interval rect{fill:var(--soft)}.interval .zero{fill:var(--soft)}
.interval .rose{fill:var(--up)}.interval .fell{fill:var(--down)}.gain.rose{color:var(--up)}.gain.fell{color:var(--down)}.gain small{display:inline}
.heat{display:flex;flex-wrap:wrap;gap:.5rem 2.5rem}.heat td,.heat thead th{text-align:center;min-width:4rem}.heat td,.heat th{border:2px solid var(--bg)}.heat th{padding-left:0}
details{border:1px solid var(--line);border-radius:.5rem;margin:.5rem 0;padding:.5rem .8rem}summary{cursor:pointer}summary small{white-space:nowrap}
dl{margin:.3rem 0}dt{color:var(--soft);font-size:.85rem;margin-top:.4rem}dd{margin:0}.text,pre{white-space:pre-wrap}pre{background:var(--card);border-radius:.5rem;padding:.8rem;font-size:.85rem}
@media(max-width:40rem){body{padding:.75rem}th,td{padding:.25rem .2rem}.scroll{font-size:.85rem}.scroll small{font-size:.75rem}.interval{display:none}tbody th.sub{padding-left:.6rem}
.heat td,.heat thead th{min-width:0;padding:.25rem .1rem}.heat td{width:4.2rem}.heat small{white-space:normal}.gain small{display:block;font-size:.65rem}}
@media print{body{max-width:none;padding:0;font-size:10pt}nav{display:none}h2,h3,summary{break-after:avoid}figure,tr,.turns section,.warnings{break-inside:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}details.paper::details-content{content-visibility:visible;block-size:auto}.scroll{overflow:visible}
.figures{grid-template-columns:1fr 1fr}.turns{grid-template-columns:repeat(auto-fit,minmax(9rem,1fr))}.heat table{break-inside:avoid}}
"""


def clean(value: object) -> str:
    """Safe inside an element or a quoted attribute; control characters, bidi overrides among them, are shown, not sent."""
    shown = (c if c in "\n\t\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else ascii(c)[1:-1] for c in str(value))
    return escape("".join(shown), quote=True)


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _number(value: object, form: str = ".3f") -> str:
    return format(value, form).replace("-", _MINUS) if _finite(value) else "\N{EN DASH}"


def _p(value: object) -> str:
    return "&lt;0.001" if _finite(value) and value < 0.001 else _number(value)


def _model(name: str) -> str:
    name, comma, more = name.partition(", ")
    return clean(_TITLES.get(name, name) + comma + more)


def _title(key: str) -> str:
    return clean(ROWS.get(key, key).strip())


def _interval(found: dict) -> str:
    return f"{_number(found.get('difference'), '+.3f')} [{_number(found.get('low'), '+.3f')}, {_number(found.get('high'), '+.3f')}]"


def _direction(found: dict) -> str:
    """rose or fell, if the interval is on one side of zero."""
    low, high = found.get("low"), found.get("high")
    return "rose" if _finite(low) and low > 0 else "fell" if _finite(high) and high < 0 else ""


def _key_row(rows: dict) -> str:
    return next((key for key in ("gold", "study_score_standardised") if key in rows), next(iter(rows), ""))


def _by_rows(keys: set) -> list[str]:
    """In the order of ROWS; what is unknown there comes last."""
    return [key for key in ROWS if key in keys] + sorted(keys - set(ROWS))


def verdict(scores: dict) -> tuple[str, str]:
    """("rose", "fell" or "", one sentence of HTML) on the last model against the one before it; where its
    training stood on labels of a judge that may be a coin, a second sentence says so."""
    direction, sentence = _change(scores)
    coins = [lens for lens, test in judge_tests(scores).items() if test.get("coin") is True]
    if coins:
        sentence += (" But it was trained on labels of a judge that cannot be told from a coin that knows places "
                     f"({clean(', '.join(coins))}).")
    return direction, sentence


def _change(scores: dict) -> tuple[str, str]:
    names, pairs = list(scores.get("models", {})), scores.get("differences", {})
    pair = f"{names[-1]} - {names[-2]}" if len(names) > 1 else ""
    key = _key_row(pairs.get(pair, {}))
    if not key:
        return "", "No two models were compared."
    found, name = pairs[pair][key], "gold" if key == "gold" else f"the {_title(key)} (by its own reward models),"
    after, before, direction = _model(names[-1]), _model(names[-2]), _direction(found)
    if direction == "rose":
        return direction, f"{after} raised {name} by {_interval(found)} over {before}."
    if direction == "fell":
        return direction, f"{name[0].upper()}{name[1:]} of {after} fell against {before}: {_interval(found)}."
    return direction, f"No reliable difference in {name} between {after} and {before}: {_interval(found)}."


def coherence(scores: dict) -> str:
    """One sentence of HTML: does the last model still write as the base does?"""
    models = scores.get("models", {})
    if len(models) < 2:
        return ""
    (base, old), (after, new) = list(models.items())[::len(models) - 1]
    doubtful, facts = any(w["about"] == "coherence" for w in scores.get("warnings", [])), []
    if _finite(old.get("perplexity")) and _finite(new.get("perplexity")) and old["perplexity"] > 0:
        facts.append(f"its perplexity under the base is {new['perplexity'] / old['perplexity']:.2f} times that of the {_model(base)}'s own answers")
    if _finite(old.get("ended")) and _finite(new.get("ended")):
        facts.append(f"{new['ended']:.1%} of its turns ended properly ({_model(base)}: {old['ended']:.1%})")
    if _finite(new.get("kl")):
        facts.append(f"its KL to the reference is {_number(new['kl'], '.2f')} nats a dialogue")
    facts += ["see the warnings"] * doubtful
    judgement = f"Coherence of {_model(after)} is doubtful" if doubtful else f"{_model(after)} stays coherent"
    return judgement + (f": {', '.join(facts)}." if facts else ".")


def _tiles(models: dict) -> str:
    key = _key_row(next(iter(models.values()), {}))
    tiles = "".join(f"<div>{_model(name)}<b>{_number(column.get(key))}</b></div>" for name, column in models.items())
    return f'<div class="tiles">{tiles}</div><small>{_title(key)}</small>' if key else ""


def _scores(models: dict, gains: dict, seen: bool) -> str:
    """The table; gains: the last model minus the one before it; seen: the second reward models know pairs of PPO's own."""
    columns, closed = list(models.values()), ""
    notes = ["Score and rewards: what the reward models say, in their own units, or standardised by the SFT model's answers. Ended, named, fits, broken and "
             "distinct are shares from 0 to 1; distinct: different texts over all texts, 1 = no two alike. Perplexity: how little the base expects the text; "
             "far from the base's own, in either direction, the text has changed its nature."]
    if _finite(columns[-1].get("gold")):
        notes.append("Gold: the toy's own measure, which training never sees; the oracle knows the best answer to every prompt. Names masked: person and thing of the "
                     "prompt replaced, so that one stock phrase counts as one text. Higher is better, for broken sentences lower.")
        before, after = (c.get("gold") for c in columns[-2:]) if len(columns) > 1 else (None, None)
        if _finite(before) and _finite(after) and before < 1:
            closed = (f"<p>Of the distance in gold from {_model(list(models)[-2])} to the oracle, {_model(list(models)[-1])} closes {_number(100 * (after - before) / (1 - before), '.0f')} %.</p>")
    if any(key.startswith("eval_reward/") for key in columns[-1]):
        notes.append("Second reward models: those of --eval-rm, " + ("which were trained on pairs that PPO's own saw, so they are not unseen." if seen else
                                                                     "trained on pairs that PPO's own never saw."))
    step = f" {_MINUS} ".join(map(_model, list(models)[:-3:-1]))
    head = "".join(f"<th>{_model(name)}</th>" for name in models) + (f"<th class=gain>{step} <small>[95 %]</small></th>" if gains else "")
    body = "".join(f"<tr><th{' class=sub' if ROWS.get(key, '').startswith(' ') else ''}>{_title(key)}</th>"
                   + "".join(f"<td>{_number(column.get(key), '.1f' if key == 'length' else '.3f')}</td>" for column in models.values())
                   + (f"<td class='gain {_direction(gains.get(key, {}))}'>{_interval(gains[key]).replace(' [', ' <small>[') + '</small>' if key in gains else ''}</td>" if gains else "") + "</tr>"
                   for key in _by_rows(set().union(*models.values())))
    return (f'{closed}<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            + "".join(f"<p class=soft>{note}</p>" for note in notes))


def _picture(found: dict, most: float) -> str:
    """The interval as a bar about zero, which is at 50 of 100, with a mark where the difference is."""
    if not all(_finite(found.get(key)) for key in ("difference", "low", "high")):
        return ""
    low, at, high = (50 + 48 * found[key] / most for key in ("low", "difference", "high"))
    mark = f' class="{_direction(found)}"'
    return (f'<svg viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true"><rect class="zero" x="49.6" y="0" width="0.8" height="12"/>'
            f'<rect{mark} opacity="0.5" x="{low:.1f}" y="3" width="{high - low:.1f}" height="6"/><rect{mark} x="{at - 0.6:.1f}" y="1" width="1.2" height="10"/></svg>')


def _differences(pairs: dict) -> str:
    found = [f for rows in pairs.values() for f in rows.values()]
    p = next((key for key in ("p_holm", "p") if any(f.get(key) is not None for f in found)), None)
    sizes = any(f.get("d_z") is not None for f in found)
    head = "<th></th><th>difference</th><th></th>" + (f"<th>{'p, Holm' if p == 'p_holm' else 'p'}</th>" if p else "") + ("<th>d<sub>z</sub></th>" if sizes else "")
    body = ""
    for key in _by_rows({key for rows in pairs.values() for key in rows}):
        most = max((abs(f[end]) for f in (rows[key] for rows in pairs.values() if key in rows) for end in ("low", "high") if _finite(f.get(end))), default=0) or 1
        body += f'<tr><th class="group" colspan="{3 + bool(p) + sizes}">{_title(key)}</th></tr>'
        for pair, f in ((pair, rows[key]) for pair, rows in pairs.items() if key in rows):
            difference, interval = _interval(f).split(" ", 1)
            body += (f"<tr><th class='sub pair'>{f' {_MINUS} '.join(map(_model, pair.split(' - ')))}</th><td>{difference}<small>{interval}</small></td>"
                     f"<td class=interval>{_picture(f, most)}</td>" + (f"<td>{_p(f.get(p))}</td>" if p else "")
                     + (f"<td>{_number(f.get('d_z'), '+.2f')}</td>" if sizes else "") + "</tr>")
    equal = ("<p class=soft>At equal length: the least-squares line of the difference on the difference of length, read where lengths are equal. "
             "Where every answer grew, that lies outside what was seen: an extrapolation.</p>") if any("at equal length" in key for rows in pairs.values() for key in rows) else ""
    return ("<p class=soft>In brackets and as bars: the interval about zero, on one scale for each measure. Blue: above zero; orange: below; grey: no reliable difference."
            f"{' p: corrected by Holm over all rows of this table.' if p == 'p_holm' else ''}</p>{equal}"
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def _heat(value: object, middle: float = 0.5, full: float = 0.3) -> str:
    """A cell, blue above the middle and orange below; `full` away from it the colour is deepest."""
    away = value - middle if _finite(value) else 0
    depth = 0.1 + 0.65 * min(abs(away) / full, 1) if round(away, 2) else 0  # 0.44 and 0.49 must differ on black too
    return f'<td style="background:rgba({"0,114,178" if away >= 0 else "213,94,0"},{depth:.2f})">{_number(value, ".2f")}</td>'


def _virtues(virtues: dict) -> str:
    """Toy only: the points of each virtue by lens, a table for each lens with the models side by side."""
    models, lenses = list(virtues), list(next(iter(virtues.values()), {}))
    tables = "".join(
        f"<table><caption>{clean(lens)}</caption><thead><tr><th></th>{''.join(f'<th>{_model(name)}</th>' for name in models)}</tr></thead><tbody>"
        + "".join(f"<tr><th>{clean(v)}</th>{''.join(_heat(virtues[name][lens].get(v), 0, 0.8) for name in models)}</tr>" for v in virtues[models[0]][lens])
        + "</tbody></table>" for lens in lenses)
    return ("<p>Gold, virtue by virtue: mean points of a turn. Action: 1 for a virtue shown, −1 violated, −0.5 overdone, 0 where it does not come up; motivation and "
            "consequence: 1 for a virtue claimed that the action shows, −1 for one that it violates.</p>"
            f'<div class="heat scroll">{tables}</div>') if tables else ""


def _judges(scores: dict) -> str:
    """How far what guided the training can be trusted: the reward models on pairs held out, the judge against gold."""
    body = "".join(f"<tr><th>{clean(m['lens'])}{'' if m['of'] == 'PPO' else ', second'}</th><td>{_number(m['accuracy'])}</td>"
                   f"<td>{_number(m['calibration_error'])}</td><td>{clean(m['pairs'])}</td></tr>"
                   for m in scores.get("reward_models", []))
    if not body:
        return ""
    table = ('<div class="scroll"><table><thead><tr><th>reward model</th><th>accuracy</th><th>calibration error</th><th>held-out pairs</th></tr></thead>'
             f"<tbody>{body}</tbody></table></div><p class=soft>Measured at their training, against the judge's own labels: they show how well the judge was learned, not how right it is.</p>")
    said = [f"{clean(lens)} {100 * row['gold']['share']:.0f} % [{100 * row['gold']['low']:.0f}, {100 * row['gold']['high']:.0f}] of {row['gold']['n']}"
            for lens, row in next(iter(scores.get("wins", {}).values()), {}).items() if row and row.get("gold", {}).get("share") is not None]
    judge = f"The judge prefers the answer of higher gold on {', '.join(said)} pairs that it compared here. " if said else ""
    return f"{table}<p>{judge}What the judge agrees with on pairs of your choice: <code>python run_eval.py judge --pairs FILE --out FOLDER</code></p>"


def _wins(wins: dict) -> str:
    """Virtues by lenses, a table for each pair of models; a lens holds its questions, or them with the share of prompts won."""
    tables, judged = "", max((row.get("pairs", 0) for lenses in wins.values() for row in lenses.values() if row), default=0)
    for pair, lenses in wins.items():
        lenses = {lens: row for lens, row in lenses.items() if row}
        asked = {lens: row.get("questions", row) for lens, row in lenses.items()}
        questions = [v for v in VIRTUES if any(v in row for row in asked.values())]
        questions += dict.fromkeys(v for row in asked.values() for v in row if v not in VIRTUES)
        body = "".join(f"<tr><th>{clean(v)}</th>{''.join(_heat(row.get(v)) for row in asked.values())}</tr>" for v in questions)
        if any("rate" in row for row in lenses.values()):
            body += "<tr><th>share of prompts won</th>" + "".join(
                f"<td>{_number(row.get('rate'), '.2f')}<small>[{_number(row.get('low'), '.2f')}, {_number(row.get('high'), '.2f')}]</small></td>" for row in lenses.values()) + "</tr>"
        tables += (f"<table><caption>{' against '.join(map(_model, pair.split(' vs ')))}</caption><thead><tr><th></th>"
                   f"{''.join(f'<th>{clean(lens)}</th>' for lens in lenses)}</tr></thead><tbody>{body}</tbody></table>")
    return (f"<p>P(the judge prefers the first-named model), both orders averaged{f', on {clean(judged)} prompts' if judged else ''}. Blue: it does; orange: it prefers "
            "the other; 0.5 is no difference. No model was trained on the questions after the five virtues, nor on the other wording: they are asked for this report only.</p>"
            f'<div class="heat scroll">{tables}</div>')


def _figures(metrics: Sequence[dict], curve: Sequence[dict] | None) -> str:
    metrics = [row for row in metrics if "iteration" in row]  # PPO's, not those of SFT on preferences
    figures = [(plots.ppo_loss, metrics, "Loss of PPO: policy above, value below. The study's first figure."),
               (plots.mean_reward, metrics, "Mean reward and its three lenses, standardised. The study's second figure."),
               (plots.kl_and_entropy, metrics, "KL to the reference (two estimates) and entropy of the policy"),
               (plots.overoptimisation, curve, "What is trained for (proxy) and gold, on PPO's own prompts, as the policy leaves its reference. Proxy up and gold down is over-optimisation. "
                "What is kept in best/ has the highest reward less its penalties, for KL by the first coefficient and for turns that did not end.")]
    figures = [(draw, rows, caption) for draw, rows, caption in figures if rows]
    if not figures:
        return "<p>There are no metrics of a training here.</p>"
    if not plots.available():
        return '<p>The figures need matplotlib: <code>pip install ".[report]"</code></p>'
    return f'<div class="figures">{"".join(f"<figure>{draw(rows)}<figcaption>{caption}</figcaption></figure>" for draw, rows, caption in figures)}</div>'


def _sum(answer: object) -> float | None:
    found = answer.get("scores") if isinstance(answer, dict) else None
    return sum(found) if found and all(map(_finite, found)) else None


def _gold(answer: dict) -> object:
    return answer["gold"].get("overall") if isinstance(answer.get("gold"), dict) else None


def _dialogue(sample: dict, names: Sequence[str], is_open: bool, printed: bool) -> str:
    """One prompt and what each model says to it, behind a line to click on; printed: on paper too."""
    messages = sample.get("prompt") or [{"role": "user", "content": ""}]
    last, ends = str(messages[-1]["content"]), [_sum(sample[name]) for name in (names[0], names[-1])] if names else [None]
    change = f" <small>{_number(ends[0], '+.2f')} \N{RIGHTWARDS ARROW} {_number(ends[1], '+.2f')} ({_number(ends[1] - ends[0], '+.2f')})</small>" if None not in ends else ""
    columns = ""
    for name in names:
        facts = [f"{what} {_number(value, form)}" for what, value, form in (("reward", _sum(sample[name]), "+.2f"), ("gold", _gold(sample[name]), ".2f")) if value is not None]
        said, scores = sample[name]["turns"], sample[name].get("scores") or []
        beside = [f" <small>{_number(score, '+.2f')}</small>" for score in scores] if len(scores) == len(said) else [""] * len(said)
        turns = "".join(f'<dt>{clean(lens)}{score}</dt><dd class="text" dir="auto">{clean(text)}</dd>' for (lens, text), score in zip(said.items(), beside))
        columns += f"<section><h4>{_model(name)} <small>{', '.join(facts)}</small></h4><dl>{turns}</dl></section>"
    asked = "".join(f'<dt>{clean(m["role"])}</dt><dd class="text" dir="auto">{clean(m["content"])}</dd>' for m in messages)
    asked = f"<dl>{asked}</dl>" if len(messages) > 1 or len(last) > 160 else ""
    return (f'<details{" open" if is_open else ""} class="{"paper" if printed else "screen"}"><summary><bdi>{clean(last if len(last) <= 160 else last[:159] + chr(0x2026))}</bdi>{change}</summary>'
            f'{asked}<div class="turns">{columns}</div></details>')


def _samples(samples: Sequence[dict], models: Sequence[str]) -> str:
    def names(sample: dict) -> list[str]:
        own = [name for name, value in sample.items() if isinstance(value, dict) and "turns" in value]
        return [name for name in models if name in own] + [name for name in own if name not in models]
    changed = []
    for sample in samples:
        ends = [_sum(sample[name]) for name in names(sample)]
        if len(ends) > 1 and None not in (ends[0], ends[-1]):
            changed.append((ends[-1] - ends[0], sample))
    changed.sort(key=lambda pair: pair[0])
    falls, rises = [s for c, s in changed if c < 0][:EXTREMES], [s for c, s in reversed(changed) if c > 0][:EXTREMES]
    unscored = [s for s in samples if not any(_sum(s[name]) is not None for name in names(s))]
    scored = [s for s in samples if s not in unscored] if changed else list(samples)
    fell = sum(c < 0 for c, _ in changed)
    groups = [("The largest falls", falls), ("The largest rises", rises), (f"The first {min(SHOWN, len(scored))} of {len(scored)}", scored[:SHOWN])]
    groups += [("Without scores, such as the study's probes", unscored[:SHOWN])] if changed else []
    page = f"<p>Beside each turn: its lens's standardised score; reward: the three summed. From the first to the last model it fell in {fell} of {len(changed)} dialogues.</p>" if changed else ""
    return page + "".join(f"<h3>{title}</h3>{''.join(_dialogue(s, names(s), i == 0, i < PRINTED) for i, s in enumerate(group))}" for title, group in groups if group)


def command_line(manifest: dict) -> str:
    """What to type to get this folder again; as plain text, not yet HTML."""
    stage, settings = str(manifest.get("stage", "")), dict(manifest.get("settings") or {})
    script = "sft" if stage == "policy" and "data" in settings else _SCRIPTS.get(stage, stage)  # SFT on chosen dialogues is a policy too
    parts = [shlex.join(["python", f"run_{script}.py", *filter(None, [settings.pop("command", None)])])]
    for name, value in settings.items():
        if value is None or value is False or script in ("sft", "rm") and name in _HANDED_ON:
            continue
        flag = "--" + name.replace("_", "-")
        values = [] if value is True else [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]
        part = f"{flag}={shlex.quote(values[0])}" if len(values) == 1 and values[0].startswith("-") else shlex.join([flag, *values])
        if len(parts[-1]) + len(part) < 90:
            parts[-1] += " " + part
        else:
            parts.append(part)
    return " \\\n    ".join(parts)


def _table(rows: dict) -> str:
    return "<div class=scroll><table><tbody>" + "".join(
        f"<tr><th>{clean(k)}</th><td class=left>{clean(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False, default=str))}</td></tr>" for k, v in rows.items()) + "</tbody></table></div>"


def _repeat(manifest: dict, commands: Sequence[str]) -> str:
    parents = {f"from {name}": f"{parent.get('folder')} ({str(parent.get('sha256'))[:12]})" if isinstance(parent, dict) else parent
               for name, parent in (manifest.get("parents") or {}).items()}
    base = manifest.get("base") or {}
    made = {"base": f"{base.get('id')} ({str(base.get('fingerprint'))[:12]})", **parents, **(manifest.get("versions") or {})}
    before = "".join(f"<pre>{clean(command)}</pre>" for command in commands)
    before = f"<details class=paper><summary>the {len(commands)} runs before it, in order</summary>{before}</details>" if before else ""
    return (f"<pre>{clean(command_line(manifest))}</pre>{before}<details class=paper><summary>base, parents, versions</summary>{_table(made)}</details>"
            f"<details class=paper><summary>all settings</summary>{_table(manifest.get('settings') or {})}</details>")


def render(scores: dict, samples: Sequence[dict], metrics: Sequence[dict], manifest: dict) -> str:
    """The whole page, from scores.json, the lines of samples.jsonl and of the policy's metrics.jsonl, and the report's virtue.json."""
    models, pairs, warnings = scores.get("models", {}), scores.get("differences", {}), scores.get("warnings") or []
    direction, sentence = verdict(scores)
    step = pairs.get(" - ".join(list(models)[:-3:-1]), {})  # of the last model over the one before it
    reward = step.get("study_score_standardised") if "gold" in step else None
    seen = any(m.get("seen") for m in scores.get("reward_models", []))
    sections = [("scores", "Scores", _scores(models, step, seen) if models else ""),
                ("virtues", "Virtues by lens", _virtues(scores.get("virtues") or {}) + (_wins(scores["wins"]) if scores.get("wins") else "")),
                ("judges", "How good are judge and reward models?", _judges(scores)),
                ("training", "Training", _figures(metrics, scores.get("curve"))), ("differences", "Differences", _differences(pairs) if pairs else ""),
                ("dialogues", "Dialogues", _samples(samples, list(models))), ("repeat", "Settings to repeat it", _repeat(manifest, scores.get("commands", [])))]
    sections = [section for section in sections if section[2]]
    intro = [f"{clean(scores['prompts'])} held-out prompts" if "prompts" in scores else "", f"{clean(scores['prompts_too_long'])} too long and dropped" if scores.get("prompts_too_long") else "",
             f"seed {clean(scores['seed'])}" if "seed" in scores else "", f"base {clean((manifest.get('base') or {}).get('id', 'unknown'))}"]
    trained = f"<p>What its reward models say, as the {_title('study_score_standardised')}: {_interval(reward)}.</p>" if reward else ""
    one_run = ("<p class=soft>Intervals are over prompts, of one training run: another seed may differ by more. "
               "Several runs together: <code>python experiments/summary.py RUN RUN ...</code></p>") if pairs else ""
    listed = "".join(f"<li>{clean(w['text'])}</li>" for w in warnings)
    warned = f'<div class="warnings" role="alert"><b>Warnings</b><ul>{listed}</ul></div>' if warnings else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>virtue: report</title>
<style>{_CSS}</style>
</head>
<body>
<header><h1>Report on a run of virtue</h1><small>{', '.join(filter(None, intro))}</small></header>
<main>
<p class="verdict {dict(rose='up', fell='down').get(direction, '')}">{sentence}</p>
<p>{coherence(scores)}</p>{trained}{one_run}
{warned}{_tiles(models)}
<nav>{''.join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)}</nav>
{''.join(f'<section id="{name}"><h2>{title}</h2>{body}</section>' for name, title, body in sections)}
</main>
<footer><small>{clean(scores.get('interval', ''))}</small></footer>
</body>
</html>
"""
