"""The three terms of the loss on one micro-batch of images: detections, labels and originals to a number.

Every term is a sum over the micro-batch divided by B, the number of images of the *whole* batch (Shen et al., ICLR 2024,
equations 5 to 7: each a mean over the images), so that micro-batches of any size add up to the same loss, and an image
without a face or without a confident label adds 0. Shapes: b images, F of them with a face, A attributes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairdiff.objective.losses import (
    Damping,
    alignment_loss,
    changing,
    damp_gradient,
    intersect,
    preservation_loss,
    realism_loss,
    smallest_factor,
)
from fairdiff.objective.perception import Judges, Seen


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


def align_term(now: Seen, part: Part, images: int) -> Tensor:
    """Sum over attributes and kept faces of w_y CE(h(x_f), y_f), divided by the images B of the whole batch."""
    return sum(
        alignment_loss(now.logits[a], part.labels[a], part.kept[a], part.weights[a]).sum() for a in part.labels
    ) / images


def image_term(judges: Judges, damping: dict[str, Damping], now: Seen, part: Part, images: int) -> Tensor:
    """Sum of m_i L_img,i over compared images, divided by B.

    m_i is the smallest `keep_outside` of the attributes that change, and inside the boxes' intersection the gradient is
    multiplied by the smallest `keep_face` of them; both are 1 where every attribute stays and without a face in x or o.
    """
    row_F = now.faces.row_F
    both_F = part.originals["found"][row_F]
    weight_B, keep_B = part.compared.clone(), torch.ones_like(part.compared)
    change_AF = changing(*_stack(part, row_F))[:, both_F]
    for value_B, name in ((weight_B, "keep_outside"), (keep_B, "keep_face")):
        factor_A = torch.tensor([getattr(damping[a], name) for a in part.labels], device=row_F.device)
        value_B[row_F[both_F]] *= smallest_factor(change_AF, factor_A)
    image = damp_gradient(now.image_BCHW, intersect(now.box_B4(), part.originals["box"]), keep_B)
    features = [part.originals[f"feature.{i}"] for i in range(len(judges.encoders))]
    return (weight_B * preservation_loss(judges.features(image), features)).sum() / images


def face_term(judges: Judges, confident_class: float, now: Seen, part: Part, images: int) -> Tensor:
    """Sum of L_face over the faces of compared images, divided by B.

    The target is o's own face where every attribute stays and h is at least `confident_class` sure of it in o, else the
    nearest face of the bank.
    """
    row_F = now.faces.row_F
    if not len(row_F):
        return now.image_BCHW.new_zeros(())
    aligned = now.faces.aligned_FCHW
    embedding = judges.embed(aligned)
    mirrored = judges.embed(aligned.flip(-1))
    sure = torch.stack([part.originals[f"probs.{a}"][row_F].amax(1) for a in part.labels])
    same = (~changing(*_stack(part, row_F)) & (sure >= confident_class)).all(0)
    same &= part.originals["found"][row_F]
    target = torch.where(same[:, None], part.originals["face"][row_F], judges.bank.nearest(embedding.detach()))
    return (part.compared[row_F] * realism_loss(embedding, mirrored, target)).sum() / images


def _stack(part: Part, row_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, kept flags and the classes of o, each [A, F]."""
    original = torch.stack([part.originals[f"probs.{a}"][row_F].argmax(1) for a in part.labels])
    return torch.stack(list(part.labels.values())), torch.stack(list(part.kept.values())), original


def gradient_at(value: Tensor, pixels: Tensor) -> Tensor:
    """d value / d pixels, zeros where there is no path; keeps the graph, which the terms share."""
    grad = torch.autograd.grad(value, pixels, retain_graph=True, allow_unused=True)[0] if value.requires_grad else None
    return torch.zeros_like(pixels) if grad is None else grad
