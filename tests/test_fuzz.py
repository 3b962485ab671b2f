"""Bad input: some hundred cases of tests/fuzz.py, and what no reader may do with what it reads."""
from __future__ import annotations

import ast
import gzip
import json
from pathlib import Path

import pytest

import fuzz
from test_html import render, sample
from virtue import VirtueError, printable
from virtue.evaluation import html
from virtue.plumbing import records, runtime
from virtue.plumbing.loading import load_tokenizer
from virtue.evaluation.report import side_by_side

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*sorted((ROOT / "virtue").rglob("*.py")), *sorted(ROOT.glob("run_*.py"))]
HOSTILE = ["\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b2J", "a\rb", "a\0b\x08\x7f",
           "\u202egnp.exe", "\u2066x\u2028y\x85", "\ud800", "<script>alert(1)</script>",
           "\"'><img src=x onerror=alert(1)>"]


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    return fuzz.Kit(tmp_path_factory.mktemp("kit") / "kit")


def test_undamaged_input_is_accepted(kit):
    """Else a case would be refused whatever was damaged."""
    for reader, (_, files) in fuzz.READERS.items():
        for file in files:
            reader(kit, sorted(kit.seeds.glob(file))[-1])


def test_a_few_hundred_cases(tmp_path):
    counts, _, faults = fuzz.run(tmp_path / "kit", range(300), seed=2024, scripts=30)
    assert not faults, "\n\n".join(faults)
    assert len({name for name, _ in counts}) == len(fuzz.READERS)
    assert sum(n for (_, result), n in counts.items() if result == "refused") > 150


FOUND = [
    # what the long run found and three hundred cases may not meet: reader, file, node, new value
    (fuzz.manifest, "sft/virtue.json", "extra", []),
    (fuzz.manifest, "sft/virtue.json", "seed", "@deep"),
    (fuzz.manifest, "sft/virtue.json", "settings/quantize", "evil"),
    (fuzz.manifest, "preferences/virtue.json", "parents", {"sft": "x"}),
    (fuzz.manifest, "preferences/virtue.json", "settings/max_new_tokens", [1]),
    (fuzz.manifest, "preferences/virtue.json", "settings/system", [1]),
    (fuzz.manifest, "preferences/virtue.json", "settings/constitution", {"courage": 1}),
    (fuzz.adapter, "rm/action/virtue.json", "extra/score_std", float("nan")),
    (fuzz.adapter, "rm/action/virtue.json", "extra/score_mean", None),
    (fuzz.adapter, "sft/adapter_config.json", "r", 10 ** 9),
    (fuzz.adapter, "sft/adapter_config.json", "lora_alpha", float("inf")),
    (fuzz.adapter, "sft/adapter_config.json", "target_modules", [["q_proj"], ["v_proj"]]),
    (fuzz.base, "base/config.json", "num_hidden_layers", 2 ** 31),
    (fuzz.base, "base/config.json", "hidden_act", "toy"),
    (fuzz.base, "base/config.json", "rms_norm_eps", -1e3),
    (fuzz.base, "base/config.json", "hidden_size", "@nested400"),
    (fuzz.base, "sharded/model.safetensors.index.json", "weight_map/model.norm.weight",
     "../base/model.safetensors"),
    (fuzz.base, "sharded/model.safetensors.index.json", "weight_map/model.norm.weight",
     "x" * 300 + ".safetensors"),
    (fuzz.base, "sharded/model.safetensors.index.json", "weight_map/model.norm.weight", "@deep"),
    (fuzz.tokenizer, "base/tokenizer_config.json", "model_max_length", [1]),
    (fuzz.tokenizer, "base/config.json", "vocab_size", 299),
    (fuzz.state, "run/resume/settings.json", "", [1]),
    (fuzz.state, "run/resume/settings.json", "lr", "@deep"),
    (fuzz.dialogues, "preferences/dialogues.jsonl", "id", None),
    (fuzz.dialogues, "preferences/dialogues.jsonl", "ids/3", 2 ** 40),
    (fuzz.dialogues, "preferences/dialogues.jsonl", "turns/0", [30, 35, False]),
    (fuzz.revisions, "revisions/revisions.jsonl", "revision", "\ud800"),
    (fuzz.preferences, "preferences/action.jsonl", "label", "x" * 3000),
    (fuzz.logs, "policy/rollouts.jsonl", "scores", None),
    (fuzz.logs, "policy/metrics.jsonl", "objective/kl", "x")]


def refused(kit, tmp_path, reader, file: str, change) -> str:
    """What is said of a copy of the seeds in which `change` had the file."""
    fuzz.shutil.copytree(kit.seeds / file.split("/")[0], tmp_path / file.split("/")[0])
    path = change(tmp_path / file) or tmp_path / file
    with pytest.raises(VirtueError) as caught:
        reader(kit, path)
    said = str(caught.value)
    assert str(tmp_path) in said and fuzz.REMEDY.search(said) and len(said) < 2000
    assert said.isprintable()
    return said


@pytest.mark.parametrize(("reader", "file", "node", "value"), FOUND,
                         ids=lambda x: str(getattr(x, "__name__", x))[:40])
def test_what_was_found_stays_refused(kit, tmp_path, reader, file, node, value):
    def change(path):
        first, *rest = (path.read_text().splitlines() if path.suffix == ".jsonl"
                        else [path.read_text()])
        holder = root = [json.loads(first)]
        *way, last = [0, *(node.split("/") if "objective" not in node else [node])] if node else [0]
        for key in way:
            holder = holder[int(key) if isinstance(holder, list) else key]
        holder[int(last) if isinstance(holder, list) else last] = value
        text = json.dumps(root[0])
        path.write_text("\n".join([text.replace(f'"{value}"', fuzz.RAW[value])
                                   if str(value).startswith("@") else text, *rest]))
    refused(kit, tmp_path, reader, file, change)


@pytest.mark.parametrize(("reader", "file", "name"), [
    (fuzz.base, "base/model.safetensors", "model.norm.weight"),
    (fuzz.adapter, "rm/action/adapter_model.safetensors", "base_model.model.score.weight"),
    (fuzz.adapter, "sft/adapter_model.safetensors",
     "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
    (fuzz.state, "run/resume/*.safetensors", "optimizer/0/exp_avg")])
@pytest.mark.parametrize("harm", ["nan", "float8", "int", "shape", "gone"])
def test_odd_tensors_are_refused(kit, tmp_path, reader, file, name, harm):
    """With the checksum put right."""
    def change(path):
        path = sorted(path.parent.glob(path.name))[-1]
        with fuzz.safe_open(path, "pt") as opened:
            about = opened.metadata()
            tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
        t = tensors.pop(name)
        changed = {"nan": t * float("nan"), "float8": t.to(fuzz.torch.float8_e4m3fn),
                   "int": t.long(), "shape": t[None].clone()}
        data = fuzz.save(tensors | ({name: changed[harm]} if harm in changed else {}), about)
        path.write_bytes(data)
        return fuzz.sign(path, data)
    refused(kit, tmp_path, reader, file, change)


@pytest.mark.parametrize("command", sorted(set(fuzz.SCRIPTS.values())))
def test_scripts_take_sound_input_and_refuse_a_damaged_file(kit, tmp_path, command):
    """Exit status 0; and 2 with one line of error, where every file is half as long."""
    where = next(key for key, value in fuzz.SCRIPTS.items() if value == command)
    top = where.split("/")[0]
    files = [f for _, files in fuzz.READERS.values() for f in files if f.startswith(top + "/")]
    file = kit.seeds / (where if "." in where else files[0])
    sound = command.format(file=file, top=kit.seeds / top, seeds=kit.seeds)
    assert fuzz.through_script(sound, tmp_path / "out", refused=False, sound=True) is None
    fuzz.shutil.copytree(kit.seeds / top, tmp_path / top)
    for path in (p for p in (tmp_path / top).rglob("*") if p.is_file()):
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    again = command.format(file=tmp_path / file.relative_to(kit.seeds), top=tmp_path / top,
                           seeds=kit.seeds)
    assert fuzz.through_script(again, tmp_path / "out2", refused=True) is None
    assert not (tmp_path / "out2").exists()


def test_the_watch_sees_what_it_forbids(tmp_path):
    import pickle
    (tmp_path / "in").mkdir()
    fuzz.Watch.folder, fuzz.Watch.seen = str(tmp_path / "in"), []
    try:
        (tmp_path / "in/a").write_text("")
        (tmp_path / "b").write_text(""), (tmp_path / "b").unlink()
        pickle.loads(pickle.dumps(Path("x")))
        exec(compile("x = 1", str(tmp_path / "in/evil.py"), "exec"))
    finally:
        fuzz.Watch.folder = None
    kinds = list(dict.fromkeys(seen.split()[0] for seen in fuzz.Watch.seen))
    assert kinds == ["open", "os.remove", "pickle.find_class", "exec"]


def test_no_code_of_a_model_runs_and_nobody_is_asked(kit, tmp_path, monkeypatch):
    fuzz.shutil.copytree(kit.seeds / "base", tmp_path / "base")
    path = tmp_path / "base/tokenizer_config.json"
    # for models of known kinds transformers would pass over the code anyway
    (tmp_path / "base/config.json").unlink()
    evil = {"auto_map": {"AutoTokenizer": ["other/repo--evil.Evil", "evil.Evil"]},
            "tokenizer_class": "Evil"}
    path.write_text(json.dumps(json.loads(path.read_text()) | evil))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(VirtueError, match="custom code"):
        load_tokenizer(tmp_path / "base")
    assert not (kit.root / "evil").exists()


def test_a_small_file_that_unpacks_to_a_huge_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST", 1 << 20)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n' + b'"' + b"x" * (40 << 20)))
    with pytest.raises(VirtueError, match="line 2: .*longer than 1 MiB"):
        records.read_prompts(path)


# ---- nothing is unpickled, no text is run as code


def dangers(source: str) -> set[str]:
    """Calls and imports by which data could become code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = ({a.name for a in node.names} if isinstance(node, ast.Import)
                     else {node.module or ""})
            found |= {n for n in names
                      if n.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib",
                                             "shelve", "marshal", "yaml", "subprocess")}
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen",
                    "torch.hub.load", "torch.jit.load"):
            found.add(name)
        if name.rpartition(".")[2] in ("unsafe_load", "full_load", "all_gather_object",
                                       "broadcast_object_list", "gather_object",
                                       "scatter_object_list"):
            found.add(name)
        if (name == "torch.load" and given.get("weights_only") != "True" or "True"
            in (given.get("trust_remote_code"), given.get("allow_pickle"), given.get("shell"))):
            found.add(name)
    return found


def test_the_rule_sees_what_it_forbids():
    for bad in ("import pickle", "from yaml import load", "eval('1')", "torch.load(f)",
                "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)",
                "A.from_pretrained(x, trust_remote_code=True)", "dist.all_gather_object(a, b)",
                "def f():\n    exec(x)"):
        assert dangers(bad), bad
    assert not dangers("model.eval()\nre.compile('x')\ntorch.load(f, "
                       "weights_only=True)\nA.from_pretrained(x, trust_remote_code=False)")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_data_never_becomes_code(path):
    assert dangers(path.read_text(encoding="utf-8")) == set()


# ---- what data says cannot act where it is shown


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_models_and_data_is_neutral_where_it_is_shown(text, capsys):
    shown = side_by_side(text, {"sft": [text] * 3, "ppo": [text, "", "x"]})
    assert all(c.isprintable() or c == "\n" for c in shown) and printable(text).isprintable()
    for page in (html.clean(text), render(samples=[sample(0, text=text)], metrics=[])):
        assert not fuzz.CONTROL.search(page) and "<script" not in page and "<img" not in page
        page.encode()
    with pytest.raises(SystemExit):
        runtime.run_main(lambda: (_ for _ in ()).throw(VirtueError(f"{text}: wrong: give another")))
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.endswith(": wrong: give another\n")
    assert err[:-1].isprintable()
