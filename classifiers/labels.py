"""Read the labels of a folder of faces as file names and class indices: a CSV, FairFace's layout or CelebA's.

    labels.csv                             image, one column for each attribute, optionally split (train, val)
    fairface_label_train.csv, _val.csv     file, age, gender, race (Karkkainen & Joo, WACV 2021)
    list_attr_celeba.txt                   Male and Young of img_align_celeba/ or img_celeba/, with list_eval_partition.txt
                                           for the split if it is there (Liu et al., ICCV 2015)

No image is opened. ValueErrors of one line name the file and the line.
"""

import csv
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

# Label of a data set -> class. Seven races to four: Shen et al. 2024, section 5. The age at which old begins is our choice.
FAIRFACE = {
    "gender": {"Female": "female", "Male": "male"},
    "race": {
        "White": "White", "Middle Eastern": "White", "Latino_Hispanic": "White", "Black": "Black", "Indian": "Indian",
        "East Asian": "Asian", "Southeast Asian": "Asian",
    },
    "age": dict.fromkeys(("0-2", "3-9", "10-19", "20-29", "30-39"), "young")
    | dict.fromkeys(("40-49", "50-59", "60-69", "more than 70"), "old"),
}  # fmt: skip
CELEBA = {"Male": ("gender", {"1": "male", "-1": "female"}), "Young": ("age", {"1": "young", "-1": "old"})}
CELEBA_FOLDERS = ("img_align_celeba", "img_celeba", ".")
CELEBA_SPLITS = {"0": "train", "1": "val", "2": "test"}
SPLITS = ("train", "val", "test")
ALLOWED = "labels.csv, fairface_label_train.csv or fairface_label_val.csv, or list_attr_celeba.txt"

Row = tuple[str, str, str, dict[str, str]]  # place in its file, image, split, attribute -> class or ""


@dataclass(frozen=True)
class LabelledFiles:
    """N image files below `folder` and their labels of perceived attributes.

    labels[a]: int [N], class index, or -1 if unlabelled; only attributes with at least one label. splits: "train", "val" or
    "test" of each file, "" if it has none.
    """

    folder: Path
    layout: str
    names: tuple[str, ...]
    labels: dict[str, np.ndarray]
    splits: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def files(self) -> list[Path]:
        return [self.folder / name for name in self.names]

    def rows(self, keep_N: np.ndarray) -> "LabelledFiles":
        """Return the files selected by bool [N]."""
        kept = np.flatnonzero(keep_N)
        return replace(
            self,
            names=tuple(self.names[i] for i in kept),
            labels={name: label_N[kept] for name, label_N in self.labels.items()},
            splits=tuple(self.splits[i] for i in kept),
        )

    def of_split(self, split: str) -> "LabelledFiles":
        """Return the files of a split, or of all splits for "all"; ValueError if there are none."""
        keep_N = np.array([split in ("all", own) for own in self.splits])
        if not keep_N.any():
            found = ", ".join(sorted({own for own in self.splits if own})) or "no splits"
            raise ValueError(f"{self.folder}: found {found}, but split {split} is requested; allowed: all")
        return self.rows(keep_N)

    def with_held_out(self, share: float = 0.2) -> "LabelledFiles":
        """Return the files with splits; if none has one, about `share` of them become "val", by a hash of the name."""
        if any(self.splits):
            return self
        marks = [int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name in self.names]
        return replace(self, splits=tuple("val" if mark < share else "train" for mark in marks))


def read_labels(folder: Path, attributes: dict[str, tuple[str, ...]]) -> LabelledFiles:
    """Read the labels of a folder in one of the layouts, as indices of the classes of `attributes`.

    A label is the name of a class, or a data set's label that the tables above map to a class. Raises ValueError for any
    other label, for an image with two rows, and for a folder without labels of these attributes.
    """
    layout, rows = _rows(Path(folder), attributes)
    names, splits = [], []
    labels: dict[str, list[int]] = {name: [] for name in attributes}
    for where, image, split, found in rows:
        names.append(image)
        splits.append(split)
        for name, classes in attributes.items():
            label = found.get(name, "")
            if label and label not in classes:
                raise ValueError(f"{where}: {name} is {label!r}, allowed: {', '.join(classes)}")
            labels[name].append(classes.index(label) if label else -1)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{folder}: {twice[0]} stands in its labels twice")
    known = {name: np.array(label, np.int64) for name, label in labels.items() if any(i >= 0 for i in label)}
    if not known:
        raise ValueError(f"{folder}: found {layout} without a label of {', '.join(attributes)}")
    return LabelledFiles(Path(folder), layout, tuple(names), known, tuple(splits))


def _rows(folder: Path, attributes: dict[str, tuple[str, ...]]) -> tuple[str, Iterator[Row]]:
    if (folder / "labels.csv").is_file():
        return "labels.csv", _own(folder / "labels.csv", attributes)
    fairface = sorted(folder.glob("fairface_label_*.csv"))
    if fairface:
        return "FairFace", (row for file in fairface for row in _fairface(file, attributes))
    if (folder / "list_attr_celeba.txt").is_file():
        return "CelebA", _celeba(folder)
    raise ValueError(f"{folder}: found no labels, allowed: a folder with {ALLOWED}")


def _table(file: Path, column: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place and the cells of each row of a CSV; ValueError if it has no column of this name."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restval="", strict=True)
            if column not in (reader.fieldnames or ()):
                raise ValueError(f"{file}: found the columns {', '.join(reader.fieldnames or ())}, {column} is missing")
            for row in reader:
                where = f"{file}:{reader.line_num}"
                if None in row:
                    raise ValueError(f"{where}: found more cells than columns")
                yield where, {key: cell.strip() for key, cell in row.items()}
    except UnicodeDecodeError:
        raise ValueError(f"{file}: is not UTF-8 text") from None
    except (csv.Error, OSError) as error:
        raise ValueError(f"{file}: cannot read it ({error})") from None


def _own(file: Path, attributes: dict[str, tuple[str, ...]]) -> Iterator[Row]:
    for where, cells in _table(file, "image"):
        split = cells.get("split", "")
        if split and split not in SPLITS:
            raise ValueError(f"{where}: split is {split!r}, allowed: {', '.join(SPLITS)}, or nothing")
        if not cells["image"]:
            raise ValueError(f"{where}: names no image")
        yield where, cells["image"], split, {name: cells.get(name, "") for name in attributes}


def _fairface(file: Path, attributes: dict[str, tuple[str, ...]]) -> Iterator[Row]:
    split = file.stem.removeprefix("fairface_label_")
    for where, cells in _table(file, "file"):
        found = {}
        for name, classes in attributes.items():
            label = cells.get(name, "")
            found[name] = label if label in classes else FAIRFACE.get(name, {}).get(label, label)
        yield where, cells["file"], split, found


def _celeba(folder: Path) -> Iterator[Row]:
    """Yield the rows of CelebA's list: a line with a count, one with column names, then lines of a file name and -1 or 1."""
    file = folder / "list_attr_celeba.txt"
    lines = _lines(file)
    columns = lines[1].split() if len(lines) > 1 else []
    if missing := [column for column in CELEBA if column not in columns]:
        raise ValueError(f"{file}:2: found no column {missing[0]}")
    splits = {}
    if (folder / "list_eval_partition.txt").is_file():
        pairs = [line.split() for line in _lines(folder / "list_eval_partition.txt") if line.strip()]
        splits = {pair[0]: CELEBA_SPLITS.get(pair[-1], "") for pair in pairs}
    where = next(part for part in CELEBA_FOLDERS if (folder / part).is_dir())
    for number, line in enumerate(lines[2:], 3):
        name, *cells = line.split() or [""]
        if not name:
            continue
        if len(cells) != len(columns):
            raise ValueError(f"{file}:{number}: found {len(cells)} cells, allowed: {len(columns)}")
        by_column = dict(zip(columns, cells, strict=True))
        found = {}
        for column, (attribute, classes) in CELEBA.items():
            if by_column[column] not in classes:
                raise ValueError(f"{file}:{number}: {column} is {by_column[column]}, allowed: {', '.join(classes)}")
            found[attribute] = classes[by_column[column]]
        yield f"{file}:{number}", (Path(where) / name).as_posix(), splits.get(name, ""), found


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file}: is not UTF-8 text") from None
