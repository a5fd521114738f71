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
    bias_interval,
    bias_range,
    draws_for,
    drift_verdict,
    gap_of_share,
    holm,
    images_for_equivalence,
    images_for_half_width,
    mean_interval,
    missing_face_bounds,
    noise_floor,
    paired_rate_interval,
    rate_interval,
    rms_interval,
    share_region,
    target_p_value,
    total_variation_floor,
    unbiased_squared_gap,
    verdict,
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


@pytest.mark.parametrize("target", [None, np.array([0.7, 0.2, 0.1])])
def test_unbiased_squared_gap_is_unbiased_over_all_outcomes(target):
    p = np.array([0.5, 0.2, 0.3])
    deviation = p - (1 / 3 if target is None else target)
    truth = np.mean([(deviation[i] - deviation[j]) ** 2 for i, j in itertools.combinations(range(3), 2)])
    assert expectation(lambda c: unbiased_squared_gap(c, target), 5, p) == pytest.approx(truth, rel=1e-9)
    assert 2 / (3 - 1) * (deviation**2).sum() == pytest.approx(truth)


def test_unbiased_squared_gap_needs_two_faces_and_broadcasts():
    values = unbiased_squared_gap(np.array([[1, 0], [0, 0], [5, 5], [9, 1]]))
    assert np.isnan(values[:2]).all() and values[2] < 0
    assert values[3] == pytest.approx(unbiased_squared_gap([9, 1]))


def test_gap_of_share_folds_at_one_half():
    assert gap_of_share(0.4, 0.7) == (0, pytest.approx(0.4))
    assert gap_of_share(0.1, 0.3) == (pytest.approx(0.4), pytest.approx(0.8))


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


@pytest.mark.parametrize("spread", [0.0, 0.15, 0.35])
def test_suite_interval_of_the_unbiased_gap_covers_and_the_plug_in_floor_does_not_leak_in(spread):
    """24 prompts x 60 images, shares p = .5 +- spread: the interval holds 2 spread; at the fair point too."""
    rng = np.random.default_rng(5)
    hits, trials = 0, 200
    for _ in range(trials):
        women = rng.binomial(60, 0.5 + spread * rng.choice([-1, 1], 24))
        gaps = unbiased_squared_gap(np.stack([women, 60 - women], -1))
        low, high = rms_interval(gaps, draws=400)[1]
        hits += low <= 2 * spread <= high
    assert hits / trials >= 0.90


def test_mean_interval_is_wider_than_percentiles_and_undefined_for_one_prompt():
    values = np.array([0.1, 0.4, 0.2, 0.6, 0.3])
    low, high = mean_interval(values)
    assert low < values.mean() < high
    assert all(map(math.isnan, mean_interval(values[:1])))
    assert verdict(mean_interval(values[:1]), 0.1, 10**6, 2) == "undecided"


@pytest.mark.parametrize("prompts", [2, 3, 4, 5, 6, 8])
def test_intervals_of_few_prompts_cover_too(prompts):
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        low, high = mean_interval(0.4 + 0.1 * rng.standard_normal(prompts), draws=500)
        hits += low <= 0.4 <= high
    assert hits / 400 >= 0.92  # nominal .95, less nearly three standard errors


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
    assert images_for_equivalence(0.10) == 857
    assert images_for_half_width(0.10, K=4) < images_for_half_width(0.10)


def test_verdict():
    assert [verdict(i, 0.1, 10**6, 2) for i in ((0, 0.09), (0.12, 0.3), (0.05, 0.2))] == [
        "within",
        "beyond",
        "undecided",
    ]


@pytest.mark.parametrize(
    "ends,verdict",
    [((-0.05, 0.05), "yes"), ((-0.05, 0.07), "cannot tell"), ((0.07, 0.2), "no"), ((-0.3, -0.061), "no"),
     ((-0.06, 0.0), "cannot tell"), ((math.nan, math.nan), "cannot tell")],
)  # fmt: skip
def test_drift_needs_the_whole_interval_on_one_side(ends, verdict):
    assert drift_verdict(ends, 0.06) == verdict


def test_few_faces_never_show_equivalence():
    """Two prompts of four images with true gaps of .4 look like zero in every resample more often than not."""
    rng = np.random.default_rng(0)
    counts = rng.binomial(4, 0.7, (400, 2))
    intervals = [rms_interval(unbiased_squared_gap(np.stack([c, 4 - c], 1)), 100)[1] for c in counts]
    assert sum(ends[1] < 0.1 for ends in intervals) > 100
    assert all(verdict(ends, 0.1, 8, 2) != "within" for ends in intervals)
    least = images_for_equivalence(0.1)
    assert [verdict((0.0, 0.05), 0.1, n, 2) for n in (least - 1, least)] == ["undecided", "within"]


def test_the_worst_tenth_of_prompts_rounds_up_and_its_floor_is_what_chance_makes():
    assert iv.worst_tenth(np.arange(21.0)) == pytest.approx((18 + 19 + 20) / 3)
    assert iv.worst_tenth([0.3]) == pytest.approx(0.3)
    fair = np.full((40, 2), 0.5)
    floor = iv.worst_tenth_floor(lambda f, _: bias(f), [60] * 40, fair, draws=2000)
    draws = np.abs(2 * np.random.default_rng(3).binomial(60, 0.5, (2000, 40)) / 60 - 1)
    assert floor == pytest.approx(np.sort(draws, 1)[:, -4:].mean(), rel=0.02) and floor > 2 * iv.noise_floor(2, 60)
    assert math.isnan(iv.worst_tenth_floor(lambda f, _: bias(f), [], fair[:0]))
    low, high = iv.worst_tenth_interval(np.linspace(0, 1, 30), seed=1)
    assert low < iv.worst_tenth(np.linspace(0, 1, 30)) <= high <= 1
