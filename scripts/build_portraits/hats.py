"""Build headwear as surfaces of revolution on an ellipsoid fitted to the head; it turns with the head."""

from dataclasses import dataclass

import numpy as np
from mesh import Head
from skin import linear
from surface import Surface, ellipsoid, from_grid

HEADWEAR = ("none", "hard hat", "chef's hat", "cap", "beanie", "surgical cap", "helmet", "headset", "visor",
            "straw hat", "peaked cap", "headband")  # fmt: skip
AZIMUTHS = np.linspace(-np.pi, np.pi, 41)
EAR_Y, EAR_Z = 7.05, 0.40  # position in the base mesh


@dataclass(frozen=True)
class Fit:
    """The coordinate frame of a hat: centre of the rim, unit axes (up, forward), half width, half depth, crown height."""

    centre_3: np.ndarray
    up_3: np.ndarray
    forward_3: np.ndarray
    width: float
    depth: float
    height: float
    ear_y: float
    ear_x: float

    def above(self, xyz: np.ndarray) -> np.ndarray:
        """Return whether points [..., 3] are above the rim."""
        return (xyz - self.centre_3) @ self.up_3 > 0.0

    def place(self, across, up, forward) -> np.ndarray:
        """Return points [..., 3] from coordinates in the hat's frame; across and forward in the rim's half axes."""
        xyz = np.multiply.outer(up, self.up_3) + np.multiply.outer(forward * self.depth, self.forward_3)
        xyz[..., 0] = xyz[..., 0] + across * self.width
        return xyz + self.centre_3

    def revolve(self, profile, colour, gloss: float = 0.1) -> Surface:
        """Return the surface that a profile of (radius, height) sweeps around the hat's axis."""
        radius, height = np.array(profile, np.float32).T
        r, h = radius[:, None], height[:, None] * np.ones((1, len(AZIMUTHS)))
        return from_grid(self.place(r * np.sin(AZIMUTHS), h, r * np.cos(AZIMUTHS)), colour, gloss)

    def dome(self, colour, gloss: float = 0.1, grow: float = 1.0, lift: float = 0.0) -> Surface:
        """Return a dome from crown to rim."""
        angle = np.linspace(0, np.pi / 2, 10)
        profile = np.stack([np.sin(angle) ** 0.85 * grow, np.cos(angle) * (self.height * grow) + lift], 1)
        return self.revolve(profile, colour, gloss)

    def brim(self, reach, drop: float, colour, span: float = np.pi) -> Surface:
        """Return a flat brim over azimuths within `span` of the front; reach(azimuth): its width in mesh units."""
        turn = np.linspace(-span, span, 33)
        out = np.linspace(0, 1, 4)[:, None] * reach(turn)[None]
        r = 0.98 + out / self.depth
        return from_grid(self.place(r * np.sin(turn), 0.05 - drop * out, r * np.cos(turn)), colour, 0.2)


def fit_hat(head: Head, xyz_V3: np.ndarray, clearance: float = 0.10) -> Fit:
    """Return the frame of a hat that sits above the brows and on the back of a morphed head."""
    front = xyz_V3[np.argmin(np.abs(head.base_V3 - [0, 8.02, 1.30]).sum(1))]
    back = xyz_V3[np.argmin(np.abs(head.base_V3 - [0, 7.45, -0.60]).sum(1))]
    ear = xyz_V3[(np.abs(head.base_V3[:, 1] - EAR_Y) < 0.15) & (np.abs(head.base_V3[:, 2] - EAR_Z) < 0.2)]
    skull = xyz_V3[head.base_V3[:, 1] > 7.7]
    forward = np.array([0, front[1] - back[1], front[2] - back[2]])
    depth = np.linalg.norm(forward)
    forward = forward / depth
    up, centre = np.array([0, forward[2], -forward[1]]), np.array([0, *(front + back)[1:] / 2])
    height = float(((skull - centre) @ up).max())
    width = float(np.abs(skull[:, 0]).max())
    return Fit(
        centre.astype(np.float32),
        up.astype(np.float32),
        forward.astype(np.float32),
        width + clearance,
        float(depth) / 2 + clearance,
        height + clearance,
        float(ear[:, 1].mean()),
        float(np.abs(ear[:, 0]).max()),
    )


def build_hat(kind: str, fit: Fit, colour_3, accent_3) -> list[Surface]:
    """Return the surfaces of a piece of headwear in two sRGB colours. Raises KeyError for a kind not in HEADWEAR."""
    return _BUILDERS[kind](fit, linear(colour_3), linear(accent_3))


def covers_crown(kind: str) -> bool:
    """Return whether the headwear presses down the hair on top."""
    return kind not in ("none", "headset", "visor", "headband")


def _hard_hat(fit, colour, accent):
    ridge = fit.revolve([(0.07, fit.height + 0.15), (0.16, fit.height + 0.12), (0.30, fit.height)], colour * 0.8, 0.5)
    brim = fit.brim(lambda a: 0.14 + 0.24 * np.clip(np.cos(a), 0, 1) ** 2, 0.25, colour * 0.9)
    return [fit.dome(colour, 0.5, 1.04, 0.02), ridge, brim]


def _chef(fit, colour, accent):
    top = fit.height
    band = fit.revolve([(1.0, -0.02), (0.99, top * 0.75)], colour * 0.92)
    puff = [
        (0.99, top * 0.75),
        (1.18, top * 0.95),
        (1.22, top * 1.2),
        (1.05, top * 1.42),
        (0.6, top * 1.52),
        (0, top * 1.54),
    ]
    return [band, fit.revolve(puff, colour)]


def _cap(fit, colour, accent):
    return [
        fit.dome(colour, 0.1, 1.02),
        fit.brim(lambda a: 0.52 * np.clip(np.cos(a * 1.3), 0, 1) ** 0.5, 0.30, accent, 1.2),
    ]


def _beanie(fit, colour, accent):
    return [fit.dome(colour, 0.0, 1.05, 0.06), fit.revolve([(1.07, -0.06), (1.10, 0.1), (1.07, 0.28)], accent, 0.0)]


def _surgical(fit, colour, accent):
    h = fit.height
    profile = [(0, h * 1.06), (0.5, h * 1.02), (0.92, h * 0.78), (1.09, h * 0.45), (1.08, h * 0.15), (1.0, -0.04)]
    return [fit.revolve(profile, colour, 0.0), fit.revolve([(1.02, -0.04), (1.05, 0.06)], accent, 0.0)]


def _helmet(fit, colour, accent):
    brim = fit.brim(
        lambda a: 0.20 + 0.14 * np.clip(np.cos(a), 0, 1) + 0.3 * np.clip(-np.cos(a), 0, 1), 0.35, colour * 0.75
    )
    shield = ellipsoid(fit.place(0.0, 0.32, 1.0), (0.20, 0.26, 0.10), accent, 0.4)
    band = fit.revolve([(1.07, 0.02), (1.07, 0.14)], accent, 0.3)
    return [fit.dome(colour, 0.5, 1.05, 0.02), brim, shield, band]


def _headset(fit, colour, accent):
    turn = np.linspace(-1.75, 1.75, 31)
    strip = np.array([-0.10, 0.10])[:, None] + 0.0 * turn[None]
    arc = fit.place(
        1.10 * np.sin(turn)[None] + 0 * strip, (fit.height + 0.16) * np.cos(turn)[None] + 0 * strip, strip - 0.05
    )
    cups = [ellipsoid((s * (fit.ear_x + 0.05), fit.ear_y, 0.45), (0.14, 0.26, 0.24), accent, 0.3) for s in (-1, 1)]
    boom = np.linspace(0, 1, 8)
    x, y, z = fit.ear_x + 0.08 - 0.42 * boom**2, fit.ear_y - 0.15 - 0.38 * boom, 0.6 + 0.85 * boom
    stick = np.stack([np.stack([x, y + d, z], -1) for d in (-0.03, 0.03)])
    tip = ellipsoid((x[-1], y[-1], z[-1]), (0.09, 0.07, 0.07), colour * 0.3)
    return [from_grid(arc, colour, 0.3), *cups, from_grid(stick, colour * 0.5), tip]


def _visor(fit, colour, accent):
    shade = fit.brim(lambda a: 0.60 * np.clip(np.cos(a * 1.2), 0, 1) ** 0.5, 0.35, accent, 1.3)
    return [fit.revolve([(1.06, 0.0), (1.05, 0.24)], colour), shade]


def _straw(fit, colour, accent):
    band = fit.revolve([(1.06, 0.02), (1.05, 0.22)], accent, 0.0)
    return [fit.dome(colour, 0.0, 1.04, 0.04), band, fit.brim(lambda a: 0.55 + 0 * a, 0.12, colour * 0.92)]


def _peaked(fit, colour, accent):
    h = fit.height
    profile = [(1.01, 0.0), (1.02, 0.26), (1.30, 0.62), (1.22, h * 0.95), (0.7, h * 1.08), (0, h * 1.1)]
    shade = fit.brim(lambda a: 0.36 * np.clip(np.cos(a * 1.3), 0, 1) ** 0.5, 0.55, linear([0.07, 0.07, 0.08]), 1.2)
    badge = ellipsoid(fit.place(0.0, 0.40, 1.14), (0.14, 0.16, 0.08), accent, 0.5)
    return [fit.revolve(profile, colour), fit.revolve([(1.03, 0.0), (1.035, 0.2)], colour * 0.45), shade, badge]


def _headband(fit, colour, accent):
    return [fit.revolve([(1.03, 0.02), (1.04, 0.26)], colour, 0.0), fit.revolve([(1.045, 0.10), (1.045, 0.18)], accent)]


_BUILDERS = {
    "none": lambda fit, colour, accent: [], "hard hat": _hard_hat, "chef's hat": _chef, "cap": _cap,
    "beanie": _beanie, "surgical cap": _surgical, "helmet": _helmet, "headset": _headset, "visor": _visor,
    "straw hat": _straw, "peaked cap": _peaked, "headband": _headband,
}  # fmt: skip
