"""Two processes under torchrun update and write what one does, and fail when one dies."""
from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.torch import load_file

from virtue.plumbing import parallel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WORKER = """
import json, os, runpy, sys, torch
sys.path.insert(0, sys.argv[1])
from virtue.plumbing import parallel
from virtue.plumbing.runtime import main_rank
commands, ports, stdout = json.loads(sys.argv[2]), iter(sys.argv[3:]), sys.stdout
device = parallel.join(torch.device("cpu"))
rank, size = parallel.rank(), parallel.size()
assert size == 2 and main_rank() == (rank == 0) and device.type == "cpu"
for n in (0, 1, 2, 5):
    items = [{"i": i, "text": "\\u00e9" * i} for i in range(n)]
    assert parallel.gather(parallel.share(items)) == items, n
assert parallel.total(torch.tensor([1.0, rank])).tolist() == [2.0, 1.0]
a, b, c = (torch.nn.Parameter(torch.ones(s)) for s in ((2, 2), (3,), (1,)))
c.requires_grad_(False)
if rank == 0:
    (a * 2).sum().backward()
else:
    ((a * 3).sum() + b.sum()).backward()
parallel.sum_gradients([a, b, c])
assert a.grad.tolist() == [[5, 5], [5, 5]] and b.grad.tolist() == [1, 1, 1] and c.grad is None
parallel.barrier()
parallel.leave()
sys.stdout.write(f"rank {rank} well\\n")  # in one piece, since the other writes too
os._exit = sys.exit  # run_main ends the process, but here another script follows
# torchrun's own store keeps the addresses of a group which is no more
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
# each script as torchrun would run it: it joins and leaves a group of its own
for name, command in commands.items():
    sys.argv, os.environ["MASTER_PORT"] = command, next(ports)
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        assert stop.code == 0, (name, stop.code)
    assert parallel.size() == 1  # it left
    sys.stdout = stdout
    sys.stdout.write(f"rank {rank} after {name}\\n")
    sys.stdout.flush()
os.environ["MASTER_PORT"] = next(ports)
parallel.join(torch.device("cpu"))
if parallel.rank() == 1:
    os.kill(os.getpid(), 9)
parallel.total(torch.zeros(1))
print("never")
"""


def torchrun(*command, groups: int, timeout: float = 300) -> subprocess.CompletedProcess:
    """The command by two processes, with a free port for each further group appended."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(groups)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        port, *more = [str(s.getsockname()[1]) for s in sockets]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
               "--master-addr=127.0.0.1", f"--master-port={port}", *map(str, command), *more]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_one_process_changes_nothing():
    import torch
    x = torch.ones(2)
    assert parallel.size() == 1 and parallel.rank() == 0 and parallel.total(x) is x
    assert parallel.gather([1, "a"]) == [1, "a"]
    assert parallel.share([1, 2, 3]) == [1, 2, 3]
    assert parallel.join(torch.device("cpu")).type == "cpu"


def content(path: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
            for line in path.read_text().splitlines()]


STAGES = {  # uneven shares: 9 prompts, batches of 3 and 5, micro-batches of 2 in mini-batches of 3
    "revisions": "run_data.py revisions --limit 13 --max-new-tokens 48 --batch-size 3",
    "sft": "run_sft.py --data {one}/revisions --epochs 1 --batch-size 5 --rank 4",
    "preferences": "run_data.py preferences --sft {one}/sft --limit 9 --batch-size 4 "
    "--judge-batch-size 4 --any-judge",
    "rm": "run_rm.py --data {one}/preferences --epochs 1 --batch-size 2 "
    "--accumulation 2 --rank 4",
    "ppo": "run_ppo.py --rm {one}/rm --iterations 2 --value-warmup 0 --rollout-size 6 "
    "--minibatch-size 3 --micro-batch-size 2 --rank 4 --limit 12 --ppo-epochs 1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The chain by one process, and by two in one torchrun (a process imports for 5 seconds),
    which ends with the death of a rank -> folders, and what torchrun said."""
    one, two = (tmp_path_factory.mktemp(f"by{n}") for n in (1, 2))
    commands = {name: command.format(one=one).split() for name, command in STAGES.items()}
    for name, (script, *flags) in commands.items():
        importlib.import_module(script.removesuffix(".py")).main([*flags, "--out", str(one / name)])
    del commands["revisions"]  # sampled as the preferences are
    commands["rm"] += ["--lens", "action"]
    (two / "worker.py").write_text(WORKER)
    commands = {name: [*command, "--out", str(two / name)] for name, command in commands.items()}
    done = torchrun(two / "worker.py", ROOT, json.dumps(commands), groups=len(commands) + 2)
    return one, two, done


def test_shares_sums_and_text(runs):
    assert runs[2].stdout.count("well") == 2, runs[2].stderr[-2000:]


def test_the_scripts_end_well_and_one_rank_speaks(runs):
    said, failed = runs[2].stdout, runs[2].stderr[-2000:]
    assert said.count("wrote") == len(STAGES) - 1, said + failed
    assert all(f"rank {rank} after {name}" in said for rank in (0, 1)
               for name in STAGES if name != "revisions"), said + failed


def test_two_processes_give_the_update_of_one(runs):
    one, two, _ = runs
    assert ((one / "preferences/dialogues.jsonl").read_bytes()
            == (two / "preferences/dialogues.jsonl").read_bytes())
    chosen, again = ([json.loads(a)["chosen"] for a in open(folder / "preferences/action.jsonl")]
                     for folder in (one, two))
    assert chosen == again
    for name in ("sft", "rm/action"):
        a, b = (load_file(folder / name / "adapter_model.safetensors") for folder in (one, two))
        assert a.keys() == b.keys() and any("lora_B" in k and (t != 0).any() for k, t in a.items())
        for key in a:
            # Adam divides by small numbers, so rounding shows at 1e-5
            assert (a[key] - b[key]).abs().max() < 1e-4, key
        for was, now in zip(content(one / name / "metrics.jsonl"),
                            content(two / name / "metrics.jsonl"), strict=True):
            assert was == pytest.approx(now, abs=1e-4)
        assert not (two / name / "resume").exists()


def test_ppo_by_two(runs):
    one, two = (folder / "ppo" for folder in runs[:2])
    for was, now in zip(content(one / "metrics.jsonl"),
                        content(two / "metrics.jsonl"), strict=True):
        assert was == pytest.approx(now, abs=2e-3), (was, now)
    first = [content(folder / "rollouts.jsonl")[:6] for folder in (one, two)]
    assert [r["turns"] for r in first[0]] == [r["turns"] for r in first[1]]
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    moved = max(float(t.abs().max()) for k, t in a.items() if "lora_B" in k)
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 0.05 * moved


def test_a_rank_that_dies_ends_the_others(runs):
    assert "rank 0 after ppo" in runs[2].stdout and runs[2].returncode != 0
    assert "never" not in runs[2].stdout


LAST = """
import atexit, importlib, sys
from virtue import VirtueError
from virtue.plumbing.runtime import run_main

class Never:
    def __del__(self):  # the end of the interpreter would call it
        print("never")

held = Never()
atexit.register(print, "atexit")

def group():
    import torch
    from virtue.plumbing import parallel
    parallel.join(torch.device("cpu"))
    # it holds the group, so leave does not end the threads
    importlib.import_module("torch.distributed.nn.functional")
    for _ in range(3):
        parallel.total(torch.ones(3))
    # A thread that frees a tensor waits: when the interpreter ends it may abort the process.
    sys.setswitchinterval(1000)

def fails(error):
    raise error

def main():
    print("said")
    {}

run_main(main)
"""


@pytest.mark.parametrize(("does", "status", "words"),
                         [("group()", 0, ""), ("fails(VirtueError('no'))", 2, "error: no\n"),
                          ("fails(KeyboardInterrupt())", 130, "interrupted: "),
                          ("fails(ZeroDivisionError())", 1, "Traceback ")])
def test_one_of_several_ends_without_the_end_of_the_interpreter(does, status, words):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": port}
    processes = [subprocess.Popen([sys.executable, "-c", LAST.format(does)], cwd=ROOT,
                                  env={**group, "RANK": str(rank)}, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                 for rank in (0, 1)]
    for said, process in zip(("said\natexit\n", ""), processes):
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out) == (status, said) and err.startswith(words), err
