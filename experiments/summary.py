"""Sum up runs of the chain that differ by seed only: gains with intervals, and what they cost.

  for s in 0 1 2; do make demo SEED=$s OUT=runs/demo-$s; done
  python experiments/summary.py runs/demo-0 runs/demo-1 runs/demo-2
  # and another recipe's, seed by seed:
  python experiments/summary.py runs/dpo-0 runs/dpo-1 --against runs/demo-0 runs/demo-1

Intervals are 95 %: for each seed a paired bootstrap over prompts; over all seeds a hierarchical
one, which resamples seeds and prompts, and Student's t over the seeds' means.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from compare import beside, judge  # noqa: E402
from tables import by_question, cell, load, over_seeds, paired  # noqa: E402
from virtue.ethics import LENSES  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of make demo")
    parser.add_argument("--against", nargs="+", type=Path, metavar="RUN",
                        help="folders of another recipe, of the same seeds")
    args = parser.parse_args()
    runs = args.runs
    if gone := [run for run in (*runs, *(args.against or ()))
                if not (run / "report/scores.json").is_file()]:
        parser.error(f"{gone[0]}: no report/scores.json in it: give folders in which make demo "
                     "came to its end")

    def read(folders: list[Path]) -> list[dict]:
        found = [json.loads((run / "report/scores.json").read_text()) for run in folders]
        if len({s["seed"] for s in found}) < len(found):
            parser.error(f"two of {', '.join(map(str, folders))} have the same seed "
                         f"({', '.join(str(s['seed']) for s in found)}): they are one run, "
                         "leave one out")
        return found

    scores = read(runs)
    against = ({s["seed"]: folder for s, folder in zip(read(args.against), args.against)}
               if args.against else {})
    if args.against and against.keys() != {s["seed"] for s in scores}:
        parser.error(f"--against has seeds {', '.join(map(str, against))}, the runs "
                     f"{', '.join(str(s['seed']) for s in scores)}: give the same ones")
    loaded = [load(run / "report") for run in runs]
    names = list(scores[0]["models"])
    # only answers to toy prompts have gold
    golden = all("gold" in s["models"][name] for s in scores for name in names)
    key = "gold" if golden else "study_score_standardised"

    seeds = ", ".join(str(s["seed"]) for s in scores)
    print(f"{len(runs)} seed{'s' * (len(runs) > 1)} ({seeds}), {scores[0]['prompts']} held-out "
          "prompts each; mean [least, greatest]\n")
    print("| |" + "|".join(names) + "|\n|---|" + "---|" * len(names))
    for row in scores[0]["models"][names[0]]:
        values = [[s["models"][name][row] for s in scores] for name in names]
        cells = [cell(np.mean(v), *(min(v), max(v)) * (len(v) > 1)) for v in values]
        print(f"| {row} | {' | '.join(cells)} |")

    print(f"\n| {key} | seed by seed | all seeds, hierarchical | all seeds, t |\n|---|---|---|---|")
    trained = [name for name in names if name != "prompted"]
    for a, b in zip(trained, trained[1:]):
        found = [s["differences"][f"{b} - {a}"][key] for s in scores]
        each = ", ".join("{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**f) for f in found)
        means = [s["models"][b][key] - s["models"][a][key] for s in scores]
        all_seeds = cell(*paired(*([run.gold[name] for run in loaded] for name in (a, b))),
                         sign="+") if golden else "–"
        print(f"| {b} - {a} | {each} | {all_seeds} | {cell(*over_seeds(means), sign='+')} |")
    wins = np.mean([run.wins for run in loaded], 0)
    gain = by = ""
    if golden:
        at_length = cell(*over_seeds([run.at_length for run in loaded]), sign="+")
        gain = f"gain in gold at equal length {at_length}; "
        by = f"; by held-out question {by_question(loaded)}"
    print(f"\nOf the last stage: {gain}the judge prefers its dialogues, both orders, in "
          f"{' / '.join(f'{x:.2f}' for x in wins)} (action / motivation / consequence){by}")

    # without SFT PPO starts from the base
    base, sft, ppo = ([s["models"][name] for s in scores]
                      for name in (trained[0], trained[-2], trained[-1]))
    checks = {"share of the distance from SFT to the oracle that PPO closes (>= 0.5)":
              [(p["gold"] - s["gold"]) / (1 - s["gold"]) for s, p in zip(sft, ppo) if golden],
              "perplexity over the base's (0.5 to 1.5)":
              [p["perplexity"] / b["perplexity"] for b, p in zip(base, ppo)],
              **{f"distinct share of the {lens} over the base's (>= 0.7)":
                 [p[f"distinct/{lens}"] / b[f"distinct/{lens}"] for b, p in zip(base, ppo)]
                 for lens in LENSES},
              **{f"the same with names masked, {lens}":
                 [p[f"patterns/{lens}"] / b[f"patterns/{lens}"]
                  for b, p in zip(base, ppo) if golden] for lens in LENSES},
              "right person and thing named, minus the base's (>= -0.02)":
              [p["named"] - b["named"] for b, p in zip(base, ppo) if golden],
              "motivations that fit, minus the base's (>= 0)":
              [p["fits"] - b["fits"] for b, p in zip(base, ppo) if golden],
              "turns that ended properly (>= 0.97)": [p["ended"] for p in ppo]}
    print("\n| PPO | seed by seed |\n|---|---|")
    for title, values in checks.items():
        if values:  # what is of gold's grammar needs gold
            print(f"| {title} | {', '.join(f'{v:.3f}' for v in values)} |")

    if args.against:
        sides = ("against", "runs")
        reports = [[run / "report" for run in side]
                   for side in ([against[s["seed"]] for s in scores], runs)]
        old, new = ({s["seed"]: load(folder) for s, folder in zip(scores, side)}
                    for side in reports)
        print("\nthe final models of these runs against those of --against\n")
        print(judge(old, new, sides))
        print("\n" + beside(sides, reports, None))


if __name__ == "__main__":
    main()
