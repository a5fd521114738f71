"""Frozen encoders that measure the drift of images: CLIP (image and text) and a self-supervised image encoder.

Each owns its preprocessing, sees the whole image and returns L2-normalised features; gradients pass to the pixels.
`config` is, with the weights, all that its answers depend on.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from classifiers.hub import architecture
from classifiers.identity import FaceEmbedder, load_face_embedder
from classifiers.pixels import first_words, freeze, processor_pixels, quiet
from classifiers.zeroshot import load_open_clip
from fairdiff.errors import FairDiffError


class ClipEncoder:
    """An open_clip model from a folder or "architecture/pretrained tag": image [B, D] and text [B, D] features."""

    def __init__(self, path: str | Path, device: str = "cpu"):
        try:
            self.model, self.tokenizer, self.pixels = load_open_clip(path)
        except ValueError as error:
            raise FairDiffError(f"features.clip: {error}") from error
        self.model.to(device)
        self.device = device
        self.config = self.pixels.about() | {"net": str(self.model)}  # which names the activations

    def image(self, image_BCHW: Tensor) -> Tensor:
        """Features [B, D] of images in [0, 1] of any size (resized as a whole, antialiased)."""
        return self.model.encode_image(self.pixels(image_BCHW), normalize=True)

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
        self.config = self.model.config

    def image(self, image_BCHW: Tensor) -> Tensor:
        """Features [B, D] of images in [0, 1]."""
        return self.model(image_BCHW)


class HubEncoder:
    """A Hugging Face vision transformer such as DINOv2: its first output token, after the last normalisation.

    The whole image is squeezed to the size to which the model's own processor would crop (DINOv2: 224).
    """

    def __init__(self, path: str, device: str = "cpu"):
        quiet()
        local = Path(path).exists()
        try:
            model, found = AutoModel.from_pretrained(
                path, use_safetensors=True, local_files_only=local, dtype=torch.float32, output_loading_info=True
            )
            self.pixels = processor_pixels(path, local).whole()
        except Exception as error:  # transformers, safetensors and the hub each have their own kinds
            raise FairDiffError(
                f"features.encoder: found {path}, allowed: embedded, or a folder or hub id of a Hugging Face image "
                f"encoder with safetensors ({first_words(error)})"
            ) from error
        if lost := sorted(k for k in found["missing_keys"] if not k.startswith("pooler.")):  # the pooler is not used
            raise FairDiffError(f"features.encoder: {path} has no weights for {lost[0]}; allowed: a whole model")
        self.model = freeze(model).to(device)
        self.config = self.pixels.about() | {"net": architecture(model)}

    def image(self, image_BCHW: Tensor) -> Tensor:
        """Features [B, D] of images in [0, 1] of any size."""
        tokens_BLD = self.model(pixel_values=self.pixels(image_BCHW)).last_hidden_state
        return F.normalize(tokens_BLD[:, 0], dim=1)
