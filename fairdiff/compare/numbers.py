"""The comparison as plain numbers (`compared`), from which table, page and chart are made.

Every number of an audit is the audit's own (`audit.wording.comparison`); differences and means over seeds are made here.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from fairdiff.audit.estimand import ends_of, verdict_of
from fairdiff.audit.wording import comparison, distance_of, last_model, targeted
from fairdiff.compare.audits import Audited
from fairdiff.compare.differences import SQUARED, differences, partners
from fairdiff.compare.groups import Figure, Group, grouped, mean_of
from fairdiff.compare.same import pairing, require_comparable

SCHEMA = "fairdiff.comparison/1"
CELLS = ("before", "after", "change")  # of a row, of each audit
LIMITS = {"between seeds": (0.0, 2.0), "no people: drift": (0.0, math.inf)}
LIMITS |= dict.fromkeys(("CLIP-T", "CLIP-I", "image encoder"), (-1.0, 1.0))


def compared(audits: Sequence[Audited], against: Sequence[Audited] = ()) -> dict:
    """All of a comparison as plain values. against: audits of which one's group is the reference; the first group without.

    {schema, prompts, images_per_prompt, judge, target, reference, settings: {key: values in which groups differ}, groups,
    numbers}. groups: {name, settings, audits: {name: folder}, training_seeds, audit_seeds, paired, verdicts}; paired: what
    its images share with the reference's, and why no more. numbers: {group, name, note, form, rows: {name of a group:
    {before, after, change, difference, floor, verdict, audits}}}, each {value, ci95, these, spread} or null.
    Raises FairDiffError for audits that do not compare.
    """
    require_comparable(audits)
    groups = grouped(audits)
    wanted = {one.folder for one in against}
    reference = next((group for group in groups if wanted & {one.folder for one in group.members}), groups[0])
    first = audits[0].audit
    pairs = {group.name: partners(reference, group) for group in groups if group is not reference}
    keys = dict.fromkeys(key for group in groups for key in group.settings)
    return {
        "schema": SCHEMA,
        "prompts": first["prompts"],
        "images_per_prompt": first["images_per_prompt"],
        "judge": first["judge"]["path"],
        "target": first["provenance"].get("target"),
        "targeted": targeted(first),
        "distances": {name: distance_of(entry)["short"] for name, entry in last_model(first)["attributes"].items()},
        "reference": reference.name,
        "settings": {key: [group.settings.get(key) for group in groups] for key in keys},
        "groups": [_about(group, pairs.get(group.name, [])) for group in groups],
        "numbers": _numbers(groups, pairs),
    }


def _about(group: Group, pairs: list[tuple[Audited, Audited]]) -> dict:
    seeds = {
        "training_seeds": {one.seed for one in group.members},
        "audit_seeds": {one.audit_seed for one in group.members},
    }
    verdicts = {
        name: [
            verdict_of(one.audit, last_model(one.audit)["attributes"][name]["target"])["tag"] for one in group.members
        ]
        for name in targeted(group.members[0].audit)
    }
    hashes = [one.audit["provenance"]["hashes"].get("before") for one in group.members]
    return {
        "name": group.name,
        "settings": group.settings,
        "audits": {one.name: one.folder.as_posix() for one in group.members},
        **{key: sorted(some - {None}) for key, some in seeds.items()},
        "models": list(group.members[0].audit["models"]),
        "before": hashes[0] if len({*hashes}) == 1 else None,
        "paired": [list(found) for found in dict.fromkeys(pairing(*pair) for pair in pairs)],
        "verdicts": verdicts,
    }


def _numbers(groups: Sequence[Group], pairs: dict[str, list[tuple[Audited, Audited]]]) -> list[dict]:
    rows = {id(one): _rows(one.audit) for group in groups for one in group.members}
    steps = {name: [differences(*pair) for pair in some] for name, some in pairs.items()}
    numbers = []
    for key, about in {key: row for some in rows.values() for key, row in some.items()}.items():
        limits = _limits(about)
        found = {}
        for group in groups:
            known = {one.name: rows[id(one)][key] for one in group.members if key in rows[id(one)]}
            if not known:
                continue
            cells = {cell: _cell(group, known, cell, limits) for cell in CELLS}
            step = _step(pairs.get(group.name, []), steps.get(group.name, []), key)
            own = {name: {cell: _own(row[cell]) for cell in CELLS} for name, row in known.items()}
            floors = [row["floor"] for row in known.values() if row["floor"] is not None]
            verdicts = dict.fromkeys(row["verdict"] for row in known.values())
            found[group.name] = cells | {
                "difference": step,
                "floor": sum(floors) / len(floors) if floors else None,
                "verdict": next(iter(verdicts)) if len(verdicts) == 1 else "",
                "audits": own if len(known) > 1 else {},
            }
        numbers.append(
            {"group": about["group"], "name": key, "note": about["note"], "form": about["form"], "rows": found}
        )
    return numbers


def _rows(audit: dict) -> dict[str, dict]:
    """The rows of an audit by their names, D^2 of each attribute with a target among them."""
    rows = {}
    for group, some in comparison(audit).items():
        for row in some:
            rows[row["name"]] = row | {"group": group, "form": row["format"].__name__}
            if row["name"].removesuffix(" corr.").endswith(" D"):  # that which the verdict rests on, if both are there
                name = row["name"].removesuffix(" corr.").removesuffix(" D")
                rows[SQUARED.format(name)] = rows[row["name"]] | _squared(audit, row, name)
    return rows


def _squared(audit: dict, row: dict, name: str) -> dict:
    """D^2, whose changes and differences are free of noise, where those of D are not."""

    def square(cell: tuple) -> tuple:
        value, ends = cell
        ends = ends if not ends or ends[0] is None else [ends[0] ** 2, ends[1] ** 2, *ends[2:]]
        return None if value is None else value**2, ends

    change = (None, None)
    if audit["paired"]:
        entry = audit["paired"]["attributes"][name]
        found = (entry.get("corrected") or entry)["squared_distance"]
        change = (found["difference"], ends_of(found))
    cells = {key: square(row[key]) for key in ("before", "after")}
    note = "mean over prompts" + (", the judge's error undone" if row["name"].endswith("corr.") else "")
    return cells | {"name": SQUARED.format(name), "change": change, "note": note}


def _limits(row: dict) -> tuple[float, float]:
    """The range of a number of this row."""
    unbounded = row["form"] == "count" or row["group"].startswith("distance D")
    return LIMITS.get(row["name"], (0.0, math.inf if unbounded else 1.0))


def _cell(group: Group, known: dict[str, dict], cell: str, limits: tuple[float, float]) -> dict | None:
    """The mean of a cell over a group's audits."""
    figures = [_figure(one.seed, one.audit_seed, *known[one.name][cell]) for one in group.members if one.name in known]
    if cell == "before":  # which no training has touched: of one audit seed the same pictures
        figures = [*{f.audit_seed: replace(f, seed=None) for f in figures if f is not None}.values()]
    if cell == "change":
        limits = (limits[0] - limits[1], limits[1] - limits[0])
    return mean_of([figure for figure in figures if figure is not None], limits)


def _figure(seed: int | None, audit_seed: int, value: float | None, ends: list | None) -> Figure | None:
    if value is None:
        return None
    known = ends is not None and ends[0] is not None
    return Figure(seed, audit_seed, value, (ends[0], ends[1]) if known else None, known and len(ends) > 2)


def _own(cell: tuple) -> dict | None:
    """A cell of one audit."""
    figure = _figure(None, 0, *cell)
    return mean_of([figure]) if figure else None


def _step(pairs: list[tuple[Audited, Audited]], steps: list[dict], key: str) -> dict | None:
    """The mean difference of a group to the reference. Trainings: of the side with more; noises: of that with fewer."""
    sides = list(zip(*pairs, strict=True)) or [(), ()]
    trained = max(sides, key=lambda side: len({one.seed for one in side}))
    noised = min(sides, key=lambda side: len({one.audit_seed for one in side}))
    figures = [
        _figure(trained[place].seed, noised[place].audit_seed, step[key]["difference"], ends_of(step[key]))
        for place, step in enumerate(steps)
        if key in step
    ]
    return mean_of([figure for figure in figures if figure is not None])
