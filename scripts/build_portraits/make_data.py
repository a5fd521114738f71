"""Write the rendered data set: shards of images with their true classes.

Usage: python scripts/build_portraits/make_data.py --images 20000 --workers 2 --seed 0 --out FOLDER
Existing shards are kept, so an interrupted run continues. Every shard depends on (seed, shard number) only, and not on the
number of workers.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from mesh import build_folder, load_head
from people import Person, sample_person, sample_shot

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the script runs without installing the package

from fairdiff.portraits import distribution, occupations  # noqa: E402

SHARD = 500
MIX = {"occupations": 0.62, "uniform": 0.22, "identity": 0.06, "objects": 0.10}
FROM_SHARES = 0.6  # share of the "occupations" images with classes from the occupation's shares; the others are uniform
SHOTS_PER_IDENTITY, HELD_OUT = 4, 0.08
NEUTRAL, NO_PERSON = -1, -2  # values of `occupation` without an occupation
TYPES = {
    "gender": np.int8, "race": np.int8, "age_years": np.float32, "age": np.int8, "occupation": np.int16,
    "object": np.int16, "person": np.int32, "split": np.int8,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One shard: its number, its number of images, the run's seed and folder."""

    shard: int
    count: int
    seed: int
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / f"shard_{self.shard:05d}.npz"


class Shard:
    """A renderer of one shard."""

    def __init__(self, renderer, job: Job) -> None:
        self.renderer, self.job = renderer, job
        self.rng = np.random.default_rng([job.seed, job.shard])
        self.rows: list[dict] = []
        self.names = renderer.local_names

    def make(self) -> dict[str, np.ndarray]:
        """Render and return every array of the shard; its images are in random order."""
        counts = {kind: round(share * self.job.count) for kind, share in MIX.items()}
        counts["identity"] -= counts["identity"] % SHOTS_PER_IDENTITY
        counts["occupations"] += self.job.count - sum(counts.values())
        for _ in range(counts["occupations"]):
            self._dressed()
        for _ in range(counts["uniform"]):
            self._person(self._uniform(), self._any_occupation())
        for _ in range(counts["identity"] // SHOTS_PER_IDENTITY):
            self._identity()
        for _ in range(counts["objects"]):
            self._object()
        order = self.rng.permutation(len(self.rows))
        arrays = {name: np.array([self.rows[i][name] for i in order], kind) for name, kind in TYPES.items()}
        return {"image": np.stack([self.rows[i]["image"] for i in order]), **arrays}

    def _uniform(self) -> tuple[int, int, int]:
        return int(self.rng.integers(2)), int(self.rng.integers(4)), int(self.rng.integers(2))

    def _any_occupation(self) -> int:
        return NEUTRAL if self.rng.random() < 0.5 else int(self.rng.integers(len(occupations.OCCUPATIONS)))

    def _dressed(self) -> None:
        occupation = int(self.rng.integers(len(occupations.OCCUPATIONS)))
        classes = self._uniform()
        if self.rng.random() < FROM_SHARES:
            shares = distribution.occupation_shares(occupation)
            at = self.rng.choice(shares.size, p=shares.ravel() / shares.sum())
            classes = tuple(int(i) for i in np.unravel_index(at, shares.shape))
        self._person(classes, occupation)

    def _identity(self) -> None:
        person = sample_person(self.rng, *self._uniform(), self.names)
        number, split = self._next_person(), self._split()
        for _ in range(SHOTS_PER_IDENTITY):
            self._picture(person, number, split, self._any_occupation())

    def _person(self, classes: tuple[int, int, int], occupation: int) -> None:
        self._picture(sample_person(self.rng, *classes, self.names), self._next_person(), self._split(), occupation)

    def _next_person(self) -> int:
        return self.job.shard * SHARD + len(self.rows)

    def _split(self) -> int:
        return int(self.rng.random() < HELD_OUT)

    def _picture(self, person: Person, number: int, split: int, occupation: int) -> None:
        from look import look_for_occupation, neutral_look

        named = occupation != NEUTRAL
        look = look_for_occupation(occupations.OCCUPATIONS[occupation], self.rng) if named else neutral_look(self.rng)
        image = self.renderer.render(person, sample_shot(self.rng), look, self.rng)
        self.rows.append(
            {
                "image": image,
                "gender": person.gender,
                "race": person.race,
                "age_years": person.years,
                "age": person.age,
                "occupation": occupation,
                "object": -1,
                "person": number,
                "split": split,
            }
        )

    def _object(self) -> None:
        from objects import OBJECTS, draw_object

        index = int(self.rng.integers(len(OBJECTS)))
        self.rows.append(
            {
                "image": draw_object(index, self.rng),
                "gender": -1,
                "race": -1,
                "age_years": -1.0,
                "age": -1,
                "occupation": NO_PERSON,
                "object": index,
                "person": -1,
                "split": self._split(),
            }
        )


def write_shard(job: Job) -> int:
    """Render and write one shard, first under a temporary name, and return its number of images."""
    from render import Renderer

    global _renderer
    if _renderer is None:
        _renderer = Renderer()
    arrays = Shard(_renderer, job).make()
    part = job.path.with_suffix(".part.npz")
    np.savez_compressed(part, **arrays)
    os.replace(part, job.path)
    return job.count


_renderer = None  # one per worker process, made at its first shard


def plan(images: int, seed: int, folder: Path) -> list[Job]:
    """Return the shards of a data set with `images` images; the last one may be smaller."""
    return [Job(i, min(SHARD, images - i * SHARD), seed, folder) for i in range(-(-images // SHARD))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="default: renders/ in the build folder")
    options = parser.parse_args()
    folder = build_folder() / "renders" if options.out is None else options.out
    folder.mkdir(parents=True, exist_ok=True)
    load_head()  # fills the cache before the workers need it
    jobs = [job for job in plan(options.images, options.seed, folder) if not job.path.exists()]
    print(f"{len(jobs)} shards to render into {folder}", flush=True)
    done, total, start = 0, sum(job.count for job in jobs), time.time()
    with get_context("spawn").Pool(options.workers) as pool:
        for count in pool.imap_unordered(write_shard, jobs):
            done += count
            speed = done / (time.time() - start)
            print(f"{done}/{total} pictures, {speed:.1f}/s, {(total - done) / speed / 60:.1f} min left", flush=True)


if __name__ == "__main__":
    main()
