"""Kill every stage at random moments, resume it, and compare with a run that was left alone.

    python tests/kill.py --kills 100            # about 5 minutes on a core; --seed: other moments
    python tests/kill.py --stages ppo --kills 5
    python tests/kill.py --each --small         # at each change of the disk in turn, not at random

Each stage of a small chain runs once undisturbed. Then the same command runs in a child process
that gets SIGKILL at a random moment of its life, is started again with --resume, killed again, and
so on, until its share of the kills is spent and it may end. All files must then be equal, byte by
byte; in metrics the fields of time are left out. With --each a child dies before its first rename,
removal or truncation of a file, the next one before its second, and so on, as many as the stage
makes; each is then resumed. Children are forked from one process that has imported everything.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with running threads cannot be forked
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

STAGES = {  # name -> script and flags; {out} is the chain's folder, {here} the stage's
    "revisions": "run_data revisions --limit 24 --max-new-tokens 48 --batch-size 4",
    "sft": "run_sft --data {out}/revisions --epochs 2 --batch-size 4 --rank 4 --save-every 2",
    "preferences": "run_data preferences --sft {out}/sft --limit 16 --batch-size 4 "
    "--judge-batch-size 4 --any-judge",
    "rm": "run_rm --data {out}/preferences --epochs 2 --batch-size 2 --rank 4 "
    "--save-every 3",
    "ppo": "run_ppo --rm {out}/rm --iterations 4 --rollout-size 6 --minibatch-size 3 --rank 4 "
    "--limit 12 --save-every 1 --kl-target 3",
    "eval": "run_eval models --policy {out}/ppo --limit 6 --batch-size 2 --judge-limit 4 "
    "--judge-batch-size 2 --show 1"}
SMALL = {  # the same with --small, in a third of the time: these flags come after those
    "revisions": "--limit 8", "sft": "--batch-size 3", "preferences": "--limit 6",
    "rm": "--epochs 1 --save-every 1",
    "ppo": "--iterations 2 --value-warmup 1 --rollout-size 4 --minibatch-size 2 --limit 6 "
    "--ppo-epochs 1",
    "eval": "--limit 2 --judge-limit 2"}


def die_at(point: int) -> None:
    """Lets this process kill itself before its `point`-th rename, removal or truncation."""
    left = point

    def dying(change):
        def changed(*args, **kwargs):
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **kwargs)
        return changed
    # shutil and pathlib call these
    for name in ("replace", "unlink", "remove", "rmdir", "truncate", "rename"):
        setattr(os, name, dying(getattr(os, name)))


def child(script: str, flags: list[str], log: Path, point: int = 0) -> int:
    """The pid of a forked process that runs a script and dies at `point` (0: does not)."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    if point:
        die_at(point)
    try:
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        importlib.import_module(script).main(flags)
        status = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def wait(pid: int, seconds: float | None, log: Path) -> bool:
    """Waits for a child's end, or kills it after `seconds` -> whether it was killed.
    RuntimeError if it failed otherwise."""
    until = time.monotonic() + seconds if seconds is not None else None
    while True:
        done, status = os.waitpid(pid, os.WNOHANG if until else 0)
        if done:
            if status == signal.SIGKILL:
                return True
            if status:
                raise RuntimeError(f"{log}: the stage failed:\n"
                                   + "\n".join(log.read_text(errors="replace").splitlines()[-12:]))
            return False
        if time.monotonic() >= until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return True
        time.sleep(0.002)


def content(folder: Path) -> dict[str, object]:
    """Every file below a folder by name: bytes, or metrics without time."""
    found: dict[str, object] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes() if path.name != "metrics.jsonl" else [
            {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
            for line in path.read_text().splitlines()]
    return found


def compare(undisturbed: Path, resumed: Path) -> list[str]:
    """Names of files that differ, are missing, or are too many."""
    a, b = content(undisturbed), content(resumed)
    return [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def torture(name: str, out: Path, kills: int, rng: random.Random, quiet: bool = False,
            small: bool = False, each: bool = False) -> int:
    """One stage: undisturbed, then killed `kills` times -> kills that hit.
    AssertionError where results differ.

    With `each` it is killed at every change of the disk instead, once each and then resumed,
    unless `kills` is 0.
    """
    script, *flags = f"{STAGES[name]} {SMALL[name] if small else ''}".format(out=out).split()
    here, log = out / name, out / f"{name}.log"
    flags += ["--out", str(here)]
    started = time.monotonic()
    wait(child(script, flags, log), None, log)
    seconds = time.monotonic() - started
    reference = out / f"{name}-undisturbed"
    shutil.move(here, reference)
    hit, moments, again = 0, [], []
    while each and kills and wait(child(script, flags, log, hit + 1), None, log):
        hit += 1
        wait(child(script, [*flags, "--resume"], log), None, log)
        differ = compare(reference, here)
        assert not differ, f"{name}, killed at change {hit} of the disk: {differ} differ"
        assert not (here / "resume").exists()
        shutil.rmtree(here)
    if each:
        kills = 0
        shutil.rmtree(here, ignore_errors=True)
    for _ in range(10 * kills):
        if hit == kills:
            break
        moment = rng.uniform(0.0, seconds)
        killed = wait(child(script, flags + again, log), moment, log)
        hit, again = hit + killed, ["--resume"]
        moments.append(round(moment, 2))
        if not killed:  # it came to its end before: from the beginning
            differ = compare(reference, here)
            assert not differ, f"{name}, kills at {moments} s: {differ} differ"
            shutil.rmtree(here)
            again = []
    wait(child(script, flags + (again if here.exists() else []), log), None, log)
    differ = compare(reference, here)
    assert not differ, f"{name}, kills at {moments} s: {differ} differ"
    assert not (here / "resume").exists()
    if not quiet:
        print(f"{name}: {seconds:.1f} s undisturbed, {hit} kills, {len(content(here))} files equal",
              flush=True)
    return hit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all, spread over the stages")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES),
                        help="stages to kill; those before them run undisturbed")
    parser.add_argument("--each", action="store_true", help="instead of at random: at each rename, "
                        "removal and truncation in turn, --kills or not")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--small", action="store_true",
                        help="the stages at their smallest, as the test suite kills them")
    args = parser.parse_args()
    import torch
    torch.set_num_threads(1)
    for script in ("run_data", "run_sft", "run_rm", "run_ppo", "run_eval"):
        importlib.import_module(script)
    import transformers.models.mistral.modeling_mistral  # noqa: F401 (6 seconds, once)
    from transformers import AutoTokenizer, DynamicCache  # noqa: F401
    if importlib.util.find_spec("matplotlib"):
        import matplotlib.backends.backend_svg, matplotlib.figure  # noqa: E401, F401
    hits, last = 0, max(list(STAGES).index(s) for s in args.stages)
    with tempfile.TemporaryDirectory() as folder:
        for name in list(STAGES)[:last + 1]:
            share = 0
            if name in args.stages:
                each, rest = divmod(args.kills, len(args.stages))
                share = each + (args.stages.index(name) < rest)
            hits += torture(name, Path(folder), share, random.Random(f"{args.seed} {name}"),
                            small=args.small, each=args.each)
    print(f"{'each change of the disk' if args.each else f'seed {args.seed}'}: {hits} kills, "
          "nothing lost, nothing twice")


if __name__ == "__main__":
    main()
