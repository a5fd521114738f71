"""The charts of a comparison: the frontier of distance and drift, and lines over a setting. It computes no statistics.

Colours and SVG come from `studies.page`. `draw` writes the same frontier with matplotlib.
"""

from pathlib import Path

from fairdiff.compare.groups import said
from fairdiff.errors import FairDiffError
from fairdiff.files import atomic_path
from fairdiff.studies.page import Point, curves_chart


def frontiers(found: dict) -> list[tuple[str, str, dict[str, Point], float | None]]:
    """Return (attribute, label of the x axis, a point for each group, noise floor) for each attribute with a target.

    x is the drift of the images from those before, 1 - cosine. Without drift, as in audits without an adapter, it is CLIP-T.
    """
    numbers = {entry["name"]: entry for entry in found["numbers"]}
    panels = []
    for name in found["targeted"]:
        up = numbers[f"{name} {found['distances'][name]}"]["rows"]
        for key, title, turn in (("image encoder", "drift of the images (0: none)", True), ("CLIP-T", "CLIP-T", False)):
            across = numbers[key]["rows"]
            cells = {group: (_last(across[group]), _last(up[group])) for group in up if group in across}
            points = {group: _point(*pair, group, turn) for group, pair in cells.items() if None not in pair}
            if points:
                floors = [up[group]["floor"] for group in points if up[group]["floor"] is not None]
                panels.append((name, title, points, max(floors) if floors else None))
                break
    return panels


def _last(row: dict) -> dict | None:
    return row["after"] or row["before"]


def _point(across: dict, up: dict, group: str, turn: bool) -> Point:
    ends = across["ci95"] or (None, None)
    x = across["value"]
    if turn:
        x, ends = 1 - x, [None if end is None else 1 - end for end in reversed(ends)]
    return Point(x, up["value"], *(up["ci95"] or (None, None)), tip=group, left=ends[0], right=ends[1])


def axis_of(found: dict) -> str | None:
    """Return the setting for the x axis: a number in all groups, with the most distinct values; None if there is none."""

    def numeric(values: list) -> bool:
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)

    counts = {key: len({*values}) for key, values in found["settings"].items() if numeric(values)}
    return max(counts, key=counts.get, default=None)


def lines_over(found: dict, axis: str, number: str) -> dict[str, list[Point]]:
    """Return lines of a number over a setting, one for each combination of the other settings.

    The model "before" has lines too if it differs between groups, or if a group has no "after".
    """
    (entry,) = (entry for entry in found["numbers"] if entry["name"] == number)
    moves = len({group["before"] for group in found["groups"]}) > 1
    lines: dict[str, list[Point]] = {}
    for group in found["groups"]:
        rest = ", ".join(f"{key}={said(value)}" for key, value in group["settings"].items() if key != axis)
        row = entry["rows"].get(group["name"])
        for model in ("before", "after"):
            cell = row and row[model]
            if cell and (model == "after" or moves or "after" not in group["models"]):
                x, ends = group["settings"][axis], cell["ci95"] or (None, None)
                name = ", ".join(part for part in (rest, model) if part)
                lines.setdefault(name, []).append(Point(x, cell["value"], *ends, tip=f"{name}: {group['name']}"))
    return {name: sorted(points, key=lambda point: point.x) for name, points in lines.items()}


def svg(found: dict) -> tuple[list[str], list[str]]:
    """Return the charts of the frontiers, and of the lines over a setting; each is [] if there is nothing to draw."""
    first = [
        curves_chart({n: [p] for n, p in points.items()}, f"{name} {found['distances'][name]}", title, floor)
        for name, title, points, floor in frontiers(found)
    ]
    axis, second = axis_of(found), []
    for name in found["targeted"] if axis else []:
        number = f"{name} {found['distances'][name]}"
        floor = next((p[3] for p in frontiers(found) if p[0] == name), None)
        second.append(curves_chart(lines_over(found, axis, number), number, axis, floor))
    return first, second


def draw(found: dict, path: Path) -> None:
    """Write the frontiers to an image file with matplotlib, an optional dependency. Bars are 95 % intervals."""
    from matplotlib.figure import Figure

    panels = frontiers(found)
    if not panels:
        raise FairDiffError("--picture: found no attribute with a target and images that an encoder has seen")
    figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained")
    for axes, (name, title, points, floor) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for group, p in points.items():
            bars = ((p.y, (p.low, p.high)), (p.x, (p.left, p.right)))
            down, left = ([[abs(v - end)] for end in ends] if None not in ends else None for v, ends in bars)
            axes.errorbar(p.x, p.y, yerr=down, xerr=left, fmt="o", label=group, lw=1)
        if floor is not None:
            axes.axhline(floor, color="grey", ls=":", label="noise floor")
        axes.set(xlabel=title, ylabel=f"{name} {found['distances'][name]}")
        axes.legend(fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix.removeprefix(".") or "png")
