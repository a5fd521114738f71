"""Numbers of one attribute, or of several combined, over all prompts: estimates with intervals, verdict and change.

Shapes: P prompts, K classes, counts_PK the faces of each class. Means over prompts give every prompt the same weight.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fairdiff.audit import intervals as iv
from fairdiff.audit import suite
from fairdiff.audit.axis import Axis, MetricSpec, requested
from fairdiff.audit.correction import corrected_mean, corrected_share, misjudged
from fairdiff.audit.distance import gram, moments, shrunken_shares, squared_distance, unbiased_squared_distance
from fairdiff.audit.judge import Judge, judge_of
from fairdiff.audit.suite import NOTHING
from fairdiff.audit.verdict import decide, distance_interval, undefined
from fairdiff.bias import bias

FOUR_FIFTHS = 0.8  # a class below this multiple of its target share is flagged (29 CFR 1607.4 D)


def plug_in_bias(shares, target) -> np.ndarray:
    """Return the bias of the shares; it has the signature of `total_variation` and ignores the target."""
    return bias(shares)


def average(values) -> float:
    """Return the mean, NaN for an empty sequence."""
    return float(np.mean(values)) if len(values) else math.nan


def judge_for(axis: Axis, spec: MetricSpec) -> Judge | None:
    """Return the audit judge with its counted errors for this attribute, None if they were never counted."""
    return judge_of(spec.confusion[axis.name], spec.seed) if axis.name in spec.confusion else None


def suite_metrics(counts, missing, seen, axis: Axis, spec: MetricSpec) -> dict:
    """Return the numbers of one axis over the prompts `seen` [P]; missing-face bounds and verdict use all prompts."""
    K, target = counts.shape[1], axis.target_PK
    faces, aim, judge = counts[seen], target[seen], judge_for(axis, spec)
    n = faces.sum(1)
    shares = faces / n[:, None]
    floors = [iv.noise_floor(K, int(m)) for m in n]
    tv_floors = [iv.total_variation_floor(t, int(m)) for t, m in zip(aim, n, strict=True)]
    biases, distances = bias(shares), iv.total_variation(shares, aim)
    uniform = np.full(aim.shape, 1 / K)
    result = {
        "bias": plug_in_mean(plug_in_bias, faces, uniform, (0, 2 / K), spec)
        | {
            "sd_over_prompts": biases.std(ddof=1) if len(biases) > 1 else math.nan,
            "floor": average(floors),
            "worst_tenth": _worst(biases, plug_in_bias, n, uniform, spec),
            "maximum": 2 / K,
            "missing_face_bounds": tuple(np.mean(ends) for ends in iv.missing_face_bounds(counts, missing)),
            "prompts": int(seen.sum()),
        },
        "shares": _shares(faces, aim, axis, spec),
        "target": {
            "shares": dict(zip(axis.classes, target.mean(0), strict=True)),
            "requested": requested(axis, spec),
            "uniform": bool(np.allclose(target, 1 / K)),
            "total_variation": plug_in_mean(iv.total_variation, faces, aim, (0, 1), spec)
            | {
                "floor": average(tv_floors),
                "worst_tenth": _worst(distances, iv.total_variation, n, aim, spec),
                "maximum": average(1 - aim.min(1)),
            },
            "distance": distance_interval(faces, aim, None, spec.seed),
            "delta": spec.delta,
            "corrected": judge is not None,
        }
        | decide(counts, missing, target, spec.delta, judge, spec.seed),
    }
    if judge is not None and seen.any():
        result["corrected"] = _corrected(faces, aim, axis, judge, spec)
    return result


def plug_in_mean(statistic: Callable, faces, aim, limits, spec: MetricSpec) -> dict:
    """Return the mean over prompts of a plug-in statistic, with both intervals."""
    n = faces.sum(1)
    if not len(faces):
        return suite.mean_over_prompts([], [], limits, spec.seed)
    assumed = shrunken_shares(faces, np.maximum(aim, 1e-9))
    variance = suite.image_variance(statistic, assumed, aim, n, spec.seed)
    return suite.mean_over_prompts(statistic(faces / n[:, None], aim), variance, limits, spec.seed)


def _worst(values, statistic: Callable, faces, target, spec: MetricSpec) -> dict:
    """Return the mean over the worst tenth of the prompts, its noise floor, and the number of these prompts.

    It has no interval, because the same images choose and measure these prompts.
    """
    return {
        "mean": float(iv.worst_tenth(values)) if len(values) else math.nan,
        "floor": iv.worst_tenth_floor(statistic, faces, target, seed=spec.seed),
        "prompts": math.ceil(len(values) / 10),
    }


def _shares(faces, aim, axis: Axis, spec: MetricSpec) -> dict:
    """Return the mean share over prompts of each class and its ratio to the mean target share, with both intervals."""
    if not len(faces):
        nothing = {"share": math.nan, "ci95": NOTHING, "ci95_these": NOTHING}
        return {name: _with_ratio(nothing, nothing, 0.0) for name in axis.classes}
    assumed, n = shrunken_shares(faces, np.maximum(aim, 1e-9)), faces.sum(1)
    K, targets, found = faces.shape[1], aim.mean(0), {}
    for k, name in enumerate(axis.classes):
        alone, at_once = (
            mean_share(faces[:, k], n, assumed[:, k], spec.seed, error) for error in (0.05, suite.error_of_each(K))
        )
        found[name] = _with_ratio(alone, at_once, float(targets[k]))
    return found


def mean_share(faces_P, n_P, assumed_P, seed: int, error: float = 0.05) -> dict:
    """Return the mean share over prompts of a class with faces_P of n_P faces, and both intervals of level 1 - error.

    assumed_P: the class's shrunken shares, from which the variance is computed.
    """
    shares = faces_P / n_P
    variance, mean = float((assumed_P * (1 - assumed_P) / n_P).sum()) / len(n_P) ** 2, float(shares.mean())
    these = suite.share_interval(mean, variance, float(assumed_P.mean()), 1 - error)
    return {"share": mean} | suite.cut(suite.ends(mean, shares, these, seed, level=1 - error), (0.0, 1.0))


def _with_ratio(entry: dict, at_once: dict, target: float) -> dict:
    """Return `entry` with the ratio of the share to the target share, flagged below four fifths; NaN for a target of 0.

    at_once: the same share with intervals that hold for all classes at once. They give the ratio's `ci95_all`.
    """

    def over(value: float) -> float:
        return value / target if target > 0 else math.nan

    every = {key: entry[key] for key in ("ci95", "ci95_these")} | suite.of_all(at_once)
    ratio = {"value": over(entry["share"])} | {key: tuple(map(over, pair)) for key, pair in every.items()}
    return entry | {"ratio": ratio | {"flagged": bool(ratio["value"] < FOUR_FIFTHS)}}


def _corrected(faces, aim, axis: Axis, judge: Judge, spec: MetricSpec) -> dict:
    """Return the numbers corrected for the judge's error, or the reason why they cannot be corrected."""
    if judge.refusal is not None:
        return {"refused": judge.refusal, "confusion": spec.confusion[axis.name]}
    K = faces.shape[1]
    shares = {}
    for k, name in enumerate(axis.classes):
        alone, at_once = (
            corrected_share(k, faces, aim, judge, spec.seed, error) for error in (0.05, suite.error_of_each(K))
        )
        shares[name] = _with_ratio(alone, at_once, float(aim[:, k].mean()))
    return {
        "refused": None,
        "bias": corrected_mean(plug_in_bias, faces, np.full(aim.shape, 1 / K), judge, (0, 2 / K), spec.seed),
        "total_variation": corrected_mean(iv.total_variation, faces, aim, judge, (0, 1), spec.seed),
        "shares": shares,
        "distance": distance_interval(faces, aim, judge, spec.seed),
        "confusion": spec.confusion[axis.name],
    }


def change(counts: list[np.ndarray], pairs_PKK: np.ndarray, axis: Axis, spec: MetricSpec) -> dict:
    """Return the change of one axis, after minus before.

    counts: counts_PK of both models. pairs_PKK: image pairs by class before and class after. Both cover the same prompts,
    those in which both models show two faces or more.
    """
    target, K = axis.target_PK, counts[0].shape[1]
    uniform = np.full(target.shape, 1 / K)  # bias is the distance to parity, whatever the target
    result = {
        "bias": _difference(BIAS, counts, pairs_PKK, uniform, 2 / K, spec.seed),
        "total_variation": _difference(TOTAL_VARIATION, counts, pairs_PKK, target, 1.0, spec.seed),
        "squared_distance": squared_change(counts, pairs_PKK, target, None, spec.seed),
    }
    judge = judge_for(axis, spec)
    if judge is not None and judge.refusal is None:
        result["corrected"] = {"squared_distance": squared_change(counts, pairs_PKK, target, judge, spec.seed)}
    return result


def share_changes(counts: list[np.ndarray], pairs_PKK: np.ndarray, axis: Axis, seed: int) -> dict:
    """Return the change of each class's mean uncorrected share, with its own intervals and with simultaneous ones.

    Variance of a prompt's change: p0 (1 - p0) / n0 + p1 (1 - p1) / n1 - 2 sum over pairs (x - f0)(y - f1) / (n0 n1). x is 1
    if the image before shows the class, and y if the image after does. Simultaneous intervals hold for all classes at once.
    """
    K = len(axis.classes)
    if not len(counts[0]):
        nothing = {"ci95": NOTHING, "ci95_these": NOTHING}
        return {name: {"difference": math.nan} | nothing | suite.of_all(nothing) for name in axis.classes}
    n = [c.sum(1, keepdims=True) for c in counts]
    f = [c / m for c, m in zip(counts, n, strict=True)]
    assumed = [shrunken_shares(c, np.maximum(axis.target_PK, 1e-9)) for c in counts]
    apart = sum(p * (1 - p) / m for p, m in zip(assumed, n, strict=True))
    alike = np.diagonal(pairs_PKK, axis1=1, axis2=2) - f[1] * pairs_PKK.sum(2) - f[0] * pairs_PKK.sum(1)
    shared = (alike + f[0] * f[1] * pairs_PKK.sum((1, 2))[:, None]) / (n[0] * n[1])
    variance = np.maximum(apart - 2 * shared, apart / np.minimum(*n)).sum(0) / len(f[0]) ** 2
    result = {}
    for k, name in enumerate(axis.classes):
        values = f[1][:, k] - f[0][:, k]
        mean, found = float(values.mean()), []
        for error in (0.05, suite.error_of_each(K)):
            these = suite.normal_interval(mean, float(variance[k]), 1 - error)
            found.append(suite.cut(suite.ends(mean, values, these, seed, level=1 - error), (-1.0, 1.0)))
        result[name] = {"difference": mean} | found[0] | suite.of_all(found[1])
    return result


def drift_of(moved: dict, shares: dict, margin: float) -> dict:
    """Return the changes of an untargeted attribute and whether all of them stayed within the margin.

    moved: the change of bias. shares: the changes of the mean shares, because bias alone misses a skew that changes sides.
    """
    stayed = {}
    for key, ends in (("stayed_within", "ci95"), ("stayed_within_these", "ci95_these")):
        each = [moved[ends], *(found[ends] for found in shares.values())]
        at_once = [moved[ends], *(found[ends.replace("ci95", "ci95_all")] for found in shares.values())]
        stayed[key] = iv.drift_verdict(each, at_once, margin)
    return moved | {"shares": shares, "margin": margin} | stayed


def bias_slope(shares, target) -> np.ndarray:
    """Return the derivative of bias with respect to each share [..., K]."""
    K = shares.shape[-1]
    return np.sign(shares[..., :, None] - shares[..., None, :]).sum(-1) * 2 / (K * (K - 1))


def total_variation_slope(shares, target) -> np.ndarray:
    return np.sign(shares - target) / 2


@dataclass(frozen=True)
class Statistic:
    """A function of shares and targets [..., K], and its derivative with respect to each share."""

    value: Callable
    slope: Callable


BIAS = Statistic(plug_in_bias, bias_slope)
TOTAL_VARIATION = Statistic(iv.total_variation, total_variation_slope)


def _difference(statistic: Statistic, counts, pairs_PKK, target, limit: float, seed: int) -> dict:
    """Return the mean change of a plug-in statistic at equal numbers of faces (`thinned`), because more faces lower it.

    The variance due to the images is that of the paired slopes (delta method). For a thinned statistic it is never too
    small (Hoeffding 1948, 5.13).
    """
    if not len(target):
        return {"difference": math.nan, "ci95": NOTHING, "ci95_these": NOTHING}
    n = [c.sum(1) for c in counts]
    shares = [c / m[:, None] for c, m in zip(counts, n, strict=True)]
    fewest = np.minimum(*n)
    before, after = (thinned(statistic.value, c, fewest, target, seed) for c in counts)
    slopes = [statistic.slope(f, target) for f in shares]
    assumed = [shrunken_shares(c, np.maximum(target, 1e-9)) for c in counts]
    own = [((p * s**2).sum(-1) - (p * s).sum(-1) ** 2) / m for p, s, m in zip(assumed, slopes, n, strict=True)]
    centred = [s - (f * s).sum(-1, keepdims=True) for f, s in zip(shares, slopes, strict=True)]
    shared = np.einsum("pj,pjk,pk->p", centred[0], pairs_PKK, centred[1]) / (n[0] * n[1])
    apart = own[0] + own[1]  # without pairing; if all pairs agree, one in n may still differ: the lower bound
    variance = np.maximum(apart - 2 * shared, apart / fewest)
    found = suite.mean_over_prompts(after - before, variance, (-limit, limit), seed)
    return {"difference": found["mean"], "ci95": found["ci95"], "ci95_these": found["ci95_these"]}


def thinned(statistic, counts_PK, faces_P, target, seed: int, draws: int = 500) -> np.ndarray:
    """Return the mean [P] of a plug-in statistic over all subsets of faces_P of each prompt's faces.

    It is an unbiased estimate of the statistic's expectation at faces_P faces. If a prompt has more faces, the mean is
    computed from random subsets (multivariate hypergeometric)."""
    counts = np.asarray(counts_PK).round().astype(int)
    values = np.array(statistic(counts / counts.sum(1)[:, None], target), float)
    rng = np.random.default_rng(seed)
    for row in np.flatnonzero(counts.sum(1) > faces_P):
        faces = int(faces_P[row])
        drawn = rng.multivariate_hypergeometric(counts[row], faces, size=draws)
        values[row] = statistic(drawn / faces, target[row]).mean()
    return values


def squared_change(counts, pairs_PKK, target, judge: Judge | None, seed: int) -> dict:
    """Return the mean change of D^2 over prompts, an unbiased estimate. The judge's error is the same for both models.

    The variance of a prompt uses Hoeffding's decomposition of X (`distance.moments`). The paired linear parts 2/n sum l(x)
    give 4/n0 E[l0^2] + 4/n1 E[l1^2] - 8 l0' pairs l1 / (n0 n1). The remainders of both models are added as if they were
    independent; with the same noise they are never negatively correlated, so the variance is not too small.
    """
    nothing = {"difference": math.nan, "ci95": NOTHING, "ci95_these": NOTHING}
    if not len(target) or undefined(target):
        return nothing
    G, P = gram(target, judge), len(target)
    x = [unbiased_squared_distance(c, G) for c in counts]
    assumed = [shrunken_shares(c, target, judge) for c in counts]
    judged = assumed if judge is None else [p @ judge.rates for p in assumed]
    variance = squared_change_variance(judged, G, [c.sum(1) for c in counts], pairs_PKK)
    values = x[1] - x[0]
    mean, labels = float(values.mean()), []
    if judge is not None:
        moved = [squared_distance(misjudged(p, judge), target).mean(-1) for p in assumed]
        truth = [squared_distance(p, target).mean() for p in assumed]
        half = float(np.quantile(np.abs(moved[1] - moved[0] - truth[1] + truth[0]), 0.95))
        labels = [(mean - half, mean + half)]
    these = suite.combine(mean, suite.normal_interval(mean, float(variance.sum()) / P**2), *labels)
    limit = float(np.mean(1 / target.min(-1) - 1))
    return {"difference": mean} | suite.both(mean, values, these, (-limit, limit), seed, labels)


def squared_change_variance(judged, gram_PKK, n, pairs_PKK) -> np.ndarray:
    """Return the image variance [P] of the change of X, from judged shares [P, K] and face counts [P] of both models."""
    lines = [(gram_PKK @ q[..., None])[..., 0] for q in judged]
    lines = [line - (q * line).sum(-1, keepdims=True) for q, line in zip(judged, lines, strict=True)]
    own = [4 / m * (q * line**2).sum(-1) for q, line, m in zip(judged, lines, n, strict=True)]
    rest = sum(moments(q, gram_PKK, m)[:, 1] - line for q, m, line in zip(judged, n, own, strict=True))
    shared = 4 * np.einsum("pj,pjk,pk->p", lines[0], pairs_PKK, lines[1]) / (n[0] * n[1])
    apart = own[0] + own[1]  # without pairing; if all pairs agree, one in n may still differ: the lower bound
    return np.maximum(apart - 2 * shared, apart / np.minimum(*n)) + rest
