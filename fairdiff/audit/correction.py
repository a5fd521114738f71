"""Classifier error undone: true shares from judged shares and the judge's confusion matrix on labelled faces.

Estimand: the shares p the judge would report if it made no error. With C[k, j] = P(judged j | true k), judged shares
are q = C^T p (Teo, Abdollahzadeh & Cheung, NeurIPS 2023, CLEAM; for two classes
p_0 = (q_0 - (1 - a_1)) / (a_0 - (1 - a_1)), a_k the accuracy on class k). A symmetric judge of accuracy a shrinks every
gap by (Ka - 1) / (K - 1). Both the images and the labelled set are uncertain; n is the *total* number of faces.
Assumption: C measured on labelled faces holds on generated ones. P prompts, K classes, D bootstrap draws.
"""

from dataclasses import dataclass

import numpy as np

from fairdiff.audit.intervals import (
    Interval,
    bias,
    bias_range,
    gap_of_share,
    percentile_interval,
    resampled_prompts,
    root,
    unbiased_squared_gap,
)


def rates(confusion) -> np.ndarray:
    """C [..., K, K] with rows summing to 1 from counts (rows: true class); ValueError for a class without a label."""
    confusion = np.asarray(confusion, float)
    total = confusion.sum(-1, keepdims=True)
    if (total == 0).any():
        raise ValueError("confusion matrix: a class has no labelled face")
    return confusion / total


def check_confusion(confusion, classes: int | None = None) -> None:
    """ValueError if the counts are not [classes, classes] or the judge is no better than chance.

    That is, the smallest singular value of C is below .05: undoing the error would multiply the sampling noise more
    than twentyfold.
    """
    shape = np.shape(confusion)
    if classes is not None and shape != (classes, classes):
        raise ValueError(f"confusion matrix: found the shape {shape}, allowed: {(classes, classes)}")
    if np.linalg.svd(rates(confusion), compute_uv=False).min() < 0.05:
        raise ValueError("confusion matrix: the judge cannot tell its classes apart, so its error cannot be undone")


def inverse_transpose(confusion) -> np.ndarray:
    """C^-T [..., K, K], which takes judged shares to unbiased true shares (the pseudo-inverse, for singular draws)."""
    return np.linalg.pinv(np.swapaxes(rates(confusion), -1, -2))


def correct_shares(shares, confusion, iterations: int = 200) -> np.ndarray:
    """Maximum-likelihood true shares on the simplex, [..., K] from judged shares [..., K]; shapes broadcast with C.

    C^-T q where that has no negative share, else its clipped value (K = 2) or the fixed point of
    p_k <- p_k sum_j q_j C_kj / (C^T p)_j (EM; Richardson 1972, Saerens et al. 2002).
    """
    exact = (inverse_transpose(confusion) @ np.asarray(shares, float)[..., None])[..., 0]
    outside = (exact < 0).any(-1) | (np.abs(exact.sum(-1) - 1) > 1e-6)
    if exact.shape[-1] == 2:
        first = np.clip(exact[..., 0], 0, 1)
        return np.stack([first, 1 - first], -1)
    q = np.broadcast_to(shares, exact.shape)[outside]
    C = np.broadcast_to(rates(confusion), exact.shape + exact.shape[-1:])[outside]
    p = np.full(q.shape, 1 / q.shape[-1])
    for _ in range(iterations if outside.any() else 0):
        judged = np.einsum("mk,mkj->mj", p, C)
        p = p * np.einsum("mj,mkj->mk", q / np.maximum(judged, 1e-12), C)
    exact[outside] = p / p.sum(-1, keepdims=True)
    return exact


def resampled_confusions(confusion, draws: int, seed: int) -> np.ndarray:
    """Bootstrap of the labelled set within each true class: counts [D, K, K]; ValueError as `check_confusion`."""
    check_confusion(confusion)
    rng = np.random.default_rng(seed)
    C, total = rates(confusion), np.asarray(confusion).sum(-1).astype(int)
    return np.stack([rng.multinomial(n, row, size=draws) for n, row in zip(total, C, strict=True)], 1)


def corrected_share_region(counts, confusions, level: float = 0.95, seed: int = 0) -> np.ndarray:
    """Box [K, 2] for one prompt's corrected shares, all at once (Bonferroni over the classes; K = 2 needs none).

    Percentiles of the corrected Dirichlet(counts + 1/2) draws, one per resampled confusion matrix [D, K, K].
    """
    counts = np.asarray(counts, float)
    judged = np.random.default_rng(seed).dirichlet(counts + 0.5, size=len(confusions))
    tail = (1 - level) / 2 / (1 if len(counts) == 2 else len(counts))
    return np.quantile(correct_shares(judged, confusions), [tail, 1 - tail], axis=0).T


def corrected_bias_interval(counts, confusions, level: float = 0.95, seed: int = 0) -> Interval:
    """Interval of one prompt's bias with the judge's error undone: the range of bias over `corrected_share_region`."""
    box = corrected_share_region(counts, confusions, level, seed)
    return gap_of_share(*box[0]) if len(box) == 2 else bias_range(box[:, 0], box[:, 1])


@dataclass(frozen=True)
class Corrected:
    """Suite-level corrected quantities; intervals resample prompts and the labelled set together."""

    mean_bias: float
    mean_bias_interval: Interval
    rms: float
    rms_interval: Interval
    shares: np.ndarray
    share_intervals: np.ndarray


def corrected_suite(counts_PK, confusion, target=None, draws: int = 500, seed: int = 0) -> Corrected:
    """Correct every prompt of a suite: mean plug-in bias, root of the unbiased mean squared gap, mean shares [K].

    The rms estimand is that of `rms_interval` for error-free labels (floor 0); the mean bias keeps a floor, which the
    correction enlarges. Prompts need two faces or more.
    """
    counts = np.asarray(counts_PK, float)
    shares = counts / counts.sum(-1, keepdims=True)
    rows = resampled_prompts(len(counts), draws, seed)
    confusions = resampled_confusions(confusion, draws, seed + 1)
    per_draw = correct_shares(shares[rows], confusions[:, None])  # [D, P, K]
    aim = None if target is None else np.broadcast_to(target, counts.shape)
    squared = unbiased_squared_gap(
        counts[rows], None if aim is None else aim[rows], inverse_transpose(confusions)[:, None]
    ).mean(-1)
    point = correct_shares(shares, confusion)
    low, high = percentile_interval(squared, len(counts))
    return Corrected(
        mean_bias=float(bias(point).mean()),
        mean_bias_interval=percentile_interval(bias(per_draw).mean(-1), len(counts)),
        rms=float(root(unbiased_squared_gap(counts, aim, inverse_transpose(confusion)).mean())),
        rms_interval=(float(root(low)), float(root(high))),
        shares=point.mean(0),
        share_intervals=np.array([percentile_interval(k, len(counts)) for k in per_draw.mean(1).T]),
    )
