"""The published loss, implemented independently of fairdiff image by image. Tests compare fairdiff's terms with it.

Source: Shen et al., "Finetuning Text-to-Image Diffusion Models for Fairness", ICLR 2024 (arXiv 2311.07604), sections 4.1
and 4.2 with appendix A.2, and its public code (sail-sg/finetune-fair-diffusion):

    L = 1/B sum_i [ sum_a CE(h_a(x_i), y_ia) + w_img m_i L_img(x_i, o_i) + w_face L_face(x_i) ]

An attribute stays where its confident label is the class of o_i. It changes where the label differs or is missing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


@dataclass
class Generated:
    """One image x_i: its face box, logits [K] and confident label (None if there is none) per attribute, and the unit
    embeddings of its aligned face and of the mirror image. Without a face, all are None or empty."""

    box: Box | None
    logits: dict[str, Tensor]
    label: dict[str, int | None]
    face: Tensor | None
    mirrored: Tensor | None


@dataclass
class Original:
    """The reference image o_i from the same noise: face box, class probabilities, features, face embedding."""

    box: Box | None
    probs: dict[str, Tensor]
    features: list[Tensor]
    face: Tensor | None


@dataclass
class Constants:
    """Constants of a batch. images: B. keep_outside, keep_face: factors per attribute. confident_class: the probability
    that h must give each class of o_i. bank: embeddings of real faces."""

    images: int
    keep_outside: dict[str, float]
    keep_face: dict[str, float]
    confident_class: float
    bank: Tensor | None


def published_terms(
    x_BCHW: Tensor,
    encode: Callable[[Tensor], list[Tensor]],
    generated: list[Generated],
    originals: list[Original],
    constants: Constants,
) -> dict[str, Tensor]:
    """Return the unweighted terms align, image and face as scalars; over micro-batches their gradients add up."""
    align, image, face = (x_BCHW.new_zeros(()) for _ in range(3))
    row_H1 = torch.arange(x_BCHW.shape[2], device=x_BCHW.device)[:, None] + 0.5
    column_W = torch.arange(x_BCHW.shape[3], device=x_BCHW.device) + 0.5
    factors, scales = [], []
    for i, (x, o) in enumerate(zip(generated, originals, strict=True)):
        for name, logits in x.logits.items():
            if x.label[name] is not None:
                align = align + torch.logsumexp(logits, 0) - logits[x.label[name]]
        changes = [name for name in constants.keep_outside if x.label.get(name) != int(o.probs[name].argmax())]
        factor, scale = 1.0, torch.ones_like(x_BCHW[i, :1])
        if x.box and o.box and changes:
            factor = min(constants.keep_outside[name] for name in changes)
            inside = torch.ones_like(scale, dtype=torch.bool)
            for x0, y0, x1, y1 in (x.box, o.box):
                inside &= (row_H1 >= y0) & (row_H1 < y1) & (column_W >= x0) & (column_W < x1)
            scale[inside] = min(constants.keep_face[name] for name in changes)
        factors.append(factor)
        scales.append(scale)
        if x.box and x.face is not None:
            sure = all(float(o.probs[name].max()) >= constants.confident_class for name in constants.keep_outside)
            similarity = constants.bank @ x.face.detach()
            target = o.face if o.box and sure and not changes else constants.bank[int(similarity.argmax())]
            face = face + 1 - (x.face @ target + x.mirrored @ target) / 2
    scale_B1HW = torch.stack(scales)
    damped = x_BCHW * scale_B1HW + (x_BCHW * (1 - scale_B1HW)).detach()  # the same image with a damped gradient
    for encoder, features_BD in enumerate(encode(damped)):
        for i, factor in enumerate(factors):
            image = image + factor * (1 - features_BD[i] @ originals[i].features[encoder])
    return {"align": align / constants.images, "image": image / constants.images, "face": face / constants.images}
