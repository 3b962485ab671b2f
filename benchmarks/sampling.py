"""Our sampling against transformers' `generate`: same model, prompts, temperature, no filters.
Processor seconds.

    python benchmarks/sampling.py             # 5 repeats, one thread, about a minute

Equal: no row ends before its 48th token. Unequal: each row ends with probability 1/24 at each
token, as answers do. The last line: a dialogue's second and third turn read again what the cache of
the turn before held; what part of sampling that is.
"""
from __future__ import annotations

import argparse
import math
import statistics
import sys

from workload import NEW_TOKENS, PROMPTS, ROOT, cpu_seconds, make_model, prompts, ratio, scratch

PROMPT, FOLLOW_UP = 24, 12  # tokens of a prompt, and of a follow-up question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch
    from virtue.dialogue import left_pad
    from virtue.generate import sample
    from virtue.plumbing.loading import load_model

    torch.set_num_threads(1)
    print("| vocabulary | rows end | generate, s | ours, s | generate / ours "
          "|\n|---:|---|---:|---:|---:|")
    for vocab_size in (1024, 32000):
        model = load_model(make_model(scratch() / f"v{vocab_size}", vocab_size))
        # the head's bias decides when rows end
        head = torch.nn.Linear(model.config.hidden_size, vocab_size).requires_grad_(False)
        head.weight, model.lm_head = model.lm_head.weight, head
        rows = prompts(PROMPTS, vocab_size)
        ids, mask = left_pad(rows, 0)
        # otherwise the distribution is nearly uniform
        for name, end in (("together", -1e9), ("apart", math.log(vocab_size / 23))):
            head.bias.zero_()[2] = end

            def theirs(model=model, ids=ids, mask=mask):
                with torch.no_grad():
                    model.generate(input_ids=ids, attention_mask=mask.long(), do_sample=True,
                                   top_k=0, top_p=1.0, temperature=1.0,
                                   max_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=2)

            def ours(model=model, rows=rows):
                sample(model, rows, np.random.default_rng(0).random((PROMPTS, NEW_TOKENS)),
                       eos_id=2, pad_id=0)

            torch.manual_seed(0)
            times = [(cpu_seconds(theirs, 1)[0], cpu_seconds(ours, 1)[0])
                     for _ in range(args.repeats)]
            a, b = zip(*times)
            print(f"| {vocab_size:,} | {name} | {sorted(a)[len(a) // 2]:.2f} | "
                  f"{sorted(b)[len(b) // 2]:.2f} | {ratio(a, b)} |", flush=True)

    def seconds(length: int, new: int) -> float:
        """Of sampling `new` tokens after `length`; one token: reading, but for a draw.
        The head is the last one, vocabulary 32,000, where no row ends early."""
        turn, uniforms = [[5] * length] * PROMPTS, np.random.default_rng(0).random((PROMPTS, new))
        return cpu_seconds(lambda: sample(model, turn, uniforms, eos_id=2, pad_id=0), 1)[0]

    head.bias.zero_()[2] = -1e9
    starts = [PROMPT + turn * (NEW_TOKENS + FOLLOW_UP) for turn in range(3)]
    shares = []
    for _ in range(args.repeats):
        whole = sum(seconds(start, NEW_TOKENS) for start in starts)
        # a turn that goes on from a cache reads its question and the last token
        shares.append((sum(seconds(start, 1) for start in starts[1:])
                       - 2 * seconds(FOLLOW_UP + 1, 1)) / whole)
    print(f"a dialogue of three turns of {NEW_TOKENS} tokens: at most "
          f"{statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%}) of sampling "
          "reads again what a cache held")


if __name__ == "__main__":
    main()
