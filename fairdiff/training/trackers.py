"""What a run tells a tracker: the rows of metrics.jsonl, and images before and after.

tensorboard, wandb and trackio, through accelerate's classes for them. Each is an extra of the installation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from PIL import Image
from torch import Tensor

from classifiers.pictures import eight_bits
from fairdiff.errors import FairDiffError


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
        image = eight_bits(image_3HW)
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
