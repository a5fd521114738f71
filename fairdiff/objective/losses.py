"""The three losses of Shen et al. (ICLR 2024, sections 4.1 and 4.2), per image or face, then as terms of a batch.

A term is the sum of its losses over a micro-batch divided by B, the number of images of the *whole* batch (equations 5 to
7: each a mean over the images). So micro-batches of any size add up to the same loss, and an image without a face or
without a confident label adds 0.

Shapes: B images, b of them in a micro-batch, F faces (row_F: the image of each face), K classes, A attributes, D feature
dimensions. Nothing here samples, detects or loads a model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fairdiff.objective.perception import FaceBatch, Perception


@dataclass(frozen=True)
class Damping:
    """Factors on the image loss of images in which one attribute changes (appendix A.2 of the paper).

    keep_outside multiplies the whole image's loss, keep_face on top of it the gradient inside the face box; both in
    [0, 1]. Of several attributes that change the smallest counts.
    """

    keep_outside: float
    keep_face: float


def alignment_loss(logits_FK: Tensor, label_F: Tensor, kept_F: Tensor, weight_K: Tensor) -> Tensor:
    """w_y CE(h(x_f), y_f) [F] with a weight for each class, 0 where the label is not confident enough to be kept."""
    return F.cross_entropy(logits_FK, label_F, weight_K.to(logits_FK), reduction="none") * kept_F


def preservation_loss(features: list[Tensor], originals: list[Tensor]) -> Tensor:
    """L_img [B] = sum over encoders of 1 - cos(x_i, o_i); features [B, D] are L2-normalised. Range [0, 2 per encoder]."""
    return sum(1 - (x * o).sum(1) for x, o in zip(features, originals, strict=True))


def changing(labels_AF: Tensor, kept_AF: Tensor, original_AF: Tensor) -> Tensor:
    """Which attributes of each face change [A, F]: the label differs from the class of o, or no label is confident.

    A attributes; labels, original: class index; kept: bool, whether the label is confident. Every other attribute stays.
    """
    return ~kept_AF | (labels_AF != original_AF)


def smallest_factor(change_AF: Tensor, factor_A: Tensor) -> Tensor:
    """[F]: the smallest factor among the attributes that change, 1 for a face all of whose attributes stay."""
    return torch.where(change_AF, factor_A[:, None], 1.0).amin(0)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def damp_gradient(image_BCHW: Tensor, box_B4: Tensor, keep_B: Tensor) -> Tensor:
    """The images unchanged, the gradient of each multiplied by its keep inside its box (x0, y0, x1, y1).

    An empty box damps nothing.
    """
    height, width = image_BCHW.shape[-2:]
    y = torch.arange(height, device=image_BCHW.device) + 0.5
    x = torch.arange(width, device=image_BCHW.device) + 0.5
    x0, y0, x1, y1 = box_B4.unbind(1)
    inside = ((y >= y0[:, None]) & (y < y1[:, None]))[:, :, None] & ((x >= x0[:, None]) & (x < x1[:, None]))[:, None]
    return _ScaleGradient.apply(image_BCHW, torch.where(inside, keep_B[:, None, None], 1.0)[:, None])


def intersect(box_B4: Tensor, other_B4: Tensor) -> Tensor:
    """Intersection of two boxes per row; disjoint boxes give an empty box (x1 <= x0 or y1 <= y0)."""
    return torch.cat([torch.maximum(box_B4[:, :2], other_B4[:, :2]), torch.minimum(box_B4[:, 2:], other_B4[:, 2:])], 1)


def realism_loss(embedding_FD: Tensor, mirrored_FD: Tensor, target_FD: Tensor) -> Tensor:
    """L_face [F] = 1 - cos(f(face), target), the mean over the aligned crop and its mirror. Range [0, 2]."""
    return 1 - ((embedding_FD + mirrored_FD) * target_FD).sum(1) / 2


@dataclass(frozen=True)
class Part:
    """Comparison data of some images: reference features [b, ...], labels and kept flags of their faces for each attribute.

    compared: what each image weighs in the terms that need its original [b], 0 where it has none, see
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


def align_term(now: FaceBatch, part: Part, images: int) -> Tensor:
    """Sum over attributes and kept faces of w_y CE(h(x_f), y_f), divided by the images B of the whole batch."""
    return (
        sum(alignment_loss(now.logits[a], part.labels[a], part.kept[a], part.weights[a]).sum() for a in part.labels)
        / images
    )


def image_term(perception: Perception, damping: dict[str, Damping], now: FaceBatch, part: Part, images: int) -> Tensor:
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
    features = [part.originals[f"feature.{i}"] for i in range(len(perception.encoders))]
    return (weight_B * preservation_loss(perception.features(image), features)).sum() / images


def face_term(perception: Perception, confident_class: float, now: FaceBatch, part: Part, images: int) -> Tensor:
    """Sum of L_face over the faces of compared images, divided by B.

    The target is o's own face where every attribute stays and h is at least `confident_class` sure of it in o, else the
    nearest face of the bank.
    """
    row_F = now.faces.row_F
    if not len(row_F):
        return now.image_BCHW.new_zeros(())
    aligned_FCHW = perception.align(now)
    embedding = perception.embed(aligned_FCHW)
    mirrored = perception.embed(aligned_FCHW.flip(-1))
    sure = torch.stack([part.originals[f"probs.{a}"][row_F].amax(1) for a in part.labels])
    same = (~changing(*_stack(part, row_F)) & (sure >= confident_class)).all(0)
    same &= part.originals["found"][row_F]
    target = torch.where(same[:, None], part.originals["face"][row_F], perception.bank.nearest(embedding.detach()))
    return (part.compared[row_F] * realism_loss(embedding, mirrored, target)).sum() / images


def _stack(part: Part, row_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, kept flags and the classes of o, each [A, F]."""
    original = torch.stack([part.originals[f"probs.{a}"][row_F].argmax(1) for a in part.labels])
    return torch.stack(list(part.labels.values())), torch.stack(list(part.kept.values())), original


def gradient_at(value: Tensor, pixels: Tensor) -> Tensor:
    """d value / d pixels, zeros where there is no path; keeps the graph, which the terms share."""
    grad = torch.autograd.grad(value, pixels, retain_graph=True, allow_unused=True)[0] if value.requires_grad else None
    return torch.zeros_like(pixels) if grad is None else grad
