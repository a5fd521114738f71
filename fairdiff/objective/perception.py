"""The frozen networks that look at images in training: detector, classifier, preservation encoders, face embedder.

They turn images into everything the losses need, with or without a graph; boxes are constants of the graph.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from classifiers.crop import extract
from classifiers.identity import Bank
from classifiers.types import Boxes, Classifier, Detector, Embedder, Faces


@dataclass
class Perception:
    """`encoders` preserve semantics; `embedder` and `bank` serve face realism, None without that term.

    The classifier sees squares of `expand` times the box at `crop_size` pixels, or faces of that size `aligned` on landmarks.

    dtype: what they multiply in, but for the detector; weights, images and outputs are float32 whatever it says (in
    bfloat16 features have length 1 to its three digits).
    """

    detector: Detector
    classifier: Classifier
    encoders: list
    embedder: Embedder | None
    bank: Bank | None
    crop_size: int
    expand: float
    dtype: torch.dtype = torch.float32
    aligned: bool = False

    def classify_faces(self, image_BCHW: Tensor, boxes: Boxes | None = None) -> "FaceBatch":
        """Detect faces (unless boxes are given), crop and classify them; gradients pass to the image where enabled."""
        boxes = self.detector(image_BCHW) if boxes is None else boxes
        faces = extract(image_BCHW, boxes, self.crop_size, self.expand, self.aligned)
        with self._cast(image_BCHW):
            logits = self.classifier(faces.crop_FCHW)
        return FaceBatch(image_BCHW, faces, {name: logits_FK.float() for name, logits_FK in logits.items()})

    def features(self, image_BCHW: Tensor) -> list[Tensor]:
        """One L2-normalised [B, D] per preservation encoder."""
        with self._cast(image_BCHW):
            return [encoder.image(image_BCHW).float() for encoder in self.encoders]

    def align(self, faces: "FaceBatch") -> Tensor:
        """Faces [F, 3, S, S] as the embedder wants them; gradients pass to the image."""
        return self.embedder.align(faces.image_BCHW, faces.faces.boxes)

    def embed(self, aligned_FCHW: Tensor) -> Tensor:
        """L2-normalised [F, D] of aligned faces."""
        with self._cast(aligned_FCHW):
            return self.embedder(aligned_FCHW).float()

    def _cast(self, image_BCHW: Tensor) -> torch.autocast:
        return torch.autocast(image_BCHW.device.type, torch.bfloat16, enabled=self.dtype != torch.float32)


@dataclass
class FaceBatch:
    """Images [B, 3, H, W], their faces and the classifier's logits (attribute -> [F, K])."""

    image_BCHW: Tensor
    faces: Faces
    logits: dict[str, Tensor]

    def box_B4(self) -> Tensor:
        """The face box of each image, zeros (empty) where no face was found."""
        box = torch.zeros(len(self.image_BCHW), 4, device=self.image_BCHW.device)
        box[self.faces.row_F] = self.faces.box_F4.to(box)
        return box

    def probs_BK(self, attribute: str) -> Tensor:
        """Class probabilities of each image, zeros where no face was found."""
        logits = self.logits[attribute]
        probs = logits.new_zeros(len(self.image_BCHW), logits.shape[1])
        probs[self.faces.row_F] = logits.detach().softmax(1)
        return probs
