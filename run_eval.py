"""Compare base, SFT and PPO model on the same held-out prompts.

  python run_eval.py --policy runs/demo/policy --sft runs/demo/sft --rm runs/demo/rm --out runs/demo/report

Every model answers every prompt with a whole dialogue. The study's Score is mean - 0.5 * population
std over the 3n scores RM_lens(dialogue up to the lens's turn). It is given on raw scores, as the study
did, whose std also holds the arbitrary offsets between the three models, and on standardised ones.
Differences carry 95 % intervals of a paired bootstrap over prompts. Writes scores.json and
samples.jsonl. On toy, gold is read: no stage has learned from it. Refuses to report on an adapter that
changes no logit: it was never loaded.
"""
from __future__ import annotations

from pathlib import Path

from virtue.runtime import add_common_flags, add_sampling_flags, make_parser, open_base, parse_with_parent, positive_int, run_main


def parse(argv):
    parser = make_parser(__doc__)
    add_common_flags(parser)
    add_sampling_flags(parser)
    group = parser.add_argument_group("what to compare").add_argument
    group("--policy", type=Path, required=True, help="folder of run_ppo.py")
    group("--sft", type=Path, help="the SFT adapter below it")
    group("--rm", type=Path, help="folder of run_rm.py: the reward models of the training, for a folder that was moved")
    group("--prompts", default="toy", help="toy, or a file: hh-rlhf .jsonl(.gz), or JSONL with a field prompt")
    group("--limit", type=positive_int, default=240, help="use the first so many held-out prompts")
    group("--show", type=positive_int, default=3, help="dialogues to print side by side")
    return parse_with_parent(parser, argv, "policy", "policy")


def main(argv=None):
    args = parse(argv)
    import numpy as np
    import torch
    from virtue import VirtueError
    from virtue.checkpoint import check_output, load_artifact, prepare_output, write_json, write_jsonl, write_manifest
    from virtue.dialogue import encode_prompt, load_prompts, messages_of, prompt_record, right_pad
    from virtue.ensemble import standardize
    from virtue.ethics import LENSES, PROBES
    from virtue.generate import check_context, fits, sample_dialogues
    from virtue.logprobs import kl_k1
    from virtue.lora import flatten, use_stack
    from virtue.models import logprobs_at
    from virtue.report import differences, mask_names, measure, side_by_side, table
    from virtue.rollout import dialogue_logprobs, load_reward_models, score_dialogues
    from virtue.toy.gold import gold as gold_of, slots

    # Build
    prompts = load_prompts(args.prompts, "eval", args.limit)
    probes = [] if args.prompts == "toy" else [prompt_record([{"role": "user", "content": text}]) for text in PROBES]
    out = check_output(args.out, args.overwrite, [args.policy, args.sft, args.rm])
    base = open_base(args)
    model, tokenizer = base.model, base.tokenizer
    pad_id, known = tokenizer.pad_token_id, dict(base=base.info, template=base.template)
    sft, parents = (), {}
    if args.sft:
        load_artifact(args.sft, model, "sft", stage="sft", **known)
        sft, parents = ("sft",), {"sft": args.sft}
    reward_models, mean, std = load_reward_models(args.rm, model, sft, parents, **known)
    load_artifact(args.policy, model, "policy", stage="policy", **known,
                  parents={**parents, **{f"rm/{lens}": args.rm / lens for lens in LENSES}})
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
    columns, details, texts = {}, {}, {}
    for name, stack in stacks.items():
        if stack:
            flatten(model, stack, "rollout")
        with use_stack(model, *(("rollout",) if stack else ())):
            dialogues = sample_dialogues(model, tokenizer, kept + probes, seed=args.seed, stage="eval", max_new_tokens=args.max_new_tokens,
                                         temperature=args.temperature, batch_size=args.batch_size, desc=f"dialogues of {name}")
        texts[name] = [[m["content"] for m in messages_of(tokenizer, d)[len(d.prompt)::2]] for d in dialogues]
        dialogues = dialogues[:len(kept)]
        settings = dict(batch_size=args.batch_size, temperature=args.temperature)
        logprobs, mask = dialogue_logprobs(model, stack, dialogues, pad_id, **settings)
        reference, _ = dialogue_logprobs(model, sft, dialogues, pad_id, **settings)
        bare, _ = dialogue_logprobs(model, (), dialogues, pad_id, batch_size=args.batch_size)
        raw = score_dialogues(model, reward_models, dialogues, (0, 1, 2), pad_id, batch_size=args.batch_size)
        kl = (kl_k1(logprobs, reference) * mask).sum(1)
        gold = [gold_of(d.prompt[0]["content"], t) for d, t in zip(dialogues, texts[name])] if args.prompts == "toy" else None
        details[name] = {"raw": raw.double().numpy(), "standardised": standardize(raw, mean, std).double().numpy(), "kl": kl.double().numpy(),
                         "gold": np.array([g.overall for g in gold]) if gold else None, "golds": gold}
        patterns = mask_names(texts[name], [slots(d.prompt[0]["content"]) for d in dialogues]) if gold else None
        columns[name] = measure(dialogues, texts[name], details[name]["raw"], details[name]["standardised"], details[name]["kl"],
                                (bare * mask).sum(1).double().numpy(), gold, patterns)
    names = list(stacks)
    compared = {f"{b} - {a}": differences(details[a], details[b], args.seed) for a, b in zip(names, names[1:])}
    if len(names) > 2:
        compared[f"{names[-1]} - {names[0]}"] = differences(details[names[0]], details[names[-1]], args.seed)

    # Save and show
    prepare_output(out, args.overwrite)
    samples = [{"id": p["id"], "prompt": p["prompt"], **{name: {
        "turns": dict(zip(LENSES, texts[name][i])),
        **({"scores": details[name]["standardised"][:, i], "raw_scores": details[name]["raw"][:, i]} if i < len(kept) else {}),
        **({"gold": details[name]["golds"][i]._asdict()} if i < len(kept) and details[name]["golds"] else {})} for name in names}}
        for i, p in enumerate(kept + probes)]
    write_jsonl(out / "samples.jsonl", samples)
    write_json(out / "scores.json", {"prompts": len(kept), "prompts_too_long": len(prompts) - len(kept), "seed": args.seed,
                                     "models": columns, "differences": compared,
                                     "interval": "paired bootstrap over prompts, 95 %, 2000 resamples"})
    write_manifest(out, stage="eval", seed=args.seed, settings=vars(args), parents={**parents, "policy": args.policy}, extra={}, **known)
    print(f"{len(kept)} held-out prompts, seed {args.seed}\n\n{table(columns)}\n")
    for pair, rows in compared.items():
        for key, found in rows.items():
            print(f"{pair:>12}  {key:26} {found['difference']:+.3f}  [{found['low']:+.3f}, {found['high']:+.3f}]")
    print("The raw Score's std holds the reward models' arbitrary offsets; the standardised one does not.\n")
    shown = list(range(min(args.show, len(kept)))) + list(range(len(kept), len(kept) + len(probes)))
    for i in shown:
        print(side_by_side((kept + probes)[i]["prompt"][-1]["content"], {name: texts[name][i] for name in names}), end="\n\n")
    print(f"wrote scores.json and samples.jsonl in {out}")


if __name__ == "__main__":
    run_main(main)
