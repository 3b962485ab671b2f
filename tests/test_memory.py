"""Gradient checkpointing against the plain backward pass;
the memory plan against bytes counted of real models.

    python -m pytest -q tests/test_memory.py
"""
from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from tiny import make_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from virtue import TARGETS, VirtueError, lora
from virtue.plumbing import memory
from virtue.generate import sample
from virtue.models import ScalarHead, checkpoint_layers, hidden_states, logprobs_at
from virtue.plumbing.loading import load_model
from virtue.rollout import values_at

IDS = torch.arange(5, 5 + 4 * 40).view(4, 40)  # (B, L)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("memory") / "base", tokenizer=False)


def roles(folder, **settings):
    """A base with three adapters that all change the output, and a value head."""
    model = load_model(folder, **settings)
    for i, name in enumerate(("sft", "policy", "value")):
        lora.add_adapter(model, name, rank=4, alpha=8, seed=i)
        for B in lora.adapter_parameters(model, name)[1::2]:
            torch.nn.init.normal_(B, std=0.05, generator=torch.Generator().manual_seed(i))
    for parameter in lora.adapter_parameters(model, "sft"):
        parameter.requires_grad_(False)
    return model, ScalarHead(64, seed=1)


def stored(forward, frozen=()) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, but for `frozen`."""
    seen, known = {}, {p.untyped_storage().data_ptr() for p in frozen}

    def pack(tensor):
        # kept alive, so that no address comes twice
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    assert result.requires_grad
    return sum(s.nbytes() for at, s in seen.items() if at not in known)


def policy_and_value(model, head):
    """One loss of two stacks, as in run_ppo.py."""
    attention, mask = torch.ones_like(IDS), torch.ones(4, 39, dtype=torch.bool)
    with lora.use_stack(model, "sft", "policy"):
        logprobs = logprobs_at(model, IDS, attention, mask)
    with lora.use_stack(model, "sft", "value"):
        values = values_at(model, head, IDS, attention, mask)
    return logprobs.mean() + (values - 1).square().mean()


@pytest.mark.parametrize("settings", [{}, {"quantize": "nf4"}, {"dtype": "bf16"}], ids=str)
def test_checkpointing_changes_memory_but_no_gradient(folder, settings):
    found = []
    for checkpointing in (False, True):
        model, head = roles(folder, **settings)
        if checkpointing:
            checkpoint_layers(model)
        trained = [*lora.adapter_parameters(model, "policy"),
                   *lora.adapter_parameters(model, "value"), *head.parameters()]
        frozen = [*model.parameters(), *head.parameters()]
        kept = stored(lambda: policy_and_value(model, head), frozen)  # noqa: B023 (called at once)
        with lora.use_stack(model, "sft"):  # the reference acts while the backward pass runs
            policy_and_value(model, head).backward()
            assert lora.active_stack(model) == ("sft",)
        found.append((kept, [p.grad for p in trained]))
    (plain, expected), (less, gradients) = found
    assert all(g.abs().max() > 0 for g in expected)
    for gradient, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())
    assert less < 0.35 * plain
    print(f"{settings}: {plain} bytes without, {less} with")


def test_checkpointing_leaves_sampling_alone(folder):
    model, _ = roles(folder)
    with torch.no_grad(), lora.use_stack(model, "sft", "policy"):
        before = model(IDS, attention_mask=torch.ones_like(IDS)).logits
        checkpoint_layers(model)
        assert torch.equal(model(IDS, attention_mask=torch.ones_like(IDS)).logits, before)


# ---- the plan


WIDE = dict(hidden_size=256, intermediate_size=448, num_attention_heads=8, num_key_value_heads=2,
            head_dim=32, num_hidden_layers=3)
MISTRAL_7B = dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                  num_attention_heads=32, num_key_value_heads=8, head_dim=128)


# Heads wider than D / heads; with the biases of tiny.ARCHITECTURES
OTHERS = [{"model_type": "llama"}, {"model_type": "qwen2"}, {"model_type": "qwen3", "head_dim": 48}]


@pytest.fixture(scope="module", params=[{}, {"tie_word_embeddings": True}, *OTHERS], ids=str)
def wide(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("wide") / "base", tokenizer=False,
                           **WIDE | request.param)


def config_7b(**fields):
    from transformers import MistralConfig
    return MistralConfig(**MISTRAL_7B, **fields)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_base_weights_are_those_that_are_loaded(wide, quantize, dtype):
    model, storages = load_model(wide, quantize=quantize, dtype=dtype), {}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        # without the table of 256 codes, which all share
        for tensor in (parameter, *((state.absmax, state.state2.absmax) if state else ())):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert memory.base_bytes(model.config, quantize, dtype) == pytest.approx(
        sum(storages.values()), rel=0 if quantize == "none" else 0.01)
    # what the architecture does not know is not there
    for name in ("attention_bias", "mlp_bias"):
        known, before = hasattr(type(model.config), name), memory.rest_bytes(model.config, dtype)
        setattr(model.config, name, getattr(model.config, name, False) if known else True)
        assert memory.rest_bytes(model.config, dtype) == before
    # then what a copy for sampling takes beside them
    for kind, torch_kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        copied = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
                  for p in lora.sampling_copy(model, torch_kind).parameters()}
        held = memory.plan(model.config, quantize=quantize, dtype=dtype,
                           copy=kind)["held"].get("sampling copy", 0)
        assert held == sum(n for where, n in copied.items() if where not in storages)


def test_the_7b_base_has_its_published_size():
    # parameters, from the index of Mistral-7B-v0.1's files: total_size 14483464192 in bf16
    published = 7_241_732_096
    assert memory.base_bytes(config_7b(), "none", "bf16") == 2 * published
    # as in QLoRA, the scales take 0.127 bits
    assert memory.base_bytes(config_7b(), "nf4", "bf16") == pytest.approx(
        4.127 * (published - 262_410_240) / 8 + 2 * 262_410_240, rel=1e-3)


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "down_proj", "lm_head")])
@pytest.mark.parametrize("rank", [4, None])
def test_adapters_are_those_that_are_made(folder, rank, targets):
    model = load_model(folder)
    lora.add_adapter(model, "new", rank=rank, alpha=8, targets=targets)
    parameters = lora.adapter_parameters(model, "new")
    size = sum(p.numel() * 4 for p in parameters)
    assert memory.adapter_bytes(model.config, (rank, targets)) == size


def test_the_kv_cache_is_that_of_a_forward(wide):
    from transformers import DynamicCache
    model = load_model(wide, dtype="bf16")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, attention_mask=torch.ones_like(IDS), past_key_values=cache, use_cache=True)
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    size = sum(t.numel() * t.element_size() for t in tensors)
    assert memory.cache_bytes(model.config, "bf16", *IDS.shape) == size


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj")])
@pytest.mark.parametrize("settings", [{}, {"quantize": "nf4"}, {"dtype": "bf16"},
                                      {"quantize": "nf4", "dtype": "bf16"}], ids=str)
@pytest.mark.parametrize("tokens", [64, 400])
def test_activations_are_those_that_autograd_keeps(wide, settings, tokens, targets):
    model, settings = load_model(wide, **settings), {"quantize": "none", "dtype": "fp32"} | settings
    lora.add_adapter(model, "policy", rank=8, alpha=8, targets=targets)
    lora.set_stack(model, "policy")
    ids, attention = torch.full((2, tokens), 9), torch.ones(2, tokens, dtype=torch.long)
    attention[0, -3:] = 0
    for checkpointing in (False, True):
        planned = memory.plan(model.config, **settings, trained=[(8, targets)],
                              checkpointing=checkpointing,
                              update=dict(rows=2, tokens=tokens, positions=0, stacks=1))["update"]
        if checkpointing:
            checkpoint_layers(model)
            layer = memory.layer_bytes(model.config, settings["dtype"], 2, tokens, (8, targets))
            planned["activations"] -= layer  # not kept but made again
            planned.pop("folded weights", None)
        kept = stored(lambda: hidden_states(model, ids, attention), model.parameters())
        assert (1 <= (planned["activations"] + planned.get("folded weights", 0)) / kept
                < (1.55 if checkpointing else 1.12))


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, as long as they live."""

    def __init__(self, model):
        super().__init__()
        self.now, self.most = 0, 0
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}

    def gone(self, key, n):
        self.now -= n
        self.known.discard(key)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        for storage in (t.untyped_storage()
                        for t in tree_leaves(made) if isinstance(t, torch.Tensor)):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return made


@pytest.mark.parametrize("settings", [{}, {"quantize": "nf4"}, {"dtype": "bf16"}], ids=str)
def test_no_moment_needs_more_than_planned(tmp_path, settings):
    folder = make_tiny_model(tmp_path / "base", tokenizer=False, **WIDE | {"vocab_size": 2000})
    flags = {"quantize": "none", "dtype": "fp32"} | settings
    ids, mask = torch.full((2, 200), 9), torch.zeros(2, 199, dtype=torch.bool)
    mask[:, 80:] = True
    for checkpointing, entropy_too in ((False, False), (False, True), (True, False)):
        model, _ = roles(folder, **settings)
        if checkpointing:
            checkpoint_layers(model)
        with Live(model) as live:
            with lora.use_stack(model, "sft", "policy"):
                logprobs, entropy = logprobs_at(model, ids, torch.ones_like(ids), mask, 1.0, True,
                                                train_entropy=entropy_too)
            with lora.use_stack(model, "sft", "value"):
                values = values_at(model, ScalarHead(256, seed=1), ids, torch.ones_like(ids), mask)
            (logprobs.mean() + entropy.mean() + values.mean()).backward()
        planned = memory.plan(model.config, **flags, trained=[(4, TARGETS)] * 2,
                              checkpointing=checkpointing,
                              update=dict(rows=2, tokens=200, positions=int(mask.sum()), stacks=2,
                                          entropy=entropy_too))["update"]
        assert 1 <= sum(planned.values()) / live.most < 1.8
    model, _ = roles(folder, **settings)
    with Live(model) as live, lora.use_stack(model, "policy"):
        sample(model, [[1] * 180] * 8, np.full((8, 20), 0.5), eos_id=-1, pad_id=0)
    planned = memory.plan(model.config, **flags, trained=[(4, TARGETS)],
                          sampling=dict(rows=8, tokens=200, prompt=180))["sampling"]
    assert 1 <= sum(planned.values()) / live.most < 1.8
    print(settings, planned, live.most)


def test_what_was_used_is_told_beside_the_plan(monkeypatch):
    monkeypatch.setattr(memory, "_planned", [])
    assert memory.used(torch.device("cpu")) == ""  # of the toy no plan is printed
    plan = memory.plan(config_7b(), quantize="nf4", dtype="bf16", scoring=dict(rows=2, tokens=100))
    moment, most = memory.greatest(plan)
    assert moment == "scoring" and memory.table(plan).endswith(f"{most / 2**30:9.3f}")
    line = memory.used(torch.device("cpu"))
    # the size of this process in GiB
    assert line.endswith(f", planned {most / 2**30:.2f}") and 0.1 < float(line.split()[3]) < 30


def test_a_plan_adds_up():
    flags = dict(quantize="nf4", dtype="bf16", frozen=[(16, TARGETS)] * 2,
                 trained=[(16, TARGETS)] * 2, sampling=dict(rows=16, tokens=1000, prompt=256))
    update = dict(rows=2, tokens=1000, positions=768, stacks=2, entropy=True)
    plain, less = (memory.plan(config_7b(), **flags, update=update, checkpointing=c)
                   for c in (False, True))
    # the seven layers of each of 32 blocks, in fp32
    one = 4 * 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert plain["held"]["adapters"] == 4 * one and plain["held"]["optimiser moments"] == 4 * one
    assert plain["update"]["gradients"] == 2 * one
    assert plain["sampling"]["KV cache"] == 2 * 32 * 8 * 128 * 2 * 16 * 1000
    assert ({part: plain["update"][part] - less["update"][part] for part in less["update"]}
            | {"activations": 0} == dict.fromkeys(less["update"], 0))
    assert less["update"]["activations"] < plain["update"]["activations"] / 10
    twice = memory.plan(config_7b(), **flags, update=update | {"rows": 4})
    assert twice["update"]["activations"] == 2 * plain["update"]["activations"]
    assert twice["update"]["logits"] == plain["update"]["logits"]
    lines = memory.table(plain).splitlines()
    total = sum(n for moment in ("held", "update") for n in plain[moment].values()) / 2**30
    assert lines[-1].split() == ["greatest", "update", f"{total:.3f}"]
    assert len({len(line) for line in lines[1:]}) == 1
    assert len(lines) == 2 + sum(map(len, plain.values()))
    with pytest.raises(VirtueError, match=r"\['k'\] match no linear layer"):
        memory.check_targets(config_7b(), ("k", "q_proj"))
