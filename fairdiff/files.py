"""Write files atomically (to a temporary name that is then renamed), and read CSV and YAML files strictly."""

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
# control characters except tab and line feed, and the line ends of Python and YAML that editors do not show as such
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp(\.\w+)?")
A_DAY = 24 * 60 * 60  # seconds


@contextmanager
def atomic_path(path: Path, former: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed to `path` if the block ends without an error and removed otherwise.

    The block may make it a file or a folder. The result is synced to disk, so that it survives a loss of power. former: new
    name of the previous file at `path`. The temporary name keeps the suffix, which numpy and parquet writers look at. It is
    random, because a process id is not unique among machines and containers. Missing parent folders are made. Raises
    FairDiffError if it cannot be written.
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
        with suppress(OSError):  # the disk may be gone, and a leftover does no harm
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
    """Sync a file, or a folder with its content, to disk."""
    for inner in path.iterdir() if path.is_dir() else []:
        _sync(inner)
    if path.is_dir():
        _sync_folder(path)
    else:
        with path.open("r+b") as file:
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Sync the file names of a folder to disk, if the system can: Windows and some network disks cannot."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder: Path, seconds: float = A_DAY) -> None:
    """Remove the temporary files that killed processes left in a folder more than `seconds` ago."""
    for path in list(folder.glob(".*.tmp*")):
        with suppress(OSError):  # another process may have removed or renamed it
            if TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime >= seconds:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def require_writable(folder: Path, key: str) -> None:
    """Make a folder and remove old leftovers in it; FairDiffError, beginning with `key`, if no file can be written there."""
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
    """Append a line to a text file; FairDiffError if it cannot be. A crash or a full disk may leave a truncated line."""
    try:
        with path.open("ab") as file:
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritten(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically, without changing its line ends."""
    write_bytes(path, text.encode())


def write_json(path: Path, value) -> None:
    """Write strict JSON atomically; ValueError for NaN and infinity, which RFC 8259 does not have."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_given(path: Path, where: str, megabytes: int = MOST_MEGABYTES) -> str:
    """Return the text of a user's file in NFC, without a byte order mark, with LF for the line ends LF, CRLF and CR.

    Raises FairDiffError, beginning with `where`, if the file cannot be read, is no regular file, is too long, is not UTF-8
    or has control characters.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # opening a pipe would wait for a writer
            raise FairDiffError(f"{where}: cannot read it: it is a folder, a pipe or a device, allowed: a file")
        if about.st_size > megabytes * 10**6:
            size = f"{about.st_size / 10**6:,.0f}"
            raise FairDiffError(f"{where}: cannot read it: it has {size} MB, allowed: at most {megabytes}")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: a file name with a zero byte
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
    """Return the columns of a CSV, and its rows with their line numbers; missing cells of a short row are "".

    Raises FairDiffError, beginning with `where`, for a repeated column, a quotation mark that is not closed or out of place,
    a cell over several lines (as an open quotation mark makes), and more cells than columns.
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
    """A YAML loader that refuses a repeated key, where PyYAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        mapping = super().construct_mapping(node, deep)  # raises for values that cannot be keys
        if twice := [key for key, count in Counter(keys).items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]} stands there twice", node.start_mark)
        return mapping


def read_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text; FairDiffError, beginning with `where`, for no YAML, repeated keys or deep nesting."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise FairDiffError(f"{where}: is nested too deep") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date or number
        raise FairDiffError(f"{where}: is not YAML: {' '.join(str(error).split())}") from error


def flat(tree, prefix: str = "") -> dict:
    """Return nested mappings as one mapping with dotted keys, {"a.b": value}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for key, item in tree.items() for k, v in flat(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }
