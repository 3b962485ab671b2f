"""Fine-tune the base on its own revisions: adapter `sft`, loss on the last assistant turn only.

  python run_sft.py --data runs/demo/revisions --out runs/demo/sft
  python run_sft.py --data runs/demo/revisions --out runs/demo/sft --epochs 4 --lr 5e-4
  python run_sft.py --data runs/demo/preferences --out runs/demo/chosen

Bai et al. 2022 (arXiv 2212.08073), section 3.2: learn to answer the prompt with the revised answer at
once. Model, precision and lengths are taken from the data's settings unless given here. (The study had no SFT,
which its report names as one likely cause of the stalemate.)

With a folder of preferences it trains on the chosen dialogues instead, each lens's turn, upon the SFT
adapter that sampled them: adapter `policy`, the baseline that PPO must beat. run_eval.py takes either.
"""
from __future__ import annotations

import time
from pathlib import Path

from virtue.plumbing.flags import (add_common_flags, add_lora_flags, add_training_flags, fraction,
                                   lora_settings, make_parser, parse_with_parent, positive_int)
from virtue.plumbing.loading import open_base
from virtue.plumbing.preview import preview
from virtue.plumbing.runtime import MetricsLog, check_finite, progress, run_main
from virtue.randomness import hold_out, stream, torch_seed


def parse(argv):
    parser = make_parser(__doc__)
    add_common_flags(parser)
    group = parser.add_argument_group("data").add_argument
    group("--data", type=Path, required=True, help="folder written by run_data.py revisions, or preferences")
    group("--sft", type=Path, help="the SFT adapter that sampled the preferences; revisions train one anew")
    group("--held-out", type=fraction, default=0.1, help="share of prompts kept for the held-out loss")
    group("--max-tokens", type=positive_int, default=1024, help="longer conversations are dropped and counted")
    add_lora_flags(parser, rank=16, alpha=32)
    add_training_flags(parser, lr=1e-3, epochs=3, batch_size=16)
    return parse_with_parent(parser, argv, None, "data")


def main(argv=None):
    args = parse(argv)
    import torch
    from virtue import VirtueError
    from virtue.plumbing.artefacts import check_made_by, check_unedited, data_hash, read_manifest, save_artifact
    from virtue.dialogue import buckets, copies_of, encode_conversation, right_pad, sampled_pair
    from virtue.plumbing.records import read_dialogues, read_preferences, read_revisions
    from virtue.ethics import LENSES
    from virtue.evaluation.feedback import doubts, judge_tests
    from virtue.lora import adapter_parameters, add_adapter, use_stack
    from virtue.plumbing.memory import used
    from virtue.models import logprobs_at
    from virtue.plumbing.parallel import share, sum_gradients, total as over_ranks
    from virtue.plumbing.resume import finish, load_checkpoint, may_write, save_checkpoint, settings_of, start
    from virtue.plumbing.artefacts import load_sft
    from virtue.rollout import span_mask

    # Build
    made = read_manifest(args.data)
    chosen = made["stage"] == "preferences"
    if chosen:
        conversations = [(r, (r["id"], lens)) for lens in LENSES
                         for r in read_preferences(args.data / f"{lens}.jsonl", lens)]
        copies = copies_of(read_dialogues(args.data / "dialogues.jsonl"))
    else:
        if made["stage"] != "revisions":
            raise VirtueError(f"{args.data}: of stage {made['stage']!r}: give a folder of revisions or of preferences")
        conversations = [([*r["prompt"], {"role": "assistant", "content": r["revision"]}], (r["id"],)) for r in read_revisions(args.data / "revisions.jsonl")]
    check_unedited(args.data, made)
    out = may_write(args, args.out, [args.data, args.sft])
    if preview(args, {"data": f"{args.data}, {len(conversations)} conversations"}, "adapter, metrics.jsonl", trained=["new"],
               update=dict(rows=args.batch_size, tokens=args.max_tokens, positions=args.batch_size * args.max_tokens, stacks=1)):
        return
    base = open_base(args)
    model, tokenizer = base.model, base.tokenizer
    device = model.device
    name, key, stack, parents = "sft", "sft", ("sft",), {}
    if chosen:
        check_made_by(args.data, base.info, base.template, args.sft)
        below, parents = load_sft(args.sft, model, base=base.info, template=base.template)
        name, key, stack = "policy", "chosen", (*below, "policy")  # random numbers other than those of the SFT below
    add_adapter(model, name, **lora_settings(args), seed=torch_seed(args.seed, key))
    parameters = adapter_parameters(model, name)

    def encode(row, record, side="chosen"):
        """Ids, and the spans of the assistant's turns; of preferences as they were sampled, if known."""
        if chosen and (pair := sampled_pair(tokenizer, row, copies.get(record[0], ()), record[1])):
            dialogue = pair[side == "rejected"]
            return dialogue.ids, [(turn.start, turn.end) for turn in dialogue.turns]
        return encode_conversation(tokenizer, row[side] if chosen else row)

    rows = [(*encode(row, record), record) for row, record in conversations]
    most = min(args.max_tokens, model.config.max_position_embeddings)  # no position lies beyond
    rows = [(ids, spans[-1:], record) for ids, spans, record in rows if len(ids) <= most]  # the last turn is the new one
    held_out, train = hold_out(rows, [prompt for *_, (prompt, *_) in rows], args.held_out, args.seed, key, "split")
    if not held_out or not train:
        raise VirtueError(f"{args.data}: {len(rows)} conversations of at most {most} tokens (--max-tokens, or the model's context) cannot be split by "
                          f"--held-out {args.held_out}: make more data, or change these flags")

    def nll(batch):
        """Sum of -log p over the batch's trained tokens, and their number."""
        ids, attention = right_pad([ids for ids, *_ in batch], tokenizer.pad_token_id)
        mask = span_mask([spans for _, spans, _ in batch], ids.shape[1])
        with use_stack(model, *stack):
            return -logprobs_at(model, ids.to(device), attention.to(device), mask.to(device)).sum(), int(mask.sum())

    @torch.no_grad()
    def evaluate():
        sums = [nll(held_out[i:i + args.batch_size]) for i in range(0, len(held_out), args.batch_size)]
        return sum(loss.item() for loss, _ in sums) / sum(n for _, n in sums)

    # Train
    files = [f"{lens}.jsonl" for lens in LENSES] if chosen else ["revisions.jsonl"]
    state = start(args, out, base=base.info["fingerprint"], data=data_hash(args.data, files))
    if state is None:
        return
    step_size = args.batch_size * args.accumulation
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0, fused=device.type == "cuda")
    steps = args.epochs * -(-len(train) // step_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1 if args.schedule == "linear" else 1.0, max(1, steps - 1))
    log = MetricsLog(out / "metrics.jsonl")
    done = load_checkpoint(state, parameters, optimizer, schedule, [log.path], ["before"])
    before = done["before"] if done else evaluate()
    if not done:
        log.write({"step": 0, "loss/held_out": before})
    step, resumed = 0, done["step"] if done else 0
    with progress(None, "sft", total=steps) as bar:
        for epoch in range(args.epochs):
            order = stream(args.seed, key, epoch).permutation(len(train)).tolist()
            for batch in buckets(order, [len(ids) for ids, *_ in train], step_size):
                step += 1
                bar.update()
                if step <= resumed:
                    continue
                started, whole = time.perf_counter(), [train[i] for i in batch]
                tokens = sum(b - a for _, spans, _ in whole for a, b in spans)
                total = 0.0
                mine = share(whole)
                for i in range(0, len(mine), args.batch_size):  # accumulation: normalised by the whole step's tokens
                    loss = nll(mine[i:i + args.batch_size])[0] / tokens
                    loss.backward()
                    total += loss.item()
                sum_gradients(parameters)
                total = over_ranks(torch.tensor(total, dtype=torch.float64)).item()
                norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                check_finite(norm, f"sft, step {step}", "the gradient", "lower --lr", [" ".join(r) for *_, r in whole], state)
                optimizer.step(), optimizer.zero_grad(), schedule.step()
                log.write({"step": step, "loss/train": total, "grad_norm": norm.item(), "tokens/read": sum(len(ids) for ids, *_ in whole),
                           "time/seconds": time.perf_counter() - started})
                bar.set_postfix(loss=f"{total:.3f}", refresh=False)
                if step % args.save_every == 0:
                    save_checkpoint(state, step, parameters, optimizer, schedule, [log.path], before=before)
            if step >= resumed:
                after = evaluate()
                log.write({"step": step, "epoch": epoch + 1, "loss/held_out": after})

    # Save
    judged = {"judge_test": judge_tests(made["extra"])} if chosen else {}
    save_artifact(out, stage=name, model=model, adapter=name, base=base.info, template=base.template, parents=parents, seed=args.seed,
                  settings=settings_of(args), extra={"held_out_loss": after, "held_out_loss_before": before, "trained_on": len(train), "data": made["sha256"]} | judged)
    finish(out)
    for text in doubts(judged):
        print(f"warning: {text}")
    print(f"sft: {len(train)} {'chosen turns' if chosen else 'revisions'} ({len(conversations) - len(rows)} too long), "
          f"held-out loss {before:.3f} -> {after:.3f} on {len(held_out)}")
    print(f"wrote adapter {name} in {out}{used(device)}")


if __name__ == "__main__":
    run_main(main)
