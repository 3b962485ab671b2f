"""Stages of an experiment: what an arm is made of, what is done already, and running the rest.

A stage is one call of a script. Its folder is <runs>/<stage>-<hash of its flags, seed, parents'
hashes, patches, toy model>, so that arms share what they have in common. Its output goes to
<folder>.log, and run.json in the folder, written once the script has ended well, holds command,
seconds and code. A stage that fails stops its own arms only. The code is not in the hash: stages
that other code made are reused, and the tables warn. One process works in <runs> at a time.
"""
from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "experiments/patches"
# One of them is in a finished folder
ENDED = ("virtue.json", "action/virtue.json", "best_of_n.json")


@dataclass(frozen=True)
class Arm:
    """One recipe: what it changes in the default one, by stage.

    The texts are flags for the scripts. `base` (model, prompts, sampling) goes to the first stage,
    from which the later ones inherit them; sft=None leaves SFT out. `patch` names files in
    experiments/patches, parted by blanks: the stages whose script they change run in a copy of the
    code with these changes.
    """

    name: str
    base: str = ""
    revisions: str = ""
    sft: str | None = ""
    preferences: str = ""
    rm: str = ""
    policy: str = ""
    report: str = ""
    patch: str = ""
    on_chosen: bool = False  # SFT on the chosen answers takes PPO's place
    # a second ensemble, of another seed and of the other half of the prompts
    unseen: bool = False
    best_of: bool = False    # also best-of-n of the model from which PPO starts


# Half of the default's pairs, a third of its dialogues in two thirds of its optimiser steps, half
# of its prompts at evaluation.
SMALL = {"preferences": "--limit 384",
         "policy": "--rollout-size 64 --minibatch-size 16 --iterations 16",
         "report": "--limit 120 --judge-limit 16"}
FAST = {"revisions": "--limit 64", "preferences": "--limit 96", "report": "--limit 60",
        "policy": "--iterations 4 --value-warmup 1 --rollout-size 32 --minibatch-size 32"}


class Tree(NamedTuple):
    """The code of a stage, where it is not this checkout as it stands: folder, and a hash for
    it."""

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
    patches: tuple[str, ...] = ()

    @functools.cached_property
    def folder(self) -> str:
        texts = [(PATCHES / f"{name}.diff").read_text() for name in self.patches]
        parents = [(flag, parent.folder) for flag, parent in self.parents]
        key = [self.argv, self.seed, parents, self.tree.code if self.tree else toy(), *texts]
        return f"{self.name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:10]}"

    def code(self, runs: Path) -> Path:
        """The folder of the code that runs this stage."""
        if self.patches:
            return runs / "code" / "+".join(self.patches)
        return self.tree.path if self.tree else ROOT

    def command(self, runs: Path) -> list[str]:
        code = self.code(runs)
        script = self.argv[0] if code == ROOT and not self.tree else str(code / self.argv[0])
        parents = [part for flag, parent in self.parents
                   for part in (flag, str(runs / parent.folder))]
        return [script, *self.argv[1:], "--seed", str(self.seed), *parents,
                "--out", str(runs / self.folder), "--resume"]

    def done(self, runs: Path) -> bool:
        """run_ppo.py writes a manifest at every save: only run.json says that it came to its
        end."""
        folder = runs / self.folder
        return (folder / "run.json").is_file() and any((folder / file).is_file() for file in ENDED)


def patched_code(patches: tuple[str, ...], folder: Path) -> None:
    """A copy of this checkout's scripts and package with the patches in `folder`, made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "virtue", folder / "virtue",
                    ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("run_*.py"):
        shutil.copy(script, folder)
    for name in patches:
        apply = ["git", "apply", str(PATCHES / f"{name}.diff")]
        outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
        done = subprocess.run(apply, cwd=folder, capture_output=True, text=True, env=outside)
        if done.returncode:
            raise SystemExit(f"error: experiments/patches/{name}.diff: does not fit this code: "
                             f"{' '.join(done.stderr.split())}")


def changes(patch: str) -> set[str]:
    """The files that a patch changes."""
    text = (PATCHES / f"{patch}.diff").read_text()
    return set(re.findall(r"^\+\+\+ b/(\S+)", text, re.MULTILINE))


def scripts_of(patch: str) -> set[str]:
    return {file for file in changes(patch) if file.startswith("run_")}


def chain(arm: Arm, seed: int, scale: str = "full",
          tree: Callable[[str], Tree | None] = lambda name: None) -> dict[str, Stage]:
    """The stages of an arm by name, parents first; `tree` says whose code runs a stage.

    The flags of scale small come before the arm's own, which win; those of scale fast after them.
    A patch of virtue/ is for the policy.
    """
    stages: dict[str, Stage] = {}

    def stage(name: str, script: str, flags: str, seed: int = seed, **parents: str) -> None:
        before = SMALL.get(name, "") if scale == "small" else ""
        after = FAST.get(name, "") if scale == "fast" else ""
        argv = (*script.split(), *shlex.split(f"{before} {flags} {after}"))
        above = tuple((f"--{flag}", stages[p]) for flag, p in parents.items() if p in stages)
        patches = tuple(patch for patch in arm.patch.split()
                        if argv[0] in changes(patch) or name == "policy" and not scripts_of(patch))
        stages[name] = Stage(name, argv, seed, above, tree(name), patches)

    if arm.sft is not None:
        stage("revisions", "run_data.py revisions", f"{arm.base} {arm.revisions}")
        stage("sft", "run_sft.py", arm.sft, data="revisions")
    base = arm.base if arm.sft is None else ""
    stage("preferences", "run_data.py preferences", f"{base} {arm.preferences}", sft="sft")
    stage("rm", "run_rm.py", arm.rm, data="preferences", sft="sft")
    if arm.unseen:
        stage("unseen", "run_rm.py", f"{arm.rm} --share second", seed + 1000, data="preferences",
              sft="sft")
    if arm.best_of:
        stage("best", "run_eval.py best-of-n", "", sft="sft", rm="rm")
    if arm.on_chosen:
        stage("chosen", "run_sft.py", arm.policy, data="preferences", sft="sft")
    else:
        stage("policy", "run_ppo.py", arm.policy, rm="rm", sft="sft")
    stage("report", "run_eval.py models", arm.report, sft="sft", rm="rm",
          policy="chosen" if arm.on_chosen else "policy", **{"eval-rm": "unseen"})
    return stages


def code_of(tree: Path) -> str:
    """Short hash of all that the scripts of a checkout run: run_*.py and virtue/."""
    files = sorted(p for p in (*tree.glob("run_*.py"), *(tree / "virtue").rglob("*"))
                   if p.is_file() and p.suffix != ".pyc")
    lines = [f"{p.relative_to(tree)} {hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:10]


# ---- running


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def lines_of(log: Path) -> list[str]:
    text = log.read_text(errors="replace")
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def last_error(log: Path) -> str:
    """The line of a log that says what went wrong: the script's "error: ...", or the last one."""
    lines = [line for line in lines_of(log) if not line.startswith("# failed")]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])


def begin(stage: Stage, runs: Path) -> subprocess.Popen:
    (runs / stage.folder / "run.json").unlink(missing_ok=True)
    command = stage.command(runs)
    with open(runs / f"{stage.folder}.log", "w") as log:
        log.write(f"$ {shlex.join(['python', *command])}\n")
        log.flush()
        return subprocess.Popen(
            [sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "10"})


def end(stage: Stage, runs: Path, status: int, seconds: float, code: str) -> str:
    """Writes run.json or the end of the log -> what went wrong, or nothing."""
    folder, log = runs / stage.folder, runs / f"{stage.folder}.log"
    if status == 0:
        folder.mkdir(exist_ok=True)
        record = {"command": shlex.join(["python", *stage.command(runs)]), "seed": stage.seed,
                  "seconds": seconds, "code": code}
        (folder / "run.json").write_text(json.dumps(record) + "\n")
    if status == 0 and stage.done(runs):
        return ""
    error = last_error(log)
    with open(log, "a") as file:
        file.write(f"\n# failed with status {status}\n")
    return error


class Journal:
    """What `execute` prints: the stage, how many there are, and how long the rest may take."""

    def __init__(self, stages: list[Stage], runs: Path, jobs: int, label: Mapping[str, str]):
        self.jobs, self.label, self.started, self.ended = jobs, label, time.monotonic(), 0
        self.total = sum(not stage.done(runs) for stage in stages)
        self.seconds: dict[str, list[float]] = {}  # of stages of a name
        for path in runs.glob("*/run.json"):
            name = path.parent.name.rsplit("-", 1)[0]
            self.seconds.setdefault(name, []).append(json.loads(path.read_text())["seconds"])
        print(f"{len(stages)} stages, {len(stages) - self.total} done already, {self.total} to "
              f"run, {jobs} at once", flush=True)

    def say(self, stage: Stage, what: str, left: Iterable[Stage]) -> None:
        guesses = [np.mean(self.seconds[s.name]) if s.name in self.seconds else None for s in left]
        known = [guess for guess in guesses if guess is not None]
        about = "about" if len(known) == len(guesses) else "at least"
        rest = f", {about} {clock(sum(known) / self.jobs)} left" if known else ""
        who = self.label.get(stage.folder, f"seed {stage.seed}")
        print(f"[{self.ended}/{self.total}] {what} {stage.folder} ({who}); "
              f"{clock(time.monotonic() - self.started)}{rest}", flush=True)


def execute(stages: Iterable[Stage], runs: Path, jobs: int = 1,
            label: Mapping[str, str] = {}) -> dict[str, str]:
    """Runs what is not done, parents first, `jobs` at once -> {folder: error} of what failed or
    could not start."""
    stages = list({stage.folder: stage for stage in stages}.values())
    journal, failed, running = Journal(stages, runs, jobs, label), {}, {}
    todo = [stage for stage in stages if not stage.done(runs)]
    done = {stage.folder for stage in stages} - {stage.folder for stage in todo}
    for patches in {stage.patches for stage in todo if stage.patches}:
        patched_code(patches, next(s for s in todo if s.patches == patches).code(runs))
    try:
        while todo or running:
            for stage in todo[:]:
                above = [parent.folder for _, parent in stage.parents]
                if broken := [folder for folder in above if folder in failed]:
                    failed[stage.folder] = failed[broken[0]]
                    todo.remove(stage)
                    journal.ended += 1
                elif len(running) < jobs and done.issuperset(above):
                    todo.remove(stage)
                    code = code_of(stage.code(runs))
                    running[stage] = begin(stage, runs), time.monotonic(), code
                    journal.say(stage, "start:", (*todo, *running))
            time.sleep(0.05)
            for stage, (process, started, code) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[stage]
                journal.ended += 1
                seconds = time.monotonic() - started
                error = end(stage, runs, process.returncode, seconds, code)
                if not error:
                    done.add(stage.folder)
                    journal.seconds.setdefault(stage.name, []).append(seconds)
                    journal.say(stage, f"{seconds:.0f} s:", (*todo, *running))
                    continue
                failed[stage.folder] = error
                journal.say(stage, "FAILED:", (*todo, *running))
                first, *rest = lines_of(runs / f"{stage.folder}.log")
                print("\n  | ".join(["  " + first, *rest[-15:]]), flush=True)
    finally:  # on Ctrl-C: end what runs; a stage without run.json goes on with --resume
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.wait()
    return failed


def commands(stages: Iterable[Stage], runs: Path) -> None:
    """Prints what `execute` would run, and what is done already."""
    stages = list({stage.folder: stage for stage in stages}.values())
    for stage in stages:
        line = shlex.join(["python", *stage.command(runs)])
        print(f"# done: {line}" if stage.done(runs) else line)
    print(f"# {len(stages)} stages, {sum(stage.done(runs) for stage in stages)} done")


def run_locked(stages: Iterable[Stage], runs: Path, jobs: int,
               label: Mapping[str, str] = {}) -> dict[str, str]:
    """`execute`, alone in the folder; SIGTERM ends it as Ctrl-C does."""
    runs.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with open(runs / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return execute(stages, runs, jobs, label)
    except BlockingIOError:
        sys.exit(f"error: {runs}: another process is at work there: wait for it, or give other "
                 "--runs")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)
