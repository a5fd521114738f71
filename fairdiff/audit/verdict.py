"""The verdict whether a generator is within a margin of its target: an equivalence test of the distance D of `distance`.

"within": the whole interval lies below the margin, with missing faces counted as the worst class. On these prompts, the
shares at the margin under which the estimate varies most must also give so low an estimate at most 5 % of the time. So
"within" is wrong at most 5 % of the time at the margin, whatever the prompts. "beyond": the whole interval lies above the
margin, with missing faces counted for the classes that lack them. If the judge's errors were counted, both verdicts are about
the corrected distance. Shapes: P prompts, K classes.
"""

import math

import numpy as np

from fairdiff.audit import suite
from fairdiff.audit.correction import lack_of_fit
from fairdiff.audit.distance import (
    confidence,
    extreme_shares,
    gram,
    mean_moments,
    squared_distance,
    unbiased_squared_distance,
    upper_tail,
)
from fairdiff.audit.judge import Judge
from fairdiff.audit.suite import ENOUGH, NOTHING, Interval

FEW_IMAGES = "with fewer than two images"  # `metrics` adds the names of the prompts
FEW_PROMPTS = "cannot tell of prompts like these"
WITHIN, BEYOND, UNDECIDED = "within", "beyond", "undecided"


def undefined(target_PK) -> str | None:
    """Return why the distance to the target is not defined, None if it is."""
    if (np.asarray(target_PK) > 0).all():
        return None
    return "a class has the target share 0: the distance to it divides by the target share and is not defined"


def distance_interval(counts_PK, target_PK, judge: Judge | None, seed: int) -> dict:
    """Return D, the root mean square over prompts with the image noise removed, and its intervals for both estimands."""
    counts, target = np.asarray(counts_PK, float), np.asarray(target_PK, float)
    if len(counts) == 0 or undefined(target):
        return {"value": math.nan, "ci95": NOTHING, "ci95_these": NOTHING}
    found = confidence(counts, target, judge)
    these = found.end(0.025), found.end(0.975)
    like = NOTHING
    if len(counts) >= ENOUGH:
        like = suite.hull(_like_these(counts, target, judge, seed), these)
    limit = float(np.mean(1 / target.min(-1) - 1))  # largest mean D^2: only the rarest class in every prompt
    value = min(max(found.point(), these[0]), these[1])
    ends = {"ci95": like, "ci95_these": these}
    return {"value": math.sqrt(value)} | {
        key: tuple(math.sqrt(end) for end in suite.within_range(pair, 0, limit)) for key, pair in ends.items()
    }


def _like_these(counts, target, judge: Judge | None, seed: int) -> Interval:
    """Return the interval of the mean D^2 over prompts like these: bootstrap-t, widened by the judge's uncertainty."""
    x = unbiased_squared_distance(counts, gram(target, judge))
    interval = suite.bootstrap_t(x, seed=seed)
    if judge is None:
        return interval
    labels = confidence(counts, target, judge, images=False)
    return suite.combine(float(x.mean()), interval, (labels.end(0.025), labels.end(0.975)))


def filled(counts_PK, missing_P, target_PK, judge: Judge | None, worst: bool) -> np.ndarray:
    """Return the counts [P, K] if the images without a face had one: of the class that makes D largest (`worst`), or of the
    classes that make D least. A face of true class k adds row k of C to the counts.

    Least: x >= 0 with sum x = missing minimises sum_k (n_k + x_k)^2 / t_k, so every class that gets faces has the same
    (n_k + x_k) / t_k: the least of (missing + sum_S n) / (sum_S t) over the sets S of the classes with least n_k / t_k."""
    counts, missing = np.asarray(counts_PK, float), np.asarray(missing_P, float)
    target = np.asarray(target_PK, float)
    C = np.eye(counts.shape[1]) if judge is None else judge.rates
    mend = np.eye(counts.shape[1]) if judge is None else judge.mend
    if worst:
        options = counts[:, None] + missing[:, None, None] * C
        total = options.sum(-1, keepdims=True)
        far = squared_distance(options / np.where(total > 0, total, 1) @ mend.T, target[:, None])
        return options[np.arange(len(counts)), far.argmax(1)]
    true = counts @ mend.T
    ratio = np.divide(true, target, out=np.full_like(true, np.inf), where=target > 0)
    order = ratio.argsort(-1)
    sums = [np.take_along_axis(np.broadcast_to(a, true.shape), order, -1).cumsum(-1) for a in (true, target)]
    level = ((missing[:, None] + sums[0]) / sums[1]).min(-1, keepdims=True)
    return counts + np.where(target > 0, np.maximum(level * target - true, 0), 0) @ C


def decide(counts_PK, missing_P, target_PK, delta: float, judge: Judge | None, seed: int) -> dict:
    """Return `verdict` on prompts like these, `verdict_these` on these prompts (within, beyond or undecided) and `reason`:
    why a verdict is impossible, or None. Prompts with fewer than two faces are included, with their missing faces."""
    counts, missing = np.asarray(counts_PK), np.asarray(missing_P)
    reason = _reason(counts, missing, target_PK, judge)
    if reason is not None:
        return {"verdict": UNDECIDED, "verdict_these": UNDECIDED, "reason": reason}
    worst, best = (filled(counts, missing, target_PK, judge, bad) for bad in (True, False))
    target = np.asarray(target_PK, float)
    these = _decide_these(worst, best, target, delta, judge)
    if len(worst) < ENOUGH:
        reason = f"{FEW_PROMPTS}: needs {ENOUGH} prompts, found {len(worst)}"
        return {"verdict": UNDECIDED, "verdict_these": these, "reason": reason}
    like = UNDECIDED
    if these == WITHIN and _like_these(worst, target, judge, seed)[1] < delta**2:
        like = WITHIN
    if these == BEYOND and _like_these(best, target, judge, seed)[0] > delta**2:
        like = BEYOND
    return {"verdict": like, "verdict_these": these, "reason": None}


def _reason(counts, missing, target, judge: Judge | None) -> str | None:
    """Return why no verdict is possible, None if one may be."""
    faces = counts.sum(-1)
    if not (faces > 1).any():
        return "no prompt shows two faces"
    if few := int((faces + missing < 2).sum()):
        return f"{few} of {len(faces)} prompts {FEW_IMAGES}"
    fit = lack_of_fit(counts[faces > 1], judge) if judge is not None and judge.refusal is None else None
    return undefined(target) or (judge.refusal if judge else None) or fit


def _decide_these(worst, best, target, delta: float, judge: Judge | None) -> str:
    n = worst.sum(-1)
    x = float(unbiased_squared_distance(worst, gram(target, judge)).mean())
    at_margin = mean_moments(extreme_shares(target, delta**2), target, n, judge)
    if 1 - upper_tail(x, *at_margin) <= 0.05 and confidence(worst, target, judge).end(0.975) < delta**2:
        return WITHIN
    return BEYOND if confidence(best, target, judge).end(0.025) > delta**2 else UNDECIDED
