"""The report's table of prompts: shares and distances with intervals, as charts and as text. No number is computed here."""

from markupsafe import Markup

from fairdiff.audit.estimand import ends_of
from fairdiff.audit.figures import mark_of, range_line
from fairdiff.audit.wording import interval, last_model, number, percent

STATES = {"off": "certainly off", "open": "may be off", "within": "certainly within"}
LOOKS = {"off": "beyond", "open": "undecided", "within": "within"}  # colours of the page


def class_lines(entries: dict[str, dict], classes: list[str], target: dict[str, float]) -> list[dict]:
    """Return a line for each class: a chart, and the share with interval of each model. target: {} if none was set."""
    lines = []
    for cls in classes:
        found = {model: entry["shares"][cls] for model, entry in entries.items()}
        marks = {model: mark_of(share["share"], ends_of(share)) for model, share in found.items()}
        texts = [
            (model, f"{_whole(share['share'])} {interval(ends_of(share), _bare)}") for model, share in found.items()
        ]
        chart = Markup(range_line(marks, at=target.get(cls)))
        lines.append({"label": cls, "chart": chart, "texts": texts, "target": target.get(cls)})
    return lines


def prompt_table(audit: dict, name: str) -> dict:
    """Return the table of an attribute: mean shares, counts of certain prompts, and a row per prompt, the worst first."""
    models = {model: entry["attributes"][name] for model, entry in audit["models"].items()}
    last = last_model(audit)["attributes"][name]
    target = last["target"]
    classes = list(target["shares"])
    shown = classes[:1] if len(classes) == 2 else classes
    every = [p["target"]["distance"]["ci95_all"][1] for entry in models.values() for p in entry["per_prompt"]]
    limit = max([2 * target["delta"], *(end for end in every if end is not None)])
    rows = [
        _row({model: entry["per_prompt"][i] for model, entry in models.items()}, shown, target, limit)
        for i in range(len(last["per_prompt"]))
    ]
    return {
        "name": name,
        "requested": target["requested"],
        "overall": class_lines(models, classes, target["shares"] if target["requested"] else {}),
        "rejected": {model: entry["target"]["prompts_rejected"] for model, entry in models.items()},
        "undone": _undone(models, classes, target),
        "certain": _certain(models),
        "rests": _rests(audit, target),
        "rows": sorted(rows, key=lambda row: row["worst"], reverse=True),
    }


def _undone(models: dict[str, dict], classes: list[str], target: dict) -> list[dict]:
    """Return the lines of the corrected mean shares, [] if they were not corrected."""
    mended = {model: entry["corrected"] for model, entry in models.items() if "shares" in entry.get("corrected", {})}
    return class_lines(mended, classes, target["shares"] if target["requested"] else {}) if mended else []


def _row(items: dict[str, dict], classes: list[str], target: dict, limit: float) -> dict:
    first, last = next(iter(items.values())), list(items.values())[-1]
    distances = {model: item["target"]["distance"] for model, item in items.items()}
    marks = {model: mark_of(d["value"], d["ci95_all"]) for model, d in distances.items()}
    found = last["target"]["distance"]
    low = found["ci95_all"][0]
    own = first["target"]["shares"] if target["requested"] else {}
    lines = class_lines(items, classes, own)
    same = all(abs(share - target["shares"][cls]) < 1e-6 for cls, share in own.items())  # as shown above the table
    missing = {model: item["images"] - item["faces"] for model, item in items.items()}
    return {
        "subject": first["subject"],
        "prompt": first["prompt"],
        "lines": [line | {"target": None if same else line["target"]} for line in lines],
        "share": _key(last["shares"][classes[0]]["share"]),
        "distance": _key(found["value"]),
        "distances": [(m, f"{number(d['value'], 2)} {interval(d['ci95_all'], _two)}") for m, d in distances.items()],
        "chart": Markup(range_line(marks, limit, target["delta"] if target["requested"] else None)),
        "state": found["state"],
        "order": list(STATES).index(found["state"]),
        "look": LOOKS[found["state"]],
        "missing": list(missing.values())[-1],
        "no_face": [(model, f"{count} of {items[model]['images']}") for model, count in missing.items()],
        "worst": (low or 0.0, found["value"] or 0.0),
    }


def _certain(models: dict[str, dict]) -> str:
    """Return how many prompts are in each state for every model, and which are certainly off for the last."""
    parts = []
    for model, entry in models.items():
        count = entry["target"]["prompts_certain"]
        calls = ", ".join(f"{count[state]} {words}" for state, words in STATES.items())
        parts.append(f"{model}, {calls}")
    last = list(models.values())[-1]["per_prompt"]
    off = [item["subject"] for item in last if item["target"]["distance"]["state"] == "off"]
    names = f" Certainly off: {', '.join(off)}." if off else ""
    return f"Of the prompts: {'; '.join(parts)}.{names}"


def _rests(audit: dict, target: dict) -> str:
    """Return on which shares the states are based, or why no prompt is certain."""
    certain = target["prompts_certain"]
    if certain["reason"]:
        return f"No prompt is called certain: {certain['reason']}."
    why = "its calibration was declined" if audit["judge"].get("not_corrected") else "this judge was not calibrated"
    judged = f"uncorrected shares ({why})"
    shares = "shares corrected for the judge's errors" if certain["corrected"] else judged
    text = f"In 95 of 100 audits no prompt of a model is wrongly called certain. This is based on {shares}. "
    text += "Pictures without a face may belong to any class."
    few = certain["images_for_within"]
    if few and few > audit["images_per_prompt"]:
        text += f" With {audit['images_per_prompt']} pictures no prompt can be certainly within; that takes {few} or more."
    return text


def _key(value: float | None) -> str:
    """Return the text by which a column is sorted, "" for an undefined number."""
    return "" if value is None else f"{value:.6f}"


def _whole(value: float | None) -> str:
    return percent(value, 0)


def _bare(value: float) -> str:
    return number(100 * value, 0)


def _two(value: float) -> str:
    return number(value, 2)
