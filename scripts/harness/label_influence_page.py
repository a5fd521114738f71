"""Build the page of scripts/label_influence.py from its record."""

from itertools import product

import numpy as np

from fairdiff.audit.wording import percent
from fairdiff.studies.page import Page, Point, Section, curves_chart
from harness.labelled_renders import KINDS, with_interval

RATES, SEEDS = (0.2,), (0, 1, 2, 3, 4)
SHARES = (0.0, 0.02, 0.04, 0.1, 0.2)  # relabelled shares of the training faces
WAYS = {
    "gap in error": "predicted fall of the gap in the expected error",
    "gap in error, no harm": "the same, only for labels not predicted to raise the error of a group",
    "gap in calibration": "predicted fall of the gap in the calibration error",
    "error of all": "predicted fall of the expected error of all validation faces, in any group",
    "loss": "the loss of the label itself; needs no validation faces",
    "random": "chance",
}
MEASURED = ("accuracy", "error gap", "calibration gap")
REFERENCES = ("as labelled", "true labels")
LEAD = (
    "This page shows which training labels widen a judge's gap between groups, and what relabelling them does. It "
    "uses influence functions of the judge's last layer (Adebayo et al., ICLR 2023). Labels are perceived "
    "presentation in images, never identity."
)
METHOD = (
    "A judge of gender, the perceptron of `scripts/label_errors.py`, is trained on 1500 faces of Portraits with wrong "
    "labels; then all but its last layer is frozen. 600 validation and 1400 test faces have true labels. The groups "
    "are race Black, a sixth of the faces, and the others. Wrong labels are equally likely for all faces, or 1.5 "
    "times as likely in the smaller group.",
    "The influence of a label is the first-order change of a validation number if the label is flipped, 1/N <dM/dW, "
    "H^-1 h (e - y)'> with the damped Gauss-Newton matrix H of the last layer. A gap is the absolute difference "
    "between the groups.",
    "Relabel and fine-tune: in rounds of 2 %, the most suspect labels are changed, the layer is trained further, and "
    "the labels are ranked again. No label is changed twice. It stops where the gap in the expected error of the "
    "validation faces was smallest.",
    "[low, high] is a 95 % interval over seeds of the split, the wrong labels and the random order (Student's).",
)
NOT_SHOWN = (
    "Influence through the lower layers, which have learnt the wrong labels too: they are frozen.",
    "Wrong labels among the validation faces, which would make right labels look suspect.",
    "More than two classes or two groups, and errors that depend on how a face looks, as human errors do.",
    "That a smaller gap is fairer: it also shrinks if the group with fewer errors gets worse.",
)


def key_of(kind: str, rate: float, seed: int) -> str:
    return f"{kind}/{rate}/{seed}"


def over_noises(record: dict, get) -> list[float]:
    """Return for each complete seed the mean of get(cell) over all noises."""
    return [float(np.mean([get(record["cells"][key_of(k, r, s)]) for k, r in product(KINDS, RATES)])) for s in seeds(record)]


def seeds(record: dict) -> list[int]:
    """Return the seeds that have all of their cells."""
    return [s for s in SEEDS if all(key_of(k, r, s) in record["cells"] for k, r in product(KINDS, RATES))]


def page(record: dict, command: str) -> Page:
    sections = [Section("Method", METHOD), _check(record["check"])]
    if seeds(record):
        sections += [_suspects(record), _mended(record), _at_the_end(record), _noises(record)]
    else:
        sections.append(Section("Suspects, relabel and fine-tune", ["Not measured yet."]))
    about = {"seeds": str(len(seeds(record))), "wrong labels": ", ".join([*(percent(rate, 0) for rate in RATES), *KINDS])}
    return Page("Labels that widen a gap", LEAD, sections, NOT_SHOWN, command, about)


def _check(found: dict) -> Section:
    names = list(next(iter(found.values()), {}))
    rows = [
        [name, *(with_interval([one[name][what] for one in found.values()]) for what in ("relabelled", "left out"))]
        for name in names
    ]
    text = [
        "For each of 200 training faces with 20 % wrong labels, the layer is trained again with this label flipped, "
        "or without the face. The table shows Spearman's correlation of true and predicted changes; 1 is the same "
        "order."
    ]
    return Section("Against training again", text, ["number", "relabelled", "left out"], rows)


def _suspects(record: dict) -> Section:
    head = ["ranked by", "which is", *(f"{percent(rate, 0)}, {kind}" for kind, rate in product(KINDS, RATES)), "all"]
    rows = []
    for way, words in WAYS.items():
        cells = [
            with_interval([record["cells"][key_of(kind, rate, s)][way]["area"] for s in seeds(record)])
            for kind, rate in product(KINDS, RATES)
        ]
        rows.append([way, words, *cells, with_interval(over_noises(record, lambda c, w=way: c[w]["area"]))])
    text = ["Area under the curve of \"is mislabelled\": 0.5 is chance, 1 finds every wrong label before any right one."]
    return Section("Do suspects have wrong labels?", text, head, rows)


def _mended(record: dict) -> Section:
    """Return the section with test numbers where relabelling stops, paired with the unchanged labels, and curves."""
    rows = []
    for name in REFERENCES:
        own = [with_interval(over_noises(record, lambda c, n=name, m=m: c[n][m])) for m in MEASURED]
        rows.append([name, *own, "–", "–", "–"])
    for way in WAYS:
        own = [with_interval(over_noises(record, lambda c, w=way, m=m: c[w]["stopped"][m])) for m in MEASURED]
        fall = over_noises(record, lambda c, w=way: c[w]["stopped"]["error gap"] - c["as labelled"]["error gap"])
        share = over_noises(record, lambda c, w=way: c[w]["stopped"]["relabelled"])
        right = over_noises(record, lambda c, w=way: c[w]["stopped"]["of them wrong"] or 0.0)
        rows.append([way, *own, with_interval(fall), with_interval(share, percent), with_interval(right, percent)])
    head = ["relabelled by", *MEASURED, "change of the error gap", "relabelled", "of them wrong before"]
    curves = {
        way: [
            Point(share, float(np.mean(over_noises(record, lambda c, w=way, i=i: c[w]["path"][i]["error gap"]))), tip=way)
            for i, share in enumerate(SHARES)
        ]
        for way in WAYS
    }
    chart = curves_chart(curves, "error gap, test faces", "share of the training faces that is relabelled")
    text = [
        "These are test faces with true labels, means over all noises. In the row \"as labelled\" nothing is changed. "
        "If a run changes nothing, its share of wrong labels counts as 0."
    ]
    return Section("Relabel and fine-tune", text, head, rows, [chart])


def _at_the_end(record: dict) -> Section:
    """Return the section in which every ranking relabels the same share, unless it runs out of labels to change."""
    rows = []
    for way in WAYS:
        own = [with_interval(over_noises(record, lambda c, w=way, m=m: c[w]["path"][-1][m])) for m in MEASURED]
        share, right = (
            over_noises(record, lambda c, w=way, k=key: c[w]["path"][-1][k] or 0.0) for key in ("relabelled", "of them wrong")
        )
        rows.append([way, *own, with_interval(share, percent), with_interval(right, percent)])
    text = [f"Without the stop, until {percent(SHARES[-1], 0)} of the labels are changed or none is predicted to help."]
    return Section("Relabel without a stop", text, ["relabelled by", *MEASURED, "relabelled", "of them wrong before"], rows)


def _noises(record: dict) -> Section:
    head = ["noise", *REFERENCES, *WAYS]
    rows = []
    for kind, rate in product(KINDS, RATES):
        cells = [record["cells"][key_of(kind, rate, s)] for s in seeds(record)]
        gaps = [[c[name]["error gap"] for c in cells] for name in REFERENCES]
        gaps += [[c[way]["stopped"]["error gap"] for c in cells] for way in WAYS]
        rows.append([f"{percent(rate, 0)}, {kind}", *map(with_interval, gaps)])
    return Section("Error gap by noise", ["Test faces, where relabelling stops; 0 is no gap."], head, rows)
