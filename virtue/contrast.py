"""Feedback by contrast, for models too weak to judge (RLCD, Yang et al. 2023, arXiv 2307.12950).

Two answers to one prompt are sampled, one under an instruction to have a virtue, the other under
one to have a vice beside it, and the first is chosen by construction. Departure: a virtue has two
vices, its deficiency and its excess, of which one is drawn.
"""
from __future__ import annotations

import re
from typing import NamedTuple

from virtue.dialogue import instructed
from virtue.ethics import Words
from virtue.randomness import stream


class Contrast(NamedTuple):
    """What the two sides of a pair are told to be."""

    virtue: str  # a name of the constitution
    vice: str    # "deficiency" or "excess"
    asks: str    # what the virtue asks, for the first side
    fails: str   # that vice, for the second


def contrasts_of(words: Words, seed: int, prompt_id: str, count: int) -> list[Contrast]:
    """`count` contrasts of a prompt, each of another virtue; at most as many as there are."""
    draw, found = stream(seed, "contrast", prompt_id), []
    for virtue in draw.permutation(words.virtues)[:count].tolist():
        vice = ("deficiency", "excess")[draw.integers(2)]
        asks, *vices = words.constitution[virtue]
        found.append(Contrast(virtue, vice, asks, vices[vice == "excess"]))
    return found


def told(tokenizer, words: Words, record: dict, trait: str) -> dict:
    """A prompt record with the instruction to have a trait before its prompt; the id stays."""
    text = words.trait.format(trait=trait)
    return record | {"prompt": instructed(tokenizer, record["prompt"], text)}


def echoes(text: str, heard: str, run: float) -> bool:
    """Whether a text says `run` words of another one in a row, or nothing else. An answer that
    does so of its instruction shows that it was told to have a trait, not that it has it."""
    said, other = ([*re.findall(r"[^\W_]+", t.lower())] for t in (text, heard))
    run = max(1, min(run, len(said)))
    runs = {tuple(other[i:i + run]) for i in range(len(other) - run + 1)}
    return any(tuple(said[i:i + run]) in runs for i in range(len(said) - run + 1))
