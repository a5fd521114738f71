"""What a run tells a tracker beside metrics.jsonl: the same rows, shares against the target, images before and after.

tensorboard, wandb and trackio, through accelerate's classes for them. Each is an extra of the installation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fairdiff.diffusion.sampling import initial_noise
from fairdiff.errors import FairDiffError
from fairdiff.training.step import Trainee
from fairdiff.training.update import Update

PROMPTS, IMAGES = 4, 6  # of a grid


def require_installed(kind: str | None) -> None:
    """FairDiffError for a tracker whose package is not there."""
    if kind is not None and find_spec(kind) is None:
        raise FairDiffError(f"tracker: {kind} is not installed, allowed: pip install 'fairdiff[{kind}]', or tracker=null")


class Tracker:
    """One run of a tracker, which goes on where the run folder's training goes on."""

    def __init__(self, kind: str, folder: Path, fingerprint: str, finished_steps: int):
        from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

        name = "/".join(folder.parts[-3:])
        if kind == "tensorboard":
            self.to = TensorBoardTracker("tensorboard", folder, purge_step=finished_steps)
        elif kind == "wandb":
            self.to = WandBTracker("fairdiff", name=name, id=fingerprint, dir=str(folder), resume="allow")
        else:
            self.to = TrackioTracker("fairdiff", name=f"{name} {fingerprint}", resume="allow")
        self.kind = kind
        self.to.start()

    def log(self, row: dict) -> None:
        """The numbers of a row of metrics.jsonl."""
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        self.to.log(numbers, step=row["step"])

    def images(self, name: str, image_3HW: Tensor, step: int) -> None:
        image = (image_3HW.clamp(0, 1).permute(1, 2, 0).float().cpu().numpy() * 255).round().astype("uint8")
        if self.kind == "tensorboard":
            self.to.log_images({name: image[None]}, step=step, dataformats="NHWC")
        elif self.kind == "wandb":
            self.to.log_images({name: [Image.fromarray(image)]}, step=step)
        else:
            import trackio

            self.to.log({name: trackio.Image(Image.fromarray(image))}, step=step)


@contextmanager
def open_tracker(kind: str | None, folder: Path, fingerprint: str, finished_steps: int) -> Iterator[Tracker | None]:
    """A tracker, closed at the end however that comes; None for no kind."""
    if kind is None:
        yield None
        return
    tracker = Tracker(kind, folder, fingerprint, finished_steps)
    try:
        yield tracker
    finally:
        tracker.to.finish()


def shares_and_targets(trainee: Trainee, update: Update) -> dict[str, float]:
    """`share.<attribute>.<class>` of the step's images by the training judge, and `target.<attribute>.<class>` beside it.

    Means over the prompts of people that name no class.
    """
    found: dict[str, list[float]] = {}
    for prompt, result in update.good:
        target = trainee.objective.target.of(prompt) if result.people and not result.named else None
        for attribute, own in (result.shares if target else {}).items():
            classes = trainee.perception.classifier.attributes[attribute]
            for cls, share, wanted in zip(classes, own, target.marginal(attribute), strict=False):
                found.setdefault(f"share.{attribute}.{cls}", []).append(float(share))
                found.setdefault(f"target.{attribute}.{cls}", []).append(float(wanted))
    return {key: sum(values) / len(values) for key, values in found.items()}


@torch.no_grad()
def before_and_after(trainee: Trainee, prompts: list[str], sampler_steps: int, seed: int) -> Tensor:
    """A grid [3, H, W] of the first prompts: a row of the frozen model, and one of the adapter from the same noise."""
    model, rows = trainee.model, []
    for prompt in list(dict.fromkeys(prompts))[:PROMPTS]:
        noise = initial_noise(prompt, seed, range(IMAGES), model.latent_shape).to(model.unet.device)
        with trainee.adapter.off():
            rows.append(model.generator(trainee.method.guidance, sampler_steps)(prompt, noise))
        rows.append(model.generator(trainee.method.guidance, sampler_steps, trainee.adapter.prefix)(prompt, noise))
    return torch.cat([torch.cat(list(row), 2) for row in rows], 1)
