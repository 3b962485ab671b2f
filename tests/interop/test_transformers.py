"""Merged reward models in transformers: Auto classes, the pipeline, and padded batches."""
from __future__ import annotations

import pytest
import torch
from tiny import ARCHITECTURES, make_tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    pipeline,
)

from virtue.dialogue import Dialogue, Turn, encode_conversation
from virtue.lora import use_stack
from virtue.plumbing.merge import write_merged
from virtue.models import ScalarHead
from virtue.plumbing.loading import load_model, load_tokenizer
from virtue.rollout import score_dialogues

# Scores differ by about 1. The base rounds as its type does, 8 bits of bf16 and 11 of fp16,
# whose merged weights are fp32; the tiny base has wide random weights, which makes that large.
PRECISION = {"fp32": 1e-5, "bf16": 0.15, "fp16": 0.01}
CONVERSATIONS = [
    [{"role": "user", "content": "What should I do about the letter?"},
     {"role": "assistant", "content": "I would give it back."}],
    [{"role": "user", "content": "A letter?"}, {"role": "assistant", "content": "Yes."},
     {"role": "user", "content": "What is the motivation behind the answer?"},
     {"role": "assistant", "content": "Honesty, and compassion for the owner."}],
    [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base whose configuration names no PAD, as Mistral's."""
    return make_tiny_model(tmp_path_factory.mktemp("merge") / "base", pad_token_id=None)


@pytest.fixture(params=PRECISION)
def merged(request, folder, adapt, tmp_path):
    """A merged folder, our scores of CONVERSATIONS, and how exact the folder can be."""
    return merge(folder, request.param, adapt, tmp_path)


def merge(folder, dtype, adapt, out):
    model, tokenizer = load_model(folder, dtype=dtype), load_tokenizer(folder)
    adapt(model, "sft", 1)
    adapt(model, "action", 2)
    head = ScalarHead(model.config.hidden_size, seed=3)
    dialogues = []
    for messages in CONVERSATIONS:
        ids, spans = encode_conversation(tokenizer, messages)
        dialogues.append(Dialogue("0" * 16, messages[:1], ids, (Turn(*spans[-1], False),)))
    scores = score_dialogues(model, [(("sft", "action"), head)], dialogues, [0],
                             tokenizer.pad_token_id, batch_size=8)[0]
    change = write_merged(out, model, tokenizer, ("sft", "action"), head, dialogues, 0)
    assert scores.std() > 0.1 and change < PRECISION[dtype]
    return out, tokenizer, scores, PRECISION[dtype]


def test_the_language_model_comes_with_it(merged, folder, model, adapt):
    """AutoModelForCausalLM makes a random head where a file has none, with a warning only."""
    loaded, report = AutoModelForCausalLM.from_pretrained(merged[0], output_loading_info=True)
    assert not report["missing_keys"] and set(report["unexpected_keys"]) == {"score.weight"}
    if merged[3] == PRECISION["fp32"]:
        adapt(model, "sft", 1)
        adapt(model, "action", 2)
        ids = torch.tensor([[1, 7, 9, 30, 41, 11, 2]])
        with use_stack(model, "sft", "action"), torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_auto_classes_give_our_scores_in_padded_batches(merged):
    folder, ours, scores, precision = merged
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in CONVERSATIONS]
    for text, messages in zip(texts, CONVERSATIONS):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == encode_conversation(ours, messages)[0]
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.no_grad():
            found = model(**batch).logits[:, 0].float()
        torch.testing.assert_close(found, scores, atol=precision, rtol=0)


def test_every_architecture_is_exported_as_its_own_kind(every, adapt, tmp_path):
    folder, _, scores, precision = merge(every, "fp32", adapt, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    base = AutoModelForCausalLM.from_pretrained(every)
    assert type(model).__name__ == type(base).__name__.replace("Causal", "Sequence").replace(
        "LM", "Classification")
    assert model.config.architectures == [type(model).__name__]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        [tokenizer.apply_chat_template(messages, tokenize=False) for messages in CONVERSATIONS],
        add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits[:, 0], scores, atol=precision, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_pipeline_gives_our_scores(merged, batch_size):
    """The template writes BOS, so the tokenizer must not;
    with one label the pipeline takes a sigmoid unless told otherwise."""
    folder, tokenizer, scores, precision = merged
    pipe = pipeline("text-classification", model=str(folder), device="cpu")
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in CONVERSATIONS]
    for function, expected in (("none", scores), ("sigmoid", scores.sigmoid())):
        found = pipe(texts, batch_size=batch_size, function_to_apply=function,
                     add_special_tokens=False)
        assert {f["label"] for f in found} == {"score"}
        torch.testing.assert_close(torch.tensor([f["score"] for f in found]), expected,
                                   atol=precision, rtol=0)


@pytest.mark.parametrize("fields", [{"tie_word_embeddings": True}, *(
    {"model_type": kind} for kind in ARCHITECTURES)], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_logits_in_4_bits_are_those_of_transformers_own_loading(dtype, fields, tmp_path):
    """Its path needs accelerate, which ours does without; sharded files too."""
    pytest.importorskip("accelerate")
    folder = make_tiny_model(tmp_path, max_shard_size="100KB", **fields)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                  bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings,
                                                  device_map={"": "cpu"}, dtype=kind).eval()
    layers = [module for module in theirs.modules() if type(module).__name__ == "Linear4bit"]
    for module in layers:
        # as in our code; otherwise a CPU that has it repacks the weights
        module.support_avx512bf16_for_cpu = False
    assert len(layers) == 14
    mine = load_model(folder, quantize="nf4", dtype=dtype)
    # PyTorch's norm rounds once where transformers' rounds twice; all else is the same bit for bit
    if dtype == "bf16":
        for path, norm in [(path, m) for path, m in theirs.named_modules()
                           if type(m).__name__.endswith("RMSNorm")]:
            assert torch.equal(norm.weight, mine.get_submodule(path).weight)
            assert norm.variance_epsilon == mine.get_submodule(path).eps
            theirs.set_submodule(path, mine.get_submodule(path))
    ids = torch.tensor([[1, 7, 9, 30, 41, 11, 2]])
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, theirs(ids).logits)
