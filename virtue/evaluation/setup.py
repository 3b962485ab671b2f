"""What the commands of run_eval.py load: the reward models and the policy on one base model."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from virtue import VirtueError, generate, lora
from virtue.dialogue import Dialogue
from virtue.ensemble import standardize
from virtue.ethics import LENSES
from virtue.plumbing import artefacts, loading, resume
from virtue.rollout import score_dialogues

Stack = tuple[str, ...]  # names of adapters
JUDGE_TOKENS = 600  # most tokens of a judge's question besides the two dialogues


class Ensemble(NamedTuple):
    """Three reward models, (stack, head) in the order of LENSES; their scores' mean, std (3,)."""

    models: list
    mean: Tensor
    std: Tensor

    def standardise(self, raw: Tensor) -> Tensor:
        """Raw scores (3, n) -> standardised ones (3, n), see `ensemble.standardize`."""
        return standardize(raw, self.mean, self.std)


class Loaded(NamedTuple):
    """A base model with the adapters of earlier stages on it."""

    base: loading.Base
    sft: Stack
    parents: dict[str, Path]  # what artefacts upon the SFT adapter record as theirs
    rewards: Ensemble


def identity(base: loading.Base) -> dict:
    """What an artefact must agree with, as `artefacts.load_artifact` takes it."""
    return {"base": base.info, "template": base.template}


def load(args: argparse.Namespace, base: loading.Base) -> Loaded:
    """Puts the adapters of --sft and --rm on the base. VirtueError: one does not belong to it."""
    sft, parents = artefacts.load_sft(args.sft, base.model, **identity(base))
    bare = Loaded(base, sft, parents, None)
    return bare._replace(rewards=load_ensemble(bare, args.rm))


def load_ensemble(loaded: Loaded, folder: Path, prefix: str = "") -> Ensemble:
    """The reward models in `folder`, adapters named with `prefix`. VirtueError: as `load`."""
    base, sft, parents, _ = loaded
    return Ensemble(*artefacts.load_reward_models(
        folder, base.model, sft, parents, prefix=prefix, **identity(base)))


def load_policy(loaded: Loaded, folder: Path, rm: Path) -> dict:
    """Puts the policy's adapter on the base model -> its virtue.json. VirtueError: as `load`."""
    recorded = artefacts.read_manifest(folder, "policy")["parents"]
    upon = {f"rm/{lens}": rm / lens for lens in LENSES if f"rm/{lens}" in recorded}
    manifest, _ = artefacts.load_artifact(folder, loaded.base.model, "policy", stage="policy",
                                          parents=loaded.parents | upon, **identity(loaded.base))
    return manifest


def flat(model, stack: Stack) -> Stack:
    """One adapter "rollout" equal to the stack, which samples faster -> its stack; () stays ()."""
    if not stack:
        return ()
    lora.flatten(model, stack, "rollout", model.dtype)
    return ("rollout",)


def fitting(prompts: Sequence[dict], args: argparse.Namespace, base: loading.Base,
            remedy: str) -> list[dict]:
    """The prompts that fit --max-prompt-tokens. VirtueError: fewer than 2, or a short context."""
    most = args.max_prompt_tokens
    kept = [p for p in prompts if generate.fits(base.tokenizer, p["prompt"], most)]
    if len(kept) < 2:
        raise VirtueError(f"{args.prompts}: {len(kept)} held-out prompts fit into "
                          f"--max-prompt-tokens {most}{remedy}")
    generate.check_context(base.model, args.max_prompt_tokens, args.max_new_tokens)
    return kept


def sample(args: argparse.Namespace, base: loading.Base, stack: Stack, prompts: Sequence[dict],
           stage: str, each_batch: generate.EachBatch, copy: int = 0) -> list[Dialogue]:
    """One dialogue for each prompt, by the sampling flags; see `generate.sample_dialogues`."""
    with lora.use_stack(base.model, *stack):
        return generate.sample_dialogues(
            base.model, base.tokenizer, prompts, seed=args.seed, stage=stage, copy=copy,
            max_new_tokens=args.max_new_tokens, temperature=args.temperature,
            batch_size=args.batch_size, each_batch=each_batch)


def raw_scores(loaded: Loaded, ensemble: Ensemble, dialogues: Sequence[Dialogue],
               batch_size: int) -> Tensor:
    """Raw scores (3, n) of n dialogues, each lens at the end of its own turn."""
    base = loaded.base
    return score_dialogues(base.model, ensemble.models, dialogues, (0, 1, 2),
                           base.tokenizer.pad_token_id, batch_size=batch_size,
                           each_batch=resume.spread())


def sampling_plan(args: argparse.Namespace, prompts: int) -> dict:
    """The sizes for which `preview` plans memory: dialogues at once, and tokens in each."""
    tokens = generate.longest(args.max_prompt_tokens, args.max_new_tokens)
    return dict(rows=min(args.batch_size, prompts), tokens=tokens, prompt=args.max_prompt_tokens)


def judging_plan(args: argparse.Namespace) -> dict:
    """The same for the judge's pairs of dialogues."""
    tokens = generate.longest(args.max_prompt_tokens, args.max_new_tokens)
    return dict(rows=args.judge_batch_size, tokens=2 * tokens + JUDGE_TOKENS)
