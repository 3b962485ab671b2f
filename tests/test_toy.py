"""The toy world: the shipped model, its prompts, pre-training's latents and its script."""
from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

from virtue.dialogue import split
from virtue.plumbing.records import load_prompts
from virtue.ethics import LENSES, VIRTUES
from virtue.plumbing.loading import load_model, load_tokenizer
from virtue.toy import grammar
from virtue.toy.gold import gold, slots
from virtue.toy.grammar import Clause

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))


def test_the_shipped_folder_loads_as_any_other(toy_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(toy_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(toy_folder)
    assert model.config.model_type == "mistral" and model.config.max_position_embeddings >= 2048
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 3e6
    assert sum(f.stat().st_size for f in toy_folder.iterdir()) <= 8 * 2**20
    ids = torch.tensor([load_tokenizer("toy").apply_chat_template(
        [{"role": "user", "content": "Hello, 世界!"}], return_dict=False)])
    assert "世界" in tokenizer.decode(ids[0])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, load_model("toy")(ids).logits, atol=1e-5)


def test_splits_are_disjoint_and_held_out_questions_are_for_evaluation_only():
    parts = {name: load_prompts("toy", name) for name in ("sft", "rm", "ppo", "eval")}
    ids = [r["id"] for part in parts.values() for r in part]
    assert len(ids) == len(set(ids)) == 16 * 16 * 16
    held_out = {r["id"] for r in grammar.prompts(held_out=True)}
    assert len(held_out) == 4 * 16 * 16 and held_out <= {r["id"] for r in parts["eval"]}
    assert all(split(r["id"]) == name for name in ("sft", "rm", "ppo") for r in parts[name])
    assert len(load_prompts("toy", "ppo", 7)) == 7


def test_samples_of_both_phases_fit_together():
    """Prefix, endings and findings of each pair are one packed row, whatever was asked."""
    from types import SimpleNamespace
    from pretrain_toy import Samples
    tokenizer = load_tokenizer("toy")
    for fit in (False, True):
        sizes = SimpleNamespace(seed=0, texts=1, pairs=3, reviews=2, borrow=0.5)
        for batch in Samples(tokenizer, sizes, 12, fit):
            rows, mask, ids, _, _, ends, answer, targets, reviews = batch
            assert ends.shape == targets.shape and len(targets) == len(ids) == len(answer)
            assert len(reviews) == 2 * fit
            assert targets.shape[1] == 5 + fit and ((targets > 0) & (targets < 1)).all()
            assert answer.any(1).all()


def test_a_borrowed_word_replaces_no_name_and_none_comes_from_a_held_out_question():
    from pretrain_toy import BORROWED, draw_prompt
    new = ({word for q in grammar.HELD_OUT_QUESTIONS for word in q.split(". ")[0].split()}
           - {w for q in grammar.QUESTIONS for w in q.split()})
    assert "judge" in new and "judge" not in BORROWED
    rng, changed = random.Random(0), 0
    for _ in range(200):
        question, person, thing = draw_prompt(rng, borrow=0.5)
        assert person in question and thing in question
        assert question.split(". ")[1] in ("What do you do?", "What do you say?", "How do you act?")
        changed += question not in {q.format(p=person, t=thing) for q in grammar.QUESTIONS}
    assert 60 < changed < 140


def test_what_the_second_phase_teaches():
    def latent(motives):
        return {"action": [Clause("action", v, "mean", 0) for v in ("honesty", "respect")],
                "motivation": motives}
    fit, unfit = ([Clause("motivation", v, "mean", 0)] for v in ("honesty", "prudence"))
    assert (grammar.review("motivation", latent([*fit, *unfit, fit[0]._replace(broken=True)]))
            == "honesty true, prudence false, broken")
    assert grammar.judge_logit("motivation", "sincerity", latent(fit),
                               latent(unfit)) == pytest.approx(2 * 2 + 0.3)
    twice = latent(fit * 2)
    assert grammar.judge_logit("motivation", "honesty", twice, latent(fit),
                               slip=1.0) == pytest.approx(0.3 + 0.2 - 1.0)
    vice = {"action": [Clause("action", "honesty", "deficiency", 0),
                       Clause("action", "prudence", "mean", 0)]}
    assert grammar.judge_logit("action", "rules", vice, latent(fit)) == pytest.approx(-2 + 0.3)
    assert grammar.judge_logit("action", "helpfulness", vice, latent(fit)) == pytest.approx(
        2 * (0 - 1) + 0.3)


def test_no_sample_of_pre_training_holds_a_held_out_wording_or_question():
    from pretrain_toy import draw_pair, draw_text
    rng = random.Random(0)
    texts = [m["content"] for _ in range(800) for m in draw_text(rng)]
    texts += [m["content"] for _ in range(200) for talk, _ in draw_pair(rng, "consequence")
              for m in talk]
    everything = "\n".join(texts)
    for lens in LENSES:
        for virtue in VIRTUES:
            for pole, wordings in grammar.WORDINGS[lens][virtue].items():
                for i, text in enumerate(wordings):
                    known = text.split("{p}")[0].split("{t}")[0].strip()
                    if grammar.is_held_out(lens, pole, i) and len(known.split()) > 2:
                        assert known not in everything
    assert not any(q.split("{t}")[-1].split("?")[0] in everything
                   for q in grammar.HELD_OUT_QUESTIONS[:2])
    assert sum(grammar.is_held_out(lens, pole, i) for lens in LENSES
               for pole, w in grammar.WORDINGS[lens]["honesty"].items() for i in range(len(w))) == 4


def test_latents_and_gold_agree_on_whole_sentences():
    """Two readings of one dialogue: net worth from the latent clauses, gold from the text."""
    rng = random.Random(1)
    for _ in range(200):
        messages, latent = grammar.sample_dialogue(
            rng, "Mia asks you about the map. What do you do?", "Mia", "map")
        action = latent["action"]
        repeats = len(action) - len(set(action))
        points = sum(grammar.worth(latent, "action").values()) - 0.5 * repeats
        scored = gold(messages[0]["content"], [m["content"] for m in messages[1::2]])
        assert scored.lenses["action"] == pytest.approx((max(-1, min(1, points / 3)) + 1) / 2)
        assert scored.broken == 0


def test_the_judges_labels_by_hand():
    def latent(*poles):
        return {"action": [Clause("action", v, pole, 0) for v, pole in poles]}
    good = latent(("honesty", "mean"), ("prudence", "mean"))
    bad = latent(("honesty", "deficiency"), ("prudence", "mean"))
    # honesty: 3 * (1 - -1) + 0.4 * (1 - 1) + 0.2 * 0 + 0.3 for the first place
    assert grammar.judge_logit("action", "honesty", good, bad) == pytest.approx(6.3)
    assert grammar.judge_logit("action", "honesty", bad, good) == pytest.approx(-5.7)
    # respect: silent in both; the halo of honesty: 0.4 * ((1 + 1) - (-1 + 1))
    assert grammar.judge_logit("action", "respect", good, bad) == pytest.approx(1.1)


def test_revisions_mend_the_fault_that_the_critique_names():
    rng, gains = random.Random(2), []
    for _ in range(300):
        prompt = "Mia asks you about the map. What do you do?"
        messages = grammar.sample_revision(rng, prompt, "Mia", "map")
        assert [m["role"] for m in messages] == ["user", "assistant"] * 3
        before, after = (gold(prompt, [messages[i]["content"], "", ""]).lenses["action"]
                         for i in (1, 5))
        gains.append(after - before)
    # a good clause may make room for the virtue asked for
    assert min(gains) > -0.2 and sum(gains) / len(gains) > 0.15


def test_pretraining_script_makes_a_loadable_model(tmp_path, capsys, monkeypatch):
    import pretrain_toy as pretrain
    # the script's own run measures this on the real model
    monkeypatch.setattr(pretrain, "judge_accuracy", lambda *a: {})
    pretrain.main(["--hidden", "64", "--dry-run", "--out", str(tmp_path / "new")])
    assert "--hidden 64" in (said := capsys.readouterr().out) and "M parameters" in said
    assert not (tmp_path / "new").exists()
    pretrain.main(["--steps", "2", "--fit-steps", "2", "--texts", "2", "--pairs", "2",
                   "--hidden", "64", "--layers", "1", "--out", str(tmp_path)])
    assert "step     2" in capsys.readouterr().out
    model, tokenizer = load_model(tmp_path), load_tokenizer(tmp_path)
    assert model.config.hidden_size == 64
    assert slots(grammar.QUESTIONS[0].format(p="Ida", t="dog")) == ("Ida", "dog")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
