"""Frozen encoders that say how far pictures moved: CLIP (image and text) and a self-supervised image encoder.

Each owns its preprocessing and returns L2-normalised features; gradients pass to the pixels.
"""

import warnings
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from classifiers.identity import FaceEmbedder, load_face_embedder
from fairdiff.errors import FairDiffError


class ClipEncoder:
    """An open_clip model from a folder (open_clip_config.json and weights): image [B, D] and text [B, D] features."""

    def __init__(self, folder: str | Path, device: str = "cpu"):
        name = f"local-dir:{folder}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # open_clip warns of the activation of models it does not know
                self.model, _, transform = open_clip.create_model_and_transforms(name, device=device)
                self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:
            raise FairDiffError(f"{folder}: cannot load an open_clip model: {' '.join(str(error).split())}") from error
        self.model.float().eval().requires_grad_(False)
        self.device = device
        normalise = transform.transforms[-1]
        self.mean = torch.tensor(normalise.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(normalise.std, device=device).view(1, 3, 1, 1)
        size = self.model.visual.image_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)

    def image(self, image_BCHW: Tensor) -> Tensor:
        """Features [B, D] of images in [0, 1] of any size (resized as a whole, antialiased)."""
        if image_BCHW.shape[-2:] != self.size:
            image_BCHW = F.interpolate(image_BCHW, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.model.encode_image((image_BCHW - self.mean) / self.std, normalize=True)

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Tensor:
        """Features [B, D] of prompts."""
        return self.model.encode_text(self.tokenizer(prompts).to(self.device), normalize=True)


class ImageEncoder:
    """A self-supervised encoder from a folder of classifiers.identity's format, in DINO's place."""

    def __init__(self, folder: str | Path, device: str = "cpu"):
        try:
            self.model: FaceEmbedder = load_face_embedder(Path(folder)).to(device)
        except (ValueError, OSError) as error:
            raise FairDiffError(str(error)) from error
        self.size = self.model.config["image_size"]

    def image(self, image_BCHW: Tensor) -> Tensor:
        """Features [B, D] of images in [0, 1]."""
        return self.model(image_BCHW)
