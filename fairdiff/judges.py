"""What looks at the pictures during training: detector, classifier, preservation encoders, face embedder.

`Judges.see` turns images into everything the losses need, with or without a graph; boxes are constants of the graph.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from classifiers.crop import extract
from classifiers.identity import Bank, FaceEmbedder
from classifiers.types import Boxes, Classifier, Detector, Faces


@dataclass
class Judges:
    """The frozen networks of training. `encoders` preserve semantics; `embedder` and `bank` serve face realism."""

    detector: Detector
    classifier: Classifier
    encoders: list
    embedder: FaceEmbedder | None
    bank: Bank | None
    crop_size: int
    expand: float

    def see(self, image_BCHW: Tensor, boxes: Boxes | None = None) -> "Seen":
        """Detect (unless boxes are given), crop, classify and encode; gradients pass to the image where enabled."""
        boxes = self.detector(image_BCHW) if boxes is None else boxes
        faces = extract(image_BCHW, boxes, self.crop_size, self.expand)
        return Seen(image_BCHW, faces, self.classifier(faces.crop_FCHW))

    def features(self, image_BCHW: Tensor) -> list[Tensor]:
        """One L2-normalised [B, D] per preservation encoder."""
        return [encoder.image(image_BCHW) for encoder in self.encoders]


@dataclass
class Seen:
    """Images [B, 3, H, W], their faces and the judge's logits (attribute -> [F, K])."""

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
