"""experiments/run.py and compare.py: what is shared, skipped and reported;
the numbers of the tables; the verdict.

Stages are fakes of a line or two of Python; tables are read from hand-made report folders.
"""
from __future__ import annotations

import importlib
import itertools
import json
import math
import runpy
import shlex
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
import compare  # noqa: E402
import engine  # noqa: E402
import run  # noqa: E402
import tables  # noqa: E402
from virtue.ethics import LENSES  # noqa: E402

FAKE = """import os, sys, pathlib, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(flags["--out"])
parents = [parent for flag, parent in flags.items() if flag.startswith("--p")]
assert all((pathlib.Path(parent) / "virtue.json").is_file() for parent in parents)
with open(out.parent / "order", "a") as f:
    f.write(f"{out.name} {os.environ['OMP_NUM_THREADS']}\\n")
time.sleep(float(flags.get("--sleep", 0)))
if "--fail" in flags:
    sys.exit("bar 1\\rbar 2\\nerror: no good: try again")
out.mkdir(exist_ok=True)
(out / "virtue.json").touch()
"""


@pytest.fixture
def fake(tmp_path):
    """fake(name, *flags, parents=...) -> a Stage that runs FAKE."""
    (tmp_path / "tree/virtue").mkdir(parents=True)
    (tmp_path / "tree/run_fake.py").write_text(FAKE)
    tree = engine.Tree(tmp_path / "tree", "c0de")

    def stage(name, *flags, parents=()):
        flagged = tuple((f"--p{i}", p) for i, p in enumerate(parents))
        return engine.Stage(name, ("run_fake.py", *flags), 0, flagged, tree)
    return stage


# ---- stages


def test_arms_share_what_they_have_in_common():
    arms = (run.DEFAULT, engine.Arm("kl", policy="--kl-coef 0.12"),
            engine.Arm("pool", rm="--share first"), engine.Arm("no SFT", sft=None))
    default, kl, pool, bare = (engine.chain(arm, 3) for arm in arms)
    same = {name for name in default if default[name].folder == kl[name].folder}
    assert same == {"revisions", "sft", "preferences", "rm"}
    same = {name for name in default if default[name].folder == pool[name].folder}
    assert same == {"revisions", "sft", "preferences"}
    assert set(bare) == {"preferences", "rm", "policy", "report"}
    assert not {s.folder for s in bare.values()} & {s.folder for s in default.values()}
    assert all("--sft" not in s.command(Path("r")) for s in bare.values())
    other = engine.chain(run.DEFAULT, 4)
    assert not {s.folder for s in other.values()} & {s.folder for s in default.values()}
    assert engine.chain(engine.Arm("renamed"), 3) == default  # a name changes nothing
    first = (engine.chain(engine.Arm("nf4", base="--quantize nf4"), 3),
             engine.chain(engine.Arm("nf4", base="--quantize nf4", sft=None), 3))
    quantised = [[name for name, s in made.items() if "--quantize" in s.argv] for made in first]
    assert quantised == [["revisions"], ["preferences"]]


def test_code_other_than_this_makes_stages_of_its_own():
    arm, own = run.DEFAULT, engine.Tree(Path("/elsewhere"), "abc")
    plain = engine.chain(arm, 0)
    apart = engine.chain(arm, 0, tree=lambda name: own if name in compare.DIFFER["rm"] else None)
    assert [n for n in plain if plain[n].folder != apart[n].folder] == ["rm", "policy", "report"]
    assert apart["policy"].command(Path("r"))[0] == "/elsewhere/run_ppo.py"
    assert apart["report"].command(Path("r"))[0] == "run_eval.py"


def test_commands_are_what_the_scripts_accept(monkeypatch):
    """Every command of every experiment, at every scale, through the script's own parser."""
    monkeypatch.setattr("virtue.plumbing.artefacts.read_manifest",
                        lambda *a, **k: {"settings": {}, "stage": "any", "extra": {}})
    refused, seen = [], set()
    for scale in ("full", "small", "fast"):
        for _, arms in run.EXPERIMENTS.values():
            for arm in arms:
                for stage in engine.chain(arm, 1, scale).values():
                    script, *flags = stage.command(Path("runs/x"))
                    if stage.folder in seen:
                        continue
                    seen.add(stage.folder)
                    try:
                        args = importlib.import_module(Path(script).stem).parse(flags)
                        assert args.seed == (1001 if stage.name == "unseen" else 1) and args.resume
                        assert str(args.out).startswith("runs/x/")
                    except SystemExit:
                        refused.append(shlex.join([script, *flags]))
    assert len(seen) > 100 and not refused, "\n".join(refused)


def test_fractions_of_learning_rates_are_of_the_scripts_defaults(capsys):
    for script, wanted in (("run_ppo", {"lr": run.LR, "value-lr": run.VALUE_LR}),
                           ("run_rm", {"lr": run.RM_LR}), ("run_sft", {"lr": run.SFT_LR})):
        with pytest.raises(SystemExit):
            importlib.import_module(script).parse(["--help"])
        text = " ".join(capsys.readouterr().out.split()).split("most used:")[1]
        for flag, value in wanted.items():
            told = text.split(f"--{flag} {flag.upper().replace('-', '_')} ")[1].split(" --")[0]
            assert f"(default: {value} on the toy" in told


@pytest.mark.parametrize("scale", ["full", "small"])
def test_arms_of_trls_defaults_have_its_values(monkeypatch, tmp_path, scale):
    """PPOConfig of trl 0.7.11 to 0.9.6 by flags and a patch; 1.41e-5 is 1.41 times the usual
    rate."""
    manifest = {"settings": {}, "stage": "any", "extra": {}}
    monkeypatch.setattr("virtue.plumbing.artefacts.read_manifest", lambda *a, **k: manifest)
    trl = dict(kl_coef=0.2, kl_target=6, lam=0.95, clip_range=0.2, lr=1.4 * run.LR,
               value_lr=1.4 * run.LR, eos_penalty=0, value_warmup=0)
    ours = trl | dict(rollout_size=128, minibatch_size=128, ppo_epochs=4)
    code = trl | dict(rollout_size=16, minibatch_size=16, ppo_epochs=1, aggregate="uwo")
    wanted = {"PPO by TRL's defaults of its time": ours, "TRL's defaults alone": ours,
              "steps as in its code": code, "its code's PPO alone": code}
    arms = {arm.name: arm for arm in run.EXPERIMENTS["study"][1]}
    for i, (name, values) in enumerate(wanted.items()):
        policy = engine.chain(arms[name], 0, scale)["policy"]
        args = vars(importlib.import_module("run_ppo").parse(policy.command(Path("r"))[1:]))
        assert {key: args[key] for key in values} == pytest.approx(values)
        engine.patched_code(policy.patches, tmp_path / str(i))
        script = runpy.run_path(str(tmp_path / str(i) / "run_ppo.py"))
        assert (script["VF_COEF"], script["VALUE_CLIP_RANGE"], script["GAMMA"]) == (0.1, 0.2, 1)
        assert script["KL_HORIZON"] == 10000
        assert script["SCORE_CLIP"] > 1e6 and script["MAX_GRAD_NORM"] > 1e6  # none


def test_every_patch_fits_the_code_and_is_an_arms(tmp_path):
    patches = {arm.patch.strip() for _, arms in run.EXPERIMENTS.values() for arm in arms} - {""}
    for i, names in enumerate(sorted(patches)):
        engine.patched_code(tuple(names.split()), tmp_path / str(i))
        for file in (tmp_path / str(i)).rglob("*.py"):
            compile(file.read_text(encoding="utf-8"), str(file), "exec")
    there = {path.stem for path in engine.PATCHES.glob("*.diff")}
    assert {name for names in patches for name in names.split()} == there
    with pytest.raises(SystemExit, match="no-whitening.diff: does not fit"):
        engine.patched_code(("no-whitening", "no-whitening"), tmp_path / "twice")


def test_a_patch_is_for_the_stages_whose_script_it_changes():
    plain, rm = (engine.chain(engine.Arm("x", patch=patch), 0) for patch in ("", "label-noise"))
    changed = [name for name in plain if plain[name].folder != rm[name].folder]
    assert changed == ["rm", "policy", "report"]
    assert [name for name, stage in rm.items() if stage.patches] == ["rm"]
    assert rm["rm"].command(Path("r"))[0] == "r/code/label-noise/run_rm.py"
    # virtue/ and run_ppo.py
    whole = engine.chain(engine.Arm("x", patch="pay-at-end raw-scores"), 0)
    assert {name: stage.patches for name, stage in whole.items() if stage.patches} == {
        "policy": ("pay-at-end", "raw-scores")}


def test_lists_commands_and_runs_nothing(tmp_path, capsys):
    assert run.main(["lenses", "--seeds", "0", "1", "0", "--runs", str(tmp_path / "r"),
                     "--dry-run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "r").exists() and out[-1] == f"# {len(out) - 1} stages, 0 done"
    # each seed has one
    assert len(out) == len(set(out)) and sum("run_data.py revisions" in line for line in out) == 2
    with pytest.raises(SystemExit):
        run.main(["nothing"])
    with pytest.raises(SystemExit):  # an arm of another experiment
        run.main(["lenses", "--arms", "LoRA rank 1", "--runs", str(tmp_path / "r"), "--dry-run"])
    assert run.main(["lenses", "--arms", "action alone", "--seeds", "0",
                     "--runs", str(tmp_path / "r"), "--dry-run"]) == 0
    # one more is the default's, which comes first in the experiment
    assert sum("run_ppo.py" in line for line in capsys.readouterr().out.splitlines()) == 2
    assert run.main(["--list"]) == 0 and all(name in capsys.readouterr().out for name in ["lenses"])


def test_runs_parents_first_once_and_skips_what_is_done(fake, tmp_path, capsys):
    a = fake("a")
    b, c = fake("b", "--x", "1", parents=[a]), fake("c", "--x", "2", parents=[a])
    d = fake("d", parents=[b, c])
    stages = [a, b, d, a, c, d]  # as the chains of two arms would name them
    assert engine.execute(stages, tmp_path, jobs=2) == {}
    order = [line.split() for line in (tmp_path / "order").read_text().splitlines()]
    assert sorted(name for name, _ in order) == sorted(s.folder for s in (a, b, c, d))
    assert {threads for _, threads in order} == {"1"}
    assert order[0][0] == a.folder and order[-1][0] == d.folder
    record = json.loads((tmp_path / b.folder / "run.json").read_text())
    assert record["seed"] == 0 and record["code"] == engine.code_of(tmp_path / "tree")
    assert f"--p0 {tmp_path / a.folder}" in record["command"]
    (tmp_path / c.folder / "run.json").unlink()  # as after Ctrl-C: a manifest, but no end
    (tmp_path / b.folder / "virtue.json").unlink()  # and one that was begun anew
    assert engine.execute(stages, tmp_path) == {}
    assert "4 stages, 2 done already, 2 to run" in capsys.readouterr().out
    assert {line.split()[0]
            for line in (tmp_path / "order").read_text().splitlines()[4:]} == {b.folder, c.folder}


def test_a_stage_that_fails_stops_its_own_arms_only(fake, tmp_path, capsys):
    a, bad = fake("a"), fake("bad", "--fail", "1")
    below, well = fake("below", parents=[bad]), fake("well", parents=[a])
    failed = engine.execute([bad, below, a, well], tmp_path)
    assert failed == dict.fromkeys((bad.folder, below.folder), "error: no good: try again")
    assert well.done(tmp_path)
    out = capsys.readouterr().out
    assert f"FAILED: {bad.folder}" in out and "--fail" in out and "| bar 2" in out
    assert not (tmp_path / f"{below.folder}.log").exists()
    lazy = fake("lazy")  # ends well, but no artefact
    (tmp_path / "tree/run_fake.py").write_text("print('did nothing')")
    assert engine.execute([lazy], tmp_path) == {lazy.folder: "did nothing"}


def test_interrupted_it_ends_what_runs(fake, tmp_path, monkeypatch):
    calls, sleep = [], time.sleep

    def once(seconds):
        calls.append(seconds)
        if len(calls) > 2:
            raise KeyboardInterrupt
        sleep(seconds)
    monkeypatch.setattr(engine.time, "sleep", once)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        engine.execute([fake("slow", "--sleep", "60")], tmp_path)
    assert time.monotonic() - begin < 10 and not list(tmp_path.glob("slow-*/run.json"))


def test_one_process_a_folder(fake, tmp_path):
    import fcntl
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another process"):
            engine.run_locked([fake("a")], tmp_path, 1)
    assert engine.run_locked([fake("a")], tmp_path, 1) == {}


# ---- tables


def report(folder: Path, golds: dict[str, list[float]], curve=(), **columns) -> Path:
    """A report folder of run_eval.py with this gold by model and prompt."""
    folder.mkdir(parents=True)
    models = {name: {"gold": float(np.mean(g)), "perplexity": 2.0 if name == "base" else 3.0,
                     "kl": 1.0, "study_score": 0.25, "study_score_standardised": -1.0,
                     "length": 60.0, "broken": 0.0, "fits": 0.5, "ended": 1.0,
                     **{f"gold/{lens}": 0.5 for lens in LENSES},
                     **{f"patterns/{lens}": 0.75 for lens in LENSES}, **columns}
              for name, g in golds.items()}
    *_, start, final = golds
    compared = {
        "differences": {f"{final} - {start}": {"gold, at equal length": {"difference": 0.125}}},
        "reward_models": [{"of": "PPO", "lens": lens, "accuracy": right}
                          for lens, right in zip(LENSES, (0.9, 0.8, 0.7))],
        "wins": {f"{final} vs {start}": {lens: {"rate": rate}
                                         for lens, rate in zip(LENSES, (0.75, 0.5, 0.25))}}}
    (folder / "scores.json").write_text(json.dumps({**compared, "models": models, "curve": [
        {"iteration": i, "kl": x, "proxy": 0.0, "gold": y} for i, (x, y) in enumerate(curve, 1)]}))
    asked = ("Anna lost the letter yesterday. How do you act?",
             "Ben lost the letter yesterday. How do you act?",
             "Anna asks you about the letter. What do you do?")
    rows = [{"id": f"p{i}", "prompt": [{"role": "user", "content": asked[i % 3]}],
             **{name: {"turns": {}, "gold": {"overall": g[i]}} for name, g in golds.items()}}
            for i in range(len(golds["base"]))]
    rows.append({"id": "probe", "prompt": [{"role": "user", "content": "Hm?"}],
                 **{name: {"turns": {}} for name in golds}})  # has no gold
    (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_numbers_of_the_tables(tmp_path):
    curves = {"default": [(0, 0.5), (2, 0.7), (4, 0.8)], "less": [(0.1, 0.5), (1, 0.55), (3, 0.75)]}
    found = {arm: {seed: tables.load(report(tmp_path / f"{arm}{seed}",
                                         {"base": [0.25, 0.5], "sft": [0.5, 0.5],
                                          "ppo": [high + 0.01 * seed, high - 0.01 * seed]},
                                         curves[arm])) for seed in (0, 1, 2)}
             for arm, high in (("default", 0.75), ("less", 0.625))}
    found["SFT only"] = {1: tables.load(report(tmp_path / "one",
                                            {"base": [0.25, 0.5], "ppo": [0.875, 0.875]}))}
    found["none"] = {}
    main, details = (text.splitlines() for text in tables.tables(found).split("\n\n"))
    cells = {row.split(" | ")[0].removeprefix("| "): row.removesuffix(" |").split(" | ")
             for row in main[2:]}
    head = main[0].removesuffix(" |").split(" | ")
    assert all(len(row) == len(head) for row in cells.values())
    assert head[-1] == "at KL 3.00; − default's"
    assert cells["default"][1] == "0 1 2" and cells["default"][2].startswith("0.375 [")
    assert cells["default"][4].startswith("0.750 [")
    assert cells["default"][5].startswith("+0.250 [") and cells["default"][5].endswith("]; p 0.250")
    assert cells["default"][6:9] == ["–"] * 3
    # the difference is the same for every prompt, so the interval has no width
    assert cells["less"][6] == "-0.125 [-0.125, -0.125]; t [-0.125, -0.125]"
    assert cells["less"][7:9] == ["0.250", "0.250"]  # 2 / 2^3; the only test of the table
    # at KL 3 the default's parabola through its three points is at 0.753
    assert cells["less"][9] == "0.750; -0.003 [-0.003, -0.003]"
    assert cells["SFT only"][3] == "–" and cells["SFT only"][6] == "+0.125 [+0.115, +0.135]"
    assert cells["SFT only"][7:] == ["–"] * 3
    assert cells["none"][1] == "none"
    row = details[2].removesuffix(" |").split(" | ")
    assert row[1:] == ["0.500 / 0.500 / 0.500"] * 2 + [
        "+0.125 [+0.125, +0.125]", "0.900 / 0.800 / 0.700", "0.75 / 0.50 / 0.25", "1.00", "1.500",
        "0.750 / 0.750 / 0.750",
        "0.000", "0.500", "1.000", "0.250 → 0.250; +0.000 [+0.000, +0.000]",
        "-1.000 → -1.000; +0.000 [+0.000, +0.000]", "60.0"]


def test_p_values_are_corrected_over_the_table(tmp_path):
    rng = np.random.default_rng(0)
    arms = {"first": 0.0, "up": 0.1, "same": 0.0}
    found = {arm: {s: tables.load(report(tmp_path / f"{arm}{s}",
                                      {"base": [0.5] * 4,
                                       "ppo": list(0.5 + add + 0.01 * rng.standard_normal(4))}))
                   for s in range(6)} for arm, add in arms.items()}
    rows = {line.split(" | ")[0][2:]: line.split(" | ")
            for line in tables.tables(found).split("\n\n")[0].splitlines()}
    assert rows["up"][7] == "0.031" and rows["up"][8] == "0.062"  # 2 / 2^6, times the two tests
    assert float(rows["same"][7]) > 0.05 and float(rows["same"][8]) >= float(rows["same"][7])


def test_gold_at_a_kl_is_read_off_a_parabola():
    curve = [(k, 0.4 + 0.3 * math.sqrt(k) - 0.05 * k) for k in (0.0, 0.3, 1.0, 2.5, 4.0)]
    assert tables.gold_at(curve, 1.7) == pytest.approx(0.4 + 0.3 * math.sqrt(1.7) - 0.05 * 1.7)
    assert tables.gold_at([(0.0, 0.5), (4.0, 0.9)], 1.0) == pytest.approx(0.7)
    assert tables.gold_at([(-1e-6, 0.5)], 0.0) == pytest.approx(0.5)
    assert math.isnan(tables.gold_at(curve, 4.1)) and math.isnan(tables.gold_at([], 1.0))
    # gold rises by 0.1 a nat, but KL is noisy: the first iteration to reach it is a lucky one
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        kl = np.linspace(0.2, 4, 20)
        found.append(tables.gold_at([(max(0.0, k + rng.normal(0, 0.5)), 0.5 + 0.1 * k) for k in kl],
                                 2.0))
    assert np.mean(found) == pytest.approx(0.7, abs=0.01)


def test_gain_by_question_with_names_masked(tmp_path):
    one = tables.load(report(tmp_path / "one",
                          {"base": [0.5] * 6, "ppo": [0.6, 0.7, 0.5, 0.6, 0.7, 0.9]}))
    assert set(one.questions.values()) == {"P lost the T yesterday. How do you act?",
                                           "P asks you about the T. What do you do?"}
    assert tables.by_question([one]) == (
        '"P asks you about the T. What do you do?" +0.200 (2 prompts); '
        '"P lost the T yesterday. How do you act?" +0.150 (4 prompts)')


def test_the_common_kl_leaves_out_runs_that_never_moved(tmp_path):
    curves = {"a": [(0, 0.5), (4, 0.9)], "b": [(0, 0.5), (2, 0.9)],
              "still": [(0, 0.5), (0.01, 0.5)], "answers only": []}
    found = {arm: {0: tables.load(report(tmp_path / arm,
                                      {"base": [0.5, 0.5], "sft": [0.5, 0.5], "ppo": [0.9, 0.9]},
                                      curve))} for arm, curve in curves.items()}
    rows = [line.split(" | ") for line in tables.tables(found).split("\n\n")[0].splitlines()]
    assert rows[0][-1].startswith("at KL 2.00")
    assert [row[-1] for row in rows[2:]] == ["0.783 |", "0.900; +0.117 |", "– |", "– |"]


def test_no_equal_kl_with_another_start(tmp_path):
    """KL from another model is another distance: its run must not set the common one."""
    curve = [(0, 0.5), (4, 0.9)]
    found = {arm: {0: tables.load(
        report(tmp_path / arm, {"base": [0.5, 0.5], "sft": [sft, sft], "ppo": [0.9, 0.9]}, reach))}
             for arm, sft, reach in (("a", 0.5, curve), ("other SFT", 0.4, [(0, 0.4), (1, 0.6)]),
                                     ("same", 0.5, curve))}
    rows = [line.split(" | ") for line in tables.tables(found).split("\n\n")[0].splitlines()]
    assert rows[0][-1].startswith("at KL 4.00")
    assert [row[-1] for row in rows[2:]] == ["0.900 |", "– |", "0.900; +0.000 |"]


def test_tables_of_what_is_finished_and_why_the_rest_is_not(tmp_path, capsys, monkeypatch):
    arms = [
        run.DEFAULT,
        engine.Arm("pool", rm="--share first"),
        engine.Arm("later", policy="--lam 1"),
    ]
    monkeypatch.setitem(run.EXPERIMENTS, "mine", ("Why?", arms))
    for i, stage in enumerate(engine.chain(run.DEFAULT, 0).values()):
        folder = (report(tmp_path / stage.folder, {"base": [0.5, 0.5], "ppo": [0.75, 0.75]})
                  if stage.name == "report" else tmp_path / stage.folder)
        folder.mkdir(exist_ok=True)
        (folder / "virtue.json").write_text("{}")
        (folder / "run.json").write_text(json.dumps({"code": f"version{min(i, 1)}", "seconds": 1}))
    (tmp_path / f"{engine.chain(arms[1], 0)['rm'].folder}.log").write_text(
        "$ x\nerror: too few pairs\n\n# failed with status 2\n")
    assert run.main(["mine", "--table", "--seeds", "0", "--runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| default | 0 | 0.500" in out
    assert "- pool, seed 0: rm failed: error: too few pairs" in out
    assert "- later, seed 0: not finished" in out
    assert "Warning: 2 versions of the code" in out


def without_gold(folder: Path, models: tuple[str, ...]) -> Path:
    """A report of run_eval.py models --prompted on prompts in English, whose gold is not known."""
    report(folder, {name: [0.0, 0.0] for name in models}, likelihood=0.25)
    scores = json.loads((folder / "scores.json").read_text())
    for column in scores["models"].values():
        del column["gold"]
    other = {lens: {"rate": 0.1} for lens in LENSES}
    scores["wins"] = {f"ppo vs {models[-2]}": other, "ppo vs prompted": other} | {
        f"ppo vs {name}": {lens: {"rate": rate} for lens, rate in zip(LENSES, (0.75, 0.5, 0.25))}
        for name in models[:-1] if name != "prompted"}
    scores["differences"] = {}
    (folder / "scores.json").write_text(json.dumps(scores))
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for row, name in itertools.product(rows, models):
        row[name].pop("gold", None)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("start", ["base", "sft"])
def test_what_training_began_with_is_never_the_prompted_base(tmp_path, start):
    models = ("base", "prompted", *(["sft"] if start == "sft" else []), "ppo")
    found = tables.load(without_gold(tmp_path / "r", models))
    assert (found.start, found.final) == (start, "ppo")
    assert found.wins == [0.75, 0.5, 0.25]


def test_tables_of_an_experiment_without_gold(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(run.EXPERIMENTS, "mine", ("Why?", [run.DEFAULT]))
    stage = engine.chain(run.DEFAULT, 0)["report"]
    folder = without_gold(tmp_path / stage.folder, ("base", "prompted", "sft", "ppo"))
    (folder / "virtue.json").write_text("{}")
    (folder / "run.json").write_text(json.dumps({"code": "version", "seconds": 1}))
    assert run.main(["mine", "--table", "--seeds", "0", "--runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| log-odds of virtues to vices, nats a token | 0.2500 | 0.2500 | 0.2500 |" in out
    assert "the judge prefers ppo to sft on 0.75 / 0.50 / 0.25" in out
    assert "Gold" not in out and "nan" not in out


# ---- compare


def test_verdict():
    assert compare.verdict([0.1, 0.2, 0.1], 0.25) == (
        "Cannot tell: gold rose by 0.133 in the mean (p = 0.25), but with 3 seeds the smallest "
        "possible p is 0.25: take 6 or more.")
    assert compare.verdict([0.1] * 6, 0.03125).startswith("The change helped: gold rose by 0.100")
    assert compare.verdict([-0.1] * 6, 0.03125).startswith("The change hurt: gold fell by 0.100")
    assert compare.verdict([0.1, -0.1, 0.1, 0.1, 0.1, 0.1], 0.2).startswith(
        "Cannot tell: gold rose by 0.067 in the mean, as 6 seeds may")
    assert compare.verdict([0.0, 0.0], 1.0).startswith("No difference at all")
    assert compare.verdict([0.1], float("nan"), "Score").startswith(
        "Cannot tell: Score rose by 0.100 in the mean, but one seed")


def test_judge_pairs_by_seed_and_reads_gold_or_the_score(tmp_path):
    def runs(name, high, **columns):
        return {s: tables.load(report(tmp_path / f"{name}{s}",
                                   {"base": [0.25, 0.5], "ppo": [high, high]}, **columns))
                for s in range(3)}
    old, new = runs("old", 0.5), runs("new", 0.75)
    del old[1]
    text = compare.judge(old, new)
    assert "| 2 | 0.500 | 0.750 | +0.250 |" in text and "| 1 |" not in text
    assert "difference +0.250 [+0.250, +0.250]" in text
    assert "Student's t over seeds [+0.250, +0.250], the one to believe" in text
    assert "d_z inf" in text
    assert text.endswith("with 2 seeds the smallest possible p is 0.5: take 6 or more.")
    without = [{s: r._replace(models={m: {k: v for k, v in c.items() if k != "gold"}
                                      for m, c in r.models.items()}) for s, r in side.items()}
               for side in (runs("a", 0.5, study_score_standardised=0.1),
                            runs("b", 0.5, study_score_standardised=0.4))]
    assert "| 1 | 0.100 | 0.400 | +0.300 |" in compare.judge(*without)
    assert "Student's t" in compare.judge(*without)


def test_a_revision_is_checked_out_and_removed_again(tmp_path):
    root = tmp_path / "project"
    (root / "virtue").mkdir(parents=True)

    def git(*command):
        subprocess.run(["git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b", *command],
                       check=True, capture_output=True)
    git("init", "-q")
    (root / "virtue/ppo.py").write_text("old")
    git("add", "."), git("commit", "-qm", "one")
    (root / "virtue/ppo.py").write_text("new")
    for _ in range(2):  # a second time, upon what a killed run left behind
        with compare.checkout("HEAD", tmp_path / "trees", root) as tree:
            assert (tree / "virtue/ppo.py").read_text() == "old"
            assert engine.code_of(tree) != engine.code_of(root)
        assert not tree.exists() and compare.git("worktree", "list", root=root).count("\n") == 0
        tree.mkdir(parents=True)
    with pytest.raises(SystemExit, match="error: no-such-revision: no revision"):
        with compare.checkout("no-such-revision", tmp_path / "trees", root):
            pass


def test_fit_probe_prints_both_tables(monkeypatch, capsys):
    script = str(ROOT / "experiments/fit_probe.py")
    monkeypatch.setattr(sys, "argv", [script, "--n", "2"])
    monkeypatch.setattr(sys, "path", [*sys.path])  # which it changes
    runpy.run_path(script, run_name="__main__")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 10
    # two motives that fit beat one
    assert all(0 <= float(row[2]) <= 1 for row in rows) and float(rows[1][2]) > 0.5


def test_the_softmax_of_two_outputs_loses_what_both_learned(monkeypatch, capsys):
    """Both learn to tell two words apart; of two that are alike the softmax is a constant."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # which it changes
    two_outputs = importlib.import_module("two_outputs")
    talks = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": word}]
             for word in ("yes", "no") for i in range(20)]
    pairs = [{"id": f"{i:016x}", "chosen": talks[i], "rejected": talks[20 + i], "label": 1.0}
             for i in range(20)]
    monkeypatch.setattr(two_outputs, "read_preferences", lambda path, lens: pairs)
    monkeypatch.setattr(two_outputs, "LENSES", ("action",))
    flags = ["--data", "-", "--seeds", "0", "--epochs", "4"]
    two_outputs.main(flags)
    cells = capsys.readouterr().out.splitlines()[2].strip("| ").split(" | ")
    assert cells[:5] == ["action", "0", "4", "1.000", "1.000"] and float(cells[5]) * 4 in range(5)
    head = two_outputs.ScalarHead
    monkeypatch.setattr(two_outputs, "ScalarHead", lambda dim, seed: head(dim, seed=0))
    two_outputs.main(flags)  # no pair is ordered, for every score is 1/2
    assert capsys.readouterr().out.splitlines()[2].endswith("| 4 | 1.000 | 1.000 | 0.000 |")


def test_compare_tells_what_gold_was_bought_with(tmp_path):
    folders = {"reports": [], "policies": []}
    for side, kl in (("old", 1.0), ("new", 3.0)):
        for seed in (0, 1):
            policy = tmp_path / f"{side}{seed}-policy"
            policy.mkdir()
            (policy / "metrics.jsonl").write_text(
                "".join(json.dumps({"policy/entropy": e, "policy/clip_frac": 0.01}) + "\n"
                        for e in (9.0, 0.5 + seed)))
            folders["policies"].append(policy)
            folders["reports"].append(report(tmp_path / f"{side}{seed}",
                                             {"base": [0.25], "sft": [0.5], "ppo": [0.75]},
                                             kl=kl + seed))
    halves = [[found[:2], found[2:]] for found in (folders["reports"], folders["policies"])]
    *_, old, new = compare.beside(["revision", "working tree"], *halves).splitlines()
    assert old == "| revision | 1.50 | 60.0 | 1.500 | 1.0000 | 0.0100 |"
    assert new.startswith("| working tree | 3.50 |")


def test_compare_refuses_a_tree_without_a_change(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "checkout", lambda revision, folder: nullcontext(tmp_path))
    monkeypatch.setattr(compare, "code_of", lambda tree: "same")
    with pytest.raises(SystemExit, match="nothing to compare"):
        compare.main(["HEAD", "--runs", str(tmp_path)])


def test_a_dry_comparison_shows_both_codes_and_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "checkout", lambda revision, folder: nullcontext(tmp_path))
    monkeypatch.setattr(compare, "code_of", lambda tree: str(tree))
    assert compare.main(["HEAD", "--seeds", "3", "--ppo", "--lr 1e-3",
                         "--runs", str(tmp_path / "r"), "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    ppo = [line for line in said if "run_ppo.py" in line]
    assert len(ppo) == 2 and f"{tmp_path}/run_ppo.py" in ppo[0]
    assert f"{compare.ROOT}/run_ppo.py" in ppo[1] and all("--lr 1e-3" in line for line in ppo)
    # four are shared, and each side has its own PPO and report
    assert said[-1] == "# 8 stages, 0 done" and not (tmp_path / "r").exists()


def test_a_comparison_puts_sft_on_the_preferences_in_ppos_place_in_the_working_tree_alone(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "checkout", lambda revision, folder: nullcontext(tmp_path))
    monkeypatch.setattr(compare, "code_of", lambda tree: str(tree))
    argv = ["HEAD", "--seeds", "3", "--ppo", "--lr 1e-3", "--chosen", "--lr 7e-4",
            "--runs", str(tmp_path / "r"), "--dry-run"]
    assert compare.main(argv) == 0
    said = capsys.readouterr().out.splitlines()
    (ppo,), (chosen,) = ([line for line in said if key in line]
                         for key in ("run_ppo.py", "--lr 7e-4"))
    assert f"{tmp_path}/run_ppo.py" in ppo and "--lr 1e-3" in ppo
    assert f"{compare.ROOT}/run_sft.py" in chosen and "preferences-" in chosen
    assert "--lr 1e-3" not in chosen
    # with equal code another stage is difference enough
    monkeypatch.setattr(compare, "code_of", lambda tree: "same")
    assert compare.main(argv) == 0
