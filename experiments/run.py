"""Run named experiments over seeds, reuse every stage that is finished, print their tables.

  python experiments/run.py --list
  python experiments/run.py lenses --seeds 0 1 2
  python experiments/run.py all --seeds 0 1 2 3 4 5 6 7 --jobs 2
  python experiments/run.py lenses --scale small --jobs 2
  python experiments/run.py lenses --arms "action alone" "one pooled model" --seeds 0 1 2 3 4 5 6 7
  python experiments/run.py lenses --table        # only the tables, of what is finished
  python experiments/run.py causes --dry-run      # only the commands, and what is done already

An experiment is a question and a list of arms. An arm is a recipe: it says what it changes in the
default one, stage by stage, as flags or as a patch of the code (experiments/patches). To ask a
question of your own, add an entry to EXPERIMENTS:

    "mine": ("Does a wider clip help?", [
        DEFAULT,                                         # the others are compared with the first
        Arm("clip 0.4", policy="--clip-range 0.4"),      # flags of run_ppo.py
        Arm("no whitening", patch="no-whitening"),       # a change of the code
        Arm("fewer pairs, wider clip", preferences="--limit 96", policy="--clip-range 0.4"),
    ]),

Arms share the stages that they have in common, and a stage that is finished is not run again, in
whatever experiment it comes. engine.py runs stages, tables.py reads what they wrote.
"""
from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from engine import ROOT, Arm, chain, commands, last_error, lines_of, run_locked  # noqa: E402
from tables import LEGEND, best_of_n_table, load, plain_tables, tables  # noqa: E402
from virtue.plumbing.flags import make_parser  # noqa: E402

DEFAULT = Arm("default")


def ppo(*variants: tuple[str, str]) -> list[Arm]:
    """Arms that differ in PPO's flags only."""
    return [Arm(name, policy=flags) for name, flags in variants]


def patched(*variants: tuple[str, str]) -> list[Arm]:
    """Arms that differ by a patch only."""
    return [Arm(name, patch=patch) for name, patch in variants]


# The defaults of run_ppo.py, run_rm.py and run_sft.py (a test keeps them so).
LR, VALUE_LR, RM_LR, SFT_LR = 2e-3, 4e-3, 2e-3, 1e-3

# How many answers the study's limits cut, it does not say. Of the SFT model's answers on the toy
# (median 31 tokens) a limit of 16 cuts 99.9 %, 24 78 %, 30 53 %, 34 about 10 %. The first two stand
# for answers of hundreds of tokens, as a 7B chat model gives, the last two for hh-rlhf's own (1,600
# harmless test dialogues: by a count of words and marks, 51 % exceed 32 tokens, 13 % 90).
CUTS = {16: "32 of hundreds", 24: "90 of hundreds", 30: "32 of hh-rlhf", 34: "90 of hh-rlhf"}
UNCUT = "--max-new-tokens 64"  # at evaluation what was learned is read off whole answers
KEEP = "--truncated keep"  # the study speaks of no truncated answer that it dropped

# The study's reward models read 100 tokens: with turns of at most 32 that is the whole action,
# about half of the motivation and nothing of the consequence. On the toy the same takes 64 tokens
# where answers are whole, 50 where they are cut at 16.  20 x 16 pairs a step and 2 epochs make 6
# steps of 650 pairs; the same number for PPO: 3 batches, 2 passes, one step each. The report gives
# 1.41e-5 for the reward models: 0.14 of the usual 1e-4 for LoRA on 7B, hence 0.14 of the toy's
# default. It gives no rate for PPO. If PPO has the same, it is 0.14 of 1e-4, but 1.4 times the 1e-5
# that is usual for PPO (docs/mistral.md): hence the arms of six steps at 0.14, 1 and 1.4 times the
# default. The report names no schedule either; its code leaves TRL's, linear.
STUDY_RM_STEPS = "--batch-size 20 --accumulation 16"
STUDY_PPO_STEPS = ("--rollout-size 320 --minibatch-size 320 --iterations 3 --value-warmup 0 "
                   "--ppo-epochs 2")
STUDY_RM_LR = f"--lr {0.14 * RM_LR:.2g}"
STUDY_RM, RAW = "cut-rm-inputs constant-rm-rate", "raw-scores fp16-scores"  # patches


def study_ppo(share: float) -> str:
    """PPO's six steps, at a share of the default learning rates."""
    return f"{STUDY_PPO_STEPS} --lr {share * LR:.2g} --value-lr {share * VALUE_LR:.2g}"


STUDY = dict(base="--quantize nf4 --max-new-tokens 16", sft=None,
             preferences=f"{KEEP} --orders one --limit 768",
             rm=f"--labels hard {STUDY_RM_STEPS} --epochs 2 {STUDY_RM_LR} --max-tokens 50",
             policy=study_ppo(0.14), patch=f"{STUDY_RM} {RAW}")
LITERAL = dict(STUDY, base="--quantize nf4 --max-new-tokens 32",
               rm=f"--labels hard {STUDY_RM_STEPS} --epochs 2 --lr 1.41e-5 --max-tokens 100",
               policy=f"{STUDY_PPO_STEPS} --lr 1.41e-5 --value-lr 1.41e-5")

# TRL's PPOConfig when the study was made (trl/trainer/ppo_config.py of trl 0.7.11 to 0.9.6,
# February to July 2024): 1.41e-5 for policy and value alike, 128 dialogues a batch and a step, 4
# epochs, an adaptive KL coefficient; scores neither scaled nor clipped, gradients not clipped, no
# missing-EOS penalty, no critic warm-up (the patch trl-2024 has what has no flag). Neither says:
# one trunk for policy and value, a constant rate, Adam's eps of 1e-8, minibatches skipped at a mean
# ratio above 10. 650 prompts make 5 batches of 128, so 20 steps.
TRL = (f"--value-warmup 0 --lr {1.4 * LR:.2g} --value-lr {1.4 * LR:.2g} --kl-coef 0.2 "
       "--kl-target 6 --lam 0.95 --clip-range 0.2 --eos-penalty 0")
TRL_PPO = f"{TRL} --rollout-size 128 --minibatch-size 128 --iterations 5 --ppo-epochs 4"
# The code published with the report (github.com/arvind6599/EthicalLLM, arvind/rl_training.py) sets
# that rate, 16 dialogues a batch and a step, 1 epoch, one pass of 10,000 prompts (the toy has 933:
# 58 steps), and as reward mean - 0.5 std of the dialogue's three scores, by the std of a sample (of
# three values: uwo's with 0.61, the patch uwo-sample). Its reward models had those pairs at least,
# so 62 steps or more; the toy's 650 at 20 a step make 65. (Their two outputs, of which PPO took the
# softmax: two_outputs.py.)
CODE_PPO = (f"{TRL} --rollout-size 16 --minibatch-size 16 --iterations 58 --ppo-epochs 1 "
            "--aggregate uwo")
CODE_RM = f"--labels hard --batch-size 20 --epochs 2 {STUDY_RM_LR} --max-tokens 50"

AGGREGATORS = [(name, f"--aggregate {name}") for name in ("min", "uwo", "median", "lsc")]
NOISE = dict(patch="label-noise")


def rank(r: int | str, divisor: int = 1) -> dict[str, str]:
    """Flags of an arm of another LoRA rank, at a part of the learning rates."""
    return dict(sft=f"--rank {r} --lr {SFT_LR / divisor:g}",
                rm=f"--rank {r} --lr {RM_LR / divisor:g}",
                policy=f"--rank {r} --lr {LR / divisor:g} --value-lr {VALUE_LR / divisor:g}")


def cut(n: int) -> Arm:
    return Arm(f"cut at {n}, as {CUTS[n]}", base=f"--max-new-tokens {n}", revisions=KEEP,
               preferences=KEEP, report=UNCUT)


def slow_ppo(n: int) -> Arm:
    return Arm(f"PPO's lr / {n}", policy=f"--lr {LR / n:g} --value-lr {VALUE_LR / n:g}")


def slow_rm(n: int) -> Arm:
    return Arm(f"reward models' lr / {n}", rm=f"--lr {RM_LR / n:g}")


# SmolLM2-135M-Instruct on this project's English prompts. Untold it goes on for hundreds of
# tokens. Its judge has one opinion for all virtues, so the pairs are made by contrast. The study's
# arm has the study's limits and rates word for word, and the judge's labels, whatever they are
# worth. The sizes are for one GPU, where TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 helps; bf16 is too
# coarse for this model.
ENGLISH = dict(
    base="--model smollm2 --max-new-tokens 96 --system "
         "'You are a helpful assistant who always answers in a single short sentence.'",
    revisions="--feedback contrast --contrasts 2 --batch-size 128",
    sft="--epochs 2 --batch-size 8",
    preferences=f"--feedback contrast --contrasts 3 {KEEP} --batch-size 128 --judge-limit 96",
    rm="--share first --epochs 2 --batch-size 8 --lr 5e-4", unseen=True,
    policy="--iterations 20 --rollout-size 64 --minibatch-size 16 --micro-batch-size 16 "
           "--lr 3e-4 --value-lr 3e-4 --kl-coef 0.06",
    report="--prompted --judge-limit 42 --batch-size 64")
ENGLISH_STUDY = dict(
    base="--model smollm2 --max-new-tokens 32", sft=None,
    preferences=f"{KEEP} --orders one --any-judge --batch-size 128",
    rm="--labels hard --batch-size 20 --accumulation 16 --epochs 2 --lr 1.41e-5 --max-tokens 100",
    policy="--value-warmup 0 --lr 1.41e-5 --value-lr 1.41e-5 --kl-coef 0.2 --kl-target 6 "
           "--lam 0.95 --clip-range 0.2 --eos-penalty 0 --rollout-size 64 --minibatch-size 64 "
           "--micro-batch-size 16 --iterations 10 --ppo-epochs 4",
    report="--prompted --judge-limit 42 --batch-size 64",
    patch=f"{STUDY_RM} trl-2024 raw-scores")

EXPERIMENTS: dict[str, tuple[str, list[Arm]]] = {
    "english": ("Does the method work on a real chat model of 135 M? Does training beat a prompt? "
                "Does the study's recipe stall there, too?", [
        Arm("contrast", **ENGLISH), Arm("the study", **ENGLISH_STUDY)]),
    "default": ("What does each stage gain, and what would SFT on the chosen answers? Do reward "
                "models that PPO never saw agree?", [
        Arm("default", best_of=True), Arm("SFT on chosen", on_chosen=True),
        Arm("half the pairs, unseen models beside", rm="--share first", unseen=True)]),
    "lenses": ("Do the lenses matter?", [
        DEFAULT, *ppo(("action alone", "--aggregate weighted --weights 1 0 0"),
                      ("action, motivation", "--aggregate weighted --weights 0.5 0.5 0")),
        Arm("one pooled model", patch="pooled-rm"),
        Arm("rules, not virtues", preferences="--ask rules"),
        *ppo(("answers only", "--reward-turns answer")),
        *patched(("train the action only", "train-action-only"))]),
    "study": ("Does the study's recipe give its stalemate?", [
        DEFAULT, Arm("translated", **STUDY),
        Arm("translated, whole answers at evaluation", **STUDY, report=UNCUT),
        Arm("literal values", **LITERAL),
        Arm("literal values, whole answers at evaluation", **LITERAL, report=UNCUT),
        Arm("its small steps alone", policy=study_ppo(0.14)),
        Arm("all but its small steps", **{**STUDY, "policy": ""}, report=UNCUT),
        Arm("six steps at the full rate", policy=study_ppo(1)),
        Arm("six steps at 1.4 times it", policy=study_ppo(1.4)),
        Arm("translated, six steps at 1.4 times the rate", **{**STUDY, "policy": study_ppo(1.4)},
            report=UNCUT),
        Arm("PPO by TRL's defaults of its time",
            **{**STUDY, "policy": TRL_PPO, "patch": f"{STUDY_RM} trl-2024 {RAW}"}, report=UNCUT),
        Arm("TRL's defaults alone", policy=TRL_PPO, patch="trl-2024 raw-scores"),
        Arm("steps as in its code",
            **{**STUDY, "policy": CODE_PPO, "rm": CODE_RM,
               "patch": f"cut-rm-inputs trl-2024 uwo-sample {RAW}"}, report=UNCUT),
        Arm("its code's PPO alone", policy=CODE_PPO, patch="trl-2024 uwo-sample raw-scores"),
        Arm("its reward models' steps alone", patch="constant-rm-rate",
            # Three of half the pairs: six steps
            rm=f"{STUDY_RM_STEPS} --epochs 3 {STUDY_RM_LR}")]),
    "causes": ("Which one cause, put into the default recipe, costs how much?", [
        DEFAULT, Arm("no SFT", sft=None), cut(16), cut(24),
        Arm("reward input cut at 64", rm="--max-tokens 64", patch="cut-rm-inputs"),
        *patched(("scores not standardised", "raw-scores")), slow_ppo(10), slow_rm(10),
        Arm("judge in one order", preferences="--orders one"),
        *patched(("fp16 scores", "fp16-scores")), Arm("NF4 base", base="--quantize nf4"),
        Arm("NF4 base, merged reward models", base="--quantize nf4", patch="merged-rm")]),
    "causes-more": ("The same, more of it: cuts, LoRA's rank, whole matrices", [
        DEFAULT, cut(30), cut(34), Arm("LoRA rank 1", **rank(1)), Arm("LoRA rank 64", **rank(64)),
        Arm("whole matrices", **rank("whole", 10))]),
    "aggregators": ("Which aggregator?", [
        Arm("mean"), *patched(("mean, paid at the end", "pay-at-end")), *ppo(*AGGREGATORS)]),
    "aggregators-noise": ("Which aggregator, with a quarter of the labels turned?", [
        Arm("mean", **NOISE), *(Arm(name, policy=flags, **NOISE) for name, flags in AGGREGATORS)]),
    # (that the value function has an adapter of its own: docs/examples/shared-trunk.diff)
    "details": ("What are the details of PPO worth that people remove?", [
        DEFAULT, *patched(("no value clipping", "no-value-clipping"),
                          ("no whitening", "no-whitening"),
                          ("values of the reference's features", "value-on-reference-features")),
        *ppo(("no critic warm-up", "--value-warmup 0"), ("adaptive KL", "--kl-target 3"),
             ("no missing-EOS penalty", "--eos-penalty 0"))]),
}


def show(name: str, arms: Sequence[Arm], runs: Path, seeds: Sequence[int], scale: str) -> None:
    """The tables of what is finished, and why the rest is not."""
    finished, missing, codes, best = {arm.name: {} for arm in arms}, [], set(), {}
    for arm in arms:
        for seed in seeds:
            stages = chain(arm, seed, scale)
            if "best" in stages and stages["best"].done(runs):
                folder = runs / stages["best"].folder
                best.setdefault(arm.name, []).append(folder / "best_of_n.json")
            if stages["report"].done(runs):
                finished[arm.name][seed] = load(runs / stages["report"].folder)
                codes |= {json.loads((runs / stage.folder / "run.json").read_text())["code"]
                          for stage in stages.values() if stage.done(runs)}
                continue
            logs = [runs / f"{stage.folder}.log" for stage in stages.values()
                    if not stage.done(runs)]
            failed = next((log for log in logs if log.is_file()
                           and lines_of(log)[-1].startswith("# failed")), None)
            why = f"{failed.stem.split('-')[0]} failed: {last_error(failed)}" if failed else ""
            missing.append(f"- {arm.name}, seed {seed}: {why or 'not finished'}")
    print(f"\n## {name}: {EXPERIMENTS[name][0]}\n")
    if scale == "fast":
        print("**At `--scale fast`: a check that all runs, not a result.**\n")
    if scale == "small":
        print("At `--scale small`: half of the default's pairs and prompts, a third of its "
              "dialogues.\n")
    gold = any(run.gold[run.final] for of_arm in finished.values() for run in of_arm.values())
    print((tables if gold or not any(finished.values()) else plain_tables)(finished), end="\n\n")
    for arm, files in best.items():
        if text := best_of_n_table(files):
            print(f"Gold of the best of n of what PPO starts from, {arm}, {len(files)} seeds:\n\n"
                  f"{text}\n")
    if gold:
        print(" ".join(LEGEND.splitlines()))
    if len(codes) > 1:
        print(f"\n**Warning: {len(codes)} versions of the code made these stages "
              f"({', '.join(sorted(codes))}).**")
    if missing:
        print("\n" + "\n".join(missing))


def parse(argv: Sequence[str] | None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("experiments", nargs="*", metavar="experiment", help=f"{', '.join(EXPERIMENTS)}, or all")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2],
        help="each makes its own data, reward models and PPO")
    add("--arms", nargs="+", metavar="ARM",
        help="of each experiment only these, beside its first, with which they are compared")
    add("--runs", type=Path, default=ROOT / "runs/experiments",
        help="folder of the stages' folders")
    add("--jobs", type=int, default=1, help="stages at once, one thread each: at most one a core")
    add("--scale", choices=("full", "small", "fast"), default="full",
        help="small: about half of everything, in a third of the time; fast: to see that all runs")
    for flag, text in (("--list", "name the experiments and their arms"),
                       ("--dry-run", "print the commands, run nothing"),
                       ("--table", "print the tables of what is finished, run nothing")):
        add(flag, action="store_true", help=text)
    args = parser.parse_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    if "all" in args.experiments:
        args.experiments = list(EXPERIMENTS)
    unknown = not args.experiments or set(args.experiments) - EXPERIMENTS.keys()
    if not args.list and (unknown or args.jobs < 1 or min(args.seeds) < 0):
        parser.error(f"give experiments of {', '.join(EXPERIMENTS)}, or all; --jobs of at least 1; "
                     "seeds of at least 0")
    there = {arm.name for name in args.experiments for arm in EXPERIMENTS[name][1]}
    if not args.list and (odd := sorted(set(args.arms or ()) - there)):
        parser.error(f"no arm {odd[0]!r} in {', '.join(args.experiments)}: --list names them")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        for name, (question, arms) in EXPERIMENTS.items():
            print(f"{name}: {question}\n  {'; '.join(arm.name for arm in arms)}")
        return 0
    chosen = {name: [arm for i, arm in enumerate(EXPERIMENTS[name][1])
                     if i == 0 or not args.arms or arm.name in args.arms]
              for name in args.experiments}
    runs = args.runs.resolve()
    runs = runs.relative_to(ROOT) if runs.is_relative_to(ROOT) else runs
    os.chdir(ROOT)
    label, stages, failed = {}, [], {}
    for seed in args.seeds:  # seed by seed, so that a whole table, if a wide one, comes early
        for name, arms in chosen.items():
            for arm in arms:
                for stage in chain(arm, seed, args.scale).values():
                    stages.append(stage)
                    label.setdefault(stage.folder, f"{name}: {arm.name}, seed {seed}")
    if args.dry_run and not args.table:
        commands(stages, runs)
        return 0
    if not args.table:
        failed = run_locked(stages, runs, args.jobs, label)
    for name, arms in chosen.items():
        show(name, arms, runs, args.seeds, args.scale)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
