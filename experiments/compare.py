"""Judge a change to the code against a git revision: did it help?

  make compare REV=HEAD SEEDS="0 1 2"
  python experiments/compare.py HEAD --seeds 0 1 2 3 4 5 6 7 --jobs 2
  python experiments/compare.py HEAD~3 --from rm --ppo "--iterations 6"       # one flag alone: --ppo=--no-whiten

Both codes train on the same earlier artefacts, seed by seed: those of the default recipe, made once by the
working tree and shared with experiments/run.py. --from says where the two begin to differ. The revision is
checked out under runs/compare for as long as this takes. One ruler: run_eval.py of the working tree
evaluates both. Leave the code alone meanwhile. With n seeds no p is below 2 / 2^n: 6 seeds can reach 0.05.
"""
from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from run import Arm, Run, Stage, Tree, cell, chain, code_of, load, paired, run_locked, seed_test  # noqa: E402
from virtue.stats import effect_size, t_interval  # noqa: E402

DIFFER = {"data": ("revisions", "sft", "preferences", "rm", "policy"), "sft": ("sft", "preferences", "rm", "policy"),
          "rm": ("rm", "policy"), "ppo": ("policy",)}  # --from -> stages that each code runs itself
SCORE = "study_score_standardised"


def git(*command: str, root: Path = ROOT) -> str:
    done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: git {' '.join(command)}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


@contextmanager
def checkout(revision: str, folder: Path, root: Path = ROOT) -> Iterator[Path]:
    """The revision's files under `folder`, in a git worktree that is removed at the end."""
    sha = git("rev-parse", "--short=12", "--verify", f"{revision}^{{commit}}", root=root)
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
    way = f"{what} {'rose' if mean > 0 else 'fell'} by {abs(mean):.3f} in the mean"
    if n == 1:
        return f"Cannot tell: {way}, but one seed says nothing of the next."
    if p <= level:
        return f"The change {'helped' if mean > 0 else 'hurt'}: {way} over {n} seeds (p = {p:.3g})."
    if 2 / 2**n > level:
        least = next(m for m in range(n, 99) if 2 / 2**m <= level)
        return f"Cannot tell: {way} (p = {p:.3g}), but with {n} seeds the smallest possible p is {2 / 2**n:.3g}: take {least} or more."
    return f"Cannot tell: {way}, as {n} seeds may by chance (p = {p:.3g})."


def judge(old: dict[int, Run], new: dict[int, Run]) -> str:
    """Difference seed by seed, mean with interval, effect size, p, verdict; seeds that both have."""
    seeds = sorted(old.keys() & new.keys())
    pairs = [(old[s], new[s]) for s in seeds]
    golden = all("gold" in run.models[run.final] for pair in pairs for run in pair)
    what = "gold" if golden else SCORE
    a, b = ([pair[i].models[pair[i].final][what] for pair in pairs] for i in (0, 1))
    apart = [y - x for x, y in zip(a, b)]
    if golden:
        found, how = paired(*([pair[i].gold[pair[i].final] for pair in pairs] for i in (0, 1))), "seeds, then prompts, resampled"
    else:
        found, how = t_interval(apart) if len(apart) > 1 else (apart[0],), "Student's t over seeds"
    p = seed_test(a, b)
    lines = [f"| seed | {what}, revision | {what}, working tree | difference |", "|---|---|---|---|",
             *(f"| {s} | {x:.3f} | {y:.3f} | {d:+.3f} |" for s, x, y, d in zip(seeds, a, b, apart)), "",
             f"difference {cell(*found, sign='+')} (95 %: {how})"
             + (f"; effect size d_z {effect_size(a, b):.2f} over seeds; p {p:.3g}, all sign flips" if len(seeds) > 1 else ""),
             verdict(apart, p, what)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="the code to compare with: HEAD, a branch, a hash")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--from", dest="start", choices=DIFFER, default="ppo", help="the first stage that each code runs itself")
    parser.add_argument("--ppo", default="", help="flags of run_ppo.py for both")
    parser.add_argument("--base", default="", help='base model, prompts and sampling for both, e.g. "--model FOLDER --prompts FILE"')
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/experiments", help="folder of the stages' folders")
    parser.add_argument("--jobs", type=int, default=1, help="stages at once, one thread each: at most as many as cores")
    parser.add_argument("--scale", choices=("full", "small", "fast"), default="full",
                        help="small: about half of everything, in a third of the time; fast: whatever --ppo says, to see that all runs")
    args = parser.parse_args(argv)
    seeds, runs = list(dict.fromkeys(args.seeds)), args.runs.resolve()
    runs = runs.relative_to(ROOT) if runs.is_relative_to(ROOT) else runs
    os.chdir(ROOT)
    arm = Arm("compared", base=args.base, policy=args.ppo)
    with checkout(args.revision, ROOT / "runs/compare") as tree:
        trees = {"revision": Tree(tree, code_of(tree)), "working tree": Tree(ROOT, code_of(ROOT))}
        made: dict[str, dict[int, dict[str, Stage]]] = {side: {s: chain(arm, s, args.scale, lambda name: own if name in DIFFER[args.start] else None)
                                                               for s in seeds} for side, own in trees.items()}
        order = [stage for s in seeds for side in made for stage in made[side][s].values()]
        label = {stage.folder: f"{side}, seed {s}" for side in made for s in seeds for stage in made[side][s].values()}
        print(f"{args.revision} is {tree.name} (code {trees['revision'].code}); working tree: code {trees['working tree'].code}")
        failed = run_locked(order, runs, args.jobs, label)
        if code_of(ROOT) != trees["working tree"].code:
            print("warning: the working tree's code changed meanwhile: these numbers are of a mixture; run it again")
    found = {side: {s: load(runs / stages["report"].folder) for s, stages in by_seed.items() if stages["report"].done(runs)}
             for side, by_seed in made.items()}
    print(f"\nworking tree against {args.revision} ({tree.name}), from {args.start} on"
          f"{f', run_ppo.py {args.ppo}' if args.ppo else ''}{'' if args.scale == 'full' else f', at --scale {args.scale}'}\n")
    if not found["revision"].keys() & found["working tree"].keys():
        print("no seed was finished by both: nothing to compare")
        return 1
    text = judge(found["revision"], found["working tree"])
    print(text)
    if SCORE in text and args.start != "ppo":
        print("Caution: without gold each code is scored by its own reward models, and these two scales are not the same.")
    for s in seeds:
        print(f"seed {s}: " + ", ".join(f"{side} {runs / made[side][s]['report'].folder}" for side in made))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
