"""run_rm.py and run_sft.py against another computation of all they write: see tests/plain.py."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from plain import (
    Plain,
    Trained,
    batches,
    call,
    descend,
    head_of,
    lines,
    make_adapter,
    make_preferences,
    make_world,
    read_up_to,
)

from virtue.ethics import LENSES, VIRTUES
from virtue.dialogue import prompt_record
from virtue.plumbing.records import read_prompts
from virtue.randomness import held_out_ids, hold_out, torch_seed

SEED, RANK, LR, CLIP = 2, 3, 0.01, 0.4
ALPHA = 2 * RANK
TRAINING = [
    "--seed",
    SEED,
    "--rank",
    RANK,
    "--lr",
    LR,
    "--batch-size",
    2,
    "--accumulation",
    2,
]
LONGEST = 172  # --max-tokens
STEP = 4  # records a step: batch size times accumulation
STUDENT = {2: 12.7062, 3: 4.30265, 4: 3.18245, 5: 2.77645, 6: 2.57058, 7: 2.44691}  # by n


@pytest.fixture(autouse=True)
def clipped(monkeypatch):
    monkeypatch.setattr("virtue.plumbing.training.MAX_GRAD_NORM", CLIP)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    made = make_world(folder)
    made["sft"] = make_adapter(made, folder / "sft", "sft", 1)
    made["plain"] = Plain(made["base"])
    made["below"] = made["plain"].stack(made["sft"])
    made["data"] = make_preferences(made, made["plain"], folder / "preferences", 18)
    return made


# ---- run_rm.py


def halves(record_id: str) -> str:
    return "second" if int(record_id, 16) % 2 else "first"


def pairs_of(world, records, unseen, *, labels, longest, share):
    """Pairs (chosen ids, rejected ids, label) to train on and held out; how many were over-long."""
    parts, too_long = ([], []), 0
    for r in records:
        if share not in ("all", halves(r["id"])):
            continue
        rows = [world["plain"].encode(r[side]) for side in ("chosen", "rejected")]
        assert all(row[-1] == world["plain"].eos for row in rows)
        if any(len(row) > longest for row in rows):
            too_long += 1
            continue
        label = r["label"] if labels == "soft" else 1.0
        parts[r["id"] in unseen].append((*rows, label))
    return *parts, too_long


class RewardModel(Trained):
    """An adapter and a head; a margin is the score of the chosen side less the rejected's."""

    def __init__(self, world, lens):
        super().__init__(world["plain"], world["below"], RANK, ALPHA, torch_seed(SEED, "rm", lens))
        D = world["plain"].model.config.hidden_size
        self.head = torch.zeros(D).double().requires_grad_()

    def margin(self, pair) -> torch.Tensor:
        chosen, rejected = (self.read(row)[0][-1] @ self.head for row in pair[:2])
        return chosen - rejected

    def loss(self, pair) -> torch.Tensor:
        d, p = self.margin(pair), pair[2]
        return -p * F.logsigmoid(d) - (1 - p) * F.logsigmoid(-d)

    @torch.no_grad()
    def measures(self, held_out) -> dict:
        """Of held-out pairs: share in the judge's order, log-loss, its interval, calibration."""
        found, bins = {}, {}
        margins = [float(self.margin(pair)) for pair in held_out]
        right = [(d > 0) == (pair[2] >= 0.5) for d, pair in zip(margins, held_out)]
        losses = [float(self.loss(pair)) for pair in held_out]
        for d, (*_, label) in zip(margins, held_out):
            sure = 1 / (1 + math.exp(-abs(d)))
            gap = sure - (label if d > 0 else 1 - label)
            bins.setdefault(min(9, int((sure - 0.5) * 20)), []).append(gap)
        n, mean = len(losses), statistics.mean(losses)
        half = STUDENT[n] * statistics.stdev(losses) / math.sqrt(n)
        found = {
            "accuracy": sum(right) / n,
            "log_loss": mean,
            "log_loss_low": mean - half,
            "log_loss_high": mean + half,
            "calibration_error": sum(abs(sum(gaps)) for gaps in bins.values()) / n,
        }
        return found

    def train(self, train, *, epochs, lens):
        """Trains epoch by epoch; yields each epoch's (loss, norm, tokens) of its steps."""
        lengths = [max(map(len, pair[:2])) for pair in train]
        epoch_batches = batches(len(train), lengths, STEP, epochs, SEED, "rm", lens)
        losses = [
            lambda rows=rows: sum(self.loss(train[i]) for i in rows) / len(rows)
            for of_epoch in epoch_batches
            for rows in of_epoch
        ]
        parameters = [half for pair in self.layers.values() for half in pair] + [self.head]
        run = descend(parameters, losses, lr=LR, clip=CLIP, schedule="linear", steps=len(losses))
        for of_epoch in epoch_batches:
            tokens = [sum(len(side) for i in rows for side in train[i][:2]) for rows in of_epoch]
            yield [(*next(run), n) for n in tokens]


def logged(measures: dict) -> dict:
    return {f"held_out/{name}": value for name, value in measures.items()}


def check_rm(
    world,
    out,
    data,
    *,
    epochs,
    labels="soft",
    held_out,
    longest=1024,
    share="all",
    also=(),
):
    """Metrics, weights, head, statistics and measures of every lens in `data`, {lens: records}."""
    dialogues = lines(world["data"] / "dialogues.jsonl")
    unseen = held_out_ids((d["id"] for d in dialogues), SEED, held_out)
    assert len(unseen) == round(held_out * len({d["id"] for d in dialogues}))
    scored = [d for d in dialogues if d["id"] in unseen]
    unseen |= set(also)
    found, notes = {}, set()
    for lens, records in data.items():
        train, kept, too_long = pairs_of(
            world, records, unseen, labels=labels, longest=longest, share=share
        )
        found[lens] = train, kept, too_long
        notes |= {"over-long"} if too_long else set()
        notes |= {"unequal"} if len(train) % STEP else set()
    for lens, (train, kept, too_long) in found.items():
        metrics, k = lines(out / lens / "metrics.jsonl"), LENSES.index(lens)
        model = RewardModel(world, lens)
        # a head of zeros prefers neither side
        none = {**model.measures(kept), "accuracy": 0.5, "calibration_error": 0.0}
        expected, step = [{"step": 0, **logged(none)}], 0
        for epoch, steps in enumerate(
            model.train(train, epochs=epochs, lens=lens)
        ):
            for loss, norm, tokens in steps:
                step += 1
                expected.append(
                    {"step": step, "loss/train": loss, "grad_norm": norm, "tokens/read": tokens}
                )
                notes |= {"clipped"} if norm > CLIP else {"not clipped"}
            expected.append({"step": step, "epoch": epoch + 1, **logged(model.measures(kept))})
        assert [{**m, "time/seconds": None} for m in metrics] == [
            {
                **{name: pytest.approx(v, rel=2e-3, abs=2e-4) for name, v in m.items()},
                "time/seconds": None,
            }
            for m in expected
        ]
        assert model.moved(out / lens) < 2e-2
        head = head_of(out / lens)
        assert (head - model.head).norm() < 1e-2 * model.head.norm()
        with torch.no_grad():
            scores = [float(model.read(read_up_to(d, k))[0][-1] @ model.head) for d in scored]
        extra = json.loads((out / lens / "virtue.json").read_text())["extra"]
        assert extra["score_mean"] == pytest.approx(statistics.mean(scores), abs=2e-3)
        assert extra["score_std"] == pytest.approx(statistics.pstdev(scores), rel=5e-3)
        assert extra["held_out"] == pytest.approx(model.measures(kept), rel=2e-3, abs=2e-4)
        assert (extra["lens"], extra["scored_dialogues"]) == (lens, len(scored))
        assert (extra["trained_on"], extra["held_out_pairs"]) == (len(train), len(kept))
        assert extra["over_long"] == too_long
    return notes


def test_reward_models(world, tmp_path, monkeypatch):
    """One for each lens, upon SFT, on soft labels, some pairs over-long, an unequal last step."""
    monkeypatch.setattr("run_rm.HELD_OUT", 0.3)
    flags = ["--epochs", 2, "--max-tokens", LONGEST, *TRAINING]
    call("run_rm", "--data", world["data"], "--out", tmp_path / "rm", *flags)
    data = {lens: lines(world["data"] / f"{lens}.jsonl") for lens in LENSES}
    notes = check_rm(world, tmp_path / "rm", data, epochs=2, held_out=0.3, longest=LONGEST)
    assert {"over-long", "unequal", "clipped"} <= notes


def test_reward_models_of_one_half_on_hard_labels(world, tmp_path, monkeypatch):
    monkeypatch.setattr("run_rm.HELD_OUT", 0.5)
    flags = ["--epochs", 1, "--share", "second", "--labels", "hard", *TRAINING]
    call("run_rm", "--data", world["data"], "--out", tmp_path / "rm", *flags)
    data = {lens: lines(world["data"] / f"{lens}.jsonl") for lens in LENSES}
    settings = dict(epochs=1, labels="hard", held_out=0.5, share="second")
    check_rm(world, tmp_path / "rm", data, **settings)


def test_a_reward_model_of_a_file_of_pairs(world, tmp_path, monkeypatch):
    """People's pairs train it, whatever the folder's say; the folder's dialogues give its scale."""
    pairs = [
        {
            "chosen": [*p["prompt"], {"role": "assistant", "content": "I would." * (i % 3 + 1)}],
            "rejected": [
                *p["prompt"],
                {"role": "assistant", "content": "The letter" * (i % 2 + 1)},
            ],
        }
        for i, p in enumerate(read_prompts(world["prompts"])[10:26])
    ]
    long = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "letter" * 40}]
    pairs.append({"chosen": long, "rejected": [long[0], {**long[1], "content": "No."}]})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    monkeypatch.setattr("run_rm.HELD_OUT", 0.25)
    flags = ["--lens", "consequence", "--pairs", tmp_path / "pairs.jsonl", "--merge"]
    flags += ["--epochs", 1, "--max-tokens", 60, *TRAINING]
    call("run_rm", "--data", world["data"], "--out", tmp_path / "rm", *flags)
    records = [
        {**pair, "id": prompt_record(pair["chosen"][:-1])["id"], "label": 1.0} for pair in pairs
    ]
    also = held_out_ids((r["id"] for r in records), SEED, 0.25)
    assert len(also) == 4
    notes = check_rm(
        world,
        tmp_path / "rm",
        {"consequence": records},
        epochs=1,
        held_out=0.25,
        longest=60,
        also=also,
    )
    assert "over-long" in notes
    from transformers import AutoModelForSequenceClassification

    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm/consequence/merged")
    weights = world["plain"].stack(world["sft"], tmp_path / "rm/consequence")
    head = head_of(tmp_path / "rm/consequence")
    for row in (world["plain"].encode(r["chosen"]) for r in records[:3]):
        with torch.no_grad():
            score = merged(torch.tensor([row])).logits.item()
        assert score == pytest.approx(world["plain"].score(weights, head, row), abs=1e-4)


# ---- run_sft.py


class Student(Trained):
    """An adapter that learns spans of rows: (ids, (start, end), prompt's id)."""

    def nll(self, row) -> torch.Tensor:
        ids, (start, end), _ = row
        logp = self.read(ids)[1].log_softmax(-1)
        return -sum(logp[t - 1, ids[t]] for t in range(start, end))

    @torch.no_grad()
    def held_out(self, rows) -> float:
        """Mean over all tokens."""
        return sum(self.nll(row).item() for row in rows) / sum(
            end - start for _, (start, end), _ in rows
        )


def spans_of(world, messages, record_id):
    """A conversation's ids, and where its last answer and EOS lie."""
    ids, start = world["plain"].encode(messages), len(world["plain"].encode(messages[:-1], True))
    assert ids[-1] == world["plain"].eos
    return ids, (start, len(ids)), record_id


def check_sft(
    world, out, conversations, below, key, *, epochs, held_out, longest
):
    rows = [spans_of(world, messages, i) for messages, i in conversations]
    rows = [row for row in rows if len(row[0]) <= longest]
    kept, train = hold_out(rows, [row[2] for row in rows], held_out, SEED, *key, "split")
    assert not {row[2] for row in kept} & {row[2] for row in train}
    model = Student(world["plain"], below, RANK, ALPHA, torch_seed(SEED, *key))
    of_epoch = batches(len(train), [len(row[0]) for row in train], STEP, epochs, SEED, *key)

    def loss(numbers):
        chosen = [train[i] for i in numbers]
        return sum(map(model.nll, chosen)) / sum(end - start for _, (start, end), _ in chosen)

    losses = [lambda numbers=numbers: loss(numbers) for epoch in of_epoch for numbers in epoch]
    parameters = [half for pair in model.layers.values() for half in pair]
    run = descend(parameters, losses, lr=LR, clip=CLIP, schedule="linear", steps=len(losses))
    before = after = model.held_out(kept)
    expected, step, norms = [{"step": 0, "loss/held_out": before}], 0, []
    for epoch, steps in enumerate(of_epoch):
        for numbers in steps:
            step, (value, norm) = step + 1, next(run)
            expected.append(
                {
                    "step": step,
                    "loss/train": value,
                    "grad_norm": norm,
                    "tokens/read": sum(len(train[i][0]) for i in numbers),
                }
            )
            norms.append(norm)
        after = model.held_out(kept)
        expected.append({"step": step, "epoch": epoch + 1, "loss/held_out": after})
    assert [{**m, "time/seconds": None} for m in lines(out / "metrics.jsonl")] == [
        {
            **{name: pytest.approx(v, rel=2e-3, abs=2e-4) for name, v in m.items()},
            "time/seconds": None,
        }
        for m in expected
    ]
    assert model.moved(out) < 2e-2 and max(norms) > CLIP and len(train) % STEP
    made = json.loads((out / "virtue.json").read_text())
    assert made["extra"]["held_out_loss_before"] == pytest.approx(before, rel=1e-4)
    assert made["extra"]["held_out_loss"] == pytest.approx(after, rel=1e-3)
    assert made["extra"]["trained_on"] == len(train) and len(rows) < len(conversations)
    return made


def test_sft_on_revisions(world, tmp_path):
    """Upon the bare base, of prompts of one and two turns: the last answer alone is learned."""
    from plain import identity
    from virtue.plumbing.artefacts import data_hash, write_jsonl, write_manifest

    data, records = tmp_path / "revisions", []
    for i, prompt in enumerate(read_prompts(world["prompts"])[:15]):
        records.append(
            {
                **prompt,
                "initial": "What is it?",
                "critique": "The motivation.",
                "revision": "I would give the letter back." * (1 + i % 3),
                "virtue": VIRTUES[i % 5],
                "truncated": False,
            }
        )
    data.mkdir()
    write_jsonl(data / "revisions.jsonl", records)
    write_manifest(
        data,
        stage="revisions",
        **identity(world["base"]),
        seed=0,
        parents={},
        settings={"model": str(world["base"]), "out": str(data)},
        sha256=data_hash(data, ["revisions.jsonl"]),
    )
    call(
        "run_sft",
        "--data",
        data,
        "--out",
        tmp_path / "sft",
        *TRAINING,
        "--epochs",
        2,
        "--held-out",
        0.25,
        "--max-tokens",
        80,
    )
    talks = [
        ([*r["prompt"], {"role": "assistant", "content": r["revision"]}], r["id"]) for r in records
    ]
    made = check_sft(
        world,
        tmp_path / "sft",
        talks,
        world["plain"].stack(),
        ["sft"],
        epochs=2,
        held_out=0.25,
        longest=80,
    )
    assert (made["stage"], made["parents"]) == ("sft", {})


def test_sft_on_chosen_dialogues(world, tmp_path):
    """Upon SFT, the lens's turn of each chosen dialogue: the adapter is a policy."""
    call(
        "run_sft",
        "--data",
        world["data"],
        "--out",
        tmp_path / "policy",
        *TRAINING,
        "--epochs",
        1,
        "--held-out",
        0.2,
        "--max-tokens",
        LONGEST,
    )
    talks = [
        (r["chosen"], r["id"]) for lens in LENSES for r in lines(world["data"] / f"{lens}.jsonl")
    ]
    made = check_sft(
        world,
        tmp_path / "policy",
        talks,
        world["below"],
        ["chosen"],
        epochs=1,
        held_out=0.2,
        longest=LONGEST,
    )
    assert made["stage"] == "policy" and [*made["parents"]] == ["sft"]
