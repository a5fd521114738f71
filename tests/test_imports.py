"""Allowed imports between packages, checked in the source with ast."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p for folder in ("fairdiff", "classifiers") for p in (ROOT / folder).rglob("*.py"))
EVERYBODY = {"errors", "files", "prompts", "fingerprint", "bias", "distributed"}
ROOMS = {  # package or module of fairdiff -> what else of fairdiff it may import
    "errors": set(),
    "files": {"errors"},
    "prompts": {"errors", "files"},
    "bias": set(),
    "fingerprint": set(),
    "lock": {"errors"},
    "hub": {"errors"},
    "distributed": {"errors"},
    "config": {"errors"},
    "diffusion": {"errors", "files", "fingerprint"},
    "objective": EVERYBODY,
    "portraits": EVERYBODY,
    "audit": {"errors", "files", "bias", "distributed"},
    "training": EVERYBODY | {"diffusion", "objective"},
    "studies": EVERYBODY | {"diffusion", "objective", "training", "portraits", "audit"},  # of scripts
    "compare": {"errors", "files", "audit", "studies", "run", "cli", "training"},
    "plan": EVERYBODY | {"config", "objective", "portraits"},
    "builder": EVERYBODY
    | {"config", "plan", "pictures", "diffusion", "objective", "training", "portraits", "audit"},
    "pictures": {"errors", "files", "prompts"},
    "describe": EVERYBODY
    | {"config", "plan", "pictures", "builder", "diffusion", "training", "audit"},
    "run": EVERYBODY | {"builder", "diffusion", "training", "audit"},
    "jobs": {"config", "plan", "pictures", "builder", "describe", "run", "cli", "hub"}
    | {"audit", "training", "lock", "distributed", "errors"},
    "view": EVERYBODY | {"cli", "plan", "builder", "diffusion", "training", "audit"},
    "start": {"jobs", "view", "compare"},
    "library": EVERYBODY
    | {"cli", "config", "plan", "builder", "run", "jobs", "diffusion", "training", "portraits", "audit"},
    "": {"library", "audit"},  # fairdiff/__init__.py, which imports nothing heavy before it is used
    "cli": {"config", "errors"},
}
HYDRA = {"config", "cli"}  # the rooms that know hydra and omegaconf


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def reaches(path: Path, *prefixes: str) -> set[str]:
    return {n for n in imports(path) if any(n == p or n.startswith(p + ".") for p in prefixes)}


def room(path: Path) -> str:
    """The package below fairdiff in which a module lies, or the module itself; "" for fairdiff's own __init__."""
    return path.relative_to(ROOT / "fairdiff").parts[0].removesuffix(".py").replace("__init__", "")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_arrows(path):
    if name(path).startswith("classifiers/"):
        assert not reaches(path, "fairdiff", "hydra", "omegaconf", "diffusers")
        return
    here = room(path)
    neighbours = {n.split(".")[1] for n in imports(path) if n.startswith("fairdiff.")} - {here}
    assert neighbours <= ROOMS.get(here, set()), f"{here} imports {neighbours - ROOMS.get(here, set())}"
    if here not in HYDRA:
        assert not reaches(path, "hydra", "omegaconf")
    if name(path) == "fairdiff/objective/targets.py":  # its tests take milliseconds
        assert not reaches(path, "torch", "diffusers", "transformers", "fairdiff.prompts")


def test_every_room_says_what_lives_there():
    for folder in {path.parent for path in MODULES}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))), folder


def test_the_test_sees_the_house():
    assert len(MODULES) > 15 and "fairdiff.objective.targets" in imports(ROOT / "fairdiff" / "training" / "step.py")


def text_without_encoding(path: Path) -> list[int]:
    """Return the lines that read or write text in the default encoding of the machine."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        modes = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
        binary = any(isinstance(mode, str) and "b" in mode and len(mode) < 4 for mode in modes)
        if called == "read_text" or (called == "write_text" and isinstance(node.func, ast.Attribute)):
            found.append(node.lineno)
        elif called == "open" and not binary and owner not in ("Image", "os"):  # os.open opens no text
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "scripts").rglob("*.py")), ROOT / "train.py"], ids=name)
def test_every_text_names_its_encoding(path):
    assert not text_without_encoding(path), "encoding='utf-8', or fairdiff.files"
