"""One PPO step against TRL's PPOTrainer (1.12.0, the last release that ships it),
on the same workload.

    # TRL and its friends stay out of our own environment:
    python -m venv .venv-trl
    .venv-trl/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.12.0 peft==0.21.2 \\
        datasets==5.2.0 accelerate==1.15.0
    # alternating, 5 times: about 6 minutes
    python benchmarks/ppo_step.py compare --trl-python .venv-trl/bin/python
    # one program alone
    python benchmarks/ppo_step.py ours --reward-models 3
    # with batch, response length, reward models and rank: about 10 minutes
    python benchmarks/ppo_step.py growth --steps 2
    # operations that the step must do over the measured rate
    python benchmarks/ppo_step.py limit --steps 3

Like for like: policy LoRA of rank 16 on all linears, one reward model, a value function (TRL: a
whole model that it trains whole, its default, or with LoRA), four epochs of one minibatch of 32
answers of 48 tokens. Ours is run_ppo.py's loop without its files: the same functions in the same
order. Processor seconds, one thread.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

from workload import (
    ALPHA,
    EPOCHS,
    HERE,
    NEW_TOKENS,
    PPO,
    PROMPTS,
    RANK,
    ROOT,
    SHAPE,
    TARGETS,
    alternate,
    cpu_seconds,
    make_model,
    median,
    peak_mib,
    prompts,
    ratio,
    resident_mib,
    scratch,
)


def ours(args: argparse.Namespace) -> dict:
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch
    import transformers  # noqa: F401 (the bare imports count for nothing)
    from transformers.models.mistral import modeling_mistral  # noqa: F401
    from virtue.dialogue import Dialogue, Turn, right_pad
    from virtue.ensemble import standardize
    from virtue.generate import sample
    from virtue.lora import adapter_parameters, add_adapter, flatten, use_stack
    from virtue.masked import whiten
    from virtue.models import ScalarHead, logprobs_at
    from virtue.plumbing.loading import load_model
    from virtue.ppo import Rollout, gae, ppo_loss, token_rewards
    from virtue.rollout import (
        by_length,
        in_chunks,
        loss_mask,
        place_scores,
        score_dialogues,
        values_at,
    )

    torch.set_num_threads(1)
    imports = resident_mib()
    model = load_model(make_model(scratch() / "v1024"))
    lora = dict(rank=args.rank, alpha=ALPHA, targets=TARGETS)
    reward_models = []
    for k in range(args.reward_models):
        add_adapter(model, f"reward{k}", seed=k, **lora)
        reward_models.append(((f"reward{k}",), ScalarHead(model.config.hidden_size, seed=k)))
        for parameter in adapter_parameters(model, f"reward{k}"):
            parameter.requires_grad_(False)
    add_adapter(model, "policy", seed=1, **lora)
    add_adapter(model, "value", seed=2, **lora)
    head = ScalarHead(model.config.hidden_size, bias=True)
    policy = adapter_parameters(model, "policy")
    value = [*adapter_parameters(model, "value"), *head.parameters()]
    optimizer = torch.optim.Adam([*policy, *value], lr=PPO["lr"], eps=1e-5)
    rows, parts, clock = prompts(args.rows * 4), {}, time.process_time

    def logprobs(stack, *tensors, entropy=False):
        with use_stack(model, *stack):
            return logprobs_at(model, *tensors, PPO["temperature"], entropy)

    def values(*tensors):
        with use_stack(model, "value"):
            return values_at(model, head, *tensors)

    def step(number: int) -> None:
        def part(name, start):
            parts.setdefault(name, []).append(clock() - start)
            return clock()

        t = clock()
        batch = [list(row) for row in rows[number % 4 * args.rows:][:args.rows]]
        flatten(model, ("policy",), "rollout")
        with use_stack(model, "rollout"):
            new = sample(model, batch,
                         np.random.default_rng(number).random((args.rows, args.new_tokens)),
                         eos_id=2, pad_id=0)
        dialogues = [Dialogue(str(i), [], row + ids, (Turn(len(row), len(row) + len(ids), cut),))
                     for i, (row, (ids, cut)) in enumerate(zip(batch, new))]
        # a turn that was cut ends in an EOS that was not sampled
        for d, (_, cut) in zip(dialogues, new):
            d.ids.extend([2] * cut)
        t = part("sample", t)
        scores = score_dialogues(model, reward_models, dialogues, [0] * len(reward_models), 0,
                                 batch_size=args.micro)
        scores = standardize(scores, scores.mean(1), scores.std(1))
        ids, attention = right_pad([d.ids for d in dialogues], 0)
        mask = loss_mask(dialogues, ids.shape[1])
        old = in_chunks(lambda *x: logprobs(("policy",), *x), args.micro, ids, attention, mask)
        ref = in_chunks(lambda *x: logprobs((), *x), args.micro, ids, attention, mask)
        old_values = in_chunks(values, args.micro, ids, attention, mask)
        t = part("score", t)
        rewards = token_rewards(place_scores(scores, dialogues, mask, "mean", eos_penalty=1.0), old,
                                ref, mask, PPO["kl_coef"])
        rollout = Rollout(ids, mask, old, ref, old_values, rewards)
        advantages, returns = gae(rewards, old_values, mask, PPO["gamma"], PPO["lam"])
        advantages = whiten(advantages, mask)
        for _ in range(EPOCHS):
            for chunk in by_length(mask).split(args.micro):
                piece = rollout.index(chunk)
                new_logprobs, entropy = logprobs(("policy",), piece.input_ids, attention[chunk],
                                                 piece.mask, entropy=True)
                loss, _ = ppo_loss(
                    new_logprobs, values(piece.input_ids, attention[chunk], piece.mask), entropy,
                    piece, advantages[chunk], returns[chunk],
                    clip_range=PPO["clip_range"], value_clip_range=PPO["value_clip_range"],
                    vf_coef=PPO["vf_coef"], num_tokens=int(mask.sum()))
                loss.backward()
            for parameters in (policy, value):
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step(), optimizer.zero_grad()
        part("update", t)

    times = []
    for number in range(args.steps):
        start = clock()
        step(number)
        times.append(clock() - start)
    return {"step": statistics.median(times[1:]),
            **{name: statistics.median(of[1:]) for name, of in parts.items()},
            "peak_mib": peak_mib() - imports,
            "parameters": sum(p.numel() for p in model.parameters())}


def limit(args: argparse.Namespace) -> None:
    """The matrix products that the update must do, over the rate of such products here, as a share
    of its measured time; and the same of transformers' model alone, forward and back to its inputs
    as often as the update does it."""
    sys.path.insert(0, str(ROOT))
    import torch
    from virtue.plumbing.loading import load_model

    torch.set_num_threads(1)
    D, V, L = SHAPE["hidden_size"], 1024, SHAPE["num_hidden_layers"]
    kv = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    shapes = [(D, D), (D, kv), (D, kv), (D, D), (D, SHAPE["intermediate_size"]),
              (D, SHAPE["intermediate_size"]), (SHAPE["intermediate_size"], D)]
    tokens, answered = sum(map(len, prompts(PROMPTS))) + PROMPTS * NEW_TOKENS, PROMPTS * NEW_TOKENS
    dense = sum(2 * i * o for i, o in shapes) * L * tokens
    narrow = sum(2 * RANK * (i + o) for i, o in shapes) * L * tokens
    length = tokens / PROMPTS
    attention = L * 2 * 2 * length / 2 * D * tokens  # causal: half of the square
    forward = dense + attention
    # the first layer's queries, keys and values pass no gradient on
    nowhere = sum(2 * i * o for i, o in shapes[:3]) * tokens
    backward = dense - nowhere + 2 * attention + 2 * narrow  # input gradients, and those of A and B
    # policy and value; lm_head forward and input gradient
    one_pass = 2 * (forward + backward) + 2 * 2 * D * V * answered
    work, bare_work = EPOCHS * one_pass, EPOCHS * 2 * (forward + dense + 2 * attention)
    a, b = torch.randn(args.micro * int(length), D), torch.randn(D, SHAPE["intermediate_size"])

    def products() -> float:
        for _ in range(20):
            a @ b
        start = time.process_time()
        for _ in range(1000):
            a @ b
        return 1000 * 2 * a.shape[0] * a.shape[1] * b.shape[1] / (time.process_time() - start)

    model = load_model(make_model(scratch() / "v1024")).model
    inputs = torch.randn(args.micro, int(length), D, requires_grad=True)

    def passes() -> None:
        for _ in range(EPOCHS * 2 * PROMPTS // args.micro):
            model(inputs_embeds=inputs, use_cache=False).last_hidden_state.sum().backward()

    runs = []
    for _ in range(args.repeats):
        before, measured = products(), ours(args)["update"]
        bare = statistics.median(cpu_seconds(passes, 3))
        # the rate of a shared machine changes by the minute
        runs.append(((before + products()) / 2, measured, bare))
    rates, updates, bares = zip(*runs)
    for what, work_of, seconds in (("update", work, updates), (
        "transformers' model alone, forward and back to its inputs as often", bare_work, bares)):
        print(f"{what}: {work_of / 1e9:.1f} GFLOP must be done; products of its size run at "
              f"{statistics.median(rates) / 1e9:.0f} GFLOP/s; it takes "
              f"{statistics.median(seconds):.2f} s; "
              f"share of the limit {ratio([work_of / rate for rate in rates], seconds)}")


def growth(args: argparse.Namespace) -> None:
    """What grows with what: each change against a run without it just before, `--repeats` times."""
    print("| changed | by | step | sample | score | update |\n|---|---:|---:|---:|---:|---:|")
    for name, factors in (("rows", (2, 4)), ("new_tokens", (2, 4)), ("reward_models", (2, 3)),
                          ("rank", (2, 4))):
        for factor in factors:
            changed = argparse.Namespace(**vars(args) | {name: getattr(args, name) * factor})
            before, after = zip(*[(ours(args), ours(changed)) for _ in range(args.repeats)])
            print(f"| {name.replace('_', ' ')} | {factor} | " + " | ".join(
                ratio([m[part] for m in after], [m[part] for m in before])
                for part in ("step", "sample", "score", "update")) + " |", flush=True)


def compare(args: argparse.Namespace) -> None:
    me = [sys.executable, str(HERE / "ppo_step.py"), "ours", "--steps", str(args.steps),
          "--micro", str(args.micro), "--reward-models"]
    peer = [args.trl_python, str(HERE / "trl_peer.py"), "ppo", "--steps", str(args.steps)]
    found = alternate({"ours, 1 reward model": [*me, "1"], f"ours, {PROMPTS} rows a forward "
                       "pass, as TRL": [*me, "1", "--micro", str(PROMPTS)], "TRL": peer,
                       "ours, 3 reward models": [*me, "3"],
                       "TRL, LoRA value": [*peer, "--value", "lora"]}, args.repeats)
    steps = {name: [run["step"] for run in runs] for name, runs in found.items()}
    print("| program | s a step | TRL / it | peak MiB above the imports | share of TRL's | "
          "parameters held, million |\n|---|---:|---:|---:|---:|---:|")
    for name, runs in found.items():
        print(f"| {name} | {median(runs, 'step'):.2f} | {ratio(steps['TRL'], steps[name])} | "
              f"{median(runs, 'peak_mib'):.0f} | "
              f"{median(runs, 'peak_mib') / median(found['TRL'], 'peak_mib'):.0%} | "
              f"{median(runs, 'parameters') / 1e6:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("ours", "compare", "growth", "limit"):
        add = commands.add_parser(name).add_argument
        add("--steps", type=int, default=6,
            help="PPO steps a run; the first warms up (default: %(default)s)")
        add("--micro", type=int, default=16,
            help="our rows a forward pass; TRL takes all 32 (default: %(default)s)")
        if name != "compare":
            for flag, default in (("--reward-models", 1), ("--rows", PROMPTS),
                                  ("--new-tokens", NEW_TOKENS), ("--rank", RANK)):
                add(flag, type=int, default=default, help="(default: %(default)s)")
        if name in ("compare", "growth", "limit"):
            add("--repeats", type=int, default=5)
        if name == "compare":
            add("--trl-python", required=True, help="interpreter with TRL 1.12.0")
    args = parser.parse_args()
    if args.command == "ours":
        print(json.dumps(ours(args)))
    else:
        {"compare": compare, "growth": growth, "limit": limit}[args.command](args)


if __name__ == "__main__":
    main()
