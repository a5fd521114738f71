"""Labelled faces of Portraits' renderer with flipped labels, shared by the studies of label errors."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from fairdiff import fingerprint
from fairdiff.audit.wording import interval, number
from fairdiff.errors import FairDiffError

KINDS = ("uniform", "by group")
GROUP = 1  # the class Black of race: the smaller group
FOLDER = Path.home() / ".cache" / "fairdiff" / "build" / "renders"


@dataclass(frozen=True)
class Faces:
    """Images uint8 [N, H, W, 3], true gender [N], group [N]: 1 for the smaller one, race Black."""

    images: np.ndarray
    gender_N: np.ndarray
    group_N: np.ndarray

    def rows(self, rows: np.ndarray) -> "Faces":
        return Faces(self.images[rows], self.gender_N[rows], self.group_N[rows])


def has_renders(folder: Path) -> bool:
    return bool(list(folder.glob("shard_*.npz")))


def require_renders(folder: Path) -> None:
    """Raise FairDiffError if the folder has no renders."""
    if not has_renders(folder):
        raise FairDiffError(
            f"--renders: found no shards in {folder}, allowed: a folder of scripts/build_portraits/make_data.py"
        )


def renders_hash(folder: Path) -> str:
    """Return a hash of the images and labels in the shards. Hashes of the files would depend on their creation time."""
    digests = []
    for file in sorted(folder.glob("shard_*.npz")):
        with np.load(file) as shard:
            digests.append([hashlib.sha256(shard[name].tobytes()).hexdigest() for name in sorted(shard.files)])
    return fingerprint.of_values(digests)


def read_renders(folder: Path) -> Faces:
    """Read all rendered people in the shards of scripts/build_portraits/make_data.py."""
    shards = [np.load(file) for file in sorted(folder.glob("shard_*.npz"))]
    columns = {name: np.concatenate([shard[name] for shard in shards]) for name in ("image", "gender", "race")}
    people = columns["gender"] >= 0
    gender_N, group_N = columns["gender"][people], columns["race"][people] == GROUP
    return Faces(columns["image"][people], gender_N.astype(np.int64), group_N.astype(np.int64))


def flipped(faces: Faces, rate: float, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Return labels [N] that are wrong with probability `rate`.

    kind "by group": 1.5 times `rate` in the smaller group, at most .48, and as much less in the other as `rate` requires.
    """
    share = faces.group_N.mean()
    smaller = rate if kind == "uniform" else min(1.5 * rate, 0.48)
    larger = (rate - share * smaller) / (1 - share)
    wrong_N = rng.random(len(faces.gender_N)) < np.where(faces.group_N == 1, smaller, larger)
    return np.where(wrong_N, 1 - faces.gender_N, faces.gender_N)


def half_width(values: list[float]) -> float:
    """Return half the width of the 95 % interval of the mean over seeds by Student's t; NaN for fewer than two."""
    if len(values) < 2:
        return float("nan")
    return float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def with_interval(values: list[float], form=number) -> str:
    """Return as text the mean over seeds and its interval, limited to [0, 1], or to [-1, 1] if a value is negative."""
    mean, half = float(np.mean(values)), half_width(values)
    low, high = (0.0, 1.0) if min(values) >= 0 else (-1.0, 1.0)
    return form(mean) if np.isnan(half) else f"{form(mean)} {interval([max(mean - half, low), min(mean + half, high)], form)}"
