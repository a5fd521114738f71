"""Properties of the targets: marginals, permutation, closed form against transport, class weights."""

import time
from itertools import permutations

import numpy as np
import pytest
import torch

from fairdiff.objective.losses import alignment_loss
from fairdiff.objective.targets import (
    Target,
    Targets,
    assign,
    drawn_counts,
    every_count,
    expected_binary,
    expected_joint,
    mean_plan,
    smallest_batch,
)


def probabilities(faces, classes, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(classes) * 0.5, faces)


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


CLASSES = {"gender": ["female", "male"], "race": ["White", "Black", "Indian", "Asian"]}
TABLE = np.array([[0.30, 0.10, 0.05, 0.05], [0.05, 0.05, 0.10, 0.30]])


def law(probs, target, kind, draws=256):
    """Return the plan from all count vectors ("exact") or from sampled ones ("drawn")."""
    faces, shares = len(next(iter(probs.values()))), target.table.ravel()
    rng = np.random.default_rng(1)
    counts = every_count(faces, shares) if kind == "exact" else drawn_counts(faces, shares, rng, draws)
    return mean_plan(probs, target.table.shape, *counts)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.9])
@pytest.mark.parametrize("kind,error", [("exact", 1e-9), ("drawn", 0.03)])
def test_transport_agrees_with_the_closed_form(share, kind, error):
    probs = probabilities(12, 2)
    target = Target.from_marginals({"gender": [1 - share, share]})
    plan = law({"gender": probs}, target, kind, draws=4000)
    assert np.abs(expected_binary(probs[:, 1], share) - plan).max() < error


def test_drawn_samples_approach_all_samples():
    probs = {"r": probabilities(6, 3)}
    target = Target.from_marginals({"r": [0.5, 0.3, 0.2]})
    assert np.abs(law(probs, target, "exact") - law(probs, target, "drawn", 4000)).max() < 0.03


def test_every_count_is_the_multinomial_distribution():
    shares = np.array([0.5, 0.0, 0.3, 0.2])
    counts, weights = every_count(5, shares)
    assert len(np.unique(counts, axis=0)) == len(counts) == 21 and (counts.sum(1) == 5).all()
    assert weights.sum() == pytest.approx(1) and np.allclose(weights @ counts, 5 * shares)
    assert (every_count(3, np.array([0.0, 1.0]))[0] == [[0, 3]]).all()


def test_each_plan_is_the_cheapest_of_all_assignments():
    probs = probabilities(5, 3, 2)
    counts = np.array([2, 1, 2])
    plan = mean_plan({"r": probs}, (3,), counts[None], np.ones(1))
    cost = np.linalg.norm(probs[:, None] - np.eye(3)[None], axis=2)
    columns = np.repeat(np.arange(3), counts)
    cheapest = min(sum(cost[f, columns[c]] for f, c in enumerate(p)) for p in permutations(range(5)))
    assert (plan * cost).sum() == pytest.approx(cheapest)


@pytest.mark.parametrize("kind", ["exact", "drawn"])
def test_the_order_of_attributes_and_classes_changes_no_label(kind):
    probs = {"gender": probabilities(6, 2, 1), "race": probabilities(6, 4, 2)}
    straight = Target(("gender", "race"), TABLE)
    turned = Target(("race", "gender"), TABLE.T[::-1])
    mirrored = {"race": probs["race"][:, ::-1], "gender": probs["gender"]}
    if kind == "exact":
        a, b = law(probs, straight, kind), law(mirrored, turned, kind)
        assert np.allclose(a, b.transpose(0, 2, 1)[:, :, ::-1])
    else:  # the samples differ, the expectation does not
        a, b = law(probs, straight, kind, 2000), law(mirrored, turned, kind, 2000)
        assert np.abs(a - b.transpose(0, 2, 1)[:, :, ::-1]).max() < 0.08


def test_a_joint_table_sums_to_its_marginals_in_any_order():
    target = Target(("gender", "race"), TABLE)
    assert np.allclose(target.marginal("gender"), 0.5) and np.allclose(
        target.marginal("race"), [0.35, 0.15, 0.15, 0.35]
    )
    assert np.array_equal(target.marginal("race", "gender"), TABLE.T)
    both = Target.from_marginals({"age": [0.75, 0.25]}).times(target, "gender", "age", "race")
    assert np.allclose(both.marginal("gender", "race"), TABLE) and np.allclose(both.marginal("age"), [0.75, 0.25])


def test_sixteen_corners_and_sixty_four_faces_take_no_time():
    target = Target.from_marginals({"g": [0.5, 0.5], "r": [0.25] * 4, "a": [0.75, 0.25]})
    probs = {n: probabilities(64, k, k) for n, k in (("g", 2), ("r", 4), ("a", 2))}
    began = time.process_time()
    assign(probs, target, np.random.default_rng(0))
    assert time.process_time() - began < 0.5  # 24 ms of one core


def test_the_audit_gets_joints_only_where_they_are_no_product():
    groups = {"gender": ("gender",), "race": ("race",), "gender×race": ("gender", "race")}
    common = Targets(Target(("race", "gender"), TABLE.T)).audited(groups, ["x", "y"])
    assert np.allclose(common["gender×race"], TABLE.ravel()) and common["gender"].shape == (2,)
    product = Target.from_marginals({"gender": [0.3, 0.7], "race": [0.25] * 4})
    assert set(Targets(product).audited(groups, ["x"])) == {"gender", "race"}
    rows = Targets(None, {"x": product, "y": Target(("gender", "race"), TABLE)}).audited(groups, ["y", "x"])
    assert rows["gender×race"].shape == (2, 8) and np.allclose(rows["gender"], [[0.5, 0.5], [0.3, 0.7]])


def test_no_marginal_is_above_one_by_rounding():
    """.30 + .28 + .34 + .08 is 1.0000000000000002, for which exact tests raise an error."""
    target = Target.from_marginals({"gender": [1.0, 0.0], "race": [0.30, 0.28, 0.34, 0.08]})
    assert target.table.sum(1)[0] > 1
    assert target.marginal("gender").tolist() == [1.0, 0.0]
    assert np.allclose(target.marginal("race", "gender"), target.table.T, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shares", [[0.9, 0.1], [0.5, 0.5], [0.7, 0.2, 0.06, 0.04]])
def test_pushes_of_faces_that_meet_the_target_cancel(shares):
    """Each face is pushed towards its own class by 1 - p, equal for all faces, and equally away from the others."""
    k, faces = len(shares), 100
    target = Target.from_marginals({"other": [0.3, 0.7], "a": shares})
    label = torch.repeat_interleave(torch.arange(k), torch.tensor([round(s * faces) for s in shares]))
    logits = (4.0 * torch.eye(k)[label]).requires_grad_()
    weights = torch.from_numpy(target.class_weights("a"))
    alignment_loss(logits, label, torch.ones(faces, dtype=torch.bool), weights).sum().backward()
    assert torch.allclose(logits.grad.sum(0), torch.zeros(k), atol=1e-5)
    assert weights[label].mean().item() == pytest.approx(1)


def test_a_class_that_nobody_shall_have_weighs_nothing():
    weights = Target.from_marginals({"a": [0.0, 0.5, 0.5]}).class_weights("a")
    assert weights.tolist() == pytest.approx([0, 2 / 3, 2 / 3])


@pytest.mark.parametrize("faces,share,unweighted", [(40, 0.25, 0.2), (40, 0.1, 0.014), (24, 0.1, 0.009)])
def test_batches_are_pushed_back_to_the_target_from_both_sides(faces, share, unweighted):
    """Without weights, confident labels push away from the rarer class although its share is already too small.

    unweighted: the share at which the push without weights is 0.
    """
    target = Target.from_marginals({"a": [1 - share, share]})
    weight = target.class_weights("a")

    def push(seen: float) -> np.ndarray:
        """Return the mean push towards the rarer class, unweighted and weighted, with five standard errors of each."""
        rng, pushes = np.random.default_rng(0), []
        for _ in range(1000):
            logit = np.where(rng.random(faces) < seen, 1, -1) * np.abs(rng.normal(4, 2, faces))
            probs = np.stack([1 / (1 + np.exp(logit)), 1 / (1 + np.exp(-logit))], 1)
            labels = assign({"a": probs}, target, rng)
            y = labels.classes["a"]
            each = np.where(y == 1, 1, -1) * (1 - probs[np.arange(faces), y]) * labels.kept("a", 0.8)
            pushes.append([each.sum(), (weight[y] * each).sum()])
        return np.array([np.mean(pushes, 0), 5 * np.std(pushes, 0) / len(pushes) ** 0.5])

    (plain, _), error = push(unweighted)
    assert abs(plain) < error[0]
    (plain, below), error = push(share - 0.03)
    assert plain < -error[0] and below > error[1]
    (_, above), error = push(share + 0.03)
    assert above < -error[1]


def test_given_a_class_the_others_keep_what_they_are_beside_it():
    table = np.array([[0.1, 0.3], [0.6, 0.0]])
    target = Target(("gender", "age"), table)
    assert target.given("gender", 0).table == pytest.approx(np.array([[0.25, 0.75], [0, 0]]))
    assert target.given("age", 1).table == pytest.approx(np.array([[0, 1], [0, 0]]))
    nobody = Target(("gender", "age"), np.array([[0.4, 0.6], [0.0, 0.0]]))  # the others' own shares where there are none
    assert nobody.given("gender", 1).table == pytest.approx(np.array([[0, 0], [0.4, 0.6]]))
    probs = {"gender": np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])}
    labels = assign(probs, Target.from_marginals({"gender": [0.5, 0.5]}).given("gender", 1), np.random.default_rng(0))
    assert labels.classes["gender"].tolist() == [1, 1, 1] and labels.kept("gender", 0.99).all()


def test_a_prompt_with_a_target_of_its_own_goes_before_the_common_one():
    common, own = Target.from_marginals({"gender": [0.5, 0.5]}), Target.from_marginals({"gender": [1, 0]})
    targets = Targets(common, {"a nurse, a woman": own})
    assert targets.of("a nurse, a woman") is own and targets.of("a nurse") is common and targets.known() == [common, own]
    assert targets.audited({"gender": ("gender",)}, ["a nurse"])["gender"] == pytest.approx([0.5, 0.5])
