"""Influence of labels against training again, in closed form for a quadratic loss, and what it cannot reach."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from classifiers.influence import (
    calibration_error,
    curvature,
    expected_error,
    fitted,
    gap_between,
    gradient,
    influence,
    objective,
    one_group,
    other_labels,
    probabilities,
)

METRICS = {"error": expected_error, "calibration": calibration_error}


def faces(rng: np.random.Generator, count: int, K: int = 2, wrong: float = 0.2, D: int = 5):
    """Features with a constant, wrong labels one-hot, true labels, groups: the smaller one is harder."""
    true_N, group_N = rng.integers(0, K, count), (rng.random(count) < 0.3).astype(int)
    centres_KD = np.random.default_rng(7).normal(size=(K, D))
    features_ND = centres_KD[true_N] * np.where(group_N, 0.6, 1.2)[:, None] + rng.normal(size=(count, D))
    features_ND = np.concatenate([features_ND, np.ones((count, 1))], 1)
    label_N = np.where(rng.random(count) < wrong, (true_N + rng.integers(1, K, count)) % K, true_N)
    return features_ND, np.eye(K)[label_N], true_N, group_N


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("name", METRICS)
def test_gradients_are_those_of_finite_differences(name, K):
    rng = np.random.default_rng(K)
    features_FD, y_FK, true_F, group_F = faces(rng, 60, K)
    group_F = rng.integers(0, 3, 60)
    metric = gap_between(METRICS[name], group_F)
    weights_DK = rng.normal(size=(features_FD.shape[1], K))
    found = gradient(metric, weights_DK, features_FD, true_F)
    for place in np.ndindex(*weights_DK.shape):
        step = np.zeros_like(weights_DK)
        step[place] = 1e-6
        ends = [metric(probabilities(weights_DK + s * step, features_FD), true_F)[0] for s in (1, -1)]
        assert found[place] == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-6)
    probs_FK = probabilities(weights_DK, features_FD)
    H = curvature(probs_FK, features_FD, 0.01)

    def slope(at):
        return features_FD.T @ (probabilities(at, features_FD) - y_FK) / 60 + 0.01 * at

    direction = rng.normal(size=weights_DK.shape)
    change = (slope(weights_DK + 1e-6 * direction) - slope(weights_DK - 1e-6 * direction)) / 2e-6
    assert (H @ direction.reshape(-1)).reshape(direction.shape) == pytest.approx(change, abs=1e-7)


def test_where_the_fit_begins_changes_nothing():
    rng = np.random.default_rng(0)
    features_ND, y_NK, *_ = faces(rng, 100, 3)
    one = fitted(features_ND, y_NK, 0.01)
    other = fitted(features_ND, y_NK, 0.01, 3 * rng.normal(size=one.shape))
    assert other == pytest.approx(one, abs=1e-6)
    for _ in range(5):
        near = one + 0.01 * rng.normal(size=one.shape)
        assert objective(near, features_ND, y_NK, 0.01) > objective(one, features_ND, y_NK, 0.01)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("what", ["relabelled", "left out"])
def test_influence_ranks_as_training_again_does(what, name):
    """On 120 faces, each trained without, or with another label, to the end: Spearman's correlation is .8 or more."""
    rng = np.random.default_rng(3)
    features_ND, y_NK, *_ = faces(rng, 120)
    features_FD, _, true_F, group_F = faces(rng, 400, wrong=0)
    metric, damping = gap_between(METRICS[name], group_F), 0.01
    weights_DK = fitted(features_ND, y_NK, damping)
    probs_NK = probabilities(weights_DK, features_ND)
    changed_NK = other_labels(probs_NK, y_NK) if what == "relabelled" else probs_NK
    H = curvature(probs_NK, features_ND, damping)
    found = influence(H, gradient(metric, weights_DK, features_FD, true_F), features_ND, changed_NK - y_NK)
    was, true = metric(probabilities(weights_DK, features_FD), true_F)[0], []
    for i in range(len(y_NK)):
        rows = np.delete(np.arange(len(y_NK)), i) if what == "left out" else np.arange(len(y_NK))
        labels_NK = y_NK.copy()
        if what == "relabelled":
            labels_NK[i] = changed_NK[i]
        # the mean is over one face fewer: damping as much stronger leaves the sum of the loss as it was
        own = damping * len(y_NK) / len(rows)
        again = fitted(features_ND[rows], labels_NK[rows], own, weights_DK)
        true.append(metric(probabilities(again, features_FD), true_F)[0] - was)
    assert spearmanr(found, true).statistic >= 0.8
    assert np.corrcoef(found, true)[0, 1] >= 0.8  # in size too


def test_it_is_exact_for_a_quadratic_loss_and_a_linear_number():
    """Least squares with ridge: L = 1/2N |XW - Y|^2 + d/2 |W|^2, M any linear function of W."""
    rng = np.random.default_rng(0)
    N, D, K, damping = 40, 6, 3, 0.05
    X, Y, linear = rng.normal(size=(N, D)), rng.normal(size=(N, K)), rng.normal(size=(D, K))
    A = X.T @ X / N + damping * np.eye(D)

    def number(labels):
        return float((linear * np.linalg.solve(A, X.T @ labels / N)).sum())

    other = rng.normal(size=(N, K))
    found = influence(np.kron(A, np.eye(K)), linear, X, other - Y)
    for i in range(N):
        labels = Y.copy()
        labels[i] = other[i]
        assert found[i] == pytest.approx(number(labels) - number(Y), abs=1e-12)


def test_a_label_has_no_influence_on_what_it_cannot_reach():
    """Two sets of faces without a common feature: labels of one change nothing of the other, and those of the other do."""
    rng = np.random.default_rng(1)
    features_ND, y_NK, *_ = faces(rng, 60)
    features_FD, _, true_F, group_F = faces(rng, 200, wrong=0)
    nothing = np.zeros_like(features_ND)
    both = np.concatenate([np.hstack([features_ND, nothing]), np.hstack([nothing, features_ND])])
    y = np.concatenate([y_NK, y_NK[::-1]])
    weights = fitted(both, y, 0.01)
    probs = probabilities(weights, both)
    measured = np.hstack([features_FD, np.zeros_like(features_FD)])
    own = gradient(gap_between(expected_error, group_F), weights, measured, true_F)
    found = influence(curvature(probs, both, 0.01), own, both, other_labels(probs, y) - y)
    assert np.abs(found[60:]).max() < 1e-15 < 1e-5 < np.abs(found[:60]).max()
    assert np.abs(influence(curvature(probs, both, 0.01), own, both, y - y)).max() == 0  # the same label again


@pytest.mark.parametrize("name", METRICS)
def test_names_of_groups_do_not_matter_and_equal_groups_have_no_gap(name):
    rng = np.random.default_rng(2)
    features_FD, _, true_F, _ = faces(rng, 90)
    group_F, weights_DK = rng.integers(0, 3, 90), rng.normal(size=(6, 2))
    value, slope = gap_between(METRICS[name], group_F)(probabilities(weights_DK, features_FD), true_F)
    for names in ([1, 2, 0], [5, -1, 3]):
        renamed = gap_between(METRICS[name], np.array(names)[group_F])
        again, other = renamed(probabilities(weights_DK, features_FD), true_F)
        assert again == pytest.approx(value, abs=1e-15) and other == pytest.approx(slope, abs=1e-15)
    twice = gap_between(METRICS[name], np.repeat([0, 1], 90))
    even, _ = twice(np.tile(probabilities(weights_DK, features_FD), (2, 1)), np.tile(true_F, 2))
    assert even == 0 < value
    with pytest.raises(ValueError, match="groups: found 1, allowed: two or more"):
        gap_between(METRICS[name], np.zeros(90, int))


def test_the_other_label_is_never_the_own_one():
    rng = np.random.default_rng(0)
    probs_NK, y_NK = rng.dirichlet(np.ones(4), 50), np.eye(4)[rng.integers(0, 4, 50)]
    other_NK = other_labels(probs_NK, y_NK)
    assert (other_NK.sum(1) == 1).all() and not (other_NK * y_NK).any()
    assert ((probs_NK * other_NK).sum(1) == np.where(y_NK == 1, -1, probs_NK).max(1)).all()
    assert (other_labels(probs_NK[:, :2], y_NK[:, [0, 0]] * 0 + [1, 0]) == [0, 1]).all()


def relabelled(groups_apart: bool, seed: int) -> dict[str, tuple[float, float]]:
    """Flips in the smaller group alone; by ranking the share of flips among 30 of 300 suspects, and the gap that is left.

    groups_apart: whether each group has features of its own, so that labels of one change the other little.
    """
    rng = np.random.default_rng([11, seed])
    features_ND, y_NK, true_N, group_N = faces(rng, 300, wrong=0)
    flip_N = (group_N == 1) & (rng.random(300) < 0.3)
    y_NK = np.where(flip_N[:, None], 1 - y_NK, y_NK)
    features_FD, _, true_F, group_F = faces(rng, 300, wrong=0)
    if groups_apart:
        features_ND, features_FD = (
            np.hstack([x * (g == 0)[:, None], x * (g == 1)[:, None]])
            for x, g in ((features_ND, group_N), (features_FD, group_F))
        )
    weights_DK = fitted(features_ND, y_NK, 0.01)
    probs_NK = probabilities(weights_DK, features_ND)
    gap, other_NK = gap_between(expected_error, group_F), other_labels(probs_NK, y_NK)
    H = curvature(probs_NK, features_ND, 0.01)

    def by(metric):
        return influence(H, gradient(metric, weights_DK, features_FD, true_F), features_ND, other_NK - y_NK)

    ranked = {"gap": by(gap), "error": by(expected_error), "loss": (probs_NK * y_NK).sum(1), "chance": rng.random(300)}
    harm_N = np.max([by(one_group(expected_error, group_F, group)) for group in (0, 1)], 0) > 0
    ranked["gap without harm"] = np.where(harm_N, 0, np.minimum(ranked["gap"], 0))
    found = {}
    for name, order_N in ranked.items():
        rows = np.argsort(order_N)[:30]
        labels_NK = y_NK.copy()
        labels_NK[rows] = other_NK[rows]
        again = fitted(features_ND, labels_NK, 0.01, weights_DK)
        left = gap(probabilities(again, features_FD), true_F)[0]
        found[name] = flip_N[rows].mean(), left
    return found


def mean_difference(runs: list[dict], one: str, other: str, what: int) -> tuple[float, float]:
    """Mean over seeds of what the rankings differ by, and three standard errors."""
    difference = np.array([run[one][what] - run[other][what] for run in runs])
    return float(difference.mean()), 3 * float(difference.std(ddof=1)) / len(difference) ** 0.5


def test_planted_flips_are_found_where_no_group_is_harmed_and_groups_have_features_of_their_own():
    runs = [relabelled(True, seed) for seed in range(12)]
    for way in ("gap without harm", "error"):
        mean, error = mean_difference(runs, way, "chance", 0)
        assert mean > error
    mean, error = mean_difference(runs, "gap without harm", "loss", 0)
    assert mean > error
    for other in ("loss", "chance"):  # and to narrow the gap no other order does as well
        mean, error = mean_difference(runs, "gap", other, 1)
        assert mean < -error


def test_the_gap_alone_is_no_detector_of_flips():
    """It falls as well where the group with fewer errors is taught wrong labels, and where groups share all features the
    right label of a hard face may help the other group more: the docs say so."""
    runs = [relabelled(False, seed) for seed in range(12)]
    mean, error = mean_difference(runs, "gap", "loss", 0)
    assert mean < -error
    mean, error = mean_difference(runs, "error", "chance", 0)
    assert mean > error


def test_one_group_is_measured_alone():
    rng = np.random.default_rng(4)
    features_FD, _, true_F, group_F = faces(rng, 80)
    probs_FK = probabilities(rng.normal(size=(6, 2)), features_FD)
    value, slope_FK = one_group(expected_error, group_F, 1)(probs_FK, true_F)
    assert value == expected_error(probs_FK[group_F == 1], true_F[group_F == 1])[0]
    assert not slope_FK[group_F == 0].any() and slope_FK[group_F == 1].any(1).all()
