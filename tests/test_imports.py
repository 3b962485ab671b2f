"""pytest tests/test_imports.py: who may import whom, read from the source and seen at run time."""
import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
CORE = ("masked", "logprobs", "preference", "ensemble", "ppo", "stats")
PACKAGE = sorted((ROOT / "virtue").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("run_*.py"))


def imports(source: str, package: str = "virtue") -> set[str]:
    """Dotted names of all that `source` imports, at any depth, relative imports resolved."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")  # one dot is the package itself, each further one its parent
            above = above[:len(above) - node.level + 1] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            # `from virtue import ppo` names a module, `from virtue.ppo import gae` does not
            names |= {f"{base}.{a.name}" for a in node.names} if base == "virtue" else {base}
    return names


def outside_core(source: str) -> set[str]:
    """What a core module may not import."""
    # the package's own name stands for virtue/__init__.py
    allowed = {f"virtue.{name}" for name in (*CORE, "AGGREGATORS")}
    free = {"torch", "numpy"} | set(sys.stdlib_module_names)
    return {n for n in imports(source) if n.split(".")[0] not in free and n not in allowed}


def scripts_in(source: str) -> set[str]:
    return {n for n in imports(source) if any(part.startswith("run_") for part in n.split("."))}


def test_the_rules_see_what_they_forbid():
    assert outside_core("from virtue.masked import whiten\nfrom virtue import ppo\n"
                        "from . import stats\nfrom .masked import x\nimport torch.nn, os") == set()
    assert outside_core("def f():\n    import transformers") == {"transformers"}
    assert outside_core("from virtue.lora import x") == {"virtue.lora"}
    assert outside_core("from virtue import ppo, lora, toy") == {"virtue.lora", "virtue.toy"}
    assert outside_core("from . import toy\nfrom .lora import y") == {"virtue.toy", "virtue.lora"}
    assert imports("from .. import lora", "virtue.toy") == {"virtue.lora"}
    assert scripts_in("if 1:\n    from run_ppo import main") == {"run_ppo"}
    assert scripts_in("import run_data, torch") == {"run_data"}


@pytest.mark.parametrize("name", CORE)
def test_core_imports_torch_numpy_stdlib_and_core_only(name):
    assert outside_core((ROOT / "virtue" / f"{name}.py").read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("path", PACKAGE + SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_a_script(path):
    assert scripts_in(path.read_text(encoding="utf-8")) == set()


def test_importing_the_core_loads_no_heavy_library():
    code = (f"import sys, {', '.join(f'virtue.{name}' for name in CORE)}\n"
            "print(sorted({'transformers', 'bitsandbytes'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_what_make_oldest_and_newest_install_are_versions_that_pyproject_admits():
    def pins(name):
        text = (ROOT / name).read_text()
        required = [Requirement(line) for line in text.splitlines() if not line.startswith("#")]
        return {r.name: r.specifier for r in required}

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = project["dependencies"] + project["optional-dependencies"]["report"]
    for wanted in map(Requirement, dependencies):
        low, = (s.version for s in wanted.specifier if s.operator == ">=")
        oldest, pinned, newest = (next(iter(pins(f"requirements{end}.txt")[wanted.name])).version
                                  for end in ("-oldest", "", "-newest"))
        assert oldest.removesuffix(".0") == low, wanted
        assert pinned in wanted.specifier and newest in wanted.specifier, wanted


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_room_it_is_in(path):
    core = path.stem in CORE or path == ROOT / "virtue/__init__.py"
    room = ("Core" if core else "Toy" if path.parent.name == "toy" else "Modules"
            if path.stem in ("lora", "models") else "Shell")
    *_, blank, last = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()
    assert not blank and last.startswith(f"{room}: ")
