"""Train a judge on labels with errors: choose weights of the faces, and estimate the share of wrong labels.

Rockafellian relaxation (Chen, Goel, Royset et al., "Mitigating the Impact of Labeling Errors on Training via Rockafellian
Relaxation", arXiv 2405.20531) optimises the weights of the faces alternately with the network:

    min over u of  sum_i (1/N + u_i) J_i + gamma/2 |u|_1    with  sum u = 0,  1/N + u >= 0.

J_i: loss of face i. Shapes: N faces, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def relaxed_weights(loss_N: np.ndarray, gamma: float) -> np.ndarray:
    """Return the optimal weights 1/N + u [N] of the program above, which sum to 1.

    Moving a mass from face i to the best face b saves J_i - J_b times the mass and costs gamma times the mass. So the whole
    mass of all faces with J_i > J_b + gamma is moved, and no other. Several best faces share it equally.
    """
    loss_N = np.asarray(loss_N, float)
    dropped_N = loss_N > loss_N.min() + gamma
    weight_N = np.where(dropped_N, 0.0, 1 / len(loss_N))
    best_N = loss_N == loss_N.min()
    weight_N[best_N] += dropped_N.mean() / best_N.sum()
    return weight_N


def kept_weights(loss_N: np.ndarray, gamma: float) -> np.ndarray:
    """Return equal weights [N] for the faces that `relaxed_weights` keeps, and 0 for the others.

    Otherwise one best face would get the mass of all dropped faces.
    """
    kept_N = np.asarray(loss_N) <= np.min(loss_N) + gamma
    return kept_N / kept_N.sum()


def gamma_of(loss_N: np.ndarray, share: float) -> float:
    """Return the gamma that drops the `share` of faces with the largest losses, rounded down to whole faces."""
    ordered = np.sort(np.asarray(loss_N, float))
    return float(ordered[max(len(ordered) - int(share * len(ordered)) - 1, 0)] - ordered[0])


def weights_by_group(
    loss_N: np.ndarray, group_N: np.ndarray, share_G: dict[int, float], weigh: Callable = kept_weights
) -> np.ndarray:
    """Return weights [N] from `weigh` within each group; each group keeps its share of the mass, whatever its losses.

    group_N: int; below 0 means no label and weight 0. share_G: group -> share of its faces to drop.
    weigh: (losses, gamma) -> weights that sum to 1.
    """
    weight_N = np.zeros(len(loss_N))
    known = int((group_N >= 0).sum())
    for group, share in share_G.items():
        rows = np.flatnonzero(group_N == group)
        if len(rows):
            weight_N[rows] = weigh(loss_N[rows], gamma_of(loss_N[rows], share)) * len(rows) / known
    return weight_N


def estimated_share(probs_NK: np.ndarray, label_N: np.ndarray, own_N: np.ndarray | None = None) -> float:
    """Estimate the share of wrong labels by the confident joint (Northcutt, Jiang & Chuang, JAIR 2021, section 3.1).

    A face's class is the most probable among the classes j with p_j at or above the mean of p_j over the faces labelled j.
    Faces without such a class do not count. The estimate is the share of the others whose label differs. own_N: estimate the
    share of these faces only, with means over all.
    """
    known_N = label_N >= 0
    labelled_K = [label_N == k for k in range(probs_NK.shape[1])]
    mean_K = np.array([probs_NK[rows, k].mean() if rows.any() else np.inf for k, rows in enumerate(labelled_K)])
    over_NK = np.where(probs_NK >= mean_K - 1e-9, probs_NK, -1.0)
    counted_N = (over_NK.max(1) >= 0) & known_N & (True if own_N is None else own_N)
    return float((over_NK.argmax(1) != label_N)[counted_N].mean()) if counted_N.any() else 0.0


@dataclass(frozen=True)
class Relaxation:
    """Settings of training with the relaxation.

    share: share of wrong labels; None: estimated in each group. damping: fraction of new weights in each update, mu in
    (0, 1]. warm_up: fraction of the training with equal weights, before networks memorise wrong labels. every: steps between
    two updates of the weights.
    by_group: faces are dropped separately for each combination of the attributes' labels; False: among all labelled faces.
    to_best: the mass of dropped faces goes to the best face, as in the program above; False: equally to all kept faces.
    epsilon: before each step, pixels in [0, 1] are changed by this much in the direction of a larger loss (A-RRM); 0: off.
    """

    share: float | None = None
    damping: float = 0.5
    warm_up: float = 0.3
    every: int = 25
    by_group: bool = True
    to_best: bool = False
    epsilon: float = 0.0

    def due(self, step: int, steps: int) -> bool:
        """Return whether the weights are updated before step `step` of `steps`."""
        start = int(self.warm_up * steps)
        return step >= start and (step - start) % self.every == 0


MOST = 0.5  # largest share of a group that may be dropped: beyond it, the wrong labels would be the majority


def chosen_weights(probs_NK: np.ndarray, label_N: np.ndarray, group_N: np.ndarray, plan: Relaxation) -> np.ndarray:
    """Return new weights of one attribute's faces [N], 0 for those without a label. group_N: below 0 means no label."""
    known_N = label_N >= 0
    loss_N = np.zeros(len(label_N))
    rows = np.flatnonzero(known_N)
    loss_N[rows] = -np.log(np.maximum(probs_NK[rows, label_N[rows]], 1e-12))
    groups_N = np.where(known_N, group_N if plan.by_group else 0, -1)
    share_G = {}
    for group in np.unique(groups_N[groups_N >= 0]).tolist():
        own = groups_N == group
        share_G[group] = min(estimated_share(probs_NK, label_N, own) if plan.share is None else plan.share, MOST)
    return weights_by_group(loss_N, groups_N, share_G, relaxed_weights if plan.to_best else kept_weights)


def groups_of(labels: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Return a group number [N] per combination of all attributes' labels, -1 for faces where `name` is unlabelled."""
    columns = np.stack([label_N for label_N in labels.values()], 1)
    _, group_N = np.unique(columns, axis=0, return_inverse=True)
    return np.where(labels[name] >= 0, group_N.reshape(-1), -1)
