"""Checks of single values; a failed check raises a FairDiffError of one line."""

import math
from collections.abc import Iterator
from typing import Any

from fairdiff.errors import FairDiffError


def one_of(key: str, found: Any, allowed: list[Any]) -> None:
    """FairDiffError unless `found` is one of `allowed`."""
    if found not in allowed:
        raise FairDiffError(f"{key}: found {found}, allowed: {', '.join(map(str, allowed))}")


def text(key: str, *values: Any) -> None:
    """FairDiffError for a value that is no text, as YAML makes of some words."""
    for value in values:
        if not isinstance(value, str):
            raise FairDiffError(
                f"{key}: found {value} ({type(value).__name__}), allowed: text; quote it, for YAML reads an unquoted yes, "
                "no, on, off or number as something else"
            )


def positive(key: str, *values: float | None) -> None:
    """FairDiffError unless every value that is set is greater than 0."""
    for value in values:
        if value is not None and not value > 0:
            raise FairDiffError(f"{key}: found {value}, allowed: greater than 0")


def between(key: str, value: float, low: float, high: float) -> None:
    """FairDiffError unless low <= value <= high."""
    if not low <= value <= high:
        raise FairDiffError(f"{key}: found {value}, allowed: {low} to {high}")


def leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b", value) of nested mappings and lists; items of a list have the list's key."""
    if isinstance(tree, dict):
        for name, below in tree.items():
            yield from leaves(below, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for item in tree:
            yield from leaves(item, key)
    else:
        yield key, tree


def finite(key: str, found: Any) -> None:
    """FairDiffError for a number that is none or without end."""
    if isinstance(found, float) and not math.isfinite(found):
        raise FairDiffError(f"{key}: found {found}, allowed: a finite number")


def no_empty_path(key: str, found: Any) -> None:
    """FairDiffError for an empty path, as of a shell variable that is not set."""
    if isinstance(found, str) and not found.strip():
        raise FairDiffError(f"{key}: found an empty path, allowed: a path, or null where there is none")
