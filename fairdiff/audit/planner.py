"""Sample sizes: the images per prompt with which a generator on target gets the verdict "within" with a given power."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np

from fairdiff.audit.distance import (
    Confidence,
    confidence,
    extreme_shares,
    gram,
    mean_moments,
    quantile,
    unbiased_squared_distance,
    upper_tail,
)
from fairdiff.audit.judge import Judge
from fairdiff.audit.suite import ENOUGH
from fairdiff.audit.verdict import filled

Rule = tuple[float, Judge | None, Confidence | None]  # margin, judge, confidence limits by the judge's error alone
MOST = 100_000  # images per prompt at which the search stops
SUITES = 1000  # simulated audits of a generator on target, and bootstrap resamples of each


def images_needed(
    prompts: int, target_K, delta: float, judge: Judge | None = None, wanted: float = 0.8, missing: float = 0.0
) -> int | None:
    """Return the fewest images per prompt, to 2 %, that give the verdict "within" with power `wanted` at so many prompts.

    From `ENOUGH` prompts on it is the verdict on prompts like these, which an audit then shows; below, on these prompts.
    missing: share of images without a face, which the verdict counts as the worst class. None if no number of images is
    enough: the judge's errors were counted on too few faces, or missing faces alone reach the margin (`reach`).
    """
    return _needed(prompts, tuple(map(float, target_K)), delta, judge, wanted, missing)


@lru_cache(maxsize=64)  # each takes half a second, and the audits of a study need the same ones
def _needed(
    prompts: int, target_K: tuple[float, ...], delta: float, judge: Judge | None, wanted: float, missing: float
) -> int | None:
    rule = (delta, judge, label_error(prompts, target_K, judge))
    images = _fewest(lambda n: power_these(prompts, n, target_K, delta, judge) >= wanted, 2)
    if images is not None and prompts >= ENOUGH:
        images = _fewest(lambda n: _power(prompts, n, target_K, rule) >= wanted, images // 2)
    if images is None or not missing:
        return images
    if missing * reach(target_K) >= delta:
        return None
    return _fewest(lambda n: _power(prompts, n, target_K, rule, missing) >= wanted, images // 2)


def reach(target_K) -> float:
    """Return D of a prompt that shows the rarest class only; a share m of missing faces can make D as large as m times it."""
    return float(np.sqrt(1 / np.min(target_K) - 1))


def _fewest(enough: Callable[[int], bool], low: int) -> int | None:
    high = 2 * low
    while not enough(high):
        low, high = high, 2 * high
        if high > MOST:
            return None
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def power(prompts: int, images: int, target_K, delta: float, judge: Judge | None = None) -> float:
    """Return P("within") of a generator exactly on target, for the verdict that an audit of so many prompts shows."""
    if prompts < ENOUGH:
        return power_these(prompts, images, target_K, delta, judge)
    return _power(prompts, images, target_K, (delta, judge, label_error(prompts, target_K, judge)))


def power_these(prompts: int, images: int, target_K, delta: float, judge: Judge | None = None) -> float:
    """Return P("within") for the verdict on these prompts: that the mean X is below its .025 quantile at the margin."""
    target, n = np.tile(np.asarray(target_K, float), (prompts, 1)), np.full(prompts, images)
    return 1 - upper_tail(_limit(target, n, delta, judge), *mean_moments(target, target, n, judge))


def _limit(target_PK, n_P, delta: float, judge: Judge | None) -> float:
    return quantile(0.025, *mean_moments(extreme_shares(target_PK, delta**2), target_PK, n_P, judge))


def label_error(prompts: int, target_K, judge: Judge | None) -> Confidence | None:
    """Return the confidence limits of D^2 on target by the judge's error alone, None without a judge."""
    if judge is None:
        return None
    target = np.tile(np.asarray(target_K, float), (prompts, 1))
    return confidence(1000 * target, target, judge, images=False)


def _power(prompts: int, images: int, target_K, rule: Rule, missing: float = 0.0) -> float:
    """Return P("within") by simulated audits; from `ENOUGH` prompts on, the bootstrap-t interval must lie within too.

    With a judge, each audit has its own draw of the confusion matrix given the labelled faces. missing: probability of an
    image without a face.
    """
    delta, judge, labels = rule
    target, rng = np.asarray(target_K, float), np.random.default_rng(0)
    suites = SUITES // 4 if missing else SUITES  # the worst case of missing faces takes K times as long
    judged = target if judge is None else (target @ judge.draws[rng.integers(len(judge.draws), size=suites)])[:, None]
    judged = judged / judged.sum(-1, keepdims=True)
    none = rng.binomial(images, missing, (suites, prompts))
    counts = rng.multinomial(images - none, judged)
    if missing:
        flat = counts.reshape(-1, len(target))
        counts = filled(flat, none.ravel(), np.tile(target, (len(flat), 1)), judge, worst=True).reshape(counts.shape)
    x = unbiased_squared_distance(counts, gram(target, judge))
    mean, n = x.mean(1), np.full(prompts, images)
    these = mean <= _limit(np.tile(target, (prompts, 1)), n, delta, judge)
    if prompts < ENOUGH:
        return float(these.mean())
    above = _upper_ends(x, rng) - mean
    if labels is not None:
        grid = np.quantile(mean, np.linspace(0, 1, 9))
        ends = [replace(labels, x=float(at)).end(0.975) for at in grid]
        above = np.hypot(np.maximum(above, 0), np.maximum(np.interp(mean, grid, ends) - mean, 0))
    return float((these & (mean + above < delta**2)).mean())


def _upper_ends(values_SP, rng: np.random.Generator) -> np.ndarray:
    """Return the upper ends [S] of `suite.bootstrap_t` for S simulated audits, all with the same resamples."""
    prompts = values_SP.shape[1]
    weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=SUITES).T / prompts
    mean, sd = values_SP.mean(1, keepdims=True), values_SP.std(1, keepdims=True)
    means = values_SP @ weights
    spreads = np.sqrt(np.maximum(values_SP**2 @ weights - means**2, 1e-4 * sd**2 + 1e-300))
    return (mean - np.quantile((means - mean) / spreads, 0.025, axis=1, keepdims=True) * sd)[:, 0]
