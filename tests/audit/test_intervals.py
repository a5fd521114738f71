"""Laws of the statistics: exact expectations, brute force against closed forms, and coverage by simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.stats import multinomial
from statsmodels.stats.multitest import multipletests

from fairdiff.audit import intervals as iv
from fairdiff.audit.intervals import (
    bias,
    bias_ends,
    bias_interval,
    bias_range,
    draws_for,
    holm,
    images_for_half_width,
    missing_face_bounds,
    noise_floor,
    paired_rate_interval,
    rate_interval,
    share_region,
    target_p_value,
    total_variation_floor,
)


def compositions(n, K):
    for bars in itertools.combinations(range(n + K - 1), K - 1):
        ends = (-1, *bars, n + K - 1)
        yield np.array([b - a - 1 for a, b in itertools.pairwise(ends)])


def expectation(function, n, p):
    return sum(multinomial.pmf(c, n, p) * function(c) for c in compositions(n, len(p)))


@pytest.mark.parametrize("K,n", [(2, 1), (2, 7), (3, 6), (4, 5)])
def test_noise_floor_is_the_expectation_over_all_outcomes(K, n):
    assert noise_floor(K, n) == pytest.approx(expectation(lambda c: bias(c / n), n, [1 / K] * K), rel=1e-9)


def test_noise_floor_matches_the_published_figures():
    for K, n, value in [(2, 60, 0.103), (2, 160, 0.063), (4, 80, 0.063), (4, 160, 0.045), (8, 160, 0.032)]:
        assert noise_floor(K, n) == pytest.approx(value, abs=1e-3)
        assert noise_floor(K, n) == pytest.approx(math.sqrt(2 / (K * n)) * math.sqrt(2 / math.pi), rel=0.03)
    assert math.isnan(noise_floor(2, 0))


def test_total_variation_floor_is_the_expectation_over_all_outcomes():
    target = np.array([0.6, 0.3, 0.1])
    exact = expectation(lambda c: np.abs(c / 6 - target).sum() / 2, 6, target)
    assert total_variation_floor(target, 6) == pytest.approx(exact, rel=1e-9)
    assert total_variation_floor([0.5, 0.5], 60) == pytest.approx(noise_floor(2, 60) / 2)


def test_the_gap_of_two_classes_folds_at_one_half_and_prompts_do_not_mix():
    boxes = [[[low, high], [1 - high, 1 - low]] for low, high in ((0.4, 0.7), (0.1, 0.3), (0.6, 0.9), (0, 1))]
    assert bias_ends(boxes) == pytest.approx(np.array([[0, 0.4], [0.4, 0.8], [0.2, 0.8], [0, 1]]), abs=1e-9)


def vertices(low, high):
    K = len(low)
    for free in range(K):
        for ends in itertools.product(*[(low[k], high[k]) for k in range(K) if k != free]):
            last = 1 - sum(ends)
            if low[free] - 1e-12 <= last <= high[free] + 1e-12:
                yield np.insert(ends, free, last)


def least_bias(low, high):
    """min bias by a linear programme: one variable per pair above |p_i - p_j|."""
    K = len(low)
    pairs = list(itertools.combinations(range(K), 2))
    rows = []
    for index, (i, j) in enumerate(pairs):
        for sign in (1, -1):
            row = np.zeros(K + len(pairs))
            row[i], row[j], row[K + index] = sign, -sign, -1
            rows.append(row)
    cost = np.r_[np.zeros(K), np.full(len(pairs), 1 / len(pairs))]
    total = np.r_[np.ones(K), np.zeros(len(pairs))][None]
    bounds = [*zip(low, high, strict=True), *[(0, None)] * len(pairs)]
    return linprog(cost, np.array(rows), np.zeros(len(rows)), total, [1], bounds).fun


@pytest.mark.parametrize("counts", [[20, 20, 20], [60, 0, 0, 0], [31, 14, 9, 6], [5, 3, 2, 0, 0], [1, 1, 0]])
def test_bias_range_agrees_with_vertex_enumeration_and_linear_programme(counts):
    low, high = np.clip(share_region(counts).T, 0, 1)
    lower, upper = bias_range(low, high)
    assert upper == pytest.approx(max(float(bias(v)) for v in vertices(low, high)), abs=1e-9)
    assert lower == pytest.approx(least_bias(low, high), abs=1e-7)


def test_bias_range_of_boxes_in_any_order_is_never_too_narrow():
    rng = np.random.default_rng(3)
    for _ in range(50):
        point = rng.dirichlet(np.ones(4))
        low, high = point - rng.uniform(0, 0.3, 4), point + rng.uniform(0, 0.3, 4)
        low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
        lower, upper = bias_range(low, high)
        assert upper >= max(float(bias(v)) for v in vertices(low, high)) - 1e-9
        assert lower <= least_bias(low, high) + 1e-7


def test_missing_face_bounds_by_hand():
    # 6 women, 2 men, 2 images without a face: 6/4 at best, 8/2 at worst
    assert missing_face_bounds([6, 2], 2) == (pytest.approx(0.2), pytest.approx(0.6))
    assert missing_face_bounds([3, 3], 4) == (pytest.approx(0), pytest.approx(0.4))
    assert missing_face_bounds([6, 2], 0) == (pytest.approx(0.5), pytest.approx(0.5))


def test_no_face_says_nothing():
    assert bias_interval([0, 0]) == (0, 1)
    assert bias_interval([0, 0, 0, 0]) == (0, pytest.approx(0.5))
    assert target_p_value([0, 0, 0], [0.2, 0.3, 0.5]) == 1


@pytest.mark.parametrize("p", [0.5, 0.55, 0.9, 0.98])
def test_wilson_mapped_to_the_gap_covers(p):
    n = 60
    chance = multinomial.pmf([[c, n - c] for c in range(n + 1)], n, [p, 1 - p])
    intervals = [bias_interval([c, n - c]) for c in range(n + 1)]
    covered = [low <= abs(2 * p - 1) <= high for low, high in intervals]
    assert chance[covered].sum() >= 0.93


@pytest.mark.parametrize("p", [[0.25] * 4, [0.7, 0.2, 0.1, 0.0], [0.4, 0.3, 0.2, 0.1]])
def test_simultaneous_region_covers_also_at_the_fair_point(p):
    draws = np.random.default_rng(1).multinomial(60, p, size=400)
    unique, times = np.unique(draws, axis=0, return_counts=True)
    truth = float(bias(p))
    covered = np.array([(i := bias_interval(c))[0] - 1e-9 <= truth <= i[1] for c in unique])
    assert (covered * times).sum() / 400 >= 0.93


def test_monte_carlo_test_agrees_with_the_exact_one_and_keeps_its_size():
    p = np.array([0.5, 0.3, 0.2])
    null = [(c, multinomial.pmf(c, 12, p)) for c in compositions(12, 3)]

    def g(c):
        return 2 * sum(x * math.log(x / (12 * q)) for x, q in zip(c, p, strict=True) if x)

    for counts in ([6, 4, 2], [10, 1, 1], [2, 5, 5]):
        exact = sum(chance for c, chance in null if g(c) >= g(counts) - 1e-9)
        assert target_p_value(counts, p) == pytest.approx(exact, abs=0.015)
    rejected = sum(chance for c, chance in null if target_p_value(c, p) <= 0.05)
    assert rejected <= 0.055


def test_binary_target_test_and_an_impossible_class():
    assert target_p_value([40, 20], [0.5, 0.5]) == pytest.approx(0.0135, abs=1e-4)
    assert target_p_value([42, 18], [0.7, 0.3]) == pytest.approx(1)
    assert target_p_value([1, 30, 29], [0, 0.5, 0.5]) == 0


def test_holm_agrees_with_statsmodels():
    p = np.random.default_rng(0).uniform(0, 0.2, 12) ** 2
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])


@pytest.mark.parametrize("prompts", [44, 1001, 5000])
def test_one_prompt_far_off_its_target_can_be_rejected_in_any_suite(prompts):
    least = target_p_value([40, 0, 0], [1 / 3] * 3, draws_for(prompts))
    assert holm([least] + [1.0] * (prompts - 1))[0] < 0.05


def test_rates_of_zero_are_no_certainty():
    assert rate_interval(0, 300)[0] == 0 and 0.005 < rate_interval(0, 300)[1] < 0.02
    assert paired_rate_interval(0, 0, 300)[0] < 0 < paired_rate_interval(0, 0, 300)[1]
    rng, hits = np.random.default_rng(6), 0
    for before, after in rng.multinomial(200, [0.03, 0.05, 0.92], 400)[:, :2]:
        low, high = paired_rate_interval(before, after, 200)
        hits += low <= 0.02 <= high
    assert hits / 400 >= 0.93


def test_planner():
    assert images_for_half_width(0.10) == 385  # (1.96 / .1)^2 = 384.1
    assert images_for_half_width(0.10, K=4) < images_for_half_width(0.10)


def test_the_worst_tenth_of_prompts_rounds_up_and_its_floor_is_what_chance_makes():
    assert iv.worst_tenth(np.arange(21.0)) == pytest.approx((18 + 19 + 20) / 3)
    assert iv.worst_tenth([0.3]) == pytest.approx(0.3)
    fair = np.full((40, 2), 0.5)
    floor = iv.worst_tenth_floor(lambda f, _: bias(f), [60] * 40, fair, draws=2000)
    draws = np.abs(2 * np.random.default_rng(3).binomial(60, 0.5, (2000, 40)) / 60 - 1)
    assert floor == pytest.approx(np.sort(draws, 1)[:, -4:].mean(), rel=0.02) and floor > 2 * iv.noise_floor(2, 60)
    assert math.isnan(iv.worst_tenth_floor(lambda f, _: bias(f), [], fair[:0]))
