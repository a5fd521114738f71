"""Laws of the targets: marginals, permutation, and the closed form against Monte Carlo."""

import numpy as np
import pytest

from fairdiff.targets import Target, assign, expected_binary, expected_joint, smallest_batch


def probabilities(faces, classes, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(classes) * 0.5, faces)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.9])
def test_closed_form_agrees_with_monte_carlo(share):
    probs = probabilities(12, 2)
    target = Target.from_marginals({"gender": [1 - share, share]})
    monte_carlo = expected_joint({"gender": probs}, target, np.random.default_rng(1), draws=4000)
    assert np.abs(expected_binary(probs[:, 1], share) - monte_carlo).max() < 0.03


@pytest.mark.parametrize(
    "marginals", [{"r": [0.4, 0.3, 0.2, 0.1]}, {"g": [0.3, 0.7], "r": [0.25] * 4, "a": [0.75, 0.25]}]
)
def test_plan_has_the_right_marginals(marginals):
    target = Target.from_marginals(marginals)
    probs = {n: probabilities(24, len(s), i) for i, (n, s) in enumerate(marginals.items())}
    plan = expected_joint(probs, target, np.random.default_rng(0), draws=500)
    assert np.allclose(plan.reshape(24, -1).sum(1), 1)
    counts = plan.reshape(24, -1).sum(0)
    assert np.abs(counts - 24 * target.table.ravel()).max() < 0.5  # 24 p up to Monte Carlo error


def test_binary_expected_counts_equal_the_target_share():
    assert expected_binary(probabilities(24, 2)[:, 1], 0.3)[:, 1].sum() == pytest.approx(24 * 0.3)


def test_labels_follow_a_permutation_of_the_faces():
    target = Target.from_marginals({"g": [0.5, 0.5], "r": [0.25] * 4})
    probs = {"g": probabilities(16, 2, 1), "r": probabilities(16, 4, 2)}
    order = np.random.default_rng(3).permutation(16)
    straight = assign(probs, target, np.random.default_rng(0))
    shuffled = assign({k: v[order] for k, v in probs.items()}, target, np.random.default_rng(0))
    for name in probs:
        assert (straight.classes[name][order] == shuffled.classes[name]).all()
        assert np.allclose(straight.confidence[name][order], shuffled.confidence[name])


def test_a_batch_that_already_meets_the_target_keeps_its_classes():
    classes = np.arange(24) % 4
    probs = np.full((24, 4), 0.01) + 0.96 * np.eye(4)[classes]
    labels = assign({"r": probs}, Target.from_marginals({"r": [0.25] * 4}), np.random.default_rng(0))
    kept = labels.kept("r", 0.8)
    assert kept.sum() >= 8
    assert (labels.classes["r"][kept] == classes[kept]).all()


def test_a_joint_target_that_is_no_product_is_met():
    table = np.array([[0.5, 0.0], [0.0, 0.5]])  # class 0 of one attribute goes with class 0 of the other
    probs = {"x": probabilities(20, 2, 4), "y": probabilities(20, 2, 5)}
    plan = expected_joint(probs, Target(("x", "y"), table), np.random.default_rng(0), draws=300)
    assert plan[:, 0, 1].sum() == plan[:, 1, 0].sum() == 0


def test_no_faces_give_no_labels():
    labels = assign({"g": np.zeros((0, 2))}, Target.from_marginals({"g": [0.5, 0.5]}), np.random.default_rng(0))
    assert len(labels.classes["g"]) == len(labels.confidence["g"]) == 0


def test_smallest_batch_is_the_first_with_a_confident_label():
    for share in (0.1, 0.25, 0.5):
        faces = smallest_batch(share, 0.8)
        probs = np.linspace(0.1, 0.9, faces)
        assert expected_binary(probs, share)[:, 1].max() >= 0.8
        assert expected_binary(probs[1:], share)[:, 1].max() < 0.8


def test_shares_must_sum_to_one():
    with pytest.raises(ValueError, match="sum to 1"):
        Target.from_marginals({"g": [0.5, 0.6]})
