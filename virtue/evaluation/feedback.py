"""What the judge's verdicts say about the judge: ties, flips, votes, halo, whether it knows more
than places; on toy, agreement with gold.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from virtue.ethics import LENSES, VIRTUES, Words
from virtue.generate import EachBatch
from virtue.judge import choose, flipped, judge_log_odds, opinion, pair_fits, preferred
from virtue.plumbing.records import is_number
from virtue.evaluation.stats import wilson


def virtue_agreement(probs: Tensor) -> float | None:
    """Mean correlation, over the ten pairs of virtues, of P(first is better); probs (N, 5).

    Near 1 the five questions are one halo judgement; near 0 they are five separate ones. None with
    fewer than three pairs of dialogues, or where a virtue's answers never vary.
    """
    if len(probs) < 3 or (probs.std(0) < 1e-6).any():
        return None
    correlation = torch.corrcoef(probs.double().T)
    return correlation[torch.ones_like(correlation, dtype=torch.bool).triu(1)].mean().item()


def points(prompt: str, turns: Sequence[str]) -> dict[str, dict[str, float]]:
    """Toy only, for reports: lens -> virtue -> points of its turn (``toy.grammar.worth``), of as
    many turns as are given. ValueError: the prompt is not the toy world's."""
    from virtue.toy.gold import parse, slots
    from virtue.toy.grammar import worth
    latent = {lens: list(parse(text, lens, *slots(prompt))) for lens, text in zip(LENSES, turns)}
    return {lens: worth(latent, lens) for lens in latent}


def truth(pair: dict) -> dict[str, float] | None:
    """Toy only, for reports: by how much the chosen one is better, in gold ("overall") and in each
    virtue's points.

    pair: {"chosen", "rejected": messages, "lens"}. None where the prompt is not the toy world's.
    """
    from virtue.toy.gold import gold, slots
    prompt = next(m["content"] for m in pair["chosen"] if m["role"] == "user")
    lens, sides = pair["lens"], []
    try:
        slots(prompt)
    except ValueError:
        return None
    for name in ("chosen", "rejected"):
        turns = [m["content"] for m in pair[name] if m["role"] == "assistant"]
        golden = gold(prompt, turns + [""] * (len(LENSES) - len(turns))).lenses[lens]
        sides.append({**points(prompt, turns)[lens], "overall": golden})
    return {name: sides[0][name] - sides[1][name] for name in sides[0]}


def gold_agreement(records: list[dict], lens: str) -> float | None:
    """Share of toy pairs whose chosen dialogue has the higher gold for the lens, equal ones left
    out. None where the prompts are not the toy world's, or no pair is left."""
    truths = [truth({**record, "lens": lens}) for record in records]
    if not all(truths):
        return None
    clear = [t["overall"] > 0 for t in truths if t["overall"]]
    return sum(clear) / len(clear) if clear else None


def _share(right: np.ndarray) -> dict:
    """Mean of right (n,), each in [0, 1], with Wilson's interval; None below two."""
    n = len(right)
    share = wilson(float(right.sum()), n) if n > 1 else (None, None, None)
    return dict(zip(("share", "low", "high"), share), n=n)


def coin_test(odds: Tensor) -> dict:
    """Can the judge be told from a coin that knows places? Its log-odds (N, orders, Q) that the
    first of each pair is better -> {"coin", "consistent", "consistent_low", "consistent_high",
    "judged"}.

    The null: in each order the judge answers by a bias for the place, which may differ from pair to
    pair, and by noise that is drawn anew for each order, so the two orders know nothing in common
    of the pair. The statistic: x1 and x2 are a pair's mean over the questions in either order, both
    as "the first is better"; b, the mean of (x1 - x2) / 2 over all pairs, is the bias; "consistent"
    is the share of the N pairs ("judged") on which x1 - b and x2 + b prefer the same dialogue,
    where a tie counts half. For no coin is it above 1/2 in expectation: where a share q of the
    answers lies above b it is 2 q (1 - q), and a bias that varies lowers it. "coin" is True unless
    Wilson's 95 % interval lies above 1/2: one coin in forty is believed, of few pairs up to one in
    25. A judge whose bias varies between pairs by more than its opinions do is not told from a coin
    either; one that always prefers what is no better, such as length, passes. With one order all
    but "judged" is None: not measured.
    """
    n = len(odds)
    test = dict.fromkeys(("coin", "consistent", "consistent_low", "consistent_high"))
    if odds.shape[1] == 2 and n:
        x = odds.double().mean(-1)  # (N, 2)
        b = (x[:, 0] - x[:, 1]).mean() / 2
        first, second = preferred(x[:, 0] - b) - 0.5, preferred(x[:, 1] + b) - 0.5
        share, low, high = wilson((0.5 + 2 * first * second).sum().item(), n)
        test = dict(zip(test, (low <= 0.5, share, low, high)))
    return {**test, "judged": n}


def reliability(odds: Tensor) -> dict:
    """What the judge's log-odds (N, orders, Q) say of the judge itself, without any truth.

    "ties": share of pairs whose label is within 0.05 of 1/2. "label_spread": root mean square
    distance of the labels from 1/2, which does not depend on which dialogue of a pair is the first:
    0 = no opinion, 0.5 = no doubt. With both orders, otherwise None (not measured):
    "position_flips", the share of questions whose answer changed sides with the order, and
    "first_place", the share of answers that prefer the dialogue shown first (a tie counts half).
    The fields of `coin_test` come on top.
    """
    away = opinion(odds).mean(-1) - 0.5  # (N,)
    both = odds.shape[1] == 2 and len(odds) > 0
    side = preferred(odds)
    return {"ties": (away.abs() < 0.05).double().mean().item() if len(odds) else 0.0,
            "label_spread": away.square().mean().sqrt().item() if len(odds) else 0.0,
            "position_flips": flipped(odds).double().mean().item() if both else None,
            "first_place": (side[:, 0].mean() + 1 - side[:, 1].mean()).item() / 2 if both else None,
            **coin_test(odds)}


def _consistent(test: Mapping) -> str:
    """The numbers of `coin_test` in words, if they are numbers."""
    names = ("consistent", "consistent_low", "consistent_high", "judged")
    share, low, high, n = map(test.get, names)
    if not all(map(is_number, (share, low, high, n))):
        return ""
    return (f"both orders prefer the same dialogue on {share:.0%} [{low:.0%}, {high:.0%}] of {n} "
            "pairs, the bias for a place taken off")


def worth(numbers: Mapping) -> str:
    """One line on what a judge is worth, from the numbers of `reliability` and "label_mass"."""
    flips, place = ("not measured" if numbers[name] is None else f"{numbers[name]:.0%}"
                    for name in ("position_flips", "first_place"))
    coin = {True: "it cannot be told from a coin that knows places",
            False: "more than a coin that knows places",
            None: "whether it is more than a coin that knows places was not measured"}
    test = ": ".join(filter(None, (coin[numbers["coin"]], _consistent(numbers))))
    return (f"flips with the order {flips}, ties {numbers['ties']:.0%}, first place preferred "
            f"{place}, labels {numbers['label_spread']:.3f} from 1/2 (root mean square), mass on "
            f"the two labels {numbers['label_mass']:.2f}; {test}")


def judge_tests(extra: Mapping) -> dict[str, Mapping]:
    """lens -> `coin_test` of the judge whose labels an artefact stands on, from the "extra" of its
    virtue.json; {} where that says nothing."""
    tests = extra.get("judge_test")
    tests = tests if isinstance(tests, Mapping) else {}
    return {lens: tests[lens] for lens in LENSES if isinstance(tests.get(lens), Mapping)}


def doubts(extra: Mapping) -> list[str]:
    """A sentence for each lens whose judge is in doubt according to `judge_tests`."""
    sentences = []
    for lens, test in judge_tests(extra).items():
        if test.get("coin") is True:
            numbers = _consistent(test)
            sentences.append(f"the labels of lens {lens} are those of a judge that cannot be told "
                             "from a coin that knows places" + f" ({numbers})" * bool(numbers))
        elif test.get("coin", False) is None:
            sentences.append(f"the judge of lens {lens} was asked in one order: whether it is more "
                             "than a coin that knows places was not measured")
    return sentences


def agrees(odds: Tensor, column: Sequence[int]) -> dict:
    """How often the judge prefers the first of a pair by one virtue of each, the mean of both
    orders: `_share` of log-odds (N, 2, Q) at question `column` (N,). None where no pair is asked
    about."""
    if not len(odds):
        return None
    own = odds.double().mean(1).gather(1, torch.tensor(column)[:, None])[:, 0]
    return _share(preferred(own).numpy())


def of_contrast(numbers: Mapping) -> str:
    """One line on pairs made by contrast."""
    lines = [f"{numbers['pairs']} pairs"]
    judge = numbers["judge_agrees"]
    if judge and judge["n"] > 1:
        lines.append(f"the judge prefers the virtuous side by its virtue on {judge['share']:.0%} "
                     f"[{judge['low']:.0%}, {judge['high']:.0%}] of {judge['n']}, with "
                     f"{numbers['label_mass']:.2f} of the probability on its labels")
    if numbers["gold_agreement"] is not None:
        lines.append(f"gold on {numbers['gold_agreement']:.0%}")
    return ", ".join(lines)


def _right(side: Tensor, sign: np.ndarray) -> dict:
    """`_share` of the pairs on which side (N,), 1 first, 0 second, 0.5 a tie, is that of sign (N,);
    where sign is 0 the pair is left out."""
    side = side.numpy()
    return _share(np.where(sign > 0, side, 1 - side)[sign != 0])


def agreement(odds: Tensor, signs: dict[str, np.ndarray],
              names: Sequence[str] = VIRTUES) -> dict:
    """How often the judge is right: its log-odds (N, 2, Q) that the chosen is better in each of the
    virtues `names`, and `signs`, the truth, (N,) each: > 0 means that the chosen one is better,
    0 that the pair is left out.

    signs has "overall" and, where each virtue has a truth of its own, the virtues. Shares carry
    Wilson's 95 % intervals, and a pair on which the judge prefers neither counts one half;
    "one_order" asks the mean of the five virtues in one order, and is the mean over both.
    Returns "agreement": {"majority", "mean", "one_order", each virtue: {"share", "low", "high",
    "n"}}, "halo" (mean correlation between two virtues' answers, or None), and what `reliability`
    has.
    """
    overall, by_order = signs["overall"], preferred(odds.double().sigmoid().mean(2).logit())
    shares = {"majority": _right(choose(odds), overall),
              "mean": _right(choose(odds, "mean"), overall),
              "one_order": _right(by_order.mean(1), overall)}
    for i, virtue in enumerate(names):
        side = preferred(odds.double().mean(1)[:, i])
        shares[virtue] = _right(side, signs.get(virtue, overall))
    return {"agreement": shares, **reliability(odds), "halo": virtue_agreement(opinion(odds))}


def win_rates(judge, tokenizer, words: Words, after: list[list[dict]],
              before: list[list[dict]], lens: str, *, batch_size: int,
              wording: str = "trained", each_batch: EachBatch = map,
              gold: np.ndarray | None = None) -> dict | None:
    """The judge's comparison of two models' dialogues (messages), prompt by prompt, both orders;
    None if fewer than two pairs fit its context.

    Returns {"rate", "low", "high", "pairs", "questions", "label_mass"}: the share of prompts on
    which `after` is preferred (mean of the five virtues; a tie counts half) with Wilson's interval;
    how many pairs were judged; {name: mean P(after preferred)}; the label mass of
    ``judge_log_odds``. With gold (n,), by how much `after` is better, also "gold": {"share", "low",
    "high", "n"}, the share of the n pairs with a difference on which the judge prefers the better
    (a tie counts half there too). VirtueError: as ``judge_log_odds``.
    """
    names = words.virtues
    asked = (*names, "helpfulness", *(["sincerity"] if lens != "action" else []))
    both = list(zip(after, before, strict=True))
    kept = [i for i, pair in enumerate(both) if pair_fits(judge, tokenizer, words, *pair, lens)]
    if len(kept) < 2:
        return None
    odds, label_mass = judge_log_odds(judge, tokenizer, words, [both[i] for i in kept], lens,
                                      batch_size, asked, wording, each_batch=each_batch)
    won = choose(odds[..., :len(names)], "mean")
    rate = dict(zip(("rate", "low", "high"), wilson(won.sum().item(), len(won))))
    if gold is not None:
        rate["gold"] = _right(won, gold[kept])
    questions = dict(zip(asked, opinion(odds).mean(0).tolist()))
    return {**rate, "pairs": len(kept), "questions": questions, "label_mass": label_mass}


def versus(judge, tokenizer, words: Words, answers: list[list[list[dict]]],
           others: list[list[dict]], *, batch_size: int,
           each_batch: Callable[[str], EachBatch] = lambda lens: map,
           ) -> tuple[np.ndarray, list[int]]:
    """P(answer better than the prompt's other one), mean of the lenses and virtues, each of which
    is ``judge.opinion`` of both orders: (P, n); and the indices of the P prompts.

    answers: n lists of dialogues as messages, prompt by prompt; others: one dialogue a prompt. A
    prompt of which a pair does not fit the judge's context is left out. `each_batch` gives each
    lens its own, see ``generate.sample_dialogues``. VirtueError: as ``judge_log_odds``.
    """
    def cut(messages: list[dict], k: int) -> list[dict]:  # up to the turn of lens k of three
        return messages[:len(messages) - 2 * (len(LENSES) - 1 - k)]

    pairs = {lens: [[(cut(side[i], k), cut(other, k)) for side in answers]
                    for i, other in enumerate(others)] for k, lens in enumerate(LENSES)}
    kept = [i for i in range(len(others)) if all(
        pair_fits(judge, tokenizer, words, *pair, lens)
        for lens in LENSES for pair in pairs[lens][i])]
    if not kept:
        return np.zeros((0, len(answers))), kept
    total = 0
    for lens in LENSES:
        odds, _ = judge_log_odds(judge, tokenizer, words,
                                 [pair for i in kept for pair in pairs[lens][i]], lens, batch_size,
                                 each_batch=each_batch(lens))
        total += opinion(odds).mean(1)
    return (total / len(LENSES)).view(len(kept), -1).numpy(), kept


def summarize(records: list[dict], odds: Tensor, lens: str) -> dict:
    """Numbers of one preference set: its records as written, and the judge's log-odds (N, orders,
    Q) on all N pairs that it read, those without a verdict too."""
    n, votes, most = len(records), Counter(r["votes"] for r in records), odds.shape[-1]
    return {"pairs": n, **reliability(odds),
            **{f"votes_{k}": votes[k] / max(1, n) for k in range(most, most // 2, -1)},
            "virtue_agreement": virtue_agreement(opinion(odds)),
            "gold_agreement": gold_agreement(records, lens)}
