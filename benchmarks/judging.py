"""Judging a pair by five questions in both orders: the shared form against ten separate prompts.
Processor seconds.

    python benchmarks/judging.py             # 5 repeats, one thread, about two minutes

The toy model, which answers such questions, judges 16 pairs of its own three-turn dialogues by the
consequence. Both forms sort prompts by length, run batches of as many rows' tokens, and read the
head at the labels' place only.
"""
from __future__ import annotations

import argparse
import sys

from workload import ROOT, cpu_seconds, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--model", default="toy", help="any local folder with a chat template")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch
    from virtue.dialogue import encode_prompt, messages_of, right_pad
    from virtue.plumbing.records import load_prompts
    from virtue.ethics import VIRTUES
    from virtue.generate import sample_dialogues
    from virtue.toy.words import WORDS
    from virtue.judge import encode_questions, judge_pairs, label_ids, questions
    from virtue.models import hidden_states
    from virtue.plumbing.loading import load_model, load_tokenizer

    torch.set_num_threads(1)
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    records = load_prompts("toy", "rm", args.pairs)
    said = [[messages_of(tokenizer, d, turns=3) for d in sample_dialogues(
        model, tokenizer, records, seed=0, stage="benchmark", copy=copy, max_new_tokens=64,
        temperature=1.0, batch_size=32)] for copy in (0, 1)]
    pairs = list(zip(*said))
    both = [pair if order == 0 else pair[::-1] for pair in pairs for order in (0, 1)]
    separate = sorted((encode_prompt(tokenizer, [{"role": "user", "content": q}]) for pair in both
                       for q in questions(WORDS, *pair, "consequence")), key=len)
    prefixes = [encode_questions(tokenizer, WORDS, *pair, "consequence") for pair in both]
    tokens = sum(map(len, separate)), sum(len(prefix) + sum(map(len, endings))
                                          for prefix, endings in prefixes)
    labels, found = torch.tensor(label_ids(tokenizer, WORDS)), {}

    @torch.no_grad()
    def ten_prompts():
        probs = []
        for start in range(0, len(separate), 32):
            ids, attention = right_pad(separate[start:start + 32], tokenizer.pad_token_id)
            last = attention.long().sum(1) - 1
            logits = model.lm_head(
                hidden_states(model, ids, attention)[torch.arange(len(ids)), last])
            probs += logits.log_softmax(-1)[:, labels].softmax(-1)[:, 0].tolist()
        found["separate"] = sum(probs) / len(probs)

    def shared():
        probs = judge_pairs(model, tokenizer, WORDS, pairs, "consequence")[0]
        found["shared"] = torch.stack([probs[:, 0], 1 - probs[:, 1]]).mean().item()

    times = [(cpu_seconds(ten_prompts, 1)[0], cpu_seconds(shared, 1)[0])
             for _ in range(args.repeats)]
    a, b = zip(*times)
    assert abs(found["separate"] - found["shared"]) < 1e-4, found
    faster = sorted(x / y for x, y in times)[len(times) // 2]
    print(f"tokens: {tokens[0]:,} in {len(separate)} prompts, {tokens[1]:,} shared: ratio "
          f"{tokens[0] / tokens[1]:.2f} ({len(VIRTUES)} questions, two orders)")
    print(f"seconds: {sorted(a)[len(a) // 2]:.2f} and {sorted(b)[len(b) // 2]:.2f}: ratio "
          f"{ratio(a, b)}, {faster / (tokens[0] / tokens[1]):.0%} of the tokens'")


if __name__ == "__main__":
    main()
