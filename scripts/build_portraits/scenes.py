"""Draw the background behind a person: plain walls and simple places, flat with a soft vertical gradient."""

import numpy as np
from pen import Pen
from PIL import Image

SKY, GRASS = (0.62, 0.80, 0.95), (0.38, 0.60, 0.30)


def _plain(p, c, a, rng):
    pass


def _office(p, c, a, rng):
    p.box((0.83, 0.90, 0.96), 4, 4, 24, 30)
    p.line((0.55, 0.57, 0.6), 1.2, (14, 4), (14, 30))
    p.line((0.55, 0.57, 0.6), 1.2, (4, 17), (24, 17))
    p.box(a, 48, 10, 60, 24)
    p.box(np.asarray(c) * 0.8, 0, 46, 64, 64)


def _shelves(p, c, a, rng):
    p.box((0.50, 0.34, 0.22), 0, 0, 64, 64)
    for y in (0, 16, 32, 48):
        p.box((0.34, 0.22, 0.14), 0, y + 13.5, 64, y + 16)
        x = 0.0
        while x < 64:
            w, h = rng.uniform(2.5, 5), rng.uniform(8, 12.5)
            p.box(rng.uniform(0.15, 0.85, 3), x, y + 13.5 - h, x + w - 0.5, y + 13.5)
            x += w


def _workshop(p, c, a, rng):
    p.box((0.66, 0.55, 0.40), 0, 0, 64, 64)
    for y in range(4, 64, 8):
        for x in range(4, 64, 8):
            p.disc((0.48, 0.39, 0.28), x, y, 0.8)
    for x in (7, 15, 50, 58):
        p.line((0.25, 0.27, 0.30), 2.0, (x, 8), (x, 26))
        p.box(a if x in (7, 58) else (0.7, 0.72, 0.75), x - 3, 6, x + 3, 12)


def _kitchen(p, c, a, rng):
    p.box((0.93, 0.94, 0.93), 0, 0, 64, 64)
    for i in range(0, 65, 8):
        p.line((0.74, 0.77, 0.78), 1.0, (i, 0), (i, 64))
        p.line((0.74, 0.77, 0.78), 1.0, (0, i), (64, i))
    p.line((0.4, 0.4, 0.42), 1.2, (0, 7), (64, 7))
    for x in (6, 56):
        p.disc((0.35, 0.36, 0.38), x, 16, 5.0)
        p.line((0.35, 0.36, 0.38), 1.5, (x, 7), (x, 14))


def _outdoor(p, c, a, rng):
    p.box(SKY, 0, 0, 64, 44)
    for _ in range(3):
        x, y = rng.uniform(0, 64), rng.uniform(4, 18)
        for dx in (-5, 0, 5):
            p.disc((0.97, 0.98, 1.0), x + dx, y, 5, 3)
    p.box(GRASS, 0, 43, 64, 64)
    for x in (5, 59):
        p.disc((0.22, 0.45, 0.22), x, 38, 8, 9)


def _classroom(p, c, a, rng):
    p.box((0.80, 0.73, 0.60), 0, 0, 64, 64)
    p.box((0.52, 0.36, 0.22), 1, 3, 63, 44)
    p.box((0.16, 0.34, 0.27), 3, 5, 61, 42)
    for y in (11, 18, 25):
        for x in (6, 46):
            p.line((0.85, 0.88, 0.85), 1.0, (x, y), (x + rng.uniform(6, 12), y))


def _brick(p, c, a, rng):
    p.box((0.78, 0.72, 0.66), 0, 0, 64, 64)
    for row, y in enumerate(range(0, 64, 6)):
        for x in range(-12, 64, 12):
            x0 = x + 6 * (row % 2)
            p.box(np.array([0.64, 0.32, 0.24]) * rng.uniform(0.85, 1.12), x0 + 0.6, y + 0.6, x0 + 11.4, y + 5.4)


def _hospital(p, c, a, rng):
    for i, x in enumerate(np.arange(0, 64, 5.0)):
        p.box(np.array([0.62, 0.84, 0.82]) * (1.05 if i % 2 else 0.92), x, 5, x + 5, 64)
    p.box((0.93, 0.95, 0.95), 0, 0, 64, 4)
    p.line((0.6, 0.62, 0.64), 1.4, (0, 5), (64, 5))


def _stage(p, c, a, rng):
    for i, x in enumerate(np.arange(0, 64, 4.0)):
        p.box(np.array([0.58, 0.08, 0.12]) * (1.15 if i % 2 else 0.72), x, 0, x + 4, 64)
    p.box((0.85, 0.68, 0.25), 0, 0, 64, 2.5)


def _street(p, c, a, rng):
    p.box((0.72, 0.82, 0.92), 0, 0, 64, 64)
    for x, w in ((0, 14), (14, 9), (42, 10), (51, 13)):
        top = rng.uniform(6, 18)
        tone = rng.uniform(0.35, 0.62)
        p.box((tone, tone * 0.97, tone * 0.95), x, top, x + w, 60)
        for y in np.arange(top + 3, 50, 6):
            p.box((0.95, 0.88, 0.60), x + 2, y, x + 4, y + 3)
            p.box((0.95, 0.88, 0.60), x + w - 5, y, x + w - 3, y + 3)
    p.box((0.35, 0.35, 0.37), 0, 54, 64, 64)


def _warehouse(p, c, a, rng):
    p.box((0.56, 0.60, 0.66), 0, 0, 64, 64)
    for y in (18, 36, 54):
        for x in (1, 10, 46, 55):
            p.box(np.array([0.76, 0.58, 0.38]) * rng.uniform(0.85, 1.1), x, y - 11, x + 8, y)
        p.line((0.85, 0.42, 0.12), 1.6, (0, y + 1), (64, y + 1))


def _laboratory(p, c, a, rng):
    p.box((0.86, 0.91, 0.95), 0, 0, 64, 64)
    p.box((0.62, 0.70, 0.78), 0, 22, 64, 25)
    for x in (4, 11, 50, 58):
        colour = rng.uniform(0.2, 0.9, 3)
        p.box((0.95, 0.97, 0.98), x - 2.4, 10, x + 2.4, 22)
        p.box(colour, x - 2.4, 15, x + 2.4, 22)
    p.box((0.70, 0.74, 0.78), 0, 48, 64, 64)


def _screens(p, c, a, rng):
    p.box((0.13, 0.15, 0.20), 0, 0, 64, 64)
    for x, y in ((1, 4), (45, 4), (1, 25), (45, 25)):
        p.box((0.10, 0.30, 0.42), x, y, x + 18, y + 17)
        for k in range(4):
            p.line((0.35, 0.90, 0.75), 1.0, (x + 2, y + 3 + 3.6 * k), (x + rng.uniform(6, 16), y + 3 + 3.6 * k))


SCENES = {
    "plain": _plain, "office": _office, "shelves": _shelves, "workshop": _workshop, "kitchen": _kitchen,
    "outdoor": _outdoor, "classroom": _classroom, "brick": _brick, "hospital": _hospital, "stage": _stage,
    "street": _street, "warehouse": _warehouse, "laboratory": _laboratory, "screens": _screens,
}  # fmt: skip


def draw_scene(look, size: int) -> Image.Image:
    """Draw the background of a look, size x size pixels, with a small random shift and shade for each image."""
    rng = np.random.default_rng(look.seed)
    image = Image.new("RGB", (size, size), tuple(int(c * 255) for c in look.scene_3))
    k = size / 64
    pen = Pen(image, -3 * k + rng.uniform(-3, 3) * k, -2 * k + rng.uniform(-2, 2) * k, 1.12 * k)
    SCENES[look.scene](pen, look.scene_3, look.scene_accent_3, rng)
    shade = np.linspace(1.06, 0.90, size)[:, None] + np.linspace(-0.05, 0.05, size)[None] * rng.uniform(-1, 1)
    shaded = np.asarray(image, np.float32) * (shade * rng.uniform(0.93, 1.04))[..., None]
    return Image.fromarray(np.clip(shaded, 0, 255).astype(np.uint8))
