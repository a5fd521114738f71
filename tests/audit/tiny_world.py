"""A tiny generator for tests of the audit, whose images depend on their noise in a known way, with a detector and a judge.

Noise is [3, 4, 4]. The image is 16x16 with a bright square (the "face"), unless the noise's last channel is low (a share
`faceless`) or the prompt has no people. The red channel of the square is the "gender", the green channel the "age".
"""

from dataclasses import dataclass

import torch
from torch import nn

from classifiers.types import Boxes


@dataclass(frozen=True)
class TinyPrompt:
    text: str
    family: str
    subject: str
    people: bool = True
    names: str = ""


class TinyGenerator:
    """A generator of faces that are red if `offset` + noise > 0, and green if noise > 0; a share `faceless` has no face."""

    def __init__(self, offset: float, faceless: float = 0.0):
        self.offset, self.faceless, self.calls = offset, faceless, 0

    def __call__(self, prompt: str, noise: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        red, green, blue = noise.mean((2, 3)).mul(4).unbind(1)  # standard normal each
        image = nn.functional.interpolate(noise.mul(0.05).add(0.2), 16).clamp(0, 0.4)
        face = torch.stack([(red + self.offset) > 0, green > 0, torch.ones_like(red, dtype=torch.bool)], 1)
        square = face.float().mul(0.4).add(0.55)[:, :, None, None].expand(-1, -1, 8, 8)
        shown = torch.special.ndtr(blue) >= self.faceless if "a person" in prompt else torch.zeros_like(blue).bool()
        image[shown, :, 4:12, 4:12] = square[shown]
        return image


class BrightSquare:
    """A detector that finds a face if the middle of the image is bright."""

    def __call__(self, image_BCHW: torch.Tensor) -> Boxes:
        batch, _, height, width = image_BCHW.shape
        row_F = (image_BCHW[:, 2, 6:10, 6:10].mean((1, 2)) > 0.5).nonzero()[:, 0]
        box_F4 = torch.tensor([4.0, 4.0, 12.0, 12.0]).expand(len(row_F), 4)
        return Boxes(row_F, box_F4, None, (batch, height, width))


class ColourJudge:
    """A judge with logits from the mean red and green of the crop."""

    attributes = {"gender": ("female", "male"), "age": ("young", "old")}

    def __call__(self, crop_FCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        mean = (crop_FCHW.mean((2, 3)) - 0.75) * 20
        return {"gender": torch.stack([mean[:, 0], -mean[:, 0]], 1), "age": torch.stack([mean[:, 1], -mean[:, 1]], 1)}


class RandomEncoder(nn.Module):
    """A small random network that encodes images and text."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(128, 12))
        self.words = nn.EmbeddingBag(256, 12)
        self.requires_grad_(False)

    def image(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.net(image_BCHW), dim=1)

    def text(self, prompts: list[str]) -> torch.Tensor:
        rows = [self.words(torch.tensor([list(prompt.encode())]))[0] for prompt in prompts]
        return nn.functional.normalize(torch.stack(rows), dim=1)
