"""The three terms of the loss on one micro-batch of pictures: what has been seen, labels and originals to a number.

Every term is a sum over the micro-batch divided by what was counted in the *whole* batch, so that micro-batches of any
size add up to the same loss. Shapes: b images, F of them with a face, A attributes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairdiff.judges import Judges, Seen
from fairdiff.losses import (
    Damping,
    alignment_loss,
    damp_gradient,
    intersect,
    preservation_loss,
    preservation_weight,
    realism_loss,
)


@dataclass(frozen=True)
class Counts:
    """What the terms are divided by: images, faces and confident labels per attribute of the whole global batch."""

    images: int
    faces: int
    kept: dict[str, int]


@dataclass(frozen=True)
class Part:
    """What some pictures are compared with: originals [b, ...], labels and kept flags of their faces per attribute.

    compared: what each picture weighs in the terms that need its original [b], 0 where it has none, see
    `Originals.sampled_rows`. weights: of each attribute's classes [K], see `Target.class_weights`.
    """

    originals: dict[str, Tensor]
    compared: Tensor
    labels: dict[str, Tensor]
    kept: dict[str, Tensor]
    weights: dict[str, Tensor]

    def rows(self, images: slice, faces: slice) -> "Part":
        """The part of one micro-batch."""
        return Part(
            {name: tensor[images] for name, tensor in self.originals.items()},
            self.compared[images],
            {a: label[faces] for a, label in self.labels.items()},
            {a: kept[faces] for a, kept in self.kept.items()},
            self.weights,
        )


def align_term(now: Seen, part: Part, counts: Counts) -> Tensor:
    """Sum over attributes of w_y CE over this part's kept faces / kept faces of that attribute in the whole batch."""
    return sum(
        alignment_loss(now.logits[a], part.labels[a], part.kept[a], part.weights[a]).sum() / max(n, 1)
        for a, n in counts.kept.items()
    )


def image_term(judges: Judges, damping: dict[str, Damping], now: Seen, part: Part, counts: Counts) -> Tensor:
    """Sum of m_i L_img,i / images over compared pictures, its gradient damped where the face boxes of x and o overlap."""
    row_F = now.faces.row_F
    both_F = part.originals["found"][row_F]
    weight = part.compared.clone()
    keep_outside = torch.tensor([damping[a].keep_outside for a in part.labels], device=row_F.device)
    weight[row_F[both_F]] *= preservation_weight(*_stack(part, row_F), keep_outside)[both_F]
    keep_face = min(damping[a].keep_face for a in part.labels)
    image = damp_gradient(now.image_BCHW, intersect(now.box_B4(), part.originals["box"]), keep_face)
    features = [part.originals[f"feature.{i}"] for i in range(len(judges.encoders))]
    return (weight * preservation_loss(judges.features(image), features)).sum() / counts.images


def face_term(judges: Judges, confident_class: float, now: Seen, part: Part, counts: Counts) -> Tensor:
    """Sum of L_face / faces over compared pictures; the target is o's own face where every label is o's confident
    class, else the nearest of the bank."""
    row_F = now.faces.row_F
    if not len(row_F):
        return now.image_BCHW.new_zeros(())
    aligned = now.faces.aligned_FCHW
    embedding = judges.embed(aligned)
    mirrored = judges.embed(aligned.flip(-1))
    labels, kept, original = _stack(part, row_F)
    sure = torch.stack([part.originals[f"probs.{a}"][row_F].amax(1) for a in part.labels])
    same = (kept & (labels == original) & (sure >= confident_class)).all(0)
    same &= part.originals["found"][row_F]
    target = torch.where(same[:, None], part.originals["face"][row_F], judges.bank.nearest(embedding.detach()))
    return (part.compared[row_F] * realism_loss(embedding, mirrored, target)).sum() / counts.faces


def _stack(part: Part, row_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, kept flags and the original's classes, each [A, F]."""
    original = torch.stack([part.originals[f"probs.{a}"][row_F].argmax(1) for a in part.labels])
    return torch.stack(list(part.labels.values())), torch.stack(list(part.kept.values())), original


def gradient_at(value: Tensor, pixels: Tensor) -> Tensor:
    """d value / d pixels, zeros where there is no path; keeps the graph, which the terms share."""
    grad = torch.autograd.grad(value, pixels, retain_graph=True, allow_unused=True)[0] if value.requires_grad else None
    return torch.zeros_like(pixels) if grad is None else grad
