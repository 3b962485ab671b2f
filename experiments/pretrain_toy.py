"""Make the toy's tiny Mistral: tokenizer, pre-training on samples of the grammar, a check, save.

    python experiments/pretrain_toy.py --out runs/quick --steps 50   # a quick look

The shipped folder was made by three commands, 45, 50 and 20 minutes on one core:

    python experiments/pretrain_toy.py --out runs/toy-1
    python experiments/pretrain_toy.py --out runs/toy-2 --init runs/toy-1 --fit-steps 2000
    python experiments/pretrain_toy.py --out runs/toy-3 --init runs/toy-2 --fit-steps 600 \\
        --seed 7 --borrow 0.4 --texts 40 --pairs 12 --reviews 10 --lr 7.5e-4 --matrix-lr 0.005

Good and bad clauses are mixed evenly, so that the base model is no better than the world it has
read. It learns four tasks in the one chat format: dialogues; revisions (answer, critique, new
answer); the judge's five questions about a pair of dialogues, with the noise and the biases that
``grammar.judge_logit`` documents (the noise enters as its expectation, a soft target); and, about
the same pair, a sixth question: which virtues each shows. Without that one, the judge learned in
the same time only which dialogue is better overall. Labels come from the grammar's latent clauses,
never from gold. Pairs of answers, the shortest, dominate the judge's first third: what is learned
on them carries over to the longer lenses.

After the first phase the judge takes almost any virtuous motive for a good one, also one that its
action does not bear out. The second (--fit-steps) teaches the difference: most pairs of motivations
and consequences share one good action and differ by how they fit it; broken and repeated sentences
cost more; what is true to the action is asked in words, sentence by sentence. In it the model also
meets the judge's other wording and the extra questions of virtue/ethics.py, and questions with
their words shuffled, so that naming the person does not hang on places. The third command, with
more text at a quarter of the rates, gives back the naming that the second loses; a word of its
questions is often replaced (--borrow), since a question with the rare word "judge" had called up
the judge's answers (docs/experiments.md, section 5).
"""
from __future__ import annotations

import json
import math
import random
import re
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from virtue.dialogue import encode_conversation, right_pad
from virtue.ethics import JUDGE_LABELS, LENSES, VIRTUES
from virtue.judge import (encode_questions, judge_log_odds, label_ids, opinion, pack,
                          pair_text, questions)
from virtue.plumbing.flags import make_parser
from virtue.toy import grammar
from virtue.toy.words import WORDS

SPECIAL = ["<pad>", "<s>", "</s>", "[INST]", "[/INST]"]
TEMPLATE = ("{{ bos_token }}{% for m in messages %}"
            "{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
            "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}")


def _borrowed() -> list[str]:
    """Every word of the judge's questions, of the constitution and of the seen wordings."""
    asked = [*WORDS.pairs.values(), *WORDS.about.values(), *WORDS.questions.values(),
             *WORDS.extra.values(), WORDS.critique, WORDS.revision]
    ethics = [*VIRTUES, *(text for texts in WORDS.constitution.values() for text in texts)]
    seen = [wording
            for lens, virtues in grammar.WORDINGS.items()
            for poles in virtues.values()
            for pole, wordings in poles.items()
            for i, wording in enumerate(wordings) if not grammar.is_held_out(lens, pole, i)]
    text = " ".join([*asked, *ethics, "true false broken good bad none", *seen])
    return sorted(set(re.findall("[a-z]+", text.lower())) - {"p", "t"})


BORROWED = _borrowed()


def draw_prompt(rng: random.Random, jumble: float = 0.0,
                borrow: float = 0.0) -> tuple[str, str, str]:
    """A question with its person and thing.

    With probability ``jumble`` the words of its first sentence are shuffled, so that naming them
    does not hang on the places that the few seen questions give them; with probability ``borrow``
    one or two of them are replaced, by words of other tasks or by letters at random, so that a word
    which is new in a question does not call up another task.
    """
    person, thing = rng.choice(grammar.PERSONS), rng.choice(grammar.THINGS)
    question = rng.choice(grammar.QUESTIONS)
    first, rest = question.split(". ", 1)
    words = first.split()
    if borrow and rng.random() < borrow:
        no_names = [i for i, word in enumerate(words) if "{" not in word]
        for place in rng.sample(no_names, rng.choice((1, 2))):
            words[place] = (rng.choice(BORROWED) if rng.random() < 0.5 else
                            "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 7))))
    if jumble and rng.random() < jumble:
        rng.shuffle(words)
    question = f"{' '.join(words)}. {rest}"
    return question.format(p=person, t=thing), person, thing


def draw_text(rng: random.Random, jumble: float = 0.0, borrow: float = 0.0) -> list[dict]:
    """One language-modelling conversation: a dialogue (two in three) or a revision."""
    prompt, person, thing = draw_prompt(rng, jumble, borrow)
    if rng.random() < 0.33:
        return grammar.sample_revision(rng, prompt, person, thing)
    return grammar.sample_dialogue(rng, prompt, person, thing)[0]


def draw_pair(rng: random.Random, lens: str, unseen: bool = False, fit: bool = False):
    """Two dialogues about one prompt, up to the lens's turn, with their latent clauses.

    With ``fit`` they share a good action: a motivation or consequence differs by how it fits.
    """
    prompt, person, thing = draw_prompt(rng, 0.4 if fit else 0.0)
    turns = LENSES.index(lens) + 1
    settings = dict(turns=turns, broken_rate=0.06, unseen=unseen)
    if fit and turns > 1:
        settings = dict(turns=turns, broken_rate=0.1, fitting=0.5, repeats=0.15, character=0.9,
                        action=grammar.sample_action(rng, 0.9))
    return [grammar.sample_dialogue(rng, prompt, person, thing, **settings) for _ in range(2)]


def encode_review(rng: random.Random, tokenizer) -> tuple[list[int], int]:
    """A dialogue with a good action, and the question whether its last answer is true to it.

    Returned with the length of the reply.
    """
    prompt, person, thing = draw_prompt(rng, 0.4)
    lens = rng.choice(LENSES[1:])
    messages, latent = grammar.sample_dialogue(
        rng, prompt, person, thing, turns=LENSES.index(lens) + 1, broken_rate=0.06,
        character=0.5 + 0.5 * rng.random(), fitting=0.5)
    messages += [{"role": "user", "content": "Is the last answer true to the action?"},
                 {"role": "assistant", "content": grammar.review(lens, latent)}]
    ids, spans = encode_conversation(tokenizer, messages)
    return ids, spans[-1][1] - spans[-1][0]


def encode_findings(tokenizer, first, second, lens: str, wording: str = "trained",
                    fit: bool = False) -> tuple[list[int], int]:
    """The sixth question about a pair with its answer, and the answer's length.

    It begins with the prefix that ``encode_questions`` makes. With ``fit`` and a lens that can fit,
    it is asked what of the two is true to the action.
    """
    pair = pair_text(WORDS, first[0], second[0], lens, wording)
    latents = first[1], second[1]
    if fit and lens != "action":
        user = pair + " Which is true to the action?"
        found = ". ".join(f"{label} {grammar.review(lens, latent)}"
                          for label, latent in zip(JUDGE_LABELS, latents))
    else:
        user = pair + " Which shows more of what?"
        worth = [grammar.worth(latent, lens) for latent in latents]
        found = ", ".join(" ".join([v, *(_finding(w[v]) for w in worth)]) for v in VIRTUES)
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": found}]
    ids, spans = encode_conversation(tokenizer, messages)
    return ids, spans[0][1] - spans[0][0]


def _finding(worth: float) -> str:
    return "good" if worth > 0 else "bad" if worth < 0 else "none"


def make_tokenizer(seed: int, vocab_size: int):
    """A byte-level BPE of ``vocab_size``, of the grammar's own text, in transformers' format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    rng = random.Random(seed)
    texts = [" " + m["content"] for _ in range(6000) for m in draw_text(rng)]
    for i in range(200):
        (first, _), (second, _) = draw_pair(rng, LENSES[i % 3])
        texts += questions(WORDS, first, second, LENSES[i % 3])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["[INST]", "[/INST]"], clean_up_tokenization_spaces=False)
    fast.chat_template = TEMPLATE
    return fast


def predicts_answer(width: int, ends: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Row by row, which columns predict the answer, whose last token is at ``ends``.

    Column j predicts token j + 1, so that a row of ``width`` tokens has one column less.
    """
    column = torch.arange(width - 1)
    return (column < ends) & (column >= ends - torch.tensor(lengths)[:, None])


class Samples(torch.utils.data.IterableDataset):
    """Each step's padded batch of texts and packed batch of judge questions with their labels."""

    def __init__(self, tokenizer, args, steps: int, fit: bool):
        self.tokenizer, self.args, self.steps, self.fit = tokenizer, args, steps, fit

    def __iter__(self):
        rng = random.Random(self.args.seed + (3 if self.fit else 1))
        jumble, borrow = 0.4 if self.fit else 0.0, self.args.borrow
        for step in range(self.steps):
            texts = [draw_text(rng, jumble, borrow) for _ in range(self.args.texts)]
            rows = [encode_conversation(self.tokenizer, text)[0] for text in texts]
            reviews = self.args.reviews if self.fit else 0
            reviews = [encode_review(rng, self.tokenizer) for _ in range(reviews)]
            judged = self._judged(rng, step)
            yield *right_pad(rows, self.tokenizer.pad_token_id), *judged, reviews

    def _judged(self, rng: random.Random, step: int) -> tuple[torch.Tensor, ...]:
        """Pairs of one lens, packed, with where their answers are and the judge's labels."""
        weights = (1, 3, 3) if self.fit else (8, 1, 1) if step < self.steps / 3 else (3, 3, 3)
        lens = rng.choices(LENSES, weights=weights)[0]
        pairs = self.args.pairs * (2 / 3 if self.fit else 1)
        pairs = round(pairs * {"action": 1.0, "motivation": 0.75, "consequence": 0.6}[lens])
        slip = 1.0 if self.fit else 0.0
        encoded, targets, lengths = [], [], []
        for _ in range(max(1, pairs)):
            first, second = draw_pair(rng, lens, fit=self.fit and rng.random() < 0.6)
            asked, wording = VIRTUES, "trained"
            if self.fit:  # what only the evaluation asks, and in other words
                own = "helpfulness" if lens == "action" else "sincerity"
                asked = (*VIRTUES, rng.choice((own, "rules")))
                wording = rng.choice(("trained", "trained", "other"))
            prefix, endings = encode_questions(
                self.tokenizer, WORDS, first[0], second[0], lens, asked, wording)
            findings, length = encode_findings(
                self.tokenizer, first, second, lens, wording, self.fit and rng.random() < 0.7)
            assert findings[:len(prefix)] == prefix
            encoded.append((prefix, [*endings, findings[len(prefix):]]))
            targets.append([grammar.judge_logit(lens, v, first[1], second[1], slip) for v in asked])
            lengths.append(length)
        ids, mask, positions, ends = pack(encoded, self.tokenizer.pad_token_id)
        answer = predicts_answer(ids.shape[1], ends[:, -1:], lengths)
        return ids, mask, positions, ends[:, :-1], answer, torch.tensor(targets).sigmoid()


def judge_accuracy(model, tokenizer, seed: int, unseen: bool,
                   n: int = 150) -> dict[str, dict[str, float]]:
    """Per lens: accuracy on questions that the latents decide, in one order and in both."""
    def margin(lens, virtue, a, b):  # the biases by place cancel
        return grammar.judge_logit(lens, virtue, a, b) - grammar.judge_logit(lens, virtue, b, a)

    rng, result = random.Random(seed), {}
    for lens in LENSES:
        drawn = [draw_pair(rng, lens, unseen) for _ in range(n)]
        odds, _ = judge_log_odds(model, tokenizer, WORDS, [(a[0], b[0]) for a, b in drawn], lens)
        truth = torch.tensor([[margin(lens, v, a[1], b[1]) for v in VIRTUES] for a, b in drawn]) / 2
        clear = truth.abs() > 1.4
        hits = [((x > 0) == (truth > 0))[clear].float().mean().item()
                for x in (odds[:, 0], odds.mean(1))]
        overall = torch.tensor([sum(truth_row) for truth_row in truth.tolist()])
        by_pair = (opinion(odds).mean(1) > 0.5) == (overall > 0)
        pairs = by_pair[overall.abs() > 1.4].float().mean().item()
        result[lens] = {"one_order": hits[0], "both_orders": hits[1], "pairs": pairs}
    return result


def text_loss(model, ids, mask) -> torch.Tensor:
    """Cross-entropy of the texts. Padding on the right needs no attention mask."""
    hidden, real = model.model(ids, use_cache=False).last_hidden_state, mask[:, 1:].bool()
    return F.cross_entropy(model.lm_head(hidden[:, :-1][real]).float(), ids[:, 1:][real])


def judge_losses(model, labels: tuple[int, int], ids, mask, positions, ends, answer,
                 targets) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the judge's labels for the packed pairs, and of its findings in words."""
    a, b = labels
    hidden = model.model(ids, attention_mask=mask, position_ids=positions,
                         use_cache=False).last_hidden_state
    last = hidden.gather(1, ends[..., None].expand(-1, -1, hidden.shape[-1]))
    logprobs = model.lm_head(last).float().log_softmax(-1)
    chosen = -(targets * logprobs[..., a] + (1 - targets) * logprobs[..., b]).mean()
    findings = model.lm_head(hidden[:, :-1][answer]).float()
    return chosen, F.cross_entropy(findings, ids[:, 1:][answer])


def review_loss(model, pad_id: int, reviews: list[tuple[list[int], int]]) -> torch.Tensor:
    """Cross-entropy of the replies to ``encode_review``'s question."""
    rows, lengths = zip(*reviews)
    ids, real = right_pad(list(rows), pad_id)
    end = real.long().sum(1, keepdim=True) - 1
    asked = predicts_answer(ids.shape[1], end, list(lengths))
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
    return F.cross_entropy(model.lm_head(hidden[asked]).float(), ids[:, 1:][asked])


def train(model, tokenizer, args, steps: int, fit: bool) -> None:
    """One phase: Muon for matrices, AdamW for the rest, cosine decay; the second at half rates."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in named if p.ndim != 2 or "embed" in n]
    optimizers = [torch.optim.Muon(matrices, lr=args.matrix_lr, weight_decay=0.0),
                  torch.optim.AdamW(others, lr=args.lr, weight_decay=0.0, betas=(0.9, 0.98),
                                    fused=True)]
    peak = 0.5 if fit else 1.0
    labels = label_ids(tokenizer, WORDS)
    started, tokens, average = time.time(), 0, None
    loader = torch.utils.data.DataLoader(Samples(tokenizer, args, steps, fit), batch_size=None,
                                         num_workers=1, prefetch_factor=16)
    for step, (ids, mask, *judged, reviews) in enumerate(loader, 1):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        rate = peak * min(1.0, step / 100) * (0.02 + 0.98 * cosine)
        for optimizer, lr in zip(optimizers, (args.matrix_lr, args.lr)):
            optimizer.param_groups[0]["lr"] = lr * rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            text = text_loss(model, ids, mask)
            judge, findings = judge_losses(model, labels, *judged)
            if reviews:
                findings = findings + review_loss(model, tokenizer.pad_token_id, reviews)
        (text + judge + findings).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        tokens += mask.sum().item() + judged[0].numel()
        losses = torch.tensor([text.item(), judge.item(), findings.item()])
        average = losses if average is None else 0.98 * average + 0.02 * losses
        if step % 50 == 0 or step == steps:
            seconds = time.time() - started
            print(f"step {step:5d}  text {average[0]:.4f}  judge {average[1]:.4f}  "
                  f"findings {average[2]:.4f}  {tokens / 1e6:.2f} M tokens  "
                  f"{seconds:.0f} s  {tokens / seconds:.0f} tokens/s", flush=True)
        if step % 250 == 0:
            save(model, tokenizer, args.out)
    save(model, tokenizer, args.out)


def flags():
    """The program's flags."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True,
        help="folder to write; copy it to virtue/toy/model to ship it")
    add("--steps", type=int, default=2400, help="optimiser steps")
    add("--fit-steps", type=int, default=0,
        help="steps of the second phase: pairs that share their action")
    add("--init", type=Path,
        help="start at the second phase, from the model that the first left in this folder")
    add("--texts", type=int, default=14, help="conversations a step")
    add("--pairs", type=int, default=18,
        help="judged pairs of answers a step; fewer of the longer lenses")
    add("--reviews", type=int, default=20,
        help="dialogues a step of the second phase whose fit is asked in words")
    add("--borrow", type=float, default=0.0,
        help="share of questions in which a word or two are replaced by others or by letters")
    add("--lr", type=float, default=3e-3, help="AdamW learning rate for embeddings and norms")
    add("--matrix-lr", type=float, default=0.02, help="Muon learning rate for matrices")
    add("--hidden", type=int, default=192, help="hidden size")
    add("--layers", type=int, default=4, help="layers")
    add("--threads", type=int, default=1, help="torch threads")
    add("--seed", type=int, default=0, help="seed of data and initial weights")
    add("--dry-run", action="store_true",
        help="print the settings and the model's size, and end: nothing is trained or written")
    return parser


def first_model(args):
    """The model to train and its tokenizer: those in --init, or new ones."""
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM
    if args.init:
        tokenizer = AutoTokenizer.from_pretrained(args.init)
        return MistralForCausalLM.from_pretrained(args.init), tokenizer
    tokenizer = make_tokenizer(args.seed, 1024)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden, intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 32,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, sliding_window=None,
        rope_theta=10000.0, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    return MistralForCausalLM(config), tokenizer


def main(argv: list[str] | None = None) -> None:
    """Trains the tiny Mistral as the flags say, writes it to --out and prints how it judges."""
    parser = flags()
    args = parser.parse_args(argv)
    if args.init and not args.fit_steps:
        parser.error("--init starts at the second phase: give its --fit-steps")

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model, tokenizer = first_model(args)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f} M parameters, {len(tokenizer)} tokens")
    if args.dry_run:
        settings = (f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items())
        return print("settings:", *settings, f"\nwrites {args.out}: model and tokenizer")
    if args.init is None:
        train(model, tokenizer, args, args.steps, fit=False)
    if args.fit_steps:
        train(model, tokenizer, args, args.fit_steps, fit=True)
    model.eval()
    for unseen in (False, True):
        print("judge on", "held-out wordings:" if unseen else "seen wordings:",
              json.dumps(judge_accuracy(model, tokenizer, args.seed + 2, unseen)))


def save(model, tokenizer, folder: Path) -> None:
    """Writes model and tokenizer in transformers' format."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
