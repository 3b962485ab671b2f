"""Mutation testing: how many small faults of the code do the tests see?

  python tests/mutants.py tests/mutants/run_ppo.txt -- tests/test_wiring_ppo.py

Applies each edit of the list alone in a copy of the working tree, runs pytest -x with what follows
``--``, and names the edits with which every test passes. Each run is a fork of this process, which
has imported torch and transformers for all of them. A list has blocks of lines, parted by empty
lines: the file's path where it changes, lines that begin with "- " for the text that goes (it must
stand once in the file), lines that begin with "+ " for the text that comes, and "# " for remarks.
"""
from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import transformers.models.mistral.modeling_mistral  # noqa: F401 (seconds, for each fork)

ROOT = Path(__file__).resolve().parent.parent


def read(path: Path) -> list[tuple[str, str, str]]:
    """The list's edits (file, old, new). ValueError: an old text that is not once in its file."""
    edits, name = [], None
    for block in path.read_text().split("\n\n"):
        lines = block.strip("\n").splitlines()
        name = next((line for line in lines if line[0] not in "-+#"), name)
        old, new = ("\n".join(line[2:] for line in lines if line[:1] == sign) for sign in "-+")
        if not old:
            continue
        if (count := (ROOT / name).read_text().count(old)) != 1:
            raise ValueError(f"{path}: {old!r} stands {count} times in {name}, not once")
        edits.append((name, old, new))
    return edits


def run(folder: Path, arguments: list[str], log: Path) -> int:
    """pytest's exit status, in a process of its own; what it prints goes to the log."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 3
    try:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.chdir(folder)
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments])
    finally:
        os._exit(status)


def main(argv: list[str]) -> None:
    lists, arguments = argv[:argv.index("--")], argv[argv.index("--") + 1:]
    edits, alive = [edit for path in lists for edit in read(Path(path))], 0
    with tempfile.TemporaryDirectory() as folder:
        copy, log = Path(folder) / "copy", Path(folder) / "log"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for name, old, new in [(None, "", ""), *edits]:  # first the code as it is: it must pass
            if name:
                (copy / name).write_text((ROOT / name).read_text().replace(old, new))
            failed = run(copy, arguments, log) != 0
            if name is None and failed:
                sys.exit(f"the tests fail without any edit:\n{log.read_text()}")
            if name:
                (copy / name).write_text((ROOT / name).read_text())
                alive += not failed
                print("killed" if failed else "alive", f"{name}: {old!r} -> {new!r}", flush=True)
    print(f"{alive} of {len(edits)} mutants live")


if __name__ == "__main__":
    main(sys.argv[1:])
