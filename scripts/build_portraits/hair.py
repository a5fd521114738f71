"""Build hair as closed smooth volumes over the scalp's polar grid; at 64 pixels only the silhouette is visible."""

import numpy as np
from mesh import Head
from people import Person
from skin import linear, smooth
from surface import Surface, ellipsoid, from_grid

# The hairline of a head without a fringe: polar angle where hair ends, by distance in azimuth from the front.
LINE_AZIMUTH = (0, 20, 38, 52, 66, 78, 88, 100, 118, 140, 160, 180)
LINE_POLAR = (57, 58, 63, 71, 84, 102, 93, 99, 112, 124, 131, 134)
STYLES = {  # thickness on top, at the sides, hanging length (mesh units; the head is about 2.3 high)
    "buzz": (0.045, 0.04, 0.0), "short": (0.21, 0.085, 0.0), "medium": (0.29, 0.21, 0.0),
    "receding": (0.07, 0.11, 0.0), "afro": (0.55, 0.50, 0.0), "pixie": (0.26, 0.19, 0.0),
    "bob": (0.24, 0.26, 0.95), "shoulder": (0.24, 0.27, 1.55), "long": (0.23, 0.27, 2.5), "tied": (0.16, 0.11, 0.0),
}  # fmt: skip
CAP_ROWS, HANG_ROWS = 15, 10


def hairline(person: Person, azimuth_Z: np.ndarray) -> np.ndarray:
    """Return the polar angle in degrees at which a person's hair ends, by azimuth in radians."""
    turn = np.abs(np.degrees(azimuth_Z))
    line = np.interp(turn, LINE_AZIMUTH, LINE_POLAR)
    if person.style == "receding":
        return line - 34 * smooth(75, 45, turn)
    if person.gender == 1 and person.age == 1:
        line = line - 9 * np.exp(-(((turn - 34) / 18) ** 2))
    if person.gender == 0:
        line = line + 4 * smooth(75, 50, turn)
    if person.style in ("buzz", "short"):
        line = line - 5 * smooth(92, 100, turn)
    if person.style in ("bob", "shoulder", "long", "pixie") and not person.fringe:
        swept = np.abs(np.degrees(azimuth_Z) - 40 * person.parting)  # falls to both sides of the parting
        line = np.maximum(line, np.where(turn < 70, 52 + 26 * smooth(4, 52, swept), line))
    if person.style == "pixie":
        line = np.where(turn > 70, np.maximum(line, 99), line)
    long_enough = person.style in ("bob", "shoulder", "long", "pixie", "medium", "short", "tied")
    reach = 20 if person.gender == 0 else 12
    return line + person.fringe * long_enough * reach * np.exp(-((turn / 50) ** 4))


def build_hair(head: Head, person: Person, xyz_V3, normal_V3, hat=None) -> list[Surface]:
    """Return the surfaces of a person's hair on a morphed head. hat: the fit of a hat that presses it down, or None."""
    if person.style == "bald":
        return []
    rng = np.random.default_rng(person.seed)
    shape = (len(head.polar_A), len(head.azimuth_Z))
    tri, bary = head.scalp_tri_G3, head.scalp_bary_G3[:, :, None]
    ground = (xyz_V3[tri] * bary).sum(1).reshape(*shape, 3)
    outward = (normal_V3[tri] * bary).sum(1).reshape(*shape, 3)
    top, side, hang = STYLES[person.style]
    top, side, hang = top * rng.uniform(0.85, 1.25), side * rng.uniform(0.85, 1.2), hang * rng.uniform(0.85, 1.12)
    if person.texture in ("curly", "coily") and person.style not in ("buzz", "receding", "tied", "afro"):
        top, side = top * 1.2, side * 1.4
    end = np.radians(hairline(person, head.azimuth_Z))
    turn = np.degrees(np.abs(head.azimuth_Z))
    front = 58 if not person.fringe else 52
    hanging = smooth(front - 8, front + 6, turn) * (hang > 0)
    end = np.where(hanging > 0.5, np.minimum(end, np.radians(88)), end)
    start = np.radians(52) if person.style == "receding" and person.seed % 2 else 0.0
    share = np.linspace(0, 1, CAP_ROWS)[:, None]
    polar = np.minimum(start, end) + share * (end - np.minimum(start, end))[None]
    row = np.clip(polar / head.polar_A[1], 0, shape[0] - 1.001)
    low, column = row.astype(int), np.arange(shape[1])[None]
    part = (row - low)[..., None]
    root = ground[low, column] * (1 - part) + ground[low + 1, column] * part
    away = outward[low, column] * (1 - part) + outward[low + 1, column] * part
    thick = _thickness(person, rng, polar, share, (top, side), hanging)
    if hat is not None:
        thick = np.where(hat.above(root), np.minimum(thick, 0.045), thick)
    away = away / np.maximum(np.linalg.norm(away, axis=-1, keepdims=True), 1e-6)
    if person.style in ("short", "medium", "pixie"):
        away = away + np.array([0, 0.25, 0], np.float32)
    cap = root + away * thick[..., None]
    length = 0.5 * share * np.ones_like(thick)
    if hang:
        drape, down = _drape(person, cap[-1], hang, hanging, xyz_V3[:, 1].max() - 2.33)
        cap, length = np.concatenate([cap, drape]), np.concatenate([length, 0.5 + 0.5 * down])
    strand = np.stack(np.broadcast_arrays(head.azimuth_Z[None] / np.pi, length), -1)
    colour = linear(person.hair_3)
    pieces = [from_grid(cap, colour, _gloss(person), strand)]
    return pieces + (_tie(person, xyz_V3, colour, hat is not None) if person.style == "tied" else [])


def _gloss(person: Person) -> float:
    return {"straight": 0.9, "wavy": 0.6, "curly": 0.3, "coily": 0.1}[person.texture]


def _thickness(person, rng, polar, share, top_side, hanging):
    top, side = top_side
    thick = top + (side - top) * smooth(np.radians(30), np.radians(85), polar)
    lumps = rng.standard_normal(polar.shape)
    lumps = (lumps + np.roll(lumps, 1, 1) + np.roll(lumps, -1, 1)) / 1.7
    amount = {"straight": 0.03, "wavy": 0.07, "curly": 0.13, "coily": 0.09}[person.texture]
    thick = thick * (1 + amount * lumps)
    if person.style in ("short", "medium") and person.parting:
        turn = np.linspace(-np.pi, np.pi, polar.shape[1])[None]
        thick = thick * (1 + 0.45 * np.sin(turn * np.sign(person.parting)) * smooth(1.5, 0.6, polar))
    taper = smooth(1.03, 0.78 if person.style != "afro" else 0.86, share)
    taper = taper + (1 - taper) * hanging[None]
    rounded = thick * (0.04 + 0.96 * taper) - 0.02 * (1 - taper)
    return rounded if person.style != "receding" else rounded * smooth(0, 0.2, share)


def _drape(person, rim_Z3, hang, hanging, chin):
    """Return hair that falls from the cap's rim: outside the cheeks, over the front of the shoulders or down the back."""
    down = np.linspace(0, 1, HANG_ROWS + 1)[1:, None]
    out = rim_Z3 - np.array([0, 0, 0.4])
    out[:, 1] = 0
    out = out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-6)
    behind = np.linspace(-180, 180, len(rim_Z3))
    behind = np.abs(behind)[None]
    puff = {"straight": 0.04, "wavy": 0.10, "curly": 0.22, "coily": 0.30}[person.texture]
    fall = down * hang * hanging[None]
    swing = puff * np.sin(np.pi * np.clip(down * 1.05, 0, 1)) + 0.06 * down
    if person.style == "bob":
        swing = swing - 0.10 * smooth(0.6, 1, down)
    if person.texture in ("wavy", "curly"):
        swing = swing + 0.045 * np.sin(fall * 7.5 + np.array([[person.seed % 7]]))
    points = rim_Z3[None] + out[None] * (swing * hanging[None])[..., None]
    points[..., 1] -= fall
    below = smooth(0.0, 0.9, chin - 0.35 - points[..., 1])
    points[..., 2] += np.where(behind < 120, 0.75, -0.25) * below * hanging[None]
    return points, down * np.ones_like(fall)


def _tie(person, xyz_V3, colour, hatted: bool):
    """Return gathered hair: a bun on the crown, or a knot in the nape (always under a hat), visible beside the neck."""
    crown = xyz_V3[:, 1].max()
    if hatted or person.seed % 3 == 0:
        return [ellipsoid((0.0, crown - 1.95, -0.45), (0.74, 0.48, 0.30), colour, _gloss(person))]
    size = 0.30 + 0.10 * (person.seed % 5) / 4
    return [ellipsoid((0.0, crown + 0.22, 0.1), (size * 1.15, size, size), colour, _gloss(person))]
