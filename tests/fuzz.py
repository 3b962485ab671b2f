"""Damaged and hostile input for every reader:
a value that can be used, or one VirtueError, and nothing else.

    python tests/fuzz.py --cases 10000 --seed 0     # 2 minutes on a core; each 50th runs a script
    python tests/fuzz.py --seed 0 --case 4711       # this case again, its folder kept

Each case copies a small valid input, damages one file of it (bytes, JSON nodes, tensors, the file
itself) and reads it. A reader must end within LIMIT seconds, with a value that stands the
assertions here or with a VirtueError that names the file and says what to do. Meanwhile an audit
hook watches for writes outside the case's folder, unpickling, sockets, sub-processes, questions,
and code of the input that runs.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

# a process with threads cannot be forked
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
sys.dont_write_bytecode = True  # else a first import is a write outside

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save  # noqa: E402

from tiny import make_tiny_model  # noqa: E402
from virtue import VirtueError, dialogue, models  # noqa: E402
from virtue import randomness  # noqa: E402
from virtue.plumbing import artefacts, loading, records, resume, runtime  # noqa: E402
from virtue.ethics import LENSES, VIRTUES  # noqa: E402
from virtue.lora import (  # noqa: E402
    active_stack,
    adapter_names,
    adapter_parameters,
    add_adapter,
    remove_adapter,
    use_stack,
)
from virtue.evaluation.report import curve_of  # noqa: E402
from virtue.plumbing.artefacts import load_reward_models  # noqa: E402

LIMIT = 20  # seconds a case
IDS = torch.tensor([[1, 7, 9, 30, 2]])
REMEDY = re.compile(r"\b(check|give|write|fetch|convert|correct|run|restore|train|take|choose|"
                    r"start|name|use|add|make|lower|remove|raise)\b")
# \r is allowed: it moves progress bars
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

# ---- valid inputs


def chat(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


class Kit:
    """A tiny base with its adapters, and under seeds/ a valid input of each kind."""

    def __init__(self, root: Path):
        self.root, self.seeds, self.cases = root, root / "seeds", root / "cases"
        self.seeds.mkdir(parents=True), self.cases.mkdir()
        for folder, shard in (("base", "50GB"), ("sharded", "100KB")):
            make_tiny_model(self.seeds / folder, max_shard_size=shard)
            evil = f"open({str(root / 'evil')!r}, 'w')\nclass Evil: pass\n"
            (self.seeds / folder / "evil.py").write_text(evil)
        self.model = loading.load_model(self.seeds / "base")
        self.tokenizer = loading.load_tokenizer(self.seeds / "base")
        self.known = dict(base={"id": str(self.seeds / "base"),
                                "fingerprint": loading.base_fingerprint(self.seeds / "base")},
                          template=loading.template_fingerprint(self.tokenizer))
        made = dict(**self.known, seed=0, settings={
            "model": str(self.seeds / "base"), "quantize": "none", "dtype": "fp32",
            "prompts": "toy", "max_prompt_tokens": 400,
            "max_new_tokens": 4, "temperature": 1.0, "seed": 0, "held_out": 0.3, "sft": None})
        # prompts, revisions, preferences, dialogues, pairs of each kind
        prompts = [dialogue.prompt_record(chat(f"What should I do about the letter {i}?"))
                   for i in range(16)]
        talk = "\n\nHuman: Why {0}?\n\nAssistant: Yes.\n\nHuman: Now {0}?\n\nAssistant: "
        hh = [{"chosen": talk.format(i) + "No.", "rejected": talk.format(i) + "Go."}
              for i in range(6)]
        self.put("text/prompts.jsonl", [{"prompt": p["prompt"][0]["content"]} for p in prompts])
        self.put("text/messages.jsonl.gz",
                 [{"prompt": chat("One?", "Two.", f"Three {i}?")} for i in range(16)])
        self.put("text/hh.jsonl.gz", hh)
        self.put("text/pairs.jsonl",
                 [*hh, *({"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(4)),
                  {"prompt": chat("q"), "chosen": chat("q", "a")[1:],
                   "rejected": chat("q", "b")[1:], "lens": "motivation"}])
        self.put("revisions/revisions.jsonl",
                 [{**p, "initial": "a", "critique": "", "revision": "I give it back.",
                   "virtue": VIRTUES[i % 5], "truncated": False} for i, p in enumerate(prompts)])
        for k, lens in enumerate(LENSES):
            tail = [text for question in dialogue.QUESTIONS[:k]
                    for text in (question, "It is honest.")]
            self.put(f"preferences/{lens}.jsonl", [
                {"id": p["id"], "lens": lens, **{side: chat(p["prompt"][0]["content"], side, *tail)
                                                 for side in ("chosen", "rejected")},
                 "virtues": dict.fromkeys(VIRTUES, 0.7), "label": 0.7, "votes": 5,
                 "position_flips": 1, "truncated": False} for p in prompts])
        self.put("preferences/dialogues.jsonl",
                 [{**p, "ids": [*range(1, 40)],
                   "turns": [[5, 9, False], [12, 20, True], [25, 39, False]]} for p in prompts])
        files = {"revisions": ["revisions.jsonl"],
                 "preferences": [*(f"{lens}.jsonl" for lens in LENSES), "dialogues.jsonl"]}
        for stage, names in files.items():
            artefacts.write_manifest(self.seeds / stage, stage=stage, parents={}, **made,
                                      sha256=artefacts.data_hash(self.seeds / stage, names))
        self.put("policy/rollouts.jsonl",
                 [{"iteration": i, "id": "0" * 16, "prompt": "q", "kl": 0.5,
                   "scores": [0.1, 0.2, 0.3], "turns": dict.fromkeys(LENSES, "a")} for i in (1, 2)])
        self.put("policy/metrics.jsonl",
                 [{"iteration": i, "objective/kl": 0.5, "objective/aggregate/mean": 0.1,
                   "val/explained_variance": None} for i in (1, 2)])
        # artefacts: SFT, and three reward models upon it
        for name in ("sft", *LENSES):
            add_adapter(self.model, name, rank=2, alpha=4, targets=("q_proj", "v_proj"))
            rm = dict(stage="rm", head=models.ScalarHead(64, bias=name == "action", seed=3),
                      parents={"sft": self.seeds / "sft"},
                      extra={"lens": name, "score_mean": 0.5, "score_std": 2.0})
            folder = self.seeds / ("sft" if name == "sft" else f"rm/{name}")
            artefacts.save_artifact(
                artefacts.prepare_output(folder, overwrite=False), model=self.model, adapter=name,
                **(dict(stage="sft", parents={}) if name == "sft" else rm), **made)
        for name in ("sft", *LENSES):
            remove_adapter(self.model, name)
        # a run that was killed: settings, two checkpoints, kept batches
        resume.start(argparse.Namespace(**{**vars(self.flags), "resume": False}),
                     self.seeds / "run", data="abc")
        for _ in range(2):
            self.train(self.seeds / "run")
        list(resume.replay(self.seeds / "run/resume/kept.jsonl", range(5), self.compute))

    def put(self, name: str, records: list[dict]) -> None:
        path, data = self.seeds / name, "".join(json.dumps(r) + "\n" for r in records).encode()
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)

    flags = argparse.Namespace(lr=0.1, data="x", resume=True, overwrite=False)

    @staticmethod
    def compute(i: int) -> list:
        return [i, {"ids": [i, 2 * i], "p": i / 7}]

    @staticmethod
    def train(out: Path) -> None:
        """One step of a loop that goes on where its checkpoint says."""
        weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
        log = out / "metrics.jsonl"
        optimizer = torch.optim.Adam([{"params": weights[:1], "lr": 0.1},
                                      {"params": weights[1:], "lr": 0.03}])
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 7)
        done = resume.load_checkpoint(out / "resume", weights, optimizer, schedule,
                                      [log], ["total"])
        assert done is None or isinstance(done["step"], int) and done["step"] >= 0
        sum((w ** 2).sum() for w in weights).backward()
        optimizer.step(), schedule.step()
        with open(log, "a") as file:
            file.write("{}\n")
        resume.save_checkpoint(out / "resume", (done["step"] if done else 0) + 1, weights,
                               optimizer, schedule, [log], total=1.5)
        assert all(w.isfinite().all() for w in weights)
        assert all(math.isfinite(g["lr"]) for g in optimizer.param_groups)


# ---- readers: they read what was damaged, and assert that what they accept can be used


def sound(messages: list[dict], last: str) -> None:
    assert messages[-1]["role"] == last
    for i, m in enumerate(messages):
        assert m["role"] == ("user", "assistant")[i % 2] and m["content"].encode().strip()


def prompts(kit: Kit, path: Path) -> None:
    for record in records.read_prompts(path):
        assert re.fullmatch("[0-9a-f]{16}", record["id"]) and record.keys() == {"id", "prompt"}
        sound(record["prompt"], "user")
        ids = dialogue.encode_prompt(kit.tokenizer, record["prompt"])
        # no text of a prompt closes a turn
        assert ids.count(2) == sum(m["role"] == "assistant" for m in record["prompt"])


def revisions(kit: Kit, path: Path) -> None:
    for r in records.read_revisions(path):
        sound([*r["prompt"], {"role": "assistant", "content": r["revision"]}], "assistant")
        assert r["virtue"].encode() is not None and r["truncated"] in (True, False)
        assert r["critique"].encode() is not None and int(r["id"], 16) >= 0


def preferences(kit: Kit, path: Path) -> None:
    for r in records.read_preferences(path, path.stem):
        sound(r["chosen"], "assistant"), sound(r["rejected"], "assistant")
        assert all(0.0 <= float(p) <= 1.0 for p in (r["label"], *r["virtues"].values()))
        most = len(r["virtues"])
        assert most and r["votes"] in range(most + 1)
        assert r["position_flips"] in (None, *range(most + 1))
        assert r["lens"] == path.stem and int(r["id"], 16) >= 0


def dialogues(kit: Kit, path: Path) -> None:
    found = records.read_dialogues(path)
    dialogue.right_pad([d.ids for d in found], 0)
    randomness.held_out_ids([d.id for d in found], 0, 0.5)
    for d in found:
        sound(d.prompt, "user")
        assert re.fullmatch("[0-9a-f]{16}", d.id)
        assert all(type(i) is int and 0 <= i < 2 ** 31 for i in d.ids)
        assert len(d.turns) == 3
        assert all(0 < t.start < t.end <= len(d.ids) > t.score_position for t in d.turns)
        assert all(a.end <= b.start for a, b in zip(d.turns, d.turns[1:]))


def pairs(kit: Kit, path: Path) -> None:
    for r in records.read_pairs(path)[0]:
        sound(r["chosen"], "assistant"), sound(r["rejected"], "assistant")
        assert r["lens"] in LENSES and r["chosen"] != r["rejected"]


def manifest(kit: Kit, path: Path) -> None:
    """As the scripts read it: flags that were left out come from there."""
    made = artefacts.read_manifest(path.parent)
    args = importlib.import_module("run_sft").parse(["--data", str(path.parent), "--out", "x"])
    assert args.quantize in loading.QUANTIZE and args.dtype in models.DTYPES
    assert isinstance(args.model, str)
    if made["stage"] == "preferences":
        artefacts.check_made_by(path.parent, kit.known["base"], kit.known["template"], None)
    elif made["stage"] == "sft":
        flags = ["preferences", "--sft", str(path.parent), "--out", "x"]
        args = importlib.import_module("run_data").parse(flags)
        assert type(args.max_new_tokens) is int and args.max_new_tokens > 0
        assert 0 < args.temperature < math.inf and isinstance(args.prompts, str)


def adapter(kit: Kit, path: Path) -> None:
    try:
        if path.parent.name == "sft":
            artefacts.load_artifact(path.parent, kit.model, "case", stage="sft", **kit.known)
            loaded = [(("case",), None)]
        else:
            loaded, mean, std = load_reward_models(path.parent.parent, kit.model, (),
                                                   {"sft": kit.seeds / "sft"}, **kit.known)
            assert mean.isfinite().all() and std.isfinite().all() and (std >= 0).all()
        for names, head in loaded:
            weights = [p for name in names for p in adapter_parameters(kit.model, name)]
            weights += head.parameters() if head else []
            with torch.no_grad(), use_stack(kit.model, *names):
                hidden = models.hidden_states(kit.model, IDS, torch.ones_like(IDS))
            assert all(p.dtype == torch.float32 and p.isfinite().all() for p in weights)
            assert ((head(hidden) if head else hidden).isfinite().all()
                    or max(p.abs().max() for p in weights) > 1e4)
    except VirtueError:
        assert all(p.isfinite().all() for name in adapter_names(kit.model)
                   for p in adapter_parameters(kit.model, name))
        raise
    finally:
        for name in adapter_names(kit.model):
            remove_adapter(kit.model, name)
        assert active_stack(kit.model) == ()


def base(kit: Kit, path: Path) -> None:
    with torch.no_grad():
        logits = loading.load_model(path.parent)(IDS).logits
    assert logits.shape == (1, 5, 300) and logits.isfinite().all()
    assert len(loading.base_fingerprint(path.parent)) == 64


def tokenizer(kit: Kit, path: Path) -> None:
    found = loading.load_tokenizer(path.parent)
    ids = dialogue.encode_prompt(found, chat("May I?"))
    assert all(type(i) is int and 0 <= i < 300
               for i in (*ids, found.eos_token_id, found.pad_token_id))
    assert found.pad_token_id != found.eos_token_id
    assert isinstance(found.decode(ids), str) and len(loading.template_fingerprint(found)) == 64


def state(kit: Kit, path: Path) -> None:
    """As a stage goes on: from its settings, its kept batches, its artefacts."""
    if path.name == "settings.json":
        resume.start(kit.flags, path.parent.parent, data="abc")
    elif path.name == "kept.jsonl":
        expected = [json.loads(json.dumps(kit.compute(i))) for i in range(5)]
        assert list(resume.replay(path, range(5), kit.compute)) == expected
    else:
        kit.train(path.parent.parent if path.parent.name == "resume" else path.parent)


def logs(kit: Kit, path: Path) -> None:
    """As run_eval.py's report reads what a training wrote."""
    if path.name == "rollouts.jsonl":
        assert all(math.isfinite(row["kl"]) and math.isfinite(row["proxy"])
                   for row in curve_of(records.read_rollouts(path)))
    else:
        assert all(value is None or math.isfinite(value) for row in records.read_metrics(path)
                   for value in row.values())


READERS = {  # reader -> (share of the cases, files to damage)
    prompts: (12, ("text/prompts.jsonl", "text/messages.jsonl.gz", "text/hh.jsonl.gz")),
    revisions: (12, ("revisions/revisions.jsonl",)),
    preferences: (16, tuple(f"preferences/{lens}.jsonl" for lens in LENSES)),
    dialogues: (10, ("preferences/dialogues.jsonl",)), pairs: (12, ("text/pairs.jsonl",)),
    manifest: (8, ("revisions/virtue.json", "preferences/virtue.json", "sft/virtue.json")),
    adapter: (14, tuple(f"{top}/{name}" for top in ("sft", "rm/action", "rm/motivation")
                        for name in (artefacts.WEIGHTS, artefacts.CONFIG, artefacts.MANIFEST))),
    base: (7, ("base/config.json", "base/model.safetensors", "sharded/model.safetensors.index.json",
               "sharded/config.json")),
    tokenizer: (4, ("base/tokenizer.json", "base/tokenizer_config.json")),
    logs: (4, ("policy/rollouts.jsonl", "policy/metrics.jsonl")),
    state: (12, ("run/resume/settings.json", "run/resume/kept.jsonl", "run/resume/*.safetensors",
                 "run/metrics.jsonl"))}
_FEW = "--limit 2 --max-prompt-tokens 400 --max-new-tokens 4"
SCRIPTS = {  # file or folder that was damaged -> a script that reads it
    "text/pairs.jsonl": "run_eval judge --pairs {file} --model {seeds}/base",
    "text": f"run_data preferences --any-judge --prompts {{file}} --model {{seeds}}/base "
    f"--truncated keep {_FEW}",
    "revisions": "run_sft --data {top} --epochs 1 --rank 2",
    "preferences": "run_rm --data {top} --epochs 1 --rank 2",
    "sft": f"run_data preferences --any-judge --sft {{top}} --truncated keep {_FEW}",
    "rm": f"run_eval best-of-n --rm {{top}} --sft {{seeds}}/sft --n 1 {_FEW}",
    "base": f"run_data preferences --any-judge --model {{top}} --truncated keep {_FEW}",
    "sharded": f"run_data preferences --any-judge --model {{top}} --truncated keep {_FEW}"}

# ---- damage

# JSON texts that json.dumps would not write
RAW = {"@1e999": "1e999", "@digits": "9" * 5000, "@deep": "[" * 100_000 + "]" * 100_000,
       "@open": '{"a":' * 2000,
       **{f"@nested{n}": "[" * n + "]" * n for n in (100, 400, 800, 940, 980)}}
NASTY = [*RAW, None, True, False, math.nan, math.inf, -math.inf, -1, 0, 1, 2, 3, 299, 0.5, 1.5,
         -0.0, 2 ** 31, 2 ** 63, 10 ** 30, 10 ** 400, 1e308, 5e-324, "", " ", "x",
         "0" * 16, "1e5", "</s>", "[INST]", "\n\nHuman: ", "\x1b[31mred\x1b[0m\x07\x9b", "\ud800",
         "a\0b", "\u202egnp.exe", "<script>alert(1)</script>",
         "../../../../etc/passwd", "/etc/passwd", "~nobody/x", "a" * 300, "é" * 100_000, [], {},
         [None], [[1]], {"a": 1}, [1] * 1000, chat("x")[0], chat("x"), "nf4", "toy"]
ADDED = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"},
         "tokenizer_class": "Evil", "num_labels": 10 ** 9, "use_dora": True,
         "quantization_config": {"load_in_4bit": True}, "\x1b[2J": 1, "lens": "action",
         "chat_template": "{% for i in range(99999999) %}x{% endfor %}", "\ud800": 0,
         "a" * 100_000: 1}
JUNK = [b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\x1b[31m", b"\r",
        b"\n", b"\n\n", b"\xe2\x80\xa8", *(bytes([c]) for c in b'"{}[],\\-'), b"\\ud800", b"NaN",
        b"null", b"[" * 100_000, b'{"a":' * 100_000, b"x" * 3_000_000, b" " * 3_000_000,
        b'"' + b"y" * 3_000_000 + b'"', b"\n" * 300_000]


def nodes(value) -> list[tuple]:
    """All (container, key) in a JSON value."""
    keys = [*value] if isinstance(value, dict) else ()
    if isinstance(value, list):
        keys = range(len(value))
    return [node for key in keys for node in ((value, key), *nodes(value[key]))]


def damage_json(rng: random.Random, text: bytes) -> bytes:
    """JSON whose nodes were replaced, deleted, doubled, moved, wrapped or added to."""
    root = [json.loads(text)]
    for _ in range(rng.choice([1, 1, 1, 3])):
        (holder, key), (other, at) = rng.choices(nodes(root), k=2)
        kind = rng.choice(["replace"] * 6 + ["delete", "double", "move", "wrap", "add"])
        if kind == "delete" and holder is not root:
            del holder[key]
        elif kind == "double" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == "move":
            holder[key] = copy.deepcopy(other[at])
        elif kind == "wrap":
            holder[key] = rng.choice([[holder[key]], {"x": holder[key]}, str(holder[key])])
        elif kind == "add" and isinstance(holder, dict):
            name = rng.choice([*ADDED])
            holder[name] = ADDED[name]
        else:
            holder[key] = copy.deepcopy(rng.choice(NASTY))
    text = json.dumps(root[0], ensure_ascii=rng.random() < 0.7)
    return re.sub(r'"(@\w+)"', lambda m: RAW.get(m[1], m[0]), text).encode("utf-8", "surrogatepass")


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    at, few = rng.randrange(len(data) + 1), rng.choice([1, 1, 10, 50])
    flipped = bytearray(data)
    for i in rng.choices(range(len(data)), k=few) if data else ():
        flipped[i] ^= 1 << rng.randrange(8)
    junk = rng.choice(JUNK)
    encoding = rng.choice(["utf-8", "utf-16", "utf-16-be", "utf-32", "utf-7"])
    recoded = data.decode("latin-1").encode(encoding)
    return rng.choice([data[:at], data[:at], data[at:], bytes(flipped), bytes(flipped),
                       *[data[:at] + junk + data[at:]] * 5, data[:at] + data[at + few:],
                       data + data[at:], recoded, rng.randbytes(few), b""])


def damage_tensors(rng: random.Random, path: Path) -> bytes:
    """A safetensors file with other tensors, or with another header over the same bytes."""
    data = path.read_bytes()
    if rng.random() < 0.3:
        size = struct.unpack("<Q", data[:8])[0]
        header = damage_json(rng, data[8:8 + size])
        return (struct.pack("<Q", rng.choice([len(header)] * 5 + [0, 2 ** 40, 2 ** 64 - 1]))
                + header + data[8 + size:])
    with safe_open(path, "pt") as file:
        about = dict(file.metadata() or {})
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    name = rng.choice([*tensors])
    t = tensors[name]
    new = rng.choice(["", "x", "../../x", "\x1b[31m", "a" * 5000, name + ".x",
                      "base_model.model.score.evil", "optimizer/99/x", "parameter/9", "optimizer",
                      rng.choice([*tensors])])
    shapes = [t.flatten(), t.flatten()[:1], t.flatten()[:0], t.mT if t.ndim > 1 else t[None],
              t[None], t.new_zeros(()), torch.cat([t[None]] * 2)]
    types = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool,
             torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
    kind = rng.choice(["gone", "name", "extra", "shape", "type", "value", "state"])
    if kind in ("gone", "name"):
        del tensors[name]
    if kind in ("name", "extra"):
        tensors[new] = t.clone()
    elif kind == "state" and "state" in about:  # what a checkpoint knows besides its tensors
        about["state"] = damage_json(rng, about["state"]).decode("utf-8", "replace")
    elif kind != "gone":
        tensors[name] = {"shape": rng.choice(shapes).clone().contiguous(), "type": t.to(rng.choice(
            types))}.get(kind, torch.full_like(t, rng.choice([math.nan, math.inf, -math.inf, 0.0])))
    return save(tensors, about)


def sign(path: Path, data: bytes) -> Path:
    """Puts the checksum of tensors right, as a forger may -> where they are now."""
    digest, made = hashlib.sha256(data).hexdigest(), path.parent / "virtue.json"
    if path.parent.name == "resume":
        return path.rename(
            path.with_name(f"{path.stem.partition('-')[0]}-{digest[:16]}.safetensors"))
    if made.exists():
        made.write_text(json.dumps({**json.loads(made.read_text()), "sha256": digest}))
    return path


def damage(rng: random.Random, path: Path) -> Path:
    """Damages one file in place -> where it is now (a checkpoint's name holds its checksum)."""
    if rng.random() < 0.04:
        path.unlink()
        rng.choice([lambda: None, path.mkdir, path.touch, lambda: path.symlink_to(path.name)])()
        return path
    data = path.read_bytes()
    packed = path.suffix == ".gz" and rng.random() < 0.7
    data = gzip.decompress(data) if packed else data
    if (rng.random() < 0.35 or path.suffix == ".gz" and not packed
        or path.name == "kept.jsonl" or not data):
        data = damage_bytes(rng, data)
    elif path.suffix == ".safetensors":
        data = damage_tensors(rng, path)
    elif path.suffix == ".json":
        data = damage_json(rng, data)
    else:
        lines = data.splitlines()
        for i in rng.sample(range(len(lines)), min(len(lines), rng.choice([1, 1, 1, 3]))):
            lines[i] = damage_json(rng, lines[i])
        data = b"\n".join([*lines, *lines[:rng.choice([0, 0, 1])]]) + b"\n"
    path.write_bytes(gzip.compress(data, 1, mtime=0) if packed else data)
    return sign(path, data) if path.suffix == ".safetensors" and rng.random() < 0.8 else path


# ---- cases


class Hang(BaseException):
    """No Exception, so that no reader takes it for one of its own."""


class Watch:
    """What a reader does while it reads, by Python's audit events, that it may not do."""
    folder, seen = None, []

    @classmethod
    def hook(cls, event: str, args: tuple) -> None:
        if cls.folder is None:
            return

        def inside(x):
            return (not isinstance(x, (str, bytes, os.PathLike))
                    or os.path.abspath(os.fsdecode(x)).startswith(cls.folder))
        if event == "open":
            writes = (set(args[1] or "") & set("wax+")
                      or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            bad = writes and not inside(args[0]) and args[0] != os.devnull
        elif event in ("os.remove", "os.rmdir", "os.rename", "os.mkdir", "os.truncate", "os.link",
                       "os.symlink", "os.chmod", "shutil.rmtree"):
            # this lies within a tree that shutil.rmtree was allowed to remove
            relative = event in ("os.remove", "os.rmdir") and args[-1] != -1
            bad = not relative and not all(map(inside, args))
        elif event == "exec":
            bad = getattr(args[0], "co_filename", "").startswith(cls.folder)
        else:
            bad = event in ("pickle.find_class", "socket.connect", "socket.getaddrinfo",
                            "subprocess.Popen", "os.system", "os.exec", "builtins.input")
        if bad:
            cls.seen.append(f"{event} {str(args)[:200]}")


sys.addaudithook(Watch.hook)


def listing(kit: Kit) -> list[tuple]:
    """All files but the cases': extensions in C or Rust make no audit events."""
    return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns)
                  for top in (kit.root, kit.seeds)
                  for p in top.rglob("*") if kit.cases not in (p, *p.parents))


def through_script(command: str, out: Path, refused: bool, sound: bool = False) -> str | None:
    """What is wrong with the end of a script, or None: it runs in a forked child, upon input
    that was refused or is sound."""
    script, *flags = command.split()
    err, status, pid = out.with_name("stderr"), 70, os.fork()
    if not pid:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL), signal.alarm(6 * LIMIT)
            with open(err, "wb", buffering=0) as file, open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), 1), os.dup2(file.fileno(), 2)
            sys.stdout = open(1, "w", closefd=False)
            sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)
            runtime.run_main(
                lambda: importlib.import_module(script).main([*flags, "--out", str(out)]))
        except SystemExit as e:
            status = e.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said = err.read_text(errors="replace")
    errors = [line for line in re.split(r"[\r\n]+", said) if "error:" in line]
    fine = (status == 0 and not refused or not sound and status == 2 and len(errors) == 1
            and errors[0].startswith("error:") and not CONTROL.search(errors[0]))
    return (None if fine and "Traceback" not in said
            else f"{command}: status {status}, {len(errors)} lines of error\n{said[-3000:]}")


def one(kit: Kit, number: int, seed: int, script: bool = False,
        keep: bool = False) -> tuple[str, str, str | None]:
    """One case -> (reader, accepted or refused, what is wrong or None)."""
    rng = random.Random(f"{seed} {number}")
    reader = rng.choices([*READERS], [share for share, _ in READERS.values()])[0]
    file = rng.choice(READERS[reader][1])
    case, top = kit.cases / f"case{number}", file.split("/")[0]
    shutil.copytree(kit.seeds / top, case / top, copy_function=shutil.copyfile)
    path = damage(rng, sorted(case.glob(file))[-1])
    before, result, wrong = listing(kit), "accepted", None

    def ring(*_):
        raise Hang
    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT)
    Watch.folder, Watch.seen = str(case), []
    try:
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(
                io.StringIO()) as out:
            reader(kit, path)
    except VirtueError as e:
        result, said = "refused", str(e)
        named = any(name in said for name in (path.name, str(path.parent), str(case / top)))
        if not named or not REMEDY.search(said) or not len(said) < 2000:
            wrong = (f"the file named: {named}, a remedy: {bool(REMEDY.search(said))}, {len(said)} "
                     f"characters: {said[:500]!r}")
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        wrong = "".join(traceback.format_exception(e, limit=-6))[-3000:]
    finally:
        signal.alarm(0), signal.signal(signal.SIGALRM, previous)
        Watch.folder = None
    if not wrong and (control := CONTROL.search(err.getvalue() + out.getvalue())):
        wrong = f"{control} on the terminal"
    if not wrong and script and (command := SCRIPTS.get(file, SCRIPTS.get(top))):
        wrong = through_script(command.format(file=path, top=case / top, seeds=kit.seeds),
                               case / "out", result == "refused")
    if Watch.seen or listing(kit) != before:
        wrong = (f"touched what is not its own: {Watch.seen[:3]} {set(listing(kit)) ^ set(before)} "
                 f"{wrong or ''}")
    if not keep:
        shutil.rmtree(case)
    return reader.__name__, result, wrong and f"case {number} ({reader.__name__}, {file}): {wrong}"


def run(folder: Path, cases: range, seed: int, scripts: int = 0, keep: bool = False,
        most: int = 20) -> tuple[Counter, Counter, list[str]]:
    """Counts of (reader, result), seconds by reader, faults; each `scripts`th runs a script."""
    kit, counts, seconds, faults = Kit(folder), Counter(), Counter(), []
    for number in cases:
        started = time.perf_counter()
        name, result, wrong = one(kit, number, seed, bool(scripts) and number % scripts == 0, keep)
        counts[name, result] += 1
        seconds[name] += time.perf_counter() - started
        if wrong:
            faults.append(wrong)
            print(wrong, end="\n\n", flush=True)
            if len(faults) == most:
                break
    return counts, seconds, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--case", type=int, help="this one alone, its folder kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scripts", type=int, default=50,
                        help="every so many cases run a script too; 0 for none")
    parser.add_argument("--most", type=int, default=20, help="stop after so many faults")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # with this limit whatever fills the memory fails here alone
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    folder, alone = Path(tempfile.mkdtemp(prefix="fuzz-")), args.case is not None
    counts, seconds, faults = run(folder / "kit", range(args.case, args.case + 1) if alone
                                  else range(args.cases), args.seed, args.scripts, alone, args.most)
    print(f"{'reader':12}{'accepted':>10}{'refused':>10}{'seconds':>10}")
    for name in sorted(seconds):
        accepted, refused = counts[name, "accepted"], counts[name, "refused"]
        print(f"{name:12}{accepted:10}{refused:10}{seconds[name]:10.1f}")
    print(f"{counts.total()} cases, seed {args.seed}: {len(faults)} faults, "
          f"{sum(seconds.values()):.0f} s" + (f", see {folder}" if alone else ""))
    if not alone:
        shutil.rmtree(folder)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
