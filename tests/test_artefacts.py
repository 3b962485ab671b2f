"""Artefacts: a round trip through the real model, every refusal, nothing half-written."""
from __future__ import annotations

import hashlib
import json
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model

from virtue import VirtueError
from virtue.plumbing import artefacts
from virtue.plumbing.artefacts import load_artifact, read_manifest, save_artifact
from virtue.lora import (
    adapter_config,
    adapter_parameters,
    adapter_state,
    add_adapter,
    remove_adapter,
    use_stack,
)
from virtue.models import ScalarHead, hidden_states
from virtue.plumbing.loading import open_base

BASE = {"id": "tiny", "fingerprint": "f1"}
MINE = dict(base=BASE, template="t1")
IDS = torch.tensor([[1, 7, 9, 30, 2]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(folder):
    from transformers import MistralForCausalLM

    return MistralForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


def adapt(model, name, seed, **settings):
    add_adapter(model, name, **{"rank": 4, "alpha": 8, "seed": seed, **settings})
    generator = torch.Generator().manual_seed(seed)
    for p in adapter_parameters(model, name):
        p.data = torch.randn(p.shape, generator=generator) * 0.1


def hidden(model, *stack):
    with torch.no_grad(), use_stack(model, *stack):
        return hidden_states(model, IDS, torch.ones_like(IDS))


@pytest.fixture
def saved(model, tmp_path):
    """An sft artefact and, trained upon it, a reward model's with its head."""
    adapt(model, "sft", 1)
    adapt(model, "action", 2)
    head = ScalarHead(model.config.hidden_size, seed=3)
    for name in ("sft", "rm"):
        artefacts.prepare_output(tmp_path / name, overwrite=False)
    save_artifact(tmp_path / "sft", stage="sft", model=model, adapter="sft", parents={}, seed=0,
                  settings={}, **MINE)
    save_artifact(tmp_path / "rm", stage="rm", model=model, adapter="action", head=head, seed=7,
                  parents={"sft": tmp_path / "sft"}, settings={"lr": 1e-3, "out": tmp_path / "rm"},
                  extra={"lens": "action", "score_mean": torch.tensor(0.5),
                         "score_std": np.float32(2)}, **MINE)
    return tmp_path, head


def test_round_trip_is_exact(model, saved):
    path, head = saved
    before = hidden(model, "sft", "action")
    score = head(before)
    remove_adapter(model, "sft")
    remove_adapter(model, "action")
    assert not torch.equal(hidden(model), before)
    sft, none = load_artifact(path / "sft", model, "sft", stage="sft", **MINE)
    rm, again = load_artifact(path / "rm", model, "a", stage="rm", lens="action",
                              parents={"sft": path / "sft"}, **MINE)
    assert none is None and torch.equal(hidden(model, "sft", "a"), before)
    assert torch.equal(again(hidden(model, "sft", "a")), score) and again.bias is None
    assert sft["parents"] == {} and rm == read_manifest(path / "rm")


def test_a_trained_adapter_is_refilled_and_keeps_its_gradient(model, saved):
    path, _ = saved
    before = hidden(model, "sft")
    for p in adapter_parameters(model, "sft"):
        p.data.zero_()
    load_artifact(path / "sft", model, "sft", stage="sft", **MINE)
    assert torch.equal(hidden(model, "sft"), before)
    assert all(p.requires_grad for p in adapter_parameters(model, "sft"))


def test_files_are_pefts_and_tell_their_origin(saved):
    path, head = saved
    assert sorted(os.listdir(path / "rm")) == [
        "adapter_config.json", "adapter_model.safetensors", "virtue.json"]
    tensors = load_file(path / "rm" / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    assert tensors[layer + "A.weight"].shape == (4, head.weight.shape[1])
    assert tensors[layer + "B.weight"].shape[1] == 4
    assert torch.equal(tensors["base_model.model.score.weight"], head.weight.detach())
    config = json.loads((path / "rm" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert (config["r"], config["base_model_name_or_path"]) == (4, "tiny")
    config = json.loads((path / "sft" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", None)
    manifest = json.loads((path / "rm" / "virtue.json").read_text())
    digest = hashlib.sha256((path / "sft" / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert manifest["parents"] == {"sft": {"folder": str(path / "sft"), "sha256": digest}}
    assert artefacts.file_hash(path / "sft") == digest
    assert manifest["extra"] == {"lens": "action", "score_mean": 0.5, "score_std": 2.0}
    assert manifest["settings"] == {"lr": 1e-3, "out": str(path / "rm")} and manifest["seed"] == 7
    assert manifest["stage"] == "rm" and manifest["base"] == BASE and manifest["template"] == "t1"
    assert manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "python" in manifest["versions"]


def test_a_head_with_bias(model, tmp_path):
    adapt(model, "value", 1)
    head = ScalarHead(model.config.hidden_size, bias=True, seed=1)
    head.bias.data.fill_(0.25)
    save_artifact(tmp_path, stage="value", model=model, adapter="value", head=head, parents={},
                  seed=0, settings={}, **MINE)
    again = load_artifact(tmp_path, model, "value", stage="value", **MINE)[1]
    assert again.bias.item() == 0.25 and torch.equal(again.weight, head.weight)


def test_same_adapter_same_bytes(model, saved):
    path, head = saved
    first = (path / "rm" / "adapter_model.safetensors").read_bytes()
    manifest = (path / "rm" / "virtue.json").read_bytes()
    read = read_manifest(path / "rm")
    save_artifact(path / "rm", stage="rm", model=model, adapter="action", head=head, seed=7,
                  parents={"sft": path / "sft"}, settings=read["settings"],
                  extra=read["extra"], **MINE)
    assert (path / "rm" / "adapter_model.safetensors").read_bytes() == first
    assert (path / "rm" / "virtue.json").read_bytes() == manifest


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refuse(model, folder, words, **changes):
    """The artefact is refused in one line that names it, and the model is left as it was."""
    from virtue.lora import adapter_names

    names, before = adapter_names(model), hidden(model, "sft", "action")
    with pytest.raises(VirtueError, match=words) as caught:
        load_artifact(folder, model, "new", **{"stage": "rm", **MINE, **changes})
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert adapter_names(model) == names
    assert torch.equal(hidden(model, "sft", "action"), before)


def test_mismatches_are_refused(model, saved):
    path, _ = saved
    rm, sft = path / "rm", path / "sft"
    refuse(model, rm, "stage 'rm': give the folder of stage 'sft'", stage="sft")
    refuse(model, rm, "lens 'action': give the folder of lens 'motivation'", lens="motivation")
    refuse(model, sft, "lens None", stage="sft", lens="action")
    refuse(model, rm, "another base", base={"id": "tiny", "fingerprint": "f2"})
    refuse(model, rm, "template", template="t2")
    refuse(model, rm, "trained upon .*sft as it was", parents={})
    refuse(model, sft, "trained upon the bare base", stage="sft", parents={"sft": sft})
    adapt(model, "other", 9)
    save_artifact(sft, stage="sft", model=model, adapter="other", parents={}, seed=0, settings={},
                  **MINE)
    refuse(model, rm, "as it was then", parents={"sft": sft})
    load_artifact(rm, model, "new", stage="rm", **MINE)


@pytest.mark.parametrize("settings", [{"rank": 2}, {"alpha": 4}, {"targets": ("q_proj",)}])
def test_another_rank_or_target_list_is_refused(model, saved, settings):
    adapt(model, "new", 5, **settings)
    words = "rm: adapter 'new'.*(r|lora_alpha|target_modules) is .*, expected"
    refuse(model, saved[0] / "rm", words)


def test_no_artefact(model, saved, tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        refuse(model, folder, "no artefact here")
    (saved[0] / "rm" / "virtue.json").unlink()  # what an interrupted stage leaves
    refuse(model, saved[0] / "rm", "no artefact here")


def test_damage_is_refused(model, saved):
    rm = saved[0] / "rm"
    weights, manifest = rm / "adapter_model.safetensors", rm / "virtue.json"
    good = manifest.read_text()
    manifest.write_text("{")
    refuse(model, rm, "not JSON")
    manifest.write_text('{"stage": "rm"}')
    refuse(model, rm, "not an object with")
    manifest.write_text(good)

    tensors = load_file(weights)
    def put(changed):
        save_file(changed, weights)
        edit_json(manifest, sha256=artefacts.file_hash(rm))
    save_file({k: v + 1 for k, v in tensors.items()}, weights)
    refuse(model, rm, "changed since")
    score = "base_model.model.score.weight"
    put({k: v for k, v in tensors.items() if k != score})
    refuse(model, rm, "without its scalar head")
    put({**tensors, score: tensors[score][:, 1:].clone()})
    refuse(model, rm, "scalar head")
    put({k: v[..., 1:].contiguous() if k.endswith("A.weight") else v for k, v in tensors.items()})
    refuse(model, rm, "another base")
    put({k: v for k, v in tensors.items() if "layers.1" not in k})
    refuse(model, rm, "missing")
    weights.write_bytes(b"no tensors")
    edit_json(manifest, sha256=artefacts.file_hash(rm))
    refuse(model, rm, "damaged")
    put(tensors)
    (rm / "adapter_config.json").unlink()
    refuse(model, rm, "adapter_config.json: cannot be read")
    weights.unlink()
    refuse(model, rm, "adapter_model.safetensors: cannot be read")


def test_an_interrupted_save_leaves_no_artefact(model, saved, monkeypatch):
    rm = saved[0] / "rm"
    for fails in range(3):  # at the weights, at the configuration, at the manifest
        calls = []

        def write(path, data, fails=fails, calls=calls, write=artefacts.write_atomic):
            calls.append(path)
            if len(calls) > fails:
                raise KeyboardInterrupt
            write(path, data)
        monkeypatch.setattr(artefacts, "write_atomic", write)
        with pytest.raises(KeyboardInterrupt):
            save_artifact(rm, stage="rm", model=model, adapter="sft", parents={}, seed=0,
                          settings={}, **MINE)
        monkeypatch.undo()
        assert not (rm / "virtue.json").exists()
    with pytest.raises(VirtueError, match="no such|cannot be read"):  # a parent that is not there
        save_artifact(saved[0] / "sft", stage="sft", model=model, adapter="sft", seed=0,
                      parents={"x": saved[0] / "none"}, settings={}, **MINE)
    assert read_manifest(saved[0] / "sft", "sft")  # refused before anything was touched


# ---- files --------------------------------------------------------------------------------------


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    artefacts.write_json(path, {"a": torch.tensor([1.5]), "b": tmp_path, "c": "é"})
    assert json.loads(path.read_text("utf-8")) == {"a": [1.5], "b": str(tmp_path), "c": "é"}
    artefacts.write_jsonl(tmp_path / "a.jsonl", iter([{"a": 1}, {"b": "x\ny\u2028"}]))
    raw = (tmp_path / "a.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in raw[:-1]] == [{"a": 1}, {"b": "x\ny\u2028"}]
    assert raw[2] == b""
    with pytest.raises(ValueError):
        artefacts.write_json(path, float("nan"))

    def full(fd):
        raise OSError(28, "No space left on device")
    old = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(VirtueError, match="a.json: cannot be written .No space"):
        artefacts.write_atomic(path, b"new")
    assert path.read_bytes() == old and not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    with pytest.raises(VirtueError, match="cannot be written"):
        artefacts.write_atomic(tmp_path / "none" / "a", b"")
    artefacts.write_atomic(path, lambda temporary: temporary.write_bytes(b"large"))
    assert path.read_bytes() == b"large" and not list(tmp_path.glob("*.tmp"))
    # this is what safetensors says of a full disk
    with pytest.raises(VirtueError, match="a.json: cannot be written .*make room"):
        artefacts.write_atomic(path, lambda place: save_file({"a": torch.zeros(2)}, place / "no"))
    path.write_bytes(old)
    assert artefacts.sha256_file(path) == hashlib.sha256(old).hexdigest()


def test_prepare_output(tmp_path):
    out = artefacts.prepare_output(tmp_path / "a" / "b", overwrite=False)
    assert out.is_dir() and artefacts.prepare_output(str(out), overwrite=False) == out
    for name in ("virtue.json", "other"):
        (out / name).write_text("{}")
    with pytest.raises(VirtueError, match="b: not empty.*--overwrite"):
        artefacts.prepare_output(out, overwrite=False)
    assert sorted(os.listdir(out)) == ["other", "virtue.json"]
    artefacts.prepare_output(out, overwrite=True)
    assert os.listdir(out) == ["other"]
    with pytest.raises(VirtueError, match="--out"):
        artefacts.prepare_output(out / "other", overwrite=True)


def test_the_readmes_way_from_peft_gives_an_sft_model(tmp_path, monkeypatch):
    """The way of docs/libraries.md on the toy; PEFT leaves a folder without virtue.json."""
    base = open_base(Namespace(model="toy", quantize="none", dtype="fp32", device="cpu"))
    add_adapter(base.model, "theirs", rank=2, alpha=4, targets=("q_proj",))
    torch.nn.init.normal_(adapter_parameters(base.model, "theirs")[-1],
                          generator=torch.Generator().manual_seed(0))
    (tmp_path / "PEFT").mkdir()
    save_file(adapter_state(base.model, "theirs"), tmp_path / "PEFT/adapter_model.safetensors")
    (tmp_path / "PEFT/adapter_config.json").write_text(
        json.dumps(adapter_config(base.model, "theirs", "toy")))
    with pytest.raises(VirtueError, match="that PEFT trained, docs/libraries.md says"):
        read_manifest(tmp_path / "PEFT")
    block = (Path(__file__).parent.parent / "docs/libraries.md").read_text().split(
        "```python\n")[1].split("```")[0]
    for told, here in (("mistralai/Mistral-7B-Instruct-v0.2", "toy"), ('"nf4"', '"none"'),
                       ('"bf16"', '"fp32"'), ('"auto"', '"cpu"')):
        assert told in block
        block = block.replace(told, here)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    again = open_base(Namespace(model="toy", quantize="none", dtype="fp32",
                                device="cpu"))
    load_artifact(tmp_path / "runs/sft", again.model, "sft", stage="sft", base=again.info,
                  template=again.template)
    for key, value in adapter_state(base.model, "theirs").items():
        assert torch.equal(adapter_state(again.model, "sft")[key], value)
