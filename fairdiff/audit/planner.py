"""How many images of how many prompts let a generator that is on target be found on target."""

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

MOST = 100_000  # images a prompt; where they are not enough none are
SUITES = 1000  # simulated suites of a generator on target, and resamples of each


def images_needed(prompts: int, target_K, delta: float, judge: Judge | None = None, wanted: float = 0.8) -> int | None:
    """Fewest images of each of so many prompts, each with a face, that give the verdict "within" with this power, to 2 %.

    From `ENOUGH` prompts the verdict on prompts like these, which an audit then shows; with fewer that on these prompts.
    None where no number of images gives it: the errors of the judge were counted on too few faces.
    """
    target = tuple(map(float, target_K))
    return _needed(prompts, target, delta, wanted) if judge is None else _search(prompts, target, delta, judge, wanted)


@lru_cache(maxsize=64)
def _needed(prompts: int, target_K: tuple[float, ...], delta: float, wanted: float) -> int | None:
    return _search(prompts, target_K, delta, None, wanted)


def _search(prompts: int, target_K, delta: float, judge: Judge | None, wanted: float) -> int | None:
    these = _fewest(lambda n: power_these(prompts, n, target_K, delta, judge) >= wanted, 2)
    if prompts < ENOUGH or these is None:
        return these
    labels = label_error(prompts, target_K, judge)
    return _fewest(lambda n: _power(prompts, n, target_K, (delta, judge, labels)) >= wanted, these // 2)


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
    """P("within") of a generator exactly on target, by the verdict that so many prompts show."""
    if prompts < ENOUGH:
        return power_these(prompts, images, target_K, delta, judge)
    return _power(prompts, images, target_K, (delta, judge, label_error(prompts, target_K, judge)))


def power_these(prompts: int, images: int, target_K, delta: float, judge: Judge | None = None) -> float:
    """The same on these prompts: that X is below its quantile .025 at the margin."""
    target, n = np.tile(np.asarray(target_K, float), (prompts, 1)), np.full(prompts, images)
    return 1 - upper_tail(_limit(target, n, delta, judge), *mean_moments(target, target, n, judge))


def _limit(target_PK, n_P, delta: float, judge: Judge | None) -> float:
    return quantile(0.025, *mean_moments(extreme_shares(target_PK, delta**2), target_PK, n_P, judge))


def label_error(prompts: int, target_K, judge: Judge | None) -> Confidence | None:
    """What the labelled faces alone leave open of D^2 where the shares are on target, None without a judge."""
    if judge is None:
        return None
    target = np.tile(np.asarray(target_K, float), (prompts, 1))
    return confidence(1000 * target, target, judge, images=False)


def _power(prompts: int, images: int, target_K, rule: tuple[float, Judge | None, Confidence | None]) -> float:
    """On prompts like these too: the bootstrap-t of the verdict over `SUITES` simulated suites. With a judge each suite has a
    confusion matrix of its own, of those that the labelled faces leave open."""
    delta, judge, labels = rule
    target, rng = np.asarray(target_K, float), np.random.default_rng(0)
    judged = target if judge is None else (target @ judge.draws[rng.integers(len(judge.draws), size=SUITES)])[:, None]
    counts = rng.multinomial(images, judged / judged.sum(-1, keepdims=True), size=(SUITES, prompts))
    x = unbiased_squared_distance(counts, gram(target, judge))
    mean, n = x.mean(1), np.full(prompts, images)
    above = _upper_ends(x, rng) - mean
    if labels is not None:
        grid = np.quantile(mean, np.linspace(0, 1, 9))
        ends = [replace(labels, x=float(at)).end(0.975) for at in grid]
        above = np.hypot(np.maximum(above, 0), np.maximum(np.interp(mean, grid, ends) - mean, 0))
    these = mean <= _limit(np.tile(target, (prompts, 1)), n, delta, judge)
    return float((these & (mean + above < delta**2)).mean())


def _upper_ends(values_SP, rng: np.random.Generator) -> np.ndarray:
    """Upper ends [S] of `suite.bootstrap_t` of many suites at once, from the same resamples."""
    prompts = values_SP.shape[1]
    weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=SUITES).T / prompts
    mean, sd = values_SP.mean(1, keepdims=True), values_SP.std(1, keepdims=True)
    means = values_SP @ weights
    spreads = np.sqrt(np.maximum(values_SP**2 @ weights - means**2, 1e-4 * sd**2 + 1e-300))
    return (mean - np.quantile((means - mean) / spreads, 0.025, axis=1, keepdims=True) * sd)[:, 0]
