"""Differences between the numbers of two audits, paired over prompts, and over images if the noise is shared.

A number of shares: `fairdiff.audit.attribute.change`, as for after minus before; its variance by the images is that of pairs
where the noise is the same. A number of images: Student's interval over the prompts' differences. Audits of the same pictures
differ by 0, [0, 0].
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from fairdiff.audit import intervals as iv
from fairdiff.audit.attribute import change
from fairdiff.audit.axis import Axis, MetricSpec, groups_of, labels
from fairdiff.audit.metrics import plain
from fairdiff.audit.paired import class_pairs
from fairdiff.audit.rows import difference_over_prompts
from fairdiff.audit.suite import combine
from fairdiff.audit.wording import distance_of
from fairdiff.compare.audits import Audited
from fairdiff.compare.groups import Group
from fairdiff.compare.same import NOISE, SAME, pairing

IMAGES = {"CLIP-T": "clip_t", "CLIP-I": "clip_i", "image encoder": "dino", "between seeds": "between"}
SQUARED = "{} D²"  # name of the row of D^2
NONE = {"difference": 0.0, "ci95": [0.0, 0.0], "ci95_these": [0.0, 0.0]}


def differences(one: Audited, other: Audited) -> dict[str, dict]:
    """Other minus one, {name of a row of `audit.wording.comparison`: {difference, ci95, ci95_these of shares}}.

    Over the prompts on which both show two faces or more. Attributes, combinations, families and what is measured on images.
    """
    common, _ = pairing(one, other)
    found = _of_shares(one, other, common == NOISE) | _of_images(one, other, common == NOISE)
    return dict.fromkeys(found, NONE) if common == SAME else plain(found)


def _of_shares(one: Audited, other: Audited, noise: bool) -> dict[str, dict]:
    models = [some.audit["models"][some.last] for some in (one, other)]
    attributes = {name: tuple(classes) for name, classes in one.audit["attributes"].items()}
    rows = _common(one, other) if noise else None
    families = [*one.audit["families"]] if len(one.audit["families"]) > 1 else []
    found = {}
    for name, members in groups_of([*attributes]).items():
        part = "attributes" if len(members) == 1 else "joint"
        entry = models[0][part].get(name)
        if entry is None:  # in the order of the other audit's attributes
            continue
        axis, counts, family_P = _counts([model[part][name] for model in models], name, members)
        pairs = _pairs(rows, attributes, axis, [p["prompt"] for p in entry["per_prompt"]])
        spec = _spec(one.audit, attributes, name, entry)
        seen, short = np.all([c.sum(1) > 1 for c in counts], 0), distance_of(entry)["short"]

        def over(rows_P: np.ndarray, axis=axis, counts=counts, pairs=pairs, spec=spec) -> dict:
            return change([c[rows_P] for c in counts], pairs[rows_P], axis.rows(rows_P), spec)

        whole = over(seen)
        found[f"{name} {short}"] = whole[distance_of(entry)["key"]]
        found[SQUARED.format(name)] = whole.get("corrected", whole)["squared_distance"]
        for family in families:
            found[f"{family}: {name} {short}"] = over(seen & (family_P == family))[distance_of(entry)["key"]]
    return found


def _counts(entries: list[dict], name: str, members: tuple[str, ...]) -> tuple[Axis, list[np.ndarray], np.ndarray]:
    """The axis, counts_PK of both audits and the family of each prompt, in the order of the first one's prompts."""
    first = entries[0]["per_prompt"]
    classes = tuple(first[0]["target"]["shares"])
    others = [{p["prompt"]: p["counts"] for p in entry["per_prompt"]} for entry in entries]
    counts = [np.array([[some[p["prompt"]][c] for c in classes] for p in first]) for some in others]
    target = np.array([[p["target"]["shares"][c] for c in classes] for p in first], float)
    return Axis(name, classes, members, target), counts, np.array([p["family"] for p in first])


def _spec(audit: dict, attributes: dict, name: str, entry: dict) -> MetricSpec:
    corrected = entry.get("corrected") or {}
    confusion = {name: np.array(corrected["confusion"])} if corrected else {}
    return MetricSpec(attributes, audit["judge"], confusion=confusion, seed=audit["provenance"]["seed"])


def _common(one: Audited, other: Audited) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of both for the images that both have, in one order."""
    both = one.rows.index.intersection(other.rows.index)
    return one.rows.loc[both], other.rows.loc[both]


def _pairs(rows: tuple | None, attributes: dict, axis: Axis, prompts: Sequence[str]) -> np.ndarray:
    """How many pairs of images show which two classes [P, K, K]; zeros without common noise."""
    size = len(prompts), len(axis.classes)
    if rows is None:
        return np.zeros((*size, size[1]))
    kinds = [labels(some, attributes, axis.members) for some in rows]
    place = rows[0].index.get_level_values("prompt").map({text: row for row, text in enumerate(prompts)}).to_numpy()
    return class_pairs(place, *kinds, size)


def _of_images(one: Audited, other: Audited, noise: bool) -> dict[str, dict]:
    found = {"no face": _no_face(one, other, noise)}
    if one.rows is None or other.rows is None:
        return found
    for name, column in IMAGES.items():
        means = [some.rows[column].groupby(level="prompt").mean() for some in (one, other)]
        step = (means[1] - means[0]).dropna().to_numpy()
        if len(step):
            found[name] = difference_over_prompts(-step if column == "between" else step)
    return found


def _no_face(one: Audited, other: Audited, noise: bool) -> dict:
    """Change of the rate of images without a face: of pairs, or by Wilson's intervals of both (Newcombe 1998)."""
    if noise:
        first, second = (some.found.to_numpy() for some in _common(one, other))
        lost, gained = int((first & ~second).sum()), int((second & ~first).sum())
        ends = iv.paired_rate_interval(gained, lost, len(first))
        return {"difference": (lost - gained) / len(first), "ci95": list(ends)}
    rates = [some.audit["models"][some.last]["no_face"] for some in (one, other)]
    a, b = (rate["rate"] for rate in rates)
    (low_a, high_a), (low_b, high_b) = (rate["ci95"] for rate in rates)
    step = b - a
    ends = combine(step, (step - (b - low_b), step + high_b - b), (step - (high_a - a), step + a - low_a))
    return {"difference": step, "ci95": list(ends)}


def partners(reference: Group, group: Group) -> list[tuple[Audited, Audited]]:
    """Pairs (of the reference, of the group): every audit of the larger one with that of the other most like it.

    The same audit seed comes first, for its noise, then the same training seed, then one that is not taken yet.
    """
    swap = len(reference.members) > len(group.members)
    many, few = (reference, group) if swap else (group, reference)
    taken = dict.fromkeys(range(len(few.members)), 0)
    pairs = []
    for audit in many.members:

        def unlike(place: int, audit: Audited = audit) -> tuple:
            other = few.members[place]
            return other.audit_seed != audit.audit_seed, other.seed != audit.seed, taken[place]

        best = min(taken, key=unlike)
        taken[best] += 1
        pairs.append((audit, few.members[best]) if swap else (few.members[best], audit))
    return pairs
