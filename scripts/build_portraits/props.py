"""Draw tools and other objects flat over a rendered person, in front of the chest or beside the head."""

import numpy as np
from pen import Pen
from PIL import Image

STEEL, DARK, WOOD, PAPER = (0.72, 0.74, 0.77), (0.13, 0.13, 0.15), (0.62, 0.42, 0.24), (0.95, 0.94, 0.90)


def _stethoscope(p, c, a):
    p.line(DARK, 0.17, (-0.85, -1.3), (-0.95, -0.3), (-0.6, 0.5), (0, 0.75), (0.6, 0.5), (0.95, -0.3), (0.85, -1.3))
    p.line(DARK, 0.17, (0.0, 0.75), (0.05, 1.1))
    p.disc(STEEL, 0.05, 1.2, 0.27)
    p.disc(DARK, 0.05, 1.2, 0.11)


def _tape(p, c, a):
    p.line((0.97, 0.85, 0.25), 0.24, (-0.85, -1.2), (-0.95, 0.0), (-0.85, 1.2))
    p.line((0.97, 0.85, 0.25), 0.24, (0.85, -1.2), (0.95, 0.0), (0.85, 1.2))


def _lanyard(p, c, a):
    p.line(c, 0.14, (-0.75, -1.2), (0.0, 0.55), (0.75, -1.2))
    p.box(PAPER, -0.34, 0.5, 0.34, 1.25)
    p.box(a, -0.34, 0.5, 0.34, 0.72)


def _wrench(p, c, a):
    p.line(STEEL, 0.34, (0, 1.3), (0, -0.5))
    p.ring(STEEL, 0.34, 0, -0.85, 0.38, start=-50, stop=230)


def _hammer(p, c, a):
    p.line(WOOD, 0.28, (0, 1.4), (0, -0.7))
    p.box(DARK, -0.62, -1.15, 0.55, -0.65)
    p.area(DARK, (0.5, -1.15), (0.95, -0.8), (0.5, -0.7))


def _saw(p, c, a):
    p.area(STEEL, (-0.25, 0.6), (0.3, 0.6), (0.1, -1.4), (-0.25, -1.4))
    p.box(WOOD, -0.4, 0.55, 0.45, 1.15)


def _brush(p, c, a):
    p.line(WOOD, 0.22, (0, 1.4), (0, -0.3))
    p.box(STEEL, -0.28, -0.55, 0.28, -0.2)
    p.area(c, (-0.30, -0.5), (0.30, -0.5), (0.22, -1.3), (-0.22, -1.3))


def _roller(p, c, a):
    p.line(DARK, 0.16, (0, 1.3), (0, -0.2), (0.65, -0.2), (0.65, -0.8))
    p.box(c, -0.75, -1.2, 0.75, -0.65)


def _book(p, c, a):
    p.box(c, -0.85, -1.0, 0.85, 1.05)
    p.box(PAPER, 0.7, -0.92, 0.85, 0.97)
    p.box(a, -0.55, -0.65, 0.45, -0.3)


def _papers(p, c, a):
    p.box(WOOD, -0.85, -1.05, 0.85, 1.15)
    p.box(PAPER, -0.70, -0.82, 0.70, 1.05)
    p.box(STEEL, -0.30, -1.15, 0.30, -0.80)
    for y in (-0.45, -0.1, 0.25, 0.6):
        p.line((0.5, 0.55, 0.62), 0.09, (-0.5, y), (0.5, y))


def _laptop(p, c, a):
    p.area((0.55, 0.57, 0.60), (-1.5, -0.3), (1.5, -0.3), (1.6, 1.4), (-1.6, 1.4))
    p.disc(PAPER, 0, 0.4, 0.22)


def _tablet(p, c, a):
    p.box(DARK, -0.9, -1.1, 0.9, 1.1)
    p.box((0.55, 0.78, 0.93), -0.75, -0.9, 0.75, 0.85)
    p.line(PAPER, 0.14, (-0.5, 0.3), (-0.15, -0.1), (0.15, 0.1), (0.5, -0.45))


def _microphone(p, c, a):
    p.line(DARK, 0.30, (0, 1.4), (0, -0.3))
    p.disc(STEEL, 0, -0.7, 0.46)
    p.ring(DARK, 0.10, 0, -0.7, 0.25)


def _ball(p, c, a):
    p.disc((0.95, 0.52, 0.18) if c[0] > 0.5 else PAPER, 0, 0, 1.0)
    p.ring(DARK, 0.10, 0, 0, 0.97)
    p.line(DARK, 0.10, (-1.0, 0), (1.0, 0))
    p.line(DARK, 0.10, (0, -1.0), (0, 1.0))


def _plant(p, c, a):
    for x, y in ((-0.6, -0.6), (0.6, -0.6), (0, -1.0), (-0.3, -0.2), (0.35, -0.2)):
        p.disc((0.20, 0.52 + 0.1 * x, 0.22), x, y, 0.38, 0.5)
    p.area((0.72, 0.38, 0.24), (-0.6, 0.25), (0.6, 0.25), (0.45, 1.2), (-0.45, 1.2))


def _flowers(p, c, a):
    p.area((0.9, 0.88, 0.8), (-0.55, 0.1), (0.55, 0.1), (0.12, 1.4), (-0.12, 1.4))
    p.disc((0.22, 0.48, 0.22), 0, -0.15, 0.75, 0.5)
    for x, y in ((-0.55, -0.35), (0.05, -0.75), (0.6, -0.35), (0.0, -0.15)):
        p.disc((0.92, 0.32, 0.45), x, y, 0.30)
        p.disc((0.98, 0.85, 0.3), x, y, 0.11)


def _camera(p, c, a):
    p.box(DARK, -1.1, -0.6, 1.1, 0.8)
    p.box(DARK, -0.4, -0.9, 0.4, -0.5)
    p.disc(STEEL, 0, 0.1, 0.55)
    p.disc((0.15, 0.25, 0.40), 0, 0.1, 0.38)


def _scissors(p, c, a):
    p.line(STEEL, 0.20, (-0.35, -1.3), (0.25, 0.4))
    p.line(STEEL, 0.20, (0.35, -1.3), (-0.25, 0.4))
    p.ring(c, 0.18, -0.42, 0.8, 0.36)
    p.ring(c, 0.18, 0.42, 0.8, 0.36)


def _spoon(p, c, a):
    p.line(WOOD, 0.22, (0, 1.4), (0, -0.5))
    p.disc(WOOD, 0, -0.85, 0.38, 0.52)


def _tray(p, c, a):
    p.disc(STEEL, 0, 0.2, 1.25, 0.28)
    p.box(PAPER, -0.65, -0.5, -0.05, 0.15)
    p.area((0.75, 0.25, 0.22), (0.25, -0.65), (0.85, -0.65), (0.65, 0.15), (0.45, 0.15))


def _bread(p, c, a):
    p.disc((0.80, 0.55, 0.27), 0, 0, 1.1, 0.65)
    for x in (-0.5, 0.0, 0.5):
        p.line((0.95, 0.80, 0.55), 0.14, (x - 0.15, 0.3), (x + 0.15, -0.4))


def _flask(p, c, a):
    p.area((0.85, 0.92, 0.95), (-0.2, -1.2), (0.2, -1.2), (0.22, -0.4), (0.8, 1.0), (-0.8, 1.0), (-0.22, -0.4))
    p.area(c, (-0.45, 0.2), (0.45, 0.2), (0.8, 1.0), (-0.8, 1.0))


def _syringe(p, c, a):
    p.line(STEEL, 0.08, (0, -1.4), (0, -0.7))
    p.box(PAPER, -0.24, -0.75, 0.24, 0.6)
    p.box((0.45, 0.75, 0.85), -0.24, -0.1, 0.24, 0.6)
    p.line(STEEL, 0.14, (0, 0.6), (0, 1.1))
    p.line(STEEL, 0.16, (-0.35, 1.15), (0.35, 1.15))


def _box(p, c, a):
    p.box((0.76, 0.58, 0.38), -1.1, -0.7, 1.1, 1.2)
    p.box((0.90, 0.80, 0.62), -0.18, -0.7, 0.18, 1.2)
    p.line((0.55, 0.40, 0.25), 0.08, (-1.1, -0.7), (1.1, -0.7))


def _letter(p, c, a):
    p.box(PAPER, -1.05, -0.65, 1.05, 0.75)
    p.line((0.55, 0.55, 0.6), 0.10, (-1.05, -0.65), (0, 0.2), (1.05, -0.65))
    p.box(c, 0.6, 0.35, 0.9, 0.62)


def _wheel(p, c, a):
    p.ring(DARK, 0.28, 0, 0.2, 1.1)
    p.line(DARK, 0.2, (-1.1, 0.2), (1.1, 0.2))
    p.line(DARK, 0.2, (0, 0.2), (0, 1.2))


def _guitar(p, c, a):
    p.line(DARK, 0.20, (0, 0), (0, -1.5))
    p.disc(WOOD, 0, 0.85, 0.72, 0.62)
    p.disc(WOOD, 0, 0.2, 0.5, 0.45)
    p.disc(DARK, 0, 0.55, 0.20)


def _broom(p, c, a):
    p.line(WOOD, 0.20, (0, 1.5), (0, -0.5))
    p.area((0.88, 0.75, 0.35), (-0.25, -0.5), (0.25, -0.5), (0.6, -1.4), (-0.6, -1.4))


def _cup(p, c, a):
    p.area(c, (-0.6, -0.8), (0.6, -0.8), (0.45, 0.9), (-0.45, 0.9))
    p.box(PAPER, -0.66, -1.0, 0.66, -0.75)
    p.box((0.55, 0.38, 0.25), -0.56, -0.3, 0.56, 0.3)


def _gavel(p, c, a):
    p.line(WOOD, 0.24, (0, 1.4), (0, -0.4))
    p.box((0.45, 0.28, 0.15), -0.8, -1.1, 0.8, -0.4)
    p.line((0.85, 0.7, 0.3), 0.12, (0, -1.1), (0, -0.4))


def _whistle(p, c, a):
    p.line((0.8, 0.15, 0.15), 0.13, (-0.75, -1.2), (0.0, 0.35), (0.75, -1.2))
    p.disc(STEEL, 0.0, 0.65, 0.34)
    p.box(STEEL, 0.0, 0.35, 0.62, 0.65)


def _radio(p, c, a):
    p.box(DARK, -0.45, -0.6, 0.45, 1.2)
    p.line(DARK, 0.16, (0.25, -0.6), (0.25, -1.5))
    p.box((0.55, 0.75, 0.55), -0.28, -0.4, 0.28, 0.0)


# The place of each: "neck" is the middle of the chest, "hand" one side, "lap" the middle of the bottom.
PROPS = {
    "none": (None, "hand"), "stethoscope": (_stethoscope, "neck"), "tape measure": (_tape, "neck"),
    "lanyard": (_lanyard, "neck"), "whistle": (_whistle, "neck"), "wrench": (_wrench, "hand"),
    "hammer": (_hammer, "hand"), "saw": (_saw, "hand"), "brush": (_brush, "hand"), "roller": (_roller, "hand"),
    "book": (_book, "hand"), "clipboard": (_papers, "hand"), "laptop": (_laptop, "lap"), "tablet": (_tablet, "hand"),
    "microphone": (_microphone, "hand"), "ball": (_ball, "hand"), "plant": (_plant, "hand"),
    "flowers": (_flowers, "hand"), "camera": (_camera, "lap"), "scissors": (_scissors, "hand"),
    "spoon": (_spoon, "hand"), "tray": (_tray, "hand"), "bread": (_bread, "hand"), "flask": (_flask, "hand"),
    "syringe": (_syringe, "hand"), "box": (_box, "hand"), "letter": (_letter, "hand"), "wheel": (_wheel, "lap"),
    "guitar": (_guitar, "hand"), "broom": (_broom, "hand"), "cup": (_cup, "hand"), "gavel": (_gavel, "hand"),
    "radio": (_radio, "hand"),
}  # fmt: skip


def draw_props(look, picture_HW3: np.ndarray, chin: float) -> np.ndarray:
    """Return the image (float in [0, 1]) with the look's prop drawn in. chin: height of the chin in pixels."""
    draw, place = PROPS[look.prop]
    if draw is None:
        return picture_HW3
    size = picture_HW3.shape[0]
    k, (dx, dy) = size / 64, look.prop_shift_2
    image = Image.fromarray((np.clip(picture_HW3, 0, 1) * 255).astype(np.uint8))
    if place == "neck":
        pen = Pen(image, size / 2 + 0.5 * dx * k, max(chin + 11.5 * k, 56 * k) - k, 7.2 * k, 0.3 * look.prop_angle)
    elif place == "lap":
        pen = Pen(image, size / 2 + dx * k, 58.5 * k, 7.5 * k, 0.3 * look.prop_angle)
    else:
        side = 1 if look.prop_right else -1
        x = size / 2 + side * (21.5 + 0.5 * dx) * k
        pen = Pen(image, x, (52.5 + dy) * k, 7.8 * k, look.prop_angle, mirror=side < 0)
    draw(pen, look.prop_3, look.accent_3)
    return np.asarray(image, np.float32) / 255
