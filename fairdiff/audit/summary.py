"""A summary of audit.json for a pull request: each attribute's verdict in some lines of Markdown. It computes no number."""

import re

from fairdiff.audit.estimand import FEW, ends_of, verdict_of, why_not_corrected
from fairdiff.audit.headline import changes, headline, rms, shares_of
from fairdiff.audit.wording import (
    attribute_order,
    distance_of,
    interval,
    last_model,
    number,
    percent,
    targeted,
)


def not_within(audit: dict) -> list[str]:
    """Return a line for each attribute whose verdict is not "within", [] if all are; only those with a target."""
    entries = last_model(audit)["attributes"]
    found = []
    for name in targeted(audit):
        verdict = verdict_of(audit, entries[name]["target"])
        if verdict["verdict"] != "within":
            found.append(f"{name} is {verdict['tag']}, {_distance(entries[name])}: {verdict['why']}")
    return found


def summary(audit: dict, settings: dict[str, list[str]]) -> str:
    """Return the Markdown beside report.html: verdicts, D and bias with intervals, missing faces, what was left out.

    settings: headings with lines, as the report shows them; only the heading "left out" is used.
    """
    entries = last_model(audit)["attributes"]
    lines = [f"## FairDiff audit: {plain(headline(audit))}", ""]
    for name in attribute_order(audit):
        lines += [f"- {line}" for line in _attribute(audit, name, entries[name])]
    lines += ["", *(plain(line) + "  " for line in changes(audit))]
    lines += ["", *_table(audit), "", *_missing(audit)]
    lines += [plain(line) + "  " for line in settings.get("left out", [])]
    if audit["prompts"] < audit["prompts_needed"]:
        few = f"for these {audit['prompts']} prompts only; a statement about prompts like these needs"
        lines += ["", f"\\{FEW}: {few} {audit['prompts_needed']}."]
    lines += ["", "Labels are perceived presentation in pictures, never identity. [Full report](report.html)"]
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """Return the text on one line, escaped so that Markdown and HTML show it unchanged."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|#~>])", r"\\\1", text)


def _distance(entry: dict) -> str:
    """Return the D of the verdict, with its interval."""
    found = rms(entry)
    return f"D {number(found['value'])} {interval(ends_of(found))}".strip()


def _attribute(audit: dict, name: str, entry: dict) -> list[str]:
    target = entry["target"]
    if not target["requested"]:
        return [f"{plain(name)}: no target was set, only measured"]
    verdict = verdict_of(audit, target)
    shown = []
    for cls, share in shares_of(entry).items():
        ends = plain(interval(ends_of(share), percent))
        shown.append(f"{plain(cls)} {percent(share['share'])} {ends} of {percent(target['shares'][cls])}")
    lines = [f"**{plain(name)}: {plain(verdict['tag'])}.** {plain(_distance(entry))}, {plain(verdict['why'])}"]
    lines.append(f"{plain(name)}, mean shares and their targets: {'; '.join(shown)}")
    if "corrected" not in entry:
        lines.append(f"**not corrected:** {plain(why_not_corrected(audit, [name]))}")
    return lines


def _table(audit: dict) -> list[str]:
    """Return a table of each model's bias, or total variation for a target that is not uniform, with its noise floor."""
    models = audit["models"]
    rows = ["| mean over prompts | " + " | ".join(models) + " | noise floor |", "|---|" + "---|" * (len(models) + 1)]
    for name in attribute_order(audit):
        found = {model: distance_of(entry["attributes"][name]) for model, entry in models.items()}
        last = distance_of(last_model(audit)["attributes"][name])
        cells = [f"{number(d['mean'])} {plain(interval(ends_of(d)))}" for d in found.values()]
        rows.append(f"| {plain(name)} {last['name']} | " + " | ".join([*cells, number(last["floor"])]) + " |")
    return rows


def _missing(audit: dict) -> list[str]:
    """Return lines on images without a face, and on prompts with too few faces."""
    rates = {model: entry["no_face"] for model, entry in audit["models"].items()}
    said = [f"{percent(rate['rate'])} {plain(interval(rate['ci95'], percent))} {m}" for m, rate in rates.items()]
    lines = [f"{audit['prompts']} prompts × {audit['images_per_prompt']} pictures. Without a face: {', '.join(said)}.  "]
    if audit["left_out"]:
        names = plain("; ".join(audit["left_out"]))
        lines.append(f"Left out of all means, because a model shows fewer than two faces: {names}.  ")
    return lines
