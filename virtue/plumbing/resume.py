"""Going on where a killed run stopped: one way to save, one way to go on, for every stage.

A run keeps its state in <out>/resume, which goes when it ends well; the same command with --resume
goes on from there. What stays is <out>/done.json, the flags and the hashes of the inputs that the
results stand for. Loops over optimiser steps save all that the next step depends on
(`save_checkpoint`); loops over batches keep each batch's result (`replay`). Randomness is keyed
(``randomness.stream``), so no generator has a state to save, and what a resumed run writes is what
it would have written anyway.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import reprlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from virtue import VirtueError, printable
from virtue.plumbing.artefacts import (MANIFEST, check_output, file_hash, prepare_output,
                                       write_atomic, write_json)
from virtue.plumbing.parallel import gather, rank, share, size, total
from virtue.plumbing.records import is_number
from virtue.plumbing.loading import is_sound
from virtue.plumbing.runtime import main_rank, progress

FOLDER, SETTINGS, DONE = "resume", "settings.json", "done.json"
KEPT = 2  # checkpoints on the disk: where the newest is damaged, the one before it serves
# Flags that may differ when a run goes on: they change speed, memory and when it stops, and results
# by rounding only.
FREE = ("out", "overwrite", "threads", "device", "micro_batch_size", "gradient_checkpointing",
        "save_every", "stop_kl", "any_judge")

T = TypeVar("T")


def _shown(value: object) -> str:
    """What a file holds, as a message can show it."""
    return printable(value[:300]) if isinstance(value, str) else reprlib.repr(value)


def may_write(args: argparse.Namespace, out: Path, inputs: Iterable[Path | None] = ()) -> Path:
    """`check_output` for a stage that can be resumed: with --resume the folder may hold what such a
    run wrote. VirtueError: as there; --overwrite too."""
    if args.resume and args.overwrite:
        raise VirtueError("--resume goes on, --overwrite starts anew: give one of them")
    begun = any((out / name).exists() for name in (FOLDER, DONE, MANIFEST))
    return check_output(out, args.overwrite or args.resume and begun, inputs)


def settings_of(args: argparse.Namespace) -> dict:
    """What a manifest says of the flags: all but how the run was started."""
    how = ("resume", "overwrite", "dry_run")
    return {name: value for name, value in vars(args).items() if name not in how}


def _agree(path: Path, settings: Mapping) -> None:
    """VirtueError unless the settings on `path` are these, all but the flags in FREE."""
    try:
        recorded = json.loads(path.read_bytes())
        recorded.keys()
    except (ValueError, RecursionError, AttributeError):
        raise VirtueError(f"{path}: not JSON, or no object: start anew with --overwrite") from None
    for name in sorted(recorded.keys() | settings.keys()):
        if name not in FREE and recorded.get(name) != settings.get(name):
            what = f"--{_shown(name).replace('_', '-')}"
            if name == "processes":
                what = "torchrun's number of processes"
            elif name.startswith("sha256"):
                what = f"the file behind {_shown(name[7:])}"
            raise VirtueError(f"{path.parent}: was begun with {what} {_shown(recorded.get(name))}, "
                              f"which is now {_shown(settings.get(name))}: give it as it was, or "
                              "start anew with --overwrite")


def start(args: argparse.Namespace, out: Path, later: Sequence[Path] = (),
          **inputs: str | None) -> Path | None:
    """Makes the output folder and its resume/ -> that; None if the run has come to its end already.

    With --resume the flags, and the hashes of `inputs` and of the SFT adapter, must be those that
    the run was begun with. Where it begins anew, what the folders of its `later` parts hold is an
    earlier run's, and is nothing finished.
    """
    inputs["sft"] = file_hash(args.sft) if getattr(args, "sft", None) else None
    settings = json.loads(json.dumps(settings_of(args), default=str))
    settings |= {f"sha256 {name}": digest for name, digest in inputs.items()}
    finished = False
    if main_rank():
        try:
            finished = _start(args, out, later, settings | {"processes": size()})
        except OSError as e:
            raise VirtueError(f"{out}: cannot be a folder to write in ({e.strerror}): choose "
                              "another --out") from None
    finished = bool(total(torch.tensor(float(finished))))  # the others wait for rank 0
    return None if finished else out / FOLDER


def _start(args: argparse.Namespace, out: Path, later: Sequence[Path], settings: dict) -> bool:
    """Whether the run has come to its end already; else its folders are ready."""
    state = out / FOLDER
    if args.resume and (state / SETTINGS).is_file():
        _agree(state / SETTINGS, settings)
        return False
    if args.resume and (out / DONE).is_file():
        _agree(out / DONE, settings)
        shutil.rmtree(state, ignore_errors=True)  # of a run that was killed while it removed this
        print(f"{out}: finished already")
        return True
    if args.resume and (out / MANIFEST).exists():
        raise VirtueError(f"{out}: an artefact without {DONE}, so not of a run that --resume "
                          "knows: choose another --out, or give --overwrite")
    if args.resume:
        print(f"{out}: nothing to resume: starting at the beginning")
    for folder in (out, *(folder for folder in later if folder.exists())):
        (folder / DONE).unlink(missing_ok=True)
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        (prepare_output(folder, overwrite=True) / FOLDER).mkdir(exist_ok=True)  # begun
    write_json(state / SETTINGS, settings)
    return False


def finish(out: Path) -> None:
    """Removes the state of a run that wrote its results; the settings first, which stay as
    done.json."""
    if not main_rank():
        return
    os.replace(out / FOLDER / SETTINGS, out / DONE)
    shutil.rmtree(out / FOLDER, ignore_errors=True)


# ---- loops over optimiser steps


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def save_checkpoint(state: Path, step: int, parameters: Sequence[Tensor],
                    optimizer: torch.optim.Optimizer, schedule, logs: Sequence[Path],
                    **numbers) -> None:
    """Writes <step>-<sha256>.safetensors: parameters, moments, learning rates, the logs' sizes, and
    `numbers`."""
    if not main_rank():
        return
    sizes = {}
    for log in logs:
        with open(log, "ab") as file:
            os.fsync(file.fileno())
            sizes[log.name] = file.tell()
    tensors = {f"parameter/{i}": p for i, p in enumerate(parameters)}
    for i, p in enumerate(_trained(optimizer)):
        tensors |= {f"optimizer/{i}/{key}": t for key, t in optimizer.state.get(p, {}).items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    saved = {"step": step, "lr": [group["lr"] for group in optimizer.param_groups],
             "schedule": schedule.state_dict(), "logs": sizes, "numbers": numbers}
    data = save(tensors, metadata={"state": json.dumps(saved)})
    name = f"{step:08d}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    write_atomic(state / name, data)
    for old in sorted(state.glob("*.safetensors"))[:-KEPT]:
        old.unlink()


def _like(value: object, model: object) -> bool:
    """Whether a JSON value has the keys, lengths and types of another."""
    if is_number(model):
        return is_number(value)
    if type(value) is not type(model):
        return False
    if isinstance(model, dict):
        return value.keys() == model.keys() and all(_like(value[key], model[key]) for key in model)
    if isinstance(model, list):
        return len(value) == len(model) and all(map(_like, value, model))
    return True


def _fits(saved: object, tensors: Mapping[str, Tensor], parameters: Sequence[Tensor],
          optimizer: torch.optim.Optimizer, schedule, logs: Sequence[Path],
          numbers: Sequence[str]) -> bool:
    """Whether a checkpoint, whose bytes are sound, is of this run: by another version of the code
    it may not be."""
    now = schedule.state_dict()
    model = {"step": 0, "lr": [group["lr"] for group in optimizer.param_groups], "schedule": now,
             "logs": {log.name: 0 for log in logs}}
    if not isinstance(saved, dict) or not isinstance(saved.get("numbers"), dict):
        return False
    if saved["numbers"].keys() != set(numbers):
        return False
    if not _like(saved, {**model, "numbers": saved["numbers"]}):
        return False
    constant = (key for key in now if key != "last_epoch" and key[0] != "_")  # the flags say these
    if any(saved["schedule"][key] != now[key] for key in constant):
        return False
    if not all(type(n) is int and n >= 0 for n in (saved["step"], *saved["logs"].values())):
        return False
    expected = {f"parameter/{i}": p for i, p in enumerate(parameters)}
    for i, p in enumerate(_trained(optimizer)):
        if f"optimizer/{i}/step" in tensors:  # parameters without gradient have no moments
            expected |= {f"optimizer/{i}/step": torch.zeros(()), f"optimizer/{i}/exp_avg": p,
                         f"optimizer/{i}/exp_avg_sq": p}
    return expected.keys() == tensors.keys() and all(
        (t.shape, t.dtype) == (expected[name].shape, expected[name].dtype) and is_sound(t)
        for name, t in tensors.items())


def _restore(saved: Mapping, tensors: Mapping[str, Tensor], parameters: Sequence[Tensor],
             optimizer: torch.optim.Optimizer, schedule) -> None:
    with torch.no_grad():
        for i, p in enumerate(parameters):
            p.copy_(tensors[f"parameter/{i}"])
    trained = _trained(optimizer)
    optimizer.state.clear()
    for name, tensor in tensors.items():
        kind, i, *key = name.split("/")
        if kind == "optimizer":  # the count of steps stays on the CPU, as Adam has it
            p = trained[int(i)]
            optimizer.state[p][key[0]] = tensor.to(p.device) if tensor.ndim else tensor
    schedule.load_state_dict(saved["schedule"])
    for group, lr in zip(optimizer.param_groups, saved["lr"]):
        group["lr"] = lr


def load_checkpoint(state: Path, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer,
                    schedule, logs: Sequence[Path], numbers: Sequence[str] = ()) -> dict | None:
    """Puts everything back as the newest sound checkpoint has it, cuts the logs back
    -> {"step", **numbers}, or None.

    A checkpoint whose bytes are not those that were written is passed over, with a warning.
    VirtueError: sound bytes of another run, or without the `numbers` that this one saves.
    """
    for path in sorted(state.glob("*.safetensors"), reverse=True):
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest()[:16] != path.stem.partition("-")[2]:
                raise ValueError("its bytes are not those that were written")
            with safe_open(path, "pt") as file:
                saved = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as e:
            print(f"warning: {path}: damaged ({_shown(str(e))}): trying the checkpoint before it",
                  file=sys.stderr)
            continue
        if not _fits(saved, tensors, parameters, optimizer, schedule, logs, numbers):
            raise VirtueError(f"{path}: not of this run, or of another version of the code: start "
                              "anew with --overwrite")
        for log in logs:
            length = saved["logs"][log.name]
            if not log.is_file() or log.stat().st_size < length:
                raise VirtueError(f"{log}: shorter than it was at the checkpoint {path.name}: "
                                  "start anew with --overwrite")
            if main_rank():
                os.truncate(log, length)
        _restore(saved, tensors, parameters, optimizer, schedule)
        print(f"resuming after step {saved['step']}", file=sys.stderr)
        return {"step": saved["step"], **saved["numbers"]}
    for log in logs:  # no checkpoint yet: what the log holds is done again
        if main_rank():
            log.unlink(missing_ok=True)
    return None


# ---- loops over batches


def spread(desc: str | None = None, keep: Path | None = None) -> Callable:
    """An ``each_batch`` for the method's loops: every process computes its share of the batches,
    and all of them get all results, in order. ``desc`` names a progress bar; ``keep`` a file for
    finished batches (see `replay`), from which a run that was killed goes on."""
    def each_batch(compute: Callable[[T], object], batches: Sequence[T]) -> list:
        mine = share(batches)
        return gather([*replay(keep, progress(mine, desc) if desc else mine, compute)])
    return each_batch


def replay(path: Path | None, batches: Iterable[T], compute: Callable[[T], object]) -> Iterator:
    """compute(batch) for each batch, as JSON gives it back; results on `path` are read, new ones
    appended.

    Each line begins with a checksum; what comes from the first damaged one on is computed again.
    Without a path nothing is kept, and results come as they are. VirtueError: the disk is full, or
    the file cannot be written.
    """
    if path is None:
        yield from map(compute, batches)
        return
    if size() > 1:
        path = path.with_suffix(f".{rank()}.jsonl")

    def sealed(i: int, text: bytes) -> bytes:
        digest = hashlib.sha256(b"%d " % i + text).hexdigest()[:16]
        return digest.encode() + b" " + text + b"\n"

    kept, length = [], 0
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        if line != sealed(len(kept), line[17:-1]):
            break
        kept.append(json.loads(line[17:-1]))
        length += len(line)
    if path.is_file():
        os.truncate(path, length)
    for i, batch in enumerate(batches):
        if i < len(kept):
            yield kept[i]
            continue
        result = json.dumps(compute(batch))
        try:
            with open(path, "ab") as file:
                file.write(sealed(i, result.encode()))
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise VirtueError(f"{path}: cannot be written ({e.strerror}): make room, then the same "
                              "command with --resume goes on") from None
        yield json.loads(result)
