"""Finished audits beside each other, for the terminal: what a sweep, several seeds or several adapters came to.

Every number is an audit's own (`wording.comparison`); only means over seeds are made here.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev

from rich import box
from rich.markup import escape
from rich.table import Table

from fairdiff.audit.read import read_audit
from fairdiff.audit.wording import comparison, distance_of, interval, last_model, number, signed
from fairdiff.errors import FairDiffError
from fairdiff.files import atomic_path

_SEED = re.compile(r"(^|/)seed\d+$")
_AUDIT = re.compile(r"(^|/)audits/[^/]+$")  # where a run folder has its audits


def find_audits(folders: Iterable[str | Path]) -> dict[str, dict]:
    """The audits at or below `folders`: {folder below what all runs have in common: audit.json}, in order of names.

    Raises FairDiffError for a folder without any and for a file that is no audit of this version.
    """
    found = {}
    for folder in folders:
        paths = sorted(Path(folder).rglob("audit.json"))
        if not paths:
            raise FairDiffError(f"{folder}: found no finished run (audit.json) in it or below")
        for path in paths:
            found[path.parent.resolve().as_posix()] = read_audit(path)
    runs = {_AUDIT.sub("", name) for name in found}
    common = os.path.commonpath(runs) if len(runs) > 1 else Path(next(iter(runs))).parent
    return {os.path.relpath(name, common): audit for name, audit in found.items()}


def comparison_tables(audits: dict[str, dict]) -> list[Table]:
    """A table for each set of prompts with their targets, number of images and judge: others do not compare.

    Every number has a line a run; where runs differ in their last folder seed<n> only, their mean ± standard deviation
    over seeds follows.
    """
    return [_table(_by_run(some)) for some in _suites(audits)]


def draw(audits: dict[str, dict], path: Path) -> None:
    """A picture of a sweep: how far each run is from the target against how far its images drifted; left and low is best.

    A panel for each attribute with a target and each set of audits that compare. Bars: 95 % intervals over prompts.
    Drift: 1 - the mean cosine of the image encoder to the image before.
    """
    from matplotlib.figure import Figure  # an extra

    panels = []
    for some in _suites(audits):
        last = last_model(next(iter(some.values())))
        panels += [(n, some) for n, e in last["attributes"].items() if e["target"]["requested"] and last["dino"]["ci95"]]
    if not panels:
        raise FairDiffError("found no audit with an adapter and a target, which is what a picture shows")
    figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained")
    for axes, (name, some) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for run, audit in _by_run(some).items():
            model = last_model(audit)
            distance, kept = distance_of(model["attributes"][name]), model["dino"]
            x, y = (kept["mean"], [*kept["ci95"]]), (distance["mean"], [*distance["ci95"]])
            if None in (x[0], y[0]):
                continue
            bars = [[[abs(value - end)] for end in ends] if None not in ends else None for value, ends in (x, y)]
            axes.errorbar(1 - x[0], y[0], yerr=bars[1], xerr=bars[0] and bars[0][::-1], fmt="o", label=run, lw=1)
        axes.axhline(distance["floor"], color="grey", ls=":", label="noise floor")
        axes.set(xlabel="drift of the images (0: none)", ylabel=f"{name} {distance['name']}")
        axes.legend(fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix.removeprefix(".") or "png")


def _suites(audits: dict[str, dict]) -> list[dict[str, dict]]:
    """The audits that compare, together."""
    suites: dict[tuple, dict[str, dict]] = {}
    for name, audit in audits.items():
        suites.setdefault(_suite(audit), {})[name] = audit
    return list(suites.values())


def _by_run(audits: dict[str, dict]) -> dict[str, dict]:
    """The same by run folder, but for a run that has several audits here."""
    runs = {name: _AUDIT.sub("", name) for name in audits}
    count = Counter(runs.values())
    return {run if count[run] == 1 else name: audits[name] for name, run in runs.items()}


def _suite(audit: dict) -> tuple:
    """What two audits must share for their numbers to compare; the last is a hash of judge, detector and encoders."""
    entries = last_model(audit)["attributes"]
    prompts = [
        (p["prompt"], *p["target"]["shares"].values()) for entry in entries.values() for p in entry["per_prompt"]
    ]
    return tuple(entries), tuple(prompts), audit["images_per_prompt"], audit["provenance"]["hashes"]["judge"]


def _table(audits: dict[str, dict]) -> Table:
    first = next(iter(audits.values()))
    about = f"{first['prompts']} prompts × {first['images_per_prompt']} pictures, judge: {first['judge']['path']}"
    targets = {audit["provenance"].get("target") for audit in audits.values()} - {None}
    table = Table(
        title=escape(", target: ".join([about, *targets]) if len(targets) == 1 else about),
        title_justify="left",
        caption=r"\[low, high]: 95 % interval; ±: standard deviation over seeds; floor: what a perfectly fair "
        "(or on-target) generator shows; *: for these prompts only",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in ("", "before", "after", "", "change", "", "floor"):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    rows: dict[str, dict[str, dict]] = {}
    for run, audit in audits.items():
        for row in (row for group in comparison(audit).values() for row in group):
            rows.setdefault(row["name"], {})[run] = row
    for name, runs in rows.items():
        table.add_row(name, style="bold")
        for group, some in _by_seed(runs).items():
            for run, row in some.items():
                table.add_row(f"  {escape(run)}", *_cells(row))
            if len(some) > 1:
                where = f"{escape(group)}: " if group else ""
                table.add_row(f"  {where}mean of {len(some)} seeds", *_mean_cells(list(some.values())))
        table.add_section()
    return table


def _by_seed(runs: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """The runs that differ in their seed only together, under their common folder; any other by itself."""
    groups: dict[str, dict[str, dict]] = {}
    for run, row in runs.items():
        groups.setdefault(_SEED.sub("", run) if _SEED.search(run) else f"{run}/", {})[run] = row
    return groups


def _cells(row: dict) -> list[str]:
    form = row["format"]
    cells = [form(row["before"][0])]
    for key, shown in (("after", form(row["after"][0])), ("change", signed(row["change"][0], form))):
        cells += [shown, interval(row[key][1], form)]
    return [*cells, row["verdict"] or number(row["floor"])]


def _mean_cells(rows: list[dict]) -> list[str]:
    form, cells = rows[0]["format"], []
    for key in ("before", "after", "change"):
        values = [row[key][0] for row in rows if row[key][0] is not None]
        mean = fmean(values) if values else None
        cells.append(signed(mean, form) if key == "change" else form(mean))
        if key != "before":
            cells.append(f"± {form(stdev(values))}" if len(values) > 1 else "")
    floors = [row["floor"] for row in rows if row["floor"] is not None]
    return [*cells, number(fmean(floors) if floors else None)]
