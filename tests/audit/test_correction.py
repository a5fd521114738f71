"""Correction of classifier errors: exact inverses, the simplex, and coverage for a judge with errors."""

import numpy as np
import pytest

from fairdiff.audit.correction import (
    correct_shares,
    corrected_bias_intervals,
    corrected_mean,
    corrected_share,
    lack_of_fit,
)
from fairdiff.audit.distance import confidence
from fairdiff.audit.intervals import bias, holm, target_p_value
from fairdiff.audit.judge import check_confusion, judge_of, rates
from fairdiff.audit.per_prompt import target_p_values
from fairdiff.audit.verdict import decide, distance_interval

BINARY = np.array([[90, 10], [5, 95]])
FOUR = np.array([[90, 2, 4, 4], [1, 95, 2, 2], [6, 2, 88, 4], [3, 1, 6, 90]])


def of_shares(shares, target):
    return bias(shares)


def reads_of(shares, P, judge, rng, n=60):
    return rng.multinomial(n, np.asarray(shares) @ judge.rates, P)


@pytest.mark.parametrize("confusion", [[[950, 50], [300, 700]], (np.eye(3) * 700 + [[0, 300, 0]] * 3).tolist()])
def test_a_judge_that_errs_rejects_no_prompt_by_its_errors_alone(confusion):
    """Tested against the target itself, a judge that misjudges three in ten of a class rejected prompts of a fair model."""
    K, rng, wrong = len(confusion), np.random.default_rng(3), 0
    truth, fair = judge_of(np.array(confusion) * 1000), np.full((12, K), 1 / K)
    for _ in range(20):
        labelled = judge_of([rng.multinomial(1000, row) for row in truth.rates], 0)
        counts = reads_of(fair[0], 12, truth, rng)
        wrong += holm(target_p_values(counts, fair, labelled, 0)).min() < 0.05
        bare = holm(target_p_values(counts, fair, None, 0))
    assert wrong <= 3 and bare.min() < 0.05
    skewed = reads_of(np.r_[0.9, np.full(K - 1, 0.1 / (K - 1))], 12, truth, rng)
    assert holm(target_p_values(skewed, fair, labelled, 0)).max() < 0.05


def test_a_judge_that_was_counted_well_tests_the_target_that_it_reads():
    """With many labelled faces, the test is the exact one against target @ C. With few, its p-values are larger."""
    judge, target, counts = judge_of(BINARY * 100_000), np.array([0.5, 0.5]), np.array([[35, 25]])
    exact = target_p_value(counts[0], target @ judge.rates)
    assert target_p_values(counts, target[None], judge, 0)[0] == pytest.approx(exact, rel=0.02)
    skewed = np.array([[48, 12]])
    few = target_p_values(skewed, target[None], judge_of(BINARY // 4), 0)[0]
    assert few > 2 * target_p_values(skewed, target[None], judge, 0)[0]
    refused = judge_of([[53, 47], [47, 53]])
    assert target_p_values(counts, target[None], refused, 0) == [target_p_value(counts[0], target)]


def test_two_classes_follow_the_published_formula():
    a0, a1, q0 = 0.9, 0.95, 0.62
    by_hand = (q0 - (1 - a1)) / (a0 - (1 - a1))
    assert correct_shares([q0, 1 - q0], judge_of(BINARY))[0] == pytest.approx(by_hand)
    assert correct_shares([0.01, 0.99], judge_of(BINARY)) == pytest.approx([0, 1], abs=1e-6)


def test_a_symmetric_judge_shrinks_every_gap_by_the_known_factor():
    a, p = 0.85, np.array([0.4, 0.3, 0.2, 0.1])
    C = np.full((4, 4), (1 - a) / 3) + np.eye(4) * (a - (1 - a) / 3)
    q = C.T @ p
    assert bias(q) == pytest.approx((4 * a - 1) / 3 * bias(p))
    assert correct_shares(q, judge_of(C * 400)) == pytest.approx(p)


def test_outside_the_simplex_the_answer_is_the_most_likely_point_of_it():
    q = np.array([0.95, 0.05, 0.0, 0.0])  # the last classes have fewer faces than the errors alone would give
    p, C = correct_shares(q, judge_of(FOUR)), rates(FOUR)
    assert p.min() >= 0 and p.sum() == pytest.approx(1)
    rng = np.random.default_rng(0)
    others = np.vstack([rng.dirichlet(np.ones(4), 500), rng.dirichlet(np.full(4, 0.2), 500), np.eye(4)])
    likelihood = lambda x: (q * np.log(np.maximum(x @ C, 1e-300))).sum(-1)  # noqa: E731
    assert likelihood(p) >= likelihood(others).max() - 1e-4


@pytest.mark.parametrize("p", [0.5, 0.9, 0.98])
def test_corrected_interval_covers_the_true_gap_with_a_new_labelled_set_each_time(p):
    rng = np.random.default_rng(7)
    C, hits, trials = rates(BINARY), 0, 80
    for _ in range(trials):
        labelled = np.stack([rng.multinomial(400, row) for row in C])
        women = rng.binomial(60, p * C[0, 0] + (1 - p) * C[1, 0])
        ((low, high),) = corrected_bias_intervals([[women, 60 - women]], judge_of(labelled))
        hits += low - 1e-9 <= abs(2 * p - 1) <= high + 1e-9
    assert hits / trials >= 0.9


def test_zero_cells_of_the_confusion_matrix_are_not_certain():
    """At accuracy .99 on 200 faces, a class often shows no error. Taking its rate as 0, coverage at D = .8 was only .48."""
    rng, C, target, hits = np.random.default_rng(8), np.array([[0.99, 0.01], [0.01, 0.99]]), np.full((44, 2), 0.5), 0
    for _ in range(60):
        judge = judge_of(np.stack([rng.multinomial(100, row) for row in C]))
        women = rng.binomial(160, np.array([0.9, 0.1]) @ C[:, 0], 44)
        found = confidence(np.stack([women, 160 - women], 1), target, judge)
        hits += found.end(0.025) <= 0.64 <= found.end(0.975)
    assert hits / 60 >= 0.88
    assert judge_of(np.eye(2) * 100).draws.min() < 1 > judge_of(np.eye(2) * 100).draws.max()


def test_a_corrected_bias_stands_beside_its_own_larger_floor():
    """With a judge of accuracy .8, a fair generator has a corrected bias of about .17 at 60 faces: its noise floor."""
    rng, target = np.random.default_rng(9), np.full((24, 2), 0.5)
    judge = judge_of([[800, 200], [200, 800]])
    women = rng.binomial(60, 0.5, 24)
    found = corrected_mean(of_shares, np.stack([women, 60 - women], 1), target, judge, (0, 1), 0)
    assert 0.15 < found["floor"] < 0.20 and abs(found["mean"] - found["floor"]) < 0.06
    assert found["ci95_these"][0] < found["floor"] < found["ci95_these"][1]


def test_suite_is_the_mean_of_its_prompts_and_a_perfect_judge_changes_nothing():
    counts, target = np.array([[50, 10], [15, 45], [40, 20]]), np.full((3, 2), 0.5)
    found = corrected_mean(of_shares, counts, target, judge_of(BINARY), (0, 1), 0)
    each = [correct_shares(c / 60, judge_of(BINARY)) for c in counts]
    assert found["mean"] == pytest.approx(np.mean([bias(p) for p in each]))
    assert found["mean"] > bias(counts / 60).mean()
    share = corrected_share(0, counts, target, judge_of(BINARY), 0)
    assert share["share"] == pytest.approx(np.mean(each, 0)[0]) and share["ci95_these"][0] < share["share"]
    perfect = distance_interval(counts, target, judge_of(np.eye(2) * 5000), 0)
    plain = distance_interval(counts, target, None, 0)
    assert perfect["value"] == pytest.approx(plain["value"], abs=1e-3)
    assert perfect["ci95_these"] == pytest.approx(plain["ci95_these"], abs=0.01)


def test_a_judge_at_chance_is_refused_and_a_class_without_labels_is_an_error():
    nearly_singular = judge_of([[53, 47], [47, 53]])
    assert "condition number" in nearly_singular.refusal and judge_of(BINARY).refusal is None
    assert "labelled faces allow" in judge_of([[6, 4], [4, 6]]).refusal  # so few labelled faces allow a judge at chance
    said = decide(np.tile([55, 5], (24, 1)), np.zeros(24), np.full((24, 2), 0.5), 0.1, nearly_singular, 0)
    assert said["verdict"] == said["verdict_these"] == "undecided" and "condition number" in said["reason"]
    for bad in ([[50, 50], [0, 0]], [[1, 2, 3]]):
        with pytest.raises(ValueError, match="confusion matrix"):
            check_confusion(bad, 2)


def test_shares_that_this_judge_cannot_have_found_are_called_that():
    """A judge that takes one woman in ten for a man cannot have found only women among 60 faces of each prompt."""
    judge, target = judge_of([[900, 100], [100, 900]]), np.full((24, 2), 0.5)
    said = decide(np.tile([60, 0], (24, 1)), np.zeros(24), target, 0.1, judge, 0)
    assert said["verdict_these"] == "undecided" and "no shares fit" in said["reason"]
    low, high = distance_interval(np.tile([60, 0], (24, 1)), target, judge, 0)["ci95_these"]
    assert 0 <= low <= high <= 1  # an end was once 1.60, beside a bias of 1
    rng = np.random.default_rng(10)
    for p in (0.0, 0.3, 0.5):
        women = rng.binomial(60, p * 0.9 + (1 - p) * 0.1, 24)
        assert lack_of_fit(np.stack([women, 60 - women], 1), judge) is None
