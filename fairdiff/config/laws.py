"""What a single value may be; else a FairDiffError of one line."""

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
