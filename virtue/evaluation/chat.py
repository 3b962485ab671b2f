"""Talk to the tuned model in the terminal: base and tuned answers in two columns, each with every reward model's standardised score."""
from __future__ import annotations

import contextlib
import itertools
import shutil
import textwrap

HELP = "/why asks for motivation and consequence of the last answer, /new begins anew, /quit ends; Ctrl-C ends an answer, or the program; in brackets: a reward model that was trained on another turn"
TOY_QUESTION = "Anna lost the letter yesterday. How do you act?"


def columns(texts: dict[str, str], width: int) -> str:
    """Texts beside each other under their names; control characters are shown, not sent to the terminal."""
    each, cells = max(20, width // len(texts) - 2), []
    for name, text in texts.items():
        clean = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
        cells.append([name, *(line for part in clean.split("\n") for line in textwrap.wrap(part, each) or [""])])
    return "\n".join("  ".join(f"{cell:{each}}" for cell in row).rstrip() for row in itertools.zip_longest(*cells, fillvalue=""))


def chat(args):
    """The conversation of run_eval.py chat with its parsed flags, until /quit. VirtueError: an artefact that does not load."""
    from virtue import VirtueError
    from virtue.plumbing.artefacts import load_artifact, read_manifest
    from virtue.dialogue import Dialogue, Turn, encode_prompt, followup_ids
    from virtue.ensemble import standardize
    from virtue.ethics import FOLLOW_UPS, LENSES
    from virtue.generate import check_context, fits, sample
    from virtue.lora import flatten, use_stack
    from virtue.plumbing.artefacts import load_reward_models, load_sft
    from virtue.rollout import score_dialogues
    from virtue.plumbing.loading import open_base
    from virtue.randomness import stream
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  importing it gives input() arrow keys and a history

    # Build
    print("loading base, adapters and reward models ...", flush=True)
    base = open_base(args)
    model, tokenizer, known = base.model, base.tokenizer, dict(base=base.info, template=base.template)
    check_context(model, args.max_prompt_tokens, args.max_new_tokens)
    sft, parents = load_sft(args.sft, model, **known)
    reward_models, mean, std = load_reward_models(args.rm, model, sft, parents, **known)
    parents |= {role: args.rm / lens for lens in LENSES if (role := f"rm/{lens}") in read_manifest(args.policy, "policy")["parents"]}
    load_artifact(args.policy, model, "policy", stage="policy", parents=parents, **known)
    flatten(model, (*sft, "policy"), "rollout", model.dtype)  # one adapter is faster than two
    stacks, count = {"base": (), "tuned": ("rollout",)}, itertools.count()
    pad, eos, room = tokenizer.pad_token_id, tokenizer.eos_token_id, model.config.max_position_embeddings - args.max_new_tokens

    def answer(talk, question):
        """talk: the ids so far of each model, none at first -> the Dialogue that each makes of it, with the new turn alone."""
        uniforms, found = stream(args.seed, "chat", next(count)).random((1, args.max_new_tokens)), {}  # the same for both models
        for name, stack in stacks.items():
            ids = [*talk[name], *followup_ids(tokenizer, question)] if talk else encode_prompt(tokenizer, [{"role": "user", "content": question}])
            if len(ids) > room:
                raise VirtueError("the conversation has become too long for the model: /new begins another")
            with use_stack(model, *stack):
                (new, truncated), = sample(model, [ids], uniforms, eos_id=eos, pad_id=pad, temperature=args.temperature)
            found[name] = Dialogue("", [], ids + new + [eos] * truncated, (Turn(len(ids), len(ids) + len(new), truncated),))
        return found

    def show(found, lens):
        scores = standardize(score_dialogues(model, reward_models, [*found.values()], [0] * len(LENSES), pad, batch_size=len(found)), mean, std)
        texts = {}
        for (name, d), row in zip(found.items(), scores.T.tolist()):
            (start, end, truncated), = d.turns
            text = tokenizer.decode(d.ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
            rewards = [f"{k} {score:+.2f}" if k == lens else f"({k} {score:+.2f})" for k, score in zip(LENSES, row)]
            texts[name] = f"{text}{' ...' if truncated else ''}\n{'  '.join(rewards)}"
        print(columns(texts, shutil.get_terminal_size().columns), end="\n\n")
        return {name: d.ids for name, d in found.items()}

    talk: dict[str, list[int]] = {}
    print(HELP, *[f"the toy knows a small world only; ask it, say: {TOY_QUESTION} And /new before another question"] * (args.model == "toy"), sep="\n")
    while True:
        try:
            line = input("you> ").encode(errors="replace").decode().strip()
        except (EOFError, KeyboardInterrupt):
            return print("\nbye")
        try:
            if line == "/quit":
                return
            elif line == "/new":
                talk = {}
            elif line == "/why" and talk:
                branch = talk  # the conversation itself goes on from the answer
                for lens, question in FOLLOW_UPS.items():
                    print(question)
                    branch = show(answer(branch, question), lens)
            elif line.startswith("/"):
                print("there is no answer yet" if line == "/why" else HELP)
            elif line and not fits(tokenizer, [{"role": "user", "content": line}], args.max_prompt_tokens):
                print(f"longer than --max-prompt-tokens {args.max_prompt_tokens}: ask in fewer words")
            elif line:
                talk = show(answer(talk, line), "action")
        except VirtueError as error:
            print(error)
        except KeyboardInterrupt:
            print("\nstopped; the question is forgotten")
