"""Draw the pictures of the docs: renders, generated pictures, and before/after strips of an audit.

python scripts/build_portraits/pictures.py                                                renders.jpg and generated.jpg
python scripts/build_portraits/pictures.py --audit outputs/gender/default/seed0/audits/*  before_after.jpg
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from captions import Person, describe_person
from data import Renders, read
from PIL import Image
from stage import build_folder

from fairdiff.audit.records import RecordStore
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.portraits import occupations, weights
from fairdiff.prompts import with_article

DOCS = Path(__file__).resolve().parents[2] / "docs" / "images"
COLUMNS, GUIDANCE, STEPS = 16, 1.5, 8
OCCUPATIONS = ("nurse", "carpenter", "chief executive", "firefighter", "librarian", "software developer")


def captions() -> list[str]:
    """Six occupations, six descriptions in words, two sports, two things: one row each."""
    cells = ((0, 0, 0), (1, 1, 0), (0, 2, 1), (1, 3, 1), (0, 1, 0), (1, 2, 0))
    people = [describe_person(Person(*c), frozenset(occupations.CLASSES), "", 0) for c in cells]
    rows = [f"a photo of the face of {with_article(words)}, a person" for words in (*OCCUPATIONS, *people)]
    return rows + [p.text for family in ("sport", "object") for p in occupations.prompts(family, "test")[:2]]


def page(rows: list[np.ndarray], zoom: int) -> Image.Image:
    """Rows of uint8 pictures [n, H, W, 3] as one picture."""
    sheet = Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in rows], 0))
    return sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.LANCZOS)


def renders_of_captions(renders: Renders, rng: np.random.Generator) -> list[np.ndarray]:
    """Held-out renders, a row for each gender, race and age."""
    rows = renders.rows(1, people=True)
    labels = renders.labels(rows)
    cells = [np.flatnonzero((labels["gender"] == g) & (labels["race"] == r) & (labels["age"] == a))
             for r in range(4) for g in range(2) for a in range(2)]  # fmt: skip
    return [renders["image"][rows[rng.choice(cell, COLUMNS, replace=False)]] for cell in cells]


def generated() -> list[np.ndarray]:
    """The shipped model's pictures of `captions`."""
    model = load_model(weights("model"))
    generate, rows = model.generator(GUIDANCE, STEPS), []
    for caption in captions():
        image = generate(caption, initial_noise(caption, 0, range(COLUMNS), model.latent_shape))
        rows.append((image * 255).round().byte().permute(0, 2, 3, 1).numpy())
    return rows


def before_after(audit: Path, prompts: int) -> Image.Image:
    """Strips of the first test prompts: each pair of rows is one prompt before and after, each column one noise."""
    store, strips = RecordStore(audit / "records"), []
    texts = [p.text for p in occupations.prompts("occupation", "test")]
    painted = [t for t in texts if store.path("after", t, "png").exists()][:prompts]
    if not painted:
        raise SystemExit(f"{audit}: holds no audited test occupation")
    for text in painted:
        pair = [np.asarray(Image.open(store.path(model, text, "png")).convert("RGB")) for model in ("before", "after")]
        strips += [*pair, np.full((6, *pair[0].shape[1:]), 255, np.uint8)]
    sheet = Image.fromarray(np.concatenate(strips[:-1], 0))
    return sheet.resize((sheet.width * 2, sheet.height * 2), Image.LANCZOS)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--audit", type=Path, default=None, help="the folder of a run's audit")
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--out", type=Path, default=DOCS)
    args = parser.parse_args(argv)
    torch.set_num_threads(2)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.audit:
        before_after(args.audit, args.prompts).save(args.out / "before_after.jpg", quality=90)
        return
    rng = np.random.default_rng(0)
    page(renders_of_captions(read(build_folder() / "renders"), rng), 1).save(args.out / "renders.jpg", quality=88)
    page(generated(), 1).save(args.out / "generated.jpg", quality=90)


if __name__ == "__main__":
    sys.exit(main())
