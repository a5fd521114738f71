"""Charts as inline SVG text. They use the page's colours (light and dark) and need no plotting library.

Colours come from the page's CSS variables (--before, --start, --after, --ink, --muted, --line, --floor). Labels are escaped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Mark:
    """A value with the ends of its interval. If an end is None, the interval is not drawn."""

    value: float
    low: float | None = None
    high: float | None = None


def mark_of(value: float | None, ends: list | None) -> Mark | None:
    """Return the mark of a number of audit.json and its interval, None if the number is undefined."""
    return None if value is None else Mark(value, *(ends or (None, None))[:2])


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float, kind: str) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="{kind}"/>'


def _svg(width: float, height: float, body: list[str], title: str) -> str:
    """Return an SVG that scales with the page between .66 and 1.25 of its size; on a narrower page its box scrolls."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{1.25 * width:.0f}px;min-width:{0.66 * width:.0f}px" '
        f'role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
    )


def _mark(mark: Mark | None, x_of, y: float, kind: str, tip: str) -> list[str]:
    """Return a whisker and a dot, hollow for "before" and filled for "after", so that they also differ without colour."""
    if mark is None:
        return []
    parts = [f"<g><title>{escape(tip)}</title>"]
    if mark.low is not None and mark.high is not None:
        parts.append(_line(x_of(mark.low), y, x_of(mark.high), y, f"whisker {kind}"))
    parts.append(f'<circle cx="{x_of(mark.value):.1f}" cy="{y:.1f}" r="4.2" class="dot {kind}"/></g>')
    return parts


def range_line(marks: dict[str, Mark | None], limit: float = 1.0, at: float | None = None) -> str:
    """Return the chart of a table row: each model's value with interval on [0, limit], dashed line `at` target or margin.

    Positions are percentages of the width, so the chart fits a narrow page. The page shows its numbers beside it as text.
    """

    def place(value: float) -> str:
        return f"{100 * min(max(value, 0), limit) / limit:.2f}%"

    height = 6 + 10 * len(marks)
    body = [f'<line x1="{25 * i}%" x2="{25 * i}%" y1="0" y2="{height}" class="grid"/>' for i in range(5)]
    if at is not None:
        body.append(f'<line x1="{place(at)}" x2="{place(at)}" y1="0" y2="{height}" class="target"/>')
    for row, (kind, mark) in enumerate(marks.items()):
        y = 8 + 10 * row
        if mark is None:
            continue
        if mark.low is not None and mark.high is not None:
            body.append(
                f'<line x1="{place(mark.low)}" x2="{place(mark.high)}" y1="{y}" y2="{y}" class="whisker {kind}"/>'
            )
        body.append(f'<circle cx="{place(mark.value)}" cy="{y}" r="4" class="dot {kind}"/>')
    return f'<svg class="line" height="{height}" aria-hidden="true">{"".join(body)}</svg>'


def bias_chart(
    marks: dict[str, Mark | None], floor: float | None, limit: float, title: str, margin: float | None = None
) -> str:
    """Return a chart of each model's value with interval on [0, limit]; the floor is a band from 0, the margin a line."""
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
    if margin is not None:
        body.append(_line(x_of(margin), top - 8, x_of(margin), top + deep, "target"))
    for place, (kind, mark) in enumerate(marks.items()):
        y = top + 8 + 24 * place
        if mark is not None:
            body.append(_text(left - 8, y + 4, kind, "tick", "end"))
            body += _mark(mark, x_of, y, kind, f"{kind}: {mark.value:.3f}")
    return _svg(width, top + deep + 24, body, title)


def line_chart(
    lines: dict[str, Sequence[tuple[float, Mark | None]]], floor: float | None, title: str, across: str
) -> str:
    """Return a chart of values with intervals against a number, one line per model; the noise floor is a band from 0."""
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
    """Return the exponential moving average without its start-up bias."""
    result, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        result.append(total / mass)
    return result


def curve_chart(points: Sequence[tuple[float, float]], title: str) -> str:
    """Return a chart of one curve over steps: faint values, with their moving average on top."""
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
