"""File helpers: atomic writes (a temporary name, then a rename) and strict reading of tables."""

import csv
import json
import os
import re
import secrets
import shutil
import stat
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from fairdiff.errors import FairDiffError

MOST_MEGABYTES = 128
MOST_LINES = 1_000_000
# all but tab and line feed, and what Python and YAML take for the end of a line and an editor does not
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp(\.\w+)?")
A_DAY = 24 * 60 * 60  # seconds


@contextmanager
def atomic_path(path: Path, former: Path | None = None) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends without an error, else vanishes.

    It may become a file or a folder. What has the name once the block has ended outlives a loss of power. former: the
    name that what was at `path` goes on with. The temporary name keeps the suffix (numpy and parquet writers look at
    it) and is random: a process id is not unique among machines and containers. Missing parent folders are made.
    FairDiffError for what cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.tmp{path.suffix}")
    try:
        _make_folder(path.parent)
        yield temporary
        _sync(temporary)
        if former is not None and path.exists():
            os.replace(path, former)
        if temporary.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise _unwritten(path, error) from error
    finally:
        with suppress(OSError):  # of a disk that is gone; a leftover does no harm
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def _unwritten(path: Path, error: Exception) -> FairDiffError:
    reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
    return FairDiffError(
        f"{path}: cannot be written ({reason}); what is finished is kept, and the command goes on once it can be "
        "(without resume=false)"
    )


def _make_folder(folder: Path) -> None:
    new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for parent in new:
        _sync_folder(parent.parent)


def _sync(path: Path) -> None:
    """Have a file, or all of a folder, on the disk."""
    for inner in path.iterdir() if path.is_dir() else []:
        _sync(inner)
    if path.is_dir():
        _sync_folder(path)
    else:
        with path.open("r+b") as file:
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can do that: Windows and some network disks cannot."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder: Path, seconds: float = A_DAY) -> None:
    """Remove the temporary files in a folder that killed processes left there more than `seconds` ago."""
    for path in list(folder.glob(".*.tmp*")):
        with suppress(OSError):  # another process has removed it, or is about to give it its name
            if TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime >= seconds:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def require_writable(folder: Path, key: str) -> None:
    """Make a folder and remove what was left in it long ago; FairDiffError, beginning with `key`, if it takes no file."""
    probe = folder / f".probe.{secrets.token_hex(8)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise FairDiffError(
            f"{key}: {folder} cannot be written ({error.strerror}); allowed: a folder that can be, or null for none"
        ) from error
    remove_leftovers(folder)


def write_bytes(path: Path, data: bytes, former: Path | None = None) -> None:
    """Write bytes atomically; `former` as for `atomic_path`."""
    with atomic_path(path, former) as temporary:
        temporary.write_bytes(data)


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file; after a crash or on a full disk it may be cut short. FairDiffError if it cannot be."""
    try:
        with path.open("ab") as file:
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritten(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically, with Unix line ends."""
    write_bytes(path, text.encode())


def write_json(path: Path, value) -> None:
    """Write strict JSON atomically (ValueError on NaN or infinity: RFC 8259 has neither)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_given(path: Path, where: str, megabytes: int = MOST_MEGABYTES) -> str:
    """The text of a file that the user names: NFC, without a byte order mark, its lines (LF, CRLF or CR) ended by LF.

    FairDiffError, beginning with `where`: unreadable, no regular file, too long, not UTF-8, control characters.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # opening a pipe waits for a writer
            raise FairDiffError(f"{where}: cannot read it: it is a folder, a pipe or a device, allowed: a file")
        if about.st_size > megabytes * 10**6:
            size = f"{about.st_size / 10**6:,.0f}"
            raise FairDiffError(f"{where}: cannot read it: it has {size} MB, allowed: at most {megabytes}")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else reason
        raise FairDiffError(f"{where}: cannot read it: {reason}") from error
    if found := _CONTROL.search(text):
        number = text.count("\n", 0, found.start()) + 1
        raise FairDiffError(
            f"{where}, line {number}: found the control character U+{ord(found[0]):04X}; lines end with LF, CRLF or CR"
        )
    if (lines := text.count("\n")) > MOST_LINES:
        raise FairDiffError(f"{where}: holds {lines:,} lines, allowed: {MOST_LINES:,}")
    return unicodedata.normalize("NFC", text)


def read_table(text: str, where: str) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The columns of a CSV and its rows with their line numbers; a short row's missing cells are "".

    FairDiffError, beginning with `where`: a column twice, a quotation mark left open or out of place, a cell over
    several lines (a mark left open swallows what follows), more cells than columns.
    """
    table = csv.reader(text.split("\n"), skipinitialspace=True, strict=True)
    columns: list[str] = []
    rows = []
    before = 0
    try:
        for row in table:
            if table.line_num > before + 1:
                raise FairDiffError(
                    f"{where}, line {table.line_num}: a cell goes over several lines; a quotation mark?"
                )
            before += 1
            cells = [cell.strip() for cell in row]
            if not columns:
                columns = cells
            elif len(cells) > len(columns):
                raise FairDiffError(f"{where}, line {before}: found more cells than columns")
            elif cells:
                cells += [""] * (len(columns) - len(cells))
                rows.append((before, dict(zip(columns, cells, strict=True))))
    except csv.Error as error:
        raise FairDiffError(f"{where}, line {table.line_num}: is no CSV: {error}") from error
    if twice := [column for column, count in Counter(filter(None, columns)).items() if count > 1]:
        raise FairDiffError(f"{where}: the column {twice[0]} stands there twice")
    return columns, rows


class _Loader(yaml.SafeLoader):
    """YAML in which no key may stand twice, where PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        mapping = super().construct_mapping(node, deep)  # refuses what cannot be a key
        if twice := [key for key, count in Counter(keys).items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]} stands there twice", node.start_mark)
        return mapping


def read_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; FairDiffError, beginning with `where`, if it is none, has a key twice or nests too deep."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise FairDiffError(f"{where}: is nested too deep") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that is none
        raise FairDiffError(f"{where}: is not YAML: {' '.join(str(error).split())}") from error


def flat(tree, prefix: str = "") -> dict:
    """{"a.b": value} of nested mappings."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for key, item in tree.items() for k, v in flat(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }
