"""Build the page of scripts/reading_errors.py from its record."""

import numpy as np

from fairdiff.audit.wording import interval, number, percent
from fairdiff.studies.page import Page, Point, Section, curves_chart
from fairdiff.studies.reading_errors import kinds
from harness.labelled_renders import with_interval

RATES, SEEDS = (0.01, 0.02, 0.05, 0.1, 0.2), (0, 1, 2, 3, 4)
DISTANCES, VERDICT_SEEDS = (0.05, 0.12, 0.2), (0, 1, 2, 3, 4)
COUNTED = ("uncounted", "counted")
LEAD = (
    "This page shows how an audit's numbers change when its judge misclassifies more faces (the test-label error of "
    "Adebayo et al., ICLR 2023). Labels are perceived presentation in images, never identity."
)
METHOD = (
    "The labels of a finished audit's faces are changed at random, and the audit's own code computes bias, D and the "
    "verdict again. Uniform: every face is equally likely to be misread. By group: 1.5 times as likely for faces of "
    "one group. Only a class: only faces of that class are misread, with the same share of all faces.",
    "Uncounted: the audit corrects for the judge's own errors at most. Counted: its confusion matrix also includes "
    "the new errors, as labelled faces would show them.",
    "[low, high] is a 95 % interval over five seeds of the misreadings (Student's), with the same faces.",
)
NOT_SHOWN = (
    "Errors that depend on the prompt: errors caused by one occupation's clothes would change only its shares.",
    "How often a real judge errs: `scripts/calibrate.py` counts that.",
    "Other audits: the error that a verdict tolerates depends on its distance from the margin and on the size of the "
    "audit.",
    "Judges whose errors on generated faces differ from those on labelled faces.",
)


def key_of(kind: str, rate: float, seed: int) -> str:
    return f"{kind}/{rate}/{seed}"


def page(record: dict, command: str) -> Page:
    about = record["about"]
    sections = [Section("Method", METHOD), _numbers(record)]
    if record["verdicts"]:
        sections.append(_verdicts(record))
    facts = {"audit": f"{about['prompts']} × {about['images']} images, {about['faces']} faces, the model {about['model']}"}
    facts |= {"attribute": about["attribute"], "group": about["group"] or "none", "margin": str(about["delta"])}
    return Page("Misread faces", LEAD, sections, NOT_SHOWN, command, facts)


def _numbers(record: dict) -> Section:
    start, rows, curves = record["as read"], [], {}
    for kind in kinds(tuple(record["about"]["classes"])):
        for rate in RATES:
            cells = [c for s in SEEDS if (c := record["numbers"].get(key_of(kind, rate, s)))]
            if not cells:
                continue
            values = [("uncounted", "bias"), ("uncounted", "distance"), ("counted", "distance")]
            drawn = [with_interval([c[how][what] for c in cells]) for how, what in values]
            said = [", ".join(sorted({c[how]["verdict"] for c in cells})) for how in COUNTED]
            rows.append([f"{percent(rate, 0)}, {kind}", *drawn, *said])
            distance = float(np.mean([c["uncounted"]["distance"] for c in cells]))
            point = Point(rate, distance, tip=f"{kind} {percent(rate, 0)}")
            curves.setdefault(kind, [Point(0, start["distance"])]).append(point)
    first = [number(start["bias"]), *[number(start["distance"])] * 2, *[start["verdict"]] * 2]
    rows.insert(0, ["as read", *first])
    head = ["misread", "bias", "D, uncounted", "D, counted", "verdict, uncounted", "verdict, counted"]
    name = record["about"]["attribute"]
    chart = curves_chart(curves, f"D of {name}, errors uncounted", "share of the faces that is misread")
    text = ["Bias is uncorrected. D is corrected for the errors that the audit knows. The verdicts are of all seeds."]
    return Section(f"The audit's numbers: {name}", text, head, rows, [chart])


def _verdicts(record: dict) -> Section:
    """Return the section with the number of audits of each verdict, by D of the generator and misclassified share."""
    head, rows = ["D of the generator", "misread", *(f"{how}: on target, off, not decided" for how in COUNTED)], []
    keys = list(record["verdicts"])
    full = max(sum(key.endswith(f"/{s}") for key in keys) for s in VERDICT_SEEDS)
    seeds = [s for s in VERDICT_SEEDS if sum(key.endswith(f"/{s}") for key in keys) == full]  # seeds with all cells
    for distance in DISTANCES:
        for kind in kinds(tuple(record["about"]["classes"])):
            for rate in (0.0, *RATES):
                some = [c for s in seeds if (c := record["verdicts"].get(f"{distance}/{key_of(kind, rate, s)}"))]
                if not some:
                    continue
                said = [[c[how] for c in some] for how in COUNTED]
                words = [" / ".join(str(one.count(v)) for v in ("within", "beyond", "undecided")) for one in said]
                rows.append([number(distance, 2), "none" if not rate else f"{percent(rate, 0)}, {kind}", *words])
    n, margin = len(seeds), number(record["about"]["delta"], 2)
    least = interval([0.025 ** (1 / n), 1.0], lambda share: percent(share, 0))
    text = [
        "These generators are like the audited one, but the deviation of every prompt is scaled down. Each of "
        f"{n} seeds gives new faces and misreadings. The verdict's margin is D = {margin}. If all {n} audits agree, the "
        f"share of this verdict is in {least} (95 % interval, Clopper and Pearson's)."
    ]
    return Section("The verdict near its margin", text, head, rows)
