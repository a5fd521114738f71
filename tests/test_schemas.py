"""The code that fills a cache has a schema number: if the code changes, the number or its hash must change.

A cache is keyed by settings and weights, and by the SCHEMA of the code. Code that makes other content of the same
settings under the same number would be handed what the old code made.
"""

import ast
import hashlib
from pathlib import Path

import pytest

from fairdiff.audit import records
from fairdiff.training import originals

ROOT = Path(__file__).resolve().parent.parent
SAMPLING = {f"fairdiff/diffusion/{name}.py": () for name in ("sampling", "solvers", "denoise")}
SAMPLING |= {"classifiers/crop.py": ()}
# cache -> (its module, {file: its functions, () for all of it})
FILLED_BY = {
    "originals": (
        originals,
        {"fairdiff/training/originals.py": ("get", "made_with", "_made", "measure", "_read", "_write")}
        | {"fairdiff/objective/perception.py": ()}
        | SAMPLING,
    ),
    "records": (records, {"fairdiff/audit/measure.py": (), "fairdiff/audit/generate.py": ()} | SAMPLING),
}
# cache -> {SCHEMA: what `code` said of it}
HELD = {
    "originals": {1: "a2c5ee3c116e8165"},
    "records": {3: "c9ff831d85430da5"},
}


def tree(node: object) -> object:
    """Return the syntax tree without comments, docstrings and differences between versions of Python."""
    if isinstance(node, list):
        return [tree(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, []) and name != "kind"}
    body = fields.get("body")
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = body[1:]
    return [type(node).__name__, {name: tree(value) for name, value in fields.items()}]


def code(files: dict[str, tuple[str, ...]]) -> str:
    """Return the first hex digits of the SHA-256 of these files, or of some of their functions."""
    said = []
    for file, names in sorted(files.items()):
        module = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {n.name: n for n in ast.walk(module) if isinstance(n, ast.FunctionDef)}
        said.append([file, *(tree(functions[name]) for name in names)] if names else [file, tree(module)])
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


@pytest.mark.parametrize("cache", FILLED_BY)
def test_code_that_fills_a_cache_does_not_change_under_its_schema(cache):
    module, files = FILLED_BY[cache]
    found, held = code(files), HELD[cache].get(module.SCHEMA)
    assert found == held, (
        f"{cache}: the code that fills the cache ({', '.join(files)}) is another than that of SCHEMA = {module.SCHEMA}. "
        f"If the same settings now fill it with other content, raise SCHEMA in {module.__name__}; in any case write the "
        f"hash here: HELD['{cache}'] = {{<SCHEMA>: '{found}'}}. If the content is the same, only update the hash."
    )


def test_words_are_no_code_and_numbers_are():
    said = [
        tree(ast.parse(text))
        for text in (
            'def f(x):\n    """One."""\n    return x + 1  # more\n',
            'def f(x):\n    """Another."""\n\n    return (\n        x + 1\n    )\n',
            "def f(x):\n    return x + 1\n",
            "def f(x):\n    return x + 2\n",
        )
    ]
    assert said[0] == said[1] == said[2] != said[3]
