"""Relaxation curves and their comparison at equal bias and at equal semantics.

Methods with one setting each differ in bias and in semantics, so they cannot be compared directly. Unprocessing (Cruz and
Hardt 2024, arXiv 2306.07261) brings them to one level. Here a method can be applied to a random share of the images, so a
mixture of two of its settings, or of one setting and the frozen model, is a valid setting too. The semantics of a mixture is
the weighted mean of both. Its bias is at most the weighted mean, because bias is convex in the shares. So a method reaches at
least the lower hull of its points.

Shapes: S settings, P prompts, D resamples of the prompts. x: semantics, more is better. y: bias, less is better.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from fairdiff.audit.suite import resampled_weights
from fairdiff.bias import bias


@dataclass(frozen=True)
class Outcome:
    """One setting of a method: bias and semantics of each prompt [P], and the number of sampled images per kept image."""

    label: str
    bias_P: np.ndarray
    semantics_P: np.ndarray
    cost: float = 1.0


def labels_of(rows: pd.DataFrame, attribute: str, classes: tuple[str, ...]) -> np.ndarray:
    """Return the most probable class of each row, -1 without a face."""
    probs = rows[[f"p.{attribute}.{name}" for name in classes]].to_numpy(float)
    return np.where(rows.found.to_numpy(bool), np.nan_to_num(probs, nan=-1).argmax(1), -1)


def usual_rows(records: pd.DataFrame, model: str) -> pd.DataFrame:
    """Return the rows of prompts of people that name no class, sorted by prompt and image."""
    rows = records[(records.model == model) & records.people & (records.names == "")]
    return rows.sort_values(["prompt", "image_index"])


def outcome(label: str, rows: pd.DataFrame, attribute: str, classes: tuple[str, ...], semantics: str) -> Outcome:
    """Return the outcome of one model's rows; bias is NaN for a prompt without a face.

    semantics: a column of the records. Where it is NaN for the model "before", it counts as 1: the images equal themselves.
    """
    labels, values = labels_of(rows, attribute, classes), rows[semantics].to_numpy(float)
    values = np.where(np.isnan(values) & (rows.model == "before"), 1.0, values)
    biases, means = [], []
    for at in rows.groupby("prompt").indices.values():  # in the order of the prompts' names
        counts = np.bincount(labels[at][labels[at] >= 0], minlength=len(classes))
        biases.append(float(bias(counts / counts.sum())) if counts.sum() else np.nan)
        means.append(values[at].mean())
    return Outcome(label, np.array(biases), np.array(means))


def of_means(outcomes: list[Outcome], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (x, y), each [1 + D, S]: means over the prompts that are known in all settings, then over each resample.

    Curves with the same prompts and seed share their resamples, so that their differences are paired.
    """
    both = np.stack([np.stack([o.semantics_P, o.bias_P]) for o in outcomes])  # [S, 2, P]
    weights = np.concatenate([np.full((1, both.shape[2]), 1 / both.shape[2]), resampled_weights(both.shape[2], seed)])
    known = ~np.isnan(both).any((0, 1))
    share = weights[:, known] / np.maximum(weights[:, known].sum(1, keepdims=True), 1e-12)
    x, y = (share @ both[:, place][:, known].T for place in (0, 1))
    return x, y


def least_bias(x: np.ndarray, y: np.ndarray, level: float | np.ndarray) -> np.ndarray:
    """Return the least y [D] over mixtures of the settings x, y [D, S] with x of at least `level`; NaN if there is none."""
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
    """Return the largest x [D] over mixtures with y of at most `level`; NaN if there is none."""
    return -least_bias(-y, -x, -np.asarray(level, float))


def hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Return the indices of the settings that no mixture of others beats, the corners of the frontier, by increasing x."""
    corners = []
    for i in np.lexsort((-y, x)):
        while corners and y[corners[-1]] >= y[i]:
            corners.pop()
        while len(corners) > 1 and _turns(x, y, corners[-2], corners[-1], i):
            corners.pop()
        corners.append(int(i))
    return corners


def _turns(x: np.ndarray, y: np.ndarray, a: int, b: int, c: int) -> bool:
    """Return whether b lies on or above the line from a to c."""
    return (y[b] - y[a]) * (x[c] - x[a]) >= (y[c] - y[a]) * (x[b] - x[a])
