"""Draws the guide's picture from a finished run: one dialogue, token by token, as PPO sees it.

  python docs/pictures.py runs/demo
  python docs/pictures.py runs/demo --record 5 --out /tmp

The dialogue is one of the last iteration in policy/rollouts.jsonl. What happens to it is computed again from the
run's adapters, by the functions that run_ppo.py calls: log-probs, scores, placed rewards, values, GAE. The policy is the
finished one, one update later than the one that sampled, and the advantages are raw: whitening needs the whole batch.
"""
from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def tokens_of(run: Path, record: int, base: str | None = None) -> dict:
    """One dialogue of a run: a list for each quantity, one number a sampled token; `words`, and `ends`, the turns' last tokens."""
    import torch
    from virtue.plumbing.artefacts import load_artifact, read_manifest
    from virtue.dialogue import Dialogue, Turn, encode_conversation, right_pad
    from virtue.plumbing.records import read_jsonl
    from virtue.ensemble import standardize
    from virtue.ethics import FOLLOW_UPS, LENSES
    from virtue.logprobs import kl_k1
    from virtue.lora import use_stack
    from virtue.plumbing.loading import (base_fingerprint, load_model, load_tokenizer, resolve,
                                         template_fingerprint)
    from virtue.ppo import gae, token_rewards
    from virtue.plumbing.artefacts import load_reward_models, load_sft
    from virtue.rollout import dialogue_logprobs, place_scores, score_dialogues, values_at

    policy = run / "policy"
    manifest = read_manifest(policy, "policy")
    args = manifest["settings"]
    folder = resolve(base or args["model"])
    model, tokenizer = load_model(folder, quantize=args["quantize"], dtype=args["dtype"]), load_tokenizer(folder)
    known = dict(base={"id": str(folder), "fingerprint": base_fingerprint(folder)}, template=template_fingerprint(tokenizer))
    sft, parents = load_sft(run / "sft" if "sft" in manifest["parents"] else None, model, **known)
    reward_models, mean, std = load_reward_models(run / "rm", model, sft, parents, **known)
    load_artifact(policy, model, "policy", stage="policy", **known)
    _, head = load_artifact(policy / "value", model, "value", stage="value", **known)

    # The record's text as a dialogue of tokens
    found = [r for _, r in read_jsonl(policy / "rollouts.jsonl")]
    found = [r for r in found if r["iteration"] == found[-1]["iteration"]][record]
    messages = [{"role": "user", "content": found["prompt"]}]
    for lens in LENSES:
        messages += [{"role": "user", "content": FOLLOW_UPS[lens]}] if lens in FOLLOW_UPS else []
        messages += [{"role": "assistant", "content": found["turns"][lens]}]
    ids, spans = encode_conversation(tokenizer, messages)
    dialogue = [Dialogue(found["id"], messages[:1], ids, tuple(Turn(start, end, False) for start, end in spans))]

    # What run_ppo.py does with it, steps 2 to 4
    pad_id, settings = tokenizer.pad_token_id, dict(batch_size=1, temperature=args["temperature"])
    logprobs, mask = dialogue_logprobs(model, (*sft, "policy"), dialogue, pad_id, **settings)
    reference, _ = dialogue_logprobs(model, sft, dialogue, pad_id, **settings)
    scores = standardize(score_dialogues(model, reward_models, dialogue, (0, 1, 2), pad_id, batch_size=1), mean, std)
    scores = scores.clamp(-args["score_clip"], args["score_clip"])
    placed = place_scores(scores, dialogue, mask, "mean")
    rewards = token_rewards(placed, logprobs, reference, mask, args["kl_coef"])
    with use_stack(model, *sft, "value"), torch.no_grad():
        values = values_at(model, head, *right_pad([ids], pad_id), mask)
    advantages, returns = gae(rewards, values, mask, args["gamma"], args["lam"])

    columns = {"log ratio": kl_k1(logprobs, reference), "rewards": rewards, "values": values, "returns": returns, "advantages": advantages}
    words = [tokenizer.decode([token]).strip() or "·" for token, sampled in zip(ids[1:], mask[0].tolist()) if sampled]
    lengths = [end - start for start, end in spans]
    return {"words": words, "ends": [sum(lengths[:i + 1]) - 1 for i in range(len(lengths))], "prompt": found["prompt"],
            **{name: row[mask].tolist() for name, row in columns.items()}}


def token_flow(row: dict) -> str:
    """The four steps of a reward, one above the other: SVG."""
    from virtue.ethics import LENSES
    from virtue.evaluation.plots import BLUE, GREEN, INK, PURPLE, RED, _svg

    def draw(axes):
        edges = [i - 0.5 for i in range(len(row["words"]) + 1)]
        for ax, name, colour, label in ((axes[0], "log ratio", RED, "log π/ref"), (axes[1], "rewards", BLUE, "reward"), (axes[3], "advantages", PURPLE, "advantage")):
            ax.stairs(row[name], edges, fill=True, color=colour)
            ax.set_ylabel(label)
        for name, colour, dash in (("values", GREEN, "-"), ("returns", BLUE, "--")):
            axes[2].stairs(row[name], edges, baseline=None, color=colour, linestyle=dash, linewidth=1.3, label=name[:-1])
        axes[2].set_ylabel("value, return")
        axes[2].legend(loc="upper right")
        for ax in axes:
            ax.grid(False, axis="x")
            ax.tick_params(axis="x", length=0)
            ax.axhline(0, color=INK, linewidth=0.6)
            for end in row["ends"][:-1]:  # where the user asks the next question: none of its tokens is here
                ax.axvline(end + 0.5, color=INK, linewidth=0.8, linestyle=":")
        for start, end, lens in zip([0, *(e + 1 for e in row["ends"])], row["ends"], LENSES):
            axes[0].text((start + end) / 2, 1.04, lens, transform=axes[0].get_xaxis_transform(), ha="center", fontsize=9)
        axes[3].set_xticks(range(len(row["words"])), row["words"], rotation=90, fontsize=6.5)
        axes[3].set_xlim(edges[0], edges[-1])

    svg = _svg("token_flow", "One dialogue token by token: log ratio to the reference, reward, value and return, advantage",
               draw, rows=4, size=(11.0, 6.6), sharex=True)
    return re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", svg)  # hundredths of a point are enough


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of make demo")
    parser.add_argument("--record", type=int, default=0, help="which dialogue of the last iteration")
    parser.add_argument("--model", help="the base, where it is not what the run recorded: toy, a folder or hub id")
    parser.add_argument("--out", type=Path, help="folder for token_flow.svg (default: the run's; docs/ for the guide)")
    args = parser.parse_args()
    row = tokens_of(args.run, args.record, args.model)
    svg = token_flow(row)
    args.out = args.out or args.run
    (args.out / "token_flow.svg").write_text(svg + "\n", encoding="utf-8")
    print(f"{row['prompt']}\n{' '.join(row['words'])}")
    for end, value, returned, reward in zip(row["ends"], *([row[name][e] for e in row["ends"]] for name in ("values", "returns", "rewards"))):
        print(f"token {end}: reward {reward:+.3f}, value {value:+.3f}, return {returned:+.3f}")
    print(f"wrote {args.out / 'token_flow.svg'}, {len(svg.encode())} bytes")


if __name__ == "__main__":
    main()
