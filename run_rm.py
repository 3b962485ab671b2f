"""Train the reward models: one for each lens, a LoRA adapter and a scalar head on the shared base.

  python run_rm.py --data runs/demo/preferences --sft runs/demo/sft --out runs/demo/rm
  python run_rm.py --data runs/demo/preferences --sft runs/demo/sft --lens motivation --merge \\
      --out runs/rm-m
  python run_rm.py --data runs/hh --lens action --pairs harmless-base.jsonl.gz \\
      --out runs/rm-people                                                     # what people chose
  python run_rm.py --data runs/7b/preferences --out runs/7b/rm --quantize nf4 --dtype fp16 \\
      --labels hard --batch-size 20 --accumulation 16 --epochs 2 --lr 1.41e-5 --max-tokens 100
                                        # the study's values; the study cut what --max-tokens drops

Pairwise (Bradley-Terry) loss on the judge's probability (soft) or its choice (hard). Every model
reads a dialogue up to the end of its lens's turn. The reward model of each lens is written to its
own folder under --out, with its head and with the mean and std of its scores on held-out,
unfiltered dialogues of the starting policy. --merge also writes the merged model: base, SFT and
reward adapter folded together, for publication only (never run PPO on reward models merged into
4-bit weights: rounding erases light fine-tunes). The loop over batches is `train` in
virtue/plumbing/training.py.
"""
from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from virtue import VirtueError
from virtue.ethics import LENSES
from virtue.plumbing import flags
from virtue.plumbing.runtime import run_main

HELD_OUT = 0.15  # share of prompts kept for accuracy, calibration and score statistics


def parse(argv):
    parser = flags.make_parser(__doc__)
    flags.add_common_flags(parser)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, required=True, help="folder written by run_data.py preferences")
    add("--sft", type=Path,
        help="SFT adapter below the reward models: the one that sampled the answers (the study: "
             "none)")
    add("--lens", choices=(*LENSES, "all"), default="all",
        help="train one lens, or all three on one loaded base")
    add("--pairs", type=Path,
        help="train the one --lens on these pairs instead, as hard labels: a file in any form of "
             "docs/data.md, .jsonl, .gz or parquet; --data still gives the dialogues for the score "
             "statistics")
    add("--labels", choices=("soft", "hard"), default="soft",
        help="target: the judge's probability, or its choice (the study: hard)")
    add("--max-tokens", type=flags.positive_int, default=1024,
        help="pairs with a longer side are dropped and counted (the study: cut at 100)")
    add("--share", choices=("all", "first", "second"), default="all",
        help="prompts to train on; first and second are disjoint halves: train an evaluation model "
             "on the half that PPO's reward models did not use")
    add("--merge", action="store_true",
        help="also write the merged model, as a sequence classifier of one label")
    flags.add_lora_flags(parser, rank=16)
    study = {"lr": "1.41e-5", "epochs": "2", "batch-size": "20", "accumulation": "16"}
    flags.add_training_flags(parser, lr=2e-3, epochs=5, batch_size=8, study=study)
    flags.most_used(parser, "data", "out", "model", "quantize", "dtype", "lens", "lr", "epochs",
                    "batch-size", "rank", "seed", "resume")
    parser.set_defaults(held_out=HELD_OUT)  # run_eval.py reads it among the artefact's settings
    return flags.parse_with_parent(parser, argv, "preferences", "data")


class Pair(NamedTuple):
    """Two dialogues up to the end of the lens's turn, of which one was chosen."""

    rows: list[list[int]]  # token ids: the chosen one, the rejected one
    label: float  # P(chosen is better)
    record: str  # the prompt's id


def read_data(args):
    """{lens: preference records}, of --data or of --pairs."""
    from virtue.dialogue import prompt_record
    from virtue.plumbing import records

    lens = args.lens
    if not args.pairs:
        lenses = LENSES if lens == "all" else (lens,)
        return {k: records.read_preferences(args.data / f"{k}.jsonl", k) for k in lenses}
    if lens == "all":
        raise VirtueError(f"--pairs {args.pairs} trains one reward model: give the --lens that it "
                          "stands for")
    pairs, skipped = records.read_pairs(args.pairs, lens=lens)
    if skipped:
        print(f"{args.pairs}: {int(skipped)} pairs passed over: {skipped}")
    if other := {pair["lens"] for pair in pairs} - {lens}:
        raise VirtueError(f"{args.pairs}: holds pairs of the lens {min(other)} where --lens {lens} "
                          "is to be trained: give the file of that lens")
    return {lens: [{**pair, "id": prompt_record(pair["chosen"][:-1])["id"], "label": 1.0}
                   for pair in pairs]}


class LensPairs(NamedTuple):
    """The pairs of one lens."""

    train: list[Pair]
    held_out: list[Pair]
    over_long: int  # how many were dropped for their length
    anew: int  # how many were encoded from their texts, since they name no sampled dialogues


def encode(args, tokenizer, records, copies, lens, unseen, most):
    """Preference records as `LensPairs`; those whose id is among `unseen` are held out, and those
    with a side of more than `most` tokens are dropped. `copies`: the sampled dialogues by prompt
    id."""
    from virtue.dialogue import pair_rows

    parts, over_long, anew = ([], []), 0, 0
    for record in records:
        half = ("first", "second")[int(record["id"], 16) % 2]
        if args.share not in ("all", half):
            continue
        rows, as_sampled = pair_rows(tokenizer, record, copies.get(record["id"], ()), lens)
        anew += not as_sampled
        if max(map(len, rows)) > most:
            over_long += 1
            continue
        label = record["label"] if args.labels == "soft" else 1.0
        parts[record["id"] in unseen].append(Pair(rows, label, record["id"]))
    return LensPairs(*parts, over_long, anew)


def split(args, base, data, dialogues):
    """{lens: `LensPairs`}, and the dialogues of held-out prompts, by which scores are standardised.
    VirtueError: a side is empty, or no held-out pair is decided."""
    from virtue.dialogue import copies_of
    from virtue.randomness import held_out_ids

    unseen = held_out_ids((d.id for d in dialogues), args.seed, args.held_out)
    scored = [d for d in dialogues if d.id in unseen]
    if args.pairs:
        unseen |= held_out_ids((r["id"] for r in data[args.lens]), args.seed, args.held_out)
    copies = {} if args.pairs else copies_of(dialogues)
    context = base.model.config.max_position_embeddings
    most, pairs = min(args.max_tokens, context), {}
    for lens, records in data.items():
        train, held_out, over_long, _ = pairs[lens] = encode(
            args, base.tokenizer, records, copies, lens, unseen, most)
        if not train or not held_out or not scored:
            raise VirtueError(
                f"{args.data}: {len(train)} pairs to train on and {len(held_out)} held out for "
                f"lens {lens} ({over_long} beyond {most} tokens, of --max-tokens {args.max_tokens} "
                f"and the model's context {context}): make more preferences, or change "
                "--max-tokens, or HELD_OUT in run_rm.py")
        if all(pair.label == 0.5 for pair in held_out):
            raise VirtueError(f"{args.data}: the label of every held-out pair of lens {lens} is "
                              "0.5, so nothing can be measured: make more preferences, or take "
                              "another judge")
    if not args.pairs and (anew := sum(of_lens.anew for of_lens in pairs.values())):
        total = sum(len(p.train) + len(p.held_out) + p.over_long for p in pairs.values())
        print(f"{args.data}: {anew} of {total} pairs are encoded from their texts: they were made "
              "by contrast, do not say which dialogues they are, or have other texts than these")
    return pairs, scored


def margins(model, stack, head, pad_id, pairs):
    """Score of the chosen side less that of the rejected one, (B,), in one forward pass."""
    from virtue import dialogue, lora, models

    ids, attention = dialogue.right_pad([row for pair in pairs for row in pair.rows], pad_id)
    last = attention.long().sum(1, keepdim=True) - 1
    with lora.use_stack(model, *stack):
        inputs = (tensor.to(model.device) for tensor in (ids, attention, last))
        scores = models.score_at(model, head, *inputs)[:, 0]
    chosen, rejected = scores.view(-1, 2).unbind(1)
    return chosen - rejected


def loss(score, pairs):
    """Bradley-Terry loss of each pair, (B,), in nats; ``score(pairs)`` gives their `margins`."""
    import torch
    from virtue.preference import pairwise_loss

    d = score(pairs)
    labels = torch.tensor([pair.label for pair in pairs], device=d.device)
    return pairwise_loss(d, torch.zeros_like(d), labels)


def measure(score, pairs, batch_size):
    """How well margins predict the labels of held-out pairs: accuracy, log-loss in nats with its
    95 % interval (if there are two pairs or more), calibration error."""
    import torch
    from virtue import preference
    from virtue.evaluation.stats import t_interval

    pairs = sorted(pairs, key=lambda pair: max(map(len, pair.rows)))
    with torch.no_grad():
        parts = [score(pairs[i:i + batch_size]) for i in range(0, len(pairs), batch_size)]
    d, labels = torch.cat(parts).cpu(), torch.tensor([pair.label for pair in pairs])
    losses = preference.pairwise_loss(d, torch.zeros_like(d), labels)
    bounds = t_interval(losses)[1:] if len(losses) > 1 else ()
    return {"held_out/accuracy": preference.accuracy(d, labels),
            "held_out/log_loss": preference.log_loss(d, labels),
            **dict(zip(("held_out/log_loss_low", "held_out/log_loss_high"), bounds)),
            "held_out/calibration_error": preference.calibration_error(d.sigmoid(), labels)}


def train_lens(args, base, lens, pairs, scored, state, sft):
    """Trains the adapter of a lens on top of the stack `sft`, and its head; then scores the
    held-out dialogues -> (head, what the artefact records of all this)."""
    from virtue import lora, models, rollout
    from virtue.plumbing import resume, runtime, training
    from virtue.randomness import torch_seed

    model, pad_id, stack = base.model, base.tokenizer.pad_token_id, (*sft, lens)
    seed = torch_seed(args.seed, "rm", lens)
    lora.add_adapter(model, lens, **flags.lora_settings(args), seed=seed)
    # Zeros: no opinion before the first step. A random head's must be unlearned first
    head = models.ScalarHead(model.config.hidden_size).to(model.device)
    parameters = [*lora.adapter_parameters(model, lens), *head.parameters()]
    score = partial(margins, model, stack, head, pad_id)
    _, measures = training.train(
        args, args.out / lens, state, parameters, pairs.train,
        lambda part, step: loss(score, part).sum() / len(step),
        lambda: measure(score, pairs.held_out, args.batch_size),
        name=f"rm {lens}", key=["rm", lens])
    scores = rollout.score_dialogues(model, [(stack, head)], scored, [LENSES.index(lens)], pad_id,
                                     batch_size=args.batch_size, each_batch=resume.spread())[0]
    runtime.check_finite(scores[None], f"rm {lens}, scores of held-out dialogues", "the score",
                         "lower --lr", [d.id for d in scored], state)
    return head, {
        "lens": lens, "score_mean": scores.mean().item(),
        "score_std": scores.std(correction=0).item(), "scored_dialogues": len(scores),
        "held_out": {name.removeprefix("held_out/"): v for name, v in measures.items()},
        "held_out_pairs": len(pairs.held_out), "trained_on": len(pairs.train),
        "over_long": pairs.over_long}


def input_hashes(args, base, lenses):
    """Hashes of all that the reward models are made of, for --resume."""
    from virtue.plumbing.artefacts import data_hash, sha256_file

    files = [*(f"{lens}.jsonl" for lens in lenses), "dialogues.jsonl"]
    of_pairs = {"pairs": sha256_file(args.pairs)} if args.pairs else {}
    return {"base": base.info["fingerprint"], "data": data_hash(args.data, files), **of_pairs}


def summary(lens, extra, folder):
    """One line on a reward model."""
    measures = extra["held_out"]
    return (f"{lens}: {extra['trained_on']} pairs ({extra['over_long']} over-long, dropped), held "
            f"out {extra['held_out_pairs']}: accuracy {measures['accuracy']:.3f}, log-loss "
            f"{measures['log_loss']:.3f}, calibration error {measures['calibration_error']:.3f}; "
            f"scores {extra['score_mean']:.3f} +- {extra['score_std']:.3f}; wrote {folder}")


def main(argv=None):
    args = parse(argv)
    from virtue.evaluation import feedback
    from virtue.plumbing import artefacts, loading, memory, merge, preview, records, resume

    # 1. Data; --dry-run ends here
    data = read_data(args)
    dialogues = records.read_dialogues(args.data / "dialogues.jsonl")
    folders = {lens: args.out / lens for lens in data}
    for folder in folders.values():
        resume.may_write(args, folder, [args.data, args.sft])
    reads = {f"pairs of {lens}": len(data[lens]) for lens in data}
    writes = f"{', '.join(data)}: each adapter, metrics.jsonl{', merged/' if args.merge else ''}"
    update = dict(rows=2 * args.batch_size, tokens=args.max_tokens, positions=0, stacks=1)
    if preview.preview(args, {"data": f"{args.data}, {len(dialogues)} dialogues", **reads}, writes,
                       trained=["rm"], flat=[["rm"]] * (len(data) - 1), update=update):
        return

    # 2. Model and pairs
    base = loading.open_base(args)
    records.check_ids(dialogues, base.model.config.vocab_size, args.data)
    manifest = artefacts.check_made_by(args.data, base.info, base.template, args.sft)
    identity = dict(base=base.info, template=base.template)
    sft, parents = artefacts.load_sft(args.sft, base.model, **identity)
    pairs, scored = split(args, base, data, dialogues)
    tests = {} if args.pairs else feedback.judge_tests(manifest["extra"])

    # 3. Each lens: its adapter and head, trained and saved
    inputs, lines = input_hashes(args, base, data), []
    for lens, folder in folders.items():
        later = [*folders.values()][[*folders].index(lens) + 1:]
        state = resume.start(args, folder, later, **inputs)
        if state is None:  # this lens had come to its end before the run was killed
            continue
        head, extra = train_lens(args, base, lens, pairs[lens], scored, state, sft)
        extra |= {"data": manifest["sha256"],
                  "judge_test": {lens: tests[lens]} if lens in tests else {}}
        artefacts.save_artifact(
            folder, stage="rm", model=base.model, adapter=lens, head=head, **identity,
            parents=parents, seed=args.seed, settings=resume.settings_of(args), extra=extra)
        lines += [*(f"warning: {text}" for text in feedback.doubts(extra)),
                  summary(lens, extra, folder)]
        if args.merge:
            change = merge.write_merged(folder / "merged", base.model, base.tokenizer, (*sft, lens),
                                        head, scored[:16], LENSES.index(lens))
            lines[-1] += (f"; merged model in {folder / 'merged'}, largest change of score "
                          f"{change:.2g}")
        resume.finish(folder)
    print("\n".join(lines) + memory.used(base.model.device))


if __name__ == "__main__":
    run_main(main)
