"""A judge whose errors were counted on labelled faces: the correction for them, and its uncertainty.

With C[k, j] = P(judged j | true k), judged shares are q = C^T p, so p = C^-T q (Teo, Abdollahzadeh & Cheung, NeurIPS 2023,
CLEAM; for two classes p_0 = (q_0 - (1 - a_1)) / (a_0 - (1 - a_1)), a_k the accuracy on class k). A symmetric judge of
accuracy a shrinks every gap by (Ka - 1) / (K - 1). Assumption: C measured on labelled faces holds on generated ones.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DRAWS = 4000
WORST = 10.0  # condition number of C from which undoing its error says nothing: noise grows tenfold


@dataclass(frozen=True, eq=False)  # one object for the same counts and seed, see `judge_of`, and so a key of caches
class Judge:
    """rates: C [K, K]. mend: C^-T. draws [B, K, K]: confusion matrices that the labelled faces leave open.

    inverses [B, K, K]: C_b^-T.
    products [B, K^3]: A_kj A_kl of A = C^-T C_b^T, which takes true shares to those that the correction finds.
    refusal: why its error cannot be undone, None where it can.
    """

    counts: np.ndarray
    rates: np.ndarray
    mend: np.ndarray
    draws: np.ndarray
    inverses: np.ndarray
    products: np.ndarray
    refusal: str | None


def rates(confusion) -> np.ndarray:
    """C [..., K, K] with rows summing to 1 from counts (rows: true class); ValueError for a class without a label."""
    confusion = np.asarray(confusion, float)
    total = confusion.sum(-1, keepdims=True)
    if (total == 0).any():
        raise ValueError("confusion matrix: a class has no labelled face")
    return confusion / total


def check_confusion(confusion, classes: int) -> None:
    """ValueError unless the counts are [classes, classes] with a labelled face in every class, of a judge that is better
    than chance: the smallest singular value of C is .05 or more."""
    shape = np.shape(confusion)
    if shape != (classes, classes):
        raise ValueError(f"confusion matrix: found the shape {shape}, allowed: {(classes, classes)}")
    if np.linalg.svd(rates(confusion), compute_uv=False).min() < 0.05:
        raise ValueError("confusion matrix: the judge cannot tell its classes apart, so its error cannot be undone")


def judge_of(confusion, seed: int = 0) -> Judge:
    """Each row of C given its counts is Dirichlet(counts + 1/K) (Jeffreys' prior for two classes; Berger, Bernardo & Sun
    2015 for more), so that a cell of 0 faces is not known to be 0."""
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
    """The condition number of C, or one that the labelled faces do not rule out (2.5 %), is above `WORST`."""
    condition = float(np.linalg.cond(C))
    possible = float(np.quantile(np.linalg.cond(draws[:1000]), 0.975))
    if max(condition, possible) <= WORST:
        return None
    return (
        f"this judge hardly tells the classes apart: the condition number of its confusion matrix is {condition:.1f}, and "
        f"its labelled faces allow {possible:.1f}; undoing its error needs {WORST:.0f} or less"
    )
