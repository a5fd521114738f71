"""Thresholds of a judge, randomised within each group, that equalise its error rates.

Source: Hardt, Price and Srebro 2016 (arXiv 1610.02413); relaxed as in Cruz and Hardt 2024 (arXiv 2306.07261). A threshold of
the score gives a point (false positive rate, true positive rate), a random choice between thresholds any point of their
convex hull. Which points make the fewest errors with rates of all groups within a tolerance is a linear program over the
weights of the thresholds. Shapes: N labelled faces, G groups, T thresholds.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.optimize import linprog

from fairdiff.errors import FairDiffError

CONSTRAINTS = {  # which rates of the groups agree
    "parity": ("positive",),
    "true positives": ("tpr",),
    "false positives": ("fpr",),
    "odds": ("tpr", "fpr"),
}


@dataclass(frozen=True)
class Group:
    """Data of one group: thresholds [T] ("positive" is score >= threshold), their rates [T], and how frequent it is.

    positives: the share of its faces with label 1. mass: of all faces, the share that is this group's.
    """

    thresholds: np.ndarray
    fpr: np.ndarray
    tpr: np.ndarray
    positives: float
    mass: float

    @property
    def positive(self) -> np.ndarray:
        """P(judged positive) of each threshold."""
        return self.positives * self.tpr + (1 - self.positives) * self.fpr

    @property
    def errors(self) -> np.ndarray:
        """P(judged wrongly) of each threshold."""
        return self.positives * (1 - self.tpr) + (1 - self.positives) * self.fpr


def roc(score_N: np.ndarray, label_N: np.ndarray, total: int) -> Group:
    """The corners of the ROC curve of a group's faces and their hull; FairDiffError without faces of both labels."""
    score, label = np.asarray(score_N, float), np.asarray(label_N, int)
    if not {0, 1} <= set(label):
        found = ", ".join(map(str, sorted(set(label.tolist())))) or "none"
        raise FairDiffError(f"found {len(label)} faces with the labels {found}, allowed: both 0 and 1 in a group")
    thresholds = np.concatenate([[np.inf], np.sort(np.unique(score))[::-1]])
    tpr, fpr = ((score[label == k][:, None] >= thresholds).mean(0) for k in (1, 0))
    return Group(thresholds, fpr, tpr, float(label.mean()), len(label) / total)


def fair_thresholds(groups: dict[str, Group], constraint: str, tolerance: float) -> dict[str, np.ndarray]:
    """The weights [T] of each group's thresholds: least errors with |rate_a - rate_b| <= tolerance for all pairs."""
    if constraint not in CONSTRAINTS:
        raise FairDiffError(f"constraint: found {constraint}, allowed: {', '.join(CONSTRAINTS)}")
    names, sizes = list(groups), [len(g.thresholds) for g in groups.values()]
    start = np.concatenate([[0], np.cumsum(sizes)])
    place = {name: slice(start[i], start[i + 1]) for i, name in enumerate(names)}
    rows = []
    for one, other in combinations(names, 2):
        for rate in CONSTRAINTS[constraint]:
            row = np.zeros(start[-1])
            row[place[one]], row[place[other]] = getattr(groups[one], rate), -getattr(groups[other], rate)
            rows += [row, -row]
    sums = np.zeros((len(names), start[-1]))
    for i, name in enumerate(names):
        sums[i, place[name]] = 1
    cost = np.concatenate([g.mass * g.errors for g in groups.values()])
    bound = {"A_ub": np.array(rows), "b_ub": np.full(len(rows), tolerance)} if rows else {}
    found = linprog(cost, **bound, A_eq=sums, b_eq=np.ones(len(names)))
    return {name: np.maximum(found.x[place[name]], 0) for name in names}


def rates(group: Group, weights_T: np.ndarray) -> dict[str, float]:
    """Rates and errors of a random choice of thresholds with these weights."""
    return {key: float(weights_T @ getattr(group, key)) for key in ("tpr", "fpr", "positive", "errors")}


def judged(score_N: np.ndarray, weights_T: np.ndarray, group: Group, rng: np.random.Generator) -> np.ndarray:
    """Labels 0 and 1 of faces of one group, each with a threshold of its own drawn by the weights."""
    drawn = rng.choice(len(weights_T), size=len(score_N), p=weights_T / weights_T.sum())
    return (np.asarray(score_N, float) >= group.thresholds[drawn]).astype(int)
