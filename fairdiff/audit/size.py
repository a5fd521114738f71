"""The necessary size of an audit in words: prompts and images for this target, margin and judge."""

from collections.abc import Sequence

import numpy as np

from fairdiff.audit.axis import MetricSpec, axes_of, requested
from fairdiff.audit.estimand import FEW
from fairdiff.audit.judge import Judge, judge_of
from fairdiff.audit.planner import images_needed, reach
from fairdiff.audit.suite import ENOUGH
from fairdiff.audit.verdict import undefined

PROMPTS = (12, 24, ENOUGH, 48, 100)
MISSING = (0.0, 0.02)  # shares of images without a face
MORE_LABELS = (2, 4, 8, 16, 32, 64)  # multiples of the labelled faces of a judge


def size_lines(spec: MetricSpec, prompts: int) -> list[str]:
    """Return lines on the sizes with which 80 of 100 audits find a generator on target, per attribute and combination.

    Attributes without a target are left out. prompts: number of prompts in the settings. If prompts have different targets,
    the one with the rarest class is used, because it needs the most images.
    """
    lines = []
    for axis in axes_of(spec, prompts):
        if requested(axis, spec):
            rarest = axis.target_PK[int(axis.target_PK.min(1).argmin())]
            counts = spec.confusion.get(axis.name)
            judge = None if counts is None else judge_of(counts, spec.seed)
            own = len(axis.members) == 1
            lines += [_heading(axis.name, axis.classes, rarest, len(np.unique(axis.target_PK, axis=0)), spec.delta)]
            lines += [f"  {line}" for line in _axis(rarest, spec.delta, judge, own, sorted({*PROMPTS, prompts}))]
    few = any(f"prompts{FEW}:" in line for line in lines)
    return lines + [f"{FEW}: this holds for these prompts only, and others need {ENOUGH} prompts"] * few


def _heading(name: str, classes: Sequence[str], target_K, targets: int, delta: float) -> str:
    shares = ", ".join(f"{cls} {share:.3g}" for cls, share in zip(classes, target_K, strict=True))
    some = f", the one of {targets} targets with the rarest class" if targets > 1 else ""
    return f"{name} (target {shares}{some}): needed to show D below {delta:g} in 80 of 100 audits of a generator on target"


def _axis(target_K, delta: float, judge: Judge | None, own: bool, numbers: list[int]) -> list[str]:
    """Return the lines below a heading."""
    if reason := undefined([target_K]):
        return [f"no number of images shows it: {reason}"]
    if judge is not None and judge.refusal:
        return [f"no number of images shows it: {judge.refusal}"]
    lines = [_about_judge(judge, own)]
    lines += [_sentence(n, [images_needed(n, target_K, delta, judge, missing=m) for m in MISSING]) for n in numbers]
    if judge is not None and images_needed(ENOUGH, target_K, delta, judge) is None:
        lines.append(_labels(target_K, delta, judge))
    most = f"{100 * delta / reach(target_K):.2g} %"
    return [*lines, f"missing faces count as the worst case: if {most} of the images or more show none, no number is enough"]


def _about_judge(judge: Judge | None, own: bool) -> str:
    if judge is None:
        why = "its errors were not counted" if own else "errors of combinations are not undone"
        return f"the judge is taken for one that never errs: {why}"
    right = np.trace(judge.counts) / judge.counts.sum()
    return f"corrected for the judge's errors: {100 * right:.3g} % right on {judge.counts.sum():.0f} labelled faces"


def _sentence(prompts: int, images: list[int | None]) -> str:
    """Return how many images so many prompts need, first with a face in every image, then with some missing."""
    if images[0] is None:
        return f"{prompts} prompts: no number of images is enough"
    some = "no number is enough" if images[1] is None else f"{images[1]} each"
    return (
        f"{prompts} prompts{FEW if prompts < ENOUGH else ''}: {images[0]} images of each, {prompts * images[0]} in all; "
        f"if {100 * MISSING[1]:g} % show no face, {some}"
    )


def _labels(target_K, delta: float, judge: Judge) -> str:
    """Return how many labelled faces would be enough if the judge's error rates stayed the same."""
    for times in MORE_LABELS:
        more = judge_of(judge.counts * times)
        images = None if more.refusal else images_needed(ENOUGH, target_K, delta, more)
        if images is not None:
            faces = times * judge.counts.sum()
            return (
                f"the errors were counted on too few faces: {faces:.0f} faces with the same rates are enough, with {images} "
                f"images of each of {ENOUGH} prompts"
            )
    return "the errors were counted on too few faces"
