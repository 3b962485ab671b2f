"""From dialogues to rewards, and PPO's step 0 on a real model: KL 0, ratio 1, no clipping."""
from __future__ import annotations

import pytest
import torch
from tiny import make_tiny_model

from virtue import VirtueError
from virtue.dialogue import Dialogue, Turn, right_pad
from virtue.dialogue import prompt_record
from virtue.generate import sample_dialogues
from virtue.logprobs import kl_k1, kl_k3
from virtue.lora import adapter_parameters, add_adapter, flatten, use_stack
from virtue.models import ScalarHead, logprobs_at, score_at
from virtue.plumbing.loading import load_model, load_tokenizer
from virtue.ppo import Rollout, ppo_loss
from virtue.rollout import (
    by_length,
    dialogue_logprobs,
    ended_share,
    in_chunks,
    loss_mask,
    place_scores,
    score_dialogues,
    span_mask,
    values_at,
)

# ids 0..9; action = 2..4, motivation = 5..7 truncated with the forced EOS at 7, consequence = 8..10
ONE = Dialogue("0" * 16, [], list(range(10, 20)),
               (Turn(2, 4, False), Turn(5, 7, True), Turn(8, 10, False)))
TWO = Dialogue("1" * 16, [], list(range(10, 18)),
               (Turn(1, 3, False), Turn(4, 5, False), Turn(6, 8, False)))


def test_loss_mask_speaks_of_the_next_token():
    mask = loss_mask([ONE, TWO], 10)
    # tokens 2 3, 5 6, 8 9, but not the forced EOS 7
    assert mask[0].nonzero().flatten().tolist() == [1, 2, 4, 5, 7, 8]
    assert mask[1].nonzero().flatten().tolist() == [0, 1, 3, 5, 6]
    assert span_mask([[(2, 4)]], 10).nonzero()[:, 1].tolist() == [1, 2]


def test_additive_scores_land_at_the_end_of_their_own_turn():
    scores = torch.tensor([[3.0, 30.0], [6.0, 60.0], [9.0, 90.0]])
    mask = loss_mask([ONE, TWO], 10)
    rewards = place_scores(scores, [ONE, TWO], mask, "mean")
    assert rewards[0].tolist() == [0, 0, 1, 0, 0, 2, 0, 0, 3]
    assert rewards[1].tolist() == [0, 10, 0, 20, 0, 0, 30, 0, 0]
    weighted = place_scores(scores, [ONE, TWO], mask, "weighted",
                            weights=torch.tensor([1.0, 0.0, 2.0]))
    assert weighted[0].tolist() == [0, 0, 3, 0, 0, 0, 0, 0, 18]


def test_other_aggregates_land_at_the_end_of_the_dialogue():
    scores = torch.tensor([[3.0, 30.0], [6.0, 60.0], [9.0, 90.0]])
    rewards = place_scores(scores, [ONE, TWO], loss_mask([ONE, TWO], 10), "min")
    assert rewards[0].tolist() == [0] * 8 + [3] and rewards[1].tolist() == [0] * 6 + [30, 0, 0]


def test_with_the_loss_over_the_action_later_rewards_fall_on_its_last_token():
    scores = torch.tensor([[3.0], [6.0], [9.0]])
    rewards = place_scores(scores, [ONE], span_mask([[(2, 4)]], 10), "mean", eos_penalty=5.0)
    # the truncated motivation is not under the loss
    assert rewards[0].tolist() == [0, 0, 6, 0, 0, 0, 0, 0, 0]


def test_missing_eos_pays_at_the_turns_last_sampled_token():
    scores = torch.zeros(3, 2)
    rewards = place_scores(scores, [ONE, TWO], loss_mask([ONE, TWO], 10), "mean", eos_penalty=0.5)
    assert rewards[0].tolist() == [0, 0, 0, 0, 0, -0.5, 0, 0, 0] and not rewards[1].any()
    assert ended_share([ONE, TWO]) == pytest.approx(5 / 6)


def test_answers_alone_are_scored_and_paid_at_their_end():
    answer = ONE._replace(ids=ONE.ids[:4], turns=ONE.turns[:1])
    rewards = place_scores(torch.tensor([[3.0], [6.0], [9.0]]), [answer],
                           loss_mask([answer], 4), "mean")
    assert rewards[0].tolist() == [0, 0, 6]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("rollout"))
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    for name in ("sft", "policy", "value", "action"):
        add_adapter(model, name, rank=4, alpha=8, seed=1)
    with torch.no_grad():
        for name in ("sft", "action"):  # trained adapters: B is not zero
            for p in adapter_parameters(model, name)[1::2]:
                p.normal_(std=0.05)
    prompts = [prompt_record([{"role": "user", "content": text}])
               for text in ("a?", "What should I do about the letter?", "hm")]
    flatten(model, ("sft", "policy"), "rollout")
    with use_stack(model, "rollout"):
        dialogues = sample_dialogues(model, tokenizer, prompts, seed=0, stage="t", max_new_tokens=6,
                                     temperature=1.0, batch_size=2)
    return model, tokenizer, dialogues


def test_step_zero_kl_zero_ratio_one(world):
    model, tokenizer, dialogues = world
    ids, attention = right_pad([d.ids for d in dialogues], tokenizer.pad_token_id)
    mask = loss_mask(dialogues, ids.shape[1])
    old, same_mask = dialogue_logprobs(model, ("sft", "policy"), dialogues,
                                       tokenizer.pad_token_id, batch_size=2)
    reference, _ = dialogue_logprobs(model, ("sft",), dialogues,
                                     tokenizer.pad_token_id, batch_size=2)
    bare, _ = dialogue_logprobs(model, (), dialogues, tokenizer.pad_token_id, batch_size=2)
    assert torch.equal(mask, same_mask) and (old[mask] < 0).all()
    assert torch.equal(kl_k1(old, reference), torch.zeros_like(old))
    assert not kl_k3(old, reference).any()
    assert (old - bare).abs().max() > 1e-3  # "adapters off" is not the reference
    head = ScalarHead(64, bias=True)
    with use_stack(model, "sft", "value"):
        values = values_at(model, head, ids, attention, mask)
    assert not values.any()
    advantages = torch.randn_like(old) * mask
    with use_stack(model, "sft", "policy"):
        new, entropy = logprobs_at(model, ids, attention, mask, with_entropy=True)
    rollout = Rollout(ids, mask, old, reference, values.detach(), torch.zeros_like(old))
    loss, stats = ppo_loss(new, values, entropy, rollout, advantages, advantages, clip_range=0.2,
                           value_clip_range=0.2, vf_coef=0.5)
    assert stats["policy/ratio"].item() == pytest.approx(1.0, abs=1e-5)
    assert stats["policy/clip_frac"] == 0
    assert stats["policy/approx_kl"].item() == pytest.approx(0.0, abs=1e-6)
    loss.backward()
    A, B = adapter_parameters(model, "policy")[:2]
    # at first B = 0 stops the gradient of A
    assert B.grad.abs().sum() > 0 and A.grad.abs().sum() == 0
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())


def test_micro_batches_add_up_to_the_whole_step(world):
    model, tokenizer, dialogues = world
    ids, attention = right_pad([d.ids for d in dialogues], tokenizer.pad_token_id)
    mask = loss_mask(dialogues, ids.shape[1])
    advantages = torch.randn(mask.shape) * mask
    parameters = adapter_parameters(model, "policy")

    def gradient(chunks):
        for p in parameters:
            p.grad = None
        for rows in chunks:
            with use_stack(model, "sft", "policy"):
                new = logprobs_at(model, ids[rows], attention[rows], mask[rows])
            rollout = Rollout(ids, mask, new.new_zeros(mask.shape) - 3, mask * 0.0, mask * 0.0,
                              mask * 0.0).index(rows)
            ppo_loss(new, mask[rows] * 0.0, None, rollout, advantages[rows], advantages[rows],
                     clip_range=0.2, value_clip_range=0.2,
                     vf_coef=0.5, num_tokens=int(mask.sum()))[0].backward()
        return torch.cat([p.grad.flatten() for p in parameters])
    whole, parts = gradient([torch.arange(3)]), gradient([torch.tensor([0]), torch.tensor([1, 2])])
    assert whole.abs().max() > 0 and torch.allclose(whole, parts, rtol=1e-4, atol=1e-7)


def test_each_reward_model_reads_its_own_prefix_whatever_the_batch(world):
    model, tokenizer, dialogues = world
    head = ScalarHead(64, seed=3)
    models = [(("sft", "action"), head), (("sft",), head), ((), head)]
    scores = score_dialogues(model, models, dialogues, (0, 1, 2),
                             tokenizer.pad_token_id, batch_size=2)
    for k, (stack, _) in enumerate(models):
        for b, d in enumerate(dialogues):
            end = d.turns[k].score_position
            ids = torch.tensor([d.ids[:end + 1]])
            with use_stack(model, *stack), torch.no_grad():
                alone = score_at(model, head, ids, torch.ones_like(ids), torch.tensor([[end]]))
            assert ids[0, -1] == tokenizer.eos_token_id
            assert scores[k, b].item() == pytest.approx(alone.item(), abs=1e-5)
    answers = score_dialogues(model, models, dialogues, (0, 0, 0),
                              tokenizer.pad_token_id, batch_size=3)
    assert torch.allclose(answers[0], scores[0], atol=1e-5)
    assert not torch.allclose(answers[2], scores[2], atol=1e-3)


def test_in_chunks_joins_in_order():
    x, mask = torch.arange(35.0).view(7, 5), torch.rand(7, 5) < 0.5
    assert torch.equal(in_chunks(lambda a, b: a + b, 3, x, mask), x + mask)


def test_rows_of_like_length_share_a_chunk():
    mask = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]],
                        dtype=torch.bool)
    assert by_length(mask).tolist() == [2, 1, 4, 3, 0]


def test_what_comes_after_the_mask_costs_nothing_and_changes_nothing(tmp_path):
    """Where the loss covers the first turn only, the model need not run on the later ones."""
    model = load_model(make_tiny_model(tmp_path, tokenizer=False))
    head = ScalarHead(64, seed=0)
    ids, attention = right_pad([torch.randint(5, 300, (n,)).tolist() for n in (9, 14)], 0)
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[:, 3:6] = True
    widths, run = [], model.model.forward
    model.model.forward = lambda ids, **kw: widths.append(ids.shape[1]) or run(ids, **kw)
    got = logprobs_at(model, ids, attention, mask), values_at(model, head, ids, attention, mask)
    assert widths == [7, 7]
    hidden = run(ids, attention_mask=attention.long(), use_cache=False).last_hidden_state
    logprobs = model.lm_head(hidden).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    values = hidden[:, :-1] @ head.weight[0]
    for a, b in zip(got, (logprobs * mask, values * mask), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert logprobs_at(model, ids, attention, mask & False).abs().sum() == 0


def test_logits_that_are_not_finite_name_stage_step_and_records():
    model = load_model("toy")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    record = {"id": "abc", "prompt": [{"role": "user", "content": "hi"}]}
    with pytest.raises(VirtueError, match="sampling for ppo, step 3, a batch with records abc: the "
                       "model's logits are not finite"):
        sample_dialogues(model, load_tokenizer("toy"), [record], seed=0, stage="ppo", step=3,
                         max_new_tokens=2, temperature=1.0, batch_size=1)
