"""Undoing classifier error: exact inverses, the simplex, and coverage when the judge errs."""

import numpy as np
import pytest

from fairdiff.audit.correction import (
    correct_shares,
    corrected_bias_interval,
    corrected_suite,
    inverse_transpose,
    rates,
    resampled_confusions,
)
from fairdiff.audit.intervals import bias, unbiased_squared_gap

BINARY = np.array([[90, 10], [5, 95]])
FOUR = np.array([[90, 2, 4, 4], [1, 95, 2, 2], [6, 2, 88, 4], [3, 1, 6, 90]])


def test_two_classes_follow_the_published_formula():
    a0, a1, q0 = 0.9, 0.95, 0.62
    by_hand = (q0 - (1 - a1)) / (a0 - (1 - a1))
    assert correct_shares([q0, 1 - q0], BINARY)[0] == pytest.approx(by_hand)
    assert correct_shares([0.01, 0.99], BINARY) == pytest.approx([0, 1], abs=1e-6)


def test_a_symmetric_judge_shrinks_every_gap_by_the_known_factor():
    a, p = 0.85, np.array([0.4, 0.3, 0.2, 0.1])
    C = np.full((4, 4), (1 - a) / 3) + np.eye(4) * (a - (1 - a) / 3)
    q = C.T @ p
    assert bias(q) == pytest.approx((4 * a - 1) / 3 * bias(p))
    assert correct_shares(q, C) == pytest.approx(p)


def test_outside_the_simplex_the_answer_is_the_most_likely_point_of_it():
    q = np.array([0.95, 0.05, 0.0, 0.0])  # fewer in the last classes than error alone would put there
    p, C = correct_shares(q, FOUR), rates(FOUR)
    assert p.min() >= 0 and p.sum() == pytest.approx(1)
    rng = np.random.default_rng(0)
    others = np.vstack([rng.dirichlet(np.ones(4), 500), rng.dirichlet(np.full(4, 0.2), 500), np.eye(4)])
    likelihood = lambda x: (q * np.log(np.maximum(x @ C, 1e-300))).sum(-1)  # noqa: E731
    assert likelihood(p) >= likelihood(others).max() - 1e-4


def test_corrected_gap_is_unbiased_for_the_true_gap():
    rng = np.random.default_rng(2)
    p = np.array([0.5, 0.2, 0.2, 0.1])
    counts = rng.multinomial(60, rates(FOUR).T @ p, size=20_000)
    raw, mended = unbiased_squared_gap(counts), unbiased_squared_gap(counts, inverse=inverse_transpose(FOUR))
    truth = 2 / 3 * ((p - 0.25) ** 2).sum()
    assert mended.mean() == pytest.approx(truth, rel=0.02)
    assert raw.mean() < 0.9 * truth


@pytest.mark.parametrize("p", [0.5, 0.9, 0.98])
def test_corrected_interval_covers_the_true_gap_with_a_new_labelled_set_each_time(p):
    rng = np.random.default_rng(7)
    C, hits, trials = rates(BINARY), 0, 150
    for _ in range(trials):
        labelled = np.stack([rng.multinomial(400, row) for row in C])
        women = rng.binomial(60, p * C[0, 0] + (1 - p) * C[1, 0])
        low, high = corrected_bias_interval([women, 60 - women], resampled_confusions(labelled, 400, 0))
        hits += low - 1e-9 <= abs(2 * p - 1) <= high + 1e-9
    assert hits / trials >= 0.92


def test_suite_is_the_mean_of_its_prompts_and_grows_the_gap():
    counts = np.array([[50, 10], [15, 45], [40, 20]])
    suite = corrected_suite(counts, BINARY, draws=300)
    each = [correct_shares(c / 60, BINARY) for c in counts]
    assert suite.mean_bias == pytest.approx(np.mean([bias(p) for p in each]))
    assert suite.shares == pytest.approx(np.mean(each, 0))
    assert suite.mean_bias > bias(counts / 60).mean()
    assert suite.rms_interval[0] <= suite.rms <= suite.rms_interval[1]


def test_a_perfect_judge_changes_nothing():
    counts = np.array([[50, 10], [15, 45]])
    suite = corrected_suite(counts, np.eye(2) * 500, draws=200)
    assert suite.mean_bias == pytest.approx(bias(counts / 60).mean())
    assert suite.rms**2 == pytest.approx(unbiased_squared_gap(counts).mean())


def test_a_judge_at_chance_or_a_class_without_labels_is_refused():
    with pytest.raises(ValueError, match="tell its classes apart"):
        corrected_suite([[30, 30], [20, 40]], [[50, 50], [49, 51]])
    with pytest.raises(ValueError, match="no labelled face"):
        resampled_confusions([[50, 50], [0, 0]], 10, 0)
    with pytest.raises(ValueError, match="no labelled face"):
        correct_shares([0.5, 0.5], [[50, 50], [0, 0]])
