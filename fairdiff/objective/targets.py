"""Target distributions, and the labels that optimal transport assigns to faces.

Source: Shen et al., "Finetuning Text-to-Image Diffusion Models for Fairness", ICLR 2024 (arXiv 2311.07604), section 4.1.
Shapes: F faces, K classes of one attribute, C = K1*K2*... corners of the joint simplex, N samples of F one-hots.
This module uses neither models nor images.
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
        """Return the product of independent marginal shares, given as one list of K shares per attribute."""
        table = np.ones(())
        for shares in marginals.values():
            table = np.multiply.outer(table, np.asarray(shares, float))
        return cls(tuple(marginals), table)

    def marginal(self, *attributes: str) -> np.ndarray:
        """Return the marginal shares of these attributes, one axis each in this order; rounding puts none above 1."""
        rest = tuple(i for i, name in enumerate(self.attributes) if name not in attributes)
        kept = [name for name in self.attributes if name in attributes]
        shares = self.table.sum(rest).transpose([kept.index(name) for name in attributes])
        return shares / shares.sum()

    def class_weights(self, attribute: str) -> np.ndarray:
        """Return class weights w_k = 1 / (K t_k) [K] for the cross-entropy, 0 for a class of share 0.

        The gradient pushes a face towards its labelled class by 1 - p, and at the target t_k F faces have class k. With
        these weights the pushes of the classes cancel at the target. Without weights, as in the paper, frequent classes
        outweigh rare ones and rare classes end below their targets: simulated at F = 40, at .20 for a target of .25 and at
        .01 for .10 (weighted: .25, .08). All weights are 1 if the target is uniform. They use the marginal shares only: a
        joint table's dependence between attributes is not balanced.
        """
        shares = self.marginal(attribute)
        return np.divide(1 / len(shares), shares, out=np.zeros_like(shares), where=shares > 0)

    def given(self, attribute: str, place: int) -> "Target":
        """Return this distribution given that `attribute` has its class number `place`, for prompts that name the class."""
        axis = self.attributes.index(attribute)
        rest = self.table.take(place, axis)
        rest = rest if rest.sum() > 0 else self.table.sum(axis)  # the class has share 0 for prompts that do not name it
        table = np.zeros_like(self.table)
        table[(slice(None),) * axis + (place,)] = rest / rest.sum()
        return Target(self.attributes, table)

    def times(self, other: "Target", *attributes: str) -> "Target":
        """Return the product with a target of other, independent attributes; its axes are `attributes` in this order."""
        both = Target((*self.attributes, *other.attributes), np.multiply.outer(self.table, other.table))
        return Target(attributes, both.marginal(*attributes))


@dataclass(frozen=True)
class Targets:
    """The target of each prompt: the one in `rows` under its text, otherwise `common` (None: every prompt has a row)."""

    common: Target | None
    rows: dict[str, Target] = field(default_factory=dict)

    @property
    def attributes(self) -> tuple[str, ...]:
        return self.known()[0].attributes

    def known(self) -> list[Target]:
        """Return all targets: the common one, and that of each row."""
        return ([] if self.common is None else [self.common]) + list(self.rows.values())

    def of(self, prompt: str) -> Target:
        """Return the target of a prompt."""
        return self.rows[prompt] if self.common is None or prompt in self.rows else self.common

    def audited(self, groups: dict[str, tuple[str, ...]], prompts: list[str]) -> dict[str, np.ndarray]:
        """Return target shares per group of attributes: [K] if there is a common target, otherwise [P, K].

        Groups of several attributes are left out if their table is the product of the marginals for every prompt.
        """
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
    """The transport labels of F faces: for attribute a, `classes[a]` int [F] and `confidence[a]` float [F] in [1/K, 1]."""

    classes: dict[str, np.ndarray]
    confidence: dict[str, np.ndarray]

    @classmethod
    def none(cls, attributes: Iterable[str]) -> "Labels":
        """Return the labels of zero faces."""
        return cls({a: np.zeros(0, int) for a in attributes}, {a: np.zeros(0) for a in attributes})

    def kept(self, attribute: str, confidence: float) -> np.ndarray:
        """Return which faces have a label confident enough to be trained on, bool [F]: c_f >= confidence."""
        return self.confidence[attribute] >= confidence


def assign(probs: dict[str, np.ndarray], target: Target, rng: np.random.Generator, draws: int = 256) -> Labels:
    """Return the transport labels of F faces: the expected optimal assignment to F one-hots drawn iid from the target.

    q_f = E[u_{sigma*(f)}], y_f = argmax q_f, c_f = max q_f (section 4.1 of the paper). Several attributes are
    assigned jointly and labelled marginally. One binary attribute uses the closed form, all others `expected_joint`.

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
    """Return q [F, 2] of one binary attribute in closed form.

    Ranks r are by the probability of class 1, the lowest first. The number of class-0 draws is Binomial(F, 1 - share), and
    transport gives class 0 to the lowest ranks. So rank r gets class 1 with probability BinomCDF(r; F, 1 - share).
    """
    rank = np.argsort(np.argsort(prob_F, kind="stable"), kind="stable")
    one = binom.cdf(rank, len(prob_F), 1 - share)
    return np.stack([1 - one, one], 1)


def expected_joint(probs: dict[str, np.ndarray], target: Target, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Return q [F, K1, K2, ...], the mean optimal plan to F one-hots drawn iid from the target.

    It is exact if there are at most 4 `draws` possible vectors of counts, (F + C - 1 choose C - 1) for C corners with a
    share above 0. Otherwise it is a Monte Carlo estimate of `draws` samples. A call with F = 64, C = 16 (2x4x2) and 256
    draws takes 24 ms on one core.
    """
    faces = len(next(iter(probs.values())))
    shares = target.table.ravel() / target.table.sum()
    used = int((shares > 0).sum())
    if comb(faces + used - 1, used - 1) <= 4 * draws:
        return mean_plan(probs, target.table.shape, *every_count(faces, shares))
    return mean_plan(probs, target.table.shape, *drawn_counts(faces, shares, rng, draws))


def every_count(faces: int, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all vectors of counts of `faces` draws, int [N, C], and their multinomial probabilities [N]."""
    used = np.flatnonzero(shares > 0)
    bars = np.array(list(combinations(range(faces + len(used) - 1), len(used) - 1)), int)  # stars and bars
    edges = np.pad(bars, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, faces + len(used) - 1)))
    counts = np.zeros((len(edges), len(shares)), int)
    counts[:, used] = np.diff(edges) - 1
    return counts, multinomial.pmf(counts[:, used], faces, shares[used])


def drawn_counts(faces: int, shares: np.ndarray, rng: np.random.Generator, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct vectors of counts among `draws` samples, int [N, C], and their frequencies [N]."""
    counts, times = np.unique(rng.multinomial(faces, shares, size=draws), axis=0, return_counts=True)
    return counts, times / draws


def mean_plan(
    probs: dict[str, np.ndarray], shape: tuple[int, ...], counts: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Return the weighted mean [F, *shape] of the optimal plans to samples with these counts [N, C].

    weights: [N], sum 1. The cost is the Euclidean distance between a face's concatenated marginal probabilities and the
    concatenated one-hots of a joint corner. Each plan solves an assignment problem, where a corner drawn n times is n
    equal columns.
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
    """Return the least F at which some face gets a confident label of a class with this share in (0, 1].

    The face most like the class gets it if it is drawn at least once, so F must satisfy 1 - (1-share)^F >= confidence.
    """
    if share >= 1:
        return 1
    return int(np.ceil(np.log(1 - confidence) / np.log(1 - share)))
