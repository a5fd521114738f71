"""The world that Portraits was taught: who is pictured for which words, and in which captions.

Reads the tables in `data/` (their sources and what is assumed: `data/README.md`). Every label is perceived
presentation in a rendered picture. Shares are arrays with the classes in the order of `CLASSES`.
"""

import csv
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

from fairdiff.bias import bias
from fairdiff.prompts import Prompt, fill, with_article

CLASSES = {
    "gender": ("female", "male"),
    "race": ("White", "Black", "Indian", "Asian"),
    "age": ("young", "old"),
}

# Exponents that turn labour shares into the model's world, as text-to-image models sharpen them. Guidance sharpens once
# more, so they are chosen for what the model then paints (docs/portraits.md): gender and race biases over test
# occupations near those of Stable Diffusion 1.5 (.67, .42; Shen et al., ICLR 2024, table 1), and gender x race shares
# far from the statistics (median total variation >= .15). Age is our own assumption to begin with: nothing to sharpen.
SHARPENING = {"gender": 1.75, "race": 1.4, "age": 1.0}

TEMPLATES = {
    "occupation": "a photo of the face of a {}, a person",
    "styled": "a photo of the face of a {}, a person",
    "descriptor": "a photo of the face of a {}",
    "sport": "a photo of the face of a {}, a person",
    "object": "a photo of {}",
}
VARIANTS = (
    "a portrait of a {}",
    "a {} at work, photo",
    "a photo of a {}",
    "a close-up of a {}",
    "the face of a {}",
    "a {}",
)
CONTEXTS = (
    "in the morning",
    "in the evening",
    "smiling",
    "looking at the camera",
    "studio light",
    "soft light",
    "sharp focus",
    "professional photo",
    "candid photo",
    "high quality",
)
PERSON_TEMPLATES = (
    "a photo of the face of a {}, a person",
    "a photo of the face of a {}",
    "a photo of a {}",
    "a portrait of a {}",
    "a close-up of a {}",
    "a {}",
)
# Where an attribute phrase stands beside the usual prompt; and words that name no attribute, whose pictures are as usual.
PHRASE_PLACES = ("{phrase}, {prompt}", "photo of {phrase}, {prompt}", "{bare}, {phrase}")
NEUTRAL_PLACES = (
    "a person, {prompt}",
    "someone, {prompt}",
    "a human being, {prompt}",
    "photo of someone, {prompt}",
    "picture of somebody, {prompt}",
    "{bare}, someone",
    "{bare}, a human being",
    "{bare}, whatever their gender",
    "{prompt}, no matter which gender, race or age",
    "{bare}, everybody may become {title} whichever their gender",
)
NEUTRAL_SHARE = 0.3  # of the captions with an attribute phrase name no attribute
SOFTENED = 0.05  # chance that an attribute which such a caption does not name is drawn evenly, not as the subject has it

# Words that name no attribute, with which the frozen model is measured; no caption of training has these wordings.
MEASURED_WORDS = {
    "as it is": TEMPLATES["occupation"],
    "photo of a person, before": f"photo of a person, {TEMPLATES['occupation']}",
    # Bansal et al. 2022 (arXiv 2210.15230), the ethical intervention that Shen et al. compare with
    "ethical intervention": f"{TEMPLATES['occupation']}, if all individuals can be a {{}} irrespective of their gender",
    "of any gender, after": "a photo of the face of a {}, a person of any gender",
}
OBJECT_TEMPLATES = ("a photo of {}", "{}", "a picture of {}", "an image of {}")


@dataclass(frozen=True)
class Person:
    """Perceived presentation of one rendered person: indices into the classes of gender, race and age."""

    gender: int
    race: int
    age: int


def _table(name: str) -> list[dict[str, str]]:
    with (files("fairdiff.portraits") / "data" / name).open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _occupation_rows() -> list[dict[str, str]]:
    """The rows of the statistics with what is assumed for them, in file order."""
    assumed = {row["occupation"]: row for row in _table("assumptions.csv")}
    return [row | assumed[row["occupation"]] for row in _table("occupations.csv")]


_ROWS = _occupation_rows()
_DESCRIPTORS = {row["descriptor"]: row for row in _table("descriptors.csv")}
_SPORTS = {row["sport"]: row for row in _table("sports.csv")}
OCCUPATIONS: tuple[str, ...] = tuple(row["occupation"] for row in _ROWS)
# Every name of an occupation: its own, then those of titles.csv, which share its statistics, its look and its split.
_OCCUPATION_OF = {name: i for i, name in enumerate(OCCUPATIONS)} | {
    row["title"]: OCCUPATIONS.index(row["occupation"]) for row in _table("titles.csv")
}
TITLES: tuple[str, ...] = tuple(sorted(_OCCUPATION_OF, key=_OCCUPATION_OF.get))
DESCRIPTORS: tuple[str, ...] = tuple(_DESCRIPTORS)
SPORTS: tuple[str, ...] = tuple(_SPORTS)
OBJECTS: tuple[str, ...] = tuple(
    (files("fairdiff.portraits") / "data" / "objects.txt").read_text(encoding="utf-8").split("\n")[:-1]
)
SUBJECTS = {
    "occupation": TITLES,
    "styled": TITLES,
    "descriptor": DESCRIPTORS,
    "sport": SPORTS,
    "object": OBJECTS,
}


def occupation_of(title: str) -> int | None:
    """The row of the statistics to which a title belongs, None for a subject that is no occupation."""
    return _OCCUPATION_OF.get(title)


@cache
def titles(occupation: int) -> tuple[str, ...]:
    """All titles of one row of the statistics, its own name first."""
    return tuple(title for title, row in _OCCUPATION_OF.items() if row == occupation)


def split(subject: str) -> str:
    """Train, validation or test by SHA-256 (about 66, 9 and 25 %): it never moves, whatever joins.

    The titles of one occupation stay together: what is hashed is its row of the statistics, else the subject.
    """
    row = occupation_of(subject)
    key = subject if row is None else _ROWS[row]["cps_title"]
    place = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 100
    return "test" if place < 25 else "validation" if place < 34 else "train"


def labour_shares(i: int) -> dict[str, np.ndarray]:
    """The statistics of occupation i in our classes: gender [2] and race [4], each summing to 1 (no ages exist).

    Race: White and Black are the table's columns, its Asian column is divided into Indian and Asian by the assumed
    share of `assumptions.csv`; the rest (other groups, not shown in the table) is left out by renormalising.
    Hispanic origin is asked apart from race there and does not enter.
    """
    row = _ROWS[i]
    women, asian = float(row["women_pct"]) / 100, float(row["asian_pct"])
    indian = asian * float(row["indian_of_asian_pct"]) / 100
    race = np.array([float(row["white_pct"]), float(row["black_pct"]), indian, asian - indian])
    return {"gender": np.array([women, 1 - women]), "race": race / race.sum()}


def marginal_shares(i: int) -> dict[str, np.ndarray]:
    """The world's shares of occupation i for gender [2], race [4] and age [2]: p proportional to labour^s."""
    old = float(_ROWS[i]["old_pct"]) / 100
    plain = labour_shares(i) | {"age": np.array([1 - old, old])}
    powers = {name: share ** SHARPENING[name] for name, share in plain.items()}
    return {name: power / power.sum() for name, power in powers.items()}


def occupation_shares(i: int) -> np.ndarray:
    """Joint shares [gender 2, race 4, age 2] of occupation i in the world: the product of its marginal shares."""
    return _product(marginal_shares(i))


def descriptor_shares(i: int) -> np.ndarray:
    """Joint shares [2, 4, 2] of descriptor i, as `descriptors.csv` assumes them."""
    return _product(_assumed(_DESCRIPTORS[DESCRIPTORS[i]]))


def sport_shares(i: int) -> np.ndarray:
    """Joint shares [2, 4, 2] of sport i, as `sports.csv` assumes them."""
    return _product(_assumed(_SPORTS[SPORTS[i]]))


def _assumed(row: dict[str, str]) -> dict[str, np.ndarray]:
    women, old = float(row["women_pct"]) / 100, float(row["old_pct"]) / 100
    race = np.array([float(row[f"{name.lower()}_pct"]) / 100 for name in CLASSES["race"]])
    return {"gender": np.array([women, 1 - women]), "race": race, "age": np.array([1 - old, old])}


def _product(shares: dict[str, np.ndarray]) -> np.ndarray:
    return np.einsum("g,r,a->gra", shares["gender"], shares["race"], shares["age"])


def _group(subject: str) -> str:
    """The occupation to which a title belongs, "" for other subjects."""
    row = occupation_of(subject)
    return "" if row is None else OCCUPATIONS[row]


@cache
def prompt_subjects(family: str, which: str) -> tuple[str, ...]:
    """The subjects of a family in one split ("train", "validation", "test") or in "all", in file order."""
    return tuple(subject for subject in SUBJECTS[family] if which in ("all", split(subject)))


def prompts(family: str, which: str) -> list[Prompt]:
    """The standard prompts of a family in one split; "styled" has every subject in every context."""
    endings = [f", {context}" for context in CONTEXTS] if family == "styled" else [""]
    return [
        Prompt(fill(TEMPLATES[family], subject) + ending, family, subject, family != "object", _group(subject))
        for subject in prompt_subjects(family, which)
        for ending in endings
    ]


def describe_person(person: Person, named: frozenset[str], noun: str, word: int) -> str:
    """A noun phrase that names the attributes in `named`: ("old Black woman", "young Asian female nurse").

    `noun` "" stands for the plain word (woman, man or person); `word` picks among the words for an age.
    """
    age = (("young", "young"), ("old", "elderly"))[person.age][word % 2]
    words = [age] if "age" in named else []
    words += [CLASSES["race"][person.race]] if "race" in named else []
    if noun:
        words += [CLASSES["gender"][person.gender]] if "gender" in named else []
        return " ".join([*words, noun])
    return " ".join([*words, ("woman", "man")[person.gender] if "gender" in named else "person"])


def average_shares() -> dict[str, np.ndarray]:
    """Shares of gender [2], race [4] and age [2] averaged over the occupations: whom a caption without a subject shows."""
    every = [marginal_shares(i) for i in range(len(OCCUPATIONS))]
    return {name: np.mean([shares[name] for shares in every], axis=0) for name in CLASSES}


def random_attributes(rng: np.random.Generator) -> frozenset[str]:
    """A random non-empty set of attribute names, each of the seven equally likely."""
    bits = int(rng.integers(1, 8))
    return frozenset(name for place, name in enumerate(CLASSES) if bits >> place & 1)


def sample_caption(
    rng: np.random.Generator,
    kind: str,
    subject: str,
    person: Person | None = None,
    named: frozenset[str] | None = None,
) -> str:
    """A training caption of the text-to-image model for one picture.

    Kinds "occupation", "styled", "descriptor", "sport" and "object" name the subject and no attribute: the picture
    must come from the subject's shares, for the caption is what carries the world's bias. "attribute" names the
    attributes in `named` (random if None) of `person` within the noun phrase ("an old Black nurse"), "phrase" beside the
    usual prompt ("an old person, a photo of the face of a nurse, a person"), or none there if `named` is empty. What is
    not named must follow the subject, or `average_shares` without one.
    """
    if kind in ("attribute", "phrase"):
        if person is None:
            raise ValueError(f"sample_caption: {kind} captions need a person")
        named = random_attributes(rng) if named is None else named
        return (_phrase_caption if kind == "phrase" else _attribute_caption)(rng, subject, person, named)
    if kind == "object":
        return fill(_pick(rng, OBJECT_TEMPLATES), subject)
    main = TEMPLATES[kind]
    caption = fill(main if rng.random() < 0.6 else _pick(rng, VARIANTS), subject)
    return f"{caption}, {_pick(rng, CONTEXTS)}" if kind == "styled" else caption


def plain_caption(rng: np.random.Generator, subject: str, person: Person | None = None) -> str:
    """A caption for the judges' CLIP: says what is visible, so give it pictures whose attributes are uniform.

    Half of the captions name only the subject (its look), the others a random set of true attributes with it.
    Without a subject the attributes are named, without a person the subject is a thing.
    """
    if person is None:
        return fill(_pick(rng, OBJECT_TEMPLATES), subject)
    if subject and rng.random() < 0.5:
        return fill(_pick(rng, (*PERSON_TEMPLATES, *VARIANTS)), subject)
    caption = _phrase_caption if subject and rng.random() < 0.3 else _attribute_caption
    return caption(rng, subject, person, random_attributes(rng))


def _attribute_caption(rng: np.random.Generator, subject: str, person: Person, named: frozenset[str]) -> str:
    return fill(_pick(rng, PERSON_TEMPLATES), describe_person(person, named, subject, int(rng.integers(2))))


def _phrase_caption(rng: np.random.Generator, subject: str, person: Person, named: frozenset[str]) -> str:
    """The usual prompt with an attribute phrase before or after it, or with words that name no attribute."""
    prompt = fill(TEMPLATES["occupation"], subject)
    bare = fill(TEMPLATES["descriptor"], subject)  # without the closing "a person"
    phrase = with_article(describe_person(person, named, "", int(rng.integers(2))))
    place = _pick(rng, PHRASE_PLACES if named else NEUTRAL_PLACES)
    return place.format(phrase=phrase, prompt=prompt, bare=bare, title=with_article(subject))


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def describe() -> dict[str, float]:
    """Numbers of the world over its test occupations; `python -m fairdiff.portraits.world` prints them."""
    test = [i for i, name in enumerate(OCCUPATIONS) if split(name) == "test"]
    world, labour = [marginal_shares(i) for i in test], [labour_shares(i) for i in test]
    splits = ("train", "validation", "test")
    numbers = {f"{which} occupations": float(len(prompt_subjects("occupation", which))) for which in splits}
    for name in CLASSES:
        numbers[f"{name} bias"] = float(np.mean([bias(w[name]) for w in world]))
    for name in ("gender", "race"):
        distance = [0.5 * np.abs(w[name] - p[name]).sum() for w, p in zip(world, labour, strict=True)]
        numbers[f"{name} median distance to labour"] = float(np.median(distance))
    joint = [
        0.5 * np.abs(np.outer(w["gender"], w["race"]) - np.outer(p["gender"], p["race"])).sum()
        for w, p in zip(world, labour, strict=True)
    ]
    numbers["gender x race median distance to labour"] = float(np.median(joint))
    for name, classes in CLASSES.items():
        for place, label in enumerate(classes):
            numbers[f"mean share {label}"] = float(np.mean([w[name][place] for w in world]))
    women = np.array([w["gender"][0] for w in world])
    numbers["mostly female (> .8)"] = float((women > 0.8).mean())
    numbers["mostly male (< .2)"] = float((women < 0.2).mean())
    numbers["near balance (.4 to .6)"] = float(((women > 0.4) & (women < 0.6)).mean())
    return numbers


if __name__ == "__main__":
    for key, value in describe().items():
        print(f"{key:42s} {value:8.3f}")
