"""Make training data from the model itself: revisions for SFT, preferences for reward models.

  python run_data.py revisions   --out runs/demo/revisions
  python run_data.py preferences --sft runs/demo/sft --out runs/demo/preferences
  python run_data.py preferences --prompts harmless-base.jsonl.gz --limit 64 --out runs/hh

revisions: the model answers each prompt, criticises its answer by one virtue of the constitution in
virtue/ethics.py, and rewrites it (Bai et al. 2022, arXiv 2212.08073, section 3.1, with virtues in the
place of principles). Empty, unchanged and truncated revisions are counted and dropped.

preferences: two independent dialogues for each prompt (answer, motivation, consequence), then for
each lens the judge compares them on five virtues, in both orders. Writes action.jsonl,
motivation.jsonl, consequence.jsonl, and dialogues.jsonl: all that was sampled, unfiltered, from which
run_rm.py takes the score statistics. The judge is the base model with adapters off, unless --judge
names another model. Where it cannot be told from a coin that knows places, the stage ends with
status 2 after judging, unless --any-judge is given; what was sampled and judged is kept for --resume.
"""
from __future__ import annotations

from collections import Counter
from pathlib import Path

from virtue.plumbing.flags import (add_common_flags, add_sampling_flags, make_parser,
                                   parse_with_parent, positive_int)
from virtue.plumbing.loading import open_base
from virtue.plumbing.preview import preview
from virtue.plumbing.runtime import run_main
from virtue.randomness import stream


def parse(argv):
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="revisions|preferences")
    revisions = commands.add_parser("revisions", help="answer, critique, revised answer", description=__doc__.split("\n\n")[2])
    preferences = commands.add_parser("preferences", help="paired dialogues and AI feedback", description=__doc__.split("\n\n")[3])
    for sub, limit, split in ((revisions, 384, "sft"), (preferences, 768, "rm")):
        add_common_flags(sub)
        add_sampling_flags(sub)
        group = sub.add_argument_group("data").add_argument
        group("--prompts", default="toy",
              help="toy, or a file of prompts or conversations, of any form that README names")
        group("--split", choices=("sft", "rm", "ppo", "eval"), default=split, help="which disjoint share of the prompts to use")
        group("--limit", type=positive_int, default=limit, help="use the first so many prompts of the split")
        group("--truncated", choices=("drop", "keep"), default="drop", help="answers cut by --max-new-tokens: drop and count them, or keep them as the study did")
        group("--sft", type=Path, help="SFT adapter that answers (default: the bare base, as in the study)")
    group("--judge", help="another model as the judge: toy, folder or hub id (default: the base, adapters off)")
    group("--judge-batch-size", type=positive_int, default=16, help="pairs judged at once")
    group("--any-judge", action="store_true",
          help="go on with a judge that cannot be told from a coin that knows places, and mark what it labels")
    group("--ask", choices=("virtues", "rules"), default="virtues",
          help="rules: one question, which breaks fewer rules, instead of the five virtues: the rule-based control")
    group("--orders", choices=("both", "one"), default="both", help="one: read each pair in one order only, and keep the judge's preference for a place (the study)")
    group("--preference", choices=("votes", "mean"), default="votes",
          help="chosen by the majority of the five virtues (the study), or by their mean probability; "
               "matters to training with run_rm.py --labels hard only, since soft labels carry the mean either way")
    return parse_with_parent(parser, argv, "sft", "sft", commands=commands)


def main(argv=None):
    args = parse(argv)
    from virtue import VirtueError
    from virtue.plumbing.artefacts import data_hash, prompts_hash, write_json, write_jsonl, write_manifest
    from virtue.dialogue import messages_of
    from virtue.plumbing.records import is_number, load_prompts
    from virtue.ethics import CONSTITUTION, CRITIQUE, LENSES, REVISION, VIRTUES
    from virtue.generate import check_context, fits, longest, sample_dialogues
    from virtue.judge import judge_log_odds, label_ids, pair_fits, unanswered, verdict
    from virtue.lora import use_stack
    from virtue.plumbing.memory import used
    from virtue.plumbing.parallel import barrier
    from virtue.plumbing.resume import finish, may_write, settings_of, spread, start
    from virtue.plumbing.artefacts import load_sft

    # Build
    prompts = load_prompts(args.prompts, args.split, args.limit)
    out = may_write(args, args.out, [args.sft])
    written = ["revisions.jsonl"] if args.command == "revisions" else [*(f"{lens}.jsonl" for lens in LENSES), "dialogues.jsonl"]
    length = longest(args.max_prompt_tokens, args.max_new_tokens)
    if preview(args, {"prompts": f"{args.prompts}, {len(prompts)} records"}, f"{', '.join(written)}, summary.json",
               sampling=dict(rows=min(args.batch_size, len(prompts)), tokens=length, new=args.max_new_tokens),
               judging=dict(rows=args.judge_batch_size, tokens=2 * length + 600) if args.command == "preferences" else None):  # 600: the questions
        return
    base = open_base(args)
    model, tokenizer = base.model, base.tokenizer
    kept = [p for p in prompts if fits(tokenizer, p["prompt"], args.max_prompt_tokens)]
    counts = Counter(prompts=len(prompts), prompts_too_long=len(prompts) - len(kept))
    if not kept:
        raise VirtueError(f"{args.prompts}: all {len(prompts)} prompts exceed --max-prompt-tokens {args.max_prompt_tokens}: raise it")
    stack, parents = load_sft(args.sft, model, base=base.info, template=base.template)
    judge_base = base
    if args.command == "preferences":
        judge_base = open_base(args, args.judge) if args.judge else base
        label_ids(judge_base.tokenizer)  # refuse a tokenizer without single-token labels before hours of sampling
    check_context(model, args.max_prompt_tokens, args.max_new_tokens)
    state = start(args, out, prompts=prompts_hash(args.prompts), base=base.info["fingerprint"], judge=judge_base.info["fingerprint"])
    if state is None:
        return
    sampling = dict(seed=args.seed, max_new_tokens=args.max_new_tokens, temperature=args.temperature, batch_size=args.batch_size)

    if args.command == "revisions":
        # 1. answer, critique and revision are one dialogue whose follow-ups depend on the virtue drawn
        drawn = {p["id"]: VIRTUES[stream(args.seed, "virtue", p["id"]).integers(len(VIRTUES))] for p in kept}
        records = []
        for virtue, (asks, deficiency, excess) in CONSTITUTION.items():
            questions = (CRITIQUE.format(virtue=virtue, asks=asks, deficiency=deficiency, excess=excess), REVISION.format(virtue=virtue))
            batch = [p for p in kept if drawn[p["id"]] == virtue]
            with use_stack(model, *stack):
                dialogues = sample_dialogues(model, tokenizer, batch, stage="revisions", questions=questions,
                                             each_batch=spread(f"revise by {virtue}", state / f"{virtue}.jsonl"), **sampling)
            # 2. keep what was really revised
            for dialogue in dialogues:
                messages = messages_of(tokenizer, dialogue, questions=questions)
                initial, critique, revision = (m["content"] for m in messages[len(dialogue.prompt)::2])
                fault = ("truncated" if dialogue.turns[2].truncated and args.truncated == "drop" else "empty" if not revision
                         else "unchanged" if revision == initial else None)
                counts[fault or "revisions"] += 1
                if fault is None:
                    records.append({"id": dialogue.id, "prompt": dialogue.prompt, "initial": initial, "critique": critique,
                                    "revision": revision, "virtue": virtue, "truncated": any(t.truncated for t in dialogue.turns)})
        if not records:
            raise VirtueError(f"no revision is left of {len(kept)} prompts ({dict(counts)}): the model may be too weak, or --max-new-tokens too small")
        write_jsonl(out / "revisions.jsonl", sorted(records, key=lambda r: r["id"]))
        summary = {name: counts[name] for name in ("prompts", "prompts_too_long", "truncated", "empty", "unchanged", "revisions")}
    else:
        from virtue.evaluation.feedback import coin_test, doubts, summarize, worth
        # 1. two independent dialogues for each prompt
        with use_stack(model, *stack):
            first, second = (sample_dialogues(model, tokenizer, kept, stage="preferences", copy=copy,
                                              each_batch=spread(f"dialogues {copy + 1} of 2", state / f"dialogues-{copy + 1}.jsonl"), **sampling)
                             for copy in (0, 1))
        write_jsonl(out / "dialogues.jsonl", ({"id": d.id, "prompt": d.prompt, "ids": d.ids, "turns": d.turns} for d in (*first, *second)))
        # 2. the judge, in both orders, lens by lens
        judge, judge_tokenizer = judge_base.model, judge_base.tokenizer
        summary = {"prompts": counts["prompts"], "prompts_too_long": counts["prompts_too_long"]}
        found, tests, lost = {}, {}, {}

        def none_left(lens, why):
            return VirtueError(f"no pair of lens {lens} is left of {len(kept)} prompts ({dict(why)}): the model or the "
                               "judge may be too weak, or --max-new-tokens too small")

        for k, lens in enumerate(LENSES):
            pairs, dropped = [], Counter()
            for a, b in zip(first, second, strict=True):
                texts = [messages_of(tokenizer, d, turns=k + 1) for d in (a, b)]
                cut = any(t.truncated for d in (a, b) for t in d.turns[:k + 1])
                fault = ("truncated" if cut and args.truncated == "drop"
                         else "empty" if any(not m["content"] for t in texts for m in t)
                         else "identical" if texts[0] == texts[1]
                         else "too_long" if not pair_fits(judge, judge_tokenizer, *texts, lens) else None)
                dropped[fault] += 1
                if fault is None:
                    pairs.append((a.id, texts, cut))
            if not pairs:
                raise none_left(lens, dropped)
            with use_stack(judge):
                odds, label_mass = judge_log_odds(judge, judge_tokenizer, [texts for _, texts, _ in pairs],
                                                lens, args.judge_batch_size,
                                                asked=VIRTUES if args.ask == "virtues" else ("rules",), orders=2 if args.orders == "both" else 1,
                                                each_batch=spread(f"judge {lens}", state / f"log-odds-{lens}.jsonl"))
            odds = odds.expand(-1, -1, len(VIRTUES))  # one question counts as five
            # 3. from judgement to preference
            records = []
            for (prompt_id, texts, cut), of_pair in zip(pairs, odds):
                said = verdict(of_pair, args.preference)
                first_is_chosen = said.pop("first_is_chosen")
                if first_is_chosen is None:  # it has no chosen side that a record could name
                    dropped["tied"] += 1
                    continue
                chosen, rejected = texts if first_is_chosen else texts[::-1]
                records.append({"id": prompt_id, "lens": lens, "chosen": chosen, "rejected": rejected, **said,
                                "truncated": cut, "chosen_copy": 0 if first_is_chosen else 1})
            found[lens] = records
            faults = ("truncated", "empty", "identical", "too_long", "tied")
            summary[lens] = {**{f"dropped_{fault}": dropped[fault] for fault in faults},
                             "label_mass": label_mass, **summarize(records, odds, lens)}
            tests[lens], lost[lens] = coin_test(odds), dropped
            print(f"judge, {lens}: {worth(summary[lens])}")
            if unanswered(label_mass):
                print(f"warning: {lens}: {unanswered(label_mass)}")
        doubtful = doubts({"judge_test": tests})
        if any(test["coin"] for test in tests.values()) and not args.any_judge:
            raise VirtueError(f"judge {judge_base.info['id']}: {'; '.join(doubtful)}: nothing can be learned from such "
                              "labels: give another --judge, other words (JUDGE_QUESTIONS in virtue/ethics.py) or more "
                              "pairs (--limit), with --overwrite; or the same command with --resume --any-judge, which "
                              f"goes on with these labels and neither samples nor judges again ({out} keeps all)")
        for lens in LENSES:
            if not found[lens]:
                raise none_left(lens, lost[lens])
        for text in doubtful:
            print(f"warning: {text}")
        for lens, records in found.items():
            write_jsonl(out / f"{lens}.jsonl", records)
    write_json(out / "summary.json", summary)
    barrier()
    write_manifest(out, stage=args.command, base=base.info, template=base.template, seed=args.seed, settings=settings_of(args),
                   parents=parents,
                   extra={"judge": judge_base.info, "judge_test": tests}
                   if args.command == "preferences" else {},
                   sha256=data_hash(out, written))
    finish(out)
    for name, value in summary.items():
        if isinstance(value, dict):  # None: not measured; a bool was said above
            value = ", ".join(f"{k} {v:.3g}" for k, v in value.items() if is_number(v))
        print(f"{name}: {value}")
    print(f"wrote {', '.join(written)}, summary.json in {out}{used(model.device)}")


if __name__ == "__main__":
    run_main(main)
