"""Compute audit.json from the records: a pure function of the table and of the settings.

Images without a face have no label and are counted separately. Undefined numbers are null, never 0.
"""

import math

import numpy as np
import pandas as pd

from fairdiff.audit import intervals as iv
from fairdiff.audit.attribute import judge_for, suite_metrics
from fairdiff.audit.axis import Axis, MetricSpec, axes_of, labels, tally
from fairdiff.audit.estimand import ESTIMANDS, LARGEST_COUNTS
from fairdiff.audit.paired import make_pair, paired_metrics
from fairdiff.audit.per_prompt import prompt_metrics
from fairdiff.audit.planner import images_needed
from fairdiff.audit.records import MODELS, probability_columns, wording_column
from fairdiff.audit.rows import by_family, difference_over_prompts, grouped, mean_over_prompts, prompt_means
from fairdiff.audit.suite import ENOUGH, ratio_interval, within_range
from fairdiff.audit.verdict import FEW_IMAGES

SCHEMA = "fairdiff.audit/7"
CONFIDENT = 0.9  # class probability that counts as confident, as in the face loss (Shen et al., ICLR 2024)


def compute_metrics(
    records: pd.DataFrame, spec: MetricSpec, at_guidance: dict[float, pd.DataFrame] | None = None
) -> dict:
    """Return all of audit.json (schema `fairdiff.audit/7`) as plain Python values, with None for NaN.

    at_guidance: records of the same prompts at further guidance scales.
    """
    usual, named = records[records.names == ""], records[records.names != ""]
    people, without_people = usual[usual.people], usual[~usual.people]
    prompts = people.drop_duplicates("prompt_index").sort_values("prompt_index")
    axes = axes_of(spec, len(prompts))
    names = [m for m in MODELS if (records.model == m).any()]
    rows_of = {model: people[people.model == model] for model in names}
    tallies = {m: {a.name: tally(rows, a, spec, prompts.prompt_index) for a in axes} for m, rows in rows_of.items()}
    seen = _seen_by_all(tallies, axes[0])
    models = {m: _model(rows, axes, tallies[m], seen[m], prompts, spec) for m, rows in rows_of.items()}

    def paired(first: str) -> dict | None:
        if not {first, "after"} <= {*models}:
            return None
        rows, counts = (tuple(of[m] for m in (first, "after")) for of in (rows_of, tallies))
        return paired_metrics(make_pair(rows, counts, seen[first] & seen["after"]), axes, prompts, spec)

    audit = {
        "schema": SCHEMA,
        "prompts": len(prompts),
        "images_per_prompt": int(people.groupby(["model", "prompt_index"]).size().max()),
        "prompts_needed": ENOUGH,
        "left_out": list(prompts.prompt[~np.all([*seen.values()], 0)]),
        "judge": spec.judge,
        "attributes": {name: list(classes) for name, classes in spec.attributes.items()},
        "families": prompts.family.value_counts().to_dict(),
        "models": models,
        "paired": paired("before"),
        "trained": paired("start"),
        "named": _named(named, spec) if len(named) else None,
        "without_people": _without_people(without_people) if len(without_people) else None,
        "guidance": _over_guidance(models, at_guidance, spec) if at_guidance else None,
        "sample_size": _sample_size(axes, len(prompts), spec),
        "provenance": {"several_faces": LARGEST_COUNTS} | spec.provenance | _provenance(records),
        "estimands": ESTIMANDS,
    }
    return plain(audit)


def _seen_by_all(tallies: dict, axis: Axis) -> dict[str, np.ndarray]:
    """Return which prompts [P] the means of each model include: those in which all models show two faces or more.

    So before and after have the same prompts. A model without any such prompt has none, and does not restrict the others.
    """
    two = {model: found[axis.name].sum(1) > 1 for model, found in tallies.items()}
    common = np.all([rows for rows in two.values() if rows.any()] or [*two.values()], 0)
    return {model: rows & common for model, rows in two.items()}


def _sample_size(axes: list[Axis], prompts: int, spec: MetricSpec) -> dict:
    """Return the images per prompt with which an audit of at least `ENOUGH` prompts has power .8 for "within"."""
    many = max(prompts, ENOUGH)
    needed = {}
    for axis in (axis for axis in axes if len(axis.members) == 1):
        judge, target = judge_for(axis, spec), axis.target_PK.mean(0)
        told = (target > 0).all() and not (judge and judge.refusal)
        needed[axis.name] = images_needed(many, target, spec.delta, judge) if told else None
    return {"half_width_0.10": iv.images_for_half_width(0.10), "prompts": many, "images_per_prompt": needed}


def _provenance(records: pd.DataFrame) -> dict:
    hashes = {model: rows.model_hash.iloc[0] for model, rows in records.groupby("model", sort=False)}
    return {
        "seed": records.seed.iloc[0],
        "hashes": hashes | {"judge": records.judge_hash.iloc[0]},
        "labels": "perceived presentation in pictures, not identity",
    }


def _model(rows: pd.DataFrame, axes: list[Axis], tallies: dict, seen, prompts: pd.DataFrame, spec: MetricSpec) -> dict:
    images = rows.groupby("prompt_index").size().reindex(prompts.prompt_index, fill_value=0).to_numpy()
    result: dict = {"images": len(rows), "attributes": {}, "joint": {}}

    def measured(axis: Axis, rows_P: np.ndarray) -> dict:
        counts = tallies[axis.name]
        entry = suite_metrics(
            counts[rows_P], (images - counts.sum(1))[rows_P], seen[rows_P], axis.rows(rows_P), spec
        )
        few = rows_P & (images < 2)
        if few.any() and FEW_IMAGES in (entry["target"]["reason"] or ""):
            named = (f'"{prompt}" ({int(n)})' for prompt, n in zip(prompts.prompt[few], images[few], strict=True))
            entry["target"]["reason"] += f": {', '.join(named)}"
        return entry

    for axis in axes:
        counts, entry = tallies[axis.name], measured(axis, np.ones(len(prompts), bool))
        entry["per_prompt"], entry["target"]["prompts_certain"] = prompt_metrics(counts, images, axis, prompts, spec)
        entry["target"]["prompts_rejected"] = sum(item["target"]["p_holm"] < 0.05 for item in entry["per_prompt"])
        if len(axis.members) == 1:
            entry["low_confidence"] = _low_confidence(rows, axis)
            if axis.name in spec.judge.get("wordings", {}):
                entry["wordings"] = _by_wording(rows, axis, spec)
        result["attributes" if len(axis.members) == 1 else "joint"][axis.name] = entry
    result["families"] = {
        family: {"prompts": int(rows_P.sum())}
        | grouped(axes, lambda axis, rows_P=rows_P: measured(axis, rows_P))
        for family, rows_P in by_family(prompts.family).items()
    }
    missing = int((~rows.found).sum())
    result["no_face"] = {"rate": missing / len(rows), "ci95": iv.rate_interval(missing, len(rows)), "images": missing}
    result["several_faces"] = _several(rows)
    for name in ("clip_t", "clip_i", "dino"):
        result[name] = mean_over_prompts(prompt_means(rows[name], rows), (-1, 1))
    result["between_seeds"] = mean_over_prompts(prompt_means(1 - rows.between, rows), (0, 2))
    return result


def _several(rows: pd.DataFrame) -> dict:
    """Return the rate of images with several faces among those whose faces were counted, NaN if none were."""
    counted = rows.faces[rows.faces >= 0]
    several, n = int((counted > 1).sum()), len(counted)
    return {"rate": several / n if n else math.nan, "ci95": iv.rate_interval(several, n), "images": several}


def _low_confidence(rows: pd.DataFrame, axis: Axis) -> dict:
    """Return the rate of low-confidence faces, in which no class has a probability of `CONFIDENT` or more."""
    largest = rows.loc[rows.found, probability_columns({axis.name: axis.classes})].max(axis=1)
    low_confidence = int((largest < CONFIDENT).sum())
    rate = low_confidence / len(largest) if len(largest) else math.nan
    return {"rate": rate, "ci95": iv.rate_interval(low_confidence, len(largest))}


def _by_wording(rows: pd.DataFrame, axis: Axis, spec: MetricSpec) -> dict:
    """Return the shares by each wording of a zero-shot judge alone, as means over prompts with a face, and their range."""
    faces = rows[rows.found]
    each = []
    for j, prompts in enumerate(spec.judge["wordings"][axis.name]):
        label = faces[wording_column(axis.name, j)]
        hits = {name: (label == k).groupby(faces.prompt_index) for k, name in enumerate(axis.classes)}
        each.append({"prompts": prompts, "shares": {name: hit.mean().mean() for name, hit in hits.items()}})
    found = {name: [item["shares"][name] for item in each] for name in axis.classes}
    return {"range": {name: [min(some), max(some)] for name, some in found.items()}, "each": each}


def _without_people(rows: pd.DataFrame) -> dict:
    """Return the drift of prompts without people, also relative to the distance between two seeds."""
    pair = ("before", "after")
    before, after = (rows[rows.model == model] for model in pair)
    between = (1 - before.between).groupby(before.prompt_index).mean()
    drift = (1 - after.dino).groupby(after.prompt_index).mean().reindex(between.index)
    ratio, interval = math.nan, (math.nan, math.nan)
    if drift.notna().all() and (between > 0).all():
        ratio = drift.mean() / between.mean()
        interval = within_range(ratio_interval(drift, between), 0, math.inf)
    names = before.drop_duplicates("prompt_index").set_index("prompt_index")
    return {
        "prompts": len(between),
        "images_per_prompt": int(before.groupby("prompt_index").size().max()),
        "drift": mean_over_prompts(drift.dropna().to_numpy(), (0, 2)),
        "between_seeds": mean_over_prompts(between.dropna().to_numpy(), (0, 2)),
        "relative_drift": {"value": ratio, "ci95": interval},
        "false_face": {
            model: {"rate": part.found.mean(), "ci95": iv.rate_interval(int(part.found.sum()), len(part))}
            for model, part in zip(pair, (before, after), strict=True)
        },
        "per_prompt": [
            {
                "prompt_index": int(i),
                "prompt": names.prompt[i],
                "subject": names.subject[i],
                "drift": drift[i],
                "between_seeds": between[i],
            }
            for i in between.index
        ],
    }


def _over_guidance(models: dict, at_guidance: dict[float, pd.DataFrame], spec: MetricSpec) -> list[dict]:
    """Return the bias and total variation of each attribute at every guidance scale, including the scale of `models`."""
    every = {float(spec.provenance["guidance"]): models}
    every |= {scale: compute_metrics(records, spec)["models"] for scale, records in at_guidance.items()}
    keys = ("mean", "ci95", "ci95_these", "floor")
    return [
        {
            "scale": scale,
            "models": {
                model: {
                    name: {
                        "bias": {key: axis["bias"][key] for key in keys},
                        "total_variation": {key: axis["target"]["total_variation"][key] for key in keys},
                    }
                    for name, axis in entry["attributes"].items()
                }
                for model, entry in found.items()
            },
        }
        for scale, found in sorted(every.items())
    ]


def _named(rows: pd.DataFrame, spec: MetricSpec) -> dict:
    """Return, for prompts that name a class, the share of faces that show this class, by attribute and model.

    kept: mean over subjects of the mean over classes, with Student's interval over subjects.
    """
    attribute, cls = rows.names.str.partition(".")[0], rows.names.str.partition(".")[2]
    entries: dict[str, dict] = {}
    models = [model for model in MODELS if (rows.model == model).any()]
    for name in attribute.unique():
        faces = rows[(attribute == name) & rows.found]
        wanted = cls[faces.index].map({c: k for k, c in enumerate(spec.attributes[name])})
        kept = pd.Series(labels(faces, spec.attributes, (name,)) == wanted, dtype=float)
        by = kept.groupby([faces.model, faces.subject, cls[faces.index]]).mean()
        subjects = by.groupby(level=[0, 1]).mean().unstack(0).reindex(columns=models)  # one row per subject
        entry = {"kept": {model: mean_over_prompts(subjects[model].dropna().to_numpy(), (0, 1)) for model in models}}
        if "after" in models:
            step = (subjects["after"] - subjects["before"]).dropna().to_numpy()
            entry["change"] = difference_over_prompts(step)
        classes = by.groupby(level=[2, 0]).mean()
        entry["classes"] = {c: {m: classes.get((c, m), math.nan) for m in models} for c in spec.attributes[name]}
        entries[name] = entry
    return {
        "prompts": rows.prompt.nunique(),
        "images_per_prompt": int(rows.groupby(["model", "prompt_index"]).size().max()),
        "attributes": entries,
        "per_prompt": [
            {"prompt": p.prompt, "subject": p.subject, "names": p.names}
            for p in rows.drop_duplicates("prompt_index").sort_values("prompt_index").itertuples()
        ],
    }


def plain(value):
    """Return plain JSON values: arrays and tuples as lists, numpy scalars as Python ones, non-finite numbers as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
