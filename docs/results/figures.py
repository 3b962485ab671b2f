"""Draws the figures of docs/experiments.md from the tables in docs/results/*.md.

  python docs/results/figures.py                 # writes docs/results/figures/*.svg
  python docs/results/figures.py --png /tmp      # writes PNGs there instead, to look at

No number is typed here. A figure names a file, a column and rows of it; each number and its 95 %
interval are read from that cell. Where the cell gives Student's t interval too, that one is drawn.
"""
from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
NUMBER = r"[-+]?\d+\.\d+"
EIGHT, THREE, PLAIN = "#1f4e79", "#c06010", "#444444"


def column(name: str, header: str, which: int = 0) -> dict[str, str]:
    """The cells under `header` in the which-th table of a file that has it, by first cell."""
    blocks = re.findall(r"(?m)(?:^\|.*\|\n)+", (HERE / f"{name}.md").read_text(encoding="utf-8"))
    tables = [[[cell.strip() for cell in line.strip()[1:-1].split("|")]
               for line in block.splitlines()] for block in blocks]
    table = [table for table in tables if header in table[0]][which]
    return {row[0]: row[table[0].index(header)] for row in table[2:]}


def interval(cell: str) -> tuple[float, float, float]:
    """The number before the first bracket, and the bracket: Student's t's where there is one."""
    found = re.search(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\]", cell)
    student = re.search(rf"t \[({NUMBER}), ({NUMBER})\]", cell)
    return float(found[1]), *map(float, student.groups() if student else found.groups()[1:])


def draw(axes, rows: list, label: str, zero: bool = True) -> None:
    """One row an arm: (its name, its cell, its colour); the numbers stand at the right."""
    for place, (_, cell, colour) in enumerate(rows):
        mean, low, high = interval(cell)
        axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(mean, place, "o", color=colour, markersize=6)
        text = (f"{mean:+.3f}" if zero else f"{mean:.3f}").replace("-", "−")
        axes.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), va="center",
                      color=colour, fontsize=9, annotation_clip=False)
    if zero:
        axes.axvline(0, color="#888888", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(axis="x", color="#e8e8e8")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def panels(height: float, *drawn: tuple):
    figure, axes = plt.subplots(1, len(drawn), figsize=(7, height), squeeze=False,
                                layout="constrained")
    for axis, arguments in zip(axes[0], drawn):
        draw(axis, *arguments)
    for axis in axes[0, 1:]:
        axis.set_yticklabels([])
    return figure


def figures() -> dict:
    gain, end, raw = "gain of the last stage", "final − default's", "standardised"
    name = "01-method"
    final, best = column(name, "final"), {n: column(name, f"n = {n}")["mean"] for n in (8, 16)}
    method = [("base", column(name, "base", 1)["default"], PLAIN),
              ("SFT", column(name, "SFT")["default"], PLAIN),
              ("SFT on the chosen answers", final["SFT on chosen"], PLAIN),
              ("best of 8 SFT answers", best[8], PLAIN), ("PPO", final["default"], EIGHT),
              ("best of 16 SFT answers", best[16], PLAIN)]

    name = "07-stalemate"
    gold = column(name, gain) | column(name, gain, 1)
    score = column(name, raw) | column(name, raw, 1)
    arms = ["default", "six steps at 1.4 times it", "six steps at the full rate",
            "its small steps alone", "translated", "literal values",
            "translated, six steps at 1.4 times the rate", "all but its small steps"]
    names = ["default", "six PPO steps, rate × 1.4", "six PPO steps, full rate",
             "six PPO steps, rate × 0.14", "whole recipe, translated", "whole recipe, literal",
             "whole recipe, PPO's rate × 1.4", "whole recipe, default's PPO"]
    stalemate = [([(shown, cells[arm], EIGHT) for shown, arm in zip(names, arms)], label)
              for cells, label in ((gold, "gain in gold"), (score, "gain in standardised Score"))]

    eight, three = column("08-lenses", end), column("08-lenses", end, 1)
    lenses = [("action alone (8 seeds)", eight["action alone"], EIGHT)] + [
        (arm, cell, THREE) for arm, cell in three.items() if arm != "default"]
    name = "09-causes"
    single = column(name, end + ", 95 % interval") | column(name, end, 1)
    causes = [(arm, cell, EIGHT) for arm, cell in column(name, end).items() if arm != "default"]
    causes += [(arm, cell, THREE) for arm, cell in single.items() if "default" not in arm]

    details = column("10-ppo-details", end).items()
    details = [(arm, cell, THREE) for arm, cell in details if arm != "default"]
    name, mean = "11-aggregators", "final − mean's"
    late = "mean, paid at the end"
    aggregators = [(f"{late} (8 seeds)", column(name, mean)[late], EIGHT)] + [
        (arm, cell, THREE) for arm, cell in column(name, mean, 1).items() if arm != "mean"]
    loss = "final gold, minus the default's"
    return dict(method=panels(2.4, (method, "gold", False)), stalemate=panels(3.2, *stalemate),
                lenses=panels(2.8, (lenses, loss)), causes=panels(4.6, (causes, loss)),
                details=panels(2.2, (details, loss)),
                aggregators=panels(2.2, (aggregators, "final gold, minus the mean's")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    matplotlib.rcParams.update({"svg.hashsalt": "virtue", "font.size": 10})
    for name, figure in figures().items():
        file = args.png / f"{name}.png" if args.png else HERE / "figures" / f"{name}.svg"
        figure.savefig(file, dpi=100, **({} if args.png else {"metadata": {"Date": None}}))
