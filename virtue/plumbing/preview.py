"""What a run would do, before anything is loaded: the memory plan, and all that --dry-run checks.
"""
from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from virtue import printable


def preview(args: argparse.Namespace, found: Mapping[str, object], writes: str, *, trained: Sequence[str] = (), flat: Sequence[Sequence[str]] = (),
            **moments: dict | None) -> bool:
    """Before anything is loaded: prints the memory plan, unless the base is the toy. With --dry-run
    also checks the inputs as the run would, all but their tensors, prints settings and files, and
    is True: the caller ends here.

    `found`: what the caller read of each input; `writes`: the files to come, or "". Adapters by
    role: those of --sft, --rm, --eval-rm and --policy, those `trained`, and the `flat` ones, each
    made of some roles. `moments`: see ``memory.plan``. VirtueError: as in a run.
    """
    from types import SimpleNamespace
    from virtue.plumbing import memory
    from virtue.plumbing.artefacts import check_artifact, check_made_by, read_manifest
    from virtue.ethics import LENSES
    from virtue.generate import check_context
    from virtue.plumbing.loading import (base_fingerprint, load_tokenizer, read_config, resolve,
                                         template_fingerprint)
    from virtue.plumbing.resume import settings_of

    if args.model == "toy" and not args.dry_run:
        return False
    names = {"base": args.model, "judge": getattr(args, "judge", None)}
    folders = {role: resolve(name, download=not args.dry_run) for role, name in names.items() if name}
    configs = {role: read_config(folder) for role, folder in folders.items() if folder}
    lacking = {role: [file for file in ("config.json", "tokenizer.json", "model*.safetensors") if not (folder and any(folder.glob(file)))]
               for role, folder in folders.items()}
    known, found, adapters = {}, dict(found), {}
    if args.dry_run and "tokenizer.json" not in lacking["base"]:
        known["template"] = template_fingerprint(load_tokenizer(folders["base"]))
    if args.dry_run and "model*.safetensors" not in lacking["base"]:
        known["base"] = {"id": args.model, "fingerprint": base_fingerprint(folders["base"])}
    if moments.get("sampling") and "base" in configs:
        check_context(SimpleNamespace(config=configs["base"]), args.max_prompt_tokens, args.max_new_tokens)

    def artefact(role: str, folder: Path, **expected) -> None:
        manifest, config = check_artifact(folder, **known, **expected)
        rank = None if manifest["settings"].get("rank") == "whole" else config["r"]
        adapters[role] = rank, tuple({name.rpartition(".")[2] for name in config["target_modules"]})
        found[role] = f"{folder}, {'whole matrices' if rank is None else f'an adapter of rank {rank}'}"

    sft, policy = getattr(args, "sft", None), getattr(args, "policy", None)
    upon = {"sft": sft} if sft else {}
    if sft:
        artefact("sft", sft, stage="sft")
    for prefix, folder in (("", getattr(args, "rm", None)), ("eval-", getattr(args, "eval_rm", None))):
        for lens in LENSES if folder else ():
            artefact(prefix + lens, folder / lens, stage="rm", lens=lens, parents=upon)
    if policy:
        roles = read_manifest(policy, "policy")["parents"]
        artefact("policy", policy, stage="policy", parents=upon | {f"rm/{lens}": args.rm / lens for lens in LENSES if f"rm/{lens}" in roles})
    if getattr(args, "data", None) and read_manifest(args.data)["stage"] == "preferences":
        check_made_by(args.data, known.get("base"), known.get("template"), sft)

    if args.dry_run:
        said = {f"--{name.replace('_', '-')}": " ".join(map(str, value)) if isinstance(value, list | tuple) else value for name, value in settings_of(args).items()}
        print("settings:", *(flag if value is True else printable(f"{flag} {value}") for flag, value in said.items() if value is not None and value is not False))
        for role, folder in folders.items():
            where = folder or "on the hub"
            found[role] = names[role] + (f", {where}" if str(where) != names[role] else "") + (f"; a run needs {', '.join(lacking[role])} as well" if lacking[role] else "")
        print(*(printable(f"reads {name}: {what}") for name, what in found.items()), *([f"writes {args.out}: {writes}"] if writes else []), sep="\n")
    if unknown := [names[role] for role in folders if role not in configs]:
        print(f"memory plan: needs the config.json of {' and of '.join(unknown)}, which is not on this machine")
        return True
    config, judge, frozen = configs["base"], configs.get("judge"), list(adapters.values())
    if trained:
        memory.check_targets(config, args.targets)
        adapters |= {"whole": (None, args.targets), **dict.fromkeys(trained, (None if args.rank == "whole" else args.rank, args.targets))}
    for stack in ([adapters[role] for role in roles if role in adapters] for roles in flat):
        if stack:
            ranks = [rank for rank, _ in stack]
            frozen.append((None if None in ranks else sum(ranks), tuple({name for _, targets in stack for name in targets})))
    print(memory.table(memory.plan(config, quantize=args.quantize, dtype=args.dtype, frozen=frozen, trained=[adapters[role] for role in trained],
                                   judge=memory.base_bytes(judge, args.quantize, args.dtype) if judge else 0,
                                   checkpointing=bool(trained) and args.gradient_checkpointing, **moments)))
    return args.dry_run
