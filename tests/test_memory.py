"""Gradient checkpointing against the plain backward pass; the memory plan against bytes counted of real models.

    python -m pytest -q tests/test_memory.py
"""
from __future__ import annotations

import pytest
import torch
from tiny import make_tiny_model

from virtue import lora
from virtue.models import ScalarHead, checkpoint_layers, load_model, logprobs_at
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
    """Bytes that autograd keeps of `forward` for the backward pass, each storage once, without `frozen`'s."""
    seen, known = {}, {p.untyped_storage().data_ptr() for p in frozen}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no address comes twice
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
        trained = [*lora.adapter_parameters(model, "policy"), *lora.adapter_parameters(model, "value"), *head.parameters()]
        kept = stored(lambda: policy_and_value(model, head), [*model.parameters(), *head.parameters()])  # noqa: B023 (called at once)
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
