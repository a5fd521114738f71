"""The arrows of the house: who may import whom, read off the source with ast."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p for folder in ("fairdiff", "classifiers") for p in (ROOT / folder).rglob("*.py"))
CONFIGURED = {f"fairdiff/{m}.py" for m in ("asked", "build", "build_audit", "run", "cli")}  # may know the configuration
FLOW = ["prompts", "sampling", "features", "targets", "losses"]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def reaches(path: Path, *prefixes: str) -> set[str]:
    return {n for n in imports(path) if any(n == p or n.startswith(p + ".") for p in prefixes)}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_arrows(path):
    place = name(path)
    if place.startswith("classifiers/"):
        assert not reaches(path, "fairdiff", "hydra", "omegaconf", "diffusers")
    schema = place.startswith("fairdiff/config/")
    if place != "fairdiff/cli.py" and not schema:
        assert not reaches(path, "hydra", "omegaconf")
    if place not in CONFIGURED and not schema:
        assert not reaches(path, "fairdiff.config", "fairdiff.cli", "fairdiff.asked", "fairdiff.build")
    if place.startswith("fairdiff/audit/"):
        assert not reaches(path, *(f"fairdiff.{m}" for m in ("trainer", "step", "losses", "targets")))
    if place in {f"fairdiff/{m}.py" for m in FLOW}:
        assert not reaches(path, *(f"fairdiff.{m}" for m in FLOW))
    if place == "fairdiff/targets.py":
        assert not reaches(path, "torch", "diffusers", "transformers")


def test_the_test_sees_the_house():
    assert len(MODULES) > 15 and "fairdiff.targets" in imports(ROOT / "fairdiff" / "step.py")
