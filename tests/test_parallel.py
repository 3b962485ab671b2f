"""Two processes under torchrun do what one does: the same updates, the same files, and an error where one dies."""
from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from virtue import parallel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WORKER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from virtue import parallel
from virtue.runtime import main_rank
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
print("rank", rank, "well")
"""


def torchrun(*command, processes: int = 2, timeout: float = 300) -> subprocess.CompletedProcess:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-addr=127.0.0.1", f"--master-port={port}",
               *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_one_process_changes_nothing():
    import torch
    x = torch.ones(2)
    assert parallel.size() == 1 and parallel.rank() == 0 and parallel.total(x) is x and parallel.gather([1, "a"]) == [1, "a"]
    assert parallel.share([1, 2, 3]) == [1, 2, 3] and parallel.join(torch.device("cpu")).type == "cpu"


def test_shares_sums_and_text(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    result = torchrun(tmp_path / "worker.py", ROOT)
    assert result.returncode == 0 and result.stdout.count("well") == 2, result.stderr[-2000:]


def content(path: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The chain by one process and by two; uneven shares: 9 prompts, batches of 3 and 5."""
    out = {}
    for n in (1, 2):
        out[n] = tmp_path_factory.mktemp(f"by{n}")
        for name, command in {
            "revisions": "run_data.py revisions --limit 13 --max-new-tokens 48 --batch-size 3",
            "sft": f"run_sft.py --data {out[1]}/revisions --epochs 1 --batch-size 5 --rank 4",
            "preferences": f"run_data.py preferences --sft {out[1]}/sft --limit 9 --batch-size 4 --judge-batch-size 4",
            "rm": f"run_rm.py --data {out[1]}/preferences --lens action --epochs 1 --batch-size 2 --accumulation 2 --rank 4 --held-out 0.25",
        }.items():
            command = [*command.split(), "--out", str(out[n] / name), "--threads", "1"]
            if n == 1:
                importlib.import_module(command[0].removesuffix(".py")).main(command[1:])
            elif name != "revisions":  # sampled as the preferences are
                result = torchrun(*command)
                assert result.returncode == 0, result.stderr[-2000:]
                assert result.stdout.count("wrote") == 1, result.stdout
    return out


def test_two_processes_give_the_update_of_one(runs):
    one, two = runs[1], runs[2]
    assert (one / "preferences/dialogues.jsonl").read_bytes() == (two / "preferences/dialogues.jsonl").read_bytes()
    assert [json.loads(a)["chosen"] for a in open(one / "preferences/action.jsonl")] == [json.loads(a)["chosen"] for a in open(two / "preferences/action.jsonl")]
    for name in ("sft", "rm/action"):
        a, b = (load_file(folder / name / "adapter_model.safetensors") for folder in (one, two))
        assert a.keys() == b.keys() and any("lora_B" in k and (t != 0).any() for k, t in a.items())
        for key in a:
            assert (a[key] - b[key]).abs().max() < 1e-4, key  # Adam divides by small numbers: rounding shows at 1e-5
        for was, now in zip(content(one / name / "metrics.jsonl"), content(two / name / "metrics.jsonl"), strict=True):
            assert was == pytest.approx(now, abs=1e-4)
        assert not (two / name / "resume").exists()


def test_ppo_by_two(tmp_path):
    for script, flags in (("run_data", f"preferences --limit 12 --out {tmp_path}/p"), ("run_rm", f"--data {tmp_path}/p --epochs 1 --rank 4 --held-out 0.25 --out {tmp_path}/rm")):
        importlib.import_module(script).main(flags.split())
    flags = f"--rm {tmp_path}/rm --iterations 2 --value-warmup 0 --rollout-size 6 --minibatch-size 3 --micro-batch-size 2 --rank 4 --limit 12 --ppo-epochs 1 --threads 1".split()
    importlib.import_module("run_ppo").main([*flags, "--out", str(tmp_path / "one")])
    result = torchrun("run_ppo.py", *flags, "--out", tmp_path / "two")
    assert result.returncode == 0, result.stderr[-2000:]
    for was, now in zip(content(tmp_path / "one/metrics.jsonl"), content(tmp_path / "two/metrics.jsonl"), strict=True):
        assert was == pytest.approx(now, abs=2e-3), (was, now)
    first = [content(tmp_path / n / "rollouts.jsonl")[:6] for n in ("one", "two")]
    assert [r["turns"] for r in first[0]] == [r["turns"] for r in first[1]]
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    moved = max(float(t.abs().max()) for k, t in a.items() if "lora_B" in k)
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 0.05 * moved


def test_a_rank_that_dies_ends_the_others(tmp_path):
    (tmp_path / "dies.py").write_text(
        "import os, sys, torch\nsys.path.insert(0, sys.argv[1])\nfrom virtue import parallel\nparallel.join(torch.device('cpu'))\n"
        "if parallel.rank() == 1:\n    os.kill(os.getpid(), 9)\nparallel.total(torch.zeros(1))\nprint('never')\n")
    result = torchrun(tmp_path / "dies.py", ROOT, timeout=120)
    assert result.returncode != 0 and "never" not in result.stdout
