"""Laws of the terms in a step: apart at the pictures they are the whole loss's gradient, shares, weight 0, balance."""

import pytest
import torch
from tiny import TinyEncoder, make_trainee

from fairdiff import step
from fairdiff.balance import Balance
from fairdiff.models import load_model
from fairdiff.sampling import initial_noise
from fairdiff.step import Batch, training_step
from fairdiff.terms import Counts, Part

PROMPT = "a photo of the face of a nurse"


def batch():
    return Batch(PROMPT, list(range(6)), 3, 0, torch.Generator().manual_seed(0))


def unlike(trainee):
    """Move the adapter, so that x differs from o and every term has a gradient."""
    for p in trainee.adapter.parameters():
        p.data.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    return trainee


def test_terms_taken_apart_at_the_pictures_are_one_gradient_at_the_latents(tiny_model):
    trainee = unlike(make_trainee(tiny_model, attributes=("gender", "race")))
    model, objective = tiny_model, trainee.objective
    latents = initial_noise(PROMPT, 1, range(6), model.latent_shape)
    with torch.no_grad():
        seen = [trainee.judges.see(model.decode(z)) for z in latents.split(4)]
    keep = torch.tensor([True, True, False, True, True, True])
    labels = {"gender": torch.tensor([0, 1, 0, 1, 0, 1]), "race": torch.tensor([0, 1, 2, 3, 0, 1])}
    originals = trainee.originals.get(PROMPT, list(range(6)), 3)
    part = Part(originals, labels, {"gender": keep, "race": ~keep})
    counts = Counts(6, 6, {"gender": 5, "race": 1})
    values, grads = step.term_gradients(trainee, seen, part, counts)
    total = sum(grads.values()).split(4)
    ours = torch.cat([step.pull_back(model, z, g) for z, g in zip(latents.split(4), total, strict=True)])

    z = latents.clone().requires_grad_()
    now = trainee.judges.see(model.decode(z))
    terms = {
        "align": step.align_term(now, part, counts),
        "image": step.image_term(trainee.judges, objective.damping, now, part, counts),
        "face": step.face_term(trainee.judges, objective.confident_class, now, part, counts),
    }
    total = objective.align * terms["align"] + objective.image * terms["image"] + objective.face * terms["face"]
    (whole,) = torch.autograd.grad(total, z)
    assert values == pytest.approx({k: v.item() for k, v in terms.items()}, rel=1e-4)
    assert (ours - whole).norm() / whole.norm() < 1e-5


def test_shares_of_the_gradient_sum_to_one_and_follow_the_weights(tiny_folder):
    one, three = (
        training_step(unlike(make_trainee(load_model(tiny_folder), image=weight)), batch()).grad_share
        for weight in (1.0, 3.0)
    )
    assert sum(one.values()) == pytest.approx(1) and min(one.values()) > 0
    assert three["image"] / three["align"] == pytest.approx(3 * one["image"] / one["align"], rel=1e-4)
    assert three["face"] / three["align"] == pytest.approx(one["face"] / one["align"], rel=1e-4)


class NoGraph(TinyEncoder):
    """An encoder that refuses to build a graph."""

    def image(self, image_BCHW):
        out = super().image(image_BCHW)
        assert not out.requires_grad
        return out


def test_a_term_of_weight_zero_is_measured_without_a_graph(tiny_model):
    trainee = unlike(make_trainee(tiny_model, image=0.0))
    trainee.judges.encoders[0] = NoGraph()
    result = training_step(trainee, batch())
    assert result.terms["image"] > 0 and set(result.grad_share) == {"align", "face"}
    assert trainee.adapter.parameters()[0].grad.norm() > 0


def test_balance_brings_the_first_step_to_the_shares_asked_for(tiny_model):
    trainee = unlike(make_trainee(tiny_model))
    trainee.balance = Balance({"align": 0.5, "image": 0.2, "face": 0.3})
    assert training_step(trainee, batch()).grad_share == pytest.approx(trainee.balance.shares)


def test_a_gradient_that_is_not_finite_is_refused_before_the_replay(tiny_model):
    trainee = unlike(make_trainee(tiny_model))
    trainee.balance = Balance({"align": 0.5, "image": 0.2, "face": 0.3})
    trainee.originals.get(PROMPT, list(range(6)), 3)
    for row in next(iter(trainee.originals.rows.values())).values():
        row["feature.0"] = row["feature.0"] * float("nan")
    result = training_step(trainee, batch())
    assert "not finite" in result.trouble and trainee.balance.mass == 0
    assert trainee.adapter.parameters()[0].grad is None
