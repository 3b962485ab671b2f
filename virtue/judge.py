"""AI feedback: which of two dialogues shows more of each virtue, from label log-probs in both
orders.

The five questions about a pair share its text, so each order is encoded once: the shared prefix,
then the five endings side by side, each of which sees the prefix and itself. That gives the
probabilities of five separate prompts for little more than the price of one. Reading probabilities
instead of text keeps the judge's doubt (Lee et al. 2023, RLAIF, arXiv 2309.00267). Two orders are
averaged (Wang et al. 2023, arXiv 2305.17926), here in log-odds: a preference for a place that adds
to the logits then cancels exactly, and a judge that answers 0.93 in one order and 0.09 in the other
keeps its small opinion.
"""
from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from virtue import VirtueError
from virtue.dialogue import encode_conversation, encode_prompt
from virtue.ethics import JUDGE_LABELS, VIRTUES, Words
from virtue.generate import EachBatch
from virtue.models import hidden_states

TIE = 1e-4  # nats of log-odds


def transcript(messages: list[dict]) -> str:
    """A conversation as plain text, one speaker a line. messages: {"role": "system", "user" or
    "assistant", "content"}; KeyError on another role."""
    names = {"system": "System", "user": "Human", "assistant": "Assistant"}
    return "\n".join(f"{names[m['role']]}: {m['content']}" for m in messages)


def pair_text(words: Words, first: list[dict], second: list[dict], lens: str,
              wording: str = "trained") -> str:
    """What all questions about a pair begin with: both conversations, in this order, and which of
    their turns to judge (`lens`)."""
    a, b = JUDGE_LABELS
    return words.pairs[wording].format(first_label=a, second_label=b, first=transcript(first),
                                       second=transcript(second), about=words.about[lens])


def questions(words: Words, first: list[dict], second: list[dict], lens: str,
              asked: Sequence[str] | None = None, wording: str = "trained") -> list[str]:
    """The judge's prompts about a pair, one for each of ``asked`` (virtues, by default all; names
    of `Words.extra`), alike up to the question."""
    pair, (a, b) = pair_text(words, first, second, lens, wording), JUDGE_LABELS
    texts = dict.fromkeys(words.virtues, words.questions[wording]) | words.extra
    return [pair + texts[name].format(
        virtue=name, asks=words.constitution.get(name, ("",))[0], first_label=a, second_label=b)
        for name in asked or words.virtues]


def reply_ids(tokenizer, reply: str) -> list[int]:
    """Ids of the beginning of an assistant's turn; none where it is empty."""
    if not reply:
        return []
    ids, spans = encode_conversation(tokenizer, [{"role": "user", "content": "?"},
                                                 {"role": "assistant", "content": reply}])
    return ids[spans[0][0]:spans[0][1] - 1]


def encode_questions(tokenizer, words: Words, first: list[dict], second: list[dict], lens: str,
                     asked: Sequence[str] | None = None,
                     wording: str = "trained") -> tuple[list[int], list[list[int]]]:
    """Token ids of `questions`, each with the beginning of the reply: what all of them begin with,
    encoded once, and the ending of each, never empty."""
    reply = reply_ids(tokenizer, words.reply)
    rows = [encode_prompt(tokenizer, [{"role": "user", "content": question}]) + reply
            for question in questions(words, first, second, lens, asked, wording)]
    prefix = os.path.commonprefix(rows)
    if len(rows) == 1:  # an ending needs a token of its own
        prefix = prefix[:-1]
    return prefix, [row[len(prefix):] for row in rows]


def pair_fits(model, tokenizer, words: Words, first: list[dict], second: list[dict],
              lens: str) -> bool:
    """Whether the judge's context holds the pair with its longest question."""
    prefix, endings = encode_questions(tokenizer, words, first, second, lens)
    return len(prefix) + max(map(len, endings)) < model.config.max_position_embeddings


def label_ids(tokenizer, words: Words) -> tuple[int, int]:
    """The ids of the two labels as the assistant's reply goes on after `Words.reply`; each must be
    one token. VirtueError: one of them is longer."""
    ids, reply = [], reply_ids(tokenizer, words.reply)
    for label in JUDGE_LABELS:
        said = reply_ids(tokenizer, f"{words.reply} {label}".strip())
        if said[:-1] != reply:
            raise VirtueError(f"the judge's label {label!r} is {len(said) - len(reply)} tokens in "
                              "this tokenizer; choose single-token JUDGE_LABELS in "
                              "virtue/ethics.py")
        ids.append(said[-1])
    return ids[0], ids[1]


def pack(encoded: list[tuple[list[int], list[list[int]]]],
         pad_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prefixes with their endings as one batch.

    Returns input_ids (B, L), mask (B, 1, L, L) True = may attend, position_ids (B, L), and ends (B,
    Q), the positions of the Q questions whose next token is the label.
    """
    width = max(len(prefix) + sum(map(len, endings)) for prefix, endings in encoded)
    ids = torch.full((len(encoded), width), pad_id)
    positions = torch.zeros_like(ids)
    branch = torch.full_like(ids, -1)  # 0 = prefix, i = i-th ending, -1 = padding
    ends = torch.empty(len(encoded), len(encoded[0][1]), dtype=torch.long)
    for row, (prefix, endings) in enumerate(encoded):
        at = len(prefix)
        ids[row, :at], positions[row, :at] = torch.tensor(prefix), torch.arange(at)
        branch[row, :at] = 0
        for i, ending in enumerate(endings):
            stop = at + len(ending)
            ids[row, at:stop], branch[row, at:stop] = torch.tensor(ending), i + 1
            positions[row, at:stop] = torch.arange(len(prefix), len(prefix) + len(ending))
            ends[row, i], at = stop - 1, stop
    query, key = branch[:, :, None], branch[:, None, :]
    mask = ((key == query) | (key == 0)) & torch.ones(width, width, dtype=torch.bool).tril()
    mask |= torch.eye(width, dtype=torch.bool)  # a padded row that sees nothing would be NaN
    return ids, mask[:, None], positions, ends


@torch.no_grad()
def read_labels(model, encoded: list[tuple[list[int], list[list[int]]]], labels: Sequence[int],
                pad_id: int) -> tuple[Tensor, Tensor]:
    """Of prefixes with Q endings each, after which a label comes: the first label's logit less the
    second's, nats, and the probability that the next token is one of them, both (B, Q) fp32."""
    ids, mask, positions, ends = (x.to(model.device) for x in pack(encoded, pad_id))
    hidden = hidden_states(model, ids, mask, position_ids=positions)
    last = hidden.gather(1, ends[..., None].expand(-1, -1, hidden.shape[-1]))  # (B, Q, D)
    logits = model.lm_head(last).float()
    of_labels = logits[..., torch.tensor(labels, device=logits.device)]  # (B, Q, 2)
    first, second = of_labels.unbind(-1)
    return first - second, (of_labels - logits.logsumexp(-1, keepdim=True)).exp().sum(-1)


@torch.no_grad()
def judge_log_odds(model, tokenizer, words: Words, pairs: list[tuple[list[dict], list[dict]]],
                   lens: str, batch_size: int = 16, asked: Sequence[str] | None = None,
                   wording: str = "trained", orders: int = 2,
                   each_batch: EachBatch = map) -> tuple[Tensor, float]:
    """Log-odds, nats, that the first of the pair is better, for each pair, order and question:
    (N, 2, Q) fp32, the difference of the two labels' logits; and the label mass.

    ``asked`` names the Q questions (default: the virtues of ``words``), ``wording`` one of
    `Words.questions`; with ``orders=1`` the second order is left out: (N, 1, Q).
    ``each_batch`` as in ``generate.sample_dialogues``. ``[:, 0]`` was read with the first dialogue
    shown first, ``[:, 1]`` with it shown second. The caller sets the adapters (none, for the base
    as its own judge). The label mass is the mean probability that the judge's next token is one of
    the two labels at all: if it is near 0, the judge does not answer the question. VirtueError:
    logits that are not finite, a label of more than one token.
    """
    asked = asked or words.virtues
    labels = label_ids(tokenizer, words)
    jobs = [(i, order, encode_questions(
        tokenizer, words, *pair[::(1, -1)[order]], lens, asked, wording))
            for i, pair in enumerate(pairs) for order in range(orders)]
    jobs.sort(key=lambda job: len(job[2][0]))  # batches of like length
    result, mass = torch.zeros(len(pairs), orders, len(asked)), 0.0

    def read(batch):
        odds, on_labels = read_labels(model, [encoded for *_, encoded in batch], labels,
                                      tokenizer.pad_token_id)
        if not (odds.isfinite() & on_labels.isfinite()).all():  # before it is kept
            raise VirtueError(f"judge {lens}, pairs {sorted({i for i, *_ in batch})}: the model's "
                              "logits are not finite: use another --dtype, or another judge")
        return odds.tolist(), on_labels.sum().item()

    batches = [jobs[start:start + batch_size] for start in range(0, len(jobs), batch_size)]
    for batch, (odds, on_labels) in zip(batches, each_batch(read, batches), strict=True):
        mass += on_labels
        for (i, order, _), first in zip(batch, torch.tensor(odds)):
            result[i, order] = first if order == 0 else -first
    return result, mass / max(1, result.numel())


def judge_pairs(*args, **kwargs) -> tuple[Tensor, float]:
    """As `judge_log_odds`, in probabilities P(first is better), (N, orders, Q), for callers that
    read single answers; to combine two orders, use log-odds (`opinion`)."""
    odds, label_mass = judge_log_odds(*args, **kwargs)
    return odds.sigmoid(), label_mass


def unanswered(label_mass: float) -> str:
    """What to say of a judge that gives its two labels less than a tenth of the probability; else
    nothing."""
    return "" if label_mass >= 0.1 else (f"the judge gives its two labels {label_mass:.3f} of the "
                                         "probability: it does not answer the question")


def preferred(odds: Tensor) -> Tensor:
    """Which side log-odds prefer, of any shape: 1 the first, 0 the second, 0.5 neither (a tie).

    Log-odds are a tie where rounding cannot tell them from 0: another batch size moves them by
    about as much.
    """
    return 0.5 + 0.5 * torch.where(odds.abs() < TIE, 0, odds.double().sign())


def opinion(odds: Tensor) -> Tensor:
    """P(first is better) by question from log-odds of each order: (..., orders, Q) -> (..., Q)
    fp64.

    The mean over the orders is that of log-odds, so what adds to the logits of one place cancels.
    """
    return odds.double().mean(-2).sigmoid()


def choose(odds: Tensor, preference: str = "votes") -> Tensor:
    """The chosen dialogue by log-odds of each order, (..., orders, Q) -> (...): 1 the first, 0 the
    second, 0.5 none.

    "votes": the majority of the questions, each the mean of its orders; a question that ties votes
    for neither. Where both sides have as many votes, and always for "mean", the mean of `opinion`
    decides.
    """
    by_mean = preferred(opinion(odds).mean(-1).logit())
    votes = (preferred(odds.double().mean(-2)) - 0.5).sum(-1)
    if preference == "mean":
        return by_mean
    return torch.where(votes == 0, by_mean, (votes > 0).double())


def flipped(odds: Tensor) -> Tensor:
    """Which questions change sides with the order: (..., 2, Q) -> (..., Q) bool; a tie has no
    side."""
    return (preferred(odds).diff(dim=-2).abs() == 1)[..., 0, :]


def verdict(odds: Tensor, preference: str = "votes", names: Sequence[str] = VIRTUES) -> dict:
    """From the judge's log-odds (orders, Q) of one pair to a preference record's fields; `names`
    are those of the Q virtues.

    ``first_is_chosen`` as `choose` decides, None where it chooses none: such a pair has no order
    that a record could keep. All other fields describe the *chosen* dialogue (the first one where
    none is chosen): ``virtues`` and ``label``, their mean, are probabilities that it is better,
    ``votes`` counts the virtues that prefer it, ``position_flips`` those whose answer changed sides
    with the order (None: only one order was asked).
    """
    first = {1.0: True, 0.0: False, 0.5: None}[choose(odds, preference).item()]
    toward = -1 if first is False else 1
    virtues = opinion(toward * odds)
    return {"first_is_chosen": first, "virtues": dict(zip(names, virtues.tolist())),
            "label": virtues.mean().item(),
            "votes": int((preferred(toward * odds.double().mean(0)) == 1).sum()),
            "position_flips": int(flipped(odds).sum()) if len(odds) == 2 else None}
