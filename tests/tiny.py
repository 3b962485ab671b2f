"""A tiny random model and its tokenizer, built in a folder in half a second: no network, no toy.

``make_tiny_model(tmp_path / "base")`` gives a folder that ``load_model`` and ``load_tokenizer``
(and transformers' own Auto classes) open. Weights are drawn wider than Mistral's 0.02, so that
logits are far from uniform and a wrong weight shows.
"""

from __future__ import annotations

from pathlib import Path

SPECIAL = ["<pad>", "<s>", "</s>", "[INST]", "[/INST]"]  # ids 0 to 4
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
SYSTEM_TEMPLATE = CHAT_TEMPLATE.replace(  # with a place for a system message
    "{% if message", "{% if message['role'] == 'system' %}{{ '<<' + message['content'] + '>>' }}"
    "{% elif message", 1)
# What sets each architecture apart: biases, norms of q and k, heads wider than D / heads, ropes
ARCHITECTURES = {
    "mistral": {"head_dim": 16, "sliding_window": None},
    "llama": {"attention_bias": True, "mlp_bias": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    # the window is off, as in Qwen's own files; transformers adds a token of Qwen's to the 300
    "qwen2": {"tie_word_embeddings": True, "sliding_window": 4, "vocab_size": 301},
    "qwen3": {"attention_bias": True, "head_dim": 32},
}
NF4 = [
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]
CORPUS = [
    "What should I do about the letter that I found? I would give the letter back to the owner.",
    "What is the motivation behind the answer? The motivation is honesty and compassion.",
    "What is the utility of the action towards promoting your virtuous character?",
    "Which is better?" + " A or B?" * 8,  # the judge needs labels of one token
]


def make_tiny_tokenizer(folder: str | Path, vocab_size: int = 300,
                        template: str = CHAT_TEMPLATE) -> None:
    """Byte-level BPE with a chat template: any UTF-8 text encodes and decodes to itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["[INST]", "[/INST]"], chat_template=template,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def make_tiny_model(
    folder: str | Path, *, seed: int = 0, max_shard_size: str | int = "50GB",
    tokenizer: bool = True, template: str = CHAT_TEMPLATE, model_type: str = "mistral", **config,
) -> Path:
    """Save a random fp32 causal model (and tokenizer) in ``folder``; return the folder.

    ``config`` overrides fields of the configuration, e.g. ``tie_word_embeddings=True``;
    ``max_shard_size="100KB"`` gives several shards and an index.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    fields = dict(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        tie_word_embeddings=False, initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fields = {**fields, **ARCHITECTURES[model_type], **config}
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**fields))
        for name, parameter in model.named_parameters():
            if "norm" in name:  # of all ones its loss would not show, nor that of a bias of zeros
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif "bias" in name:
                torch.nn.init.uniform_(parameter, -1, 1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        make_tiny_tokenizer(folder, template=template)
    return folder


def dequantize(parameter):
    """fp32 weight (out, in) of a double-quantised NF4 ``Params4bit``, by the definition of QLoRA
    (Dettmers et al. 2023, sec. 3, app. E): no bitsandbytes kernel is trusted."""
    import torch

    state = parameter.quant_state
    codes = parameter.data.reshape(-1)
    codes = torch.stack([codes >> 4, codes & 15], dim=1).reshape(-1, 64).long()  # blocks of 64
    outer, n = state.state2, state.absmax.numel()
    scale = outer.code[state.absmax.long()] * outer.absmax.repeat_interleave(256)[:n] + state.offset
    return (torch.tensor(NF4)[codes] * scale[:, None]).reshape(state.shape)
