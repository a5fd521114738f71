"""Files: what is written is whole or absent (a temporary name, then renamed), and tables are read without guessing."""

import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fairdiff.errors import FairDiffError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends without an error, else vanishes.

    The temporary name keeps the suffix (numpy and parquet writers look at it); missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically, with Unix line ends."""
    write_bytes(path, text.encode())


def write_json(path: Path, value) -> None:
    """Write strict JSON atomically (ValueError on NaN or infinity: RFC 8259 has neither)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_given(path: Path, where: str) -> str:
    """The text of a file that the user names, without a byte order mark; FairDiffError, beginning with `where`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise FairDiffError(f"{where}: cannot read it: {reason}") from error


def read_table(text: str, where: str) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The columns of a CSV and its rows with their line numbers; a short row's missing cells are "".

    FairDiffError, beginning with `where`: a quotation mark left open or out of place, a cell over several lines (a mark
    left open swallows what follows), more cells than columns.
    """
    # universal newlines inside quoted cells are csv's own business, hence keepends
    table = csv.DictReader(text.splitlines(keepends=True), skipinitialspace=True, strict=True)
    rows = []
    try:
        for row in table:
            if None in row:  # where csv puts the cells beyond the last column
                raise FairDiffError(f"{where}, line {table.line_num}: found more cells than columns")
            cells = {column: (cell or "").strip() for column, cell in row.items()}
            if any("\n" in cell or "\r" in cell for cell in cells.values()):
                raise FairDiffError(
                    f"{where}, line {table.line_num}: a cell goes over several lines; a quotation mark?"
                )
            rows.append((table.line_num, cells))
    except csv.Error as error:
        raise FairDiffError(f"{where}, line {table.line_num}: is no CSV: {error}") from error
    return list(table.fieldnames or []), rows


def flat(tree, prefix: str = "") -> dict:
    """{"a.b": value} of nested mappings."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for key, item in tree.items() for k, v in flat(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }
