"""Evaluate: models side by side, the judge, the reward models, best-of-n; score answers, or talk.

  python run_eval.py models    --policy runs/demo/policy --out runs/demo/report
  python run_eval.py judge     --pairs harmless-base.jsonl.gz --limit 200 --out runs/demo/judge
  python run_eval.py rewards   --rm runs/demo/rm --data runs/demo/preferences --out runs/rewards
  python run_eval.py best-of-n --rm runs/demo/rm --out runs/demo/best
  python run_eval.py score     --rm runs/demo/rm --answers answers.jsonl --out runs/scores
  python run_eval.py choice    --items scenarios.csv --policy runs/demo/policy --out runs/choice
  python run_eval.py chat      --policy runs/demo/policy

models: the base, SFT and PPO models answer the same held-out prompts with whole dialogues. The
study's Score is mean - 0.5 * population std over the 3n scores RM_lens(dialogue up to the lens's
turn). It is given for raw scores, as in the study (their std also holds the arbitrary offsets
between the three models), and for standardised scores. Differences have 95 % intervals from a
paired bootstrap over prompts, and p-values have Holm's correction. The judge compares the models in
both orders, in the wording of the training and in another one. The command writes scores.json,
samples.jsonl and report.html. On toy prompts it also reports gold, from which no stage has learned.
--prompted adds the base with the constitution as a prompt: does training beat a prompt? The command
refuses to report on an adapter that changes no logit, since that adapter was never loaded.

judge: measures how often the judge agrees with human preferences (hh-rlhf or any file of chosen and
rejected answers), for each virtue, and reports position flips and the halo. On toy pairs it
compares the judge with gold instead of the file's own choice.

rewards: reports the accuracy and calibration of each reward model on held-out pairs, the
correlation of its score with length, and its scores of degenerate answers. With --pairs it also
reports the accuracy on any external preference file.

best-of-n: reports gold, rewards and the judge's opinion of the best of 1, 2, 4, ... answers of the
starting policy under each aggregator, by the unbiased estimator. If best-of-n does not help, PPO is
unlikely to help either.

score: writes what the three reward models say of anybody's answers, standardised, and the
aggregate, one line of JSON for each. A row of the file is a prompt and an answer, or a whole
conversation. Where that ends with the two follow-up questions and their answers, each model reads
its own turn, as in training; else all three read the last answer.

choice: asks other people's questions with two options, of which one is right, in both orders, by
the log-probs of the two labels: the base, and the models of --policy. It reports the share right by
group, with paired intervals between models. It reads VirtueBench's scenarios.csv, the HHH
evaluation, any file of preferences, and this project's own form.

chat: lets you talk to the base and the tuned model at once in the terminal, and shows the three
rewards of every answer; /why asks for motivation and consequence.
"""
from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

from virtue import AGGREGATORS, VirtueError
from virtue.plumbing.flags import (add_common_flags, add_constitution_flag, add_prompts_flag,
                                   add_sampling_flags, make_parser, nonnegative_int,
                                   parse_with_parent, positive_int)
from virtue.plumbing.runtime import run_main

FORMS = "in any form of docs/data.md"


def models_flags(sub: ArgumentParser, add: Callable, rarely: Callable) -> None:
    policy_flags(sub, add, rarely)
    add("--limit", type=positive_int, default=240, help="use only the first LIMIT held-out prompts")
    add_prompts_flag(add, sub)
    add("--eval-rm", type=Path, help="a second ensemble, which PPO did not see "
        "(run_rm.py --share second --seed 1)")
    add("--prompted", action="store_true",
        help="a fourth model: the base with the constitution as an instruction before each prompt")
    add("--show", type=positive_int, default=3, help="dialogues to print side by side")
    rarely("--judge", help="another model as the judge: toy, folder or hub id "
           "(default: the base, adapters off)")
    rarely("--judge-limit", type=positive_int, default=48,
           help="prompts on which the judge compares the models")
    rarely("--judge-batch-size", type=positive_int, default=16, help="pairs judged at once")


def judge_flags(sub: ArgumentParser, add: Callable, rarely: Callable) -> None:
    add("--pairs", type=Path, required=True, help=f"preferences of this project or {FORMS}")
    add("--limit", type=positive_int, default=200, help="use only the first LIMIT pairs")
    add("--wording", choices=("trained", "other"), default="trained",
        help="the question as in training, or in other words")
    rarely("--batch-size", type=positive_int, default=32, help="pairs judged at once")


def rewards_flags(sub: ArgumentParser, add: Callable, rarely: Callable) -> None:
    reward_model_flags(add, rarely)
    add("--data", type=Path, required=True,
        help="folder of run_data.py preferences: its held-out part")
    add("--pairs", type=Path,
        help=f"an external preference file {FORMS}, scored at its last answer")
    add("--limit", type=positive_int, default=500, help="use only the first LIMIT external pairs")
    rarely("--batch-size", type=positive_int, default=32, help="pairs or dialogues scored at once")


def best_of_n_flags(sub: ArgumentParser, add: Callable, rarely: Callable) -> None:
    reward_model_flags(add, rarely)
    add("--n", type=positive_int, default=16, help="answers per prompt")
    add("--limit", type=positive_int, default=64, help="use only the first LIMIT held-out prompts")
    add_prompts_flag(add, sub)
    rarely("--judge-limit", type=nonnegative_int, default=16,
           help="prompts on which the judge, the base with adapters off, compares every answer "
                "with one more answer of the same model (0: none)")
    rarely("--judge-batch-size", type=positive_int, default=16, help="pairs judged at once")


def score_flags(sub: ArgumentParser, add: Callable, rarely: Callable) -> None:
    reward_model_flags(add, rarely)
    add("--answers", type=Path, required=True,
        help='JSON lines, .gz or parquet of {"prompt", "answer"} or {"messages"}')
    add("--aggregate", choices=[name for name in AGGREGATORS if name != "weighted"],
        default="mean", help="how three scores become one")
    add("--limit", type=positive_int, help="score only the first LIMIT answers (default: all)")
    rarely("--batch-size", type=positive_int, default=32, help="answers scored at once")


def choice_flags(sub: ArgumentParser, add: Callable, rarely: Callable) -> None:
    add("--items", type=Path, required=True,
        help="questions with two options: JSON lines or CSV (docs/data.md)")
    policy_flags(sub, add, rarely, required=False)
    add("--limit", type=positive_int, help="ask only the first LIMIT items (default: all)")
    rarely("--batch-size", type=positive_int, default=32, help="questions asked at once")


def policy_flags(sub: ArgumentParser, add: Callable, rarely: Callable,
                 required: bool = True) -> None:
    add("--policy", type=Path, required=required,
        help="folder of run_ppo.py, or of run_sft.py on preferences")
    rarely("--rm", type=Path, help="folder of run_rm.py with the reward models of the training; "
           "needed if the folder was moved")
    rarely("--sft", type=Path, help="the SFT adapter below it")


def reward_model_flags(add: Callable, rarely: Callable) -> None:
    add("--rm", type=Path, required=True, help="folder of run_rm.py")
    rarely("--sft", type=Path, help="the SFT adapter below it")


# name: its flags, its title, the artefact whose settings it takes (see `parse_with_parent`)
COMMANDS = {
    "models": (models_flags, "base, SFT and PPO model side by side", ("policy", "policy", "")),
    "judge": (judge_flags, "the judge against human preferences", (None, None, "")),
    "rewards": (rewards_flags, "the reward models on pairs, lengths and degenerate answers",
                ("rm", "rm", "action")),
    "best-of-n": (best_of_n_flags, "what choosing among answers gains", ("rm", "rm", "action")),
    "score": (score_flags, "what the reward models say of answers in a file",
              ("rm", "rm", "action")),
    "choice": (choice_flags, "other people's questions with two options",
               ("policy", "policy", "")),
    "chat": (policy_flags, "talk to base and tuned model", ("policy", "policy", "")),
}


def parse(argv):
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    about = {text.split(":")[0]: text for text in __doc__.split("\n\n")}
    for name, (add_flags, title, parent) in COMMANDS.items():
        sub = commands.add_parser(name, help=title, description=about[name])
        sub.parent = parent
        most_used, rarely = (sub.add_argument_group(group) for group in ("most used", "less used"))
        add_flags(sub, most_used.add_argument, rarely.add_argument)
        add_common_flags(sub, out=name != "chat")
        if name not in ("judge", "rewards", "score", "choice"):
            add_sampling_flags(sub)
        if name not in ("rewards", "score", "choice", "chat"):
            add_constitution_flag(rarely.add_argument)
    return parse_with_parent(parser, argv, commands=commands)


def main(argv=None):
    args = parse(argv)
    if args.command in ("models", "chat", "choice") and args.policy and args.rm is None:
        raise VirtueError(f"{args.policy}: names no reward models: give --rm")
    from virtue.evaluation import (  # torch takes seconds
        best_of_n, chat, choice, judging, models, rewards, scoring)
    run = {"models": models.compare, "judge": judging.evaluate, "rewards": rewards.evaluate,
           "best-of-n": best_of_n.evaluate, "score": scoring.evaluate,
           "choice": choice.evaluate, "chat": chat.run}[args.command]
    run(args)


if __name__ == "__main__":
    run_main(main)
