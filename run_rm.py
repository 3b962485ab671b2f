"""Train the reward models: one for each lens, a LoRA adapter and a scalar head on the shared base.

  python run_rm.py --data runs/demo/preferences --sft runs/demo/sft --out runs/demo/rm
  python run_rm.py --data runs/demo/preferences --sft runs/demo/sft --lens motivation --merge --out runs/rm-m
  python run_rm.py --data runs/hh --lens action --pairs harmless-base.jsonl.gz --out runs/rm-people     # what people chose
  python run_rm.py --data runs/7b/preferences --out runs/7b/rm --quantize nf4 --dtype fp16 --labels hard --batch-size 20 --accumulation 16 \\
      --epochs 2 --lr 1.41e-5 --max-tokens 100 --over-long cut     # the study's values

Pairwise (Bradley-Terry) loss on the judge's probability (soft) or its choice (hard). Every model reads
a dialogue up to the end of its lens's turn. Each lens goes to its own folder under --out, with its
head and its score's mean and std on held-out, unfiltered dialogues of the starting policy. --merge
also writes the merged model: base, SFT and reward adapter folded together, for publication only
(never run PPO on reward models merged into 4-bit weights: rounding erases light fine-tunes).
"""
from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from virtue.plumbing.flags import (add_common_flags, add_lora_flags, add_training_flags, fraction,
                                   lora_settings, make_parser, parse_with_parent, positive_int)
from virtue.plumbing.loading import open_base
from virtue.plumbing.preview import preview
from virtue.plumbing.runtime import MetricsLog, check_finite, progress, run_main
from virtue.randomness import held_out_ids, stream, torch_seed


def parse(argv):
    from virtue.ethics import LENSES
    parser = make_parser(__doc__)
    add_common_flags(parser)
    group = parser.add_argument_group("data").add_argument
    group("--data", type=Path, required=True, help="folder written by run_data.py preferences")
    group("--sft", type=Path, help="SFT adapter below the reward models: the one that answered (the study: none)")
    group("--lens", choices=(*LENSES, "all"), default="all", help="train one lens, or all three on one loaded base")
    group("--pairs", type=Path,
          help="preferences to train the one --lens on instead, as hard labels: hh-rlhf's, TRL's, ultrafeedback's, "
               "ShareGPT's, PKU's, the HHH evaluation's or the study's own (README names all forms), .jsonl, .gz or "
               "parquet; --data still gives the dialogues for the score statistics")
    group("--labels", choices=("soft", "hard"), default="soft", help="target: the judge's probability, or its choice (the study: hard)")
    group("--held-out", type=fraction, default=0.15, help="share of prompts kept for accuracy, calibration and score statistics")
    group("--max-tokens", type=positive_int, default=1024, help="longer conversations are over-long (the study: 100, cut)")
    group("--over-long", choices=("drop", "cut"), default="drop", help="drop and count over-long pairs, or cut their end as the study did "
                                                                                   "(to reproduce it: score statistics and PPO still read whole dialogues)")
    group("--share", choices=("all", "first", "second"), default="all",
          help="prompts to train on; first and second are disjoint halves: an evaluation model takes the half that PPO's did not")
    group("--pool", action="store_true", help="one model trained on the pairs of all three lenses, saved under each lens")
    group("--label-noise", type=fraction, default=0.0, help="share of training pairs whose label is turned round, to study a worse judge")
    group("--merge", action="store_true", help="also write the merged model, as MistralForSequenceClassification")
    add_lora_flags(parser, rank=16, alpha=32)
    add_training_flags(parser, lr=2e-3, epochs=5, batch_size=8, study={"lr": "1.41e-5", "epochs": "2", "batch_size": "20", "accumulation": "16"})
    return parse_with_parent(parser, argv, "preferences", "data")


def main(argv=None):
    args = parse(argv)
    import torch
    from virtue import VirtueError
    from virtue.plumbing.artefacts import check_made_by, data_hash, load_artifact, save_artifact, sha256_file
    from virtue.dialogue import buckets, copies_of, pair_rows, right_pad
    from virtue.dialogue import prompt_record
    from virtue.plumbing.records import check_ids, read_dialogues, read_pairs, read_preferences
    from virtue.ethics import LENSES
    from virtue.evaluation.feedback import doubts, judge_tests
    from virtue.lora import adapter_parameters, add_adapter, use_stack
    from virtue.plumbing.memory import used
    from virtue.models import ScalarHead, score_at
    from virtue.preference import accuracy, calibration_error, log_loss, pairwise_loss
    from virtue.evaluation.stats import t_interval
    from virtue.plumbing.parallel import share, sum_gradients, total as over_ranks
    from virtue.plumbing.resume import finish, load_checkpoint, may_write, save_checkpoint, settings_of, spread, start
    from virtue.plumbing.artefacts import load_sft
    from virtue.rollout import score_dialogues

    # Build
    lenses = LENSES if args.lens == "all" else (args.lens,)
    if args.pool and args.lens != "all":
        raise VirtueError(f"--pool trains one model on all three lenses: leave --lens {args.lens} out")
    if args.label_noise >= 0.5:
        raise VirtueError(f"--label-noise {args.label_noise}: half of the labels turned leaves nothing to learn: give less than 0.5")
    if args.pairs and args.lens == "all":
        raise VirtueError(f"--pairs {args.pairs} trains one reward model: give the --lens that it stands for")
    if args.pairs:
        found, skipped = read_pairs(args.pairs, lens=args.lens)
        if skipped:
            print(f"{args.pairs}: {int(skipped)} pairs passed over: {skipped}")
        other = {pair["lens"] for pair in found} - {args.lens}
        if other:
            raise VirtueError(f"{args.pairs}: holds pairs of the lens {min(other)} where --lens "
                              f"{args.lens} is to be trained: give the file of that lens")
        data = {args.lens: [{**pair, "id": prompt_record(pair["chosen"][:-1])["id"], "label": 1.0} for pair in found]}
    else:
        data = {lens: read_preferences(args.data / f"{lens}.jsonl", lens) for lens in lenses}
    dialogues = read_dialogues(args.data / "dialogues.jsonl")
    for lens in lenses:
        may_write(args, args.out / lens, [args.data, args.sft])
    if preview(args, {"data": f"{args.data}, {len(dialogues)} dialogues", **{f"pairs of {lens}": len(of_lens) for lens, of_lens in data.items()}},
               f"{', '.join(lenses)}: each adapter, metrics.jsonl{', merged/' if args.merge else ''}", trained=["rm"], flat=[["rm"]] * (0 if args.pool else len(lenses) - 1),
               update=dict(rows=2 * args.batch_size, tokens=args.max_tokens, positions=0, stacks=1)):
        return
    base = open_base(args)
    model, tokenizer = base.model, base.tokenizer
    device = model.device
    check_ids(dialogues, model.config.vocab_size, args.data)
    made = check_made_by(args.data, base.info, base.template, args.sft)
    sft, parents = load_sft(args.sft, model, base=base.info, template=base.template)
    tests = {} if args.pairs else judge_tests(made["extra"])  # of the judge whose labels are learned

    unseen = held_out_ids((d.id for d in dialogues), args.seed, args.held_out)
    held_out_dialogues = [d for d in dialogues if d.id in unseen]
    if args.pairs:
        unseen |= held_out_ids((r["id"] for r in data[args.lens]), args.seed, args.held_out)
    # 1. Pairs as tokens, (chosen ids, rejected ids, P(chosen better), record id), by lens and by whether they are held out
    pairs = {lens: ([], []) for lens in lenses}
    over_long, sampled = dict.fromkeys(lenses, 0), Counter()
    copies = {} if args.pairs else copies_of(dialogues)
    most = min(args.max_tokens, model.config.max_position_embeddings)  # no position lies beyond
    for lens in lenses:
        for r in data[lens]:
            if args.share != "all" and ("first", "second")[int(r["id"], 16) % 2] != args.share:
                continue
            rows, as_sampled = pair_rows(tokenizer, r, copies.get(r["id"], ()), lens)
            sampled[as_sampled] += 1
            if max(map(len, rows)) > most:
                over_long[lens] += 1
                rows = [row[:most] for row in rows]
                if args.over_long == "drop" or rows[0] == rows[1]:  # what the cut left may hold no difference
                    continue
            pairs[lens][r["id"] in unseen].append((*rows, r["label"] if args.labels == "soft" else 1.0, r["id"]))
        train, held_out = pairs[lens]
        if not train or not held_out or not held_out_dialogues:
            raise VirtueError(f"{args.data}: {len(train)} pairs to train on and {len(held_out)} held out for lens {lens} "
                              f"({over_long[lens]} beyond {most} tokens, of --max-tokens {args.max_tokens} and the model's context "
                              f"{model.config.max_position_embeddings}): make more preferences, or change --held-out or --max-tokens")
        if all(label == 0.5 for *_, label, _ in held_out):
            raise VirtueError(f"{args.data}: the label of every held-out pair of lens {lens} is 0.5, so nothing can be "
                              "measured: make more preferences, or take another judge")

    if sampled[False] and not args.pairs:
        print(f"{args.data}: {sampled[False]} of {sampled.total()} pairs do not say which dialogues they "
              "are, or have other texts than these: they are encoded anew from their texts")

    if args.label_noise:
        for lens in lenses:
            noise = stream(args.seed, "rm", lens, "noise").random(len(pairs[lens][0])) < args.label_noise
            pairs[lens] = ([(*pair[:2], 1 - pair[2], pair[3]) if turn else pair for pair, turn in zip(pairs[lens][0], noise)], pairs[lens][1])

    summary = []
    for lens in lenses:
        folder = args.out / lens
        state = start(args, folder, [args.out / other for other in lenses[lenses.index(lens) + 1:]], base=base.info["fingerprint"],
                      data=data_hash(args.data, [*(f"{lens}.jsonl" for lens in lenses), "dialogues.jsonl"]),
                      **({"pairs": sha256_file(args.pairs)} if args.pairs else {}))
        name, (train, held_out) = lens, pairs[lens]
        if args.pool:  # one model, trained when its first lens comes by
            name, train = lenses[0], [pair for other in lenses for pair in pairs[other][0]]
        if state is None:  # finished before the run was killed
            if args.pool and name == lens:
                _, head = load_artifact(folder, model, name, stage="rm", base=base.info, template=base.template)
                parameters = list(head.parameters())
            continue
        if name == lens:
            add_adapter(model, name, **lora_settings(args), seed=torch_seed(args.seed, "rm", lens))
            head = ScalarHead(model.config.hidden_size, seed=torch_seed(args.seed, "rm", lens, "head")).to(device)
            parameters = [*adapter_parameters(model, name), *head.parameters()]

        def margins(batch):
            """Score of chosen minus score of rejected, (B,); both sides in one forward pass."""
            tokens, attention = right_pad([side for pair in batch for side in pair[:2]], tokenizer.pad_token_id)
            last = attention.long().sum(1, keepdim=True) - 1
            with use_stack(model, *sft, name):
                scores = score_at(model, head, tokens.to(device), attention.to(device), last.to(device))[:, 0]
            return scores.view(-1, 2).diff(dim=1)[:, 0].neg()

        def targets(batch):
            return torch.tensor([pair[2] for pair in batch], device=device)

        @torch.no_grad()
        def evaluate():
            ordered = sorted(held_out, key=lambda pair: max(map(len, pair[:2])))
            d = torch.cat([margins(ordered[i:i + args.batch_size]) for i in range(0, len(ordered), args.batch_size)]).cpu()
            labels = targets(ordered).cpu()
            losses = pairwise_loss(d, torch.zeros_like(d), labels)
            interval = dict(zip(("log_loss_low", "log_loss_high"), t_interval(losses)[1:])) if len(losses) > 1 else {}
            return {"accuracy": accuracy(d, labels), "log_loss": log_loss(d, labels), **interval,
                    "calibration_error": calibration_error(d.sigmoid(), labels)}

        # 2. Train
        step_size = args.batch_size * args.accumulation
        optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0, fused=device.type == "cuda")
        steps = args.epochs * -(-len(train) // step_size) if name == lens else 0
        end = 0.1 if args.schedule == "linear" else 1.0
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end, max(1, steps - 1))
        log = MetricsLog(folder / "metrics.jsonl")
        done = load_checkpoint(state, parameters if name == lens else [], optimizer, schedule, [log.path])
        if not done:
            result = evaluate()
            log.write({"step": 0, **{f"held_out/{k}": v for k, v in result.items()}})
        step, resumed = 0, done["step"] if done else 0
        with progress(None, f"rm {lens}", total=steps) as bar:
            for epoch in range(args.epochs if name == lens else 0):
                order = stream(args.seed, "rm", lens, epoch).permutation(len(train)).tolist()
                for batch in buckets(order, [max(map(len, pair[:2])) for pair in train], step_size):
                    step += 1
                    bar.update()
                    if step <= resumed:
                        continue
                    started, whole, total = time.perf_counter(), [train[i] for i in batch], 0.0
                    mine = share(whole)
                    for i in range(0, len(mine), args.batch_size):  # accumulation: normalised by the whole step's pairs
                        part = mine[i:i + args.batch_size]
                        d = margins(part)
                        loss = pairwise_loss(d, torch.zeros_like(d), targets(part)).sum() / len(whole)
                        loss.backward()
                        total += loss.item()
                    sum_gradients(parameters)
                    total = over_ranks(torch.tensor(total, dtype=torch.float64)).item()
                    norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                    check_finite(norm, f"rm {lens}, step {step}", "the gradient", "lower --lr", [pair[3] for pair in whole], state)
                    optimizer.step(), optimizer.zero_grad(), schedule.step()
                    log.write({"step": step, "loss/train": total, "grad_norm": norm.item(), "tokens/read": sum(len(side) for pair in whole for side in pair[:2]),
                               "time/seconds": time.perf_counter() - started})
                    bar.set_postfix(loss=f"{total:.3f}", refresh=False)
                    if step % args.save_every == 0:
                        save_checkpoint(state, step, parameters, optimizer, schedule, [log.path])
                if step >= resumed:
                    result = evaluate()
                    log.write({"step": step, "epoch": epoch + 1, **{f"held_out/{k}": v for k, v in result.items()}})

        # 3. Score statistics on held-out, unfiltered dialogues; save
        scores = score_dialogues(model, [((*sft, name), head)], held_out_dialogues, [LENSES.index(lens)], tokenizer.pad_token_id,
                                 batch_size=args.batch_size, each_batch=spread())[0]
        check_finite(scores[None], f"rm {lens}, scores of held-out dialogues", "the score", "lower --lr", [d.id for d in held_out_dialogues], state)
        extra = {"lens": lens, "score_mean": scores.mean().item(), "score_std": scores.std(correction=0).item(),
                 "scored_dialogues": len(scores), "held_out": result, "held_out_pairs": len(held_out), "trained_on": len(train), "over_long": over_long[lens],
                 "data": made["sha256"]}
        extra["judge_test"] = {k: v for k, v in tests.items() if args.pool or k == lens}
        save_artifact(folder, stage="rm", model=model, adapter=name, head=head, base=base.info, template=base.template,
                      parents=parents, seed=args.seed, settings=settings_of(args), extra=extra)
        line = (f"{lens}: {len(train)} pairs ({over_long[lens]} over-long: {args.over_long}), held out {len(held_out)}: accuracy {result['accuracy']:.3f}, "
                f"log-loss {result['log_loss']:.3f}, calibration error {result['calibration_error']:.3f}; "
                f"scores {extra['score_mean']:.3f} +- {extra['score_std']:.3f}; wrote {folder}")
        if args.merge:
            from virtue.plumbing.merge import write_merged
            change = write_merged(folder / "merged", model, tokenizer, (*sft, name), head, held_out_dialogues[:16], LENSES.index(lens))
            line += f"; merged model in {folder / 'merged'}, largest change of score {change:.2g}"
        finish(folder)
        summary += [*(f"warning: {text}" for text in doubts(extra)), line]
    print("\n".join(summary) + used(device))


if __name__ == "__main__":
    run_main(main)
