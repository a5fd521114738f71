"""The chi-squared distance: properties of true shares, exact moments by enumeration, coverage by simulation."""

import itertools

import numpy as np
import pytest
from scipy.stats import multinomial

from fairdiff.audit.distance import (
    confidence,
    extreme_shares,
    gram,
    mean_moments,
    moments,
    quantile,
    shrunken_shares,
    squared_distance,
    unbiased_squared_distance,
    upper_tail,
)
from fairdiff.audit.judge import judge_of

CONFUSION = np.array([[40, 6, 4], [3, 45, 2], [5, 5, 40]])


def compositions(n, K):
    for bars in itertools.combinations(range(n + K - 1), K - 1):
        ends = (-1, *bars, n + K - 1)
        yield [b - a - 1 for a, b in itertools.pairwise(ends)]


def test_for_two_classes_at_parity_it_is_the_gap():
    p = np.random.default_rng(0).dirichlet([1, 1], 20)
    assert np.sqrt(squared_distance(p, [0.5, 0.5])) == pytest.approx(np.abs(p[:, 0] - p[:, 1]))


def test_merging_classes_never_makes_it_larger_so_no_joint_table_is_nearer_than_its_marginals():
    rng = np.random.default_rng(1)
    p, t = rng.dirichlet(np.full(8, 0.5), 200).reshape(-1, 2, 4), rng.dirichlet(np.full(8, 2.0), 200).reshape(-1, 2, 4)
    joint = squared_distance(p.reshape(-1, 8), t.reshape(-1, 8))
    for axis in (1, 2):
        assert (squared_distance(p.sum(axis), t.sum(axis)) <= joint + 1e-12).all()
    order = rng.permutation(8)
    assert squared_distance(p.reshape(-1, 8)[:, order], t.reshape(-1, 8)[:, order]) == pytest.approx(joint)


@pytest.mark.parametrize("K", [2, 8, 16])
def test_a_class_that_is_never_drawn_costs_the_root_of_its_target_share(K):
    """With gaps between pairs of classes, one of eight could vanish at a gap of .071, and one of sixteen at .024."""
    p = np.r_[0, np.full(K - 1, 1 / (K - 1))]
    assert np.sqrt(squared_distance(p, np.full(K, 1 / K))) >= np.sqrt(1 / K) > 0.1


@pytest.mark.parametrize("K,n,judge", [(2, 5, None), (3, 4, None), (3, 4, CONFUSION)])
def test_mean_variance_and_third_cumulant_are_those_over_all_outcomes(K, n, judge):
    rng = np.random.default_rng(2)
    q, t = rng.dirichlet(np.ones(K)), rng.dirichlet(np.full(K, 3.0))
    judge = judge_of(judge) if judge is not None else None
    G = gram(t[None], judge)[0]
    outcomes = np.array(list(compositions(n, K)))
    chance, x = multinomial.pmf(outcomes, n, q), unbiased_squared_distance(outcomes, G)
    mean = chance @ x
    exact = [mean, chance @ (x - mean) ** 2, chance @ (x - mean) ** 3]
    assert moments(q, G, n) == pytest.approx(exact, rel=1e-9)
    assert mean == pytest.approx(squared_distance(q if judge is None else judge.mend @ q, t))  # unbiased


def test_the_estimate_is_the_formula_of_the_design_and_needs_two_faces():
    counts, t = np.array([[7, 3, 2], [1, 0, 0]]), np.array([0.5, 0.3, 0.2])
    f = counts[0] / 12
    by_hand = (((f - t) ** 2 - f * (1 - f) / 11) / t).sum()
    x = unbiased_squared_distance(counts, gram(np.tile(t, (2, 1))))
    assert x[0] == pytest.approx(by_hand) and np.isnan(x[1])


def test_tail_and_quantile_agree_and_are_normal_without_skew():
    for third in (0.0, 0.3, -0.3):
        assert upper_tail(quantile(0.16, 1.0, 0.5, third), 1.0, 0.5, third) == pytest.approx(0.84)
    assert quantile(0.975, 0, 1, 0) == pytest.approx(1.96, abs=1e-3)


def test_no_shares_at_one_distance_vary_more_than_the_extreme_ones():
    rng, target = np.random.default_rng(3), np.tile([0.4, 0.3, 0.2, 0.1], (10, 1))
    most = mean_moments(extreme_shares(target, 0.01), target, np.full(10, 60))
    assert most[0] == pytest.approx(0.01)
    for _ in range(50):
        step = rng.standard_normal(target.shape)
        step -= step.mean(1, keepdims=True)
        p = target + step * np.sqrt(0.01 / squared_distance(target + step, target))[:, None]
        assert mean_moments(p, target, np.full(10, 60))[1] <= most[1] * 1.0001


def test_with_a_judge_the_moments_are_those_of_simulated_judged_faces():
    """The error of the confusion matrix is the same for all prompts, so it does not average out."""
    rng, P, n, judge = np.random.default_rng(4), 12, 60, judge_of(CONFUSION * 2)
    target = np.full((P, 3), 1 / 3)
    p = rng.dirichlet([8, 8, 8], P)
    means = []
    for C in judge.draws[:2000]:
        means.append(unbiased_squared_distance(rng.multinomial(n, p @ C), gram(target, judge)).mean())
    mean, variance, _ = mean_moments(p, target, np.full(P, n), judge)
    assert mean == pytest.approx(np.mean(means), rel=0.05) and variance == pytest.approx(np.var(means), rel=0.15)
    assert variance > 1.5 * mean_moments(p, target, np.full(P, n))[1]


def held(found, truth):
    return found.end(0.025) - 1e-9 <= truth <= found.end(0.975) + 1e-9


@pytest.mark.parametrize("P,gap", [(6, 0.05), (6, 0.16), (24, 0.05), (24, 0.16)])
def test_intervals_of_these_prompts_cover_with_few_prompts_too(P, gap):
    """Percentile intervals of resampled prompts had coverage .84 to .86 at 6 prompts, and .91 at 24."""
    rng, target = np.random.default_rng(5), np.full((P, 2), 0.5)
    women = rng.binomial(60, 0.5 + gap / 2 * rng.choice([-1, 1], (200, P)))
    found = [confidence(np.stack([w, 60 - w], 1), target) for w in women]
    assert np.mean([held(f, gap**2) for f in found]) >= 0.935 - 0.03  # two standard errors


def test_a_fair_suite_never_reads_zero_to_zero():
    rng, target = np.random.default_rng(6), np.full((24, 2), 0.5)
    for women in rng.binomial(60, 0.5, (100, 24)):
        found = confidence(np.stack([women, 60 - women], 1), target)
        assert found.end(0.975) > 0.001 and found.end(0.025) <= found.point() <= max(found.end(0.975), found.x)


def test_ends_stay_in_range_and_shrunken_shares_in_the_simplex():
    counts, target = np.tile([60, 0, 0], (8, 1)), np.tile([0.5, 0.3, 0.2], (8, 1))
    found = confidence(counts, target)
    assert 0 < found.end(0.025) <= found.end(0.975) <= 1 / 0.2 - 1
    p = shrunken_shares(counts, target)
    assert p.min() > 0 and p.sum(1) == pytest.approx(1)


@pytest.mark.parametrize("P,n,K", [(1, 3, 2), (1, 6, 2), (2, 6, 2), (5, 4, 4), (24, 60, 2), (36, 160, 8)])
def test_faces_of_one_class_alone_do_not_show_that_no_other_is_drawn(P, n, K):
    """The interval ends at the largest distance and begins below it, since smaller distances make such faces likely too."""
    found = confidence(np.eye(K)[[0] * P] * n, np.full((P, K), 1 / K))
    low, high = found.end(0.025), found.end(0.975)
    assert high == pytest.approx(found.point()) == pytest.approx(K - 1)
    largest = 0.2 ** (1 / (P * n))  # with this share, all faces are of the class in one audit of five
    likely = squared_distance(np.r_[largest, np.full(K - 1, (1 - largest) / (K - 1))], np.full(K, 1 / K))
    assert low < likely < high
