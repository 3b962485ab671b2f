"""LoRA: against explicit matrices, torch.func on dense weights, and PEFT's format.

    python -m pytest -q tests/test_lora.py
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.func import functional_call
from tiny import ARCHITECTURES, dequantize, make_tiny_model

from virtue import VirtueError
from virtue.lora import (
    TARGETS,
    LoRALinear,
    active_stack,
    adapter_config,
    adapter_names,
    adapter_parameters,
    _Folded,
    adapter_state,
    add_adapter,
    flatten,
    load_adapter_state,
    merged_state_dict,
    remove_adapter,
    sampling_copy,
    set_stack,
    use_stack,
)
from virtue.plumbing.loading import load_model

IDS = torch.tensor([[1, 3, 50, 60, 70, 80, 4, 90, 2], [1, 3, 9, 8, 7, 6, 4, 5, 2]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    tied = {tied: make_tiny_model(root / str(tied), tie_word_embeddings=tied, tokenizer=False)
            for tied in (False, True)}
    return tied | {kind: make_tiny_model(root / kind, model_type=kind, tokenizer=False)
                   for kind in ARCHITECTURES}


@pytest.fixture
def model(folders):
    return load_model(folders[False])


def logits(model):
    return model(IDS, use_cache=False).logits


def fill(model, name, seed=1, std=0.3):
    """Random A and B (std so large that the adapter matters); the zero B of a new adapter would
    make any equality trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name):
            parameter.normal_(std=std, generator=generator)


def add(model, name, rank=2, alpha=4, targets=TARGETS, seed=1, std=0.3):
    add_adapter(model, name, rank=rank, alpha=alpha, targets=targets)
    fill(model, name, seed, std)


def dense_weights(model):
    """{HF name: fp32 weight} of the base, dequantised by hand."""
    weights = {}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            quantized = getattr(parameter, "quant_state", None) is not None
            weight = dequantize(parameter) if quantized else parameter.detach().clone()
            weights[name.replace(".base", "")] = weight
    return weights


def plain(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder).eval()


# ---- one layer


class Toy(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.q_proj = nn.Linear(7, 5, bias=True, dtype=dtype)
        self.v_proj = nn.Linear(5, 3, bias=False, dtype=dtype)

    def forward(self, x):
        return self.v_proj(self.q_proj(x))


def toy(dtype=torch.float32):
    torch.manual_seed(0)
    return Toy(dtype).requires_grad_(False)


def test_forward_is_w_plus_scaled_ba():
    model, x = toy(), torch.randn(2, 4, 7)
    weight, bias = model.q_proj.weight.double(), model.q_proj.bias.double()
    add(model, "a", rank=2, alpha=6, targets=("q_proj",), seed=1)  # scaling 3
    add(model, "b", rank=4, alpha=2, targets=("q_proj", "v_proj"), seed=2)  # scaling 0.5
    layer = model.q_proj
    for stack, scales in {(): {}, ("a",): {"a": 3}, ("b", "a"): {"a": 3, "b": 0.5}}.items():
        dense = weight.clone()
        for name, scale in scales.items():
            dense += scale * layer.lora_B[name].double() @ layer.lora_A[name].double()
        with use_stack(model, *stack):
            torch.testing.assert_close(
                layer(x).double(), x.double() @ dense.T + bias, rtol=1e-5, atol=1e-5
            )
    with use_stack(model, "a"):  # v_proj lacks "a": the base alone, bitwise
        x = torch.randn(3, 5)
        assert torch.equal(model.v_proj(x), model.v_proj.base(x))


def test_bf16_base_keeps_fp32_adapters_and_adds_in_fp32():
    model = toy(torch.bfloat16)
    for name in "ab":
        add(model, name, rank=3, alpha=3, targets=("q_proj",), seed=ord(name))
    set_stack(model, "a", "b")
    layer, x = model.q_proj, torch.randn(4, 7, dtype=torch.bfloat16)
    assert {p.dtype for p in adapter_parameters(model, "a")} == {torch.float32}
    update = sum(x.float() @ layer.lora_A[n].T @ layer.lora_B[n].T for n in "ab")
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), layer.base(x) + update.bfloat16())


def test_init_is_kaiming_a_zero_b_from_the_seed():
    def pair(seed):
        model = nn.ModuleDict({"q_proj": nn.Linear(100, 50)})
        add_adapter(model, "a", rank=8, alpha=16, targets=("q_proj",), seed=seed)
        return model["q_proj"].lora_A["a"], model["q_proj"].lora_B["a"]

    A, B = pair(0)
    assert A.shape == (8, 100) and B.shape == (50, 8) and not B.any()
    assert A.requires_grad and B.requires_grad
    # U(-0.1, 0.1), 0.1 = 1/sqrt(100): 800 draws reach within 2 % of the bound, std 0.1/sqrt(3)
    assert 0.098 < A.abs().max() <= 0.1 and abs(A.std() - 0.1 / 3**0.5) < 0.003
    # the global generator, which moves on at each call, plays no part
    assert torch.equal(A, pair(0)[0]) and not torch.equal(A, pair(1)[0])


# ---- adapters on the model


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_new_adapter_changes_nothing_and_the_head_stays_bare(folders, kind):
    model = load_model(folders[kind])
    before = logits(model)
    add_adapter(model, "sft", rank=4, alpha=8)
    wrapped = {p.rpartition(".")[2] for p, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert wrapped == set(TARGETS) and not isinstance(model.lm_head, LoRALinear)
    assert active_stack(model) == () and torch.equal(logits(model), before)
    with use_stack(model, "sft"):
        assert torch.equal(logits(model), before)
        fill(model, "sft")
        assert not torch.allclose(logits(model), before, atol=0.1)
    assert torch.equal(logits(model), before)


def test_lm_head_can_be_named(model):
    add(model, "head", targets=("lm_head",))
    assert [p for p, m in model.named_modules() if isinstance(m, LoRALinear)] == ["lm_head"]
    assert len(adapter_parameters(model, "head")) == 2


def test_adapters_do_not_leak(model):
    add(model, "a", seed=1), add(model, "b", seed=2)
    with use_stack(model, "a"):
        before = logits(model)
        fill(model, "b", seed=3)
        assert torch.equal(logits(model), before)
    with use_stack(model, "a", "b"):
        both = logits(model)
    with use_stack(model, "b", "a"):
        torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-4)


def test_use_stack_restores_nested_and_on_exceptions(model):
    add(model, "a"), add(model, "b")
    set_stack(model, "a")
    with use_stack(model, "a", "b") as same:
        assert same is model and active_stack(model) == ("a", "b")
        with pytest.raises(RuntimeError), use_stack(model):
            assert active_stack(model) == ()
            raise RuntimeError
        assert active_stack(model) == ("a", "b")
        with pytest.raises(KeyError, match="nobody"), use_stack(model, "b", "nobody"):
            pass
        with pytest.raises(ValueError, match="twice"):
            set_stack(model, "b", "b")
        assert active_stack(model) == ("a", "b")
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert {layer.active for layer in layers} == {("a",)}


def test_layers_wrapped_later_join_the_active_stack(model):
    add(model, "a", targets=("q_proj",))
    set_stack(model, "a")
    add(model, "b", targets=("v_proj",))
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert len(layers) == 4 and {layer.active for layer in layers} == {("a",)}


def test_remove_adapter(model):
    before = logits(model)
    add(model, "a"), add(model, "b")
    with use_stack(model, "b"):
        with_b = logits(model)
    set_stack(model, "a", "b")
    with use_stack(model, "a"):
        remove_adapter(model, "a")
        assert active_stack(model) == () and torch.equal(logits(model), before)
    assert active_stack(model) == ("b",) and adapter_names(model) == ("b",)
    assert torch.equal(logits(model), with_b)
    assert not any(".a" == name[-2:] for name, _ in model.named_parameters())
    with pytest.raises(KeyError):
        remove_adapter(model, "a")


def test_bad_requests(model):
    add_adapter(model, "a", rank=2, alpha=4)
    with pytest.raises(ValueError, match="'a'"):
        add_adapter(model, "a", rank=2, alpha=4)
    with pytest.raises(ValueError):
        add_adapter(model, "b", rank=0, alpha=4)
    with pytest.raises(VirtueError, match="q_prj"):
        add_adapter(model, "b", rank=2, alpha=4, targets=("q_prj", "v_proj"))
    with pytest.raises(VirtueError):
        add_adapter(model, "b", rank=2, alpha=4, targets=())
    for function in (adapter_parameters, adapter_state, remove_adapter, set_stack):
        with pytest.raises(KeyError, match="'b'"):
            function(model, "b")
    assert adapter_names(model) == ("a",)


# ---- training


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_base_and_idle_adapters_are_bitwise_unchanged_by_a_step(folders, quantize):
    model = load_model(folders[False], quantize=quantize)
    add(model, "sft", seed=1), add(model, "policy", seed=2), add(model, "rm", seed=3)
    for parameter in adapter_parameters(model, "sft"):
        parameter.requires_grad_(False)
    set_stack(model, "sft", "policy")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1)
    with torch.no_grad():
        logits(model)  # on AVX512-BF16 this is what would repack 4-bit weights
    logits(model).square().mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not name.endswith(".policy")), name


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_adapter_gradients_match_dense_weights(folders, quantize, kind):
    """The same loss on a plain model with W + s B A put together by hand (W dequantised): equal
    logits, and equal gradients of every A and B."""
    model = load_model(folders[kind], quantize=quantize)
    add(model, "a", rank=3, alpha=6)  # scaling 2
    set_stack(model, "a")
    with torch.no_grad():
        logits(model)
    output = logits(model)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    (output * target).mean().backward()

    weights, leaves = dense_weights(model), {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            A, B = (h["a"].detach().clone().requires_grad_() for h in (layer.lora_A, layer.lora_B))
            leaves[path] = (A, B)
            weights[path + ".weight"] = weights[path + ".weight"] + 2 * B @ A
    dense = functional_call(plain(folders[kind]), weights, (IDS,), {"use_cache": False}).logits
    torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-4)
    (dense * target).mean().backward()
    assert len(leaves) == 14
    for path, (A, B) in leaves.items():
        layer = model.get_submodule(path)
        for mine, oracle in ((layer.lora_A["a"].grad, A.grad), (layer.lora_B["a"].grad, B.grad)):
            assert oracle.abs().max() > 1e-5
            torch.testing.assert_close(mine, oracle, rtol=1e-3, atol=1e-4 * oracle.abs().max())


# ---- the folded path of an fp32 base


def test_folded_gradients_against_finite_differences():
    def rand(*shape, grad=True):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)

    generator = torch.Generator().manual_seed(0)
    x, weight, bias = rand(2, 3, 5), rand(4, 5, grad=False), rand(4, grad=False)
    halves = [rand(2, 5), rand(4, 2), rand(3, 5), rand(4, 3)]

    def folded(x, *halves):
        total = weight + 0.5 * halves[1] @ halves[0] + 3 * halves[3] @ halves[2]
        return _Folded.apply(x, total.detach(), bias, [0.5, 3.0], *halves)

    def numeric(x, *halves):  # the same with W' inside the graph: what finite differences see
        return nn.functional.linear(
            x, weight + 0.5 * halves[1] @ halves[0] + 3 * halves[3] @ halves[2], bias)

    dy = rand(2, 3, 4, grad=False)
    for mine, oracle in zip(*(torch.autograd.grad(f(x, *halves), (x, *halves), dy)
                              for f in (folded, numeric))):
        torch.testing.assert_close(mine, oracle)
    assert torch.autograd.gradcheck(numeric, (x, *halves))


def test_folded_equals_plain_whatever_is_frozen():
    model, x = toy(), torch.randn(2, 4, 7, requires_grad=True)
    add(model, "a", rank=2, alpha=6, targets=("q_proj",), seed=1)
    add(model, "b", rank=4, alpha=2, targets=("q_proj",), seed=2)
    for p in adapter_parameters(model, "a"):
        p.requires_grad_(False)
    layer, found = model.q_proj, {}
    for path in (layer.folded, layer.plain):
        output = path(x, ["a", "b"])
        inputs = (x, *adapter_parameters(model, "b"))
        found[path.__name__] = output, *torch.autograd.grad(output.square().sum(), inputs)
    for mine, oracle in zip(found["folded"], found["plain"]):
        torch.testing.assert_close(mine, oracle, rtol=1e-5, atol=1e-5)
    output = layer.folded(x, ["a", "b"])
    output.sum().backward()
    assert all(p.grad is None for p in adapter_parameters(model, "a"))


@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_what_was_folded_is_never_stale(kind):
    """Every way in which weights change: optimiser, copy, another adapter, base, stack, scale.

    PyTorch's fused optimisers do not count their changes: an fp32 base on a GPU was trained without
    seeing its own adapter.
    """
    model, x = toy(), torch.randn(3, 7)
    add(model, "a", rank=2, alpha=6, targets=("q_proj",), seed=1)
    layer = model.q_proj

    def check():
        with torch.no_grad():
            now = layer(x)
            torch.testing.assert_close(now, layer.plain(x, list(layer.active)) if layer.active
                                       else layer.base(x), rtol=1e-5, atol=1e-5)
        return now

    seen = [check()]
    set_stack(model, "a")
    seen.append(check())
    optimizer = torch.optim.Adam(adapter_parameters(model, "a"), lr=0.1, **kind)
    layer(x).square().sum().backward()
    optimizer.step()
    seen.append(check())
    load_adapter_state(model, "a", {k: t + 0.1 for k, t in adapter_state(model, "a").items()},
                       adapter_config(model, "a", "x"))
    seen.append(check())
    remove_adapter(model, "a")
    add(model, "a", rank=2, alpha=6, targets=("q_proj",), seed=5)
    set_stack(model, "a")
    seen.append(check())
    layer.scaling["a"] = 1.0
    seen.append(check())
    with torch.no_grad():
        layer.base.weight.add_(1.0)
    seen.append(check())
    layer.lora_B["a"].data = torch.randn(5, 2)
    seen.append(check())
    assert all(not torch.allclose(a, b) for a, b in zip(seen, seen[1:]))


# ---- whole matrices; merging into 4 bits


def test_whole_matrices_learn_what_dense_weights_learn(model, folders, tmp_path):
    """Two steps of SGD on B equal two on the plain model's matrices, also when loaded again."""
    add_adapter(model, "w", rank=None)
    assert torch.equal(logits(model), logits(load_model(folders[False])))
    set_stack(model, "w")
    dense = plain(folders[False]).requires_grad_(False)
    trained = [p for n, p in dense.named_parameters() if n.split(".")[-2] in TARGETS]
    for p in trained:
        p.requires_grad_(True)
    mine = [p for p in adapter_parameters(model, "w") if p.requires_grad]
    assert len(mine) == len(trained) == 14
    target = torch.randn(logits(model).shape, generator=torch.Generator().manual_seed(0))
    first = logits(model).detach()
    for parameters, which in ((mine, model), (trained, dense)):
        optimizer = torch.optim.SGD(parameters, lr=3.0)
        for _ in range(2):
            optimizer.zero_grad()
            (which(IDS, use_cache=False).logits * target).mean().backward()
            optimizer.step()
    assert (logits(model) - first).abs().max() > 0.01
    torch.testing.assert_close(logits(model), dense(IDS, use_cache=False).logits,
                               rtol=1e-4, atol=1e-4)
    again, state = load_model(folders[False]), adapter_state(model, "w")
    config = adapter_config(model, "w", "x")
    load_adapter_state(again, "w", state, config)
    set_stack(again, "w")
    assert torch.equal(logits(again), logits(model))
    # PEFT's format has an A, memory has none
    assert len(state) == 28 and len(adapter_parameters(again, "w")) == 14
    linears = [m for m in plain(folders[False]).modules() if isinstance(m, torch.nn.Linear)]
    ranks = {A.shape[0] for key, A in state.items() if "lora_A" in key}
    assert ranks == {config["r"]} == {max(m.in_features for m in linears)}
    with pytest.raises(ValueError):
        flatten(model, ("w",), "w")
    # no identity: LoRA, of that rank
    state["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"][0, 1] = 1.0
    with pytest.raises(VirtueError, match="is LoRA, expected whole matrices"):
        load_adapter_state(again, "w", state, config)
    load_adapter_state(again, "lora", state, config)
    assert len(adapter_parameters(again, "lora")) == 28
    merged = plain(folders[False])
    merged.load_state_dict(merged_state_dict(model, ("w",), torch.float32))
    torch.testing.assert_close(merged(IDS, use_cache=False).logits, logits(model),
                               rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_whole_matrices_stand_upon_lora_and_are_flattened_with_it(folders, quantize):
    model = load_model(folders[False], quantize=quantize)
    add(model, "a", targets=("q_proj", "up_proj"), seed=1)
    add_adapter(model, "w", rank=None, targets=("q_proj", "down_proj"))
    for p in adapter_parameters(model, "w"):
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.shape[1]))
    set_stack(model, "a", "w")
    stacked, dense = logits(model), dense_weights(model)
    for path, layer in model.named_modules():  # W + s B A + the whole change, by hand
        if isinstance(layer, LoRALinear):
            if "a" in layer.scaling:
                dense[path + ".weight"] += (layer.scaling["a"] * layer.lora_B["a"].detach()
                                            @ layer.lora_A["a"].detach())
            if "w" in layer.scaling:
                dense[path + ".weight"] += layer.lora_B["w"].detach()
    oracle = functional_call(plain(folders[False]), dense, (IDS,), {"use_cache": False}).logits
    torch.testing.assert_close(stacked, oracle, rtol=1e-4, atol=1e-4)
    flatten(model, ("a", "w"), "flat")
    set_stack(model, "flat")
    torch.testing.assert_close(logits(model), stacked, rtol=1e-4, atol=1e-4)
    assert all(p.shape[0] != 3 and not p.requires_grad for p in adapter_parameters(model, "flat"))


def unequal_stack(model):
    """Ranks 2 and 5, scales 2 and 0.6; only o_proj and v_proj have both."""
    add(model, "a", rank=2, alpha=4, targets=("q_proj", "v_proj", "o_proj"), seed=1)
    add(model, "b", rank=5, alpha=3, targets=("v_proj", "o_proj", "down_proj"), seed=2)
    add(model, "other", rank=3, alpha=3, targets=("k_proj",), seed=3)
    return ("a", "b")


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_sampling_path_equals_plain(folders, quantize, monkeypatch):
    """A stack flattened in bf16: the shorter path's logits are as near to the fp32 adapters' as
    bf16 allows, and only sampling takes it."""
    model, taken = load_model(folders[False], quantize=quantize, dtype="bf16"), []
    stack, path = unequal_stack(model), LoRALinear.sampling
    flatten(model, stack, "flat", torch.bfloat16)
    monkeypatch.setattr(LoRALinear, "sampling",
                        lambda layer, x, name: taken.append(name) or path(layer, x, name))
    layer = next(m for m in model.modules() if isinstance(m, LoRALinear) and "flat" in m.lora_A)
    x = torch.randn(2, 3, layer.base.in_features, dtype=torch.bfloat16)
    layer.scaling["flat"] = 0.5  # flatten makes it 1: the scale must count all the same
    with torch.no_grad():
        found, want = path(layer, x, "flat"), layer.plain(x, ["flat"])
    assert found.shape == want.shape and found.dtype == torch.bfloat16
    assert (want - layer.base(x)).abs().max() > 0.1
    torch.testing.assert_close(found, want, rtol=0.02, atol=0.02)
    layer.scaling["flat"] = 1.0
    with use_stack(model, "flat"):
        logits(model)
        assert not taken  # a gradient may be wanted
        with torch.no_grad():
            found = logits(model)
    assert set(taken) == {"flat"}
    with torch.no_grad(), use_stack(model, *stack):
        want = logits(model)
    assert (found - want).abs().mean() < 0.03 * want.abs().mean()


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_flatten_equals_the_stack(folders, quantize):
    model = load_model(folders[False], quantize=quantize)
    stack = unequal_stack(model)
    set_stack(model, *stack)
    flatten(model, stack, "flat")
    assert active_stack(model) == stack
    for seed in (5, 6):
        with torch.no_grad():
            want = logits(model)
            with use_stack(model, "flat"):
                torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-4)
            with use_stack(model, "a"):
                assert not torch.allclose(logits(model), want, atol=0.1)
        fill(model, "b", seed)
        with torch.no_grad(), use_stack(model, "flat"):  # a copy, stale until refreshed
            assert torch.allclose(logits(model), want, atol=1e-4)
        flatten(model, stack, "flat")
    config = adapter_config(model, "flat", "x")
    assert (config["r"], config["lora_alpha"]) == (7, 7)
    assert config["target_modules"] == ["down_proj", "o_proj", "q_proj", "v_proj"]
    state = adapter_state(model, "flat")
    assert {t.shape[0] for k, t in state.items() if "lora_A" in k} == {7}
    assert {t.shape[1] for k, t in state.items() if "lora_B" in k} == {7}
    assert not any(p.requires_grad for p in adapter_parameters(model, "flat"))
    flatten(model, ("a",), "flat")  # another stack: no leftovers in down_proj
    assert adapter_config(model, "flat", "x")["target_modules"] == ["o_proj", "q_proj", "v_proj"]


def test_flatten_refuses_to_destroy(model):
    stack = unequal_stack(model)
    before = adapter_state(model, "other")
    for parameter in adapter_parameters(model, "a"):
        parameter.requires_grad_(False)
    for bad, name in ((stack, "a"), (stack, "other"), ((), "flat")):
        with pytest.raises(ValueError):
            flatten(model, bad, name)
    with pytest.raises(KeyError):
        flatten(model, ("a", "nobody"), "flat")
    assert set(adapter_names(model)) == {"a", "b", "other"}
    assert all(torch.equal(t, before[k]) for k, t in adapter_state(model, "other").items())


@pytest.mark.parametrize("shape", [True, *ARCHITECTURES])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_merged_plain_model_equals_the_stack(folders, quantize, shape):
    model = load_model(folders[shape], quantize=quantize)
    stack = unequal_stack(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    merged = merged_state_dict(model, stack, torch.float32)
    other = plain(folders[shape])
    absent = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(merged) == set(other.state_dict()) - absent
    result = other.load_state_dict(merged, strict=False)
    assert set(result.missing_keys) == absent and not result.unexpected_keys
    with torch.no_grad(), use_stack(model, *stack):
        torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-4)
    # ... and it is a copy: merging again gives the same, the model is as before
    next(iter(merged.values())).zero_()
    again = merged_state_dict(model, stack, torch.float32)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert again["model.embed_tokens.weight"].any()


def test_merging_nothing_gives_the_base_and_dtype_is_the_files(model):
    base = {name: p.clone() for name, p in model.named_parameters()}
    stack = unequal_stack(model)
    merged = merged_state_dict(model, (), torch.float32)
    assert merged.keys() == base.keys()
    assert all(torch.equal(tensor, base[name]) for name, tensor in merged.items())
    exact = merged_state_dict(model, stack, torch.float32)  # rounded once, from the fp32 sum
    for name, tensor in merged_state_dict(model, stack, torch.bfloat16).items():
        assert torch.equal(tensor, exact[name].bfloat16())
    with pytest.raises(KeyError):
        merged_state_dict(model, ("nobody",), torch.float32)


def test_a_changed_tied_head_cannot_be_merged(folders):
    model = load_model(folders[True])
    add(model, "a", targets=("lm_head",)), add(model, "b")
    assert merged_state_dict(model, ("b",), torch.float32)
    with pytest.raises(VirtueError, match="lm_head"):
        merged_state_dict(model, ("a", "b"), torch.float32)


# ---- PEFT's format


def test_exact_peft_keys_and_config(model):
    add(model, "policy", rank=2, alpha=3, targets=("q_proj", "down_proj"))
    state = adapter_state(model, "policy")
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == {
        f"base_model.model.model.layers.{i}.{module}.lora_{half}.weight": shape
        for i in (0, 1)
        for module, half, shape in (
            ("self_attn.q_proj", "A", (2, 64)), ("self_attn.q_proj", "B", (64, 2)),
            ("mlp.down_proj", "A", (2, 128)), ("mlp.down_proj", "B", (64, 2)),
        )
    }
    config = adapter_config(model, "policy", "some/base")
    assert json.loads(json.dumps(config)) == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/base",
        "r": 2, "lora_alpha": 3, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "target_modules": ["down_proj", "q_proj"], "modules_to_save": None, "inference_mode": True,
    }
    assert adapter_config(model, "policy", "x", ["score"])["modules_to_save"] == ["score"]
    kept = next(iter(state.values())).clone()  # a snapshot: training on does not alter it
    fill(model, "policy", seed=7)
    assert torch.equal(next(iter(state.values())), kept)


def test_peft_reads_it(folders, tmp_path, model):
    peft = pytest.importorskip("peft")
    from safetensors.torch import save_file

    add(model, "policy", rank=2, alpha=3)
    save_file(adapter_state(model, "policy"), tmp_path / "adapter_model.safetensors")
    config = adapter_config(model, "policy", str(folders[False]))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    other = peft.PeftModel.from_pretrained(plain(folders[False]), tmp_path).eval()
    with torch.no_grad(), use_stack(model, "policy"):
        torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-4)


def test_round_trip(model, folders):
    add(model, "policy", rank=3, alpha=1, targets=("q_proj", "up_proj"))
    state, config = adapter_state(model, "policy"), adapter_config(model, "policy", "x")
    config = json.loads(json.dumps(config))
    other = load_model(folders[False])
    load_adapter_state(other, "renamed", state, config)
    assert not any(p.requires_grad for p in other.parameters())  # a new one is frozen
    with torch.no_grad(), use_stack(model, "policy"), use_stack(other, "renamed"):
        assert torch.equal(logits(model), logits(other))
    add_adapter(other, "resumed", rank=3, alpha=1, targets=("up_proj", "q_proj"))
    load_adapter_state(other, "resumed", state, config)
    assert all(p.requires_grad for p in adapter_parameters(other, "resumed"))  # kept as it was
    again = adapter_state(other, "resumed")
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("change, complaint", [
    (lambda s, c: s.pop(KEY), "layers.1.*lora_A.weight is missing"),
    (lambda s, c: s.update({KEY + "x": s[KEY]}), "weightx is unknown"),
    (lambda s, c: s.update({KEY: s[KEY][:, :-1]}), r"\(2, 63\), expected \(2, 64\)"),
    (lambda s, c: s.update({KEY: s[KEY].T}), r"\(64, 2\)"),
    (lambda s, c: s[KEY].fill_(float("nan")), "NaN"),
    (lambda s, c: c.update(r=3), "3|expected"),
    (lambda s, c: c.update(r=0), "rank"),
    (lambda s, c: c.update(target_modules=["q_proj", "v_proj"]), "target_modules|missing"),
    (lambda s, c: c.update(target_modules="all-linear"), "match no|target_modules"),
    (lambda s, c: c.update(peft_type="IA3"), "LoRA"),
    (lambda s, c: c.update(use_rslora=True), "rslora"),
    (lambda s, c: c.pop("r"), "'r'"),
    (lambda s, c: c.update(lora_alpha=None), "adapter_config"),
])
def test_a_misfit_is_refused_and_changes_nothing(model, change, complaint, exists):
    add(model, "source", rank=2, alpha=4, targets=("q_proj",))
    state, config = adapter_state(model, "source"), adapter_config(model, "source", "x")
    remove_adapter(model, "source")
    if exists:
        add(model, "target", rank=2, alpha=4, targets=("q_proj",), seed=9)

    def weights():
        return {k.replace(".base", ""): p.detach().clone() for k, p in model.named_parameters()}

    before = weights()
    change(state, config)
    with pytest.raises(VirtueError, match=complaint):
        load_adapter_state(model, "target", state, config)
    after = weights()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_existing_adapter_with_another_alpha_is_refused(model):
    add(model, "a", rank=2, alpha=4)
    add(model, "b", rank=2, alpha=8)
    with pytest.raises(VirtueError, match="lora_alpha is 4.0, expected 8"):
        load_adapter_state(model, "b", adapter_state(model, "a"), adapter_config(model, "a", ""))


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_sampling_copy_has_the_same_weights_and_adapters(tmp_path, quantize):
    model = load_model(make_tiny_model(tmp_path, tokenizer=False), quantize=quantize)
    add_adapter(model, "policy", rank=4, alpha=8, targets=("q_proj", "down_proj"))
    twin, half = sampling_copy(model, torch.float32), sampling_copy(model, torch.bfloat16)
    assert twin.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert {p.dtype for n, p in half.named_parameters() if "lora" not in n} == {torch.bfloat16}
    assert not any(hasattr(p, "quant_state") for p in twin.parameters())
    ids = torch.randint(5, 300, (2, 9))
    def run(m):
        return m(ids, attention_mask=torch.ones_like(ids)).logits.detach().float()
    plain = run(model)
    for lora_B in adapter_parameters(model, "policy")[1::2]:
        lora_B.data.normal_(std=0.1)
    flatten(model, ("policy",), "rollout")  # an adapter made after the copy
    with use_stack(twin, "rollout"):
        assert active_stack(model) == () and torch.equal(run(model), plain)
        tuned = run(twin)
    with use_stack(model, "policy"):
        torch.testing.assert_close(tuned, run(model), rtol=1e-4, atol=1e-4)
    assert 0 < (run(half) - plain).norm() < 0.04 * plain.norm()
    torch.testing.assert_close(run(twin), plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(tuned, plain, atol=0.01)


def test_rollouts_in_bf16_have_the_log_probs_of_the_fp32_policy(toy_folder):
    """The tolerance that --rollout-dtype bf16 is used with:
    of the toy's own samples 0.005 nats a token in the mean, 0.1 at most."""
    from virtue.plumbing.records import load_prompts
    from virtue.generate import sample_dialogues
    from virtue.plumbing.loading import load_tokenizer
    from virtue.rollout import dialogue_logprobs

    model, tokenizer = load_model(toy_folder), load_tokenizer(toy_folder)
    add_adapter(model, "policy", rank=4, alpha=8)
    for lora_B in adapter_parameters(model, "policy")[1::2]:
        lora_B.data.normal_(std=0.01)
    half = sampling_copy(model, torch.bfloat16)
    flatten(model, ("policy",), "rollout")
    with use_stack(half, "rollout"):
        dialogues = sample_dialogues(half, tokenizer, load_prompts("toy", "eval", 8), seed=0,
                                     stage="t", max_new_tokens=32, temperature=1.0,
                                     batch_size=8, turns=1)
    exact, mask = dialogue_logprobs(model, ("policy",), dialogues,
                                    tokenizer.pad_token_id, batch_size=8)
    rounded, _ = dialogue_logprobs(half, ("rollout",), dialogues,
                                   tokenizer.pad_token_id, batch_size=8)
    apart = (exact - rounded)[mask].abs()
    assert len(apart) > 100 and 0 < apart.mean() < 0.005 and apart.max() < 0.1
