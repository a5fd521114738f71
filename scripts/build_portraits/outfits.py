"""Clothing as patterns of reflectance over the base mesh: which points of the bust it covers, and in which colour."""

import numpy as np
from skin import linear, smooth

OUTFITS = ("t-shirt", "shirt", "suit", "apron", "hi-vis vest", "lab coat", "scrubs", "overalls", "uniform",
           "turtleneck", "robe", "hoodie", "striped shirt", "work jacket")  # fmt: skip
WHITE, INK, GOLD = (0.93, 0.93, 0.92), (0.10, 0.10, 0.12), (0.88, 0.70, 0.28)
_V_DEPTH = {"scrubs": 0.75, "hi-vis vest": 0.15, "suit": 0.25, "lab coat": 0.25, "shirt": 0.35, "uniform": 0.1}


def neckline(outfit: str, xyz_P3: np.ndarray) -> np.ndarray:
    """Return the height in the base mesh below which the outfit covers the body, at each point."""
    x, z = np.abs(xyz_P3[:, 0]), xyz_P3[:, 2]
    collar = 5.60 + (0.8 - z) * 0.4545
    depth = _V_DEPTH.get(outfit, 0.0)
    collar = collar - 2.2 * depth * np.clip(0.45 - x, 0, 1) * (z > 0.3)
    return collar + (0.42 if outfit == "turtleneck" else 0.0)


def clothe(outfit: str, main_3, accent_3, xyz_P3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return linear reflectance [P, 3] and cover [P] in [0, 1] of an outfit in two sRGB colours at base points."""
    below = neckline(outfit, xyz_P3) - xyz_P3[:, 1]
    cover = smooth(-0.012, 0.012, below)
    paint = _Paint(xyz_P3, below, main_3)
    _PATTERNS[outfit](paint, main_3, accent_3)
    paint.fill(paint.below < 0.05, np.asarray(paint.colour_P3.mean(0)) ** (1 / 2.2) * 0.8, 0.5)
    return paint.colour_P3, cover


class _Paint:
    """A canvas over points of the bust: x across (signed), y up, z forward, below = depth under the neckline."""

    def __init__(self, xyz_P3, below, ground) -> None:
        self.x, self.y, self.z = xyz_P3.T
        self.ax, self.front = np.abs(self.x), xyz_P3[:, 2] > 0.25
        self.below = np.where(self.ax < 0.70, below, 9.0)  # collars stay at the neck, off the shoulders
        self.colour_P3 = np.repeat(linear(ground)[None], len(xyz_P3), 0)

    def fill(self, where, colour, weight: float = 1.0) -> None:
        w = (where * weight)[:, None].astype(np.float32)
        self.colour_P3 = self.colour_P3 * (1 - w) + linear(np.clip(colour, 0, 1)) * w

    def lapels(self, shirt, lapel, bottom: float = 4.05) -> None:
        """Draw an open front down to `bottom`: a shirt inside a V, and folded lapels beside it."""
        half = np.clip(self.y - bottom, 0, 3) * 0.30
        self.fill(self.front & (self.ax < half), shirt)
        self.fill(self.front & (self.ax >= half) & (self.ax < half + 0.24) & (self.y > bottom), lapel)
        self.fill(self.front & (np.abs(self.ax - half - 0.25) < 0.025) & (self.y > bottom), np.asarray(lapel) * 0.45)

    def collar(self, colour, width: float = 0.24) -> None:
        """Draw a folded collar round the neck with a shadow under it."""
        flap = width + 0.20 * np.clip(0.5 - self.ax, 0, 1) * self.front
        self.fill(self.below < flap, colour)
        self.fill(np.abs(self.below - flap) < 0.03, np.asarray(colour) * 0.5)


def _t_shirt(p, main, accent):
    p.fill(p.below < 0.09, np.asarray(main) * 0.82)


def _shirt(p, main, accent):
    p.fill(p.front & (p.ax < 0.03), np.asarray(main) * 0.7)
    p.fill(p.front & (p.ax < 0.035) & (np.mod(p.y, 0.4) < 0.07), np.asarray(main) * 0.35)
    p.collar(np.clip(np.asarray(main) * 1.15 + 0.05, 0, 1))


def _striped(p, main, accent):
    p.fill(np.mod(p.y + 0.12 * p.ax, 0.46) < 0.22, accent)


def _suit(p, main, accent):
    p.lapels(accent, np.asarray(main) * 0.8 + 0.03)
    p.fill(p.front & (p.below < 0.22) & (p.ax < 0.5), np.clip(np.asarray(accent) * 1.1, 0, 1))


def _apron(p, main, accent):
    p.collar(np.asarray(main) * 0.9)
    p.fill(p.front & (p.ax < 0.74) & (p.y < 5.02), accent)
    p.fill((np.abs(p.ax - 0.66) < 0.11) & (p.y > 4.9), accent)
    p.fill(p.front & (p.ax < 0.76) & (np.abs(p.y - 5.02) < 0.035), np.asarray(accent) * 0.5)


def _hi_vis(p, main, accent):
    vest = (p.ax > np.clip(5.6 - p.y, 0.08, 0.5) * 0.5) & (p.ax < 1.62)
    p.colour_P3 = np.repeat(linear(accent)[None], len(p.x), 0)
    p.fill(vest, main)
    silver = (0.87, 0.89, 0.88)
    p.fill(vest & (np.abs(p.ax - 0.92) < 0.15), silver)
    p.fill(vest & (np.abs(p.y - 4.55) < 0.13), silver)
    p.fill(vest & ((np.abs(p.ax - 0.75) < 0.03) | (np.abs(p.ax - 1.09) < 0.03)), np.asarray(main) * 0.6)


def _lab_coat(p, main, accent):
    p.colour_P3 = np.repeat(linear(WHITE)[None], len(p.x), 0)
    p.lapels(main, (0.84, 0.85, 0.87), 3.9)
    p.fill(p.front & (np.abs(p.x - 0.95) < 0.28) & (np.abs(p.y - 4.62) < 0.03), (0.6, 0.62, 0.66))
    p.fill(p.front & (np.abs(p.x - 0.85) < 0.035) & (p.y < 4.85) & (p.y > 4.6), accent)


def _scrubs(p, main, accent):
    p.fill(p.front & (p.below < 0.13) & (p.ax < 0.7), np.asarray(main) * 0.62)
    p.fill(p.front & (np.abs(p.x - 0.9) < 0.3) & (np.abs(p.y - 4.6) < 0.03), np.asarray(main) * 0.6)


def _overalls(p, main, accent):
    p.fill(p.front & (p.ax < 0.78) & (p.y < 4.80), accent)
    p.fill((np.abs(p.ax - 0.74) < 0.15) & (p.y > 4.6), accent)
    p.fill(p.front & (np.hypot(p.ax - 0.74, p.y - 4.82) < 0.11), GOLD)
    p.fill(p.front & (p.ax < 0.3) & (np.abs(p.y - 4.45) < 0.03), np.asarray(accent) * 0.55)


def _uniform(p, main, accent):
    p.collar(np.asarray(main) * 0.75)
    p.fill(p.front & (p.ax < 0.03), np.asarray(main) * 0.5)
    p.fill(p.front & (np.hypot(p.x - 0.80, (p.y - 4.85) * 0.8) < 0.17), GOLD)
    p.fill((p.ax > 1.15) & (p.ax < 1.42) & (p.y > 5.0), accent)
    p.fill(p.front & (np.abs(p.x + 0.85) < 0.26) & (np.abs(p.y - 4.9) < 0.05), accent)


def _turtleneck(p, main, accent):
    p.fill(p.below < 0.42, np.asarray(main) * 0.88)
    p.fill(np.abs(p.below - 0.43) < 0.03, np.asarray(main) * 0.5)


def _robe(p, main, accent):
    p.colour_P3 = np.repeat(linear(INK)[None], len(p.x), 0)
    p.fill((np.abs(p.ax - 0.42) < 0.18) | (p.below < 0.2), accent)
    p.fill(p.front & (p.ax < 0.16) & (p.y > 4.9), WHITE)


def _hoodie(p, main, accent):
    p.fill(p.below < 0.36, np.asarray(main) * 0.78)
    p.fill(np.abs(p.below - 0.37) < 0.035, np.asarray(main) * 0.4)
    p.fill(p.front & (np.abs(p.ax - 0.26) < 0.04) & (p.y < 5.3) & (p.y > 4.7), WHITE)


def _work_jacket(p, main, accent):
    p.lapels(accent, np.asarray(main) * 1.15, 4.6)
    p.fill(p.front & (p.ax < 0.035) & (p.y < 4.7), np.asarray(main) * 0.4)
    p.fill(p.front & (np.abs(p.ax - 0.85) < 0.3) & (np.abs(p.y - 4.6) < 0.035), np.asarray(main) * 0.45)


_PATTERNS = {
    "t-shirt": _t_shirt, "shirt": _shirt, "suit": _suit, "apron": _apron, "hi-vis vest": _hi_vis,
    "lab coat": _lab_coat, "scrubs": _scrubs, "overalls": _overalls, "uniform": _uniform,
    "turtleneck": _turtleneck, "robe": _robe, "hoodie": _hoodie, "striped shirt": _striped,
    "work jacket": _work_jacket,
}  # fmt: skip
