"""Axes: attributes and combinations of attributes with their classes and targets, and the faces of each class.

Shapes: P prompts, K classes.
"""

import itertools
import platform
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pandas as pd

from fairdiff.audit.records import probability_columns


def software_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages on which the numbers depend."""
    found = {"python": platform.python_version()}
    for name in ("fairdiff", "torch", "diffusers", "transformers", "peft", "numpy", "scipy", "statsmodels"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an audit of recorded images needs no diffusers
            found[name] = "not installed"
    return found


@dataclass(frozen=True)
class MetricSpec:
    """Settings of the metrics.

    attributes: classes by attribute. judge: the entry `judge` of audit.json. targets: shares [K] or one row per prompt
    [P, K], by attribute or joint name ("gender×race"); by default uniform for an attribute, for a joint the product of the
    marginals. confusion: counts [K, K] of the judge on labelled faces (rows: true class). delta: equivalence margin of the
    distance to the target. drift: margin within which the bias and the mean shares of an untargeted attribute count as
    unchanged. provenance: further entries of audit.json, by default the versions of the software.
    """

    attributes: dict[str, tuple[str, ...]]
    judge: dict
    targets: dict[str, np.ndarray] = field(default_factory=dict)
    confusion: dict[str, np.ndarray] = field(default_factory=dict)
    delta: float = 0.10
    drift: float = 0.06
    seed: int = 0
    provenance: dict = field(default_factory=lambda: {"software": software_versions()})

    def to_json(self) -> dict:
        """Return all fields as JSON values, with arrays as lists."""
        tables = {key: {name: t.tolist() for name, t in vars(self)[key].items()} for key in ("targets", "confusion")}
        return vars(self) | tables | {"attributes": {name: list(classes) for name, classes in self.attributes.items()}}

    @classmethod
    def from_json(cls, saved: dict) -> "MetricSpec":
        """Return the settings that `to_json` wrote; TypeError or KeyError for anything else."""
        tables = {key: {name: np.array(t) for name, t in saved[key].items()} for key in ("targets", "confusion")}
        return cls(**saved | tables | {"attributes": {name: tuple(c) for name, c in saved["attributes"].items()}})


@dataclass(frozen=True)
class Axis:
    """One attribute, or the combination of several (`members`): its classes and its target shares [P, K]."""

    name: str
    classes: tuple[str, ...]
    members: tuple[str, ...]
    target_PK: np.ndarray

    def rows(self, rows_P: np.ndarray) -> "Axis":
        """Return the same axis over some of the prompts."""
        return replace(self, target_PK=self.target_PK[rows_P])


def groups_of(names: list[str]) -> dict[str, tuple[str, ...]]:
    """Return the attributes, all pairs, and all together if there are three or more; name ("gender×race") -> members."""
    groups = [(name,) for name in names] + list(itertools.combinations(names, 2))
    groups += [tuple(names)] if len(names) > 2 else []
    return {"×".join(members): members for members in groups}


def axes_of(spec: MetricSpec, prompts: int) -> list[Axis]:
    """Return every attribute and combination with its classes and targets."""
    axes, marginal = [], {}
    for name, members in groups_of(list(spec.attributes)).items():
        classes = tuple("×".join(c) for c in itertools.product(*(spec.attributes[m] for m in members)))
        if name in spec.targets:
            target = np.asarray(spec.targets[name], float).reshape(-1, len(classes))
        elif len(members) == 1:
            target = np.full((1, len(classes)), 1 / len(classes))
        else:
            target = np.ones((prompts, 1))
            for member in members:
                target = (target[:, :, None] * marginal[member][:, None]).reshape(prompts, -1)
        marginal[name] = np.broadcast_to(target, (prompts, len(classes)))
        axes.append(Axis(name, classes, members, marginal[name]))
    return axes


def labels(rows: pd.DataFrame, attributes: dict[str, tuple[str, ...]], members: tuple[str, ...]) -> np.ndarray:
    """Return the most probable class [N] of each row, an index into the (combined) classes; -1 without a face."""
    label = np.zeros(len(rows), int)
    for member in members:
        probs = rows[probability_columns({member: attributes[member]})].to_numpy()
        label = label * len(attributes[member]) + np.nan_to_num(probs, nan=-1.0).argmax(1)
    return np.where(rows.found, label, -1)


def tally(rows: pd.DataFrame, axis: Axis, spec: MetricSpec, index: pd.Series) -> np.ndarray:
    """Return counts_PK, the faces of each class for the prompts of `index`."""
    label = labels(rows, spec.attributes, axis.members)
    counts = np.zeros((len(index), len(axis.classes)), int)
    place = {prompt: row for row, prompt in enumerate(index)}
    prompt = rows.prompt_index.map(place).to_numpy()
    np.add.at(counts, (prompt[label >= 0], label[label >= 0]), 1)
    return counts


def requested(axis: Axis, spec: MetricSpec) -> bool:
    """Return whether a target was set for this axis, or for all of its members."""
    return axis.name in spec.targets or all(member in spec.targets for member in axis.members)
