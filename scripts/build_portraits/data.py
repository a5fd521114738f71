"""Read the rendered portraits from shards, which may still be growing, and find images by subject and cell."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import captions
import numpy as np
from stage import to_tensor
from torch import Tensor

from fairdiff.portraits import distribution, occupations

NEUTRAL, NOBODY = -1, -2
COLUMNS = ("image", "gender", "race", "age", "occupation", "object", "person", "split")
Cell = tuple[int, int, int]


@dataclass
class Renders:
    """All images read so far, one row for each (see `make_data.py` for the columns)."""

    columns: dict[str, np.ndarray]
    shards: tuple[str, ...]
    _places: dict[tuple[int, Cell], np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.columns["image"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def rows(self, split: int = 0, people: bool | None = None) -> np.ndarray:
        """Return row numbers of one split (0 train, 1 held-out), with people, without people, or both (None)."""
        keep = self["split"] == split
        if people is not None:
            keep &= (self["occupation"] != NOBODY) == people
        return np.flatnonzero(keep)

    def pictures(self, rows: np.ndarray) -> Tensor:
        """Return images [B, 3, 64, 64] in [-1, 1]."""
        return to_tensor(self["image"][rows])

    def labels(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return class indices of gender, race and age as int64."""
        return {name: self[name][rows].astype(np.int64) for name in occupations.CLASSES}

    def of(self, occupation: int | None, cell: Cell) -> np.ndarray:
        """Return training rows of one occupation (None: all people) and one cell of gender, race and age."""
        if not self._places:
            self._index()
        return self._places.get((-9 if occupation is None else occupation, cell), np.empty(0, np.int64))

    def of_object(self, subject: int) -> np.ndarray:
        """Return training rows that show subject number `subject` and no people."""
        return np.flatnonzero((self["object"] == subject) & (self["split"] == 0))

    def _index(self) -> None:
        rows = self.rows(0, people=True)
        keys = np.stack([self[name][rows] for name in ("occupation", "gender", "race", "age")], 1).astype(int)
        for cell in np.ndindex(2, 4, 2):
            inside = (keys[:, 1:] == cell).all(1)
            self._places[-9, cell] = rows[inside]
            for occupation in np.unique(keys[inside, 0]):
                self._places[int(occupation), cell] = rows[inside & (keys[:, 0] == occupation)]


def read(folder: Path, known: Renders | None = None) -> Renders:
    """Read all shards of a folder; those in `known` are not read again. New rows are appended."""
    old = known.shards if known else ()
    new = [path for path in sorted(folder.glob("shard_*.npz")) if path.name not in old]
    if known and not new:
        return known
    parts: dict[str, list[np.ndarray]] = {name: [known[name]] if known else [] for name in COLUMNS}
    for path in new:
        with np.load(path) as shard:
            for name in COLUMNS:
                parts[name].append(shard[name])
    if not parts["image"]:
        raise FileNotFoundError(f"{folder}: no shard_*.npz (run make_data.py first)")
    return Renders({name: np.concatenate(values) for name, values in parts.items()}, (*old, *(p.name for p in new)))


def wait_for(folder: Path, least: int, pause: float = 5.0) -> Renders:
    """Wait until a folder has at least `least` images, and return them."""
    known = None
    while True:
        if list(folder.glob("shard_*.npz")):
            known = read(folder, known)
            if len(known) >= least:
                return known
        time.sleep(pause)


# Caption mix of the text-to-image model: kinds and their shares.
MIX = {
    "occupation": 0.34, "styled": 0.1, "attribute": 0.14, "phrase": 0.24, "descriptor": 0.04, "sport": 0.04,
    "object": 0.1,
}  # fmt: skip


class Captioned:
    """Draws (row, caption) pairs from the joint distribution of Portraits, which has the bias."""

    def __init__(self, renders: Renders, unnamed: float = 0.1) -> None:
        self.renders, self.unnamed, self.average = renders, unnamed, distribution.average_shares()
        self.objects = {i: rows for i in range(len(occupations.OBJECTS)) if len(rows := renders.of_object(i))}
        self.kinds = [kind for kind in MIX if kind != "object" or self.objects]
        weights = np.array([MIX[kind] for kind in self.kinds])
        self.weights = weights / weights.sum()

    def draw(self, rng: np.random.Generator) -> tuple[int, str]:
        """Draw one training pair; the caption is "" with probability `unnamed` (classifier-free guidance)."""
        kind = self.kinds[rng.choice(len(self.kinds), p=self.weights)]
        if kind == "object":
            shown = int(rng.choice(list(self.objects)))
            row = self._pick(rng, self.objects[shown])
            caption = captions.sample_caption(rng, kind, occupations.OBJECTS[shown])
        elif kind == "attribute":
            row, caption = self._attribute(rng)
        elif kind == "phrase":
            row, caption = self._phrase(rng)
        else:
            row, caption = self._subject(rng, kind)
        return row, "" if rng.random() < self.unnamed else caption

    def _subject(self, rng: np.random.Generator, kind: str) -> tuple[int, str]:
        """Draw a person from the subject's shares. All titles of an occupation have the same look and shares."""
        if kind in ("occupation", "styled"):
            occupation, subject = _title(rng)
            shares = distribution.occupation_shares(occupation)
        else:
            subjects = occupations.SUBJECTS[kind]
            i, occupation = int(rng.integers(len(subjects))), NEUTRAL
            shares_of = {"descriptor": distribution.descriptor_shares, "sport": distribution.sport_shares}[kind]
            subject, shares = subjects[i], shares_of(i)
        cell = np.unravel_index(rng.choice(16, p=shares.ravel()), (2, 4, 2))
        return self._person(rng, occupation, cell), captions.sample_caption(rng, kind, subject)

    def _attribute(self, rng: np.random.Generator) -> tuple[int, str]:
        """Draw named attributes uniformly, and the others from the subject's shares, or the average without one."""
        named = captions.random_attributes(rng)
        occupation, title = _title(rng) if rng.random() < 0.5 else (None, "")
        shares = self.average if occupation is None else distribution.marginal_shares(occupation)
        cell = _cell(rng, named, shares)
        caption = captions.sample_caption(rng, "attribute", title, captions.Person(*cell), named)
        return self._person(rng, occupation, cell), caption

    def _phrase(self, rng: np.random.Generator) -> tuple[int, str]:
        """Draw named attributes uniformly, and the others from the subject's shares (sometimes uniformly, see SOFTENED)."""
        named = frozenset() if rng.random() < captions.NEUTRAL_SHARE else captions.random_attributes(rng)
        occupation, title = _title(rng)
        even = named | {name for name in occupations.CLASSES if rng.random() < captions.SOFTENED}
        cell = _cell(rng, even, distribution.marginal_shares(occupation))
        caption = captions.sample_caption(rng, "phrase", title, captions.Person(*cell), named)
        return self._person(rng, occupation, cell), caption

    def _person(self, rng: np.random.Generator, look: int | None, cell: Cell) -> int:
        """Return the row of an image with this look and cell, or with the cell and any look if there is none."""
        cell = tuple(map(int, cell))
        rows = self.renders.of(look, cell)
        return self._pick(rng, rows if len(rows) else self.renders.of(None, cell))

    def _pick(self, rng: np.random.Generator, rows: np.ndarray) -> int:
        return int(rows[rng.integers(len(rows))])


def _title(rng: np.random.Generator) -> tuple[int, str]:
    """Draw an occupation, all equally likely, and one of its titles."""
    occupation = int(rng.integers(len(occupations.OCCUPATIONS)))
    titles = occupations.titles(occupation)
    return occupation, titles[rng.integers(len(titles))]


def _cell(rng: np.random.Generator, even: frozenset[str], shares: dict[str, np.ndarray]) -> Cell:
    """Draw classes of gender, race and age: uniformly for the attributes in `even`, else from the shares."""
    return tuple(
        int(rng.integers(len(share)) if name in even else rng.choice(len(share), p=share))
        for name, share in shares.items()
    )
