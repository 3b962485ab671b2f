"""What finished runs say: gold by arm and seed, differences with intervals, tables in Markdown."""
from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from virtue.ethics import LENSES
from virtue.evaluation.stats import (best_of_n_kl, hierarchical_bootstrap, holm,
                                     paired_bootstrap, permutation_test, t_interval)
from virtue.toy.gold import slots

MAIN = ("gold | seeds | base | SFT | final | gain of the last stage | final − {first}'s | p | "
        "p, Holm | at {kl}; − {first}'s")
DETAILS = ("final model, mean over seeds | gold before the last stage, by lens | after | its gain "
           "at equal length | reward models' accuracy, by lens | judge prefers after, by lens | "
           "KL | perplexity / base's | distinct, names masked, by lens | broken | fits | ended | "
           "Score: start → final | standardised | tokens")
LEGEND = """\
Gold of held-out prompts, 0 worst to 1 oracle; 95 % intervals: seeds and prompts resampled (one
seed: prompts alone); of two to five seeds Student's t over them too, the one to believe; p: all
sign flips of the seeds' differences, on these prompts; Holm: over the arms shown. At equal KL, for
arms that start from the same model: of PPO's own dialogues, a parabola in sqrt(KL) through the run
(the arm that goes further is read where it has trained less); there, at equal length, of Scores
and of best-of-n Student's t over seeds. By lens: action / motivation / consequence."""


class Run(NamedTuple):
    """What a finished chain has to say."""

    start: str  # the model that PPO started from: sft, or base
    final: str
    models: dict[str, dict[str, float]]  # model -> column of run_eval.py
    gold: dict[str, dict[str, float]]  # model -> prompt id -> gold
    curve: list[tuple[float, float]]  # KL and gold of PPO's dialogues by iteration, if it has them
    questions: dict[str, str]  # prompt id -> its question, names masked
    at_length: float  # gain of the last stage in gold at equal length; nan without gold
    wins: list[float]  # how often the judge prefers the final model to the start, by lens
    accuracy: list[float]  # of PPO's reward models on held-out pairs, by lens


def load(report: Path) -> Run:
    scores = json.loads((report / "scores.json").read_text())
    lines = (report / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    gold = {name: {s["id"]: s[name]["gold"]["overall"] for s in samples if "gold" in s[name]}
            for name in scores["models"]}
    *_, start, final = (name for name in scores["models"] if name != "prompted")
    questions = {}
    for sample in samples:
        if "gold" in sample[final]:
            text = sample["prompt"][-1]["content"]
            person, thing = slots(text)
            questions[sample["id"]] = text.replace(person, "P").replace(thing, "T")
    differences = scores.get("differences", {}).get(f"{final} - {start}", {})
    at_length = differences.get("gold, at equal length", {}).get("difference", np.nan)
    wins = scores.get("wins", {}).get(f"{final} vs {start}", {}).values()
    accuracy = [np.nan if model["accuracy"] is None else model["accuracy"]
                for model in scores.get("reward_models", []) if model["of"] == "PPO"]
    curve = [(point["kl"], point["gold"]) for point in scores.get("curve", [])
             if point["gold"] is not None]
    return Run(start, final, scores["models"], gold, curve, questions, at_length,
               [win["rate"] if win else np.nan for win in wins],  # none fits the judge's context
               accuracy)


def gold_at(curve: Sequence[tuple[float, float]], kl: float) -> float:
    """Gold at `kl`: of the parabola in sqrt(KL) nearest to the run's iterations, each of which is
    noisy; nan where no iteration went so far."""
    x = np.sqrt(np.maximum([k for k, _ in curve], 0))
    y = [gold for _, gold in curve]
    if not len(x) or kl > x.max() ** 2 + 1e-9:
        return float("nan")
    parabola = np.polyfit(x, y, min(2, len(set(x)) - 1))
    return float(np.polyval(parabola, np.sqrt(max(kl, 0))))


def paired(a: Sequence[Mapping[str, float]],
           b: Sequence[Mapping[str, float]]) -> tuple[float, float, float]:
    """Mean of b - a over seeds and the prompts that both have, with its 95 % interval; one mapping
    by prompt a seed."""
    ids = [sorted(x.keys() & y.keys()) for x, y in zip(a, b, strict=True)]
    a, b = ([np.array([row[i] for i in of_seed]) for row, of_seed in zip(rows, ids)]
            for rows in (a, b))
    if len(a) == 1:
        return paired_bootstrap(a[0], b[0], resamples=2000)
    crossed = all(of_seed == ids[0] for of_seed in ids)  # every seed was asked the same
    return hierarchical_bootstrap(a, b, crossed=crossed)


def by_question(runs: Sequence[Run]) -> str:
    """Gain of the last stage on each question of the evaluation, mean over seeds: prompts of one
    question are not independent."""
    gains: dict[str, list[float]] = {}
    for run in runs:
        for key, question in run.questions.items():
            gain = run.gold[run.final][key] - run.gold[run.start][key]
            gains.setdefault(question, []).append(gain)
    return "; ".join(f'"{question}" {np.mean(values):+.3f} ({len(values) // len(runs)} prompts)'
                     for question, values in sorted(gains.items()))


def over_seeds(values: Sequence[float]) -> tuple[float, ...]:
    """Mean with Student's interval, one value a seed; the mean alone of one seed, or with a nan."""
    several = len(values) > 1 and np.isfinite(values).all()
    return t_interval(values) if several else (float(np.mean(values)),)


def seed_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Exact two-sided p of b - a, one value a seed; nan for one seed."""
    return permutation_test(a, b) if len(a) > 1 else float("nan")


def cell(value: float, low: float | None = None, high: float | None = None, sign: str = "",
         digits: int = 3) -> str:
    if np.isnan(value):
        return "–"
    interval = "" if low is None else f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
    return f"{value:{sign}.{digits}f}{interval}"


def lenses(values: Iterable[str]) -> str:
    return " / ".join(values)


def rows_of(rows: Sequence[Sequence[str]], head: str) -> str:
    heads = head.split(" | ")
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


class Comparison:
    """Arms over seeds, against the first arm, and at equal KL.

    Equal KL is the smallest of the runs' largest KL. Runs that never reach `least_kl` nats are left
    out, and those that started from another model than the first arm's: it would not be the same
    distance.
    """

    def __init__(self, runs: Mapping[str, Mapping[int, Run]], least_kl: float = 0.5) -> None:
        self.runs, self.first = runs, next(iter(runs))
        starts = {seed: run.gold[run.start] for seed, run in runs[self.first].items()}
        curves = {arm: {seed: run.curve if run.gold[run.start] == starts.get(seed) else []
                        for seed, run in of_arm.items()} for arm, of_arm in runs.items()}
        reached = [max(kl for kl, _ in curve)
                   for of_arm in curves.values() for curve in of_arm.values() if curve]
        self.kl = min((kl for kl in reached if kl >= least_kl), default=float("nan"))
        self.at_kl = {arm: {seed: gold_at(curve, self.kl) for seed, curve in of_arm.items()}
                      for arm, of_arm in curves.items()}
        self.gold = {arm: {seed: float(np.mean([*run.gold[run.final].values()]))
                           for seed, run in of_arm.items()} for arm, of_arm in runs.items()}
        self.shared = {arm: sorted(of_arm.keys() & runs[self.first].keys())
                       if arm != self.first else [] for arm, of_arm in runs.items()}
        self.p = {arm: seed_test(*([self.gold[side][seed] for seed in seeds]
                                   for side in (self.first, arm)))
                  for arm, seeds in self.shared.items() if seeds}
        tested = [arm for arm in self.p if not np.isnan(self.p[arm])]
        adjusted = holm([self.p[arm] for arm in tested]) if tested else []
        self.p_holm = dict(zip(tested, adjusted))

    def main_row(self, arm: str) -> list[str]:
        runs, seeds, first = self.runs[arm], self.shared[arm], self.first
        each = list(runs.values())
        if not each:
            return [arm, "none", *["–"] * 8]

        def level(name: str) -> str:
            gold = [run.gold[name] for run in each if name in run.gold]
            return cell(*paired([dict.fromkeys(g, 0.0) for g in gold], gold)) if gold else "–"

        start, final = ([run.gold[getattr(run, which)] for run in each]
                        for which in ("start", "final"))
        gain = cell(*paired(start, final), sign="+")
        if len(each) > 1:
            began = [float(np.mean([*gold.values()])) for gold in start]
            gain += f"; p {seed_test(began, [*self.gold[arm].values()]):.3f}"
        apart = "–"
        if seeds:
            sides = ([self.runs[side][seed] for seed in seeds] for side in (first, arm))
            golds = ([run.gold[run.final] for run in side] for side in sides)
            apart = cell(*paired(*golds), sign="+")
            if 1 < len(seeds) < 6:  # a bootstrap of few seeds is too narrow
                _, low, high = t_interval([self.gold[arm][s] - self.gold[first][s] for s in seeds])
                apart += f"; t [{low:+.3f}, {high:+.3f}]"
        at, at_first = self.at_kl[arm], self.at_kl[first]
        known = [value for value in at.values() if not np.isnan(value)]
        equal = cell(float(np.mean(known))) if known else "–"
        both = [s for s in seeds if not np.isnan([at[s], at_first[s]]).any()]
        if both:
            equal += f"; {cell(*over_seeds([at[s] - at_first[s] for s in both]), sign='+')}"
        return [arm, " ".join(map(str, runs)), level("base"),
                level("sft") if each[0].start == "sft" else "–", level(each[0].final), gain, apart,
                cell(self.p.get(arm, np.nan)), cell(self.p_holm.get(arm, np.nan)), equal]

    def details_row(self, arm: str) -> list[str]:
        each = list(self.runs[arm].values())

        def mean(key: str, which: str = "final", over: str | None = None, digits: int = 3) -> str:
            values = [run.models[getattr(run, which)].get(key, np.nan)
                      / (run.models[over][key] if over else 1) for run in each]
            return cell(float(np.mean(values)), digits=digits)

        def moved(key: str) -> str:
            apart = [run.models[run.final].get(key, np.nan) - run.models[run.start].get(key, np.nan)
                     for run in each]
            change = f"; {cell(*over_seeds(apart), sign='+')}" if len(each) > 1 else ""
            return f"{mean(key, 'start')} → {mean(key)}{change}"

        def of_lenses(rows: Sequence[Sequence[float]], digits: int) -> str:
            if not all(rows):
                return "–"
            return lenses(cell(value, digits=digits) for value in np.mean(rows, 0))

        return [arm, lenses(mean(f"gold/{lens}", "start") for lens in LENSES),
                lenses(mean(f"gold/{lens}") for lens in LENSES),
                cell(*over_seeds([run.at_length for run in each]), sign="+"),
                of_lenses([run.accuracy for run in each], 3),
                of_lenses([run.wins for run in each], 2), mean("kl", digits=2),
                mean("perplexity", over="base"),
                lenses(mean(f"patterns/{lens}") for lens in LENSES), mean("broken"), mean("fits"),
                mean("ended"), moved("study_score"), moved("study_score_standardised"),
                mean("length", digits=1)]

    def notes(self, arm: str) -> list[str]:
        each = list(self.runs[arm].values())
        notes = []
        if each and "eval_reward/action" in each[0].models[each[0].final]:
            parts = []
            for key, title in (("reward", "models that PPO saw"), ("eval_reward", "unseen models")):
                gains = [np.mean([run.models[run.final][f"{key}/{lens}"]
                                  - run.models[run.start][f"{key}/{lens}"] for run in each])
                         for lens in LENSES]
                parts.append(f"{title} {lenses(f'{gain:+.2f}' for gain in gains)}")
            notes.append(f"{arm}: what the last stage gained in standardised reward, by lens: "
                         f"{'; '.join(parts)}.")
        if arm == self.first and len({q for run in each for q in run.questions.values()}) > 1:
            notes.append(f"{arm}: gain of the last stage in gold by held-out question: "
                         f"{by_question(each)}.")
        return notes


def tables(runs: Mapping[str, Mapping[int, Run]], least_kl: float = 0.5) -> str:
    """Two tables in Markdown, from arm -> seed -> run; the first arm is what the others are
    compared with."""
    against = Comparison(runs, least_kl)
    kl = "equal KL" if np.isnan(against.kl) else f"KL {against.kl:.2f}"
    main = rows_of([against.main_row(arm) for arm in runs],
                   MAIN.format(first=against.first, kl=kl))
    details = rows_of([against.details_row(arm) for arm in runs if runs[arm]], DETAILS)
    return "\n\n".join([main, details, *(note for arm in runs for note in against.notes(arm))])


# row -> (its keys in a model's column, of which the mean is taken; digits)
PLAIN = {
    "reward of the models that PPO saw": ([f"reward/{lens}" for lens in LENSES], 3),
    "reward of unseen models": ([f"eval_reward/{lens}" for lens in LENSES], 3),
    **{f"  of these, {lens}": ([f"eval_reward/{lens}"], 3) for lens in LENSES},
    "log-odds of virtues to vices, nats a token": (["likelihood"], 4),
    "study's Score, raw": (["study_score"], 3),
    "KL to the reference, nats a dialogue": (["kl"], 2),
    "perplexity under the base": (["perplexity"], 2), "turns that ended": (["ended"], 3),
    "tokens a dialogue": (["length"], 1), "answers that refuse": (["refusals"], 3),
    "distinct share": ([f"distinct/{lens}" for lens in LENSES], 3),
    "repeated word triples": (["repetition"], 3)}


def plain_tables(runs: Mapping[str, Mapping[int, Run]]) -> str:
    """Where gold is not known: for each arm its models side by side, means over seeds, and what the
    final one has over the start and over the prompted base, with Student's t over seeds."""
    texts = []
    for arm, of_arm in runs.items():
        each = list(of_arm.values())
        if not each:
            continue
        names, final = [*each[0].models], each[0].final
        against = [name for name in (each[0].start, "prompted") if name in names]
        rows = []
        for title, (keys, digits) in PLAIN.items():
            of_model = {name: [float(np.mean([run.models[name].get(key, np.nan) for key in keys]))
                               for run in each] for name in names}
            if np.isnan(of_model[final]).any():
                continue
            apart = (over_seeds(np.subtract(of_model[final], of_model[name])) for name in against)
            rows.append([title, *(cell(float(np.mean(v)), digits=digits)
                                  for v in of_model.values()),
                         *(cell(*row, sign="+", digits=digits) for row in apart)])
        head = [f"{arm}, mean of seeds {' '.join(map(str, of_arm))}", *names,
                *(f"{final} − {name}" for name in against)]
        wins = [cell(*over_seeds(share), digits=2) for share in zip(*(run.wins for run in each))]
        right = [cell(*over_seeds(share), digits=2)
                 for share in zip(*(run.accuracy for run in each))]
        texts += [rows_of(rows, " | ".join(head)),
                  f"By lens: the judge prefers {final} to {each[0].start} on {lenses(wins)}; the "
                  f"reward models are right on {lenses(right)} of held-out pairs."]
    return "\n\n".join(texts)


def best_of_n_table(files: Sequence[Path]) -> str:
    """Gold of the best of n by aggregator, from the files of run_eval.py best-of-n, one a seed."""
    golds: dict[str, dict[int, list[float]]] = {}
    for file in files:
        for row in json.loads(file.read_text())["rows"]:
            if "gold" in row:
                golds.setdefault(row["aggregator"], {}).setdefault(row["n"], []).append(row["gold"])
    if not golds:
        return ""
    sizes = next(iter(golds.values()))
    bounds = ["nats, at most", *(f"{best_of_n_kl(n):.2f}" for n in sizes)]
    rows = [[name, *(cell(*over_seeds(values)) for values in by_n.values())]
            for name, by_n in golds.items()]
    return rows_of([bounds, *rows], "aggregator | " + " | ".join(f"n = {n}" for n in sizes))
