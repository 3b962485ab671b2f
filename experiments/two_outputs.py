"""What is left of a reward model with two outputs when its score is the softmax of the two?

  python experiments/two_outputs.py --data runs/demo/preferences --sft runs/demo/sft

The code published with the study's report (github.com/arvind6599/EthicalLLM) gives its reward
models two outputs. TRL's pairwise loss asks of each that it score the chosen text higher; the score
is softmax(outputs)[1], which holds nothing but their difference. Here one adapter with two heads is
trained in that way, at run_rm.py's rate and batch. The table says which share of held-out pairs
either output, and the softmax, orders as the judge did. A fifth of the prompts is held out.
"""
from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from virtue import TARGETS
from virtue.dialogue import buckets, encode_conversation, right_pad
from virtue.ethics import LENSES
from virtue.lora import adapter_parameters, add_adapter, use_stack
from virtue.models import ScalarHead, score_at
from virtue.plumbing.loading import (base_fingerprint, load_model, load_tokenizer, resolve,
                                     template_fingerprint)
from virtue.preference import pairwise_loss
from virtue.plumbing.records import read_preferences
from virtue.plumbing.artefacts import load_sft
from virtue.plumbing.flags import make_parser
from virtue.randomness import stream, torch_seed


def main(argv=None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True,
                        help="folder of run_data.py preferences, made by the toy")
    parser.add_argument("--sft", type=Path, help="SFT adapter below the reward models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2],
                        help="of adapter, heads and order; the data stay the same")
    parser.add_argument("--epochs", type=int, default=2,
                        help="passes over the pairs (the study: 2)")
    args = parser.parse_args(argv)
    model, tokenizer = load_model("toy"), load_tokenizer("toy")
    known = dict(base={"id": "toy", "fingerprint": base_fingerprint(resolve("toy"))},
                 template=template_fingerprint(tokenizer))
    sft, _ = load_sft(args.sft, model, **known)
    print("| lens | seed | held-out pairs | output 0 | output 1 | their softmax |")
    print("| --- | --- | --- | --- | --- | --- |")
    for lens in LENSES:
        train, held_out = [], []
        for r in read_preferences(args.data / f"{lens}.jsonl", lens):
            sides = [encode_conversation(tokenizer, r[side])[0] for side in ("chosen", "rejected")]
            (held_out if int(r["id"], 16) % 5 == 0 else train).append((sides, r["label"]))
        for seed in args.seeds:
            stack = (*sft, f"{lens}-{seed}")
            right = fit(model, tokenizer, stack, train, held_out, args.epochs)
            cells = " | ".join(f"{x:.3f}" for x in right)
            print(f"| {lens} | {seed} | {len(held_out)} | {cells} |", flush=True)


def fit(model, tokenizer, stack, train, held_out, epochs: int) -> list[float]:
    """Trains adapter stack[-1] and two heads -> the share of `held_out` that each orders rightly.

    A pair is (token ids of chosen and rejected, P(chosen better)). The shares are of output 0, of
    output 1, of the softmax.
    """
    key = ("two outputs", stack[-1])
    add_adapter(model, stack[-1], rank=16, alpha=32, targets=TARGETS, seed=torch_seed(*key))
    heads = [ScalarHead(model.config.hidden_size, seed=torch_seed(*key, k)) for k in (0, 1)]
    parameters = [*adapter_parameters(model, stack[-1]), *(head.weight for head in heads)]

    def margins(batch) -> torch.Tensor:
        """Chosen less rejected, of each output: (2, B)."""
        rows = [side for sides, _ in batch for side in sides]
        ids, attention = right_pad(rows, tokenizer.pad_token_id)
        last = attention.long().sum(1, keepdim=True) - 1
        with use_stack(model, *stack):
            scores = [score_at(model, head, ids, attention, last)[:, 0] for head in heads]
        return torch.stack([score[0::2] - score[1::2] for score in scores])

    steps = epochs * -(-len(train) // 8)
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    for epoch in range(epochs):
        order = stream(*key, epoch).permutation(len(train)).tolist()
        for batch in buckets(order, [max(map(len, sides)) for sides, _ in train], 8):
            d = margins([train[i] for i in batch])
            labels = torch.tensor([train[i][1] for i in batch]).expand_as(d)
            pairwise_loss(d, torch.zeros_like(d), labels).mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step(), optimizer.zero_grad(), schedule.step()
    with torch.no_grad():
        parts = [margins(held_out[i:i + 16]) for i in range(0, len(held_out), 16)]
        first, second = torch.cat(parts, 1)
    # softmax(outputs)[1] is the logistic function of output 1 less output 0
    return [(x > 0).float().mean().item() for x in (first, second, second - first)]


if __name__ == "__main__":
    main()
