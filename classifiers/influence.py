"""Influence functions of a judge's last layer: how one training label changes a metric, such as a gap between groups.

Adebayo, Hall, Yu & Chern, "Quantifying and mitigating the impact of label errors on model disparity metrics", ICLR 2023
(arXiv 2310.02533), after Koh & Liang 2017. The last layer W on frozen features h_i is trained with

    L(W) = 1/N sum_i CE(y_i, p_i) + damping/2 |W|^2,    p_i = softmax(h_i W),

whose Hessian is its Gauss-Newton matrix, H = 1/N sum_i (h_i h_i') x (diag p_i - p_i p_i') + damping. Cross-entropy is linear
in the label y_i. So to first order, another label e changes W by 1/N H^-1 h_i (e - y_i)', and leaving the face out changes W
by 1/N H^-1 h_i (p_i - y_i)'. A metric M of other faces changes by the product of this with dM/dW.

Shapes: N training faces, F faces that M is measured on, D features (one of them constant, for the bias), K classes. y_NK are
shares of the classes, one-hot for plain labels. All computations are in float64 and deterministic.
"""

from collections.abc import Callable
from itertools import combinations

import numpy as np

BINS = 10  # bins of the calibration error
Metric = Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray]]  # (probs_FK, true_F) -> value, d value / d probs_FK


def probabilities(weights_DK: np.ndarray, features_ND: np.ndarray) -> np.ndarray:
    """Return the class probabilities p = softmax(h W) [N, K]."""
    logits = features_ND @ weights_DK
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def curvature(probs_NK: np.ndarray, features_ND: np.ndarray, damping: float) -> np.ndarray:
    """Return the Hessian H [D K, D K] of L, in the order of a flattened W."""
    N, D = features_ND.shape
    K = probs_NK.shape[1]
    H_DKDK = np.empty((D, K, D, K))
    for k in range(K):
        for other in range(k, K):
            spread_N = probs_NK[:, k] * ((k == other) - probs_NK[:, other])
            block_DD = (features_ND * spread_N[:, None]).T @ features_ND / N
            H_DKDK[:, k, :, other] = H_DKDK[:, other, :, k] = block_DD
    return H_DKDK.reshape(D * K, D * K) + damping * np.eye(D * K)


def objective(weights_DK: np.ndarray, features_ND: np.ndarray, y_NK: np.ndarray, damping: float) -> float:
    """Return L(W)."""
    probs_NK = probabilities(weights_DK, features_ND)
    return float(-(y_NK * np.log(np.maximum(probs_NK, 1e-300))).sum(1).mean() + damping / 2 * (weights_DK**2).sum())


def fitted(
    features_ND: np.ndarray, y_NK: np.ndarray, damping: float, start_DK: np.ndarray | None = None, tolerance: float = 1e-9
) -> np.ndarray:
    """Return the W [D, K] that minimises L, by Newton's method with step halving; start_DK: initial weights.

    L is strictly convex for damping > 0, so the initial weights change the running time only, and not the result.
    """
    N, D = features_ND.shape
    weights_DK = np.zeros((D, y_NK.shape[1])) if start_DK is None else start_DK
    least = objective(weights_DK, features_ND, y_NK, damping)
    while True:
        probs_NK = probabilities(weights_DK, features_ND)
        gradient_DK = features_ND.T @ (probs_NK - y_NK) / N + damping * weights_DK
        if np.abs(gradient_DK).max() < tolerance:
            return weights_DK
        H = curvature(probs_NK, features_ND, damping)
        step_DK = np.linalg.solve(H, gradient_DK.reshape(-1)).reshape(gradient_DK.shape)
        size = 1.0
        while (found := objective(weights_DK - size * step_DK, features_ND, y_NK, damping)) > least and size > 1e-8:
            size /= 2
        if size <= 1e-8:  # because of rounding, no step decreases L any more
            return weights_DK
        weights_DK, least = weights_DK - size * step_DK, found


def expected_error(probs_FK: np.ndarray, true_F: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean of 1 - p(true), the error rate of labels drawn from p, in [0, 1], and its gradient [F, K]."""
    chosen_FK = np.eye(probs_FK.shape[1])[true_F]
    return float(1 - (probs_FK * chosen_FK).sum(1).mean()), -chosen_FK / len(true_F)


def calibration_error(probs_FK: np.ndarray, true_F: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the calibration error over soft bins, mean over classes, in [0, 1], and its gradient [F, K].

    For class k it is the sum over bins b of |mean over faces of m_b(p_k) (p_k - 1[true k])|. The membership m_b of a face in
    the bins is a softmax of -(p_k - centre_b)^2 / 2 width^2 and sums to 1 (Karandikar et al., NeurIPS 2021). Hard bins, or
    the most probable class only, would make it discontinuous where a face changes its bin or class, with no useful gradient.
    It is biased upwards for few faces.
    """
    excess_FK = probs_FK - np.eye(probs_FK.shape[1])[true_F]
    centres_B = (np.arange(BINS) + 0.5) / BINS
    pull_FKB = (centres_B - probs_FK[..., None]) * BINS**2  # d softmax argument / d p, for the width 1 / BINS
    member_FKB = np.exp(-((centres_B - probs_FK[..., None]) ** 2) * BINS**2 / 2)
    member_FKB /= member_FKB.sum(-1, keepdims=True)
    sum_KB = (member_FKB * excess_FK[..., None]).sum(0)
    change_FKB = member_FKB * (pull_FKB - (member_FKB * pull_FKB).sum(-1, keepdims=True))
    slope_FK = ((member_FKB + change_FKB * excess_FK[..., None]) * np.sign(sum_KB)).sum(-1)
    return float(np.abs(sum_KB).sum() / probs_FK.size), slope_FK / probs_FK.size


def one_group(metric: Metric, group_F: np.ndarray, group: int) -> Metric:
    """Return `metric` of one group's faces as a metric that takes all faces."""
    rows = np.flatnonzero(group_F == group)

    def measured(probs_FK: np.ndarray, true_F: np.ndarray) -> tuple[float, np.ndarray]:
        slope_FK = np.zeros_like(probs_FK)
        value, slope_FK[rows] = metric(probs_FK[rows], true_F[rows])
        return value, slope_FK

    return measured


def gap_between(metric: Metric, group_F: np.ndarray) -> Metric:
    """Return a metric of all faces: the mean over pairs of groups of the absolute difference of `metric`.

    0 means that all groups are equal. It does not depend on the order of groups. Raises ValueError for a single group.
    """
    each_G = [one_group(metric, group_F, group) for group in np.unique(group_F)]
    if len(each_G) < 2:
        raise ValueError(f"groups: found {len(each_G)}, allowed: two or more with faces")

    def measured(probs_FK: np.ndarray, true_F: np.ndarray) -> tuple[float, np.ndarray]:
        own = [own_metric(probs_FK, true_F) for own_metric in each_G]
        pairs = [(a[0] - b[0], a[1] - b[1]) for a, b in combinations(own, 2)]
        slope_FK = sum(np.sign(difference) * slope for difference, slope in pairs) / len(pairs)
        return sum(abs(difference) for difference, _ in pairs) / len(pairs), slope_FK

    return measured


def gradient(metric: Metric, weights_DK: np.ndarray, features_FD: np.ndarray, true_F: np.ndarray) -> np.ndarray:
    """Return dM/dW [D, K]."""
    probs_FK = probabilities(weights_DK, features_FD)
    _, slope_FK = metric(probs_FK, true_F)
    by_logit_FK = probs_FK * (slope_FK - (probs_FK * slope_FK).sum(1, keepdims=True))
    return features_FD.T @ by_logit_FK


def influence(H: np.ndarray, gradient_DK: np.ndarray, features_ND: np.ndarray, moved_NK: np.ndarray) -> np.ndarray:
    """Return the first-order change of M [N] if only face i is changed in training: 1/N <dM/dW, H^-1 h_i moved_i'>.

    moved_NK: e - y_i for another label e, p_i - y_i for leaving the face out. For changed labels it is exact if the loss is
    quadratic with Hessian H and M is linear in W.
    """
    direction_DK = np.linalg.solve(H, gradient_DK.reshape(-1)).reshape(gradient_DK.shape)
    return ((features_ND @ direction_DK) * moved_NK).sum(1) / len(features_ND)


def other_labels(probs_NK: np.ndarray, y_NK: np.ndarray) -> np.ndarray:
    """Return the most probable class of each face other than its label, one-hot [N, K]."""
    return np.eye(y_NK.shape[1])[np.where(y_NK == y_NK.max(1, keepdims=True), -1.0, probs_NK).argmax(1)]
