"""The three losses of Shen et al. (ICLR 2024, section 4.1-4.2), each as one value per image or face.

Shapes: B images, F faces (row_F: the image of each face), K classes, D feature dimensions.
Nothing here samples, detects or loads a model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Damping:
    """How much of the image loss is kept where one attribute changes (appendix A.2 of the paper).

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
