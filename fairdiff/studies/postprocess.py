"""A baseline without training: sample M images of a prompt and keep n by a quota, at a cost of M / n for each kept image.

Source of the idea: post-processing with a relaxed constraint as the yardstick of every other method (Cruz and Hardt 2024,
arXiv 2306.07261). Shapes: K classes, counts of images.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog


def most_kept(counts_K: Sequence[int], target_K: Sequence[float], tolerance: float) -> float:
    """The most images n, not whole, that can be kept: max sum n_k with 0 <= n_k <= M_k and |n_k - t_k n| <= tolerance n."""
    counts, target = np.asarray(counts_K, float), np.asarray(target_K, float)
    share = np.eye(len(counts)) - target[:, None]  # n_k - t_k n
    slack = np.full((len(counts), len(counts)), tolerance)
    rows = np.concatenate([share - slack, -share - slack])
    found = linprog(-np.ones(len(counts)), rows, np.zeros(len(rows)), bounds=[(0, m) for m in counts])
    return float(-found.fun)


def quota(counts_K: Sequence[int], target_K: Sequence[float], tolerance: float) -> np.ndarray:
    """How many images n_k of each class are kept, whole numbers, in all as many as possible; 0 where none can be.

    For n images n_k may be from (t_k - tolerance) n to (t_k + tolerance) n, and M_k at most; what is free goes to the classes
    of which most is left.
    """
    counts, target = np.asarray(counts_K, int), np.asarray(target_K, float)
    for n in range(int(most_kept(counts, target, tolerance) + 1e-6), 0, -1):
        low = np.ceil(np.maximum(target - tolerance, 0) * n - 1e-9).astype(int)
        high = np.minimum(counts, np.floor((target + tolerance) * n + 1e-9).astype(int))
        if (low > high).any() or not low.sum() <= n <= high.sum():
            continue
        kept = low.copy()
        while kept.sum() < n:
            kept[np.where(kept < high, counts - kept, -1).argmax()] += 1
        return kept
    return np.zeros(len(counts), int)


def true_shares(kept_K: Sequence[int], judged_K: Sequence[float], rates_KK: np.ndarray) -> np.ndarray:
    """Shares of the true classes among images that were kept by what a judge says, by Bayes' rule.

    P(true j | judged k) is proportional to p_j C[j, k], with p the prompt's true shares (C^T p = judged, cut to the simplex)
    and C[j, k] = P(judged k | true j). The judge that chose the images would find its own quota fulfilled.
    """
    rates, judged = np.asarray(rates_KK, float), np.asarray(judged_K, float)
    true = np.maximum(np.linalg.pinv(rates.T) @ judged, 0)
    joint = (true / true.sum())[:, None] * rates  # [true, judged]
    column = joint.sum(0)
    given = np.divide(joint, column, out=np.zeros_like(joint), where=column > 0)
    kept = np.asarray(kept_K, float)
    return given @ kept / kept.sum()
