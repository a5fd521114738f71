"""Experiment trackers: they get the rows of metrics.jsonl, and images before and after.

tensorboard, wandb and trackio, through accelerate's classes for them. Each is an extra of the installation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

from PIL import Image
from torch import Tensor

from classifiers.pictures import eight_bits
from fairdiff.errors import FairDiffError

STARTS = {"tensorboard": "torch.utils.tensorboard.SummaryWriter", "wandb": "wandb.init", "trackio": "trackio.init"}
OURS = {  # of its arguments: by these a training goes on in its own run
    "tensorboard": ("log_dir", "comment", "purge_step"),
    "wandb": ("id", "dir", "resume"),
    "trackio": ("resume",),
}


def require_installed(kind: str | None, options: dict[str, object] | None = None) -> None:
    """FairDiffError for a tracker whose package is not there, and for options that are no arguments of its start."""
    if kind is None:
        return
    if find_spec(kind) is None:
        raise FairDiffError(f"tracker: {kind} is not installed, allowed: pip install 'fairdiff[{kind}]', or tracker=null")
    if options:
        module, _, name = STARTS[kind].rpartition(".")
        known = [key for key in signature(getattr(import_module(module), name)).parameters if key not in OURS[kind]]
        if other := [key for key in options if key not in known]:
            raise FairDiffError(f"tracker_options: found {other[0]}, allowed with tracker={kind}: {', '.join(known)}")


class Tracker:
    """One run of a tracker, which goes on where the run folder's training goes on.

    options: arguments of its start (STARTS) beside or in the place of ours, such as project, name, group and tags.
    """

    def __init__(self, kind: str, folder: Path, fingerprint: str, finished_steps: int, options: dict[str, object]):
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

        PartialState()  # their logging asks for it; of several processes it takes the group that is there
        name = "/".join(folder.parts[-3:])
        if kind == "tensorboard":
            self.to = TensorBoardTracker("tensorboard", folder, purge_step=finished_steps, **options)
        elif kind == "wandb":
            given = {"project": "fairdiff", "name": name} | options
            self.to = WandBTracker(given.pop("project"), id=fingerprint, dir=str(folder), resume="allow", **given)
        else:
            given = {"project": "fairdiff", "name": f"{name} {fingerprint}"} | options
            self.to = TrackioTracker(given.pop("project"), resume="allow", **given)
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
def open_tracker(
    kind: str | None, folder: Path, fingerprint: str, finished_steps: int, options: dict[str, object]
) -> Iterator[Tracker | None]:
    """A tracker, closed at the end however that comes; None for no kind."""
    if kind is None:
        yield None
        return
    tracker = Tracker(kind, folder, fingerprint, finished_steps, options)
    try:
        yield tracker
    finally:
        tracker.to.finish()
