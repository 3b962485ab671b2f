"""Tokens a second of the stages of a run, from the metrics that they wrote: a median over steps.

    make real && python benchmarks/tokens.py runs/real

SFT and reward models: tokens read, each forward and back. PPO: tokens sampled; tokens read by the
reward models, policy, reference and value function; tokens read forward and back by policy and
value function, all passes.
"""
from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path


def medians(path: Path, rates: dict[str, tuple[str, str, int]]) -> dict[str, float]:
    """Rate name -> median over the file's lines of tokens * times / seconds."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {name: statistics.median(row[tokens] * times / row[seconds]
                                    for row in rows if seconds in row)
            for name, (tokens, seconds, times) in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder with sft, rm and policy in it")
    run = parser.parse_args().run
    settings = json.loads((run / "policy/virtue.json").read_text())["settings"]
    trained = {"": ("tokens/read", "time/seconds", 1)}
    print("| stage | tokens a second |\n|---|---:|")
    for stage in ("sft", *sorted(f"rm/{path.name}" for path in (run / "rm").iterdir())):
        print(f"| {stage} | {medians(run / stage / 'metrics.jsonl', trained)['']:.0f} |")
    sampled = ("tokens/length", "time/sample", settings["rollout_size"])
    for name, rate in medians(run / "policy/metrics.jsonl", {
            "sampled": sampled, "scored": ("tokens/read", "time/score", 1),
            "update": ("tokens/read", "time/update", settings["ppo_epochs"])}).items():
        print(f"| PPO, {name} | {rate:.0f} |")


if __name__ == "__main__":
    main()
