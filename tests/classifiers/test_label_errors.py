"""The reweighting program against linear programming, and what is dropped by group."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from classifiers.label_errors import (
    Relaxation,
    chosen_weights,
    estimated_share,
    gamma_of,
    groups_of,
    kept_weights,
    relaxed_weights,
    weights_by_group,
)
from classifiers.training import attacked, label_loss


def program(loss_N: np.ndarray, gamma: float) -> float:
    """The least value of sum (1/N + u_i) J_i + gamma/2 |u|_1, with u = p - m, p and m from 0 on."""
    n = len(loss_N)
    cost = np.concatenate([loss_N + gamma / 2, -loss_N + gamma / 2])
    balance = np.concatenate([np.ones(n), -np.ones(n)])[None]
    enough = np.hstack([-np.eye(n), np.eye(n)])  # m - p <= 1/N
    found = linprog(cost, enough, np.full(n, 1 / n), balance, [0.0], bounds=(0, None))
    return found.fun + loss_N.mean()


@pytest.mark.parametrize("seed", range(40))
def test_the_closed_form_is_the_best_of_the_program(seed):
    rng = np.random.default_rng(seed)
    loss_N = rng.exponential(size=rng.integers(2, 12))
    if seed % 4 == 0:
        loss_N = loss_N.round()  # ties, also for the best
    gamma = float(rng.choice([0, 0.1, 0.5, 1, 3]))
    weight_N = relaxed_weights(loss_N, gamma)
    assert weight_N.sum() == pytest.approx(1) and weight_N.min() >= 0
    value = (weight_N * loss_N).sum() + gamma / 2 * np.abs(weight_N - 1 / len(loss_N)).sum()
    assert value == pytest.approx(program(loss_N, gamma), abs=1e-9)
    kept_N = kept_weights(loss_N, gamma)
    assert ((kept_N > 0) == (weight_N > 0)).all() and kept_N.sum() == pytest.approx(1)
    assert len(set(kept_N[kept_N > 0].round(12))) == 1


@pytest.mark.parametrize("share", [0, 0.1, 0.25, 0.5])
def test_gamma_drops_the_share_it_is_asked_for(share):
    loss_N = np.random.default_rng(0).exponential(size=200)
    assert (kept_weights(loss_N, gamma_of(loss_N, share)) == 0).mean() == pytest.approx(share)
    assert gamma_of(np.ones(3), 0.5) == 0 and (kept_weights(np.ones(3), 0.0) > 0).all()


def test_by_group_a_minority_keeps_its_hard_faces_and_its_mass():
    rng = np.random.default_rng(0)
    group_N = np.repeat([0, 1, -1], [900, 100, 50])
    loss_N = rng.exponential(size=1050) + 2.0 * (group_N == 1)  # a minority that is hard for the network
    together = kept_weights(loss_N, gamma_of(loss_N, 0.1))
    assert (together[group_N == 1] == 0).mean() > 0.4
    apart = weights_by_group(loss_N, group_N, {0: 0.1, 1: 0.1})
    for group, mass in ((0, 0.9), (1, 0.1), (-1, 0.0)):
        assert apart[group_N == group].sum() == pytest.approx(mass)
    assert (apart[group_N == 1] == 0).mean() == pytest.approx(0.1)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_the_share_of_wrong_labels_is_found_from_good_answers(noise):
    rng = np.random.default_rng(0)
    true_N = rng.integers(0, 3, 3000)
    label_N = np.where(rng.random(3000) < noise, (true_N + rng.integers(1, 3, 3000)) % 3, true_N)
    probs_NK = np.eye(3)[true_N] * rng.uniform(0.6, 0.9, (3000, 1)) + rng.uniform(0.01, 0.1, (3000, 3))
    probs_NK /= probs_NK.sum(1, keepdims=True)
    assert estimated_share(probs_NK, label_N) == pytest.approx(noise, abs=0.04)
    weight_N = chosen_weights(probs_NK, label_N, np.zeros(3000, int), Relaxation())
    assert (weight_N == 0).mean() == pytest.approx(noise, abs=0.04)
    if noise:
        assert (label_N != true_N)[weight_N == 0].mean() > 0.95  # what is dropped is wrong


def test_no_group_loses_more_than_half_and_unlabelled_faces_have_no_weight():
    label_N = np.array([0, 0, 0, 0, 1, 1, -1])
    probs_NK = np.array([[0.1, 0.9]] * 4 + [[0.9, 0.1]] * 2 + [[0.5, 0.5]])
    weight_N = chosen_weights(probs_NK, label_N, label_N, Relaxation(share=1.0))
    assert (weight_N[:4] > 0).sum() >= 2 and weight_N[6] == 0 and weight_N.sum() == pytest.approx(1)
    assert len(set(groups_of({"a": label_N, "b": label_N % 2}, "a")[:6])) == 2
    assert groups_of({"a": label_N}, "a")[6] == -1


def test_when_weights_are_chosen():
    plan = Relaxation(warm_up=0.3, every=10)
    assert [step for step in range(100) if plan.due(step, 100)] == [30, 40, 50, 60, 70, 80, 90]


def test_the_mass_of_dropped_faces_goes_to_the_best_of_their_own_group():
    rng = np.random.default_rng(0)
    probs_NK, label_N, group_N = rng.dirichlet([1, 1], 60), rng.integers(0, 2, 60), rng.integers(0, 2, 60)
    kept, best = (chosen_weights(probs_NK, label_N, group_N, Relaxation(0.2, to_best=to_best)) for to_best in (False, True))
    assert ((kept > 0) == (best > 0)).all() and (kept == 0).any()
    for group in (0, 1):
        own = group_N == group
        assert best[own].sum() == pytest.approx(kept[own].sum()) == pytest.approx(own.mean())
        top = probs_NK[np.arange(60), label_N][own].argmax()
        assert best[own][top] == best[own].max() > 1.5 * kept[own].max()
        assert np.delete(best[own], top).max() == pytest.approx(1 / 60)


def test_an_attack_raises_the_loss_more_than_any_other_move_of_its_size_and_leaves_the_net_alone():
    torch.manual_seed(0)
    net, image_BD, true_B = torch.nn.Linear(12, 2), torch.rand(8, 12), torch.randint(0, 2, (8,))

    def loss_of(logits):
        return label_loss({"a": logits}, {"a": true_B}, 0.05)

    moved_BD = attacked(net, image_BD, 0.01, loss_of)
    assert (moved_BD - image_BD).abs().max() <= 0.01 + 1e-6 and not moved_BD.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    others = [image_BD + 0.01 * (2 * torch.randint(0, 2, image_BD.shape) - 1) for _ in range(50)]
    assert loss_of(net(moved_BD)) > max(loss_of(net(other)) for other in [image_BD, *others])
    assert (attacked(net, image_BD, 0.0, loss_of) == image_BD).all()
