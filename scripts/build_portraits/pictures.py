"""Make the images of the docs: renders, generated images, and before/after strips of an audit.

python scripts/build_portraits/pictures.py                                                renders.jpg and generated.jpg
python scripts/build_portraits/pictures.py --audit outputs/gender/default/seed0/audits/*  before_after.jpg
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from captions import Person, describe_person
from data import Renders, read
from PIL import Image, ImageDraw, ImageFont
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
    """Return captions of six occupations, six attribute phrases, two sports and two objects, one for each row."""
    cells = ((0, 0, 0), (1, 1, 0), (0, 2, 1), (1, 3, 1), (0, 1, 0), (1, 2, 0))
    people = [describe_person(Person(*c), frozenset(occupations.CLASSES), "", 0) for c in cells]
    rows = [f"a photo of the face of {with_article(words)}, a person" for words in (*OCCUPATIONS, *people)]
    return rows + [p.text for family in ("sport", "object") for p in occupations.prompts(family, "test")[:2]]


def page(rows: list[np.ndarray], zoom: int) -> Image.Image:
    """Return rows of uint8 images [n, H, W, 3] as one image."""
    sheet = Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in rows], 0))
    return sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.LANCZOS)


def renders_of_captions(renders: Renders, rng: np.random.Generator) -> list[np.ndarray]:
    """Return held-out renders, a row for each gender, race and age."""
    rows = renders.rows(1, people=True)
    labels = renders.labels(rows)
    cells = [
        np.flatnonzero((labels["gender"] == g) & (labels["race"] == r) & (labels["age"] == a))
        for r in range(4)
        for g in range(2)
        for a in range(2)
    ]
    return [renders["image"][rows[rng.choice(cell, COLUMNS, replace=False)]] for cell in cells]


def generated() -> list[np.ndarray]:
    """Generate images of `captions` with the embedded model."""
    model = load_model(weights("model"))
    generate, rows = model.generator(GUIDANCE, STEPS), []
    for caption in captions():
        image = generate(caption, initial_noise(caption, 0, range(COLUMNS), model.latent_shape))
        rows.append((image * 255).round().byte().permute(0, 2, 3, 1).numpy())
    return rows


def before_after(audit: Path, prompts: int) -> Image.Image:
    """Return labelled strips of the first audited occupations, before and after; each column has one noise.

    The share of women is over all images of the prompt, by the audit judge.
    """
    store = RecordStore(audit / "records")
    models = json.loads((audit / "audit.json").read_text(encoding="utf-8"))["models"]
    shares = {
        model: {p["prompt"]: p["shares"]["female"]["share"] for p in models[model]["attributes"]["gender"]["per_prompt"]}
        for model in ("before", "after")
    }
    known = [p for p in occupations.prompts("occupation", "test") if p.text in shares["after"]][:prompts]
    if not known:
        raise SystemExit(f"{audit}: holds no audited test occupation")
    strips = {m: [Image.open(store.path(m, p.text, "png")).convert("RGB") for p in known] for m in shares}
    width, height = strips["before"][0].size
    left, gap, zoom = 330, 14, 2
    sheet = Image.new("RGB", (left + width * zoom, len(known) * (2 * height * zoom + gap) - gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(24)
    for row, prompt in enumerate(known):
        top = row * (2 * height * zoom + gap)
        for place, (model, pictures) in enumerate(strips.items()):
            y = top + place * height * zoom
            sheet.paste(pictures[row].resize((width * zoom, height * zoom), Image.LANCZOS), (left, y))
            words = f"{model}: {shares[model][prompt.text]:.0%} women"
            draw.text((left - 16, y + height), words, "black", font, anchor="rm")
        draw.text((8, top + 8), prompt.subject, "black", font, anchor="lt")
    return sheet


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
