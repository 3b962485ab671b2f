"""The memory plan: how many bytes a run needs, from the base's config.json and the flags, before
anything is loaded.

Weights, adapters, moments and KV cache are exact; activations follow the formula at `layer_bytes`,
which is what autograd keeps of transformers' models with a fused attention kernel (which CUDA has
for bf16 and fp16, but not for fp32 without a mask) and our LoRA; logits and passing tensors are
upper estimates. Not in it: the CUDA context and the allocator's fragments, 0.5 to 1 GiB. Sizes in
bytes; every sequence counts as full length.
"""
from __future__ import annotations

from collections.abc import Sequence

from virtue import TARGETS, VirtueError
from virtue.models import LOGITS_AT_ONCE

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
Adapter = tuple[int | None, Sequence[str]]  # rank, None for whole matrices; targets


def linears(config) -> dict[str, tuple[int, int, int]]:
    """Inputs, outputs and number of each linear layer of a model with this config."""
    D, F, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    A, K = (_head_dim(config) * n for n in (heads, config.num_key_value_heads))
    sizes = zip(TARGETS, ((D, A), (D, K), (D, K), (A, D), (D, F), (D, F), (F, D)), strict=True)
    layers = {name: (*size, config.num_hidden_layers) for name, size in sizes}
    return layers | {"lm_head": (D, config.vocab_size, 1)}


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _biased(config) -> Sequence[str]:
    """Names of the linear layers with a bias. Fields that the architecture does not know may stand
    in a config all the same."""
    kind = config.model_type
    attention = kind in ("llama", "qwen3") and config.attention_bias
    mlp = kind == "llama" and config.mlp_bias
    return TARGETS[:3 if kind == "qwen2" else 4 * attention] + TARGETS[4:] * mlp


def rest_bytes(config, dtype: str) -> int:
    """Bytes of what is never quantised: embeddings, norms, biases and lm_head, each in `dtype`."""
    D, N, known = config.hidden_size, config.num_hidden_layers, linears(config)
    norms = (2 * N + 1) * D + (2 * N * _head_dim(config) if config.model_type == "qwen3" else 0)
    words = config.vocab_size * (1 if config.tie_word_embeddings else 2) * D
    return (norms + words + N * sum(known[name][1] for name in _biased(config))) * BYTES[dtype]


def base_bytes(config, quantize: str, dtype: str) -> int:
    """The base's weights. NF4: 4 bits, 8 for the scale of 64, 32 for that of 256 scales (QLoRA,
    sec. 3); the rest in `dtype`."""
    layers = sum(i * o * n for name, (i, o, n) in linears(config).items() if name != "lm_head")
    if quantize == "none":
        return rest_bytes(config, dtype) + layers * BYTES[dtype]
    return rest_bytes(config, dtype) + layers // 2 + layers // 64 + layers // (64 * 256) * 4


def check_targets(config, targets: Sequence[str]) -> None:
    """VirtueError: a target that there is not."""
    if unmatched := sorted(set(targets) - linears(config).keys()):
        raise VirtueError(f"LoRA targets {unmatched} match no linear layer; known are {TARGETS}")


def adapter_bytes(config, adapter: Adapter) -> int:
    """An adapter in fp32; the flattened one that samples is smaller in bf16."""
    (rank, targets), known = adapter, linears(config)
    sizes = (known[name] for name in targets)
    return 4 * sum((i * o if rank is None else rank * (i + o)) * n for i, o, n in sizes)


def layer_bytes(config, dtype: str, rows: int, tokens: int, adapter: Adapter) -> int:
    """What one decoder layer keeps of rows x tokens for the backward pass; c bytes a number of
    `dtype`, A heads times head_dim, K the same of keys and values.

    Per token: the inputs of two norms in fp32, 8 D, and of Qwen3's norms of q and k, 4 (A + K);
    attention's q and result, 2 A c, k and v, 2 K c, and its log-sums; gate, silu(gate) and up, 3 F
    c; each target's input in fp32, its own cast where c < 4, else shared by q, k, v and by gate,
    up; r numbers of each target between A and B. (Rows are padded on the right and need no mask.)
    """
    (rank, targets), known, c = adapter, linears(config), BYTES[dtype]
    D, F = config.hidden_size, config.intermediate_size
    A, K = known["o_proj"][0], known["k_proj"][1]
    inputs = [known[name][0] for name in targets if name != "lm_head"]
    if c == 4:  # o_proj's is attention's result
        groups = (("qkv", D), ("gu", D), ("d", F))
        inputs = [i for group, i in groups if any(name[0] in group for name in targets)]
    attention = 2 * (A + K) * c + 4 * config.num_attention_heads
    attention += 4 * (A + K) if config.model_type == "qwen3" else 0
    each = 8 * D + attention + 3 * F * c + 4 * sum(inputs) + 4 * (rank or 0) * len(targets)
    return rows * tokens * each


def passing_bytes(config, quantize: str, dtype: str, rows: int, tokens: int) -> int:
    """What an MLP needs for a moment, forward or backward; NF4: also the widest weight in `dtype`,
    for its product. Where c < 4 a norm on a CPU makes one more fp32 copy of its input, 4 D."""
    c, F, D = BYTES[dtype], config.intermediate_size, config.hidden_size
    each = F * (4 * c + 4) + (8 if c == 4 else 12) * D
    return rows * tokens * each + (F * D * c if quantize == "nf4" else 0)


def mask_bytes(dtype: str, rows: int, tokens: int) -> int:
    """A mask (rows, tokens, tokens), and as numbers: of rows that are padded on the left, or that
    the judge packs."""
    return rows * tokens * tokens * (1 + BYTES[dtype])


def cache_bytes(config, dtype: str, rows: int, tokens: int) -> int:
    """Bytes of the KV cache of rows x tokens: keys and values of every layer."""
    each = 2 * linears(config)["k_proj"][1] * config.num_hidden_layers * BYTES[dtype]
    return each * rows * tokens


def plan(config, *, quantize: str, dtype: str, frozen: Sequence[Adapter] = (),
         trained: Sequence[Adapter] = (), judge: int = 0, checkpointing: bool = False,
         sampling: dict | None = None, judging: dict | None = None, scoring: dict | None = None,
         update: dict | None = None, copy: str | None = None) -> dict[str, dict[str, int]]:
    """Bytes by part: what is "held" all the time, and what each moment needs on top of it. `judge`:
    another model's bytes; `copy`: the type of a dequantised one for sampling, which shares what is
    of that type already.

    `sampling`: rows, tokens, prompt (those of them that the first pass reads). `judging`,
    `scoring`: rows, tokens. `update`: a forward's rows and tokens, positions whose logits are
    taken, stacks before one backward pass, whether entropy is trained.
    """
    c, V, D, N = BYTES[dtype], config.vocab_size, config.hidden_size, config.num_hidden_layers
    learning = sum(adapter_bytes(config, adapter) for adapter in trained)
    folded = folded_bytes(config, quantize, dtype, (*frozen, *trained))

    def passing(rows: int, tokens: int, masked: bool = False) -> int:
        mask = mask_bytes(dtype, rows, tokens) if masked else 0
        return passing_bytes(config, quantize, dtype, rows, tokens) + mask

    plan = {"held": {"base weights": base_bytes(config, quantize, dtype), "judge": judge,
                     "adapters": sum(adapter_bytes(config, a) for a in (*frozen, *trained)),
                     "optimiser moments": 2 * learning}}
    if copy:
        shared = rest_bytes(config, dtype) if dtype == copy else 0
        if (quantize, dtype) == ("none", copy):
            shared = base_bytes(config, "none", copy)
        plan["held"]["sampling copy"] = base_bytes(config, "none", copy) - shared
    if sampling:
        rows, tokens = sampling["rows"], sampling["tokens"]
        plan["sampling"] = {"KV cache": cache_bytes(config, dtype, rows, tokens),
                            "logits": rows * V * (c + 12), "folded weights": folded,
                            "passing": passing(rows, sampling["prompt"], masked=True)}
    if judging:
        rows, tokens = judging["rows"], judging["tokens"]
        plan["judging"] = {"logits": rows * 5 * V * (c + 8),
                           "passing": passing(rows, tokens, masked=True)}
    if scoring:
        plan["scoring"] = {"folded weights": folded,
                           "passing": passing(scoring["rows"], scoring["tokens"])}
    if update:
        rows, tokens, stacks = update["rows"], update["tokens"], update["stacks"]
        layer = max(layer_bytes(config, dtype, rows, tokens, adapter) for adapter in trained)
        kept = stacks * N * layer
        if checkpointing:
            kept = stacks * N * rows * tokens * D * c + layer
        last_norm = stacks * rows * tokens * 8 * D  # its input and output in fp32
        each = c + (24 if update.get("entropy") else 12)
        plan["update"] = {"gradients": learning, "activations": kept + last_norm,
                          "folded weights": folded * (1 if checkpointing else stacks),
                          "logits": min(update["positions"] * V, LOGITS_AT_ONCE) * each,
                          "passing": passing(rows, tokens)}
    return {moment: {part: n for part, n in parts.items() if n} for moment, parts in plan.items()}


def folded_bytes(config, quantize: str, dtype: str, adapters: Sequence[Adapter]) -> int:
    """The second copy of the weights with adapters that an fp32 base keeps (lora.LoRALinear)."""
    if (quantize, dtype) != ("none", "fp32"):
        return 0
    targets = {name for _, names in adapters for name in names}
    return sum(4 * i * o * n for name, (i, o, n) in linears(config).items() if name in targets)


_planned: list[int] = []  # bytes of the plans printed so far: what `used` compares with


def greatest(plan: dict[str, dict[str, int]]) -> tuple[str, int]:
    """The moment that needs most, and its bytes, what is held included."""
    held = sum(plan["held"].values())
    moments = {name: sum(parts.values()) for name, parts in plan.items() if name != "held"}
    moment = max(moments, key=moments.get, default="held")
    return moment, held + moments.get(moment, 0)


def table(plan: dict[str, dict[str, int]]) -> str:
    """The plan as aligned lines, in GiB, and its greatest moment; `used` remembers it."""
    rows = [(moment if i == 0 else "", part, n) for moment, parts in plan.items()
            for i, (part, n) in enumerate(parts.items())]
    rows.append(("greatest", *greatest(plan)))
    _planned.append(rows[-1][-1])
    lines = [f"  {moment:10}{part:18}{n / 2**30:9.3f}" for moment, part, n in rows]
    title = "memory plan, GiB (computed; CUDA's own and fragments, 0.5 to 1, come on top)"
    return "\n".join([title, *lines])


def used(device) -> str:
    """A line that compares what was used with the plan printed last: on CUDA what its allocator
    gave out at most, on a CPU the process's resident memory at most, Python and its libraries
    included. Nothing where neither CUDA nor a plan is there."""
    import resource
    import torch

    plan = f", planned {_planned[-1] / 2**30:.2f}" if _planned else ""
    if device.type == "cuda":
        allocated, reserved = (most(device) / 2**30 for most in (
            torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved))
        return f"\nmemory: at most {allocated:.2f} GiB allocated, {reserved:.2f} reserved{plan}"
    if not plan:
        return ""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return (f"\nmemory: at most {resident:.2f} GiB resident, Python and libraries "
            f"included{plan}")
