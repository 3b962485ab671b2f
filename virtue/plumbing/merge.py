"""Export: a reward model as one plain folder that transformers loads without this project.

An adapter alone is the wrong model wherever it was trained upon SFT, so base, SFT and reward
adapter are folded together. Never train on the result in 4 bits: rounding erases light fine-tunes.
"""
from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from virtue.plumbing.artefacts import write_atomic
from virtue.dialogue import Dialogue
from virtue.lora import merged_state_dict
from virtue.plumbing.parallel import barrier
from virtue.rollout import score_dialogues
from virtue.plumbing.runtime import main_rank


def write_merged(folder: Path, model, tokenizer, stack: tuple[str, ...], head: torch.nn.Module,
                 dialogues: Sequence[Dialogue], turn: int) -> float:
    """Write ``folder`` as the base's kind of ...ForSequenceClassification with one label, in the
    base's dtype.

    The language-model head goes with it, so that AutoModelForCausalLM finds a whole model too.
    Returns the largest change of score against ``stack`` with ``head`` on ``dialogues``, each read
    at the end of its ``turn``, by the merged model as loaded back from the disk. VirtueError: it
    cannot be written; as ``merged_state_dict``.
    """
    from safetensors.torch import save_file
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    if main_rank():
        folder.mkdir(parents=True, exist_ok=True)
    # fp16 could overflow when folded
    dtype = torch.float32 if model.dtype == torch.float16 else model.dtype
    state = merged_state_dict(model, stack, dtype)
    state["score.weight"] = head.weight.detach().cpu().to(dtype)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    kind = type(model).__name__.replace("CausalLM", "SequenceClassification")
    config = type(model.config)(**model.config.to_dict() | {
        "architectures": [kind], "id2label": {0: "score"}, "label2id": {"score": 0},
        "pad_token_id": tokenizer.pad_token_id, "dtype": str(dtype).removeprefix("torch.")})
    if main_rank():
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    write_atomic(folder / "model.safetensors",
                 functools.partial(save_file, state, metadata={"format": "pt"}))
    barrier()

    before = score_dialogues(model, [(stack, head)], dialogues, [turn], tokenizer.pad_token_id,
                             batch_size=8)[0]
    del state  # 14.5 GB of Mistral-7B, and as many come back
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a log is no place for it
    try:
        merged = AutoModelForSequenceClassification.from_pretrained(folder).to(model.device).eval()
    finally:
        if shown:
            logging.enable_progress_bar()
    with torch.no_grad():
        rows = [d.ids[:d.turns[turn].score_position + 1] for d in dialogues]
        after = [merged(torch.tensor([row], device=model.device)).logits[0, 0] for row in rows]
    return (before - torch.stack(after).float().cpu()).abs().max().item()
