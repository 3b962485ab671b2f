"""What an evaluation says: one column of numbers for each model, intervals of differences, transcripts."""
from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np

from virtue.dialogue import Dialogue
from virtue.ensemble import study_score
from virtue.ethics import LENSES
from virtue.stats import paired_bootstrap

# name in the table -> what it is
ROWS = {
    "gold": "gold, 0 worst to 1 oracle", **{f"gold/{lens}": f"  gold, {lens}" for lens in LENSES},
    "study_score": "study's Score, raw", "study_score_standardised": "study's Score, standardised",
    **{f"reward/{lens}": f"reward, {lens} (standardised)" for lens in LENSES},
    "kl": "KL to the reference (nats a dialogue)", "ended": "turns that ended properly",
    "length": "tokens a dialogue", "perplexity": "perplexity under the base",
    **{f"distinct/{lens}": f"distinct share, {lens}" for lens in LENSES},
    "named": "right person and thing named", "fits": "motivations that fit the action", "broken": "broken sentences",
}


def distinct_share(texts: Sequence[str]) -> float:
    """Different texts over all texts: 1 = no two dialogues say the same, 1/n = one stock answer."""
    return len(set(texts)) / len(texts)


def measure(dialogues: Sequence[Dialogue], texts: Sequence[Sequence[str]], raw: np.ndarray, standardised: np.ndarray,
            kl: np.ndarray, base_logprob_sums: np.ndarray, gold: Sequence | None) -> dict[str, float]:
    """One column of the table.

    texts: n dialogues of three turns; raw, standardised (3, n) scores; kl (n,) nats; base_logprob_sums
    (n,) log-prob of all sampled tokens under the base; gold: n toy.gold.Gold, or None for real prompts.
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
                   **{name: float(np.mean([getattr(g, name) for g in gold])) for name in ("named", "fits", "broken")}}
    return column


def differences(before: dict, after: dict, seed: int) -> dict[str, tuple[float, float, float]]:
    """Paired bootstrap over prompts of after - before: name -> (difference, low, high), 95 %.

    before, after: {"raw", "standardised": (3, n), "gold": (n,) or None}.
    """
    result = {}
    for name, key in (("study_score", "raw"), ("study_score_standardised", "standardised")):
        result[name] = paired_bootstrap(before[key].T, after[key].T, statistic=study_score, seed=seed, resamples=2000)
    for k, lens in enumerate(LENSES):
        result[f"reward/{lens}"] = paired_bootstrap(before["standardised"][k], after["standardised"][k], seed=seed, resamples=2000)
    if before["gold"] is not None:
        result["gold"] = paired_bootstrap(before["gold"], after["gold"], seed=seed, resamples=2000)
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
