"""The training loop: draw batches of a few prompts, update, average, validate, checkpoint.

It resumes bit-exactly on a CPU: everything that is not in the checkpoint is a function of (seed, step).
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
PATIENCE = 10  # the run fails after this many steps in a row that align nothing


@dataclass(frozen=True)
class Schedule:
    """The settings of the training loop and its optimiser.

    prompts: per step. batch, noise_pool: images per prompt. sampler_steps: [low, high] of T. ema: decay of the averages.
    decay: see `learning_rate`. validation, tracker: None for none. tracker_options: see `trackers`.
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
    """Return the learning rate of training step `step`, counted from 0.

    It is constant, or has with u = step / steps in [0, 1) the factor 1 - u (linear) or (1 + cos(pi u)) / 2 (cosine).
    """
    u = step / schedule.steps
    factor = {"constant": 1.0, "linear": 1 - u, "cosine": (1 + math.cos(math.pi * u)) / 2}
    return schedule.learning_rate * factor[schedule.decay]


def draw_batches(prompts: list[Prompt], schedule: Schedule, step: int) -> list[Batch]:
    """Return one batch for each prompt of a step, a function of (seed, step) only.

    Each epoch visits all prompts in a new order. A prompt's batches are the slices of its noise pool in turn, always the
    same slices, since they are whole blocks of the cache of reference images. A slice has a fixed T, so that a second visit
    finds its reference images. Indices beyond the last whole slice are not used.
    """
    return [_draw(prompts, schedule, step * schedule.prompts + place) for place in range(schedule.prompts)]


def _draw(prompts: list[Prompt], schedule: Schedule, visit: int) -> Batch:
    epoch, position = divmod(visit, len(prompts))
    which = int(torch.randperm(len(prompts), generator=_generator(schedule.seed, 1, epoch))[position])
    generator = _generator(schedule.seed, 2, visit)
    copies = [i for i, prompt in enumerate(prompts) if prompt.text == prompts[which].text]  # repeated by `prompts.families`
    turn, part = divmod(epoch * len(copies) + copies.index(which), schedule.noise_pool // schedule.batch)
    place = torch.arange(schedule.batch)
    if turn:  # its place in the batch decides at which steps an image is replayed
        place = torch.randperm(schedule.batch, generator=_generator(schedule.seed, 3, turn * len(prompts) + copies[0]))
    indices = (part * schedule.batch + place).tolist()
    torch.randint(1, (), generator=generator)  # T was once drawn here: keeps the results of runs with one T bit-equal
    prompt = prompts[which]
    steps = slice_steps(schedule, prompt.text, part)
    return Batch(prompt.text, indices, steps, schedule.seed, generator, prompt.people, bool(prompt.names))


def slice_steps(schedule: Schedule, prompt: str, part: int) -> int:
    """Return T of one slice of a prompt's noise pool, uniform over {low .. high}, independent of all other prompts."""
    low, high = schedule.sampler_steps
    digest = hashlib.sha256(f"{schedule.seed}|{prompt}|{part}".encode()).digest()
    return low + int.from_bytes(digest[:7], "big") % (high - low + 1)


def _generator(seed: int, stream: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 8 + stream) * 10_000_019 + index)


def train(
    trainee: Trainee, prompts: list[Prompt], schedule: Schedule, folder: Path, fingerprint: str, console: Console
) -> None:
    """Train the adapter in place until `schedule.steps`, from the folder's checkpoint if there is one.

    Leaves averaged weights (EMA) in the adapter: those of the best validation if there is one, else the last ones. Raises
    FairDiffError on a gradient of exactly zero, on PATIENCE steps in a row that align nothing, and if the trained adapter
    changes no image. Of several processes only the first reads and writes the folder.
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
    """Everything that training changes: the adapter's parameters and the other parts of a checkpoint."""

    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer
    ema: checkpoint.Ema
    best: Best
    balance: Balance | None

    @property
    def parts(self) -> dict:
        """The parts of a checkpoint by name."""
        parts = {"ema": self.ema, "optimizer": self.optimizer, "best": self.best}
        return parts | ({"balance": self.balance} if self.balance else {})

    def step(self, step: int, rate: float) -> None:
        """Update the adapter by its current gradient at this learning rate, then update the averages."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.ema.update(step)

    def validated(self, trainee: Trainee, validation: Validation, seed: int, steps: int) -> dict:
        """Validate the averages after `steps` steps, keep them if they are the best, and return the validation's row."""
        with self.ema.in_place():
            found = validate(trainee, validation, seed)
        self.best.update(steps, found, validation.floor, self.ema.shadow)
        return found

    def save(self, folder: Path, steps: int, fingerprint: str, world: World) -> None:
        """Write a checkpoint after `steps` steps; FairDiffError unless all processes have the same adapter."""
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
    """Load the folder's checkpoint and return its number of finished steps, 0 without one."""
    say = partial(console.print, markup=False)
    start = checkpoint.load_together(folder / "checkpoints", fingerprint, state.parts, say, world)
    checkpoint.require_enough(folder, start, schedule.steps)  # in every process, so that none waits for another
    return start


def _grids(trainee: Trainee, prompts: list[Prompt], schedule: Schedule) -> pictures.Grids:
    """Return grids of the validation prompts if there are any, otherwise of the training prompts."""
    shown = schedule.validation.prompts if schedule.validation else prompts
    texts = [prompt.text for prompt in shown if prompt.people and not prompt.names]
    return pictures.Grids(trainee, texts or [prompts[0].text], schedule.sampler_steps[1], schedule.seed)


def keep_grid(
    grids: pictures.Grids, ema: checkpoint.Ema, folder: Path, step: int, tracker: Tracker | None
) -> None:
    """Write a grid of the averaged adapter into the run folder and log it to the tracker."""
    with ema.in_place():
        grid = grids.grid()
    pictures.save(grid, folder, step + 1)
    if tracker:
        tracker.images("before and after", grid, step)


def require_labels(folder: Path) -> None:
    """Raise FairDiffError if no step of a run had a face with a kept label."""
    rows = read_metrics(folder / "metrics.jsonl")
    if rows and not any(row.get("kept") for row in rows):
        raise FairDiffError(
            "training: nothing was learnt about people: no step had a face with a label (loss.confidence, global_batch), "
            "or all were of prompts without people"
        )


def finish(schedule: Schedule, ema: checkpoint.Ema, best: Best, console: Console) -> None:
    """Copy the chosen averages into the adapter: the best validation's if there is one, otherwise the last."""
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
    """Return how many steps in a row, up to this one, aligned nothing, for want of a confident label or a finite gradient.

    A step that has prompts without people only is not counted. Prints warnings; raises FairDiffError at PATIENCE.
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
    """Warn of target shares that give no face a confident label in this batch, with the batch size that they need."""
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
    """Raise FairDiffError if images with the adapter on and off are bit-equal."""
    if not changes_images(trainee.model, trainee.adapter, prompt, trainee.method.guidance):
        raise FairDiffError("training: the trained adapter changes nothing in the images")


def _note(update: Update, running: dict[str, float]) -> str:
    terms = " ".join(f"{name} {value:.3f}" for name, value in update.terms().items())
    return f"{terms}  bias " + " ".join(f"{a} {b:.2f}" for a, b in running.items())
