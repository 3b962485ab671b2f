"""Run named experiments over seeds, reuse every stage that is finished, print their tables.

  python experiments/run.py --list
  python experiments/run.py lenses --seeds 0 1 2
  python experiments/run.py all --seeds 0 1 2 3 4 5 6 7 --jobs 2
  python experiments/run.py lenses --scale small --jobs 2
  python experiments/run.py lenses --arms "action alone" "one pooled model" --seeds 0 1 2 3 4 5 6 7
  python experiments/run.py lenses --table        # only the tables, of what is finished
  python experiments/run.py causes --dry-run      # only the commands, and what is done already

An experiment is a list of arms, and an arm says what it changes in the default recipe, stage by stage.
A stage's folder is <runs>/<stage>-<hash of its flags, seed, parents' hashes, toy model>: arms share what
they have in common. Its output goes to <folder>.log, and run.json in the folder, written once the script
has ended well, holds command, seconds and code. A stage that fails stops its own arms only. Code is not
in the hash: stages that other code made are reused, and the tables warn. One process works in <runs> at a
time: for more at once, --jobs. Every stage has one thread.
"""
from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from virtue.ethics import LENSES  # noqa: E402
from virtue.plumbing.flags import make_parser  # noqa: E402
from virtue.evaluation.stats import best_of_n_kl, hierarchical_bootstrap, holm, paired_bootstrap, permutation_test, t_interval  # noqa: E402
from virtue.toy.gold import slots  # noqa: E402

# ---- the experiments


@dataclass(frozen=True)
class Arm:
    """A recipe: flags that differ from the default's, by stage. `base` (model, prompts, sampling) goes to the first
    stage, from which the later ones inherit; sft=None leaves SFT out; on_chosen puts SFT on the chosen answers in PPO's place;
    unseen trains a second ensemble, of another seed, on the half of the prompts that `rm` leaves it (--share first)."""

    name: str
    base: str = ""
    revisions: str = ""
    sft: str | None = ""
    preferences: str = ""
    rm: str = ""
    policy: str = ""
    report: str = ""
    on_chosen: bool = False
    unseen: bool = False
    best_of: bool = False  # also best-of-n of what PPO starts from


def ppo(*variants: tuple[str, str], **shared: str) -> list[Arm]:
    return [Arm(name, policy=flags, **shared) for name, flags in variants]


DEFAULT = Arm("default")
LR, VALUE_LR, RM_LR, SFT_LR = 2e-3, 4e-3, 2e-3, 1e-3  # the defaults of run_ppo.py, run_rm.py and run_sft.py (a test keeps them so)
UNCUT = "--max-new-tokens 64"  # at evaluation: what was learned is read off whole answers, however training cut them
# How many answers the study's limits cut, it does not say. Of the SFT model's answers on the toy (median 31 tokens) a limit of
# 16 cuts 99.9 %, 24 78 %, 30 53 %, 34 about 10 %: the first two stand for answers of hundreds of tokens, as a 7B chat model gives,
# the last two for hh-rlhf's own (1,600 harmless test dialogues: by a count of words and marks, 51 % exceed 32 tokens, 13 % 90).
CUTS = {16: "32 of hundreds", 24: "90 of hundreds", 30: "32 of hh-rlhf", 34: "90 of hh-rlhf"}
KEEP = "--truncated keep"  # the study speaks of no truncated answer that it dropped
# The study's reward models read 100 tokens: with turns of at most 32 that is the whole action, about half of the motivation and
# nothing of the consequence. On the toy the same takes 64 tokens where answers are whole, 50 where they are cut at 16.
STUDY_RM = "--labels hard --over-long cut"
RAW = "--no-standardize --score-dtype fp16"
# 20 x 16 pairs a step and 2 epochs make 6 steps of 650 pairs; the same number for PPO: 3 batches, 2
# passes, one step each. The report gives 1.41e-5 for the reward models: 0.14 of the usual 1e-4 for
# LoRA on 7B, hence 0.14 of the toy's default. PPO's rate it does not give; if it is the same, it is
# 0.14 of 1e-4, but 1.4 times the 1e-5 that is usual for PPO (README): hence the arms of six steps
# at 0.14, 1 and 1.4 times the default. (It names no schedule either; its code leaves TRL's,
# linear.)
STUDY_RM_STEPS, STUDY_PPO_STEPS = "--batch-size 20 --accumulation 16 --schedule constant", "--rollout-size 320 --minibatch-size 320 --iterations 3 --value-warmup 0 --ppo-epochs 2"
STUDY_RM_LR = f"--lr {0.14 * RM_LR:.2g}"


def study_ppo(share: float) -> str:
    """PPO's six steps, at a share of the default learning rates."""
    return f"{STUDY_PPO_STEPS} --lr {share * LR:.2g} --value-lr {share * VALUE_LR:.2g}"


# TRL's PPOConfig when the study was made (trl/trainer/ppo_config.py of trl 0.7.11 to 0.9.6,
# February to July 2024): 1.41e-5 for policy and value alike, 128 dialogues a batch and a step, 4
# epochs, an adaptive KL coefficient; scores neither scaled nor clipped, gradients not clipped, no
# missing-EOS penalty, no critic warm-up. No flag can say: one trunk for policy and value, a
# constant rate, Adam's eps of 1e-8, minibatches skipped at a mean ratio above 10. 650 prompts make
# 5 batches of 128, so 20 steps.
TRL = (f"--value-warmup 0 --lr {1.4 * LR:.2g} --value-lr {1.4 * LR:.2g} "
       "--kl-coef 0.2 --kl-target 6 --kl-horizon 10000 --lam 0.95 "
       "--clip-range 0.2 --value-clip-range 0.2 --vf-coef 0.1 "
       "--score-clip 1e9 --max-grad-norm 1e9 --eos-penalty 0")
TRL_PPO = f"{TRL} --rollout-size 128 --minibatch-size 128 --iterations 5 --ppo-epochs 4"
# The code published with the report (github.com/arvind6599/EthicalLLM, arvind/rl_training.py) sets
# that rate, 16 dialogues a batch and a step, 1 epoch, one pass of 10,000 prompts (the toy has 933:
# 58 steps), and as reward mean - 0.5 std of the dialogue's three scores, by the std of a sample (of
# three values: uwo's with 0.61). Its reward models had those pairs at least, so 62 steps or more;
# the toy's 650 at 20 a step make 65. (Their two outputs, of which PPO took the softmax, no flag can
# say: two_outputs.py.)
CODE_PPO = (f"{TRL} --rollout-size 16 --minibatch-size 16 --iterations 58 --ppo-epochs 1 "
            "--aggregate uwo --uwo-coef 0.61")
STUDY = dict(base="--quantize nf4 --max-new-tokens 16", sft=None, preferences=f"{KEEP} --orders one --limit 768",
             rm=f"{STUDY_RM} {STUDY_RM_STEPS} --epochs 2 {STUDY_RM_LR} --max-tokens 50", policy=f"{study_ppo(0.14)} {RAW}")
LITERAL = dict(STUDY, base="--quantize nf4 --max-new-tokens 32", rm=f"{STUDY_RM} {STUDY_RM_STEPS} --epochs 2 --lr 1.41e-5 --max-tokens 100",
               policy=f"{STUDY_PPO_STEPS} --lr 1.41e-5 --value-lr 1.41e-5 {RAW}")
AGGREGATORS = [("min", "--aggregate min"), ("uwo", "--aggregate uwo"), ("median", "--aggregate median"), ("lsc", "--aggregate lsc")]
NOISE = dict(rm="--label-noise 0.25")


def rank(r: int) -> Arm:  # alpha / r stays 2, so that a step's size does too
    return Arm(f"LoRA rank {r}", **dict.fromkeys(("sft", "rm", "policy"), f"--rank {r} --alpha {2 * r}"))


def cut(n: int) -> Arm:
    return Arm(f"cut at {n}, as {CUTS[n]}", base=f"--max-new-tokens {n}", revisions=KEEP, preferences=KEEP, report=UNCUT)


def slow_ppo(n: int) -> Arm:
    return Arm(f"PPO's lr / {n}", policy=f"--lr {LR / n:g} --value-lr {VALUE_LR / n:g}")


def slow_rm(n: int) -> Arm:
    return Arm(f"reward models' lr / {n}", rm=f"--lr {RM_LR / n:g}")


EXPERIMENTS: dict[str, tuple[str, list[Arm]]] = {
    "default": ("What does each stage gain, and what would SFT on the chosen answers? Do reward models that PPO never saw agree?",
                [Arm("default", best_of=True), Arm("SFT on chosen", on_chosen=True), Arm("half the pairs, unseen models beside", rm="--share first", unseen=True)]),
    "lenses": ("Do the lenses matter?", [
        DEFAULT, *ppo(("action alone", "--aggregate weighted --weights 1 0 0"), ("action, motivation", "--aggregate weighted --weights 0.5 0.5 0")),
        Arm("one pooled model", rm="--pool"), Arm("rules, not virtues", preferences="--ask rules"),
        *ppo(("answers only", "--reward-turns answer"), ("train the action only", "--train-turns action"))]),
    "study": ("Does the study's recipe give its stalemate?", [
        DEFAULT, Arm("translated", **STUDY), Arm("translated, whole answers at evaluation", **STUDY, report=UNCUT),
        Arm("literal values", **LITERAL), Arm("literal values, whole answers at evaluation", **LITERAL, report=UNCUT),
        Arm("its small steps alone", policy=study_ppo(0.14)), Arm("all but its small steps", **{**STUDY, "policy": RAW}, report=UNCUT),
        Arm("six steps at the full rate", policy=study_ppo(1)), Arm("six steps at 1.4 times it", policy=study_ppo(1.4)),
        Arm("translated, six steps at 1.4 times the rate", **{**STUDY, "policy": f"{study_ppo(1.4)} {RAW}"}, report=UNCUT),
        Arm("PPO by TRL's defaults of its time", **{**STUDY, "policy": f"{TRL_PPO} {RAW}"}, report=UNCUT),
        Arm("TRL's defaults alone", policy=f"{TRL_PPO} --no-standardize"),
        Arm("steps as in its code", **{**STUDY, "policy": f"{CODE_PPO} {RAW}",
            "rm": f"{STUDY_RM} --batch-size 20 --epochs 2 {STUDY_RM_LR} --max-tokens 50"},
            report=UNCUT),
        Arm("its code's PPO alone", policy=f"{CODE_PPO} --no-standardize"),
        Arm("its reward models' steps alone", rm=f"{STUDY_RM_STEPS} --epochs 3 {STUDY_RM_LR}")]),  # three epochs of half the pairs are six steps too
    "causes": ("Which one cause, put into the default recipe, costs how much?", [
        DEFAULT, Arm("no SFT", sft=None), cut(16), cut(24), Arm("reward input cut at 64", rm="--max-tokens 64 --over-long cut"),
        Arm("scores not standardised", policy="--no-standardize"), slow_ppo(10), slow_rm(10),
        Arm("judge in one order", preferences="--orders one"), Arm("fp16 scores", policy="--score-dtype fp16"),
        Arm("NF4 base", base="--quantize nf4"), Arm("NF4 base, merged reward models", base="--quantize nf4", policy="--merge-rm")]),
    "causes-more": ("The same, more of it: cuts, LoRA's rank, whole matrices", [
        DEFAULT, cut(30), cut(34), rank(1), rank(64),
        Arm("whole matrices", sft=f"--whole --lr {SFT_LR / 10:g}", rm=f"--whole --lr {RM_LR / 10:g}",
            policy=f"--whole --lr {LR / 10:g} --value-lr {VALUE_LR / 10:g}")]),
    "aggregators": ("Which aggregator?", [Arm("mean"), *ppo(("mean, paid at the end", "--pay-at end"), *AGGREGATORS)]),
    "aggregators-noise": ("Which aggregator, with a quarter of the labels turned?", [Arm("mean", **NOISE), *ppo(*AGGREGATORS, **NOISE)]),
    # (that the value function has an adapter of its own cannot be taken out by a flag)
    "details": ("What are the details of PPO worth that people remove?", [DEFAULT, *ppo(
        ("no value clipping", "--value-clip-range 1e9"), ("no whitening", "--no-whiten"), ("no critic warm-up", "--value-warmup 0"), ("adaptive KL", "--kl-target 3"),
        ("no missing-EOS penalty", "--eos-penalty 0"))]),
}
# Half of the default's pairs, a third of its dialogues in two thirds of its optimiser steps, half of its prompts at evaluation.
SMALL = {"preferences": "--limit 384", "policy": "--rollout-size 64 --minibatch-size 16 --iterations 16", "report": "--limit 120 --judge-limit 16"}
FAST = {"revisions": "--limit 64", "preferences": "--limit 96", "policy": "--iterations 4 --value-warmup 1 --rollout-size 32 --minibatch-size 32", "report": "--limit 60"}

# ---- stages


class Tree(NamedTuple):
    """A checkout of the project other than this one, or this one pinned: where its scripts are, and its `code_of`."""

    path: Path
    code: str


@functools.cache
def toy() -> str:
    """The toy model's weights: another one makes another world, in which no stage can be reused."""
    return hashlib.sha256((ROOT / "virtue/toy/model/model.safetensors").read_bytes()).hexdigest()


@dataclass(frozen=True)
class Stage:
    name: str
    argv: tuple[str, ...]  # script and flags, without paths
    seed: int
    parents: tuple[tuple[str, Stage], ...] = ()  # (flag, the stage whose folder it names)
    tree: Tree | None = None  # None: this checkout, whatever its code

    @functools.cached_property
    def folder(self) -> str:
        key = [self.argv, self.seed, [(flag, p.folder) for flag, p in self.parents], self.tree.code if self.tree else toy()]
        return f"{self.name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:10]}"

    def command(self, runs: Path) -> list[str]:
        script = str(self.tree.path / self.argv[0]) if self.tree else self.argv[0]
        parents = [part for flag, p in self.parents for part in (flag, str(runs / p.folder))]
        return [script, *self.argv[1:], "--seed", str(self.seed), *parents, "--out", str(runs / self.folder), "--resume"]

    def done(self, runs: Path) -> bool:
        folder = runs / self.folder  # run_ppo.py writes a manifest at every save: run.json says that it came to its end
        return (folder / "run.json").is_file() and any((folder / file).is_file() for file in ("virtue.json", "action/virtue.json", "best_of_n.json"))


def chain(arm: Arm, seed: int, scale: str = "full", tree: Callable[[str], Tree | None] = lambda name: None) -> dict[str, Stage]:
    """The stages of an arm by name, parents first; `tree` says whose code runs a stage.

    The flags of scale small come before the arm's own, which win; those of scale fast after them.
    """
    made: dict[str, Stage] = {}

    def stage(name: str, script: str, flags: str, seed: int = seed, **parents: str) -> None:
        before, after = (SMALL.get(name, "") if scale == "small" else ""), (FAST.get(name, "") if scale == "fast" else "")
        argv = (*script.split(), *shlex.split(f"{before} {flags} {after}"))
        made[name] = Stage(name, argv, seed, tuple((f"--{flag}", made[p]) for flag, p in parents.items() if p in made), tree(name))

    if arm.sft is not None:
        stage("revisions", "run_data.py revisions", f"{arm.base} {arm.revisions}")
        stage("sft", "run_sft.py", arm.sft, data="revisions")
    stage("preferences", "run_data.py preferences", f"{arm.base if arm.sft is None else ''} {arm.preferences}", sft="sft")
    stage("rm", "run_rm.py", arm.rm, data="preferences", sft="sft")
    if arm.unseen:
        stage("unseen", "run_rm.py", "--share second", seed + 1000, data="preferences", sft="sft")
    if arm.best_of:
        stage("best", "run_eval.py best-of-n", "", sft="sft", rm="rm")
    if arm.on_chosen:
        stage("chosen", "run_sft.py", arm.policy, data="preferences", sft="sft")
    else:
        stage("policy", "run_ppo.py", arm.policy, rm="rm", sft="sft")
    stage("report", "run_eval.py models", arm.report, policy="chosen" if arm.on_chosen else "policy", sft="sft", rm="rm", **{"eval-rm": "unseen"})
    return made


def code_of(tree: Path) -> str:
    """Short hash of all that the scripts of a checkout run: run_*.py and virtue/."""
    files = sorted(p for p in (*tree.glob("run_*.py"), *(tree / "virtue").rglob("*")) if p.is_file() and p.suffix != ".pyc")
    return hashlib.sha256("".join(f"{p.relative_to(tree)} {hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in files).encode()).hexdigest()[:10]


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def lines_of(log: Path) -> list[str]:
    return [line for line in re.split(r"[\r\n]+", log.read_text(errors="replace")) if line.strip()]


def last_error(log: Path) -> str:
    """The line of a log that says what went wrong: the script's "error: ...", or the last one."""
    lines = [line for line in lines_of(log) if not line.startswith("# failed")]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])


def execute(stages: Iterable[Stage], runs: Path, jobs: int = 1, label: Mapping[str, str] = {}) -> dict[str, str]:
    """Runs what is not done, parents first, `jobs` at once -> {folder: error} of what failed or could not start."""
    stages = list({s.folder: s for s in stages}.values())
    todo, failed, running, ended = [s for s in stages if not s.done(runs)], {}, {}, 0
    done, seconds = {s.folder for s in stages} - {s.folder for s in todo}, {}  # seconds: of stages of a name
    for path in runs.glob("*/run.json"):
        seconds.setdefault(path.parent.name.rsplit("-", 1)[0], []).append(json.loads(path.read_text())["seconds"])
    total, begin = len(todo), time.monotonic()
    print(f"{len(stages)} stages, {len(done)} done already, {total} to run, {jobs} at once", flush=True)

    def say(stage: Stage, what: str) -> None:
        guess = [np.mean(seconds[s.name]) if s.name in seconds else None for s in (*todo, *running)]
        left = sum(g for g in guess if g is not None) / jobs
        rest = f", {'at least' if None in guess else 'about'} {clock(left)} left" if left else ""
        print(f"[{ended}/{total}] {what} {stage.folder} ({label.get(stage.folder, f'seed {stage.seed}')}); {clock(time.monotonic() - begin)}{rest}", flush=True)

    try:
        while todo or running:
            for stage in todo[:]:
                if cause := next((p for _, p in stage.parents if p.folder in failed), None):
                    failed[stage.folder] = failed[cause.folder]
                    todo.remove(stage)
                    ended += 1
                elif len(running) < jobs and all(p.folder in done for _, p in stage.parents):
                    todo.remove(stage)
                    folder, command = runs / stage.folder, stage.command(runs)
                    (folder / "run.json").unlink(missing_ok=True)
                    with open(runs / f"{stage.folder}.log", "w") as log:
                        log.write(f"$ {shlex.join(['python', *command])}\n")
                        log.flush()
                        process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
                                                   env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "10"})
                    running[stage] = process, time.monotonic(), code_of(stage.tree.path if stage.tree else ROOT)
                    say(stage, "start:")
            time.sleep(0.05)
            for stage, (process, started, code) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[stage]
                ended += 1
                took, folder, log = time.monotonic() - started, runs / stage.folder, runs / f"{stage.folder}.log"
                if process.returncode == 0:
                    folder.mkdir(exist_ok=True)
                    (folder / "run.json").write_text(json.dumps(
                        {"command": shlex.join(["python", *stage.command(runs)]), "seed": stage.seed, "seconds": took, "code": code}) + "\n")
                if process.returncode == 0 and stage.done(runs):
                    done.add(stage.folder)
                    seconds.setdefault(stage.name, []).append(took)
                    say(stage, f"{took:.0f} s:")
                    continue
                failed[stage.folder] = last_error(log)
                with open(log, "a") as file:
                    file.write(f"\n# failed with status {process.returncode}\n")
                say(stage, "FAILED:")
                first, *rest = lines_of(log)
                print("\n  | ".join(["  " + first, *rest[-15:]]), flush=True)
    finally:  # on Ctrl-C: end what runs; a stage without run.json goes on with --resume
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.wait()
    return failed


def commands(stages: Iterable[Stage], runs: Path) -> None:
    """Prints what `execute` would run, and what is done already."""
    stages = list({s.folder: s for s in stages}.values())
    for stage in stages:
        print(f"{'# done: ' if stage.done(runs) else ''}{shlex.join(['python', *stage.command(runs)])}")
    print(f"# {len(stages)} stages, {sum(s.done(runs) for s in stages)} done")


def run_locked(stages: Iterable[Stage], runs: Path, jobs: int, label: Mapping[str, str] = {}) -> dict[str, str]:
    """`execute`, alone in the folder; SIGTERM ends it as Ctrl-C does."""
    runs.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with open(runs / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return execute(stages, runs, jobs, label)
    except BlockingIOError:
        sys.exit(f"error: {runs}: another process is at work there: wait for it, or give other --runs")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- tables


class Run(NamedTuple):
    """What a finished chain has to say."""

    start: str  # the model that PPO started from: sft, or base
    final: str
    models: dict[str, dict[str, float]]  # model -> column of run_eval.py
    gold: dict[str, dict[str, float]]  # model -> prompt id -> gold
    curve: list[tuple[float, float]]  # KL and gold of PPO's own dialogues, iteration by iteration; none of answers alone
    questions: dict[str, str]  # prompt id -> its question, names masked
    at_length: float  # gain of the last stage in gold at equal length; nan without gold
    wins: list[float]  # share of dialogues in which the judge prefers the final model to the start, by lens
    accuracy: list[float]  # of PPO's reward models on held-out pairs, by lens


def load(report: Path) -> Run:
    scores = json.loads((report / "scores.json").read_text())
    samples = [json.loads(line) for line in (report / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    gold = {name: {s["id"]: s[name]["gold"]["overall"] for s in samples if "gold" in s[name]} for name in scores["models"]}
    *_, start, final = scores["models"]
    asked = [(s["id"], s["prompt"][-1]["content"]) for s in samples if "gold" in s[final]]
    questions = {key: text.replace(person, "P").replace(thing, "T") for key, text in asked for person, thing in [slots(text)]}
    at_length = scores.get("differences", {}).get(f"{final} - {start}", {}).get("gold, at equal length", {}).get("difference", np.nan)
    wins = [found["rate"] if found else np.nan for found in scores.get("wins", {}).get(f"{final} vs {start}", {}).values()]  # none fits the judge's context
    accuracy = [np.nan if m["accuracy"] is None else m["accuracy"] for m in scores.get("reward_models", []) if m["of"] == "PPO"]
    return Run(start, final, scores["models"], gold, [(c["kl"], c["gold"]) for c in scores.get("curve", []) if c["gold"] is not None], questions, at_length, wins, accuracy)


def gold_at(curve: Sequence[tuple[float, float]], kl: float) -> float:
    """Gold at `kl`: of the parabola in sqrt(KL) nearest to the run's iterations, each of which is noisy; nan where no iteration went so far."""
    x, y = np.sqrt(np.maximum([k for k, _ in curve], 0)), [gold for _, gold in curve]
    if not len(x) or kl > x.max() ** 2 + 1e-9:
        return float("nan")
    return float(np.polyval(np.polyfit(x, y, min(2, len(set(x)) - 1)), np.sqrt(max(kl, 0))))


def paired(a: Sequence[Mapping[str, float]], b: Sequence[Mapping[str, float]]) -> tuple[float, float, float]:
    """Mean of b - a over seeds and the prompts that both have, with its 95 % interval; one mapping by prompt a seed."""
    ids = [sorted(x.keys() & y.keys()) for x, y in zip(a, b, strict=True)]
    crossed = all(keep == ids[0] for keep in ids)  # every seed was asked the same
    a, b = ([np.array([row[i] for i in keep]) for row, keep in zip(rows, ids)] for rows in (a, b))
    return hierarchical_bootstrap(a, b, crossed=crossed) if len(a) > 1 else paired_bootstrap(a[0], b[0], resamples=2000)


def by_question(runs: Sequence[Run]) -> str:
    """Gain of the last stage on each question of the evaluation, mean over seeds: prompts of one question are not independent."""
    gains: dict[str, list[float]] = {}
    for run in runs:
        for key, question in run.questions.items():
            gains.setdefault(question, []).append(run.gold[run.final][key] - run.gold[run.start][key])
    return "; ".join(f'"{question}" {np.mean(values):+.3f} ({len(values) // len(runs)} prompts)' for question, values in sorted(gains.items()))


def over_seeds(values: Sequence[float]) -> tuple[float, ...]:
    """Mean with Student's interval, one value a seed; the mean alone of one seed, or where a value is nan."""
    return t_interval(values) if len(values) > 1 and np.isfinite(values).all() else (float(np.mean(values)),)


def seed_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Exact two-sided p of b - a, one value a seed; nan for one seed."""
    return permutation_test(a, b) if len(a) > 1 else float("nan")


def cell(value: float, low: float | None = None, high: float | None = None, sign: str = "", digits: int = 3) -> str:
    if np.isnan(value):
        return "–"
    return f"{value:{sign}.{digits}f}" + ("" if low is None else f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]")


def rows_of(found: Sequence[Sequence[str]], head: str) -> str:
    heads = head.split(" | ")
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *found))


def tables(found: Mapping[str, Mapping[int, Run]], least_kl: float = 0.5) -> str:
    """Two tables in markdown, from arm -> seed -> run; the first arm is what the others are compared with.

    Equal KL: the smallest of the runs' largest KL, runs that never reach `least_kl` nats left out, and those that started from
    another model than the first arm's: it would not be the same distance.
    """
    first = next(iter(found))
    starts = {seed: run.gold[run.start] for seed, run in found[first].items()}
    curves = {arm: {seed: run.curve if run.gold[run.start] == starts.get(seed) else [] for seed, run in runs.items()} for arm, runs in found.items()}
    reached = [kl for arm in curves.values() for curve in arm.values() if curve and (kl := max(x for x, _ in curve)) >= least_kl]
    kl = min(reached, default=float("nan"))
    at = {arm: {seed: gold_at(curve, kl) for seed, curve in runs.items()} for arm, runs in curves.items()}
    means = {arm: {seed: float(np.mean([*run.gold[run.final].values()])) for seed, run in runs.items()} for arm, runs in found.items()}
    shared = {arm: sorted(runs.keys() & found[first].keys()) if arm != first else [] for arm, runs in found.items()}
    p = {arm: seed_test([means[first][s] for s in seeds], [means[arm][s] for s in seeds]) for arm, seeds in shared.items() if seeds}
    tested = [arm for arm in p if not np.isnan(p[arm])]
    adjusted = dict(zip(tested, holm([p[arm] for arm in tested]))) if tested else {}
    main, details, notes = [], [], []
    for arm, runs in found.items():
        if not runs:
            main.append([arm, "none", *["–"] * 8])
            continue
        each, seeds = list(runs.values()), shared[arm]

        def level(name: str) -> str:
            gold = [run.gold[name] for run in each if name in run.gold]
            return cell(*paired([dict.fromkeys(g, 0.0) for g in gold], gold)) if gold else "–"

        def mean(key: str, which: str = "final", over: str | None = None, digits: int = 3) -> str:
            values = [run.models[getattr(run, which)].get(key, np.nan) / (run.models[over][key] if over else 1) for run in each]
            return cell(float(np.mean(values)), digits=digits)

        def moved(key: str) -> str:
            apart = [run.models[run.final].get(key, np.nan) - run.models[run.start].get(key, np.nan) for run in each]
            return f"{mean(key, 'start')} → {mean(key)}" + (f"; {cell(*over_seeds(apart), sign='+')}" if len(each) > 1 else "")

        began = [float(np.mean([*run.gold[run.start].values()])) for run in each]
        low, high = (over_seeds([means[arm][s] - means[first][s] for s in seeds]) + (np.nan,) * 2)[1:3] if seeds else (np.nan,) * 2
        few = "" if np.isnan(low) or len(seeds) > 5 else f"; t [{low:+.3f}, {high:+.3f}]"  # a bootstrap of few seeds is too narrow
        both = [s for s in seeds if not np.isnan([at[arm][s], at[first][s]]).any()]
        apart = [at[arm][s] - at[first][s] for s in both]
        here = cell(float(np.nanmean([*at[arm].values()]))) if not np.isnan([*at[arm].values()]).all() else "–"
        if "eval_reward/action" in each[0].models[each[0].final]:
            notes.append(f"{arm}: what the last stage gained in standardised reward, by lens: " + "; ".join(
                f"{title} " + " / ".join(f"{np.mean([r.models[r.final][f'{key}/{x}'] - r.models[r.start][f'{key}/{x}'] for r in each]):+.2f}" for x in LENSES)
                for key, title in (("reward", "models that PPO saw"), ("eval_reward", "unseen models"))) + ".")
        if arm == first and len({q for run in each for q in run.questions.values()}) > 1:
            notes.append(f"{arm}: gain of the last stage in gold by held-out question: {by_question(each)}.")
        main.append([
            arm, " ".join(map(str, runs)), level("base"), level("sft") if each[0].start == "sft" else "–", level(each[0].final),
            cell(*paired([run.gold[run.start] for run in each], [run.gold[run.final] for run in each]), sign="+") + (f"; p {seed_test(began, [*means[arm].values()]):.3f}" if len(each) > 1 else ""),
            cell(*paired(*([found[x][s].gold[found[x][s].final] for s in seeds] for x in (first, arm))), sign="+") + few if seeds else "–",
            cell(p.get(arm, np.nan)), cell(adjusted.get(arm, np.nan)),
            f"{here}; {cell(*over_seeds(apart), sign='+')}" if apart else here])
        details.append([
            arm, " / ".join(mean(f"gold/{lens}", "start") for lens in LENSES), " / ".join(mean(f"gold/{lens}") for lens in LENSES),
            cell(*over_seeds([run.at_length for run in each]), sign="+"),
            " / ".join(cell(x) for x in np.mean([run.accuracy for run in each], 0)) if all(run.accuracy for run in each) else "–",
            " / ".join(f"{x:.2f}" for x in np.mean([run.wins for run in each], 0)) if all(run.wins for run in each) else "–", mean("kl", digits=2), mean("perplexity", over="base"),
            " / ".join(mean(f"patterns/{lens}") for lens in LENSES), mean("broken"), mean("fits"), mean("ended"),
            moved("study_score"), moved("study_score_standardised"), mean("length", digits=1)])
    equal = "equal KL" if np.isnan(kl) else f"KL {kl:.2f}"
    text = rows_of(main, f"gold | seeds | base | SFT | final | gain of the last stage | final − {first}'s | p | p, Holm | at {equal}; − {first}'s")
    text += "\n\n" + rows_of(details, "final model, mean over seeds | gold before the last stage, by lens | after | its gain at equal length | reward models' accuracy, by lens | "
                                    "judge prefers after, by lens | KL | perplexity / base's | distinct, names masked, by lens | broken | fits | ended | Score: start → final | standardised | tokens")
    return "\n\n".join([text, *notes])


def show(name: str, arms: Sequence[Arm], runs: Path, seeds: Sequence[int], scale: str) -> None:
    found, missing, codes = {arm.name: {} for arm in arms}, [], set()
    for arm in arms:
        for seed in seeds:
            made = chain(arm, seed, scale)
            if made["report"].done(runs):
                found[arm.name][seed] = load(runs / made["report"].folder)
                codes |= {json.loads((runs / s.folder / "run.json").read_text())["code"] for s in made.values() if s.done(runs)}
                continue
            logs = [runs / f"{s.folder}.log" for s in made.values() if not s.done(runs) and (runs / f"{s.folder}.log").is_file()]
            bad = next((log for log in logs if lines_of(log)[-1].startswith("# failed")), None)
            missing.append(f"- {arm.name}, seed {seed}: " + (f"{bad.stem.split('-')[0]} failed: {last_error(bad)}" if bad else "not finished"))
    print(f"\n## {name}: {EXPERIMENTS[name][0]}\n")
    if scale != "full":
        print({"fast": "**At `--scale fast`: a check that all runs, not a result.**\n",
               "small": "At `--scale small`: half of the default's pairs and prompts, a third of its dialogues.\n"}[scale])
    print(tables(found), end="\n\n")
    for arm in arms:
        files = [runs / made["best"].folder / "best_of_n.json" for seed in seeds if (made := chain(arm, seed, scale)).get("best") and made["best"].done(runs)]
        golds: dict[str, dict[int, list[float]]] = {}
        for row in (row for file in files for row in json.loads(file.read_text())["rows"] if "gold" in row):
            golds.setdefault(row["aggregator"], {}).setdefault(row["n"], []).append(row["gold"])
        if golds:
            sizes = next(iter(golds.values()))
            print(f"Gold of the best of n of what PPO starts from, {arm.name}, {len(files)} seeds:\n")
            print(rows_of([["nats, at most", *(f"{best_of_n_kl(n):.2f}" for n in sizes)],
                           *([name, *(cell(*over_seeds(values)) for values in by_n.values())] for name, by_n in golds.items())],
                          "aggregator | " + " | ".join(f"n = {n}" for n in sizes)), end="\n\n")
    print("Gold of held-out prompts, 0 worst to 1 oracle; 95 % intervals: seeds and prompts resampled (one seed: prompts alone); of two to five seeds Student's t over them too, the one to believe; "
          "p: all sign flips of the seeds' differences, on these prompts; Holm: over the arms shown. At equal KL, for arms that start from the same model: of PPO's own dialogues, "
          "a parabola in sqrt(KL) through the run (the arm that goes further is read where it has trained less); there, at equal length, of Scores and of best-of-n "
          "Student's t over seeds. By lens: action / motivation / consequence.")
    if len(codes) > 1:
        print(f"\n**Warning: {len(codes)} versions of the code made these stages ({', '.join(sorted(codes))}).**")
    if missing:
        print("\n" + "\n".join(missing))


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("experiments", nargs="*", metavar="experiment", help=f"{', '.join(EXPERIMENTS)}, or all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each makes its own data, reward models and PPO")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="of each experiment only these, beside its first, with which they are compared")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/experiments", help="folder of the stages' folders")
    parser.add_argument("--jobs", type=int, default=1, help="stages at once, one thread each: at most as many as cores")
    parser.add_argument("--scale", choices=("full", "small", "fast"), default="full",
                        help="small: about half of everything, in a third of the time; fast: to see that all runs, no result")
    for flag, help_text in (("--list", "name the experiments and their arms"), ("--dry-run", "print the commands, run nothing"),
                            ("--table", "print the tables of what is finished, run nothing")):
        parser.add_argument(flag, action="store_true", help=help_text)
    args = parser.parse_args(argv)
    names, seeds = list(EXPERIMENTS) if "all" in args.experiments else args.experiments, list(dict.fromkeys(args.seeds))
    if args.list:
        for name, (question, arms) in EXPERIMENTS.items():
            print(f"{name}: {question}\n  {'; '.join(arm.name for arm in arms)}")
        return 0
    if not names or set(names) - EXPERIMENTS.keys() or args.jobs < 1 or min(seeds) < 0:
        parser.error(f"give experiments of {', '.join(EXPERIMENTS)}, or all; --jobs of at least 1; seeds of at least 0")
    chosen = {name: [arm for i, arm in enumerate(EXPERIMENTS[name][1]) if i == 0 or not args.arms or arm.name in args.arms] for name in names}
    if unknown := set(args.arms or ()) - {arm.name for arms in chosen.values() for arm in arms}:
        parser.error(f"no arm {sorted(unknown)[0]!r} in {', '.join(names)}: --list names them")
    runs = args.runs.resolve()
    runs = runs.relative_to(ROOT) if runs.is_relative_to(ROOT) else runs
    os.chdir(ROOT)
    failed = {}
    if not args.table:
        label, stages = {}, []
        for seed in seeds:  # seed by seed, so that a whole table, if a wide one, comes early
            for name in names:
                for arm in chosen[name]:
                    for stage in chain(arm, seed, args.scale).values():
                        stages.append(stage)
                        label.setdefault(stage.folder, f"{name}: {arm.name}, seed {seed}")
        if args.dry_run:
            commands(stages, runs)
            return 0
        failed = run_locked(stages, runs, args.jobs, label)
    for name in names:
        show(name, chosen[name], runs, seeds, args.scale)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
