"""Draws the pictures of README and guide.

  python docs/pictures.py --diagrams --out docs     # adapter_stacks.svg, layers.svg
  python docs/pictures.py --report runs/demo/report/report.html --out docs    # report.png
  python docs/pictures.py runs/demo                 # token_flow.svg of a finished run
  python docs/pictures.py runs/demo --record 5 --out /tmp

token_flow.svg shows one dialogue, token by token, as PPO sees it. The dialogue is one of the last
iteration in policy/rollouts.jsonl. What happens to it is computed again from the run's adapters, by
the functions that run_ppo.py calls: log-probs, scores, placed rewards, values, GAE. The policy is
the finished one, one update later than the one that sampled, and the advantages are raw: whitening
needs the whole batch.
"""
from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def loaded(run: Path, args: dict, parents: dict, base: str | None):
    """A run's model with all its adapters, and its tokenizer.

    With them: the stack under the policy, the reward models, the mean and standard deviation of
    their scores, and the value head.
    """
    from virtue.plumbing.artefacts import load_artifact, load_reward_models, load_sft
    from virtue.plumbing.loading import (base_fingerprint, load_model, load_tokenizer, resolve,
                                         template_fingerprint)

    folder = resolve(base or args["model"])
    model = load_model(folder, quantize=args["quantize"], dtype=args["dtype"])
    tokenizer = load_tokenizer(folder)
    known = dict(base={"id": str(folder), "fingerprint": base_fingerprint(folder)},
                 template=template_fingerprint(tokenizer))
    sft, parents = load_sft(run / "sft" if "sft" in parents else None, model, **known)
    rewarding = load_reward_models(run / "rm", model, sft, parents, **known)
    load_artifact(run / "policy", model, "policy", stage="policy", **known)
    _, head = load_artifact(run / "policy" / "value", model, "value", stage="value", **known)
    return model, tokenizer, sft, rewarding, head


def recorded(rollouts: Path, record: int, tokenizer):
    """One record of the last iteration, and its text as a dialogue of tokens."""
    from virtue.dialogue import Dialogue, Turn, encode_conversation
    from virtue.ethics import FOLLOW_UPS, LENSES
    from virtue.plumbing.records import read_jsonl

    found = [r for _, r in read_jsonl(rollouts)]
    found = [r for r in found if r["iteration"] == found[-1]["iteration"]][record]
    messages = [{"role": "user", "content": found["prompt"]}]
    for lens in LENSES:
        messages += [{"role": "user", "content": FOLLOW_UPS[lens]}] if lens in FOLLOW_UPS else []
        messages += [{"role": "assistant", "content": found["turns"][lens]}]
    ids, spans = encode_conversation(tokenizer, messages)
    turns = tuple(Turn(start, end, False) for start, end in spans)
    return found, Dialogue(found["id"], messages[:1], ids, turns)


def tokens_of(run: Path, record: int, base: str | None = None) -> dict:
    """One dialogue of a run: for each quantity a list, with a number for each sampled token.

    Beside them `words`, `ends`, which are the turns' last tokens, and the `prompt`.
    """
    import torch
    from run_ppo import GAMMA, SCORE_CLIP
    from virtue.dialogue import right_pad
    from virtue.ensemble import standardize
    from virtue.logprobs import kl_k1
    from virtue.lora import use_stack
    from virtue.plumbing.artefacts import read_manifest
    from virtue.ppo import gae, token_rewards
    from virtue.rollout import dialogue_logprobs, place_scores, score_dialogues, values_at

    manifest = read_manifest(run / "policy", "policy")
    args = manifest["settings"]
    model, tokenizer, sft, rewarding, head = loaded(run, args, manifest["parents"], base)
    reward_models, mean, std = rewarding
    found, dialogue = recorded(run / "policy" / "rollouts.jsonl", record, tokenizer)
    ids, dialogues, pad_id = dialogue.ids, [dialogue], tokenizer.pad_token_id

    # What run_ppo.py does with it, steps 2 to 4
    settings = dict(batch_size=1, temperature=args["temperature"])
    logprobs, mask = dialogue_logprobs(model, (*sft, "policy"), dialogues, pad_id, **settings)
    reference, _ = dialogue_logprobs(model, sft, dialogues, pad_id, **settings)
    scores = score_dialogues(model, reward_models, dialogues, (0, 1, 2), pad_id, batch_size=1)
    scores = standardize(scores, mean, std).clamp(-SCORE_CLIP, SCORE_CLIP)
    placed = place_scores(scores, dialogues, mask, "mean")
    rewards = token_rewards(placed, logprobs, reference, mask, args["kl_coef"])
    with use_stack(model, *sft, "value"), torch.no_grad():
        values = values_at(model, head, *right_pad([ids], pad_id), mask)
    advantages, returns = gae(rewards, values, mask, GAMMA, args["lam"])

    columns = {"log ratio": kl_k1(logprobs, reference), "rewards": rewards, "values": values,
               "returns": returns, "advantages": advantages}
    sampled = [token for token, is_sampled in zip(ids[1:], mask[0].tolist()) if is_sampled]
    lengths = [turn.end - turn.start for turn in dialogue.turns]
    return {"words": [tokenizer.decode([token]).strip() or "·" for token in sampled],
            "ends": [sum(lengths[:i + 1]) - 1 for i in range(len(lengths))],
            "prompt": found["prompt"],
            **{name: row[mask].tolist() for name, row in columns.items()}}


def token_flow(row: dict) -> str:
    """The four steps of a reward, one above the other: SVG."""
    from virtue.ethics import LENSES
    from virtue.evaluation.plots import BLUE, GREEN, INK, PURPLE, RED, _svg

    def draw(axes):
        edges = [i - 0.5 for i in range(len(row["words"]) + 1)]
        for ax, name, colour, label in ((axes[0], "log ratio", RED, "log π/ref"),
                                        (axes[1], "rewards", BLUE, "reward"),
                                        (axes[3], "advantages", PURPLE, "advantage")):
            ax.stairs(row[name], edges, fill=True, color=colour)
            ax.set_ylabel(label)
        for name, colour, dash in (("values", GREEN, "-"), ("returns", BLUE, "--")):
            axes[2].stairs(row[name], edges, baseline=None, color=colour, linestyle=dash,
                           linewidth=1.3, label=name[:-1])
        axes[2].set_ylabel("value, return")
        axes[2].legend(loc="upper right")
        for ax in axes:
            ax.grid(False, axis="x")
            ax.tick_params(axis="x", length=0)
            ax.axhline(0, color=INK, linewidth=0.6)
            # The user asks the next question here; none of its tokens is shown.
            for end in row["ends"][:-1]:
                ax.axvline(end + 0.5, color=INK, linewidth=0.8, linestyle=":")
        starts = [0, *(end + 1 for end in row["ends"])]
        for start, end, lens in zip(starts, row["ends"], LENSES):
            axes[0].text((start + end) / 2, 1.04, lens, ha="center", fontsize=9,
                         transform=axes[0].get_xaxis_transform())
        axes[3].set_xticks(range(len(row["words"])), row["words"], rotation=90, fontsize=6.5)
        axes[3].set_xlim(edges[0], edges[-1])

    title = ("One dialogue token by token: log ratio to the reference, reward, value and return, "
             "advantage")
    return _rounded(_svg("token_flow", title, draw, rows=4, size=(11.0, 6.6)))


def _rounded(svg: str) -> str:
    """Hundredths of a point are enough."""
    return re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", svg)


GREY = "#808080"  # of what stays frozen: to be seen on white and on black


def _diagram(name: str, title: str, draw, width: int, height: int) -> str:
    """SVG of `width` x `height` pixels; `draw(ax)` has these as its units, with y downwards."""
    from virtue.evaluation.plots import _svg

    def canvas(ax):
        ax.set_position([0, 0, 1, 1])
        ax.set_xlim(0, width)
        ax.set_ylim(height, 0)
        ax.axis("off")
        draw(ax)
    svg = _svg(name, title, canvas, size=(width / 72, height / 72))
    svg = re.sub(r'width="100%" viewBox="[^"]*"',
                 f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"', svg, count=1)
    return _rounded(svg)


def _box(ax, left, top, width, height, colour, lines=(), size=10.5, filled=0.16, **text) -> None:
    """A rounded box with lines of text in its middle; a line may be a pair: text, its settings."""
    from matplotlib.patches import FancyBboxPatch
    shape = dict(boxstyle="round,pad=0,rounding_size=5", linewidth=1.2)
    for settings in (dict(facecolor=colour, edgecolor="none", alpha=filled),
                     dict(facecolor="none", edgecolor=colour)):
        ax.add_patch(FancyBboxPatch((left, top), width, height, **shape, **settings))
    for i, line in enumerate(lines):
        words, own = line if isinstance(line, tuple) else (line, {})
        middle = top + height / 2 + (i - (len(lines) - 1) / 2) * 1.35 * size
        ax.text(left + width / 2, middle, words, ha="center", va="center_baseline",
                **{"fontsize": size, **text, **own})


def adapter_stacks() -> str:
    """One frozen base, and the adapters and heads that each role adds to it: SVG."""
    from virtue.evaluation.plots import BLUE, GREEN, PURPLE
    roles = (("judge", None, None, "verdicts"), ("reference", None, None, "log-probs"),
             ("policy", BLUE, None, "log-probs"), ("value", BLUE, "head", "values"),
             ("action", PURPLE, "head", "scores"), ("motivation", PURPLE, "head", "scores"),
             ("consequence", PURPLE, "head", "scores"))

    def draw(ax):
        width, gap, left = 90, 8, 11
        x = [left + i * (width + gap) for i in range(len(roles))]
        right, small = x[-1] + width, dict(fontsize=9)
        ax.text((x[4] + right) / 2, 15, "three reward models", ha="center", fontsize=10.5)
        ax.plot([x[4], right], [22, 22], color=PURPLE, linewidth=1.2)
        for at, (role, colour, head, gives) in zip(x, roles):
            ax.text(at + width / 2, 40, role, ha="center", fontsize=11, weight="bold")
            ax.text(at + width / 2, 55, gives, ha="center", **small)
            if head:
                _box(ax, at + 15, 68, width - 30, 24, colour, ["head"], 10)
            if colour:
                _box(ax, at, 98, width, 34, colour, [role], 10.5)
        _box(ax, x[1], 138, right - x[1], 34, GREEN, ["sft: one adapter, under all six"], 10.5)
        _box(ax, x[0], 178, right - x[0], 44, GREY,
             ["base: one copy in memory, in 4 bits or more; never trained"], 10.5)
        for at, colour, words in ((x[0], GREY, "frozen"), (x[1], GREEN, "trained by run_sft.py"),
                                  (x[3] - 5, PURPLE, "trained by run_rm.py"),
                                  (x[5] - 15, BLUE, "trained by run_ppo.py")):
            _box(ax, at, 236, 14, 12, colour)
            ax.text(at + 20, 246, words, **small)
    title = ("One frozen base; above it the adapter sft, which all roles but the judge use; above "
             "that an adapter each for policy, value function and three reward models, the last "
             "four with a head")
    return _diagram("adapter_stacks", title, draw, 700, 256)


# As in tests/test_imports.py.
CORE = ("masked", "logprobs", "preference", "ensemble", "ppo", "randomness")


def layers(package: Path = ROOT / "virtue") -> str:
    """The package's layers with their modules, those that are imported below: SVG."""
    import virtue
    from virtue.evaluation.plots import BLUE, GREEN, PURPLE, RED
    order = re.findall(r"^    (\w+)\.py ", virtue.__doc__, re.M)

    def modules(folder: Path) -> list[str]:
        return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    method = sorted(set(modules(package)) - set(CORE), key=order.index)
    beside = [(name, says, modules(package / name)) for name, says in (
        ("plumbing", "a run: flags, files, resume"), ("evaluation", "measures and reports"),
        ("toy", "the embedded world"))]

    def rows(names, columns):
        deep = -(-len(names) // columns)
        return [names[i * deep:(i + 1) * deep] for i in range(columns)]

    def draw(ax):
        mono = dict(family=["DejaVu Sans Mono", "monospace"], fontsize=9.5)

        def layer(left, top, width, height, colour, name, says, columns):
            _box(ax, left, top, width, height, colour, filled=0.1)
            ax.text(left + 12, top + 19, name, fontsize=11, weight="bold")
            ax.text(left + 12, top + 34, says, fontsize=9)
            for i, names in enumerate(columns):
                x = left + 12 + i * (width - 16) / len(columns)
                for j, word in enumerate(names):
                    ax.text(x, top + 53 + j * 15, word, **mono)

        def arrow(x, top, bottom):
            ax.annotate("", (x, bottom), (x, top), arrowprops=dict(
                arrowstyle="-|>", color=GREY, linewidth=1.4, shrinkA=0, shrinkB=0))
        scripts = [[f"run_{name}.py"] for name in ("data", "sft", "rm", "ppo", "eval")]
        layer(10, 8, 680, 66, RED, "scripts", "one for each stage: read its main loop", scripts)
        deepest = max(len(rows(beside[0][2], 2)[0]), len(rows(beside[1][2], 2)[0]))
        tall = 50 + 15 * deepest
        places = ((10, 262, 2), (282, 262, 2), (554, 136, 1))
        for (left, width, columns), (name, says, names) in zip(places, beside):
            layer(left, 98, width, tall, BLUE, name, says, rows(names, columns))
            arrow(left + width / 2, 76, 97)
            arrow(left + width / 2, 100 + tall, 121 + tall)
        top = 122 + tall
        layer(10, top, 680, 66, GREEN, "method", "dialogues, adapters, judge, rewards",
              [[name] for name in method])
        arrow(350, top + 68, top + 89)
        layer(10, top + 90, 680, 66, PURPLE, "core",
              "formulas and random numbers: imports torch, numpy and itself only",
              [[name] for name in CORE])
    deepest = max(-(-len(names) // 2) for _, _, names in beside[:2])
    title = ("Layers of the package: the scripts import plumbing, evaluation and toy, "
             "these the method, and the method the core")
    return _diagram("layers", title, draw, 700, 122 + 50 + 15 * deepest + 164)


def report_picture(page: Path, out: Path, height: int = 1150, browser: str = "chromium") -> Path:
    """The top of a report as out/report.png, 900 pixels wide, in 64 colours: by headless Chromium,

      chromium --headless --hide-scrollbars --window-size=900,1150 \\
               --screenshot=report.png report.html

    with flags that keep it off the network. `page`: report.html of run_eval.py models."""
    from PIL import Image  # comes with matplotlib
    if not shutil.which(browser):
        raise SystemExit(f"error: no {browser} on the PATH: apt-get install chromium, or --browser")
    target = out / "report.png"
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                        "--disable-background-networking", "--disable-component-update",
                        "--disable-sync", "--hide-scrollbars", f"--user-data-dir={profile}",
                        f"--window-size=900,{height}", f"--screenshot={target.resolve()}",
                        page.resolve().as_uri()],
                       check=True, timeout=120, stderr=subprocess.DEVNULL)
    Image.open(target).convert("RGB").quantize(64).save(target, optimize=True)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, nargs="?", help="folder of make demo: draw token_flow.svg")
    add("--record", type=int, default=0, help="which dialogue of the last iteration")
    add("--model", help="the base, where it is not what the run recorded: toy, a folder or hub id")
    add("--diagrams", action="store_true", help="draw adapter_stacks.svg and layers.svg")
    add("--report", type=Path, metavar="PAGE", help="report.html: draw report.png")
    add("--height", type=int, default=1150, help="of report.png, in pixels")
    add("--browser", default="chromium", help="Chromium or Chrome, for --report")
    add("--out", type=Path, help="folder for the pictures (default: the run's, or docs/)")
    args = parser.parse_args()
    if not (args.run or args.diagrams or args.report):
        parser.error("give a run, --diagrams or --report PAGE")
    docs = args.out or ROOT / "docs"
    if args.diagrams:
        for name, svg in (("adapter_stacks", adapter_stacks()), ("layers", layers())):
            (docs / f"{name}.svg").write_text(svg + "\n", encoding="utf-8")
            print(f"wrote {docs / name}.svg, {len(svg.encode())} bytes")
    if args.report:
        target = report_picture(args.report, docs, args.height, args.browser)
        print(f"wrote {target}, {target.stat().st_size} bytes")
    if not args.run:
        return
    row = tokens_of(args.run, args.record, args.model)
    svg = token_flow(row)
    args.out = args.out or args.run
    (args.out / "token_flow.svg").write_text(svg + "\n", encoding="utf-8")
    print(f"{row['prompt']}\n{' '.join(row['words'])}")
    for end in row["ends"]:
        print(f"token {end}: reward {row['rewards'][end]:+.3f}, "
              f"value {row['values'][end]:+.3f}, return {row['returns'][end]:+.3f}")
    print(f"wrote {args.out / 'token_flow.svg'}, {len(svg.encode())} bytes")


if __name__ == "__main__":
    main()
