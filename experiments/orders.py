"""How should a judge's answers in the two orders be combined: as probabilities, or as log-odds?

  python experiments/orders.py                                # made-up judges, whose truth is known
  python experiments/orders.py --data runs/demo/preferences   # the toy's judge, against gold

A made-up judge knows by how much the first of a pair is better, s ~ N(0, 1) in log-odds for each of
five questions, and answers s in each order, turned round where the first is shown second, plus
noise and a bias for the place shown first. The combined label is compared with sigmoid(s).
"""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from virtue.ethics import LENSES, VIRTUES  # noqa: E402
from virtue.evaluation.feedback import agreement, truth  # noqa: E402
from virtue.judge import choose, judge_log_odds, opinion  # noqa: E402
from virtue.plumbing.loading import load_model, load_tokenizer  # noqa: E402
from virtue.plumbing.records import read_preferences  # noqa: E402
from virtue.plumbing.flags import make_parser  # noqa: E402
from virtue.toy.words import WORDS  # noqa: E402


def in_probabilities(odds: Tensor) -> Tensor:
    """Log-odds (N, 2, Q) -> those of the mean of the two orders' probabilities, (N, 1, Q)."""
    return odds.double().sigmoid().mean(1, keepdim=True).logit()


def answers(kind: str, s: Tensor, rng: np.random.Generator) -> Tensor:
    """A made-up judge's log-odds (N, 2, Q) that the first is better; the truth is s (N, Q)."""
    n, questions = s.shape
    noise = torch.from_numpy(rng.normal(scale=0.5, size=(n, 2, questions)))
    sides = torch.tensor([1.0, -1.0])[:, None]  # who stands in the place that is preferred
    both = s[:, None] + noise
    if kind == "bias of 0.1 to 0.4 added to the probability":
        shift = torch.from_numpy(rng.uniform(0.1, 0.4, size=(n, 1, 1)))
        return (both.sigmoid() + sides * shift).clamp(1e-6, 1 - 1e-6).logit()
    if kind == "no bias; one answer in ten is a slip of 6":
        slips = rng.choice([-6.0, 6.0], size=noise.shape) * (rng.random(noise.shape) < 0.1)
        return both + torch.from_numpy(slips)
    bias = {"no bias": 0.0, "bias of 1 added to the logits": 1.0,
            "bias of 3 added to the logits": 3.0, "the same, sd 2 from pair to pair":
            torch.from_numpy(3 + 2 * rng.normal(size=(n, 1, 1)))}[kind]
    return both + sides * bias


KINDS = ("no bias", "bias of 1 added to the logits", "bias of 3 added to the logits",
         "the same, sd 2 from pair to pair",
         "bias of 0.1 to 0.4 added to the probability", "no bias; one answer in ten is a slip of 6")


def made_up(n: int, seed: int) -> list[str]:
    """Rows of the table: each kind of judge, its labels by either combination against the truth."""
    rows = []
    for kind in KINDS:
        rng = np.random.default_rng(seed)
        s = torch.from_numpy(rng.normal(size=(n, len(VIRTUES))))
        odds, wanted = answers(kind, s, rng), s.sigmoid().mean(1)
        cells = []
        for combined in (in_probabilities(odds), odds):
            label = opinion(combined).mean(1)
            error = (label - wanted).square().mean().sqrt()
            slope = ((label - 0.5) * (wanted - 0.5)).sum() / (wanted - 0.5).square().sum()
            votes = (choose(combined) == choose(s[:, None])).double().mean()
            mean = (choose(combined, "mean") == choose(s[:, None], "mean")).double().mean()
            cells.append((f"{votes:.3f}", f"{mean:.3f}", f"{error:.3f}", f"{slope:.2f}"))
        rows.append(f"| {kind} | " + " | ".join(f"{a}, {b}" for a, b in zip(*cells)) + " |")
    return rows


def on_the_toy(data: Path, model: str) -> list[str]:
    """Rows of the table: lens by lens, the judge's labels by either combination against gold."""
    judge, tokenizer, rows = load_model(model), load_tokenizer(model), []
    for lens in LENSES:
        records = read_preferences(data / f"{lens}.jsonl", lens)
        pairs = [(r["chosen"], r["rejected"]) for r in records]
        odds, _ = judge_log_odds(judge, tokenizer, WORDS, pairs, lens)
        truths = [truth(r) for r in records]
        signs = {name: np.array([t[name] for t in truths]) for name in (*VIRTUES, "overall")}
        cells = []
        for combined in (in_probabilities(odds), odds):
            found = agreement(combined, signs)
            right = [found["agreement"][name]["share"] for name in ("majority", "mean")]
            cells.append([f"{x:.3f}" for x in (*right, found["label_spread"], found["ties"])])
        both = " | ".join(f"{a}, {b}" for a, b in zip(*cells))
        rows.append(f"| {lens}, {len(records)} pairs | {both} |")
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path,
                        help="folder of run_data.py preferences, on the toy's prompts")
    parser.add_argument("--model", default="toy", help="the judge: toy, or a folder")
    parser.add_argument("--n", type=int, default=20000, help="pairs of each made-up judge")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("In each cell: combined as probabilities, as log-odds.\n")
    if args.data:
        head = "lens | right by the vote | by the mean label | labels from 1/2 (rms) | ties"
        rows = on_the_toy(args.data, args.model)
    else:
        head = ("made-up judge | right by the vote | by the mean label | error of the label (rms) "
                "| its slope on the true one")
        rows = made_up(args.n, args.seed)
    print("\n".join([f"| {head} |", "|---" * (head.count("|") + 1) + "|", *rows]))


if __name__ == "__main__":
    main()
