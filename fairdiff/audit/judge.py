"""A judge whose errors were counted on labelled faces: the correction for them and its uncertainty.

With C[k, j] = P(judged j | true k), judged shares are q = C^T p, so p = C^-T q (Teo, Abdollahzadeh & Cheung, NeurIPS 2023,
CLEAM). For two classes p_0 = (q_0 - (1 - a_1)) / (a_0 - (1 - a_1)), where a_k is the accuracy on class k. A judge with
symmetric errors and accuracy a multiplies every gap by (Ka - 1) / (K - 1). It is assumed that C, measured on labelled faces,
also holds for generated faces.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DRAWS = 4000
WORST = 10.0  # largest condition number of C with a correction; above it, noise grows more than tenfold


@dataclass(frozen=True, eq=False)  # caches use it as key: `judge_of` returns the same object for equal counts and seed
class Judge:
    """The counted errors of a judge, with draws of its true confusion matrix given the labelled faces.

    counts: labelled faces [K, K] by true (rows) and judged class. rates: C [K, K]. mend: C^-T. draws: matrices C_b [B, K, K].
    inverses: C_b^-T [B, K, K]. products [B, K^3]: A_kj A_kl of A = C^-T C_b^T, which maps true shares to corrected shares.
    refusal: why the error cannot be corrected, None if it can.
    """

    counts: np.ndarray
    rates: np.ndarray
    mend: np.ndarray
    draws: np.ndarray
    inverses: np.ndarray
    products: np.ndarray
    refusal: str | None


def rates(confusion) -> np.ndarray:
    """Return C [..., K, K], the counts (rows: true class) divided by row sums; ValueError for a class without a face."""
    confusion = np.asarray(confusion, float)
    total = confusion.sum(-1, keepdims=True)
    if (total == 0).any():
        raise ValueError("confusion matrix: a class has no labelled face")
    return confusion / total


def check_confusion(confusion, classes: int) -> None:
    """Raise ValueError unless the counts are [classes, classes], every class has a labelled face, and the judge can tell the
    classes apart: the smallest singular value of C must be .05 or more."""
    shape = np.shape(confusion)
    if shape != (classes, classes):
        raise ValueError(f"confusion matrix: found the shape {shape}, allowed: {(classes, classes)}")
    if np.linalg.svd(rates(confusion), compute_uv=False).min() < 0.05:
        raise ValueError("confusion matrix: the judge cannot tell its classes apart, so its error cannot be undone")


def judge_of(confusion, seed: int = 0) -> Judge:
    """Return the judge with these counted errors. Each row of C given its counts is Dirichlet(counts + 1/K) (Jeffreys' prior
    for two classes; Berger, Bernardo & Sun 2015 for more), so a cell without a face may have a rate above 0."""
    return _judge_of(tuple(tuple(float(cell) for cell in row) for row in np.asarray(confusion)), seed)


@lru_cache(maxsize=8)
def _judge_of(confusion: tuple, seed: int) -> Judge:
    counts = np.array(confusion)
    C, rng = rates(counts), np.random.default_rng(seed)
    draws = np.stack([rng.dirichlet(row + 1 / len(C), size=DRAWS) for row in counts], 1)
    mend = np.linalg.pinv(C.T)
    found = mend @ np.swapaxes(draws, -1, -2)
    products = (found[..., :, None] * found[..., None, :]).reshape(DRAWS, -1)
    inverses = np.linalg.pinv(np.swapaxes(draws, -1, -2))
    return Judge(counts, C, mend, draws, inverses, products, _refusal(C, draws))


def _refusal(C: np.ndarray, draws: np.ndarray) -> str | None:
    """Return why no correction is made, None if the condition number of C and its .975 quantile over draws are <= `WORST`."""
    condition = float(np.linalg.cond(C))
    possible = float(np.quantile(np.linalg.cond(draws[:1000]), 0.975))
    if max(condition, possible) <= WORST:
        return None
    return (
        f"this judge hardly tells the classes apart: the condition number of its confusion matrix is {condition:.1f}, and "
        f"its labelled faces allow {possible:.1f}; undoing its error needs {WORST:.0f} or less"
    )
