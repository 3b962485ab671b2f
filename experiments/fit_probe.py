"""Can the toy's judge, or a reward model, tell a motive that the
action bears out from one that it does not?

  python experiments/fit_probe.py                                  # the shipped judge
  python experiments/fit_probe.py --model runs/fit                 # of another toy model
  python experiments/fit_probe.py --rm runs/demo/rm --sft runs/demo/sft

Made dialogues with three virtues shown in the action; the last turn claims two of them (fit), two
others (unfit), one (one), one twice in the same words (repeat) or in two wordings (same virtue).
The judge compares pairs that share their action, in both orders; a reward model scores each kind,
standardised.
"""
from __future__ import annotations

import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from virtue.dialogue import encode_conversation, right_pad
from virtue.ethics import FOLLOW_UPS, LENSES, VIRTUES
from virtue.judge import judge_log_odds, opinion
from virtue.lora import use_stack
from virtue.models import score_at
from virtue.plumbing.loading import (base_fingerprint, load_model, load_tokenizer, resolve,
                                     template_fingerprint)
from virtue.plumbing.artefacts import load_reward_models, load_sft
from virtue.plumbing.flags import make_parser
from virtue.toy import grammar
from virtue.toy.words import WORDS

KINDS = ("fit", "unfit", "one", "repeat", "same virtue")
PAIRS = (("fit", "unfit"), ("fit", "one"), ("one", "unfit"), ("one", "repeat"),
         ("one", "same virtue"))


def dialogues(rng: random.Random, lens: str) -> dict[str, list[dict]]:
    """One action with a last turn of each kind: kind -> messages up to the lens's turn."""
    person, thing = rng.choice(grammar.PERSONS), rng.choice(grammar.THINGS)
    question = rng.choice(grammar.QUESTIONS)
    shown = rng.sample(VIRTUES, 3)
    silent = [v for v in VIRTUES if v not in shown]

    def clauses(of: str, *virtues: str) -> list[grammar.Clause]:
        # the seen wordings
        return [grammar.Clause(of, v, "mean", rng.randrange(3)) for v in virtues]
    action = clauses("action", *shown)
    other = clauses(lens, shown[0])[0]
    last = {"fit": clauses(lens, *shown[:2]), "unfit": clauses(lens, *silent), "one": [other],
            "repeat": [other, other],
            "same virtue": [other, other._replace(wording=(other.wording + 1) % 3)]}
    before = {"action": action, "motivation": clauses("motivation", *shown[:2])}
    found = {}
    for kind, talk in last.items():
        said = {**before, lens: talk}
        found[kind] = [{"role": role, "content": text} for name in LENSES[:LENSES.index(lens) + 1]
                       for role, text in (("user", question.format(p=person, t=thing)
                                           if name == "action" else FOLLOW_UPS[name]),
                                          ("assistant", grammar.say(said[name], person, thing)))]
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="toy",
                        help="toy, or another folder of pretrain_toy.py")
    parser.add_argument("--rm", type=Path,
                        help="folder of run_rm.py: probe its models instead of the judge")
    parser.add_argument("--sft", type=Path, help="the SFT adapter below them")
    parser.add_argument("--n", type=int, default=64, help="actions")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    drawn = {lens: [dialogues(random.Random(i), lens) for i in range(args.n)]
             for lens in LENSES[1:]}
    if args.rm is None:
        print("| lens | first kind, second kind | mean P(first better) | share above 0.5 "
              "|\n|---|---|---|---|")
        for lens in LENSES[1:]:
            for a, b in PAIRS:
                pairs = [(d[a], d[b]) for d in drawn[lens]]
                p = opinion(judge_log_odds(model, tokenizer, WORDS, pairs, lens)[0]).mean(1)
                print(f"| {lens} | {a}, {b} | {p.mean():.3f} | {(p > 0.5).float().mean():.2f} |")
        return
    known = dict(base={"id": args.model, "fingerprint": base_fingerprint(resolve(args.model))},
                 template=template_fingerprint(tokenizer))
    sft, parents = load_sft(args.sft, model, **known)
    reward_models, mean, std = load_reward_models(args.rm, model, sft, parents, **known)
    print(f"| lens | {' | '.join(KINDS)} |\n{'|---' * (1 + len(KINDS))}|")
    for k, lens in enumerate(LENSES[1:], 1):
        cells = []
        for kind in KINDS:
            ids, attention = right_pad([encode_conversation(tokenizer, d[kind])[0]
                                        for d in drawn[lens]],
                                       tokenizer.pad_token_id)
            stack, head = reward_models[k]
            with use_stack(model, *stack), torch.no_grad():
                scores = score_at(model, head, ids, attention,
                                  attention.long().sum(1, keepdim=True) - 1)[:, 0]
            cells.append(f"{((scores - mean[k]) / std[k]).mean():+.2f}")
        print(f"| {lens} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
