"""Labelled faces in memory: convert image arrays to tensors, and cut the crops that a judge gets."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from classifiers.crop import EXPAND, crop
from classifiers.detect import WholeImage
from classifiers.types import Boxes, Detector


@dataclass(frozen=True)
class LabelledFaces:
    """Images uint8 [N, H, W, 3] with a detected face, the boxes [N, 4], and the labels [N] of each attribute."""

    images: np.ndarray
    boxes: np.ndarray
    labels: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.images)


def to_float(images: np.ndarray) -> Tensor:
    """Convert uint8 [N, H, W, 3] to float [N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def cut(images: np.ndarray, boxes: np.ndarray | None, size: int, expand: float = EXPAND) -> Tensor:
    """Return the crops [N, 3, size, size] for a judge: about one box [N, 4] per image, or the whole images."""
    image_NCHW = to_float(images)
    if boxes is None:
        return crop(image_NCHW, WholeImage()(image_NCHW), size, 1.0)
    batch, _, height, width = image_NCHW.shape
    box_N4 = torch.from_numpy(boxes).float()
    return crop(image_NCHW, Boxes(torch.arange(batch), box_N4, None, (batch, height, width)), size, expand)


def find_faces(images: np.ndarray, detector: Detector, batch: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices [F] of the images in which the detector finds a face, and its boxes [F, 4]."""
    rows, boxes = [], []
    for start in range(0, len(images), batch):
        found = detector(to_float(images[start : start + batch]))
        rows.append(found.row_F.cpu().numpy() + start)
        boxes.append(found.box_F4.cpu().numpy())
    return np.concatenate(rows), np.concatenate(boxes)
