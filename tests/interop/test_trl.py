"""Our data files in datasets and in TRL's trainers, TRL's files in ours: tokens and losses agree.
The libraries are the oracle."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402

from virtue.plumbing import hub  # noqa: E402
from virtue.plumbing.artefacts import write_jsonl  # noqa: E402
from virtue.dialogue import encode_conversation, right_pad  # noqa: E402
from virtue.ethics import FOLLOW_UPS, LENSES, VIRTUES  # noqa: E402
from virtue.lora import load_adapter_state, use_stack  # noqa: E402
from virtue.models import ScalarHead, logprobs_at, score_at  # noqa: E402
from virtue.plumbing.loading import load_tokenizer  # noqa: E402
from virtue.preference import pairwise_loss  # noqa: E402
from virtue.plumbing.records import (  # noqa: E402
    parse_hh,
    read_dialogues,
    read_pairs,
    read_preferences,
    read_prompts,
    read_revisions,
)
from virtue.rollout import span_mask  # noqa: E402

ANSWERS = [("I would give the letter back.", "Keep it."),
           ("Ask the owner first, and then decide.", "Burn it!"), ("Yes, and say why.", "No.")]


def said(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def data(tmp_path):
    """The files of run_data.py, written by the project's own writer, small and valid."""
    revisions, preferences = [], {lens: [] for lens in LENSES}
    for i, (good, bad) in enumerate(ANSWERS):
        prompt = [said("user", f"What about letter {i}?")]
        if i == 2:  # a prompt of three messages
            prompt += [said("assistant", "Which one?"), said("user", "The first.")]
        known = {"id": f"{i:016x}", "truncated": False}
        revisions.append({**known, "prompt": prompt, "initial": bad, "critique": "It is rash.",
                          "revision": good, "virtue": VIRTUES[i]})
        sides = [[*prompt, said("assistant", text)] for text in (good, bad)]
        for lens in LENSES:
            if lens != "action":
                sides = [[*side, said("user", FOLLOW_UPS[lens]),
                          said("assistant", f"{text} It is {lens}.")]
                         for side, text in zip(sides, (good, bad))]
            preferences[lens].append({**known, "lens": lens, "chosen": sides[0],
                                      "rejected": sides[1], "virtues": dict.fromkeys(VIRTUES, 0.75),
                                      "label": 0.75, "votes": 4, "position_flips": 1})
    write_jsonl(tmp_path / "revisions.jsonl", revisions)
    write_jsonl(tmp_path / "dialogues.jsonl",
                [{"id": f"{i:016x}", "prompt": [said("user", "?")], "ids": [*range(1, 9)],
                  "turns": [[1, 3, False], [4, 6, False], [7, 8, False]]} for i in range(3)])
    for lens in LENSES:
        write_jsonl(tmp_path / f"{lens}.jsonl", preferences[lens])
    return tmp_path


def load(tmp_path, *names):
    return datasets.load_dataset("json",
                                 data_files=[str(tmp_path / f"{name}.jsonl") for name in names],
                                 split="train", cache_dir=str(tmp_path / "cache"))


def test_datasets_loads_our_files_as_we_do(data):
    assert load(data, "revisions").to_list() == read_revisions(data / "revisions.jsonl")
    for lens in LENSES:
        assert load(data, lens).to_list() == read_preferences(data / f"{lens}.jsonl", lens)
    # a turn, [start, end, truncated], is of mixed type: datasets keeps it as JSON
    rows = load(data, "dialogues").to_list()
    ours = read_dialogues(data / "dialogues.jsonl")
    expected = [(d.id, d.ids, [list(t) for t in d.turns]) for d in ours]
    assert [(r["id"], r["ids"], r["turns"]) for r in rows] == expected
    # all three make one data set
    assert [r["lens"] for r in load(data, *LENSES)] == [lens for lens in LENSES for _ in ANSWERS]


def settings(tmp_path, kind, **more):
    """One step on the CPU with nothing random in it, so that the loss can be compared."""
    return kind(output_dir=str(tmp_path / "trl"), max_steps=1,
                per_device_train_batch_size=len(ANSWERS), learning_rate=1e-3, report_to="none",
                use_cpu=True, save_strategy="no", logging_steps=1, gradient_checkpointing=False,
                bf16=False, disable_tqdm=True, **more)


@pytest.mark.parametrize("lens", LENSES)
def test_reward_trainer_takes_a_preference_file_as_it_is(folder, model, data, lens):
    """Same tokens, and the loss of ours with --labels hard;
    the probability in `label` is lost on it, as TRL has hard labels only."""
    tokenizer, records = load_tokenizer(folder), read_preferences(data / f"{lens}.jsonl", lens)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8,
                             target_modules=["q_proj", "down_proj"], modules_to_save=["score"])
    kind = AutoModelForSequenceClassification
    base = kind.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    trainer = trl.RewardTrainer(model=base, args=settings(data, trl.RewardConfig),
                                train_dataset=load(data, lens), processing_class=tokenizer,
                                peft_config=config)
    rows = [[encode_conversation(tokenizer, r[side])[0] for r in records]
            for side in ("chosen", "rejected")]
    assert [trainer.train_dataset[f"{side}_ids"][:] for side in ("chosen", "rejected")] == rows

    weight = trainer.model.base_model.model.score.modules_to_save["default"].weight
    head = ScalarHead(model.config.hidden_size)
    head.load_state_dict({"weight": weight.detach().clone()})

    def score(side, *stack):
        ids, mask = right_pad(rows[side], tokenizer.pad_token_id)
        with use_stack(model, *stack), torch.no_grad():
            return score_at(model, head, ids, mask, mask.long().sum(1, keepdim=True) - 1)[:, 0]
    # with B = 0 the adapter does nothing yet
    expected = pairwise_loss(score(0), score(1), torch.ones(len(records))).mean()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)

    trainer.save_model(str(data / "saved"))  # and what it trained is ours to load
    state = load_file(data / "saved/adapter_model.safetensors")
    head.load_state_dict({"weight": state.pop("base_model.model.score.weight")})
    load_adapter_state(model, lens, state,
                       json.loads((data / "saved/adapter_config.json").read_text()))
    ids, mask = right_pad(rows[0], tokenizer.pad_token_id)
    with torch.no_grad():
        theirs = trainer.model.eval()(input_ids=ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(score(0, lens), theirs, atol=1e-5, rtol=1e-5)


def test_sft_trainer_takes_revisions_after_one_map(folder, model, data):
    """The map on the card of revisions makes the same tokens and the loss of run_sft.py."""
    tokenizer, card = load_tokenizer(folder), {"data": load(data, "revisions")}
    template = (Path(hub.__file__).parent / "card.md.jinja").read_text(encoding="utf-8")
    line, = (line for line in template.splitlines() if line.startswith("rows = "))
    exec(line, card)
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        train_dataset=card["rows"], processing_class=tokenizer,
        args=settings(data, trl.SFTConfig, max_length=None))
    encoded = [encode_conversation(tokenizer, [*r["prompt"], said("assistant", r["revision"])])
               for r in read_revisions(data / "revisions.jsonl")]
    assert trainer.train_dataset["input_ids"][:] == [ids for ids, _ in encoded]
    ids, attention = right_pad([ids for ids, _ in encoded], tokenizer.pad_token_id)
    mask = span_mask([spans[-1:] for _, spans in encoded], ids.shape[1])
    with torch.no_grad():
        expected = -logprobs_at(model, ids, attention, mask).sum() / mask.sum()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)


def test_files_of_others_are_read(data):
    """hh-rlhf's transcripts and TRL's three layouts, written by datasets itself."""
    good, bad = "Give it back.", "Keep it."
    turns = [said("user", "I found a letter.")]
    expected = {"chosen": [*turns, said("assistant", good)],
                "rejected": [*turns, said("assistant", bad)], "lens": "action"}
    hh = [f"\n\nHuman: I found a letter.\n\nAssistant: {text}" for text in (good, bad)]
    assert parse_hh(hh[0]) == expected["chosen"]
    layouts = {
        "hh-rlhf": {"chosen": hh[0], "rejected": hh[1]},
        "TRL, implicit prompt": {"chosen": expected["chosen"], "rejected": expected["rejected"]},
        "TRL, explicit prompt": {"prompt": turns, "chosen": [said("assistant", good)],
                                 "rejected": [said("assistant", bad)]},
        "TRL, texts": {"prompt": "I found a letter.", "chosen": good, "rejected": bad}}
    for name, record in layouts.items():
        path = data / f"{name}.jsonl"
        datasets.Dataset.from_list([record]).to_json(path)
        assert read_pairs(path) == ([expected], 0), name
        assert [r["prompt"] for r in read_prompts(path)] == [turns], name
