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
from virtue.plumbing.artefacts import (
    MANIFEST,
    check_output,
    file_hash,
    prepare_output,
    write_atomic,
    write_json,
)
from virtue.plumbing.loading import is_sound
from virtue.plumbing.parallel import gather, rank, share, size, total
from virtue.plumbing.records import is_number
from virtue.plumbing.runtime import main_rank, progress

FOLDER, SETTINGS, DONE = "resume", "settings.json", "done.json"
KEPT = 2  # checkpoints on the disk: where the newest is damaged, the one before it serves
# Flags that may differ when a run goes on: they change speed, memory and when it stops, and results
# by rounding only.
FREE = ("out", "overwrite", "device", "micro_batch_size", "gradient_checkpointing", "save_every",
        "stop_kl", "any_judge")

T = TypeVar("T")


def _said(value: object) -> str:
    """What a file holds, as a message can show it."""
    return printable(value[:300]) if isinstance(value, str) else reprlib.repr(value)


# ---- the folder of a run


def may_write(args: argparse.Namespace, out: Path, inputs: Iterable[Path | None] = ()) -> Path:
    """`check_output` for a stage that can be resumed: with --resume the folder may hold what such a
    run wrote. Raises VirtueError as that does, and where --overwrite is given too."""
    if args.resume and args.overwrite:
        raise VirtueError("--resume goes on, --overwrite starts anew: give one of them")
    begun = any((out / name).exists() for name in (FOLDER, DONE, MANIFEST))
    return check_output(out, args.overwrite or args.resume and begun, inputs)


def settings_of(args: argparse.Namespace) -> dict:
    """What a manifest says of the flags: all but how the run was started."""
    started = ("resume", "overwrite", "dry_run")
    return {name: value for name, value in vars(args).items() if name not in started}


def _title(setting: str) -> str:
    """What a message calls a setting."""
    if setting == "processes":
        return "torchrun's number of processes"
    if setting.startswith("sha256"):
        return f"the file behind {_said(setting.removeprefix('sha256 '))}"
    return f"--{_said(setting).replace('_', '-')}"


def _agree(path: Path, settings: Mapping, out: Path) -> None:
    """Raises VirtueError unless the run in `out`, whose settings are on `path`, has these ones."""
    try:
        saved = json.loads(path.read_bytes())
        names = saved.keys() | settings.keys()
    except (ValueError, RecursionError, AttributeError):
        raise VirtueError(
            f"{path}: not JSON, or no object: start anew with --overwrite") from None
    for name in sorted(names - {*FREE}):
        before, now = saved.get(name), settings.get(name)
        if before != now:
            raise VirtueError(
                f"{out}: was begun with {_title(name)} {_said(before)}, which is now {_said(now)}: "
                "give it as it was, or start anew with --overwrite")


def start(args: argparse.Namespace, out: Path, later: Sequence[Path] = (),
          **inputs: str | None) -> Path | None:
    """Makes the output folder and its resume/, and returns that; or None if the run has come to its
    end already.

    With --resume the flags, and the hashes of `inputs` and of the SFT adapter, must be those that
    the run was begun with. Where it begins anew, what the folders of its `later` parts hold is an
    earlier run's, and is nothing finished.
    """
    inputs["sft"] = file_hash(args.sft) if getattr(args, "sft", None) else None
    settings = json.loads(json.dumps(settings_of(args), default=str))
    settings |= {f"sha256 {name}": digest for name, digest in inputs.items()}
    settings["processes"] = size()
    finished = main_rank() and _finished(args.resume, out, later, settings)
    # the other processes wait here for rank 0
    return None if total(torch.tensor(float(finished))) else out / FOLDER


def _finished(resume: bool, out: Path, later: Sequence[Path], settings: dict) -> bool:
    """Whether the run has come to its end already; if not, its folder is ready for it."""
    state = out / FOLDER
    try:
        if resume and (state / SETTINGS).is_file():
            _agree(state / SETTINGS, settings, out)
        elif resume and (out / DONE).is_file():
            _agree(out / DONE, settings, out)
            shutil.rmtree(state, ignore_errors=True)  # of a run that was killed while it did this
            print(f"{out}: finished already")
            return True
        elif resume and (out / MANIFEST).exists():
            raise VirtueError(
                f"{out}: an artefact without {DONE}, so not of a run that --resume knows: "
                "choose another --out, or give --overwrite")
        else:
            if resume:
                print(f"{out}: nothing to resume: starting at the beginning")
            for folder in (out, *(folder for folder in later if folder.exists())):
                (folder / DONE).unlink(missing_ok=True)
                shutil.rmtree(folder / FOLDER, ignore_errors=True)
                prepare_output(folder, overwrite=True)
                (folder / FOLDER).mkdir(exist_ok=True)  # says that the part is begun
            write_json(state / SETTINGS, settings)
    except OSError as e:
        raise VirtueError(f"{out}: cannot be a folder to write in ({e.strerror}): "
                          "choose another --out") from None
    return False


def finish(out: Path) -> None:
    """Removes the state of a run that wrote its results; the settings, which stay as done.json,
    are moved first."""
    if not main_rank():
        return
    os.replace(out / FOLDER / SETTINGS, out / DONE)
    shutil.rmtree(out / FOLDER, ignore_errors=True)


# ---- loops over optimiser steps


def _optimised(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that an optimiser holds, whose moments are saved by their places here."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _description(step: int, optimizer: torch.optim.Optimizer, schedule, sizes: dict[str, int],
                 numbers: object) -> dict:
    """What a checkpoint says beside its tensors."""
    return {"step": step, "lr": [group["lr"] for group in optimizer.param_groups],
            "schedule": schedule.state_dict(), "logs": sizes, "numbers": numbers}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def save_checkpoint(state: Path, step: int, parameters: Sequence[Tensor],
                    optimizer: torch.optim.Optimizer, schedule, logs: Sequence[Path],
                    **numbers) -> None:
    """Writes <step>-<sha256>.safetensors, which holds the parameters, their moments, the learning
    rates, the sizes of the logs, and `numbers`."""
    if not main_rank():
        return
    sizes = {}
    for log in logs:
        with open(log, "ab") as file:
            os.fsync(file.fileno())
            sizes[log.name] = file.tell()
    tensors = {f"parameter/{i}": p for i, p in enumerate(parameters)}
    for i, p in enumerate(_optimised(optimizer)):
        moments = optimizer.state.get(p, {})
        tensors |= {f"optimizer/{i}/{key}": value for key, value in moments.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    description = _description(step, optimizer, schedule, sizes, numbers)
    data = save(tensors, metadata={"state": json.dumps(description)})
    write_atomic(state / f"{step:08d}-{_digest(data)}.safetensors", data)
    for old in sorted(state.glob("*.safetensors"))[:-KEPT]:
        old.unlink()


def _read_checkpoint(path: Path) -> tuple[object, dict[str, Tensor]]:
    """What a checkpoint says, and its tensors. Raises ValueError, or one of safetensors' errors, if
    it is damaged."""
    if _digest(path.read_bytes()) != path.stem.partition("-")[2]:
        raise ValueError("its bytes are not those that were written")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["state"]), tensors


def _like(saved: object, expected: object) -> bool:
    """Whether a JSON value has the keys, lengths and types of the expected one."""
    if isinstance(expected, dict):
        return (isinstance(saved, dict) and saved.keys() == expected.keys()
                and all(_like(saved[key], value) for key, value in expected.items()))
    if isinstance(expected, list):
        return (isinstance(saved, list) and len(saved) == len(expected)
                and all(map(_like, saved, expected)))
    return is_number(saved) if is_number(expected) else type(saved) is type(expected)


def _constants(schedule: Mapping) -> dict:
    """What the flags say of a schedule, and no step changes."""
    return {key: value for key, value in schedule.items()
            if key != "last_epoch" and not key.startswith("_")}


def _description_fits(saved: object, optimizer: torch.optim.Optimizer, schedule,
                      logs: Sequence[Path], numbers: Sequence[str]) -> bool:
    """Whether a checkpoint says what one of this run says."""
    if not isinstance(saved, dict):
        return False
    sizes = {log.name: 0 for log in logs}
    expected = _description(0, optimizer, schedule, sizes, saved.get("numbers"))
    return (_like(saved, expected)
            and _constants(saved["schedule"]) == _constants(expected["schedule"])
            and isinstance(saved["numbers"], dict) and saved["numbers"].keys() == set(numbers)
            and all(type(n) is int and n >= 0 for n in (saved["step"], *saved["logs"].values())))


def _tensors_fit(saved: Mapping[str, Tensor], parameters: Sequence[Tensor],
                 optimizer: torch.optim.Optimizer) -> bool:
    """Whether a checkpoint's tensors are sound, and in name, shape and type those of this run."""
    expected = {f"parameter/{i}": p for i, p in enumerate(parameters)}
    for i, p in enumerate(_optimised(optimizer)):
        moments = {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p}
        if f"optimizer/{i}/step" in saved:  # parameters without gradient have no moments
            expected |= {f"optimizer/{i}/{key}": value for key, value in moments.items()}
    return saved.keys() == expected.keys() and all(
        tensor.shape == expected[name].shape and tensor.dtype == expected[name].dtype
        and is_sound(tensor) for name, tensor in saved.items())


def _put_back(saved: dict, tensors: Mapping[str, Tensor], parameters: Sequence[Tensor],
              optimizer: torch.optim.Optimizer, schedule) -> None:
    with torch.no_grad():
        for i, p in enumerate(parameters):
            p.copy_(tensors[f"parameter/{i}"])
    optimised = _optimised(optimizer)
    optimizer.state.clear()
    for name, tensor in tensors.items():
        kind, i, *key = name.split("/")
        if kind == "optimizer":
            p = optimised[int(i)]
            # the count of steps stays on the CPU, as Adam has it
            optimizer.state[p][key[0]] = tensor.to(p.device) if tensor.ndim else tensor
    schedule.load_state_dict(saved["schedule"])
    for group, lr in zip(optimizer.param_groups, saved["lr"]):
        group["lr"] = lr


def load_checkpoint(state: Path, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer,
                    schedule, logs: Sequence[Path], numbers: Sequence[str] = ()) -> dict | None:
    """Puts everything back as the newest sound checkpoint has it, cuts the logs back, and returns
    {"step", **numbers}; or None if there is no such checkpoint.

    A checkpoint whose bytes are not those that were written is passed over, with a warning. Raises
    VirtueError if sound bytes are of another run, as those of another version of the code may be,
    or without the `numbers` that this one saves.
    """
    for path in sorted(state.glob("*.safetensors"), reverse=True):
        try:
            saved, tensors = _read_checkpoint(path)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as e:
            print(f"warning: {path}: damaged ({_said(str(e))}): trying the checkpoint before it",
                  file=sys.stderr)
            continue
        if not (_description_fits(saved, optimizer, schedule, logs, numbers)
                and _tensors_fit(tensors, parameters, optimizer)):
            raise VirtueError(f"{path}: not of this run, or of another version of the code: "
                              "start anew with --overwrite")
        _put_back(saved, tensors, parameters, optimizer, schedule)
        for log in logs:
            length = saved["logs"][log.name]
            if not log.is_file() or log.stat().st_size < length:
                raise VirtueError(f"{log}: shorter than it was at the checkpoint {path.name}: "
                                  "start anew with --overwrite")
            if main_rank():
                os.truncate(log, length)
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


def _sealed(i: int, text: bytes) -> bytes:
    """The line of the i-th result, which begins with a checksum of 16 digits and a space."""
    return _digest(b"%d " % i + text).encode() + b" " + text + b"\n"


def _kept(path: Path) -> list:
    """The results on `path` up to the first damaged line, from which on the file is cut off."""
    if not path.is_file():
        return []
    results, length = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        text = line[17:-1]
        if line != _sealed(len(results), text):
            break
        results.append(json.loads(text))
        length += len(line)
    os.truncate(path, length)
    return results


def replay(path: Path | None, batches: Iterable[T], compute: Callable[[T], object]) -> Iterator:
    """Yields compute(batch) for each batch, as JSON gives it back. Results on `path` are read, and
    new ones appended.

    Each line begins with a checksum; what comes from the first damaged one on is computed again.
    Without a path nothing is kept, and results come as they are. Raises VirtueError if the disk is
    full, or the file cannot be written.
    """
    if path is None:
        yield from map(compute, batches)
        return
    if size() > 1:
        path = path.with_suffix(f".{rank()}.jsonl")
    kept = _kept(path)
    for i, batch in enumerate(batches):
        if i < len(kept):
            yield kept[i]
            continue
        result = json.dumps(compute(batch))
        try:
            with open(path, "ab") as file:
                file.write(_sealed(i, result.encode()))
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise VirtueError(f"{path}: cannot be written ({e.strerror}): make room, then the same "
                              "command with --resume goes on") from None
        yield json.loads(result)
