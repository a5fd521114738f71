"""Print a comparison as a table in the terminal. It computes no numbers."""

from collections.abc import Callable

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fairdiff.audit import wording
from fairdiff.audit.estimand import FEW
from fairdiff.audit.wording import interval, number, signed

COLUMNS = {"before": "before", "after": "after", "change": "change", "difference": "to the reference"}
LONGEST = 24  # characters of a group's name, of 80 columns


def form_of(row: dict) -> Callable:
    """Return the function that formats the values of a row."""
    return {"number": number, "percent": wording.percent, "count": wording.count}[row["form"]]


def columns_of(found: dict) -> dict[str, str]:
    """Return the columns in which any row has a value."""
    rows = [row for entry in found["numbers"] for row in entry["rows"].values()]
    return {key: name for key, name in COLUMNS.items() if any(row[key] is not None for row in rows)}


def written(cell: dict | None, key: str, form: Callable) -> tuple[str, str]:
    """Return a value as text, and its interval followed by the spread over seeds; "" for missing ones."""
    if cell is None:
        return "", ""
    ends = None if cell["ci95"] is None else [*cell["ci95"], *([FEW] if cell["these"] else [])]
    value = signed(cell["value"], form) if key in ("change", "difference") else form(cell["value"])
    spread = "" if cell["spread"] is None else f"± {form(cell['spread'])}"
    return value, "\n".join(part for part in (interval(ends, form), spread) if part)


def labels(found: dict) -> dict[str, str]:
    """Return the label of each group in the terminal's table: its name, or a number if a name is long."""
    names = [group["name"] for group in found["groups"]]
    short = max(map(len, names)) <= LONGEST
    return {name: name if short else f"({place})" for place, name in enumerate(names, 1)}


def about(found: dict) -> list[str]:
    """Describe what is compared, in lines."""
    audits = sum(len(group["audits"]) for group in found["groups"])
    target = f", target: {found['target']}" if found["target"] else ""
    lines = [
        f"{audits} audit{'s' if audits > 1 else ''}, {found['prompts']} prompts × {found['images_per_prompt']} pictures, "
        f"judge: {found['judge']}{target}"
    ]
    for group in found["groups"]:
        if group["paired"]:
            common = "; ".join(f"{what}{f' ({why})' if why else ''}" for what, why in group["paired"])
            lines.append(f"{group['name']} and {found['reference']} have in common: {common}")
    return lines


def comparison_table(found: dict) -> Table:
    """Return a table with a line for every number and group, and for each audit of a group of several."""
    columns, short = columns_of(found), labels(found)
    numbered = [f"{label}: {name}" for name, label in short.items() if label != name]
    table = Table(
        title=escape("\n".join([*about(found), *numbered])),
        title_justify="left",
        caption=escape(
            "[low, high]: 95 % interval. ±: standard deviation over seeds, whose mean is shown. floor: noise floor, the "
            "value for a perfectly fair (or on-target) generator. *: for these prompts only"
        )
        + (escape(f". The reference is {short[found['reference']]}") if "difference" in columns else ""),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for name in ("", *columns.values(), "floor"):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    for entry in found["numbers"]:
        table.add_row(escape(entry["name"]), style="bold")
        for name, row in entry["rows"].items():
            for audit, own in row["audits"].items():
                table.add_row(f"    {escape(audit)}", *(_cell(own.get(key), key, entry) for key in columns), "")
            mean = f" mean of {len(row['audits'])}" if row["audits"] else ""
            cells = [_cell(row[key], key, entry) for key in columns]
            table.add_row(f"  {escape(short[name])}{mean}", *cells, row["verdict"] or number(row["floor"]))
        table.add_section()
    return table


def _cell(cell: dict | None, key: str, entry: dict) -> Text:
    value, more = written(cell, key, form_of(entry))
    return Text.assemble(value, ("\n" + more if more else "", "dim"))
