"""Labels with errors: which faces to weigh down while a judge is trained, and how many of them there may be.

Rockafellian relaxation (Chen, Goel, Royset et al., "Mitigating the Impact of Labeling Errors on Training via Rockafellian
Relaxation", arXiv 2405.20531): beside the network the weights of the faces are chosen,

    min over u of  sum_i (1/N + u_i) J_i + gamma/2 |u|_1    with  sum u = 0,  1/N + u >= 0,

in turns with the network's steps. J_i: loss of face i. Shapes: N faces, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def relaxed_weights(loss_N: np.ndarray, gamma: float) -> np.ndarray:
    """The best weights 1/N + u [N] of the program above, which sum to 1.

    To move a mass from i to the best face b saves J_i - J_b of it and costs gamma of it: all of those above J_b + gamma is
    moved, and nothing else. Several best faces share it.
    """
    loss_N = np.asarray(loss_N, float)
    dropped_N = loss_N > loss_N.min() + gamma
    weight_N = np.where(dropped_N, 0.0, 1 / len(loss_N))
    best_N = loss_N == loss_N.min()
    weight_N[best_N] += dropped_N.mean() / best_N.sum()
    return weight_N


def kept_weights(loss_N: np.ndarray, gamma: float) -> np.ndarray:
    """The same faces dropped, the others weighed alike [N]: one face would carry all the mass moved otherwise."""
    kept_N = np.asarray(loss_N) <= np.min(loss_N) + gamma
    return kept_N / kept_N.sum()


def gamma_of(loss_N: np.ndarray, share: float) -> float:
    """The gamma by which the `share` of faces with the largest losses is dropped, rounded down to whole faces."""
    ordered = np.sort(np.asarray(loss_N, float))
    return float(ordered[max(len(ordered) - int(share * len(ordered)) - 1, 0)] - ordered[0])


def weights_by_group(
    loss_N: np.ndarray, group_N: np.ndarray, share_G: dict[int, float], weigh: Callable = kept_weights
) -> np.ndarray:
    """`weigh` within each group [N], which keeps its share of the mass: nobody pays for another group's hard faces.

    group_N: int, below 0 for no label, whose weight is 0. share_G: of each group the share to drop.
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
    """The share of wrong labels by the confident joint (Northcutt, Jiang & Chuang, JAIR 2021, section 3.1).

    A face counts as of the most probable among those classes j with p_j at or above the mean of p_j over faces labelled j.
    The share, among faces that count, of those labelled otherwise. own_N: of some faces, with the means over all.
    """
    known_N = label_N >= 0
    labelled_K = [label_N == k for k in range(probs_NK.shape[1])]
    mean_K = np.array([probs_NK[rows, k].mean() if rows.any() else np.inf for k, rows in enumerate(labelled_K)])
    over_NK = np.where(probs_NK >= mean_K - 1e-9, probs_NK, -1.0)
    counted_N = (over_NK.max(1) >= 0) & known_N & (True if own_N is None else own_N)
    return float((over_NK.argmax(1) != label_N)[counted_N].mean()) if counted_N.any() else 0.0


@dataclass(frozen=True)
class Relaxation:
    """How a judge is trained on labels with errors.

    share: of wrong labels; None: estimated in each group. damping: how much of the weights is new each time, mu in (0, 1].
    warm_up: the part of the training with all faces, before networks learn wrong labels by heart. every: steps between two
    choices of the weights.
    by_group: a quantile for each labelled class of the attribute and each group of the others; False: one for all.
    to_best: the mass of dropped faces goes to the best face, as the program has it; False: to all kept faces alike.
    epsilon: pixels, in [0, 1], are moved by this much to where the loss rises before each step (A-RRM); 0: they are not.
    """

    share: float | None = None
    damping: float = 0.5
    warm_up: float = 0.3
    every: int = 25
    by_group: bool = True
    to_best: bool = False
    epsilon: float = 0.0

    def due(self, step: int, steps: int) -> bool:
        """Whether the weights are chosen anew before this step, of `steps` in all."""
        start = int(self.warm_up * steps)
        return step >= start and (step - start) % self.every == 0


MOST = 0.5  # share of a group that may be dropped: beyond, nobody knows which labels are the wrong ones


def chosen_weights(probs_NK: np.ndarray, label_N: np.ndarray, group_N: np.ndarray, plan: Relaxation) -> np.ndarray:
    """New weights of one attribute's faces [N], 0 for those without a label. group_N: from 0, below for no label."""
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
    """A number [N] for each combination of all attributes' labels, -1 where `name` itself is unlabelled."""
    columns = np.stack([label_N for label_N in labels.values()], 1)
    _, group_N = np.unique(columns, axis=0, return_inverse=True)
    return np.where(labels[name] >= 0, group_N.reshape(-1), -1)
