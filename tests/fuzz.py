"""Damaged and hostile input for every reader: a value that can be used, or one VirtueError; nothing else.

    python tests/fuzz.py --cases 10000 --seed 0      # 200 cases go through the real scripts as well
    python tests/fuzz.py --only adapter --case 4711  # one case again, its folder kept

Each case copies a small valid input, damages one file of it (bytes, JSON nodes, tensors, the file itself) and
reads it. The reader must end within LIMIT seconds with a value that `USE` finds usable, or with a VirtueError
that names the file and what to do. Meanwhile an audit hook watches for files written outside the case's
folder, for unpickling, sockets, and code that runs from the input.
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

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with running threads cannot be forked
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
sys.dont_write_bytecode = True  # a first import would be a write outside

import torch  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402
from safetensors.torch import save  # noqa: E402

from tiny import make_tiny_model  # noqa: E402
from virtue import VirtueError, checkpoint, dialogue, models, resume, runtime  # noqa: E402
from virtue.ethics import LENSES, VIRTUES  # noqa: E402
from virtue.lora import active_stack, adapter_names, adapter_parameters, add_adapter, remove_adapter, use_stack  # noqa: E402
from virtue.rollout import load_reward_models, load_sft  # noqa: E402

LIMIT = 20  # seconds a case
IDS = torch.tensor([[1, 7, 9, 30, 2]])
DO = re.compile(r"\b(check|give|write|fetch|convert|correct|run|restore|train|take|choose|start|name|use|add|make|lower|remove|raise)\b")

# ---- valid inputs


def chat(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


class Kit:
    """A tiny base, and a folder of valid inputs of each kind upon it."""

    def __init__(self, root: Path):
        self.root, self.seeds, self.cases = root, root / "seeds", root / "cases"
        self.seeds.mkdir(parents=True), self.cases.mkdir()
        (root / "outside.txt").write_text("untouched")
        base = make_tiny_model(self.seeds / "base")
        shutil.copytree(make_tiny_model(root / "sharded", max_shard_size="100KB"), self.seeds / "sharded")
        for folder in (base, self.seeds / "sharded"):
            (folder / "evil.py").write_text(f"open({str(root / 'outside.txt')!r}, 'w').write('code ran')\nclass Evil: pass\n")
        self.model, self.tokenizer = models.load_model(base), models.load_tokenizer(base)
        self.known = dict(base={"id": str(base), "fingerprint": models.base_fingerprint(base)}, template=models.template_fingerprint(self.tokenizer))
        known = dict(**self.known, seed=0, settings={"model": str(base), "quantize": "none", "dtype": "fp32", "prompts": "toy", "max_prompt_tokens": 400,
                                                     "max_new_tokens": 4, "temperature": 1.0, "seed": 0, "held_out": 0.3, "sft": None})
        # text: prompts, revisions, preferences, pairs of each kind
        prompts = [dialogue.prompt_record(chat(f"What should I do about the letter {i}?")) for i in range(16)]
        human = "\n\nHuman: Why {}?\n\nAssistant: Yes.\n\nHuman: Now {}?\n\nAssistant: "
        hh = [{"chosen": human.format(i, i) + "No.", "rejected": human.format(i, i) + "Go."} for i in range(6)]
        one_turn = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
        self.put("text/prompts.jsonl", [{"prompt": p["prompt"][0]["content"]} for p in prompts])
        self.put("text/messages.jsonl.gz", [{"prompt": chat("One?", "Two.", f"Three {i}?")} for i in range(16)])
        self.put("text/hh.jsonl.gz", hh)
        self.put("text/pairs.jsonl", [*hh, *one_turn, {"prompt": chat("q"), "chosen": chat("q", "a")[1:], "rejected": chat("q", "b")[1:], "lens": "motivation"}])
        self.put("revisions/revisions.jsonl", [p | {"initial": "a", "critique": "", "revision": "I give it back.", "virtue": VIRTUES[i % 5], "truncated": False}
                                               for i, p in enumerate(prompts)])
        for k, lens in enumerate(LENSES):
            tail = [x for q in dialogue.QUESTIONS[:k] for x in (q, "It is honest.")]
            self.put(f"preferences/{lens}.jsonl", [{
                "id": p["id"], "lens": lens, "chosen": chat(p["prompt"][0]["content"], "yes", *tail), "rejected": chat(p["prompt"][0]["content"], "no", *tail),
                "virtues": dict.fromkeys(VIRTUES, 0.7), "label": 0.7, "votes": 5, "position_flips": 1, "truncated": False} for p in prompts])
        self.put("preferences/dialogues.jsonl", [{**p, "ids": [*range(1, 40)], "turns": [[5, 9, False], [12, 20, True], [25, 39, False]]} for p in prompts])
        for stage in ("revisions", "preferences"):
            checkpoint.write_manifest(self.seeds / stage, stage=stage, parents={}, **known)
        # artefacts: SFT, and three reward models upon it
        for name in ("sft", *LENSES):
            add_adapter(self.model, name, rank=2, alpha=4, targets=("q_proj", "v_proj"))
            folder = checkpoint.prepare_output(self.seeds / ("sft" if name == "sft" else f"rm/{name}"), overwrite=False)
            checkpoint.save_artifact(folder, stage="sft" if name == "sft" else "rm", model=self.model, adapter=name,
                                     head=None if name == "sft" else models.ScalarHead(64, bias=name == "action", seed=3),
                                     parents={} if name == "sft" else {"sft": self.seeds / "sft"}, **known,
                                     extra={} if name == "sft" else {"lens": name, "score_mean": 0.5, "score_std": 2.0})
        for name in LENSES:
            remove_adapter(self.model, name)
        # a run that was killed: checkpoints, kept batches, settings
        (self.seeds / "run/resume").mkdir(parents=True)
        (self.seeds / "run/metrics.jsonl").write_text("")
        for step in (1, 2):
            self.train(self.seeds / "run")
        list(resume.replay(self.seeds / "run/resume/kept.jsonl", range(5), self.compute))
        checkpoint.write_json(self.seeds / "run/resume/settings.json", {**vars(self.flags(self.seeds / "run")), "resume": None, "processes": 1} | {"sha256 data": "abc"})
        state = self.seeds / "run/resume/settings.json"
        state.write_text(json.dumps({k: v for k, v in json.loads(state.read_text()).items() if k not in ("resume", "overwrite")}))

    def put(self, name: str, records: list[dict]) -> None:
        path, data = self.seeds / name, "".join(json.dumps(r) + "\n" for r in records).encode()
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)

    @staticmethod
    def flags(out: Path) -> argparse.Namespace:
        return argparse.Namespace(out=str(out), lr=0.1, seed=0, resume=True, overwrite=False)

    @staticmethod
    def compute(i: int) -> list:
        return [i, {"ids": [i, 2 * i], "p": i / 7}]

    @staticmethod
    def train(out: Path) -> list[torch.Tensor]:
        """One step of a loop that goes on where its checkpoint says."""
        weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
        optimizer = torch.optim.Adam([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "lr": 0.03}])
        schedule, log = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 7), out / "metrics.jsonl"
        done = resume.load_checkpoint(out / "resume", weights, optimizer, schedule, [log])
        step = done["step"] + 1 if done else 1
        sum((w ** 2).sum() for w in weights).backward()
        optimizer.step(), schedule.step()
        with open(log, "a") as file:
            file.write("{}\n")
        resume.save_checkpoint(out / "resume", step, weights, optimizer, schedule, [log], total=1.5)
        assert all(w.isfinite().all() for w in weights) and all(math.isfinite(g["lr"]) for g in optimizer.param_groups) and 0 < step < 10 ** 6
        return weights


# ---- readers: each reads the damaged input and asserts that what it accepts can be used


def sound(messages: list[dict], last: str) -> None:
    assert messages and messages[-1]["role"] == last
    for i, m in enumerate(messages):
        assert m["role"] == ("user", "assistant")[i % 2] and m["content"].strip() and m["content"].encode() is not None


def prompts(kit: Kit, path: Path) -> None:
    for record in dialogue.read_prompts(path):
        assert re.fullmatch("[0-9a-f]{16}", record["id"]) and record.keys() == {"id", "prompt"}
        sound(record["prompt"], "user")
        ids = dialogue.encode_prompt(kit.tokenizer, record["prompt"])
        assert ids.count(2) == sum(m["role"] == "assistant" for m in record["prompt"])  # no text closes a turn


def revisions(kit: Kit, path: Path) -> None:
    for r in dialogue.read_revisions(path):
        sound([*r["prompt"], {"role": "assistant", "content": r["revision"]}], "assistant")
        assert r["virtue"] in VIRTUES and r["truncated"] in (True, False) and isinstance(r["critique"], str) and int(r["id"], 16) >= 0


def preferences(kit: Kit, path: Path) -> None:
    for r in dialogue.read_preferences(path, path.stem):
        sound(r["chosen"], "assistant"), sound(r["rejected"], "assistant")
        assert r["virtues"].keys() == set(VIRTUES) and all(0.0 <= float(p) <= 1.0 for p in (r["label"], *r["virtues"].values()))
        assert r["votes"] in range(6) and r["position_flips"] in range(6) and r["lens"] == path.stem and int(r["id"], 16) >= 0


def dialogues(kit: Kit, path: Path) -> None:
    found = dialogue.read_dialogues(path)
    dialogue.right_pad([d.ids for d in found], 0)
    assert runtime.held_out_ids([d.id for d in found], 0, 0.5) is not None
    for d in found:
        sound(d.prompt, "user")
        assert re.fullmatch("[0-9a-f]{16}", d.id) and all(type(i) is int and 0 <= i < 2 ** 31 for i in d.ids)
        assert len(d.turns) == 3 and all(0 < t.start < t.end <= t.score_position + 1 <= len(d.ids) for t in d.turns)
        assert all(a.end <= b.start for a, b in zip(d.turns, d.turns[1:]))


def pairs(kit: Kit, path: Path) -> None:
    found, skipped = dialogue.read_pairs(path)
    assert skipped >= 0
    for r in found:
        sound(r["chosen"], "assistant"), sound(r["rejected"], "assistant")
        assert r["lens"] in LENSES and r["chosen"] != r["rejected"]


def manifest(kit: Kit, path: Path) -> None:
    """As run_sft.py and run_data.py read it: flags that were left out come from there."""
    made = checkpoint.read_manifest(path.parent)
    for script, flags in (("run_sft", ["--data", str(path.parent)]), ("run_data", ["preferences", "--sft", str(path.parent)])):
        if script == "run_sft" or made["stage"] == "sft":
            args = importlib.import_module(script).parse([*flags, "--out", "x"])
            assert args.quantize in models.QUANTIZE and args.dtype in models.DTYPES and isinstance(args.model, str)
            if script == "run_data":
                assert type(args.max_new_tokens) is int and args.max_new_tokens > 0 and 0 < args.temperature < math.inf and isinstance(args.prompts, str)
    if made["stage"] == "preferences":
        checkpoint.check_made_by(path.parent, kit.known["base"], kit.known["template"], None)


def adapter(kit: Kit, path: Path) -> None:
    before = adapter_names(kit.model)
    try:
        if path.parent.name == "sft":
            checkpoint.load_artifact(path.parent, kit.model, "case", stage="sft", **kit.known)
            stacks = [(("case",), None)]
        else:
            stacks, mean, std = load_reward_models(path.parent.parent, kit.model, (), {"sft": kit.seeds / "sft"}, **kit.known, prefix="case")
            assert mean.isfinite().all() and std.isfinite().all() and (std > 0).all()
        for names, head in stacks:
            with torch.no_grad(), use_stack(kit.model, *names):
                hidden = models.hidden_states(kit.model, IDS, torch.ones_like(IDS))
            assert (hidden if head is None else head(hidden)).isfinite().all()
            assert head is None or all(p.dtype == torch.float32 for p in head.parameters())
    finally:
        for name in set(adapter_names(kit.model)) - set(before):
            assert all(p.dtype == torch.float32 for p in adapter_parameters(kit.model, name))
            remove_adapter(kit.model, name)
        assert adapter_names(kit.model) == before and active_stack(kit.model) == ()


def base(kit: Kit, path: Path) -> None:
    model = models.load_model(path.parent)
    with torch.no_grad():
        logits = model(IDS).logits
    assert logits.shape == (1, 5, 300) and logits.isfinite().all() and len(models.base_fingerprint(path.parent)) == 64


def tokenizer(kit: Kit, path: Path) -> None:
    found = models.load_tokenizer(path.parent)
    ids = dialogue.encode_prompt(found, chat("May I?"))
    assert all(type(i) is int for i in (*ids, found.eos_token_id, found.pad_token_id)) and found.pad_token_id != found.eos_token_id
    assert isinstance(found.decode(ids), str) and len(models.template_fingerprint(found)) == 64


def state(kit: Kit, path: Path) -> None:
    """As a stage goes on: settings, then a checkpoint or kept batches."""
    out = path.parent.parent if path.parent.name == "resume" else path.parent
    if path.name == "settings.json":
        args = kit.flags(out)
        args.out = str(kit.seeds / "run")
        resume.start(args, out, data="abc")
    elif path.name == "kept.jsonl":
        assert list(resume.replay(path, range(5), kit.compute)) == [json.loads(json.dumps(kit.compute(i))) for i in range(5)]
    else:
        kit.train(out)


# reader -> (share of the cases, files to damage, the script that reads them)
READERS = {
    prompts: (12, ("text/prompts.jsonl", "text/messages.jsonl.gz", "text/hh.jsonl.gz"), "run_data revisions --prompts {file} --model {base} " + (few := "--limit 2 --max-prompt-tokens 400 --max-new-tokens 2")),
    revisions: (12, ("revisions/revisions.jsonl",), "run_sft --data {top} --epochs 1 --rank 2"),
    preferences: (16, tuple(f"preferences/{lens}.jsonl" for lens in LENSES), train_rm := "run_rm --data {top} --epochs 1 --rank 2 --held-out 0.3"),
    dialogues: (10, ("preferences/dialogues.jsonl",), train_rm),
    pairs: (12, ("text/pairs.jsonl",), "run_eval judge --pairs {file} --model {base}"),
    manifest: (8, ("revisions/virtue.json", "preferences/virtue.json", "sft/virtue.json"), None),
    adapter: (14, tuple(f"{top}/{name}" for top in ("sft", "rm/action", "rm/motivation") for name in (checkpoint.WEIGHTS, checkpoint.CONFIG, checkpoint.MANIFEST)), None),
    base: (7, ("base/config.json", "base/model.safetensors", "sharded/model.safetensors.index.json", "sharded/config.json"), "run_data revisions --model {top} " + few),
    tokenizer: (4, ("base/tokenizer.json", "base/tokenizer_config.json"), "run_data revisions --model {top} " + few),
    state: (12, ("run/resume/settings.json", "run/resume/kept.jsonl", "run/resume/*.safetensors", "run/metrics.jsonl"), None),
}

# ---- damage

RAW = {"@1e999": "1e999", "@digits": "9" * 5000, "@deep": "[" * 100_000 + "]" * 100_000, "@open": '{"a":' * 2000,
       **{f"@nested{n}": "[" * n + "]" * n for n in (100, 400, 800, 940, 980)}}  # texts that JSON's writer would not write
NASTY = [*RAW, None, True, False, math.nan, math.inf, -math.inf, -1, 0, 1, 2, 3, 0.5, 1.5, -0.0, 2 ** 31, 2 ** 63, 10 ** 30, 10 ** 400, 1e308, 5e-324, "", " ", "x", "0" * 16,
         "1e5", "</s>", "[INST]", "\n\nHuman: ", "\x1b[31mred\x1b[0m\x07\x9b", "\ud800", "a\0b", "\u202egnp.exe", "<script>alert(1)</script>", "../../../../etc/passwd", "/etc/passwd",
         "~nobody/x", "a" * 300, "é" * 100_000, [], {}, [None], [[1]], {"a": 1}, [1] * 1000, {"role": "user", "content": "x"}, [{"role": "user", "content": "x"}], "nf4", "toy"]
KEYS = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}, "tokenizer_class": "Evil", "num_labels": 10 ** 9, "use_dora": True,
        "__class__": "x", "quantization_config": {"load_in_4bit": True}, "base_model_name_or_path": "../x", "trust_remote_code": True, "\x1b[2J": 1, "lens": "action",
        "chat_template": "{% for i in range(99999999) %}x{% endfor %}", "\ud800": 0, "a" * 100_000: 1}


def nodes(value, found=None) -> list[tuple]:
    """All (container, key) in a JSON value."""
    found = [] if found is None else found
    for key in (value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()):
        found.append((value, key))
        nodes(value[key], found)
    return found


def damage_json(rng: random.Random, value, times: int = 1) -> str:
    """Text of the value after nodes of it were replaced, deleted, doubled, moved or added to."""
    value = [copy.deepcopy(value)]
    for _ in range(times):
        holder, key = rng.choice(nodes(value))
        kind = rng.choice(["replace"] * 6 + ["delete", "double", "swap", "wrap", "add"])
        if kind == "delete" and holder is not value:
            del holder[key]
        elif kind == "double":
            holder.insert(key, copy.deepcopy(holder[key])) if isinstance(holder, list) else holder.update({f"{key} ": holder[key]})
        elif kind == "swap":
            other, at = rng.choice(nodes(value))
            holder[key] = copy.deepcopy(other[at])
        elif kind == "wrap":
            holder[key] = rng.choice([[holder[key]], {"x": holder[key]}, str(holder[key])])
        elif kind == "add" and isinstance(holder, dict):
            name = rng.choice([*KEYS])
            holder[name] = KEYS[name]
        else:
            holder[key] = copy.deepcopy(rng.choice(NASTY))
    text = json.dumps(value[0], ensure_ascii=rng.random() < 0.7)
    return re.sub(r'"(@\w+)"', lambda m: RAW.get(m[1], m[0]), text)


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    junk = rng.choice([b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\x1b[31m", b"\r", b"\n", b"\n\n", b"\xe2\x80\xa8", b'"', b"{", b"}", b"[", b"]", b",",
                       b"\\", b"\\ud800", b"NaN", b"-", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"x" * 3_000_000, b" " * 3_000_000, b'"' + b"y" * 3_000_000 + b'"', b"\n" * 300_000])
    kind = rng.choice(["cut", "cut", "flip", "flip", "insert", "insert", "insert", "insert", "drop", "double", "utf-16", "latin", "noise", "head"])
    if kind == "cut":
        return data[:at]
    if kind == "head":
        return data[at:]
    if kind == "flip":
        data = bytearray(data)
        for _ in range(rng.choice([1, 1, 10])):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if kind == "drop":
        return data[:at] + data[at + rng.choice([1, 2, 50]):]
    if kind == "double":
        return data + data[at:]
    if kind in ("utf-16", "latin"):
        return data.decode("latin-1").encode(rng.choice(["utf-16", "utf-16-be", "utf-32", "utf-7"]) if kind == "utf-16" else "utf-8")
    if kind == "noise":
        return rng.randbytes(rng.choice([0, 1, 8, 100, 5000]))
    return data[:at] + junk + data[at:]


def damage_tensors(rng: random.Random, path: Path) -> bytes:
    """A safetensors file with other tensors, or another header over the same bytes."""
    data = path.read_bytes()
    if rng.random() < 0.3:
        size = struct.unpack("<Q", data[:8])[0]
        header = damage_json(rng, json.loads(data[8:8 + size]), rng.choice([1, 1, 3])).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", rng.choice([len(header)] * 5 + [0, 2 ** 40, 2 ** 64 - 1])) + header + data[8 + size:]
    with safe_open(path, "pt") as file:
        about, tensors = dict(file.metadata() or {}), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    if "state" in about and rng.random() < 0.4:
        return save(tensors, {"state": damage_json(rng, json.loads(about["state"]))})
    name = rng.choice([*tensors])
    t = tensors[name]
    kind = rng.choice(["gone", "name", "shape", "shape", "dtype", "dtype", "value", "value", "extra"])
    if kind == "gone":
        del tensors[name]
    elif kind in ("name", "extra"):
        new = rng.choice(["", "x", "../../x", "\x1b[31m", "a" * 5000, name + ".x", "base_model.model.score.evil", "optimizer/99/x", "parameter/9", "optimizer", rng.choice([*tensors])])
        tensors[new] = tensors.pop(name).clone() if kind == "name" else t.clone()
    elif kind == "shape":
        new = rng.choice([t.flatten(), t[..., :1], t[:0], t.T, t[None], t.new_zeros(()), t.repeat(2, *[1] * (t.ndim - 1)) if t.ndim else t[None]])
        tensors[name] = new.clone().contiguous()
    elif kind == "dtype":
        types = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
        tensors[name] = t.to(rng.choice(types))
    else:
        tensors[name] = torch.full_like(t, rng.choice([math.nan, math.inf, -math.inf, 1e38, 0.0]))
    return save(tensors, about)


def damage(rng: random.Random, path: Path) -> Path:
    """Damages one file in place -> where it is now (a checkpoint's name holds its checksum)."""
    if rng.random() < 0.04:
        path.unlink()
        kind = rng.choice(["gone", "folder", "empty", "loop"])
        if kind == "folder":
            path.mkdir()
        elif kind == "empty":
            path.touch()
        elif kind == "loop":
            path.symlink_to(path.name)
        return path
    data = path.read_bytes()
    packed = path.suffix == ".gz" and rng.random() < 0.7
    data = gzip.decompress(data) if packed else data
    if rng.random() < 0.35 or (path.suffix == ".gz" and not packed):
        data = damage_bytes(rng, data)
    elif path.suffix == ".safetensors":
        data = damage_tensors(rng, path)
    elif ".jsonl" in path.name:
        lines = data.splitlines()
        for i in rng.sample(range(len(lines)), min(len(lines), rng.choice([1, 1, 1, 3]))):
            lines[i] = damage_json(rng, json.loads(lines[i]), rng.choice([1, 1, 2])).encode("utf-8", "surrogatepass")
        data = b"\n".join([*lines, *lines[:rng.choice([0, 0, 1])]]) + b"\n"
    else:
        data = damage_json(rng, json.loads(data), rng.choice([1, 1, 1, 3])).encode("utf-8", "surrogatepass")
    path.write_bytes(gzip.compress(data, 1, mtime=0) if packed else data)
    if path.suffix == ".safetensors" and rng.random() < 0.8:  # the checksum's owner may be careless, or hostile
        digest, made = hashlib.sha256(path.read_bytes()).hexdigest(), path.parent / "virtue.json"
        if path.parent.name == "resume":
            return path.rename(path.with_name(f"{path.stem.partition('-')[0]}-{digest[:16]}.safetensors"))
        if made.exists():
            made.write_text(json.dumps({**json.loads(made.read_text()), "sha256": digest}))
    return path


# ---- cases


class Hang(BaseException):
    """Not an Exception, so that no reader takes it for one of its own."""


class Watch:
    """What a reader may not do while it reads, as Python's audit events tell it."""
    folder, seen = None, []

    @classmethod
    def hook(cls, event: str, args: tuple) -> None:
        if cls.folder is None:
            return
        inside = lambda x: not isinstance(x, (str, bytes, os.PathLike)) or os.path.abspath(os.fsdecode(x)).startswith(cls.folder)  # noqa: E731
        if event == "open":
            writes = set(args[1] or "") & set("wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            bad = writes and not inside(args[0]) and args[0] != os.devnull
        elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod", "shutil.rmtree"):
            bad = not all(map(inside, args))
        elif event == "exec":
            bad = hasattr(args[0], "co_filename") and args[0].co_filename.startswith(cls.folder)
        else:
            bad = event in ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "builtins.input")
        if bad:
            cls.seen.append(f"{event} {str(args)[:200]}")


sys.addaudithook(Watch.hook)


def listing(kit: Kit) -> list[tuple]:
    return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in kit.root.rglob("*") if kit.cases not in p.parents and p != kit.cases)


def single(message: str, names: set[str]) -> str | None:
    """What is wrong with an error message, or None."""
    if not message.strip() or len(message) > 2000:
        return f"a message of {len(message)} characters"
    if not any(name in message for name in names):
        return "the message does not name the file"
    return None if DO.search(message) else "the message does not say what to do"


def through_script(kit: Kit, command: str, out: Path, refused: bool) -> str | None:
    """Runs a script in a forked child -> what is wrong with its end, or None."""
    script, *flags = command.split()
    err, pid = out.with_name("stderr"), os.fork()
    if not pid:
        signal.signal(signal.SIGALRM, signal.SIG_DFL), signal.alarm(6 * LIMIT)
        status = 70
        try:
            sys.stdout.flush(), sys.stderr.flush()
            with open(err, "wb", buffering=0) as file, open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), 1), os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", errors="backslashreplace", closefd=False)
            main = importlib.import_module(script).main
            runtime.run_main(lambda: main([*flags, "--out", str(out)]))
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
    if "Traceback" in said or status not in ((2,) if refused else (0, 2)):
        return f"{command}: status {status}\n{said[-2500:]}"
    if status == 2 and (len(errors) != 1 or not errors[0].startswith("error:")):
        return f"{command}: {len(errors)} lines of error\n{said[-2500:]}"
    return None


def one(kit: Kit, number: int, seed: int, only: str | None = None, script: bool = False, keep: bool = False) -> tuple[str, str, str | None]:
    """One case -> (reader, "accepted" or "refused", what is wrong or None)."""
    rng = random.Random(f"{seed} {number} {only}")
    known = {r.__name__: r for r in READERS}
    reader = known[only] if only else rng.choices([*READERS], [share for share, *_ in READERS.values()])[0]
    _, files, command = READERS[reader]
    file = rng.choice(files)
    top = file.split("/")[0]
    case = kit.cases / f"case{number}"
    shutil.copytree(kit.seeds / top, case / top, copy_function=shutil.copyfile)
    path = damage(rng, sorted((case / top).parent.glob(file))[-1])
    before, result, wrong = listing(kit), "accepted", None
    names = {path.name, str(path.parent), str(case / top)}
    Watch.folder, Watch.seen = str(case), []
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(Hang())), signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
            reader(kit, path)
    except VirtueError as e:
        result, wrong = "refused", single(str(e), names)
        wrong = wrong and f"{wrong}: {str(e)[:500]!r}"
    except SystemExit as e:
        result, wrong = "refused", None if e.code == 2 and "error:" in err.getvalue() else f"exit {e.code}"
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
        wrong = "".join(traceback.format_exception(e, limit=-6))[-3000:]
    finally:
        signal.alarm(0)
        Watch.folder = None
    if not wrong and re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", err.getvalue()):
        wrong = f"control characters on the terminal: {err.getvalue()[:300]!r}"
    if Watch.seen or listing(kit) != before:
        wrong = f"{wrong or ''} it touched what is not its own: {Watch.seen[:3]}"
    if script and command and not wrong:
        wrong = through_script(kit, command.format(file=path, top=case / top, base=kit.seeds / "base"), case / "out", result == "refused")
        if listing(kit) != before:
            wrong = f"{wrong or ''} the script touched what is not its own"
    if not keep:
        shutil.rmtree(case)
    return f"{reader.__name__}", result, wrong and f"case {number} ({reader.__name__}, {file}): {wrong}"


def run(folder: Path, cases: range, seed: int, only: str | None = None, scripts: int = 0, keep: bool = False, most: int = 20) -> tuple[Counter, Counter, list[str]]:
    """-> (reader, result) counted, seconds by reader, and what went wrong; `scripts`: every so many cases through the script."""
    kit, counts, seconds, faults = Kit(folder), Counter(), Counter(), []
    for number in cases:
        started = time.perf_counter()
        name, result, wrong = one(kit, number, seed, only, bool(scripts) and number % scripts == 0, keep)
        counts[name, result] += 1
        seconds[name] += time.perf_counter() - started
        if wrong:
            faults.append(wrong)
            print(wrong, end="\n\n", flush=True)
            if len(faults) >= most:
                break
    return counts, seconds, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--case", type=int, help="this one alone, its folder kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[r.__name__ for r in READERS])
    parser.add_argument("--scripts", type=int, default=100, help="every so many cases go through the real script; 0 for none")
    parser.add_argument("--most", type=int, default=20, help="stop after so many faults")
    args = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))  # a bomb is to hit this process alone
    cases = range(args.cases) if args.case is None else range(args.case, args.case + 1)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    counts, seconds, faults = run(folder / "kit", cases, args.seed, args.only, args.scripts, args.case is not None, args.most)
    if args.case is None:
        shutil.rmtree(folder)
    print(f"{'reader':12}{'accepted':>10}{'refused':>10}{'seconds':>10}")
    for name in seconds:
        print(f"{name:12}{counts[name, 'accepted']:10}{counts[name, 'refused']:10}{seconds[name]:10.0f}")
    print(f"{counts.total()} cases, seed {args.seed}: {len(faults)} faults, {sum(seconds.values()):.0f} s" + (f", see {folder}" if args.case is not None else ""))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
