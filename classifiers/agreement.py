"""Whether two judges mean the same by a class: how often they label the same faces alike. F faces, K classes."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom

RISK = 0.02  # of calling two judges at odds by chance, in each of the two tests


@dataclass(frozen=True)
class Agreement:
    """On one attribute: `share` of the `faces` with the same label, and the share under the best naming of classes.

    renamed: pairs (class of the first judge, class of the second) of that naming that differ and hold a face. at_odds:
    whether the labels cannot mean the same.
    """

    faces: int
    share: float
    renamed: tuple[tuple[int, int], ...]
    best_share: float
    at_odds: bool


def agreement(first_FK: np.ndarray, second_FK: np.ndarray) -> Agreement:
    """Of two judges' class probabilities of the same faces.

    Judges are at odds under two conditions. They disagree on more faces than their confidence allows: were it right, face
    f would get two labels with a chance of (1 - c_f) + (1 - d_f) at most (Hoeffding's inequality over the faces). And another
    naming of the classes agrees better by a sign test over the faces on which just one of the two namings agrees.
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
    by_chance = binom.sf(better - 1, better + worse, 0.5) * (classes - 1)  # it is the best of several namings
    at_odds = bool((~alike_F).sum() > allowed and by_chance < RISK)
    renamed = tuple((i, j) for i, j in enumerate(best_K.tolist()) if i != j and counts_KK[i, j])
    return Agreement(faces, float(alike_F.mean()), renamed, float(renamed_F.mean()), at_odds)
