"""The training loop: draw a batch, one step, clip, optimise, average, checkpoint; resumes bit-exactly on a CPU."""

import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from fairdiff import checkpoint
from fairdiff.errors import FairDiffError
from fairdiff.prompts import Prompt
from fairdiff.sampling import initial_noise
from fairdiff.step import Batch, StepResult, Trainee, training_step
from fairdiff.targets import smallest_batch
from fairdiff.tracking import Metrics, bias_of, progress

PATIENCE = 5  # bad steps in a row before the run is given up


@dataclass(frozen=True)
class Schedule:
    """How long and how: steps, images a step, pool of noises a prompt, [low, high] of T, optimiser settings, seed."""

    steps: int
    batch: int
    noise_pool: int
    sampler_steps: tuple[int, int]
    learning_rate: float
    weight_decay: float
    max_grad_norm: float | None
    ema: float
    checkpoint_every: int
    seed: int


def draw_batch(prompts: list[Prompt], schedule: Schedule, step: int) -> Batch:
    """The batch of one step, a function of (seed, step) only.

    Prompts go round in a new order each epoch; images are drawn without replacement from the prompt's noise pool.
    """
    epoch, position = divmod(step, len(prompts))
    order = torch.randperm(len(prompts), generator=_generator(schedule.seed, 1, epoch))
    generator = _generator(schedule.seed, 2, step)
    indices = torch.randperm(schedule.noise_pool, generator=generator)[: schedule.batch].tolist()
    low, high = schedule.sampler_steps
    sampler_steps = int(torch.randint(low, high + 1, (), generator=generator))
    return Batch(prompts[order[position]].text, indices, sampler_steps, schedule.seed, generator)


def _generator(seed: int, stream: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 8 + stream) * 10_000_019 + index)


def train(
    trainee: Trainee, prompts: list[Prompt], schedule: Schedule, folder: Path, fingerprint: str, console: Console
) -> None:
    """Train the adapter in place until `schedule.steps`, from the folder's checkpoint if there is one.

    Leaves the EMA weights in the adapter. Raises FairDiffError on a gradient that is exactly zero, on PATIENCE bad
    steps in a row, and if the trained adapter changes no picture.
    """
    parameters = trainee.adapter.parameters()
    optimizer = torch.optim.AdamW(parameters, schedule.learning_rate, weight_decay=schedule.weight_decay)
    ema = checkpoint.Ema(parameters, schedule.ema)
    untrained = [p.detach().clone() for p in parameters]
    start = checkpoint.load(folder / "checkpoints", fingerprint, ema, optimizer)
    if start > schedule.steps:
        raise FairDiffError(
            f"steps: found {schedule.steps}, but {folder} already holds {start}; allowed: {start} or more"
        )
    metrics = Metrics(folder / "metrics.jsonl", start)
    warn_about_small_batches(trainee, schedule.batch, console)
    running: dict[str, float] = {}
    bad = 0
    with progress(console) as bar:
        task = bar.add_task("training", total=schedule.steps, completed=start, note="")
        for step in range(start, schedule.steps):
            began = time.perf_counter()
            batch = draw_batch(prompts, schedule, step)
            optimizer.zero_grad()
            result = training_step(trainee, batch)
            norm, trouble = judge_step(result, parameters, schedule.max_grad_norm)
            if trouble:
                bad += 1
                warnings.warn(f"step {step}, prompt '{batch.prompt}': {trouble}; step skipped", stacklevel=1)
                if bad >= PATIENCE:
                    raise FairDiffError(
                        f"training: {PATIENCE} steps in a row were skipped, the last because: {trouble}"
                    )
            else:
                bad = 0
                optimizer.step()
                ema.update(step)
            biases = {a: bias_of(s) for a, s in result.shares.items() if s}
            running = {a: b if a not in running else 0.9 * running[a] + 0.1 * b for a, b in biases.items()}
            row = {"step": step, "prompt": batch.prompt, "faces": result.faces, "kept": result.kept, "grad_norm": norm}
            row |= {f"loss.{k}": v for k, v in result.terms.items()} | {f"bias.{a}": b for a, b in biases.items()}
            metrics.write(row | {"seconds": time.perf_counter() - began})
            bar.update(task, advance=1, note=_note(result, running))
            if (step + 1) % schedule.checkpoint_every == 0 or step + 1 == schedule.steps:
                checkpoint.save(folder / "checkpoints", step + 1, fingerprint, ema, optimizer)
    ema.copy_to_parameters()
    if all(torch.equal(p, q) for p, q in zip(parameters, untrained, strict=True)):
        raise FairDiffError("training: the adapter is what it was before training, every step was skipped")
    require_effect(trainee, prompts[0].text)


def judge_step(result: StepResult, parameters: list[torch.nn.Parameter], max_norm: float | None) -> tuple[float, str]:
    """Clip, and say what is wrong: (gradient norm, reason or ""). A norm of exactly zero is an error, not a bad step."""
    if result.trouble:
        return 0.0, result.trouble
    if result.faces == 0:
        return 0.0, "no face was found in any picture of the batch"
    if result.kept == 0:
        return 0.0, "no face got a label of enough confidence"
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf")))
    if not grads or norm == 0:
        raise FairDiffError("training: the adapter's gradient is exactly zero, so nothing is being trained")
    return norm, "" if torch.isfinite(torch.tensor(norm)) else f"the gradient norm is {norm}"


def warn_about_small_batches(trainee: Trainee, batch: int, console: Console) -> None:
    """Name the batch size below which a target share can give no face a confident label."""
    objective, known = trainee.objective, trainee.objective.target.known()
    for attribute in objective.target.attributes:
        classes = trainee.judges.classifier.attributes[attribute]
        for cls, shares in zip(classes, np.stack([t.marginal(attribute) for t in known], 1), strict=True):
            least = round(float(shares[shares > 0].min(initial=1)), 9)
            needed = smallest_batch(least, objective.confidence)
            if needed > batch:
                of_prompts = f" (the least of {len(known)} prompts)" if len(known) > 1 else ""
                console.print(
                    f"warning: target.{attribute}.{cls} = {least:g}{of_prompts} gives no face a label with confidence "
                    f"{objective.confidence:g} in a batch of {batch}; it needs global_batch >= {needed}"
                )


def require_effect(trainee: Trainee, prompt: str) -> None:
    """Raise if pictures with the adapter on and off are bit-equal: an adapter that changes nothing is an error."""
    model, method = trainee.model, trainee.method
    noise = initial_noise(prompt, 0, [0], model.latent_shape).to(model.unet.device)
    on = model.generator(method.guidance, 2, trainee.adapter.prefix)(prompt, noise)
    with trainee.adapter.off():
        off = model.generator(method.guidance, 2)(prompt, noise)
    if torch.equal(on, off):
        raise FairDiffError("training: the trained adapter changes nothing in the pictures")


def _note(result: StepResult, running: dict[str, float]) -> str:
    terms = " ".join(f"{name} {value:.3f}" for name, value in result.terms.items())
    return f"{terms}  bias " + " ".join(f"{a} {b:.2f}" for a, b in running.items())
