"""Figures as SVG text, drawn by matplotlib: an optional extra, pip install ".[report]".

Each figure is one <svg> to inline in a page or to save as a file: text and axes in currentColor,
lines in those colours of Okabe and Ito that can be told apart on white and on black, ids of its
own; the same numbers give the same bytes. A value that is missing or None leaves a gap. Each
function takes rows of metrics.jsonl, of scores.json's curve or of best_of_n.json, and raises
ImportError without matplotlib.
"""
from __future__ import annotations

import hashlib
import importlib.util
import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape

from virtue.ethics import LENSES

MISSING = 'no figures: they need matplotlib, pip install ".[report]"'
INK = "#010203"  # drawn in this colour, sent as currentColor
BLUE, RED, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color",
          "grid.color")
_SETTINGS = {
    **dict.fromkeys(_INKED, INK), "svg.fonttype": "none", "text.parse_math": False,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"], "font.size": 10,
    "legend.frameon": False, "legend.fontsize": 9, "legend.borderpad": 0,
    "legend.handlelength": 1.6, "legend.columnspacing": 1, "axes.grid": True, "grid.alpha": 0.15,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "lines.linewidth": 1.8}
# lines: the metric, its label, colour, dash, width
_REWARD = ("objective/aggregate/mean", "mean", INK, "-", 2.4)
_LENSES = [(f"objective/score/{lens}", lens, colour, dash, 1.2)
           for lens, colour, dash in zip(LENSES, (BLUE, RED, GREEN), ("-", "--", ":"))]
_POLICY, _VALUE = ("policy/loss", "policy", BLUE, "-", 1.8), ("value/loss", "value", RED, "--", 1.8)
_KLS = [("objective/kl", "KL, k1", BLUE, "-", 1.8), ("objective/kl_k3", "k3", RED, "--", 1.2)]
_ENTROPY = ("policy/entropy", "entropy", GREEN, "-", 1.8)
_TOKENS = ("tokens/length", "tokens a dialogue", BLUE, "-", 1.8)
_ENDED = ("tokens/eos_rate", "turns that ended", RED, "--", 1.8)
_ROOT = ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
         'role="img" aria-label="{title}" width="100%" viewBox="{box}" style="color-scheme:light '
         'dark;color:CanvasText;stroke-linejoin:round;stroke-linecap:butt">')


def available() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def _svg(name: str, title: str, draw: Callable, rows: int = 1, columns: int = 1,
         size: tuple[float, float] = (5.0, 3.2), sharex: bool = True) -> str:
    """What `draw(axes)` draws; `title` is read out by a screen reader."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # and no matplotlibrc of the user's
        matplotlib.rcParams.update(_SETTINGS | {"svg.hashsalt": name})
        figure, buffer = Figure(figsize=size, layout="constrained"), io.StringIO()
        draw(figure.subplots(rows, columns, sharex=sharex))
        figure.align_ylabels()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().replace(INK, "currentColor")
    root = _ROOT.format(title=escape(title), box=re.search(r'viewBox="([^"]*)"', svg)[1])
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", svg, flags=re.S)  # a style for all elements
    used = set(re.findall(r'["(]#([\w-]+)[")]', svg))
    prefix = f"{name}-{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(["(]#)([\w-]+[")])', rf"\g<1>{prefix}\2", svg)
    return re.sub(r"<svg\b.*?>", lambda _: root, svg, count=1, flags=re.S)


def _column(rows: Sequence[dict], key: str) -> list[float]:
    return [math.nan if row.get(key) is None else row[key] for row in rows]


def _legend(ax) -> None:
    """Above the axes, where it hides no line; nothing for a single line."""
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > 1:
        ax.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1),
                  ncols=3 if len(labels) == 6 else 4)


def _lines(ax, metrics: Sequence[dict], series: Sequence[tuple], ylabel: str,
           xlabel: str = "iteration") -> None:
    for key, label, colour, dash, width in series:
        ax.plot(_column(metrics, "iteration"), _column(metrics, key), dash, color=colour,
                linewidth=width, label=label, marker="o" if len(metrics) == 1 else None,
                markersize=4)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.xaxis.get_major_locator().set_params(integer=True)
    _legend(ax)


def ppo_loss(metrics: Sequence[dict]) -> str:
    """The study's first figure: the loss of PPO, its two parts one above the other."""
    def draw(axes):
        _lines(axes[0], metrics, [_POLICY], "policy loss", "")
        _lines(axes[1], metrics, [_VALUE], "value loss")
    return _svg("ppo_loss", "Policy and value loss by iteration", draw, rows=2)


def mean_reward(metrics: Sequence[dict]) -> str:
    """The study's second figure: the mean reward, and each lens."""
    def draw(ax):
        _lines(ax, metrics, [_REWARD, *_LENSES], "reward, standardised")
    return _svg("mean_reward", "Mean reward by iteration", draw)


def kl_and_entropy(metrics: Sequence[dict]) -> str:
    """How far the policy went from its reference, and how much it still varies."""
    def draw(axes):
        _lines(axes[0], metrics, _KLS, "nats a dialogue", "")
        _lines(axes[1], metrics, [_ENTROPY], "entropy")
    return _svg("kl_and_entropy", "KL to the reference and entropy by iteration", draw, rows=2)


def overoptimisation(curve: Sequence[dict]) -> str:
    """Proxy reward, and below it gold, against the square root of the KL; it marks the highest
    gold, if known, and the iteration kept in best/."""
    rows = [row for row in curve if row.get("kl") is not None]
    x = [math.sqrt(max(row["kl"], 0.0)) for row in rows]
    rated = [i for i, row in enumerate(rows) if row.get("gold") is not None]
    highest = max(rated, key=lambda i: rows[i]["gold"], default=None)
    kept = next((i for i, row in enumerate(rows) if row.get("kept")), None)
    marks = [(highest, ":", "highest gold, noisy: {gold:.3f}, iteration {iteration}"),
             (kept, "--", "kept in best/: iteration {iteration}")]
    marks = [mark for mark in marks if mark[0] is not None]

    def draw(axes):
        for ax, name, colour in zip(axes, ("proxy", "gold"), (BLUE, RED)):
            y = _column(rows, name)
            ax.plot(x, y, "o", color=colour, markersize=3.5)
            ax.plot(x, y, color=colour, linewidth=0.8, alpha=0.5)  # in the order of the iterations
            ax.set(ylabel=name)
            for at, dash, _ in marks:
                ax.axvline(x[at], color=INK, linewidth=0.8, linestyle=dash)
        axes[1].set(xlabel="square root of the KL")
        if highest is not None:  # none on the proxy: it rises because it is trained for
            axes[1].plot(x[highest], rows[highest]["gold"], "*", color=INK, markersize=11)
        axes[0].set_title("; ".join(text.format(**rows[at]) for at, _, text in marks),
                          loc="left", fontsize=9)
    return _svg("overoptimisation", "Proxy reward and gold against the square root of the KL",
                draw, rows=2)


def training_curves(metrics: Sequence[dict]) -> str:
    """What to watch while PPO runs, in four panels."""
    def draw(axes):
        (reward, kl), (loss, turns) = axes
        _lines(reward, metrics, _LENSES, "reward, standardised", "")
        _lines(kl, metrics, _KLS, "nats a dialogue", "")
        _lines(loss, metrics, [_POLICY, _VALUE], "loss")
        _lines(turns, metrics, [_TOKENS], "tokens a dialogue")
        turns.yaxis.label.set_color(BLUE)
        ended = turns.twinx()
        _lines(ended, metrics, [_ENDED], "share of turns ended")
        ended.yaxis.label.set_color(RED)
        ended.set_ylim(-0.02, 1.02)
        ended.grid(False)
    return _svg("training_curves", "Reward, KL, losses, turns ended and length by iteration", draw,
                rows=2, columns=2, size=(9.0, 5.6))


def best_of_n(rows: Sequence[dict]) -> str:
    """Gold of the best of n dialogues by each aggregator, with its interval; where gold is not
    known the judge's opinion, or the reward."""
    kinds = (("gold", "low", "high"), ("judge", "judge_low", "judge_high"), ("reward",) * 3)
    key, low, high = next((kind for kind in kinds if any(kind[0] in row for row in rows)), kinds[2])

    def draw(ax):
        for i, name in enumerate(dict.fromkeys(row["aggregator"] for row in rows)):
            own = sorted((r for r in rows if r["aggregator"] == name), key=lambda r: r["n"])
            n, colour = _column(own, "n"), (BLUE, RED, GREEN, PURPLE, INK)[i % 5]
            ax.plot(n, _column(own, key), ("-", "--", ":", "-.")[i % 4], marker="os^Dvx"[i % 6],
                    markersize=4, color=colour, label=str(name))
            ax.fill_between(n, _column(own, low), _column(own, high), color=colour, alpha=0.12,
                            linewidth=0)
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts := sorted({row["n"] for row in rows}), labels=map(str, counts))
        ax.set(xlabel="best of n", ylabel=key)
        _legend(ax)
    return _svg("best_of_n", f"{key.capitalize()} of the best of n dialogues", draw)
