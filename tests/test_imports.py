"""pytest tests/test_imports.py: who may import whom, read from the source and seen at run time."""
import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
CORE = ("masked", "logprobs", "preference", "ensemble", "ppo", "randomness")
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
            whole = base in ("virtue", "virtue.plumbing", "virtue.evaluation", "virtue.toy",
                              "virtue.real")
            names |= {f"{base}.{a.name}" for a in node.names} if whole else {base}
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
    assert (
        outside_core(
            "from virtue.masked import whiten\nfrom virtue import ppo\n"
            "from . import logprobs\nfrom .masked import x\nimport torch.nn, os"
        )
        == set()
    )
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


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def rank(name: str) -> int:
    """Core 0, method 1, the toy and the real model 2, plumbing and evaluation 3."""
    folder = {"toy": 2, "real": 2, "plumbing": 3, "evaluation": 3}
    parts = name.split(".")
    if len(parts) == 1:  # the package itself: names and errors
        return 0
    return folder.get(parts[1], 0 if parts[1] in CORE else 1)


MODULES = {module(path): path for path in PACKAGE}
GRAPH = {name: {n for n in imports(path.read_text(encoding="utf-8")) if n in MODULES} - {name}
         for name, path in MODULES.items()}


@pytest.mark.parametrize("name", MODULES)
def test_dependencies_point_from_the_plumbing_to_the_method(name):
    """Imports inside functions count, too."""
    assert {n for n in GRAPH[name] if rank(n) > rank(name)} == set()


def test_no_module_imports_itself_by_way_of_others():
    def below(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name):], name))
        for other in GRAPH[name]:
            below(other, (*path, name))

    # The graph sees something
    assert GRAPH["virtue.plumbing.resume"] >= {"virtue.plumbing.artefacts"}
    for name in GRAPH:
        below(name, ())


def test_the_package_says_what_each_module_of_the_method_is_for():
    text = ast.get_docstring(ast.parse((ROOT / "virtue/__init__.py").read_text("utf-8")))
    listed = [line.split(".py")[0].strip() for line in text.splitlines() if ".py " in line]
    there = {path.stem for path in (ROOT / "virtue").glob("*.py")} - {"__init__"}
    assert set(listed) == there and len(listed) == len(there)
