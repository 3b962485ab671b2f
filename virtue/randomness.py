"""Random numbers that belong to a name, not to an order of calls.

Every draw is keyed, e.g. by (seed, stage, step, record id, turn), so that batch size, the number of
processes and a run that was killed and resumed change nothing.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np


def _key(*key: int | float | str) -> int:
    canonical = json.dumps(key, default=lambda scalar: scalar.item())  # 1, 1.0, "1" all differ
    return int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:16], "little")


def stream(*key: int | float | str) -> np.random.Generator:
    """The random numbers that belong to `key`, e.g. (seed, stage, step, record id, turn): resume,
    sharding and batch size leave them alone. Philox, keyed by 128 bits of the sha256."""
    return np.random.Generator(np.random.Philox(key=_key(*key)))


def held_out_ids(ids: Iterable[str], seed: int, share: float) -> set[str]:
    """The prompts that reward models of this seed do not train on."""
    ids = sorted(set(ids))
    order = stream(seed, "rm", "split").permutation(len(ids))
    return {ids[i] for i in order[:round(len(ids) * share)]}


def hold_out(rows: Sequence, prompts: Sequence[str], share: float,
             *key: int | float | str) -> tuple[list, list]:
    """(held-out rows, the others): all rows of a prompt, `prompts` naming each row's, fall on one
    side. Of P prompts round(share P) are held out; either side may be empty."""
    groups: dict[str, list] = {}
    for row, prompt in zip(rows, prompts, strict=True):
        groups.setdefault(prompt, []).append(row)
    order, parts = stream(*key).permutation(len(groups)), list(groups.values())
    count = round(len(parts) * share)
    return tuple([row for i in part for row in parts[i]] for part in (order[:count], order[count:]))


def torch_seed(*key: int | float | str) -> int:
    """A seed in [0, 2^63) for ``torch.Generator().manual_seed``, keyed as `stream` is."""
    return _key("torch", *key) >> 65
