"""Grids of images during training, without and with the adapter, from the same noise."""

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from classifiers.pictures import eight_bits
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.files import atomic_path
from fairdiff.training.step import Trainee
from fairdiff.training.tracking import PICTURES

PROMPTS, IMAGES = 3, 4  # of a grid
GRIDS = 8  # of a run, about
WIDEST = 192  # pixels of an image in a grid


def due(step: int, steps: int) -> bool:
    """Whether a grid is made after training step `step`, counted from 0."""
    return (step + 1) % math.ceil(steps / GRIDS) == 0 or step + 1 == steps


class Grids:
    """Grids of the first few prompts: a row of the frozen model, and below it one of the adapter from the same noise."""

    def __init__(self, trainee: Trainee, prompts: list[str], sampler_steps: int, seed: int):
        self.trainee, self.prompts = trainee, list(dict.fromkeys(prompts))[:PROMPTS]
        self.options = (trainee.method.guidance, sampler_steps)
        shape, device = trainee.model.latent_shape, trainee.model.unet.device
        self.noise = [initial_noise(prompt, seed, range(IMAGES), shape).to(device) for prompt in self.prompts]
        self.before: list[Tensor] = []

    @torch.no_grad()
    def grid(self) -> Tensor:
        """The grid [3, H, W] of the adapter as it stands."""
        model, adapter = self.trainee.model, self.trainee.adapter
        if not self.before:
            with adapter.off():
                self.before = [self._row(model.generator(*self.options)(*of)) for of in self._each()]
        after = [self._row(model.generator(*self.options, adapter.prefix)(*of)) for of in self._each()]
        return torch.cat([row for pair in zip(self.before, after, strict=True) for row in pair], 1)

    def _each(self) -> list[tuple[str, Tensor]]:
        return list(zip(self.prompts, self.noise, strict=True))

    def _row(self, image_BCHW: Tensor) -> Tensor:
        wide = max(image_BCHW.shape[-2:])
        if wide > WIDEST:
            image_BCHW = interpolate(image_BCHW.float(), scale_factor=WIDEST / wide, mode="area")
        return torch.cat(list(image_BCHW.float().cpu()), 2)


def save(image_3HW: Tensor, folder: Path, steps: int) -> None:
    """Write pictures/step_<steps done>.png of a run folder."""
    path = folder / PICTURES / f"step_{steps:06d}.png"
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        Image.fromarray(eight_bits(image_3HW)).save(temporary, "png")
