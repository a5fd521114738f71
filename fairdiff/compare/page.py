"""Build the page of a comparison, in the style of an audit's report. It computes no numbers."""

from fairdiff.audit.wording import number
from fairdiff.compare.charts import axis_of, svg
from fairdiff.compare.table import about, columns_of, form_of, written
from fairdiff.studies.page import Page, Section

INTERVALS = (
    "[low, high] is a 95 % interval for prompts like these, or if marked * for these prompts with new noise. With several "
    "seeds, the mean is shown with ± the standard deviation over seeds. Several trainings widen the interval by Student's "
    "interval of their means."
)
NOT_SHOWN = (
    "Identity. Labels are perceived presentation in pictures, as a classifier reads it, and never anybody's identity.",
    "Luck of the winner: the best of many audits looks better than it is. Choose on validation prompts, and measure the "
    "choice on test prompts once.",
    "Intervals for all differences at once: each one by itself holds in 95 of 100 comparisons.",
    "Intervals for the worst prompts and for the number that is off: the same pictures choose them.",
    "Other prompts and judges than those of these audits.",
)


def page(found: dict, command: str) -> Page:
    """Return the page of a comparison. found: result of `numbers.compared`. command: the command that made it."""
    frontier, lines = svg(found)
    lead = f"{about(found)[0]}. Labels are perceived presentation in pictures, never anybody's identity."
    axis = axis_of(found)
    drawn = []
    if frontier:
        text = (
            "Distance to the target against the cost in pictures. Bars are 95 % intervals, the band is the noise floor."
        )
        drawn.append(Section("Frontier", [text], charts=frontier))
    if lines:
        drawn.append(Section(f"Over {axis}", ["Bars are 95 % intervals, the band is the noise floor."], charts=lines))
    sections = [*drawn, _what(found), *_numbers(found)]
    return Page(_title(found), lead, sections, NOT_SHOWN, command, _folders(found), "comparison")


def _title(found: dict) -> str:
    names = [group["name"] for group in found["groups"]]
    if found["settings"] and len(found["settings"]) == 1 and len(names) > 2:
        (key,) = found["settings"]
        return f"{len(names)} values of {key}"
    return " and ".join(names) if len(names) < 3 else f"{len(names)} groups of audits"


def _what(found: dict) -> Section:
    head = ["", "audits", "training seeds", "audit seeds", *(f"{name}: verdict" for name in found["targeted"])]
    head += ["in common with the reference"]
    rows = []
    for group in found["groups"]:
        seeds = [", ".join(map(str, group[key])) or "–" for key in ("training_seeds", "audit_seeds")]
        verdicts = [_counted(group["verdicts"][name]) for name in found["targeted"]]
        common = "; ".join(what for what, _ in group["paired"]) or "the reference"
        rows.append([group["name"], str(len(group["audits"])), *seeds, *verdicts, common])
    text = [
        f"The reference is {found['reference']}. Differences to it are paired over prompts, and over pictures with the same "
        "noise. This makes them more precise than a comparison of two intervals. Identical pictures differ by 0."
    ]
    return Section("What is compared", [*text, *(f"{line}." for line in about(found)[1:])], head, rows)


def _counted(tags: list[str]) -> str:
    """Return the verdict of one audit, such as "on target", or how often several audits have each."""
    counts = {tag: tags.count(tag) for tag in tags}
    return (
        next(iter(counts)) if len(tags) == 1 else "; ".join(f"{tag}: {n} of {len(tags)}" for tag, n in counts.items())
    )


def _numbers(found: dict) -> list[Section]:
    columns = columns_of(found)
    sections = []
    for title in dict.fromkeys(entry["group"] for entry in found["numbers"]):
        rows = []
        for entry in (entry for entry in found["numbers"] if entry["group"] == title):
            for name, row in entry["rows"].items():
                label = f"{entry['name']}: {name}"
                for audit, own in row["audits"].items():
                    rows.append(
                        [f"{entry['name']}: · {audit}", *(_cell(own.get(key), key, entry) for key in columns), ""]
                    )
                label += f", mean of {len(row['audits'])}" if row["audits"] else ""
                cells = [_cell(row[key], key, entry) for key in columns]
                rows.append([label, *cells, row["verdict"] or number(row["floor"])])
        notes = {
            entry["name"]: entry["note"] for entry in found["numbers"] if entry["group"] == title and entry["note"]
        }
        text = [INTERVALS] if not sections else []
        text += ["; ".join(f"{name}: {note}" for name, note in notes.items()) + "."] if notes else []
        sections.append(Section(title[0].upper() + title[1:], text, ["", *columns.values(), "floor"], rows))
    return [section for section in sections if section.rows]


def _cell(cell: dict | None, key: str, entry: dict) -> str:
    return " ".join(part for part in written(cell, key, form_of(entry)) if part)


def _folders(found: dict) -> dict[str, str]:
    return {f"{group['name']}: {name}": folder for group in found["groups"] for name, folder in group["audits"].items()}
