"""How a script runs: exits and their messages, progress bars, the file of metrics, numbers that
must be finite.

Imports no torch, so that ``--help`` is instant.
"""
from __future__ import annotations

import atexit
import errno
import importlib.util
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from virtue import VirtueError

NEEDED = ("numpy", "torch", "transformers", "safetensors")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    print(f"error: {', '.join(missing)}: not installed for {sys.executable}: make demo and make "
          "test install what it takes into .venv; source .venv/bin/activate, or python -m pip "
          "install -r requirements.txt", file=sys.stderr)
    raise SystemExit(2)


# What the system says of a disk that is full or must not be written to
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def main_rank() -> bool:
    """Whether this process writes and prints: the only one, or torchrun's first."""
    return int(os.environ.get("RANK", 0)) == 0


def run_main(main: Callable[[], object]) -> None:
    """Runs a script's `main` and exits: 0; 2 after a VirtueError's one line; 130 on Ctrl-C.

    As one of several processes, it skips the shutdown of the interpreter. What is imported after
    ``parallel.join`` may hold the group (torch.distributed.nn does, which transformers imports), so
    its threads outlive ``parallel.leave``; and before Python 3.14 a thread that wants to free a
    tensor while the interpreter shuts down is killed in the middle of C++ code, which aborts the
    process with SIGABRT.
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
        # Else the interpreter complains when it flushes them
        for output in (sys.stdout, sys.stderr):
            os.dup2(nowhere, output.fileno())
        sys.exit(128 + 13)  # as a shell reports SIGPIPE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            print(f"error: {error.filename or 'a file'}: {error.strerror}: make room or get "
                  "permission, then the same command with --resume goes on", file=sys.stderr)
            sys.exit(2)
        if not _is_out_of_memory(error):
            raise
        print("error: out of memory: of --batch-size, --micro-batch-size and --judge-batch-size "
              "lower what this script has, or take --quantize nf4 or --gradient-checkpointing "
              "(--dry-run says what a run needs); with the last, or another --micro-batch-size, "
              "the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: a stage that was killed goes on with --resume", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether this is Python's own error, or torch's on CUDA (by name, since torch is not imported
    here), or that of its CPU allocator or of cuBLAS, which only say so in words."""
    words = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or any(word in str(error) for word in words))


class _Lines:
    """stderr that is not a terminal: each state of a progress bar becomes a separate line."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(iterable: Iterable | None, desc: str, total: int | None = None,
             **settings) -> Iterable:
    """`iterable` with a progress bar on stderr, or a line every half minute where stderr is no
    terminal. There, a bar that would go away again (leave=False) shows up only for work that takes
    long."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        style = dict(file=sys.stderr, dynamic_ncols=True)
    else:
        delay = 0 if settings.get("leave", True) else 30
        style = dict(file=_Lines(), mininterval=30, delay=delay)
    return tqdm(iterable, desc=desc, total=total, disable=not main_rank(), **style, **settings)


class MetricsLog:
    """A file of metrics: each call writes one JSON line at once; ``resume.load_checkpoint`` cuts
    off the lines of an earlier run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, metrics: dict) -> None:
        """`metrics`: names to texts and scalars (torch's and numpy's too); nan is written null.
        Rank 0 writes."""
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


def check_finite(value, where: str, what: str, remedy: str, records: Sequence[str] = (),
                 state: Path | None = None) -> None:
    """VirtueError where a number is NaN or infinite, since nothing that follows could be right.

    `value`: a scalar, or a tensor with one column a record; the message names the step (`where`),
    the records (those of bad columns), and the last checkpoint in `state`, which holds what was
    before.
    """
    import torch

    finite = torch.as_tensor(value).isfinite()
    if finite.all():
        return
    if finite.ndim:
        good = finite.reshape(-1, finite.shape[-1]).all(0).tolist()
        records = [record for record, is_good in zip(records, good) if not is_good]
    more = f" and {len(records) - 4} more" if len(records) > 4 else ""
    of = f" of records {', '.join(records[:4])}{more}" if records else ""
    last = max((p.name for p in state.glob("*.safetensors")), default=None) if state else None
    kept = f"; the last good checkpoint is {state / last}" if last else ""
    raise VirtueError(f"{where}: {what}{of} is not finite: {remedy}, or train in another "
                      f"--dtype{kept}")
