"""Charts as inline SVG text: they follow the page's colours (light and dark) and need no plotting library.

Colours come from the page's CSS variables (--before, --start, --after, --ink, --muted, --line, --floor). Labels are escaped.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image


@dataclass(frozen=True)
class Mark:
    """A value with its interval, all on the chart's scale; an end that is None is not drawn."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of a chart: a mark for each model (None: undefined), and the target, None where none was set."""

    label: str
    marks: dict[str, Mark | None]
    target: float | None = None


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float, kind: str) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="{kind}"/>'


def _svg(width: float, height: float, body: list[str], title: str) -> str:
    """Scales with the page between two thirds and five quarters of its size; on a narrower page its box scrolls."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{1.25 * width:.0f}px;min-width:{0.66 * width:.0f}px" '
        f'role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
    )


def _mark(mark: Mark | None, x_of, y: float, kind: str, tip: str) -> list[str]:
    """Whisker and dot; "before" hollow, "after" filled, so that they differ without colour too."""
    if mark is None:
        return []
    parts = [f"<g><title>{escape(tip)}</title>"]
    if mark.low is not None and mark.high is not None:
        parts.append(_line(x_of(mark.low), y, x_of(mark.high), y, f"whisker {kind}"))
    parts.append(f'<circle cx="{x_of(mark.value):.1f}" cy="{y:.1f}" r="4.2" class="dot {kind}"/></g>')
    return parts


def _tip(label: str, kind: str, mark: Mark | None) -> str:
    if mark is None:
        return ""
    interval = "" if mark.low is None or mark.high is None else f" ({mark.low:.0%} to {mark.high:.0%})"
    return f"{label}, {kind}: {mark.value:.0%}{interval}"


def share_chart(panels: Sequence[tuple[str, Sequence[Row]]], title: str) -> str:
    """Shares in [0, 1] with intervals, one panel a class, one line a prompt (or class); the target is a dashed line.

    All panels have the same rows in the same order.
    """
    rows, most = panels[0][1], 48
    names = [row.label if len(row.label) <= most else row.label[: most - 2].rstrip() + " …" for row in rows]
    gutter = max(170, 24 + 6.8 * max(map(len, names)))
    width = 860 if len(panels) == 1 else 1072
    step, top, bottom = 24, 30, 24
    height = top + step * len(rows) + bottom
    each = (width - gutter - 14 * len(panels)) / len(panels)
    body = []
    ticks = (0, 0.25, 0.5, 0.75, 1) if each > 250 else (0, 0.5, 1)
    for i in range(0, len(rows), 2):
        body.append(f'<rect x="0" y="{top + step * i}" width="{width}" height="{step}" class="stripe"/>')
    body += [_text(gutter - 12, top + step * (i + 0.5) + 4, name, "name", "end") for i, name in enumerate(names)]
    for column, (name, lines) in enumerate(panels):
        left = gutter + column * (each + 14)

        def x_of(value: float, left: float = left) -> float:
            return left + 6 + min(max(value, 0), 1) * (each - 12)

        body.append(_text(left + 6, 14, name, "head"))
        for tick in ticks:
            body.append(_line(x_of(tick), top - 6, x_of(tick), height - bottom + 2, "grid"))
            body.append(_text(x_of(tick), height - 6, f"{tick:.0%}", "tick", "middle"))
        for i, row in enumerate(lines):
            y = top + step * (i + 0.5)
            if row.target is not None:
                x = x_of(row.target)
                body.append(_line(x, y - step / 2, x, y + step / 2, "target"))
            for place, (kind, mark) in enumerate(row.marks.items()):
                shift = 9 * (place - (len(row.marks) - 1) / 2) if len(row.marks) > 1 else -4.5
                body += _mark(mark, x_of, y + shift * min(1, 2 / len(row.marks)), kind, _tip(row.label, kind, mark))
    return _svg(width, height, body, title)


def bias_chart(marks: dict[str, Mark | None], floor: float | None, limit: float, title: str) -> str:
    """A value with its interval for each model on [0, limit], and the noise floor as a shaded band from 0."""
    width, top, left, right = 320, 12, 48, 14
    deep = 24 * max(len(marks), 2)

    def x_of(value: float) -> float:
        return left + min(max(value, 0), limit) / limit * (width - left - right)

    body = []
    if floor is not None:
        band = f'width="{x_of(floor) - left:.1f}" height="{deep + 8}" class="floor"'
        body.append(f'<rect x="{left}" y="{top - 8}" {band}><title>noise floor {floor:.3f}</title></rect>')
    ticks = [limit * i / 4 for i in range(5)]
    for tick in ticks:
        body.append(_line(x_of(tick), top - 8, x_of(tick), top + deep, "grid"))
        body.append(_text(x_of(tick), top + deep + 16, f"{tick:.3g}", "tick", "middle"))
    for place, (kind, mark) in enumerate(marks.items()):
        y = top + 8 + 24 * place
        if mark is not None:
            body.append(_text(left - 8, y + 4, kind, "tick", "end"))
            body += _mark(mark, x_of, y, kind, f"{kind}: {mark.value:.3f}")
    return _svg(width, top + deep + 24, body, title)


def line_chart(
    lines: dict[str, Sequence[tuple[float, Mark | None]]], floor: float | None, title: str, across: str
) -> str:
    """Values from 0 with intervals against a number, one line a model; the noise floor is a shaded band from 0."""
    width, height, left, right, top, bottom = 320, 200, 46, 16, 26, 40
    xs = sorted({x for points in lines.values() for x, _ in points})
    marks = [mark for points in lines.values() for _, mark in points if mark is not None]
    most = max([mark.high or mark.value for mark in marks], default=0) or 1
    span = (xs[-1] - xs[0]) or 1

    def x_of(x: float) -> float:
        return left + 8 + (x - xs[0]) / span * (width - left - right - 16)

    def y_of(y: float) -> float:
        return top + (1 - min(max(y, 0), most) / most) * (height - top - bottom)

    body = [_text(left, 14, title, "head")]
    if floor is not None:
        band = f'width="{width - left - right}" height="{y_of(0) - y_of(floor):.1f}" class="floor"'
        body.append(f'<rect x="{left}" y="{y_of(floor):.1f}" {band}/>')
    for share in (0, 0.5, 1):
        y = y_of(share * most)
        body += [_line(left, y, width - right, y, "grid"), _text(left - 6, y + 4, f"{share * most:.2g}", "tick", "end")]
    body += [_text(x_of(x), height - 22, f"{x:g}", "tick", "middle") for x in xs]
    body.append(_text((left + width - right) / 2, height - 5, across, "tick", "middle"))
    for kind, points in lines.items():
        there = [(x, mark) for x, mark in points if mark is not None]
        path = " ".join(f"{x_of(x):.1f},{y_of(mark.value):.1f}" for x, mark in there)
        body.append(f'<polyline points="{path}" class="{kind}"/>')
        for x, mark in there:
            ends = "" if mark.low is None or mark.high is None else f" [{mark.low:.3f}, {mark.high:.3f}]"
            body.append(f"<g><title>{escape(f'{kind}, {x:g}: {mark.value:.3f}{ends}')}</title>")
            if ends:
                body.append(_line(x_of(x), y_of(mark.low), x_of(x), y_of(mark.high), f"whisker {kind}"))
            body.append(f'<circle cx="{x_of(x):.1f}" cy="{y_of(mark.value):.1f}" r="4.2" class="dot {kind}"/></g>')
    return _svg(width, height, body, title)


def _smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average without its start-up bias."""
    result, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        result.append(total / mass)
    return result


def curve_chart(points: Sequence[tuple[float, float]], title: str) -> str:
    """One curve over steps: the values faint, their moving average on top."""
    width, height, left, right, top, bottom = 320, 170, 46, 10, 26, 24
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(0.0, *ys), max(ys)
    high = high if high > low else low + 1
    span = max(xs[-1] - xs[0], 1)

    def path(values: Sequence[float]) -> str:
        across = [left + (x - xs[0]) / span * (width - left - right) for x in xs]
        down = [top + (high - y) / (high - low) * (height - top - bottom) for y in values]
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))

    body = [_text(left, 14, title, "head")]
    for share in (0, 0.5, 1):
        y = top + (1 - share) * (height - top - bottom)
        body.append(_line(left, y, width - right, y, "grid"))
        body.append(_text(left - 6, y + 4, f"{low + share * (high - low):.2g}", "tick", "end"))
    body.append(_text(left, height - 6, f"step {xs[0]:g}", "tick"))
    body.append(_text(width - right, height - 6, f"{xs[-1]:g}", "tick", "end"))
    body.append(f'<polyline points="{path(ys)}" class="raw"/>')
    body.append(f'<polyline points="{path(_smooth(ys, 0.9))}" class="smooth"/>')
    return _svg(width, height, body, title)


def picture_uri(path: Path) -> str:
    """An image file as a JPEG data URI (quality 90), for a page that needs no network."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
