"""Cut crops at boxes: differentiable in the pixels, antialiased, also for non-square images and boxes outside the frame.

An axis-aligned crop is separable, crop = R_y image R_x^T, with one small interpolation matrix per face and axis. So the
filter width follows each face's own scale, and the backward pass is a matrix product (deterministic on every device).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from classifiers.types import Boxes, Faces

# MTCNN's box ends at the hairline and the chin; 1.6 times its longer side shows the hair.
EXPAND = 1.6

# Eyes, nose and mouth corners of an aligned face, as fractions of the side: the 112 px template of ArcFace
# (Deng et al., CVPR 2019; insightface `face_align.arcface_dst`).
TEMPLATE_52 = (
    (0.341916, 0.461574),
    (0.656534, 0.459834),
    (0.500225, 0.640505),
    (0.370976, 0.824692),
    (0.631517, 0.823250),
)


def expand_box(box_F4: Tensor, expand: float) -> Tensor:
    """Return squares [F, 4] about the centres of the boxes with `expand` times their longer side; may leave the frame."""
    centre_F2 = (box_F4[:, :2] + box_F4[:, 2:]) / 2
    half_F1 = (box_F4[:, 2:] - box_F4[:, :2]).amax(1, keepdim=True) * expand / 2
    return torch.cat([centre_F2 - half_F1, centre_F2 + half_F1], 1)


def interpolation(start_F: Tensor, stop_F: Tensor, size: int, length: int) -> Tensor:
    """Return matrices R [F, size, length] that resample [start, stop) of an axis of `length` pixels to `size` pixels.

    They are triangle filters of half-width max(1, scale), cut at the frame and normalised. On the whole axis this equals
    `F.interpolate(mode="bilinear", antialias=True)`. Outside the frame the edge is repeated.
    """
    scale_F1 = ((stop_F - start_F) / size).unsqueeze(1)
    step = torch.arange(size, device=start_F.device, dtype=start_F.dtype) + 0.5
    centre_FS1 = (start_F.unsqueeze(1) + step * scale_F1).clamp(0, length).unsqueeze(2)
    pixel = torch.arange(length, device=start_F.device, dtype=start_F.dtype) + 0.5
    weight_FSL = (1 - (pixel - centre_FS1).abs() / scale_F1.clamp(min=1).unsqueeze(2)).clamp(min=0)
    return weight_FSL / weight_FSL.sum(2, keepdim=True)


def resample(image_BCHW: Tensor, row_F: Tensor, box_F4: Tensor, size: int) -> Tensor:
    """Resample the content of each box to [F, C, size, size], without keeping its aspect ratio."""
    height, width = image_BCHW.shape[-2:]
    box_F4 = box_F4.to(image_BCHW.dtype)
    vertical_FSH = interpolation(box_F4[:, 1], box_F4[:, 3], size, height)
    horizontal_FSW = interpolation(box_F4[:, 0], box_F4[:, 2], size, width)
    return vertical_FSH.unsqueeze(1) @ image_BCHW[row_F] @ horizontal_FSW.unsqueeze(1).transpose(2, 3)


def crop(image_BCHW: Tensor, boxes: Boxes, size: int, expand: float = EXPAND) -> Tensor:
    """Return square crops [F, C, size, size] about the boxes; gradients reach the pixels, boxes are constants."""
    check_size(image_BCHW, boxes)
    return resample(image_BCHW, boxes.row_F, expand_box(boxes.box_F4, expand), size)


def similarity(from_F52: Tensor, to_52: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least-squares similarity transform: complex a_F, b_F that minimise sum |a z + b - w|^2 over the points.

    a = sum (w - mean w) conj(z - mean z) / sum |z - mean z|^2, b = mean w - a mean z (Umeyama 1991 in the plane).
    """
    z_F5, w_5 = torch.view_as_complex(from_F52.contiguous()), torch.view_as_complex(to_52.contiguous())
    z_mean_F1, w_mean = z_F5.mean(1, keepdim=True), w_5.mean()
    spread_F = (z_F5 - z_mean_F1).abs().square().sum(1)
    a_F = ((w_5 - w_mean) * (z_F5 - z_mean_F1).conj()).sum(1) / spread_F
    return a_F, w_mean - a_F * z_mean_F1.squeeze(1)


def align(image_BCHW: Tensor, boxes: Boxes, size: int) -> Tensor:
    """Return aligned faces [F, C, size, size]: a similarity transform moves the landmarks onto ArcFace's template.

    It has two steps, so that large faces are antialiased too: an upright crop at the final scale that is 1.5 times as wide
    (the rotated square has a diagonal of 1.41), then the rotation by bilinear sampling. Without landmarks it crops the box.
    """
    check_size(image_BCHW, boxes)
    if boxes.landmark_F52 is None:
        return crop(image_BCHW, boxes, size, 1.0)
    template_52 = torch.tensor(TEMPLATE_52, device=image_BCHW.device) * size
    a_F, b_F = similarity(boxes.landmark_F52.float(), template_52)
    middle_F = (complex(size / 2, size / 2) - b_F) / a_F
    wide = math.ceil(size * 0.75) * 2
    half_F = wide / 2 / a_F.abs()
    upright_F4 = torch.stack(
        [middle_F.real - half_F, middle_F.imag - half_F, middle_F.real + half_F, middle_F.imag + half_F], 1
    )
    upright_FCHW = resample(image_BCHW, boxes.row_F, upright_F4, wide)
    # output positions relative to the centre, rotated back, in units of half the upright crop
    step = (torch.arange(size, device=image_BCHW.device) + 0.5 - size / 2) / (wide / 2)
    offset_HW = torch.complex(step.expand(size, size), step.unsqueeze(1).expand(size, size).contiguous())
    turned_FHW = (a_F.conj() / a_F.abs())[:, None, None] * offset_HW
    grid_FHW2 = torch.view_as_real(turned_FHW).to(image_BCHW.dtype)
    return F.grid_sample(upright_FCHW, grid_FHW2, align_corners=False)


def cut(image_BCHW: Tensor, boxes: Boxes, crop_size: int, expand: float, aligned: bool) -> Tensor:
    """Return the crop of each face for a judge: `align` if `aligned` (`expand` is then unused), otherwise `crop`."""
    return align(image_BCHW, boxes, crop_size) if aligned else crop(image_BCHW, boxes, crop_size, expand)


def extract(
    image_BCHW: Tensor, boxes: Boxes, crop_size: int, expand: float = EXPAND, aligned: bool = False
) -> Faces:
    """Return the boxes with the crops of their faces."""
    return Faces(boxes, cut(image_BCHW, boxes, crop_size, expand, aligned))


def check_size(image_BCHW: Tensor, boxes: Boxes) -> None:
    """Raise ValueError for boxes of another batch size or image size, such as swapped width and height."""
    batch, _, height, width = image_BCHW.shape
    if (batch, height, width) != boxes.size:
        raise ValueError(f"boxes belong to a batch (B, H, W) = {boxes.size}, the images are {(batch, height, width)}")
