"""Classify prompts as certainly off their target, certainly within the margin, or open.

An interval of every prompt's own distance D_p = sqrt(sum_k (p_k - t_k)^2 / t_k) that holds for all prompts at once in 95 %
of audits: level 1 - .05 / P each (Bonferroni), the range of D over Clopper and Pearson's (1934) exact box of its shares.
Estimand: these prompts with new noise; of other prompts it says nothing. Pictures without a face may have any class: a class
has between its own faces and those together with all missing ones, and either end is counted where it widens the box.

With a judge whose errors were counted the box of judged shares is taken back through the 4000 confusion matrices that its
labelled faces leave open, and the interval is the range over all of them: .04 of the .05 goes to the pictures, .01 to them
(the convex hull of so many draws in a plane misses the next one in 4 of 1000 cases: Renyi & Sulanke 1963).
P prompts, K classes, B confusion matrices.
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
    """Lower and upper ends [P, K] that hold all shares of a prompt with probability 1 - error, whatever the missing show.

    Exact: the faces of class k among n pictures, were none missing, are binomial and lie between counts_k and counts_k +
    missing. Two classes need one interval, K the error divided by K.
    """
    counts, missing = np.asarray(counts_PK, float), np.asarray(missing_P, float)[:, None]
    n, K = counts.sum(-1, keepdims=True) + missing, counts.shape[1]
    tail = error / 2 / (1 if K == 2 else K)
    most = counts + missing
    low = np.where(counts > 0, betaincinv(np.maximum(counts, 1e-9), n - counts + 1, tail), 0.0)
    high = np.where(most < n, 1 - betaincinv(np.maximum(n - most, 1e-9), most + 1, tail), 1.0)
    return low, high


def distance_range(low, high, target) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest D [...] over the box [low, high] [..., K] cut with the simplex; (inf, -inf) where they do not meet.

    Least: p_k = clip(c t_k, low_k, high_k) with c so that they sum to 1 (Karush, Kuhn, Tucker). Greatest: D^2 is convex in
    each share, so its chord over [low_k, high_k] lies above it; the sum of chords is greatest where the classes of the
    steepest are filled first. Exact for two classes, and never too small for more: at most one lies within its ends there.
    """
    low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
    meet = (low.sum(-1) <= 1 + 1e-9) & (high.sum(-1) >= 1 - 1e-9) & (low <= high).all(-1)
    others = low.sum(-1, keepdims=True) - low, high.sum(-1, keepdims=True) - high
    low, high = np.maximum(low, 1 - others[1]), np.minimum(high, 1 - others[0])  # no end that the others forbid
    target = np.broadcast_to(target, low.shape)
    knots = np.sort(np.concatenate([low, high], -1) / np.concatenate([target, target], -1), -1)  # between them it is linear
    sums = np.clip(knots[..., None] * target[..., None, :], low[..., None, :], high[..., None, :]).sum(-1)
    after = np.clip((sums < 1).sum(-1, keepdims=True), 1, knots.shape[-1] - 1)  # the first knot that reaches 1
    (at, sum_at), (to, sum_to) = ([np.take_along_axis(x, i, -1)[..., 0] for x in (knots, sums)] for i in (after - 1, after))
    c = at + np.clip((1 - sum_at) / np.maximum(sum_to - sum_at, 1e-300), 0, 1) * (to - at)
    least = squared_distance(np.clip(c[..., None] * target, low, high), target)
    slope = (low + high - 2 * target) / target
    most = squared_distance(low, target) + filled_first(slope, low, high)
    return np.where(meet, np.sqrt(least), np.inf), np.where(meet, np.sqrt(np.maximum(most, 0)), -np.inf)


def filled_first(weight, low, high) -> np.ndarray:
    """The greatest sum_k weight_k (p_k - low_k) [...] of shares p in the box: the largest weights are filled first."""
    order = np.argsort(-weight, -1)
    room = np.take_along_axis(np.broadcast_to(high - low, weight.shape), order, -1)
    spare = 1 - np.broadcast_to(low, weight.shape).sum(-1, keepdims=True)
    taken = np.clip(spare - (room.cumsum(-1) - room), 0, room)
    return (np.take_along_axis(weight, order, -1) * taken).sum(-1)


def mended_box(low_K, high_K, mend_BKK) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest true share of each class [B, K], by itself, of judged shares in the box: a linear programme."""
    base = mend_BKK @ low_K
    return base - filled_first(-mend_BKK, low_K, high_K), base + filled_first(mend_BKK, low_K, high_K)


def simultaneous_intervals(counts_PK, missing_P, target_PK, judge: Judge | None) -> np.ndarray:
    """[P, 2] intervals of D that hold all at once; judge: one whose error can be undone, None for shares as judged."""
    P, target = len(counts_PK), np.asarray(target_PK, float)
    low, high = share_box(counts_PK, missing_P, (0.05 if judge is None else 0.04) / P)
    if judge is None:
        return np.stack(distance_range(low, high, target), -1)
    mend = np.concatenate([judge.mend[None], judge.inverses])
    found = np.empty((P, 2))
    for row in range(P):
        least, most = distance_range(*_united(*mended_box(low[row], high[row], mend)), target[row])
        whole = (0.0, math.sqrt(1 / target[row].min() - 1))  # no matrix fits: nothing is known
        found[row] = (least.min(), most.max()) if np.isfinite(least).any() else whole
    return found


def _united(low_BK, high_BK) -> tuple[np.ndarray, np.ndarray]:
    """Of two classes the boxes that show some shares as one, which no D of theirs lies outside; of more the boxes."""
    fit = (low_BK <= 1).all(-1) & (high_BK >= 0).all(-1)
    if low_BK.shape[1] > 2 or not fit.any():
        return low_BK, high_BK
    return low_BK[fit].min(0, keepdims=True), high_BK[fit].max(0, keepdims=True)


def certain_prompts(counts_PK, missing_P, target_PK, delta: float, judge: Judge | None) -> tuple[list[dict], dict]:
    """Each prompt's `distance`: value (of the shares seen, noise included), interval and state; and what they rest on.

    off: the whole interval lies above delta, within: below it, open: neither. In 95 of 100 audits no prompt is wrongly called
    off or within. judge: as in `verdict`; where its error cannot be undone the shares are as judged and no prompt is certain.
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
    """The fewest images of each of so many prompts, all with a face and exactly on target, that make a prompt certainly
    within.

    It assumes a judge without errors.
    """
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
