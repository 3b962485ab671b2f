"""Publish a folder of a run on the Hugging Face hub, with a card that says what it is and what was measured of it.

  python -m virtue.plumbing.hub runs/demo/policy --name user/virtue-policy --report runs/demo/report --dry-run
  python -m virtue.plumbing.hub runs/demo/rm/action --name user/virtue-action
  python -m virtue.plumbing.hub runs/demo/preferences --name user/virtue-preferences --public

FOLDER is an adapter (of run_sft.py, run_ppo.py or one lens of run_rm.py), the merged model below it, or data. An adapter
trained upon SFT is the wrong model when it stands alone: the two go up as one flat adapter. The card's numbers are those
of virtue.json, of summary.json, and of --report, which must be on these very weights. Of absolute paths only the last
part goes up. --dry-run prints the card and the names of the files, and opens no connection.
"""
from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from virtue import VirtueError
from virtue.plumbing.artefacts import CONFIG, MANIFEST, WEIGHTS, file_hash, read_manifest, sha256_file
from virtue.ethics import LENSES, VIRTUES
from virtue.evaluation.feedback import doubts
from virtue.evaluation.report import ROWS
from virtue.plumbing.flags import make_parser
from virtue.plumbing.runtime import run_main
from virtue.evaluation.stats import wilson

REPOSITORY = r"[\w-][\w.-]*/[\w.-]+"
# stage: (what it is, what it is for, how to load it)
MESSAGES = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
REWARD = "reward = (score - {score_mean:.6g}) / {score_std:.6g}  # standardised on dialogues of the starting policy"
GENERATE = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), repository).eval()
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "..."}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=256, do_sample=True, top_k=0)[0]))"""
STAGES = {
    "sft": ("A LoRA adapter fine-tuned on a model's own answers, each revised by one virtue.", "research on AI feedback; a start for PPO", GENERATE),
    "policy": ("A LoRA adapter that guides a language model by virtue ethics, tuned on the feedback of a model.", "research on AI feedback and virtue ethics", GENERATE),
    "rm": ("A reward model, a LoRA adapter with a scalar head, that scores a dialogue at the end of one turn: the {lens}.",
           "research: to rank or reward dialogues of its base model", f"""from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=tokenizer.pad_token_id)
model = PeftModel.from_pretrained(model, repository).eval()
text = tokenizer.apply_chat_template({MESSAGES}, tokenize=False)
score = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item()
{REWARD}"""),
    "merged": ("A reward model in one piece, without adapters, that scores a dialogue at the end of one turn: the {lens}.",
               "research: to rank or reward dialogues", f"""from transformers import AutoTokenizer, pipeline
text = AutoTokenizer.from_pretrained(repository).apply_chat_template({MESSAGES}, tokenize=False)
classifier = pipeline("text-classification", repository, function_to_apply="none")
score = classifier(text, add_special_tokens=False)[0]["score"]
{REWARD}"""),
    "revisions": ("A model's answers, a critique of each by one virtue, and the revised answers.", "supervised fine-tuning",
                  """from datasets import load_dataset
data = load_dataset(repository, "revisions", split="train")
# TRL's SFTTrainer takes these: the prompt as it is, the revision as its completion
rows = data.map(lambda r: {"completion": [{"role": "assistant", "content": r["revision"]}]}).select_columns(["prompt", "completion"])"""),
    "preferences": ("Pairs of dialogues with a model's judgement of them by five virtues, for three lenses: action, motivation, consequence.",
                    "training of reward models, or of a policy on preferences",
                    'from datasets import load_dataset\ndata = load_dataset(repository, "action", split="train")'),
}
DATA = {"revisions": ("revisions",), "preferences": (*LENSES, "dialogues")}
LIMITS = f"""The feedback came from a model, not from people, and what that model misjudges is in here. It judged by {", ".join(VIRTUES)}: one
reading of virtue ethics among many. This is no moral advice and no safety filter."""
TOY = " It belongs to a toy world, everyday situations in a small fixed grammar, and says nothing about large models."


def public(value):
    """A value of a JSON file without what it tells of a machine: of an absolute path the last part."""
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
        raise VirtueError(f"{path}: cannot be read ({e}): run again the stage that writes it") from None


def flat_adapter(folders: Sequence[Path]) -> tuple[dict[str, torch.Tensor], dict]:
    """State and config of the one adapter that equals the sum of the artefacts: `lora.flatten` on files, so that no base is loaded.

    A stacked along the rank, B scaled and side by side; zeros stand for an adapter that a layer lacks. The last one's head stays.
    VirtueError: an adapter_config.json that cannot be read.
    """
    parts = [(load_file(folder / WEIGHTS), _read(folder / CONFIG)) for folder in folders]
    state = {key: value for key, value in parts[-1][0].items() if ".lora_" not in key}
    for layer in sorted({key.rpartition(".lora_")[0] for tensors, _ in parts for key in tensors if ".lora_" in key}):
        a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        width, height = next((t[a].shape[1], t[b].shape[0]) for t, _ in parts if a in t)
        state[a] = torch.cat([t.get(a, torch.zeros(c["r"], width)) for t, c in parts])
        state[b] = torch.cat([t.get(b, torch.zeros(height, c["r"])) * (c["lora_alpha"] / c["r"]) for t, c in parts], dim=1)
    rank = sum(c["r"] for _, c in parts)
    return state, {**parts[-1][1], "r": rank, "lora_alpha": rank, "target_modules": sorted({t for _, c in parts for t in c["target_modules"]})}


def contents(folder: Path, sft: Path | None = None) -> tuple[str, dict, dict[str, bytes | Path]]:
    """(kind, manifest, what goes up beside the card: bytes or a file, by name). VirtueError: a folder that cannot be published."""
    merged = (folder / "config.json").is_file()
    manifest = read_manifest(folder.resolve().parent if merged else folder)
    kind, shown = "merged" if merged else manifest["stage"], public(manifest)
    if kind not in STAGES or merged and manifest["stage"] != "rm":
        raise VirtueError(f"{folder}: a folder of stage {kind!r}, of no use to others: give one of {', '.join(STAGES)}")
    if kind in DATA:
        files = {name: folder / name for name in (*(f"{part}.jsonl" for part in DATA[kind]), "summary.json")}
    elif merged:
        files = {path.name: path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".jinja", ".safetensors")}
    else:
        upon = manifest["parents"].get("sft")
        below = {sft or Path(upon["folder"]): upon["sha256"]} if upon else {}
        for path, known in {**below, folder: manifest["sha256"]}.items():
            if file_hash(path) != known:
                raise VirtueError(f"{path}: not the weights that {folder} records: give the SFT adapter by --sft, or run again the stage that writes {folder}")
        state, config = flat_adapter([*below, folder])
        weights = save(state, metadata={"format": "pt"}) if below else (folder / WEIGHTS).read_bytes()
        files = {WEIGHTS: weights, CONFIG: _bytes(public(config))}
        if below:  # an artefact that stands upon nothing
            shown |= {"parents": {}, "settings": {**shown["settings"], "sft": None}, "sha256": hashlib.sha256(weights).hexdigest(),
                      "extra": {**shown["extra"], "flat": {"sft": upon["sha256"], kind: manifest["sha256"]}}}
    for path in files.values():
        if isinstance(path, Path):
            sha256_file(path)  # one that is missing is refused before anything goes up
    return kind, manifest, {**files, MANIFEST: _bytes(shown)}


def _table(names: Sequence[str], rows: Mapping[str, Sequence]) -> list[str]:
    cells = [[title, *("-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row)] for title, row in rows.items()]
    return ["", *(f"| {' | '.join(row)} |" for row in (["", *names], ["---"] * (len(names) + 1), *cells))]


def results(folder: Path, kind: str, manifest: dict, report: Path | None) -> list[str]:
    """Lines of Markdown: what was measured, with the intervals that the files have. VirtueError: a report of another stage, or on other weights."""
    extra = manifest["extra"]
    if report and kind not in ("sft", "policy"):
        raise VirtueError(f"--report {report}: only an SFT adapter or a policy has one, {folder} is of stage {kind!r}: leave it out")
    if kind in DATA:
        summary = _read(folder / "summary.json")
        lines = [", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in summary.items() if not isinstance(value, dict))]
        parts = {name: value for name, value in summary.items() if isinstance(value, dict)}
        return lines + (_table([*parts], {key.replace("_", " "): [part.get(key) for part in parts.values()] for key in next(iter(parts.values()))}) if parts else [])
    if kind in ("rm", "merged"):
        found, n, interval = extra["held_out"], extra.get("held_out_pairs", 0), " [{:.3f}, {:.3f}]".format
        accuracy = interval(*wilson(round(found["accuracy"] * n * 2) / 2, n)[1:]) if n else ""
        loss = interval(found["log_loss_low"], found["log_loss_high"]) if "log_loss_low" in found else ""
        whose = f"the choices in {public(manifest['settings']['pairs'])}" if manifest["settings"].get("pairs") else "the judge"
        lines = [f"On {n or 'the'} pairs held out from training, against {whose}: accuracy {found['accuracy']:.3f}{accuracy}, log-loss {found['log_loss']:.3f}{loss}, "
                 f"calibration error {found['calibration_error']:.3f}{'; in brackets 95 %' * bool(accuracy or loss)}."]
    else:
        lines = [f"Held-out loss {extra['held_out_loss_before']:.3f} before and {extra['held_out_loss']:.3f} after{', nats a token' * (kind == 'sft')}."] if "held_out_loss" in extra else []
    if report is None:
        return lines or ["Not measured: published without a report."]
    if read_manifest(report, "eval")["parents"].get(kind, {}).get("sha256") != manifest["sha256"]:
        raise VirtueError(f"{report}: a report on other weights than those in {folder}: give the folder that run_eval.py models wrote on these")
    scores = _read(report / "scores.json")
    names = [name for name in scores["models"] if kind == "policy" or name != "ppo"]
    lines += ["", f"{scores['prompts']} held-out prompts, seed {scores['seed']}. Interval: {scores['interval']}."]
    lines += _table(names, {title.strip(): [scores["models"][n][key] for n in names] for key, title in ROWS.items() if key in scores["models"]["base"]})
    pairs = {pair: rows for pair, rows in scores["differences"].items() if kind == "policy" or pair == "sft - base"}
    lines += _table([*pairs], {key: [f"{rows[key]['difference']:+.3f} [{rows[key]['low']:+.3f}, {rows[key]['high']:+.3f}]" if key in rows else None
                                     for rows in pairs.values()] for key in next(iter(pairs.values()))})
    if kind == "policy":
        lines += [""]
        for pair, lenses in scores["wins"].items():
            lines += [f"- the judge, {pair}: {lens} preferred on {w['rate']:.0%} [{w['low']:.0%}, {w['high']:.0%}] of {w['pairs']}" for lens, w in lenses.items() if w]
        lines += [f"- **warning**: {text}" for text in scores["warnings"]]
    return lines


def card(name: str, kind: str, manifest: dict, measured: Sequence[str], licence: str | None) -> str:
    """README.md of the repository: the hub's metadata, then text. `manifest` as from `public`, `measured` as from `results`."""
    what, use, load = STAGES[kind]
    base, extra, toy = manifest["base"]["id"], manifest["extra"], manifest["base"]["id"] == "toy"
    on_hub = re.fullmatch(REPOSITORY, base) and not Path(base).is_dir()
    licence = licence or ("mit" if toy else "other")
    head = {"license": licence, "tags": ["virtue-ethics", "rlaif", *(["lora"] if kind in ("sft", "policy", "rm") else [])]}
    if kind in DATA:
        head |= {"configs": [{"config_name": part, "data_files": f"{part}.jsonl"} for part in DATA[kind]]}
    else:
        head |= {"library_name": "transformers" if kind == "merged" else "peft", **({"base_model": base} if on_hub else {}),
                 "pipeline_tag": "text-generation" if kind in ("sft", "policy") else "text-classification"}
    where = 'str(resolve("toy"))' if toy else json.dumps(base if on_hub else f"path/to/{base}")
    code = f"repository = {json.dumps(name)}\n"
    if "(base" in load:
        code = ("from virtue.models import resolve\n" if toy else "") + f"base = {where}\n{code}"
    if kind in ("rm", "merged"):
        what, load = what.format(**extra), load.replace(REWARD, REWARD.format(**extra))
    terms = {"mit": "MIT.", "other": "The code is MIT. The terms of the base model and of the prompts apply to what was made with them."}.get(licence, f"{licence}.")
    return "\n".join([
        "---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", "", f"# {name.rpartition('/')[2]}", "", what, "",
        "## Base and data", "", f"- base model: {base}, fingerprint {manifest['base']['fingerprint'][:16]}, "
        f"weights {manifest['settings'].get('quantize', 'none').replace('none', 'not quantised')}, {manifest['settings'].get('dtype')}",
        f"- prompts: {manifest['settings'].get('prompts')}; seed {manifest['seed']}" + (f"; trained on {extra['trained_on']} records" if "trained_on" in extra else ""),
        *([f"- judge: {extra['judge']['id']}, fingerprint {extra['judge']['fingerprint'][:16]}"] if "judge" in extra else []),
        *(f"- **warning**: {text}" for text in doubts(extra)),
        *(f"- made upon {role}: {parent['sha256'][:16]}" for role, parent in manifest["parents"].items()), "",
        "## Results", "", *measured, "", "## How to load it", "", "```python", f"{code}{load}", "```", "",
        "## Intended use and limits", "", f"Meant for {use}.", "", LIMITS + TOY * toy, "", "## Flags", "",
        "```json", json.dumps(manifest["settings"], indent=1), json.dumps(manifest["versions"]), "```", "", "## Licence", "", terms, "",
        "After H. Li, *Virtue Ethics Guidance of LLMs with RLAIF and Ensemble of Reward Models*, EPFL DHLAB, 2024.", ""])


def upload(name: str, files: Mapping[str, bytes | Path], repo_type: str, private: bool) -> str:
    """Puts the files into the repository in one commit, and makes it where there is none; returns its address.
    VirtueError: the hub refuses, or is out of reach."""
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        url = api.create_repo(name, repo_type=repo_type, private=private, exist_ok=True)
        operations = [huggingface_hub.CommitOperationAdd(path, data if isinstance(data, bytes) else str(data)) for path, data in files.items()]
        api.create_commit(name, operations, commit_message="Upload by virtue", repo_type=repo_type)
    except Exception as error:  # network, rights, spelling: the hub has an exception for each
        raise VirtueError(f"{name}: the hub did not take it ({' '.join(str(error).split())[:200]}): check the name, the network, and `hf auth login`") from error
    return str(url)


def main(argv=None):
    """Makes the card; writes (--out), previews (--dry-run) or uploads the files. VirtueError: as `contents` and `upload`, an --out that is not empty."""
    parser = make_parser(__doc__)
    parser.prog = "python -m virtue.plumbing.hub"
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="adapter, merged model or data")
    parser.add_argument("--name", "--push-to-hub", dest="name", help="the repository, owner/name; not needed with --out")
    parser.add_argument("--out", type=Path, help="write the files into this new folder and upload nothing: PEFT's form of an adapter, SFT folded in")
    parser.add_argument("--report", type=Path, help="of an SFT adapter or a policy: folder of run_eval.py models on it; its numbers go into the card")
    parser.add_argument("--sft", type=Path, help="the SFT adapter below it, for a folder that was moved")
    parser.add_argument("--license", help="the hub's name of a licence (default: mit on toy, else other)")
    parser.add_argument("--public", action="store_true", help="a new repository is open to all; otherwise it is private")
    parser.add_argument("--dry-run", action="store_true", help="print the card and the names of the files; no network")
    args = parser.parse_args(argv)
    if args.name is None and args.out is None:
        raise VirtueError("neither --name nor --out: give --name owner/name, or --out FOLDER, which uploads nothing")
    if args.name and not re.fullmatch(REPOSITORY, args.name):
        raise VirtueError(f"--name {args.name}: no name of a repository: give owner/name")
    name = args.name or args.out.resolve().name  # for the card: a folder loads as a repository does
    kind, manifest, files = contents(args.folder, args.sft)
    text = card(name, kind, public(manifest), results(args.folder, kind, manifest, args.report), args.license)
    files["README.md"] = text.encode()
    if args.out and not args.dry_run:
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise VirtueError(f"{args.out}: exists and is not an empty folder: give another --out, or empty it")
        for path, data in files.items():
            (args.out / path).parent.mkdir(parents=True, exist_ok=True)
            (args.out / path).write_bytes(data) if isinstance(data, bytes) else shutil.copyfile(data, args.out / path)
        print(f"wrote {len(files)} files to {args.out}")
    elif args.dry_run:
        where = f"write to {args.out}" if args.out else f"upload to {args.name}, {'public' if args.public else 'private'}"
        print(f"{text}\nwould {where}: {', '.join(sorted(files))}")
    else:
        print(f"wrote {len(files)} files to {upload(args.name, files, 'dataset' if kind in DATA else 'model', not args.public)}")


if __name__ == "__main__":
    run_main(main)
