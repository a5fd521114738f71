"""The formats of images and boxes, and the protocols of detectors, classifiers and embedders.

Images are `image_BCHW`: float RGB in [0, 1]. Boxes are (x0, y0, x1, y1) in pixels of the image, where pixel j covers
[j, j+1); they may lie partly outside the frame. Shapes: B images, F <= B faces found (the largest face of each image),
K classes of an attribute. Do not confuse B and F: `row_F` has the image of each face.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Boxes:
    """The largest face of each image that has one; constants, never part of a graph.

    row_F: long, strictly ascending image indices. box_F4: float pixels. landmark_F52: float pixels (x, y) of eye, eye, nose,
    mouth corner, mouth corner, the left one in the image first; None if the detector has no landmarks. size: (B, H, W) of
    the batch. count_F: long, number of faces that the detector found in the image; None if it is not known.
    """

    row_F: Tensor
    box_F4: Tensor
    landmark_F52: Tensor | None
    size: tuple[int, int, int]
    count_F: Tensor | None = None

    @property
    def found_B(self) -> Tensor:
        """Whether each image has a face, bool [B]."""
        found_B = torch.zeros(self.size[0], dtype=torch.bool, device=self.row_F.device)
        found_B[self.row_F] = True
        return found_B

    def rows(self, keep_F: Tensor) -> "Boxes":
        """Return the faces selected by bool [F]; the images of the others then have none."""
        points, count = (None if some is None else some[keep_F] for some in (self.landmark_F52, self.count_F))
        return Boxes(self.row_F[keep_F], self.box_F4[keep_F], points, self.size, count)

    @classmethod
    def none(cls, image_BCHW: Tensor) -> "Boxes":
        """Return boxes without a face in any image of the batch."""
        batch, _, height, width = image_BCHW.shape
        nobody = image_BCHW.new_zeros(0, 4)
        return cls(torch.zeros(0, dtype=torch.long, device=nobody.device), nobody, None, (batch, height, width))


@dataclass(frozen=True)
class Faces:
    """Boxes, and the crops at them for the judges."""

    boxes: Boxes
    crop_FCHW: Tensor

    @property
    def row_F(self) -> Tensor:
        return self.boxes.row_F

    @property
    def found_B(self) -> Tensor:
        return self.boxes.found_B

    @property
    def box_F4(self) -> Tensor:
        return self.boxes.box_F4


class Detector(Protocol):
    """Finds the largest face of each image, without gradient; the result for an image does not depend on its batch."""

    def __call__(self, image_BCHW: Tensor) -> Boxes: ...


class Classifier(Protocol):
    """Returns logits [F, K] per attribute, with gradient to the pixels; does its own resizing and normalisation."""

    attributes: dict[str, tuple[str, ...]]

    def __call__(self, crop_FCHW: Tensor) -> dict[str, Tensor]: ...


class Embedder(Protocol):
    """Returns embeddings [F, D] of length 1, with gradient to the pixels; does its own alignment and normalisation.

    The output depends on `config` and the weights only. D is `config["dim"]`.
    """

    config: dict

    def align(self, image_BCHW: Tensor, boxes: Boxes) -> Tensor:
        """Return faces [F, 3, S, S], aligned as in its training; mirrored faces are valid inputs too."""
        ...

    def __call__(self, aligned_FCHW: Tensor) -> Tensor: ...
