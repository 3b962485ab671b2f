"""Count how stages of two processes end, several at once:
a thread alive at the end may abort a process.

    python tests/exits.py                  # 200 stages, four at once
    python tests/exits.py --interpreter    # the same, ended by the interpreter's own end, which
                                           # run_main leaves out

Each stage goes through torchrun, `run_main`, `join`, sums of gradients, a progress bar and `leave`.
"""
from __future__ import annotations

import argparse
import collections
import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def stage() -> None:
    import torch

    from virtue.plumbing import parallel
    from virtue.plumbing.runtime import progress

    parallel.join(torch.device("cpu"))
    # this module holds the group; transformers imports it
    importlib.import_module("torch.distributed.nn.functional")
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
    for _ in progress(range(5), "steps"):
        layer(torch.randn(32, 64)).square().mean().backward()
        parallel.sum_gradients(layer.parameters())
    print("done")


def once(interpreter: bool) -> str:
    """One stage -> how it ended."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*TORCHRUN, __file__, *["--interpreter"] * interpreter],
                          capture_output=True, text=True, env=settings)
    if done.returncode == 0 and done.stdout == "done\n":
        return "well"
    return "aborted" if "terminate called" in done.stderr else f"otherwise: {done.stderr[-2000:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--interpreter", action="store_true",
                        help="end by the end of the interpreter")
    args = parser.parse_args()
    if "RANK" in os.environ:  # torchrun's processes
        from virtue.plumbing import runtime
        (runtime._run if args.interpreter else runtime.run_main)(stage)
    with ThreadPoolExecutor(args.at_once) as pool:
        ends = collections.Counter()
        for end in pool.map(once, [args.interpreter] * args.stages):
            ends[end] += 1
            print(*(f"{count} {how}" for how, count in ends.items()), sep=", ", flush=True)


if __name__ == "__main__":
    main()
