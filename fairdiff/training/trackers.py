"""Log the rows of metrics.jsonl and image grids to tensorboard, wandb or trackio.

accelerate's tracker classes are used. Each tracker is an extra of the installation.
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
OURS = {  # arguments that a user may not set: with them a resumed training continues its own run
    "tensorboard": ("log_dir", "comment", "purge_step"),
    "wandb": ("id", "dir", "resume"),
    "trackio": ("resume",),
}


def require_installed(kind: str | None, options: dict[str, object] | None = None) -> None:
    """Raise FairDiffError if the tracker's package is not installed, or for options its start function does not have."""
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
    """One run of a tracker; a resumed training continues the same run.

    options: arguments of the start function in STARTS, such as project, name, group and tags; they override our defaults.
    """

    def __init__(self, kind: str, folder: Path, fingerprint: str, finished_steps: int, options: dict[str, object]):
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

        PartialState()  # accelerate's logging needs it; it uses the existing process group, if any
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
        """Log the numbers of a row of metrics.jsonl."""
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
    """Open a tracker and close it when the context ends, also after an error; None if `kind` is None."""
    if kind is None:
        yield None
        return
    tracker = Tracker(kind, folder, fingerprint, finished_steps, options)
    try:
        yield tracker
    finally:
        tracker.to.finish()
