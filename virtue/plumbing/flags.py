"""The flags of the scripts: types that check, groups that several scripts share, and inheritance of
settings from an earlier artefact.

Imports no torch, so that ``--help`` is instant.
"""
from __future__ import annotations

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from virtue import TARGETS, VirtueError

# What a later stage takes from the earlier artefact's settings unless it is given again. A script
# without such a flag of its own hands it on.
CARRIED = ("model", "quantize", "dtype", "prompts", "max_prompt_tokens", "max_new_tokens", "temperature", "sft", "rm")


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if hasattr(action, "inherited"):
            return f"{action.help} (default: {action.inherited})"
        if isinstance(action.default, tuple):
            return f"{action.help} (default: {' '.join(action.default)})"
        silent = action.default is None or action.default is False  # defaults that say nothing
        return action.help if silent else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):  # argparse makes sub-commands of the same class
    def __init__(self, **kwargs) -> None:
        super().__init__(**{"formatter_class": _Formatter, "allow_abbrev": False, **kwargs})
        # "--lr -1e-5" is a number out of range, not a flag of the name -1e-5
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.I)

    def parse_args(self, argv=None, namespace=None):
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            group = next((a for a in self._actions if isinstance(a, argparse._SubParsersAction)), None)
            owner = group.choices.get(getattr(args, "command", None), self) if group else self
            flag, flags = unknown[0].split("=")[0], owner._option_string_actions
            near = [name for name in flags if name.startswith(flag)] or difflib.get_close_matches(flag, flags, 1, 0.65)
            owner.error(f"unrecognized arguments: {' '.join(unknown)}" + (f": did you mean {near[0]}?" if near else ""))
        return args

    def error(self, message: str):
        if "|" in message and "invalid choice" in message:
            message += ": the command comes first, then its flags"
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help opens with `doc`, the script's docstring; errors exit with status 2."""
    return _Parser(description=doc.strip())


def _checked(convert: Callable, test: Callable, what: str) -> Callable[[str], float]:
    def parse(text: str):
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not test(value):  # nan fails every test
            raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
        return value
    return parse
positive_int = _checked(int, lambda v: v >= 1, "a whole number of at least 1")
nonnegative_int = _checked(int, lambda v: v >= 0, "a whole number of at least 0")
positive_float = _checked(float, lambda v: 0 < v < math.inf, "a number above 0")
finite_float = _checked(float, math.isfinite, "a finite number")
nonnegative_float = _checked(float, lambda v: 0 <= v < math.inf, "a number of at least 0")
fraction = _checked(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")


def add_common_flags(parser: argparse.ArgumentParser, out: bool = True) -> None:
    """The flags of every stage: base model, machine, seed, and unless `out` is False the output folder."""
    add = parser.add_argument_group("base model, machine, output").add_argument
    add("--model", default="toy", help="toy, a local folder, or a Hugging Face hub id")
    add("--quantize", choices=("none", "nf4"), default="none", help="4-bit NF4 base weights (Mistral, the study: nf4)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32",
        help="type of the base's weights and arithmetic; on a CPU fp32 is fastest; fp16 (the study) trains without loss scaling, so prefer bf16")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if present")
    add("--threads", type=nonnegative_int, default=0, help="CPU threads, 0 for torch's choice")
    add("--seed", type=nonnegative_int, default=0, help="same seed, same bytes, on one kind of CPU with one number of threads")
    add("--dry-run", action="store_true", help="check the inputs, print settings, files and the memory plan, and end: nothing is loaded or written")
    if not out:
        return
    add("--out", type=Path, required=True, help="folder to write")
    add("--overwrite", action="store_true", help="write into a folder that is not empty")
    add("--resume", action="store_true", help="go on where a run of the same command was killed")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every stage that samples."""
    add = parser.add_argument_group("sampling").add_argument
    add("--max-new-tokens", type=positive_int, default=64, help="most tokens of one turn (Mistral: 128, at most 256; the study: 32)")
    add("--max-prompt-tokens", type=positive_int, default=512, help="longer prompts are dropped and counted")
    add("--temperature", type=positive_float, default=1.0, help="sampling temperature; no top-k, no top-p")
    add("--batch-size", type=positive_int, default=64, help="dialogues sampled or scored at once")


def add_lora_flags(parser: argparse.ArgumentParser, rank: int, alpha: float) -> None:
    """Flags of every stage that trains an adapter."""
    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=positive_int, default=rank, help="rank r of the update B A (the study reports none)")
    add("--alpha", type=positive_float, default=alpha, help="the update is scaled by alpha / r")
    add("--whole", action="store_true", help="train the layers' whole matrices instead of B A, with a lower --lr; memory: an fp32 copy of them an adapter, three more of what is trained")
    add("--targets", nargs="+", default=TARGETS, metavar="NAME", help="linear layers that get an adapter")
    add("--gradient-checkpointing", action="store_true", help="compute activations again in the backward pass: much less memory, a third more arithmetic")


def lora_settings(args: argparse.Namespace) -> dict:
    """What those flags say, for ``lora.add_adapter``."""
    return dict(rank=None if args.whole else args.rank, alpha=args.alpha, targets=args.targets)


def add_aggregator_flags(add: Callable) -> None:
    """How the aggregators weigh: `add` is a parser's or a group's add_argument."""
    add("--uwo-coef", type=nonnegative_float, default=0.5, help="coefficient of the spread in uwo")
    add("--uwo-variance", action="store_true", help="uwo subtracts the variance (Coste et al.) instead of the standard deviation")
    add("--lsc-reference", type=finite_float, default=1.0, help="standardised score that counts as good in lsc: one number for all prompts, where the paper has one of each prompt")


def aggregator_settings(args: argparse.Namespace) -> dict:
    """What those flags say, for ``ensemble.aggregate``."""
    return dict(coef=args.uwo_coef, use_variance=args.uwo_variance, reference=args.lsc_reference)


def add_training_flags(parser: argparse.ArgumentParser, *, lr: float, epochs: int, batch_size: int, study: Mapping[str, str] | None = None) -> None:
    """Flags of the supervised stages: SFT and reward models. `study` has the study's own values, for the help."""
    def told(text: str, name: str) -> str:
        return f"{text} (the study: {study[name]})" if study else text

    add = parser.add_argument_group("training").add_argument
    add("--lr", type=positive_float, default=lr, help=told("AdamW learning rate; Mistral-7B: 1e-4", "lr"))
    add("--schedule", choices=("linear", "constant"), default="linear",
        help="linear: from --lr at the first step to a tenth of it at the last")
    add("--epochs", type=positive_int, default=epochs, help=told("passes over the data", "epochs"))
    add("--batch-size", type=positive_int, default=batch_size, help=told("records a forward pass", "batch_size"))
    add("--accumulation", type=positive_int, default=1, help=told("forward passes an optimiser step", "accumulation"))
    add("--max-grad-norm", type=positive_float, default=1.0, help="gradient clipping")
    add("--save-every", type=positive_int, default=50, help="optimiser steps between checkpoints for --resume")


def parse_with_parent(parser: argparse.ArgumentParser, argv: Sequence[str] | None, stage: str | None = None, flag: str | None = None,
                      inside: str = "", commands=None) -> argparse.Namespace:
    """Parses `argv`; the flags in CARRIED that it leaves out are as in the earlier artefact's settings.

    That artefact, of the given `stage` (None: of any), is the folder that --`flag` names, or `inside` it;
    without one the parser's own defaults stand. `commands` are the sub-parsers, if the script has any; one
    with an attribute `parent`, (stage, flag, inside), goes by that. A run may be copied or moved whole: where a folder
    that the settings name is gone, the one counts that lies to the artefact as that lay. VirtueError: neither is there.
    """
    def link(owner) -> tuple[str | None, str | None, str]:
        return getattr(owner, "parent", (stage, flag, inside))

    for owner in list(commands.choices.values()) if commands else [parser]:
        for action in owner._actions:
            if action.dest in CARRIED and link(owner)[1] not in (None, action.dest):
                optional = commands and action.default is not None and not any(a.required for a in owner._actions if a.dest == link(owner)[1])
                action.inherited = f"as in --{link(owner)[1]}" + (f", or {action.default}" if optional else "")
    args = parser.parse_args(argv)
    owner = commands.choices[args.command] if commands else parser
    stage, flag, inside = link(owner)
    folder = getattr(args, flag) if flag else None
    if folder is None:
        return args
    from virtue.plumbing.artefacts import MANIFEST, read_manifest
    if inside and (folder / MANIFEST).is_file():
        raise VirtueError(f"{folder}: one artefact (of stage {read_manifest(folder)['stage']!r}): give the folder of run_rm.py, in which {inside}/ lies")
    settings = read_manifest(folder / inside, stage)["settings"]
    for name in ("sft", "rm"):
        if settings.get(name) and getattr(args, name, "") is None and not os.path.exists(settings[name]):
            moved = os.path.normpath(folder / os.path.relpath(settings[name], settings.get("out", folder)))
            if not os.path.exists(moved):
                raise VirtueError(f"{folder / inside}: was made with --{name} {settings[name]}, which is gone, and it is not at {moved} either: give --{name}")
            settings[name] = moved
    owner.set_defaults(**{name: settings[name] for name in CARRIED if settings.get(name) is not None})
    return parser.parse_args(argv)
