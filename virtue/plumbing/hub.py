"""Publish a folder of a run on the Hugging Face hub, with a card: what it is, what was measured of
it.

  python -m virtue.plumbing.hub runs/demo/policy --name user/virtue-policy --report runs/demo/report
  python -m virtue.plumbing.hub runs/demo/rm/action --name user/virtue-action --dry-run
  python -m virtue.plumbing.hub runs/demo/preferences --name user/virtue-preferences --public

FOLDER is an adapter (of run_sft.py, run_ppo.py or one lens of run_rm.py), the merged model below
it, or data. An adapter trained upon SFT is the wrong model when it stands alone: the two go up as
one flat adapter. The card's numbers are those of virtue.json, of summary.json, and of --report,
which must be on these very weights. Of absolute paths only the last part goes up. --dry-run prints
the card and the names of the files, and opens no connection.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import torch
from safetensors.torch import load_file, save

from virtue import VirtueError
from virtue.plumbing.artefacts import (AGAIN, CONFIG, MANIFEST, WEIGHTS, file_hash, read_manifest,
                                       sha256_file)
from virtue.ethics import LENSES, VIRTUES
from virtue.evaluation.feedback import doubts
from virtue.evaluation.report import ROWS
from virtue.plumbing.flags import make_parser
from virtue.plumbing.loading import one_line
from virtue.plumbing.runtime import run_main
from virtue.evaluation.stats import wilson

REPOSITORY = r"[\w-][\w.-]*/[\w.-]+"
DATA = {"revisions": ("revisions",), "preferences": (*LENSES, "dialogues")}
KINDS = ("sft", "policy", "rm", "merged", *DATA)
TEMPLATE = Path(__file__).with_name("card.md.jinja")


def public(value):
    """A value of a JSON file without what it tells of a machine: of an absolute path the last
    part."""
    if isinstance(value, Mapping):
        return {key: public(v) for key, v in value.items()}
    if isinstance(value, list):
        return [public(v) for v in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _bytes(value) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as e:
        raise VirtueError(f"{path}: cannot be read ({e}): {AGAIN}") from None


def flat_adapter(folders: Sequence[Path]) -> tuple[dict[str, torch.Tensor], dict]:
    """State and config of the one adapter that equals the sum of the artefacts: `lora.flatten` on
    files, so that no base is loaded.

    A stacked along the rank, B scaled and side by side; zeros stand for an adapter that a layer
    lacks. The last one's head stays. VirtueError: an adapter_config.json that cannot be read.
    """
    parts = [(load_file(folder / WEIGHTS), _read(folder / CONFIG)) for folder in folders]
    keys = {key for tensors, _ in parts for key in tensors if ".lora_" in key}
    state = {key: value for key, value in parts[-1][0].items() if key not in keys}
    for layer in sorted({key.rpartition(".lora_")[0] for key in keys}):
        a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        width, height = next((t[a].shape[1], t[b].shape[0]) for t, _ in parts if a in t)
        state[a] = torch.cat([t.get(a, torch.zeros(c["r"], width)) for t, c in parts])
        state[b] = torch.cat([t.get(b, torch.zeros(height, c["r"])) * (c["lora_alpha"] / c["r"])
                              for t, c in parts], dim=1)
    rank = sum(config["r"] for _, config in parts)
    targets = sorted({target for _, config in parts for target in config["target_modules"]})
    return state, {**parts[-1][1], "r": rank, "lora_alpha": rank, "target_modules": targets}


def contents(folder: Path, sft: Path | None = None) -> tuple[str, dict, dict[str, bytes | Path]]:
    """(kind, manifest, what goes up beside the card: bytes or a file, by name). VirtueError: a
    folder that cannot be published."""
    merged = (folder / "config.json").is_file()
    manifest = read_manifest(folder.resolve().parent if merged else folder)
    kind, shown = "merged" if merged else manifest["stage"], public(manifest)
    if kind not in KINDS or merged and manifest["stage"] != "rm":
        raise VirtueError(f"{folder}: a folder of stage {kind!r}, of no use to others: give one of "
                          f"{', '.join(KINDS)}")
    if kind in DATA:
        names = [*(f"{part}.jsonl" for part in DATA[kind]), "summary.json"]
    elif merged:
        suffixes = (".json", ".jinja", ".safetensors")
        names = [path.name for path in sorted(folder.iterdir()) if path.suffix in suffixes]
    else:
        files, changes = _adapter_files(folder, manifest, sft)
        return kind, manifest, {**files, MANIFEST: _bytes(shown | changes)}
    for name in names:
        sha256_file(folder / name)  # one that is missing is refused before anything goes up
    return kind, manifest, {**{name: folder / name for name in names}, MANIFEST: _bytes(shown)}


def _adapter_files(folder: Path, manifest: dict, sft: Path | None) -> tuple[dict[str, bytes], dict]:
    """An adapter's files, made one with the SFT adapter below it, and what then changes in the
    manifest."""
    upon = manifest["parents"].get("sft")
    below = {sft or Path(upon["folder"]): upon["sha256"]} if upon else {}
    for path, recorded in {**below, folder: manifest["sha256"]}.items():
        if file_hash(path) != recorded:
            raise VirtueError(f"{path}: not the weights that {folder} records: give the SFT "
                              f"adapter by --sft, or run again the stage that writes {folder}")
    state, config = flat_adapter([*below, folder])
    if not upon:
        return {WEIGHTS: (folder / WEIGHTS).read_bytes(), CONFIG: _bytes(public(config))}, {}
    weights, shown = save(state, metadata={"format": "pt"}), public(manifest)
    hashes = {"sft": upon["sha256"], manifest["stage"]: manifest["sha256"]}
    changes = {"parents": {}, "sha256": hashlib.sha256(weights).hexdigest(),
               "settings": {**shown["settings"], "sft": None},
               "extra": {**shown["extra"], "flat": hashes}}
    return {WEIGHTS: weights, CONFIG: _bytes(public(config))}, changes


def results(folder: Path, kind: str, manifest: dict, report: Path | None) -> dict:
    """What was measured: {"text", "tables": [(names of columns, {title: cells})], "remarks"}.

    VirtueError: a report of a kind that has none, or on other weights.
    """
    if report and kind not in ("sft", "policy"):
        raise VirtueError(f"--report {report}: only an SFT adapter or a policy has one, {folder} "
                          f"is of stage {kind!r}: leave it out")
    if kind in DATA:
        return _counts(_read(folder / "summary.json"))
    extra, text = manifest["extra"], ""
    if kind in ("rm", "merged"):
        text = _accuracy(extra, manifest["settings"].get("pairs"))
    elif "held_out_loss" in extra:
        text = (f"Held-out loss {extra['held_out_loss_before']:.3f} before and "
                f"{extra['held_out_loss']:.3f} after{', nats a token' if kind == 'sft' else ''}.")
    if report is None:
        return {"text": text or "Not measured: published without a report."}
    if read_manifest(report, "eval")["parents"].get(kind, {}).get("sha256") != manifest["sha256"]:
        raise VirtueError(f"{report}: a report on other weights than those in {folder}: give the "
                          "folder that run_eval.py models wrote on these")
    scores = _read(report / "scores.json")
    text += (f"\n\n{scores['prompts']} held-out prompts, seed {scores['seed']}. "
             f"Interval: {scores['interval']}.")
    return {"text": text.lstrip(), **_compared(scores, kind == "policy")}


def _counts(summary: dict) -> dict:
    """The counts of a folder of data, and its table of one column a lens."""
    lenses = {name: part for name, part in summary.items() if isinstance(part, dict)}
    rows = {key.replace("_", " "): [part.get(key) for part in lenses.values()]
            for key in next(iter(lenses.values()), ())}
    text = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in summary.items()
                     if name not in lenses)
    return {"text": text, "tables": [([*lenses], rows)] if lenses else []}


def _accuracy(extra: dict, pairs: str | None) -> str:
    """How a reward model does on the pairs held out, with Wilson's interval; a tie counts one
    half."""
    held_out, n = extra["held_out"], extra.get("held_out_pairs", 0)
    accuracy, loss = f"{held_out['accuracy']:.3f}", f"{held_out['log_loss']:.3f}"
    if n:
        right = round(held_out["accuracy"] * n * 2) / 2
        accuracy += " [{1:.3f}, {2:.3f}]".format(*wilson(right, n))
    if "log_loss_low" in held_out:
        loss += " [{log_loss_low:.3f}, {log_loss_high:.3f}]".format(**held_out)
    return (f"On {n or 'the'} pairs held out from training, against "
            f"{f'the choices in {public(pairs)}' if pairs else 'the judge'}: accuracy {accuracy}, "
            f"log-loss {loss}, calibration error {held_out['calibration_error']:.3f}"
            f"{'; in brackets 95 %' if '[' in accuracy + loss else ''}.")


def _compared(scores: dict, policy: bool) -> dict:
    """A report's tables; on the card of an SFT adapter without the policy upon it."""
    models = {name: column for name, column in scores["models"].items() if policy or name != "ppo"}
    pairs = {pair: measures for pair, measures in scores["differences"].items()
             if policy or pair == "sft - base"}
    rows = {title.strip(): [column[key] for column in models.values()]
            for key, title in ROWS.items() if key in models["base"]}
    span = "{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format
    differences = {key: [span(**row[key]) if key in row else None for row in pairs.values()]
                   for key in next(iter(pairs.values()))}
    share = "preferred on {rate:.0%} [{low:.0%}, {high:.0%}] of {pairs}".format
    remarks = [f"the judge, {pair}: {lens} {share(**rate)}"
               for pair, rates in scores["wins"].items() if policy
               for lens, rate in rates.items() if rate]
    remarks += [f"**warning**: {text}" for text in scores["warnings"] if policy]
    return {"tables": [([*models], rows), ([*pairs], differences)], "remarks": remarks}


def card(name: str, kind: str, manifest: dict, measured: dict, licence: str | None) -> str:
    """README.md of the repository: the hub's metadata, then text. `manifest` is from `public`,
    `measured` from `results`."""
    base = manifest["base"]["id"]
    toy, on_hub = base == "toy", re.fullmatch(REPOSITORY, base) and not Path(base).is_dir()
    tags = ["virtue-ethics", "rlaif", *(["lora"] if kind in ("sft", "policy", "rm") else [])]
    metadata = {"license": licence or ("mit" if toy else "other"), "tags": tags}
    if kind in DATA:
        metadata["configs"] = [{"config_name": part, "data_files": f"{part}.jsonl"}
                               for part in DATA[kind]]
    else:
        metadata["library_name"] = "transformers" if kind == "merged" else "peft"
        if on_hub:
            metadata["base_model"] = base
        task = "generation" if kind in ("sft", "policy") else "classification"
        metadata["pipeline_tag"] = f"text-{task}"
    template = jinja2.Template(TEMPLATE.read_text("utf-8"), trim_blocks=True, lstrip_blocks=True,
                               keep_trailing_newline=True)
    return template.render(
        name=name, kind=kind, manifest=manifest, measured=measured, metadata=metadata, toy=toy,
        base=base if on_hub else f"path/to/{base}", doubts=doubts(manifest["extra"]),
        virtues=manifest["base"].get("virtues", ", ".join(VIRTUES)), dumps=json.dumps)


def upload(name: str, files: Mapping[str, bytes | Path], repo_type: str, private: bool) -> str:
    """Puts the files into the repository in one commit, and makes it where there is none; returns
    its address. VirtueError: the hub refuses, or is out of reach."""
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        url = api.create_repo(name, repo_type=repo_type, private=private, exist_ok=True)
        operations = [huggingface_hub.CommitOperationAdd(*file) for file in files.items()]
        api.create_commit(name, operations, commit_message="Upload by virtue", repo_type=repo_type)
    except Exception as error:  # network, rights, spelling: the hub has an exception for each
        raise VirtueError(f"{name}: the hub did not take it ({one_line(error)}): "
                          "check the name, the network, and `hf auth login`") from error
    return str(url)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags. VirtueError: no place to put the files, or no name of a repository."""
    parser = make_parser(__doc__)
    parser.prog = "python -m virtue.plumbing.hub"
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="adapter, merged model or data")
    add("--name", "--push-to-hub", dest="name", help="the repository, owner/name; or give --out")
    add("--out", type=Path, help="write the files into this new folder and upload nothing: PEFT's "
        "form of an adapter, SFT folded in")
    add("--report", type=Path, help="of an SFT adapter or a policy: folder of run_eval.py models "
        "on it; its numbers go into the card")
    add("--sft", type=Path, help="the SFT adapter below it, for a folder that was moved")
    add("--license", help="the hub's name of a licence (default: mit on toy, else other)")
    add("--public", action="store_true", help="open a new repository to all; else it is private")
    add("--dry-run", action="store_true", help="print the card and the files' names; no network")
    args = parser.parse_args(argv)
    if args.name is None and args.out is None:
        raise VirtueError("neither --name nor --out: give --name owner/name, or --out FOLDER, "
                          "which uploads nothing")
    if args.name and not re.fullmatch(REPOSITORY, args.name):
        raise VirtueError(f"--name {args.name}: no name of a repository: give owner/name")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the card; writes (--out), previews (--dry-run) or uploads the files. VirtueError: as
    `contents` and `upload`; an --out that is not empty."""
    args = parse(argv)
    name = args.name or args.out.resolve().name  # for the card: a folder loads as a repository does
    kind, manifest, files = contents(args.folder, args.sft)
    measured = results(args.folder, kind, manifest, args.report)
    text = card(name, kind, public(manifest), measured, args.license)
    files["README.md"] = text.encode()
    if args.dry_run:
        visible = "public" if args.public else "private"
        where = f"write to {args.out}" if args.out else f"upload to {args.name}, {visible}"
        print(f"{text}\nwould {where}: {', '.join(sorted(files))}")
        return
    if args.out:
        where = args.out
        if where.exists() and (not where.is_dir() or any(where.iterdir())):
            raise VirtueError(f"{where}: exists and is not an empty folder: give another --out, or "
                              "empty it")
        where.mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            if isinstance(data, bytes):
                (where / file).write_bytes(data)
            else:
                shutil.copyfile(data, where / file)
    else:
        where = upload(args.name, files, "dataset" if kind in DATA else "model", not args.public)
    print(f"wrote {len(files)} files to {where}")


if __name__ == "__main__":
    run_main(main)
