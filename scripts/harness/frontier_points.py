"""Compute the points of the frontier from finished audits: curves, and quotas on the images before."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from fairdiff.audit.axis import MetricSpec, axes_of
from fairdiff.audit.judge import rates
from fairdiff.audit.records import load_records
from fairdiff.bias import bias
from fairdiff.errors import FairDiffError
from fairdiff.studies.curves import Outcome, labels_of, outcome, usual_rows
from fairdiff.studies.postprocess import quota, true_shares


def checked(places: dict[str, list[Path]]) -> dict[str, Path]:
    """Return every audit by its folder. FairDiffError unless prompts, images, model before and classifier agree."""
    suites = {}
    for where in (path for some in places.values() for path in some):
        before = usual_rows(load_records(where / "records.parquet"), "before")
        about = tuple(before.prompt), tuple(before.seed), tuple(before.model_hash)[:1], tuple(before.judge_hash)[:1]
        suites[str(where)] = about
    first = next(iter(suites))
    for where, about in suites.items():
        if about != suites[first]:
            what = ("prompts or images", "seeds", "model before", "judge")
            differ = ", ".join(w for w, a, b in zip(what, about, suites[first], strict=True) if a != b)
            raise FairDiffError(f"{where}: has other {differ} than {first}, allowed: audits of the same")
    return {where: Path(where) for where in suites}


def measured(places: dict[str, list[Path]], attribute: str, semantics: str) -> dict:
    """Return the curves: name -> points, each with a label and the bias and semantics of every prompt."""
    points: dict[str, list[dict]] = {}
    for name, some in places.items():
        for where in some:
            records = load_records(where / "records.parquet")
            classes = tuple(c.split(".", 2)[2] for c in records if c.startswith(f"p.{attribute}."))
            rows = usual_rows(records, "after")
            if rows.empty:
                raise FairDiffError(f"{where}: has no model after, allowed: audits of an adapter or a baseline")
            label = where.parent.parent.name.replace("__", ", ").replace("_", " ")
            points.setdefault(name, []).append(_plain(outcome(label, rows, attribute, classes, semantics)))
            nothing = _plain(outcome("nothing", usual_rows(records, "before"), attribute, classes, semantics))
    return {"attribute": attribute, "semantics": semantics, "nothing": nothing, "curves": points}


def _plain(found: Outcome) -> dict:
    values = {"bias": found.bias_P, "semantics": found.semantics_P}
    return {"label": found.label} | {
        key: [None if np.isnan(v) else round(float(v), 6) for v in some] for key, some in values.items()
    }


def quotas(where: Path, attribute: str, tolerances: tuple[float, ...]) -> list[dict]:
    """Return for each tolerance the cost (sampled images for one kept), the bias as classified, and the true bias.

    The true bias needs the classifier's counted errors. A prompt whose quota keeps no image is counted, but has no numbers.
    """
    records = load_records(where / "records.parquet")
    spec = MetricSpec.from_json(json.loads((where / "request.json").read_text(encoding="utf-8"))["spec"])
    rows = usual_rows(records, "before")
    order = rows.drop_duplicates("prompt")
    axis = next(a for a in axes_of(spec, int(order.prompt_index.max()) + 1) if a.name == attribute)
    confusion = spec.confusion.get(attribute)
    each = [rows[rows.prompt == prompt] for prompt in order.prompt]
    targets = [axis.target_PK[i] for i in order.prompt_index]
    return [_quota(each, targets, axis.classes, (attribute, tolerance, confusion)) for tolerance in tolerances]


def _quota(each: list[pd.DataFrame], targets: list, classes: tuple[str, ...], about: tuple) -> dict:
    attribute, tolerance, confusion = about
    costs, said, true, none = [], [], [], 0
    for rows, target in zip(each, targets, strict=True):
        labels = labels_of(rows, attribute, classes)
        counts = np.bincount(labels[labels >= 0], minlength=len(classes))
        kept = quota(counts, target, tolerance)
        if not kept.sum():
            none += 1
            continue
        costs.append(len(rows) / kept.sum())
        said.append(float(bias(kept / kept.sum())))
        if confusion is not None:
            true.append(float(bias(true_shares(kept, counts / counts.sum(), rates(confusion)))))
    return {"tolerance": tolerance, "costs": costs, "bias": said, "true_bias": true, "nothing_kept": none}
