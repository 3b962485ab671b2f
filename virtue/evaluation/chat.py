"""run_eval.py chat: base and tuned model answer in two columns, with all rewards of each answer."""
from __future__ import annotations

import argparse
import contextlib
import itertools
import shutil
import textwrap
from collections.abc import Callable, Mapping
from typing import NamedTuple

from virtue import VirtueError, generate
from virtue.dialogue import Dialogue, Turn, encode_prompt, followup_ids
from virtue.ethics import FOLLOW_UPS, LENSES
from virtue.evaluation import setup
from virtue.evaluation.report import visible
from virtue.lora import use_stack
from virtue.plumbing import loading
from virtue.plumbing.preview import preview
from virtue.randomness import stream
from virtue.rollout import score_dialogues

HELP = ("/why asks for motivation and consequence of the last answer, /new begins anew, /quit "
        "ends; Ctrl-C ends an answer, or the program; in brackets: a reward model that was "
        "trained on another turn")
TOY_QUESTION = "Anna lost the letter yesterday. How do you act?"
TOY_HINT = ("the toy knows a small world only; ask it, say: "
            f"{TOY_QUESTION} And /new before another question")

Talk = dict[str, list[int]]  # model -> the ids of its conversation so far; {} before the first


class Pair(NamedTuple):
    """The base and the tuned model, and the settings with which they are sampled."""

    loaded: setup.Loaded
    stacks: Mapping[str, setup.Stack]
    max_new_tokens: int
    temperature: float
    system: list[dict] = []


def columns(texts: Mapping[str, str], width: int) -> str:
    """Texts beside each other under their names, width characters in all."""
    each, cells = max(20, width // len(texts) - 2), []
    for name, text in texts.items():
        lines = [textwrap.wrap(part, each) or [""] for part in visible(text).split("\n")]
        cells.append([name, *itertools.chain(*lines)])
    rows = itertools.zip_longest(*cells, fillvalue="")
    return "\n".join("  ".join(f"{cell:{each}}" for cell in row).rstrip() for row in rows)


def answer(pair: Pair, talk: Talk, question: str, uniforms) -> dict[str, Dialogue]:
    """Each model's conversation with its new answer, as a dialogue that has this turn alone.

    uniforms (1, max_new_tokens): the random numbers of both. VirtueError: no room is left.
    """
    base, dialogues = pair.loaded.base, {}
    model, tokenizer = base.model, base.tokenizer
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    for name, stack in pair.stacks.items():
        if talk:
            ids = [*talk[name], *followup_ids(tokenizer, question)]
        else:
            ids = encode_prompt(tokenizer, [*pair.system, {"role": "user", "content": question}])
        if len(ids) > model.config.max_position_embeddings - pair.max_new_tokens:
            raise VirtueError("the conversation has become too long for the model: /new begins "
                              "another")
        with use_stack(model, *stack):
            (new, truncated), = generate.sample(model, [ids], uniforms, eos_id=eos, pad_id=pad,
                                                temperature=pair.temperature)
        turn = Turn(len(ids), len(ids) + len(new), truncated)
        dialogues[name] = Dialogue("", [], ids + new + [eos] * truncated, (turn,))
    return dialogues


def show(pair: Pair, dialogues: Mapping[str, Dialogue], lens: str) -> Talk:
    """Prints the new turns, which are of this lens, with all rewards -> the conversation so far."""
    (base, _, _, rewards), texts = pair.loaded, {}
    scores = rewards.standardise(score_dialogues(
        base.model, rewards.models, [*dialogues.values()], [0] * len(LENSES),
        base.tokenizer.pad_token_id, batch_size=len(dialogues)))
    for (name, d), row in zip(dialogues.items(), scores.T.tolist()):
        (start, end, truncated), = d.turns
        text = base.tokenizer.decode(d.ids[start:end], skip_special_tokens=True,
                                     clean_up_tokenization_spaces=False).strip()
        shown = [f"{other} {score:+.2f}" if other == lens else f"({other} {score:+.2f})"
                 for other, score in zip(LENSES, row)]
        texts[name] = f"{text}{' ...' if truncated else ''}\n{'  '.join(shown)}"
    print(columns(texts, shutil.get_terminal_size().columns), end="\n\n")
    return {name: d.ids for name, d in dialogues.items()}


def run(args: argparse.Namespace) -> None:
    """The command, with its parsed flags: the conversation, unless --dry-run says not to."""
    if not preview(args, {}, "", flat=[["sft", "policy"]], sampling=setup.sampling_plan(args, 1)):
        chat(args)


def chat(args: argparse.Namespace) -> None:
    """The conversation, until /quit. VirtueError: an artefact that does not load."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  importing it gives input() arrow keys and a history

    print("loading base, adapters and reward models ...", flush=True)
    base = loading.open_base(args)
    generate.check_context(base.model, args.max_prompt_tokens, args.max_new_tokens)
    loaded = setup.load(args, base)
    setup.load_policy(loaded, args.policy, args.rm)
    stacks = {"base": (), "tuned": setup.flat(base.model, (*loaded.sft, "policy"))}
    system = [{"role": "system", "content": args.system}] if getattr(args, "system", None) else []
    pair = Pair(loaded, stacks, args.max_new_tokens, args.temperature, system)
    count = itertools.count()

    def ask(talk: Talk, question: str, lens: str) -> Talk:
        uniforms = stream(args.seed, "chat", next(count)).random((1, args.max_new_tokens))
        return show(pair, answer(pair, talk, question, uniforms), lens)

    def fits(line: str) -> bool:
        return generate.fits(base.tokenizer, [*system, {"role": "user", "content": line}],
                             args.max_prompt_tokens)

    print(HELP, *[TOY_HINT] * (args.model == "toy"), sep="\n")
    talk: Talk = {}
    while True:
        try:
            line = input("you> ").encode(errors="replace").decode().strip()
        except (EOFError, KeyboardInterrupt):
            return print("\nbye")
        if line == "/quit":
            return
        try:
            if line and not line.startswith("/") and not fits(line):
                print(f"longer than --max-prompt-tokens {args.max_prompt_tokens}: ask in fewer "
                      "words")
            else:
                talk = reply(line, talk, ask)
        except VirtueError as error:
            print(error)
        except KeyboardInterrupt:
            print("\nstopped; the question is forgotten")


def reply(line: str, talk: Talk, ask: Callable[[Talk, str, str], Talk]) -> Talk:
    """Carries out one line that the person typed -> the conversation after it."""
    if line == "/new":
        return {}
    if line == "/why" and talk:
        branch = talk  # the conversation itself goes on from the answer
        for lens, question in FOLLOW_UPS.items():
            print(question)
            branch = ask(branch, question, lens)
    elif line.startswith("/"):
        print("there is no answer yet" if line == "/why" else HELP)
    elif line:
        return ask(talk, line, "action")
    return talk
