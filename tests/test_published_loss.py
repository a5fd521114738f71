"""Our loss terms equal an independent implementation of the published loss, in value and in pixel gradient."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import TinyEmbedder, TinyEncoder, tiny_bank

from classifiers.types import Boxes
from fairdiff.objective.losses import Damping, Part
from fairdiff.objective.perception import Perception
from fairdiff.objective.targets import Target, Targets
from fairdiff.training.step import Objective, batch_terms

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from benchmark.published import Constants, Generated, Original, published_terms  # noqa: E402

SIDE, FACE, IMAGES = 24, 16, 40
CLASSES = {"gender": 2, "race": 4, "age": 2}
DAMPING = {"gender": Damping(0.2, 0.25), "race": Damping(0.6, 0.3), "age": Damping(0.5, 0.4)}
WEIGHTS = {"align": 1.0, "image": 8.0, "face": 0.5}


class Classifier(torch.nn.Module):
    """A classifier with random linear logits of three attributes."""

    def __init__(self, names):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.heads = {a: torch.randn(3 * FACE * FACE, CLASSES[a], generator=generator) / 8 for a in names}
        self.attributes = {a: tuple(map(str, range(CLASSES[a]))) for a in names}

    def forward(self, crop_FCHW):
        return {a: (crop_FCHW - 0.5).flatten(1) @ head for a, head in self.heads.items()}


class Scene:
    """Random images, boxes, originals and labels: faces missing in x, in o and in both; labels missing, equal, different."""

    def __init__(self, names):
        self.generator = torch.Generator().manual_seed(0)
        self.names = names
        self.pixels = torch.rand(IMAGES, 3, SIDE, SIDE, generator=self.generator)
        self.box_x, self.box_o = (self.boxes() for _ in range(2))
        self.probs = {a: self.draw_probs(CLASSES[a]) for a in names}
        self.label = [
            {a: self.draw_label(int(self.probs[a][i].argmax()), CLASSES[a]) for a in names} for i in range(IMAGES)
        ]
        other = torch.rand(IMAGES, 3, SIDE, SIDE, generator=self.generator)
        self.feature = TinyEncoder().image(other)
        self.face = F.normalize(torch.randn(IMAGES, 12, generator=self.generator), dim=1)

    def integer(self, high):
        return int(torch.randint(high, (), generator=self.generator))

    def boxes(self):
        """A face of 16 x 16 whole pixels in five of six images: its crop is a slice."""
        corners = [(self.integer(SIDE - FACE), self.integer(SIDE - FACE)) for _ in range(IMAGES)]
        return [None if i % 6 == self.integer(6) else (x, y, x + FACE, y + FACE) for i, (x, y) in enumerate(corners)]

    def draw_probs(self, classes):
        return (6 * torch.randn(IMAGES, classes, generator=self.generator)).softmax(1)

    def draw_label(self, original, classes):
        """Return None, the class of the reference image (most often, so that attributes may agree), or another."""
        kind = self.integer(6)
        return None if kind == 0 else original if kind < 5 else (original + 1 + self.integer(classes - 1)) % classes


def ours(scene, pixels, size):
    """Return the terms of our code over micro-batches of `size` images."""
    names = scene.names
    rows = [i for i, box in enumerate(scene.box_x) if box]
    perception = Perception(None, Classifier(names), [TinyEncoder()], TinyEmbedder(), tiny_bank(), FACE, 1.0)
    whole = Part(
        {"feature.0": scene.feature, "face": scene.face, "found": torch.tensor([b is not None for b in scene.box_o])}
        | {"box": torch.tensor([b or (0, 0, 0, 0) for b in scene.box_o]).float()}
        | {f"probs.{a}": p for a, p in scene.probs.items()},
        torch.ones(IMAGES),
        {a: torch.tensor([scene.label[i][a] or 0 for i in rows]) for a in names},
        {a: torch.tensor([scene.label[i][a] is not None for i in rows]) for a in names},
        {a: torch.ones(CLASSES[a]) for a in names},
    )
    uniform = Target.from_marginals({a: [1 / CLASSES[a]] * CLASSES[a] for a in names})
    damping = {a: DAMPING[a] for a in names}
    objective = Objective(Targets(uniform), damping, 0.8, False, *WEIGHTS.values(), confident_class=0.9)
    trainee = type("Trainee", (), {"perception": perception, "objective": objective})
    totals = dict.fromkeys(WEIGHTS, 0.0)
    for start in range(0, IMAGES, size):
        inside = [i for i in rows if start <= i < start + size]
        part = pixels[start : start + size]
        box_F4 = torch.tensor([scene.box_x[i] for i in inside]).float().view(-1, 4)
        boxes = Boxes(torch.tensor([i - start for i in inside]), box_F4, None, (len(part), SIDE, SIDE))
        faces = slice(rows.index(inside[0]), rows.index(inside[-1]) + 1)
        now = perception.classify_faces(part, boxes)
        for name, value in batch_terms(
            trainee, now, whole.rows(slice(start, start + size), faces), IMAGES
        ).items():
            totals[name] = totals[name] + value
    return totals


def published(scene, pixels):
    """Return the terms of the independent implementation, with crops that are slices."""
    classifier, embedder = Classifier(scene.names), TinyEmbedder()
    generated, originals = [], []
    for i, (box, other) in enumerate(zip(scene.box_x, scene.box_o, strict=True)):
        x = Generated(None, {}, {}, None, None)
        if box:
            crop = pixels[i : i + 1, :, box[1] : box[3], box[0] : box[2]]
            logits = {a: head[0] for a, head in classifier(crop).items()}
            x = Generated(box, logits, scene.label[i], embedder(crop)[0], embedder(crop.flip(-1))[0])
        generated.append(x)
        probs = {a: p[i] for a, p in scene.probs.items()}
        originals.append(Original(other, probs, [scene.feature[i]], scene.face[i] if other else None))
    keep = ({a: getattr(DAMPING[a], side) for a in scene.names} for side in ("keep_outside", "keep_face"))
    constants = Constants(IMAGES, *keep, 0.9, tiny_bank().embedding_ND)
    return published_terms(pixels, lambda x: [TinyEncoder().image(x)], generated, originals, constants)


@pytest.mark.parametrize("names", [("gender",), ("gender", "race"), ("gender", "race", "age")])
@pytest.mark.parametrize("size", [IMAGES, 10])
def test_the_terms_are_the_published_ones_in_value_and_gradient(names, size):
    scene = Scene(names)
    faces = [i for i, box in enumerate(scene.box_x) if box and scene.box_o[i]]
    kinds = [
        {"none" if label is None else label == int(scene.probs[a][i].argmax()) for a, label in scene.label[i].items()}
        for i in faces
    ]
    assert {"none", True, False} <= set().union(*kinds) and {True} in kinds  # every case is among them
    assert len(faces) < sum(box is not None for box in scene.box_x) < IMAGES
    gradients, values = [], []
    for terms_of in (lambda x: ours(scene, x, size), lambda x: published(scene, x)):
        pixels = scene.pixels.clone().requires_grad_()
        terms = terms_of(pixels)
        values.append({name: value.item() for name, value in terms.items()})
        gradients.append({n: torch.autograd.grad(t, pixels, retain_graph=True)[0] for n, t in terms.items()})
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    for name, expected in gradients[1].items():
        assert expected.norm() > 0
        assert (gradients[0][name] - expected).norm() / expected.norm() < 1e-5, name
