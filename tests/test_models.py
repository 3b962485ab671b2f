"""Loading against transformers' own loader, log-probs and scores against a plain per-row forward.

    python -m pytest -q tests/test_models.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import ARCHITECTURES, dequantize, make_tiny_model
from torch import nn

from virtue import VirtueError
from virtue.plumbing import loading
from virtue.models import ScalarHead, checkpoint_layers, hidden_states, logprobs_at, score_at
from virtue.plumbing.loading import (base_fingerprint, load_model, load_tokenizer, resolve,
                                     template_fingerprint)

KINDS = [kind for kind in ARCHITECTURES if kind != "mistral"]
SHAPES = [(False, False), (False, True), (True, False), (True, True), *KINDS]
ROWS = [[1, 3, 50, 60, 70, 4, 90, 91, 2], [1, 3, 9, 4, 7], [1, 3, 200, 201, 4, 8, 2]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {}
    for tied in (False, True):
        for shards in (False, True):
            folder = root / f"tied{tied:d}-shards{shards:d}"
            made[tied, shards] = make_tiny_model(
                folder, tie_word_embeddings=tied, tokenizer=not (tied or shards),
                max_shard_size="100KB" if shards else "50GB",
            )
    assert len(list(made[True, True].glob("model-*.safetensors"))) > 1
    for kind in KINDS:
        made[kind] = make_tiny_model(root / kind, model_type=kind, tokenizer=False)
    return made


@pytest.fixture(scope="module")
def folder(folders):
    return folders[False, False]


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def plain(folder):
    from transformers import MistralForCausalLM
    return MistralForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def edit(path, **fields):
    content = json.loads(path.read_text())
    content.update(fields)
    path.write_text(json.dumps(content))


def batch(rows, side="right", extra=0, pad=0):
    length = max(map(len, rows)) + extra
    ids, mask = torch.full((len(rows), length), pad), torch.zeros(len(rows), length, dtype=bool)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, where], mask[i, where] = torch.tensor(row), True
    return ids, mask


# ---- loading


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_logits_equal_from_pretrained_bitwise(folders, dtype, shape):
    from transformers import AutoModelForCausalLM

    folder, kind = folders[shape], {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    mine = load_model(folder, dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()
    tied, ids = theirs.config.tie_word_embeddings, torch.tensor([ROWS[0]])
    with torch.no_grad():
        # PyTorch's norm rounds once where transformers' rounds twice; all else is the same bit for
        # bit
        if dtype == "bf16":
            for path, norm in [(path, m) for path, m in theirs.named_modules()
                               if type(m).__name__.endswith("RMSNorm")]:
                ours = mine.get_submodule(path)
                assert torch.equal(ours.weight, norm.weight) and ours.eps == norm.variance_epsilon
                theirs.set_submodule(path, ours)
        assert torch.equal(mine(ids).logits, theirs(ids).logits)
    assert sum(type(m) is nn.RMSNorm for m in mine.modules()) == (9 if shape == "qwen3" else 5)
    assert (mine.lm_head.weight is mine.model.embed_tokens.weight) == tied
    assert {p.dtype for p in mine.parameters()} == {kind}
    assert torch.equal(mine.model.rotary_emb.inv_freq, theirs.model.rotary_emb.inv_freq)
    assert mine.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not mine.training and not any(p.requires_grad for p in mine.parameters())
    assert type(mine) is type(theirs)


@pytest.mark.parametrize("kind, fields, window", [
    ("llama", dict(sliding_window=4), None),  # not a field of Llama's
    ("qwen2", dict(use_sliding_window=True, max_window_layers=2), None),  # on layers 2 and up
    ("qwen3", dict(use_sliding_window=True, sliding_window=4, max_window_layers=0), 4),
])
def test_a_window_is_on_all_layers_or_on_none(folders, tmp_path, kind, fields, window):
    from transformers import AutoModelForCausalLM

    copy = shutil.copytree(folders[kind], tmp_path / "copy")
    path = copy / "config.json"
    edit(path, **{**json.loads(path.read_text()), "layer_types": None, **fields})
    mine, theirs = load_model(copy), AutoModelForCausalLM.from_pretrained(copy).eval()
    assert mine.config.sliding_window == window
    ids, attention = batch(ROWS, "left")
    with torch.no_grad():
        hidden = hidden_states(mine, ids, attention)
        for i, row in enumerate(ROWS):
            want = theirs.model(torch.tensor([row])).last_hidden_state[0]
            torch.testing.assert_close(hidden[i, -len(row):], want, rtol=1e-4, atol=1e-5)
    if kind != "llama":
        edit(path, use_sliding_window=True, sliding_window=4, max_window_layers=1)
        with pytest.raises(VirtueError, match="config.json: a sliding window on some layers only"):
            load_model(copy)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("tied, has", [
    (True, "another"), (True, "equal"), (True, "head"), (False, "equal")])
def test_a_head_in_the_file_is_kept_or_tied_as_in_transformers(
        tmp_path, capsys, folder, tied, has, quantize):
    from transformers import AutoModelForCausalLM

    copy = shutil.copytree(folder, tmp_path / "copy")
    edit(copy / "config.json", tie_word_embeddings=tied)
    head, embeddings = "lm_head.weight", "model.embed_tokens.weight"
    if has == "equal":
        save(copy, lambda t: t.update({head: t[embeddings].clone()}))
    elif has == "head":
        save(copy, lambda t: t.pop(embeddings))
    mine, one = load_model(copy, quantize=quantize), tied and has != "another"
    said = capsys.readouterr().err
    warning = f"warning: {copy}: config.json ties lm_head" if has == "another" else ""
    assert said.startswith(warning) and bool(said) == bool(warning)
    theirs = AutoModelForCausalLM.from_pretrained(copy).eval()
    for model in (mine, theirs):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == one
    assert torch.equal(mine.lm_head.weight, theirs.lm_head.weight)
    assert torch.equal(mine.model.embed_tokens.weight, theirs.model.embed_tokens.weight)
    if quantize == "none":
        ids = torch.tensor([ROWS[0]])
        with torch.no_grad():
            assert torch.equal(mine(ids).logits, theirs(ids).logits)
    assert mine.config.tie_word_embeddings == one


def test_weights_do_not_live_in_the_file(copy):
    model = load_model(copy)
    before = model.model.embed_tokens.weight.clone()
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-400_000, 2)
        file.write(b"\0" * 400_000)
    assert torch.equal(model.model.embed_tokens.weight, before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(False, True), (True, True), *KINDS], ids=str)
def test_nf4_equals_a_model_of_dequantised_weights(folders, shape, dtype):
    """Each linear but lm_head is what bitsandbytes makes of the file's tensor cast to dtype; the
    fp32 logits are those of a plain model with these weights dequantised."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    folder, kind = folders[shape], {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = load_model(folder, quantize="nf4", dtype=dtype)
    other = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    quantized = {path for path, m in model.named_modules() if isinstance(m, Linear4bit)}
    linears = {path for path, m in other.named_modules() if isinstance(m, nn.Linear)}
    assert quantized == linears - {"lm_head"} and len(quantized) == 14
    for path in quantized:
        layer, dense = model.get_submodule(path), other.get_submodule(path).weight
        data, _ = quantize_4bit(dense.detach().to(kind), quant_type="nf4", compress_statistics=True)
        assert torch.equal(layer.weight.data, data)
        # the type that was quantised is the one that backward computes in
        assert layer.compute_dtype == layer.weight.quant_state.dtype == kind
        assert layer.support_avx512bf16_for_cpu is False
        back = dequantize(layer.weight)
        # NF4's widest step is 0.304 of a block's largest value; half of it is the worst error
        assert 0 < (back - dense).abs().max() < 0.16 * dense.abs().max()
        dense.data.copy_(back)
    assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == kind
    assert not any(p.requires_grad for p in model.parameters())
    if dtype == "fp32":
        ids = torch.tensor([ROWS[0]])
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(model(ids).logits, plain(ids).logits, atol=0.1)


def test_gradients_reach_through_4_bits_after_a_no_grad_forward(folder):
    """The trap of CPUs with AVX512-BF16: weights repacked in place by a forward in eval mode."""
    model = load_model(folder, quantize="nf4")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer(torch.randn(3, 64))
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    dense = dequantize(layer.weight)
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_nf4_refuses_widths_that_bitsandbytes_gets_wrong(tmp_path):
    """Where 16 but not 64 divides the width, its AVX512 kernel reads the scales of other blocks:
    errors of 0.9 of the largest weight of the block, silently."""
    odd = make_tiny_model(tmp_path, intermediate_size=112, tokenizer=False)
    with pytest.raises(VirtueError, match="down_proj.*multiples of 64, not 112.*--quantize none"):
        load_model(odd, quantize="nf4")
    load_model(odd)


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"dtype": "float32"}])
def test_unknown_options_are_programming_errors(folder, options):
    with pytest.raises(ValueError):
        load_model(folder, **options)


def save(folder, change):
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("damage, complaint", [
    (lambda f: edit(f / "config.json", model_type="phi3"),
     "config.json.*'phi3', known are mistral, llama, qwen2, qwen3;"),
    (lambda f: edit(f / "config.json", model_type=["llama"]), "config.json.*'llama'.*known are"),
    (lambda f: edit(f / "config.json", quantization_config={"bits": 4}), "quantised"),
    (lambda f: edit(f / "config.json", hidden_size="wide"), "config.json"),
    (lambda f: edit(f / "config.json", num_hidden_layers=3), "9 tensors are missing.*layers.2"),
    (lambda f: edit(f / "config.json", num_hidden_layers=1), "layers.1.*no such tensor"),
    (lambda f: edit(f / "config.json", intermediate_size=192), r"\(64, 128\).*\(64, 192\)"),
    (lambda f: (f / "config.json").write_text("{"), "config.json"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    (lambda f: (f / "config.json").unlink(), "config.json"),
    (lambda f: edit(f / "config.json", sliding_window=0), "config.json.*sliding_window"),
    (lambda f: save(f, lambda t: t.pop(NORM)), f"1 tensors are missing.*{NORM}"),
    (lambda f: save(f, lambda t: t.pop("lm_head.weight")), "1 tensors are missing.*lm_head"),
    (lambda f: (edit(f / "config.json", tie_word_embeddings=True),
                save(f, lambda t: [t.pop("lm_head.weight"), t.pop("model.embed_tokens.weight")])),
     "1 tensors are missing.*embed_tokens"),
    (lambda f: save(f, lambda t: t.update(bias=t[NORM].clone())), "bias.*no such tensor"),
    (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
     "damaged")])
def test_a_damaged_folder_is_refused(copy, damage, complaint):
    damage(copy)
    with pytest.raises(VirtueError, match=complaint) as caught:
        load_model(copy)
    assert str(copy) in str(caught.value)


def test_old_files_with_inv_freq_load(copy, model):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save(copy, lambda tensors: tensors.update({name: torch.zeros(4)}))
    ids = torch.tensor([ROWS[0]])
    assert torch.equal(load_model(copy)(ids).logits, model(ids).logits)


def test_a_missing_shard_is_named(folders, tmp_path):
    folder = shutil.copytree(folders[False, True], tmp_path / "copy")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(VirtueError, match=shard.name):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(VirtueError, match="index"):
        load_model(folder)


def test_resolve(folder, tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "empty" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "inner")  # relative names then name nothing

    asked = []

    def download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        if repo.startswith("nobody"):
            raise OSError("404\n not   found")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(loading, "TOY_FOLDER", folder)
    assert resolve("toy") == folder and resolve(folder) == folder and resolve(str(folder)) == folder
    for bad in ("mistral", "./x/y", "/no/such/place", "../x", "a/b/c", "~/nothing", ""):
        with pytest.raises(VirtueError, match="toy"):
            resolve(bad if bad else "no such")
    assert not asked
    assert resolve("mistralai/Mistral-7B-Instruct-v0.2") == tmp_path
    from fnmatch import fnmatch
    wanted = {
        name for name in (
            "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
            "model.safetensors", "model-00001-of-00003.safetensors", "model.safetensors.index.json",
            "pytorch_model-00001-of-00003.bin", "consolidated.safetensors", "tokenizer.model",
        ) if any(fnmatch(name, pattern) for pattern in asked[0][1])
    }
    assert len(wanted) == 7 and "consolidated.safetensors" not in wanted
    with pytest.raises(VirtueError, match="nobody/x.*404 not found"):
        resolve("nobody/x")
    monkeypatch.setattr(loading, "TOY_FOLDER", tmp_path / "gone")
    with pytest.raises(VirtueError, match="gone"):
        resolve("toy")


def test_a_gated_model_says_how_to_get_it(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def download(*args, **kwargs):
        raise GatedRepoError.__new__(GatedRepoError)  # it wants the hub's response
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    page = "https://huggingface.co/owner/secret"
    with pytest.raises(VirtueError, match=rf"accept the terms.*{page},.*hf auth login.*HF_TOKEN"):
        resolve("owner/secret")


LOADING = """
import sys
from virtue.plumbing.loading import load_model
from tiny import make_tiny_model

def peak():  # MiB; a new process's own, and without what its parent had
    status = open("/proc/self/status")
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

load_model(sys.argv[1], quantize="nf4")  # imports and first calls
before = peak()
model = load_model(sys.argv[2], quantize="nf4")
print(peak() - before, sum(t.nbytes for t in model.state_dict().values()) / 2**20)
"""


def test_loading_holds_its_result_and_little_more(folder, tmp_path):
    """A checkpoint of 130 MiB in shards: tensor by tensor, so that it is never held whole."""
    large = make_tiny_model(tmp_path, tokenizer=False, hidden_size=512, intermediate_size=1792,
                            num_hidden_layers=10, head_dim=128, max_shard_size="16MB")
    size = sum(f.stat().st_size for f in large.glob("*.safetensors")) / 2**20
    shards = len(list(large.glob("*.safetensors")))
    # the system may map pages of the files ahead, which only adds: the least of three counts
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", LOADING, str(folder), str(large)],
                              capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH":
                                   f"{Path(__file__).parent}:{Path(__file__).parent.parent}",
                                   "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        grown, result = map(float, done.stdout.split())
        assert size > 120 and shards >= 8 and 15 < result < size / 5
        if grown < 0.7 * size:
            break
    # 49 to 92 MiB in 14 counts, once 114: the result, pages of two shards, which may go at any
    # time, the largest tensor on its way into 4 bits; held whole: 150
    assert grown < 0.7 * size


# ---- tokenizer


def test_tokenizer_renders_the_chat_as_ids(folder):
    tokenizer = load_tokenizer(folder)
    texts = {"user": "Où est-ce ?", "assistant": "là 你"}
    messages = [{"role": role, "content": text} for role, text in texts.items()]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert tokenizer.decode(ids) == "<s>[INST] Où est-ce ?[/INST] là 你</s>"
    assert (ids[0], ids[1], ids[-1]) == (1, 3, 2) and ids.count(4) == 1
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


def test_unknown_token_pads_where_no_pad_is_set(copy):
    edit(copy / "tokenizer_config.json", pad_token=None, unk_token="<pad>")
    assert load_tokenizer(copy).pad_token_id == 0


@pytest.mark.parametrize("damage, complaint", [
    (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json.*save_pretrained"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot read the tokenizer"),
    (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
    (lambda f: edit(f / "tokenizer_config.json", eos_token=None), "eos_token"),
    (lambda f: edit(f / "tokenizer_config.json", pad_token=None), "neither pad_token nor unk"),
    (lambda f: edit(f / "tokenizer_config.json", pad_token="</s>"), "pad_token is eos_token"),
    (lambda f: edit(f / "tokenizer_config.json", pad_token=None, unk_token="</s>"), "is eos_token"),
])
def test_an_unfit_tokenizer_is_refused(copy, damage, complaint):
    damage(copy)
    with pytest.raises(VirtueError, match=complaint) as caught:
        load_tokenizer(copy)
    assert str(copy) in str(caught.value)


def test_a_chat_template_that_loops_is_stopped(copy, monkeypatch):
    nested = "".join(f"{{% for {v} in range(99999) %}}" for v in "abc") + "x" + "{% endfor %}" * 3
    (copy / "chat_template.jinja").write_text(nested)
    monkeypatch.setattr("virtue.plumbing.loading.TEMPLATE_SECONDS", 0.2)
    with pytest.raises(VirtueError, match="cannot be used .it runs for more than 0.2 s"):
        load_tokenizer(copy)
    time.sleep(0.3)  # and no alarm is left


# ---- fingerprints


def test_base_fingerprint_sees_config_names_sizes_and_both_ends(folders, copy, folder, tmp_path):
    first = base_fingerprint(folder)
    assert len(first) == 64 and first == base_fingerprint(copy)  # the place does not matter
    assert len({base_fingerprint(f) for f in folders.values()}) == len(folders)
    weights = copy / "model.safetensors"
    original = weights.read_bytes()
    seen = {first}
    for content in (  # 3 MiB, more than the two that are read: first byte, last byte, length
        b"a" + b"\0" * (3 << 20) + b"b", b"c" + b"\0" * (3 << 20) + b"b",
        b"a" + b"\0" * (3 << 20) + b"c", b"a" + b"\0" * (4 << 20) + b"b",
    ):
        weights.write_bytes(content)
        seen.add(base_fingerprint(copy))
    index = {"weight_map": {"any": "model-1.safetensors"}}  # the last content by another name
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    weights.rename(copy / "model-1.safetensors")
    seen.add(base_fingerprint(copy))
    assert len(seen) == 6
    weights.write_bytes(original)
    assert base_fingerprint(copy) == first
    edit(copy / "config.json", rope_theta=5.0)
    assert base_fingerprint(copy) != first


def test_template_fingerprint(folder, copy):
    tokenizer = load_tokenizer(folder)
    first = template_fingerprint(tokenizer)
    tokenizer(["a", "a longer one"], padding=True)  # use leaves it alone
    assert template_fingerprint(tokenizer) == first == template_fingerprint(load_tokenizer(copy))
    tokenizer.chat_template += " "
    second = template_fingerprint(tokenizer)
    other = load_tokenizer(copy)
    other.add_tokens(["virtue"])
    third = template_fingerprint(other)
    edit(copy / "tokenizer_config.json", pad_token="[INST]")
    assert len({first, second, third, template_fingerprint(load_tokenizer(copy))}) == 4


# ---- reading the model


def oracle(plain, row, temperature):
    """float64 log-softmax of a lone, unpadded row: log-probs and entropies of row[1:]."""
    with torch.no_grad():
        logits = plain(torch.tensor([row])).logits[0, :-1].double() / temperature
    logp = logits - logits.exp().sum(-1, keepdim=True).log()
    return logp[torch.arange(len(row) - 1), torch.tensor(row[1:])], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("side, extra", [("right", 0), ("right", 6), ("left", 4)])
def test_logprobs_do_not_depend_on_padding_or_batch(model, plain, side, extra, temperature):
    ids, attention = batch(ROWS, side, extra)
    mask = attention[:, 1:] & attention[:, :-1]
    mask[0, mask[0].nonzero()[2]] = False  # a hole, and a row with a single token
    mask[1, mask[1].nonzero()[1:]] = False
    with torch.no_grad():
        logprobs, entropies = logprobs_at(model, ids, attention, mask, temperature, True)
        alone = logprobs_at(model, ids, attention.long(), mask, temperature)
    assert logprobs.dtype == entropies.dtype == torch.float32
    assert torch.equal(logprobs, alone)
    assert logprobs.shape == mask.shape and not logprobs[~mask].any() and not entropies[~mask].any()
    for i, row in enumerate(ROWS):
        start = 0 if side == "right" else ids.shape[1] - len(row)
        want = oracle(plain, row, temperature)
        for got, expected in zip((logprobs[i], entropies[i]), want, strict=True):
            here = mask[i, start : start + len(row) - 1]
            got = got[start : start + len(row) - 1][here]
            torch.testing.assert_close(got.double(), expected[here], rtol=1e-5, atol=1e-5)


def test_logprobs_run_the_head_on_masked_positions_only(model):
    ids, attention = batch(ROWS)
    mask = torch.zeros(3, ids.shape[1] - 1, dtype=bool)
    mask[0, 3] = mask[2, 1] = True
    rows = []
    hook = model.lm_head.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    logprobs_at(model, ids, attention, mask)
    hook.remove()
    assert rows == [2]


def test_logits_in_parts_are_the_same(model, monkeypatch):
    """In parts log-probs, entropies and gradients are the same, and no part is too large."""
    ids, attention = batch(ROWS)
    mask, sizes, found = attention[:, 1:], [], []
    hook = model.lm_head.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    weight = model.model.norm.weight
    try:
        weight.requires_grad_(True)
        for allowed in (1 << 26, 4 * 300 + 7):  # 4 rows of the vocabulary's 300
            monkeypatch.setattr("virtue.models.LOGITS_AT_ONCE", allowed)
            logprobs, entropies = logprobs_at(model, ids, attention, mask, 0.7, True,
                                              train_entropy=True)
            gradients = torch.autograd.grad(
                (logprobs * torch.arange(mask.shape[1]) + entropies**2).sum(), weight)
            found.append((logprobs, entropies, *gradients))
    finally:
        weight.requires_grad_(False)
        hook.remove()
    # once forward, and again in the backward pass
    assert sizes[0] == int(mask.sum()) and max(sizes[1:]) == 4 and sum(sizes[1:]) == 2 * sizes[0]
    for at_once, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, at_once, rtol=1e-5, atol=1e-5)


def test_padding_content_and_gradients_stay_out(model):
    """What stands in the padding is never read, and its embedding gets no gradient."""
    ids, attention = batch(ROWS, extra=3)
    other = batch(ROWS, extra=3, pad=222)[0]
    mask = attention[:, 1:]
    weight = model.model.embed_tokens.weight
    try:
        weight.requires_grad_(True)
        logprobs = logprobs_at(model, other, attention, mask)
        torch.testing.assert_close(
            logprobs, logprobs_at(model, ids, attention, mask), rtol=0, atol=1e-6
        )
        (gradient,) = torch.autograd.grad(logprobs.sum(), weight)
    finally:
        weight.requires_grad_(False)
    assert not gradient[222].any() and gradient[50].any() and gradient.isfinite().all()


def test_hidden_states_are_those_before_the_head(model, plain):
    ids, attention = batch(ROWS, "left")
    positions = []  # rotary embeddings see differences only, so logits would not tell
    hook = model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    hidden = hidden_states(model, ids, attention)
    hook.remove()
    assert positions[0].tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 0, 0, 1, 2, 3, 4], [0, 0, 0, 1, 2, 3, 4, 5, 6]
    ]
    assert hidden.shape == (*ids.shape, 64) and hidden[attention].isfinite().all()
    for i, row in enumerate(ROWS):
        logits = plain(torch.tensor([row])).logits[0]
        torch.testing.assert_close(
            hidden[i, -len(row) :] @ plain.lm_head.weight.T, logits, rtol=1e-4, atol=1e-4
        )


def test_rows_padded_on_the_right_need_no_mask(model):
    """Attention then is causal in one kernel; with one row padded on the left it has a mask."""
    seen = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    right, left = batch(ROWS, "right", 3), batch(ROWS, "left", 3)
    rows = [torch.cat(sides)
            for sides in zip((right[0], right[1].long()), (left[0], left[1].long()))]
    for ids, attention in (right, rows):
        hidden_states(model, ids, attention)
    hook.remove()
    assert seen[0] is None and seen[1] is not None


@pytest.mark.parametrize("shape", [(False, False), *KINDS], ids=str)
def test_4d_mask_lets_two_continuations_share_a_prefix(folders, shape):
    from transformers import AutoModelForCausalLM

    model = load_model(folders[shape])
    plain = AutoModelForCausalLM.from_pretrained(folders[shape]).eval()
    prefix, first, second = [1, 3, 50, 60], [70, 4], [90, 91, 2]
    row = prefix + first + second
    length, p, f = len(row), len(prefix), len(first)
    attends = torch.ones(length, length, dtype=bool).tril()
    attends[p + f :, p : p + f] = False  # the second does not see the first
    positions = torch.tensor([[*range(p + f), *range(p, p + len(second))]])
    ids = torch.tensor([row])
    hidden = hidden_states(model, ids, attends[None, None], positions)[0]
    for tail, got in ((first, hidden[: p + f]), (second, torch.cat([hidden[:p], hidden[p + f :]]))):
        want = plain.model(torch.tensor([prefix + tail])).last_hidden_state[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="position_ids"):
        hidden_states(model, ids, attends[None, None])


@pytest.mark.parametrize("kind, window", [*(("mistral", n) for n in (1, 4, 8)), ("qwen3", 4)])
def test_a_sliding_window_is_that_of_transformers_on_every_way_through(tmp_path, kind, window):
    """Rows of 9, 5 and 7 tokens alone in transformers' forward,
    against batches padded on both sides and a shared prefix."""
    from transformers import AutoModelForCausalLM

    on = {"use_sliding_window": True, "max_window_layers": 0} if kind == "qwen3" else {}
    folder = make_tiny_model(tmp_path, model_type=kind, sliding_window=window, tokenizer=False,
                             **on)
    model, plain = load_model(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    model.model.embed_tokens.weight.requires_grad_()
    for parameter in plain.parameters():
        parameter.requires_grad_(parameter is plain.model.embed_tokens.weight)
    want = [plain.model(torch.tensor([row])).last_hidden_state[0] for row in ROWS]
    loss = sum(plain.lm_head(h)[:-1].log_softmax(-1)[torch.arange(len(row) - 1), row[1:]].sum()
               for h, row in zip(want, ROWS))
    loss.backward()
    head = ScalarHead(64, seed=3)
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_layers(model)
        for side, extra in (("right", 0), ("right", 5), ("left", 2)):
            ids, attention = batch(ROWS, side, extra)
            hidden = hidden_states(model, ids, attention)
            starts = torch.tensor([0 if side == "right" else ids.shape[1] - len(row)
                                   for row in ROWS])
            for i, row in enumerate(ROWS):
                torch.testing.assert_close(hidden[i, starts[i]:starts[i] + len(row)], want[i],
                                           rtol=1e-4, atol=1e-5)
            last = starts + torch.tensor([len(row) - 1 for row in ROWS])
            scores = score_at(model, head, ids, attention, last[:, None])[:, 0]
            torch.testing.assert_close(scores, torch.stack([head(h[-1]) for h in want]),
                                       rtol=1e-4, atol=1e-4)
            model.zero_grad()
            found = logprobs_at(model, ids, attention, attention[:, 1:] & attention[:, :-1]).sum()
            found.backward()
            torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-3)
            torch.testing.assert_close(model.model.embed_tokens.weight.grad[5:],
                                       plain.model.embed_tokens.weight.grad[5:],
                                       rtol=1e-3, atol=1e-3)
    prefix, first, second = ROWS[0][:5], ROWS[0][5:], ROWS[1][1:]
    p, f = len(prefix), len(first)
    length = p + f + len(second)
    attends = torch.ones(length, length, dtype=bool).tril()
    attends[p + f:, p:p + f] = False
    positions = torch.tensor([[*range(p + f), *range(p, p + len(second))]])
    with torch.no_grad():
        hidden = hidden_states(model, torch.tensor([prefix + first + second]),
                               attends[None, None], positions)[0]
        torch.testing.assert_close(hidden[p + f:], plain.model(
            torch.tensor([prefix + second])).last_hidden_state[0, p:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(hidden[:p + f], want[0], rtol=1e-4, atol=1e-5)


# ---- scores


def test_scores_do_not_depend_on_padding_or_batch(model, plain):
    head = ScalarHead(64, bias=True, seed=3)
    head.bias.data.fill_(0.25)
    where = torch.tensor([[8, 3], [4, 0], [6, 2]])
    want = torch.stack([
        plain.model(torch.tensor([row])).last_hidden_state[0, at].double()
        @ head.weight[0].double() + 0.25
        for row, at in zip(ROWS, where, strict=True)
    ])
    assert want.std() > 0.1
    lengths = torch.tensor([[len(row)] for row in ROWS])
    for side, extra in (("right", 0), ("right", 5), ("left", 2)):
        ids, attention = batch(ROWS, side, extra)
        positions = where if side == "right" else where + ids.shape[1] - lengths
        with torch.no_grad():
            scores = score_at(model, head, ids, attention, positions)
        assert scores.shape == (3, 2) and scores.dtype == torch.float32
        torch.testing.assert_close(scores.double(), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="padding"):
        score_at(model, head, *batch(ROWS), torch.tensor([[8], [5], [6]]))


def test_scalar_head_init_and_precision():
    head = ScalarHead(8)
    assert head.weight.shape == (1, 8) and head.bias is None and not head.weight.any()
    assert dict(head.named_parameters()).keys() == {"weight"}
    assert ScalarHead(8, bias=True).bias.shape == (1,)
    wide = ScalarHead(9_999, seed=0).weight
    assert abs(wide.std() - 0.01) < 3e-4  # 1/sqrt(10,000); standard error 7e-5
    assert torch.equal(wide, ScalarHead(9_999, seed=0).weight)
    assert not torch.equal(wide, ScalarHead(9_999, seed=1).weight)
    hidden = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    head.weight.data.normal_()
    score = head(hidden)
    assert score.dtype == torch.float32 and score.shape == (2, 3)
    torch.testing.assert_close(score, (hidden.float() * head.weight[0]).sum(-1))
    score.sum().backward()
    torch.testing.assert_close(head.weight.grad[0], hidden.float().sum((0, 1)))


def test_import_is_light():
    code = (
        "import sys, virtue.models, virtue.lora\n"
        "print({m.partition('.')[0] for m in sys.modules} & "
        "{'transformers', 'bitsandbytes', 'tokenizers', 'huggingface_hub'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
