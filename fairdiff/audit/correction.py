"""Numbers corrected for the judge's error, with intervals that include the noise of the images and of the labelled faces.

Estimand: what the judge would report if it made no error (`judge` has the model and its assumption). The error of the
estimated confusion matrix is the same for every prompt, so it does not average out over prompts.
Shapes: P prompts, K classes, B draws.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.stats import norm

from fairdiff.audit import suite
from fairdiff.audit.distance import shrunken_shares
from fairdiff.audit.intervals import bias_ends
from fairdiff.audit.judge import Judge
from fairdiff.audit.suite import Interval

SIMULATED = 2000  # simulated prompts in all for a variance or a noise floor


def correct_shares(shares, judge: Judge, iterations: int = 200) -> np.ndarray:
    """Return the maximum-likelihood true shares [..., K] on the simplex, from judged shares q [..., K].

    They are C^-T q if that lies on the simplex. Otherwise they are its clipped value (K = 2), or the fixed point of
    p_k <- p_k sum_j q_j C_kj / (C^T p)_j (EM; Richardson 1972, Saerens et al. 2002).
    """
    shares = np.asarray(shares, float)
    exact = shares @ judge.mend.T
    if exact.shape[-1] == 2:
        first = np.clip(exact[..., 0], 0, 1)
        return np.stack([first, 1 - first], -1)
    outside = (exact < 0).any(-1) | (np.abs(exact.sum(-1) - 1) > 1e-6)
    q, C = shares[outside], judge.rates
    p = np.full(q.shape, 1 / q.shape[-1])
    for _ in range(iterations if outside.any() else 0):
        p = p * (q / np.maximum(p @ C, 1e-12) @ C.T)
    exact[outside] = p / p.sum(-1, keepdims=True)
    return exact


def misjudged(shares, judge: Judge, draws: int = 1000) -> np.ndarray:
    """Return what the correction makes of true shares p [..., K] if C_b is the true matrix: C^-T C_b^T p [B, ..., K]."""
    step = judge.mend @ np.swapaxes(judge.draws[:draws], -1, -2)
    return np.einsum("bkj,...j->b...k", step, np.asarray(shares, float))


def lack_of_fit(counts_PK, judge: Judge) -> str | None:
    """Return why no true shares are compatible with these counts, None if some are.

    They are incompatible if (C^-T f)_k of a class is below 0 by more than the noise of images and labelled faces: in one
    prompt (p < .001, Bonferroni over prompts and classes), or on average over prompts. There, the mean of its negative parts
    must be 3.5 standard errors below the one expected if no prompt had that class.
    """
    counts = np.asarray(counts_PK, float)
    n = counts.sum(-1, keepdims=True)
    found = counts / n @ judge.mend.T
    fitted = correct_shares(counts / n, judge)
    judged = fitted @ judge.draws.mean(0)
    images = np.sqrt(np.maximum(judged @ (judge.mend**2).T - (judged @ judge.mend.T) ** 2, 1e-12) / n)  # [P, K]
    labels = misjudged(fitted, judge).std(0)
    single = norm.cdf(found / np.hypot(images, labels)).min() * counts.size
    below = np.minimum(found, 0).mean(0)
    expected = -images.mean(0) / math.sqrt(2 * math.pi)
    spread = np.hypot(0.584 * np.sqrt((images**2).sum(0)) / len(counts), labels.mean(0))  # sd of min(z, 0) is .584
    if single >= 0.001 and (below >= expected - 3.5 * spread).all():
        return None
    return "no shares fit this judge's errors: it is surer of these faces than its labelled faces allow"


def corrected_share_region(counts, judge: Judge, level: float = 0.95, seed: int = 0) -> np.ndarray:
    """Return a box [K, 2] that holds all corrected shares of one prompt (Bonferroni over classes; K = 2 needs none).

    Its ends are percentiles over draws of C and of the judged shares, which are Dirichlet(counts + 1/2).
    """
    counts = np.asarray(counts, float)
    judged = np.random.default_rng(seed).dirichlet(counts + 0.5, size=500)
    shares = np.clip((judge.inverses[:500] @ judged[..., None])[..., 0], 0, 1)
    tail = (1 - level) / 2 / (1 if len(counts) == 2 else len(counts))
    return np.quantile(shares, [tail, 1 - tail], axis=0).T


def corrected_bias_intervals(counts_PK, judge: Judge, level: float = 0.95, seed: int = 0) -> np.ndarray:
    """Return the interval [P, 2] of each prompt's corrected bias, the range of bias over `corrected_share_region`."""
    return bias_ends([corrected_share_region(counts, judge, level, seed) for counts in counts_PK])


def corrected_mean(statistic: Callable, counts_PK, target_PK, judge: Judge, limits: Interval, seed: int) -> dict:
    """Return the mean over prompts of a plug-in statistic of corrected shares, with its noise floor and both intervals.

    statistic(shares [..., P, K], target_PK) gives one value per prompt. The noise floor is the mean for a generator exactly
    on target after the same correction, with the uncertainty of C included.
    """
    counts, target = np.asarray(counts_PK, float), np.asarray(target_PK, float)
    n, P = counts.sum(-1), len(counts)
    rng = np.random.default_rng(seed)
    shares = correct_shares(counts / n[:, None], judge)
    values = statistic(shares, target)
    mean = float(values.mean())
    draws = max(20, SIMULATED // P)

    def drawn(judged) -> np.ndarray:
        faces = rng.multinomial(n.astype(int), judged / judged.sum(-1, keepdims=True), size=(draws, P))
        return statistic(correct_shares(faces / n[:, None], judge), target)

    variance = drawn(shrunken_shares(counts, target, judge) @ judge.rates).var(0)
    floor = drawn(target @ judge.draws[rng.integers(len(judge.draws), size=draws)]).mean()
    moved = np.maximum(misjudged(shares, judge, 500), 0)
    moved = statistic(moved / moved.sum(-1, keepdims=True), target).mean(-1)
    half = float(np.quantile(np.abs(moved - mean), 0.95))
    labels = (mean - half, mean + half)
    these = suite.combine(mean, suite.normal_interval(mean, float(variance.sum()) / P**2), labels)
    return {"mean": mean, "floor": float(floor)} | suite.both(mean, values, these, limits, seed, [labels])


def corrected_share(k: int, counts_PK, target_PK, judge: Judge, seed: int, error: float = 0.05) -> dict:
    """Return the corrected mean share over prompts of class k, and both intervals of level 1 - error."""
    counts, target = np.asarray(counts_PK, float), np.asarray(target_PK, float)
    n, P = counts.sum(-1), len(counts)
    found = counts / n[:, None] @ judge.mend.T
    overall = correct_shares((counts / n[:, None]).mean(0), judge)
    judged = shrunken_shares(counts, target, judge) @ judge.rates
    variance = (judged @ judge.mend[k] ** 2 - (judged @ judge.mend[k]) ** 2) / n
    mean = float(found[:, k].mean())
    low, high = np.quantile(misjudged(overall, judge, len(judge.draws))[:, k] - overall[k], [error / 2, 1 - error / 2])
    labels = (mean - high, mean - low)
    these = suite.combine(mean, suite.normal_interval(mean, float(variance.sum()) / P**2, 1 - error), labels)
    return {"share": float(overall[k])} | suite.cut(
        suite.ends(mean, found[:, k], these, seed, [labels], 1 - error), (0.0, 1.0)
    )
