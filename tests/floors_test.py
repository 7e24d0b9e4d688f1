"""The floors of docs/design.md: imports go to a lower floor or stay in their folder."""

import ast
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "peftax"
FLOORS = {
    "ops": 0,
    "models": 1,
    "data": 1,
    "core": 1,
    "processes": 1,
    "methods/inits": 2,
    "machines": 2,
    "sharding": 2,
    "methods": 3,
    "weights": 4,
    "train": 5,
    "catalog": 4,
    "combination": 4,
    "mixed_batch": 4,
    "recipe": 4,
    "plan": 6,
    "sweep": 6,
    "engines": 5,
    "results": 7,
    "report": 8,
    "selection": 8,
    "cli": 9,
    "": 10,  # peftax/__init__.py, which re-exports
}
OUTSIDE = ("tests", "experiments", "launch")


def home(parts: tuple[str, ...]) -> str:
    """The folder (or file of the top level) that a module belongs to."""
    if parts[:2] == ("methods", "inits"):
        return "methods/inits"
    return parts[0] if parts else ""


def imports(file: Path, root: Path) -> list[tuple[int, tuple[str, ...]]]:
    """(line, module without "peftax") of every import of the package or of what must stay outside, lazy ones too."""
    found = []
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, tuple(a.name.split("."))) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                base = ("peftax", *package[: len(package) - node.level + 1], *base)
            for alias in node.names:  # `from peftax.core import tree` names a module, `from x import f` does not
                found.append((node.lineno, (*base, alias.name) if _is_module(base, alias.name, root) else base))
    return [(line, m[1:]) if m[:1] == ("peftax",) else (line, m) for line, m in found if m[0] in ("peftax", *OUTSIDE)]


def _is_module(base: tuple[str, ...], name: str, root: Path) -> bool:
    at = root.joinpath(*base[1:], name)
    return base[:1] == ("peftax",) and (at.is_dir() or at.with_suffix(".py").exists())


def violations(root: Path) -> list[str]:
    bad = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if parts[-1] == "utils" or "utils" in parts[:-1]:
            bad.append(f"{file.name}: files are nouns; what is in it?")
        here = home(parts if parts[-1] != "__init__" else parts[:-1])
        if here not in FLOORS:
            bad.append(f"{'/'.join(parts)}: has no floor")
            continue
        for line, module in imports(file, root):
            said = f"{'/'.join(parts)}.py:{line} imports {'.'.join(module) or 'peftax'}"
            there = home(module)
            if module[:1] and module[0] in OUTSIDE:
                bad.append(f"{said}: outside the package")
            elif there not in FLOORS:
                bad.append(f"{said}: has no floor")
            elif here == there == "methods" and parts[-1] != "__init__":
                bad.append(f"{said}: methods never import each other")
            elif here != there and FLOORS[there] >= FLOORS[here]:
                bad.append(f"{said}: floor {FLOORS[here]} imports floor {FLOORS[there]}")
    return bad


def test_imports_go_down():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    "file, line, why",
    [
        ("ops/product.py", "from peftax.core import tree", "floor 0 imports floor 1"),
        ("core/tree.py", "from peftax import models", "floor 1 imports floor 1"),
        ("core/tree.py", "import peftax", "floor 1 imports floor 10"),
        ("core/views.py", "from ..methods import lora", "floor 1 imports floor 3"),
        ("methods/bitfit.py", "from peftax.methods.lora import AXES", "never import each other"),
        ("methods/bitfit.py", "from . import full", "never import each other"),
        ("methods/inits/__init__.py", "from peftax import sharding", "floor 2 imports floor 2"),
        ("sharding.py", "def f():\n    from peftax.train import step", "floor 2 imports floor 5"),
        ("train/step.py", "from tests.data import tiny", "outside the package"),
        ("train/step.py", "import launch", "outside the package"),
        ("core/utils.py", "", "files are nouns"),
        ("misc/thing.py", "", "has no floor"),
    ],
)
def test_a_bad_import_is_found(tmp_path, file, line, why):
    root = tmp_path / "peftax"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns("__pycache__"))
    target = root / file
    target.parent.mkdir(exist_ok=True)
    target.write_text((target.read_text() if target.exists() else "") + f"\n{line}\n")
    found = sorted(set(violations(root)) - set(violations(ROOT)))
    assert len(found) == 1 and why in found[0], found
