"""What run_ppo.py writes, resumes and says, so that the script holds PPO alone.

`run` is what a checkpoint keeps beside the tensors: the iteration that is done, the KL coefficient,
the greatest selection score and its iteration ("best", "best_iteration"), and the metrics of the
first iteration and of the last one.
"""
from __future__ import annotations

import math
import sys
import time

from virtue import VirtueError, dialogue
from virtue.ethics import LENSES
from virtue.evaluation import feedback, plots, report
from virtue.generate import longest
from virtue.lora import adapter_parameters, flatten
from virtue.plumbing import artefacts, memory, preview, records, resume
from virtue.plumbing.runtime import main_rank


def plan(args, prompts, turns):
    """Prints the memory plan; with --dry-run checks the inputs too, and is True."""
    length = longest(args.max_prompt_tokens, args.max_new_tokens, turns)
    rows = min(args.micro_batch_size, args.minibatch_size)
    return preview.preview(
        args, {"prompts": f"{args.prompts}, {len(prompts)} records"},
        "adapter, best/, value/, metrics.jsonl, rollouts.jsonl, curves.svg",
        trained=["policy", "value"],
        flat=[["sft", "policy"], ["policy"]],  # what samples, and best/
        sampling=dict(rows=min(args.batch_size, args.rollout_size), tokens=length,
                      prompt=args.max_prompt_tokens),
        update=dict(rows=rows, tokens=length, positions=rows * turns * args.max_new_tokens,
                    stacks=2, entropy=args.entropy_coef > 0),
        copy=args.rollout_dtype)


def check_prompts(args, prompts):
    """VirtueError where there are fewer prompts than an iteration takes."""
    if len(prompts) < args.rollout_size:
        raise VirtueError(f"{args.prompts}: {len(prompts)} prompts fit into --max-prompt-tokens "
                          f"{args.max_prompt_tokens}, fewer than --rollout-size "
                          f"{args.rollout_size}: give more prompts, or change these flags")


def judges_of(folder):
    """What is known of the judge behind each reward model; a doubt is printed."""
    tests = {}
    for lens in LENSES:
        tests |= feedback.judge_tests(artefacts.read_manifest(folder / lens)["extra"])
    for doubt in feedback.doubts({"judge_test": tests}):
        print(f"warning: {doubt}")
    return tests


def _learned(roles):
    """The tensors of a checkpoint: what is trained, and the best policy so far."""
    policy, value, best = (adapter_parameters(roles.base.model, name)
                           for name in ("policy", "value", "best"))
    return [*policy, *value, *roles.value_head.parameters(), *best]


def begin_or_resume(roles, args, resume_dir, optimizer, schedule, logs):
    """`run` as the last checkpoint has it, whose tensors are put back, or as a run begins."""
    run = {"iteration": 0, "kl_coef": args.kl_coef, "best": -math.inf, "best_iteration": 0,
           "first": None, "last": None}
    saved = resume.load_checkpoint(resume_dir, _learned(roles), optimizer, schedule, logs, [*run])
    if saved:
        return {name: saved[name] for name in run}
    for folder in ("value", "best"):
        artefacts.prepare_output(args.out / folder, overwrite=True)
    return run


def is_over(args, run):
    """Whether all iterations are done, or --stop-kl ends the run."""
    return run["iteration"] == args.iterations or _astray(args, run)


def _astray(args, run):
    return bool(args.stop_kl and run["last"] and run["last"]["objective/kl"] > args.stop_kl)


def keep_if_best(roles, run, metrics):
    """Makes the policy that sampled the adapter `best`, if its selection score is the greatest."""
    if metrics["objective/selection"] > run["best"]:
        run |= {"best": metrics["objective/selection"], "best_iteration": metrics["iteration"]}
        flatten(roles.base.model, ("policy",), "best")


def seconds(clock):
    """What sampling, scoring and the update took, and the iteration so far."""
    sample, score, update = (end - begin for begin, end in zip(clock, clock[1:]))
    return {"time/sample": sample, "time/score": score, "time/update": update,
            "time/seconds": time.perf_counter() - clock[0]}


def write_rollouts(log, roles, iteration, batch):
    """Every dialogue with its KL and scores, one line each."""
    for d, scores, kl in zip(batch.dialogues, batch.scores.T.tolist(), batch.kl.sum(1).tolist()):
        messages = dialogue.messages_of(roles.base.tokenizer, d, turns=len(d.turns))
        texts = [message["content"] for message in messages[len(d.prompt)::2]]
        log.write({"iteration": iteration, "id": d.id, "prompt": d.prompt[-1]["content"], "kl": kl,
                   "scores": scores, "turns": dict(zip(LENSES, texts))})


def show(bar, run):
    """The bar's numbers, and warnings of a run that goes astray."""
    first, last = run["first"], run["last"]
    bar.set_postfix(score=f"{last['objective/score']:.2f}", kl=f"{last['objective/kl']:.1f}",
                    eos=f"{last['tokens/eos_rate']:.2f}", refresh=False)
    for warning in report.run_away(first, last) if main_rank() else ():
        bar.write(f"warning: iteration {run['iteration']}: {warning}", file=sys.stderr)
    bar.update()


def save(roles, args, run, judge_test, resume_dir, optimizer, schedule, logs):
    """The policy, the best one so far, the value function, the training curves, a checkpoint."""
    shared = dict(model=roles.base.model, base=roles.base.info, template=roles.base.template,
                  settings=resume.settings_of(args), seed=args.seed)
    parents = {**roles.parents, **{f"rm/{lens}": args.rm / lens for lens in LENSES}}
    extra = {"kl_coef": run["kl_coef"], "score_mean": roles.score_mean.tolist(),
             "score_std": roles.score_std.tolist(), "judge_test": judge_test}
    for folder, adapter, updates in ((args.out, "policy", run["iteration"]),
                                     (args.out / "best", "best", run["best_iteration"] - 1)):
        artefacts.save_artifact(folder, stage="policy", adapter=adapter, parents=parents,
                                extra={"iterations": updates, **extra}, **shared)
    artefacts.save_artifact(args.out / "value", stage="value", adapter="value",
                            head=roles.value_head, parents=roles.parents, **shared)
    if main_rank() and plots.available():
        metrics = [line for _, line in records.read_jsonl(args.out / "metrics.jsonl")]
        artefacts.write_atomic(args.out / "curves.svg", plots.training_curves(metrics).encode())
    resume.save_checkpoint(resume_dir, run["iteration"], _learned(roles), optimizer, schedule, logs,
                           **run)


def tell(args, run, device):
    """What came out, in words."""
    first, last = run["first"], run["last"]
    if _astray(args, run):
        print(f"stopped at iteration {run['iteration']}: KL {last['objective/kl']:.2f} nats a "
              f"dialogue is above --stop-kl {args.stop_kl}")
    print(f"ppo: {run['iteration']} iterations of {args.rollout_size} dialogues; score "
          f"{first['objective/score']:.3f} -> {last['objective/score']:.3f}, KL "
          f"{last['objective/kl']:.2f} nats a dialogue, {last['tokens/eos_rate']:.1%} of turns "
          "ended")
    print(f"wrote adapter policy in {args.out}, the one with the greatest score less penalties "
          f"({run['best']:.3f}, before iteration {run['best_iteration']}) in {args.out / 'best'}, "
          f"value function in {args.out / 'value'}, metrics.jsonl, every dialogue in rollouts.jsonl"
          f"{', curves.svg' * plots.available()}{memory.used(device)}")
