"""The code on a card of virtue.plumbing.hub, run as it stands, on the files that would go up:
the scores and logits of the stack."""
from __future__ import annotations

import re

import pytest
import torch

from virtue.plumbing import hub
from virtue.plumbing.artefacts import save_artifact, write_json, write_jsonl, write_manifest
from virtue.dialogue import Dialogue, Turn, encode_conversation
from virtue.lora import use_stack
from virtue.plumbing.merge import write_merged
from virtue.models import ScalarHead
from virtue.plumbing.loading import load_tokenizer
from virtue.rollout import score_dialogues

# the placeholder on the card
MESSAGES = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]


@pytest.fixture
def execute(tmp_path, folder, capsys):
    """execute(artefact) -> the variables of its card's code, run on a folder of what goes up."""
    def run(artefact):
        kind, manifest, files = hub.contents(artefact)
        text = hub.card("me/x", kind, hub.public(manifest),
                        hub.results(artefact, kind, manifest, None), None)
        (tmp_path / "up").mkdir()
        for name, data in files.items():
            data = data if isinstance(data, bytes) else data.read_bytes()
            (tmp_path / "up" / name).write_bytes(data)
        (tmp_path / "up/README.md").write_text(text)
        code, = re.findall(r"```python\n(.*?)```", text, re.S)
        assert code.count('"me/x"') == 1
        variables = {}
        code = code.replace('"me/x"', repr(str(tmp_path / "up")))
        exec(code.replace('"path/to/base"', repr(str(folder))), variables)
        return variables
    return run


@pytest.fixture
def run(tmp_path, folder, model, adapt):
    """An SFT adapter, a policy, a reward model upon it, and the score of MESSAGES by that."""
    tokenizer, head = load_tokenizer(folder), ScalarHead(model.config.hidden_size, seed=3)
    common = dict(model=model, base={"id": str(folder), "fingerprint": "f"}, template="t",
                  seed=0, settings={})
    for seed, name in enumerate(("sft", "policy", "action")):
        adapt(model, name, seed)
        (tmp_path / name).mkdir()
        extra = {"lens": "action", "score_mean": 0.5, "score_std": 2.0,
                 "held_out": dict.fromkeys(("accuracy", "log_loss", "calibration_error"), 0.5)}
        save_artifact(tmp_path / name, stage={"action": "rm"}.get(name, name), adapter=name,
                      head=head if name == "action" else None,
                      parents={"sft": tmp_path / "sft"} if seed else {},
                      extra=extra if name == "action" else {}, **common)
    ids, spans = encode_conversation(tokenizer, MESSAGES)
    dialogue = Dialogue("", [], ids, (Turn(*spans[0], False),))
    write_merged(tmp_path / "action/merged", model, tokenizer, ("sft", "action"), head,
                 [dialogue], 0)
    models = [(("sft", "action"), head)]
    return tmp_path, score_dialogues(model, models, [dialogue], [0], 0, batch_size=1).item()


def test_a_policy_speaks(run, execute, model, capsys):
    pytest.importorskip("peft")
    found = execute(run[0] / "policy")
    ids = found["prompt"]["input_ids"]
    with use_stack(model, "sft", "policy"), torch.no_grad():
        expected = model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(found["model"](ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert "[INST] ...[/INST]" in capsys.readouterr().out


def test_reward_models_score(run, execute):
    pytest.importorskip("peft")
    folder, score = run
    found = execute(folder / "action")
    assert found["score"] == pytest.approx(score, abs=1e-5)
    assert found["reward"] == pytest.approx((score - 0.5) / 2, abs=1e-5)


def test_merged_reward_models_score(run, execute):
    folder, score = run
    assert execute(folder / "action/merged")["score"] == pytest.approx(score, abs=1e-5)


def test_data_load(tmp_path, execute, monkeypatch):
    """The card's metadata names the parts, and datasets reads it."""
    pytest.importorskip("datasets")
    (tmp_path / "p").mkdir()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("action", "motivation", "consequence", "dialogues"):
        write_jsonl(tmp_path / f"p/{name}.jsonl", [{"id": name}])
    write_json(tmp_path / "p/summary.json", {"prompts": 1})
    write_manifest(tmp_path / "p", stage="preferences", base={"id": "toy", "fingerprint": "f"},
                   template="t", parents={}, settings={}, seed=0, sha256="0")
    assert execute(tmp_path / "p")["data"].to_list() == [{"id": "action"}]
