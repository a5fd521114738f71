"""Target distributions and the labels that optimal transport draws from them.

Source: Shen et al., "Finetuning Text-to-Image Diffusion Models for Fairness", ICLR 2024 (arXiv 2311.07604), section 4.1.
Shapes: F faces, K classes of one attribute, C = K1*K2*... corners of the joint simplex, D draws.
This module loads no model and knows no image.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import ot
from scipy.stats import binom


@dataclass(frozen=True)
class Target:
    """A distribution over the joint classes of one or more attributes.

    `table` has one axis per attribute, in the order of `attributes`; it is non-negative and sums to 1.
    """

    attributes: tuple[str, ...]
    table: np.ndarray

    def __post_init__(self):
        if self.table.ndim != len(self.attributes):
            raise ValueError(f"target table has {self.table.ndim} axes for {len(self.attributes)} attributes")
        if (self.table < 0).any() or not np.isclose(self.table.sum(), 1, atol=1e-6):
            raise ValueError(f"target shares must be non-negative and sum to 1, found sum {self.table.sum():.6g}")

    @classmethod
    def from_marginals(cls, marginals: dict[str, list[float]]) -> "Target":
        """The product of independent marginal shares, one list of K shares per attribute."""
        table = np.ones(())
        for shares in marginals.values():
            table = np.multiply.outer(table, np.asarray(shares, float))
        return cls(tuple(marginals), table)

    def marginal(self, attribute: str) -> np.ndarray:
        """Shares of one attribute's K classes."""
        axis = self.attributes.index(attribute)
        return self.table.sum(tuple(i for i in range(self.table.ndim) if i != axis))


@dataclass(frozen=True)
class Labels:
    """What transport asks of each face: `classes[a]` int [F], `confidence[a]` float [F] in [1/K, 1]."""

    classes: dict[str, np.ndarray]
    confidence: dict[str, np.ndarray]

    def kept(self, attribute: str, confidence: float) -> np.ndarray:
        """Which faces (bool [F]) have a label sure enough to be trained on: c_f >= confidence."""
        return self.confidence[attribute] >= confidence


def assign(probs: dict[str, np.ndarray], target: Target, rng: np.random.Generator, draws: int = 256) -> Labels:
    """Label F faces so that, in expectation over iid draws of F one-hots from the target, transport is optimal.

    q_f = E[u_{sigma*(f)}], y_f = argmax q_f, c_f = max q_f (section 4.1 of the paper). Several attributes are
    assigned jointly and labelled marginally. One binary attribute uses the closed form, all else Monte Carlo.

    probs: attribute -> [F, K] rows on the simplex, in the target's order. Returns labels of length F (may be 0).
    """
    if tuple(probs) != target.attributes:
        raise ValueError(f"probabilities of {tuple(probs)} do not match the target's {target.attributes}")
    faces = len(next(iter(probs.values())))
    if faces == 0:
        empty = {a: np.zeros(0) for a in probs}
        return Labels({a: v.astype(int) for a, v in empty.items()}, empty)
    if target.table.shape == (2,):
        name = target.attributes[0]
        expected = {name: expected_binary(probs[name][:, 1], float(target.table[1]))}
    else:
        joint = expected_joint(probs, target, rng, draws)
        axes = range(1, joint.ndim)
        expected = {a: joint.sum(tuple(x for x in axes if x != i + 1)) for i, a in enumerate(target.attributes)}
    return Labels({a: q.argmax(1) for a, q in expected.items()}, {a: q.max(1) for a, q in expected.items()})


def expected_binary(prob_F: np.ndarray, share: float) -> np.ndarray:
    """q [F, 2] in closed form: the face of rank r (0 = least class-1-like) gets class 1 with BinomCDF(r; F, 1-share).

    The number of class-0 draws is Binomial(F, 1-share) and transport gives class 0 to the lowest ranks.
    """
    rank = np.argsort(np.argsort(prob_F, kind="stable"), kind="stable")
    one = binom.cdf(rank, len(prob_F), 1 - share)
    return np.stack([1 - one, one], 1)


def expected_joint(probs: dict[str, np.ndarray], target: Target, rng: np.random.Generator, draws: int) -> np.ndarray:
    """q [F, K1, K2, ...] by Monte Carlo: the mean over `draws` of the optimal plan to a multinomial sample.

    Cost: Euclidean distance between the concatenated marginal probabilities and each joint corner's one-hots.
    """
    faces = len(next(iter(probs.values())))
    corners = np.indices(target.table.shape).reshape(target.table.ndim, -1)
    onehot = np.concatenate([np.eye(k)[c] for k, c in zip(target.table.shape, corners, strict=True)], 1)
    points = np.concatenate(list(probs.values()), 1).astype(float)
    cost = np.linalg.norm(points[:, None] - onehot[None], axis=2)
    shares = target.table.ravel() / target.table.sum()
    counts, times = np.unique(rng.multinomial(faces, shares, size=draws), axis=0, return_counts=True)
    plan = np.zeros_like(cost)
    for count, n in zip(counts, times, strict=True):
        used = count > 0
        plan[:, used] += n * ot.emd(np.ones(faces), count[used].astype(float), np.ascontiguousarray(cost[:, used]))
    return (plan / draws).reshape(faces, *target.table.shape)


@lru_cache
def smallest_batch(share: float, confidence: float) -> int:
    """The least F at which some face gets a confident label of a class with this share in (0, 1].

    The most class-like face is labelled if the class is drawn at all: 1 - (1-share)^F >= confidence.
    """
    if share >= 1:
        return 1
    return int(np.ceil(np.log(1 - confidence) / np.log(1 - share)))
