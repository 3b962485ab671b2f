"""What every script shares: flags, errors, keyed randomness, progress, metrics, device, threads.

Imports no torch at the top, so that ``--help`` is instant.

Shell: imports core and modules; scripts may import it, the core may not.
"""
from __future__ import annotations

import argparse
import atexit
import difflib
import errno
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

if missing := [name for name in ("numpy", "torch", "transformers", "safetensors") if importlib.util.find_spec(name) is None]:
    print(f"error: {', '.join(missing)}: not installed for {sys.executable}: make demo and make test install what it takes into .venv; "
          "source .venv/bin/activate, or python -m pip install -r requirements.txt", file=sys.stderr)
    raise SystemExit(2)

import numpy as np

from virtue import TARGETS, VirtueError, printable


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
    from virtue.plumbing.checkpoint import MANIFEST, read_manifest
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


def main_rank() -> bool:
    """Whether this process writes and prints: the only one, or torchrun's first."""
    return int(os.environ.get("RANK", 0)) == 0


def run_main(main: Callable[[], object]) -> None:
    """Runs a script's `main` and exits: 0; 2 after a VirtueError's one line; 130 on Ctrl-C.

    As one of several processes it leaves out the end of the interpreter. What is imported after
    ``parallel.join`` may hold the group (torch.distributed.nn does, which transformers imports), so its
    threads outlive ``parallel.leave``; and before Python 3.14 a thread that wants to free a tensor while
    the interpreter ends is ended in the midst of C++, which aborts the process with SIGABRT.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        _run(main)
    status = 1
    try:
        _run(main)
    except SystemExit as end:
        status = end.code
    except Exception:
        traceback.print_exc()
    atexit._run_exitfuncs()  # temporary folders of the libraries
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads any more
        status = status or 1
    os._exit(status)


def _run(main: Callable[[], object]) -> NoReturn:
    if not main_rank():
        sys.stdout = open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be UTF-8
    try:
        main()
        sys.stdout.flush()  # here, where a closed pipe is caught
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from virtue.plumbing.parallel import leave
            leave()
    except VirtueError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # who read our output went away, as `head` does; nothing more is to say
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in (sys.stdout, sys.stderr):  # else the interpreter complains when it flushes them
            os.dup2(nowhere, output.fileno())
        sys.exit(128 + 13)  # as a shell reports SIGPIPE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
            print(f"error: {error.filename or 'a file'}: {error.strerror}: make room or get permission, then the same command with --resume goes on", file=sys.stderr)
            sys.exit(2)
        # torch's own on CUDA (by name: torch is not imported here); its CPU allocator and cuBLAS only say so in words
        if not (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED"))):
            raise
        print("error: out of memory: of --batch-size, --micro-batch-size and --judge-batch-size lower what this script has, or take --quantize nf4 or "
              "--gradient-checkpointing (--dry-run says what a run needs); with the last, or another --micro-batch-size, "
              "the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: a stage that was killed goes on with --resume", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


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
    return {ids[i] for i in stream(seed, "rm", "split").permutation(len(ids))[:round(len(ids) * share)]}


def hold_out(rows: Sequence, prompts: Sequence[str], share: float, *key: int | float | str) -> tuple[list, list]:
    """(held-out rows, the others): all rows of a prompt, `prompts` naming each row's, fall on one side. Of P prompts
    round(share P) are held out; either side may be empty."""
    groups: dict[str, list] = {}
    for row, prompt in zip(rows, prompts, strict=True):
        groups.setdefault(prompt, []).append(row)
    order, parts = stream(*key).permutation(len(groups)), list(groups.values())
    count = round(len(parts) * share)
    return tuple([row for i in part for row in parts[i]] for part in (order[:count], order[count:]))


def torch_seed(*key: int | float | str) -> int:
    """A seed in [0, 2^63) for ``torch.Generator().manual_seed``, keyed as `stream` is."""
    return _key("torch", *key) >> 65


class _Lines:
    """stderr where it is no terminal: each state of a progress bar is a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(iterable: Iterable | None, desc: str, total: int | None = None, **settings) -> Iterable:
    """`iterable` with a progress bar on stderr; a line every half minute where that is no terminal."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(iterable, desc=desc, total=total, file=sys.stderr if terminal else _Lines(), dynamic_ncols=terminal, mininterval=0.1 if terminal else 30,
                delay=0 if terminal or settings.get("leave", True) else 30,  # a bar that goes away again is for what takes long
                disable=not main_rank(), **settings)


class MetricsLog:
    """A file of metrics: one JSON line a call, at once; ``resume.load_checkpoint`` cuts an earlier run's off."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, metrics: dict) -> None:
        """`metrics`: names to texts and scalars (torch's and numpy's too); nan is written null. Rank 0 writes."""
        if not main_rank():
            return
        plain = {k: v.item() if hasattr(v, "item") else v for k, v in metrics.items()}
        line = json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v
                           for k, v in plain.items()}, ensure_ascii=False)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:  # one that comes when the file is flushed does not say which file
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def pick_device(name: str):
    """``torch.device`` of "auto", "cpu" or "cuda"; VirtueError where there is no such device."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise VirtueError(f"--device {name}: torch sees no GPU here: use --device cpu, or install "
                          "a CUDA build of torch")
    return torch.device(name)


def torch_threads(count: int) -> None:
    """Sets the number of torch's CPU threads; 0 leaves it alone."""
    import torch

    if count:
        torch.set_num_threads(count)


def check_finite(value, where: str, what: str, remedy: str, records: Sequence[str] = (), state: Path | None = None) -> None:
    """VirtueError where a number is NaN or infinite, since nothing that follows could be right.

    `value`: a scalar, or a tensor with one column a record; the message names the step (`where`), the records (those
    of bad columns), and the last checkpoint in `state`, which holds what was before.
    """
    import torch

    finite = torch.as_tensor(value).isfinite()
    if finite.all():
        return
    if finite.ndim:
        records = [r for r, good in zip(records, finite.reshape(-1, finite.shape[-1]).all(0).tolist()) if not good]
    of = f" of records {', '.join(records[:4])}{f' and {len(records) - 4} more' if len(records) > 4 else ''}" if records else ""
    last = max((p.name for p in state.glob("*.safetensors")), default=None) if state else None
    kept = f"; the last good checkpoint is {state / last}" if last else ""
    raise VirtueError(f"{where}: {what}{of} is not finite: {remedy}, or train in another --dtype{kept}")


class Base(NamedTuple):
    """The base model with what its artefacts must agree with."""

    model: object
    tokenizer: object
    info: dict[str, str]  # {"id", "fingerprint"}
    template: str


def open_base(args: argparse.Namespace, name: str | None = None) -> Base:
    """The model that the common flags name (or `name`, with the same flags) and its tokenizer. VirtueError: no such model or device, or its files are unfit."""
    from virtue.models import base_fingerprint, checkpoint_layers, load_model, load_tokenizer, resolve, template_fingerprint
    from virtue.plumbing.parallel import join

    torch_threads(args.threads)
    name = name or args.model
    folder = resolve(name)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, quantize=args.quantize, dtype=args.dtype, device=str(join(pick_device(args.device))))
    if getattr(args, "gradient_checkpointing", False):
        checkpoint_layers(model)
    return Base(model, tokenizer, {"id": str(name), "fingerprint": base_fingerprint(folder)}, template_fingerprint(tokenizer))


def preview(args: argparse.Namespace, found: Mapping[str, object], writes: str, *, trained: Sequence[str] = (), flat: Sequence[Sequence[str]] = (),
            **moments: dict | None) -> bool:
    """Before anything is loaded: prints the memory plan, unless the base is the toy. With --dry-run also checks the inputs as the
    run would, all but their tensors, prints settings and files, and is True: the caller ends here.

    `found`: what the caller read of each input; `writes`: the files to come, or "". Adapters by role: those of --sft, --rm, --eval-rm and
    --policy, those `trained`, and the `flat` ones, each made of some roles. `moments`: see ``memory.plan``. VirtueError: as in a run.
    """
    from types import SimpleNamespace
    from virtue.plumbing import memory
    from virtue.plumbing.checkpoint import check_artifact, check_made_by, read_manifest
    from virtue.ethics import LENSES
    from virtue.generate import check_context
    from virtue.models import base_fingerprint, load_tokenizer, read_config, resolve, template_fingerprint
    from virtue.plumbing.resume import settings_of

    if args.model == "toy" and not args.dry_run:
        return False
    names = {"base": args.model, "judge": getattr(args, "judge", None)}
    folders = {role: resolve(name, download=not args.dry_run) for role, name in names.items() if name}
    configs = {role: read_config(folder) for role, folder in folders.items() if folder}
    lacking = {role: [file for file in ("config.json", "tokenizer.json", "model*.safetensors") if not (folder and any(folder.glob(file)))]
               for role, folder in folders.items()}
    known, found, adapters = {}, dict(found), {}
    if args.dry_run and "tokenizer.json" not in lacking["base"]:
        known["template"] = template_fingerprint(load_tokenizer(folders["base"]))
    if args.dry_run and "model*.safetensors" not in lacking["base"]:
        known["base"] = {"id": args.model, "fingerprint": base_fingerprint(folders["base"])}
    if moments.get("sampling") and "base" in configs:
        check_context(SimpleNamespace(config=configs["base"]), args.max_prompt_tokens, args.max_new_tokens)

    def artefact(role: str, folder: Path, **expected) -> None:
        manifest, config = check_artifact(folder, **known, **expected)
        rank = None if manifest["settings"].get("whole") else config["r"]
        adapters[role] = rank, tuple({name.rpartition(".")[2] for name in config["target_modules"]})
        found[role] = f"{folder}, {'whole matrices' if rank is None else f'an adapter of rank {rank}'}"

    sft, policy = getattr(args, "sft", None), getattr(args, "policy", None)
    upon = {"sft": sft} if sft else {}
    if sft:
        artefact("sft", sft, stage="sft")
    for prefix, folder in (("", getattr(args, "rm", None)), ("eval-", getattr(args, "eval_rm", None))):
        for lens in LENSES if folder else ():
            artefact(prefix + lens, folder / lens, stage="rm", lens=lens, parents=upon)
    if policy:
        roles = read_manifest(policy, "policy")["parents"]
        artefact("policy", policy, stage="policy", parents=upon | {f"rm/{lens}": args.rm / lens for lens in LENSES if f"rm/{lens}" in roles})
    if getattr(args, "data", None) and read_manifest(args.data)["stage"] == "preferences":
        check_made_by(args.data, known.get("base"), known.get("template"), sft)

    if args.dry_run:
        said = {f"--{name.replace('_', '-')}": " ".join(map(str, value)) if isinstance(value, list | tuple) else value for name, value in settings_of(args).items()}
        print("settings:", *(flag if value is True else printable(f"{flag} {value}") for flag, value in said.items() if value is not None and value is not False))
        for role, folder in folders.items():
            where = folder or "on the hub"
            found[role] = names[role] + (f", {where}" if str(where) != names[role] else "") + (f"; a run needs {', '.join(lacking[role])} as well" if lacking[role] else "")
        print(*(printable(f"reads {name}: {what}") for name, what in found.items()), *([f"writes {args.out}: {writes}"] if writes else []), sep="\n")
    if unknown := [names[role] for role in folders if role not in configs]:
        print(f"memory plan: needs the config.json of {' and of '.join(unknown)}, which is not on this machine")
        return True
    config, judge, frozen = configs["base"], configs.get("judge"), list(adapters.values())
    if trained:
        memory.check_targets(config, args.targets)
        adapters |= {"whole": (None, args.targets), **dict.fromkeys(trained, (None if args.whole else args.rank, args.targets))}
    for stack in ([adapters[role] for role in roles if role in adapters] for roles in flat):
        if stack:
            ranks = [rank for rank, _ in stack]
            frozen.append((None if None in ranks else sum(ranks), tuple({name for _, targets in stack for name in targets})))
    print(memory.table(memory.plan(config, quantize=args.quantize, dtype=args.dtype, frozen=frozen, trained=[adapters[role] for role in trained],
                                   judge=memory.base_bytes(judge, args.quantize, args.dtype) if judge else 0,
                                   checkpointing=bool(trained) and args.gradient_checkpointing, **moments)))
    return args.dry_run
