"""Frozen encoders that measure the drift of images: CLIP (image and text) and a self-supervised image encoder.

Each encoder does its own preprocessing, takes the whole image and returns L2-normalised features. Gradients reach the
pixels. The output of an encoder depends on its `config` and its weights only.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from classifiers.hub import load_hub_encoder
from classifiers.identity import FaceEmbedder, load_face_embedder
from classifiers.zeroshot import load_open_clip
from fairdiff.errors import FairDiffError, blame


class ClipEncoder:
    """CLIP features [B, D] of images and of texts, by an open_clip model from a folder or "architecture/pretrained tag"."""

    def __init__(self, path: str | Path, device: str = "cpu"):
        try:
            self.model, self.tokenizer, self.pixels = load_open_clip(path)
        except ValueError as error:
            raise FairDiffError(f"features.clip: {error}") from error
        self.model.to(device)
        self.device = device
        self.config = self.pixels.about() | {"net": str(self.model)}  # its text names the activations

    def image(self, image_BCHW: Tensor) -> Tensor:
        """Return the features [B, D] of images in [0, 1] of any size; each whole image is resized with antialiasing."""
        return self.model.encode_image(self.pixels(image_BCHW), normalize=True)

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Tensor:
        """Return the features [B, D] of prompts."""
        return self.model.encode_text(self.tokenizer(prompts).to(self.device), normalize=True)


class ImageEncoder:
    """A self-supervised image encoder used instead of DINO, from a folder in the format of classifiers.identity."""

    def __init__(self, folder: str | Path, device: str = "cpu"):
        try:
            self.model: FaceEmbedder = load_face_embedder(Path(folder)).to(device)
        except (ValueError, OSError) as error:
            raise FairDiffError(str(error)) from error
        self.config = self.model.config

    def image(self, image_BCHW: Tensor) -> Tensor:
        """Return the features [B, D] of images in [0, 1]."""
        return self.model(image_BCHW)


class HubEncoder:
    """A Hugging Face image encoder such as DINOv2, loaded by classifiers.hub."""

    def __init__(self, path: str, device: str = "cpu"):
        with blame("features.encoder"):
            self.model = load_hub_encoder(path).to(device)
        self.config, self.pixels = self.model.config, self.model.pixels

    def image(self, image_BCHW: Tensor) -> Tensor:
        """Return the features [B, D] of images in [0, 1] of any size."""
        return F.normalize(self.model(image_BCHW), dim=1)
