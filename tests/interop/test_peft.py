"""Our adapters in PEFT and PEFT's in ours: the same logits and scores. PEFT is the oracle."""
from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

peft = pytest.importorskip("peft")

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402

from virtue import VirtueError  # noqa: E402
from virtue.plumbing.artefacts import save_artifact  # noqa: E402
from virtue.dialogue import right_pad  # noqa: E402
from virtue.lora import flatten, load_adapter_state, merged_state_dict, use_stack  # noqa: E402
from virtue.models import ScalarHead, score_at  # noqa: E402
from virtue.plumbing.loading import load_model  # noqa: E402

ROWS = [[1, 7, 9, 30, 41, 11, 2], [1, 88, 5, 2]]  # of two lengths, so that padding takes part
IDS, MASK = right_pad(ROWS, 0)
LAST = MASK.long().sum(1, keepdim=True) - 1
KINDS = {"all layers": {}, "two kinds of layer": {"targets": ("q_proj", "down_proj")},
         "an odd alpha": {"alpha": 2.5}, "whole matrices": {"rank": None},
         "some whole matrices": {"rank": None, "targets": ("down_proj", "k_proj")}}


def save(folder, model, name, base, head=None):
    folder.mkdir(exist_ok=True)
    save_artifact(folder, stage="sft", model=model, adapter=name, head=head,
                  base={"id": str(base), "fingerprint": "f"},
                  template="t", parents={}, seed=0, settings={})
    return folder


@torch.no_grad()
def logits(model, *stack):  # (B, L, V), padding zero
    with use_stack(model, *stack):
        return model(IDS, attention_mask=MASK).logits * MASK[..., None]


@torch.no_grad()
def scores(model, head, *stack):  # (B,)
    with use_stack(model, *stack):
        return score_at(model, head, IDS, MASK, LAST)[:, 0]


def causal(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def classifier(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()


@torch.no_grad()
def theirs(model):  # logits (B, L, V) of a causal LM, padding zero; scores (B,) of a classifier
    found = model(IDS, attention_mask=MASK).logits
    return found[:, 0] if found.dim() == 2 else found * MASK[..., None]


def test_peft_and_ours_agree_on_every_architecture(every, adapt, tmp_path):
    """There and back: logits, scores, merged weights."""
    model = load_model(every)
    adapt(model, "a", 1)
    head = ScalarHead(model.config.hidden_size, seed=3)
    saved, scored = (save(tmp_path / name, model, "a", every, of)
                     for name, of in (("lm", None), ("rm", head)))
    loaded = peft.PeftModel.from_pretrained(causal(every), saved)
    torch.testing.assert_close(theirs(loaded), logits(model, "a"), atol=1e-5, rtol=1e-5)
    assert (logits(model) - logits(model, "a")).abs().max() > 0.1
    ours = merged_state_dict(model, ("a",), torch.float32)
    merged = loaded.merge_and_unload().state_dict()
    assert merged.keys() - ours.keys() <= {"lm_head.weight"}  # where it is tied
    torch.testing.assert_close(ours, {key: merged[key] for key in ours}, atol=1e-5, rtol=1e-5)
    loaded = peft.PeftModel.from_pretrained(classifier(every), scored)
    torch.testing.assert_close(theirs(loaded), scores(model, head, "a"), atol=1e-5, rtol=1e-5)
    wrapped = trained_by_peft(causal(every), task_type="CAUSAL_LM", target_modules="all-linear")
    wrapped.save_pretrained(tmp_path)
    load_adapter_state(model, "b", load_file(tmp_path / "adapter_model.safetensors"),
                       json.loads((tmp_path / "adapter_config.json").read_text()))
    torch.testing.assert_close(logits(model, "b"), theirs(wrapped), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_gives_our_logits(folder, model, adapt, tmp_path, kind):
    adapt(model, "a", 1, **KINDS[kind])
    loaded = peft.PeftModel.from_pretrained(causal(folder), save(tmp_path, model, "a", folder))
    assert (logits(model) - logits(model, "a")).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(theirs(loaded), logits(model, "a"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["all layers", "whole matrices"])
def test_peft_gives_our_scores(folder, model, adapt, tmp_path, kind):
    adapt(model, "a", 2, **KINDS[kind])
    head = ScalarHead(model.config.hidden_size, seed=3)
    save(tmp_path, model, "a", folder, head)
    loaded = peft.PeftModel.from_pretrained(classifier(folder), tmp_path)
    torch.testing.assert_close(theirs(loaded), scores(model, head, "a"), atol=1e-5, rtol=1e-5)
    # this class finds the base itself
    kind = peft.AutoPeftModelForSequenceClassification
    by_name = kind.from_pretrained(tmp_path, num_labels=1).eval()
    torch.testing.assert_close(theirs(by_name), scores(model, head, "a"), atol=1e-5, rtol=1e-5)


def test_a_value_function_needs_a_head_with_bias(folder, model, adapt, tmp_path):
    """PPO's value head has a bias, transformers' classifier none:
    PEFT leaves it out without a word, unless the base has a place for it."""
    adapt(model, "value", 4)
    head = ScalarHead(model.config.hidden_size, bias=True, seed=5)
    head.bias.data.fill_(0.75)
    save(tmp_path, model, "value", folder, head)
    without, base = peft.PeftModel.from_pretrained(classifier(folder), tmp_path), classifier(folder)
    torch.testing.assert_close(theirs(without) + 0.75, scores(model, head, "value"),
                               atol=1e-5, rtol=1e-5)
    base.score = torch.nn.Linear(model.config.hidden_size, 1)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(theirs(loaded), scores(model, head, "value"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("upper", ["all layers", "two kinds of layer", "whole matrices"])
def test_a_stack_is_one_flat_adapter(folder, model, adapt, tmp_path, upper):
    adapt(model, "sft", 1)
    adapt(model, "policy", 2, **KINDS[upper])
    flatten(model, ("sft", "policy"), "flat")
    saved = save(tmp_path / "lm", model, "flat", folder)
    loaded = peft.PeftModel.from_pretrained(causal(folder), saved)
    torch.testing.assert_close(theirs(loaded), logits(model, "sft", "policy"), atol=1e-5, rtol=1e-5)
    head = ScalarHead(model.config.hidden_size, seed=3)
    saved = save(tmp_path / "rm", model, "flat", folder, head)
    loaded = peft.PeftModel.from_pretrained(classifier(folder), saved)
    expected = scores(model, head, "sft", "policy")
    torch.testing.assert_close(theirs(loaded), expected, atol=1e-5, rtol=1e-5)


def test_adapters_add_up_in_peft_too(folder, model, adapt, tmp_path):
    """Without flattening: both adapters active at once on PEFT's LoraModel."""
    adapt(model, "sft", 1)
    adapt(model, "policy", 2)
    loaded = peft.PeftModel.from_pretrained(
        causal(folder), save(tmp_path / "sft", model, "sft", folder), adapter_name="sft")
    loaded.load_adapter(save(tmp_path / "policy", model, "policy", folder), "policy")
    torch.testing.assert_close(theirs(loaded), logits(model, "sft"), atol=1e-5, rtol=1e-5)
    loaded.base_model.set_adapter(["sft", "policy"])
    torch.testing.assert_close(theirs(loaded), logits(model, "sft", "policy"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["all layers", "whole matrices"])
def test_merging_agrees_with_peft(folder, model, adapt, tmp_path, kind):
    adapt(model, "a", 1, **KINDS[kind])
    merged = peft.PeftModel.from_pretrained(
        causal(folder), save(tmp_path, model, "a", folder)).merge_and_unload().state_dict()
    ours = merged_state_dict(model, ("a",), torch.float32)
    assert ours.keys() == merged.keys()
    torch.testing.assert_close(ours, dict(merged), atol=1e-5, rtol=1e-5)


def trained_by_peft(base, **settings):
    """Two steps of SGD on nothing sensible, for values that no initialisation has."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"],
                                "lora_dropout": 0.1, **settings})
    wrapped = peft.get_peft_model(base, config)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # at the first, A has no gradient
        wrapped.train()(IDS, attention_mask=MASK).logits.std().backward()
        optimizer.step(), optimizer.zero_grad()
    return wrapped.eval()


@pytest.mark.parametrize("settings",
                         [{}, {"target_modules": "all-linear"}, {"init_lora_weights": "gaussian"},
                          {"init_lora_weights": "orthogonal"}])
def test_ours_gives_pefts_logits(folder, model, tmp_path, settings):
    wrapped = trained_by_peft(causal(folder), task_type="CAUSAL_LM", **settings)
    wrapped.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    load_adapter_state(model, "a", load_file(tmp_path / "adapter_model.safetensors"), config)
    assert (logits(model) - logits(model, "a")).abs().max() > 0.01
    torch.testing.assert_close(logits(model, "a"), theirs(wrapped), atol=1e-5, rtol=1e-5)


def test_ours_gives_pefts_scores(folder, model, tmp_path):
    # this task type saves the head beside the adapter
    wrapped = trained_by_peft(classifier(folder), task_type="SEQ_CLS")
    wrapped.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    head = ScalarHead(model.config.hidden_size)
    head.load_state_dict({"weight": state.pop("base_model.model.score.weight")})
    load_adapter_state(model, "a", state,
                       json.loads((tmp_path / "adapter_config.json").read_text()))
    assert (scores(model, head) - scores(model, head, "a")).abs().max() > 0.01
    torch.testing.assert_close(scores(model, head, "a"), theirs(wrapped), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}},
                 {"alpha_pattern": {"q_proj": 1}},
                 {"layers_to_transform": [0]}, {"lora_bias": True}, {"init_lora_weights": "pissa"},
                 {"init_lora_weights": "olora"},
                 {"target_modules": ["layers.0.mlp.up_proj"]}, {"alora_invocation_tokens": [7, 9]}])
def test_what_is_not_plain_lora_is_refused(folder, model, tmp_path, settings):
    trained_by_peft(causal(folder), task_type="CAUSAL_LM", **settings).save_pretrained(tmp_path)
    with pytest.raises(VirtueError, match="adapter 'a'"):
        load_adapter_state(model, "a", load_file(tmp_path / "adapter_model.safetensors"),
                           json.loads((tmp_path / "adapter_config.json").read_text()))
