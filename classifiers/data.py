"""Labelled faces in memory, and a reader of a folder of images with one CSV of labels."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from classifiers.crop import EXPAND, crop
from classifiers.detect import WholeImage
from classifiers.types import Boxes, Detector


@dataclass(frozen=True)
class LabelledFaces:
    """N images of one size and what people perceive in them.

    `images` uint8 [N, H, W, 3]; `labels[a]` int [N], class index or -1 = unlabelled.
    """

    images: np.ndarray
    labels: dict[str, np.ndarray]


def to_float(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] to float [N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def cut(images: np.ndarray, boxes: np.ndarray | None, size: int, expand: float = EXPAND) -> Tensor:
    """The crops a judge sees, [N, 3, size, size]: about one box [N, 4] an image, or the whole images."""
    image_NCHW = to_float(images)
    if boxes is None:
        return crop(image_NCHW, WholeImage()(image_NCHW), size, 1.0)
    batch, _, height, width = image_NCHW.shape
    box_N4 = torch.from_numpy(boxes).float()
    return crop(image_NCHW, Boxes(torch.arange(batch), box_N4, None, (batch, height, width)), size, expand)


def find_faces(images: np.ndarray, detector: Detector, batch: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Index [F] of the images in which the detector finds a face, and its boxes [F, 4]."""
    rows, boxes = [], []
    for start in range(0, len(images), batch):
        found = detector(to_float(images[start : start + batch]))
        rows.append(found.row_F.cpu().numpy() + start)
        boxes.append(found.box_F4.cpu().numpy())
    return np.concatenate(rows), np.concatenate(boxes)


def read_image(file: Path) -> Image.Image:
    """An image file as RGB, upright; errors are PIL's."""
    with Image.open(file) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


def read_folder(folder: Path, labels: Path, attributes: dict[str, tuple[str, ...]], size: int) -> LabelledFaces:
    """Images of `folder` named in the CSV `labels`, shorter side resized to `size`, centre cut to a square.

    Columns: `file` and one per attribute holding a class name or nothing (= unlabelled). Raises ValueError naming the
    file and line for an absent column or image and for an unknown class.
    """
    with open(labels, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    if not rows:
        raise ValueError(f"{labels}: no rows")
    if absent := [name for name in ("file", *attributes) if name not in rows[0]]:
        raise ValueError(f"{labels}: column {absent[0]!r} is absent")
    classes_N = {name: np.full(len(rows), -1, np.int64) for name in attributes}
    images = np.empty((len(rows), size, size, 3), np.uint8)
    for i, row in enumerate(rows):
        for name, classes in attributes.items():
            if row[name] and row[name] not in classes:
                raise ValueError(f"{labels}:{i + 2}: {name} is {row[name]!r}, allowed: {', '.join(classes)}")
            classes_N[name][i] = classes.index(row[name]) if row[name] else -1
        try:
            upright = read_image(Path(folder) / row["file"])
        except OSError as error:
            raise ValueError(f"{labels}:{i + 2}: {Path(folder) / row['file']}: cannot be read ({error})") from None
        images[i] = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
    return LabelledFaces(images, classes_N)
