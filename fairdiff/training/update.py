"""The gradient of one update: the mean over several prompts, without those whose step failed.

Prompts pull in opposite directions: what makes carpenters more female does so to nurses. More images of one prompt do
not lessen this noise, images divided among several prompts do (docs/performance.md has the numbers).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from fairdiff.bias import bias
from fairdiff.distributed import ALONE, World
from fairdiff.errors import FairDiffError
from fairdiff.training.step import Batch, StepResult, Trainee, training_step

Step = Callable[[Trainee, Batch], StepResult]


@dataclass
class Update:
    """The batches of an update: results by prompt, the norm of their mean gradient, and (prompt, reason) of skipped ones."""

    good: list[tuple[str, StepResult]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    norm: float = 0.0

    def row(self) -> dict:
        """Its row in metrics.jsonl: sums of faces and kept labels, means over prompts of the rest."""
        results = [result for _, result in self.good]
        row = {"prompts": [prompt for prompt, _ in self.good], "grad_norm": self.norm}
        row |= {"faces": sum(r.faces for r in results), "kept": sum(r.kept for r in results)}
        row |= {f"loss.{k}": v for k, v in self.terms().items()}
        row |= {f"grad_share.{k}": v for k, v in _means([r.grad_share for r in self.usual]).items()}
        return row | {f"bias.{k}": v for k, v in self.biases().items()}

    @property
    def usual(self) -> list[StepResult]:
        """The results of prompts that show people and name no class."""
        return [result for _, result in self.good if result.people and not result.named]

    @property
    def aligned(self) -> bool:
        """Whether a face of any prompt had a confident label (prompts without people have none)."""
        return any(result.kept for _, result in self.good)

    @property
    def people(self) -> bool:
        """Whether any of the good steps was of a prompt of people."""
        return any(result.people for _, result in self.good)

    def terms(self) -> dict[str, float]:
        """Mean of each loss term over prompts of people that name no class; the alignment term of those that do; and what
        prompts without people lost of their images.
        """
        others = [{"without_people": r.terms["image"]} for _, r in self.good if not r.people]
        others += [{"named": r.terms["align"]} for _, r in self.good if r.named]
        return _means([r.terms for r in self.usual] + others)

    def biases(self) -> dict[str, float]:
        """Mean over prompts of the bias of each attribute in a prompt's images, by the training judge."""
        return _means([{a: float(bias(s)) for a, s in result.shares.items() if s} for result in self.usual])


def gather(trainee: Trainee, batches: list[Batch], step: Step = training_step) -> Update:
    """Leave the mean gradient of the batches, one for each prompt, in the adapter.

    A batch whose gradient is not finite is skipped and named in `skipped`; if all are, the adapter has no gradient. Raises
    FairDiffError for a gradient of exactly zero. With several processes, each adds the part of its own images, and all skip
    the same batches.
    """
    parameters, update, world = trainee.adapter.parameters(), Update(), trainee.world
    sums: list[Tensor | None] = [None] * len(parameters)
    for batch in batches:
        for p in parameters:
            p.grad = None
        result = step(trainee, batch)
        if reason := skip_reason(result, parameters, world):
            update.skipped.append((batch.prompt, reason))
            continue
        update.good.append((batch.prompt, result))
        sums = [_plus(total, p.grad) for total, p in zip(sums, parameters, strict=True)]
    whole = iter(world.add_up([total for total in sums if total is not None]))
    for p, total in zip(parameters, sums, strict=True):
        p.grad = None if total is None else next(whole) / len(update.good)
    if update.good:
        update.norm = _norm(parameters)
    return update


def skip_reason(result: StepResult, parameters: list[torch.nn.Parameter], world: World = ALONE) -> str:
    """Why a batch is skipped, "" if it is not; the same in all processes, whichever found a reason.

    A gradient of exactly zero is an error, because then nothing is trained. Only a batch without confident labels may have
    one, as long as its images are the reference images.
    """
    if result.skipped:
        return result.skipped
    norm = math.hypot(*world.gather(_norm(parameters)))
    if norm == 0 and result.kept:
        raise FairDiffError("training: the adapter's gradient is exactly zero, so nothing is being trained")
    return "" if math.isfinite(norm) else f"the gradient norm is {norm}"


def _norm(parameters: list[torch.nn.Parameter]) -> float:
    grads = [p.grad for p in parameters if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0


def _plus(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    return total if grad is None else grad.clone() if total is None else total + grad


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every key over the rows that have it."""
    return {key: fmean(row[key] for row in rows if key in row) for key in dict.fromkeys(k for row in rows for k in row)}


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
