"""The image contract and the two protocols.

Images are `image_BCHW`: float RGB in [0, 1]. Boxes are (x0, y0, x1, y1) in pixels of the image, where pixel j covers
[j, j+1); they may lie partly outside the frame. B images, F <= B faces found (the largest face of each image),
K classes of an attribute. B against F is the main hazard: `row_F` says which image a face belongs to.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Boxes:
    """The largest face of each image that has one; constants, never part of a graph.

    `row_F` long, strictly ascending image indices; `box_F4` float pixels; `landmark_F52` float pixels (x, y) of the
    eye, eye, nose, mouth corner, mouth corner, the one further left in the image first, or None if the detector has
    no landmarks; `size` (B, H, W) of the batch; `count_F` long, how many faces the detector found in the image, or None
    if it was not asked.
    """

    row_F: Tensor
    box_F4: Tensor
    landmark_F52: Tensor | None
    size: tuple[int, int, int]
    count_F: Tensor | None = None

    @property
    def found_B(self) -> Tensor:
        """Which images have a face, bool [B]."""
        found_B = torch.zeros(self.size[0], dtype=torch.bool, device=self.row_F.device)
        found_B[self.row_F] = True
        return found_B

    def rows(self, keep_F: Tensor) -> "Boxes":
        """Some of the faces, by bool [F]; the images of the others are then without one."""
        points, count = (None if some is None else some[keep_F] for some in (self.landmark_F52, self.count_F))
        return Boxes(self.row_F[keep_F], self.box_F4[keep_F], points, self.size, count)

    @classmethod
    def none(cls, image_BCHW: Tensor) -> "Boxes":
        """No face in any image of the batch."""
        batch, _, height, width = image_BCHW.shape
        nobody = image_BCHW.new_zeros(0, 4)
        return cls(torch.zeros(0, dtype=torch.long, device=nobody.device), nobody, None, (batch, height, width))


@dataclass(frozen=True)
class Faces:
    """Boxes with their pixels: `crop_FCHW` for the judges."""

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
    """Finds the largest face of each image, without gradient; the answer for an image is the same in every batch."""

    def __call__(self, image_BCHW: Tensor) -> Boxes: ...


class Classifier(Protocol):
    """Logits per attribute, [F, K] each, with gradient to the pixels; owns its resize and its normalisation."""

    attributes: dict[str, tuple[str, ...]]

    def __call__(self, crop_FCHW: Tensor) -> dict[str, Tensor]: ...


class Embedder(Protocol):
    """Faces to embeddings [F, D] of length 1, with gradient to the pixels; owns its alignment and its normalisation.

    `config`: with the weights, all that its answers depend on; its `dim` is D.
    """

    config: dict

    def align(self, image_BCHW: Tensor, boxes: Boxes) -> Tensor:
        """Faces [F, 3, S, S] as it was trained with; a mirrored one is a face too."""
        ...

    def __call__(self, aligned_FCHW: Tensor) -> Tensor: ...
