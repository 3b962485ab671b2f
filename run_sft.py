"""Fine-tune the base on its own revisions: adapter `sft`, loss on the last assistant turn only.

  python run_sft.py --data runs/demo/revisions --out runs/demo/sft
  python run_sft.py --data runs/demo/revisions --out runs/demo/sft --epochs 4 --lr 5e-4
  python run_sft.py --data runs/demo/preferences --out runs/demo/chosen

As in Bai et al. 2022 (arXiv 2212.08073), section 3.2, the model learns to answer the prompt with
the revised answer at once. Model, precision and lengths are taken from the data's settings unless
given here. (The study had no SFT, which its report names as one likely cause of the stalemate.)

With a folder of preferences it trains on the chosen dialogues instead, on the turn of each lens.
The new adapter, `policy`, goes on top of the SFT adapter that sampled the dialogues; it is the
baseline that PPO must beat. run_eval.py takes it in the place of PPO's policy. The loop over
batches is `train` in virtue/plumbing/training.py.
"""
from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from virtue import VirtueError
from virtue.plumbing import flags
from virtue.plumbing.runtime import run_main


def parse(argv):
    parser = flags.make_parser(__doc__)
    flags.add_common_flags(parser)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, required=True,
        help="folder written by run_data.py revisions, or preferences")
    add("--sft", type=Path,
        help="the SFT adapter that sampled the preferences; on revisions a new one is trained")
    add("--held-out", type=flags.fraction, default=0.1,
        help="share of prompts kept for the held-out loss")
    add("--max-tokens", type=flags.positive_int, default=1024,
        help="longer conversations are dropped and counted")
    flags.add_lora_flags(parser, rank=16)
    flags.add_training_flags(parser, lr=1e-3, epochs=3, batch_size=16)
    flags.most_used(parser, "data", "out", "model", "quantize", "dtype", "lr", "epochs",
                    "batch-size", "rank", "seed", "resume")
    return flags.parse_with_parent(parser, argv, None, "data")


class Example(NamedTuple):
    """One conversation, whose last assistant turn is learned."""

    rows: list[list[int]]  # its token ids, as the only row
    spans: list[list[tuple[int, int]]]  # of that row: where the turn starts and ends, with EOS
    prompt: str  # id
    record: str  # what errors call it


def read_data(folder, stage):
    """The records of a folder of revisions, or of preferences (all lenses, one after the other);
    the dialogues that were sampled, by prompt id; the names of the files with the records."""
    from virtue.dialogue import copies_of
    from virtue.ethics import LENSES
    from virtue.plumbing import records

    if stage == "revisions":
        return records.read_revisions(folder / "revisions.jsonl"), {}, ["revisions.jsonl"]
    if stage != "preferences":
        raise VirtueError(f"{folder}: of stage {stage!r}: give a folder of revisions or of "
                          "preferences")
    files = [f"{lens}.jsonl" for lens in LENSES]
    pairs = [pair for lens, file in zip(LENSES, files)
             for pair in records.read_preferences(folder / file, lens)]
    return pairs, copies_of(records.read_dialogues(folder / "dialogues.jsonl")), files


def encode(tokenizer, record, copies):
    """A record's `Example`: prompt and revision, or the chosen dialogue, in the very tokens that
    were sampled if its `copies` still have its texts."""
    from virtue import dialogue

    if "revision" in record:
        messages = [*record["prompt"], {"role": "assistant", "content": record["revision"]}]
        ids, spans = dialogue.encode_conversation(tokenizer, messages)
        return Example([ids], [spans[-1:]], record["id"], record["id"])
    if pair := dialogue.sampled_pair(tokenizer, record, copies, record["lens"]):
        ids, span = pair[0].ids, pair[0].turns[-1][:2]
    else:
        ids, (*_, span) = dialogue.encode_conversation(tokenizer, record["chosen"])
    return Example([ids], [[span]], record["id"], f"{record['id']} {record['lens']}")


def tokens(batch):
    """How many tokens of a batch are learned."""
    return sum(end - start for example in batch for (start, end), in example.spans)


def nll(model, stack, pad_id, batch):
    """Sum of -log p over the learned tokens of a batch, in nats: a scalar."""
    from virtue import dialogue, lora, models, rollout

    ids, attention = dialogue.right_pad([row for e in batch for row in e.rows], pad_id)
    mask = rollout.span_mask([spans for e in batch for spans in e.spans], ids.shape[1])
    inputs = [tensor.to(model.device) for tensor in (ids, attention, mask)]
    with lora.use_stack(model, *stack):
        return -models.logprobs_at(model, *inputs).sum()


def held_out_loss(nll, held_out, batch_size):
    """Mean of -log p over all learned tokens of the held-out examples, in nats."""
    import torch

    with torch.no_grad():
        sums = [nll(held_out[i:i + batch_size]) for i in range(0, len(held_out), batch_size)]
    return sum(loss.item() for loss in sums) / tokens(held_out)


def split(args, base, records, copies, key):
    """The records as examples: (held-out ones, those to train on, how many were too long and
    dropped). All examples of one prompt fall on the same side. VirtueError: a side is empty."""
    from virtue.randomness import hold_out

    most = min(args.max_tokens, base.model.config.max_position_embeddings)
    examples = [encode(base.tokenizer, r, copies.get(r["id"], ())) for r in records]
    fitting = [example for example in examples if max(map(len, example.rows)) <= most]
    prompts = [example.prompt for example in fitting]
    held_out, train = hold_out(fitting, prompts, args.held_out, args.seed, key, "split")
    if not held_out or not train:
        raise VirtueError(
            f"{args.data}: {len(fitting)} conversations of at most {most} tokens (--max-tokens, or "
            f"the model's context) cannot be split by --held-out {args.held_out}: make more data, "
            "or change these flags")
    return held_out, train, len(examples) - len(fitting)


def add_adapter(args, base, name, key):
    """Puts the adapter that is to be trained on the base; a policy goes on top of the SFT adapter
    that sampled the preferences -> (the stack of adapters, the parents that the artefact records,
    the parameters to train)."""
    from virtue import lora
    from virtue.plumbing import artefacts
    from virtue.randomness import torch_seed

    below, parents = (), {}
    if name == "policy":
        artefacts.check_made_by(args.data, base.info, base.template, args.sft)
        below, parents = artefacts.load_sft(args.sft, base.model, base=base.info,
                                            template=base.template)
    seed = torch_seed(args.seed, key)
    lora.add_adapter(base.model, name, **flags.lora_settings(args), seed=seed)
    return (*below, name), parents, lora.adapter_parameters(base.model, name)


def main(argv=None):
    args = parse(argv)
    from virtue.evaluation import feedback
    from virtue.plumbing import artefacts, loading, memory, preview, resume, training

    # 1. Data; --dry-run ends here
    manifest = artefacts.read_manifest(args.data)
    records, copies, files = read_data(args.data, manifest["stage"])
    artefacts.check_unedited(args.data, manifest)
    out = resume.may_write(args, args.out, [args.data, args.sft])
    update = dict(rows=args.batch_size, tokens=args.max_tokens,
                  positions=args.batch_size * args.max_tokens, stacks=1)
    if preview.preview(args, {"data": f"{args.data}, {len(records)} conversations"},
                       "adapter, metrics.jsonl", trained=["new"], update=update):
        return

    # 2. Model: a new adapter; `key` names its random numbers, which are not those of the SFT below
    chosen = manifest["stage"] == "preferences"
    name, key = ("policy", "chosen") if chosen else ("sft", "sft")
    base = loading.open_base(args)
    stack, parents, parameters = add_adapter(args, base, name, key)
    held_out, train, too_long = split(args, base, records, copies, key)

    # 3. Training, by maximum likelihood: -log p of a step's tokens, divided by their number
    state = resume.start(args, out, base=base.info["fingerprint"],
                         data=artefacts.data_hash(args.data, files))
    if state is None:  # the run had already finished
        return
    batch_nll = partial(nll, base.model, stack, base.tokenizer.pad_token_id)
    before, after = training.train(
        args, out, state, parameters, train, lambda part, step: batch_nll(part) / tokens(step),
        lambda: {"loss/held_out": held_out_loss(batch_nll, held_out, args.batch_size)},
        name="sft", key=[key])
    before, after = before["loss/held_out"], after["loss/held_out"]

    # 4. The adapter, and what is known of it
    judged = {"judge_test": feedback.judge_tests(manifest["extra"])} if chosen else {}
    extra = {"held_out_loss": after, "held_out_loss_before": before, "trained_on": len(train),
             "data": manifest["sha256"], **judged}
    artefacts.save_artifact(out, stage=name, model=base.model, adapter=name, base=base.info,
                            template=base.template, parents=parents, seed=args.seed,
                            settings=resume.settings_of(args), extra=extra)
    resume.finish(out)
    for text in feedback.doubts(judged):
        print(f"warning: {text}")
    what = "chosen turns" if chosen else "revisions"
    print(f"sft: {len(train)} {what} ({too_long} too long), held-out loss {before:.3f} -> "
          f"{after:.3f} on {len(held_out)}")
    print(f"wrote adapter {name} in {out}{memory.used(base.model.device)}")


if __name__ == "__main__":
    run_main(main)
