"""Write a judge's calibration as a Markdown page, and its reliability diagram as a PNG."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from statsmodels.stats.proportion import proportion_confint

from classifiers.calibration import Calibration
from classifiers.files import written

SMALL = 100  # the accuracy of a class with fewer faces says little


def page(calibrations: Mapping[str, Calibration], about: Mapping[str, str], picture: str | None) -> str:
    """Return the page as Markdown. about: lines "name: value" at the top. picture: file of the diagram, None without one."""
    lines = ["# A judge on labelled faces", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += ["- Labels are perceived presentation, never identity. [Brackets] hold 95 % Wilson intervals over faces.", ""]
    for name, c in calibrations.items():
        lines += [f"## {name}", "", _summary(c), "", *_confusion(c), ""]
        lines += [*_groups(c), ""]
    if picture is not None:
        lines += ["## Reliability", "", f"![Accuracy of faces by the judge's confidence]({picture})", ""]
        lines += ["On the diagonal the judge is right as often as it is sure. Below it is over-confident.", ""]
    return "\n".join(lines)


def _summary(c: Calibration) -> str:
    faces = int(c.counts.sum())
    text = f"Accuracy {_share(int(np.trace(c.counts)), faces)} of {faces} faces. Expected calibration error {c.ece:.3f}. "
    return text + f"Temperature {c.temperature:.2f} (above 1 is over-confident)."


def _share(right: int, faces: int) -> str:
    if not faces:
        return "none"
    low, high = proportion_confint(right, faces, 0.05, "wilson")
    return f"{right / faces:.3f} [{low:.3f}, {high:.3f}]"


def _confusion(c: Calibration) -> list[str]:
    rows = [f"| true ↓ judged → | {' | '.join(c.classes)} |", "|---" * (len(c.classes) + 1) + "|"]
    return rows + [f"| {cls} | {' | '.join(map(str, row))} |" for cls, row in zip(c.classes, c.counts.tolist(), strict=True)]


def _groups(c: Calibration) -> list[str]:
    """Return a table of accuracies per group, and per attribute the gap between its best and its worst group."""
    rows = ["| faces labelled | accuracy | faces |", "|---|---|---|"]
    gaps = []
    for attribute, group in (c.groups or {}).items():
        for cls, (right, faces) in group.items():
            rows.append(f"| {attribute}: {cls} | {_share(right, faces)}{' (few)' if faces < SMALL else ''} | {faces} |")
        known = [right / faces for right, faces in group.values() if faces]
        gaps.append(f"{attribute} {max(known) - min(known):.3f}")
    return [*rows, "", f"Gap between the best and the worst group: {', '.join(gaps)}."]


def draw_reliability(calibrations: Mapping[str, Calibration], file: Path) -> bool:
    """Write the reliability diagrams of all attributes as a PNG; return False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(3.2 * len(calibrations), 3.2), layout="constrained")
    for place, (name, c) in enumerate(calibrations.items(), 1):
        axes = figure.add_subplot(1, len(calibrations), place)
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        if c.bins is not None:
            full = c.bins.count > 0
            area = 10 + 150 * c.bins.count[full] / c.bins.count.sum()
            axes.scatter(c.bins.confidence[full], c.bins.accuracy[full], area, color="#00796b")
        axes.set(title=name, xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy", aspect="equal")
    with written(file) as part:
        figure.savefig(part, format="png", dpi=130)
    return True
