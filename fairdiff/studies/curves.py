"""Relaxation curves and their comparison at equal bias and at equal semantics.

Methods at one setting each stand at unequal bias and unequal semantics, and do not compare. Unprocessing (Cruz and Hardt
2024, arXiv 2306.07261) brings them to one level. Here a method may always be applied to a random share of the images, so a
mixture of any two of its settings, or of one and nothing, is one of its settings too. Semantics of a mixture are between; its
bias is at most the mean of both, for bias is convex in the shares. So the lower hull of a method's points is what it reaches
at least.

Shapes: S settings, P prompts, D resamples of the prompts. x: semantics, more is better. y: bias, less is better.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from fairdiff.audit.suite import resampled_weights
from fairdiff.bias import bias


@dataclass(frozen=True)
class Outcome:
    """One setting of a method on the prompts of an audit: bias_P, semantics_P and what an image costs in sampled ones."""

    label: str
    bias_P: np.ndarray
    semantics_P: np.ndarray
    cost: float = 1.0


def labels_of(rows: pd.DataFrame, attribute: str, classes: tuple[str, ...]) -> np.ndarray:
    """The most probable class of each row, -1 without a face."""
    probs = rows[[f"p.{attribute}.{name}" for name in classes]].to_numpy(float)
    return np.where(rows.found.to_numpy(bool), np.nan_to_num(probs, nan=-1).argmax(1), -1)


def usual_rows(records: pd.DataFrame, model: str) -> pd.DataFrame:
    """The rows of prompts of people that name no class, by prompt and image."""
    rows = records[(records.model == model) & records.people & (records.names == "")]
    return rows.sort_values(["prompt", "image_index"])


def outcome(label: str, rows: pd.DataFrame, attribute: str, classes: tuple[str, ...], semantics: str) -> Outcome:
    """The outcome of one model's records; "before" has similarity 1 to itself. NaN for a prompt without a face."""
    labels, values = labels_of(rows, attribute, classes), rows[semantics].to_numpy(float)
    values = np.where(np.isnan(values) & (rows.model == "before"), 1.0, values)
    biases, means = [], []
    for at in rows.groupby("prompt").indices.values():  # in the order of the prompts' names
        counts = np.bincount(labels[at][labels[at] >= 0], minlength=len(classes))
        biases.append(float(bias(counts / counts.sum())) if counts.sum() else np.nan)
        means.append(values[at].mean())
    return Outcome(label, np.array(biases), np.array(means))


def of_means(outcomes: list[Outcome], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(x, y), each [1 + D, S]: the means over the prompts that all settings have, then of every resample of the prompts.

    Curves of one set of prompts and one seed share their resamples, so that their differences are paired.
    """
    both = np.stack([np.stack([o.semantics_P, o.bias_P]) for o in outcomes])  # [S, 2, P]
    weights = np.concatenate([np.full((1, both.shape[2]), 1 / both.shape[2]), resampled_weights(both.shape[2], seed)])
    known = ~np.isnan(both).any((0, 1))
    share = weights[:, known] / np.maximum(weights[:, known].sum(1, keepdims=True), 1e-12)
    x, y = (share @ both[:, place][:, known].T for place in (0, 1))
    return x, y


def least_bias(x: np.ndarray, y: np.ndarray, level: float | np.ndarray) -> np.ndarray:
    """The least y [D] of mixtures of the settings x, y [D, S] whose x is `level` at least; NaN where none reaches it."""
    level = np.broadcast_to(level, x.shape[:1])[:, None]
    best = np.where(x >= level, y, np.inf).min(1)
    for i in range(x.shape[1]):
        for j in range(x.shape[1]):
            below, above = x[:, [i]], x[:, [j]]
            mixes = (below < level) & (above > level)
            share = (level - below) / np.where(mixes, above - below, 1)
            best = np.minimum(best, np.where(mixes, y[:, [i]] + share * (y[:, [j]] - y[:, [i]]), np.inf)[:, 0])
    return np.where(np.isinf(best), np.nan, best)


def most_semantics(x: np.ndarray, y: np.ndarray, level: float | np.ndarray) -> np.ndarray:
    """The most x [D] of mixtures whose y is `level` at most; NaN where none reaches it."""
    return -least_bias(-y, -x, -np.asarray(level, float))


def hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """The settings [S] of x, y that no mixture of others beats: the corners of the frontier, by growing x."""
    corners = []
    for i in np.lexsort((-y, x)):
        while corners and y[corners[-1]] >= y[i]:
            corners.pop()
        while len(corners) > 1 and _turns(x, y, corners[-2], corners[-1], i):
            corners.pop()
        corners.append(int(i))
    return corners


def _turns(x: np.ndarray, y: np.ndarray, a: int, b: int, c: int) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (y[b] - y[a]) * (x[c] - x[a]) >= (y[c] - y[a]) * (x[b] - x[a])
