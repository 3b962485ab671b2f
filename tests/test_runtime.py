"""Flags, errors and exit statuses, keyed randomness, metrics."""
from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from virtue import VirtueError, randomness
from virtue.plumbing import flags, loading, runtime


def parser():
    p = flags.make_parser("Does it.\n\n    run.py --out x  100% (well)\n")
    flags.add_common_flags(p)
    p.add_argument("--lr", type=flags.positive_float, default=1e-3, help="learning rate")
    return p


def test_common_flags():
    args = parser().parse_args(["--out", "x", "--seed", "3"])
    assert vars(args) | {"out": str(args.out)} == {
        "model": "toy", "quantize": "none", "dtype": "fp32", "device": "auto",
        "seed": 3, "out": "x", "dry_run": False, "overwrite": False, "resume": False, "lr": 1e-3}


def test_help_keeps_the_docstring_and_shows_defaults():
    text = parser().format_help()
    assert "\n    run.py --out x  100% (well)\n" in text
    assert "(default: 0.001)" in text and "None" not in text and "False" not in text


@pytest.mark.parametrize(("argv", "words"), [
    (["--lr", "-1e-5"], "argument --lr: must be a number above 0, not '-1e-5'"),
    (["--lr", "0"], "above 0"), (["--lr", "nan"], "above 0"), (["--lr", "inf"], "above 0"),
    (["--seed", "-1"], "at least 0"), (["--seed", "1.5"], "whole number"),
    (["--quantize", "int8"], "invalid choice"),
    (["--overwr"], "unrecognized arguments: --overwr: did you mean --overwrite?"),
    (["--zzz", "1"], "unrecognized arguments: --zzz 1 (see"), ([], None)])
def test_bad_flags_give_one_line_and_status_2(capsys, argv, words):
    with pytest.raises(SystemExit) as caught:
        parser().parse_args([*argv, *(["--out", "x"] if words else [])])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and (words or "--out") in error


def test_subcommands_are_alike(capsys):
    p = flags.make_parser("x")
    p.add_subparsers().add_parser("go").add_argument("--n", type=flags.positive_int)
    with pytest.raises(SystemExit) as caught:
        p.parse_args(["go", "--n", "0"])
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_an_unknown_flag_is_looked_up_in_its_own_command(capsys):
    p = flags.make_parser("x")
    commands = p.add_subparsers(dest="command", metavar="go|stop")
    commands.add_parser("go").add_argument("--clip-range")
    for argv, words in ((["go", "--clip", "0.1"], "--clip 0.1: did you mean --clip-range? (see"),
                        (["--clip-range", "1"], "the command comes first, then its flags")):
        with pytest.raises(SystemExit) as caught:
            p.parse_args(argv)
        error = capsys.readouterr().err
        assert caught.value.code == 2 and words in error and error.count("\n") == 1
        assert " go --help" in error or "stop" in error


@pytest.mark.parametrize(("kind", "good", "bad"), [
    ("positive_int", ["1", "20"], ["0", "-1", "a", "1.0"]),
    ("nonnegative_int", ["0", "5"], ["-1", "x"]),
    ("positive_float", ["1e-5", "2"], ["0", "-1", "nan", "inf", ""]),
    ("nonnegative_float", ["0", "0.5"], ["-0.1", "nan", "inf"]),
    ("fraction", ["0", "1", "0.3"], ["1.01", "-0.1", "nan"])])
def test_number_types(kind, good, bad):
    parse = getattr(flags, kind)
    assert [parse(t) for t in good] == [float(t) for t in good]
    assert isinstance(parse(good[0]), int if "int" in kind else float)
    for text in bad:
        with pytest.raises(flags.argparse.ArgumentTypeError, match="must be"):
            parse(text)


@pytest.mark.parametrize(("error", "status", "words"), [
    (VirtueError("a.jsonl, line 3:\nno"), 2, "error: a.jsonl, line 3: no\n"),
    (KeyboardInterrupt(), 130, "interrupted: a stage that was killed goes on with --resume\n"),
    (None, 0, "")])
def test_run_main(capsys, error, status, words):
    def main():
        if error is not None:
            raise error
    with pytest.raises(SystemExit) as caught:
        runtime.run_main(main)
    assert caught.value.code == status and capsys.readouterr().err == words


@pytest.mark.parametrize("full", [
    lambda: torch.empty(10**15), lambda: np.empty(10**15),
    lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
    lambda: (_ for _ in ()).throw(RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))])
def test_out_of_memory_says_what_to_lower(capsys, full):
    with pytest.raises(SystemExit) as caught:
        runtime.run_main(full)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: out of memory: of --batch-size, ")


def test_a_programming_error_keeps_its_traceback():
    for error in (ZeroDivisionError(), RuntimeError("CUDA error: device-side assert triggered")):
        with pytest.raises(type(error)):
            runtime.run_main(lambda error=error: (_ for _ in ()).throw(error))


def test_streams_are_keyed_by_name():
    a = randomness.stream(0, "ppo", 3, "ab", 1).random(4)
    randomness.stream(9).random(100)  # other draws in between change nothing
    np.testing.assert_array_equal(randomness.stream(0, "ppo", np.int64(3), "ab", 1).random(4), a)
    others = [(1, "ppo", 3, "ab", 1), (0, "sft", 3, "ab", 1), (0, "ppo", 3, "a", "b1"),
              (0, "ppo", "3", "ab", 1), (0, "ppo", 3, "ab"), (0, "ppo3", "ab", 1)]
    for key in others:
        assert not np.isin(randomness.stream(*key).random(4), a).any()
        assert randomness.torch_seed(*key) != randomness.torch_seed(0, "ppo", 3, "ab", 1)
    key = hashlib.sha256(b'[0, "ppo", 3, "ab", 1]').digest()[:16]  # the same on every machine
    philox = np.random.Philox(key=int.from_bytes(key, "little"))
    np.testing.assert_array_equal(np.random.Generator(philox).random(4), a)
    assert 0 <= randomness.torch_seed(1) < 2**63
    torch.Generator().manual_seed(randomness.torch_seed(1))


def test_metrics_log_appends_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = runtime.MetricsLog(path)
    log.write({"step": 1, "loss": torch.tensor(0.5), "x": np.float32(2)})
    log.write({"step": 2, "loss": float("nan"), "name": "é"})
    lines = path.read_text("utf-8").splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert rows == [{"step": 1, "loss": 0.5, "x": 2.0}, {"step": 2, "loss": None, "name": "é"}]


def test_a_prompt_is_held_out_with_all_its_rows():
    prompts = [f"p{i % 20}" for i in range(50)]
    held, train = randomness.hold_out(range(50), prompts, 0.15, 3, "sft")
    assert sorted(held + train) == list(range(50)) and len({prompts[i] for i in held}) == 3
    assert not {prompts[i] for i in held} & {prompts[i] for i in train}
    assert (held, train) == randomness.hold_out(range(50), prompts, 0.15, 3, "sft")
    assert held != randomness.hold_out(range(50), prompts, 0.15, 4, "sft")[0]
    # Too few: none
    assert randomness.hold_out([1, 2], "ab", 0.1, 0) in (([], [1, 2]), ([], [2, 1]))
    # with one row a prompt it is a plain permutation of the rows
    order = randomness.stream(3, "sft").permutation(20)
    assert randomness.hold_out(range(20), list(map(str, range(20))), 0.1, 3,
                            "sft") == ([*order[:2]], [*order[2:]])


def test_progress_yields_all_on_stderr(capsys):
    assert list(runtime.progress(iter([1, 2]), "Reading", total=2)) == [1, 2]
    out, err = capsys.readouterr()
    # a log file gets lines, a terminal a bar
    assert out == "" and "Reading" in err and "\r" not in err
    assert list(runtime.progress(iter([1, 2]), "Loading", total=2, leave=False)) == [1, 2]
    assert capsys.readouterr().err == ""  # nothing was slow


def test_progress_draws_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    list(runtime.progress(range(3), "Reading"))
    assert "\r" in sys.stderr.getvalue() and "3/3" in sys.stderr.getvalue()


def test_device():
    assert loading.pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert loading.pick_device("auto").type == "cpu"
        with pytest.raises(VirtueError, match="--device cpu"):
            loading.pick_device("cuda")


def test_importing_it_loads_no_torch():
    code = ("import sys, virtue.plumbing.runtime; sys.exit('torch' in sys.modules or 'tqdm' in "
            "sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_the_packages_one_line_says_where_they_are():
    hide = ("import importlib.util as u; find = u.find_spec; u.find_spec = lambda name, *a: None "
            "if name == 'torch' else find(name, *a); import virtue.plumbing.runtime")
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: torch: not installed for ")
    assert done.stderr.count("\n") == 1
    assert "source .venv/bin/activate" in done.stderr


@pytest.mark.parametrize("output", ["stdout", "stderr"])
def test_a_closed_pipe_ends_quietly(output, tmp_path):
    code = f"""import sys
from virtue.plumbing.runtime import run_main
def main():
    open({str(tmp_path / 'result')!r}, "w").write("whole")
    for _ in range(9999):
        print("x" * 99, file=sys.{output})
run_main(main)"""
    pipe = {"stdout": "|", "stderr": "2>&1 >/dev/null |"}[output]
    command = f'"$0" -c "$1" {pipe} head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command, sys.executable, code], capture_output=True,
                          text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (141, "x" * 99 + "\n", "")
    assert (tmp_path / "result").read_text() == "whole"
