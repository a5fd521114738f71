"""The training loop: draw batches for a few prompts, update, average, validate, write checkpoints.

Resumes bit-exactly on a CPU: whatever is not in the checkpoint is a function of (seed, step).
"""

import hashlib
import math
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fairdiff.diffusion.adapters import changes_images
from fairdiff.distributed import World
from fairdiff.errors import FairDiffError
from fairdiff.fingerprint import of_tensors
from fairdiff.objective.balance import Balance
from fairdiff.objective.targets import smallest_batch
from fairdiff.prompts import Prompt
from fairdiff.training import checkpoint, pictures
from fairdiff.training.step import Batch, Trainee
from fairdiff.training.trackers import Tracker, open_tracker
from fairdiff.training.tracking import Metrics, progress, read_metrics
from fairdiff.training.update import Update, gather, shares_and_targets
from fairdiff.training.validation import Best, Validation, validate

CHECKPOINT_EVERY = 10  # steps
PATIENCE = 10  # steps in a row that align nothing before the run is given up


@dataclass(frozen=True)
class Schedule:
    """Schedule of a training: steps, prompts a step, images and noise pool of a prompt, [low, high] of T, optimiser, seed.

    decay: of the learning rate, see `learning_rate`. validation, tracker: None for none; tracker_options: see `trackers`.
    """

    steps: int
    batch: int
    noise_pool: int
    sampler_steps: tuple[int, int]
    learning_rate: float
    weight_decay: float
    ema: float
    seed: int
    prompts: int = 1
    decay: str = "constant"
    validation: Validation | None = None
    tracker: str | None = None
    tracker_options: dict[str, object] = field(default_factory=dict)


def learning_rate(schedule: Schedule, step: int) -> float:
    """The rate of training step `step`, counted from 0; a function of the step alone.

    Constant, or with u = step / steps in [0, 1): linear 1 - u, cosine (1 + cos(pi u)) / 2.
    """
    u = step / schedule.steps
    factor = {"constant": 1.0, "linear": 1 - u, "cosine": (1 + math.cos(math.pi * u)) / 2}
    return schedule.learning_rate * factor[schedule.decay]


def draw_batches(prompts: list[Prompt], schedule: Schedule, step: int) -> list[Batch]:
    """A batch for each prompt of one step, as a function of (seed, step) only.

    Each epoch visits all prompts in a new order. The batches of a prompt are slices of its noise pool, always the same
    ones, because they are whole blocks of the cache of reference images. Each slice has its own T, so that a second visit
    finds its reference images in the cache. Noises beyond the last whole slice are not used.
    """
    return [_draw(prompts, schedule, step * schedule.prompts + place) for place in range(schedule.prompts)]


def _draw(prompts: list[Prompt], schedule: Schedule, visit: int) -> Batch:
    epoch, position = divmod(visit, len(prompts))
    which = int(torch.randperm(len(prompts), generator=_generator(schedule.seed, 1, epoch))[position])
    generator = _generator(schedule.seed, 2, visit)
    copies = [i for i, prompt in enumerate(prompts) if prompt.text == prompts[which].text]  # `prompts.families` repeats
    turn, part = divmod(epoch * len(copies) + copies.index(which), schedule.noise_pool // schedule.batch)
    place = torch.arange(schedule.batch)
    if turn:  # its place says at which steps an image is replayed
        place = torch.randperm(schedule.batch, generator=_generator(schedule.seed, 3, turn * len(prompts) + copies[0]))
    indices = (part * schedule.batch + place).tolist()
    torch.randint(1, (), generator=generator)  # which T once took: runs of one T keep their digits
    prompt = prompts[which]
    steps = slice_steps(schedule, prompt.text, part)
    return Batch(prompt.text, indices, steps, schedule.seed, generator, prompt.people, bool(prompt.names))


def slice_steps(schedule: Schedule, prompt: str, part: int) -> int:
    """T of one slice of a prompt's noises, uniform over {low .. high}; the same whatever else is trained on."""
    low, high = schedule.sampler_steps
    digest = hashlib.sha256(f"{schedule.seed}|{prompt}|{part}".encode()).digest()
    return low + int.from_bytes(digest[:7], "big") % (high - low + 1)


def _generator(seed: int, stream: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 8 + stream) * 10_000_019 + index)


def train(
    trainee: Trainee, prompts: list[Prompt], schedule: Schedule, folder: Path, fingerprint: str, console: Console
) -> None:
    """Train the adapter in place until `schedule.steps`, from the folder's checkpoint if there is one.

    Leaves the averaged weights in the adapter: with validation the best ones, else the last. Raises FairDiffError if the
    gradient is exactly zero, if PATIENCE steps in a row have no alignment loss, and if the trained adapter changes no
    image. With several processes, the first one reads and writes the folder.
    """
    world, validation = trainee.world, schedule.validation
    state = _begin(trainee, schedule)
    start = _resume(state, schedule, folder, fingerprint, console, world)
    metrics = Metrics(folder / "metrics.jsonl", start) if world.first else None
    warn_about_small_batches(trainee, schedule.batch, console)
    grids = _grids(trainee, prompts, schedule)
    running: dict[str, float] = {}
    idle = 0
    with progress(console) as bar, open_tracker(
        schedule.tracker if world.first else None, folder, fingerprint, start, schedule.tracker_options
    ) as tracker:
        task = bar.add_task("training", total=schedule.steps, completed=start, note="")
        for step in range(start, schedule.steps):
            if validation and state.best.exhausted(validation.patience):
                break
            began = time.perf_counter()
            update = gather(trainee, draw_batches(prompts, schedule, step))
            idle = count_idle(idle, step, update, console)
            rate = learning_rate(schedule, step)
            if update.good:
                state.step(step, rate)
            row = {"step": step} | update.row() | shares_and_targets(trainee, update) | {"learning_rate": rate}
            row["seconds"] = time.perf_counter() - began
            due = validation is not None and (validation.due(step + 1) or step + 1 == schedule.steps)
            if due:
                row |= state.validated(trainee, validation, schedule.seed, step + 1)
            if metrics:
                metrics.write(row)
            if tracker:
                tracker.log(row)
            if world.first and pictures.due(step, schedule.steps):
                keep_grid(grids, state.ema, folder, step, tracker)
            running |= {a: 0.9 * running.get(a, b) + 0.1 * b for a, b in update.biases().items()}
            bar.update(task, advance=1, note=_note(update, running))
            if due or (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == schedule.steps:
                state.save(folder, step + 1, fingerprint, world)
    finish(schedule, state.ema, state.best, console)
    if world.first:
        require_labels(folder)
    require_effect(trainee, prompts[0].text)


@dataclass(frozen=True)
class _State:
    """The state that training changes: the adapter's parameters and everything else in a checkpoint."""

    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer
    ema: checkpoint.Ema
    best: Best
    balance: Balance | None

    @property
    def parts(self) -> dict:
        """The parts of a checkpoint."""
        parts = {"ema": self.ema, "optimizer": self.optimizer, "best": self.best}
        return parts | ({"balance": self.balance} if self.balance else {})

    def step(self, step: int, rate: float) -> None:
        """Update the adapter by the gradient that it has, at this rate, and the averages."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.ema.update(step)

    def validated(self, trainee: Trainee, validation: Validation, seed: int, steps: int) -> dict:
        """The validation of the averages after so many steps; the averages are kept if they are the best."""
        with self.ema.in_place():
            found = validate(trainee, validation, seed)
        self.best.update(steps, found, validation.floor, self.ema.shadow)
        return found

    def save(self, folder: Path, steps: int, fingerprint: str, world: World) -> None:
        """A checkpoint after so many steps; FairDiffError unless all processes have the same adapter."""
        world.require_same(f"training: the adapter after {steps} steps", partial(of_tensors, self.parameters))
        if world.first:
            checkpoint.save(folder / "checkpoints", steps, fingerprint, self.parts)


def _begin(trainee: Trainee, schedule: Schedule) -> _State:
    parameters = trainee.adapter.parameters()
    optimizer = torch.optim.AdamW(parameters, schedule.learning_rate, weight_decay=schedule.weight_decay)
    return _State(parameters, optimizer, checkpoint.Ema(parameters, schedule.ema), Best(), trainee.balance)


def _resume(
    state: _State, schedule: Schedule, folder: Path, fingerprint: str, console: Console, world: World
) -> int:
    """Load the folder's checkpoint and return its number of steps; 0 without one."""
    say = partial(console.print, markup=False)
    start = checkpoint.load_together(folder / "checkpoints", fingerprint, state.parts, say, world)
    if start > schedule.steps:
        raise FairDiffError(
            f"steps: found {schedule.steps}, but {folder} already holds {start}; allowed: {start} or more"
        )
    return start


def _grids(trainee: Trainee, prompts: list[Prompt], schedule: Schedule) -> pictures.Grids:
    """Image grids for validation prompts if there are some, else for training prompts."""
    shown = schedule.validation.prompts if schedule.validation else prompts
    texts = [prompt.text for prompt in shown if prompt.people and not prompt.names]
    return pictures.Grids(trainee, texts or [prompts[0].text], schedule.sampler_steps[1], schedule.seed)


def keep_grid(
    grids: pictures.Grids, ema: checkpoint.Ema, folder: Path, step: int, tracker: Tracker | None
) -> None:
    """Write a grid of the averaged adapter into the run folder, and hand it to the tracker."""
    with ema.in_place():
        grid = grids.grid()
    pictures.save(grid, folder, step + 1)
    if tracker:
        tracker.images("before and after", grid, step)


def require_labels(folder: Path) -> None:
    """FairDiffError if no step of a run had a label for the alignment loss."""
    rows = read_metrics(folder / "metrics.jsonl")
    if rows and not any(row.get("kept") for row in rows):
        raise FairDiffError(
            "training: nothing was learnt about people: no step had a face with a label (loss.confidence, global_batch), "
            "or all were of prompts without people"
        )


def finish(schedule: Schedule, ema: checkpoint.Ema, best: Best, console: Console) -> None:
    """Leave the chosen averages in the adapter, and print which ones if validation chose."""
    if best.step is not None:
        for shadow, average in zip(ema.shadow, best.averages, strict=True):
            shadow.copy_(average)
        console.print(f"best validation: after {best.step} steps, distance to the target {best.score:.3f}")
    elif schedule.validation:
        console.print(
            f"warning: no validation reached validation.floor={schedule.validation.floor:g}; the last averages are saved"
        )
    ema.copy_to_parameters()


def count_idle(idle: int, step: int, update: Update, console: Console) -> int:
    """The number of steps in a row, up to this one, without alignment loss: no confident label, or no finite gradient.

    Steps with only prompts without people do not count. Prints a warning for each; raises FairDiffError at PATIENCE.
    """
    reasons = []
    for prompt, reason in update.skipped:
        what = "prompt skipped" if update.good else "step skipped"
        reasons.append(f"prompt '{prompt}': {reason}; {what}")
    if update.people and not update.aligned:
        nobody = not any(result.faces for _, result in update.good)
        what = "no face was found in any image" if nobody else "no face got a confident label"
        reasons.append(f"{what}; only the image and face terms are trained")
    for reason in reasons:
        console.print(f"warning: step {step}, {reason}", markup=False)
    if update.aligned:
        return 0
    if reasons and idle + 1 >= PATIENCE:
        raise FairDiffError(f"training: {PATIENCE} steps in a row had no alignment loss, the last because: {reasons[-1]}")
    return idle + bool(reasons)


def warn_about_small_batches(trainee: Trainee, batch: int, console: Console) -> None:
    """Name the batch size below which a target share can give no face a confident label."""
    objective, known = trainee.objective, trainee.objective.target.known()
    for attribute in objective.target.attributes:
        classes = trainee.perception.classifier.attributes[attribute]
        for cls, shares in zip(classes, np.stack([t.marginal(attribute) for t in known], 1), strict=True):
            least = round(float(shares[shares > 0].min(initial=1)), 9)
            needed = smallest_batch(least, objective.confidence)
            if needed > batch:
                of_prompts = f" (the least of {len(known)} prompts)" if len(known) > 1 else ""
                console.print(
                    f"warning: target.{attribute}.{cls} = {least:g}{of_prompts} is too small for a label with confidence "
                    f"{objective.confidence:g} in a batch of {batch}; it needs global_batch >= {needed}"
                )


def require_effect(trainee: Trainee, prompt: str) -> None:
    """Raise if images with the adapter on and off are bit-equal: an adapter that changes nothing is an error."""
    if not changes_images(trainee.model, trainee.adapter, prompt, trainee.method.guidance):
        raise FairDiffError("training: the trained adapter changes nothing in the images")


def _note(update: Update, running: dict[str, float]) -> str:
    terms = " ".join(f"{name} {value:.3f}" for name, value in update.terms().items())
    return f"{terms}  bias " + " ".join(f"{a} {b:.2f}" for a, b in running.items())
