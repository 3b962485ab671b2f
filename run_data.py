"""Make training data from the model itself: revisions for SFT, preferences for reward models.

  python run_data.py revisions   --out runs/demo/revisions
  python run_data.py preferences --sft runs/demo/sft --out runs/demo/preferences
  python run_data.py preferences --prompts harmless-base.jsonl.gz --limit 64 --out runs/hh

revisions: the model answers each prompt, criticises its answer by one virtue of the constitution in
virtue/ethics.py, and rewrites it (Bai et al. 2022, arXiv 2212.08073, section 3.1, with virtues in
the place of principles). Empty, unchanged and truncated revisions are counted and dropped.

preferences: the model writes two independent dialogues for each prompt (answer, motivation,
consequence). For each lens, the judge then compares them on five virtues, in both orders. The
command writes action.jsonl, motivation.jsonl, consequence.jsonl and dialogues.jsonl. The last holds
all that was sampled, unfiltered, and run_rm.py takes the score statistics from it. The judge is the
base model with adapters off, unless --judge names another model. If the judge cannot be told from a
coin that knows places, the stage ends with status 2 after judging, unless --any-judge is given;
what was sampled and judged is kept for --resume.
"""
from __future__ import annotations

from collections import Counter
from pathlib import Path

from virtue import VirtueError
from virtue.ethics import CONSTITUTION, CRITIQUE, LENSES, REVISION, VIRTUES
from virtue.plumbing import flags
from virtue.plumbing.runtime import run_main

FAULTS = ("truncated", "empty", "identical", "too_long", "tied")  # why a pair is dropped


def parse(argv):
    parser = flags.make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="revisions|preferences")
    _, _, about_revisions, about_preferences, *_ = __doc__.split("\n\n")
    revisions = commands.add_parser("revisions", help="answer, critique, revised answer",
                                    description=about_revisions)
    preferences = commands.add_parser("preferences", help="paired dialogues and AI feedback",
                                      description=about_preferences)
    for sub, limit, split in ((revisions, 384, "sft"), (preferences, 768, "rm")):
        flags.add_common_flags(sub)
        flags.add_sampling_flags(sub)
        add = sub.add_argument_group("data").add_argument
        add("--prompts", default="toy",
            help="toy, or a file of prompts or conversations, in any form of docs/data.md")
        add("--split", choices=("sft", "rm", "ppo", "eval"), default=split,
            help="which disjoint share of the prompts to use")
        add("--limit", type=flags.positive_int, default=limit,
            help="use only the first LIMIT prompts of the split")
        add("--truncated", choices=("drop", "keep"), default="drop",
            help="answers cut by --max-new-tokens: drop and count them, or keep them as the study "
                 "did")
        add("--sft", type=Path,
            help="SFT adapter that answers (default: the bare base, as in the study)")
    add = preferences.add_argument_group("judge").add_argument
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
    flags.most_used(revisions, *common, "batch-size", "seed", "resume")
    flags.most_used(preferences, *common, "judge", "any-judge", "seed", "resume")
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
    those of the virtue drawn for it -> (records of what was really revised, counts).
    VirtueError: no record is left."""
    from virtue.dialogue import messages_of
    from virtue.plumbing.resume import spread
    from virtue.randomness import stream

    records, counts = [], dict.fromkeys(("truncated", "empty", "unchanged", "revisions"), 0)
    drawn = {p["id"]: VIRTUES[stream(args.seed, "virtue", p["id"]).integers(len(VIRTUES))]
             for p in prompts}
    for virtue, (asks, deficiency, excess) in CONSTITUTION.items():
        words = dict(virtue=virtue, asks=asks, deficiency=deficiency, excess=excess)
        questions = (CRITIQUE.format(**words), REVISION.format(**words))
        dialogues = sample(args, base, stack, [p for p in prompts if drawn[p["id"]] == virtue],
                           questions=questions,
                           each_batch=spread(f"revise by {virtue}", state / f"{virtue}.jsonl"))
        for d in dialogues:
            messages = messages_of(base.tokenizer, d, questions=questions)
            initial, critique, revision = (m["content"] for m in messages[len(d.prompt)::2])
            fault = ("truncated" if d.turns[2].truncated and args.truncated == "drop"
                     else "empty" if not revision
                     else "unchanged" if revision == initial else None)
            counts[fault or "revisions"] += 1
            if fault is None:
                records.append({"id": d.id, "prompt": d.prompt, "initial": initial,
                                "critique": critique, "revision": revision, "virtue": virtue,
                                "truncated": any(turn.truncated for turn in d.turns)})
    if not records:
        raise VirtueError(f"no revision is left of {len(prompts)} prompts ({counts}): the model "
                          "may be too weak, or --max-new-tokens too small")
    return sorted(records, key=lambda r: r["id"]), counts


# ---- preferences


def pairs_of(args, tokenizer, judge, first, second, lens):
    """The pairs of dialogues that the judge can compare, each as (the prompt's id, both dialogues
    as messages up to the lens's turn, whether a turn was cut), and a Counter of the reasons why the
    others are dropped."""
    from virtue.dialogue import messages_of
    from virtue.judge import pair_fits

    pairs, dropped, turns = [], Counter(), LENSES.index(lens) + 1
    for sides in zip(first, second, strict=True):
        texts = [messages_of(tokenizer, d, turns=turns) for d in sides]
        cut = any(turn.truncated for d in sides for turn in d.turns[:turns])
        fault = ("truncated" if cut and args.truncated == "drop"
                 else "empty" if any(not m["content"] for text in texts for m in text)
                 else "identical" if texts[0] == texts[1]
                 else "too_long" if not pair_fits(judge.model, judge.tokenizer, *texts, lens)
                 else None)
        dropped[fault] += 1
        if fault is None:
            pairs.append((sides[0].id, texts, cut))
    return pairs, dropped


def compare(args, judge, pairs, lens, state):
    """The judge's preferences among the pairs of one lens -> (records, its log-odds (N, orders, 5)
    of all pairs, and its label mass: see ``judge_log_odds``). A tied pair has no record."""
    from virtue import lora
    from virtue.judge import judge_log_odds, verdict
    from virtue.plumbing.resume import spread

    with lora.use_stack(judge.model):  # adapters off
        odds, label_mass = judge_log_odds(
            judge.model, judge.tokenizer, [texts for _, texts, _ in pairs], lens,
            args.judge_batch_size, asked=VIRTUES if args.ask == "virtues" else ("rules",),
            orders=2 if args.orders == "both" else 1,
            each_batch=spread(f"judge {lens}", state / f"log-odds-{lens}.jsonl"))
    odds = odds.expand(-1, -1, len(VIRTUES))  # one question counts as five
    records = []
    for (prompt_id, texts, cut), odds_of_pair in zip(pairs, odds):
        fields = verdict(odds_of_pair, args.preference)
        first_is_chosen = fields.pop("first_is_chosen")
        if first_is_chosen is None:  # it has no chosen side that a record could name
            continue
        chosen, rejected = texts if first_is_chosen else texts[::-1]
        records.append({"id": prompt_id, "lens": lens, "chosen": chosen, "rejected": rejected,
                        **fields, "truncated": cut, "chosen_copy": 0 if first_is_chosen else 1})
    return records, odds, label_mass


def prefer(args, base, judge, stack, prompts, out, state):
    """Two dialogues of each prompt, written to dialogues.jsonl, and the judge's preference between
    them, lens by lens -> ({lens: records}, {lens: numbers}, {lens: `coin_test` of the judge}).
    VirtueError: a lens without a pair, or a judge that cannot be told from a coin."""
    from virtue.evaluation import feedback
    from virtue.judge import unanswered
    from virtue.plumbing import artefacts, resume

    first, second = (sample(args, base, stack, prompts, copy=copy, each_batch=resume.spread(
        f"dialogues {copy + 1} of 2", state / f"dialogues-{copy + 1}.jsonl")) for copy in (0, 1))
    artefacts.write_jsonl(out / "dialogues.jsonl", (
        {"id": d.id, "prompt": d.prompt, "ids": d.ids, "turns": d.turns}
        for d in (*first, *second)))
    records, numbers, tests, dropped = {}, {}, {}, {}

    def check(lens, pairs):
        if not pairs:
            raise VirtueError(f"no pair of lens {lens} is left of {len(prompts)} prompts "
                              f"({dict(dropped[lens])}): the model or the judge may be too weak, "
                              "or --max-new-tokens too small")

    for lens in LENSES:
        pairs, dropped[lens] = pairs_of(args, base.tokenizer, judge, first, second, lens)
        check(lens, pairs)
        records[lens], odds, label_mass = compare(args, judge, pairs, lens, state)
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
            "labels: give another --judge, other words (JUDGE_QUESTIONS in virtue/ethics.py) or "
            "more pairs (--limit), with --overwrite; or the same command with --resume "
            "--any-judge, which goes on with these labels and neither samples nor judges again "
            f"({out} keeps all)")
    for lens in LENSES:
        check(lens, records[lens])
    for text in doubts:
        print(f"warning: {text}")
    return records, numbers, tests


# ---- both


def open_models(args, prompts):
    """The base with its stack of adapters, the judge, and the prompts that are short enough ->
    (base, stack, the parents that the artefact records, judge, prompts)."""
    from virtue import generate, judge
    from virtue.plumbing import artefacts, loading

    most = args.max_prompt_tokens
    base = judge_base = loading.open_base(args)
    kept = [p for p in prompts if generate.fits(base.tokenizer, p["prompt"], most)]
    if not kept:
        raise VirtueError(f"{args.prompts}: all {len(prompts)} prompts exceed --max-prompt-tokens "
                          f"{most}: raise it")
    stack, parents = artefacts.load_sft(args.sft, base.model, base=base.info,
                                        template=base.template)
    if args.command == "preferences":
        judge_base = loading.open_base(args, args.judge) if args.judge else base
        judge.label_ids(judge_base.tokenizer)  # may refuse it: before hours of sampling
    generate.check_context(base.model, most, args.max_new_tokens)
    return base, stack, parents, judge_base, kept


def main(argv=None):
    args = parse(argv)
    from virtue import generate
    from virtue.plumbing import artefacts, memory, parallel, preview, records, resume

    # 1. Prompts; --dry-run ends here
    prompts = records.load_prompts(args.prompts, args.split, args.limit)
    out = resume.may_write(args, args.out, [args.sft])
    revisions = args.command == "revisions"
    names = ["revisions"] if revisions else [*LENSES, "dialogues"]
    files = [f"{name}.jsonl" for name in names]
    length = generate.longest(args.max_prompt_tokens, args.max_new_tokens)
    sampling = dict(rows=min(args.batch_size, len(prompts)), tokens=length, new=args.max_new_tokens)
    judging = None if revisions else dict(
        rows=args.judge_batch_size, tokens=2 * length + 600)  # 600: the questions
    if preview.preview(args, {"prompts": f"{args.prompts}, {len(prompts)} records"},
                       f"{', '.join(files)}, summary.json", sampling=sampling, judging=judging):
        return

    # 2. Models
    base, stack, parents, judge, kept = open_models(args, prompts)
    state = resume.start(args, out, prompts=artefacts.prompts_hash(args.prompts),
                         base=base.info["fingerprint"], judge=judge.info["fingerprint"])
    if state is None:  # the run had already finished
        return

    # 3. Data: sampled, and judged
    if revisions:
        rows, numbers = revise(args, base, stack, kept, state)
        data, extra = {"revisions": rows}, {}
    else:
        data, numbers, tests = prefer(args, base, judge, stack, kept, out, state)
        extra = {"judge": judge.info, "judge_test": tests}

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
