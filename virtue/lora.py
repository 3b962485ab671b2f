"""LoRA over any linear layer: named adapters, stacks that add up, flattening and merging.

    y = W x + sum over the active adapters i of  (alpha_i / r_i) B_i A_i x

(Hu et al. 2021, arXiv:2106.09685, eq. 3.) ``W`` is frozen and may be 4-bit (QLoRA, Dettmers et al.
2023, arXiv:2305.14314, eq. 5). Departures: the adapters of a stack add up, so that one base plays
every role, reference ("sft",), policy ("sft", "policy") and so on; adapter arithmetic is fp32
whatever the base's type, as bf16 loses the small updates of RL (except in the flattened copy that
samples, see `flatten`); and there is no dropout.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from virtue import TARGETS, VirtueError

State = dict[str, Tensor]
_PREFIX = "base_model.model."  # PEFT's names: base_model.model.<module>.lora_A.weight
# PEFT's settings that are not plain LoRA; the last acts on a part of the tokens only
VARIANTS = ("use_rslora", "use_dora", "use_qalora", "fan_in_fan_out", "rank_pattern",
            "alpha_pattern", "layer_replication", "alora_invocation_tokens")
INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")  # those that leave the base alone


class _Folded(torch.autograd.Function):
    """x W'^T with W' = W + sum s_i B_i A_i, and the gradients of x, A_i and B_i, but not of W'.

    One product forward and one backward instead of one and three narrow ones for each adapter. Per
    adapter dB = s dy^T (x A^T) and dA = s (dy B)^T x: the same as on the plain path, with the sums
    in another order.
    """

    @staticmethod
    def forward(ctx, x, folded, bias, scales, *halves):
        """halves: A1, B1, A2, B2, ... of `scales`; an A that is None: a whole matrix B."""
        ctx.save_for_backward(x, folded, *halves)
        ctx.scales = scales
        return F.linear(x, folded, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, folded, *halves = ctx.saved_tensors
        dx = dy @ folded if ctx.needs_input_grad[0] else None
        x, dy, grads = x.flatten(0, -2), dy.flatten(0, -2), []
        needed = ctx.needs_input_grad[4:]
        for i, s in enumerate(ctx.scales):
            A, B = halves[2 * i:2 * i + 2]
            grads.append((dy @ B).T @ x * s if needed[2 * i] else None)
            grads.append(dy.T @ (x if A is None else x @ A.T) * s if needed[2 * i + 1] else None)
        return dx, None, None, None, *grads


_steps = [0]  # of all optimisers


@register_optimizer_step_post_hook
def _count_step(*_) -> None:
    _steps[0] += 1


class LoRALinear(nn.Module):
    """A frozen linear layer ``base`` and its adapters: ``lora_A[name]`` (r, in), ``lora_B[name]``
    (out, r), both fp32, times ``scaling[name]`` = alpha / r. A name without an A is a whole matrix:
    its B (out, in) is the change of W itself, its scaling 1. Adapters named in ``active`` add to
    the output; a name that this layer lacks (another list of targets) adds nothing here.

    Three paths compute the same result, up to rounding:
    ``plain``: the equation above, for a base of any type.
    ``folded``: one product with the sum of all matrices, which is kept until an adapter changes. It
    is a third faster, but keeps a second copy of the weights. It is taken where the base is fp32,
    as on a CPU.
    ``sampling``: without gradient, by one adapter of the input's own type below fp32 (`flatten`).
    """

    def __init__(self, base: nn.Linear, active: tuple[str, ...] = ()):
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.active = active
        self._fold: tuple = (None, [], None)  # key, tensors and their sum

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the base's dtype: the base and the active adapters."""
        names, weight = [n for n in self.active if n in self.scaling], self.base.weight
        if not names:
            return self.base(x)
        A = self.lora_A[names[0]] if names[0] in self.lora_A else None
        low_precision = A is not None and x.dtype == A.dtype != torch.float32
        if low_precision and len(names) == 1 and not torch.is_grad_enabled():
            return self.sampling(x, names[0])
        frozen = type(self.base) is nn.Linear and not weight.requires_grad
        autocast = torch.is_autocast_enabled(x.device.type)
        fp32 = x.dtype == weight.dtype == torch.float32 and not autocast
        return self.folded(x, names) if frozen and fp32 else self.plain(x, names)

    def plain(self, x: Tensor, names: list[str]) -> Tensor:
        """base(x) + sum_n scaling_n B_n A_n x. (..., in) -> (..., out), in the base's dtype."""
        output = self.base(x)
        updates = []
        for n in names:
            h = x.to(self.lora_B[n].dtype)
            if n in self.lora_A:  # the scale meets the narrow side, (..., r)
                h = F.linear(h, self.lora_A[n]) * self.scaling[n]
            updates.append(F.linear(h, self.lora_B[n]))
        return output + sum(updates[1:], updates[0]).to(output.dtype)

    def sampling(self, x: Tensor, name: str) -> Tensor:
        """``plain`` with one adapter of x's own type, without gradient: the second narrow product
        adds to the base's. (..., in) -> (..., out)."""
        output, h = self.base(x), F.linear(x, self.lora_A[name])
        rows = torch.addmm(output.flatten(0, -2), h.flatten(0, -2), self.lora_B[name].T,
                           alpha=self.scaling[name])
        return rows.view_as(output)

    def change(self, name: str) -> Tensor:
        """(out, in), fp32: what an adapter adds to the weight. KeyError: there is none."""
        B = self.lora_B[name] * self.scaling[name]
        return B @ self.lora_A[name] if name in self.lora_A else B

    def folded(self, x: Tensor, names: list[str]) -> Tensor:
        """The same as (W + sum_n scaling_n B_n A_n) x + bias, for an fp32 base that is not trained.
        (..., in) -> (..., out)."""
        pair = self.lora_A, self.lora_B
        halves = [half[n] if n in half else None for n in names for half in pair]
        scales = [self.scaling[n] for n in names]
        # PyTorch counts a tensor's changes in place, but not those by its fused optimisers: steps
        # are counted, too. The tensors are kept beside the key, so that no other one can come to
        # stand at the same address.
        tensors = [self.base.weight, *(half for half in halves if half is not None)]
        key = [(t.data_ptr(), t._version) for t in tensors], scales, *_steps
        if key != self._fold[0]:
            with torch.no_grad():
                folded = self.base.weight + sum(self.change(n) for n in names)
            self._fold = key, tensors, folded
        folded = self._fold[2]
        return _Folded.apply(x, folded, self.base.bias, scales, *halves)

    def put(self, name: str, A: Tensor | None, B: Tensor, scaling: float, trainable: bool) -> None:
        """Adds adapter `name`, or replaces it: A (r, in), B (out, r), or None and B (out, in);
        moved to the base's device."""
        self.drop(name)
        device = self.base.weight.device
        for half, value in ((self.lora_A, A), (self.lora_B, B)):
            if value is not None:
                half[name] = nn.Parameter(value.to(device), requires_grad=trainable)
        self.scaling[name] = scaling

    def drop(self, name: str) -> None:
        """Removes adapter `name`, if this layer has it."""
        self.scaling.pop(name, None)
        for half in (self.lora_A, self.lora_B):
            if name in half:
                del half[name]


def _layers(model: nn.Module, name: str | None = None) -> dict[str, LoRALinear]:
    """Wrapped layers by module path; only those that hold adapter ``name``, if given."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}
    held = {path: layer for path, layer in layers.items() if name is None or name in layer.scaling}
    if not held and name is not None:
        raise KeyError(f"no adapter {name!r}; there are {adapter_names(model)}")
    return held


def _ranks(model: nn.Module, stack: tuple[str, ...]) -> dict[str, int]:
    """Rank of each adapter of ``stack``; of whole matrices that of the widest. KeyError: an unknown
    name; ValueError: one named twice."""
    if len(set(stack)) < len(stack):
        raise ValueError(f"the stack {stack} names an adapter twice")
    return {n: max(layer.lora_B[n].shape[1] for layer in _layers(model, n).values()) for n in stack}


def _is_whole(model: nn.Module, name: str) -> bool:
    return any(name not in layer.lora_A for layer in _layers(model, name).values())


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of all adapters on the model, in the order of their first appearance."""
    return tuple(dict.fromkeys(n for layer in _layers(model).values() for n in layer.scaling))


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """A and B of each layer (of whole matrices B), in the order of the model. KeyError if there is
    no such adapter."""
    held = _layers(model, name).values()
    return [half[name] for layer in held for half in (layer.lora_A, layer.lora_B) if name in half]


def add_adapter(
    model: nn.Module, name: str, *, rank: int | None, alpha: float = 0.0,
    targets: tuple[str, ...] = TARGETS, seed: int = 0,
) -> None:
    """Add a trainable adapter to every linear whose last path component is in ``targets``.

    A is uniform in +-1/sqrt(in) (kaiming, a = sqrt 5) from ``seed``, B zero: a no-op at first.
    ``rank`` None trains whole matrices: no A, B (out, in) the change of W, zeros at first.
    ValueError: the name is taken, or rank < 1; VirtueError: a target that matches no layer.
    """
    if name in adapter_names(model) or (rank is not None and rank < 1):
        raise ValueError(f"adapter {name!r} exists already, or its rank {rank} is below 1")
    found = {
        path: module for path, module in model.named_modules()
        if isinstance(module, nn.Linear | LoRALinear) and path.rpartition(".")[2] in targets
    }
    unmatched = sorted(set(targets) - {path.rpartition(".")[2] for path in found})
    if unmatched or not targets:
        raise VirtueError(f"LoRA targets {unmatched} match no linear layer; known are {TARGETS}")
    active, generator = active_stack(model), torch.Generator().manual_seed(seed)
    for path, layer in found.items():
        if isinstance(layer, nn.Linear):
            layer = LoRALinear(layer, active)
            model.set_submodule(path, layer)
        inputs, outputs = layer.base.in_features, layer.base.out_features
        if rank is None:
            layer.put(name, None, torch.zeros(outputs, inputs), 1.0, trainable=True)
            continue
        A = nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=math.sqrt(5), generator=generator)
        layer.put(name, A, torch.zeros(outputs, rank), alpha / rank, trainable=True)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Delete an adapter and take it off the active stack. KeyError if there is none."""
    for layer in _layers(model, name).values():
        layer.drop(name)
    _activate(model, active_stack(model))


def active_stack(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that act now."""
    return next((layer.active for layer in _layers(model).values()), ())


def _activate(model: nn.Module, names: tuple[str, ...]) -> None:
    known = adapter_names(model)
    for layer in _layers(model).values():
        layer.active = tuple(name for name in names if name in known)


def set_stack(model: nn.Module, *names: str) -> None:
    """Make exactly ``names`` act together (none: the bare base). KeyError: an unknown name."""
    _ranks(model, names)
    _activate(model, names)


@contextmanager
def use_stack(model: nn.Module, *names: str) -> Iterator[nn.Module]:
    """``set_stack`` for the length of a ``with`` block; the previous stack is restored in any
    case."""
    previous = active_stack(model)
    set_stack(model, *names)
    try:
        yield model
    finally:
        _activate(model, previous)


def adapter_state(model: nn.Module, name: str) -> State:
    """Copies on the CPU under PEFT's names, ``base_model.model.<module>.lora_A.weight``.

    PEFT has no whole matrices, and one rank for all layers: their A is an identity of the widest
    layer's inputs, and zeros fill up B.
    """
    state, rank = {}, _ranks(model, (name,))[name]
    for path, layer in _layers(model, name).items():
        B, key = layer.lora_B[name].detach().cpu(), f"{_PREFIX}{path}.lora"
        A = layer.lora_A[name] if name in layer.lora_A else torch.eye(rank, B.shape[1])
        state[f"{key}_A.weight"] = A.detach().cpu().clone()
        state[f"{key}_B.weight"] = F.pad(B, (0, rank - B.shape[1])).clone()
    return state


def adapter_config(
    model: nn.Module, name: str, base_id: str, modules_to_save: list[str] | None = None
) -> dict:
    """The content of PEFT's ``adapter_config.json``; ``modules_to_save=["score"]`` with a head."""
    layers, rank = _layers(model, name), _ranks(model, (name,))[name]
    alpha = round(next(iter(layers.values())).scaling[name] * rank, 9)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_id,
        "r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": 0.0,
        "target_modules": sorted({path.rpartition(".")[2] for path in layers}), "bias": "none",
        "modules_to_save": modules_to_save, "fan_in_fan_out": False, "inference_mode": True,
    }


def load_adapter_state(model: nn.Module, name: str, state: State, config: dict) -> None:
    """Write ``state`` and ``config`` (as from ``adapter_state`` and ``adapter_config``) to adapter
    ``name``, which keeps its ``requires_grad``; where there is no such adapter, a frozen one is
    made. It is one of whole matrices if every A is an identity that leaves nothing out.
    VirtueError, and nothing is changed: not plain LoRA; a rank, alpha or list of targets other than
    the existing adapter's; a tensor that is missing, extra, misshapen or not finite.
    """
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        # "all-linear" comes as whole paths: a layer that they leave out shows as a missing tensor
        targets = sorted({str(path).rpartition(".")[2] for path in config["target_modules"]})
        want = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
        if config["peft_type"] != "LORA" or rank < 1 or any(config.get(key) for key in VARIANTS):
            raise ValueError(f"not plain LoRA of rank >= 1 without {VARIANTS}")
        if (begin := config.get("init_lora_weights", True)) not in INITIAL:
            raise ValueError(f"init_lora_weights {begin!r} changes the base itself: convert it to "
                             "plain LoRA in PEFT")
    except (KeyError, TypeError, ValueError) as error:
        raise VirtueError(f"adapter {name!r}: bad adapter_config.json: {error!r}") from error
    is_new = name not in adapter_names(model)
    whole = alpha == rank and all(_is_identity(A) for key, A in state.items() if ".lora_A." in key)
    if is_new:
        add_adapter(model, name, rank=None if whole else rank, alpha=alpha, targets=tuple(targets))
    have, expected = adapter_config(model, name, ""), adapter_state(model, name)
    problems = [f"{k} is {v}, expected {have[k]}" for k, v in want.items() if v != have[k]]
    problems += ["it is LoRA, expected whole matrices"] * (_is_whole(model, name) and not whole)
    unpaired = sorted(expected.keys() ^ state.keys())
    problems += [f"{k} is {'missing' if k in expected else 'unknown'}" for k in unpaired]
    shapes = {k: (tuple(state[k].shape), tuple(expected[k].shape)) for k in expected if k in state}
    problems += [f"{k} is {a}, expected {b}" for k, (a, b) in shapes.items() if a != b]
    problems += [f"{k} holds NaN or infinity" for k in shapes if not state[k].isfinite().all()]
    if problems and is_new:
        remove_adapter(model, name)
    if problems:
        raise VirtueError(f"adapter {name!r} was made for another base or settings: {problems[0]}")
    with torch.no_grad():
        for path, layer in _layers(model, name).items():
            for half, held in (("A", layer.lora_A), ("B", layer.lora_B)):
                if name in held:
                    value = state[f"{_PREFIX}{path}.lora_{half}.weight"]
                    held[name].copy_(value[:, :held[name].shape[1]])
                    held[name].requires_grad_(held[name].requires_grad and not is_new)


def _is_identity(A: Tensor) -> bool:
    """Whether A stands for a whole matrix: an identity that leaves no input out."""
    square = A.ndim == 2 and A.shape[0] >= A.shape[1]
    return square and torch.equal(A, torch.eye(*A.shape, dtype=A.dtype))


def flatten(model: nn.Module, stack: tuple[str, ...], name: str,
            dtype: torch.dtype = torch.float32) -> None:
    """Make the frozen adapter ``name`` equal to ``stack`` up to rounding; a second call refreshes
    it. In the base's ``dtype`` it samples fastest, and all that is lost is the rounding of its
    output. Adapters that are trained on, scored by or saved are fp32.

    A stacked along the rank, s B side by side: [s1 B1, s2 B2] [A1; A2] = s1 B1 A1 + s2 B2 A2. Rank
    and alpha are the sum of ranks; zeros stand for an adapter that a layer lacks. With a whole
    matrix in the stack the sum is one too. ValueError: empty stack, ``name`` in the stack or
    trainable; KeyError: an unknown adapter.
    """
    ranks, whole = _ranks(model, stack), any(_is_whole(model, part) for part in stack)
    trainable = name in adapter_names(model) and adapter_parameters(model, name)[-1].requires_grad
    if not stack or name in stack or trainable:
        raise ValueError(f"cannot flatten {stack} into {name!r}: empty, itself, or trainable")
    for layer in _layers(model).values():
        layer.drop(name)
        if layer.scaling.keys().isdisjoint(stack):
            continue
        if whole:
            change = sum(layer.change(part).detach() for part in stack if part in layer.scaling)
            layer.put(name, None, change.to(dtype), 1.0, trainable=False)
            continue
        base, start, total = layer.base, 0, sum(ranks.values())
        A = torch.zeros(total, base.in_features, device=base.weight.device)
        B = torch.zeros(base.out_features, total, device=base.weight.device)
        for part, rank in ranks.items():
            if part in layer.scaling:
                A[start : start + rank] = layer.lora_A[part].detach()
                B[:, start : start + rank] = layer.lora_B[part].detach() * layer.scaling[part]
            start += rank
        layer.put(name, A.to(dtype), B.to(dtype), 1.0, trainable=False)


def _dense(parameter: nn.Parameter) -> Tensor:
    if getattr(parameter, "quant_state", None) is None:
        return parameter.detach().float()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state).float()


def merged_state_dict(model: nn.Module, stack: tuple[str, ...], dtype: torch.dtype) -> State:
    """The base with ``stack`` folded in, on the CPU, under the names of a plain model's files.

    W + sum scaling_i B_i A_i in fp32 (4-bit W dequantised first), then ``dtype``. Use it for export
    only: rounding to bf16 erases light fine-tunes, and rounding to 4 bits erases still more. A tied
    lm_head is left out, as in HF's files; VirtueError if the stack changes it. KeyError: an unknown
    adapter.
    """
    layers, merged, _ = _layers(model), {}, _ranks(model, stack)
    for key, parameter in model.named_parameters():  # a tied tensor comes once
        if ".lora_A." in key or ".lora_B." in key:
            continue
        key, weight = key.replace(".base.", "."), _dense(parameter)
        layer = layers.get(key.removesuffix(".weight"))
        for name in (name for name in stack if layer is not None and name in layer.scaling):
            weight = weight + layer.change(name).detach()
        merged[key] = weight.to("cpu", dtype, copy=True)
    for path, layer in layers.items():
        if f"{path}.weight" not in merged and not layer.scaling.keys().isdisjoint(stack):
            raise VirtueError(f"{path} is tied to the embeddings: its adapter cannot be merged")
    return merged


def sampling_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A second model with the same weights, 4-bit ones dequantised, in ``dtype``, and the *same*
    adapters.

    For rollouts: a 4-bit product of many rows (how many, depends on the card) dequantises its whole
    weight each time, which this copy never does. Weights that are not quantised and already have
    that type are shared, not copied; a change to an adapter of either model shows in both, but each
    has its own active stack.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if getattr(weight, "quant_state", None) is not None:
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(_dense(weight).to(dtype), requires_grad=False)
            if module.bias is not None:
                linear.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
            memo[id(module)] = linear
        elif isinstance(module, LoRALinear):
            memo |= {id(part): part for part in (module.lora_A, module.lora_B, module.scaling)}
            memo[id(module._fold)] = (None, [], None)
        elif not isinstance(module, nn.ParameterDict):
            memo |= {id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False)
                     for p in module.parameters(recurse=False)}
    return copy.deepcopy(model, memo)
