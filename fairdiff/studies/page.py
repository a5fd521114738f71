"""The page of a study: a self-contained report.html in the audit's style, and the same as Markdown for the docs."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path

from fairdiff.files import write_text

# Neighbours differ in lightness too, for readers who do not see their hues apart
PALETTE = ("#0f766e", "#e08a1e", "#4d5fb5", "#d0607f", "#7a9a2e", "#7c3f8c", "#4a9fc9", "#b42318", "#8a5a2b", "#777777")


@dataclass(frozen=True)
class Section:
    """A heading, sentences, a table (head and rows of text), and charts as SVG."""

    title: str
    text: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    charts: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """title and lead: of the page. not_shown: what its numbers do not say. written_by: the command.

    kind: of page, above its title.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    not_shown: Sequence[str]
    written_by: str
    about: dict[str, str] = field(default_factory=dict)
    kind: str = "study"


def report_css() -> str:
    """The style sheet of an audit's report, so that the pages of studies look alike."""
    return files("fairdiff.audit").joinpath("report.css").read_text(encoding="utf-8")


def audit_style() -> str:
    return f"<style>\n{report_css()}</style>"


def picture(chart: str) -> str:
    """A chart of a page as an SVG file by itself: on white, in the page's light colours, with the rules that it needs."""
    css = report_css()
    colours = dict(reversed(re.findall(r"--(\w+): ([^;]+);", css)))  # the first are the light ones
    rules = " ".join(line for line in css.splitlines() if line.startswith("svg"))
    width, height = re.search(r'viewBox="0 0 (\S+) (\S+)"', chart).groups()
    head, body = chart.split(">", 1)
    size = f'xmlns="http://www.w3.org/2000/svg" width="{1.25 * float(width):.0f}" height="{1.25 * float(height):.0f}"'
    text = f"{head} {size}><style>{rules} svg {{ background: {colours['card']}; }}</style>{body}"
    return re.sub(r"var\(--(\w+)\)", lambda found: colours[found[1]], text) + "\n"


def write_html(page: Page, path: Path) -> None:
    """The page as one file that needs no network."""
    body = [
        f'<div class="eyebrow">FairDiff {page.kind}</div><h1>{escape(page.title)}</h1><p class="lead">{_text(page.lead)}</p>'
    ]
    for section in page.sections:
        body.append(f"<h2>{escape(section.title)}</h2>")
        body += [f"<p>{_text(sentence)}</p>" for sentence in section.text]
        if section.charts:
            body.append(
                f'<div class="cards">{"".join(f"<div class=card>{chart}</div>" for chart in section.charts)}</div>'
            )
        if section.rows:
            body.append(_table(section))
    body.append(
        "<h2>What this does not show</h2><ul>" + "".join(f"<li>{_text(s)}</li>" for s in page.not_shown) + "</ul>"
    )
    about = page.about | {"command": page.written_by}
    facts = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in about.items())
    body.append(f'<details><summary>Settings</summary><table class="facts">{facts}</table></details>')
    head = f"<title>{escape(page.title)} · FairDiff</title>{audit_style()}"
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    html = (
        f'<!doctype html>\n<html lang="en"><head>{meta}{head}</head><body><main>{"".join(body)}</main></body></html>\n'
    )
    write_text(path, html)


def write_markdown(page: Page, path: Path) -> None:
    """The page for the documentation, and its charts as <page>-<number>.svg beside it."""
    lines = [f"# {page.title}", "", f"Written by `{page.written_by}`. {page.lead}"]
    for old in path.parent.glob(f"{path.stem}-*.svg"):
        old.unlink()
    number = 0
    for section in page.sections:
        lines += ["", f"## {section.title}", *(line for sentence in section.text for line in ("", sentence))]
        for chart in section.charts:
            number += 1
            name = f"{path.stem}-{number}.svg"
            write_text(path.parent / name, picture(chart))
            title = re.search('aria-label="([^"]*)"', chart)[1]
            lines += ["", f"![{title}]({name})"]
        if section.rows:
            lines += ["", _row(section.head), "|" + "---|" * len(section.head), *map(_row, section.rows)]
    lines += ["", "## What this does not show", "", *(f"- {sentence}" for sentence in page.not_shown)]
    if page.about:
        lines += ["", "Settings: " + "; ".join(f"{key}: {value}" for key, value in page.about.items()) + "."]
    write_text(path, "\n".join(lines) + "\n")


def _text(sentence: str) -> str:
    """Escaped, with `code` of Markdown."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(sentence))


def _table(section: Section) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in section.head)
    rows = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in section.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '·') for cell in cells)} |"


@dataclass(frozen=True)
class Point:
    """A mark of a chart: its place, the ends of its bars upwards and across (None: none), and what a pointer shows."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    tip: str = ""
    left: float | None = None
    right: float | None = None


def curves_chart(curves: dict[str, Sequence[Point]], title: str, across: str, floor: float | None = None) -> str:
    """Curves of points in the order given, each in its colour with its name below; the floor is a shaded band from 0."""
    width, height, left, right, top, bottom = 520, 300, 50, 14, 28, 44
    points = [point for some in curves.values() for point in some]
    xs, ys = (
        [end for p in points for end in some(p) if end is not None]
        for some in (lambda p: (p.x, p.left, p.right), lambda p: (p.y, p.low, p.high))
    )
    x0, x1, y1 = min(xs), max(xs), max([*ys, floor or 0]) or 1.0
    x0, x1 = (x0 - 0.5, x1 + 0.5) if x0 == x1 else (x0, x1)

    def at(point_x: float, point_y: float) -> tuple[float, float]:
        across_x = left + 8 + (point_x - x0) / (x1 - x0) * (width - left - right - 16)
        return across_x, top + (1 - max(point_y, 0) / y1) * (height - top - bottom)

    body = [f'<text x="{left}" y="16" class="head">{escape(title)}</text>']
    if floor is not None:
        y = at(x0, floor)[1]
        size = f'width="{width - left - right}" height="{at(x0, 0)[1] - y:.1f}"'
        body.append(f'<rect x="{left}" y="{y:.1f}" {size} class="floor"/>')
    for value in ticks(0, y1):
        y = at(x0, value)[1]
        body.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}" class="grid"/>')
        body.append(f'<text x="{left - 6}" y="{y + 4:.1f}" class="tick" text-anchor="end">{value:g}</text>')
    for value in ticks(x0, x1):
        x = at(value, 0)[0]
        body.append(f'<text x="{x:.1f}" y="{height - 26}" class="tick" text-anchor="middle">{value:g}</text>')
    middle = (left + width - right) / 2
    body.append(f'<text x="{middle}" y="{height - 8}" class="tick" text-anchor="middle">{escape(across)}</text>')
    x, y = left, height + 8
    for place, (name, some) in enumerate(curves.items()):
        colour, room = PALETTE[place % len(PALETTE)], 30 + 6.5 * len(name)
        body += _curve(name, some, colour, at)
        if x > left and x + room > width:
            x, y = left, y + 18
        body.append(f'<circle cx="{x + 5:.1f}" cy="{y}" r="5" style="fill:{colour}"/>')
        body.append(f'<text x="{x + 15:.1f}" y="{y + 4}">{escape(name)}</text>')
        x += room
    box = f'viewBox="0 0 {width} {y + 14}" style="max-width:{1.25 * width:.0f}px" role="img" aria-label="{escape(title)}"'
    return f"<svg {box}>{''.join(body)}</svg>"


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers within the ends."""
    step = 10 ** math.floor(math.log10(high - low))
    step *= next(share for share in (0.2, 0.5, 1, 2) if (high - low) / (share * step) <= 6)
    return [round(n * step, 9) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _curve(name: str, points: Sequence[Point], colour: str, at) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(p.x, p.y) for p in points))
    parts = [f'<polyline points="{path}" style="stroke:{colour};opacity:.6"/>'] if len(points) > 1 else []
    for point in points:
        x, y = at(point.x, point.y)
        parts.append(f"<g><title>{escape(point.tip or name)}</title>")
        up = [(point.x, point.low), (point.x, point.high)]
        for ends in (up, [(point.left, point.y), (point.right, point.y)]):
            if None not in (*ends[0], *ends[1]):
                (x1, y1), (x2, y2) = (at(*end) for end in ends)
                box = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
                parts.append(f'<line {box} class="whisker" style="stroke:{colour}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.2" style="fill:{colour}"/></g>')
    return parts
