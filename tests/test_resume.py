"""Resume: an interrupted loop ends with the same bytes; damage is noticed; SIGKILL."""
from __future__ import annotations

import argparse
import json
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from virtue import VirtueError
from virtue.plumbing.resume import (
    KEPT,
    finish,
    load_checkpoint,
    may_write,
    replay,
    save_checkpoint,
    spread,
    start,
)

ROOT = Path(__file__).resolve().parent.parent


class Loop:
    """A training loop on a quadratic whose target is keyed by the step; state in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "metrics.jsonl"
        self.weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.zeros(2, 2))]
        self.optimizer = torch.optim.Adam([{"params": self.weights[:1], "lr": 0.1},
                                           {"params": self.weights[1:], "lr": 0.03}])
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, 7)
        found = load_checkpoint(folder, self.weights, self.optimizer, self.schedule,
                                [self.log], ["total"])
        self.step, self.total = (found["step"], found["total"]) if found else (0, 0.0)

    def run(self, until: int, save_every: int = 2) -> None:
        while self.step < until:
            self.step += 1
            target = torch.randn(3, generator=torch.Generator().manual_seed(self.step))
            loss = (((self.weights[0] - target) ** 2).sum()
                    + ((self.weights[1] - self.step) ** 2).sum())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step(), self.schedule.step()
            self.total += loss.item()
            with open(self.log, "a") as file:
                file.write(json.dumps({"step": self.step, "loss": loss.item()}) + "\n")
            if self.step % save_every == 0:
                save_checkpoint(self.folder, self.step, self.weights, self.optimizer, self.schedule,
                                [self.log], total=self.total)

    def result(self):
        return (self.log.read_text(), self.total, [g["lr"] for g in self.optimizer.param_groups],
                [w.tolist() for w in self.weights])


def test_an_interrupted_loop_ends_as_if_it_had_not_been(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = Loop(tmp_path / "a")
    whole.run(7)
    # each start loses what came after the checkpoint, the first one all of it
    for until in (1, 3, 5, 6):
        loop = Loop(tmp_path / "b")
        assert loop.step == max(0, (until - 2) // 2 * 2) if until > 1 else loop.step == 0
        loop.run(until)
    last = Loop(tmp_path / "b")
    assert last.step == 6
    last.run(7)
    assert last.result() == whole.result()
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == KEPT


@pytest.mark.parametrize("harm", ["cut", "bit", "empty"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, harm):
    loop = Loop(tmp_path)
    loop.run(4)
    newest = sorted(tmp_path.glob("*.safetensors"))[-1]
    data = bytearray(newest.read_bytes())
    if harm == "bit":
        data[-1] ^= 1
    newest.write_bytes({"cut": data[: len(data) // 2], "bit": data, "empty": b""}[harm])
    again = Loop(tmp_path)
    err = capsys.readouterr().err
    assert again.step == 2 and "damaged" in err and newest.name in err
    again.run(7)
    (tmp_path / "whole").mkdir()
    whole = Loop(tmp_path / "whole")
    whole.run(7)
    assert again.result() == whole.result()


def test_without_a_sound_checkpoint_it_begins_anew(tmp_path):
    Loop(tmp_path).run(1)
    assert Loop(tmp_path).step == 0 and not (tmp_path / "metrics.jsonl").exists()
    Loop(tmp_path).run(3)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(VirtueError, match="metrics.jsonl: shorter"):
        Loop(tmp_path)


def test_a_checkpoint_without_the_numbers_of_this_code_is_refused(tmp_path):
    loop = Loop(tmp_path)
    loop.run(2)
    save_checkpoint(tmp_path, 4, loop.weights, loop.optimizer, loop.schedule, [loop.log], sum=1.0)
    with pytest.raises(VirtueError, match="00000004-.*another version of the code"):
        Loop(tmp_path)


def flags(out, **more):
    return argparse.Namespace(
        **{"out": out, "overwrite": False, "resume": False, "lr": 1e-3, "device": "cpu"} | more)


def test_start_goes_on_only_with_the_same_flags_and_files(tmp_path, capsys):
    out = tmp_path / "x"
    state = start(flags(out), out, data="abc")
    (state / "work").write_text("half")
    assert start(flags(out, resume=True, device="cuda"), out, data="abc") == state
    assert (state / "work").exists()
    with pytest.raises(VirtueError, match=r"--lr 0.001, which is now 0.01"):
        start(flags(out, resume=True, lr=1e-2), out, data="abc")
    with pytest.raises(VirtueError, match="the file behind data abc, which is now abd"):
        start(flags(out, resume=True), out, data="abd")
    with pytest.raises(VirtueError, match="not empty"):
        may_write(flags(out), out)
    with pytest.raises(VirtueError, match="give one of them"):
        may_write(flags(out, resume=True, overwrite=True), out)
    assert may_write(flags(out, resume=True), out) == out
    (state / "settings.json").write_text("{")
    with pytest.raises(VirtueError, match="settings.json: not JSON"):
        start(flags(out, resume=True), out)
    start(flags(out, overwrite=True), out)
    assert not (state / "work").exists()
    finish(out)
    assert not state.exists()
    capsys.readouterr()
    (out / "done.json").unlink()
    start(flags(out, resume=True), out, data="abc")
    assert "nothing to resume" in capsys.readouterr().out
    finish(out)
    (out / "virtue.json").write_text("{}")
    assert start(flags(out, resume=True), out, data="abc") is None
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(VirtueError, match="--lr"):
        start(flags(out, resume=True, lr=1.0), out, data="abc")
    # the data changed after it ended
    with pytest.raises(VirtueError, match="the file behind data abc, which is now abd"):
        start(flags(out, resume=True), out, data="abd")
    (out / "done.json").unlink()
    with pytest.raises(VirtueError, match="an artefact without done.json"):
        start(flags(out, resume=True), out, data="abc")
    assert (out / "virtue.json").exists()


def test_a_part_begun_anew_takes_no_later_part_for_finished(tmp_path, capsys):
    """run_rm.py --overwrite killed in its first lens: the other lenses' files are not its own."""
    first, second = tmp_path / "action", tmp_path / "motivation"
    for folder in (first, second):
        start(flags(tmp_path), folder)
        (folder / "virtue.json").write_text("{}")
        finish(folder)
    start(flags(tmp_path, overwrite=True), first, [second, tmp_path / "none yet"])
    again = flags(tmp_path, resume=True)
    for folder in (first, second):  # as a new process would
        assert may_write(again, folder) == folder
        assert start(again, folder, [second] if folder is first else []) == folder / "resume"
    assert "finished already" not in capsys.readouterr().out
    assert not (tmp_path / "none yet").exists()


def test_replay_computes_what_is_missing(tmp_path):
    path, calls = tmp_path / "kept.jsonl", []

    def square(x):
        calls.append(x)
        return [x * x, 0.1 * x]

    assert list(replay(path, [1, 2, 3], square)) == [[1, 0.1], [4, 0.2], [9, 3 * 0.1]]
    assert calls == [1, 2, 3]
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        calls.clear()
        assert list(replay(path, [1, 2, 3], square)) == [[1, 0.1], [4, 0.2], [9, 3 * 0.1]]
        assert calls == [1, 2, 3][whole[:cut].count(b"\n"):] and path.read_bytes() == whole
    path.write_bytes(b'[1, 0.1]\nnot json\n[9, 9]\n')
    assert list(replay(path, [1, 2, 3], square))[1:] == [[4, 0.2], [9, 3 * 0.1]]
    assert path.read_bytes() == whole
    assert list(replay(None, [3], square)) == [[9, 3 * 0.1]]


def test_spread_keeps_each_batch_and_shows_a_bar(tmp_path, capsys):
    computed = []

    def double(batch):
        computed.append(batch)
        return [2 * x for x in batch]
    batches = [[1, 2], [3]]
    for _ in range(2):
        assert spread("Doubling", tmp_path / "kept.jsonl")(double, batches) == [[2, 4], [6]]
        assert "Doubling" in capsys.readouterr().err
    assert computed == batches  # the second time all was there
    assert spread()(double, batches) == [[2, 4], [6]] and computed == batches * 2



def test_stages_survive_sigkill():
    """One kill in each of five stages; `python tests/kill.py` does a hundred."""
    seed = random.SystemRandom().randrange(10**6)
    result = subprocess.run([sys.executable, ROOT / "tests/kill.py", "--small", "--kills", "5",
                             "--stages", "revisions", "sft", "preferences", "rm", "ppo",
                             "--seed", str(seed)],
                            capture_output=True, text=True, cwd=ROOT)
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert f"seed {seed}: 5 kills, nothing lost, nothing twice" in result.stdout, said


def test_a_stage_survives_a_kill_at_each_change_of_the_disk():
    result = subprocess.run([sys.executable, ROOT / "tests/kill.py", "--small", "--each",
                             "--stages", "sft"],
                            capture_output=True, text=True, cwd=ROOT)
    kills = re.search(r"each change of the disk: (\d+) kills, nothing lost, nothing twice",
                      result.stdout)
    assert result.returncode == 0 and int(kills[1]) >= 10, result.stdout + result.stderr


def test_a_finished_stage_is_left_alone_and_another_command_refused(tmp_path):
    sys.path.insert(0, str(ROOT))
    import run_data
    command = ["revisions", "--limit", "8", "--max-new-tokens", "48", "--out", str(tmp_path / "r")]
    run_data.main(command)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "r").iterdir()}
    run_data.main([*command, "--resume"])
    assert before == {p.name: (p.read_bytes(), p.stat().st_mtime_ns)
                      for p in (tmp_path / "r").iterdir()}
    with pytest.raises(VirtueError, match="--limit 8, which is now 9"):
        run_data.main(["revisions", "--limit", "9", "--max-new-tokens", "48",
                       "--out", str(tmp_path / "r"), "--resume"])


LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
from virtue.plumbing.runtime import run_main
import run_sft
sys.argv = ["run_sft.py", *{flags!r}]
for limit in {limits!r}:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        run_main(run_sft.main)
    except SystemExit as stop:
        print(f"status {{stop.code}}", file=sys.stderr)
"""


def test_a_full_disk_and_a_changed_source_leave_the_state_whole(tmp_path):
    """A limit on the size of files is a full disk; when it is lifted, --resume ends the same."""
    sys.path.insert(0, str(ROOT))
    import run_data
    import run_sft
    data, out = tmp_path / "r", tmp_path / "s"
    run_data.main(["revisions", "--limit", "16", "--max-new-tokens", "48", "--out", str(data)])
    flags = ["--data", str(data), "--epochs", "2", "--batch-size", "4", "--rank", "4",
             "--save-every", "1", "--out", str(out)]
    limits = [200_000, 50]  # no checkpoint fits; not even the metrics do
    script = LIMITED.format(root=str(ROOT), limits=limits, flags=[*flags, "--resume"])
    result = subprocess.run([sys.executable, "-c", script], capture_output=True,
                            text=True, cwd=ROOT)
    said = [line for line in result.stderr.splitlines() if line.startswith(("error:", "status"))]
    assert said[1::2] == ["status 2"] * 2 and len(said) == 4, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    assert said[0].startswith(f"error: {out}/resume/00000001-"), said
    assert said[2].startswith(f"error: {out}/metrics.jsonl"), said
    assert all("make room" in line for line in said[::2]), said
    assert not (out / "virtue.json").exists()
    source = data / "revisions.jsonl"
    kept = source.read_bytes()
    source.write_bytes(b"".join(kept.splitlines(keepends=True)[:-1]))
    with pytest.raises(VirtueError, match="changed since run_data.py revisions wrote them"):
        run_sft.main([*flags, "--resume"])
    source.write_bytes(kept)
    run_sft.main([*flags, "--resume"])
    run_sft.main([*flags[:-2], "--out", str(tmp_path / "t")])
    assert ((out / "adapter_model.safetensors").read_bytes()
            == (tmp_path / "t/adapter_model.safetensors").read_bytes())
    resumed, whole = ([{k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
                       for line in (folder / "metrics.jsonl").read_text().splitlines()]
                      for folder in (out, tmp_path / "t"))
    assert resumed == whole


def test_a_folder_that_cannot_be_written_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv",
                        ["run_data.py", "revisions", "--limit", "2", "--out", "/proc/nowhere"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "run_data.py"), run_name="__main__")
    assert stop.value.code == 2 and "error: /proc/nowhere" in capsys.readouterr().err


def test_another_sft_adapter_or_other_prompts_are_refused(tmp_path):
    from virtue.plumbing.artefacts import prompts_hash
    sft, prompts = tmp_path / "sft", tmp_path / "p.jsonl"
    sft.mkdir()
    (sft / "adapter_model.safetensors").write_bytes(b"one")
    prompts.write_text('{"prompt": "x"}\n')
    start(flags(tmp_path / "x", sft=sft), tmp_path / "x", prompts=prompts_hash(str(prompts)))
    start(flags(tmp_path / "x", sft=sft, resume=True), tmp_path / "x",
          prompts=prompts_hash(str(prompts)))
    (sft / "adapter_model.safetensors").write_bytes(b"two")
    with pytest.raises(VirtueError, match="the file behind sft"):
        start(flags(tmp_path / "x", sft=sft, resume=True), tmp_path / "x",
              prompts=prompts_hash(str(prompts)))
    (sft / "adapter_model.safetensors").write_bytes(b"one")
    prompts.write_text('{"prompt": "y"}\n')
    with pytest.raises(VirtueError, match="the file behind prompts"):
        start(flags(tmp_path / "x", sft=sft, resume=True), tmp_path / "x",
              prompts=prompts_hash(str(prompts)))
    assert prompts_hash("toy") is None
