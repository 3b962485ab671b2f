"""Evaluate: two models side by side, the judge, the reward models, best-of-n; or talk to the result.

  python run_eval.py models    --policy runs/demo/policy --out runs/demo/report
  python run_eval.py judge     --pairs harmless-base.jsonl.gz --limit 200 --out runs/demo/judge
  python run_eval.py rewards   --rm runs/demo/rm --data runs/demo/preferences --out runs/demo/rewards
  python run_eval.py best-of-n --rm runs/demo/rm --out runs/demo/best
  python run_eval.py chat      --policy runs/demo/policy

models: base, SFT and PPO model answer the same held-out prompts with whole dialogues. The study's Score is
mean - 0.5 * population std over the 3n scores RM_lens(dialogue up to the lens's turn), on raw scores, as the
study did (their std also holds the arbitrary offsets between the three models), and on standardised ones.
Differences carry 95 % intervals of a paired bootstrap over prompts, p-values Holm's correction; the judge
compares the models in both orders, in the words of the training and in others. Writes scores.json,
samples.jsonl and report.html. On toy, gold is read: no stage has learned from it. Refuses to report on an
adapter that changes no logit: it was never loaded.

judge: how often the judge agrees with human preferences (hh-rlhf or any file of chosen and rejected), per
virtue, with position flips and the halo; on toy pairs, with gold instead of the file's own choice.

rewards: accuracy and calibration of each reward model on held-out pairs, score against length, scores of
degenerate answers; with --pairs accuracy on any external preference file.

best-of-n: gold, rewards and the judge's opinion of the best of 1, 2, 4, ... answers of the starting policy under each
aggregator, by the unbiased estimator. If best-of-n does not help, PPO is unlikely to.

chat: talk to base and tuned model at once in the terminal, with the three rewards of every answer; /why asks
for motivation and consequence.
"""
from __future__ import annotations

import functools
import json
from pathlib import Path

from virtue.plumbing.flags import (add_aggregator_flags, add_common_flags, add_sampling_flags,
                                   aggregator_settings, make_parser, nonnegative_int,
                                   parse_with_parent, positive_int)
from virtue.plumbing.loading import open_base
from virtue.plumbing.preview import preview
from virtue.plumbing.runtime import progress, run_main
from virtue.randomness import held_out_ids

NO_FIGURES = 'no figures: they need matplotlib, pip install ".[report]"'


def parse(argv):
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="models|judge|rewards|best-of-n|chat")
    parts = {text.split(":")[0]: text for text in __doc__.split("\n\n")}
    models, judge, rewards, best, talk = (commands.add_parser(name, help=title, description=parts[name]) for name, title in (
        ("models", "base, SFT and PPO model side by side"), ("judge", "the judge against human preferences"),
        ("rewards", "the reward models on pairs, lengths and degenerate answers"), ("best-of-n", "what choosing among answers gains"), ("chat", "talk to base and tuned model")))
    models.parent, judge.parent, rewards.parent, best.parent, talk.parent = (
        ("policy", "policy", ""), (None, None, ""), ("rm", "rm", "action"), ("rm", "rm", "action"), ("policy", "policy", ""))
    for sub in (models, best):
        add_common_flags(sub)
        add_sampling_flags(sub)
    add_common_flags(talk, out=False)
    add_sampling_flags(talk)
    for sub in (judge, rewards):
        add_common_flags(sub)
    add = {sub: sub.add_argument_group("artefacts and data").add_argument for sub in (models, judge, rewards, best, talk)}
    for sub in (judge, rewards):
        add[sub]("--batch-size", type=positive_int, default=32, help="pairs or dialogues scored at once")
    group = models.add_argument_group("what to compare").add_argument
    for sub in (models, talk):
        add[sub]("--policy", type=Path, required=True, help="folder of run_ppo.py, or of run_sft.py on preferences")
    group("--eval-rm", type=Path, help="a second ensemble, which PPO did not see (run_rm.py --share second --seed 1)")
    group("--judge", help="another model as the judge: toy, folder or hub id (default: the base, adapters off)")
    group("--judge-limit", type=positive_int, default=48, help="prompts on which the judge compares the models")
    group("--judge-batch-size", type=positive_int, default=16, help="pairs judged at once")
    group("--show", type=positive_int, default=3, help="dialogues to print side by side")
    group = judge.add_argument_group("pairs").add_argument
    group("--pairs", type=Path, required=True,
          help="preferences of this project or of any form that README names")
    group("--wording", choices=("trained", "other"), default="trained", help="the question as in training, or in other words")
    for sub in (rewards, best):
        add[sub]("--rm", type=Path, required=True, help="folder of run_rm.py")
    group = rewards.add_argument_group("pairs").add_argument
    group("--data", type=Path, required=True, help="folder of run_data.py preferences: its held-out part")
    group("--pairs", type=Path,
          help="an external preference file of any form that README names, scored at "
               "its last answer")
    for sub, limit, what in ((models, 240, "held-out prompts"), (judge, 200, "pairs"), (rewards, 500, "external pairs"), (best, 64, "held-out prompts")):
        add[sub]("--limit", type=positive_int, default=limit, help=f"use the first so many {what}")
    for sub in (models, rewards, best, talk):
        add[sub]("--sft", type=Path, help="the SFT adapter below it")
    for sub in (models, talk):
        add[sub]("--rm", type=Path, help="folder of run_rm.py: the reward models of the training, for a folder that was moved")
    for sub in (models, best):
        add[sub]("--prompts", default="toy",
                 help="toy, or a file of prompts or conversations, of any form that README names")
    add_aggregator_flags(best.add_argument_group("aggregators").add_argument)
    add[best]("--n", type=positive_int, default=16, help="answers to each prompt")
    group = best.add_argument_group("judge: the base, adapters off").add_argument
    group("--judge-limit", type=nonnegative_int, default=16, help="prompts of which the judge compares every answer with one more of the same model (0: none)")
    group("--judge-batch-size", type=positive_int, default=16, help="pairs judged at once")
    return parse_with_parent(parser, argv, commands=commands)


def main(argv=None):
    args = parse(argv)
    if args.command in ("models", "chat") and args.rm is None:
        from virtue import VirtueError
        raise VirtueError(f"{args.policy}: names no reward models: give --rm")
    if args.command == "chat":
        from virtue.evaluation.chat import chat
        from virtue.generate import longest
        if not preview(args, {}, "", flat=[["sft", "policy"]],
                       sampling=dict(rows=1, tokens=longest(args.max_prompt_tokens, args.max_new_tokens), new=args.max_new_tokens)):
            chat(args)
        return
    {"models": compare_models, "judge": evaluate_judge, "rewards": evaluate_rewards, "best-of-n": best_of_n}[args.command](args)


def compare_models(args):
    import numpy as np
    import torch
    from virtue import VirtueError
    from virtue.evaluation import html, plots
    from virtue.plumbing.artefacts import (MANIFEST, file_hash, load_artifact, prompts_hash, read_manifest, write_atomic, write_json, write_jsonl,
                                   write_manifest)
    from virtue.dialogue import encode_prompt, messages_of, right_pad
    from virtue.dialogue import prompt_record
    from virtue.plumbing.records import load_prompts, read_jsonl, read_metrics, read_rollouts
    from virtue.ensemble import standardize
    from virtue.ethics import LENSES, PROBES, VIRTUES
    from virtue.evaluation.feedback import doubts, judge_tests, points, win_rates
    from virtue.generate import check_context, fits, longest, sample_dialogues
    from virtue.judge import label_ids
    from virtue.logprobs import kl_k1
    from virtue.lora import flatten, use_stack
    from virtue.plumbing.memory import used
    from virtue.models import logprobs_at
    from virtue.plumbing.parallel import barrier
    from virtue.evaluation.report import correct, curve_of, differences, made_by, mask_names, measure, reward_model_facts, side_by_side, table, warnings_of
    from virtue.plumbing.resume import finish, may_write, settings_of, spread, start
    from virtue.plumbing.artefacts import load_reward_models, load_sft
    from virtue.rollout import dialogue_logprobs, score_dialogues
    from virtue.toy.gold import gold as gold_of, slots

    # Build
    prompts = load_prompts(args.prompts, "eval", args.limit)
    probes = [] if args.prompts == "toy" else [prompt_record([{"role": "user", "content": text}]) for text in PROBES]
    out = may_write(args, args.out, [args.policy, args.sft, args.rm, args.eval_rm])
    length = longest(args.max_prompt_tokens, args.max_new_tokens)
    if preview(args, {"prompts": f"{args.prompts}, {len(prompts)} records"}, "report.html, scores.json, samples.jsonl", flat=[["sft", "policy"]],
               sampling=dict(rows=min(args.batch_size, len(prompts)), tokens=length, new=args.max_new_tokens),
               judging=dict(rows=args.judge_batch_size, tokens=2 * length + 600)):
        return
    base = open_base(args)
    judge_base = open_base(args, args.judge) if args.judge else base
    label_ids(judge_base.tokenizer)
    model, tokenizer = base.model, base.tokenizer
    pad_id, known = tokenizer.pad_token_id, dict(base=base.info, template=base.template)
    sft, parents = load_sft(args.sft, model, **known)
    reward_models, mean, std = load_reward_models(args.rm, model, sft, parents, **known)
    if args.eval_rm:
        eval_models, eval_mean, eval_std = load_reward_models(args.eval_rm, model, sft, parents, prefix="eval-", **known)
    trained = read_manifest(args.policy, "policy")
    rollouts, metrics = (read(path) if (path := args.policy / name).is_file() else []
                         for name, read in (("rollouts.jsonl", read_rollouts), ("metrics.jsonl", read_metrics)))
    trained_upon = {**parents, **{role: args.rm / lens for lens in LENSES if (role := f"rm/{lens}") in trained["parents"]}}
    load_artifact(args.policy, model, "policy", stage="policy", **known, parents=trained_upon)
    best = args.policy / "best"
    kept_at = read_manifest(best, "policy")["extra"].get("iterations", -1) + 1 if (best / MANIFEST).is_file() else None  # it sampled the next iteration's dialogues
    facts = reward_model_facts(args.rm, args.eval_rm)
    stacks = {"base": (), **({"sft": sft} if sft else {}), "ppo": (*sft, "policy")}
    kept = [p for p in prompts if fits(tokenizer, p["prompt"], args.max_prompt_tokens)]
    if len(kept) < 2:
        raise VirtueError(f"{args.prompts}: {len(kept)} held-out prompts fit into --max-prompt-tokens {args.max_prompt_tokens} and --limit "
                          f"{args.limit}, but an interval needs at least 2: give more prompts, or raise these flags")
    check_context(model, args.max_prompt_tokens, args.max_new_tokens)

    # An adapter that was never loaded gives "before" and "after" that differ by nothing: refuse
    ids, attention = right_pad([encode_prompt(tokenizer, p["prompt"]) for p in kept[:8]], pad_id)
    ids, attention = ids.to(model.device), attention.to(model.device)
    seen = {}
    for name, stack in stacks.items():
        with use_stack(model, *stack), torch.no_grad():
            seen[name] = logprobs_at(model, ids, attention, attention[:, 1:].bool())
        same = next((other for other in seen if other != name and torch.equal(seen[other], seen[name])), None)
        if same:
            folder = args.policy if name == "ppo" else args.sft
            raise VirtueError(f"{folder}: the logits of {name} equal those of {same}: this adapter was never trained or never loaded; train it again")

    # Every model on the same prompts, from the same random numbers
    state = start(args, out, base=base.info["fingerprint"], prompts=prompts_hash(args.prompts), policy=file_hash(args.policy))
    if state is None:
        return
    columns, details, texts, spoken, virtues = {}, {}, {}, {}, {}
    for name, stack in stacks.items():
        if stack:
            flatten(model, stack, "rollout", model.dtype)
        with use_stack(model, *(("rollout",) if stack else ())):
            dialogues = sample_dialogues(model, tokenizer, kept + probes, seed=args.seed, stage="eval", max_new_tokens=args.max_new_tokens,
                                         temperature=args.temperature, batch_size=args.batch_size,
                                         each_batch=spread(f"dialogues of {name}", state / f"{name}.jsonl"))
        texts[name] = [[m["content"] for m in messages_of(tokenizer, d)[len(d.prompt)::2]] for d in dialogues]
        dialogues = dialogues[:len(kept)]
        spoken[name] = [messages_of(tokenizer, d) for d in dialogues[:args.judge_limit]]

        @functools.cache  # the model may be the reference, and the reference the base
        def read(stack, temperature, dialogues=dialogues):
            return dialogue_logprobs(model, stack, dialogues, pad_id, batch_size=args.batch_size, each_batch=spread(), temperature=temperature)

        (logprobs, mask), (reference, _), (bare, _) = read(stack, args.temperature), read(sft, args.temperature), read((), 1.0)
        raw = score_dialogues(model, reward_models, dialogues, (0, 1, 2), pad_id, batch_size=args.batch_size, each_batch=spread())
        kl = (kl_k1(logprobs, reference) * mask).sum(1)
        gold = [gold_of(d.prompt[0]["content"], t) for d, t in zip(dialogues, texts[name])] if args.prompts == "toy" else None
        details[name] = {"raw": raw.double().numpy(), "standardised": standardize(raw, mean, std).double().numpy(), "kl": kl.double().numpy(),
                         "length": np.array([sum(t.end - t.start for t in d.turns) for d in dialogues], float),
                         "gold": np.array([g.overall for g in gold]) if gold else None, "golds": gold}
        if gold:
            each = [points(d.prompt[0]["content"], t) for d, t in zip(dialogues, texts[name])]
            virtues[name] = {lens: {v: float(np.mean([p[lens][v] for p in each])) for v in VIRTUES} for lens in LENSES}
        patterns = mask_names(texts[name], [slots(d.prompt[0]["content"]) for d in dialogues]) if gold else None
        columns[name] = measure(dialogues, texts[name][:len(kept)], details[name]["raw"], details[name]["standardised"], details[name]["kl"],
                                (bare * mask).sum(1).double().numpy(), gold, patterns)
        if args.eval_rm:
            unseen = score_dialogues(model, eval_models, dialogues, (0, 1, 2), pad_id, batch_size=args.batch_size, each_batch=spread())
            details[name]["eval"] = standardize(unseen, eval_mean, eval_std).double().numpy()
            columns[name] |= {f"eval_reward/{lens}": float(row.mean()) for lens, row in zip(LENSES, details[name]["eval"])}
    names = list(stacks)
    compared = {f"{b} - {a}": differences(details[a], details[b], args.seed) for a, b in zip(names, names[1:])}
    if len(names) > 2:
        compared[f"{names[-1]} - {names[0]}"] = differences(details[names[0]], details[names[-1]], args.seed)

    correct(compared)

    # The judge compares the last model with the one before it, and with the base
    wins = {}
    with use_stack(judge_base.model):
        for other, wording in ((names[-2], "trained"), (names[-2], "other"), (names[0], "trained")):
            key = f"{names[-1]} vs {other}" + (", other wording" if wording == "other" else "")
            if key not in wins:
                wins[key] = {}
                for k, lens in enumerate(LENSES):
                    sides = [[m[:len(kept[i]["prompt"]) + 2 * k + 1] for i, m in enumerate(spoken[name])] for name in (names[-1], other)]
                    golds = [details[name]["golds"] for name in (names[-1], other)]
                    better = np.array([a.lenses[lens] - b.lenses[lens] for a, b in zip(*golds)])[:args.judge_limit] if all(golds) else None
                    wins[key][lens] = win_rates(judge_base.model, judge_base.tokenizer, *sides, lens, batch_size=args.judge_batch_size,
                                                wording=wording, each_batch=spread(f"judge {lens}", state / f"log-odds-{len(wins)}-{lens}.jsonl"), gold=better)
    curve = curve_of(rollouts, gold_of if args.prompts == trained["settings"]["prompts"] == "toy" else None, metrics, kept_at)
    warned = warnings_of(columns, compared, wins, facts)
    warned += [{"about": "other", "text": text} for text in doubts(trained["extra"])]

    # Save and show
    samples = [{"id": p["id"], "prompt": p["prompt"], **{name: {
        "turns": dict(zip(LENSES, texts[name][i])),
        **({"scores": details[name]["standardised"][:, i], "raw_scores": details[name]["raw"][:, i]} if i < len(kept) else {}),
        **({"gold": details[name]["golds"][i]._asdict()} if i < len(kept) and details[name]["golds"] else {})} for name in names}}
        for i, p in enumerate(kept + probes)]
    write_jsonl(out / "samples.jsonl", samples)
    scores = {"prompts": len(kept), "prompts_too_long": len(prompts) - len(kept), "seed": args.seed,
              "models": columns, "differences": compared, "wins": wins, "virtues": virtues, "curve": curve, "warnings": warned,
              "judge_test": judge_tests(trained["extra"]),
              "reward_models": facts, "commands": list(dict.fromkeys(map(html.command_line, made_by(args.policy, args.sft, args.rm, args.eval_rm)))),
              "interval": "paired bootstrap over prompts, 95 %, 2000 resamples; p: permutation test, 10000 sign flips; p_holm: Holm over all rows and pairs"}
    write_json(out / "scores.json", scores)
    write_manifest(out, stage="eval", seed=args.seed, settings=settings_of(args), parents={**parents, "policy": args.policy}, extra={}, **known)
    barrier()  # every process reads back what rank 0 wrote
    as_read = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    write_atomic(out / "report.html", html.render(as_read, [r for _, r in read_jsonl(out / "samples.jsonl")], metrics, read_manifest(out)).encode())
    finish(out)
    print(f"{len(kept)} held-out prompts, seed {args.seed}\n\n{table(columns)}\n")
    for pair, rows in compared.items():
        for key, found in rows.items():
            print(f"{pair:>12}  {key:26} {found['difference']:+.3f}  [{found['low']:+.3f}, {found['high']:+.3f}]")
    for pair, lenses in wins.items():
        print(f"judge, {pair}: " + ", ".join(f"{lens} preferred on {w['rate']:.0%} [{w['low']:.0%}, {w['high']:.0%}] of {w['pairs']}"
                                             for lens, w in lenses.items() if w))
    for warning in warned:
        print(f"warning: {warning['text']}")
    if not plots.available():
        print(NO_FIGURES)
    print("The raw Score's std holds the reward models' arbitrary offsets; the standardised one does not.\n")
    shown = list(range(min(args.show, len(kept)))) + list(range(len(kept), len(kept) + len(probes)))
    for i in shown:
        print(side_by_side((kept + probes)[i]["prompt"][-1]["content"], {name: texts[name][i] for name in names}), end="\n\n")
    print(f"wrote report.html, scores.json and samples.jsonl in {out}{used(base.model.device)}")


def evaluate_judge(args):
    import numpy as np
    from virtue import VirtueError
    from virtue.plumbing.artefacts import sha256_file, write_json
    from virtue.plumbing.records import read_pairs
    from virtue.ethics import LENSES, VIRTUES
    from virtue.evaluation.feedback import agreement, truth, worth
    from virtue.judge import judge_log_odds, label_ids, pair_fits, unanswered
    from virtue.plumbing.memory import used
    from virtue.plumbing.resume import finish, may_write, spread, start

    pairs, skipped = read_pairs(args.pairs, args.limit)
    out = may_write(args, args.out)
    if preview(args, {"pairs": f"{args.pairs}, {len(pairs)} pairs, {int(skipped)} passed over"}, "judge.json",
               judging=dict(rows=args.batch_size, tokens=600 + max((sum(len(m["content"]) for side in ("chosen", "rejected") for m in p[side])
                                                                    for p in pairs), default=0) // 3)):  # a token has about three characters
        return
    base = open_base(args)
    label_ids(base.tokenizer)
    kept = [p for p in pairs if pair_fits(base.model, base.tokenizer, p["chosen"], p["rejected"], p["lens"])]
    if len(kept) < 2:
        raise VirtueError(f"{args.pairs}: {len(kept)} pairs are left ({int(skipped)} passed over, {len(pairs) - len(kept)} too long): "
                          "give more pairs, or raise --limit")
    state = start(args, out, base=base.info["fingerprint"], pairs=sha256_file(args.pairs))
    if state is None:
        return
    result = {"pairs": len(kept), "skipped": int(skipped), "too_long": len(pairs) - len(kept), "wording": args.wording, "model": args.model}
    for lens in LENSES:
        of_lens = [p for p in kept if p["lens"] == lens]
        if len(of_lens) < 2:
            continue
        odds, mass = judge_log_odds(base.model, base.tokenizer, [(p["chosen"], p["rejected"]) for p in of_lens], lens, args.batch_size,
                                  wording=args.wording, each_batch=spread(f"judge {lens}", state / f"log-odds-{lens}.jsonl"))
        truths = [truth(p) for p in of_lens]
        if all(truths):
            signs = {name: np.array([t[name] for t in truths]) for name in (*VIRTUES, "overall")}
        else:
            signs = {"overall": np.ones(len(of_lens))}
        result[lens] = {"against": "gold" if all(truths) else "the file's choice", "label_mass": mass, **agreement(odds, signs)}

    write_json(out / "judge.json", result)
    finish(out)
    print(f"{len(kept)} pairs ({int(skipped)} passed over, {len(pairs) - len(kept)} too long), judge {args.model}, "
          f"{args.wording} wording" + f"\npassed over: {skipped}" * bool(skipped))
    for lens in LENSES:
        if lens in result:
            found = result[lens]
            print(f"\n{lens}, against {found['against']}; right on")
            for name, r in found["agreement"].items():
                print(f"  {name:12}" + (f"{r['share']:.1%} [{r['low']:.1%}, {r['high']:.1%}] of {r['n']}" if r["share"] is not None else "too few pairs decide"))
            halo = "n/a" if found["halo"] is None else f"{found['halo']:.2f}"
            if unanswered(found["label_mass"]):
                print(f"  warning: {unanswered(found['label_mass'])}")
            print(f"  correlation between virtues (halo) {halo}\n  {worth(found)}")
    print(f"\nwrote judge.json in {out}{used(base.model.device)}")


def evaluate_rewards(args):
    import numpy as np
    import torch
    from virtue import VirtueError
    from virtue.plumbing.artefacts import check_made_by, data_hash, file_hash, read_manifest, sha256_file, write_json
    from virtue.dialogue import copies_of, encode_conversation, messages_of, pair_rows, right_pad
    from virtue.plumbing.records import check_ids, read_dialogues, read_pairs, read_preferences
    from virtue.ethics import LENSES
    from virtue.lora import use_stack
    from virtue.plumbing.memory import used
    from virtue.models import score_at
    from virtue.preference import accuracy, calibration_bins, calibration_error, log_loss
    from virtue.plumbing.resume import finish, may_write, spread, start
    from virtue.plumbing.artefacts import load_reward_models, load_sft
    from virtue.rollout import score_dialogues
    from virtue.evaluation.stats import rank_correlation
    from virtue.evaluation.textstats import degenerate

    # Build
    data = {lens: read_preferences(args.data / f"{lens}.jsonl", lens) for lens in LENSES}
    dialogues = read_dialogues(args.data / "dialogues.jsonl")
    external, skipped = read_pairs(args.pairs, args.limit) if args.pairs else ([], 0)
    if skipped:
        print(f"{args.pairs}: {int(skipped)} pairs passed over: {skipped}")
    out = may_write(args, args.out, [args.rm, args.data, args.sft])
    if preview(args, {"data": f"{args.data}, {len(dialogues)} dialogues", **{f"pairs of {lens}": len(of_lens) for lens, of_lens in data.items()},
                      **({"pairs": f"{args.pairs}, {len(external)}"} if args.pairs else {})}, "rewards.json",
               scoring=dict(rows=args.batch_size, tokens=max((len(d.ids) for d in dialogues), default=0))):
        return
    base = open_base(args)
    model, tokenizer = base.model, base.tokenizer
    check_ids(dialogues, model.config.vocab_size, args.data)
    known = dict(base=base.info, template=base.template)
    check_made_by(args.data, base.info, base.template, args.sft)
    sft, parents = load_sft(args.sft, model, **known)
    reward_models, mean, std = load_reward_models(args.rm, model, sft, parents, **known)
    settings = read_manifest(args.rm / "action", "rm")["settings"]
    unseen = held_out_ids((d.id for d in dialogues), settings["seed"], settings["held_out"])
    held_out = [d for d in dialogues if d.id in unseen]
    limit = model.config.max_position_embeddings
    if bare := [lens for lens in LENSES if len(held_out) < 3 or all(r["id"] not in unseen for r in data[lens])]:
        raise VirtueError(f"{args.data}: no pair of lens {bare[0]} was held out from {args.rm}: give the preferences that it was trained on")
    if start(args, out, base=base.info["fingerprint"], data=data_hash(args.data, [*(f"{lens}.jsonl" for lens in LENSES), "dialogues.jsonl"]),
             pairs=sha256_file(args.pairs) if args.pairs else None, **{lens: file_hash(args.rm / lens) for lens in LENSES}) is None:
        return

    @torch.no_grad()
    def score(k, rows):
        """Standardised scores (n,) at the end of rows of ids; NaN where one exceeds the context."""
        stack, head = reward_models[k]
        result = torch.full((len(rows),), float("nan"))
        order = sorted((i for i in range(len(rows)) if len(rows[i]) <= limit), key=lambda i: len(rows[i]))
        with use_stack(model, *stack):
            for begin in progress(range(0, len(order), args.batch_size), f"score {LENSES[k]}"):
                batch = order[begin:begin + args.batch_size]
                ids, attention = right_pad([rows[i] for i in batch], tokenizer.pad_token_id)
                last = attention.long().sum(1, keepdim=True) - 1
                result[batch] = score_at(model, head, ids.to(model.device), attention.to(model.device), last.to(model.device))[:, 0].cpu()
        return (result - mean[k]) / std[k]

    def encode(conversations):
        return [encode_conversation(tokenizer, c)[0] for c in conversations]

    result, copies = {}, copies_of(dialogues)
    for k, lens in enumerate(LENSES):
        # 1. Held-out pairs: accuracy and calibration
        pairs = [r for r in data[lens] if r["id"] in unseen]
        sides = zip(*(pair_rows(tokenizer, r, copies.get(r["id"], ()), lens)[0] for r in pairs))
        chosen, rejected = (score(k, rows) for rows in sides)
        margins = (chosen - rejected) * std[k]
        known_margins = margins[~margins.isnan()]
        labels = torch.tensor([r["label"] for r in pairs])[~margins.isnan()]
        if not (labels != 0.5).any():
            raise VirtueError(f"{args.data}: of {len(pairs)} held-out pairs of lens {lens}, {len(labels)} fit the "
                              "model's context, and none has a label other than 0.5: give preferences that decide")
        found = {"pairs": len(known_margins), "accuracy": accuracy(known_margins, labels),
                 "log_loss": log_loss(known_margins, labels),
                 "calibration_error": calibration_error(known_margins.sigmoid(), labels), "calibration": calibration_bins(known_margins.sigmoid(), labels)}
        # 2. Score against length, on dialogues as sampled
        scores = score_dialogues(model, [reward_models[k]], held_out, [k], tokenizer.pad_token_id, batch_size=args.batch_size, each_batch=spread())[0]
        correlation = rank_correlation(np.array([d.turns[k].end - d.turns[k].start for d in held_out]), scores.double().numpy())
        found["length_correlation"] = correlation if np.isfinite(correlation) else None  # all of one length
        # 3. Degenerate answers in the place of the lens's turn
        chosen = [messages_of(tokenizer, d, turns=k + 1) for d in held_out[:32] if not d.turns[k].truncated]
        variants = {}
        for messages in chosen:
            for kind, text in {"as sampled": messages[-1]["content"], **degenerate(messages[-2]["content"], messages[-1]["content"])}.items():
                variants.setdefault(kind, []).append([*messages[:-1], {"role": "assistant", "content": text}])
        means = {kind: score(k, encode(conversations)).nanmean().item() for kind, conversations in variants.items()}
        found["degenerate"] = {kind: value for kind, value in means.items() if np.isfinite(value)}  # none where no turn ended, or fits
        # 4. Any external preference file, at its last answer
        if external:
            chosen, rejected = (score(k, encode(p[side] for p in external)) for side in ("chosen", "rejected"))
            margins = chosen - rejected
            judged = margins[~margins.isnan()]
            found["external"] = {"pairs": len(judged), "too_long": len(margins) - len(judged), "skipped": int(skipped),
                                 "accuracy": accuracy(judged, torch.ones(len(judged))) if len(judged) else None}
        result[lens] = found

    write_json(out / "rewards.json", result)
    finish(out)
    for lens, found in result.items():
        print(f"\n{lens}: {found['pairs']} held-out pairs, accuracy {found['accuracy']:.3f}, log-loss {found['log_loss']:.3f}, calibration error "
              f"{found['calibration_error']:.3f}; rank correlation of score and length "
              + ("n/a" if found["length_correlation"] is None else f"{found['length_correlation']:+.2f}"))
        print("  predicted -> judged: " + ", ".join(f"{b['predicted']:.2f} -> {b['label']:.2f} ({b['pairs']})" for b in found["calibration"]))
        print("  standardised score: " + ", ".join(f"{kind} {value:+.2f}" for kind, value in found["degenerate"].items()))
        paid = [kind for kind, value in found["degenerate"].items() if kind != "as sampled" and value >= found["degenerate"].get("as sampled", np.inf)]
        if paid:
            print(f"warning: {lens}: pays {', '.join(paid)} as well as real answers: PPO may find out")
        if "external" in found:
            print(f"  {args.pairs}: " + ("no pair fits" if found["external"]["accuracy"] is None else
                                         f"accuracy {found['external']['accuracy']:.3f} on {found['external']['pairs']} pairs"))
    print(f"\nwrote rewards.json in {out}{used(base.model.device)}")


def best_of_n(args):
    import numpy as np
    import torch
    from virtue import AGGREGATORS, VirtueError
    from virtue.evaluation import plots
    from virtue.plumbing.artefacts import file_hash, prompts_hash, write_atomic, write_json
    from virtue.dialogue import messages_of
    from virtue.plumbing.records import load_prompts
    from virtue.ensemble import aggregate, standardize
    from virtue.ethics import LENSES
    from virtue.evaluation.feedback import versus
    from virtue.generate import check_context, fits, longest, sample_dialogues
    from virtue.lora import flatten, use_stack
    from virtue.plumbing.memory import used
    from virtue.plumbing.resume import finish, may_write, spread, start
    from virtue.plumbing.artefacts import load_reward_models, load_sft
    from virtue.rollout import score_dialogues
    from virtue.evaluation.stats import best_of_n as estimate, best_of_n_kl, paired_bootstrap
    from virtue.toy.gold import gold as gold_of

    # Build
    prompts, length = load_prompts(args.prompts, "eval", args.limit), longest(args.max_prompt_tokens, args.max_new_tokens)
    out = may_write(args, args.out, [args.rm, args.sft])
    if preview(args, {"prompts": f"{args.prompts}, {len(prompts)} records"}, "best_of_n.json, best_of_n.svg", flat=[["sft"]],
               sampling=dict(rows=min(args.batch_size, len(prompts)), tokens=length, new=args.max_new_tokens),
               **({"judging": dict(rows=args.judge_batch_size, tokens=2 * length + 600)} if args.judge_limit else {})):
        return
    base = open_base(args)
    model, tokenizer = base.model, base.tokenizer
    known = dict(base=base.info, template=base.template)
    sft, parents = load_sft(args.sft, model, **known)
    reward_models, mean, std = load_reward_models(args.rm, model, sft, parents, **known)
    kept = [p for p in prompts if fits(tokenizer, p["prompt"], args.max_prompt_tokens)]
    if len(kept) < 2:
        raise VirtueError(f"{args.prompts}: {len(kept)} held-out prompts fit into --max-prompt-tokens {args.max_prompt_tokens}: give more")
    check_context(model, args.max_prompt_tokens, args.max_new_tokens)

    # n dialogues for each prompt, scored
    state = start(args, out, base=base.info["fingerprint"], prompts=prompts_hash(args.prompts), **{lens: file_hash(args.rm / lens) for lens in LENSES})
    if state is None:
        return
    if sft:
        flatten(model, sft, "rollout", model.dtype)
    scores, golds, spoken, judged = [], [], [], kept[:args.judge_limit]
    for copy in range(args.n + bool(judged)):  # the last: what the judge compares the others with
        with use_stack(model, *(("rollout",) if sft else ())):
            dialogues = sample_dialogues(model, tokenizer, kept if copy < args.n else judged, seed=args.seed, stage="best-of-n", copy=copy, max_new_tokens=args.max_new_tokens,
                                         temperature=args.temperature, batch_size=args.batch_size,
                                         each_batch=spread(f"answers {copy + 1} of {args.n + bool(judged)}", state / f"{copy}.jsonl"))
        spoken.append([messages_of(tokenizer, d) for d in dialogues[:len(judged)]])
        if copy == args.n:
            break
        scores.append(standardize(score_dialogues(model, reward_models, dialogues, (0, 1, 2), tokenizer.pad_token_id, batch_size=args.batch_size, each_batch=spread()), mean, std))
        if args.prompts == "toy":
            golds.append([gold_of(d.prompt[0]["content"], [m["content"] for m in messages_of(tokenizer, d)[1::2]]).overall for d in dialogues])
    scores = torch.stack(scores, 2)  # (K, P, n)
    gold = np.array(golds).T if golds else None  # (P, n)
    average = scores.mean(0).double().numpy()
    with use_stack(model):  # P(better than one more answer of the model), mean of virtues, orders and lenses: (prompts judged, n)
        wins, which = versus(model, tokenizer, spoken[:-1], spoken[-1], batch_size=args.judge_batch_size, 
                             each_batch=lambda lens: spread(f"judge {lens}", state / f"log-odds-{lens}.jsonl")) if judged else (None, [])

    # What the best of m would be worth, m = 1, 2, 4, ... n
    sizes = [m for m in (2 ** i for i in range(20)) if m <= args.n]
    rows = []
    for name in AGGREGATORS:
        if name == "weighted":  # without weights it is the mean
            continue
        proxy = aggregate(scores.flatten(1), name, **aggregator_settings(args)).view(scores.shape[1:]).double().numpy()
        for m in sizes:
            row = {"aggregator": name, "n": m, "kl_bound": best_of_n_kl(m), "reward": estimate(proxy, average, m)}
            if gold is not None:
                each = np.array([estimate(p[None], g[None], m) for p, g in zip(proxy, gold)])
                row |= dict(zip(("gold", "low", "high"), paired_bootstrap(np.zeros(len(each)), each, resamples=2000, seed=args.seed)))
            if len(which) > 1:
                each = np.array([estimate(p[None], w[None], m) for p, w in zip(proxy[which], wins)])
                row |= dict(zip(("judge", "judge_low", "judge_high"), paired_bootstrap(np.zeros(len(each)), each, resamples=2000, seed=args.seed)))
            rows.append(row)

    # Save and show
    write_json(out / "best_of_n.json", {"prompts": len(kept), "judged": len(which), "n": args.n, "seed": args.seed, "rows": rows})
    if plots.available():
        write_atomic(out / "best_of_n.svg", plots.best_of_n(rows).encode())
    finish(out)
    if not plots.available():
        print(NO_FIGURES)
    for what, prompts, title in (("gold", len(kept), "gold"), ("judge", len(which), "the judge's P(better than another answer of the same model)"), ("reward", len(kept), "mean standardised reward")):
        if what in rows[0]:
            print(f"{title}: of the best of n, {prompts} held-out prompts, {args.n} answers each\n{'':10}" + "".join(f"{m:>8}" for m in sizes))
            for name in dict.fromkeys(row["aggregator"] for row in rows):
                print(f"{name:10}" + "".join(f"{row[what]:8.3f}" for row in rows if row["aggregator"] == name))
    print(f"wrote best_of_n.json in {out}{used(base.model.device)}")


if __name__ == "__main__":
    run_main(main)
