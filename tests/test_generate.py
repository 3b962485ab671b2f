"""Sampling against a plain loop that recomputes everything, and dialogues against their parts."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, make_tiny_model

from virtue import generate
from virtue.dialogue import encode_prompt, followup_ids
from virtue.dialogue import prompt_record
from virtue.ethics import FOLLOW_UPS
from virtue.randomness import stream

PAD, EOS = 0, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(folder):
    from transformers import MistralForCausalLM

    model = MistralForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 2.5  # now and then EOS is likely: rows of many lengths
    return model


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return [rng.integers(5, 300, n).tolist() for n in (3, 11, 7, 1, 7, 20, 2, 5, 9, 4, 6, 13)]


@pytest.fixture(scope="module")
def uniforms(rows):
    return np.random.default_rng(1).random((len(rows), 24))


@torch.no_grad()
def plainly(model, row, uniforms, temperature):
    """One row alone, no padding, no cache, the whole forward for each token, float64 draws."""
    ids = list(row)
    for u in uniforms:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        p = torch.softmax(logits / temperature, 0).numpy()
        edges = np.cumsum(p)
        ids.append(int(np.argmax(edges > u * edges[-1])))
        if ids[-1] == EOS:
            return ids[len(row):], False
    return ids[len(row):], True


def sample(model, rows, uniforms, temperature=1.0):
    return generate.sample(model, rows, uniforms, eos_id=EOS, pad_id=PAD, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_sampling_equals_a_plain_loop(model, rows, uniforms, temperature):
    expected = [plainly(model, r, u, temperature) for r, u in zip(rows, uniforms, strict=True)]
    lengths = {len(new) for new, _ in expected}
    assert len(lengths) > 3 and {t for _, t in expected} == {True, False}  # a test that can fail
    before = [list(r) for r in rows]
    assert sample(model, rows, uniforms, temperature) == expected
    assert rows == before


@pytest.mark.parametrize("window", [1, 6])
def test_sampling_with_a_sliding_window_equals_a_plain_loop(tmp_path, rows, uniforms, window):
    from transformers import MistralForCausalLM

    folder = make_tiny_model(tmp_path, sliding_window=window, tokenizer=False)
    narrow = MistralForCausalLM.from_pretrained(folder).eval()
    expected = [plainly(narrow, r, u, 1.0) for r, u in zip(rows, uniforms, strict=True)]
    for one_shape in (None, True):  # of one shape it cannot be: it must do without
        ids = dict(eos_id=EOS, pad_id=PAD, one_shape=one_shape)
        assert generate.sample(narrow, rows, uniforms, **ids) == expected


@pytest.mark.parametrize("one_shape", [False, True])
@pytest.mark.parametrize("kind", [{"model_type": kind} for kind in ARCHITECTURES] + [
    {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0}], ids=str)
def test_greedy_equals_transformers_generate_on_every_architecture(tmp_path, rows, uniforms, kind,
                                                                   one_shape):
    from transformers import AutoModelForCausalLM
    from virtue.plumbing.loading import load_model

    folder = make_tiny_model(tmp_path, tokenizer=False, **kind)
    model, theirs = load_model(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    found = generate.sample(model, rows, uniforms, eos_id=EOS, pad_id=PAD, temperature=0.0,
                            one_shape=one_shape)
    for row, (new, _) in zip(rows, found, strict=True):
        whole = theirs.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)),
                                do_sample=False, max_new_tokens=24, pad_token_id=PAD)[0].tolist()
        assert new == whole[len(row):]


def test_greedy_equals_transformers_generate(model, rows, uniforms):
    for row, (new, truncated) in zip(rows, sample(model, rows, uniforms, 0.0), strict=True):
        whole = model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)),
                               do_sample=False, max_new_tokens=24, pad_token_id=PAD)[0].tolist()
        assert new == whole[len(row):] and truncated == (EOS not in new)


def test_neither_batch_size_nor_order_changes_a_row(model, rows, uniforms):
    whole = sample(model, rows, uniforms)
    assert [sample(model, [r], u[None])[0] for r, u in zip(rows, uniforms)] == whole
    order = np.random.default_rng(2).permutation(len(rows))
    shuffled = sample(model, [rows[i] for i in order], uniforms[order])
    assert shuffled == [whole[i] for i in order]


def test_finished_rows_leave_the_batch(model, rows, uniforms, monkeypatch):
    sizes, whole = [], sample(model, rows, uniforms)
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True)
    try:
        assert sample(model, rows, uniforms) == whole
        # before step t the rows are those that had not ended: one in eight or more has to be done
        lengths = np.array([len(new) if not truncated else 99 for new, truncated in whole])
        assert sizes[0] == (12, 20) and all(columns == 1 for _, columns in sizes[1:])
        for t, (size, _) in enumerate(sizes):
            unfinished = (lengths > t).sum()
            assert unfinished <= size and (size - unfinished) * generate.DROP < size
        assert sizes[-1][0] < 12
        sizes.clear()
        monkeypatch.setattr(generate, "DROP", 1)  # drop only when all are done: the same ids
        assert sample(model, rows, uniforms) == whole and {s for s, _ in sizes} == {12}
        ended = [i for i, n in enumerate(lengths) if n < 24]
        sizes.clear()
        sample(model, [rows[i] for i in ended], uniforms[ended])
        assert len(sizes) == lengths[ended].max()  # no step after the last EOS
    finally:
        hook.remove()


def test_positions_count_real_tokens(model, rows, uniforms):
    seen = []  # rotary embeddings forgive an offset, so that no id would show a wrong one
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    sample(model, rows[:2], uniforms[:2, :2])
    hook.remove()
    assert seen[0].tolist() == [[0] * 8 + [0, 1, 2], list(range(11))]  # rows of 3 and 11 ids
    assert seen[1].tolist() == [[3], [11]]


def test_truncation_is_the_samplers_word(model, rows, uniforms):
    new, truncated = sample(model, rows[:1], uniforms[:1, :1])[0]
    assert len(new) == 1 and truncated == (new != [EOS])
    whole = sample(model, rows, uniforms)
    ended = next(i for i, (_, t) in enumerate(whole) if not t)
    length = len(whole[ended][0])
    assert sample(model, [rows[ended]], uniforms[[ended], :length])[0] == whole[ended]
    assert sample(model, [rows[ended]], uniforms[[ended], : length - 1])[0] == (
        whole[ended][0][:-1], True)
    assert whole[ended][0].index(EOS) == length - 1


def test_no_gradient_and_no_change(model, rows, uniforms):
    weights = {name: p.clone() for name, p in model.named_parameters()}
    enabled = []
    hook = model.register_forward_pre_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    sample(model, rows[:2], uniforms[:2])
    hook.remove()
    assert enabled and not any(enabled)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.3, -float("inf"), 1.7, -2.0, 0.0, -float("inf")])
    n = 20_000  # a grid of n uniforms: each token's count is n p to within one
    u = (torch.arange(n) + 0.5) / n
    for temperature in (0.5, 1.0, 2.0):
        counts = torch.bincount(generate.draw(logits.expand(n, -1), u, temperature), minlength=6)
        weights = np.exp(np.array([0.3, -np.inf, 1.7, -2.0, 0.0, -np.inf]) / temperature)
        np.testing.assert_allclose(counts.numpy(), n * weights / weights.sum(), atol=1.01)
    edges = torch.tensor([0.0, 1.0, np.float32(1 - 2.0**-24)])  # u = 1 - 1e-9 is 1.0 in fp32
    for row in (logits, logits.roll(1), torch.randn(50_000)):
        drawn = generate.draw(row.expand(3, -1), edges, 1.0)
        assert row[drawn].isfinite().all()
    assert generate.draw(logits[None].bfloat16(), u[:1], 0.0).tolist() == [2]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_every_token_can_be_drawn_with_its_own_probability(temperature):
    """Bisection finds the uniforms at which the drawn token changes: their distances are p."""
    V = 400
    # half of them are rarer than fp32's step below 1
    logits = 2 * torch.randn(V) - 12 * (torch.arange(V) % 2)
    want = torch.log_softmax(logits.double() / temperature, 0).exp()
    assert (want < 6e-8).sum() > 100
    low, high = torch.zeros(V, dtype=torch.float64), torch.ones(V, dtype=torch.float64)
    for _ in range(54):
        middle = (low + high) / 2
        after = generate.draw(logits.expand(V, -1), middle, temperature) > torch.arange(V)
        low, high = torch.where(after, low, middle), torch.where(after, middle, high)
    found = torch.cat([high[:1], high.diff()])
    assert (found > 0).all() and (found - want).abs().sum() / 2 < 1e-6
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-15)


def test_sampling_takes_its_uniforms_as_they_are(model, rows, monkeypatch):
    """A number of 53 bits is not rounded on its way to the draw."""
    seen, real = [], generate.draw
    monkeypatch.setattr(generate, "draw", lambda *a: seen.append(a[1]) or real(*a))
    sample(model, rows[:1], np.array([[1 - 2.0**-40]]))
    assert seen[0].tolist() == [1 - 2.0**-40]


def test_wrong_arguments(model, rows, uniforms):
    with pytest.raises(ValueError, match="temperature"):
        sample(model, rows, uniforms, -1.0)
    with pytest.raises(ValueError, match="rows"):
        sample(model, rows, uniforms[:3])
    two = uniforms[:1, None].repeat(2, axis=1)
    for questions in ([], [[]], [[[5], [6]]], [[[5]], [[5]]]):  # one of one row is what fits
        with pytest.raises(ValueError, match="questions"):
            generate.sample_turns(model, rows[:1], two, questions, eos_id=EOS, pad_id=PAD)


# ---- several turns ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def questions(rows):
    """For each row two, of its own lengths, one of them empty."""
    rng = np.random.default_rng(3)
    return [[rng.integers(5, 300, (i + 2 * t) % 6).tolist() for t in range(2)]
            for i in range(len(rows))]


def turn_by_turn(model, row, uniforms, questions, temperature=1.0):
    """`plainly`, called anew for each turn on all that came before."""
    ids, found = list(row), []
    for u, question in zip(uniforms, [*questions, []]):
        new, truncated = plainly(model, ids, u, temperature)
        found.append((new, truncated))
        ids += new + [EOS] * truncated + question
    return found


@pytest.mark.parametrize("one_shape", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 0.8])
def test_turns_equal_a_plain_loop(model, rows, questions, one_shape, temperature):
    uniforms = np.random.default_rng(4).random((len(rows), 3, 7))
    expected = [turn_by_turn(model, *each, temperature) for each in zip(rows, uniforms, questions)]
    cuts = {tuple(cut for _, cut in turns) for turns in expected}
    assert len(cuts) > 3 and len({len(turns[0][0]) for turns in expected}) > 3
    fed = []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: fed.append(
        tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    found = generate.sample_turns(model, rows, uniforms, questions, eos_id=EOS, pad_id=PAD,
                                  temperature=temperature, one_shape=one_shape)
    hook.remove()
    assert found == expected
    # Nothing is read twice: after the prompts one token a step, to the end of the longest row
    length = [sum(len(new) + cut for new, cut in turns) + sum(map(len, q)) - turns[-1][1]
              for turns, q in zip(expected, questions)]
    assert fed[0] == (12, 20) and len(fed) == max(length)
    assert all(columns == 1 for _, columns in fed[1:])


def test_turns_with_a_sliding_window_equal_a_plain_loop(tmp_path, rows, questions):
    from transformers import MistralForCausalLM

    narrow = MistralForCausalLM.from_pretrained(
        make_tiny_model(tmp_path, sliding_window=6, tokenizer=False)).eval()
    uniforms = np.random.default_rng(5).random((len(rows), 3, 7))
    found = generate.sample_turns(narrow, rows, uniforms, questions, eos_id=EOS, pad_id=PAD)
    assert found == [turn_by_turn(narrow, *each) for each in zip(rows, uniforms, questions)]


# ---- dialogues ----------------------------------------------------------------------------------

PROMPTS = [prompt_record([{"role": "user", "content": text}]) for text in (
    "What should I do about the letter?", "Why?", "A long story, " * 9, "Hm", "And now what?")]
WHOLE = dict(seed=0, stage="ppo", step=4, max_new_tokens=8, temperature=1.0, batch_size=3)


def test_dialogues_are_prompt_samples_and_follow_ups(model, tokenizer):
    dialogues = generate.sample_dialogues(model, tokenizer, PROMPTS, **WHOLE)
    assert [d.id for d in dialogues] == [p["id"] for p in PROMPTS]
    flags = set()
    for record, d in zip(PROMPTS, dialogues, strict=True):
        ids = encode_prompt(tokenizer, record["prompt"])
        for i, turn in enumerate(d.turns):
            u = stream(0, "ppo", 4, record["id"], 0, i).random(8)
            new, truncated = plainly(model, ids, u, 1.0)
            flags.add(truncated)
            assert turn == (len(ids), len(ids) + len(new), truncated)
            ids += new
            assert (ids[-1] != EOS) == truncated
            if truncated:  # the forced EOS is outside the span, and is where the score is read
                assert turn.score_position == turn.end == len(ids)
                ids.append(EOS)
            assert ids[turn.score_position] == EOS
            if i < 2:
                ids += followup_ids(tokenizer, list(FOLLOW_UPS.values())[i])
        assert d.ids == ids and len(d.turns) == 3 and d.prompt == record["prompt"]
    assert flags == {True, False}


def test_dialogues_depend_on_their_key_alone(model, tokenizer):
    whole = generate.sample_dialogues(model, tokenizer, PROMPTS, **WHOLE)
    again = generate.sample_dialogues(model, tokenizer, PROMPTS[::-1], **WHOLE | {"batch_size": 1})
    assert again == whole[::-1]
    for other in ({"seed": 1}, {"stage": "eval"}, {"step": 5}, {"copy": 1}):
        assert generate.sample_dialogues(model, tokenizer, PROMPTS, **WHOLE | other) != whole


def test_one_turn_and_other_questions(model, tokenizer):
    whole = generate.sample_dialogues(model, tokenizer, PROMPTS, **WHOLE)
    single = generate.sample_dialogues(model, tokenizer, PROMPTS, turns=1, **WHOLE)
    for one, three in zip(single, whole, strict=True):
        assert one.turns == three.turns[:1]
        assert one.ids == three.ids[: one.turns[0].score_position + 1]
    asked = generate.sample_dialogues(model, tokenizer, PROMPTS[:1], turns=2, questions=["Eh?"],
                                      **WHOLE)
    gap = asked[0].ids[asked[0].turns[0].score_position + 1:asked[0].turns[1].start]
    assert gap == list(followup_ids(tokenizer, "Eh?"))
    with pytest.raises(ValueError, match="turns"):
        generate.sample_dialogues(model, tokenizer, PROMPTS, turns=4, **WHOLE)


def test_fits(tokenizer):
    messages = PROMPTS[0]["prompt"]
    length = len(encode_prompt(tokenizer, messages))
    assert generate.fits(tokenizer, messages, length)
    assert not generate.fits(tokenizer, messages, length - 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steps_of_one_shape_give_the_same_tokens(model, rows, uniforms, temperature):
    shapes = set()
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: shapes.add(
        (*kwargs["input_ids"].shape, *kwargs["attention_mask"].shape)),
                                           with_kwargs=True)
    found = generate.sample(model, rows, uniforms, eos_id=EOS, pad_id=PAD, temperature=temperature,
                            one_shape=True)
    hook.remove()
    assert found == sample(model, rows, uniforms, temperature)
    # the prompts, then one shape for all steps
    assert shapes == {(12, 20, 12, 20), (12, 1, 12, 1, 1, 44)}
    assert generate.sample(model, rows, uniforms[:, :1], eos_id=EOS, pad_id=PAD,
                           one_shape=True) == sample(model, rows, uniforms[:, :1])


def test_a_step_of_one_shape_sees_no_column_that_is_not_written(model, rows):
    ids, mask = generate.left_pad(rows, PAD)
    whole = torch.cat([mask, mask.new_ones(len(rows), 6)], 1).bool()
    column, position = torch.tensor([20]), mask.sum(1, keepdim=True).long() - 1
    cache = generate.cache_with_room(model.config, 6, column)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
              past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            layer.room[:, :, :, 20:] = 1e4  # what an earlier owner of the memory left
        step = generate.steps_of_one_shape(model, cache, column, whole, position)
        for n in range(1, 4):
            token = torch.full((len(rows),), 7 + n)
            logits = step(token)
            ids = torch.cat([ids, token[:, None]], 1)
            expected = model(input_ids=ids, attention_mask=whole[:, : 20 + n],
                             position_ids=(whole[:, : 20 + n].cumsum(1) - 1).clamp(min=0),
                             logits_to_keep=1).logits[:, 0]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert column.tolist() == [23]
