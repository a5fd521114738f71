"""audit.json to people: one self-contained report.html, and a table for the terminal. No number is computed here."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from fairdiff.audit.records import RecordStore
from fairdiff.figures import Mark, Row, bias_chart, curve_chart, picture_uri, share_chart
from fairdiff.files import write_text

VERDICTS = {
    "within": "the whole interval lies below {delta:.2f}",
    "beyond": "the whole interval lies above {delta:.2f}",
    "undecided": "the interval reaches across {delta:.2f}, so more prompts or pictures are needed",
}


def render_report(folder: Path, audit: dict, asked: dict[str, list[str]], history: list[dict]) -> Path:
    """Write `folder`/report.html from the audit, the picture strips in `folder`/records and metrics.jsonl's rows.

    `asked`: headings with lines (target, adapter, sampler, ...), shown as given. `history` may be empty.
    """
    environment = Environment(
        loader=PackageLoader("fairdiff.audit", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "percent": percent, "interval": interval, "signed": signed}
    html = environment.get_template("report.html.j2").render(
        audit=audit,
        asked=asked,
        title=headline(audit),
        cards=[_card(audit, name) for name in _order(audit)],
        rows=[(group, list(rows)) for group, rows in comparison(audit).items()],
        pictures=_pictures(audit, RecordStore(Path(folder) / "records")),
        shares=[_shares(audit, name) for name in _order(audit)],
        joint=[(name, Markup(_overall(audit, "joint", name))) for name in _last(audit)["joint"]],
        curves=[Markup(curve_chart(points, name)) for name, points in _curves(history).items()],
        unrelated=_unrelated_pictures(audit, RecordStore(Path(folder) / "records")),
        unmeasured=not_measured(audit),
    )
    path = Path(folder) / "report.html"
    write_text(path, html)
    return path


def summary_table(audit: dict) -> Table:
    """Before, after, change and floor of every headline number, for the terminal."""
    table = Table(
        title=f"{audit['prompts']} prompts × {audit['images_per_prompt']} pictures, same noise before and after",
        title_justify="left",
        caption=r"\[low, high]: 95 % interval; floor: what a perfectly fair generator shows",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in ("", "before", "after", "change", "floor"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for rows in comparison(audit).values():
        for row in rows:
            form = row["format"]
            cells = [_cell(form(row[key][0]), interval(row[key][1], form)) for key in ("before", "after")]
            change = _cell(signed(row["change"][0], form), interval(row["change"][1], form))
            table.add_row(row["name"], *cells, change, number(row["floor"]))
        table.add_section()
    return table


def comparison(audit: dict) -> dict[str, list[dict]]:
    """Headline rows by group: name, before, after and change as (value, ci95 or None), floor, format, note."""
    before, after = audit["models"].get("before"), audit["models"].get("after")
    paired, groups = audit["paired"], {}

    def row(name: str, get, change, floor=None, form=None, note: str = "") -> dict:
        pair = [(None, None) if model is None else get(model) for model in (before, after)]
        moved = (None, None) if paired is None or change is None else (change["difference"], change["ci95"])
        return {"name": name, "before": pair[0], "after": pair[1], "change": moved, "floor": floor,
                "format": form or number, "note": note}  # fmt: skip

    for kind, title in (("attributes", "bias"), ("joint", "joint bias")):
        groups[title] = [
            row(
                f"{name} bias",
                lambda model, k=kind, n=name: (model[k][n]["bias"]["mean"], model[k][n]["bias"]["ci95"]),
                paired and paired[kind][name]["bias"],
                _last(audit)[kind][name]["bias"]["floor"],
            )
            for name in (_order(audit) if kind == "attributes" else _last(audit)[kind])
        ]
    groups["distance to target, noise removed"] = [
        row(f"{name} gap", lambda model, n=name: _pair(model["attributes"][n]["target"]["unbiased_rms"]), None, 0.0)
        for name in _order(audit)
        if _last(audit)["attributes"][name]["target"]["asked"]
    ]
    groups["pictures"] = [
        row("no face", lambda m: (m["no_face"]["rate"], m["no_face"]["ci95"]), paired and paired["no_face"], form=percent),
        row("CLIP-T", lambda m: _pair(m["clip_t"]), paired and paired["clip_t"], note="picture against prompt"),
        row("CLIP-I", lambda m: _pair(m["clip_i"]), None, note="after against before, same noise"),
        row("DINO", lambda m: _pair(m["dino"]), None, note="after against before, same noise"),
        row("between seeds", lambda m: _pair(m["between_seeds"]), paired and paired["between_seeds"],
            note="1 − cosine of two pictures of one prompt: variety"),
    ]  # fmt: skip
    if audit["unrelated"] is not None:
        ratio = audit["unrelated"]["ratio"]
        row_ = row("no people: moved", lambda m: (None, None), None, note="1 is as far as another seed")
        groups["pictures"].append(row_ | {"after": (ratio["value"], ratio["ci95"])})
    return groups


def headline(audit: dict) -> str:
    """The result in a sentence: each attribute with a target, "no clear change" where the paired interval holds 0."""
    entries = _last(audit)["attributes"]
    asked = [name for name in _order(audit) if entries[name]["target"]["asked"]] or list(entries)
    parts = []
    for name in asked:
        value = [number(model["attributes"][name]["bias"]["mean"], 2) for model in audit["models"].values()]
        if audit["paired"] is None:
            parts.append(f"{name} bias is {value[0]}")
            continue
        low, high = audit["paired"]["attributes"][name]["bias"]["ci95"]
        verb = "shows no clear change" if low is None or low <= 0 <= high else "fell" if high < 0 else "rose"
        parts.append(f"{name} bias {verb} from {value[0]} to {value[1]}")
    text = ", ".join(parts) + f" over {audit['prompts']} prompts"
    return text[0].upper() + text[1:]


def not_measured(audit: dict) -> list[str]:
    """What a reader might take for measured and is not."""
    last = _last(audit)
    lines = [
        "Identity. Labels are perceived presentation read from pictures by a classifier; nobody in them has a gender, "
        "race or age to be right or wrong about, and two genders and a few races are a coarse reading.",
        "Anyone but the largest face of a picture.",
        "Other prompts, guidance scales, samplers and prompt languages than those listed here; an adapter can be fair "
        "at one guidance scale and unfair at another.",
        "Whether people of different groups are shown alike in dress, pose, setting, dignity or picture quality.",
        "Realism of the pictures (FID or human ratings).",
    ]
    if audit["judge"].get("same_as_training_judge"):
        lines.insert(0, "An independent opinion: the judge of this audit is the one that trained the adapter, and an "
                        "optimised loss flatters itself on its own judge.")  # fmt: skip
    else:
        lines.append(
            "Disagreement between judges: one audit judge, other than the training one, labelled every picture."
        )
    raw = [name for name, entry in last["attributes"].items() if "corrected" not in entry]
    if raw:
        lines.append(
            f"The judge's own error for {', '.join(raw)}: no labelled faces were given, so shares are as judged."
        )
    if len(raw) < len(last["attributes"]):
        lines.append(
            "Whether the judge errs on generated faces as it does on the labelled ones: the correction assumes so."
        )
    if any(last[key]["mean"] is None for key in ("clip_t", "dino")):
        lines.append("What an absent encoder would have measured (shown as –).")
    bystanders = [name for name, entry in last["attributes"].items() if not entry["target"]["asked"]]
    if bystanders:
        lines.append(f"Success for {', '.join(bystanders)}: measured, but no target was set for it.")
    return lines


def number(value: float | None, digits: int = 3) -> str:
    """A figure with a true minus sign, "–" for what is undefined."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else number(100 * value, digits) + "\u00a0%"


def signed(value: float | None, form=number) -> str:
    """A change, with its sign always shown."""
    return ("+" if value is not None and value >= 0 else "") + form(value)


def interval(ends: list | None, form=number) -> str:
    """[low, high], or nothing where it is undefined."""
    return "" if ends is None or ends[0] is None else f"[{form(ends[0])}, {form(ends[1])}]"


def _cell(value: str, ends: str) -> Text:
    return Text.assemble(value, ("\n" + ends if ends else "", "dim"))


def _pair(entry: dict) -> tuple:
    return entry["mean"] if "mean" in entry else entry["value"], entry["ci95"]


def _last(audit: dict) -> dict:
    """The model the report is about: "after" if it was audited."""
    return audit["models"].get("after") or audit["models"]["before"]


def _order(audit: dict) -> list[str]:
    """Attributes with a target first, in the order they were given."""
    entries = _last(audit)["attributes"]
    return sorted(entries, key=lambda name: not entries[name]["target"]["asked"])


def _mark(value: float | None, ends: list | None) -> Mark | None:
    return None if value is None else Mark(value, *(ends or (None, None)))


def _card(audit: dict, name: str) -> dict:
    entries = {model: entry["attributes"][name] for model, entry in audit["models"].items()}
    marks = {model: _mark(e["bias"]["mean"], e["bias"]["ci95"]) for model, e in entries.items()}
    last, target = _last(audit)["attributes"][name], _last(audit)["attributes"][name]["target"]
    chart = bias_chart(marks.get("before"), marks.get("after"), last["bias"]["floor"], last["bias"]["maximum"], name)
    return {
        "name": name, "entries": entries, "last": last, "target": target, "chart": Markup(chart),
        "verdict": VERDICTS[target["verdict"]].format(delta=target["delta"]),
        "difference": audit["paired"] and audit["paired"]["attributes"][name],
    }  # fmt: skip


def _share_row(label: str, models: dict[str, dict], name: str, target: float | None) -> Row:
    marks = {
        model: _mark(entry["shares"][name]["share"], entry["shares"][name]["ci95"]) for model, entry in models.items()
    }
    return Row(label, marks.get("before"), marks.get("after"), target)


def _overall(audit: dict, kind: str, name: str) -> str:
    models = {model: entry[kind][name] for model, entry in audit["models"].items()}
    target = _last(audit)[kind][name]["target"]
    rows = [
        _share_row(label, models, label, share if target["asked"] else None)
        for label, share in target["shares"].items()
    ]
    return share_chart([("share of pictures with a face", rows)], f"{name}: shares over all prompts")


def _shares(audit: dict, name: str) -> dict:
    """Overall chart and the per-prompt chart, prompts sorted by what the model before drew most one-sidedly."""
    models = {model: entry["attributes"][name] for model, entry in audit["models"].items()}
    target = _last(audit)["attributes"][name]["target"]
    classes = list(target["shares"])
    shown = classes[:1] if len(classes) == 2 else classes
    first = next(iter(models.values()))["per_prompt"]
    order = sorted(range(len(first)), key=lambda i: first[i]["shares"][classes[0]]["share"] or 0)
    panels = [
        (label, [
            _share_row(
                first[i]["subject"], {m: e["per_prompt"][i] for m, e in models.items()}, label,
                first[i]["target"]["shares"][label] if target["asked"] else None,
            )
            for i in order
        ])
        for label in shown
    ]  # fmt: skip
    return {
        "name": name, "asked": target["asked"], "overall": Markup(_overall(audit, "attributes", name)),
        "per_prompt": Markup(share_chart(panels, f"{name}: shares of each prompt")),
        "rejected": {model: entry["target"]["prompts_rejected"] for model, entry in models.items()},
    }  # fmt: skip


def _pictures(audit: dict, store: RecordStore) -> list[dict]:
    """Strips of every prompt; the note gives the share of the first attribute's first class before and after."""
    name = _order(audit)[0]
    models = {model: entry["attributes"][name]["per_prompt"] for model, entry in audit["models"].items()}
    label, items = audit["attributes"][name][0], []
    for i, item in enumerate(next(iter(models.values()))):
        shares = [percent(rows[i]["shares"][label]["share"], 0) for rows in models.values()]
        note, strips = f"{label} " + " → ".join(shares), _strips(store, list(models), item["prompt"])
        items.append({"subject": item["subject"], "prompt": item["prompt"], "note": note, "strips": strips})
    return items


def _unrelated_pictures(audit: dict, store: RecordStore) -> list[dict]:
    items = audit["unrelated"]["per_prompt"] if audit["unrelated"] else []
    return [item | {"strips": _strips(store, list(audit["models"]), item["prompt"])} for item in items]


def _strips(store: RecordStore, models: list[str], prompt: str) -> list[tuple[str, str]]:
    paths = [(model, store.path(model, prompt, "png")) for model in models]
    return [(model, picture_uri(path)) for model, path in paths if path.exists()]


def _curves(history: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """Losses, then bias, then the gradient norm, against the step; rows without a value are left out."""
    names = {key: None for row in history for key in row if key.startswith(("loss.", "bias.")) or key == "grad_norm"}
    order = sorted(names, key=lambda key: ("loss.", "bias.", "grad_").index(key[:5]))
    curves = {key: [(row["step"], row[key]) for row in history if row.get(key) is not None] for key in order}
    return {key.replace(".", " ").replace("_", " "): points for key, points in curves.items() if len(points) > 1}
