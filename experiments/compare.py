"""Judge a change to the code against a git revision: did it help?

  make compare REV=HEAD SEEDS="0 1 2 3 4 5"
  python experiments/compare.py HEAD --scale fast --seeds 0             # minutes: does it all run?
  python experiments/compare.py HEAD --scale small --jobs 2             # a third of the time
  python experiments/compare.py HEAD~3 --from rm --ppo "--iterations 6"
  python experiments/compare.py HEAD --chosen "--lr 5e-4 --epochs 2"    # DPO against PPO

The last one is for a working tree with docs/examples/dpo.diff applied (git apply).
Both codes train on the same earlier artefacts, seed by seed: those of the default recipe, made once
by the working tree and shared with experiments/run.py. --from says where the two begin to differ.
The revision is checked out under runs/compare for as long as this takes. One ruler: run_eval.py of
the working tree evaluates both. Leave the code alone meanwhile. With n seeds no p is below 2 / 2^n:
6 seeds, the default, can reach 0.05, and 3 are a look.
"""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from engine import Arm, Stage, Tree, chain, code_of, commands, lines_of, run_locked  # noqa: E402
from tables import Run, cell, load, paired, rows_of, seed_test  # noqa: E402
from virtue.plumbing.flags import make_parser  # noqa: E402
from virtue.evaluation.stats import effect_size, t_interval  # noqa: E402

TUNED = ("policy", "chosen")
# by --from: the stages that each code runs itself
DIFFER = {"data": ("revisions", "sft", "preferences", "rm", *TUNED),
          "sft": ("sft", "preferences", "rm", *TUNED),
          "preferences": ("preferences", "rm", *TUNED), "rm": ("rm", *TUNED), "ppo": TUNED}
SCORE = "study_score_standardised"


def git(*command: str, root: Path = ROOT) -> str:
    done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: git {' '.join(command)}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


@contextmanager
def checkout(revision: str, folder: Path, root: Path = ROOT) -> Iterator[Path]:
    """The revision's files under `folder`, in a git worktree that is removed at the end."""
    try:
        sha = git("rev-parse", "--short=12", "--verify",
                  "--quiet", f"{revision}^{{commit}}", root=root)
    except SystemExit:
        raise SystemExit(f"error: {revision}: no revision of this repository: give HEAD, a branch "
                         "or a hash (git log --oneline)") from None
    tree = folder.resolve() / sha
    if tree.exists():  # of a run that was killed
        shutil.rmtree(tree)
    git("worktree", "prune", root=root)
    git("worktree", "add", "--detach", str(tree), sha, root=root)
    try:
        yield tree
    finally:
        git("worktree", "remove", "--force", str(tree), root=root)


def verdict(differences: Sequence[float], p: float, what: str = "gold", level: float = 0.05) -> str:
    """One sentence from a difference for each seed and their exact p."""
    n, mean = len(differences), float(np.mean(differences))
    if not np.any(differences):
        return "No difference at all: both codes gave the same numbers."
    way = (f"{what} {'rose' if mean > 0 else 'fell'} by {abs(mean):.3f} in the mean"
           if abs(mean) >= 0.0005 else f"{what} hardly moved ({mean:+.4f} in the mean)")
    least = next(m for m in range(n, 99) if 2 / 2**m <= level)
    if n == 1:
        return f"Cannot tell: {way}, but one seed says nothing of the next: take {least} or more."
    if p <= level:
        return f"The change {'helped' if mean > 0 else 'hurt'}: {way} over {n} seeds (p = {p:.3g})."
    if 2 / 2**n > level:
        return (f"Cannot tell: {way} (p = {p:.3g}), but with {n} seeds the smallest possible p is "
                f"{2 / 2**n:.3g}: take {least} or more.")
    return f"Cannot tell: {way}, as {n} seeds may by chance (p = {p:.3g})."


def judge(old: dict[int, Run], new: dict[int, Run],
          sides: Sequence[str] = ("revision", "working tree")) -> str:
    """Difference seed by seed, mean with interval, effect size, p, verdict; of common seeds."""
    seeds = sorted(old.keys() & new.keys())
    pairs = [(old[s], new[s]) for s in seeds]
    golden = all("gold" in run.models[run.final] for pair in pairs for run in pair)
    what = "gold" if golden else SCORE
    a, b = ([pair[i].models[pair[i].final][what] for pair in pairs] for i in (0, 1))
    apart = [y - x for x, y in zip(a, b)]
    if golden:
        found = paired(*([pair[i].gold[pair[i].final] for pair in pairs] for i in (0, 1)))
        how = "seeds and prompts resampled" if len(seeds) > 1 else "prompts resampled"
    else:
        found, how = t_interval(apart) if len(apart) > 1 else (apart[0],), "Student's t over seeds"
    p = seed_test(a, b)
    said = f"difference {cell(*found, sign='+')} (95 %: {how})"
    if golden and 1 < len(apart) < 6:
        ends = ", ".join(f"{end:+.3f}" for end in t_interval(apart)[1:])
        said += f"; Student's t over seeds [{ends}], the one to believe of so few"
    if len(seeds) > 1:
        said += (f"; effect size d_z {effect_size(a, b):.2f} over seeds; p {p:.3g}, all sign flips "
                 "of the seeds, on these prompts")
    head = [f"| seed | {what}, {sides[0]} | {what}, {sides[1]} | difference |", "|---|---|---|---|"]
    rows = [f"| {s} | {x:.3f} | {y:.3f} | {d:+.3f} |" for s, x, y, d in zip(seeds, a, b, apart)]
    return "\n".join([*head, *rows, "", said, verdict(apart, p, what)])


def beside(sides: Sequence[str], reports: Sequence[Sequence[Path]],
           policies: Sequence[Sequence[Path]] | None) -> str:
    """What gold may have been bought with, mean over seeds:
    `reports` and `policies` (of PPO) hold the folders of each side."""
    rows = []
    for i, side in enumerate(sides):
        runs = [load(folder) for folder in reports[i]]
        tuned = [run.models[run.final] for run in runs]
        base = [next(iter(run.models.values())) for run in runs]
        row = [(2, [t["kl"] for t in tuned]), (1, [t["length"] for t in tuned]),
               (3, [t["perplexity"] / b["perplexity"] for t, b in zip(tuned, base)])]
        if policies:
            last = [json.loads(lines_of(folder / "metrics.jsonl")[-1]) for folder in policies[i]]
            row += [(4, [m[key] for m in last]) for key in ("policy/entropy", "policy/clip_frac")]
        rows.append([side, *(f"{np.mean(values):.{digits}f}" for digits, values in row)])
    return rows_of(rows, "mean over seeds | KL | tokens | perplexity / base's"
                   + " | entropy, last iteration | clip_frac, last iteration" * bool(policies))


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("revision", help="the code to compare with: HEAD, a branch, a hash")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5],
                        help="each makes its own data, reward models and PPO")
    parser.add_argument("--from", dest="start", choices=DIFFER, default="ppo",
                        help="the first stage that each code runs itself")
    parser.add_argument("--ppo", default="", help="flags of run_ppo.py for both")
    parser.add_argument("--chosen", metavar="FLAGS",
                        help="in the working tree run_sft.py with these flags on the preferences, "
                             "in PPO's place: SFT on the chosen answers, or what you made of it")
    parser.add_argument("--base", default="",
                        help="base model, prompts and sampling for both, e.g. "
                             '"--model FOLDER --prompts FILE"')
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/experiments",
                        help="folder of the stages' folders")
    parser.add_argument("--jobs", type=int, default=1,
                        help="stages at once, one thread each: at most as many as cores")
    parser.add_argument("--scale", choices=("full", "small", "fast"), default="full",
                        help="small: about half of everything, in a third of the time; fast: a few "
                             "small iterations, whatever --ppo says: shows that all runs, and is "
                             "no result")
    parser.add_argument("--dry-run", action="store_true",
                        help="print the commands and what is done already, run nothing")
    args = parser.parse_args(argv)
    seeds, runs = list(dict.fromkeys(args.seeds)), args.runs.resolve()
    runs = runs.relative_to(ROOT) if runs.is_relative_to(ROOT) else runs
    os.chdir(ROOT)
    arms = {"revision": Arm("compared", base=args.base, policy=args.ppo)}
    arms["working tree"] = arms["revision"]
    if args.chosen is not None:
        arms["working tree"] = replace(arms["revision"], policy=args.chosen, on_chosen=True)
    # the stage whose model is judged
    last = {side: "chosen" if arm.on_chosen else "policy" for side, arm in arms.items()}
    with checkout(args.revision, ROOT / "runs/compare") as tree:
        trees = {"revision": Tree(tree, code_of(tree)), "working tree": Tree(ROOT, code_of(ROOT))}
        if args.chosen is None and trees["revision"].code == trees["working tree"].code:
            raise SystemExit(f"error: run_*.py and virtue/ are the same in {args.revision} and in "
                             "the working tree: nothing to compare (is the change committed "
                             "already? then give HEAD~1)")
        made: dict[str, dict[int, dict[str, Stage]]] = {}
        for side, own in trees.items():
            tree_of = dict.fromkeys(DIFFER[args.start], own).get
            made[side] = {s: chain(arms[side], s, args.scale, tree_of) for s in seeds}
        order = [stage for s in seeds for side in made for stage in made[side][s].values()]
        label = {stage.folder: f"{side}, seed {s}" for side in made for s in seeds
                 for stage in made[side][s].values()}
        if args.dry_run:
            commands(order, runs)
            return 0
        print(f"{args.revision} is {tree.name} (code {trees['revision'].code}); working tree: code "
              f"{trees['working tree'].code}")
        if 2 / 2**len(seeds) > 0.05:
            print(f"a look: with {len(seeds)} seed{'s' * (len(seeds) > 1)} no p is below "
                  f"{min(1, 2 / 2**len(seeds)):.3g}; 6 can reach 0.05")
        failed = run_locked(order, runs, args.jobs, label)
        if code_of(ROOT) != trees["working tree"].code:
            print("warning: the working tree's code changed meanwhile: these numbers are of a "
                  "mixture; run it again")
    found = {side: {s: load(runs / stages["report"].folder) for s, stages in by_seed.items()
                    if stages["report"].done(runs)} for side, by_seed in made.items()}
    changed = [f"from {args.start} on"]
    changed += [f"run_ppo.py {args.ppo}"] * bool(args.ppo)
    if args.chosen is not None:
        changed.append(f"in the working tree run_sft.py {args.chosen} in PPO's place")
    changed += [f"at --scale {args.scale}"] * (args.scale != "full")
    print(f"\nworking tree against {args.revision} ({tree.name}), {', '.join(changed)}"
          f"{': a check that all runs, not a result' * (args.scale == 'fast')}\n")
    if not found["revision"].keys() & found["working tree"].keys():
        print("no seed was finished by both: nothing to compare")
        return 1
    both = [s for s in seeds if all(s in found[side] for side in made)]
    reports = [[runs / made[side][s]["report"].folder for s in both] for side in made]
    records = [folder / "run.json" for folders in reports for folder in folders]
    rulers = {json.loads(record.read_text())["code"] for record in records}
    if len(rulers) > 1:
        print(f"note: reports of earlier calls were kept, so {len(rulers)} versions of the code "
              f"evaluated these models ({', '.join(sorted(rulers))}): if what samples or evaluates "
              "changed since, remove the report folders named below and run this again\n")
    text = judge(found["revision"], found["working tree"])
    print(text)
    if SCORE in text and args.start != "ppo":
        print("Caution: without gold each code is scored by its own reward models, and these two "
              "scales are not the same.")
    policies = [[runs / made[side][s][last[side]].folder for s in both] for side in made]
    print("\n" + beside(list(made), reports, policies if args.chosen is None else None) + "\n")
    for s in seeds:
        folders = {side: [runs / stages[name].folder for name in (last[side], "report")]
                   for side, stages in ((side, made[side][s]) for side in made)}
        print(f"seed {s}: " + "; ".join(f"{side} {a}, {b}" for side, (a, b) in folders.items()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
