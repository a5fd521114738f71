"""Check whether two judges use the same class names for the same thing, by their labels of the same faces.

Shapes: F faces, K classes.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom

RISK = 0.02  # probability, for each of the two tests, of finding two judges at odds by chance


@dataclass(frozen=True)
class Agreement:
    """The agreement of two judges on one attribute.

    share: share of the `faces` with the same label. best_share: the same after the best permutation of the first judge's
    classes. renamed: the pairs (class of the first judge, class of the second) that this permutation changes and that have
    faces. at_odds: whether the two judges' classes cannot mean the same.
    """

    faces: int
    share: float
    renamed: tuple[tuple[int, int], ...]
    best_share: float
    at_odds: bool


def agreement(first_FK: np.ndarray, second_FK: np.ndarray) -> Agreement:
    """Return the agreement of two judges from their class probabilities of the same faces.

    Judges are at odds if two conditions hold. First, they disagree on more faces than their confidences c_f and d_f allow:
    if these were right, face f would get different labels with probability (1 - c_f) + (1 - d_f) at most (Hoeffding's
    inequality over the faces). Second, a permutation of the classes agrees better, by a sign test over the faces on which
    only one of the two agrees.
    """
    faces, classes = first_FK.shape
    if not faces:
        return Agreement(0, math.nan, (), math.nan, False)
    first_F, second_F = first_FK.argmax(1), second_FK.argmax(1)
    counts_KK = np.zeros((classes, classes), int)
    np.add.at(counts_KK, (first_F, second_F), 1)
    best_K = linear_sum_assignment(counts_KK, maximize=True)[1]
    alike_F, renamed_F = first_F == second_F, best_K[first_F] == second_F
    doubt_F = np.minimum(2 - first_FK.max(1) - second_FK.max(1), 1)
    allowed = doubt_F.sum() + math.sqrt(faces * math.log(1 / RISK) / 2)
    better, worse = int((renamed_F & ~alike_F).sum()), int((alike_F & ~renamed_F).sum())
    by_chance = binom.sf(better - 1, better + worse, 0.5) * (classes - 1)  # corrects for several permutations
    at_odds = bool((~alike_F).sum() > allowed and by_chance < RISK)
    renamed = tuple((i, j) for i, j in enumerate(best_K.tolist()) if i != j and counts_KK[i, j])
    return Agreement(faces, float(alike_F.mean()), renamed, float(renamed_F.mean()), at_odds)
