"""Loading: the base model (a Mistral, Llama, Qwen2 or Qwen3; fp32, bf16, fp16 or NF4), its
tokenizer, and the adapters of earlier stages.

Tensor by tensor, because transformers' 4-bit path needs accelerate; the logits equal transformers'.
transformers and bitsandbytes take seconds to import: they are imported inside the functions.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import re
import reprlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from virtue import VirtueError
from virtue.dialogue import dated
from virtue.ethics import ENGLISH, Words
from virtue.models import DTYPES, checkpoint_layers
from virtue.plumbing.parallel import join
from virtue.plumbing.runtime import main_rank, progress
from virtue.toy.words import WORDS as TOY_WORDS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


TOY, SMOLLM2 = "toy", "smollm2"
TOY_FOLDER = Path(__file__).parents[1] / "toy" / "model"
QUANTIZE = ("none", "nf4")
# config.json's model_type. One layout of layers: some have biases, some more norms than others.
ARCHITECTURES = ("mistral", "llama", "qwen2", "qwen3")
_INDEX = "model.safetensors.index.json"
# The largest values believed of a config.json
_SIZES = dict.fromkeys((
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "sliding_window"), 1 << 30) | {"num_hidden_layers": 1000}
_HUB_FILES = (  # no pickles, no duplicate "consolidated" weights, no sentencepiece
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "model*.safetensors", _INDEX,
)


def pick_device(name: str):
    """``torch.device`` of "auto", "cpu" or "cuda"; VirtueError where there is no such device."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise VirtueError(f"--device {name}: torch sees no GPU here: use --device cpu, or install "
                          "a CUDA build of torch")
    return torch.device(name)


class Base(NamedTuple):
    """The base model with what its artefacts must agree with."""

    model: object
    tokenizer: object
    info: dict[str, str]  # {"id", "fingerprint", "words", "virtues"}
    template: str
    words: Words  # in which it is asked


def open_base(args: argparse.Namespace, name: str | None = None) -> Base:
    """The model that the common flags name (or `name`, with the same flags) and its tokenizer.
    VirtueError: no such model or device, or its files are unfit."""
    from virtue.plumbing.loading import (base_fingerprint, load_model, load_tokenizer, resolve,
                                         template_fingerprint)

    name = name or args.model
    folder = resolve(name)
    tokenizer = load_tokenizer(folder)
    device = join(pick_device(args.device))
    model = load_model(folder, quantize=args.quantize, dtype=args.dtype, device=str(device))
    if getattr(args, "gradient_checkpointing", False):
        checkpoint_layers(model)
    words = words_of(name, args.constitution if "constitution" in args else None)
    info = {"id": str(name), "fingerprint": base_fingerprint(folder), "words": words_hash(words),
            "virtues": ", ".join(words.virtues)}
    return Base(model, tokenizer, info, template_fingerprint(tokenizer), words)


def words_of(model: str | Path, constitution: str | Path | None = None) -> Words:
    """The words for a model: the toy's own, or English; with the constitution of a file, if one is
    given. VirtueError: that is no constitution."""
    words = TOY_WORDS if model == TOY else ENGLISH
    if constitution is None:
        return words
    fields = ("asks", "deficiency", "excess")
    try:
        virtues = json.loads(Path(constitution).read_text("utf-8"))
        if not isinstance(virtues, dict) or not 1 <= len(virtues) <= 20:
            raise ValueError("no object of 1 to 20 virtues")
        for name, told in virtues.items():
            if not isinstance(told, dict) or {*told} != {*fields} or not all(
                    isinstance(text, str) and text.strip() for text in told.values()):
                raise ValueError(f"{name[:40]!r} has not just the texts {', '.join(fields)}")
            if re.search("[\ud800-\udfff]", name + "".join(told.values())):
                raise ValueError(f"{name[:40]!r} has half of a surrogate pair")
            if not name.strip() or name in words.extra:
                raise ValueError(f"{name[:40]!r} is no name for a virtue")
    except (OSError, ValueError, RecursionError) as error:
        raise VirtueError(f"{constitution}: not a constitution ({one_line(error)}): write "
                          '{"courage": {"asks": "...", "deficiency": "...", "excess": "..."}, ...}'
                          ) from None
    return words._replace(constitution={
        name: tuple(told[field].strip() for field in fields) for name, told in virtues.items()})


def words_hash(words: Words) -> str:
    """Hex digest of all the words."""
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def is_sound(tensor: Tensor) -> bool:
    """Whether a tensor from a file can be weights: floating point of at least two bytes, all
    finite."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return False
    # One pass, no copy of 14 GB
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def resolve(name: str | Path, download: bool = True) -> Path | None:
    """Folder of a model: "toy" (the one in the package), "smollm2" (converted once from another
    package), a local folder, or a hub id.

    A hub id (owner/model) is downloaded to Hugging Face's cache; unless ``download``, that model
    and smollm2 are only looked up: None if they are not there. VirtueError: none of the four.
    """
    if name == SMOLLM2:
        return _smollm2(download)
    folder = TOY_FOLDER if name == TOY else Path(name)
    try:
        folder = folder.expanduser()
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError):  # a name too long, a home of nobody
        pass
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        raise VirtueError(f"{folder}: no such folder; give 'toy', 'smollm2', a local folder or a "
                          "hub id")
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError

    if not download:
        found = try_to_load_from_cache(str(name), "config.json")
        return Path(found).parent if isinstance(found, str) else None
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(_HUB_FILES)))
    except GatedRepoError as error:
        raise VirtueError(f"{name}: its owner gives it to those who accept the terms: do so on "
                          f"https://huggingface.co/{name}, make a token under Settings there, then "
                          "`hf auth login`, or set HF_TOKEN") from error
    except Exception as error:  # network, access, spelling: the hub has an exception for each
        reason = " ".join(str(error).split())[:200]
        raise VirtueError(f"{name}: no such folder, and the hub did not give it ({reason}); check "
                          "the spelling, the network, and `hf auth login`") from error


def _smollm2(convert: bool) -> Path | None:
    from virtue.real import smollm2

    folder = smollm2.folder()
    if not folder.is_dir():
        if not convert:
            return None
        if main_rank():
            print(f"smollm2: converting it, once, into {folder}", file=sys.stderr)
        smollm2.convert(folder)
    return folder


TEMPLATE_SECONDS = 10  # for "?" through the chat template, which takes milliseconds


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Tokenizer with a chat template, an EOS, and a PAD that is not EOS (else EOS is masked away
    and the model never learns to stop). Where no PAD is set, the unknown token takes its place.

    VirtueError: tokenizer.json, template, EOS or PAD is missing, or PAD is EOS. No remote code.
    """
    folder = resolve(name)
    if not (folder / "tokenizer.json").is_file():
        raise VirtueError(f"{folder}: no tokenizer.json; convert tokenizer.model: load it with "
                          "AutoTokenizer (sentencepiece installed) and save_pretrained")
    from transformers import AutoTokenizer

    try:
        # Else it asks whether to run code
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise VirtueError(f"{folder}: cannot read the tokenizer ({one_line(error)}); fetch its "
                          "files again") from error
    where = folder / "tokenizer_config.json"
    if not tokenizer.chat_template:
        raise VirtueError(f"{where}: no chat template; take an instruction-tuned model or add one")
    if tokenizer.eos_token_id is None:
        raise VirtueError(f"{where}: no eos_token; name the token that ends a turn")
    if tokenizer.pad_token_id is None:
        if tokenizer.unk_token_id is None:
            raise VirtueError(f"{where}: neither pad_token nor unk_token; name a pad_token")
        tokenizer.pad_token = tokenizer.unk_token
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise VirtueError(f"{where}: pad_token is eos_token; name another, such as <unk>")
    if (folder / "config.json").is_file():
        size = read_config(folder).vocab_size
        if max(tokenizer.get_vocab().values()) >= size:
            raise VirtueError(f"{where}: has tokens beyond the model's {size} embeddings; fetch "
                              "the tokenizer that belongs to it")
    try:
        with _at_most(TEMPLATE_SECONDS):
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}],
                                          add_generation_prompt=True)
    except Exception as error:  # jinja2's, and whatever odd settings lead to
        raise VirtueError(f"{where}: the chat template cannot be used ({one_line(error)}); fetch "
                          "the tokenizer's files again") from error
    return tokenizer


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds: a template is a program, and may loop. Only the main
    thread can be woken."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TimeoutError(f"it runs for more than {seconds} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def one_line(error: Exception) -> str:
    """Another library's words on one line, not too long."""
    return " ".join(str(error).split())[:200]


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files: the single one, or all that the index names."""
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        raise VirtueError(f"{folder}: neither model.safetensors nor {_INDEX}; convert the weights")
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        if not all(re.fullmatch(r"[\w-][\w.-]{0,200}\.safetensors", name) for name in names):
            raise ValueError("a name that leads out of the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VirtueError(f"{index}: not an index of safetensors files in this folder; fetch it "
                          "again") from error
    for name in names:
        if not (folder / name).is_file():
            raise VirtueError(f"{folder / name}: the index names this file, but it is missing; "
                              "fetch it")
    return [folder / name for name in names]


def _tensors(files: list[Path]) -> Iterator[tuple[Path, str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (a handle, not a dict)
                    yield path, key, file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise VirtueError(f"{path}: damaged ({one_line(error)}); fetch it again") from error


def read_config(folder: Path) -> PretrainedConfig:
    """config.json of a folder; ``sliding_window`` is that of all layers, or None. VirtueError:
    unreadable, not one of ARCHITECTURES, quantised, or with windows on some layers only."""
    from transformers import CONFIG_MAPPING

    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text("utf-8"))
        kind, quantized = fields.get("model_type"), fields.pop("quantization_config", None)
        fields.pop("num_labels", None)  # a list of that many names would be made
        for name, most in _SIZES.items():  # before anything of that size is
            if fields.get(name) is not None and not 1 <= fields[name] <= most:
                raise ValueError(f"{name} is not between 1 and {most}")
        known = kind in ARCHITECTURES
        config = CONFIG_MAPPING[kind].from_dict(fields) if known else None
        attention = {*(getattr(config, "layer_types", None) or ())}
    except Exception as error:  # transformers' validation has exceptions of its own
        raise VirtueError(f"{path}: not a readable model configuration ({one_line(error)}); fetch "
                          "it again") from error
    if not known:
        raise VirtueError(f"{path}: model_type is {reprlib.repr(kind)}, known are "
                          f"{', '.join(ARCHITECTURES)}; choose such a model")
    if len(attention) > 1:
        raise VirtueError(f"{path}: a sliding window on some layers only is not known here; choose "
                          "a model with one on all layers or on none")
    if kind != "mistral" and attention != {"sliding_attention"}:
        config.sliding_window = None  # Llama has no such field, Qwen's may concern no layer
    if quantized:
        raise VirtueError(f"{path}: weights are quantised; take the original and --quantize nf4")
    return config


def _skeleton(
    config: PretrainedConfig, quantize: str, dtype: torch.dtype, device: str
) -> PreTrainedModel:
    """The model on the meta device (no memory), with ``Linear4bit`` for all linears but lm_head."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        for path, old in list(model.named_modules()):
            if type(old).__name__.endswith("RMSNorm"):  # seven kernels on a GPU, PyTorch's is one
                model.set_submodule(path, nn.RMSNorm(old.weight.shape, eps=config.rms_norm_eps))
    if quantize == "none":
        return model
    from bitsandbytes.nn import Linear4bit

    for path, old in list(model.named_modules()):
        if isinstance(old, nn.Linear) and path != "lm_head":
            if torch.device(device).type == "cpu" and old.in_features % 64:
                # bitsandbytes 0.50.2: its AVX512 kernel takes the wrong scales, and says nothing.
                raise VirtueError(f"{path}: NF4 on a CPU needs widths that are multiples of 64, "
                                  f"not {old.in_features}; use --quantize none")
            new = Linear4bit(old.in_features, old.out_features, old.bias is not None,
                             compute_dtype=dtype, quant_type="nf4", device="meta")
            # Else a no-grad forward on a CPU with AVX512-BF16 repacks the weights in place, and
            # gradients through them are None ever after.
            new.support_avx512bf16_for_cpu = False
            model.set_submodule(path, new)
    return model


def _place(module: nn.Module, leaf: str, tensor: Tensor, dtype: torch.dtype, device: str) -> None:
    """Replace the meta parameter ``leaf`` of ``module`` by ``tensor``; 4-bit where it belongs."""
    old = getattr(module, leaf)
    # A copy: the tensor may be a view of the file. The cast comes before the quantisation, since
    # bitsandbytes' backward uses the type that was quantised.
    tensor = tensor.to(device, dtype, copy=True)
    if type(old).__name__ == "Params4bit":
        new = type(old)(tensor, requires_grad=False, quant_type="nf4", module=module).to(device)
    else:
        new = nn.Parameter(tensor, requires_grad=False)
    setattr(module, leaf, new)


def _tie(model: PreTrainedModel, folder: Path, missing: set[str]) -> set[str]:
    """Makes lm_head and the embeddings one tensor, since config.json says so -> what is missing
    after that.

    As in transformers the one of the two that the files hold serves for both. Where they hold both
    and the two differ, both stay, with a warning, and ``model.config``, which an export writes,
    says untied.
    """
    head, embeddings = model.lm_head, model.model.embed_tokens
    absent = missing & {"lm_head.weight", "model.embed_tokens.weight"}
    if len(absent) == 2:
        return missing - {"lm_head.weight"}
    if not absent and not torch.equal(head.weight, embeddings.weight):
        model.config.tie_word_embeddings = False
        if main_rank():
            print(f"warning: {folder}: config.json ties lm_head to the embeddings, but the weights "
                  "hold another lm_head: it is kept, as transformers does; set tie_word_embeddings "
                  "to false in config.json", file=sys.stderr)
        return missing
    held = head if "model.embed_tokens.weight" in absent else embeddings
    head.weight = embeddings.weight = held.weight
    return missing - absent


def load_model(
    name: str | Path, *, quantize: str = "none", dtype: str = "fp32", device: str = "cpu"
) -> PreTrainedModel:
    """The frozen base in eval mode; ``dtype`` is also the compute type of NF4. Never ``.to()`` it.

    VirtueError: as ``read_config``; a file or tensor that is missing, damaged, unknown
    or of another shape than config.json says. ValueError: an unknown ``quantize`` or ``dtype``.
    """
    if quantize not in QUANTIZE or dtype not in DTYPES:
        raise ValueError(f"quantize {quantize!r} not in {QUANTIZE}, or {dtype!r} in {list(DTYPES)}")
    folder = resolve(name)
    config, files = read_config(folder), _weight_files(folder)
    try:
        model = _skeleton(config, quantize, DTYPES[dtype], device)
    except VirtueError:
        raise
    except Exception as error:  # an activation or a kind of rope that transformers does not know
        raise VirtueError(f"{folder / 'config.json'}: no model can be made of it "
                          f"({one_line(error)}); fetch it again") from error
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    seen: set[str] = set()
    with progress(None, f"loading {folder.name}", len(shapes), unit="tensor", leave=False) as bar:
        for path, key, tensor in _tensors(files):
            if key.endswith("rotary_emb.inv_freq"):
                continue  # computed below
            if shapes.get(key) != tensor.shape:
                want = tuple(shapes[key]) if key in shapes else "no such tensor"
                raise VirtueError(f"{path}: {key[:200]} is {tuple(tensor.shape)}, config.json has "
                                  f"{want}; fetch both again")
            if not is_sound(tensor):
                raise VirtueError(f"{path}: {key} is no floating-point tensor, or holds NaN or "
                                  "infinity; fetch it again")
            module, _, leaf = key.rpartition(".")
            _place(model.get_submodule(module), leaf, tensor, DTYPES[dtype], device)
            seen.add(key)
            bar.update()
    missing = shapes.keys() - seen
    if config.tie_word_embeddings:
        missing = _tie(model, folder, missing)
    if missing:
        raise VirtueError(f"{folder}: {len(missing)} tensors are missing, e.g. {min(missing)}; "
                          "fetch the weights again")
    # inv_freq is in no file and still on meta: compute it again, and in fp32 whatever the dtype.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert not tensor.is_meta, f"{key} was never loaded"
    with torch.no_grad():
        first = model.eval()(torch.zeros(1, 2, dtype=torch.long, device=device)).logits
    if not first.isfinite().all():
        raise VirtueError(f"{folder}: the logits are not finite: take another --dtype, or fetch "
                          "config.json and the weights again")
    return model


def base_fingerprint(folder: str | Path) -> str:
    """Hex digest of config.json and of name, size, first and last MiB of each weight file: tells
    bases apart without reading all 14 GB. ``folder`` as from ``resolve``."""
    folder, size = Path(folder), 1 << 20
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in _weight_files(folder):
        length = path.stat().st_size
        digest.update(f"\n{path.name} {length}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(size))
            file.seek(max(0, length - size))
            digest.update(file.read(size))
    return digest.hexdigest()


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex digest of the chat template (`dialogue.dated`), the vocabulary with its ids, and BOS, EOS
    and PAD."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    content = [dated(tokenizer.chat_template), sorted(tokenizer.get_vocab().items()), special]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
