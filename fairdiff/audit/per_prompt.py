"""Numbers of each prompt, with intervals for its own shares, estimated from its own images only.

The intervals of `shares` and `bias` hold for one prompt chosen in advance, those of `distance` for all prompts at once.
"""

import math

import numpy as np
import pandas as pd

from fairdiff.audit import intervals as iv
from fairdiff.audit.attribute import judge_for
from fairdiff.audit.axis import Axis, MetricSpec
from fairdiff.audit.certain import certain_prompts
from fairdiff.audit.correction import corrected_bias_intervals
from fairdiff.audit.judge import Judge
from fairdiff.bias import bias

NULLS = 500  # draws of the confusion matrix over which the null distribution of a prompt's test is averaged


def target_p_values(counts, target_PK, judge: Judge | None, seed: int) -> list[float]:
    """Return the p-value of each prompt's target. If the judge's errors were counted, the null is target @ C; without counts,
    or if the correction was refused, it is the target itself."""
    draws = iv.draws_for(len(counts))
    if judge is None or judge.refusal:
        return [iv.target_p_value(c, t, draws, seed) for c, t in zip(counts, target_PK, strict=True)]
    return [iv.judged_p_value(c, t @ judge.draws[:NULLS], draws, seed) for c, t in zip(counts, target_PK, strict=True)]


def prompt_metrics(counts, images, axis: Axis, prompts: pd.DataFrame, spec: MetricSpec) -> tuple[list[dict], dict]:
    """Return one entry per prompt from counts_PK and images [P], and the summary of `certain_prompts`."""
    judge = judge_for(axis, spec)
    p_values = target_p_values(counts, axis.target_PK, judge, spec.seed)
    holm = iv.holm(p_values)
    distances, certain = certain_prompts(counts, images - counts.sum(1), axis.target_PK, spec.delta, judge)
    corrected = None if judge is None or judge.refusal else corrected_bias_intervals(counts, judge, seed=spec.seed)
    regions = np.stack([iv.share_region(c) for c in counts])
    ends, bounds = iv.bias_ends(regions), np.stack(iv.missing_face_bounds(counts, images - counts.sum(1)), -1)
    items = []
    for row, prompt in enumerate(prompts[["prompt_index", "prompt", "subject", "family"]].to_dict("records")):
        faces = int(counts[row].sum())
        shares = counts[row] / faces if faces else np.full(len(counts[row]), math.nan)
        item = {
            **prompt,
            "images": int(images[row]),
            "faces": faces,
            "counts": dict(zip(axis.classes, counts[row], strict=True)),
            "shares": {name: {"share": shares[k], "ci95": regions[row, k]} for k, name in enumerate(axis.classes)},
            "bias": {
                "value": bias(shares),
                "ci95": ends[row],
                "floor": iv.noise_floor(len(axis.classes), faces),
                "missing_face_bounds": bounds[row],
            },
            "target": {
                "shares": dict(zip(axis.classes, axis.target_PK[row], strict=True)),
                "total_variation": iv.total_variation(shares, axis.target_PK[row]),
                "floor": iv.total_variation_floor(axis.target_PK[row], faces),
                "distance": distances[row],
                "p": p_values[row],
                "p_holm": holm[row],
            },
        }
        if corrected is not None and faces:
            item["bias"]["corrected_ci95"] = corrected[row]
        items.append(item)
    return items, certain
