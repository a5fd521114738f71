"""Target distributions and the labels that optimal transport draws from them.

Source: Shen et al., "Finetuning Text-to-Image Diffusion Models for Fairness", ICLR 2024 (arXiv 2311.07604), section 4.1.
Shapes: F faces, K classes of one attribute, C = K1*K2*... corners of the joint simplex, N samples of F one-hots.
This module loads no model and knows no image.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom, multinomial


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
        if (self.table < 0).any() or not abs(self.table.sum() - 1) < 1e-5:
            raise ValueError(f"target shares must be non-negative and sum to 1, found sum {self.table.sum():.6g}")

    @classmethod
    def from_marginals(cls, marginals: dict[str, list[float]]) -> "Target":
        """The product of independent marginal shares, one list of K shares per attribute."""
        table = np.ones(())
        for shares in marginals.values():
            table = np.multiply.outer(table, np.asarray(shares, float))
        return cls(tuple(marginals), table)

    def marginal(self, *attributes: str) -> np.ndarray:
        """Shares of these attributes' classes, one axis each, in this order; none is above 1 by rounding."""
        rest = tuple(i for i, name in enumerate(self.attributes) if name not in attributes)
        kept = [name for name in self.attributes if name in attributes]
        shares = self.table.sum(rest).transpose([kept.index(name) for name in attributes])
        return shares / shares.sum()

    def class_weights(self, attribute: str) -> np.ndarray:
        """w_k = 1 / (K t_k) [K] for the cross-entropy, 0 for a class of share 0: at the target the classes' pushes cancel.

        A face is pushed into its own class by 1 - p, whichever that is, and at the target t_k F faces have class k. Without
        weights, as in the paper, the frequent classes outweigh the rare ones and shares end beyond the target: simulated
        at F = 40 at .20 where .25 is the target, at .01 where .10 is (weighted: .25, .08). 1 where the target is uniform. Of
        marginal shares: what a joint table says beyond those is not balanced so.
        """
        shares = self.marginal(attribute)
        return np.divide(1 / len(shares), shares, out=np.zeros_like(shares), where=shares > 0)

    def given(self, attribute: str, place: int) -> "Target":
        """This distribution where one attribute has a known class: of prompts that name it."""
        axis = self.attributes.index(attribute)
        rest = self.table.take(place, axis)
        rest = rest if rest.sum() > 0 else self.table.sum(axis)  # a class that no image shall show otherwise
        table = np.zeros_like(self.table)
        table[(slice(None),) * axis + (place,)] = rest / rest.sum()
        return Target(self.attributes, table)

    def times(self, other: "Target", *attributes: str) -> "Target":
        """The product with a target of other, independent attributes, its axes in the given order."""
        both = Target((*self.attributes, *other.attributes), np.multiply.outer(self.table, other.table))
        return Target(attributes, both.marginal(*attributes))


@dataclass(frozen=True)
class Targets:
    """The target of each prompt: its own in `rows` (by its text), else the one in `common`, if there is one."""

    common: Target | None
    rows: dict[str, Target] = field(default_factory=dict)

    @property
    def attributes(self) -> tuple[str, ...]:
        return self.known()[0].attributes

    def known(self) -> list[Target]:
        """Every target: the common one, and one for each prompt with its own."""
        return ([] if self.common is None else [self.common]) + list(self.rows.values())

    def of(self, prompt: str) -> Target:
        """The target of a prompt."""
        return self.rows[prompt] if self.common is None or prompt in self.rows else self.common

    def audited(self, groups: dict[str, tuple[str, ...]], prompts: list[str]) -> dict[str, np.ndarray]:
        """Shares [K], or [P, K] where prompts have their own, of each attribute and of each group that is no product."""
        each = [self.common] if self.common is not None else [self.of(prompt) for prompt in prompts]
        found = {}
        for name, members in groups.items():
            tables = [target.marginal(*members) for target in each]
            product = [Target.from_marginals({m: t.marginal(m) for m in members}).table for t in each]
            if len(members) == 1 or not np.allclose(tables, product, rtol=0, atol=1e-9):
                found[name] = np.stack([table.ravel() for table in tables])
        return found if self.common is None else {name: rows[0] for name, rows in found.items()}


@dataclass(frozen=True)
class Labels:
    """The transport labels of each face: `classes[a]` int [F], `confidence[a]` float [F] in [1/K, 1]."""

    classes: dict[str, np.ndarray]
    confidence: dict[str, np.ndarray]

    @classmethod
    def none(cls, attributes: Iterable[str]) -> "Labels":
        """The labels of no face."""
        return cls({a: np.zeros(0, int) for a in attributes}, {a: np.zeros(0) for a in attributes})

    def kept(self, attribute: str, confidence: float) -> np.ndarray:
        """Which faces (bool [F]) have a label sure enough to be trained on: c_f >= confidence."""
        return self.confidence[attribute] >= confidence


def assign(probs: dict[str, np.ndarray], target: Target, rng: np.random.Generator, draws: int = 256) -> Labels:
    """Label F faces so that, in expectation over iid draws of F one-hots from the target, transport is optimal.

    q_f = E[u_{sigma*(f)}], y_f = argmax q_f, c_f = max q_f (section 4.1 of the paper). Several attributes are
    assigned jointly and labelled marginally. One binary attribute uses the closed form, all else `expected_joint`.

    probs: attribute -> [F, K] rows on the simplex, in the target's order. Returns labels of length F (may be 0).
    """
    if tuple(probs) != target.attributes:
        raise ValueError(f"probabilities of {tuple(probs)} do not match the target's {target.attributes}")
    faces = len(next(iter(probs.values())))
    if faces == 0:
        return Labels.none(probs)
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
    """q [F, K1, K2, ...]: the mean optimal plan to F one-hots drawn iid from the target.

    Exact where all possible samples, (F + C - 1 choose C - 1) vectors of counts, are no more than 4 `draws`; else Monte
    Carlo over `draws` of them. At F = 64, C = 16 (2x4x2), 256 draws: 24 ms a call on one core.
    """
    faces = len(next(iter(probs.values())))
    shares = target.table.ravel() / target.table.sum()
    used = int((shares > 0).sum())
    if comb(faces + used - 1, used - 1) <= 4 * draws:
        return mean_plan(probs, target.table.shape, *every_count(faces, shares))
    return mean_plan(probs, target.table.shape, *drawn_counts(faces, shares, rng, draws))


def every_count(faces: int, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All vectors of counts of `faces` draws, int [N, C], and their multinomial probabilities [N]."""
    used = np.flatnonzero(shares > 0)
    bars = np.array(list(combinations(range(faces + len(used) - 1), len(used) - 1)), int)  # between stars
    edges = np.pad(bars, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, faces + len(used) - 1)))
    counts = np.zeros((len(edges), len(shares)), int)
    counts[:, used] = np.diff(edges) - 1
    return counts, multinomial.pmf(counts[:, used], faces, shares[used])


def drawn_counts(faces: int, shares: np.ndarray, rng: np.random.Generator, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Different vectors of counts among `draws` samples, int [N, C], and their frequencies [N]."""
    counts, times = np.unique(rng.multinomial(faces, shares, size=draws), axis=0, return_counts=True)
    return counts, times / draws


def mean_plan(
    probs: dict[str, np.ndarray], shape: tuple[int, ...], counts: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The optimal plans [F, *shape] to samples with these counts [N, C], averaged with weights [N] that sum to 1.

    Cost: Euclidean distance between the concatenated marginal probabilities and each joint corner's one-hots. Every
    face is a unit and so is every draw: a corner drawn n times is n equal columns of an assignment problem.
    """
    corners = np.indices(shape).reshape(len(shape), -1)
    onehot = np.concatenate([np.eye(k)[c] for k, c in zip(shape, corners, strict=True)], 1)
    points = np.concatenate(list(probs.values()), 1).astype(float)
    cost = np.linalg.norm(points[:, None] - onehot[None], axis=2)
    plan = np.zeros_like(cost)
    for count, weight in zip(counts, weights, strict=True):
        corner = np.repeat(np.arange(len(count)), count)
        face, column = linear_sum_assignment(cost[:, corner])
        plan[face, corner[column]] += weight
    return plan.reshape(len(points), *shape)


@lru_cache
def smallest_batch(share: float, confidence: float) -> int:
    """The least F at which some face gets a confident label of a class with this share in (0, 1].

    The most class-like face is labelled if the class is drawn at all: 1 - (1-share)^F >= confidence.
    """
    if share >= 1:
        return 1
    return int(np.ceil(np.log(1 - confidence) / np.log(1 - share)))
