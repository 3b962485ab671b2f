"""run_data.py against another computation of all that it writes: see tests/plain.py."""

from __future__ import annotations

import json

import pytest
import torch
from plain import ANY_JUDGE, Plain, call, combine, lines, make_adapter, make_world, up_to

from virtue.ethics import ENGLISH, LENSES, VIRTUES
from virtue.dialogue import split
from virtue.plumbing.records import read_prompts
from virtue.randomness import stream

SEED, TEMPERATURE, NEW, LIMIT = 4, 0.7, 12, 18
LONGEST = 65  # --max-prompt-tokens: some prompts of two turns are longer
FAULTS = ("truncated", "empty", "identical", "too_long")
SAMPLING = [
    "--seed",
    SEED,
    "--temperature",
    TEMPERATURE,
    "--max-new-tokens",
    NEW,
    "--max-prompt-tokens",
    LONGEST,
    "--batch-size",
    4,
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    made = make_world(folder)
    made["sft"] = make_adapter(made, folder / "sft", "sft", 1)
    made["plain"] = Plain(made["base"])
    made["weights"] = made["plain"].stack(made["sft"])
    made["stranger"] = Plain(made["judge"])
    return made


def prompts_of(world, part: str, limit: int) -> tuple[list[dict], list[dict]]:
    """The first prompts of a split; and those of them that are not too long."""
    found = [p for p in read_prompts(world["prompts"]) if split(p["id"]) == part][:limit]
    return found, [p for p in found if len(world["plain"].encode(p["prompt"], True)) <= LONGEST]


def draw(world, kept, temperature):
    """Two dialogues of each prompt by base and SFT, as the oracle draws them."""
    return [
        [
            world["plain"].dialogue(
                world["weights"],
                p,
                SEED,
                "preferences",
                copy=copy,
                new=NEW,
                temperature=temperature,
            )
            for copy in (0, 1)
        ]
        for p in kept
    ]


@pytest.fixture(scope="module")
def sampled(world):
    found, kept = prompts_of(world, "rm", LIMIT)
    assert len(found) > len(kept) > 6 and {len(p["prompt"]) for p in kept} == {1, 3}
    return draw(world, kept, TEMPERATURE)


def judged(judge, first, second, lens, **asked) -> dict:
    """What a preference record says of a pair, and what its lens's summary is made of."""
    found = judge.judge(judge.stack(), first, second, lens, **asked)
    if found is None:
        return None
    probs, mass = found
    virtues = combine(probs).expand(len(VIRTUES))
    votes = int((virtues > 0.5).sum())
    flips = int(((probs[0] > 0.5) != (probs[-1] > 0.5)).sum())
    return {"virtues": virtues, "votes": votes, "flips": flips, "mass": mass, "probs": probs}


def check(world, sampled, out, *, judge, truncated="drop", preference="votes", **asked):
    """Every record of every lens, and the summary."""
    summary, seen = json.loads((out / "summary.json").read_text()), []
    assert summary["prompts"] == LIMIT
    assert summary["prompts_too_long"] == LIMIT - len(sampled)
    for k, lens in enumerate(LENSES):
        expected, all_mass, dropped = {}, [], dict.fromkeys(FAULTS, 0)
        for pair in sampled:
            texts = [up_to(d, k) for d in pair]
            cut = any(d["turns"][i][2] for d in pair for i in range(k + 1))
            why = (
                "truncated"
                if cut and truncated == "drop"
                else "empty"
                if not all(m["content"] for t in texts for m in t)
                else "identical"
                if texts[0] == texts[1]
                else None
            )
            said = judged(judge, *texts, lens, **asked) if why is None else None
            if said is None:
                dropped[why or "too_long"] += 1
                continue
            first = said["virtues"].mean() > 0.5 if preference == "mean" else said["votes"] > 2
            side = 0 if first else 1
            expected[pair[0]["id"]] = {
                "chosen": texts[side],
                "rejected": texts[1 - side],
                "truncated": cut,
                "lens": lens,
                "virtues": said["virtues"] if first else 1 - said["virtues"],
                "votes": said["votes"] if first else 5 - said["votes"],
                "position_flips": said["flips"],
            }
            all_mass.append(said["mass"])
            seen.append((said["votes"] > 2, bool(said["virtues"].mean() > 0.5), bool(first)))
        found = summary[lens]
        records = {r["id"]: r for r in lines(out / f"{lens}.jsonl")}
        assert list(records) == list(expected)
        for record, want in zip(records.values(), expected.values()):
            for name in ("chosen", "rejected", "truncated", "lens", "votes"):
                assert record[name] == want[name], name
            said = torch.tensor([record["virtues"][v] for v in VIRTUES], dtype=torch.float64)
            assert torch.allclose(said, want["virtues"], atol=2e-5)
            assert record["label"] == pytest.approx(float(want["virtues"].mean()), abs=2e-5)
            if asked.get("orders") != 1:  # of one order nothing can flip
                assert record["position_flips"] == want["position_flips"]
        assert {why: found[f"dropped_{why}"] for why in dropped} == dropped
        assert found["pairs"] == len(expected)
        assert found["label_mass"] == pytest.approx(float(torch.cat(all_mass).mean()), rel=1e-3)
        if asked.get("orders") != 1:
            flips = [want["position_flips"] for want in expected.values()]
            assert found["position_flips"] == pytest.approx(sum(flips) / len(flips) / 5)
        seen += [why for why in FAULTS if dropped[why]]
    return seen


def test_preferences(world, sampled, tmp_path):
    """The base with SFT answers, at the temperature; the base alone judges; cut turns stay."""
    call(
        "run_data",
        "preferences",
        "--model",
        world["base"],
        "--sft",
        world["sft"],
        *SAMPLING,
        *ANY_JUDGE,
        "--prompts",
        world["prompts"],
        "--limit",
        LIMIT,
        "--truncated",
        "keep",
        "--judge-batch-size",
        3,
        "--out",
        tmp_path / "p",
    )
    written = lines(tmp_path / "p/dialogues.jsonl")
    assert written == [
        {name: d[name] for name in ("id", "prompt", "ids", "turns")}
        for copy in (0, 1)
        for d in (pair[copy] for pair in sampled)
    ]
    assert all(a["ids"] != b["ids"] for a, b in sampled)  # else one copy could pass for two
    seen = check(world, sampled, tmp_path / "p", judge=world["plain"], truncated="keep")
    assert {True, False, "empty"} == {s if isinstance(s, str) else s[2] for s in seen}
    parents = json.loads((tmp_path / "p/virtue.json").read_text())["parents"]
    assert [*parents] == ["sft"] and parents["sft"]["folder"] == str(world["sft"])


def test_preferences_of_another_judge(world, sampled, tmp_path):
    """Another model with another tokenizer and a shorter context judges; the mean chooses. So near
    to temperature 0 some answers are the same twice."""
    call(
        "run_data",
        "preferences",
        "--model",
        world["base"],
        "--sft",
        world["sft"],
        *SAMPLING,
        *ANY_JUDGE,
        "--prompts",
        world["prompts"],
        "--limit",
        LIMIT,
        "--temperature",
        0.13,
        "--judge",
        world["judge"],
        "--truncated",
        "keep",
        "--preference",
        "mean",
        "--out",
        tmp_path / "p",
    )
    again = draw(world, [a for a, _ in sampled], 0.13)
    seen = check(
        world, again, tmp_path / "p", judge=world["stranger"], truncated="keep", preference="mean"
    )
    assert {"identical", "too_long"} < set(seen)
    assert any(s[0] != s[1] for s in seen if isinstance(s, tuple))  # else votes could pass
    made = json.loads((tmp_path / "p/virtue.json").read_text())
    assert made["extra"]["judge"]["id"] == str(world["judge"])
    assert made["base"]["id"] == str(world["base"])


def test_preferences_by_one_question_in_one_order(world, sampled, tmp_path):
    call(
        "run_data",
        "preferences",
        "--model",
        world["base"],
        "--sft",
        world["sft"],
        *SAMPLING,
        *ANY_JUDGE,
        "--prompts",
        world["prompts"],
        "--limit",
        LIMIT,
        "--ask",
        "rules",
        "--orders",
        "one",
        "--out",
        tmp_path / "p",
    )
    seen = check(world, sampled, tmp_path / "p", judge=world["plain"], orders=1, asked=("rules",))
    assert "truncated" in seen


def revised(world, weights, kept):
    """Each prompt's virtue and its answer, critique and revision, as the oracle draws them."""
    for p in kept:
        virtue = VIRTUES[stream(SEED, "virtue", p["id"]).integers(len(VIRTUES))]
        asks, deficiency, excess = ENGLISH.constitution[virtue]
        questions = (
            ENGLISH.critique.format(virtue=virtue, asks=asks, deficiency=deficiency, excess=excess),
            ENGLISH.revision.format(virtue=virtue),
        )
        yield (
            virtue,
            world["plain"].dialogue(
                weights, p, SEED, "revisions", new=NEW, temperature=TEMPERATURE, questions=questions
            ),
        )


@pytest.mark.parametrize(
    ("truncated", "part", "sft"), [("drop", "ppo", False), ("keep", None, True)]
)
def test_revisions(world, tmp_path, truncated, part, sft):
    call(
        "run_data",
        "revisions",
        "--model",
        world["base"],
        *SAMPLING,
        "--prompts",
        world["prompts"],
        *(["--sft", world["sft"]] if sft else []),
        *(["--split", part] if part else []),
        "--limit",
        24,
        "--truncated",
        truncated,
        "--out",
        tmp_path / "r",
    )
    weights, expected = world["weights"] if sft else world["plain"].stack(), {}
    found, kept = prompts_of(world, part or "sft", 24)
    counts = {
        "prompts": len(found),
        "prompts_too_long": len(found) - len(kept),
        "truncated": 0,
        "empty": 0,
        "unchanged": 0,
        "echoed": 0,
    }
    for virtue, d in revised(world, weights, kept):
        initial, critique, revision = d["texts"]
        cut = [truncated for *_, truncated in d["turns"]]
        why = (
            "truncated"
            if cut[2] and truncated == "drop"
            else "empty"
            if not revision
            else "unchanged"
            if revision == initial
            else "echoed"
            if revision and f" {revision} " in f" {critique} "
            else None
        )
        if why:
            counts[why] += 1
        else:
            expected[d["id"]] = {
                "id": d["id"],
                "prompt": d["prompt"],
                "initial": initial,
                "critique": critique,
                "revision": revision,
                "virtue": virtue,
                "truncated": any(cut),
            }
    found = lines(tmp_path / "r/revisions.jsonl")
    assert found == [expected[i] for i in sorted(expected)] and len(found) > 2
    assert len({r["virtue"] for r in found}) > 2
    summary = json.loads((tmp_path / "r/summary.json").read_text())
    assert summary == {**counts, "revisions": len(expected)}
