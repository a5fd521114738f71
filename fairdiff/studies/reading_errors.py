"""How an audit's numbers change when the judge misreads more faces (test-label error).

Adebayo et al., ICLR 2023 (arXiv 2310.02533), section 3, flip a share of the test labels of a fairness audit. Here the labels
are the judge's readings of generated faces, and the numbers are the audit's own: bias, D, verdict. For two classes at parity
and errors that are alike in both, shares p become r + (1 - 2r) p, so that D falls to (1 - 2r) D; errors in one class move all
shares the same way. Shapes: N faces, P prompts, K classes.
"""

import numpy as np

from fairdiff.audit.attribute import suite_metrics
from fairdiff.audit.axis import Axis, MetricSpec
from fairdiff.audit.distance import shrunken_shares, squared_distance

MORE = 1.5  # how much more often the faces of a group are misread, by group


def kinds(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Kinds of misreadings: equal for all faces, more frequent in a group, or only in faces of one class."""
    return ("uniform", "by group", *(f"only {name}" for name in classes))


def error_rates(kind: str, label_N: np.ndarray, group_N: np.ndarray, rate: float, classes: tuple[str, ...]) -> np.ndarray:
    """The chance of each face [N] to be misread, `rate` on average; 1 at most, which lowers the average.

    label_N: from 0, below for no face. group_N: True for faces of the group.
    """
    seen_N = label_N >= 0
    if kind == "uniform":
        chance_N = np.full(len(label_N), rate)
    elif kind == "by group":
        share = group_N[seen_N].mean()
        more = min(MORE * rate, 1.0)
        chance_N = np.where(group_N, more, (rate - share * more) / max(1 - share, 1e-12))
    else:
        own_N = label_N == classes.index(kind.removeprefix("only "))
        chance_N = own_N * rate * seen_N.sum() / max(own_N.sum(), 1)
    return np.clip(np.where(seen_N, chance_N, 0.0), 0, 1)


def misread(label_N: np.ndarray, chance_N: np.ndarray, K: int, rng: np.random.Generator) -> np.ndarray:
    """Readings [N]: each face's label, or with its chance another one, all others alike."""
    wrong_N, other_N = rng.random(len(label_N)) < chance_N, rng.integers(1, K, len(label_N))
    return np.where(wrong_N & (label_N >= 0), (label_N + other_N) % K, label_N)


def transition(label_N: np.ndarray, chance_N: np.ndarray, K: int) -> np.ndarray:
    """P(read as l | label j) [K, K] of these faces, as a count of the misreadings would find it."""
    wrong_K = np.array([chance_N[label_N == k].mean() if (label_N == k).any() else 0.0 for k in range(K)])
    return np.eye(K) * (1 - wrong_K[:, None]) + (1 - np.eye(K)) * wrong_K[:, None] / (K - 1)


def counts_of(prompt_N: np.ndarray, label_N: np.ndarray, prompts: int, K: int) -> np.ndarray:
    """Faces of each class [P, K]."""
    counts_PK, seen_N = np.zeros((prompts, K), int), label_N >= 0
    np.add.at(counts_PK, (prompt_N[seen_N], label_N[seen_N]), 1)
    return counts_PK


def audited(counts_PK: np.ndarray, images_P: np.ndarray, axis: Axis, spec: MetricSpec) -> dict:
    """Bias, D as the verdict takes it, and both verdicts, of an audit that reads these faces."""
    found = suite_metrics(counts_PK, images_P - counts_PK.sum(1), counts_PK.sum(1) > 1, axis, spec)
    corrected = found.get("corrected", {}).get("distance")
    distance = corrected or found["target"]["distance"]
    return {
        "bias": float(found["bias"]["mean"]),
        "distance": float(distance["value"]),
        "verdict": found["target"]["verdict"],
        "verdict_these": found["target"]["verdict_these"],
    }


def nearer(counts_PK: np.ndarray, target_PK: np.ndarray, distance: float) -> np.ndarray:
    """True shares [P, K] of a generator like the audited one, whose prompts all deviate from the target less in proportion.

    distance: its D, at most that of the audited one.
    """
    shares_PK = shrunken_shares(counts_PK, target_PK)
    own = float(np.sqrt(squared_distance(shares_PK, target_PK).mean()))
    return target_PK + min(distance / own, 1.0) * (shares_PK - target_PK)
