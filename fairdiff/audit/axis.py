"""One attribute, or several combined, counted: suite-level and per-prompt numbers from counts_PK.

Shapes: P prompts, K classes, counts_PK faces of each class. Every mean over prompts weighs prompts alike.
"""

import itertools
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pandas as pd

from fairdiff.audit import intervals as iv
from fairdiff.audit.correction import corrected_bias_interval, corrected_suite, resampled_confusions
from fairdiff.audit.records import probability_columns
from fairdiff.bias import bias as bias_of


def software_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("fairdiff", "torch", "diffusers", "transformers", "peft", "numpy", "scipy", "statsmodels"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an audit of recorded images needs no diffusers
            found[name] = "not installed"
    return found


@dataclass(frozen=True)
class MetricSpec:
    """What to count. targets: shares [K] or one row a prompt [P, K], by attribute or joint name ("gender×race").

    Missing targets: uniform for an attribute, the product of the marginals for a joint. confusion: counts [K, K] of
    the judge on labelled faces (rows: true class). judge: what audit.json says of the judge. delta: equivalence margin.
    drift: how far the bias of an attribute without a target may move and count as unchanged.
    provenance: anything else audit.json is to carry (by default the versions of the software).
    """

    attributes: dict[str, tuple[str, ...]]
    judge: dict
    targets: dict[str, np.ndarray] = field(default_factory=dict)
    confusion: dict[str, np.ndarray] = field(default_factory=dict)
    delta: float = 0.10
    drift: float = 0.06
    draws: int = 2000
    seed: int = 0
    provenance: dict = field(default_factory=lambda: {"software": software_versions()})

    def to_json(self) -> dict:
        """All of it as JSON says it, arrays as lists."""
        tables = {key: {name: t.tolist() for name, t in vars(self)[key].items()} for key in ("targets", "confusion")}
        return vars(self) | tables | {"attributes": {name: list(classes) for name, classes in self.attributes.items()}}

    @classmethod
    def from_json(cls, saved: dict) -> "MetricSpec":
        """What `to_json` wrote; TypeError or KeyError for anything else."""
        tables = {key: {name: np.array(t) for name, t in saved[key].items()} for key in ("targets", "confusion")}
        return cls(**saved | tables | {"attributes": {name: tuple(c) for name, c in saved["attributes"].items()}})


@dataclass(frozen=True)
class Axis:
    """One attribute, or the combinations of several (their `members`), as classes with a target [P, K]."""

    name: str
    classes: tuple[str, ...]
    members: tuple[str, ...]
    target_PK: np.ndarray

    def rows(self, rows_P: np.ndarray) -> "Axis":
        """The same axis over some of the prompts."""
        return replace(self, target_PK=self.target_PK[rows_P])


def groups_of(names: list[str]) -> dict[str, tuple[str, ...]]:
    """Attributes, then all pairs, then all together when they are three or more, by name ("gender×race")."""
    groups = [(name,) for name in names] + list(itertools.combinations(names, 2))
    groups += [tuple(names)] if len(names) > 2 else []
    return {"×".join(members): members for members in groups}


def axes_of(spec: MetricSpec, prompts: int) -> list[Axis]:
    """Every attribute and combination with its classes and targets."""
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
    """The most probable class of each row, [rows] in the order of the combined classes; -1 without a face."""
    label = np.zeros(len(rows), int)
    for member in members:
        probs = rows[probability_columns({member: attributes[member]})].to_numpy()
        label = label * len(attributes[member]) + np.nan_to_num(probs, nan=-1.0).argmax(1)
    return np.where(rows.found, label, -1)


def tally(rows: pd.DataFrame, axis: Axis, spec: MetricSpec, index: pd.Series) -> np.ndarray:
    """Faces of each class, counts_PK."""
    label = labels(rows, spec.attributes, axis.members)
    counts = np.zeros((len(index), len(axis.classes)), int)
    place = {prompt: row for row, prompt in enumerate(index)}
    prompt = rows.prompt_index.map(place).to_numpy()
    np.add.at(counts, (prompt[label >= 0], label[label >= 0]), 1)
    return counts


def requested(axis: Axis, spec: MetricSpec) -> bool:
    """Whether a target was set for this axis, or for all of its members."""
    return axis.name in spec.targets or all(member in spec.targets for member in axis.members)


def average(values) -> float:
    """Mean, NaN of nothing."""
    return float(np.mean(values)) if len(values) else math.nan


def mean_over_prompts(values: np.ndarray, spec: MetricSpec) -> dict:
    """Mean of a per-prompt quantity [P] and its interval over the population of prompts."""
    return {"mean": average(values), "ci95": iv.mean_interval(values, spec.draws, spec.seed)}


def difference_over_prompts(values: np.ndarray, spec: MetricSpec) -> dict:
    """The same for paired differences, after minus before."""
    return {"difference": average(values), "ci95": iv.mean_interval(values, spec.draws, spec.seed)}


def rms_over_prompts(squared_gaps: np.ndarray, spec: MetricSpec) -> dict:
    """Root of the unbiased mean squared gap [P] and its interval over the population of prompts."""
    if not len(squared_gaps):
        return {"value": math.nan, "ci95": (math.nan, math.nan)}
    value, interval = iv.rms_interval(squared_gaps, spec.draws, spec.seed)
    return {"value": value, "ci95": interval}


def _worst(values: np.ndarray, statistic: Callable, faces: np.ndarray, target: np.ndarray, spec: MetricSpec) -> dict:
    """The mean over the tenth of the prompts that are worst, what chance alone makes of it, and how many they are."""
    return {
        "mean": float(iv.worst_tenth(values)) if len(values) else math.nan,
        "ci95": iv.worst_tenth_interval(values, spec.draws, spec.seed),
        "floor": iv.worst_tenth_floor(statistic, faces, target, seed=spec.seed),
        "prompts": math.ceil(len(values) / 10),
    }


def suite_metrics(counts: np.ndarray, missing: np.ndarray, axis: Axis, spec: MetricSpec) -> dict:
    """Suite-level numbers of one attribute or joint; prompts without a face take no part (bounds: they do)."""
    K, faces = counts.shape[1], counts.sum(1)
    seen, two = faces > 0, faces > 1
    shares = counts[seen] / faces[seen, None]
    aim = axis.target_PK[seen]
    bias, distance = bias_of(shares), iv.total_variation(shares, aim)
    bounds = [iv.missing_face_bounds(c, m) for c, m in zip(counts, missing, strict=True)]
    floors = [iv.noise_floor(K, int(n)) for n in faces[seen]]
    tv_floors = [iv.total_variation_floor(t, int(n)) for t, n in zip(aim, faces[seen], strict=True)]
    on_target = rms_over_prompts(iv.unbiased_squared_gap(counts[two], axis.target_PK[two]), spec)
    result = {
        "bias": mean_over_prompts(bias, spec)
        | {
            "sd_over_prompts": bias.std(ddof=1) if len(bias) > 1 else math.nan,
            "floor": average(floors),
            "worst_tenth": _worst(bias, lambda f, _: bias_of(f), faces[seen], np.full(aim.shape, 1 / K), spec),
            "maximum": 2 / K,
            "unbiased_rms": rms_over_prompts(iv.unbiased_squared_gap(counts[two]), spec),
            "missing_face_bounds": np.mean(bounds, 0),
            "prompts": int(seen.sum()),
        },
        "shares": {
            name: {"share": m["mean"], "ci95": m["ci95"]}
            for name, m in ((name, mean_over_prompts(shares[:, k], spec)) for k, name in enumerate(axis.classes))
        },
        "target": {
            "shares": dict(zip(axis.classes, axis.target_PK.mean(0), strict=True)),
            "requested": requested(axis, spec),
            "uniform": bool(np.allclose(axis.target_PK, 1 / K)),
            "total_variation": mean_over_prompts(distance, spec)
            | {
                "floor": average(tv_floors),
                "worst_tenth": _worst(distance, iv.total_variation, faces[seen], aim, spec),
                "maximum": average(1 - aim.min(1)),
            },
            "unbiased_rms": on_target,
            "delta": spec.delta,
            "verdict": iv.verdict(on_target["ci95"], spec.delta, int(faces.sum()), K),
        },
    }
    if axis.name in spec.confusion and two.any():
        result["corrected"] = _corrected(counts[two], axis, spec, axis.target_PK[two])
    return result


def _corrected(counts: np.ndarray, axis: Axis, spec: MetricSpec, target: np.ndarray) -> dict:
    confusion = np.asarray(spec.confusion[axis.name])
    raw = corrected_suite(counts, confusion, seed=spec.seed)
    aimed = corrected_suite(counts, confusion, target, seed=spec.seed)
    return {
        "bias": {
            "mean": raw.mean_bias,
            "ci95": raw.mean_bias_interval,
            "unbiased_rms": {"value": raw.rms, "ci95": raw.rms_interval},
        },
        "shares": {
            name: {"share": raw.shares[k], "ci95": raw.share_intervals[k]} for k, name in enumerate(axis.classes)
        },
        "target": {
            "unbiased_rms": {"value": aimed.rms, "ci95": aimed.rms_interval},
            "verdict": iv.verdict(aimed.rms_interval, spec.delta, int(counts.sum()), counts.shape[1]),
        },
        "confusion": confusion,
    }


def prompt_metrics(counts, images, axis: Axis, prompts: pd.DataFrame, spec: MetricSpec) -> list[dict]:
    """Every prompt's own numbers with intervals for its own shares (no prompt borrows from another)."""
    draws = iv.draws_for(len(counts))
    p_values = [iv.target_p_value(c, t, draws, spec.seed) for c, t in zip(counts, axis.target_PK, strict=True)]
    holm = iv.holm(p_values)
    confusions = None
    if axis.name in spec.confusion:
        confusions = resampled_confusions(spec.confusion[axis.name], 500, spec.seed)
    items = []
    for row, prompt in enumerate(prompts.itertuples()):
        faces, region = int(counts[row].sum()), iv.share_region(counts[row])
        shares = counts[row] / faces if faces else np.full(len(counts[row]), math.nan)
        item = {
            "prompt_index": int(prompt.prompt_index),
            "prompt": prompt.prompt,
            "subject": prompt.subject,
            "family": prompt.family,
            "images": int(images[row]),
            "faces": faces,
            "counts": dict(zip(axis.classes, counts[row], strict=True)),
            "shares": {name: {"share": shares[k], "ci95": region[k]} for k, name in enumerate(axis.classes)},
            "bias": {
                "value": bias_of(shares),
                "ci95": iv.bias_interval(counts[row]),
                "floor": iv.noise_floor(len(axis.classes), faces),
                "missing_face_bounds": iv.missing_face_bounds(counts[row], int(images[row]) - faces),
            },
            "target": {
                "shares": dict(zip(axis.classes, axis.target_PK[row], strict=True)),
                "total_variation": iv.total_variation(shares, axis.target_PK[row]),
                "floor": iv.total_variation_floor(axis.target_PK[row], faces),
                "p": p_values[row],
                "p_holm": holm[row],
            },
        }
        if confusions is not None and faces:
            item["bias"]["corrected_ci95"] = corrected_bias_interval(counts[row], confusions, seed=spec.seed)
        items.append(item)
    return items
