"""Artefacts on disk: safetensors and JSON only, written whole or not at all, refused on mismatch.

An artefact is a folder with ``adapter_model.safetensors`` and ``adapter_config.json`` in PEFT's
format (a scalar head under the name ``score``) and ``virtue.json``, which is written last and says
what the adapter belongs to: without it the folder is no artefact.
"""
from __future__ import annotations

import hashlib
import json
import os
import platform
import reprlib
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from virtue import VirtueError
from virtue.ethics import LENSES
from virtue.plumbing.records import SITUATIONS, is_number
from virtue.lora import adapter_config, adapter_state, load_adapter_state
from virtue.models import DTYPES, ScalarHead
from virtue.plumbing.loading import QUANTIZE, is_sound
from virtue.plumbing.runtime import main_rank

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "virtue.json"
PACKAGES = ("torch", "transformers", "bitsandbytes", "safetensors", "numpy")
_SCORE = "base_model.model.score."
_UNLIKE = "r, lora_alpha or target_modules is not what the weights have"
AGAIN = "run again the stage that writes this folder"


def write_atomic(path: str | Path, data: bytes | Callable[[Path], None]) -> None:
    """Writes `data` under a temporary name, to the disk, and renames: never half a file. Under
    torchrun only rank 0 writes. Data that would fill the memory as bytes can be given as a
    function, which is called with a path and writes that file, as safetensors does. VirtueError:
    the disk is full, or the folder cannot be written."""
    if not main_rank():
        return
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        if callable(data):
            data(temporary)
        with open(temporary, "ab" if callable(data) else "wb") as file:
            file.write(b"" if callable(data) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name too, should the machine itself go down
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as e:
        temporary.unlink(missing_ok=True)
        reason = getattr(e, "strerror", None) or e
        raise VirtueError(f"{path}: cannot be written ({reason}): make room, or choose another "
                          "folder") from None


def _json(value: object, indent: int | None = None) -> str:
    """JSON with tensors and arrays as lists, paths as text; ValueError for nan and infinity."""
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False,
                      default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v)) + "\n"


def write_json(path: str | Path, value: object) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_atomic(path, _json(value, indent=2).encode(errors="backslashreplace"))


def write_jsonl(path: str | Path, records: Iterable[Mapping]) -> None:
    """Writes one JSON object a line, atomically."""
    write_atomic(path, "".join(map(_json, records)).encode(errors="backslashreplace"))


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes. VirtueError: it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise VirtueError(f"{path}: cannot be read ({e.strerror}): {AGAIN}") from None


def file_hash(folder: str | Path) -> str:
    """Hex sha256 of an artefact's weights, by which later artefacts identify it. VirtueError: the
    file is not there."""
    return sha256_file(Path(folder) / WEIGHTS)


def prompts_hash(name: str) -> str | None:
    """Hex sha256 of a file of prompts; None for the toy's, which are code."""
    return None if name == "toy" else sha256_file(SITUATIONS if name == "situations" else name)


def data_hash(folder: Path, names: Iterable[str]) -> str:
    """Hex sha256 over the named files of a folder of data, in that order."""
    hashes = "".join(sha256_file(folder / name) for name in names)
    return hashlib.sha256(hashes.encode()).hexdigest()


def check_unedited(folder: Path, manifest: Mapping) -> None:
    """VirtueError where the files of a folder of data are not those that its manifest records."""
    stage = manifest["stage"]
    of_stage = (*LENSES, "dialogues") if stage == "preferences" else (stage,)
    names = [f"{name}.jsonl" for name in of_stage]
    if data_hash(folder, names) != manifest["sha256"]:
        raise VirtueError(f"{folder}: {', '.join(names)}: changed since run_data.py {stage} wrote "
                          "them: run it again, or give edited pairs to run_rm.py by --pairs FILE")


def check_made_by(folder: Path, base: Mapping[str, str] | None, template: str | None,
                  sft: Path | None) -> dict:
    """A preference folder's manifest; VirtueError where its files were edited, or
    its dialogues came from another base, template (None: not compared) or SFT."""
    manifest = read_manifest(folder, "preferences")
    check_unedited(folder, manifest)
    same_base = not base or manifest["base"].get("fingerprint") == base["fingerprint"]
    if not same_base or template and manifest["template"] != template:
        raise VirtueError(f"{folder}: sampled by another base or tokenizer, "
                          f"{manifest['base'].get('id')}: give that --model")
    recorded = manifest["parents"].get("sft", {})
    if recorded.get("sha256") != (file_hash(sft) if sft else None):
        raise VirtueError(f"{folder}: sampled upon {recorded.get('folder', 'the bare base')}, not "
                          f"upon {sft or 'the bare base'} as it is now: give that --sft, or run "
                          "run_data.py preferences again")
    return manifest


def check_output(folder: str | Path, overwrite: bool, inputs: Iterable[Path | None] = ()) -> Path:
    """Refuses a folder that is not empty (unless `overwrite`) or that is one of the `inputs`;
    changes nothing.

    A stage calls it at its beginning, before hours of work; `prepare_output` is for its first
    write. VirtueError: such a folder, or one that cannot be read.
    """
    folder = Path(folder)
    try:
        if not overwrite and folder.exists() and any(folder.iterdir()):
            raise VirtueError(f"{folder}: not empty: choose another --out, or give --overwrite")
    except OSError as e:
        raise VirtueError(f"{folder}: cannot be a folder to write in ({e.strerror}): choose "
                          "another --out") from None
    if any(path is not None and path.resolve() == folder.resolve() for path in inputs):
        raise VirtueError(f"{folder}: an input of this stage, which would be lost: choose another "
                          "--out")
    return folder


def prepare_output(folder: str | Path, overwrite: bool) -> Path:
    """Makes the folder, after `check_output`; an old virtue.json goes first.

    Without it, a folder that is only half overwritten cannot pass for an artefact. VirtueError: as
    `check_output`; or the folder cannot be made.
    """
    folder = check_output(folder, overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
    except OSError as e:
        raise VirtueError(f"{folder}: cannot be a folder to write in ({e.strerror}): choose "
                          "another --out") from None
    return folder


def save_artifact(folder: str | Path, *, stage: str, model: nn.Module, adapter: str,
                  head: nn.Module | None = None, base: Mapping[str, str], template: str,
                  parents: Mapping[str, str | Path], settings: Mapping, seed: int,
                  extra: Mapping | None = None) -> None:
    """Saves `adapter` of `model`, and the scalar `head`, with everything that must match when they
    are loaded.

    `base` is {"id", "fingerprint"}, `template` a fingerprint (see models.py); `parents` maps roles
    to the artefact folders it was trained upon, e.g. {"sft": "runs/sft"}; `extra` is the stage's
    own: lens, score mean and std, ... KeyError: no such adapter. VirtueError: a parent is missing,
    before anything is touched; the disk is full, which leaves no virtue.json.
    """
    for parent in parents.values():
        file_hash(parent)  # refuses one that is missing before anything is touched
    if not main_rank():
        return
    folder, state = Path(folder), adapter_state(model, adapter)
    config = adapter_config(model, adapter, base["id"], ["score"] if head is not None else None)
    if head is not None:
        config["task_type"] = "SEQ_CLS"  # PEFT then opens it as a ...ForSequenceClassification
        state |= {_SCORE + name: t.cpu().clone() for name, t in head.state_dict().items()}
    (folder / MANIFEST).unlink(missing_ok=True)  # no artefact while its files change
    write_atomic(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
    write_json(folder / CONFIG, config)
    write_manifest(folder, stage=stage, base=base, template=template, parents=parents,
                   settings=settings, seed=seed, extra=extra, sha256=file_hash(folder))


def write_manifest(folder: Path, *, stage: str, base: Mapping[str, str], template: str,
                   parents: Mapping[str, str | Path], settings: Mapping, seed: int,
                   extra: Mapping | None = None, sha256: str | None = None) -> None:
    """Writes virtue.json, of an adapter (see `save_artifact`) or of a folder of data."""
    if not main_rank():
        return
    write_json(folder / MANIFEST, {
        "stage": stage, "base": dict(base), "template": template,
        "parents": {role: {"folder": str(parent), "sha256": file_hash(parent)}
                    for role, parent in parents.items()},
        "seed": seed, "settings": dict(settings), "extra": dict(extra or {}),
        "versions": {"python": platform.python_version(), **dict(sorted(
            (d.name, d.version) for d in metadata.distributions() if d.name in PACKAGES))},
        "sha256": sha256,
    })


def _read_json(path: Path, fields: Iterable[str]) -> dict:
    try:
        value = json.loads(path.read_bytes())
        if isinstance(value, dict) and all(name in value for name in fields):
            return value
        problem = f"not an object with {', '.join(fields)}"
    except OSError as e:
        problem = f"cannot be read ({e.strerror})"
    except (ValueError, RecursionError):
        problem = "not JSON"
    raise VirtueError(f"{path}: {problem}: {AGAIN}")


# What later stages take from an artefact's settings, and what it may be.
_SETTINGS = {
    **dict.fromkeys(("model", "prompts", "system", "constitution", "sft", "rm"),
                    lambda v: isinstance(v, str)),
    **dict.fromkeys(("max_prompt_tokens", "max_new_tokens"), lambda v: type(v) is int and v >= 1),
    "quantize": QUANTIZE.__contains__, "dtype": [*DTYPES].__contains__,
    "temperature": lambda v: is_number(v) and v > 0, "seed": lambda v: type(v) is int,
    "held_out": lambda v: is_number(v) and 0 <= v <= 1,
}
_KINDS = {"stage": str, "base": dict, "template": str, "parents": dict, "seed": int,
          "settings": dict, "extra": dict, "sha256": str | None}


def _odd_field(manifest: Mapping) -> str | None:
    """The first field of a manifest that has a type or value that no stage writes."""
    if odd := [name for name, kind in _KINDS.items() if not isinstance(manifest[name], kind)]:
        return odd[0]
    if not all(isinstance(value, str) for value in manifest["base"].values()):
        return "base"
    for parent in manifest["parents"].values():
        if not (isinstance(parent, dict) and isinstance(parent.get("folder"), str)
                and isinstance(parent.get("sha256"), str)):
            return "parents"
    for name, check in _SETTINGS.items():
        value = manifest["settings"].get(name)
        if value is not None and not check(value):
            return f"settings, {name}"
    mean, std = (manifest["extra"].get(name) for name in ("score_mean", "score_std"))
    if manifest["stage"] == "rm" and not (is_number(mean) and is_number(std) and std >= 0):
        return "extra, score_mean and score_std"
    return None


def read_manifest(folder: str | Path, stage: str | None = None, lens: str | None = None) -> dict:
    """An artefact's virtue.json. VirtueError: no artefact, another stage, another lens."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        below = sorted(reprlib.repr(file.parent.name) for file in path.parent.glob(f"*/{MANIFEST}"))
        remedy = f"give one of those in it, {', '.join(below[:9])}"
        if not below:
            remedy = "check the path, or run the stage that writes it to its end"
            if (path.parent / CONFIG).is_file():
                remedy += "; how to load an adapter that PEFT trained, docs/libraries.md says"
        raise VirtueError(f"{folder}: no artefact here (it has no {MANIFEST}): {remedy}")
    manifest = _read_json(path, _KINDS)
    if odd := _odd_field(manifest):
        raise VirtueError(f"{path}: {odd}: no value that a stage writes: {AGAIN}")
    for name, expected, is_of in (("stage", stage, manifest["stage"]),
                                  ("lens", lens, manifest["extra"].get("lens"))):
        if expected is not None and is_of != expected:
            raise VirtueError(f"{folder}: of {name} {reprlib.repr(is_of)}: give the folder of "
                              f"{name} {expected!r}")
    return manifest


def check_artifact(folder: str | Path, *, stage: str, base: Mapping[str, str] | None = None,
                   template: str | None = None, lens: str | None = None,
                   parents: Mapping[str, str | Path] | None = None) -> tuple[dict, dict]:
    """The manifest and adapter_config.json of an artefact, with the errors of `load_artifact` that
    need no model.

    ``base``, ``template`` and ``parents`` are not compared where None.
    """
    folder, manifest = Path(folder), read_manifest(folder, stage, lens)
    recorded = {role: parent["sha256"] for role, parent in manifest["parents"].items()}
    if base is not None and manifest["base"].get("fingerprint") != base["fingerprint"]:
        raise VirtueError(f"{folder}: made for another base, {manifest['base'].get('id')}, whose "
                          f"files differ from those of {base['id']}: give the --model it was made "
                          "with")
    if template is not None and manifest["template"] != template:
        raise VirtueError(f"{folder}: made with another tokenizer or chat template than that of "
                          f"{base['id'] if base else 'the base'}: restore the template, or train "
                          "again")
    if parents is not None and recorded != {r: file_hash(p) for r, p in parents.items()}:
        was = ", ".join(p["folder"] for p in manifest["parents"].values()) or "the bare base"
        raise VirtueError(f"{folder}: was trained upon {was} as it was then, not upon what is "
                          "given now: give that, or train again")
    if file_hash(folder) != manifest["sha256"]:
        raise VirtueError(f"{folder / WEIGHTS}: changed since it was saved: {AGAIN}")
    config = _read_json(folder / CONFIG, ("r", "lora_alpha", "target_modules", "modules_to_save"))
    rank, targets = config["r"], config["target_modules"]
    if not (type(rank) is int and rank >= 1 and is_number(config["lora_alpha"])
            and isinstance(targets, list) and all(isinstance(name, str) for name in targets)):
        raise VirtueError(f"{folder / CONFIG}: {_UNLIKE}: {AGAIN}")
    return manifest, config


def load_artifact(folder: str | Path, model: nn.Module, adapter_name: str, *, stage: str,
                  base: Mapping[str, str], template: str, lens: str | None = None,
                  parents: Mapping[str, str | Path] | None = None,
                  ) -> tuple[dict, nn.Module | None]:
    """Puts an artefact's adapter on `model` as `adapter_name` (see `lora.load_adapter_state`).

    `base` and `template` are those in use, as in `save_artifact`; `parents`, if given, the very
    artefacts it was trained upon. Returns the manifest, and the scalar head or None. VirtueError:
    made for another base, template or parent; changed or damaged since, its head lost; of other
    rank, targets or shapes than the model's adapter. The model is then left as it was.
    """
    folder = Path(folder)
    manifest, config = check_artifact(folder, stage=stage, base=base, template=template, lens=lens,
                                      parents=parents)
    try:
        state, head = load_file(folder / WEIGHTS), None
        if odd := [k for k, t in state.items() if not is_sound(t)]:
            raise RuntimeError(f"{odd[0]} is no floating-point tensor, or holds NaN or infinity")
        if (config["r"],) not in {t.shape[:1] for t in state.values()}:
            raise VirtueError(f"{folder / CONFIG}: {_UNLIKE}: {AGAIN}")
        score = {k.removeprefix(_SCORE): state.pop(k) for k in [*state] if k.startswith(_SCORE)}
        if score or config["modules_to_save"]:
            head = ScalarHead(model.config.hidden_size, bias="bias" in score)
            head.load_state_dict(score)  # a head that is missing or misshapen: RuntimeError
            head.to(next(model.parameters()).device)
    except (SafetensorError, RuntimeError) as e:
        what = str(e).splitlines()[-1].strip()[:300]
        raise VirtueError(f"{folder / WEIGHTS}: damaged, or without its scalar head ({what}): "
                          f"{AGAIN}") from None
    try:
        load_adapter_state(model, adapter_name, state, config)
    except VirtueError as e:
        raise VirtueError(f"{folder}: {str(e)[:500]}: {AGAIN}") from None
    return manifest, head


def load_sft(folder: Path | None, model, **known) -> tuple[tuple[str, ...], dict[str, Path]]:
    """Puts the SFT adapter on the model, if there is one -> (its stack, the parents that artefacts
    upon it record). VirtueError: as ``load_artifact``."""
    if folder is None:
        return (), {}
    load_artifact(folder, model, "sft", stage="sft", **known)
    return ("sft",), {"sft": folder}


def load_reward_models(
    folder: Path, model, sft: tuple[str, ...], parents: Mapping[str, Path], prefix: str = "",
    **known,
) -> tuple[list[tuple[tuple[str, ...], torch.nn.Module]], Tensor, Tensor]:
    """The reward models of run_rm.py, as (stack, head) in the order of LENSES, and their scores'
    mean and std.

    mean and std (K,) are those of the starting policy's dialogues. ``parents`` and ``known`` (base,
    template) must be what the models were trained upon: see ``artefacts.load_artifact``. ``prefix``
    keeps a second ensemble's adapters apart. VirtueError: one is missing or does not match.
    """
    reward_models, statistics = [], []
    for lens in LENSES:
        manifest, head = load_artifact(folder / lens, model, prefix + lens, stage="rm", lens=lens,
                                       parents=parents, **known)
        reward_models.append(((*sft, prefix + lens), head))
        statistics.append([manifest["extra"][key] for key in ("score_mean", "score_std")])
    mean, std = torch.tensor(statistics).T
    return reward_models, mean, std
