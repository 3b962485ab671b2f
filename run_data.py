"""Make training data from the model itself: revisions for SFT, preferences for reward models.

  python run_data.py revisions   --out runs/demo/revisions
  python run_data.py preferences --sft runs/demo/sft --out runs/demo/preferences
  python run_data.py preferences --model smollm2 --feedback contrast --limit 64 --out runs/pairs
  python run_data.py preferences --prompts harmless-base.jsonl.gz --limit 64 --out runs/hh

revisions: the model answers each prompt, criticises its answer by one virtue of the constitution
(virtue/ethics.py, or --constitution), and rewrites it (Bai et al. 2022, arXiv 2212.08073, section
3.1, with virtues in the place of principles). Revisions that are empty, unchanged or truncated, or
say nothing that the critique does not say, are counted and dropped. With --feedback contrast the
revision is the answer that the model gives under an instruction to have the virtue.

preferences: the model writes two independent dialogues for each prompt (answer, motivation,
consequence). For each lens, the judge then compares them on five virtues, in both orders. The
command writes action.jsonl, motivation.jsonl, consequence.jsonl and dialogues.jsonl. The last holds
all that was sampled, unfiltered, and run_rm.py takes the score statistics from it. The judge is the
base model with adapters off, unless --judge names another model. If the judge cannot be told from a
coin that knows places, the stage ends with status 2 after judging, unless --any-judge is given;
what was sampled and judged is kept for --resume.

--feedback contrast is for models too weak to judge (RLCD, Yang et al. 2023, arXiv 2307.12950). Of
the two dialogues of a prompt one is sampled under an instruction that asks for a virtue, the other
under one that asks for its deficiency or its excess. The first is chosen by construction. The
instructions are not in the record. The judge is asked about some of these pairs, to say how often
it agrees; dialogues.jsonl holds a third dialogue, without an instruction.
"""
from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from virtue import VirtueError
from virtue.ethics import LENSES
from virtue.plumbing import flags
from virtue.plumbing.runtime import run_main

FAULTS = ("truncated", "empty", "identical", "echoed", "too_long", "tied")  # why a pair is dropped
ECHO = 3  # words of its instruction that a dialogue may not say in a row


def parse(argv):
    parser = flags.make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="revisions|preferences")
    _, _, about_revisions, *about_preferences = __doc__.split("\n\n")
    revisions = commands.add_parser("revisions", help="answer, critique, revised answer",
                                    description=about_revisions)
    preferences = commands.add_parser("preferences", help="paired dialogues and AI feedback",
                                      description="\n\n".join(about_preferences))
    for sub, limit, split in ((revisions, 384, "sft"), (preferences, 768, "rm")):
        flags.add_common_flags(sub)
        flags.add_sampling_flags(sub)
        add = sub.add_argument_group("data").add_argument
        flags.add_prompts_flag(add, sub)
        flags.add_constitution_flag(add)
        add("--split", choices=("sft", "rm", "ppo", "eval"), default=split,
            help="which disjoint share of the prompts to use")
        add("--limit", type=flags.positive_int, default=limit,
            help="use only the first LIMIT prompts of the split")
        add("--truncated", choices=("drop", "keep"), default="drop",
            help="answers cut by --max-new-tokens: drop and count them, or keep them as the study "
                 "did")
        add("--sft", type=Path,
            help="SFT adapter that answers (default: the bare base, as in the study)")
        add("--feedback", choices=("judge", "contrast"), default="judge",
            help="judge: the model judges or revises its own text; contrast: for models too weak "
                 "for that, see above")
        add("--contrasts", type=flags.positive_int, default=1, metavar="N",
            help="contrast: pairs or answers for each prompt, each of another virtue")
    add = preferences.add_argument_group("feedback").add_argument
    add("--judge-limit", type=flags.nonnegative_int, default=48,
        help="contrast: ask the judge about this many pairs a lens; nothing is learned from it")
    add("--judge", help="another model as the judge: toy, folder or hub id (default: the base, "
                        "adapters off)")
    add("--judge-batch-size", type=flags.positive_int, default=16, help="pairs judged at once")
    add("--any-judge", action="store_true",
        help="go on with a judge that cannot be told from a coin that knows places, and mark the "
             "data that it labels")
    add("--ask", choices=("virtues", "rules"), default="virtues",
        help="rules: ask one question (which dialogue breaks fewer rules?) instead of the five "
             "virtues; this is the rule-based control")
    add("--orders", choices=("both", "one"), default="both",
        help="one: read each pair in one order only, and keep the judge's preference for a place "
             "(the study)")
    add("--preference", choices=("votes", "mean"), default="votes",
        help="choose by the majority of the five virtues (the study), or by their mean "
             "probability; this affects training only with run_rm.py --labels hard, since soft "
             "labels carry the mean either way")
    common = ("out", "prompts", "limit", "sft", "model", "quantize", "dtype", "max-new-tokens")
    flags.most_used(revisions, *common, "feedback", "batch-size", "seed", "resume")
    flags.most_used(preferences, *common, "feedback", "judge", "seed", "resume")
    return flags.parse_with_parent(parser, argv, "sft", "sft", commands=commands)


def sample(args, base, stack, prompts, **settings):
    """One dialogue for each prompt record, by the base with a stack of adapters."""
    from virtue import generate, lora

    with lora.use_stack(base.model, *stack):
        return generate.sample_dialogues(
            base.model, base.tokenizer, prompts, seed=args.seed, stage=args.command,
            max_new_tokens=args.max_new_tokens, temperature=args.temperature,
            batch_size=args.batch_size, **settings)


# ---- revisions


def revise(args, base, stack, prompts, state):
    """Answer, critique and revision of each prompt, as one dialogue whose follow-up questions are
    those of the virtue drawn for it -> for each, (dialogue, virtue, answer, critique, revision,
    whether the revision was cut)."""
    from virtue.dialogue import messages_of
    from virtue.plumbing.resume import spread
    from virtue.randomness import stream

    words, names = base.words, base.words.virtues
    drawn = {p["id"]: names[stream(args.seed, "virtue", p["id"]).integers(len(names))]
             for p in prompts}
    questions = {}
    for prompt_id, virtue in drawn.items():
        asks, deficiency, excess = words.constitution[virtue]
        told = dict(virtue=virtue, asks=asks, deficiency=deficiency, excess=excess)
        questions[prompt_id] = words.critique.format(**told), words.revision.format(**told)
    found = []
    for d in sample(args, base, stack, prompts, questions=questions,
                    each_batch=spread("revise", state / "dialogues.jsonl")):
        messages = messages_of(base.tokenizer, d, questions=questions[d.id])
        texts = [m["content"] for m in messages[len(d.prompt)::2]]
        found.append((d, drawn[d.id], *texts, d.turns[2].truncated))
    return found


def instruct(args, base, stack, prompts, state):
    """As `revise`, where the revision is the answer under an instruction to have a virtue, and the
    critique is what that virtue asks (context distillation, Askell et al. 2021,
    arXiv 2112.00861)."""
    from virtue.dialogue import messages_of
    from virtue.plumbing.resume import spread

    plain = sample(args, base, stack, prompts, turns=1,
                   each_batch=spread("answers", state / "answers.jsonl"))
    first, _, contrasts = sample_contrasts(args, base, stack, prompts, state, turns=1, sides=1)
    answers = {d.id: messages_of(base.tokenizer, d, turns=1)[-1]["content"] for d in plain}
    found = []
    for d, of_pair in zip(first, contrasts):
        revision = messages_of(base.tokenizer, d, turns=1)[-1]["content"]
        found.append((d, of_pair.virtue, answers[d.id], of_pair.asks, revision,
                      d.turns[0].truncated))
    return found


def revisions_of(args, base, stack, prompts, state):
    """The records of what was really revised, and counts. VirtueError: no record is left."""
    from virtue.contrast import echoes

    make, run = ((instruct, ECHO) if args.feedback == "contrast"
                 else (revise, math.inf))  # all of the revision lies in the critique
    records, counts = [], dict.fromkeys(
        ("truncated", "empty", "unchanged", "echoed", "revisions"), 0)
    for d, virtue, initial, critique, revision, cut in make(args, base, stack, prompts, state):
        fault = ("truncated" if cut and args.truncated == "drop"
                 else "empty" if not revision
                 else "unchanged" if revision == initial
                 else "echoed" if echoes(revision, critique, run)
                 else None)
        counts[fault or "revisions"] += 1
        if fault is None:
            records.append({"id": d.id, "prompt": d.prompt, "initial": initial,
                            "critique": critique, "revision": revision, "virtue": virtue,
                            "truncated": any(turn.truncated for turn in d.turns)})
    if not records:
        raise VirtueError(f"no revision is left of {len(prompts)} prompts ({counts}): the model "
                          "may be too weak: give --feedback contrast, or a larger "
                          "--max-new-tokens")
    return sorted(records, key=lambda r: r["id"]), counts


# ---- preferences


def pairs_of(args, tokenizer, judge, first, second, lens, traits=None):
    """The pairs of dialogues that can be compared, each as (its index, both dialogues as messages
    up to the lens's turn, whether a turn was cut), and a Counter of the reasons why the others are
    dropped. `traits`: for each pair, what either side was told to be."""
    from virtue.contrast import echoes
    from virtue.dialogue import messages_of
    from virtue.judge import pair_fits

    pairs, dropped, turns = [], Counter(), LENSES.index(lens) + 1
    for i, sides in enumerate(zip(first, second, strict=True)):
        texts = [messages_of(tokenizer, d, turns=turns) for d in sides]
        cut = any(turn.truncated for d in sides for turn in d.turns[:turns])
        fault = ("truncated" if cut and args.truncated == "drop"
                 else "empty" if any(not m["content"] for text in texts for m in text)
                 else "identical" if texts[0] == texts[1]
                 else "echoed" if traits and any(
                     echoes(m["content"], trait, ECHO)
                     for text, trait in zip(texts, traits[i])
                     for m in text[len(sides[0].prompt)::2])
                 else "too_long" if not pair_fits(judge.model, judge.tokenizer, judge.words,
                                                  *texts, lens)
                 else None)
        dropped[fault] += 1
        if fault is None:
            pairs.append((i, texts, cut))
    return pairs, dropped


def compare(args, judge, first, pairs, lens, state):
    """The judge's preferences among the pairs of one lens -> (records, its log-odds (N, orders, Q)
    of all pairs, and its label mass: see ``judge_log_odds``). A tied pair has no record."""
    from virtue import lora
    from virtue.judge import judge_log_odds, verdict
    from virtue.plumbing.resume import spread

    names = judge.words.virtues
    with lora.use_stack(judge.model):  # adapters off
        odds, label_mass = judge_log_odds(
            judge.model, judge.tokenizer, judge.words, [texts for _, texts, _ in pairs], lens,
            args.judge_batch_size, asked=names if args.ask == "virtues" else ("rules",),
            orders=2 if args.orders == "both" else 1,
            each_batch=spread(f"judge {lens}", state / f"log-odds-{lens}.jsonl"))
    odds = odds.expand(-1, -1, len(names))  # one question counts as five
    records = []
    for (i, texts, cut), odds_of_pair in zip(pairs, odds):
        fields = verdict(odds_of_pair, args.preference, names)
        first_is_chosen = fields.pop("first_is_chosen")
        if first_is_chosen is None:  # it has no chosen side that a record could name
            continue
        chosen, rejected = texts if first_is_chosen else texts[::-1]
        records.append({"id": first[i].id, "lens": lens, "chosen": chosen, "rejected": rejected,
                        **fields, "truncated": cut, "chosen_copy": 0 if first_is_chosen else 1})
    return records, odds, label_mass


def row_of(dialogue):
    """The line of dialogues.jsonl."""
    return {"id": dialogue.id, "prompt": dialogue.prompt, "ids": dialogue.ids,
            "turns": dialogue.turns}


def check_left(pairs, lens, prompts, dropped):
    """VirtueError where a lens has no pair."""
    if not pairs:
        raise VirtueError(f"no pair of lens {lens} is left of {len(prompts)} prompts "
                          f"({dict(dropped)}): the model or the judge may be too weak, or "
                          "--max-new-tokens too small")


def prefer(args, base, judge, stack, prompts, out, state):
    """Two dialogues of each prompt, written to dialogues.jsonl, and the judge's preference between
    them, lens by lens -> ({lens: records}, {lens: numbers}, {lens: `coin_test` of the judge}).
    VirtueError: a lens without a pair, or a judge that cannot be told from a coin."""
    from virtue.evaluation import feedback
    from virtue.judge import unanswered
    from virtue.plumbing import artefacts, resume

    first, second = (sample(args, base, stack, prompts, copy=copy, each_batch=resume.spread(
        f"dialogues {copy + 1} of 2", state / f"dialogues-{copy + 1}.jsonl")) for copy in (0, 1))
    artefacts.write_jsonl(out / "dialogues.jsonl", map(row_of, (*first, *second)))
    records, numbers, tests, dropped = {}, {}, {}, {}
    for lens in LENSES:
        pairs, dropped[lens] = pairs_of(args, base.tokenizer, judge, first, second, lens)
        check_left(pairs, lens, prompts, dropped[lens])
        records[lens], odds, label_mass = compare(args, judge, first, pairs, lens, state)
        dropped[lens]["tied"] = len(pairs) - len(records[lens])
        tests[lens] = feedback.coin_test(odds)
        numbers[lens] = {**{f"dropped_{fault}": dropped[lens][fault] for fault in FAULTS},
                         "label_mass": label_mass, **feedback.summarize(records[lens], odds, lens)}
        print(f"judge, {lens}: {feedback.worth(numbers[lens])}")
        if unanswered(label_mass):
            print(f"warning: {lens}: {unanswered(label_mass)}")
    doubts = feedback.doubts({"judge_test": tests})
    if any(test["coin"] for test in tests.values()) and not args.any_judge:
        raise VirtueError(
            f"judge {judge.info['id']}: {'; '.join(doubts)}: nothing can be learned from such "
            "labels: give another --judge, other words (virtue/ethics.py), --feedback "
            "contrast or more pairs (--limit), with --overwrite; or the same command with --resume "
            "--any-judge, which goes on with these labels and neither samples nor judges again "
            f"({out} keeps all)")
    for lens in LENSES:
        check_left(records[lens], lens, prompts, dropped[lens])
    for text in doubts:
        print(f"warning: {text}")
    return records, numbers, tests


def sample_contrasts(args, base, stack, prompts, state, turns=3, sides=2):
    """Pairs of dialogues, the first of which was told to have a virtue and the second to have a
    vice -> (first, second, the `Contrast` of each pair). Both sides draw the same random numbers,
    and carry the prompt as it was, without the instruction. sides=1: the first ones only."""
    from virtue.contrast import contrasts_of, told
    from virtue.dialogue import with_prompt
    from virtue.plumbing.resume import spread

    each = [contrasts_of(base.words, args.seed, p["id"], args.contrasts) for p in prompts]
    found, contrasts = ([], []), []
    for copy in range(min(args.contrasts, len(base.words.virtues))):
        now = [of_prompt[copy] for of_prompt in each]
        contrasts += now
        asked = [told(base.tokenizer, base.words, p, getattr(of_pair, side))
                 for side in ("asks", "fails")[:sides] for p, of_pair in zip(prompts, now)]
        dialogues = sample(
            args, base, stack, asked, copy=1 + copy, turns=turns, each_batch=spread(
                f"contrast {copy + 1} of {args.contrasts}", state / f"contrast-{copy + 1}.jsonl"))
        for i, d in enumerate(dialogues):
            prompt = prompts[i % len(prompts)]["prompt"]
            found[i // len(prompts)].append(with_prompt(base.tokenizer, d, prompt))
    return *found, contrasts


def contrast(args, base, judge, stack, prompts, out, state):
    """As `prefer`, but by contrast: the judge labels nothing, so that there is no test of it."""
    from virtue import lora
    from virtue.evaluation import feedback
    from virtue.judge import judge_log_odds
    from virtue.plumbing import artefacts, resume

    plain = sample(args, base, stack, prompts,
                   each_batch=resume.spread("dialogues", state / "dialogues.jsonl"))
    artefacts.write_jsonl(out / "dialogues.jsonl", map(row_of, plain))
    first, second, contrasts = sample_contrasts(args, base, stack, prompts, state)
    records, numbers = {}, {}
    for lens in LENSES:
        pairs, dropped = pairs_of(args, base.tokenizer, judge, first, second, lens,
                                  [(of_pair.asks, of_pair.fails) for of_pair in contrasts])
        check_left(pairs, lens, prompts, dropped)
        records[lens] = [{
            "id": first[i].id, "lens": lens, "chosen": texts[0], "rejected": texts[1],
            "virtues": {contrasts[i].virtue: 1.0}, "label": 1.0, "votes": 1, "position_flips": None,
            "truncated": cut, "vice": contrasts[i].vice} for i, texts, cut in pairs]
        asked = pairs[:args.judge_limit]
        with lora.use_stack(judge.model):
            odds, label_mass = judge_log_odds(
                judge.model, judge.tokenizer, judge.words, [texts for _, texts, _ in asked], lens,
                args.judge_batch_size,
                each_batch=resume.spread(f"judge {lens}", state / f"log-odds-{lens}.jsonl"))
        column = [judge.words.virtues.index(contrasts[i].virtue) for i, *_ in asked]
        numbers[lens] = {
            "pairs": len(pairs), **{f"dropped_{fault}": dropped[fault] for fault in FAULTS},
            "judge_agrees": feedback.agrees(odds, column),
            "label_mass": label_mass if asked else None,  # not measured
            "gold_agreement": feedback.gold_agreement(records[lens], lens)}
        print(f"contrast, {lens}: {feedback.of_contrast(numbers[lens])}")
    return records, numbers, {}


# ---- both


def open_models(args, prompts):
    """The base with its stack of adapters, the judge, and the prompts that are short enough ->
    (base, stack, the parents that the artefact records, judge, prompts)."""
    from virtue import generate, judge
    from virtue.contrast import told
    from virtue.plumbing import artefacts, loading

    most = args.max_prompt_tokens
    base = judge_base = loading.open_base(args)
    asked = prompts
    if args.feedback == "contrast":  # with the longest instruction
        trait = max((text for poles in base.words.constitution.values() for text in poles), key=len)
        asked = [told(base.tokenizer, base.words, p, trait) for p in prompts]
    kept = [p for p, record in zip(prompts, asked)
            if generate.fits(base.tokenizer, record["prompt"], most)]
    if not kept:
        raise VirtueError(f"{args.prompts}: all {len(prompts)} prompts exceed --max-prompt-tokens "
                          f"{most}: raise it")
    stack, parents = artefacts.load_sft(args.sft, base.model, base=base.info,
                                        template=base.template)
    if args.command == "preferences":
        judge_base = loading.open_base(args, args.judge) if args.judge else base
        # may refuse it: before hours of sampling
        judge.label_ids(judge_base.tokenizer, judge_base.words)
    generate.check_context(base.model, most, args.max_new_tokens)
    return base, stack, parents, judge_base, kept


def main(argv=None):
    args = parse(argv)
    from virtue import generate
    from virtue.plumbing import artefacts, memory, parallel, preview, records, resume

    # 1. Prompts; --dry-run ends here
    prompts = records.load_prompts(args.prompts, args.split, args.limit, args.system)
    out = resume.may_write(args, args.out, [args.sft])
    revisions = args.command == "revisions"
    names = ["revisions"] if revisions else [*LENSES, "dialogues"]
    files = [f"{name}.jsonl" for name in names]
    length = generate.longest(args.max_prompt_tokens, args.max_new_tokens)
    sampling = dict(rows=min(args.batch_size, len(prompts)), tokens=length,
                    prompt=args.max_prompt_tokens)
    judging = None if revisions else dict(
        rows=args.judge_batch_size, tokens=2 * length + 600)  # 600: the questions
    if preview.preview(args, {"prompts": f"{args.prompts}, {len(prompts)} records"},
                       f"{', '.join(files)}, summary.json", sampling=sampling, judging=judging):
        return

    # 2. Models
    base, stack, parents, judge, kept = open_models(args, prompts)
    state = resume.start(args, out, prompts=artefacts.prompts_hash(args.prompts),
                         base=base.info["fingerprint"], judge=judge.info["fingerprint"],
                         words=base.info["words"])
    if state is None:  # the run had already finished
        return

    # 3. Data: sampled, and judged
    if revisions:
        rows, numbers = revisions_of(args, base, stack, kept, state)
        data, extra = {"revisions": rows}, {}
    else:
        make = contrast if args.feedback == "contrast" else prefer
        data, numbers, tests = make(args, base, judge, stack, kept, out, state)
        extra = {"judge": judge.info, "judge_test": tests, "feedback": args.feedback}

    # 4. Files
    for name, rows in data.items():
        artefacts.write_jsonl(out / f"{name}.jsonl", rows)
    summary = {"prompts": len(prompts), "prompts_too_long": len(prompts) - len(kept), **numbers}
    artefacts.write_json(out / "summary.json", summary)
    parallel.barrier()
    artefacts.write_manifest(out, stage=args.command, base=base.info, template=base.template,
                             seed=args.seed, settings=resume.settings_of(args), parents=parents,
                             extra=extra, sha256=artefacts.data_hash(out, files))
    resume.finish(out)
    for name, value in summary.items():
        if isinstance(value, dict):  # None: not measured; a bool was said above
            value = ", ".join(f"{k} {v:.3g}" for k, v in value.items() if records.is_number(v))
        print(f"{name}: {value}")
    print(f"wrote {', '.join(files)}, summary.json in {out}{memory.used(base.model.device)}")


if __name__ == "__main__":
    run_main(main)
