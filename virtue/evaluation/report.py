"""What an evaluation says: a column of numbers for each model, intervals of differences, warnings,
transcripts, and how they are written."""
from __future__ import annotations

import math
import os
import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from virtue import VirtueError
from virtue.dialogue import Dialogue
from virtue.ensemble import study_score
from virtue.ethics import LENSES
from virtue.evaluation import stats, textstats
from virtue.judge import unanswered
from virtue.plumbing.artefacts import read_manifest
from virtue.plumbing.records import is_number

# name of a row -> what it is; two spaces before one that belongs to the row above it
ROWS = {
    "gold": "gold, 0 worst to 1 oracle", **{f"gold/{lens}": f"  gold, {lens}" for lens in LENSES},
    "study_score": "study's Score, raw", "study_score_standardised": "study's Score, standardised",
    **{f"reward/{lens}": f"reward, {lens} (standardised)" for lens in LENSES},
    **{f"eval_reward/{lens}": f"second reward model, {lens}" for lens in LENSES},
    "kl": "KL to the reference (nats a dialogue)", "ended": "turns that ended properly",
    "length": "tokens a dialogue", "perplexity": "perplexity under the base",
    "likelihood": "log-odds of virtues to vices (nats a token)",
    **{f"distinct/{lens}": f"distinct share, {lens}" for lens in LENSES},
    **{f"patterns/{lens}": f"  with names masked, {lens}" for lens in LENSES},
    "named": "right person and thing named", "fits": "motivations that fit the action",
    "broken": "broken sentences", "repetition": "repeated word triples",
    "virtue_words": "virtue words a hundred words", "refusals": "answers that refuse",
    "hedges": "hedging phrases a hundred words", "flattery": "flattering phrases a hundred words",
}
ENDS = ("difference", "low", "high")


# ---- how numbers are written


def title(key: str) -> str:
    """What a row is, in words; the key itself where ROWS lacks it."""
    return ROWS.get(key, key).strip()


def in_order(keys: Iterable[str]) -> list[str]:
    """Keys of rows in the order of ROWS; what is unknown there comes last."""
    keys = set(keys)
    return [key for key in ROWS if key in keys] + sorted(keys - set(ROWS))


def is_finite(value: object) -> bool:
    """Whether a value of a JSON file is a number that can be shown."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(value: object, form: str = ".3f") -> str:
    """A number in this form; a dash for anything that is not a finite number."""
    return format(value, form) if is_finite(value) else "\N{EN DASH}"


def with_interval(row: Mapping, key: str = "difference", form: str = "+.3f") -> str:
    """A number of a row, with the interval that the row has for it: +0.149 [+0.120, +0.180]."""
    value, low, high = (number(row.get(name), form) for name in (key, "low", "high"))
    return f"{value} [{low}, {high}]"


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Models side by side, as text: model -> column of `measure`.

    It leaves out rows that the first model lacks and names outside ROWS. KeyError: another model
    lacks a row.
    """
    first = next(iter(columns.values()))
    lines = [f"{'':44}" + "".join(f"{name:>10}" for name in columns)]
    for key, words in ROWS.items():
        if key in first:
            lines.append(f"{words:44}" + "".join(f"{c[key]:10.3f}" for c in columns.values()))
    return "\n".join(lines)


def visible(text: str) -> str:
    """A text for a terminal: control characters are shown, not sent."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def side_by_side(prompt: str, answers: Mapping[str, Sequence[str]], width: int = 100) -> str:
    """One prompt's dialogues, model by model, for a terminal."""
    def wrap(name: str, text: str) -> str:
        return textwrap.fill(f"{name}: {visible(text)}", width, initial_indent="  ",
                             subsequent_indent="      ")
    lines = [wrap("PROMPT", prompt)[2:]]
    for name, turns in answers.items():
        lines += [f" {name}", *(wrap(lens, text) for lens, text in zip(LENSES, turns))]
    return "\n".join(lines)


# ---- what is measured


def distinct_share(texts: Sequence[str]) -> float:
    """Different texts over all texts, in [1/n, 1]: 1 = no two dialogues say the same, 1/n = one
    stock answer. ZeroDivisionError: no text."""
    return len(set(texts)) / len(texts)


def mask_names(texts: Sequence[Sequence[str]], slots: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Toy dialogues with their prompt's person and thing as {p} and {t}: a stock phrase is then
    one text, which the names of hundreds of prompts would hide."""
    return [[re.sub(rf"\b{t}\b", "{t}", re.sub(rf"\b{p}\b", "{p}", text)) for text in turns]
            for turns, (p, t) in zip(texts, slots, strict=True)]


def measure(dialogues: Sequence[Dialogue], texts: Sequence[Sequence[str]], raw: np.ndarray,
            standardised: np.ndarray, kl: np.ndarray, base_logprob_sums: np.ndarray,
            gold: Sequence | None = None, patterns: Sequence[Sequence[str]] | None = None,
            ) -> dict[str, float]:
    """One model's column of the table: its mean over n dialogues, by the names of ROWS.

    texts: n dialogues of three turns; raw, standardised (3, n) scores; kl (n,) nats;
    base_logprob_sums (n,) log-prob of all sampled tokens under the base; on toy also gold, n
    toy.gold.Gold, and patterns, the texts with names masked.
    """
    tokens = [sum(t.end - t.start for t in d.turns) for d in dialogues]
    turns = [t for d in dialogues for t in d.turns]

    def by_lens(name: str, values: Iterable) -> dict[str, float]:
        return {f"{name}/{lens}": float(value) for lens, value in zip(LENSES, values)}

    column = {
        "study_score": float(study_score(raw)),
        "study_score_standardised": float(study_score(standardised)),
        **by_lens("reward", standardised.mean(1)), "kl": float(np.mean(kl)),
        "ended": 1 - sum(t.truncated for t in turns) / len(turns),
        "length": float(np.mean(tokens)),
        "perplexity": float(np.exp(-base_logprob_sums.sum() / sum(tokens))),
        **by_lens("distinct", map(distinct_share, zip(*texts))),
        **textstats.measures([" ".join(t) for t in texts])}
    if gold is not None:
        column |= {"gold": float(np.mean([g.overall for g in gold])),
                   **by_lens("gold", (np.mean([g.lenses[lens] for g in gold]) for lens in LENSES)),
                   **by_lens("patterns", map(distinct_share, zip(*patterns))),
                   **{name: float(np.mean([getattr(g, name) for g in gold]))
                      for name in ("named", "fits", "broken")}}
    return column


def differences(before: dict, after: dict, seed: int) -> dict[str, dict]:
    """after - before, paired by prompt: name -> {"difference", "low", "high"} of a 95 % bootstrap.

    Means over prompts also have "p" of a permutation test and "d_z", the paired effect size.
    "..., at equal length" is the difference that length does not explain. before, after: {"raw",
    "standardised": (3, n), "gold", "length": (n,)}; "gold" may be None; "eval" (3, n) and
    "likelihood" (n,) may be missing.
    """
    rows, means = {}, {}
    for name, key in (("study_score", "raw"), ("study_score_standardised", "standardised")):
        a, b = before[key].T, after[key].T
        rows[name] = dict(zip(ENDS, stats.paired_bootstrap(
            a, b, statistic=study_score, seed=seed, resamples=2000)))
    for name, key in (("reward", "standardised"), ("eval_reward", "eval")):
        if key in before:
            means |= {f"{name}/{lens}": pair
                      for lens, *pair in zip(LENSES, before[key], after[key])}
    if before["gold"] is not None:
        means["gold"] = (before["gold"], after["gold"])
    if before.get("likelihood") is not None:
        means["likelihood"] = (before["likelihood"], after["likelihood"])
    for name, (a, b) in means.items():
        d_z = stats.effect_size(a, b)
        rows[name] = {**dict(zip(ENDS, stats.paired_bootstrap(a, b, seed=seed, resamples=2000))),
                      "p": stats.permutation_test(a, b, seed=seed),
                      "d_z": d_z if np.isfinite(d_z) else None}
    overall = {"mean reward": [side["standardised"].mean(0) for side in (before, after)]}
    if "gold" in means:
        overall["gold"] = means["gold"]
    for name, (a, b) in overall.items():
        interval = stats.length_controlled_interval(a, b, before["length"], after["length"],
                                                    seed=seed)
        if np.isfinite(interval).all():
            rows[f"{name}, at equal length"] = dict(zip(ENDS, interval))
    return rows


def correct(compared: Mapping[str, dict[str, dict]]) -> None:
    """Adds "p_holm" to the rows with "p" of all pairs of models: Holm's correction over the one
    table that a reader sees."""
    tested = [row for rows in compared.values() for row in rows.values() if "p" in row]
    for row, p in zip(tested, stats.holm([row["p"] for row in tested])):
        row["p_holm"] = float(p)


def curve_of(rollouts: Sequence[dict], gold_of=None, metrics: Sequence[dict] = (),
             kept: int | None = None) -> list[dict]:
    """Over-optimisation, by iteration of PPO: {"iteration", "kl", "proxy", "gold", "kept"}, means
    over its rollouts.

    rollouts, metrics: lines of run_ppo.py's files. The proxy is the aggregate that was trained
    for, "objective/score", or the mean of the lenses where metrics lack the iteration.
    gold_of(prompt, three turns), or None where gold is not known; gold is None also where the
    rollouts are answers alone. kept: the iteration whose dialogues the adapter in best/ sampled.
    Gao et al. 2022 (arXiv 2210.10760) plot proxy and gold against sqrt(KL).
    """
    trained_for = {m["iteration"]: m["objective/score"] for m in metrics
                   if "iteration" in m and m.get("objective/score") is not None}
    grouped: dict[int, list[dict]] = {}
    for r in rollouts:
        grouped.setdefault(r["iteration"], []).append(r)
    curve = []
    for i, own in sorted(grouped.items()):
        gold = None
        if gold_of and all(len(r["turns"]) == len(LENSES) for r in own):
            gold = float(np.mean([gold_of(r["prompt"], list(r["turns"].values())).overall
                                  for r in own]))
        proxy = trained_for.get(i, float(np.mean([r["scores"] for r in own])))
        curve.append({"iteration": i, "kl": float(np.mean([r["kl"] for r in own])),
                      "proxy": proxy, "kept": i == kept, "gold": gold})
    return curve


# ---- where it came from


def same_pairs(one: Mapping, other: Mapping) -> bool:
    """Whether two reward models, by their virtue.json, can have been trained on the same pairs:
    those of one folder or file, unless one took the first share of it and the other the second."""
    source = [m["settings"].get("pairs") or m["extra"].get("data") for m in (one, other)]
    shares = [m["settings"].get("share") for m in (one, other)]
    return source[0] == source[1] and shares not in (["first", "second"], ["second", "first"])


def reward_model_facts(rm: Path, eval_rm: Path | None = None) -> list[dict]:
    """How good the reward models are, from their virtue.json: {"of": "PPO" or "second", "lens",
    "accuracy", "calibration_error", "pairs"}, on "pairs" pairs that each did not train on; those
    of eval_rm with "seen": trained on pairs that PPO's own saw."""
    own = [read_manifest(rm / lens, "rm", lens) for lens in LENSES]
    second = [read_manifest(eval_rm / lens, "rm", lens) for lens in LENSES] if eval_rm else []
    facts = []
    for manifest in (*own, *second):
        extra, measured = manifest["extra"], manifest["extra"].get("held_out")
        measured = {"pairs": extra.get("held_out_pairs"),
                    **(measured if isinstance(measured, dict) else {})}
        facts.append({"of": "PPO" if len(facts) < len(own) else "second", "lens": extra["lens"],
                      **{key: measured[key] if is_number(measured.get(key)) else None
                         for key in ("accuracy", "calibration_error", "pairs")}})
    for fact, manifest in zip(facts[len(own):], second):
        fact["seen"] = any(same_pairs(first, manifest) for first in own)
    return facts


def made_by(policy: Path, sft: Path | None, rm: Path, eval_rm: Path | None = None) -> list[dict]:
    """The virtue.json of every artefact that a policy was made from, in order, the policy's own
    last. That of a data folder is there only if the folder is unchanged and still in its place, or
    in the same place relative to the artefact."""
    manifests = []
    for home, inside in ((sft, [""]), (rm, LENSES), (eval_rm, LENSES), (policy, [""])):
        for name in inside if home else ():
            manifest = read_manifest(home / name)
            manifests += [*_data_of(manifest, home), manifest]
    return manifests


def _data_of(manifest: dict, home: Path) -> Iterator[dict]:
    """virtue.json of the data that an artefact in `home` was trained on, if it is still there."""
    settings, wanted = manifest["settings"], manifest["extra"].get("data")
    data, out = settings.get("data"), settings.get("out")
    if not (wanted and isinstance(data, str) and isinstance(out, str)):
        return
    for path in {os.path.normpath(data), os.path.normpath(home / os.path.relpath(data, out))}:
        try:
            source = read_manifest(path)
        except VirtueError:  # gone, or written over
            continue
        if source["sha256"] == wanted:
            yield source


# stage of a manifest -> run_*.py, if not the same
_SCRIPTS = {"policy": "ppo", "value": "ppo", "revisions": "data", "preferences": "data"}
# in their settings for later stages, no flags of run_sft.py and run_rm.py
_HANDED_ON = ("prompts", "max_prompt_tokens", "max_new_tokens", "temperature")


def command_line(manifest: Mapping) -> str:
    """What to type to get an artefact again, from its virtue.json: lines that end with a \\."""
    stage, settings = str(manifest.get("stage", "")), dict(manifest.get("settings") or {})
    script = _SCRIPTS.get(stage, stage)
    if stage == "policy" and "data" in settings:  # SFT on chosen dialogues is a policy too
        script = "sft"
    command = settings.pop("command", None)
    lines = [shlex.join(["python", f"run_{script}.py", *([command] if command else [])])]
    for name, value in settings.items():
        if value is None or value is False or script in ("sft", "rm") and name in _HANDED_ON:
            continue
        values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
        flag, values = "--" + name.replace("_", "-"), [str(v) for v in values]
        part = shlex.join([flag, *values])
        if len(values) == 1 and values[0].startswith("-"):
            part = f"{flag}={shlex.quote(values[0])}"
        if len(lines[-1]) + len(part) < 90:
            lines[-1] += " " + part
        else:
            lines.append(part)
    return " \\\n    ".join(lines)


# ---- what a person should know


def run_away(first: dict, now: dict) -> list[str]:
    """What a person should know while PPO runs, with the usual cause: metrics of the first
    iteration and of this one -> warnings.

    The bounds are this project's own: a KL of more than 25 nats per dialogue (Gao et al. 2022 see
    reward models fail long before), an entropy below a fifth of the first iteration's, a length
    above twice or below half of the first, or fewer than 90 % of turns ended.
    """
    kl, ended = now["objective/kl"], now["tokens/eos_rate"]
    (calm, entropy), (short, length) = ((first[key], now[key])
                                        for key in ("policy/entropy", "tokens/length"))
    tokens = f"from {short:.0f} to {length:.0f} tokens"
    checks = [
        (kl > 25, f"KL is {kl:.0f} nats a dialogue: --kl-coef is too low or --lr too high; "
                  "--stop-kl ends such a run"),
        (kl < -1, f"KL is {kl:.1f} nats a dialogue, and it cannot be negative: sampling and "
                  "training disagree (temperature, template, adapters)"),
        (entropy < 0.2 * calm, f"entropy fell from {calm:.2f} to {entropy:.2f} nats a token: the "
                               "policy says always the same; raise --kl-coef or --entropy-coef"),
        (length > 2 * short, f"dialogues grew {tokens}: the reward models may pay for length"),
        (length < 0.5 * short, f"dialogues shrank {tokens}: the KL penalty is per token, so "
                               "silence is cheap"),
        (ended < 0.9, f"only {ended:.0%} of turns ended: raise --eos-penalty or "
                      "--max-new-tokens")]
    return [text for bad, text in checks if bad]


# about, row of the table, condition on its value a in the base and b in the last model, sentence;
# "share" is b / a. Bounds are this project's.
_FELL = (
    ("coherence", "perplexity", lambda a, b: not 0.5 * a <= b <= 1.5 * a,
     "perplexity under the base is {share:.2f} times that of the base's own answers"),
    ("coherence", "ended", lambda a, b: b < 0.97, "only {b:.1%} of turns end properly"),
    ("coherence", "kl a token", lambda a, b: b > 0.2, "the policy is {last[kl]:.1f} nats a "
     "dialogue away from what it started from, {b:.2f} a token"),
    ("coherence", "repetition", lambda a, b: b > a + 0.05,
     "repeated word triples rose from {a:.2f} to {b:.2f}"),
    *(("coherence", f"{kind}/{lens}", lambda a, b: b < 0.7 * a, "{title}: from {a:.2f} to {b:.2f}")
      for kind in ("distinct", "patterns") for lens in LENSES),
    ("coherence", "broken", lambda a, b: b > a + 0.05,
     "broken sentences rose from {a:.1%} to {b:.1%}"),
    ("coherence", "named", lambda a, b: b < a - 0.02, "the right person and thing are named in "
     "{b:.1%} of sentences, by the base in {a:.1%}"),
    ("other", "refusals", lambda a, b: b > a + 0.05, "refusals rose from {a:.1%} to {b:.1%}"),
    ("other", "flattery", lambda a, b: b > a + 0.5,
     "flattery rose from {a:.2f} to {b:.2f} phrases a hundred words"),
    ("other", "length", lambda a, b: b > 1.5 * a, "dialogues grew from {a:.0f} to {b:.0f} tokens"),
    ("other", "length", lambda a, b: b < 0.5 * a,
     "dialogues shrank from {a:.0f} to {b:.0f} tokens"),
)


def warnings_of(columns: Mapping[str, dict], compared: Mapping[str, dict], wins: Mapping[str, dict],
                facts: Sequence[dict] = ()) -> list[dict]:
    """What a sceptic would say, {"about": "coherence" or "other", "text"}: where reward rose and
    something else fell. Coherence is measured against the base.

    columns, compared, wins: as in scores.json. facts: of `reward_model_facts`, for models that are
    no better than a coin, and for second ones that are not unseen.
    """
    names = [name for name in columns if name != "prompted"]
    base, last = (
        {**column, "kl a token": column["kl"] / max(1, column["length"])}
        for column in (columns[names[0]], columns[names[-1]]))
    step, fallen = compared[f"{names[-1]} - {names[-2]}"], []
    for about, key, fell, sentence in _FELL:
        if key in last and fell(a := base[key], b := last[key]):
            text = sentence.format(a=a, b=b, share=b / a if a else 0, last=last, title=title(key))
            fallen.append((about, text))
    fallen += [("other", text) for text in _fallen_rewards(step, facts)]
    but = "reward rose, but " * any(step[f"reward/{lens}"]["low"] > 0 for lens in LENSES)
    return [*({"about": about, "text": but + text} for about, text in fallen),
            *({"about": "other", "text": text} for text in (*_untrusted(facts), *_unjudged(wins)))]


def _fallen_rewards(step: Mapping[str, dict], facts: Sequence[dict]) -> Iterator[str]:
    """What of the last model's rewards over the one before it does not hold elsewhere."""
    if "gold" in step and step["gold"]["high"] < 0:
        yield f"gold fell by {-step['gold']['difference']:.3f}"
    kind = "second" if any(fact.get("seen") for fact in facts) else "unseen"
    for lens in LENSES:
        row = step.get(f"eval_reward/{lens}")
        if row and step[f"reward/{lens}"]["low"] > 0 >= row["low"]:
            yield (f"the {kind} reward model of lens {lens} saw no reliable rise: "
                   f"{with_interval(row)}")


def _untrusted(facts: Sequence[dict]) -> Iterator[str]:
    """Reward models that may be coins, and second ones that are not unseen."""
    for fact in facts:
        share, n = fact["accuracy"], fact["pairs"]
        if share is None or not n or not 0 <= share <= 1 <= n:
            continue
        if (low := stats.wilson(share * n, n)[1]) <= 0.5:
            yield (f"the {'' if fact['of'] == 'PPO' else 'second '}reward model of lens "
                   f"{fact['lens']} may be a coin: right on {share:.0%} of {n} held-out pairs "
                   f"(95%: from {low:.0%}), so its reward may say nothing")
    if any(fact.get("seen") for fact in facts):
        yield ("the second reward models (--eval-rm) are not unseen: they were trained on pairs "
               "that PPO's own saw; train these with run_rm.py --share first and those with "
               "--share second")


def _unjudged(wins: Mapping[str, dict]) -> Iterator[str]:
    """Where the judge does not answer, or finds the answers less helpful."""
    for pair, lenses in wins.items():
        for lens, row in lenses.items():
            if row and (text := unanswered(row["label_mass"])):
                yield f"{pair}, {lens}: {text}"
        helpful = (lenses.get("action") or {}).get("questions", {}).get("helpfulness")
        if helpful is not None and helpful < 0.45:
            yield (f"{pair}: the judge finds the answers less helpful ({helpful:.2f}; 0.5 = as "
                   "before): virtue by refusal?")
