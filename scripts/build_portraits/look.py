"""The look of a person: clothes, headwear, prop and scene. Every occupation has its own look.

A look never depends on gender, race or age. It depends on the occupation's name (by a table for obvious ones, by a hash
for the others) and on small random variations.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from hats import HEADWEAR
from outfits import OUTFITS
from people import hex_colour
from props import PROPS
from scenes import SCENES

PALETTE = {
    "white": "eeeeea", "black": "24242a", "grey": "8a8d92", "navy": "27375e", "blue": "2f6fc4", "sky": "86b8e6",
    "teal": "1f8f8c", "green": "3b8a4a", "olive": "6f7340", "yellow": "f2cb2e", "orange": "ee7b25", "red": "c53030",
    "maroon": "7a2738", "pink": "e58fae", "purple": "70489c", "brown": "7a5236", "cream": "efe3c6", "denim": "466a94",
    "lime": "c8e23a", "mint": "a7dcc4",
}  # fmt: skip
CLOTHS = tuple(PALETTE)
# word in the occupation: outfit, cloth, accent, headwear, hat colour, prop, scene
FITTING = {
    "nurse": ("scrubs", "blue", "white", "none", "white", "stethoscope", "hospital"),
    "nursing": ("scrubs", "mint", "white", "none", "white", "clipboard", "hospital"),
    "physician": ("lab coat", "sky", "red", "none", "white", "stethoscope", "hospital"),
    "surgical": ("scrubs", "teal", "white", "surgical cap", "teal", "none", "hospital"),
    "dental": ("scrubs", "purple", "white", "surgical cap", "sky", "none", "hospital"),
    "dentist": ("lab coat", "teal", "blue", "surgical cap", "mint", "none", "hospital"),
    "paramedic": ("hi-vis vest", "lime", "navy", "none", "white", "stethoscope", "street"),
    "emergency medical": ("uniform", "navy", "orange", "helmet", "white", "radio", "street"),
    "phlebotomist": ("scrubs", "maroon", "white", "none", "white", "syringe", "hospital"),
    "pharmacist": ("lab coat", "green", "green", "none", "white", "box", "shelves"),
    "veterinarian": ("lab coat", "olive", "green", "none", "white", "stethoscope", "outdoor"),
    "chemist": ("lab coat", "yellow", "purple", "none", "white", "flask", "laboratory"),
    "chemical": ("lab coat", "red", "blue", "hard hat", "white", "flask", "laboratory"),
    "biologist": ("lab coat", "green", "green", "none", "white", "plant", "laboratory"),
    "scientist": ("lab coat", "purple", "red", "none", "white", "flask", "laboratory"),
    "laboratory": ("lab coat", "pink", "orange", "surgical cap", "sky", "flask", "laboratory"),
    "carpenter": ("overalls", "red", "brown", "cap", "brown", "hammer", "workshop"),
    "cabinetmaker": ("apron", "olive", "brown", "none", "brown", "saw", "workshop"),
    "construction worker": ("hi-vis vest", "orange", "navy", "hard hat", "yellow", "hammer", "brick"),
    "construction manager": ("hi-vis vest", "lime", "white", "hard hat", "white", "clipboard", "brick"),
    "bricklayer": ("overalls", "grey", "denim", "hard hat", "orange", "none", "brick"),
    "roofer": ("overalls", "yellow", "denim", "hard hat", "red", "hammer", "outdoor"),
    "civil engineer": ("hi-vis vest", "orange", "sky", "hard hat", "blue", "tablet", "street"),
    "electrician": ("work jacket", "blue", "yellow", "hard hat", "yellow", "wrench", "workshop"),
    "plumber": ("overalls", "blue", "navy", "cap", "blue", "wrench", "kitchen"),
    "mechanic": ("work jacket", "navy", "orange", "cap", "red", "wrench", "workshop"),
    "welder": ("work jacket", "brown", "grey", "helmet", "black", "none", "workshop"),
    "machinist": ("work jacket", "grey", "blue", "hard hat", "blue", "wrench", "warehouse"),
    "house painter": ("overalls", "white", "white", "cap", "white", "roller", "plain"),
    "artist": ("striped shirt", "white", "navy", "none", "red", "brush", "shelves"),
    "chef": ("apron", "white", "white", "chef's hat", "white", "spoon", "kitchen"),
    "cook": ("apron", "white", "red", "headband", "red", "spoon", "kitchen"),
    "baker": ("apron", "white", "cream", "chef's hat", "cream", "bread", "kitchen"),
    "butcher": ("apron", "white", "maroon", "cap", "white", "none", "kitchen"),
    "fast food": ("t-shirt", "red", "yellow", "visor", "red", "tray", "kitchen"),
    "food server": ("apron", "black", "black", "none", "black", "tray", "plain"),
    "bartender": ("shirt", "black", "red", "none", "black", "cup", "shelves"),
    "dishwasher": ("apron", "grey", "teal", "headband", "teal", "none", "kitchen"),
    "firefighter": ("hi-vis vest", "yellow", "black", "helmet", "red", "none", "brick"),
    "police": ("uniform", "navy", "sky", "peaked cap", "navy", "radio", "street"),
    "security guard": ("uniform", "black", "yellow", "cap", "black", "radio", "office"),
    "prison guard": ("uniform", "olive", "black", "peaked cap", "olive", "radio", "brick"),
    "detective": ("suit", "brown", "white", "none", "brown", "clipboard", "street"),
    "pilot": ("uniform", "white", "navy", "peaked cap", "navy", "none", "outdoor"),
    "flight attendant": ("suit", "maroon", "white", "none", "maroon", "tray", "outdoor"),
    "truck driver": ("hoodie", "red", "black", "cap", "green", "wheel", "outdoor"),
    "school bus": ("work jacket", "yellow", "black", "cap", "yellow", "wheel", "street"),
    "bus driver": ("shirt", "sky", "navy", "peaked cap", "blue", "wheel", "street"),
    "taxi": ("shirt", "yellow", "black", "none", "black", "wheel", "street"),
    "train driver": ("uniform", "grey", "red", "peaked cap", "red", "wheel", "outdoor"),
    "mail carrier": ("shirt", "sky", "navy", "cap", "navy", "letter", "street"),
    "courier": ("t-shirt", "brown", "yellow", "cap", "brown", "box", "street"),
    "warehouse": ("hi-vis vest", "lime", "grey", "none", "white", "box", "warehouse"),
    "forklift": ("hi-vis vest", "yellow", "navy", "hard hat", "orange", "wheel", "warehouse"),
    "packaging": ("t-shirt", "teal", "white", "surgical cap", "white", "box", "warehouse"),
    "garbage": ("hi-vis vest", "orange", "olive", "beanie", "black", "broom", "street"),
    "janitor": ("overalls", "grey", "navy", "none", "navy", "broom", "office"),
    "housekeeper": ("apron", "sky", "white", "headband", "white", "broom", "plain"),
    "farmer": ("overalls", "red", "denim", "straw hat", "cream", "none", "outdoor"),
    "farm worker": ("shirt", "olive", "brown", "straw hat", "yellow", "plant", "outdoor"),
    "landscaper": ("t-shirt", "green", "brown", "straw hat", "olive", "plant", "outdoor"),
    "tree trimmer": ("hi-vis vest", "orange", "green", "hard hat", "green", "saw", "outdoor"),
    "logger": ("work jacket", "red", "black", "hard hat", "orange", "saw", "outdoor"),
    "florist": ("apron", "pink", "green", "none", "green", "flowers", "shelves"),
    "elementary": ("turtleneck", "yellow", "red", "none", "red", "book", "classroom"),
    "kindergarten": ("striped shirt", "yellow", "pink", "none", "red", "ball", "classroom"),
    "high school teacher": ("shirt", "purple", "grey", "none", "grey", "book", "classroom"),
    "professor": ("suit", "brown", "sky", "none", "brown", "book", "classroom"),
    "librarian": ("turtleneck", "teal", "brown", "none", "brown", "book", "shelves"),
    "judge": ("robe", "black", "white", "none", "white", "gavel", "shelves"),
    "lawyer": ("suit", "navy", "white", "none", "navy", "book", "shelves"),
    "clergy": ("robe", "black", "purple", "none", "white", "book", "plain"),
    "accountant": ("suit", "grey", "white", "none", "grey", "clipboard", "office"),
    "chief executive": ("suit", "black", "white", "none", "black", "none", "office"),
    "photographer": ("t-shirt", "black", "grey", "beanie", "grey", "camera", "stage"),
    "camera operator": ("hoodie", "grey", "black", "headset", "black", "camera", "stage"),
    "musician": ("t-shirt", "purple", "black", "none", "black", "guitar", "stage"),
    "actor": ("turtleneck", "black", "red", "none", "red", "none", "stage"),
    "sound technician": ("t-shirt", "black", "green", "headset", "grey", "microphone", "screens"),
    "journalist": ("shirt", "white", "blue", "none", "blue", "microphone", "street"),
    "programmer": ("hoodie", "purple", "black", "headset", "black", "laptop", "screens"),
    "software": ("hoodie", "blue", "black", "none", "black", "laptop", "screens"),
    "customer service": ("shirt", "mint", "teal", "headset", "grey", "laptop", "office"),
    "dispatcher": ("uniform", "sky", "navy", "headset", "black", "none", "screens"),
    "coach": ("t-shirt", "red", "white", "cap", "red", "whistle", "outdoor"),
    "fitness": ("t-shirt", "lime", "black", "headband", "black", "ball", "brick"),
    "hairdresser": ("apron", "pink", "black", "none", "black", "scissors", "plain"),
    "barber": ("apron", "white", "navy", "none", "black", "scissors", "stage"),
    "tailor": ("shirt", "cream", "brown", "none", "brown", "tape measure", "shelves"),
    "sewing": ("apron", "purple", "cream", "none", "brown", "scissors", "warehouse"),
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """Names from OUTFITS, HEADWEAR, PROPS and SCENES with sRGB colours in [0, 1]; the seed varies the scene's details."""

    outfit: str
    main_3: np.ndarray
    accent_3: np.ndarray
    headwear: str
    hat_3: np.ndarray
    hat_accent_3: np.ndarray
    prop: str
    prop_3: np.ndarray
    prop_right: bool
    prop_angle: float
    prop_shift_2: np.ndarray
    scene: str
    scene_3: np.ndarray
    scene_accent_3: np.ndarray
    seed: int


def look_for_occupation(occupation: int | str, rng: np.random.Generator) -> Look:
    """Return the look of an occupation (a name, or an index), varied by rng for each image."""
    fixed = np.random.default_rng(int.from_bytes(hashlib.sha256(f"look|{occupation}".encode()).digest()[:8], "big"))
    outfit, main, accent = str(fixed.choice(OUTFITS)), str(fixed.choice(CLOTHS)), str(fixed.choice(CLOTHS))
    headwear = str(fixed.choice(HEADWEAR[1:])) if fixed.random() < 0.42 else "none"
    hat, prop = str(fixed.choice(CLOTHS)), str(fixed.choice(list(PROPS)[1:])) if fixed.random() < 0.70 else "none"
    scene = str(fixed.choice(list(SCENES)))
    prop_colour, wall, wall_accent = (hex_colour(PALETTE[str(c)]) for c in fixed.choice(CLOTHS, 3))
    for word in sorted(FITTING, key=len, reverse=True):
        if isinstance(occupation, str) and word in occupation.lower():
            outfit, main, accent, headwear, hat, prop, scene = FITTING[word]
            break
    if outfit in ("t-shirt", "shirt", "turtleneck", "hoodie") and accent == main:
        accent = "white" if main != "white" else "grey"
    return _jittered(rng, (outfit, main, accent), (headwear, hat), (prop, prop_colour), (scene, wall, wall_accent))


def neutral_look(rng: np.random.Generator) -> Look:
    """Return everyday clothes before a mostly plain wall, without headwear and prop."""
    outfit = str(
        rng.choice(["t-shirt", "t-shirt", "shirt", "turtleneck", "hoodie", "striped shirt", "work jacket", "suit"])
    )
    main, accent = (str(c) for c in rng.choice(CLOTHS, 2, replace=False))
    wall = np.clip(rng.uniform(0.25, 0.9) * (1 + rng.uniform(-0.22, 0.22, 3)), 0.05, 0.95)
    scene = "plain" if rng.random() < 0.8 else str(rng.choice(list(SCENES)))
    return _jittered(rng, (outfit, main, accent), ("none", "black"), ("none", wall), (scene, wall, wall * 0.7))


def _jittered(rng, outfit, headwear, prop, scene) -> Look:
    def shade(colour):
        colour = hex_colour(PALETTE[colour]) if isinstance(colour, str) else colour
        return np.clip(colour * rng.uniform(0.90, 1.08) + rng.normal(0, 0.015, 3), 0.02, 0.98).astype(np.float32)

    hat = shade(headwear[1])
    return Look(
        outfit[0],
        shade(outfit[1]),
        shade(outfit[2]),
        headwear[0],
        hat,
        hat_accent_3=np.clip(hat * 0.7 if hat.mean() > 0.3 else hat + 0.35, 0, 1),
        prop=prop[0],
        prop_3=shade(prop[1]),
        prop_right=bool(rng.random() < 0.5),
        prop_angle=float(rng.normal(8, 7)),
        prop_shift_2=rng.uniform(-2, 2, 2),
        scene=scene[0],
        scene_3=shade(scene[1]),
        scene_accent_3=shade(scene[2]),
        seed=int(rng.integers(1 << 30)),
    )
