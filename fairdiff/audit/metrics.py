"""Records in, audit.json out: a pure function of the table and of the request.

Images without a face have no label and are counted apart. Undefined numbers are null, never 0.
"""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from fairdiff.audit import intervals as iv
from fairdiff.audit.attribute import average, change, judge_for, suite_metrics
from fairdiff.audit.axis import Axis, MetricSpec, axes_of, labels, requested, tally
from fairdiff.audit.per_prompt import prompt_metrics
from fairdiff.audit.planner import images_needed
from fairdiff.audit.records import MODELS, probability_columns, wording_column
from fairdiff.audit.suite import ENOUGH, ratio_interval, student_interval, within_range

SCHEMA = "fairdiff.audit/6"
LARGEST_COUNTS = "the largest face of a picture counts, the others are ignored"
CONFIDENT = 0.9  # of a class: what the face loss calls confident (Shen et al., ICLR 2024)

ESTIMANDS = {
    "ci95": "95 % interval for the population that the prompts are a sample of (prompts like these): bootstrap-t over "
    f"prompts, never narrower than ci95_these; null with fewer than {ENOUGH} prompts. No sample sees a bias that one prompt "
    "in a hundred carries",
    "ci95_these": "95 % interval for these prompts with new noise",
    "bias.mean": "mean over prompts of the plug-in bias at this number of images; its noise floor is not 0",
    "bias.sd_over_prompts": "spread of the per-prompt bias, not a standard error",
    "bias.floor": "what a perfectly fair generator shows on average at the same numbers of faces",
    "bias.missing_face_bounds": "mean bias if the pictures without a face had had the best or the worst classes",
    "bias.worst_tenth": "mean of the tenth of the prompts with the largest bias; its floor, what a perfectly fair generator "
    "shows, is larger than that of the mean: some prompts are off by chance. No interval: the same images choose the prompts",
    "shares": "mean share over prompts; ratio: to the mean target share, flagged below four fifths",
    "target.total_variation": "mean over prompts of half the absolute differences to the prompt's target; its floor, "
    "the mean of what a generator exactly on each target shows at the same numbers of faces, is not 0",
    "target.distance": "D, root mean square over prompts of the chi-squared distance sum_k (p_k - t_k)^2 / t_k of a "
    "prompt's true shares p to its target t, estimated without the noise of the images (floor 0); these: inverted test, "
    "worlds from empirical-Bayes shares",
    "target.verdict": "of prompts like these, verdict_these: of these prompts. within: the whole interval below delta, wrong "
    "at most 5 % of the time at D = delta, with missing faces at their worst; beyond: the whole above delta, with missing "
    "faces at their best; else undecided. On corrected shares where the judge's errors were counted",
    "target.prompts_certain": "how many prompts are certainly off (the whole interval of their own D above delta), within "
    "(below it) or open; in 95 % of audits none is wrongly called off or within. images_for_within: fewer pictures of a "
    "prompt call none within",
    "per_prompt.target.distance": "D of the shares seen, noise included; ci95_all holds for all prompts at once: Clopper and "
    "Pearson's exact box at .05 / prompts, missing faces of any class, and the judge's error undone where it was counted",
    "target.p_holm": "exact binomial (two classes) or Monte Carlo G test of the prompt's target, Holm over prompts",
    "per_prompt.bias.ci95": "the prompt's own true bias: Wilson (two classes) or Goodman's simultaneous region",
    "corrected": "the judge's error on labelled faces undone, assumed to be the same on generated ones; intervals hold what "
    "the labelled faces leave open of it (Dirichlet, zero cells included); its floors are larger",
    "families": "the same over the prompts of one family; their intervals are for that family, not for a comparison",
    "low_confidence.rate": "faces whose most probable class has less than .9, all prompts pooled: no class is clear, "
    "and labels of such faces can hide a bias or make one; Wilson, for these prompts and new noise",
    "wordings": "mean shares over prompts if a zero-shot judge had one of its wordings only: how far they are its words'",
    "no_face.rate": "pictures without a face, all prompts pooled; Wilson, for these prompts and new noise",
    "several_faces.rate": "pictures in which the detector found several faces, all prompts pooled; Wilson, as no_face.rate; "
    "null where it does not count them",
    "left_out": "prompts that show fewer than two faces by one of the models: in no mean of shares, before or after, but in "
    "the verdict and the bounds",
    "paired": "after minus before on the same prompts and noise",
    "trained": "after minus start (the untrained adapter, where it changes images by itself), as paired: what training did",
    "paired.drift": "of an attribute without a target: the change of its bias, and whether its whole interval lies within "
    "(yes) or outside (no) the margin: ci95, and ci95_these for stayed_within_these",
    "clip_t, clip_i, dino, between_seeds, named.kept": "means over prompts (subjects); ci95: Student's over prompts",
    "guidance": "bias.mean and target.total_variation at other guidance scales, with the same prompts and noise",
    "named.kept": "share of the faces that show the class which their prompt names; mean over subjects",
    "without_people.relative_drift": "mean drift (1 - cosine to the image before) over the mean distance between two "
    "seeds; Student's interval of the linearised ratio",
}


def compute_metrics(
    records: pd.DataFrame, spec: MetricSpec, at_guidance: dict[float, pd.DataFrame] | None = None
) -> dict:
    """All of audit.json (schema `fairdiff.audit/6`) as plain Python values, NaN replaced by None.

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
        return _paired(people, axes, tallies, seen[first] & seen["after"], prompts, spec, first)

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
    return _plain(audit)


def _seen_by_all(tallies: dict, axis: Axis) -> dict[str, np.ndarray]:
    """Which prompts [P] each model's means are about: those in which all models show two faces or more.

    So before and after are of the same prompts. A model that never shows two faces has none, and takes none from the others.
    """
    two = {model: found[axis.name].sum(1) > 1 for model, found in tallies.items()}
    common = np.all([rows for rows in two.values() if rows.any()] or [*two.values()], 0)
    return {model: rows & common for model, rows in two.items()}


def mean_over_prompts(values: np.ndarray, limits: tuple[float, float] = (-math.inf, math.inf)) -> dict:
    """Mean over prompts of what is measured on images [P], with Student's interval."""
    return {"mean": average(values), "ci95": student_interval(values, limits)}


def difference_over_prompts(values: np.ndarray) -> dict:
    """The same for paired differences, after minus before."""
    return {"difference": average(values), "ci95": student_interval(values)}


def _sample_size(axes: list[Axis], prompts: int, spec: MetricSpec) -> dict:
    """Images of each of as many prompts (or enough of them) that find a generator on target so in 80 of 100 audits."""
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
    images = rows.groupby("prompt_index").size().reindex(prompts.prompt_index).to_numpy()
    result: dict = {"images": len(rows), "attributes": {}, "joint": {}}
    for axis in axes:
        counts = tallies[axis.name]
        entry = suite_metrics(counts, images - counts.sum(1), seen, axis, spec)
        entry["per_prompt"], entry["target"]["prompts_certain"] = prompt_metrics(counts, images, axis, prompts, spec)
        entry["target"]["prompts_rejected"] = sum(item["target"]["p_holm"] < 0.05 for item in entry["per_prompt"])
        if len(axis.members) == 1:
            entry["low_confidence"] = _low_confidence(rows, axis)
            if axis.name in spec.judge.get("wordings", {}):
                entry["wordings"] = _by_wording(rows, axis, spec)
        result["attributes" if len(axis.members) == 1 else "joint"][axis.name] = entry
    result["families"] = {
        family: {"prompts": int(rows_P.sum())}
        | _grouped(
            axes,
            lambda axis, rows_P=rows_P: suite_metrics(
                tallies[axis.name][rows_P],
                (images - tallies[axis.name].sum(1))[rows_P],
                seen[rows_P],
                axis.rows(rows_P),
                spec,
            ),
        )
        for family, rows_P in _families(prompts.family).items()
    }
    missing = int((~rows.found).sum())
    result["no_face"] = {"rate": missing / len(rows), "ci95": iv.rate_interval(missing, len(rows)), "images": missing}
    result["several_faces"] = _several(rows)
    for name in ("clip_t", "clip_i", "dino"):
        result[name] = mean_over_prompts(_prompt_means(rows[name], rows), (-1, 1))
    result["between_seeds"] = mean_over_prompts(_prompt_means(1 - rows.between, rows), (0, 2))
    return result


def _several(rows: pd.DataFrame) -> dict:
    """Pictures with several faces, of those whose faces the detector counted; NaN where it counted none."""
    counted = rows.faces[rows.faces >= 0] if "faces" in rows else rows.found[:0]
    several, n = int((counted > 1).sum()), len(counted)
    return {"rate": several / n if n else math.nan, "ci95": iv.rate_interval(several, n), "images": several}


def _low_confidence(rows: pd.DataFrame, axis: Axis) -> dict:
    """Low-confidence faces: no class has a probability of `CONFIDENT`."""
    largest = rows.loc[rows.found, probability_columns({axis.name: axis.classes})].max(axis=1)
    low_confidence = int((largest < CONFIDENT).sum())
    rate = low_confidence / len(largest) if len(largest) else math.nan
    return {"rate": rate, "ci95": iv.rate_interval(low_confidence, len(largest))}


def _by_wording(rows: pd.DataFrame, axis: Axis, spec: MetricSpec) -> dict:
    """The shares, means over prompts with a face, by each wording of a zero-shot judge alone, and their range."""
    faces = rows[rows.found]
    each = []
    for j, prompts in enumerate(spec.judge["wordings"][axis.name]):
        label = faces[wording_column(axis.name, j)]
        hits = {name: (label == k).groupby(faces.prompt_index) for k, name in enumerate(axis.classes)}
        each.append({"prompts": prompts, "shares": {name: hit.mean().mean() for name, hit in hits.items()}})
    found = {name: [item["shares"][name] for item in each] for name in axis.classes}
    return {"range": {name: [min(some), max(some)] for name, some in found.items()}, "each": each}


def _families(family_P: pd.Series) -> dict[str, np.ndarray]:
    """Which prompts [P] belong to each family; {} for a single one, whose numbers are those of all prompts."""
    names = list(dict.fromkeys(family_P))
    return {name: (family_P == name).to_numpy() for name in names} if len(names) > 1 else {}


def _grouped(axes: list[Axis], measure: Callable[[Axis], dict]) -> dict[str, dict]:
    """measure(axis) of every axis, attributes and combinations apart."""
    result: dict[str, dict] = {"attributes": {}, "joint": {}}
    for axis in axes:
        result["attributes" if len(axis.members) == 1 else "joint"][axis.name] = measure(axis)
    return result


def _paired(
    people: pd.DataFrame,
    axes: list[Axis],
    tallies: dict,
    seen: np.ndarray,
    prompts: pd.DataFrame,
    spec: MetricSpec,
    first: str,
) -> dict:
    """ "after" minus the model `first`: same prompts (`seen`), same noise."""
    order, pair = ["prompt_index", "image_index"], (first, "after")
    before, after = (people[people.model == model].sort_values(order) for model in pair)
    before, after = _in_both(before, after, order)
    place = before.prompt_index.map({prompt: row for row, prompt in enumerate(prompts.prompt_index)}).to_numpy()

    def change_in(axis: Axis, rows_P: np.ndarray) -> dict:
        kinds = [labels(rows, spec.attributes, axis.members) for rows in (before, after)]
        faces = (kinds[0] >= 0) & (kinds[1] >= 0)
        both = np.zeros((len(prompts), len(axis.classes), len(axis.classes)))
        np.add.at(both, (place[faces], kinds[0][faces], kinds[1][faces]), 1)
        rows_P = rows_P & seen
        return change([tallies[m][axis.name][rows_P] for m in pair], both[rows_P], axis.rows(rows_P), spec)

    def change_of(axis: Axis) -> dict:
        kinds = [labels(rows, spec.attributes, axis.members) for rows in (before, after)]
        faces = (kinds[0] >= 0) & (kinds[1] >= 0)
        changed = (kinds[0] != kinds[1])[faces].mean() if faces.any() else math.nan
        entry = change_in(axis, np.ones(len(prompts), bool)) | {"class_changed": changed}
        if len(axis.members) == 1 and not requested(axis, spec):
            stayed = {
                key: iv.drift_verdict(entry["bias"][ends], spec.drift)
                for key, ends in (("stayed_within", "ci95"), ("stayed_within_these", "ci95_these"))
            }
            entry["drift"] = entry["bias"] | {"margin": spec.drift} | stayed
        return entry

    result: dict = {"pairs": len(before)} | _grouped(axes, change_of)
    result["families"] = {
        family: _grouped(axes, lambda axis, rows_P=rows_P: change_in(axis, rows_P))
        for family, rows_P in _families(prompts.family).items()
    }
    lost, gained = before.found.to_numpy() & ~after.found.to_numpy(), after.found.to_numpy() & ~before.found.to_numpy()
    result["no_face"] = {
        "difference": (lost.sum() - gained.sum()) / len(before),
        "ci95": iv.paired_rate_interval(int(gained.sum()), int(lost.sum()), len(before)),
    }
    steps = {
        "clip_t": after.clip_t.to_numpy() - before.clip_t,
        "between_seeds": before.between - after.between.to_numpy(),
    }
    for name, step in steps.items():
        result[name] = difference_over_prompts(_prompt_means(step, before))
    return result


def _in_both(before: pd.DataFrame, after: pd.DataFrame, key: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of each whose key the other has too: of given images some may have no partner."""
    keys = [pd.MultiIndex.from_frame(rows[key]) for rows in (before, after)]
    return before[keys[0].isin(keys[1])], after[keys[1].isin(keys[0])]


def _prompt_means(values: pd.Series, rows: pd.DataFrame) -> np.ndarray:
    """Mean of each prompt [P]; a prompt without any value takes no part."""
    return values.groupby(rows.prompt_index).mean().dropna().to_numpy()


def _without_people(rows: pd.DataFrame) -> dict:
    """Prompts without people: the drift of their images, also relative to the distance between two seeds."""
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
    """Bias and distance to the target of each attribute at every guidance scale, that of `models` among them."""
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
    """Prompts that name a class: the share of their faces that show it, by attribute and model.

    kept: mean over subjects, each the mean over classes; subjects are resampled.
    """
    attribute, cls = rows.names.str.partition(".")[0], rows.names.str.partition(".")[2]
    entries: dict[str, dict] = {}
    models = [model for model in MODELS if (rows.model == model).any()]
    for name in attribute.unique():
        faces = rows[(attribute == name) & rows.found]
        wanted = cls[faces.index].map({c: k for k, c in enumerate(spec.attributes[name])})
        kept = pd.Series(labels(faces, spec.attributes, (name,)) == wanted, dtype=float)
        by = kept.groupby([faces.model, faces.subject, cls[faces.index]]).mean()
        subjects = by.groupby(level=[0, 1]).mean().unstack(0).reindex(columns=models)  # a row a subject
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


def _plain(value):
    """Plain JSON values: arrays and tuples become lists, numpy scalars Python ones, what is not finite None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
