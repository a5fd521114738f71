"""Render audit.json: as a self-contained report.html, and as a table for the terminal. No number is computed here."""

import math
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from fairdiff.audit.estimand import ends_of, stayed_of, verdict_of, why_not_corrected
from fairdiff.audit.figures import bias_chart, curve_chart, line_chart, mark_of
from fairdiff.audit.headline import (
    ANSWERS,
    bias_line,
    change_of,
    changes,
    four_fifths,
    headline,
    margin,
    question,
    rms,
    verdicts,
)
from fairdiff.audit.pairs import grids_of_training, picture_groups, strips
from fairdiff.audit.prompt_table import STATES, class_lines, prompt_table
from fairdiff.audit.records import MODELS, RecordStore
from fairdiff.audit.wording import (
    attribute_order,
    comparison,
    distance_of,
    interval,
    last_model,
    not_measured,
    number,
    percent,
    signed,
)
from fairdiff.files import write_text


def render_report(
    folder: Path, audit: dict, settings: dict[str, list[str]], history: list[dict], grids: Path | None = None
) -> Path:
    """Write `folder`/report.html from the audit, the image strips in `folder`/records and metrics.jsonl's rows.

    `settings`: headings with lines (target, adapter, sampler, ...), shown as given. `history` may be empty. grids: a folder
    with the images that training wrote while the adapter learnt.
    """
    environment = Environment(
        loader=PackageLoader("fairdiff.audit", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "signed": signed}
    environment.filters |= {"interval": interval, "ends": ends_of}
    html = environment.get_template("report.html.j2").render(
        audit=audit,
        settings=settings,
        title=headline(audit),
        verdicts=verdicts(audit),
        changes=changes(audit),
        states=STATES,
        cards=[_card(audit, name) for name in attribute_order(audit)],
        rows=[(group, list(rows)) for group, rows in comparison(audit).items()],
        pictures=picture_groups(audit, RecordStore(Path(folder) / "records")),
        prompts=[prompt_table(audit, name) for name in attribute_order(audit)],
        joint=[(name, _joint(audit, name)) for name in last_model(audit)["joint"]],
        curves=[Markup(curve_chart(points, name)) for name, points in _curves(history).items()],
        given="pictures" in audit["provenance"],
        grids=grids_of_training(grids) if grids else [],
        words=[_words(audit, name) for name in attribute_order(audit) if name in audit["judge"].get("prompts", {})],
        without_people=_without_people(audit, RecordStore(Path(folder) / "records")),
        guidance=_guidance(audit),
        named=_named(audit, RecordStore(Path(folder) / "records")),
        unmeasured=not_measured(audit),
    )
    path = Path(folder) / "report.html"
    write_text(path, html)
    return path


def summary_table(audit: dict) -> Table:
    """Return a terminal table of the main numbers: every model, the change between two models, and the noise floor.

    The change is after minus before, or after minus start if there is a start.
    """
    table = Table(
        title=f"{audit['prompts']} prompts × {audit['images_per_prompt']} pictures"
        + (", same noise before and after" if audit["paired"] and "pictures" not in audit["provenance"] else ""),
        title_justify="left",
        caption=r"\[low, high]: 95 % interval. *: for these prompts only, which are too few for others. floor: noise floor, "
        "the value for a perfectly fair (or on-target) generator. D: distance to the target, noise removed. worst: mean of "
        "the worst tenth of the prompts. off: prompts certainly off target. kept: faces that show the class a prompt names"
        + (". start: the adapter before training. trained: after minus start" if audit["trained"] else ""),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        show_edge=False,  # room for "cannot" in 80 columns
    )
    shown = [model for model in MODELS if model in audit["models"]]
    # with two models the total change; with three the change by training, without that by the start
    change = [] if len(shown) == 1 else ["trained" if audit["trained"] else "change"]
    for name in ("", *shown, *change, "floor"):
        table.add_column(name, justify="right" if name else "left", no_wrap=name != "floor" and not audit["trained"])
    for rows in comparison(audit).values():
        for row in rows:
            form = row["format"]
            cells = [_cell(form(row[key][0]), interval(row[key][1], form)) for key in shown]
            if audit["trained"]:
                cells[0] = _cell(form(row["before"][0]), "")  # room for the others' intervals in 80 columns
            cells += [_cell(signed(row[key][0], form), interval(row[key][1], form)) for key in change]
            table.add_row(row["name"], *cells, row["verdict"] or number(row["floor"]))
        table.add_section()
    return table


def _cell(value: str, ends: str) -> Text:
    return Text.assemble(value, ("\n" + ends if ends else "", "dim"))


def _card(audit: dict, name: str) -> dict:
    entries = {model: entry["attributes"][name] for model, entry in audit["models"].items()}
    last = last_model(audit)["attributes"][name]
    target, distance = last["target"], distance_of(last)
    numbers, limit, floor = (
        {model: distance_of(entry) for model, entry in entries.items()},
        distance["maximum"] or 1.0,
        distance["floor"],
    )
    if target["requested"]:
        numbers, floor = {model: rms(entry) for model, entry in entries.items()}, None
        limit = _most([ends_of(entry) for entry in numbers.values()], at_least=2 * target["delta"])
    marks = {m: mark_of(d.get("value", d.get("mean")), ends_of(d)) for m, d in numbers.items()}
    label = rms(last)["name"] if target["requested"] else distance["name"]
    margin_at = target["delta"] if target["requested"] else None
    paired = audit["paired"] and audit["paired"]["attributes"][name]
    verdict = verdict_of(audit, target)
    return {
        "name": name,
        "last": last,
        "not_corrected": why_not_corrected(audit, [name]),
        "target": target,
        "question": question(audit, name),
        "margin": margin(audit, name),
        "margin_is": len(target["shares"]) == 2,
        "answer": ANSWERS[verdict["verdict"]],
        "verdict": verdict,
        "undone": "distance" in (last.get("corrected") or {}),
        "distance": distance,
        "label": label,
        "numbers": numbers,
        "chart": Markup(bias_chart(marks, floor, limit, f"{name} {label}", margin_at)),
        "change": change_of(audit, name) if target["requested"] else None,
        "fifths": four_fifths(audit, name),
        "entries": entries,
        "bias": bias_line(audit, name),
        "changed": paired and paired["class_changed"],
        "drift": paired and paired.get("drift"),
        "worst": distance["worst_tenth"] | {"subjects": _worst_subjects(last, distance["key"])},
        "kept": audit["named"] and audit["named"]["attributes"].get(name),
        "stayed": paired and "drift" in paired and stayed_of(paired["drift"]),
    }


def _most(intervals: list[list | None], at_least: float) -> float:
    """Return the largest upper end, rounded up to a multiple of .2, as the end of a scale."""
    most = max([at_least, *(ends[1] for ends in intervals if ends and ends[1] is not None)])
    return math.ceil(5 * most) / 5


def _joint(audit: dict, name: str) -> list[dict]:
    """Return a line for each class of a combination."""
    entries = {model: entry["joint"][name] for model, entry in audit["models"].items()}
    target = last_model(audit)["joint"][name]["target"]
    return class_lines(entries, list(target["shares"]), target["shares"] if target["requested"] else {})


def _worst_subjects(entry: dict, key: str) -> list[str]:
    """Return the subjects of the worst tenth of the prompts, the worst first."""
    rows = [(p["bias"]["value"] if key == "bias" else p["target"][key], p["subject"]) for p in entry["per_prompt"]]
    rows = sorted((row for row in rows if row[0] is not None), reverse=True)
    most = (entry["bias"] if key == "bias" else entry["target"][key])["worst_tenth"]["prompts"]
    return [subject for _, subject in rows[:most]]


def _words(audit: dict, name: str) -> dict:
    """Return the table of a zero-shot judge's wordings: words, the share by them alone, and last the share by all.

    With two classes, only the shares of the first are shown.
    """
    entries = {model: entry["attributes"][name] for model, entry in audit["models"].items()}
    classes = audit["attributes"][name]
    shown = classes[:1] if len(classes) == 2 else classes
    together = (audit["judge"]["prompts"][name], [e["shares"][c]["share"] for c in shown for e in entries.values()])
    rows = [] if "wordings" in last_model(audit)["attributes"][name] else [together]
    if not rows:
        each = zip(*(e["wordings"]["each"] for e in entries.values()), strict=True)
        rows = [(some[0]["prompts"], [one["shares"][c] for c in shown for one in some]) for some in each]
        rows.append(("all of them", together[1]))
    heads = [f"{c}, {model}" for c in shown for model in entries]
    ranges = [
        (f"{c} {model}", e["wordings"]["range"][c]) for model, e in entries.items() for c in shown if "wordings" in e
    ]
    return {"name": name, "heads": heads, "rows": rows, "ranges": ranges}


def _guidance(audit: dict) -> list[Markup]:
    """Return a chart for each attribute with a target: bias or total variation against the guidance scale."""
    charts = []
    for name in attribute_order(audit) if audit["guidance"] else []:
        distance = distance_of(last_model(audit)["attributes"][name])
        if not last_model(audit)["attributes"][name]["target"]["requested"]:
            continue
        lines = {
            model: [
                (at["scale"], mark_of(found["mean"], ends_of(found)))
                for at in audit["guidance"]
                for found in [at["models"][model][name][distance["key"]]]
            ]
            for model in audit["models"]
        }
        charts.append(Markup(line_chart(lines, distance["floor"], f"{name} {distance['name']}", "guidance")))
    return charts


def _named(audit: dict, store: RecordStore) -> list[dict]:
    """Return the prompts that name a class, with their image strips."""
    items = audit["named"]["per_prompt"] if audit["named"] else []
    return [item | {"strips": strips(store, list(audit["models"]), item["prompt"])} for item in items]


def _without_people(audit: dict, store: RecordStore) -> list[dict]:
    items = audit["without_people"]["per_prompt"] if audit["without_people"] else []
    return [item | {"strips": strips(store, list(audit["models"]), item["prompt"])} for item in items]


CURVES = {
    "loss.": "loss {}",
    "bias.": "bias {}",
    "grad_norm": "gradient norm",
    "grad_share.": "share of the gradient: {}",
    "validation.": "validation: {}",
}


def _curves(history: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """Return curves against the step by their names in words, in the order of CURVES; rows without a value are left out."""
    curves = {}
    for prefix, name in CURVES.items():
        for key in dict.fromkeys(key for row in history for key in row if key.startswith(prefix)):
            points = [(row["step"], row[key]) for row in history if row.get(key) is not None]
            if len(points) > 1:
                curves[name.format(key.removeprefix(prefix).replace(".", " ").replace("_", " "))] = points
    return curves
