"""Measure images without gradients: detect the largest face, classify it with the judge, encode the whole image.

Shapes: B images, F <= B faces, K classes, D features. An image without a face has NaN probabilities, never zeros.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from classifiers.crop import cut
from classifiers.types import Boxes, Classifier, Detector
from fairdiff.errors import FairDiffError


class ImageEncoder(Protocol):
    """An encoder that returns L2-normalised features [B, D] of whole images [B, 3, H, W] in [0, 1]."""

    def image(self, image_BCHW: Tensor) -> Tensor: ...


class ClipEncoder(ImageEncoder, Protocol):
    """An image encoder with a text encoder for the same feature space."""

    def text(self, prompts: list[str]) -> Tensor: ...


@dataclass(frozen=True)
class Measurer:
    """The frozen networks that measure images. The judge gets the square around the box, `expand` times as wide, resized to
    `crop_size` pixels, or an aligned face of that size if `aligned`.

    refuse_several: an image with several faces counts as one without a face. If an encoder is None, its columns are NaN,
    and the report says so.
    """

    detector: Detector
    judge: Classifier
    clip: ClipEncoder | None
    encoder: ImageEncoder | None
    crop_size: int
    expand: float
    aligned: bool = False
    refuse_several: bool = False


@dataclass(frozen=True)
class Measured:
    """The measurements of one batch: found [B] bool, box [B, 4], probabilities [B, K] per attribute, features [B, D].

    faces_B: number of faces that the detector found, -1 if it does not count them. clip_t_B: cosine of image and prompt.
    wordings: class [B, W] by each wording of a zero-shot judge alone, -1 without a face; {} for other judges.
    """

    found_B: np.ndarray
    box_B4: np.ndarray
    probs: dict[str, np.ndarray]
    clip_t_B: np.ndarray
    features: dict[str, np.ndarray]
    wordings: dict[str, np.ndarray]
    faces_B: np.ndarray

    def rows(self, order_B: np.ndarray) -> "Measured":
        """Return the same images in another order."""
        tables = [{k: v[order_B] for k, v in table.items()} for table in (self.probs, self.features, self.wordings)]
        found, box, clip_t, faces = (one[order_B] for one in (self.found_B, self.box_B4, self.clip_t_B, self.faces_B))
        return Measured(found, box, tables[0], clip_t, tables[1], tables[2], faces)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


@torch.no_grad()
def measure(measurer: Measurer, image_BCHW: Tensor, prompt: str) -> Measured:
    """Detect, classify and encode one batch of images of one prompt; FairDiffError for logits that are not finite."""
    batch = len(image_BCHW)
    boxes = measurer.detector(image_BCHW)
    faces_B = _counted(boxes)
    if measurer.refuse_several and boxes.count_F is not None:
        boxes = boxes.rows(boxes.count_F == 1)
    row_F = boxes.row_F.cpu().numpy()
    box_B4 = np.full((batch, 4), np.nan, np.float32)
    probs = {name: np.full((batch, len(k)), np.nan, np.float32) for name, k in measurer.judge.attributes.items()}
    wordings = {name: np.full((batch, len(w)), -1, np.int8) for name, w in wordings_of(measurer.judge).items()}
    if len(row_F):
        box_B4[row_F] = _array(boxes.box_F4)
        crop_FCHW = cut(image_BCHW, boxes, measurer.crop_size, measurer.expand, measurer.aligned)
        logits = measurer.judge(crop_FCHW)
        for name, label_FW in measurer.judge.labels_by_wording(crop_FCHW).items() if wordings else ():
            wordings[name][row_F] = label_FW.cpu().numpy()
        for name, logits_FK in logits.items():
            bad = int((~logits_FK.isfinite().all(1)).sum())
            if bad:  # argmax would assign them to some class
                where = f"{bad} of {len(row_F)} faces of '{prompt}'"
                raise FairDiffError(
                    f"audit.judge: {name}: logits that are not finite for {where}, allowed: finite ones"
                )
            probs[name][row_F] = _array(logits_FK.float().softmax(1))
    features, clip_t_B = {}, np.full(batch, np.nan, np.float32)
    if measurer.clip is not None:
        clip_BD = measurer.clip.image(image_BCHW)
        clip_t_B = _array(clip_BD @ measurer.clip.text([prompt])[0].to(clip_BD))
        features["clip"] = _array(clip_BD)
    if measurer.encoder is not None:
        features["encoder"] = _array(measurer.encoder.image(image_BCHW))
    return Measured(boxes.found_B.cpu().numpy(), box_B4, probs, clip_t_B, features, wordings, faces_B)


def _counted(boxes: Boxes) -> np.ndarray:
    """Return the number of faces of each image, int16 [B]; -1 if there are any and the detector does not count them."""
    faces_B = np.zeros(boxes.size[0], np.int16)
    count_F = torch.full_like(boxes.row_F, -1) if boxes.count_F is None else boxes.count_F
    faces_B[boxes.row_F.cpu().numpy()] = count_F.cpu().numpy()
    return faces_B


def wordings_of(judge: Classifier) -> dict[str, list[dict[str, list[str]]]]:
    """Return a zero-shot judge's wordings, attribute -> list of (class -> prompts), or {} if there are none to compare."""
    return getattr(judge, "wordings", {})


def joined(parts: list[Measured]) -> Measured:
    """Return the batches of one prompt as one."""
    return Measured(
        np.concatenate([part.found_B for part in parts]),
        np.concatenate([part.box_B4 for part in parts]),
        {name: np.concatenate([part.probs[name] for part in parts]) for name in parts[0].probs},
        np.concatenate([part.clip_t_B for part in parts]),
        {name: np.concatenate([part.features[name] for part in parts]) for name in parts[0].features},
        {name: np.concatenate([part.wordings[name] for part in parts]) for name in parts[0].wordings},
        np.concatenate([part.faces_B for part in parts]),
    )


def unit(features_BD: np.ndarray) -> np.ndarray:
    """Return the rows scaled to length 1, which storage as fp16 changes slightly."""
    return features_BD / np.linalg.norm(features_BD, axis=-1, keepdims=True)


def cosine(a_BD: np.ndarray, b_BD: np.ndarray) -> np.ndarray:
    """Return the cosine similarity [B] of corresponding rows."""
    return (unit(a_BD) * unit(b_BD)).sum(-1)


def cosine_to_others(features_BD: np.ndarray) -> np.ndarray:
    """Return the mean cosine [B] of each row to all other rows, NaN for a single row. Its mean is the mean over pairs."""
    features_BD = unit(features_BD)
    if len(features_BD) < 2:
        return np.full(len(features_BD), np.nan, np.float32)
    return (features_BD @ features_BD.sum(0) - 1) / (len(features_BD) - 1)
