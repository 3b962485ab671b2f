"""The pieces of benchmarks/gpu.py that need no GPU:
a tokenizer that reads back what it wrote, sizes of data, the table of gold."""
from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu


def test_every_text_reads_back_as_the_tokens_it_was(tmp_path):
    from virtue.plumbing.loading import load_tokenizer
    gpu.make_tokenizer(tmp_path, 2000)
    tokenizer, rng = load_tokenizer(tmp_path), random.Random(0)
    assert len(tokenizer) == 2000
    # characters, as a random model writes them
    ids = [rng.randrange(1300, 2000) for _ in range(200)]
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids
    made = gpu.text(rng, 50, 2000)
    assert len(tokenizer.encode(made, add_special_tokens=False)) == len(made) == 50


@pytest.mark.parametrize("share", [0.1, 0.15, 0.25])
@pytest.mark.parametrize("rows", [4, 16, 64, 96])
def test_the_records_left_to_train_on_fill_whole_steps(rows, share):
    n = gpu.of_full_steps(rows, share)
    assert n - round(n * share) == rows and all(m - round(m * share) < rows for m in range(rows, n))


def test_the_table_of_gold_pairs_devices_by_seed():
    found = {(device, seed): dict.fromkeys(("base", "sft", "ppo"),
                                           0.5 + 0.1 * seed + (gap if device == "cuda" else 0))
             for device in ("cuda", "cpu") for seed, gap in ((0, 0.01), (1, 0.03), (2, 0.02))}
    base = gpu.gold_table(found, ["cuda", "cpu"], [0, 1, 2])[3]
    assert "+0.0200 [-0.0048, +0.0448] | yes" in base  # 0.02 +- 4.3027 * 0.01 / sqrt 3
    apart = {k: {n: v + (0.5 if k[0] == "cuda" else 0) for n, v in g.items()}
             for k, g in found.items()}
    assert "**no**" in gpu.gold_table(apart, ["cuda", "cpu"], [0, 1, 2])[3]
    assert "needs two seeds" in gpu.gold_table(found, ["cuda", "cpu"], [0])[3]
