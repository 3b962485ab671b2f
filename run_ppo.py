"""PPO with a KL penalty against the ensemble of the three reward models.

  python run_ppo.py --rm runs/demo/rm --out runs/demo/policy
  python run_ppo.py --rm runs/demo/rm --aggregate min --kl-target 6 --out runs/min

One base is in memory, and stacks of adapters play every role: reference (sft), policy (sft,
policy), value function (sft, value) with a head, reward model i (sft, lens i) with a head. To
change the objective, edit `ppo_loss` in virtue/ppo.py. Five points differ from the textbook:
  1. A rollout is a whole dialogue (answer, motivation, consequence). Each reward model reads it up
     to the turn that it was trained on. With --aggregate mean or weighted its reward is paid at the
     end of that turn, else one reward at the end of the dialogue.
  2. Scores are standardised on dialogues of the starting policy before they are aggregated.
  3. The KL penalty is k1 per token, unclamped. Its sum over a dialogue is the KL everywhere else,
     so a reported KL can be negative; metrics.jsonl has k3 beside it.
  4. Advantages are whitened under the mask over the whole batch. Returns stay raw.
  5. Losses are divided by the number of tokens in the optimiser step, so that the size of the
     micro-batches does not change them.
"""
from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import virtue  # virtue.ppo.gae: a module is imported when it is first named
from virtue import AGGREGATORS, VirtueError, plumbing
from virtue.ethics import LENSES
from virtue.plumbing.flags import (add_common_flags, add_lora_flags, add_prompts_flag,
                                   add_sampling_flags, finite_float, fraction, lora_settings,
                                   make_parser, most_used, nonnegative_float, nonnegative_int,
                                   on_real_models, parse_with_parent, positive_float, positive_int)
from virtue.plumbing.runtime import MetricsLog, check_finite, progress, run_main

if TYPE_CHECKING:
    from torch import Tensor, nn

# Few people change these, so they have no flag; experiments change them by a patch.
GAMMA = 1.0             # discount of later rewards
VF_COEF = 0.5           # weight of the value loss
VALUE_CLIP_RANGE = 0.5  # epsilon of the clipped value loss
MAX_GRAD_NORM = 1.0     # gradients of policy and value function are clipped to this, each
SCORE_CLIP = 5.0        # standardised scores are cut at plus and minus this
KL_HORIZON = 2000       # dialogues in which --kl-target adapts the coefficient


def parse(argv):
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data, reward models and size").add_argument
    data("--rm", type=Path, required=True,
         help="folder of run_rm.py, with action/, motivation/, consequence/")
    data("--sft", type=Path, help="SFT adapter: it is the reference, and the policy starts from it")
    add_prompts_flag(data, parser)
    data("--iterations", type=positive_int, default=24, help="batches of dialogues")
    data("--rollout-size", type=positive_int, default=128, help="dialogues an iteration")
    data("--micro-batch-size", type=positive_int, default=8,
         help="dialogues a forward pass; changes memory, not the update")
    data("--lr", type=positive_float, default=2e-3,
         help="Adam learning rate of the policy adapter in the first iteration; it falls linearly "
              "to a tenth in the last, warm-up included")
    data("--value-lr", type=positive_float, default=4e-3,
         help="the same for the value adapter and head")
    data("--kl-coef", type=nonnegative_float, default=0.06,
         help="coefficient of k1 per token in the reward, and of the KL by which best/ is chosen")
    data("--aggregate", choices=AGGREGATORS, default="mean",
         help="how three scores become one; uwo's spread is a conflict of values, not doubt")
    add_common_flags(parser)
    add_sampling_flags(parser)
    add_lora_flags(parser, rank=16)
    reward = parser.add_argument_group("reward and KL").add_argument
    reward("--weights", type=finite_float, nargs=3, metavar="W",
           help="weights of action, motivation, consequence for --aggregate weighted")
    reward("--reward-turns", choices=("dialogue", "answer"), default="dialogue",
           help="answer: only the answer is sampled, and all three reward models read it")
    reward("--eos-penalty", type=nonnegative_float, default=1.0,
           help="subtracted at the end of a turn that did not stop")
    reward("--kl-target", type=positive_float,
           help="adapt the coefficient towards this KL per dialogue, in nats (default: fixed)")
    reward("--stop-kl", type=positive_float,
           help="end the run when the KL per dialogue exceeds this, in nats; best/ holds the best "
                "policy until then")
    ppo = parser.add_argument_group("PPO").add_argument
    ppo("--ppo-epochs", type=positive_int, default=2, help="passes over each batch")
    ppo("--minibatch-size", type=positive_int, default=32, help="dialogues per optimiser step")
    ppo("--clip-range", type=positive_float, default=0.2, help="epsilon of the clipped policy loss")
    ppo("--value-warmup", type=nonnegative_int, default=2,
        help="number of first iterations that train only the value function, since advantages "
             "from an untrained one are noise")
    ppo("--entropy-coef", type=nonnegative_float, default=0.0, help="weight of the entropy bonus")
    ppo("--lam", type=fraction, default=0.95,
        help="lambda of GAE; take 1.0 for answers of hundreds of tokens (0.95^256 is 2e-6)")
    ppo("--limit", type=positive_int, help="use only the first LIMIT prompts (default: all)")
    ppo("--rollout-dtype", choices=("fp32", "bf16", "fp16"),
        help="sample from a copy of the base in this type, dequantised once; this is faster, but "
             "takes 14.5 GB more for Mistral-7B in bf16 (default: sample with the base itself)")
    ppo("--save-every", type=positive_int, default=10, help="iterations between saves")
    on_real_models(parser, lr=1e-5, value_lr=1e-4)
    most_used(parser, "rm", "out", "prompts", "model", "iterations", "rollout-size",
              "micro-batch-size", "lr", "value-lr", "kl-coef", "aggregate", "resume")
    args = parse_with_parent(parser, argv, "rm", "rm", "action")
    if (args.aggregate == "weighted") != (args.weights is not None):
        raise VirtueError("--aggregate weighted and --weights W W W (action, motivation, "
                          "consequence) go together: give both or neither")
    if args.minibatch_size > args.rollout_size:
        raise VirtueError(f"--minibatch-size {args.minibatch_size} exceeds --rollout-size "
                          f"{args.rollout_size}: lower it")
    if args.value_warmup >= args.iterations:
        raise VirtueError(f"--value-warmup {args.value_warmup} leaves none of --iterations "
                          f"{args.iterations} to the policy: lower it")
    if args.kl_target and args.rollout_size >= 5 * KL_HORIZON:
        raise VirtueError(f"--kl-target needs a --rollout-size below {5 * KL_HORIZON}: lower it")
    return args


# ---- the roles


class Roles(NamedTuple):
    """The base, and for each role its stack of adapters."""

    base: plumbing.loading.Base
    sampler: nn.Module          # the base's model, or a copy of it in --rollout-dtype
    reference: tuple[str, ...]  # (sft), or () without SFT
    policy: tuple[str, ...]     # (sft, policy)
    value: tuple[str, ...]      # (sft, value)
    value_head: nn.Module
    reward_models: list         # (stack, head) by lens
    score_mean: Tensor          # (K,), of dialogues of the starting policy
    score_std: Tensor           # (K,)
    parents: dict[str, Path]


def build_roles(args):
    base = plumbing.loading.open_base(args)
    model, known = base.model, dict(base=base.info, template=base.template)
    reference, parents = plumbing.artefacts.load_sft(args.sft, model, **known)
    reward_models, mean, std = plumbing.artefacts.load_reward_models(
        args.rm, model, reference, parents, **known)
    virtue.generate.check_context(model, args.max_prompt_tokens, args.max_new_tokens)
    for name in ("policy", "value"):
        seed = virtue.randomness.torch_seed(args.seed, name)
        virtue.lora.add_adapter(model, name, seed=seed, **lora_settings(args))
    virtue.lora.flatten(model, ("policy",), "best")
    head = virtue.models.ScalarHead(model.config.hidden_size, bias=True).to(model.device)
    sampler = model
    if args.rollout_dtype:
        sampler = virtue.lora.sampling_copy(model, virtue.models.DTYPES[args.rollout_dtype])
    return Roles(base, sampler, reference, (*reference, "policy"), (*reference, "value"), head,
                 reward_models, mean, std, parents)


def trained(roles):
    """The trained tensors of the policy, and those of the value function."""
    policy, value = (virtue.lora.adapter_parameters(roles.base.model, name)
                     for name in ("policy", "value"))
    return policy, [*value, *roles.value_head.parameters()]


def build_optimizer(roles, args):
    """Adam over policy and value function; both rates fall linearly to a tenth."""
    import torch
    policy, value = trained(roles)
    groups = [{"params": policy, "lr": args.lr}, {"params": value, "lr": args.value_lr}]
    optimizer = torch.optim.Adam(groups, eps=1e-5)
    steps = max(1, args.iterations - 1)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)


def logprobs_of(roles, args, stack, ids, attention, mask, entropy=False):
    """Log-probs (B, T) of the tokens under the mask by a stack; with `entropy`, their entropies
    too."""
    model = roles.base.model
    ids, attention, mask = (t.to(model.device) for t in (ids, attention, mask))
    with virtue.lora.use_stack(model, *stack):
        return virtue.models.logprobs_at(model, ids, attention, mask, args.temperature, entropy,
                                         train_entropy=args.entropy_coef > 0)


def values_of(roles, ids, attention, mask):
    """Values (B, T) before each token under the mask."""
    model = roles.base.model
    ids, attention, mask = (t.to(model.device) for t in (ids, attention, mask))
    with virtue.lora.use_stack(model, *roles.value):
        return virtue.rollout.values_at(model, roles.value_head, ids, attention, mask)


# ---- one iteration


class Batch(NamedTuple):
    """The dialogues of one iteration, and what the roles say of them. T = L - 1 columns."""

    dialogues: list
    scores: Tensor     # (K, B) standardised
    attention: Tensor  # (B, L)
    kl: Tensor         # (B, T) k1, 0 outside the mask
    placed: Tensor     # (B, T) scores as rewards, before the KL penalty
    rollout: virtue.ppo.Rollout


def prompts_of(args, prompts, iteration):
    """The iteration's prompts: each pass over all of them has an order of its own."""
    number, part = divmod(iteration - 1, len(prompts) // args.rollout_size)
    order = virtue.randomness.stream(args.seed, "ppo", "order", number).permutation(len(prompts))
    begin = part * args.rollout_size
    return [prompts[i] for i in order[begin:begin + args.rollout_size]]


def weights_of(args):
    import torch
    return torch.tensor(args.weights) if args.weights else None


def turns_of(args):
    """How many turns are sampled, and the turn at whose end each reward model reads."""
    return (1, (0, 0, 0)) if args.reward_turns == "answer" else (3, (0, 1, 2))


def sample(roles, args, prompts, iteration):
    """One dialogue for each prompt, from the policy as it is."""
    virtue.lora.flatten(roles.base.model, roles.policy, "rollout", roles.sampler.dtype)
    with virtue.lora.use_stack(roles.sampler, "rollout"):
        return virtue.generate.sample_dialogues(
            roles.sampler, roles.base.tokenizer, prompts, seed=args.seed, stage="ppo",
            step=iteration, turns=turns_of(args)[0], max_new_tokens=args.max_new_tokens,
            temperature=args.temperature, batch_size=args.batch_size,
            each_batch=plumbing.resume.spread())


def score(roles, args, dialogues):
    """Raw scores (K, B) of the reward models, each at the end of its own turn."""
    return virtue.rollout.score_dialogues(
        roles.base.model, roles.reward_models, dialogues, turns_of(args)[1],
        roles.base.tokenizer.pad_token_id, batch_size=args.micro_batch_size,
        each_batch=plumbing.resume.spread())


def reward(roles, args, dialogues, raw, kl_coef):
    """From raw scores to a batch with rewards: standardise, place, subtract the KL penalty."""
    scores = virtue.ensemble.standardize(raw, roles.score_mean, roles.score_std)
    scores = scores.clamp(-SCORE_CLIP, SCORE_CLIP)
    pad_id = roles.base.tokenizer.pad_token_id
    ids, attention = virtue.dialogue.right_pad([d.ids for d in dialogues], pad_id)
    mask = virtue.rollout.loss_mask(dialogues, ids.shape[1])

    def read(function):
        return virtue.rollout.in_chunks(function, args.micro_batch_size, ids, attention, mask,
                                        each_batch=plumbing.resume.spread())

    old = read(lambda *chunk: logprobs_of(roles, args, roles.policy, *chunk))
    reference = read(lambda *chunk: logprobs_of(roles, args, roles.reference, *chunk))
    old_values = read(lambda *chunk: values_of(roles, *chunk))
    placed = virtue.rollout.place_scores(scores, dialogues, mask, args.aggregate,
                                         eos_penalty=args.eos_penalty, weights=weights_of(args))
    rewards = virtue.ppo.token_rewards(placed, old, reference, mask, kl_coef)
    return Batch(dialogues, scores, attention, virtue.logprobs.kl_k1(old, reference) * mask, placed,
                 virtue.ppo.Rollout(ids, mask, old, reference, old_values, rewards))


def advantage(args, rollout):
    """Whitened advantages, and raw returns, both (B, T)."""
    advantages, returns = virtue.ppo.gae(rollout.rewards, rollout.values, rollout.mask, GAMMA,
                                         args.lam)
    return virtue.masked.whiten(advantages, rollout.mask), returns


def backward(roles, args, batch, advantages, returns, rows, tokens):
    """Adds the gradient of some rows' part of a step's loss, of `tokens` tokens -> statistics."""
    part = batch.rollout.index(rows)
    read = part.input_ids, batch.attention[rows], part.mask
    new_logprobs, entropy = logprobs_of(roles, args, roles.policy, *read, entropy=True)
    new_values = values_of(roles, *read)
    loss, stats = virtue.ppo.ppo_loss(  # on the CPU, where rollouts are: the tensors are small
        new_logprobs.cpu(), new_values.cpu(), entropy.cpu(), part, advantages[rows], returns[rows],
        clip_range=args.clip_range, value_clip_range=VALUE_CLIP_RANGE, vf_coef=VF_COEF,
        entropy_coef=args.entropy_coef, num_tokens=tokens)
    loss.backward()
    return stats


def update(roles, args, optimizer, iteration, batch, advantages, returns, resume_dir):
    """--ppo-epochs passes over the batch in minibatches -> means of the statistics over steps."""
    import torch
    parts, mask = trained(roles), batch.rollout.mask
    steps = args.ppo_epochs * -(-args.rollout_size // args.minibatch_size)
    sums, norms = {}, {"policy/grad_norm": 0.0, "value/grad_norm": 0.0}
    for epoch in range(args.ppo_epochs):
        order = virtue.randomness.stream(args.seed, "ppo", iteration, epoch).permutation(len(mask))
        for minibatch in torch.from_numpy(order).split(args.minibatch_size):
            tokens = int(mask[minibatch].sum())  # of the whole optimiser step
            by_length = minibatch[virtue.rollout.by_length(mask[minibatch])]
            for rows in plumbing.parallel.share(by_length).split(args.micro_batch_size):
                stats = backward(roles, args, batch, advantages, returns, rows, tokens)
                for name, number in stats.items():  # a step's micro-batches add up
                    sums[name] = sums.get(name, 0.0) + number.item() / steps
            plumbing.parallel.sum_gradients([*parts[0], *parts[1]])
            for name, parameters in zip(norms, parts):
                norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
                check_finite(norm, f"ppo, iteration {iteration}, {name}", "the gradient",
                             "lower --lr and --value-lr",
                             [batch.dialogues[i].id for i in minibatch], resume_dir)
                norms[name] += norm.item() / steps
            if iteration <= args.value_warmup:  # Adam leaves alone what has no gradient
                for parameter in parts[0]:
                    parameter.grad = None
            optimizer.step(), optimizer.zero_grad()
    totals = plumbing.parallel.total(torch.tensor([*sums.values()], dtype=torch.float64))
    return dict(zip(sums, totals.tolist())) | norms


def measure(args, iteration, batch, returns, kl_coef):
    """The iteration's numbers: KL, scores under every aggregator, the objective, lengths."""
    rollout, n = batch.rollout, len(batch.dialogues)
    old, reference, mask = rollout.old_logprobs, rollout.ref_logprobs, rollout.mask
    scores = {name: virtue.ensemble.aggregate(batch.scores, name, weights_of(args)).mean().item()
              for name in AGGREGATORS}
    # best/ is chosen by the reward with one KL coefficient for all iterations
    selection = virtue.ppo.token_rewards(batch.placed, old, reference, mask, args.kl_coef)
    return {
        "iteration": iteration,
        "objective/kl": batch.kl[mask].sum().item() / n,
        "objective/kl_k3": virtue.logprobs.kl_k3(old, reference)[mask].sum().item() / n,
        "objective/kl_coef": kl_coef,
        "objective/score": scores[args.aggregate],
        "objective/rlhf_reward": rollout.rewards.sum().item() / n,
        "objective/selection": selection.sum().item() / n,
        **{f"objective/score/{lens}": row.mean().item() for lens, row in zip(LENSES, batch.scores)},
        **{f"objective/aggregate/{name}": value for name, value in scores.items()},
        "val/explained_variance": virtue.ppo.explained_variance(rollout.values, returns, mask),
        "tokens/eos_rate": virtue.rollout.ended_share(batch.dialogues),
        "tokens/length": mask.sum().item() / n,
        "tokens/read": batch.attention.sum().item(),
    }


# ---- the run


def train(roles, args, prompts, resume_dir, judge_test):
    """Sample, score, reward, advantage, update, adapt, log."""
    files = plumbing.ppo_files
    optimizer, schedule = build_optimizer(roles, args)
    log, rollouts = (MetricsLog(args.out / f"{name}.jsonl") for name in ("metrics", "rollouts"))
    state = resume_dir, optimizer, schedule, [log.path, rollouts.path]
    run = files.begin_or_resume(roles, args, *state)
    bar = progress(None, "ppo", args.iterations, unit="iteration", initial=run["iteration"])
    while not files.is_over(args, run):
        run["iteration"] = iteration = run["iteration"] + 1
        clock = [time.perf_counter()]
        dialogues = sample(roles, args, prompts_of(args, prompts, iteration), iteration)
        clock.append(time.perf_counter())

        raw = score(roles, args, dialogues)
        check_finite(raw, f"ppo, iteration {iteration}", "the score",
                     "train the reward models again with a lower --lr", [d.id for d in dialogues],
                     resume_dir)
        batch = reward(roles, args, dialogues, raw, run["kl_coef"])
        advantages, returns = advantage(args, batch.rollout)
        metrics = measure(args, iteration, batch, returns, run["kl_coef"])
        files.keep_if_best(roles, run, metrics)  # of the policy that sampled: before the update
        clock.append(time.perf_counter())

        metrics |= update(roles, args, optimizer, iteration, batch, advantages, returns, resume_dir)
        schedule.step()
        clock.append(time.perf_counter())
        if args.kl_target:
            run["kl_coef"] = virtue.ppo.update_kl_coef(
                run["kl_coef"], metrics["objective/kl"], args.kl_target, len(dialogues), KL_HORIZON)

        log.write(metrics | files.seconds(clock))
        files.write_rollouts(rollouts, roles, iteration, batch)
        run |= {"first": run["first"] or metrics, "last": metrics}
        files.show(bar, run)
        if files.is_over(args, run) or iteration % args.save_every == 0:
            files.save(roles, args, run, judge_test, *state)
    bar.close()
    files.tell(args, run, roles.base.model.device)


def main(argv=None):
    args = parse(argv)
    prompts = plumbing.records.load_prompts(args.prompts, "ppo", args.limit, args.system)
    plumbing.resume.may_write(args, args.out, [args.sft, args.rm])
    plumbing.ppo_files.check_prompts(args, prompts)
    if plumbing.ppo_files.plan(args, prompts, turns_of(args)[0]):  # --dry-run ends here
        return
    roles, judge_test = build_roles(args), plumbing.ppo_files.judges_of(args.rm)
    prompts = [prompt for prompt in prompts if virtue.generate.fits(
        roles.base.tokenizer, prompt["prompt"], args.max_prompt_tokens)]
    plumbing.ppo_files.check_prompts(args, prompts)
    if args.reward_turns == "answer":  # standardise in the mode in which PPO reads
        raw = score(roles, args, sample(roles, args, prompts[:4 * args.rollout_size], -1))
        roles = roles._replace(score_mean=raw.mean(1), score_std=raw.std(1, correction=0))
    hashes = {lens: plumbing.artefacts.file_hash(args.rm / lens) for lens in LENSES}
    resume_dir = plumbing.resume.start(
        args, args.out, base=roles.base.info["fingerprint"],
        prompts=plumbing.artefacts.prompts_hash(args.prompts), **hashes)
    if resume_dir is not None:  # else this command has come to its end before
        train(roles, args, prompts, resume_dir, judge_test)
        plumbing.resume.finish(args.out)


if __name__ == "__main__":
    run_main(main)
