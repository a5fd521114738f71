"""Classify prompts as certainly off their target, certainly within the margin, or open.

Every prompt has an interval of its own distance D_p = sqrt(sum_k (p_k - t_k)^2 / t_k). In 95 % of audits the intervals of all
prompts hold at once: each has level 1 - .05 / P (Bonferroni) and is the range of D over Clopper and Pearson's (1934) exact
box of the shares. Estimand: these prompts with new noise, not other prompts. Images without a face may have any class, so
the lower end of a class counts its own faces only, and the upper end adds all images without a face.

If the judge's errors were counted, the box of judged shares is corrected with each of 4000 draws of the confusion matrix, and
the interval is the range over all of them. Of the error of .05, .04 goes to the images and .01 to the confusion matrix (the
convex hull of so many draws in a plane misses the next one in 4 of 1000 cases: Renyi & Sulanke 1963).
Shapes: P prompts, K classes, B confusion matrices.
"""

import math
from functools import lru_cache

import numpy as np
from scipy.special import betaincinv

from fairdiff.audit.correction import correct_shares
from fairdiff.audit.distance import squared_distance
from fairdiff.audit.judge import Judge
from fairdiff.audit.verdict import undefined

OFF, OPEN, WITHIN = "off", "open", "within"


def share_box(counts_PK, missing_P, error: float) -> tuple[np.ndarray, np.ndarray]:
    """Return lower and upper ends [P, K] that contain all shares of a prompt with probability 1 - error.

    They are exact for any classes of the missing faces: without missing faces, the count of class k among n images is
    binomial, and it lies between counts_k and counts_k + missing. K > 2 classes divide the error by K; two need one interval.
    """
    counts, missing = np.asarray(counts_PK, float), np.asarray(missing_P, float)[:, None]
    n, K = counts.sum(-1, keepdims=True) + missing, counts.shape[1]
    tail = error / 2 / (1 if K == 2 else K)
    most = counts + missing
    low = np.where(counts > 0, betaincinv(np.maximum(counts, 1e-9), n - counts + 1, tail), 0.0)
    high = np.where(most < n, 1 - betaincinv(np.maximum(n - most, 1e-9), most + 1, tail), 1.0)
    return low, high


def distance_range(low, high, target) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and greatest D [...] over the box [low, high] [..., K] within the simplex, (inf, -inf) if it is empty.

    Least: p_k = clip(c t_k, low_k, high_k) with c such that they sum to 1 (Karush, Kuhn, Tucker). Greatest: D^2 is convex in
    each share, so its chord over [low_k, high_k] lies above it. The sum of chords is greatest if the classes with the
    steepest chords are filled first. Exact for two classes, never too small for more (one share at most lies between ends).
    """
    low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
    meet = (low.sum(-1) <= 1 + 1e-9) & (high.sum(-1) >= 1 - 1e-9) & (low <= high).all(-1)
    others = low.sum(-1, keepdims=True) - low, high.sum(-1, keepdims=True) - high
    low, high = np.maximum(low, 1 - others[1]), np.minimum(high, 1 - others[0])  # ends that the others allow
    target = np.broadcast_to(target, low.shape)
    knots = np.sort(np.concatenate([low, high], -1) / np.concatenate([target, target], -1), -1)  # sums: linear between them
    sums = np.clip(knots[..., None] * target[..., None, :], low[..., None, :], high[..., None, :]).sum(-1)
    after = np.clip((sums < 1).sum(-1, keepdims=True), 1, knots.shape[-1] - 1)  # the first knot that reaches 1
    (at, sum_at), (to, sum_to) = ([np.take_along_axis(x, i, -1)[..., 0] for x in (knots, sums)] for i in (after - 1, after))
    c = at + np.clip((1 - sum_at) / np.maximum(sum_to - sum_at, 1e-300), 0, 1) * (to - at)
    least = squared_distance(np.clip(c[..., None] * target, low, high), target)
    slope = (low + high - 2 * target) / target
    most = squared_distance(low, target) + filled_first(slope, low, high)
    return np.where(meet, np.sqrt(least), np.inf), np.where(meet, np.sqrt(np.maximum(most, 0)), -np.inf)


def filled_first(weight, low, high) -> np.ndarray:
    """Return the greatest sum_k weight_k (p_k - low_k) [...] over shares p in the box: largest weights are filled first."""
    order = np.argsort(-weight, -1)
    room = np.take_along_axis(np.broadcast_to(high - low, weight.shape), order, -1)
    spare = 1 - np.broadcast_to(low, weight.shape).sum(-1, keepdims=True)
    taken = np.clip(spare - (room.cumsum(-1) - room), 0, room)
    return (np.take_along_axis(weight, order, -1) * taken).sum(-1)


def mended_box(low_K, high_K, mend_BKK) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and greatest corrected share of each class [B, K] for judged shares in the box (linear programmes)."""
    base = mend_BKK @ low_K
    return base - filled_first(-mend_BKK, low_K, high_K), base + filled_first(mend_BKK, low_K, high_K)


def simultaneous_intervals(counts_PK, missing_P, target_PK, judge: Judge | None) -> np.ndarray:
    """Return intervals [P, 2] of D that hold simultaneously; judge: None, or one without a refusal, to correct its error."""
    P, target = len(counts_PK), np.asarray(target_PK, float)
    low, high = share_box(counts_PK, missing_P, (0.05 if judge is None else 0.04) / P)
    if judge is None:
        return np.stack(distance_range(low, high, target), -1)
    mend = np.concatenate([judge.mend[None], judge.inverses])
    found = np.empty((P, 2))
    for row in range(P):
        least, most = distance_range(*_united(*mended_box(low[row], high[row], mend)), target[row])
        whole = (0.0, math.sqrt(1 / target[row].min() - 1))  # if no matrix fits, D may have any value
        found[row] = (least.min(), most.max()) if np.isfinite(least).any() else whole
    return found


def _united(low_BK, high_BK) -> tuple[np.ndarray, np.ndarray]:
    """Return, for two classes, one box around those that meet the simplex; its range of D contains theirs. For more classes
    return the boxes unchanged."""
    fit = (low_BK <= 1).all(-1) & (high_BK >= 0).all(-1)
    if low_BK.shape[1] > 2 or not fit.any():
        return low_BK, high_BK
    return low_BK[fit].min(0, keepdims=True), high_BK[fit].max(0, keepdims=True)


def certain_prompts(counts_PK, missing_P, target_PK, delta: float, judge: Judge | None) -> tuple[list[dict], dict]:
    """Return each prompt's `distance` (value, interval and state) and a summary: counts of states, correction, reason.

    value: D of the observed shares, noise included. off: the whole interval lies above delta; within: below; open: neither.
    In 95 of 100 audits no prompt is wrongly called off or within. judge: its errors are corrected. If that is refused, the
    shares are uncorrected and every prompt is open.
    """
    counts, target = np.asarray(counts_PK, float), np.asarray(target_PK, float)
    if why := undefined(target):
        nothing = {"value": math.nan, "ci95_all": (math.nan, math.nan), "state": OPEN}
        return [nothing for _ in counts], _summary([], False, why) | {"images_for_within": None}
    refusal = judge.refusal if judge else None
    usable = None if refusal else judge
    items = []
    for row, (least, most) in enumerate(simultaneous_intervals(counts, missing_P, target, usable)):
        n = counts[row].sum()
        seen = counts[row] / n if n else np.full(counts.shape[1], math.nan)
        seen = correct_shares(seen, usable) if usable and n else seen
        value = float(np.clip(math.sqrt(squared_distance(seen, target[row])), least, most)) if n else math.nan
        state = OFF if least > delta else WITHIN if most < delta else OPEN
        items.append({"value": value, "ci95_all": (least, most), "state": OPEN if refusal else state})
    few = images_for_within(len(counts), tuple(target.mean(0)), delta)
    return items, _summary(items, usable is not None, refusal) | {"images_for_within": few}


def _summary(items: list[dict], corrected: bool, reason: str | None) -> dict:
    count = {state: sum(item["state"] == state for item in items) for state in (OFF, OPEN, WITHIN)}
    return count | {"corrected": corrected, "reason": reason}


@lru_cache(maxsize=32)
def images_for_within(prompts: int, target_K: tuple[float, ...], delta: float) -> int:
    """Return the fewest images per prompt with which a prompt can be certainly within, among so many prompts. All images have
    a face, the shares are exactly on target, and the judge's error is not counted."""
    target = np.asarray(target_K, float)

    def enough(n: int) -> bool:
        low, high = share_box(n * target[None], [0], 0.05 / prompts)
        return bool(distance_range(low, high, target)[1][0] < delta)

    high = 2
    while not enough(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
