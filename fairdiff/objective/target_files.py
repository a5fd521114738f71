"""Read target files, CSV or YAML, with a joint table or a row for each prompt. The formats are:

Joint table       one row per cell: a column for each attribute and `share`, every combination of classes exactly once.
                      gender,race,share
                      female,White,0.10
                  YAML: the same rows as a list of mappings, or nested in the order of `attribute`:
                      female: {White: 0.10, Black: 0.20, ...}
                      male: {White: 0.15, ...}
Row per prompt    CSV: a column `prompt` (the whole text) or `subject`, and one column of marginal shares per class. Its
                  name is the class or, if two attributes have a class of that name, `attribute.class`. Attributes are
                  independent. An attribute without any column keeps its `target.<attribute>`.
                      subject,female,male
                      nurse,0.9,0.1
Joint per prompt  the columns of the joint table and `prompt` or `subject`: one whole table for each prompt or subject.

Columns may have any order, and `family` and `template` are ignored. Every prompt of people that is trained on, validated
or audited needs a row. The row `*` applies to all prompts without a row, and rows of other prompts are ignored.
`python scripts/target_file.py` writes a table to fill in.

A share is 0 or in [1e-06, 1], and shares sum to 1. A sum within 0.002 of 1, as rounded statistics have, is scaled to 1.
"""

import csv
import io
import math
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairdiff.errors import FairDiffError
from fairdiff.files import read_given, read_table, read_yaml
from fairdiff.objective.targets import Target
from fairdiff.prompts import Prompt

KEYS = ("prompt", "subject")
NOTES = ("family", "template")
ROUNDING = 2e-3
SMALLEST = 1e-6  # least share above 0: nobody draws a million images, and reciprocals of much smaller shares overflow
OTHERS = "*"  # the key of the row for prompts without a row of their own
YAML_MEGABYTES = 1  # a YAML file holds one joint table

Classes = dict[str, list[str]]  # attribute -> its classes, in the order of `attribute`
Rows = list[tuple[str, dict[str, Any]]]  # (place of the row in its file, its cells)


@dataclass(frozen=True)
class WrittenTarget:
    """The targets of a file by the values of its column `key` ("prompt", "subject"); if None, one target under ""."""

    source: str
    key: str | None
    targets: dict[str, Target]

    @property
    def attributes(self) -> tuple[str, ...]:
        return next(iter(self.targets.values())).attributes

    def of(self, prompt: Prompt) -> Target:
        """Return the target written for a prompt; KeyError if there is none."""
        key = self._key(prompt)
        return self.targets[key if key in self.targets or OTHERS not in self.targets else OTHERS]

    def require(self, prompts: Iterable[Prompt]) -> None:
        """Raise FairDiffError, naming the first few, if prompts have no row."""
        asked = dict.fromkeys(map(self._key, prompts))
        missing = [key for key in asked if key not in self.targets]
        if missing and OTHERS not in self.targets:
            few = ", ".join(f"'{key}'" for key in missing[:5]) + (f" and {len(missing) - 5} more" if missing[5:] else "")
            raise FairDiffError(
                f"{self.source}: no row for {len(missing)} of {len(asked)} {self.key}s: {few}; allowed: a row for each, or "
                f"a row {OTHERS} for all others; `python scripts/target_file.py` writes all into another target.file"
            )

    def _key(self, prompt: Prompt) -> str:
        return "" if self.key is None else prompt.text if self.key == "prompt" else prompt.subject


def read_target(path: str | Path, classes: Classes, others: Iterable[str] = ()) -> WrittenTarget:
    """Read a target file of any form above; columns `attribute.class` of the attributes in `others` are ignored.

    Raises a FairDiffError of one line that names the file and the row or column. Reasons: the file is unreadable or empty,
    a column or class is missing or unknown, a cell or key is missing or repeated, a share is no number in the allowed
    range, shares do not sum to 1.
    """
    path, where = Path(path), f"target.file: {path}"
    if path.suffix not in (".csv", ".yaml", ".yml"):
        raise FairDiffError(f"{where}: found the ending '{path.suffix}', allowed: .csv, .yaml, .yml")
    if path.suffix != ".csv":
        return _nested(read_yaml(read_given(path, where, YAML_MEGABYTES), where), classes, where)
    found, table = read_table(read_given(path, where), where)
    columns = [column for column in found if column.split(".")[0] not in others or "." not in column]
    return _written(where, columns, [(f"line {number}", cells) for number, cells in table], classes)


def table_to_fill_in(subjects: Iterable[str], shares: dict[str, dict[str, float]]) -> str:
    """Return the text of a CSV with a row for each subject; `shares`: attribute -> class -> share in every row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["subject", *(f"{name}.{cls}" for name, classes in shares.items() for cls in classes)])
    row = [f"{share:g}" for classes in shares.values() for share in classes.values()]
    writer.writerows([subject, *row] for subject in subjects)
    return text.getvalue()


def _nested(value: Any, classes: Classes, where: str) -> WrittenTarget:
    """Read the joint table of a YAML value: a list of rows, or shares nested in the order of the attributes."""
    if isinstance(value, dict):
        rows = _flat(where, value, list(classes))
    elif isinstance(value, list) and all(isinstance(row, dict) for row in value):
        rows = [(f"row {i}", {str(k): _scalar(v) for k, v in row.items()}) for i, row in enumerate(value, 1)]
    else:
        raise FairDiffError(f"{where}: found {reprlib.repr(value)}, allowed: a list of rows or nested shares")
    columns = list(dict.fromkeys(column for _, cells in rows for column in cells))
    return _written(where, columns, rows, classes)


def _scalar(value: Any) -> Any:
    """Return the value, or a short text for a list or mapping, which aliases may make far longer than the file."""
    return reprlib.repr(value) if isinstance(value, dict | list | set) else value


def _flat(where: str, value: Any, names: list[str], above: tuple[str, ...] = ()) -> Rows:
    """Return nested mappings as rows with a cell for each level."""
    if len(above) == len(names):
        return [(" × ".join(above), dict(zip(names, above, strict=True)) | {"share": value})]
    if not isinstance(value, dict):
        place = " × ".join(above)
        raise FairDiffError(
            f"{where}, {place}: found {reprlib.repr(value)}, allowed: a share for each class of {names[len(above)]}"
        )
    return [row for name, below in value.items() for row in _flat(where, below, names, (*above, str(name)))]


def _written(where: str, columns: list[str], rows: Rows, classes: Classes) -> WrittenTarget:
    if not rows:
        raise FairDiffError(f"{where}: holds no rows")
    keys = [column for column in KEYS if column in columns]
    share_columns = [column for column in columns if column not in (*keys, *NOTES)]
    if "share" in columns:
        _check_joint_columns(where, share_columns, classes)
        parts: dict[str, Rows] = {}
        for place, cells in rows:
            parts.setdefault(_key(f"{where}, {place}", cells, keys), []).append((place, cells))
        targets = {key: _joint(f"{where}, '{key}'" if key else where, part, classes) for key, part in parts.items()}
        return WrittenTarget(where, keys[0] if keys else None, targets)
    if not keys:
        raise FairDiffError(f"{where}: needs a column share, prompt or subject, found {', '.join(columns)}")
    chosen = _class_columns(where, share_columns, classes)
    targets: dict[str, Target] = {}
    known: dict[tuple[str, ...], Target] = {}  # rows of equal shares have the same target object
    for place, cells in rows:
        key = _key(f"{where}, {place}", cells, keys)
        if key in targets:
            raise FairDiffError(f"{where}, {place}: the {keys[0]} '{key}' stands there twice")
        shares = tuple(str(cells.get(column)) for column in share_columns)
        if shares not in known:
            known[shares] = _marginals(f"{where}, {place} ('{key}')", cells, chosen)
        targets[key] = known[shares]
    return WrittenTarget(where, keys[0], targets)


def _key(where: str, cells: dict[str, Any], keys: list[str]) -> str:
    if keys and not cells.get(keys[0]):
        raise FairDiffError(f"{where}: the cell {keys[0]} is empty")
    return str(cells[keys[0]]) if keys else ""


def _check_joint_columns(where: str, columns: list[str], classes: Classes) -> None:
    allowed = [*classes, "share"]
    for column in columns:
        if column not in allowed:
            raise FairDiffError(f"{where}: found the column {column}, allowed: {', '.join(allowed)}")
    for name in classes:
        if name not in columns:
            raise FairDiffError(f"{where}: no column {name}, found {', '.join(columns)}")


def _joint(where: str, rows: Rows, classes: Classes) -> Target:
    table = np.full([len(names) for names in classes.values()], math.nan)
    for place, cells in rows:
        found = {name: str(cells.get(name, "")) for name in classes}
        for name, cls in found.items():
            if cls not in classes[name]:
                raise FairDiffError(f"{where}, {place}: {name}: found '{cls}', allowed: {', '.join(classes[name])}")
        cell = tuple(classes[name].index(cls) for name, cls in found.items())
        if not math.isnan(table[cell]):
            raise FairDiffError(f"{where}, {place}: {' × '.join(found.values())} stands there twice")
        table[cell] = _share(f"{where}, {place}: share", cells.get("share"))
    missing = np.argwhere(np.isnan(table))
    if len(missing):
        names = [names[i] for names, i in zip(classes.values(), missing[0], strict=True)]
        raise FairDiffError(f"{where}: no share for {' × '.join(names)}")
    return Target(tuple(classes), _scaled(where, table))


def _class_columns(where: str, columns: list[str], classes: Classes) -> dict[str, list[str]]:
    """Return attribute -> its column for each class, for the attributes that have columns."""
    chosen: dict[tuple[str, str], str] = {}
    allowed = [f"{name}.{cls}" for name, names in classes.items() for cls in names]
    for column in columns:
        owners = [(n, c) for n, names in classes.items() for c in names if column in (c, f"{n}.{c}")]
        if len(owners) != 1 or owners[0] in chosen:
            reason = "" if not owners else ", which says no class or one that has a column already"
            raise FairDiffError(f"{where}: found the column {column}{reason}, allowed: {', '.join([*KEYS, *allowed])}")
        chosen[owners[0]] = column
    if not chosen:
        raise FairDiffError(f"{where}: no column of shares, allowed: {', '.join(allowed)}")
    chosen_names = dict.fromkeys(name for name, _ in chosen)
    missing = [f"{name}.{cls}" for name in chosen_names for cls in classes[name] if (name, cls) not in chosen]
    if missing:
        raise FairDiffError(f"{where}: no column for {missing[0]}, found {', '.join(columns)}")
    return {name: [chosen[name, cls] for cls in classes[name]] for name in classes if name in chosen_names}


def _marginals(where: str, cells: dict[str, Any], chosen: dict[str, list[str]]) -> Target:
    shares = {
        name: _scaled(f"{where}: {name}", np.array([_share(f"{where}: {c}", cells.get(c)) for c in columns]))
        for name, columns in chosen.items()
    }
    return Target.from_marginals(shares)


def _share(where: str, found: Any) -> float:
    try:
        value = float(found)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if isinstance(found, bool) or not (value == 0 or SMALLEST <= value <= 1):
        raise FairDiffError(f"{where}: found {reprlib.repr(found)}, allowed: 0, or a number in [{SMALLEST:g}, 1]")
    return value


def _scaled(where: str, shares: np.ndarray) -> np.ndarray:
    total = float(shares.sum())
    if abs(total - 1) > ROUNDING:
        raise FairDiffError(f"{where}: shares sum to {total:.6g}, allowed: 1")
    return shares / total
