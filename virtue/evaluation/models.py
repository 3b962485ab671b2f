"""run_eval.py models: base, SFT and PPO model answer the same held-out prompts and are compared."""
from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from virtue import VirtueError
from virtue.dialogue import (Dialogue, encode_prompt, instructed, messages_of, prompt_record,
                             right_pad, with_prompt)
from virtue.contrast import told
from virtue.ethics import LENSES, PROBES, VIRTUES, Words
from virtue.evaluation import feedback, html, plots, report, setup
from virtue.evaluation.setup import Ensemble, Loaded, Stack
from virtue.judge import label_ids
from virtue.logprobs import kl_k1
from virtue.lora import use_stack
from virtue.models import logprobs_at
from virtue.plumbing import artefacts, loading, memory, parallel, records, resume
from virtue.plumbing.preview import preview
from virtue.rollout import dialogue_logprobs
from virtue.toy import gold as toy

FILES = "report.html, scores.json, samples.jsonl"
INTERVAL = ("paired bootstrap over prompts, 95 %, 2000 resamples; p: permutation test, "
            "10000 sign flips; p_holm: Holm over all rows and pairs")


class Answers(NamedTuple):
    """One model's dialogues and what they measure: n prompts, then probes that are not scored."""

    texts: list[list[str]]      # of every prompt and probe: three turns
    messages: list[list[dict]]  # of every prompt: the whole dialogue
    column: dict[str, float]    # of the table, see `report.measure`
    rows: dict                  # of every prompt, see `report.differences`
    golds: list | None          # of every toy prompt: toy.gold.Gold
    points: dict | None         # on toy prompts: lens -> virtue -> mean points


def compare(args: argparse.Namespace) -> None:
    """The command, with its parsed flags. VirtueError: an input that does not fit the others."""
    prompts = records.load_prompts(args.prompts, "eval", args.limit, args.system)
    out = resume.may_write(args, args.out, [args.policy, args.sft, args.rm, args.eval_rm])
    if preview(args, {"prompts": f"{args.prompts}, {len(prompts)} records"}, FILES,
               flat=[["sft", "policy"]], sampling=setup.sampling_plan(args, len(prompts)),
               judging=setup.judging_plan(args)):
        return

    # Build
    base = loading.open_base(args)
    judge = loading.open_base(args, args.judge) if args.judge else base
    label_ids(judge.tokenizer, judge.words)
    loaded = setup.load(args, base)
    second = setup.load_ensemble(loaded, args.eval_rm, "eval-") if args.eval_rm else None
    curve, metrics = training_of(args.policy, args.prompts)
    setup.load_policy(loaded, args.policy, args.rm)
    sft = {"sft": loaded.sft} if loaded.sft else {}
    stacks = {"base": (), **sft, "ppo": (*loaded.sft, "policy")}
    asked = guided(base, prompts) if args.prompted else prompts
    kept = setup.fitting(asked, args, base, f" and --limit {args.limit}, but an interval needs "
                         "at least 2: give more prompts, or raise these flags")
    kept = [p for p in prompts if p["id"] in {record["id"] for record in kept}]
    refuse_equals(base, stacks, kept[:8], {"sft": args.sft, "ppo": args.policy})
    state = resume.start(args, out, base=base.info["fingerprint"], words=judge.info["words"],
                         prompts=artefacts.prompts_hash(args.prompts),
                         policy=artefacts.file_hash(args.policy))
    if state is None:
        return

    # Sample and score: every model on the same prompts, from the same random numbers
    asked, answers = kept + probes_of(args.prompts, args.system), {}
    if args.prompted:
        stacks = {"base": (), "prompted": (), **stacks}
    for name, stack in stacks.items():
        read = guided(base, asked) if name == "prompted" else asked
        spread = resume.spread(f"dialogues of {name}", state / f"{name}.jsonl")
        dialogues = setup.sample(args, base, setup.flat(base.model, stack), read, "eval", spread)
        answers[name] = measure(args, loaded, second, stack, dialogues, asked, len(kept))

    # Judge, compare, write, show
    wins = judge_models(judge, answers, kept[:args.judge_limit], args.judge_batch_size, state)
    scores = summary(args, answers, wins, curve, len(kept), len(prompts))
    write(args, out, loaded, scores, samples_of(asked, answers, len(kept)), metrics)
    resume.finish(out)
    show(scores)
    for i in (*range(min(args.show, len(kept))), *range(len(kept), len(asked))):
        texts = {name: answers[name].texts[i] for name in answers}
        print(report.side_by_side(asked[i]["prompt"][-1]["content"], texts), end="\n\n")
    print(f"wrote report.html, scores.json and samples.jsonl in {out}"
          f"{memory.used(base.model.device)}")


def probes_of(prompts: str, system: str | None = None) -> list[dict]:
    """The study's probes as prompts; none of the toy, which would not understand them."""
    return [records.with_system(prompt_record([{"role": "user", "content": text}]), system)
            for text in PROBES if prompts != "toy"]


def all_of(words: Words, pole: int) -> str:
    """What all virtues of the constitution ask (pole 0), or their deficiencies (1)."""
    return "; ".join(poles[pole] for poles in words.constitution.values())


def guided(base: loading.Base, prompts: Sequence[dict]) -> list[dict]:
    """The prompts with the whole constitution as an instruction before each."""
    text = base.words.guide.format(all_asks=all_of(base.words, 0))
    return [p | {"prompt": instructed(base.tokenizer, p["prompt"], text)} for p in prompts]


def training_of(policy: Path, prompts: str) -> tuple[list[dict], list[dict]]:
    """How PPO went, from the policy's folder: `report.curve_of`, and its metrics.

    Gold is known where PPO's prompts and these `prompts` are the toy's.
    """
    rollouts, metrics = (
        read(policy / name) if (policy / name).is_file() else []
        for name, read in (("rollouts.jsonl", records.read_rollouts),
                           ("metrics.jsonl", records.read_metrics)))
    kept, best = None, policy / "best"
    if (best / artefacts.MANIFEST).is_file():  # it sampled the next iteration's dialogues
        kept = artefacts.read_manifest(best, "policy")["extra"].get("iterations", -1) + 1
    trained = artefacts.read_manifest(policy, "policy")["settings"]
    gold = toy.gold if prompts == trained["prompts"] == "toy" else None
    return report.curve_of(rollouts, gold, metrics, kept), metrics


@torch.no_grad()
def refuse_equals(base: loading.Base, stacks: Mapping[str, Stack], prompts: Sequence[dict],
                  folders: Mapping[str, Path]) -> None:
    """VirtueError where two models give the same logits: then an adapter was never loaded, and
    "before" and "after" would differ by nothing. folders: those of the adapters, by model."""
    model, logits = base.model, {}
    rows = [encode_prompt(base.tokenizer, p["prompt"]) for p in prompts]
    ids, attention = (t.to(model.device) for t in right_pad(rows, base.tokenizer.pad_token_id))
    for name, stack in stacks.items():
        with use_stack(model, *stack):
            logits[name] = logprobs_at(model, ids, attention, attention[:, 1:].bool())
        for other in logits:
            if other != name and torch.equal(logits[other], logits[name]):
                raise VirtueError(
                    f"{folders[name]}: the logits of {name} equal those of {other}: this adapter "
                    "was never trained or never loaded; train it again")


def measure(args: argparse.Namespace, loaded: Loaded, second: Ensemble | None, stack: Stack,
            sampled: Sequence[Dialogue], prompts: Sequence[dict], scored: int) -> Answers:
    """What one model's dialogues are worth; only the first `scored` of them are measured. They are
    read after the bare `prompts`, even where they were sampled after an instruction."""
    tokenizer, size = loaded.base.tokenizer, args.batch_size
    dialogues = [with_prompt(tokenizer, d, p["prompt"]) for d, p in zip(sampled, prompts)]
    messages = [messages_of(tokenizer, d) for d in dialogues]
    texts = [[m["content"] for m in talk[len(d.prompt)::2]] for d, talk in zip(dialogues, messages)]
    sampled, dialogues = sampled[:scored], dialogues[:scored]
    kl, base_sums = distances(loaded, stack, sampled, dialogues, args.temperature, size)
    raw = setup.raw_scores(loaded, loaded.rewards, dialogues, size)
    rows = {"raw": raw.double().numpy(), "kl": kl.double().numpy(),
            "standardised": loaded.rewards.standardise(raw).double().numpy(),
            "length": np.array([sum(t.end - t.start for t in d.turns) for d in dialogues], float),
            "gold": None}
    golds = patterns = points = None
    if args.prompts == "toy":
        questions = [d.prompt[-1]["content"] for d in dialogues]
        golds = [toy.gold(question, turns) for question, turns in zip(questions, texts)]
        rows["gold"] = np.array([g.overall for g in golds])
        patterns = report.mask_names(texts, [toy.slots(question) for question in questions])
        points = mean_points(questions, texts)
    column = report.measure(dialogues, texts[:scored], rows["raw"], rows["standardised"],
                            rows["kl"], base_sums.double().numpy(), golds, patterns)
    if golds is None:
        rows["likelihood"] = trait_odds(loaded, dialogues, prompts, size)
        column["likelihood"] = float(rows["likelihood"].mean())
    if second:
        unseen = setup.raw_scores(loaded, second, dialogues, size)
        rows["eval"] = second.standardise(unseen).double().numpy()
        column |= {f"eval_reward/{lens}": float(row.mean())
                   for lens, row in zip(LENSES, rows["eval"])}
    return Answers(texts, messages[:scored], column, rows, golds, points)


def log_likelihoods(loaded: Loaded, stack: Stack, dialogues: Sequence[Dialogue],
                    temperature: float, batch_size: int) -> Tensor:
    """Log-probs of all sampled tokens of each of n dialogues, summed, in nats: (n,) fp64."""
    base = loaded.base
    logprobs, mask = dialogue_logprobs(
        base.model, stack, dialogues, base.tokenizer.pad_token_id, temperature=temperature,
        batch_size=batch_size, each_batch=resume.spread())
    return (logprobs.double() * mask).sum(1)


def distances(loaded: Loaded, stack: Stack, sampled: Sequence[Dialogue],
              dialogues: Sequence[Dialogue], temperature: float,
              batch_size: int) -> tuple[Tensor, Tensor]:
    """Of n dialogues (n,): the KL to the reference, k1 in nats, and log-probs under the base.
    `sampled`: the same after the prompts after which the model wrote them."""
    def read(stack: Stack, dialogues: Sequence[Dialogue], heat: float) -> Tensor:
        return log_likelihoods(loaded, stack, dialogues, heat, batch_size)

    reference = read(loaded.sft, dialogues, temperature)
    same = stack == loaded.sft and sampled == dialogues  # the model may be the reference
    own = reference if same else read(stack, sampled, temperature)
    return kl_k1(own, reference), read((), dialogues, 1.0)


def trait_odds(loaded: Loaded, dialogues: Sequence[Dialogue], prompts: Sequence[dict],
               batch_size: int) -> np.ndarray:
    """By how much likelier the base finds each of n dialogues after an instruction to have the
    virtues than after one to have their deficiencies: nats a sampled token, (n,)."""
    base, tokens = loaded.base, [sum(t.end - t.start for t in d.turns) for d in dialogues]

    def read(pole: int) -> Tensor:
        trait = all_of(base.words, pole)
        asked = [told(base.tokenizer, base.words, p, trait)["prompt"] for p in prompts]
        return log_likelihoods(loaded, (), [with_prompt(base.tokenizer, d, prompt)
                                            for d, prompt in zip(dialogues, asked)], 1.0,
                               batch_size)

    return ((read(0) - read(1)) / torch.tensor(tokens)).numpy()


def mean_points(questions: Sequence[str], texts: Sequence[Sequence[str]]) -> dict:
    """On toy prompts: lens -> virtue -> mean points of its turn, see `feedback.points`."""
    each = [feedback.points(question, turns) for question, turns in zip(questions, texts)]
    return {lens: {virtue: float(np.mean([points[lens][virtue] for points in each]))
                   for virtue in VIRTUES} for lens in LENSES}


def judge_models(judge: loading.Base, answers: Mapping[str, Answers], prompts: Sequence[dict],
                 batch_size: int, state: Path) -> dict[str, dict]:
    """The judge compares the last model with the one before it, in both wordings, and with the
    base -> pair of models -> lens -> `feedback.win_rates`."""
    names, wins = [name for name in answers if name != "prompted"], {}
    last, before, first = names[-1], names[-2], names[0]
    contests = [(before, "trained"), (before, "other"), (first, "trained")]
    if "prompted" in answers:
        contests.append(("prompted", "trained"))
    with use_stack(judge.model):
        for other, wording in contests:
            pair = f"{last} vs {other}" + ", other wording" * (wording == "other")
            if pair not in wins:
                keep = state / f"log-odds-{len(wins) + 1}"
                wins[pair] = contest(judge, answers[last], answers[other], prompts, wording,
                                     batch_size, keep)
    return wins


def contest(judge: loading.Base, after: Answers, before: Answers, prompts: Sequence[dict],
            wording: str, batch_size: int, keep: Path) -> dict[str, dict | None]:
    """lens -> `feedback.win_rates` of two models on the prompts, up to the lens's turn."""
    wins = {}
    for k, lens in enumerate(LENSES):
        sides = [[talk[:len(p["prompt"]) + 2 * k + 1] for talk, p in zip(side.messages, prompts)]
                 for side in (after, before)]
        better = None
        if after.golds and before.golds:
            better = np.array([a.lenses[lens] - b.lenses[lens]
                               for a, b, _ in zip(after.golds, before.golds, prompts)])
        spread = resume.spread(f"judge {lens}", Path(f"{keep}-{lens}.jsonl"))
        wins[lens] = feedback.win_rates(judge.model, judge.tokenizer, judge.words, *sides, lens,
                                        batch_size=batch_size, wording=wording,
                                        each_batch=spread, gold=better)
    return wins


def summary(args: argparse.Namespace, answers: Mapping[str, Answers], wins: dict,
            curve: list[dict], kept: int, given: int) -> dict:
    """scores.json: the models' columns, their differences, the judge's opinion, the warnings."""
    columns = {name: of_model.column for name, of_model in answers.items()}
    names = [name for name in answers if name != "prompted"]
    pairs = dict.fromkeys([*zip(names, names[1:]), (names[0], names[-1])])
    if args.prompted:
        pairs |= {("prompted", names[-1]): None}
    compared = {f"{b} - {a}": report.differences(answers[a].rows, answers[b].rows, args.seed)
                for a, b in pairs}
    report.correct(compared)
    facts = report.reward_model_facts(args.rm, args.eval_rm)
    extra = artefacts.read_manifest(args.policy, "policy")["extra"]
    warnings = report.warnings_of(columns, compared, wins, facts)
    warnings += [{"about": "other", "text": text} for text in feedback.doubts(extra)]
    runs = report.made_by(args.policy, args.sft, args.rm, args.eval_rm)
    return {
        "prompts": kept, "prompts_too_long": given - kept, "seed": args.seed, "models": columns,
        "differences": compared, "wins": wins,
        "virtues": {name: of_model.points for name, of_model in answers.items() if of_model.points},
        "curve": curve, "warnings": warnings, "judge_test": feedback.judge_tests(extra),
        "reward_models": facts, "commands": list(dict.fromkeys(map(report.command_line, runs))),
        "interval": INTERVAL}


def samples_of(asked: Sequence[dict], answers: Mapping[str, Answers], scored: int) -> list[dict]:
    """The lines of samples.jsonl: each prompt or probe with every model's turns, scores, gold."""
    def line_of(of_model: Answers, i: int) -> dict:
        line = {"turns": dict(zip(LENSES, of_model.texts[i]))}
        if i < scored:
            line |= {"scores": of_model.rows["standardised"][:, i],
                     "raw_scores": of_model.rows["raw"][:, i]}
            if of_model.golds:
                line["gold"] = of_model.golds[i]._asdict()
        return line

    return [{"id": prompt["id"], "prompt": prompt["prompt"],
             **{name: line_of(of_model, i) for name, of_model in answers.items()}}
            for i, prompt in enumerate(asked)]


def write(args: argparse.Namespace, out: Path, loaded: Loaded, scores: dict,
          samples: Sequence[dict], metrics: Sequence[dict]) -> None:
    """Writes the folder: samples.jsonl, scores.json, virtue.json and, from these, report.html."""
    artefacts.write_jsonl(out / "samples.jsonl", samples)
    artefacts.write_json(out / "scores.json", scores)
    artefacts.write_manifest(
        out, stage="eval", seed=args.seed, settings=resume.settings_of(args), extra={},
        parents={**loaded.parents, "policy": args.policy}, **setup.identity(loaded.base))
    parallel.barrier()  # every process reads back what rank 0 wrote
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    samples = [sample for _, sample in records.read_jsonl(out / "samples.jsonl")]
    page = html.render(scores, samples, metrics, artefacts.read_manifest(out))
    artefacts.write_atomic(out / "report.html", page.encode())


def show(scores: dict) -> None:
    """Prints what scores.json says."""
    print(f"{scores['prompts']} held-out prompts, seed {scores['seed']}\n\n"
          f"{report.table(scores['models'])}\n")
    for pair, rows in scores["differences"].items():
        for key, row in rows.items():
            print(f"{pair:>12}  {key:26} {report.with_interval(row)}")
    for pair, lenses in scores["wins"].items():
        shares = [f"{lens} preferred on {report.with_interval(row, 'rate', '.0%')} of "
                  f"{row['pairs']}" for lens, row in lenses.items() if row]
        print(f"judge, {pair}: {', '.join(shares)}")
    for warning in scores["warnings"]:
        print(f"warning: {warning['text']}")
    if not plots.available():
        print(plots.MISSING)
    print("The raw Score's std holds the reward models' arbitrary offsets; the standardised one "
          "does not.\n")
