"""Write a contact sheet of the renderer's images: people by class, occupations or objects.

Usage: python scripts/build_portraits/contact_sheet.py OUT.png [--what people|occupations|objects] [--seed S]
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from look import look_for_occupation, neutral_look
from objects import OBJECTS, draw_object
from people import AGES, GENDERS, RACES, sample_person, sample_shot
from PIL import Image
from render import Renderer

COLUMNS = 12


def people(rng: np.random.Generator) -> list[np.ndarray]:
    """Render neutral portraits, one row for every race, gender and age (in this order, age fastest)."""
    renderer = Renderer()
    classes = [(g, r, a) for r in range(len(RACES)) for g in range(len(GENDERS)) for a in range(len(AGES))]
    return [
        renderer.render(sample_person(rng, *c, renderer.local_names), sample_shot(rng), neutral_look(rng), rng)
        for c in classes
        for _ in range(COLUMNS)
    ]


def occupations(rng: np.random.Generator) -> list[np.ndarray]:
    """Render a random person dressed for each occupation."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from fairdiff.portraits.occupations import OCCUPATIONS

    renderer, pictures = Renderer(), []
    for name in OCCUPATIONS:
        person = sample_person(rng, *(int(rng.integers(n)) for n in (2, 4, 2)), renderer.local_names)
        pictures.append(renderer.render(person, sample_shot(rng), look_for_occupation(name, rng), rng))
    return pictures


def objects(rng: np.random.Generator) -> list[np.ndarray]:
    """Draw every subject without people four times."""
    return [draw_object(i, rng) for _ in range(4) for i in range(len(OBJECTS))]


def sheet(pictures: list[np.ndarray], columns: int = COLUMNS, scale: int = 2) -> Image.Image:
    """Return the images in rows, enlarged; the last row is padded with white."""
    size = pictures[0].shape[0]
    blank = np.full_like(pictures[0], 255)
    full = np.stack(pictures + [blank] * (-len(pictures) % columns))
    grid = full.reshape(-1, columns, size, size, 3).transpose(0, 2, 1, 3, 4).reshape(-1, columns * size, 3)
    image = Image.fromarray(grid)
    return image.resize((image.width * scale, image.height * scale), Image.BICUBIC)


def main() -> None:
    kinds = {"people": people, "occupations": occupations, "objects": objects}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--what", choices=kinds, default="people")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    sheet(kinds[options.what](np.random.default_rng(options.seed))).save(options.out)


if __name__ == "__main__":
    main()
