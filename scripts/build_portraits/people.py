"""Draw random people (Person) and the way they are photographed (Shot).

Labels are perceived presentation. Geometry, skin, hair and face all vary within a group and overlap between
groups. The ranges differ only as much as is needed to recognise the groups in an image of 64 x 64 pixels.
"""

from dataclasses import dataclass, field

import numpy as np

GENDERS, RACES, AGES = ("female", "male"), ("White", "Black", "Indian", "Asian"), ("young", "old")
AGE_RANGES = ((18.0, 40.0), (58.0, 80.0))
# Weights of the mesh's (african, asian, caucasian) shapes, because MakeHuman has no Indian macro target.
SHAPES = {"White": (0, 0, 1), "Black": (1, 0, 0), "Indian": (0.22, 0.10, 0.68), "Asian": (0, 1, 0)}
SKINS = {  # sRGB anchors, light to dark
    "White": ("f6dccf", "f1cdba", "eac0a8", "e2b298"),
    "Black": ("7e5340", "6f4835", "5e3c2b", "503224", "462b1f"),
    "Indian": ("c29972", "b18662", "9f7450", "8d6243"),
    "Asian": ("f0d8c2", "e8c9af", "deba9b", "cea786"),
}
HAIRS = {
    "black": "17120f", "dark": "2c1d15", "brown": "4c3120", "light": "80583a", "blond": "c09a62", "red": "8a4220",
    "grey": "96938f", "white": "d2cfc9",
}  # fmt: skip
HAIR_OF = {
    "White": ("dark", "brown", "brown", "light", "light", "blond", "blond", "red"),
    "Black": ("black", "black", "dark"), "Indian": ("black", "black", "dark"), "Asian": ("black", "black", "black"),
}  # fmt: skip
IRISES = {"dark": "2b1a10", "brown": "5a3a1e", "hazel": "6f5a2c", "green": "5a7050", "blue": "4f7390", "grey": "76828a"}
IRIS_OF = {"White": ("blue", "blue", "green", "grey", "brown", "hazel"), "Black": ("dark",),
           "Indian": ("dark", "brown"), "Asian": ("dark",)}  # fmt: skip
TEXTURE_OF = {
    "White": ("straight", "wavy", "wavy", "curly"), "Black": ("coily", "coily", "curly"),
    "Indian": ("straight", "wavy", "wavy"), "Asian": ("straight",),
}  # fmt: skip
# Hair styles with their shares, by (gender, age band); "afro" is for Black people only, see _style.
STYLES = {
    ("female", "young"): {"long": 0.42, "shoulder": 0.22, "bob": 0.17, "tied": 0.15, "pixie": 0.04},
    ("female", "old"): {"long": 0.10, "shoulder": 0.32, "bob": 0.40, "tied": 0.14, "pixie": 0.04},
    ("male", "young"): {"buzz": 0.17, "short": 0.52, "medium": 0.22, "bald": 0.07, "shoulder": 0.02},
    ("male", "old"): {"short": 0.36, "medium": 0.08, "buzz": 0.08, "receding": 0.36, "bald": 0.12},
}


@dataclass(frozen=True)
class Person:
    """A person's appearance. Class indices as in GENDERS, RACES, AGES; colours sRGB in [0, 1]; strengths in [0, 1]."""

    gender: int
    race: int
    years: float
    shape_3: np.ndarray
    masculine: float
    weight: float
    muscle: float
    local: dict[str, float]
    skin_3: np.ndarray
    hair_3: np.ndarray
    brow_3: np.ndarray
    iris_3: np.ndarray
    style: str
    texture: str
    fringe: float
    parting: float
    beard: str
    makeup: float
    seed: int = field(default=0)

    @property
    def age(self) -> int:
        return int(self.years > 49)

    @property
    def wear(self) -> float:
        """How much age is visible on the skin: 0 below 30 years, about 1 at 70."""
        return float(np.clip((self.years - 30) / 40, 0, 1.15))


@dataclass(frozen=True)
class Shot:
    """Head turn in degrees, zoom (head height / image height), smile, key light (degrees, strength, warmth)."""

    yaw: float
    pitch: float
    roll: float
    zoom: float
    smile: float
    azimuth: float
    elevation: float
    strength: float
    warmth: float


def hex_colour(code: str) -> np.ndarray:
    """Return the sRGB values in [0, 1] of a six-digit hexadecimal colour."""
    return np.array([int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)], np.float32)


def sample_person(rng: np.random.Generator, gender: int, race: int, age: int, local_names) -> Person:
    """Draw a person of the given classes. local_names: the mesh's local targets (see Head.names)."""
    race_name, male = RACES[race], gender == 1
    years = float(rng.uniform(*AGE_RANGES[age]))
    shape = np.array(SHAPES[race_name], np.float32) + rng.dirichlet([1, 1, 1]) * rng.uniform(0, 0.10)
    anchors = np.stack([hex_colour(c) for c in SKINS[race_name]])
    at = rng.uniform(0, len(anchors) - 1)
    skin = np.stack([np.interp(at, np.arange(len(anchors)), anchors[:, c]) for c in range(3)])
    natural = hex_colour(HAIRS[str(rng.choice(HAIR_OF[race_name]))]) * rng.uniform(0.85, 1.15)
    grey = _greyness(rng, age)
    silver = hex_colour(HAIRS["white"]) * (w := rng.uniform(0, 1)) + hex_colour(HAIRS["grey"]) * (1 - w)
    style = _style(rng, gender, race_name, age)
    texture = str(rng.choice(TEXTURE_OF[race_name]))
    return Person(
        gender,
        race,
        years,
        (shape / shape.sum()).astype(np.float32),
        masculine=float(np.clip(gender + (1 - 2 * gender) * abs(rng.normal(0, 0.06)), 0, 1)),
        weight=float(np.clip(rng.normal(0.52, 0.13), 0.15, 0.9)),
        muscle=float(np.clip(rng.normal(0.58 if male else 0.42, 0.12), 0.1, 0.9)),
        local=_local_shape(rng, race_name, local_names),
        skin_3=np.clip(skin + rng.normal(0, 0.008, 3), 0, 1),
        hair_3=(1 - grey) * natural + grey * silver,
        brow_3=(1 - 0.65 * grey) * natural * 0.9 + 0.65 * grey * hex_colour(HAIRS["grey"]),
        iris_3=hex_colour(IRISES[str(rng.choice(IRIS_OF[race_name]))]),
        style=style,
        texture="coily" if style == "afro" else texture,
        fringe=float(rng.uniform(0.5, 1)) if rng.random() < (0.12 if male else 0.38) else 0.0,
        parting=float(rng.choice([-0.55, 0.0, 0.0, 0.55])),
        beard=_beard(rng, gender, race_name, style),
        makeup=0.0 if male else float(rng.uniform(0.35, 1.0)),
        seed=int(rng.integers(1 << 30)),
    )


def sample_shot(rng: np.random.Generator) -> Shot:
    """Draw a frontal head-and-shoulders shot with moderate variation of pose and light."""
    return Shot(
        yaw=float(rng.normal(0, 6)),
        pitch=float(rng.normal(0, 3)),
        roll=float(rng.normal(0, 2)),
        zoom=float(rng.uniform(0.55, 0.60)),
        smile=float(np.clip(rng.normal(0.3, 0.28), 0, 0.85)),
        azimuth=float(rng.uniform(-50, 50)),
        elevation=float(rng.uniform(20, 50)),
        strength=float(rng.uniform(0.88, 1.08)),
        warmth=float(rng.uniform(-0.035, 0.035)),
    )


def _greyness(rng, age: int) -> float:
    if age == 0:
        return 0.0
    return float(rng.uniform(0.65, 1.0)) if rng.random() < 0.92 else float(rng.uniform(0.2, 0.5))


def _style(rng, gender: int, race: str, age: int) -> str:
    if race == "Black" and rng.random() < (0.22 if gender == 0 else 0.10):
        return "afro"
    shares = STYLES[GENDERS[gender], AGES[age]]
    style = str(rng.choice(list(shares), p=np.array(list(shares.values()))))
    if race == "Black" and gender == 1 and style in ("medium", "shoulder"):
        return "buzz"
    return style


def _beard(rng, gender: int, race: str, style: str) -> str:
    if gender == 0:
        return "none"
    shares = {"none": 0.36, "stubble": 0.22, "full": 0.24, "goatee": 0.12, "moustache": 0.06}
    beard = str(rng.choice(list(shares), p=list(shares.values())))
    if race == "Asian" and beard == "full":
        beard = "goatee"
    return "full" if style == "shoulder" else beard  # men with long hair get a beard to stay recognisable


def _local_shape(rng, race: str, names) -> dict[str, float]:
    """Draw strengths of forty local targets, small and the same for the left and the right side."""
    chosen = {}
    for name in rng.choice(names, 40, replace=False):
        value = float(abs(rng.normal(0, 0.20)))
        folder, target = str(name).split("/")
        chosen[str(name)] = value
        if target[:2] in ("l-", "r-"):
            chosen[f"{folder}/{'r-' if target[0] == 'l' else 'l-'}{target[2:]}"] = value
    if race == "Asian":
        for side in "lr":
            chosen[f"eyes/{side}-eye-epicanthus-in"] = float(rng.uniform(0.1, 0.5))
    return chosen
