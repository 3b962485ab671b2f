"""Publishing: what would go up, what the card says of it, and what is refused.
The hub is a stand-in; nothing opens a connection."""
from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
import socket

import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard
from huggingface_hub import HfApi as REAL
from tiny import make_tiny_model

from virtue import VirtueError
from virtue.plumbing import hub
from virtue.plumbing.artefacts import (
    data_hash,
    file_hash,
    load_artifact,
    save_artifact,
    write_json,
    write_jsonl,
    write_manifest,
)
from virtue.dialogue import Dialogue, Turn
from virtue.ethics import LENSES
from virtue.lora import adapter_parameters, add_adapter, use_stack
from virtue.plumbing.merge import write_merged
from virtue.models import ScalarHead
from virtue.plumbing.loading import load_model, load_tokenizer, resolve
from virtue.evaluation.stats import wilson

BASE = {"id": "mistralai/Mistral-7B-Instruct-v0.2", "fingerprint": "f" * 64}
KNOWN = dict(base=BASE, template="t")
IDS = torch.tensor([[1, 7, 9, 30, 2]])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("base"))
    model = load_model(folder)
    for seed, (name, targets) in enumerate((("sft", ("q_proj", "up_proj")),
                                            ("policy", ("q_proj", "down_proj")),
                                            ("motivation", ("v_proj",)))):
        add_adapter(model, name, rank=3 + seed, alpha=7, targets=targets, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter_parameters(model, name):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model, load_tokenizer(folder)


def row(d):
    return {"difference": d, "low": d - 0.05, "high": d + 0.05}


@pytest.fixture
def run(model, tmp_path):
    """The folders of a run: adapters, a merged model, data, a report."""
    net, tokenizer = model
    for name in ("sft", "policy", "rm/motivation", "revisions", "preferences", "report", "value"):
        (tmp_path / name).mkdir(parents=True)
    settings = {"model": BASE["id"], "quantize": "nf4", "dtype": "bf16",
                "prompts": str(tmp_path / "mine/train.jsonl"), "lr": 0.25, "out": tmp_path / "x",
                "sft": tmp_path / "sft"}
    common = dict(model=net, seed=5, settings=settings, **KNOWN)
    save_artifact(tmp_path / "sft", stage="sft", adapter="sft", parents={},
                  extra={"held_out_loss": 1.25, "held_out_loss_before": 2.5, "trained_on": 77},
                  **common)
    upon = {"sft": tmp_path / "sft"}
    save_artifact(tmp_path / "policy", stage="policy", adapter="policy", parents=upon,
                  extra={"iterations": 3}, **common)
    head = ScalarHead(64, seed=3)
    extra = {"lens": "motivation", "score_mean": 1.5, "score_std": 0.25, "scored_dialogues": 9,
             "trained_on": 66, "held_out_pairs": 50,
             "held_out": {"accuracy": 0.81, "log_loss": 0.5, "log_loss_low": 0.45,
                          "log_loss_high": 0.55, "calibration_error": 0.0625}}
    save_artifact(tmp_path / "rm/motivation", stage="rm", adapter="motivation", head=head,
                  parents=upon, extra=extra, **common)
    save_artifact(tmp_path / "value", stage="value", adapter="policy",
                  head=ScalarHead(64, bias=True), parents=upon, **common)
    write_merged(tmp_path / "rm/motivation/merged", net, tokenizer, ("sft", "motivation"), head,
                 [Dialogue("", [], IDS[0].tolist(), (Turn(2, 5, False),))], 0)
    write_jsonl(tmp_path / "revisions/revisions.jsonl", [{"id": "1"}])
    write_json(tmp_path / "revisions/summary.json",
               {"prompts": 12, "prompts_too_long": 1, "revisions": 9})
    for name in (*LENSES, "dialogues"):
        write_jsonl(tmp_path / f"preferences/{name}.jsonl", [{"id": name}])
    write_json(tmp_path / "preferences/summary.json",
               {"prompts": 12,
                **{lens: {"pairs": 8, "ties": 0.125, "gold_agreement": None} for lens in LENSES}})
    manifest = dict(seed=5, settings=settings, **KNOWN)
    write_manifest(tmp_path / "revisions", stage="revisions", parents={},
                   sha256=data_hash(tmp_path / "revisions", ["revisions.jsonl"]), **manifest)
    write_manifest(tmp_path / "preferences", stage="preferences", parents=upon,
                   extra={"judge": BASE}, sha256="0", **manifest)
    columns = {name: {"gold": 0.25 * i, "reward/action": i, "kl": 0.5}
               for i, name in enumerate(("base", "sft", "ppo"), 1)}
    write_json(tmp_path / "report/scores.json", {
        "prompts": 240, "seed": 5, "models": columns, "interval": "bootstrap, 95 %",
        "warnings": ["reward rose, but gold fell by 0.100"],
        "differences": {"sft - base": {"gold": row(0.25)}, "ppo - sft": {"gold": row(-0.1)},
                        "ppo - base": {"gold": row(0.15)}},
        "wins": {"ppo vs sft": {"action": {"rate": 0.75, "low": 0.625, "high": 0.875, "pairs": 48},
                                "motivation": None}}})
    write_manifest(tmp_path / "report", stage="eval",
                   parents={**upon, "policy": tmp_path / "policy"}, **manifest)
    return tmp_path


@pytest.fixture
def api(monkeypatch):
    """A stand-in for the hub, which notes what it is told; sockets are closed to everybody."""
    class Api:
        calls: list[tuple[str, tuple, dict]] = []

        def create_repo(self, *args, **kwargs):
            # a TypeError here means that the real one would not take it
            inspect.signature(REAL.create_repo).bind(self, *args, **kwargs)
            Api.calls.append(("create_repo", args, kwargs))
            return f"https://hub/{args[0]}"

        def create_commit(self, *args, **kwargs):
            inspect.signature(REAL.create_commit).bind(self, *args, **kwargs)
            Api.calls.append(("create_commit", args, kwargs))

    def closed(*args, **kwargs):
        raise AssertionError("a connection")
    Api.calls = []
    monkeypatch.setattr(socket.socket, "connect", closed)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return Api


def published(api) -> dict[str, bytes]:
    """What went up, by name."""
    (_, (name, operations), _), = [call for call in api.calls if call[0] == "create_commit"]
    found = {}
    for operation in operations:
        with operation.as_file() as file:
            found[operation.path_in_repo] = file.read()
    return found


def push(run, folder, *flags, name="me/virtue-x"):
    hub.main([str(run / folder), "--name", name, *map(str, flags)])


def refuse(words, run, folder, *flags, **changes):
    with pytest.raises(VirtueError, match=words) as caught:
        push(run, folder, *flags, **changes)
    assert "\n" not in str(caught.value)


def test_merging_shows_no_bar_and_leaves_bars_as_they_were(model, tmp_path, capsys):
    from transformers.utils import logging
    logging.enable_progress_bar()
    write_merged(tmp_path, *model, ("sft",), ScalarHead(64),
                 [Dialogue("", [], IDS[0].tolist(), (Turn(2, 5, False),))], 0)
    assert "Loading" not in capsys.readouterr().err and logging.is_progress_bar_enabled()


@torch.no_grad()
def logits(model, *stack):
    with use_stack(model, *stack):
        return model(IDS).logits


def test_an_adapter_goes_up_flat_and_is_an_artefact(run, model, api, capsys):
    push(run, "policy", "--report", run / "report")
    assert [(call, kwargs) for call, _, kwargs in api.calls] == [
        ("create_repo", {"repo_type": "model", "private": True, "exist_ok": True}),
        ("create_commit", {"repo_type": "model", "commit_message": "Upload by virtue"})]
    assert "wrote 4 files to https://hub/me/virtue-x" in capsys.readouterr().out
    files = published(api)
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors",
                             "virtue.json"]
    folder = run / "fetched"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    net, expected = model[0], logits(model[0], "sft", "policy")
    try:
        manifest, head = load_artifact(folder, net, "flat", stage="policy", parents={}, **KNOWN)
        torch.testing.assert_close(logits(net, "flat"), expected, atol=1e-5, rtol=1e-5)
    finally:
        from virtue.lora import remove_adapter
        remove_adapter(net, "flat")
    assert head is None
    flat = {name: file_hash(run / name) for name in ("sft", "policy")}
    assert manifest["extra"] == {"iterations": 3, "flat": flat}
    assert json.loads(files["adapter_config.json"])["r"] == 3 + 4


def test_the_same_files_into_a_folder(run, api, capsys):
    push(run, "policy")
    up = published(api)
    hub.main([str(run / "policy"), "--push-to-hub", "me/virtue-x", "--out", str(run / "flat")])
    assert {p.name: p.read_bytes() for p in (run / "flat").iterdir()} == up
    assert "wrote 4 files to " in capsys.readouterr().out
    push(run, "revisions", "--out", run / "data")  # files as they are
    assert ((run / "data/revisions.jsonl").read_bytes()
            == (run / "revisions/revisions.jsonl").read_bytes())
    # no name is needed where nothing goes up
    hub.main([str(run / "policy"), "--out", str(run / "unnamed")])
    assert 'repository = "unnamed"' in (run / "unnamed/README.md").read_text()
    assert (run / "unnamed/virtue.json").read_bytes() == up["virtue.json"]
    with pytest.raises(VirtueError, match="neither --name nor --out: give"):
        hub.main([str(run / "policy"), "--dry-run"])
    refuse("flat: exists and is not an empty folder: give another --out, or empty it", run,
           "policy", "--out", run / "flat")  # nothing is overwritten
    assert len(api.calls) == 2  # the first alone went up


def test_a_reward_model_keeps_its_head(run, api):
    from safetensors.torch import load, load_file
    push(run, "rm/motivation")
    state = load(published(api)["adapter_model.safetensors"])
    own = load_file(run / "rm/motivation/adapter_model.safetensors")
    assert torch.equal(state["base_model.model.score.weight"], own["base_model.model.score.weight"])
    assert json.loads(published(api)["adapter_config.json"])["modules_to_save"] == ["score"]


def test_what_stands_alone_goes_up_as_it_is(run, api):
    push(run, "sft", "--public")
    assert api.calls[0][2]["private"] is False
    weights = (run / "sft/adapter_model.safetensors").read_bytes()
    assert published(api)["adapter_model.safetensors"] == weights
    api.calls.clear()
    push(run, "rm/motivation/merged")
    files = published(api)
    assert (files["model.safetensors"]
            == (run / "rm/motivation/merged/model.safetensors").read_bytes())
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "virtue.json",
            "README.md"} <= set(files)
    api.calls.clear()
    push(run, "preferences")
    assert api.calls[0][2]["repo_type"] == api.calls[1][2]["repo_type"] == "dataset"
    files = published(api)
    assert sorted(files) == ["README.md", *sorted(f"{n}.jsonl" for n in (*LENSES, "dialogues")),
                             "summary.json", "virtue.json"]
    assert files["action.jsonl"] == (run / "preferences/action.jsonl").read_bytes()


FOLDERS = ("sft", "policy", "rm/motivation", "rm/motivation/merged", "revisions", "preferences")


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_tells_of_the_machine_and_the_code_is_code(run, api, folder):
    push(run, folder)
    for name, data in published(api).items():
        assert str(run).encode() not in data, name
    text = published(api)["README.md"].decode()
    for title in ("Base and data", "Results", "How to load it", "Intended use and limits",
                  "Flags", "Licence"):
        assert f"\n## {title}\n" in text
    assert '"lr": 0.25' in text and "train.jsonl" in text and "weights nf4, bf16" in text
    assert "no moral advice" in text
    code, = re.findall(r"```python\n(.*?)```", text, re.S)
    ast.parse(code)
    assert 'repository = "me/virtue-x"' in code and ("base =" in code) == ("(base" in code)
    card = (DatasetCard if folder in ("revisions", "preferences") else ModelCard)(text)
    assert card.data.license == "other" and "virtue-ethics" in card.data.tags
    assert "The terms of the base model" in text
    if folder in ("sft", "policy", "rm/motivation"):
        assert card.data.library_name == "peft" and card.data.base_model == BASE["id"]
    if folder == "preferences":
        files = [f"{name}.jsonl" for name in (*LENSES, "dialogues")]
        assert [c["data_files"] for c in card.data.configs] == files
        assert f"judge: {BASE['id']}" in text


def test_the_card_of_a_toy_adapter_finds_the_toy(run, api):
    manifest = json.loads((run / "sft/virtue.json").read_text())
    manifest |= {"base": {"id": "toy", "fingerprint": "f"}}
    (run / "sft/virtue.json").write_text(json.dumps(manifest))
    push(run, "sft")
    text = published(api)["README.md"].decode()
    code, = re.findall(r"```python\n(.*?)\nrepository", text, re.S)
    found = {}
    exec(code, found)
    assert found["base"] == str(resolve("toy"))
    assert "It belongs to a toy world" in text and "base_model" not in text


def test_numbers_come_with_their_intervals(run, api, capsys):
    def card(folder, *flags):
        push(run, folder, "--dry-run", *flags)
        return capsys.readouterr().out
    assert "Not measured" in card("policy")
    text = card("policy", "--report", run / "report")
    assert ("| gold | +0.250 [+0.200, +0.300] | -0.100 [-0.150, -0.050] | +0.150 [+0.100, +0.200] |"
            in text)
    assert "240 held-out prompts" in text
    assert "action preferred on 75% [62%, 88%] of 48" in text
    assert "- **warning**: reward rose, but gold fell" in text
    assert "| 0.250 | 0.500 | 0.750 |" in text
    text = card("sft", "--report", run / "report")
    assert "loss 2.500 before and 1.250 after" in text
    assert "| gold | +0.250 [+0.200, +0.300] |" in text and "ppo" not in text
    found = re.search(r"On 50 pairs.*accuracy 0\.810 \[(0\.\d+), (0\.\d+)\]", card("rm/motivation"))
    low, high = map(float, found.groups())
    assert (low, high) == pytest.approx(wilson(40.5, 50)[1:], abs=5e-4)  # a tie counts one half
    of_model = card("rm/motivation")
    assert "log-loss 0.500 [0.450, 0.550], calibration error 0.062; in brackets 95 %." in of_model
    assert "(score - 1.5) / 0.25" in text + of_model
    assert "the motivation." in card("rm/motivation/merged")
    assert "prompts: 12, prompts too long: 1, revisions: 9" in card("revisions")
    assert "| ties | 0.125 | 0.125 | 0.125 |" in card("preferences")
    assert "| gold agreement | - | - | - |" in card("preferences")


def test_a_dry_run_asks_nobody(run, monkeypatch, api, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    push(run, "policy", "--dry-run", "--license", "apache-2.0", name="me/other")
    out = capsys.readouterr().out
    assert 'license: "apache-2.0"' in out and "# other" in out
    assert out.rstrip().endswith("would upload to me/other, private: README.md, "
                                 "adapter_config.json, adapter_model.safetensors, virtue.json")
    push(run, "policy", "--dry-run", "--out", run / "new")
    assert f"would write to {run / 'new'}: README.md" in capsys.readouterr().out
    assert not (run / "new").exists()
    assert not api.calls


def test_a_wrong_flag_names_the_command(capsys):
    with pytest.raises(SystemExit):
        hub.main(["x", "--name", "me/x", "--overwrite"])
    assert "see python -m virtue.plumbing.hub --help" in capsys.readouterr().err


def test_refusals(run, api):
    refuse("--name me: no name of a repository", run, "policy", name="me")
    refuse("no artefact here .*: give one of those in it, 'motivation'$", run, "rm")
    refuse("no artefact here .*: check the path", run, "rm/motivation/none")
    refuse("stage 'value', of no use to others", run, "value")
    refuse("stage 'eval'", run, "report")
    (run / "preferences/motivation.jsonl").unlink()
    refuse("motivation.jsonl: cannot be read", run, "preferences")
    shutil.copytree(run / "report", run / "old")
    manifest = json.loads((run / "old/virtue.json").read_text())
    manifest["parents"]["policy"]["sha256"] = "0" * 64
    (run / "old/virtue.json").write_text(json.dumps(manifest))
    refuse("a report on other weights", run, "policy", "--report", run / "old")
    refuse("--report .*: only an SFT adapter or a policy has one", run, "rm/motivation",
           "--report", run / "report")
    refuse("--report .*: only an SFT adapter or a policy has one", run, "revisions",
           "--report", run / "none")
    refuse("policy: not the weights that .*motivation records: give the SFT adapter by --sft", run,
           "rm/motivation", "--sft", run / "policy")
    shutil.move(run / "sft", run / "moved")
    refuse("cannot be read", run, "policy")
    push(run, "policy", "--sft", run / "moved", "--dry-run")
    moved = run / "moved/adapter_model.safetensors"
    (run / "policy/adapter_model.safetensors").write_bytes(moved.read_bytes())
    refuse("policy: not the weights", run, "policy", "--sft", run / "moved")
    assert not api.calls  # all before anything goes up


def test_the_hub_s_refusal_is_one_line(run, api, monkeypatch):
    def no(self, *args, **kwargs):
        raise OSError("401\nunauthorised")
    monkeypatch.setattr(api, "create_repo", no)
    refuse("me/virtue-x: the hub did not take it .401 unauthorised.: .*hf auth login", run, "sft")
