"""Draw images without people: simple subjects for prompts without people, which must not change."""

import colorsys

import numpy as np
from pen import Pen
from PIL import Image

WOOD, SKY, SEA = (0.60, 0.42, 0.26), (0.58, 0.78, 0.95), (0.16, 0.42, 0.62)
GRASS, DARK = (0.38, 0.62, 0.30), (0.13, 0.13, 0.15)
CREAM, STEEL, LEAF = (0.95, 0.93, 0.86), (0.72, 0.74, 0.77), (0.20, 0.48, 0.22)


class _Stage:
    """An image in units of -1..1: the pen of its background, the pen of its subject, a random generator, a colour."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.image = Image.new("RGB", (size, size), (200, 200, 200))
        self.back, half = Pen(self.image, size / 2, size / 2, size / 2), size / 2
        x, y = half * (1 + rng.uniform(-0.14, 0.14, 2))
        self.pen = Pen(self.image, x, y, half * rng.uniform(0.80, 1.08), rng.normal(0, 2), bool(rng.random() < 0.5))
        self.rng = rng
        self.colour = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.5, 0.85), rng.uniform(0.55, 0.95)))

    def table(self) -> None:
        """Draw a wall above a table."""
        wall = np.array([0.86, 0.84, 0.80]) * (1 + self.rng.uniform(-0.25, 0.1, 3))
        self.back.box(wall, -1, -1, 1, 1)
        self.back.box(np.array(WOOD) * self.rng.uniform(0.7, 1.25), -1, 0.38, 1, 1)

    def land(self, sky=SKY, ground=GRASS, horizon: float = 0.35) -> None:
        """Draw a sky above the ground."""
        self.back.box(np.array(sky) * self.rng.uniform(0.9, 1.05), -1, -1, 1, horizon)
        self.back.box(np.array(ground) * self.rng.uniform(0.85, 1.1), -1, horizon, 1, 1)

    def wall(self) -> None:
        """Draw a plain wall."""
        self.back.box(self.rng.uniform(0.6, 0.95) * (1 + self.rng.uniform(-0.18, 0.05, 3)), -1, -1, 1, 1)


def _apple(s):
    s.table()
    red = np.array([0.82, 0.14, 0.13])
    s.pen.disc(red, -0.16, 0.15, 0.34, 0.40)
    s.pen.disc(red, 0.16, 0.15, 0.34, 0.40)
    s.pen.disc((0.95, 0.5, 0.45), -0.25, 0.0, 0.09, 0.13)
    s.pen.line(DARK, 0.07, (0, -0.2), (0.06, -0.48))
    s.pen.disc(LEAF, 0.22, -0.40, 0.17, 0.08)


def _mug(s):
    s.table()
    s.pen.ring(s.colour * 0.85, 0.11, 0.45, 0.08, 0.24)
    s.pen.box(s.colour, -0.42, -0.36, 0.42, 0.56)
    s.pen.disc(s.colour * 0.75, 0, -0.36, 0.42, 0.12)
    s.pen.disc((0.25, 0.15, 0.10), 0, -0.35, 0.35, 0.08)


def _house(s):
    s.land()
    s.pen.box(CREAM, -0.55, -0.15, 0.55, 0.55)
    s.pen.area((0.66, 0.24, 0.18), (-0.72, -0.15), (0.72, -0.15), (0, -0.75))
    s.pen.box((0.42, 0.27, 0.17), -0.12, 0.15, 0.14, 0.55)
    for x in (-0.38, 0.34):
        s.pen.box((0.45, 0.68, 0.88), x - 0.11, 0.0, x + 0.11, 0.22)


def _tree(s):
    s.land()
    s.pen.box((0.42, 0.28, 0.17), -0.09, 0.0, 0.09, 0.62)
    green = np.array(LEAF) * s.rng.uniform(0.8, 1.3)
    for x, y, r in ((-0.3, -0.15, 0.33), (0.3, -0.15, 0.33), (0, -0.42, 0.40), (0, -0.1, 0.36)):
        s.pen.disc(green * (1 + 0.2 * x), x, y, r)


def _mountains(s):
    s.land((0.97, 0.60, 0.36), (0.30, 0.25, 0.30), 0.45)
    s.back.box((0.98, 0.78, 0.46), -1, 0.05, 1, 0.45)
    s.pen.disc((1.0, 0.90, 0.55), 0.25, -0.05, 0.22)
    s.back.area((0.45, 0.30, 0.42), (-1.1, 0.5), (-0.5, -0.40), (0.1, 0.5))
    s.back.area((0.36, 0.24, 0.38), (-0.3, 0.5), (0.45, -0.2), (1.2, 0.5))
    s.back.area((0.95, 0.85, 0.82), (-0.5, -0.40), (-0.37, -0.20), (-0.63, -0.20))


def _boat(s):
    s.land(SKY, SEA, 0.2)
    s.pen.line(WOOD, 0.06, (0, 0.3), (0, -0.75))
    s.pen.area(CREAM, (0.06, -0.70), (0.06, 0.16), (0.55, 0.16))
    s.pen.area(s.colour, (-0.06, -0.55), (-0.06, 0.16), (-0.42, 0.16))
    s.pen.area((0.50, 0.25, 0.15), (-0.6, 0.25), (0.65, 0.25), (0.42, 0.52), (-0.42, 0.52))


def _bicycle(s):
    s.land((0.82, 0.86, 0.90), (0.55, 0.55, 0.55), 0.5)
    for x in (-0.48, 0.48):
        s.pen.ring(DARK, 0.08, x, 0.28, 0.34)
    s.pen.line(s.colour, 0.09, (-0.48, 0.28), (-0.18, -0.2), (0.35, -0.2), (0.02, 0.28), (-0.48, 0.28))
    s.pen.line(s.colour, 0.09, (0.02, 0.28), (-0.2, -0.3))
    s.pen.line(s.colour, 0.09, (0.48, 0.28), (0.30, -0.42), (0.48, -0.45))
    s.pen.line(DARK, 0.10, (-0.34, -0.33), (-0.08, -0.33))


def _car(s):
    s.land(SKY, (0.45, 0.45, 0.47), 0.42)
    s.pen.area(s.colour * 0.9, (-0.42, -0.02), (-0.25, -0.36), (0.28, -0.36), (0.50, -0.02))
    s.pen.area((0.70, 0.86, 0.95), (-0.32, -0.04), (-0.20, -0.28), (0.24, -0.28), (0.38, -0.04))
    s.pen.box(s.colour, -0.80, -0.04, 0.80, 0.34)
    for x in (-0.45, 0.45):
        s.pen.disc(DARK, x, 0.36, 0.19)
        s.pen.disc(STEEL, x, 0.36, 0.09)


def _vase(s):
    s.table()
    for x, y in ((-0.35, -0.35), (0, -0.58), (0.35, -0.35), (-0.15, -0.2), (0.2, -0.15)):
        s.pen.line(LEAF, 0.05, (0, 0.2), (x, y))
        s.pen.disc(s.colour, x, y, 0.17)
        s.pen.disc((0.98, 0.85, 0.35), x, y, 0.07)
    s.pen.area((0.35, 0.55, 0.72), (-0.16, 0.0), (0.16, 0.0), (0.30, 0.4), (0.18, 0.68), (-0.18, 0.68), (-0.30, 0.4))


def _books(s):
    s.table()
    for i, y in enumerate((0.48, 0.24, 0.0, -0.24)):
        shift, half = s.rng.uniform(-0.1, 0.1), s.rng.uniform(0.48, 0.66)
        colour = np.roll(s.colour, i) * s.rng.uniform(0.7, 1.1)
        s.pen.box(colour, shift - half, y - 0.12, shift + half, y + 0.11)
        s.pen.box(CREAM, shift + half - 0.10, y - 0.07, shift + half, y + 0.07)


def _lamp(s):
    s.table()
    s.pen.disc((1.0, 0.95, 0.70), -0.05, 0.1, 0.40, 0.28)
    s.pen.line(DARK, 0.07, (0.35, 0.55), (0.45, -0.05), (0.05, -0.45))
    s.pen.disc(DARK, 0.35, 0.58, 0.28, 0.08)
    s.pen.area(s.colour, (0.12, -0.55), (0.22, -0.25), (-0.20, 0.08), (-0.38, -0.30))


def _clock(s):
    s.wall()
    s.pen.disc(s.colour * 0.7, 0, 0, 0.68)
    s.pen.disc(CREAM, 0, 0, 0.57)
    for k in range(12):
        x, y = np.sin(k * np.pi / 6), np.cos(k * np.pi / 6)
        s.pen.line(DARK, 0.05, (0.45 * x, 0.45 * y), (0.53 * x, 0.53 * y))
    hour, minute = s.rng.uniform(0, 2 * np.pi, 2)
    s.pen.line(DARK, 0.09, (0, 0), (0.30 * np.sin(hour), 0.30 * np.cos(hour)))
    s.pen.line(DARK, 0.06, (0, 0), (0.44 * np.sin(minute), 0.44 * np.cos(minute)))


def _chair(s):
    s.wall()
    s.back.box((0.55, 0.55, 0.56), -1, 0.6, 1, 1)
    wood = np.array([0.66, 0.42, 0.22]) * s.rng.uniform(0.75, 1.15)
    s.pen.box(wood, -0.40, -0.70, 0.30, 0.0)
    s.pen.area(wood * 0.8, (-0.45, 0.05), (0.32, 0.05), (0.50, 0.28), (-0.50, 0.28))
    for x, y in ((-0.44, 0.85), (0.44, 0.85), (-0.34, 0.65), (0.28, 0.65)):
        s.pen.line(wood * 0.6, 0.08, (x, 0.2), (x, y))


def _umbrella(s):
    s.land((0.62, 0.68, 0.74), (0.42, 0.44, 0.47), 0.6)
    yellow = np.array([0.96, 0.80, 0.16]) * s.rng.uniform(0.85, 1.05)
    s.pen.line(DARK, 0.06, (0, -0.4), (0, 0.7), (0.12, 0.76), (0.20, 0.66))
    turn = np.linspace(np.pi, 2 * np.pi, 25)
    s.pen.area(yellow, *zip(0.72 * np.cos(turn), 0.05 + 0.72 * np.sin(turn), strict=True))
    s.pen.area(yellow * 0.82, (-0.24, 0.05), (0.24, 0.05), (0.0, -0.67))


def _balloon(s):
    s.land(SKY, GRASS, 0.75)
    s.pen.disc(s.colour, 0, -0.25, 0.50, 0.55)
    s.pen.disc(np.clip(s.colour * 1.25 + 0.1, 0, 1), 0, -0.25, 0.20, 0.55)
    s.pen.line(DARK, 0.03, (-0.3, 0.2), (-0.13, 0.45))
    s.pen.line(DARK, 0.03, (0.3, 0.2), (0.13, 0.45))
    s.pen.box((0.50, 0.33, 0.18), -0.15, 0.42, 0.15, 0.64)


def _cactus(s):
    s.table()
    green = np.array([0.22, 0.52, 0.28]) * s.rng.uniform(0.85, 1.2)
    s.pen.line(green, 0.26, (0, 0.3), (0, -0.62))
    s.pen.disc(green, 0, -0.62, 0.13)
    s.pen.line(green, 0.16, (0, 0.05), (-0.38, 0.05), (-0.38, -0.30))
    s.pen.line(green, 0.16, (0, -0.1), (0.38, -0.1), (0.38, -0.48))
    s.pen.area((0.74, 0.38, 0.24), (-0.34, 0.22), (0.34, 0.22), (0.25, 0.72), (-0.25, 0.72))
    s.pen.box((0.82, 0.45, 0.29), -0.38, 0.18, 0.38, 0.32)


def _lighthouse(s):
    s.land(SKY, SEA, 0.3)
    s.back.area((0.45, 0.42, 0.38), (-1, 1), (-0.6, 0.5), (0.6, 0.5), (1, 1))
    s.pen.area(CREAM, (-0.22, 0.6), (-0.14, -0.5), (0.14, -0.5), (0.22, 0.6))
    for y in (-0.3, 0.05, 0.40):
        s.pen.box((0.80, 0.18, 0.16), -0.18, y - 0.08, 0.18, y + 0.08)
    s.pen.box((1.0, 0.90, 0.50), -0.12, -0.68, 0.12, -0.5)
    s.pen.area((0.35, 0.15, 0.14), (-0.18, -0.66), (0.18, -0.66), (0, -0.85))


def _traffic_light(s):
    s.land((0.70, 0.80, 0.90), (0.45, 0.45, 0.47), 0.6)
    s.pen.line(DARK, 0.12, (0, 0.2), (0, 0.95))
    s.pen.box(DARK, -0.30, -0.80, 0.30, 0.35)
    lit = int(s.rng.integers(3))
    for i, colour in enumerate(((0.95, 0.15, 0.12), (0.98, 0.80, 0.15), (0.20, 0.85, 0.35))):
        s.pen.disc(np.array(colour) * (1.0 if i == lit else 0.45), 0, -0.58 + 0.36 * i, 0.15)


def _bottle(s):
    s.table()
    green = np.array([0.15, 0.50, 0.28]) * s.rng.uniform(0.8, 1.3)
    s.pen.area(
        green,
        (-0.10, -0.80),
        (0.10, -0.80),
        (0.11, -0.40),
        (0.28, -0.12),
        (0.28, 0.62),
        (-0.28, 0.62),
        (-0.28, -0.12),
        (-0.11, -0.40),
    )
    s.pen.box(CREAM, -0.28, 0.05, 0.28, 0.38)
    s.pen.box((0.45, 0.28, 0.15), -0.12, -0.88, 0.12, -0.74)


def _pizza(s):
    s.table()
    s.pen.disc((0.94, 0.95, 0.97), 0, 0.1, 0.82, 0.66)
    s.pen.disc((0.82, 0.84, 0.88), 0, 0.1, 0.62, 0.48)
    s.pen.area((0.95, 0.77, 0.35), (-0.40, -0.28), (0.40, -0.28), (0.0, 0.55))
    s.pen.line((0.72, 0.46, 0.22), 0.14, (-0.42, -0.28), (0.42, -0.28))
    for x, y in ((-0.15, -0.08), (0.17, -0.05), (0.0, 0.22)):
        s.pen.disc((0.75, 0.18, 0.12), x, y, 0.10)


def _window(s):
    s.wall()
    s.pen.box((0.90, 0.88, 0.84), -0.66, -0.70, 0.66, 0.62)
    s.pen.box(SKY, -0.56, -0.60, 0.56, 0.52)
    s.pen.box((0.90, 0.88, 0.84), -0.04, -0.6, 0.04, 0.52)
    s.pen.box((0.90, 0.88, 0.84), -0.56, -0.08, 0.56, -0.01)
    for side in (-1, 1):
        s.pen.area(
            s.colour,
            (side * 0.82, -0.78),
            (side * 0.25, -0.78),
            (side * 0.42, 0.1),
            (side * 0.48, 0.78),
            (side * 0.82, 0.78),
        )
    s.pen.line(DARK, 0.06, (-0.9, -0.79), (0.9, -0.79))


def _door(s):
    s.wall()
    s.back.box(np.array(WOOD) * 0.8, -1, 0.82, 1, 1)
    blue = np.array([0.18, 0.38, 0.72]) * s.rng.uniform(0.8, 1.25)
    s.pen.box(CREAM, -0.50, -0.82, 0.50, 0.84)
    s.pen.box(blue, -0.41, -0.74, 0.41, 0.84)
    for x in (-0.20, 0.20):
        s.pen.box(blue * 0.75, x - 0.14, -0.62, x + 0.14, -0.05)
        s.pen.box(blue * 0.75, x - 0.14, 0.12, x + 0.14, 0.70)
    s.pen.disc((0.90, 0.75, 0.30), 0.33, 0.04, 0.06)


def _moon(s):
    s.back.box(np.array([0.07, 0.09, 0.22]) * s.rng.uniform(0.7, 1.4), -1, -1, 1, 1)
    for x, y in s.rng.uniform(-1, 1, (16, 2)):
        s.back.disc(CREAM, x, y, 0.02)
    s.pen.disc((0.97, 0.95, 0.82), 0.1, -0.30, 0.34)
    s.pen.disc((0.86, 0.84, 0.72), 0.0, -0.36, 0.08)
    s.pen.disc((0.86, 0.84, 0.72), 0.2, -0.18, 0.06)
    s.back.disc((0.08, 0.13, 0.13), -0.55, 1.0, 0.95, 0.60)
    s.back.disc((0.05, 0.09, 0.10), 0.55, 1.1, 0.90, 0.62)


def _football(s):
    s.land(SKY, GRASS, -0.25)
    s.pen.disc((0.22, 0.42, 0.20), 0.05, 0.62, 0.52, 0.12)
    s.pen.disc((0.95, 0.95, 0.95), 0, 0.15, 0.50)
    turn = np.linspace(0, 2 * np.pi, 6)[:-1] - np.pi / 2
    s.pen.area(DARK, *zip(0.17 * np.cos(turn), 0.15 + 0.17 * np.sin(turn), strict=True))
    for t in turn:
        s.pen.line(DARK, 0.04, (0.17 * np.cos(t), 0.15 + 0.17 * np.sin(t)), (0.36 * np.cos(t), 0.15 + 0.36 * np.sin(t)))
        s.pen.disc(DARK, 0.41 * np.cos(t), 0.15 + 0.41 * np.sin(t), 0.09)


_DRAWERS = {
    "a red apple on a table": _apple, "a coffee mug": _mug, "a house under a blue sky": _house,
    "a tree in a field": _tree, "mountains at sunset": _mountains, "a sailing boat on the sea": _boat,
    "a bicycle": _bicycle, "a car on a road": _car, "a vase of flowers": _vase, "a stack of books": _books,
    "a desk lamp": _lamp, "a clock on a wall": _clock, "a wooden chair": _chair, "a yellow umbrella": _umbrella,
    "a hot air balloon in the sky": _balloon, "a traffic light": _traffic_light, "a green bottle": _bottle,
    "a slice of pizza on a plate": _pizza, "a window with curtains": _window, "a lighthouse by the sea": _lighthouse,
    "a cactus in a pot": _cactus, "a blue door": _door, "a moon over dark hills": _moon,
    "a football on grass": _football,
}  # fmt: skip
OBJECTS: tuple[str, ...] = tuple(_DRAWERS)


def draw_object(index: int, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """Draw OBJECTS[index], uint8 [size, size, 3], with random position, size, colour and light."""
    stage = _Stage(4 * size, rng)
    _DRAWERS[OBJECTS[index]](stage)
    pixels = np.asarray(stage.image, np.float32) / 255
    across, down = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size))
    slope = rng.uniform(-0.08, 0.08, 2)
    light = rng.uniform(0.88, 1.06) * (1 + slope[0] * across + slope[1] * down)
    small = pixels.reshape(size, 4, size, 4, 3).mean((1, 3)) * light[..., None]
    return (np.clip(small + rng.normal(0, 0.006, small.shape), 0, 1) * 255 + 0.5).astype(np.uint8)
