"""The data-generating distribution of Portraits: the shares of the classes for each subject.

They are labour statistics, sharpened as text-to-image models sharpen them. Shares are arrays with the classes in the order of
`occupations.CLASSES`. Every label is perceived presentation in a rendered image.
`python -m fairdiff.portraits.distribution` prints its numbers.
"""

import numpy as np

from fairdiff.bias import bias
from fairdiff.portraits.occupations import (
    CLASSES,
    DESCRIPTOR_ROWS,
    DESCRIPTORS,
    OCCUPATIONS,
    ROWS,
    SPORT_ROWS,
    SPORTS,
    prompt_subjects,
    split,
)

# Exponents that sharpen labour shares as text-to-image models do. Guidance sharpens once more, so they are chosen by the
# images that the model then generates (docs/portraits.md): gender and race biases over test occupations near those of
# Stable Diffusion 1.5 (.67, .42; Shen et al., ICLR 2024, table 1), and gender x race shares far from the statistics
# (median total variation >= .15). Age shares are our own assumption and are not sharpened.
SHARPENING = {"gender": 1.75, "race": 1.4, "age": 1.0}


def labour_shares(i: int) -> dict[str, np.ndarray]:
    """Return the labour statistics of occupation i in our classes: gender [2] and race [4], each with sum 1; no ages exist.

    Race: White and Black are columns of the table. Its Asian column is divided into Indian and Asian by the assumed share
    in `assumptions.csv`. Other groups are not in the table and are left out by renormalising. Hispanic origin is a question
    separate from race there, and is not used.
    """
    row = ROWS[i]
    women, asian = float(row["women_pct"]) / 100, float(row["asian_pct"])
    indian = asian * float(row["indian_of_asian_pct"]) / 100
    race = np.array([float(row["white_pct"]), float(row["black_pct"]), indian, asian - indian])
    return {"gender": np.array([women, 1 - women]), "race": race / race.sum()}


def marginal_shares(i: int) -> dict[str, np.ndarray]:
    """Return Portraits' shares of occupation i for gender [2], race [4] and age [2]: p proportional to labour^s."""
    old = float(ROWS[i]["old_pct"]) / 100
    plain = labour_shares(i) | {"age": np.array([1 - old, old])}
    powers = {name: share ** SHARPENING[name] for name, share in plain.items()}
    return {name: power / power.sum() for name, power in powers.items()}


def occupation_shares(i: int) -> np.ndarray:
    """Return the joint shares [gender 2, race 4, age 2] of occupation i, the product of its marginal shares."""
    return _product(marginal_shares(i))


def descriptor_shares(i: int) -> np.ndarray:
    """Return the joint shares [2, 4, 2] of descriptor i, as assumed in `descriptors.csv`."""
    return _product(_assumed(DESCRIPTOR_ROWS[DESCRIPTORS[i]]))


def sport_shares(i: int) -> np.ndarray:
    """Return the joint shares [2, 4, 2] of sport i, as assumed in `sports.csv`."""
    return _product(_assumed(SPORT_ROWS[SPORTS[i]]))


def _assumed(row: dict[str, str]) -> dict[str, np.ndarray]:
    women, old = float(row["women_pct"]) / 100, float(row["old_pct"]) / 100
    race = np.array([float(row[f"{name.lower()}_pct"]) / 100 for name in CLASSES["race"]])
    return {"gender": np.array([women, 1 - women]), "race": race, "age": np.array([1 - old, old])}


def _product(shares: dict[str, np.ndarray]) -> np.ndarray:
    return np.einsum("g,r,a->gra", shares["gender"], shares["race"], shares["age"])


def average_shares() -> dict[str, np.ndarray]:
    """Return the mean shares of gender [2], race [4] and age [2] over occupations, used for captions without a subject."""
    every = [marginal_shares(i) for i in range(len(OCCUPATIONS))]
    return {name: np.mean([shares[name] for shares in every], axis=0) for name in CLASSES}


def describe() -> dict[str, float]:
    """Return numbers of the distribution over test occupations, which `python -m fairdiff.portraits.distribution` prints."""
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
