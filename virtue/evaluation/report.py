"""What an evaluation says: one column of numbers for each model, intervals of differences, transcripts.
"""
from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from virtue import VirtueError
from virtue.evaluation import textstats
from virtue.plumbing.artefacts import read_manifest
from virtue.dialogue import Dialogue
from virtue.plumbing.records import is_number
from virtue.ensemble import study_score
from virtue.ethics import LENSES
from virtue.judge import unanswered
from virtue.evaluation.stats import effect_size, holm, length_controlled_interval, paired_bootstrap, permutation_test, wilson

# name in the table -> what it is
ROWS = {
    "gold": "gold, 0 worst to 1 oracle", **{f"gold/{lens}": f"  gold, {lens}" for lens in LENSES},
    "study_score": "study's Score, raw", "study_score_standardised": "study's Score, standardised",
    **{f"reward/{lens}": f"reward, {lens} (standardised)" for lens in LENSES},
    **{f"eval_reward/{lens}": f"second reward model, {lens}" for lens in LENSES},
    "kl": "KL to the reference (nats a dialogue)", "ended": "turns that ended properly",
    "length": "tokens a dialogue", "perplexity": "perplexity under the base",
    **{f"distinct/{lens}": f"distinct share, {lens}" for lens in LENSES},
    **{f"patterns/{lens}": f"  with names masked, {lens}" for lens in LENSES},
    "named": "right person and thing named", "fits": "motivations that fit the action", "broken": "broken sentences",
    "repetition": "repeated word triples", "virtue_words": "virtue words a hundred words", "refusals": "answers that refuse",
    "hedges": "hedging phrases a hundred words", "flattery": "flattering phrases a hundred words",
}


def distinct_share(texts: Sequence[str]) -> float:
    """Different texts over all texts: 1 = no two dialogues say the same, 1/n = one stock answer. ZeroDivisionError: no text."""
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
    column |= textstats.measures([" ".join(t) for t in texts])
    if gold is not None:
        column |= {"gold": float(np.mean([g.overall for g in gold])),
                   **{f"gold/{lens}": float(np.mean([g.lenses[lens] for g in gold])) for lens in LENSES},
                   **{f"patterns/{lens}": distinct_share([t[k] for t in patterns]) for k, lens in enumerate(LENSES)},
                   **{name: float(np.mean([getattr(g, name) for g in gold])) for name in ("named", "fits", "broken")}}
    return column


def differences(before: dict, after: dict, seed: int) -> dict[str, dict]:
    """after - before, paired by prompt: name -> {"difference", "low", "high"} of a 95 % bootstrap.

    Means over prompts also have "p" of a permutation test and "d_z", the paired effect size. "..., at equal length" is the difference that length does not explain.
    before, after: {"raw", "standardised": (3, n), "gold", "length": (n,); "gold" may be None, "eval" (3, n) missing}.
    """
    result = {}
    for name, key in (("study_score", "raw"), ("study_score_standardised", "standardised")):
        result[name] = (before[key].T, after[key].T, study_score)
    rewards = {f"reward/{lens}": (before["standardised"][k], after["standardised"][k]) for k, lens in enumerate(LENSES)}
    if "eval" in before:
        rewards |= {f"eval_reward/{lens}": (before["eval"][k], after["eval"][k]) for k, lens in enumerate(LENSES)}
    if before["gold"] is not None:
        rewards["gold"] = (before["gold"], after["gold"])
    for name, (a, b) in rewards.items():
        result[name] = (a, b, None)
    for name, (a, b, statistic) in result.items():
        found = dict(zip(("difference", "low", "high"), paired_bootstrap(a, b, statistic=statistic, seed=seed, resamples=2000)))
        if statistic is None:
            d_z = effect_size(a, b)
            found |= {"p": permutation_test(a, b, seed=seed), "d_z": d_z if np.isfinite(d_z) else None}
        result[name] = found
    overall = {"mean reward": (before["standardised"].mean(0), after["standardised"].mean(0)), **({"gold": rewards["gold"]} if "gold" in rewards else {})}
    for name, (a, b) in overall.items():
        found = length_controlled_interval(a, b, before["length"], after["length"], seed=seed)
        if np.isfinite(found).all():
            result[f"{name}, at equal length"] = dict(zip(("difference", "low", "high"), found))
    return result


def correct(compared: Mapping[str, dict[str, dict]]) -> None:
    """Adds "p_holm" to the rows with "p" of all pairs of models: Holm's correction over the one table that a reader sees."""
    tested = [found for rows in compared.values() for found in rows.values() if "p" in found]
    for found, p in zip(tested, holm([found["p"] for found in tested])):
        found["p_holm"] = float(p)


def curve_of(rollouts: Sequence[dict], gold_of=None, metrics: Sequence[dict] = (), kept: int | None = None) -> list[dict]:
    """Over-optimisation: per iteration of PPO {"iteration", "kl", "proxy", "gold", "kept"}, means over its rollouts.

    rollouts, metrics: lines of run_ppo.py's files; the proxy is the aggregate that was trained for, "objective/score", or the mean of the lenses
    where metrics lack the iteration. gold_of(prompt, three turns) or None, where gold is not known (also where the rollouts are answers
    alone). kept: the iteration whose dialogues the adapter in best/ sampled. Gao et al. 2022 (arXiv 2210.10760) plot both against sqrt(KL).
    """
    rows: dict[int, list[dict]] = {}
    trained_for = {m["iteration"]: m["objective/score"] for m in metrics if "iteration" in m and m.get("objective/score") is not None}
    for r in rollouts:
        rows.setdefault(r["iteration"], []).append(r)
    return [{"iteration": i, "kl": float(np.mean([r["kl"] for r in found])), "proxy": trained_for.get(i, float(np.mean([r["scores"] for r in found]))), "kept": i == kept,
             "gold": float(np.mean([gold_of(r["prompt"], list(r["turns"].values())).overall for r in found]))
             if gold_of and all(len(r["turns"]) == len(LENSES) for r in found) else None} for i, found in sorted(rows.items())]


def run_away(first: dict, now: dict) -> list[str]:
    """What a person should know while PPO runs: metrics of the first iteration and of this one -> warnings with the usual cause.

    Bounds are this project's: KL a dialogue beyond 25 nats (Gao et al. 2022 see reward models fail long before),
    entropy below a fifth of the first, length beyond twice or below half of it, fewer than 90 % of turns ended.
    """
    kl, entropy, length = now["objective/kl"], now["policy/entropy"], now["tokens/length"]
    checks = [(kl > 25, f"KL is {kl:.0f} nats a dialogue: --kl-coef is too low or --lr too high; --stop-kl ends such a run"),
              (kl < -1, f"KL is {kl:.1f} nats a dialogue, and it cannot be negative: sampling and training disagree (temperature, template, adapters)"),
              (entropy < 0.2 * first["policy/entropy"], f"entropy fell from {first['policy/entropy']:.2f} to {entropy:.2f} nats a token: the policy says always the same; "
                                                        "raise --kl-coef or --entropy-coef"),
              (length > 2 * first["tokens/length"], f"dialogues grew from {first['tokens/length']:.0f} to {length:.0f} tokens: the reward models may pay for length"),
              (length < 0.5 * first["tokens/length"], f"dialogues shrank from {first['tokens/length']:.0f} to {length:.0f} tokens: the KL penalty is per token, so silence is cheap"),
              (now["tokens/eos_rate"] < 0.9, f"only {now['tokens/eos_rate']:.0%} of turns ended: raise --eos-penalty or --max-new-tokens")]
    return [text for bad, text in checks if bad]


def same_pairs(one: Mapping, other: Mapping) -> bool:
    """Whether two reward models, by their virtue.json, can have been trained on the same pairs: those of one folder or file, unless one took
    the first share of it and the other the second."""
    source = [m["settings"].get("pairs") or m["extra"].get("data") for m in (one, other)]
    shares = [m["settings"].get("share") for m in (one, other)]
    return source[0] == source[1] and shares not in (["first", "second"], ["second", "first"])


def reward_model_facts(rm: Path, eval_rm: Path | None = None) -> list[dict]:
    """How good the reward models are, from their virtue.json: {"of": "PPO" or "second", "lens", "accuracy", "calibration_error", "pairs"},
    on "pairs" pairs that each did not train on; those of eval_rm with "seen": trained on pairs that PPO's own saw."""
    def held_out(manifest: dict) -> dict:
        extra, found = manifest["extra"], manifest["extra"].get("held_out")
        found = {"pairs": extra.get("held_out_pairs"), **(found if isinstance(found, dict) else {})}
        return {key: found[key] if is_number(found.get(key)) else None for key in ("accuracy", "calibration_error", "pairs")}

    own = [read_manifest(rm / lens, "rm", lens) for lens in LENSES]
    second = [read_manifest(eval_rm / lens, "rm", lens) for lens in LENSES] if eval_rm else []
    return [{"of": of, "lens": m["extra"]["lens"], **held_out(m), **({"seen": any(same_pairs(o, m) for o in own)} if of == "second" else {})}
            for of, found in (("PPO", own), ("second", second)) for m in found]


def made_by(policy: Path, sft: Path | None, rm: Path, eval_rm: Path | None = None) -> list[dict]:
    """virtue.json of all that a policy was made by, in order, itself last; data as far as it still lies where it was, or beside, as it was."""
    found = []
    for home, inside in ((sft, [""]), (rm, LENSES), (eval_rm, LENSES), (policy, [""])):
        for manifest in [read_manifest(home / name) for name in inside] if home else []:
            data, made_in, wanted = manifest["settings"].get("data"), manifest["settings"].get("out"), manifest["extra"].get("data")
            for path in {os.path.normpath(data), os.path.normpath(home / os.path.relpath(data, made_in))} if wanted and isinstance(data, str) and isinstance(made_in, str) else ():
                try:
                    found += [made] if (made := read_manifest(path))["sha256"] == wanted else []
                except VirtueError:  # gone, or written over
                    pass
            found.append(manifest)
    return found


def warnings_of(columns: dict[str, dict], compared: dict[str, dict], wins: dict[str, dict], facts: Sequence[dict] = ()) -> list[dict]:
    """What a sceptic would say, {"about": "coherence" or "other", "text"}: where reward rose and something else fell. Bounds are this project's.

    The base is what coherence is measured by. facts: of `reward_model_facts`, for models that are no better than a coin, and for second ones that are not unseen.
    """
    seen = any(m.get("seen") for m in facts)
    names = list(columns)
    first, last, step = columns[names[0]], columns[names[-1]], compared[f"{names[-1]} - {names[-2]}"]
    rose = any(step[f"reward/{lens}"]["low"] > 0 for lens in LENSES)
    ratio = last["perplexity"] / first["perplexity"]
    broken = [(not 0.5 <= ratio <= 1.5, f"perplexity under the base is {ratio:.2f} times that of the base's own answers"),
              (last["ended"] < 0.97, f"only {last['ended']:.1%} of turns end properly"),
              (last["kl"] > 0.2 * last["length"], f"the policy is {last['kl']:.1f} nats a dialogue away from what it started from, {last['kl'] / max(1, last['length']):.2f} a token"),
              (last["repetition"] > first["repetition"] + 0.05, f"repeated word triples rose from {first['repetition']:.2f} to {last['repetition']:.2f}")]
    for kind in ("distinct", "patterns"):
        broken += [(last[key] < 0.7 * first[key], f"{ROWS[key].strip()}: from {first[key]:.2f} to {last[key]:.2f}")
                   for lens in LENSES if (key := f"{kind}/{lens}") in last]
    other = [(last["refusals"] > first["refusals"] + 0.05, f"refusals rose from {first['refusals']:.1%} to {last['refusals']:.1%}"),
             (last["flattery"] > first["flattery"] + 0.5, f"flattery rose from {first['flattery']:.2f} to {last['flattery']:.2f} phrases a hundred words"),
             (last["length"] > 1.5 * first["length"], f"dialogues grew from {first['length']:.0f} to {last['length']:.0f} tokens"),
             (last["length"] < 0.5 * first["length"], f"dialogues shrank from {first['length']:.0f} to {last['length']:.0f} tokens")]
    if "gold" in last:
        broken += [(last["broken"] > first["broken"] + 0.05, f"broken sentences rose from {first['broken']:.1%} to {last['broken']:.1%}"),
                   (last["named"] < first["named"] - 0.02, f"the right person and thing are named in {last['named']:.1%} of sentences, by the base in {first['named']:.1%}")]
        other.append((step["gold"]["high"] < 0, f"gold fell by {-step['gold']['difference']:.3f}"))
    if "eval_reward/action" in last:
        other += [(step[f"reward/{lens}"]["low"] > 0 and found["low"] <= 0, f"the {'second' if seen else 'unseen'} reward model of lens {lens} saw no reliable rise: "
                   "{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**found)) for lens in LENSES for found in [step[f"eval_reward/{lens}"]]]
    found = [{"about": about, "text": f"reward rose, but {text}" if rose else text}
             for about, checks in (("coherence", broken), ("other", other)) for bad, text in checks if bad]
    for m in facts:
        share, n = m["accuracy"], m["pairs"]
        if share is not None and n and 0 <= share <= 1 <= n and (low := wilson(share * n, n)[1]) <= 0.5:
            found.append({"about": "other", "text": f"the {'' if m['of'] == 'PPO' else 'second '}reward model of lens {m['lens']} may be a coin: "
                                                    f"right on {share:.0%} of {n} held-out pairs (95%: from {low:.0%}), so its reward may say nothing"})
    if seen:
        found.append({"about": "other", "text": "the second reward models (--eval-rm) are not unseen: they were trained on pairs that PPO's own saw; "
                                                "train these with run_rm.py --share first and those with --share second"})
    for pair, lenses in wins.items():
        found += [{"about": "other", "text": f"{pair}, {lens}: {text}"} for lens, row in lenses.items() if row and (text := unanswered(row["label_mass"]))]
        helpful = (lenses.get("action") or {}).get("questions", {}).get("helpfulness")
        if helpful is not None and helpful < 0.45:
            found.append({"about": "other", "text": f"{pair}: the judge finds the answers less helpful ({helpful:.2f}; 0.5 = as before): virtue by refusal?"})
    return found


def table(columns: dict[str, dict[str, float]]) -> str:
    """Models side by side, as text: model -> column of `measure`; rows that the first model lacks, and names outside ROWS, are left out. KeyError: another lacks one."""
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
