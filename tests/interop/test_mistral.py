"""Mistral's real vocabularies and its own encoding of a chat (mistral-common) against ours."""
from __future__ import annotations

from pathlib import Path

import pytest

mistral_common = pytest.importorskip("mistral_common")
sentencepiece = pytest.importorskip("sentencepiece")

from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage  # noqa: E402
from mistral_common.protocol.instruct.request import ChatCompletionRequest  # noqa: E402
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer  # noqa: E402
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from virtue.dialogue import encode_conversation, encode_prompt  # noqa: E402
from virtue.ethics import FOLLOW_UPS  # noqa: E402

DATA = Path(mistral_common.__file__).parent / "data"
LOOP = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + "
        "m['content'] + 'END' }}"
        "{% else %}{{ 'LEAD' + m['content'] + eos_token }}{% endif %}{% endfor %}")
TEMPLATES = {  # as they stood on the hub: end of the user's turn, what comes before an answer
    "v0.1 and v0.2 first": ("tokenizer.model.v1",
                            LOOP.replace("END", " [/INST]").replace("LEAD", "")),
    "v0.2 today": ("tokenizer.model.v1", LOOP.replace("END", " [/INST]").replace("LEAD", " ")),
    "v0.3": ("mistral_instruct_tokenizer_240323.model.v3",
             LOOP.replace("END", "[/INST]").replace("LEAD", " "))}
ANSWERS = ("Yes.", "(Yes) I would.", "[A] is better.", "I give it back, and say so: é.")


def fast(name: str, template: str) -> PreTrainedTokenizerFast:
    """A SentencePiece model as transformers converts it: BPE with merges in order of scores."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(DATA / name))
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    merges = []
    for piece, i in vocab.items():
        cuts = [(piece[:k], piece[k:], i)
                for k in range(1, len(piece)) if piece[:k] in vocab and piece[k:] in vocab]
        merges += sorted(cuts, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
    merges.sort(key=lambda cut: -model.get_score(cut[2]))
    tokenizer = Tokenizer(models.BPE(vocab, [cut[:2] for cut in merges], unk_token="<unk>",
                                     fuse_unk=True, byte_fallback=True))
    control = ["<unk>", "<s>", "</s>"]
    if name.endswith("v3"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        control += ["[INST]", "[/INST]"]
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                                     normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                           decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False)
                                  for word in control])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>",
                                   chat_template=template, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("shape", TEMPLATES)
def test_conversations_have_the_tokens_of_mistral_s_own_encoding(shape):
    name, template = TEMPLATES[shape]
    ours, theirs = fast(name, template), MistralTokenizer.from_file(str(DATA / name))
    for answer in ANSWERS:
        turns = ["May I keep it?", answer,
                 *(text for question in FOLLOW_UPS.values() for text in (question, answer))]
        said = [(UserMessage, AssistantMessage)[i % 2](content=text)
                for i, text in enumerate(turns)]
        mine = [{"role": ("user", "assistant")[i % 2], "content": text}
                for i, text in enumerate(turns)]
        for n in range(1, len(turns), 2):  # a prompt of each length, and what follows it
            want = theirs.encode_chat_completion(ChatCompletionRequest(messages=said[:n])).tokens
            assert encode_prompt(ours, mine[:n]) == want
            ids, spans = encode_conversation(ours, mine[:n + 1])
            assert ids[:spans[-1][0]] == want
            assert ours.decode(ids[spans[-1][0]:-1]).strip() == answer
