"""Our sampling against transformers' `generate`: same model, prompts, temperature, no filters.
Processor seconds.

    python benchmarks/sampling.py                  # 5 repeats, one thread, about a minute
    python benchmarks/sampling.py --model smollm2  # a real model's dialogues, about 8 minutes

Equal: no row ends before its 48th token. Unequal: each row ends with probability 1/24 at each
token, as answers do. Dialogues: three turns of up to 48 tokens, with a question of 12 between them.
`generate` is called anew for each turn and reads the dialogue again.
"""
from __future__ import annotations

import argparse
import math
import statistics
import sys
from functools import partial

from workload import NEW_TOKENS, PROMPTS, ROOT, cpu_seconds, make_model, prompts, ratio, scratch

QUESTION = [5] * 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", help="compare dialogues of this model only, by its name or "
                                        "folder, as they end by themselves at temperature 0.6")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch
    from virtue.dialogue import left_pad
    from virtue.generate import sample, sample_turns
    from virtue.plumbing.loading import load_model, resolve

    torch.set_num_threads(1)

    def generated(model, rows, temperature=1.0):
        """The new tokens of each row, by generate."""
        ids, mask = left_pad(rows, 0)
        with torch.no_grad():
            found = model.generate(input_ids=ids, attention_mask=mask.long(), do_sample=True,
                                   top_k=0, top_p=1.0, temperature=temperature,
                                   max_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=2)
        return found[:, ids.shape[1]:].tolist()

    def compare(theirs, ours) -> str:
        torch.manual_seed(0)
        a, b = zip(*((cpu_seconds(theirs, 1)[0], cpu_seconds(ours, 1)[0])
                     for _ in range(args.repeats)))
        return f"{statistics.median(a):.2f} | {statistics.median(b):.2f} | {ratio(a, b)} |"

    def dialogues(model, rows, temperature=1.0) -> str:
        """Three turns, by both."""
        uniforms = np.random.default_rng(0).random((len(rows), 3, NEW_TOKENS))

        def theirs():
            so_far = rows
            for _ in range(3):
                new = generated(model, so_far, temperature)
                so_far = [row + (ids[:ids.index(2)] if 2 in ids else ids) + [2] + QUESTION
                          for row, ids in zip(so_far, new)]

        return compare(theirs, lambda: sample_turns(
            model, rows, uniforms, [[QUESTION] * 2] * len(rows), eos_id=2, pad_id=0,
            temperature=temperature))

    print("| vocabulary | rows end | generate, s | ours, s | generate / ours "
          "|\n|---:|---|---:|---:|---:|")
    if args.model:
        from transformers import AutoTokenizer
        from virtue.dialogue import encode_prompt
        from virtue.plumbing.records import load_prompts

        folder = resolve(args.model)
        model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder)
        rows = [encode_prompt(tokenizer, record["prompt"])
                for record in load_prompts("situations", "ppo", PROMPTS)]
        print(f"| {model.config.vocab_size:,} | dialogues | {dialogues(model, rows, 0.6)}")
        return
    for vocab_size in (1024, 32000):
        model = load_model(make_model(scratch() / f"v{vocab_size}", vocab_size))
        # the head's bias decides when rows end
        head = torch.nn.Linear(model.config.hidden_size, vocab_size).requires_grad_(False)
        head.weight, model.lm_head = model.lm_head.weight, head
        rows = prompts(PROMPTS, vocab_size)
        uniforms = np.random.default_rng(0).random((PROMPTS, NEW_TOKENS))
        # otherwise the distribution is nearly uniform
        for name, end in (("together", -1e9), ("apart", math.log(vocab_size / 23))):
            head.bias.zero_()[2] = end
            row = compare(partial(generated, model, rows),
                          partial(sample, model, rows, uniforms, eos_id=2, pad_id=0))
            print(f"| {vocab_size:,} | {name} | {row}", flush=True)
        print(f"| {vocab_size:,} | dialogues, apart | {dialogues(model, rows)}", flush=True)


if __name__ == "__main__":
    main()
