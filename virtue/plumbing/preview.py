"""What a run would do, before anything is loaded: the memory plan and the checks of --dry-run."""
from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from virtue import printable
from virtue.ethics import LENSES
from virtue.generate import check_context
from virtue.plumbing import artefacts, loading, memory
from virtue.plumbing.resume import settings_of

FILES = ("config.json", "tokenizer.json", "model*.safetensors")


def preview(args: argparse.Namespace, reads: Mapping[str, object], writes: str, *,
            trained: Sequence[str] = (), flat: Sequence[Sequence[str]] = (),
            **moments: dict | None) -> bool:
    """Before anything is loaded: prints the memory plan, unless the base is the toy. With --dry-run
    also checks the inputs as the run would, all but their tensors, prints settings and files, and
    is True: the caller ends here.

    `reads`: what the caller read of each input; `writes`: the files to come, or "". Adapters by
    role: those of --sft, --rm, --eval-rm and --policy, those `trained`, and the `flat` ones, each
    made of some roles. `moments`: see ``memory.plan``. VirtueError: as in a run.
    """
    if args.model == "toy" and not args.dry_run:
        return False
    if getattr(args, "constitution", None):
        words = loading.words_of(args.model, args.constitution)
        reads = {**reads, "constitution": f"{args.constitution}, {', '.join(words.virtues)}"}
    names = {"base": args.model, "judge": getattr(args, "judge", None)}
    folders = {role: loading.resolve(name, download=not args.dry_run)
               for role, name in names.items() if name}
    configs = {role: loading.read_config(folder) for role, folder in folders.items() if folder}
    lacking = {role: [file for file in FILES if not (folder and any(folder.glob(file)))]
               for role, folder in folders.items()}
    if moments.get("sampling") and "base" in configs:
        check_context(SimpleNamespace(config=configs["base"]), args.max_prompt_tokens,
                      args.max_new_tokens)
    adapters, reads = _read_artefacts(args, folders["base"], lacking["base"], dict(reads))
    if args.dry_run:
        for role, folder in folders.items():
            where = "" if str(folder) == names[role] else f", {folder or 'on the hub'}"
            more = f"; a run needs {', '.join(lacking[role])} as well" if lacking[role] else ""
            reads[role] = names[role] + where + more
        _print_settings(args, reads, writes)
    if unknown := [names[role] for role in folders if role not in configs]:
        print(f"memory plan: needs the config.json of {' and of '.join(unknown)}, which is not on "
              "this machine")
        return True
    _print_plan(args, configs["base"], configs.get("judge"), adapters, trained, flat, moments)
    return args.dry_run


def _read_artefacts(args: argparse.Namespace, folder: Path | None, lacking: Sequence[str],
                    reads: dict) -> tuple[dict[str, memory.Adapter], dict]:
    """Checks the artefacts that the flags name -> their adapters by role, and `reads` with them."""
    expected, adapters = {}, {}
    if args.dry_run and "tokenizer.json" not in lacking:
        expected["template"] = loading.template_fingerprint(loading.load_tokenizer(folder))
    if args.dry_run and "model*.safetensors" not in lacking:
        expected["base"] = {"id": args.model, "fingerprint": loading.base_fingerprint(folder)}

    def read(role: str, folder: Path, **of_role) -> None:
        manifest, config = artefacts.check_artifact(folder, **expected, **of_role)
        whole = manifest["settings"].get("rank") == "whole" or manifest["settings"].get("whole")
        rank = None if whole else config["r"]
        adapters[role] = rank, tuple({name.rpartition(".")[2] for name in config["target_modules"]})
        reads[role] = f"{folder}, {'whole matrices' if whole else f'an adapter of rank {rank}'}"

    sft, rm, eval_rm, policy, data = (getattr(args, name, None) for name in (
        "sft", "rm", "eval_rm", "policy", "data"))
    upon = {"sft": sft} if sft else {}
    if sft:
        read("sft", sft, stage="sft")
    for prefix, reward_models in (("", rm), ("eval-", eval_rm)):
        for lens in LENSES if reward_models else ():
            read(prefix + lens, reward_models / lens, stage="rm", lens=lens, parents=upon)
    if policy:
        parents = artefacts.read_manifest(policy, "policy")["parents"]
        of_rm = {f"rm/{lens}": rm / lens for lens in LENSES if f"rm/{lens}" in parents}
        read("policy", policy, stage="policy", parents=upon | of_rm)
    if data and artefacts.read_manifest(data)["stage"] == "preferences":
        artefacts.check_made_by(data, expected.get("base"), expected.get("template"), sft)
    return adapters, reads


def _print_settings(args: argparse.Namespace, reads: Mapping[str, object], writes: str) -> None:
    flags = []
    for name, value in settings_of(args).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, list | tuple):
            value = " ".join(map(str, value))
        if value is not None and value is not False:
            flags.append(flag if value is True else printable(f"{flag} {value}"))
    print("settings:", *flags)
    for name, what in reads.items():
        print(printable(f"reads {name}: {what}"))
    if writes:
        print(f"writes {args.out}: {writes}")


def _print_plan(args: argparse.Namespace, config, judge, adapters: dict[str, memory.Adapter],
                trained: Iterable[str], flat: Iterable[Iterable[str]], moments: dict) -> None:
    frozen, learned = [*adapters.values()], []
    if trained:
        memory.check_targets(config, args.targets)
        rank = None if args.rank == "whole" else args.rank
        learned = [(rank, args.targets)] * len(trained)
        adapters = adapters | dict.fromkeys(trained, learned[0])
    for roles in flat:
        stack = [adapters[role] for role in roles if role in adapters]
        if stack:
            ranks, targets = zip(*stack)
            rank = None if None in ranks else sum(ranks)
            frozen.append((rank, tuple({name for names in targets for name in names})))
    print(memory.table(memory.plan(
        config, quantize=args.quantize, dtype=args.dtype, frozen=frozen, trained=learned,
        judge=memory.base_bytes(judge, args.quantize, args.dtype) if judge else 0,
        checkpointing=bool(trained) and args.gradient_checkpointing, **moments)))
