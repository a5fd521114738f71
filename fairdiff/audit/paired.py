"""The change of every number between two models of one audit, on the same prompts and noise."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fairdiff.audit import intervals as iv
from fairdiff.audit.attribute import change, drift_of, share_changes
from fairdiff.audit.axis import Axis, MetricSpec, labels, requested
from fairdiff.audit.rows import by_family, difference_over_prompts, grouped, prompt_means

IMAGE = ["prompt_index", "image_index"]


@dataclass(frozen=True)
class Pair:
    """The records of two models, whose rows at the same place have the same noise.

    tallies: per model, axis -> faces of each class [P, K]. seen: which of the P prompts the means include, bool [P].
    """

    before: pd.DataFrame
    after: pd.DataFrame
    tallies: tuple[dict, dict]
    seen: np.ndarray


def make_pair(rows: tuple[pd.DataFrame, pd.DataFrame], tallies: tuple[dict, dict], seen: np.ndarray) -> Pair:
    """Return the pair of the images that both models have; given images may lack a partner."""
    one, other = (some.sort_values(IMAGE) for some in rows)
    keys = [pd.MultiIndex.from_frame(some[IMAGE]) for some in (one, other)]
    return Pair(one[keys[0].isin(keys[1])], other[keys[1].isin(keys[0])], tallies, seen)


def paired_metrics(pair: Pair, axes: list[Axis], prompts: pd.DataFrame, spec: MetricSpec) -> dict:
    """Return the changes of all numbers, the second model minus the first."""
    before, after = pair.before, pair.after
    every = np.ones(len(prompts), bool)
    result: dict = {"pairs": len(before)} | grouped(axes, lambda axis: _with_verdict(pair, axis, prompts, every, spec))
    result["families"] = {
        family: grouped(axes, lambda axis, rows_P=rows_P: _change(pair, axis, prompts, rows_P, spec))
        for family, rows_P in by_family(prompts.family).items()
    }
    lost, gained = before.found.to_numpy() & ~after.found.to_numpy(), after.found.to_numpy() & ~before.found.to_numpy()
    result["no_face"] = {
        "difference": (lost.sum() - gained.sum()) / len(before),
        "ci95": iv.paired_rate_interval(int(gained.sum()), int(lost.sum()), len(before)),
    }
    steps = {
        "clip_t": after.clip_t.to_numpy() - before.clip_t,
        "between_seeds": before.between - after.between.to_numpy(),
    }
    for name, step in steps.items():
        result[name] = difference_over_prompts(prompt_means(step, before))
    return result


def class_pairs(place_N: np.ndarray, one_N: np.ndarray, other_N: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the number of image pairs of each prompt by the classes of both images [P, K, K].

    place_N: the prompt of each pair. one_N, other_N: the classes of both images, below 0 without a face. size: P and K.
    """
    pairs_PKK, faces = np.zeros((*size, size[1])), (one_N >= 0) & (other_N >= 0)
    np.add.at(pairs_PKK, (place_N[faces], one_N[faces], other_N[faces]), 1)
    return pairs_PKK


def _classes_of_both(pair: Pair, axis: Axis, spec: MetricSpec) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes [N] before and after of all image pairs, below 0 without a face."""
    one, other = (labels(rows, spec.attributes, axis.members) for rows in (pair.before, pair.after))
    return one, other


def _counted(pair: Pair, axis: Axis, prompts: pd.DataFrame, rows_P: np.ndarray, spec: MetricSpec) -> tuple[list, np.ndarray]:
    """Return the faces of each class [P, K] for both models and the image pairs by class [P, K, K], for some prompts."""
    kinds = _classes_of_both(pair, axis, spec)
    place = pair.before.prompt_index.map({prompt: row for row, prompt in enumerate(prompts.prompt_index)}).to_numpy()
    both = class_pairs(place, *kinds, (len(prompts), len(axis.classes)))
    return [tally[axis.name][rows_P] for tally in pair.tallies], both[rows_P]


def _change(pair: Pair, axis: Axis, prompts: pd.DataFrame, rows_P: np.ndarray, spec: MetricSpec) -> dict:
    """Return the change of one axis over some of the prompts."""
    rows_P = rows_P & pair.seen
    return change(*_counted(pair, axis, prompts, rows_P, spec), axis.rows(rows_P), spec)


def _with_verdict(pair: Pair, axis: Axis, prompts: pd.DataFrame, rows_P: np.ndarray, spec: MetricSpec) -> dict:
    """Return the change of one axis, the share of face pairs that changed class, and the drift of an untargeted attribute."""
    one, other = _classes_of_both(pair, axis, spec)
    faces = (one >= 0) & (other >= 0)
    changed = (one != other)[faces].mean() if faces.any() else math.nan
    entry = _change(pair, axis, prompts, rows_P, spec) | {"class_changed": changed}
    if len(axis.members) == 1 and not requested(axis, spec):
        rows_P = rows_P & pair.seen
        shares = share_changes(*_counted(pair, axis, prompts, rows_P, spec), axis.rows(rows_P), spec.seed)
        entry["drift"] = drift_of(entry["bias"], shares, spec.drift)
    return entry
