"""The five scripts in sequence on the toy, on an fp32 and an NF4 base; bad input; flags."""
from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tiny_model

from virtue import VirtueError
from virtue.plumbing import hub
from virtue.plumbing.artefacts import data_hash
from virtue.ethics import ENGLISH, LENSES, VIRTUES
from virtue.judge import judge_log_odds
from virtue.plumbing.loading import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("run_data", "run_sft", "run_rm", "run_ppo", "run_eval")
SMALL = ["--batch-size", "16", "--rank", "4"]
BRIEF = ["--value-warmup", 0, "--rollout-size", 4, "--minibatch-size", 4]  # PPO
WEIGHTS = "adapter_model.safetensors"


def call(script: str, *flags) -> None:
    importlib.import_module(script).main([str(f) for f in flags])


def chain(out: Path, quantize: str, revised: int, prompts: int, iterations: int = 2) -> Path:
    call("run_data", "revisions", "--out", out / "revisions", "--limit", revised,
         "--quantize", quantize, "--max-new-tokens", 48)
    call("run_sft", "--data", out / "revisions", "--out", out / "sft", "--epochs", 2,
         "--lr", 1e-3, *SMALL)
    call("run_data", "preferences", "--sft", out / "sft", "--out", out / "preferences",
         "--limit", prompts, "--any-judge")
    call("run_rm", "--data", out / "preferences", "--out", out / "rm", "--epochs", 1, *SMALL)
    call("run_ppo", "--rm", out / "rm", "--out", out / "policy", "--iterations", iterations,
         "--value-warmup", 0, "--rollout-size", 8, "--lr", 1e-3, "--minibatch-size", 4,
         "--ppo-epochs", 1, "--rank", 4, "--limit", 16, "--kl-target", 3,
         *(["--rollout-dtype", "fp32", "--gradient-checkpointing"] if quantize == "nf4" else []))
    call("run_eval", "models", "--policy", out / "policy", "--out", out / "report",
         "--limit", prompts // 2, "--show", 1, "--judge-limit", 3)
    return out


@pytest.fixture(scope="module", autouse=True)
def a_quarter_is_held_out():
    """Of so few prompts: else two or three would be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("run_rm.HELD_OUT", 0.25)
        yield


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    return chain(tmp_path_factory.mktemp("fp32"), "none", 24, 16)


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """PPO draws its curves at each iteration; those of `fp32`, made before this, are enough."""
    monkeypatch.setattr("virtue.evaluation.plots.available", lambda: False)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def cakes(n: int) -> list[dict]:
    """Records of hh-rlhf's layout, each with another prompt."""
    talk = "\n\nHuman: What about {}: the cake?\n\nAssistant: Yes."
    return [{"chosen": talk.format(i), "rejected": "x"} for i in range(n)]


def test_chain_on_fp32(fp32):
    revisions = lines(fp32 / "revisions/revisions.jsonl")
    assert revisions
    assert all(r["revision"] != r["initial"] and r["virtue"] in VIRTUES for r in revisions)
    summary = read(fp32 / "revisions/summary.json")
    kinds = ("truncated", "empty", "unchanged", "echoed", "revisions", "prompts_too_long")
    assert summary["prompts"] == 24 == sum(summary[k] for k in kinds)
    held_out = [m["loss/held_out"]
                for m in lines(fp32 / "sft/metrics.jsonl") if "loss/held_out" in m]
    assert held_out[-1] < held_out[0]
    for k, lens in enumerate(LENSES):
        for r in lines(fp32 / f"preferences/{lens}.jsonl"):
            assert len(r["chosen"]) == len(r["rejected"]) == 2 * k + 2
            assert r["chosen"] != r["rejected"] and r["votes"] >= 3
            assert r["label"] == pytest.approx(sum(r["virtues"].values()) / 5)
        manifest = read(fp32 / f"rm/{lens}/virtue.json")
        assert manifest["extra"]["lens"] == lens and manifest["extra"]["score_std"] > 0
        assert manifest["parents"]["sft"]["sha256"]
    first, second = lines(fp32 / "policy/metrics.jsonl")
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert first["objective/kl_k3"] == pytest.approx(0, abs=1e-6)
    assert second["objective/kl_k3"] > 0
    assert second["objective/kl_coef"] != first["objective/kl_coef"]
    scores = read(fp32 / "report/scores.json")
    assert set(scores["models"]) == {"base", "sft", "ppo"}
    assert scores["models"]["sft"]["kl"] == pytest.approx(0, abs=1e-4)
    d, low, high = (scores["differences"]["sft - base"]["gold"][k]
                    for k in ("difference", "low", "high"))
    assert low <= d <= high
    assert d == pytest.approx(scores["models"]["sft"]["gold"] - scores["models"]["base"]["gold"])
    samples = lines(fp32 / "report/samples.jsonl")
    raw = torch.tensor([s["ppo"]["raw_scores"] for s in samples], dtype=torch.float64)
    expected = raw.mean() - 0.5 * ((raw - raw.mean()) ** 2).mean().sqrt()
    assert scores["models"]["ppo"]["study_score"] == pytest.approx(expected.item(), abs=1e-6)


def test_chain_on_nf4(tmp_path):
    out = chain(tmp_path, "nf4", 8, 8, iterations=1)
    manifest = read(out / "policy/virtue.json")
    assert manifest["settings"]["quantize"] == "nf4"
    assert manifest["settings"]["max_new_tokens"] == 48  # inherited
    assert set(read(out / "report/scores.json")["models"]) == {"base", "sft", "ppo"}


def test_same_seed_same_bytes(fp32, tmp_path):
    call("run_data", "revisions", "--out", tmp_path / "again", "--limit", 24,
         "--max-new-tokens", 48)
    call("run_sft", "--data", tmp_path / "again", "--out", tmp_path / "sft", "--epochs", 2,
         "--lr", 1e-3, *SMALL)
    call("run_data", "revisions", "--out", tmp_path / "other", "--limit", 8,
         "--max-new-tokens", 48, "--seed", 1)
    assert ((fp32 / "revisions/revisions.jsonl").read_bytes()
            == (tmp_path / "again/revisions.jsonl").read_bytes())
    first, other = ({r["id"]: r["initial"] for r in lines(p / "revisions.jsonl")}
                    for p in (fp32 / "revisions", tmp_path / "other"))
    both = first.keys() & other.keys()  # the same prompts
    assert len(both) > 2 and any(first[i] != other[i] for i in both)
    assert (fp32 / "sft" / WEIGHTS).read_bytes() == (tmp_path / "sft" / WEIGHTS).read_bytes()


def test_ppo_of_each_kind(fp32, tmp_path):
    for i, flags in enumerate((["--aggregate", "min"],
                               ["--reward-turns", "answer", "--micro-batch-size", 2],
                               ["--aggregate", "weighted", "--weights", 1, 0, 1])):
        call("run_ppo", "--rm", fp32 / "rm", "--out", tmp_path / str(i), "--iterations", 1, *BRIEF,
             "--lr", 1e-3, "--rank", 4, "--limit", 8, *flags)
        metrics, = lines(tmp_path / str(i) / "metrics.jsonl")
        assert metrics["objective/kl_k3"] == pytest.approx(0, abs=1e-6)
        assert metrics["policy/ratio"] == pytest.approx(1, abs=0.1)


def test_ppo_records_every_rollout(fp32):
    found = lines(fp32 / "policy/rollouts.jsonl")
    assert [r["iteration"] for r in found] == [1] * 8 + [2] * 8
    assert all(set(r["turns"]) == set(LENSES) and len(r["scores"]) == 3 for r in found)
    for metrics in lines(fp32 / "policy/metrics.jsonl"):
        of_step = [r for r in found if r["iteration"] == metrics["iteration"]]
        assert sum(r["kl"] for r in of_step) / 8 == pytest.approx(metrics["objective/kl"], abs=1e-5)
        mean = sum(r["scores"][1] for r in of_step) / 8
        assert mean == pytest.approx(metrics["objective/score/motivation"], abs=1e-5)


def test_what_the_ablations_change(fp32, tmp_path):
    """The patches of experiments/, whose script runs here with the package as it is."""
    sys.path.insert(0, str(ROOT / "experiments"))
    import engine

    def first(*patches):
        code = tmp_path / "-".join(("code", *patches))
        engine.patched_code(patches, code)
        spec = importlib.util.spec_from_file_location(code.name, code / "run_ppo.py")
        script = importlib.util.module_from_spec(spec)
        sys.modules[code.name] = script
        spec.loader.exec_module(script)
        flags = ["--rm", fp32 / "rm", "--out", code / "out", "--iterations", 1, *BRIEF,
                 "--ppo-epochs", 1, "--rank", 4, "--limit", 4]
        script.main([str(flag) for flag in flags])
        scores = [row["scores"] for row in lines(code / "out/rollouts.jsonl")]
        return lines(code / "out/metrics.jsonl")[0] | {
            f"most {lens}": max(map(abs, own)) for lens, own in zip(LENSES, zip(*scores))}
    plain, raw, half, bare = (
        first(*patches) for patches in ((), ("raw-scores",), ("fp16-scores",), ("no-whitening",)))
    for lens in LENSES:
        extra = read(fp32 / f"rm/{lens}/virtue.json")["extra"]
        key = f"objective/score/{lens}"
        unscaled = plain[key] * extra["score_std"] + extra["score_mean"]
        if plain[f"most {lens}"] < 5:  # else a score was cut
            assert raw[key] == pytest.approx(unscaled, abs=1e-4)
        assert half[key] == pytest.approx(plain[key], abs=0.1)
    assert any(plain[f"most {lens}"] < 5 for lens in LENSES)
    assert any(half[f"objective/score/{lens}"] != plain[f"objective/score/{lens}"]
               for lens in LENSES)
    assert bare["objective/score"] == plain["objective/score"]
    assert bare["policy/grad_norm"] != plain["policy/grad_norm"]


def test_the_policy_waits_for_the_value_function(fp32, tmp_path):
    call("run_ppo", "--rm", fp32 / "rm", "--out", tmp_path / "w", "--iterations", 2,
         "--value-warmup", 1, "--rollout-size", 4, "--minibatch-size", 4, "--rank", 4, "--limit", 8,
         "--lr", 0.02)
    first, second = lines(tmp_path / "w/metrics.jsonl")
    assert second["objective/kl_k3"] == pytest.approx(0, abs=1e-6) and first["value/loss"] > 0
    policy, value = (load_file(tmp_path / folder / WEIGHTS) for folder in ("w", "w/value"))
    assert all(any((t != 0).any() for k, t in adapter.items() if "lora_B" in k)
               for adapter in (policy, value))
    assert first["policy/ratio"] == pytest.approx(1, abs=1e-4) != second["policy/ratio"]


def test_the_best_policy_is_kept(fp32, tmp_path):
    """best/ is what sampled the iteration with the greatest score less penalties:
    at iteration 1 the untrained adapter."""
    metrics = lines(fp32 / "policy/metrics.jsonl")
    for m in metrics:
        cut = 3 * (1 - m["tokens/eos_rate"])  # turns of a dialogue: each costs 1
        placed = m["objective/score"] - cut
        kl, coef = m["objective/kl"], m["objective/kl_coef"]
        assert m["objective/rlhf_reward"] == pytest.approx(placed - coef * kl, abs=1e-5)
        assert m["objective/selection"] == pytest.approx(placed - 0.06 * kl, abs=1e-5)  # --kl-coef
    call("run_ppo", "--rm", fp32 / "rm", "--out", tmp_path / "p", "--iterations", 3, *BRIEF,
         "--rank", 4, "--limit", 12,
         "--ppo-epochs", 1, "--lr", 1e-7, "--kl-coef", 0.0, "--save-every", 1)
    found = [m["objective/selection"] for m in lines(tmp_path / "p/metrics.jsonl")]
    manifest = read(tmp_path / "p/best/virtue.json")
    assert manifest["stage"] == "policy"
    assert manifest["extra"]["iterations"] == found.index(max(found))
    call("run_ppo", "--rm", fp32 / "rm", "--out", tmp_path / "q", "--iterations", 2, *BRIEF,
         "--rank", 4, "--limit", 8, "--lr", 0.02, "--kl-coef", 1e6)
    best = load_file(tmp_path / "q/best" / WEIGHTS)
    last = load_file(tmp_path / "q" / WEIGHTS)
    # so large a change costs so much that the start is the best
    assert not any((t != 0).any() for k, t in best.items() if "lora_B" in k)
    assert any((t != 0).any() for k, t in last.items() if "lora_B" in k)
    with pytest.raises(VirtueError, match="equal those of sft"):
        call("run_eval", "models", "--policy", tmp_path / "q/best",
             "--out", tmp_path / "r", "--limit", 4)


def test_ppo_stops_when_it_runs_away(fp32, tmp_path, capsys):
    flags = ["--rm", fp32 / "rm", "--iterations", 4, "--value-warmup", 0, "--rollout-size", 8,
             "--minibatch-size", 4, "--rank", 4, "--limit", 16, "--save-every", 1]
    call("run_ppo", *flags, "--out", tmp_path / "p", "--lr", 0.02, "--stop-kl", 0.5)
    metrics = lines(tmp_path / "p/metrics.jsonl")
    assert 1 < len(metrics) < 4 and metrics[-1]["objective/kl"] > 0.5 >= metrics[-2]["objective/kl"]
    assert (tmp_path / "p/best/virtue.json").is_file() and not (tmp_path / "p/resume").exists()
    assert f"stopped at iteration {len(metrics)}" in capsys.readouterr().out


def test_numbers_that_go_wrong_name_step_records_and_checkpoint(fp32, tmp_path, monkeypatch):
    import virtue.rollout
    real, calls = virtue.rollout.score_dialogues, []

    def broken(*args, **kwargs):
        calls.append(1)
        scores = real(*args, **kwargs)
        if len(calls) == 3:
            scores[1, 2] = float("nan")
        return scores

    monkeypatch.setattr(virtue.rollout, "score_dialogues", broken)
    flags = ["--rm", fp32 / "rm", "--out", tmp_path / "p", "--iterations", 3, *BRIEF, "--rank", 4,
             "--limit", 4, "--save-every", 1, "--ppo-epochs", 1]
    with pytest.raises(VirtueError, match=r"ppo, iteration 3: the score of records (\w+) is not "
                       r"finite: .*checkpoint is .*resume.00000002-") as caught:
        call("run_ppo", *flags)
    assert lines(tmp_path / "p/rollouts.jsonl")[0]["id"] and str(tmp_path) in str(caught.value)
    monkeypatch.undo()
    call("run_ppo", *flags, "--resume")
    assert [m["iteration"] for m in lines(tmp_path / "p/metrics.jsonl")] == [1, 2, 3]


def test_whole_matrices_and_merged_reward_models(fp32, tmp_path):
    call("run_sft", "--data", fp32 / "revisions", "--out", tmp_path / "sft", "--lr", 1e-4,
         "--epochs", 1, *SMALL, "--rank", "whole")
    config = read(tmp_path / "sft/adapter_config.json")
    assert config["r"] == config["lora_alpha"] == 384  # the width of the toy's down_proj


def test_one_question_and_one_order(fp32, tmp_path):
    for name, flags in (("rules", ["--ask", "rules"]), ("one", ["--orders", "one"])):
        call("run_data", "preferences", "--sft", fp32 / "sft", "--limit", 8, "--any-judge",
             "--out", tmp_path / name, *flags)
    both, rules, one = ({r["id"]: r for r in lines(folder / "action.jsonl")}
                        for folder in (fp32 / "preferences", tmp_path / "rules", tmp_path / "one"))
    assert all(len(set(r["virtues"].values())) == 1 and r["votes"] == 5 for r in rules.values())
    assert all(r["position_flips"] is None for r in one.values())
    assert any(r["position_flips"] for r in both.values())
    assert set(both) > set(rules) == set(one) and len(one) > 4
    assert any(both[i]["label"] != pytest.approx(one[i]["label"]) for i in one)


def test_a_judge_that_judges_nothing_is_not_believed(tmp_path, capsys, monkeypatch):
    """A random model judges: status 2, nothing lost; with --any-judge all that follows says so."""
    base = make_tiny_model(tmp_path / "base", max_position_embeddings=4096)
    hh, out = tmp_path / "hh.jsonl", tmp_path / "p"
    write_lines(hh, cakes(160))
    few = ["--prompts", hh, "--max-new-tokens", 6, "--batch-size", 16]
    flags = ["run_data", "preferences", "--model", base, *few, "--limit", 20,
             "--truncated", "keep", "--out", out]
    with pytest.raises(VirtueError) as caught:
        call(*flags)
    said, text = capsys.readouterr().out, str(caught.value)
    assert "\n" not in text
    assert all(f"judge, {lens}: flips with the order" in said for lens in LENSES)
    parts = (str(base), "--judge", "virtue/ethics.py", "--limit", "--resume --any-judge")
    assert all(part in text for part in parts)
    assert "cannot be told from a coin that knows places" in text
    assert len(lines(out / "dialogues.jsonl")) == 40 and (out / "resume").is_dir()
    assert not (out / "virtue.json").exists()
    with pytest.raises(VirtueError, match="cannot be told from a coin"):
        call(*flags, "--resume")
    for name in ("virtue.judge.hidden_states", "virtue.generate.sample"):
        # what was sampled and judged is not sampled and judged again
        monkeypatch.setattr(name, None)
    call(*flags, "--resume", "--any-judge")
    monkeypatch.undo()
    monkeypatch.setattr("virtue.evaluation.plots.available", lambda: False)
    summary, tests = read(out / "summary.json"), read(out / "virtue.json")["extra"]["judge_test"]
    coins = [lens for lens in LENSES if summary[lens]["coin"]]
    assert coins
    for lens in LENSES:
        assert tests[lens].items() <= summary[lens].items()
        assert tests[lens]["judged"] == summary[lens]["pairs"] + summary[lens]["dropped_tied"]
    assert [lens for lens in LENSES if tests[lens]["coin"]] == coins
    assert [lens for lens in LENSES if tests[lens]["consistent_low"] <= 0.5] == coins

    capsys.readouterr()
    call("run_rm", "--data", out, "--out", tmp_path / "rm", "--epochs", 1,
         *SMALL)
    call("run_sft", "--data", out, "--out", tmp_path / "chosen", "--epochs", 1, *SMALL)
    call("run_ppo", "--rm", tmp_path / "rm", "--out", tmp_path / "policy", *few, "--iterations", 1,
         *BRIEF, "--rank", 4, "--limit", 8)
    said = capsys.readouterr().out
    warning = "warning: the labels of lens {} are those of a judge that cannot be told from a coin"
    assert all(said.count(warning.format(lens)) == 3 * (lens in coins) for lens in LENSES)
    for folder, lenses in (*((f"rm/{lens}", [lens]) for lens in LENSES), ("chosen", LENSES),
                           ("policy", LENSES), ("policy/best", LENSES)):
        extra = read(tmp_path / folder / "virtue.json")["extra"]
        assert extra["judge_test"] == {lens: tests[lens] for lens in lenses}
    call("run_eval", "models", "--policy", tmp_path / "policy", *few, "--limit", 4,
         "--judge-limit", 2, "--out", tmp_path / "report")
    sentence = ("But it was trained on labels of a judge that cannot be told from a coin that "
                f"knows places ({', '.join(coins)}).")
    page = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    headline = page.split('<p class="verdict')[1].split("</p>")[0]
    assert sentence in headline
    warned = [w["text"] for w in read(tmp_path / "report/scores.json")["warnings"]]
    for folder in ("p", f"rm/{coins[0]}", "policy"):
        hub.main([str(tmp_path / folder), "--out", str(tmp_path / "no"), "--dry-run"])
        card = capsys.readouterr().out
        for lens in LENSES:
            named = lens in coins and (folder[:2] != "rm" or lens == coins[0])
            assert (f"- **warning**: the labels of lens {lens} are those" in card) == named
    for lens in LENSES:
        named = any(f"the labels of lens {lens} are those" in text for text in warned)
        assert named == (lens in coins)


@pytest.fixture(scope="module")
def second(fp32, tmp_path_factory):
    """Reward models on the half of the preferences that is never the first's."""
    out = tmp_path_factory.mktemp("rm") / "second"
    call(
        "run_rm",
        "--data",
        fp32 / "preferences",
        "--out",
        out,
        "--epochs",
        1,
        *SMALL,
        "--share",
        "second",
    )
    return out


def test_reward_models_on_either_half(fp32, second, tmp_path):
    call(
        "run_rm",
        "--data",
        fp32 / "preferences",
        "--out",
        tmp_path / "first",
        "--epochs",
        1,
        *SMALL,
        "--share",
        "first",
    )
    for lens in LENSES:
        first, other, whole = (
            json.loads((folder / lens / "virtue.json").read_text())["extra"]["trained_on"]
            for folder in (tmp_path / "first", second, fp32 / "rm")
        )
        assert first and other and first + other == whole


def test_sft_on_the_chosen_dialogues_is_a_policy_and_other_reward_models_read_it(
        fp32, second, tmp_path):
    call("run_sft", "--data", fp32 / "preferences", "--out", tmp_path / "chosen",
         "--epochs", 6, *SMALL)
    manifest = read(tmp_path / "chosen/virtue.json")
    assert manifest["stage"] == "policy" and set(manifest["parents"]) == {"sft"}
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    ours, theirs = (load_file(folder / WEIGHTS)[name].flatten()
                    for folder in (tmp_path / "chosen", fp32 / "sft"))
    # A hardly moves in training, so this one was drawn anew
    assert abs(torch.cosine_similarity(ours, theirs, dim=0)) < 0.3
    losses = [m["loss/train"]
              for m in lines(tmp_path / "chosen/metrics.jsonl") if "loss/train" in m]
    epoch = len(losses) // 6
    # on the same records: held-out loss need not fall on so few
    assert sum(losses[-epoch:]) < sum(losses[:epoch])
    with pytest.raises(VirtueError, match="give --rm"):
        call("run_eval", "models", "--policy", tmp_path / "chosen",
             "--out", tmp_path / "no", "--limit", 4)
    call("run_eval", "models", "--policy", tmp_path / "chosen", "--rm", fp32 / "rm",
         "--eval-rm", second, "--out", tmp_path / "report", "--limit", 4, "--judge-limit", 2)
    found = read(tmp_path / "report/scores.json")["models"]["ppo"]
    assert found["kl"] != 0
    assert {found[f"eval_reward/{lens}"] != found[f"reward/{lens}"] for lens in LENSES} == {True}


def test_judge_against_the_files_choice_and_against_gold(fp32, tmp_path):
    hh = tmp_path / "hh.jsonl"
    talk = "\n\nHuman: May I take the cake of Mia?\n\nAssistant: "
    write_lines(hh, ({"chosen": talk + "Ask her first.", "rejected": talk + text}
                     for text in ("Take it.", "", "Ask her first.", "No, you fool.")))
    call("run_eval", "judge", "--pairs", hh, "--out", tmp_path / "hh")
    found = read(tmp_path / "hh/judge.json")
    assert (found["pairs"], found["skipped"]) == (2, 2)
    assert found["action"]["against"] == "the file's choice"
    assert found["action"]["agreement"]["honesty"]["n"] == 2
    call("run_eval", "judge", "--pairs", fp32 / "preferences/motivation.jsonl",
         "--wording", "other", "--out", tmp_path / "toy")
    found = read(tmp_path / "toy/judge.json")
    assert "action" not in found and found["motivation"]["against"] == "gold"
    assert 0 <= found["motivation"]["position_flips"] <= 1


def test_reward_models_on_lengths_and_degenerate_answers(fp32, tmp_path):
    call("run_eval", "rewards", "--rm", fp32 / "rm", "--data", fp32 / "preferences",
         "--pairs", fp32 / "preferences/action.jsonl", "--out", tmp_path / "r")
    found = read(tmp_path / "r/rewards.json")
    for lens in LENSES:
        trained = read(fp32 / f"rm/{lens}/virtue.json")["extra"]["held_out"]
        assert found[lens]["accuracy"] == pytest.approx(trained["accuracy"])
        assert found[lens]["log_loss"] == pytest.approx(trained["log_loss"], abs=1e-4)
        kinds = {"as sampled", "empty", "repeated", "echo", "virtue words", "refusal"}
        assert set(found[lens]["degenerate"]) == kinds
        assert -1 <= found[lens]["length_correlation"] <= 1
        assert found[lens]["external"]["pairs"] == len(lines(fp32 / "preferences/action.jsonl"))


def test_best_of_n(fp32, tmp_path):
    call("run_eval", "best-of-n", "--rm", fp32 / "rm", "--limit", 4, "--n", 4,
         "--out", tmp_path / "b")
    rows = read(tmp_path / "b/best_of_n.json")["rows"]
    assert [r["n"] for r in rows if r["aggregator"] == "mean"] == [1, 2, 4]
    assert len({round(r["gold"], 9) for r in rows if r["n"] == 1}) == 1
    means = [r["reward"] for r in rows if r["aggregator"] == "mean"]
    assert means == sorted(means)  # the best by the mean has the best mean
    assert all(r["low"] - 1e-9 <= r["gold"] <= r["high"] + 1e-9 for r in rows)
    assert all(0 < r["judge_low"] - 1e-9 <= r["judge"] <= r["judge_high"] + 1e-9 < 1 for r in rows)
    assert read(tmp_path / "b/best_of_n.json")["judged"] == 4
    call("run_eval", "best-of-n", "--rm", fp32 / "rm", "--limit", 2, "--n", 2, "--judge-limit", 0,
         "--out", tmp_path / "c")
    assert "judge" not in read(tmp_path / "c/best_of_n.json")["rows"][0]


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory, toy_folder):
    """Another Mistral of another shape, which ends its turns:
    the toy less its last layer, and its tokens with other ids, of which the toy makes nothing."""
    from safetensors.torch import load_file, save_file
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(toy_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights = {k: v for k, v in weights.items() if ".layers.3." not in k}
    config, tokenizer = (read(folder / f"{name}.json") for name in ("config", "tokenizer"))
    assert config["num_hidden_layers"] == 4 and config["tie_word_embeddings"]
    special = len(tokenizer["added_tokens"])
    vocab, embedding = tokenizer["model"]["vocab"], weights["model.embed_tokens.weight"]
    size, rolled = len(vocab) - special, embedding[special:].roll(100, 0)
    tokenizer["model"]["vocab"] = {
        token: i if i < special else (i - special + 100) % size + special
        for token, i in vocab.items()}
    weights["model.embed_tokens.weight"] = torch.cat([embedding[:special], rolled])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_hh_prompts_without_sft_and_another_local_folder(tmp_path, other_folder):
    hh = tmp_path / "hh.jsonl"
    write_lines(hh, cakes(60))
    call("run_data", "preferences", "--prompts", hh, "--split", "rm", "--limit", 12,
         "--out", tmp_path / "out", "--model", other_folder, "--any-judge")
    summary = read(tmp_path / "out/summary.json")
    for lens in LENSES:
        dropped = sum(summary[lens][f"dropped_{why}"]
                      for why in ("truncated", "empty", "identical"))
        assert summary[lens]["pairs"] + dropped == summary["prompts"]
        assert summary[lens]["gold_agreement"] is None
    manifest = read(tmp_path / "out/virtue.json")
    assert manifest["base"]["id"] == str(other_folder) and manifest["parents"] == {}


def test_the_study_s_reward_model_settings_and_another_judge(fp32, tmp_path, other_folder):
    call("run_data", "preferences", "--sft", fp32 / "sft", "--limit", 8, "--judge", other_folder,
         "--preference", "mean", "--any-judge", "--out", tmp_path / "p")
    summary = read(tmp_path / "p/summary.json")
    assert read(tmp_path / "p/virtue.json")["extra"]["judge"]["id"] == str(other_folder)
    for lens in LENSES:
        # these were chosen by the mean
        assert all(r["label"] >= 0.5 for r in lines(tmp_path / f"p/{lens}.jsonl"))
    judge = load_model(other_folder), load_tokenizer(other_folder)  # it reads with its own words
    pairs = [(r["chosen"], r["rejected"]) for r in lines(tmp_path / "p/action.jsonl")]
    assert summary["action"]["dropped_tied"] == 0
    assert summary["action"]["label_mass"] == pytest.approx(
        judge_log_odds(*judge, ENGLISH, pairs, "action")[1], rel=1e-3)
    ends = {}  # prompt -> where the longer of its two answers ends
    for d in lines(fp32 / "preferences/dialogues.jsonl"):
        _, end, truncated = d["turns"][0]
        ends[d["id"]] = max(ends.get(d["id"], 0), end + truncated)
    call("run_rm", "--data", fp32 / "preferences", "--out", tmp_path / "rm", "--lens", "action",
         "--labels", "hard", "--batch-size", 5, "--accumulation", 2, "--epochs", 2, "--lr", 1.41e-5,
         "--max-tokens", sorted(ends.values())[-4], "--rank", 4)
    manifest = read(tmp_path / "rm/action/virtue.json")
    steps = max(m["step"] for m in lines(tmp_path / "rm/action/metrics.jsonl"))
    assert manifest["extra"]["over_long"] > 0
    assert steps == 2 * -(-manifest["extra"]["trained_on"] // 10)
    call("run_rm", "--data", fp32 / "preferences", "--out", tmp_path / "rm", "--lens", "motivation",
         "--epochs", 1, *SMALL)  # beside it, without --overwrite


def test_again_with_overwrite_is_as_if_new(fp32, tmp_path):
    flags = ["--data", fp32 / "revisions", "--out", tmp_path / "sft", "--epochs", 1, *SMALL]
    call("run_sft", *flags)
    def made():
        timeless = [{k: v for k, v in m.items() if not k.startswith("time/")}
                    for m in lines(tmp_path / "sft/metrics.jsonl")]
        return timeless, (tmp_path / "sft" / WEIGHTS).read_bytes()
    before = made()
    with pytest.raises(VirtueError, match="--overwrite"):
        call("run_sft", *flags)
    call("run_sft", *flags, "--overwrite")
    assert before == made()


def test_batch_size_changes_no_draw(fp32, tmp_path):
    call("run_data", "preferences", "--sft", fp32 / "sft", "--out", tmp_path / "p", "--limit", 8,
         "--batch-size", 5, "--judge-batch-size", 3, "--any-judge")
    ours, theirs = ((folder / "dialogues.jsonl").read_bytes().splitlines()
                    for folder in (tmp_path / "p", fp32 / "preferences"))
    assert ours == theirs[:8] + theirs[16:24]  # two dialogues of each of the first 8 prompts
    prompts = {d["id"] for d in lines(tmp_path / "p/dialogues.jsonl")}
    for lens in LENSES:
        wanted = (r for r in lines(fp32 / f"preferences/{lens}.jsonl") if r["id"] in prompts)
        for a, b in zip(lines(tmp_path / f"p/{lens}.jsonl"), wanted, strict=True):
            assert a["label"] == pytest.approx(b["label"], abs=1e-4) and a["id"] == b["id"]


def test_reward_models_learn_from_the_tokens_that_were_sampled(fp32, tmp_path, capsys):
    """Each record says which dialogue was chosen; for an older folder, which has texts only,
    the program says that it does not know."""
    data, names = tmp_path / "data", [*(f"{lens}.jsonl" for lens in LENSES), "dialogues.jsonl"]
    shutil.copytree(fp32 / "preferences", data)
    text = (data / "action.jsonl").read_text()
    assert {json.loads(line)["chosen_copy"] for line in text.splitlines()} == {0, 1}
    call("run_rm", "--data", data, "--lens", "action", "--out", tmp_path / "a",
         "--epochs", 1, *SMALL)
    assert "encoded from their texts" not in capsys.readouterr().out
    (data / "action.jsonl").write_text(text.replace('"chosen_copy"', '"old"'))
    made = read(data / "virtue.json")
    (data / "virtue.json").write_text(json.dumps(made | {"sha256": data_hash(data, names)}))
    call("run_rm", "--data", data, "--lens", "action", "--out", tmp_path / "b",
         "--epochs", 1, *SMALL)
    n = len(text.splitlines())
    assert f"{n} of {n} pairs are encoded from their texts" in capsys.readouterr().out


def test_a_reward_model_of_other_people_s_preferences(fp32, tmp_path, capsys):
    """hh-rlhf's and TRL's layouts of the same pairs make the same model."""
    pairs = [(f"What about {i}: the cake?", "I give it back.", "I keep it.") for i in range(40)]
    talk = "\n\nHuman: {}\n\nAssistant: {}"
    write_lines(tmp_path / "hh.jsonl", ({"chosen": talk.format(q, a), "rejected": talk.format(q, b)}
                                        for q, a, b in pairs))

    def said(q, a):
        return [{"role": "user", "content": q}, {"role": "assistant", "content": a}]

    write_lines(tmp_path / "trl.jsonl", ({"chosen": said(q, a), "rejected": said(q, b)}
                                         for q, a, b in [*pairs, ("Same?", "Yes.", "Yes.")]))
    for name in ("hh", "trl"):
        call("run_rm", "--data", fp32 / "preferences", "--pairs", tmp_path / f"{name}.jsonl",
             "--lens", "action", "--out", tmp_path / name, "--epochs", 2, *SMALL)
    extra = read(tmp_path / "hh/action/virtue.json")["extra"]
    found = capsys.readouterr().out
    assert "trl.jsonl: 1 pairs passed over: 1 from line 41 on: identical" in found
    assert "hh.jsonl: " not in found
    low, high = (extra["held_out"][f"log_loss_{end}"] for end in ("low", "high"))
    assert 0 < (low + high) / 2 == pytest.approx(extra["held_out"]["log_loss"], abs=1e-6)
    assert low < high
    assert extra["trained_on"] == 30 and extra["held_out_pairs"] == 10
    assert extra["held_out"]["accuracy"] == 1 and extra["score_std"] > 0
    assert ((tmp_path / "hh/action" / WEIGHTS).read_bytes()
            == (tmp_path / "trl/action" / WEIGHTS).read_bytes())
    with pytest.raises(VirtueError, match="give the --lens"):
        call("run_rm", "--data", fp32 / "preferences", "--pairs", tmp_path / "hh.jsonl",
             "--out", tmp_path / "all")


def test_merge_loads_in_transformers_with_the_same_scores(fp32, tmp_path, capsys):
    call("run_rm", "--data", fp32 / "preferences", "--out", tmp_path / "rm",
         "--lens", "consequence", "--merge", "--epochs", 1, *SMALL)
    change = float(capsys.readouterr().out.split("largest change of score ")[1].split()[0])
    assert change < 1e-4  # of the model as transformers loads it from disk, against stack and head


def test_an_untrained_policy_is_refused(fp32, tmp_path):
    """An adapter that was never loaded leaves before and after equal: no score may be reported."""
    from safetensors.torch import load_file, save_file
    from virtue.plumbing.artefacts import file_hash
    shutil.copytree(fp32 / "policy", tmp_path / "policy")
    path = tmp_path / "policy" / WEIGHTS
    save_file({k: v * (".lora_A." in k) for k, v in load_file(path).items()}, path)
    manifest = read(tmp_path / "policy/virtue.json")
    manifest["sha256"] = file_hash(tmp_path / "policy")
    (tmp_path / "policy/virtue.json").write_text(json.dumps(manifest))
    with pytest.raises(VirtueError, match="logits of ppo equal those of sft"):
        call("run_eval", "models", "--policy", tmp_path / "policy",
             "--out", tmp_path / "report", "--limit", 8)


# ---- bad input ends with status 2 and one line (what, where, the remedy), and writes nothing


def bad_line(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def as_main(monkeypatch, capsys, script: str, *flags) -> tuple[int, str]:
    """Exit status and stderr of `python script.py flags`, run in this process, which has torch
    already; an exception goes up."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    return stop.value.code, capsys.readouterr().err


def test_bad_input(fp32, tmp_path, toy_folder, monkeypatch, capsys):
    good = lines(fp32 / "revisions/revisions.jsonl")[0]

    def revisions(name, text):
        shutil.copytree(fp32 / "revisions", tmp_path / name)
        bad_line(tmp_path / name / "revisions.jsonl", text)
        return tmp_path / name

    def edited(stage, name):  # one record less
        shutil.copytree(fp32 / stage, tmp_path / f"{stage}-edited")
        path = tmp_path / f"{stage}-edited/{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        return path.parent
    long = write_lines(tmp_path / "long.jsonl", (
        {"prompt": f"Question {i}?", "chosen": "Bring it back. " * 600, "rejected": "Keep it."}
        for i in range(4)))
    swapped = tmp_path / "swapped"
    shutil.copytree(fp32 / "rm", swapped)
    shutil.rmtree(swapped / "action")
    shutil.copytree(fp32 / "rm/motivation", swapped / "action")
    other = tmp_path / "other_base"
    shutil.copytree(toy_folder, other)
    config = read(other / "config.json")
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    call("run_sft", "--data", fp32 / "revisions", "--out", tmp_path / "other_sft", "--epochs", 1,
         "--seed", 5, *SMALL)
    out = tmp_path / "out"
    cases = [
        ("run_data", ["revisions", "--prompts", tmp_path / "none.jsonl"],
         ["none.jsonl", "no such file"]),
        ("run_data", ["revisions", "--prompts", bad_line(tmp_path / "empty.jsonl", "")],
         ["empty.jsonl", "empty"]),
        ("run_data",
         ["revisions", "--prompts", bad_line(tmp_path / "a.jsonl", '{"prompt": "x"}\nnot json\n')],
         ["a.jsonl", "line 2"]),
        ("run_data", ["revisions", "--prompts", bad_line(tmp_path / "b.jsonl", '{"text": "x"}\n')],
         ["b.jsonl", "line 1", "prompt"]),
        ("run_data", ["revisions", "--max-prompt-tokens", 2], ["--max-prompt-tokens 2"]),
        ("run_data", ["revisions", "--constitution", tmp_path / "none.json"],
         ["none.json: not a constitution", "No such file", '{"courage": {"asks": "..."']),
        ("run_data", ["preferences", "--constitution", bad_line(tmp_path / "c.json", "[]"),
                      "--dry-run"],
         ["c.json: not a constitution", "no object of 1 to 20 virtues"]),
        ("run_eval", ["judge", "--constitution", tmp_path / "c.json", "--pairs",
                      fp32 / "preferences/action.jsonl"], ["c.json: not a constitution"]),
        ("run_data", ["revisions", "--model", "no/such/model"], ["no/such/model"]),
        ("run_sft", ["--data", revisions("c", json.dumps(good | {"virtue": 7}) + "\n")],
         ["line 1", "virtue", "text"]),
        ("run_sft", ["--data", revisions("d", json.dumps(good) + "\n{}\n")],
         ["revisions.jsonl, line 2", "lacks"]),
        ("run_sft", ["--data", fp32 / "revisions", "--lr", -1], ["--lr", "above 0"]),
        ("run_sft", ["--data", tmp_path], ["virtue.json"]),
        ("run_rm", ["--data", fp32 / "revisions"], ["stage 'revisions'", "stage 'preferences'"]),
        ("run_ppo", ["--rm", swapped], ["lens 'motivation'", "lens 'action'"]),
        ("run_ppo", ["--rm", fp32 / "rm", "--model", other], ["another base"]),
        ("run_ppo", ["--rm", fp32 / "rm", "--sft", fp32 / "policy"], ["stage 'policy'"]),
        ("run_ppo", ["--rm", fp32 / "rm", "--aggregate", "weighted"], ["--weights"]),
        ("run_ppo", ["--rm", fp32 / "rm", "--iterations", 2, "--value-warmup", 0,
                     "--value-warmup", 2],
         ["--value-warmup 2", "--iterations 2"]),
        ("run_ppo", ["--rm", fp32 / "rm", "--weights", "nan", 1, 1], ["--weights", "finite"]),
        ("run_rm", ["--data", fp32 / "preferences", "--sft", tmp_path / "other_sft"],
         ["sampled upon", "--sft"]),
        ("run_rm", ["--data", fp32 / "preferences", "--lens", "action",
                    "--pairs", fp32 / "preferences/motivation.jsonl"],
         ["motivation.jsonl", "lens motivation"]),
        ("run_rm", ["--data", fp32 / "preferences", "--lens", "action", "--pairs", long,
                    "--max-tokens", 4000],
         ["(4 beyond 2048 tokens", "the model's context"]),
        ("run_rm", ["--data", edited("preferences", "action")],
         ["preferences-edited", "action.jsonl", "changed since"]),
        ("run_sft", ["--data", edited("revisions", "revisions")],
         ["revisions-edited", "changed since"]),
        ("run_eval", ["rewards", "--rm", fp32 / "rm", "--data", tmp_path / "preferences-edited"],
         ["changed since"]),
        ("run_eval", ["models", "--policy", fp32 / "sft"], ["stage"]),
        ("run_eval", ["models", "--policy", fp32 / "policy", "--limit", 1], ["at least 2"])]
    for script, flags, words in cases:
        status, stderr = as_main(monkeypatch, capsys, script, *flags, "--out", out)
        error = [line for line in stderr.splitlines() if line.startswith("error:")]
        case = script, flags, stderr
        assert status == 2 and len(error) == 1 and "Traceback" not in stderr, case
        assert all(word in error[0] for word in words), (words, error)
        assert not out.exists(), (script, flags)
    overwriting = ("run_sft", "--data", "revisions"), ("run_eval", "models", "--policy", "policy")
    for script, *flag, folder in overwriting:  # an input is never written over
        with pytest.raises(VirtueError, match="an input of this stage"):
            call(script, *flag, fp32 / folder, "--out", fp32 / folder, "--overwrite")
    with pytest.raises(
        VirtueError,
        match=r"sft, step 1: the gradient of records \w+, .* and \d+ more is not finite: "
        r"lower --lr|sft, step 2",
    ):
        monkeypatch.setattr("virtue.plumbing.training.MAX_GRAD_NORM", 1e30)
        call(
            "run_sft", "--data", fp32 / "revisions", "--out", tmp_path / "nan", "--lr", 1e30, *SMALL
        )
    assert not (tmp_path / "nan/virtue.json").exists()
    occupied = bad_line(tmp_path / "full/notes.txt", "mine")
    command = [sys.executable, ROOT / "run_data.py", "revisions", "--out", occupied.parent]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)  # a true process
    assert result.returncode == 2 and result.stderr.startswith("error:")
    assert result.stderr.count("\n") == 1
    assert "--overwrite" in result.stderr and occupied.read_text() == "mine"


# ---- flags


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_explained(script, monkeypatch):
    """Each flag is an `args.name` in the script or in what reads common flags, and has a help."""
    import argparse
    seen = []
    add = argparse._ActionsContainer.add_argument
    monkeypatch.setattr(argparse._ActionsContainer, "add_argument",
                        lambda self, *a, **k: seen.append(add(self, *a, **k)) or seen[-1])
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse(["--help"])
    commands = sorted((ROOT / "virtue/evaluation").glob("*.py")) if script == "run_eval" else []
    sources = [(ROOT / name).read_text() for name in (
        f"{script}.py", *commands, *(f"virtue/plumbing/{name}.py" for name in (
            "flags", "loading", "ppo_files", "preview", "resume", "training")))]
    read = {node.attr for source in sources for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            and node.value.id == "args"}
    flags = {a.dest: a for a in seen if a.option_strings and a.dest != "help"}
    unread = sorted(set(flags) - read)
    assert len(flags) > 10 and not unread, f"never read: {unread}"
    assert all(a.help for a in flags.values())


@pytest.mark.parametrize(
    "script", ["run_sft", "run_rm", "run_data revisions", "run_data preferences"]
)
def test_help_opens_with_the_flags_that_matter(script, capsys):
    name, *command = script.split()
    with pytest.raises(SystemExit):
        importlib.import_module(name).parse([*command, "--help"])
    text = capsys.readouterr().out
    first, rest = text.split("\nmost used:\n")[1].split("\n\n", 1)
    assert text.startswith("usage: ") and "--out OUT" in text.splitlines()[0] and "options:" in rest
    most, others = (re.findall(r"^  (?:-h, )?(--[a-z-]+)", part, re.M) for part in (first, rest))
    assert 8 <= len(most) <= 12 and len(most) + len(others) - 1 <= 29  # --help is none of them
    assert len({*most, *others}) == len(most) + len(others) and "--out" in most


def test_help_of_sub_commands_teaches(capsys):
    for script, command, flag in (
            ("run_data", "revisions", "--max-prompt-tokens"), ("run_data", "preferences", "--ask"),
            ("run_eval", "models", "--eval-rm"), ("run_eval", "judge", "--pairs"),
            ("run_eval", "rewards", "--data"), ("run_eval", "best-of-n", "--n"),
            ("run_eval", "score", "--answers"), ("run_eval", "choice", "--items"),
            ("run_eval", "chat", "--policy")):
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(script).parse([command, "--help"])
        assert stop.value.code == 0 and flag in capsys.readouterr().out


# ---- --dry-run


def files_of(folder: Path) -> dict:
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


STAGES = {  # flags, and words of what is read, written and planned
    "revisions": (["run_data", "revisions", "--limit", 20],
                  ["prompts: toy, 20 records", "revisions.jsonl, summary.json", "KV cache"]),
    "sft": (["run_sft", "--data", "{}/revisions", "--max-tokens", 99],
            ["--max-new-tokens 48", "--max-tokens 99", "conversations", "metrics.jsonl", "update"]),
    "chosen": (["run_sft", "--data", "{}/preferences"],
               ["reads sft: {}/sft, an adapter of rank 4", "optimiser moments"]),
    "preferences": (["run_data", "preferences", "--sft", "{}/sft"],
                    ["reads sft: {}/sft", "consequence.jsonl, dialogues.jsonl", "judging"]),
    "rm": (["run_rm", "--data", "{}/preferences", "--gradient-checkpointing"],
           ["--gradient-checkpointing", "32 dialogues", "reads pairs of motivation: ", "motivation",
            "update"]),
    "policy": (["run_ppo", "--rm", "{}/rm", "--rollout-size", 8, "--minibatch-size", 8,
                "--limit", 16, "--rank", "whole"],
               ["--sft {}/sft", "--quantize none",
                "reads consequence: {}/rm/consequence, an adapter of rank 4",
                "prompts: toy, 16 records", "rollouts.jsonl", "sampling", "update"]),
    "report": (["run_eval", "models", "--policy", "{}/policy", "--limit", 8],
               ["--rm {}/rm", "reads policy: {}/policy", "report.html", "judging"]),
    "judge": (["run_eval", "judge", "--pairs", "{}/preferences/action.jsonl"],
              ["pairs, 0 passed over", "judge.json", "judging"]),
    "rewards": (["run_eval", "rewards", "--rm", "{}/rm", "--data", "{}/preferences"],
                ["reads action: {}/rm/action", "rewards.json", "scoring"]),
    "chat": (["run_eval", "chat", "--policy", "{}/policy"],
             ["--rm {}/rm", "reads motivation: {}/rm/motivation", "sampling"]),
    "best": (["run_eval", "best-of-n", "--rm", "{}/rm"],
             ["prompts: toy, 64 records", "best_of_n.json", "sampling", "judging"])}


def forbid_weights(monkeypatch):
    monkeypatch.setattr("virtue.plumbing.loading.load_model",
                        lambda *a, **k: pytest.fail("weights were loaded"))
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda *a, **k: pytest.fail("something was downloaded"))


@pytest.fixture
def no_weights(monkeypatch):
    forbid_weights(monkeypatch)


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_says_all_and_writes_nothing(fp32, tmp_path, monkeypatch, capsys,
                                               no_weights, stage):
    flags, words = ([str(w).replace("{}", str(fp32)) for w in part] for part in STAGES[stage])
    monkeypatch.chdir(tmp_path)
    before = files_of(fp32)
    out = () if stage == "chat" else ("--out", "new/out")
    call(*flags, *out, "--dry-run")
    assert files_of(fp32) == before and not files_of(tmp_path)
    said = capsys.readouterr().out
    for word in (*words, "settings: ", "reads base: toy", "memory plan, GiB"):
        assert word in said, word
    assert ("writes new/out: " in said) == bool(out)
    assert "dry-run" not in said


def test_a_dry_run_exits_0(tmp_path):
    command = [sys.executable, ROOT / "run_data.py", "revisions", "--out", tmp_path / "new"]
    done = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "greatest" in done.stdout, done.stderr
    assert not any(tmp_path.iterdir()), done.stderr


@pytest.mark.parametrize(("stage", "flags", "words"), [
    ("policy", ["--rollout-size", 32], "16 prompts fit .*fewer than --rollout-size 32"),
    ("policy", ["--sft", "{}/policy"], "of stage 'policy': give the folder of stage 'sft'"),
    ("policy", ["--rm", "{}/nowhere"], "no artefact here"),
    ("policy", ["--targets", "q"], r"\['q'\] match no linear layer"),
    ("policy", ["--out", "{}/rm"], "not empty"),
    ("policy", ["--out", "{}/rm", "--overwrite"], "an input of this stage"),
    ("policy", ["--sft", "{}/other"], "trained upon .*not upon what is given now"),
    ("policy", ["--model", "{}/base"], "sft: made for another base"),
    ("policy", ["--max-new-tokens", 4000], "positions, but the model has"),
    ("rm", ["--sft", "{}/other"], "sampled upon .*/sft, not upon .*/other"),
    ("sft", ["--data", "{}/rm/action"], "of stage 'rm'"),
    ("report", ["--judge", "{}/nowhere"], "no such folder"),
    ("report", ["--prompts", "{}/none.jsonl"], "none.jsonl: no such file"),
    ("revisions", ["--model", "{}/rm"], "config.json: not a readable model configuration"),
], ids=str)
def test_a_dry_run_refuses_what_a_run_refuses(fp32, tmp_path, monkeypatch, stage, flags, words):
    world = tmp_path / "world"
    shutil.copytree(fp32, world)
    if "{}/other" in flags:
        call("run_sft", "--data", world / "revisions", "--out", world / "other", "--epochs", 1,
             "--lr", 1e-3, *SMALL)
    if "{}/base" in flags:
        make_tiny_model(world / "base")
    before = files_of(world)
    forbid_weights(monkeypatch)
    out = () if "--out" in flags else ("--out", tmp_path / "new")
    command = [*STAGES[stage][0], *out, *flags, "--dry-run"]
    with pytest.raises(VirtueError, match=words):
        call(*(str(flag).replace("{}", str(world)) for flag in command))
    assert files_of(world) == before and not (tmp_path / "new").exists()


def test_a_run_may_be_moved_whole(fp32, tmp_path, monkeypatch, capsys):
    shutil.copytree(fp32, tmp_path / "old")
    for stage in ("rm", "policy"):  # made in a folder that is gone
        for path in (tmp_path / "old" / stage).rglob("virtue.json"):
            path.write_text(path.read_text().replace(str(fp32), str(tmp_path / "gone")))
    shutil.move(tmp_path / "old", tmp_path / "new")
    forbid_weights(monkeypatch)
    new = tmp_path / "new"
    call("run_ppo", "--rm", new / "rm", "--out", tmp_path / "x", *SMALL, "--dry-run")
    assert f"reads sft: {new / 'sft'}," in capsys.readouterr().out
    call("run_eval", "models", "--policy", new / "policy", "--out", tmp_path / "x", "--dry-run")
    out = capsys.readouterr().out
    assert f"reads sft: {new / 'sft'}," in out and f"reads action: {new / 'rm/action'}," in out
    shutil.move(new / "sft", tmp_path / "elsewhere")
    with pytest.raises(VirtueError, match=r"new/rm/action: was made with --sft .*gone/sft, which "
                       r"is gone, and it is not at .*new/sft either: give --sft"):
        call("run_ppo", "--rm", new / "rm", "--out", tmp_path / "x", "--dry-run")
    call("run_ppo", "--rm", new / "rm", "--sft", tmp_path / "elsewhere", "--out", tmp_path / "x",
         *SMALL, "--dry-run")
    with pytest.raises(VirtueError, match=r"rm/action: one artefact \(of stage 'rm'\): give the "
                       r"folder of run_rm.py"):
        call("run_ppo", "--rm", new / "rm/action", "--out", tmp_path / "x", "--dry-run")


def test_a_dry_run_needs_no_weights(fp32, tmp_path, monkeypatch, capsys, no_weights):
    config = (read(ROOT / "virtue/toy/model/config.json")
              | {"hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768})
    (tmp_path / "big").mkdir()
    (tmp_path / "big/config.json").write_text(json.dumps(config))
    flags = ["run_ppo", "--rm", fp32 / "rm", "--rollout-size", 8, "--minibatch-size", 8,
             "--limit", 8, "--out", tmp_path / "new", "--quantize", "nf4", "--dry-run"]
    call(*flags, "--model", tmp_path / "big")
    said = capsys.readouterr().out
    assert "a run needs tokenizer.json, model*.safetensors as well" in said and "greatest" in said
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    call(*flags, "--model", "nobody/nothing")
    said = capsys.readouterr().out
    assert "reads base: nobody/nothing, on the hub; a run needs config.json" in said
    assert "memory plan: needs the config.json of nobody/nothing" in said
    call("run_data", "preferences", "--judge", "nobody/judge",
         "--out", tmp_path / "new", "--dry-run")
    assert "memory plan: needs the config.json of nobody/judge" in capsys.readouterr().out
    snapshot = tmp_path / "cache/models--nobody--nothing/snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text(snapshot.name)
    shutil.copy(tmp_path / "big/config.json", snapshot)
    call(*flags, "--model", "nobody/nothing")
    said = capsys.readouterr().out
    assert f"reads base: nobody/nothing, {snapshot}; a run needs tokenizer.json" in said
    assert "greatest" in said


def test_a_run_upon_another_base_than_the_toy_prints_its_plan(tmp_path, capsys):
    shutil.copytree(ROOT / "virtue/toy/model", tmp_path / "base")
    call("run_data", "revisions", "--model", tmp_path / "base", "--limit", 4,
         "--out", tmp_path / "data")
    said = capsys.readouterr().out
    assert said.startswith("memory plan") and "settings" not in said
    assert (tmp_path / "data/virtue.json").is_file()


def test_a_run_that_dies_while_it_finishes_loses_nothing(fp32, tmp_path, monkeypatch):
    import virtue.plumbing.resume
    from virtue.plumbing.artefacts import read_manifest
    flags = ["--rm", fp32 / "rm", "--out", tmp_path / "p", "--iterations", 1, *BRIEF,
             "--rank", 4, "--limit", 8]

    def die(out):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(virtue.plumbing.resume, "finish", die)
        with pytest.raises(KeyboardInterrupt):
            call("run_ppo", *flags)
    call("run_ppo", *flags, "--resume")
    found = [read_manifest(tmp_path / "p" / name)["stage"] for name in ("", "best", "value")]
    assert found == ["policy", "policy", "value"]
    assert not (tmp_path / "p/resume").exists()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/metrics.jsonl").write_text("mine")
    with pytest.raises(VirtueError, match="not empty"):
        call("run_ppo", *flags[:2], "--out", tmp_path / "foreign", "--resume", *flags[4:])
    assert (tmp_path / "foreign/metrics.jsonl").read_text() == "mine"
