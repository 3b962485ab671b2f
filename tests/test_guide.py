"""The guide: its examples run, its functions exist, its diffs change what they say."""
from __future__ import annotations

import ast
import doctest
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs/guide.md"
DIFFS = sorted((ROOT / "docs/examples").glob("*.diff"))
NAMED = re.compile(r"`([\w/]+\.py): ([\w., ]+)`")  # `lora.py: add_adapter, flatten`


def test_the_examples_run():
    found = doctest.testfile(str(GUIDE), module_relative=False, encoding="utf-8",
                             optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 60 and not found.failed


def definitions(path: Path) -> set[str]:
    """Functions, classes and methods (Class.method) of a file."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}"
                      for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_every_function_that_it_names_exists():
    text = GUIDE.read_text(encoding="utf-8")
    named = [(file, name.strip()) for file, names in NAMED.findall(text)
             for name in names.split(",")]
    assert len(named) > 30
    for file, name in named:
        path = next((p for p in (ROOT / "virtue" / file, ROOT / file) if p.is_file()), None)
        assert path and name in definitions(path), f"{file}: {name}"


def test_its_files_and_pictures_are_there():
    text = GUIDE.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (GUIDE.parent / target).exists(), target
    assert all(f"docs/examples/{diff.name}" in text for diff in DIFFS) and len(DIFFS) == 5
    assert all(picture.stat().st_size < 60_000 for picture in GUIDE.parent.glob("*.svg"))


# ---- the worked examples


@pytest.fixture(scope="module", autouse=True)
def without_pictures():
    """Without matplotlib, in the patched trees too: no curves are drawn at each iteration."""
    find = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec",
                      lambda name, *package: None if name == "matplotlib" else find(name, *package))
        yield


def changed(diff: Path) -> list[str]:
    return [line for line in diff.read_text(encoding="utf-8").splitlines() if line[:1] in ("+", "-")
            and line[:3] not in ("+++", "---")]


@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: diff.stem)
def test_at_most_26_lines(diff):
    assert 0 < len(changed(diff)) <= 26


def test_the_guide_quotes_them_as_they_are():
    lines = [line for diff in DIFFS for line in changed(diff)]
    quoted = re.findall(r"^    ([-+] .*?)(?: \.\.\.)?$", GUIDE.read_text(encoding="utf-8"), re.M)
    assert len(quoted) > 6
    assert all(any(line.startswith(quote) for line in lines) for quote in quoted)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what git tracks, outside of any repository."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others",
                             "--exclude-standard"],
                            capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    copy = tmp_path_factory.mktemp("tree")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@contextmanager
def patched(tree: Path, name: str):
    """The tree with a diff applied, and its modules in the place of ours."""
    def apply(*flags: str) -> None:
        done = subprocess.run(["git", "apply", *flags, str(ROOT / "docs/examples" / name)],
                              cwd=tree, capture_output=True, text=True,
                              env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)})
        assert not done.returncode, done.stderr

    def take_ours_out() -> dict:
        return {name: sys.modules.pop(name) for name in list(sys.modules)
                if name.partition(".")[0] == "virtue" or name.startswith("run_")}
    apply()
    # two versions of a file may have one mtime
    ours, bytecode, sys.dont_write_bytecode = take_ours_out(), sys.dont_write_bytecode, True
    sys.path.insert(0, str(tree))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(tree))
        take_ours_out()
        sys.modules.update(ours)
        sys.dont_write_bytecode = bytecode
        apply("--reverse")


def call(script: str, *flags, **constants) -> list[dict]:
    """Runs a script, with other constants if some are given, and returns its metrics."""
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(module, name, value)
        module.main([str(f) for f in flags])
    log = Path(flags[flags.index("--out") + 1]) / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out, small = tmp_path_factory.mktemp("demo"), ("--rank", 4, "--epochs", 1)
    call("run_data", "revisions", "--out", out / "revisions", "--limit", 16)
    call("run_sft", "--data", out / "revisions", "--out", out / "sft", *small)
    call("run_data", "preferences", "--sft", out / "sft", "--out", out / "preferences",
         "--limit", 8, "--any-judge")
    call("run_rm", "--data", out / "preferences", "--out", out / "rm", *small)
    return out


PPO = ("--iterations", 1, "--value-warmup", 0, "--rollout-size", 8, "--minibatch-size", 4,
       "--rank", 4, "--limit", 8, "--lr", 0.01)


def rollouts(out: Path) -> list[dict]:
    return [json.loads(line)
            for line in (out / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def plain(demo):
    """One iteration of PPO, unpatched: the policy is the reference, so there is no KL penalty."""
    return call("run_ppo", "--rm", demo / "rm", "--out", demo / "plain", *PPO)[0]


def test_asymmetric_clip(demo, tree, plain):
    def loss(A):
        from virtue.ppo import policy_loss  # whichever is on the path
        zero = torch.zeros(1, 3)
        return policy_loss(torch.tensor([[0.75, 1.25, 1.3]]).log(), zero, zero + A,
                           zero == 0, 0.2)[1]
    assert loss(1.0)["policy/clip_frac"].item() == pytest.approx(2 / 3)
    assert loss(-1.0)["policy/clip_frac"].item() == pytest.approx(1 / 3)
    with patched(tree, "asymmetric-clip.diff"):
        assert loss(1.0)["policy/clip_frac"].item() == pytest.approx(1 / 3)
        assert loss(-1.0)["policy/clip_frac"].item() == pytest.approx(1 / 3)
        found = call("run_ppo", "--rm", demo / "rm", "--out", demo / "clip", *PPO)[0]
    assert plain["policy/clip_frac"] > found["policy/clip_frac"] > 0  # less is clipped
    assert found["objective/score"] == plain["objective/score"]  # of the same dialogues


def test_kl_in_loss(demo, tree, plain):
    strong = ("--kl-coef", 3.0)
    with patched(tree, "kl-in-loss.diff"):
        found = call("run_ppo", "--rm", demo / "rm", "--out", demo / "kl", *PPO, *strong)[0]
        none = call("run_ppo", "--rm", demo / "rm", "--out", demo / "kl0", *PPO,
                    "--kl-coef", 0.0)[0]
    assert "policy/ref_kl" not in plain and found["policy/ref_kl"] > 0
    # the loss holds the policy back within the first iteration
    assert found["policy/ref_kl"] < 0.8 * none["policy/ref_kl"]
    # and 0 is the unpatched code, whose penalty is 0 there
    assert none["policy/loss"] == pytest.approx(plain["policy/loss"], abs=1e-6)


def test_shared_trunk(demo, tree, plain):
    def adapter(out, vf_coef):
        found = call("run_ppo", "--rm", demo / "rm", "--out", demo / out, *PPO,
                     VF_COEF=vf_coef)[0]
        return found, (demo / out / "adapter_model.safetensors").read_bytes()
    # the value loss leaves the policy alone
    assert adapter("apart", 5.0)[1] == (demo / "plain/adapter_model.safetensors").read_bytes()
    with patched(tree, "shared-trunk.diff"):
        (weak, without), (strong, with_it) = adapter("shared-0", 0.0), adapter("shared-5", 5.0)
    # here it does not
    assert without == (demo / "plain/adapter_model.safetensors").read_bytes() != with_it
    assert strong["policy/grad_norm"] > weak["policy/grad_norm"]
    assert strong["value/grad_norm"] > 0 == weak["value/grad_norm"]
    with patched(tree, "shared-trunk.diff"):  # what is saved as the value function is what it was
        call("run_ppo", "--rm", demo / "rm", "--out", demo / "shared-5", *PPO, "--resume",
             VF_COEF=5.0)
    # it holds the policy and the head
    assert (demo / "shared-5/value/adapter_model.safetensors").stat().st_size > len(with_it)


def test_rloo(demo, tree, plain):
    seen = []
    with patched(tree, "rloo.diff"):
        masked = importlib.import_module("virtue.masked")
        whiten = masked.whiten
        masked.whiten = lambda x, mask: seen.append((x, mask)) or whiten(x, mask)
        found = call("run_ppo", "--rm", demo / "rm", "--out", demo / "rloo", *PPO,
                     "--eos-penalty", 0)[0]
    assert Counter(Counter(r["id"] for r in rollouts(demo / "plain")).values()) == {1: 8}
    ours = rollouts(demo / "rloo")
    assert Counter(Counter(r["id"] for r in ours).values()) == {4: 2}
    assert len({json.dumps(r["turns"]) for r in ours}) > 2
    (advantages, mask), = seen
    totals = torch.tensor([sum(r["scores"]) / 3 for r in ours])  # there is no KL yet
    first = torch.tensor([row[m][0].item() for row, m in zip(advantages, mask)])
    # all tokens of a dialogue have one number
    assert torch.equal(advantages, first[:, None] * mask) and first.abs().max() > 0
    for i, r in enumerate(ours):
        others = [j for j, other in enumerate(ours) if other["id"] == r["id"] and j != i]
        assert first[i].item() == pytest.approx((totals[i] - totals[others].mean()).item(),
                                                abs=1e-4)
    assert plain["value/loss"] > 0 and plain["value/grad_norm"] > 0
    assert found["value/loss"] == found["value/grad_norm"] == 0 < found["policy/grad_norm"]


def test_dpo(demo, tree):
    flags = ("--data", demo / "preferences", "--rank", 4, "--lr", 4e-3, "--epochs", 2,
             "--held-out", 0.2)
    with patched(tree, "dpo.diff"):
        found = call("run_sft", *flags, "--out", demo / "dpo")
        again = call("run_sft", "--data", demo / "revisions", "--rank", 4, "--epochs", 1,
                     "--out", demo / "sft-again")
    even = pytest.approx(math.log(2), abs=1e-5)  # at first the policy is the reference
    assert found[0]["loss/held_out"] == even == found[1]["loss/train"]
    # then it learns
    assert min(m["loss/train"] for m in found if "loss/train" in m) < math.log(2) - 0.005
    unpatched = map(json.loads, (demo / "sft/metrics.jsonl").read_text().splitlines())
    for ours, before in zip(again, unpatched, strict=True):  # SFT on revisions is left alone
        before["time/seconds"] = ours.get("time/seconds")
        assert ours == pytest.approx({k: v for k, v in before.items() if v is not None}, abs=1e-4)
    manifest = json.loads((demo / "dpo/virtue.json").read_text())
    assert manifest["stage"] == "policy" and set(manifest["parents"]) == {"sft"}
    call("run_eval", "models", "--policy", demo / "dpo", "--rm", demo / "rm",
         "--out", demo / "report", "--limit", 2, "--judge-limit", 2)
    assert json.loads((demo / "report/scores.json").read_text())["models"]["ppo"]["kl"] != 0
