"""What an evaluation says: one column of numbers for each model, intervals of differences, transcripts."""
from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

import numpy as np

from virtue.dialogue import Dialogue
from virtue.ensemble import study_score
from virtue.ethics import LENSES
from virtue.stats import effect_size, paired_bootstrap, permutation_test

# name in the table -> what it is
ROWS = {
    "gold": "gold, 0 worst to 1 oracle", **{f"gold/{lens}": f"  gold, {lens}" for lens in LENSES},
    "study_score": "study's Score, raw", "study_score_standardised": "study's Score, standardised",
    **{f"reward/{lens}": f"reward, {lens} (standardised)" for lens in LENSES},
    "kl": "KL to the reference (nats a dialogue)", "ended": "turns that ended properly",
    "length": "tokens a dialogue", "perplexity": "perplexity under the base",
    **{f"distinct/{lens}": f"distinct share, {lens}" for lens in LENSES},
    **{f"patterns/{lens}": f"  with names masked, {lens}" for lens in LENSES},
    "named": "right person and thing named", "fits": "motivations that fit the action", "broken": "broken sentences",
}


def distinct_share(texts: Sequence[str]) -> float:
    """Different texts over all texts: 1 = no two dialogues say the same, 1/n = one stock answer."""
    return len(set(texts)) / len(texts)


def mask_names(texts: Sequence[Sequence[str]], slots: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Toy dialogues with their prompt's person and thing as {p} and {t}: a stock phrase is then one text,
    which the names of hundreds of prompts would hide."""
    return [[re.sub(rf"\b{t}\b", "{t}", re.sub(rf"\b{p}\b", "{p}", text)) for text in turns]
            for turns, (p, t) in zip(texts, slots, strict=True)]


def measure(dialogues: Sequence[Dialogue], texts: Sequence[Sequence[str]], raw: np.ndarray, standardised: np.ndarray,
            kl: np.ndarray, base_logprob_sums: np.ndarray, gold: Sequence | None = None,
            patterns: Sequence[Sequence[str]] | None = None) -> dict[str, float]:
    """One column of the table.

    texts: n dialogues of three turns; raw, standardised (3, n) scores; kl (n,) nats; base_logprob_sums
    (n,) log-prob of all sampled tokens under the base; on toy also gold, n toy.gold.Gold, and patterns, the
    texts with names masked.
    """
    tokens = [sum(t.end - t.start for t in d.turns) for d in dialogues]
    turns = [t for d in dialogues for t in d.turns]
    column = {
        "study_score": float(study_score(raw)), "study_score_standardised": float(study_score(standardised)),
        **{f"reward/{lens}": float(row.mean()) for lens, row in zip(LENSES, standardised)},
        "kl": float(np.mean(kl)), "ended": 1 - sum(t.truncated for t in turns) / len(turns), "length": float(np.mean(tokens)),
        "perplexity": float(np.exp(-base_logprob_sums.sum() / sum(tokens))),
        **{f"distinct/{lens}": distinct_share([t[k] for t in texts]) for k, lens in enumerate(LENSES)},
    }
    if gold is not None:
        column |= {"gold": float(np.mean([g.overall for g in gold])),
                   **{f"gold/{lens}": float(np.mean([g.lenses[lens] for g in gold])) for lens in LENSES},
                   **{f"patterns/{lens}": distinct_share([t[k] for t in patterns]) for k, lens in enumerate(LENSES)},
                   **{name: float(np.mean([getattr(g, name) for g in gold])) for name in ("named", "fits", "broken")}}
    return column


def differences(before: dict, after: dict, seed: int) -> dict[str, dict]:
    """after - before, paired by prompt: name -> {"difference", "low", "high"} of a 95 % bootstrap.

    Means over prompts also have "p" of a permutation test and "d_z", the paired effect size.
    before, after: {"raw", "standardised": (3, n), "gold": (n,) or None}.
    """
    result = {}
    for name, key in (("study_score", "raw"), ("study_score_standardised", "standardised")):
        result[name] = (before[key].T, after[key].T, study_score)
    for k, lens in enumerate(LENSES):
        result[f"reward/{lens}"] = (before["standardised"][k], after["standardised"][k], None)
    if before["gold"] is not None:
        result["gold"] = (before["gold"], after["gold"], None)
    for name, (a, b, statistic) in result.items():
        found = dict(zip(("difference", "low", "high"), paired_bootstrap(a, b, statistic=statistic, seed=seed, resamples=2000)))
        if statistic is None:
            d_z = effect_size(a, b)
            found |= {"p": permutation_test(a, b, seed=seed, resamples=2000), "d_z": d_z if np.isfinite(d_z) else None}
        result[name] = found
    return result


def table(columns: dict[str, dict[str, float]]) -> str:
    """Models side by side, as text."""
    names = list(columns)
    lines = [f"{'':38}" + "".join(f"{name:>10}" for name in names)]
    for key, title in ROWS.items():
        if key in columns[names[0]]:
            lines.append(f"{title:38}" + "".join(f"{columns[name][key]:10.3f}" for name in names))
    return "\n".join(lines)


def side_by_side(prompt: str, answers: dict[str, Sequence[str]], width: int = 100) -> str:
    """One prompt's dialogues, model by model, for a terminal; control characters are shown, not sent."""
    def wrap(title: str, text: str) -> str:
        clean = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
        return textwrap.fill(f"{title}: {clean}", width, initial_indent="  ", subsequent_indent="      ")
    lines = [wrap("PROMPT", prompt)[2:]]
    for name, turns in answers.items():
        lines += [f" {name}", *(wrap(lens, text) for lens, text in zip(LENSES, turns))]
    return "\n".join(lines)
