"""PPO with a KL penalty against the ensemble of the three reward models.

  python run_ppo.py --sft runs/demo/sft --rm runs/demo/rm --out runs/demo/policy
  python run_ppo.py --sft runs/demo/sft --rm runs/demo/rm --aggregate min --kl-target 6 --out runs/min

One base in memory; stacks of adapters play every role: reference (sft), policy (sft, policy), value
(sft, value) with a head, reward model i (sft, lens i) with a head. To change the objective, edit
`ppo_loss` in virtue/ppo.py. How this differs from the textbook:
  1. a rollout is a whole dialogue (answer, motivation, consequence): each reward model reads it up to
     the turn that it was trained on, and mean and weighted pay it there (--reward-turns answer: all
     three read the answer alone);
  2. scores are standardised on dialogues of the starting policy before they are aggregated;
  3. k1 per token is the KL penalty in the reward, and its sum the KL of --kl-target, --stop-kl and
     the reports, where it may fall below 0; k3 stands beside it in metrics.jsonl;
  4. advantages are whitened under the mask over the whole batch; returns stay raw;
  5. losses are normalised by the number of tokens in the optimiser step, whatever the micro-batch.
"""
from __future__ import annotations

import sys
import time
from pathlib import Path

from virtue.plumbing.flags import (add_aggregator_flags, add_common_flags, add_lora_flags,
                                   add_sampling_flags, aggregator_settings, finite_float, fraction,
                                   lora_settings, make_parser, nonnegative_float, nonnegative_int,
                                   parse_with_parent, positive_float, positive_int)
from virtue.plumbing.loading import open_base
from virtue.plumbing.preview import preview
from virtue.plumbing.runtime import MetricsLog, check_finite, main_rank, progress, run_main
from virtue.randomness import stream, torch_seed


def parse(argv):
    from virtue import AGGREGATORS
    parser = make_parser(__doc__)
    add_common_flags(parser)
    add_sampling_flags(parser)
    add_lora_flags(parser, rank=16, alpha=32)
    data = parser.add_argument_group("data and reward models").add_argument
    data("--rm", type=Path, required=True, help="folder of run_rm.py, with action/, motivation/, consequence/")
    data("--sft", type=Path, help="SFT adapter: reference and start of the policy")
    data("--prompts", default="toy",
         help="toy, or a file of prompts or conversations, of any form that README names")
    data("--rollout-dtype", choices=("fp32", "bf16", "fp16"), help="sample from a copy of the base in this type, dequantised once: 14.5 GB more for "
                                                                   "Mistral-7B in bf16, and no weight dequantised for each batch of tokens (default: sample with the base itself)")
    data("--limit", type=positive_int, help="use the first so many prompts of the ppo split (default: all)")
    reward = parser.add_argument_group("reward").add_argument
    reward("--aggregate", choices=AGGREGATORS, default="mean", help="how three scores become one; uwo's spread is conflict of values, not doubt")
    reward("--weights", type=finite_float, nargs=3, metavar="W", help="weights of action, motivation, consequence for --aggregate weighted")
    reward("--pay-at", choices=("turns", "end"), default="turns", help="where mean and weighted pay: each lens at the end of its own turn, or all at the dialogue's end, as the others do")
    add_aggregator_flags(reward)
    reward("--reward-turns", choices=("dialogue", "answer"), default="dialogue", help="what the reward models read")
    reward("--train-turns", choices=("all", "action"), default="all", help="which turns' tokens the loss covers")
    reward("--score-clip", type=positive_float, default=5.0, help="standardised scores are cut at plus or minus this")
    reward("--no-standardize", action="store_true", help="aggregate raw scores, as the study may have: offset and scale of each model are arbitrary")
    reward("--score-dtype", choices=("fp32", "fp16"), default="fp32", help="round raw scores to this type, to see what fp16 costs (the study: its Scores lie on the fp16 grid)")
    reward("--eos-penalty", type=nonnegative_float, default=1.0, help="subtracted at the end of a turn that did not stop")
    reward("--merge-rm", action="store_true", help="score with reward models merged into the 4-bit base and quantised again, as the study published its own: shows what rounding erases")
    kl = parser.add_argument_group("KL penalty").add_argument
    kl("--kl-coef", type=nonnegative_float, default=0.06,
       help="coefficient of k1 per token in the reward, and of the KL where best/ is chosen "
            "(the study reports none)")
    kl("--kl-target", type=positive_float,
       help="adapt the coefficient towards this KL per dialogue (k1), in nats (default: fixed)")
    kl("--stop-kl", type=positive_float,
       help="end the run when KL per dialogue (k1) exceeds this, in nats; "
            "best/ holds the best policy until then")
    kl("--kl-horizon", type=positive_int, default=2000, help="dialogues in which the coefficient adapts")
    ppo = parser.add_argument_group("PPO").add_argument
    ppo("--iterations", type=positive_int, default=24, help="rollout batches (this and the three below: the study reports none)")
    ppo("--rollout-size", type=positive_int, default=128, help="dialogues an iteration")
    ppo("--ppo-epochs", type=positive_int, default=2, help="passes over each batch")
    ppo("--minibatch-size", type=positive_int, default=32, help="dialogues an optimiser step")
    ppo("--micro-batch-size", type=positive_int, default=8, help="dialogues a forward pass; changes memory, not the update")
    ppo("--lr", type=positive_float, default=2e-3,
        help="Adam learning rate of the policy adapter in the first iteration; it falls linearly "
             "to a tenth in the last, and the iterations of the value's warm-up count "
             "(Mistral-7B: 1e-5; the study reports none)")
    ppo("--value-lr", type=positive_float, default=4e-3,
        help="Adam learning rate of value adapter and head in the first iteration, "
             "which falls in the same way (Mistral-7B: 1e-4)")
    ppo("--clip-range", type=positive_float, default=0.2, help="epsilon of the clipped policy loss (the study reports none)")
    ppo("--value-clip-range", type=positive_float, default=0.5, help="epsilon of the clipped value loss")
    ppo("--value-warmup", type=nonnegative_int, default=2, help="first iterations, in which only the value function learns: advantages against an untrained one are noise")
    ppo("--vf-coef", type=nonnegative_float, default=0.5, help="weight of the value loss")
    ppo("--entropy-coef", type=nonnegative_float, default=0.0, help="weight of the entropy bonus")
    ppo("--gamma", type=fraction, default=1.0, help="discount")
    ppo("--lam", type=fraction, default=0.95, help="lambda of GAE; take 1.0 for answers of hundreds of tokens (0.95^256 is 2e-6)")
    ppo("--no-whiten", action="store_true", help="use advantages as GAE gives them")
    ppo("--max-grad-norm", type=positive_float, default=1.0, help="gradient clipping, policy and value each")
    ppo("--save-every", type=positive_int, default=10, help="iterations between saves")
    return parse_with_parent(parser, argv, "rm", "rm", "action")


def main(argv=None):
    args = parse(argv)
    import torch
    from virtue import AGGREGATORS, VirtueError
    from virtue.evaluation import plots
    from virtue.plumbing.artefacts import (file_hash, prepare_output, prompts_hash, read_manifest, save_artifact,
                                   write_atomic)
    from virtue.dialogue import messages_of, right_pad
    from virtue.plumbing.records import load_prompts, read_jsonl
    from virtue.ensemble import aggregate, standardize
    from virtue.ethics import LENSES
    from virtue.evaluation.feedback import doubts, judge_tests
    from virtue.generate import check_context, fits, longest, sample_dialogues
    from virtue.logprobs import kl_k1, kl_k3
    from virtue.lora import adapter_parameters, add_adapter, flatten, requantize, sampling_copy, use_stack
    from virtue.masked import whiten
    from virtue.plumbing.memory import used
    from virtue.models import DTYPES, ScalarHead, logprobs_at
    from virtue.ppo import Rollout, explained_variance, gae, ppo_loss, token_rewards, update_kl_coef
    from virtue.plumbing.parallel import share, size as processes, sum_gradients, total
    from virtue.plumbing.resume import finish, load_checkpoint, may_write, save_checkpoint, settings_of, spread, start
    from virtue.evaluation.report import run_away
    from virtue.plumbing.artefacts import load_reward_models, load_sft
    from virtue.rollout import (by_length, ended_share, in_chunks, loss_mask, place_scores,
                                score_dialogues, values_at)

    if (args.aggregate == "weighted") != (args.weights is not None):
        raise VirtueError("--aggregate weighted and --weights W W W (action, motivation, consequence) go together: give both or neither")
    if args.minibatch_size > args.rollout_size:
        raise VirtueError(f"--minibatch-size {args.minibatch_size} exceeds --rollout-size {args.rollout_size}: lower it")
    if args.value_warmup >= args.iterations:
        raise VirtueError(f"--value-warmup {args.value_warmup} leaves none of --iterations {args.iterations} to the policy: lower it")
    if args.kl_target and args.rollout_size >= 5 * args.kl_horizon:
        raise VirtueError(f"--kl-horizon {args.kl_horizon} is too short for --rollout-size {args.rollout_size}: take more than a fifth of it")

    def enough(prompts):
        if len(prompts) < args.rollout_size:
            raise VirtueError(f"{args.prompts}: {len(prompts)} prompts fit into --max-prompt-tokens {args.max_prompt_tokens}, "
                              f"fewer than --rollout-size {args.rollout_size}: give more prompts, or change these flags")
        return prompts

    # Build: one base, every role a stack of adapters
    prompts = enough(load_prompts(args.prompts, "ppo", args.limit))
    out = may_write(args, args.out, [args.sft, args.rm])
    turns, rows = 1 if args.reward_turns == "answer" else 3, min(args.micro_batch_size, args.minibatch_size)
    length = longest(args.max_prompt_tokens, args.max_new_tokens, turns)
    if preview(args, {"prompts": f"{args.prompts}, {len(prompts)} records"}, "adapter, best/, value/, metrics.jsonl, rollouts.jsonl, curves.svg", trained=["policy", "value"],
               flat=[["sft", "policy"], ["policy"], ["policy"], *[["whole"]] * (3 * args.merge_rm)],  # rollout, sampled, best; merged
               sampling=dict(rows=min(args.batch_size, args.rollout_size), tokens=length, new=args.max_new_tokens),
               update=dict(rows=rows, tokens=length, positions=rows * turns * args.max_new_tokens, stacks=2, entropy=args.entropy_coef > 0), copy=args.rollout_dtype):
        return
    base = open_base(args)
    model, tokenizer = base.model, base.tokenizer
    device, pad_id = model.device, tokenizer.pad_token_id
    known = dict(base=base.info, template=base.template)
    sft, parents = load_sft(args.sft, model, **known)
    reward_models, mean, std = load_reward_models(args.rm, model, sft, parents, **known)
    said = [judge_tests(read_manifest(args.rm / lens)["extra"]) for lens in LENSES]
    judged = {"judge_test": {lens: test for tests in said for lens, test in tests.items()}}
    for text in doubts(judged):
        print(f"warning: {text}")
    prompts = enough([p for p in prompts if fits(tokenizer, p["prompt"], args.max_prompt_tokens)])
    if args.minibatch_size < processes():
        raise VirtueError(f"--minibatch-size {args.minibatch_size} leaves some of {processes()} processes without a dialogue: raise it")
    check_context(model, args.max_prompt_tokens, args.max_new_tokens)
    add_adapter(model, "policy", seed=torch_seed(args.seed, "policy"), **lora_settings(args))
    add_adapter(model, "value", seed=torch_seed(args.seed, "value"), **lora_settings(args))
    value_head = ScalarHead(model.config.hidden_size, bias=True).to(device)
    policy_parameters = adapter_parameters(model, "policy")
    value_parameters = [*adapter_parameters(model, "value"), *value_head.parameters()]
    optimizer = torch.optim.Adam([{"params": policy_parameters, "lr": args.lr}, {"params": value_parameters, "lr": args.value_lr}], eps=1e-5, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, max(1, args.iterations - 1))

    answer = args.reward_turns == "answer"
    read_at = (0, 0, 0) if answer else (0, 1, 2)  # the turn at whose end each reward model is read
    chunk = args.micro_batch_size

    sampler = sampling_copy(model, DTYPES[args.rollout_dtype]) if args.rollout_dtype else model

    def sample(records, step):
        flatten(model, (*sft, "policy"), "rollout", sampler.dtype)
        with use_stack(sampler, "rollout"):
            return sample_dialogues(sampler, tokenizer, records, seed=args.seed, stage="ppo", step=step, turns=1 if answer else 3, each_batch=spread(),
                                    max_new_tokens=args.max_new_tokens, temperature=args.temperature, batch_size=args.batch_size)

    def logprobs(stack, *tensors, entropy=False):
        with use_stack(model, *stack):
            return logprobs_at(model, *(t.to(device) for t in tensors), args.temperature, entropy, train_entropy=args.entropy_coef > 0)

    def values(*tensors):
        with use_stack(model, *sft, "value"):
            return values_at(model, value_head, *(t.to(device) for t in tensors))

    def score(dialogues):
        raw = score_dialogues(model, reward_models, dialogues, read_at, pad_id, batch_size=chunk, each_batch=spread())
        return raw.half().float() if args.score_dtype == "fp16" else raw

    def save():
        settings = dict(model=model, settings=settings_of(args), seed=args.seed, **known)
        save_artifact(out / "value", stage="value", adapter="value", head=value_head, parents=parents, **settings)
        roles = {**parents, **{f"rm/{lens}": args.rm / lens for lens in LENSES}}
        extra = {"iterations": iteration, "kl_coef": kl_coef, "score_mean": mean.tolist(), "score_std": std.tolist(),
                 **judged}
        save_artifact(out, stage="policy", adapter="policy", parents=roles, extra=extra, **settings)
        save_artifact(out / "best", stage="policy", adapter="best", parents=roles, extra=extra | {"iterations": best_iteration - 1}, **settings)

    if args.merge_rm:
        reward_models = [((requantize(model, stack, f"merged-{lens}"),), head) for lens, (stack, head) in zip(LENSES, reward_models)]
    if answer or args.merge_rm:  # standardise in the mode in which PPO reads
        scores = score(sample(prompts[:4 * args.rollout_size], -1))
        mean, std = scores.mean(1), scores.std(1, correction=0)
    if args.no_standardize:
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    weights = torch.tensor(args.weights) if args.weights else None
    ensemble = dict(weights=weights, **aggregator_settings(args))

    state = start(args, out, base=base.info["fingerprint"], prompts=prompts_hash(args.prompts),
                  **{lens: file_hash(args.rm / lens) for lens in LENSES})
    if state is None:
        return
    log, rollouts, kl_coef = MetricsLog(out / "metrics.jsonl"), MetricsLog(out / "rollouts.jsonl"), args.kl_coef
    best, best_iteration, resumed, stop, drawn = -float("inf"), 0, 0, False, -float("inf")
    flatten(model, ("policy",), "best")
    learned = lambda: [*policy_parameters, *value_parameters, *adapter_parameters(model, "best")]  # noqa: E731 (flatten makes "best" anew)
    numbers = ("kl_coef", "best", "best_iteration", "before", "first", "metrics")
    if done := load_checkpoint(state, learned(), optimizer, schedule, [log.path, rollouts.path], numbers):
        resumed, kl_coef, best, best_iteration, before, first, metrics = (done[k] for k in ("step", *numbers))
        stop = args.stop_kl is not None and metrics["objective/kl"] > args.stop_kl
    else:
        prepare_output(out / "value", overwrite=True)
        prepare_output(out / "best", overwrite=True)
    bar = progress(None, "ppo", args.iterations, unit="iteration")
    updates = args.ppo_epochs * -(-args.rollout_size // args.minibatch_size)  # optimiser steps an iteration
    for iteration in range(1, args.iterations + 1):
        if iteration <= resumed or stop:
            bar.update()
            continue
        started = time.perf_counter()
        # 1. Sample a batch of prompts, and dialogues from the policy
        per_pass = len(prompts) // args.rollout_size
        order = stream(args.seed, "ppo", "order", (iteration - 1) // per_pass).permutation(len(prompts))
        begin = (iteration - 1) % per_pass * args.rollout_size
        dialogues = sample([prompts[i] for i in order[begin:begin + args.rollout_size]], iteration)
        flatten(model, ("policy",), "sampled")  # a copy of what sampled, before the update changes it

        sampled = time.perf_counter()

        # 2. Score: three reward models, old and reference log-probs, values
        raw = score(dialogues)
        check_finite(raw, f"ppo, iteration {iteration}", "the score", "train the reward models again with a lower --lr", [d.id for d in dialogues], state)
        scores = standardize(raw, mean, std).clamp(-args.score_clip, args.score_clip)  # (K, B)
        input_ids, attention = right_pad([d.ids for d in dialogues], pad_id)
        mask = loss_mask(dialogues, input_ids.shape[1], args.train_turns)
        spoken = loss_mask(dialogues, input_ids.shape[1])  # KL is reported of all turns, whichever are trained
        old_logprobs = in_chunks(lambda *t: logprobs((*sft, "policy"), *t), chunk, input_ids, attention, spoken, each_batch=spread())
        ref_logprobs = in_chunks(lambda *t: logprobs(sft, *t), chunk, input_ids, attention, spoken, each_batch=spread())
        old_values = in_chunks(values, chunk, input_ids, attention, mask, each_batch=spread())

        # 3. Rewards: aggregate and place the scores, subtract the KL penalty
        placed = place_scores(scores, dialogues, mask, args.aggregate, pay_at=args.pay_at, eos_penalty=args.eos_penalty, **ensemble)
        rewards = token_rewards(placed, old_logprobs, ref_logprobs, mask, kl_coef)
        rollout = Rollout(input_ids, mask, old_logprobs, ref_logprobs, old_values, rewards)

        # 4. Advantages: GAE, whitened over the batch
        advantages, returns = gae(rewards, old_values, mask, args.gamma, args.lam)
        advantages = advantages if args.no_whiten else whiten(advantages, mask)

        # 5. Update
        scored = time.perf_counter()
        stats, norms = {}, {}
        for epoch in range(args.ppo_epochs):
            permutation = torch.from_numpy(stream(args.seed, "ppo", iteration, epoch).permutation(len(dialogues)))
            for minibatch in permutation.split(args.minibatch_size):
                tokens = int(mask[minibatch].sum())  # of the whole optimiser step
                for rows in share(minibatch[by_length(mask[minibatch])]).split(chunk):
                    part = rollout.index(rows)
                    new_logprobs, entropy = logprobs((*sft, "policy"), part.input_ids, attention[rows], part.mask, entropy=True)
                    loss, micro = ppo_loss(
                        new_logprobs.cpu(), values(part.input_ids, attention[rows], part.mask).cpu(), entropy.cpu(), part,
                        advantages[rows], returns[rows], clip_range=args.clip_range, value_clip_range=args.value_clip_range,
                        vf_coef=args.vf_coef, entropy_coef=args.entropy_coef, num_tokens=tokens)
                    loss.backward()
                    for name, value in micro.items():  # sums over micro-batches, means over optimiser steps
                        stats[name] = stats.get(name, 0.0) + value.item() / updates
                sum_gradients([*policy_parameters, *value_parameters])
                for name, parameters in (("policy", policy_parameters), ("value", value_parameters)):
                    norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                    check_finite(norm, f"ppo, iteration {iteration}, {name}", "the gradient", "lower --lr and --value-lr",
                                 [dialogues[i].id for i in minibatch.tolist()], state)
                    norms[f"{name}/grad_norm"] = norms.get(f"{name}/grad_norm", 0.0) + norm.item() / updates
                if iteration <= args.value_warmup:  # the policy waits
                    for parameter in policy_parameters:
                        parameter.grad = None  # Adam then passes over it, moments too
                optimizer.step(), optimizer.zero_grad()
        schedule.step()
        updated = time.perf_counter()
        stats = dict(zip(stats, total(torch.tensor([*stats.values()], dtype=torch.float64)).tolist()))

        # 6. KL: report, adapt the coefficient
        k1 = kl_k1(old_logprobs, ref_logprobs)[spoken].sum().item() / len(dialogues)
        k3 = kl_k3(old_logprobs, ref_logprobs)[spoken].sum().item() / len(dialogues)
        metrics = {"iteration": iteration, "objective/kl": k1, "objective/kl_k3": k3, "objective/kl_coef": kl_coef,
                   "objective/score": aggregate(scores, args.aggregate, **ensemble).mean().item()}
        # What PPO maximises, penalties for KL and for turns that did not end included; and the same
        # with one KL coefficient for all iterations, by which best/ is chosen.
        metrics["objective/rlhf_reward"] = rewards.sum().item() / len(dialogues)
        by_one_ruler = token_rewards(placed, old_logprobs, ref_logprobs, mask, args.kl_coef)
        metrics["objective/selection"] = selection = by_one_ruler.sum().item() / len(dialogues)
        if selection > best:
            best, best_iteration = selection, iteration
            flatten(model, ("sampled",), "best")
        if args.kl_target:
            kl_coef = update_kl_coef(kl_coef, k1, args.kl_target, len(dialogues), args.kl_horizon)

        # 7. Log, save, show
        metrics |= {f"objective/score/{lens}": row.mean().item() for lens, row in zip(LENSES, scores)}
        metrics |= {f"objective/aggregate/{name}": aggregate(scores, name, **ensemble).mean().item() for name in AGGREGATORS}
        metrics |= stats | norms | {"val/explained_variance": explained_variance(old_values, returns, mask),
                            "tokens/eos_rate": ended_share(dialogues), "tokens/length": spoken.sum().item() / len(dialogues),
                            "tokens/read": attention.sum().item(), "time/sample": sampled - started, "time/score": scored - sampled,
                            "time/update": updated - scored, "time/seconds": time.perf_counter() - started}
        log.write(metrics)
        if iteration == 1:
            before, first = metrics["objective/score"], metrics
        for warning in run_away(first, metrics):
            bar.write(f"warning: iteration {iteration}: {warning}", file=sys.stderr) if main_rank() else None
        stop = args.stop_kl is not None and k1 > args.stop_kl
        bar.set_postfix(score=f"{metrics['objective/score']:.2f}", kl=f"{k1:.1f}", eos=f"{metrics['tokens/eos_rate']:.2f}", refresh=False)
        bar.update()
        kl_each = (kl_k1(old_logprobs, ref_logprobs) * spoken).sum(1).tolist()
        for d, s, kl_one in zip(dialogues, scores.T.tolist(), kl_each):
            messages = messages_of(tokenizer, d, turns=len(d.turns))
            rollouts.write({"iteration": iteration, "id": d.id, "prompt": d.prompt[-1]["content"], "kl": kl_one, "scores": s,
                            "turns": dict(zip(LENSES, (m["content"] for m in messages[len(d.prompt)::2])))})
        last = stop or iteration == args.iterations
        if main_rank() and plots.available() and (last or time.monotonic() - drawn > 30):  # drawing takes 0.4 s
            drawn = time.monotonic()
            write_atomic(out / "curves.svg", plots.training_curves([m for _, m in read_jsonl(out / "metrics.jsonl")]).encode())
        if iteration % args.save_every == 0 or last:
            save()
            save_checkpoint(state, iteration, learned(), optimizer, schedule, [log.path, rollouts.path], kl_coef=kl_coef, best=best,
                            best_iteration=best_iteration, before=before, first=first, metrics=metrics)
        if stop:
            bar.close()
            print(f"stopped at iteration {iteration}: KL {k1:.2f} nats a dialogue is above --stop-kl {args.stop_kl}")
            break
    bar.close()
    finish(out)

    print(f"ppo: {metrics['iteration']} iterations of {args.rollout_size} dialogues; score {before:.3f} -> {metrics['objective/score']:.3f}, "
          f"KL {metrics['objective/kl']:.2f} nats a dialogue, {metrics['tokens/eos_rate']:.1%} of turns ended")
    print(f"wrote adapter policy in {out}, the one with the greatest score less penalties ({best:.3f}, before iteration {best_iteration}) in {out / 'best'}, "
          f"value function in {out / 'value'}, metrics.jsonl, every dialogue in rollouts.jsonl"
          f"{', curves.svg' if plots.available() else ''}{used(device)}")


if __name__ == "__main__":
    run_main(main)
