"""Maps over the front of the base mesh for redness, hollows, wrinkles, brows, lips and beards of the skin."""

import numpy as np
from mesh import MAP_SHAPE, MAP_X, MAP_Y
from people import Person
from raster import lookup

CHANNELS = ("lips", "flush", "hollow", "wrinkle", "brow_male", "brow_female", "liner", "shadow", "jaw", "moustache",
            "chin", "mouth", "oil")  # fmt: skip
BEARDS = {  # strengths of (jaw, moustache, chin), and the thickness of the beard in mesh units
    "none": (0.10, 0.10, 0.10, 0.0), "stubble": (0.42, 0.42, 0.42, 0.0), "full": (0.93, 0.93, 0.93, 0.07),
    "goatee": (0.12, 0.88, 0.92, 0.05), "moustache": (0.10, 0.92, 0.10, 0.03),
}  # fmt: skip


def linear(srgb) -> np.ndarray:
    """Return the linear light of sRGB values in [0, 1]."""
    c = np.asarray(srgb, np.float32)
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def smooth(low, high, x) -> np.ndarray:
    """Return the smooth step from 0 at `low` to 1 at `high` (falling where low > high)."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _bump(x, y, cx, cy, wx, wy):
    return np.exp(-(((x - cx) / wx) ** 2) - ((y - cy) / wy) ** 2)


def beard_masks(x, y):
    """Return masks in [0, 1] of jaw with cheeks, moustache and chin. x: distance from the middle, y: height in the mesh."""
    edge = 6.60 + np.clip(x - 0.30, 0, 1) * 1.05  # the upper border rises towards the sideburn
    bare_lip = np.exp(-((x / 0.25) ** 6) - ((y - 6.605) / 0.085) ** 6)
    jaw = smooth(edge + 0.07, edge - 0.07, y) * smooth(6.0, 6.16, y) * (1 - bare_lip)
    drop = 6.765 - 0.35 * np.clip(x - 0.08, 0, 1)
    moustache = np.exp(-(((x - 0.11) / 0.19) ** 4) - ((y - drop) / 0.062) ** 4)
    chin = jaw * np.exp(-((x / 0.27) ** 4))
    return jaw, moustache, chin


def _wrinkles(signed, x, y):
    """Return lines of forehead, mouth, chin, eyes and neck, wide enough for an image of 64 pixels."""
    line = 0
    for height, s in ((7.70, 0.9), (7.83, 1.0), (7.95, 0.8)):
        line = line + s * np.exp(-(((y - height - 0.02 * np.sin(signed * 7)) / 0.020) ** 2)) * np.exp(
            -((x / 0.42) ** 4)
        )
    fold = 0.19 + (6.90 - y) * 0.42
    line = line + 1.35 * np.exp(-(((x - fold) / 0.030) ** 2)) * smooth(6.46, 6.58, y) * smooth(6.95, 6.86, y)
    jowl = 0.27 + (6.58 - y) * 0.1
    line = line + 0.8 * np.exp(-(((x - jowl) / 0.024) ** 2)) * smooth(6.28, 6.40, y) * smooth(6.60, 6.54, y)
    for slope in (-0.5, 0.0, 0.5):
        crow = np.exp(-(((y - 7.27 - slope * (x - 0.46)) / 0.016) ** 2))
        line = line + 0.9 * crow * smooth(0.46, 0.50, x) * smooth(0.70, 0.60, x)
    bag = np.exp(-(((y - 7.10 + 0.25 * (x - 0.3) ** 2) / 0.022) ** 2))
    line = line + 1.3 * bag * np.exp(-(((x - 0.3) / 0.16) ** 4))
    line = line + 0.8 * np.exp(-(((x - 0.055) / 0.015) ** 2)) * smooth(7.40, 7.46, y) * smooth(7.62, 7.54, y)
    for height in (5.83, 5.98):
        line = line + 0.8 * np.exp(-(((y - height - 0.05 * np.cos(signed * 3)) / 0.022) ** 2))
    return line


def _brow(x, y, arch, width):
    """Return a brow with the given arch and half thickness, thinner towards the temple."""
    middle = 7.487 + arch * np.sin(np.clip((x - 0.1) / 0.44, 0, 1) * 2.5)
    width = width * (1 - 0.5 * smooth(0.25, 0.52, x))
    return np.exp(-(((y - middle) / width) ** 4)) * smooth(0.085, 0.13, x) * smooth(0.555, 0.48, x)


class SkinMaps:
    """The precomputed maps [H, W, len(CHANNELS)] and a tileable noise [256, 256, 2] (blotches, grain)."""

    def __init__(self, lips_HW: np.ndarray) -> None:
        rows, columns = MAP_SHAPE
        y, signed = np.meshgrid(np.linspace(*MAP_Y, rows), np.linspace(*MAP_X, columns), indexing="ij")
        x = np.abs(signed)
        jaw, moustache, chin = beard_masks(x, y)
        flush = 0.75 * _bump(x, y, 0.36, 6.93, 0.17, 0.13) + 0.8 * _bump(x, y, 0, 6.94, 0.12, 0.10)
        flush = flush + 0.5 * _bump(x, y, 0.83, 7.05, 0.2, 0.3) + 0.35 * _bump(x, y, 0, 6.25, 0.2, 0.12)
        ring = np.hypot((x - 0.31) / 0.165, (y - 7.275) / 0.085)
        oil = _bump(x, y, 0, 7.8, 0.35, 0.3) + _bump(x, y, 0, 7.0, 0.12, 0.3) + _bump(x, y, 0.38, 7.02, 0.12, 0.1)
        mouth = np.exp(-(((y - 6.595) / 0.014) ** 2)) * np.exp(-((x / 0.25) ** 6))
        self.maps = np.stack(
            [
                lips_HW,
                flush,
                _bump(x, y, 0.30, 7.13, 0.15, 0.05),
                _wrinkles(signed, x, y),
                _brow(x, y, 0.028, 0.046),
                _brow(x, y, 0.050, 0.030),
                np.exp(-(((ring - 1) / 0.18) ** 2)),
                _bump(x, y, 0.31, 7.37, 0.17, 0.055),
                jaw,
                moustache,
                chin,
                mouth,
                oil,
            ],
            -1,
        ).astype(np.float32)
        self.noise = np.stack([_noise(1, (4, 10, 30)), _noise(2, (40, 70))], -1).astype(np.float32)

    def at(self, base_P3: np.ndarray) -> dict[str, np.ndarray]:
        """Return every channel [P] at points of the base mesh; it is 0 away from the front of head and neck."""
        column = (base_P3[:, 0] - MAP_X[0]) / (MAP_X[1] - MAP_X[0]) * (MAP_SHAPE[1] - 1)
        row = (base_P3[:, 1] - MAP_Y[0]) / (MAP_Y[1] - MAP_Y[0]) * (MAP_SHAPE[0] - 1)
        front = smooth(0.40, 0.72, base_P3[:, 2])[:, None]
        values = lookup(self.maps, column, row, False) * front
        return {name: values[:, i] for i, name in enumerate(CHANNELS)}

    def albedo(self, person: Person, base_P3: np.ndarray, m: dict[str, np.ndarray]) -> np.ndarray:
        """Return the linear reflectance [P, 3] of a person's bare skin. m: the channels at the same points."""
        skin, wear, male = linear(person.skin_3), person.wear, person.gender == 1
        offset = person.seed % 97
        noise = lookup(self.noise, base_P3[:, 0] * 45 + offset * 3.0, base_P3[:, 1] * 45 + offset * 1.0, True)
        dark = 1 - float(skin.mean()) ** 0.5
        out = skin * (1 + (0.03 + 0.05 * wear) * noise[:, :1] + (0.02 + 0.04 * wear) * noise[:, 1:])
        red = np.array([1.10, 0.93, 0.92], np.float32) - 1
        out = out * (1 + red * (m["flush"] * (0.8 + 0.7 * person.makeup) * (1.6 - dark))[:, None])
        darker = (0.12 + 0.30 * wear) * m["hollow"] + np.clip(0.54 * wear * m["wrinkle"], 0, 0.6) + 0.60 * m["mouth"]
        darker = darker + 0.50 * person.makeup * m["shadow"] + (0.32 + 0.35 * person.makeup) * m["liner"]
        out = out * (1 - np.clip(darker, 0, 0.9))[:, None]
        out = _blend(
            out, _lip_colour(skin, person.makeup), m["lips"] * (0.5 + 0.4 * person.makeup) * (1 - 0.3 * wear * male)
        )
        brow = m["brow_male"] if male else m["brow_female"]
        out = _blend(out, linear(person.brow_3) * 0.9, np.clip(brow * 1.05, 0, 1) * (1 - 0.15 * wear))
        if male:
            jaw, moustache, chin, _ = BEARDS[person.beard]
            cover = np.maximum(np.maximum(m["jaw"] * jaw, m["moustache"] * moustache), m["chin"] * chin)
            colour = linear(person.hair_3 * 0.9) if person.beard != "none" else linear([0.25, 0.24, 0.25])
            out = _blend(out, colour * (1 + 0.25 * noise[:, 1:]), cover * (1 - m["lips"]))
        return out


def _blend(under, over, weight):
    w = weight[:, None]
    return under * (1 - w) + over * w


def _lip_colour(skin, makeup):
    bare = skin * np.array([0.80, 0.50, 0.52]) + np.array([0.05, 0.0, 0.005])
    painted = bare * np.array([1.2, 0.40, 0.50]) + np.array([0.08, 0.0, 0.01])
    return (bare * (1 - 0.8 * makeup) + painted * 0.8 * makeup).astype(np.float32)


def _noise(seed, bands, n: int = 256):
    """Return tileable noise of unit variance with the given spatial frequencies (cycles per tile)."""
    rng, out = np.random.default_rng(seed), np.zeros((n, n))
    f = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.fftfreq(n)[None])
    for band in bands:
        wave = np.real(np.fft.ifft2(np.fft.fft2(rng.standard_normal((n, n))) * np.exp(-((f * n / band) ** 2) / 2)))
        out += wave / wave.std()
    return out / out.std()
