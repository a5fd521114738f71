"""Loss terms in a step: their separate gradients add up to that of the whole loss; shares, weight 0, balance."""

import copy
import weakref

import pytest
import torch
from tiny import TinyEncoder, make_trainee

from classifiers.detect import WholeImage
from classifiers.types import Boxes
from fairdiff.diffusion.denoise import Guidance
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.sampling import initial_noise, sample
from fairdiff.objective.balance import Balance
from fairdiff.objective.losses import Damping, Part, align_term, face_term, image_term, preservation_loss
from fairdiff.objective.targets import Target
from fairdiff.training import step
from fairdiff.training.step import Batch, StepResult, batch_terms, training_step

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
        seen = [trainee.perception.classify_faces(model.decode(z)) for z in latents.split(4)]
    keep = torch.tensor([True, True, False, True, True, True])
    labels = {"gender": torch.tensor([0, 1, 0, 1, 0, 1]), "race": torch.tensor([0, 1, 2, 3, 0, 1])}
    originals = trainee.originals.get(PROMPT, list(range(6)), 3)
    weights = {"gender": torch.tensor([0.5, 2.0]), "race": torch.tensor([1.0, 0.5, 2.0, 1.5])}
    compared = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0, 0.5])
    part = Part(originals, compared, labels, {"gender": keep, "race": ~keep}, weights)
    values, grads = step.term_gradients(trainee, seen, part, 6)
    total = sum(grads.values()).split(4)
    ours = torch.cat([step.pull_back(model, z, g) for z, g in zip(latents.split(4), total, strict=True)])

    z = latents.clone().requires_grad_()
    now = trainee.perception.classify_faces(model.decode(z))
    terms = {
        "align": align_term(now, part, 6),
        "image": image_term(trainee.perception, objective.damping, now, part, 6),
        "face": face_term(trainee.perception, objective.confident_class, now, part, 6),
    }
    total = objective.align * terms["align"] + objective.image * terms["image"] + objective.face * terms["face"]
    (whole,) = torch.autograd.grad(total, z)
    assert values == pytest.approx({k: v.item() for k, v in terms.items()}, rel=1e-4)
    assert (ours - whole).norm() / whole.norm() < 1e-5


@pytest.mark.parametrize("weigh_classes", [True, False])
def test_labels_weigh_by_their_class_unless_the_papers_cross_entropy_is_asked_for(tiny_model, weigh_classes):
    target = Target.from_marginals({"gender": [0.3, 0.7]})
    trainee = make_trainee(tiny_model, target=target, weigh_classes=weigh_classes)
    terms = training_step(trainee, batch()).terms

    guidance = Guidance(*step.embed_prompt(trainee, PROMPT), trainee.method.guidance)
    noise = initial_noise(PROMPT, 0, range(6), tiny_model.latent_shape)
    with torch.no_grad():
        final = sample(tiny_model.unet, tiny_model.scheduler, guidance, noise, 3).final
        seen = trainee.perception.classify_faces(tiny_model.decode(final))
    labels, _ = step.label_faces([seen], target, torch.Generator().manual_seed(0))
    label, kept = torch.from_numpy(labels.classes["gender"]), torch.from_numpy(labels.kept("gender", 0.8))
    assert len(label[kept].unique()) == 2
    each = torch.nn.functional.cross_entropy(seen.logits["gender"], label, reduction="none")
    by_hand = (torch.tensor([1 / 0.6, 1 / 1.4])[label] if weigh_classes else 1) * each
    assert kept.sum() < 6
    assert terms["align"] == pytest.approx(by_hand[kept].sum().item() / 6, rel=1e-4)


def test_shares_of_the_gradient_sum_to_one_and_follow_the_weights(tiny_folder):
    one, three = (
        training_step(unlike(make_trainee(load_model(tiny_folder), image=weight)), batch()).grad_share
        for weight in (1.0, 3.0)
    )
    assert sum(one.values()) == pytest.approx(1) and min(one.values()) > 0
    assert three["image"] / three["align"] == pytest.approx(3 * one["image"] / one["align"], rel=1e-4)
    assert three["face"] / three["align"] == pytest.approx(one["face"] / one["align"], rel=1e-4)


@pytest.mark.parametrize("balance", [None, Balance({"align": 0.6, "image": 0.4})])
def test_a_share_of_the_pictures_stands_for_all_in_shares_and_balance(balance):
    """For eight images of gradient norm 1, two with weight 4 have twice the norm of all eight."""
    align = torch.zeros(8, 12)  # apart from the other term, so that what each adds to the sum is its own
    align[:, 0] = 1
    whole = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    whole[:, 0] = 0
    whole = torch.nn.functional.normalize(whole)
    part = torch.cat([4 * whole[:2], torch.zeros(6, 12)])
    shares, added = [], []
    for image, compared in ((whole, 1.0), (part, 0.25)):
        result = StepResult({}, {}, 0, 0)
        total = step.add_up({"align": align, "image": image}, copy.deepcopy(balance), result, compared)
        shares.append(result.grad_share)
        added.append([(total[:, 0] / align[:, 0])[0].item(), (total[:2, 1:].norm() / image[:2].norm()).item()])
    assert shares[0] == pytest.approx(shares[1]) and added[0] == pytest.approx(added[1])


class Finds(WholeImage):
    """A detector that finds a face in the left half of the given images only."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, image_BCHW):
        boxes = super().__call__(image_BCHW)
        keep = torch.tensor([row in self.rows for row in boxes.row_F.tolist()])
        left_F4 = boxes.box_F4[keep] * torch.tensor([1, 1, 0.5, 1])
        return Boxes(boxes.row_F[keep], left_F4, None, boxes.size)


def test_image_term_by_hand_where_faces_are_missing_in_x_or_in_o(tiny_model):
    """Images 0: one changes, 1: all stay, 2: no label, 3: no face in o, 4: no face in x; 5: changes what is damped less."""
    trainee = unlike(make_trainee(tiny_model, attributes=("gender", "race"), detector=Finds({0, 1, 2, 3, 5})))
    trainee.objective.damping["gender"], trainee.objective.damping["race"] = Damping(0.2, 0.25), Damping(0.6, 0.5)
    pixels = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    now = trainee.perception.classify_faces(pixels)
    original = dict(trainee.originals.get(PROMPT, list(range(6)), 3))
    original["probs.gender"] = torch.tensor([[0.9, 0.1]] * 6)
    original["probs.race"] = torch.tensor([[0.1, 0.7, 0.1, 0.1]] * 6)
    original["found"] = torch.tensor([True, True, True, False, True, True])
    original["box"] = torch.tensor([[4.0, 0.0, 16.0, 16.0]] * 3 + [[0.0] * 4] + [[4.0, 0.0, 16.0, 16.0]] * 2)
    yes, no = True, False
    labels = {"gender": torch.tensor([1, 0, 1, 1, 0]), "race": torch.tensor([1, 1, 2, 2, 3])}
    kept = {"gender": torch.tensor([yes, yes, no, yes, yes]), "race": torch.tensor([yes, yes, no, yes, yes])}
    compared = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.5])
    part = Part(original, compared, labels, kept, {})
    term = image_term(trainee.perception, trainee.objective.damping, now, part, 6)
    distance = preservation_loss(trainee.perception.features(pixels), [original["feature.0"]])
    weight = torch.tensor([0.2, 1.0, 0.2, 1.0, 1.0, 0.6]) * compared
    assert term.item() == pytest.approx((weight * distance).sum().item() / 6)
    (damped,) = torch.autograd.grad(term, pixels, retain_graph=True)
    (plain,) = torch.autograd.grad((weight * distance).sum() / 6, pixels)
    ratio = damped / plain
    for image, keep in {0: 0.25, 1: 1.0, 2: 0.25, 5: 0.5}.items():
        assert torch.allclose(ratio[image][..., 4:8], torch.tensor(keep), atol=1e-3)
    both = [0, 1, 2, 5]
    for outside in (ratio[both][..., :4], ratio[both][..., 8:], ratio[[3, 4]]):
        assert torch.allclose(outside, torch.tensor(1.0), atol=1e-3)


def test_a_face_is_pulled_to_its_original_only_where_every_label_is_surely_its_class(tiny_model):
    """Faces 0: own original, 1: must change, 2: o not sure, 3: a label is missing, 4: no face in o."""
    trainee = make_trainee(tiny_model, attributes=("gender", "race"), detector=Finds({0, 1, 2, 3, 5}))
    perception = trainee.perception
    now = perception.classify_faces(torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    own = torch.nn.functional.normalize(torch.randn(6, 12, generator=torch.Generator().manual_seed(1)), dim=1)
    gender, race = torch.tensor([[0.95, 0.05]] * 6), torch.tensor([[0.02, 0.94, 0.02, 0.02]] * 6)
    gender[2] = torch.tensor([0.85, 0.15])
    found = torch.tensor([True, True, True, True, True, False])
    original = {"probs.gender": gender, "probs.race": race, "found": found, "face": own}
    labels = {"gender": torch.tensor([0, 1, 0, 0, 0]), "race": torch.ones(5, dtype=torch.long)}
    kept = {"gender": torch.ones(5, dtype=torch.bool), "race": torch.tensor([True, True, True, False, True])}
    compared = torch.tensor([1.0, 0.0, 2.0, 3.0, 9.0, 0.5])  # of the images; that of the fifth has no face
    term = face_term(perception, 0.9, now, Part(original, compared, labels, kept, {}), 6)
    face = perception.embed(perception.align(now))
    mirrored = perception.embed(perception.align(now).flip(-1))
    target = perception.bank.nearest(face)
    target[0] = own[0]
    each = 1 - ((face + mirrored) / 2 * target).sum(1)
    assert term.item() == pytest.approx((compared[[0, 1, 2, 3, 5]] * each).sum().item() / 6)


class NoGraph(TinyEncoder):
    """An encoder that fails if it would build a graph."""

    def image(self, image_BCHW):
        out = super().image(image_BCHW)
        assert not out.requires_grad
        return out


def test_a_term_of_weight_zero_is_measured_without_a_graph(tiny_model):
    trainee = unlike(make_trainee(tiny_model, image=0.0))
    trainee.perception.encoders[0] = NoGraph()
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
    assert "not finite" in result.skipped and trainee.balance.mass == 0
    assert trainee.adapter.parameters()[0].grad is None


def test_the_first_balanced_step_of_lora_does_not_depend_on_rounding(tiny_folder):
    """Its images equal their reference images, so the rounding error of the image term is not scaled up to its share."""

    def first(seed):
        trainee = make_trainee(load_model(tiny_folder), "lora_both")
        trainee.balance = Balance({"align": 0.6, "image": 0.3, "face": 0.1})
        frozen, noise = trainee.originals.generate, torch.Generator().manual_seed(seed)

        def rounded(*of):
            images = frozen(*of)
            return images + 1e-6 * torch.randn(images.shape, generator=noise)

        trainee.originals.generate = rounded
        training_step(trainee, batch())
        return torch.cat([p.grad.flatten() for p in trainee.adapter.parameters()])

    one, other = first(0), first(1)
    assert one.norm() > 0 and (one - other).norm() < 1e-3 * one.norm()


def test_one_micro_batchs_graph_is_alive_at_a_time(tiny_model, monkeypatch):
    alive, made = [], []

    trainee = make_trainee(tiny_model, decode_batch=2)
    classify_faces = trainee.perception.classify_faces

    def watched(found):
        made.extend(weakref.ref(value) for value in found.values() if value.requires_grad)

    def seen(pixels, boxes=None):
        if pixels.requires_grad:
            alive.append(sum(ref() is not None for ref in made))
        now = classify_faces(pixels, boxes)
        watched(now.logits)
        return now

    def counted(*args):
        terms = batch_terms(*args)
        watched(terms)
        return terms

    monkeypatch.setattr(step, "batch_terms", counted)
    trainee.perception.classify_faces = seen
    assert training_step(trainee, Batch("a nurse", list(range(8)), 3, 0, torch.Generator().manual_seed(0))).kept
    assert alive == [0, 0, 0, 0] and made
