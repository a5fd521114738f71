"""The frozen networks that training applies to images: detector, classifier, preservation encoders, face embedder.

They compute all inputs of the losses from images, with or without a graph. Boxes are constants of the graph.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from classifiers.crop import extract
from classifiers.identity import Bank
from classifiers.types import Boxes, Classifier, Detector, Embedder, Faces


@dataclass
class Perception:
    """The frozen networks of training, and how faces are cropped for the classifier.

    encoders: networks of the image term. embedder, bank: for the face term, None without it. The classifier gets squares of
    `expand` times the box at `crop_size` pixels. If `aligned`, it gets faces of that size aligned by their landmarks.

    dtype: precision of autocast, for all networks but the detector. Weights, images and outputs are float32 in any case.
    In bfloat16 the features have length 1 to three digits only.
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
        """Detect faces (unless boxes are given), crop and classify them; gradients reach the image where enabled."""
        boxes = self.detector(image_BCHW) if boxes is None else boxes
        faces = extract(image_BCHW, boxes, self.crop_size, self.expand, self.aligned)
        with self._cast(image_BCHW):
            logits = self.classifier(faces.crop_FCHW)
        return FaceBatch(image_BCHW, faces, {name: logits_FK.float() for name, logits_FK in logits.items()})

    def features(self, image_BCHW: Tensor) -> list[Tensor]:
        """Return L2-normalised features [B, D], one tensor per preservation encoder."""
        with self._cast(image_BCHW):
            return [encoder.image(image_BCHW).float() for encoder in self.encoders]

    def align(self, faces: "FaceBatch") -> Tensor:
        """Return faces [F, 3, S, S], aligned as the embedder requires; gradients reach the image."""
        return self.embedder.align(faces.image_BCHW, faces.faces.boxes)

    def embed(self, aligned_FCHW: Tensor) -> Tensor:
        """Return the L2-normalised embeddings [F, D] of aligned faces."""
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
        """Return the face box of each image [B, 4], zeros (an empty box) where no face was found."""
        box = torch.zeros(len(self.image_BCHW), 4, device=self.image_BCHW.device)
        box[self.faces.row_F] = self.faces.box_F4.to(box)
        return box

    def probs_BK(self, attribute: str) -> Tensor:
        """Return the class probabilities of each image [B, K], zeros where no face was found."""
        logits = self.logits[attribute]
        probs = logits.new_zeros(len(self.image_BCHW), logits.shape[1])
        probs[self.faces.row_F] = logits.detach().softmax(1)
        return probs
