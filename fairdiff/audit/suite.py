"""Intervals of a mean over prompts, for two estimands that are never mixed.

*These prompts*: the mean of the same prompts with new noise. *Prompts like these*: the mean over the population of which the
prompts are a sample. For it prompts are resampled, and its interval contains the one for these prompts. With fewer than
`ENOUGH` prompts it is not computed: if one prompt in ten carries all of the bias, 36 prompts miss it in one sample of forty
(.9^36 = .023), and no interval can then contain it. No sample reliably shows a bias that one prompt in a hundred carries.

Shapes: P prompts, D resamples, values_P one number per prompt, variance_P its variance due to the images alone.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student
from statsmodels.stats.proportion import proportion_confint

Interval = tuple[float, float]
NOTHING: Interval = (math.nan, math.nan)
ENOUGH = 36
DRAWS = 10_000


def resampled_weights(prompts: int, seed: int) -> np.ndarray:
    """Return the weights [D, P] of each prompt in the bootstrap resamples; all numbers with one seed use the same."""
    return _weights(prompts, seed, DRAWS)


@lru_cache(maxsize=8)
def _weights(prompts: int, seed: int, draws: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=draws) / prompts


def bootstrap_t(values_P, level: float = 0.95, seed: int = 0) -> Interval:
    """Return the bootstrap-t interval of a mean over prompts (Efron & Tibshirani 1993, 12.5).

    Its ends are m - s times a quantile of (m* - m) / s*. Percentiles of m* would lie too low for skewed values such as
    squared distances.
    """
    values = np.asarray(values_P, float)
    weights = resampled_weights(len(values), seed)
    mean, sd = values.mean(), values.std()
    means = weights @ values
    spreads = np.sqrt(np.maximum(weights @ values**2 - means**2, 1e-4 * sd**2 + 1e-300))
    low, high = np.quantile((means - mean) / spreads, [(1 - level) / 2, (1 + level) / 2])
    return float(mean - high * sd), float(mean - low * sd)


def combine(point: float, *parts: Interval) -> Interval:
    """Return the interval of a number with independent errors from the interval by each error (MOVER: Zou & Donner 2008)."""
    below = math.hypot(*(max(point - low, 0) for low, _ in parts))
    above = math.hypot(*(max(high - point, 0) for _, high in parts))
    return point - below, point + above


def hull(*intervals: Interval) -> Interval:
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def within_range(interval: Interval, low: float, high: float) -> Interval:
    """Return the interval with both ends clipped to [low, high]."""
    a, b = (float(np.clip(end, low, high)) for end in interval)
    return a, b


def normal_interval(mean: float, variance: float, level: float = 0.95) -> Interval:
    half = norm.ppf((1 + level) / 2) * math.sqrt(variance)
    return mean - half, mean + half


def share_interval(share: float, variance: float, expected: float, level: float = 0.95) -> Interval:
    """Return Wilson's interval of a mean share at its effective number of faces n, by which its variance is
    expected (1 - expected) / n (Korn & Graubard 1998)."""
    n = expected * (1 - expected) / variance
    return tuple(float(end) for end in proportion_confint(share * n, n, 1 - level, "wilson"))


def ends(mean: float, values_P, these: Interval, seed: int, common: Sequence[Interval] = (), level: float = 0.95) -> dict:
    """Return the intervals `ci95` for prompts like these (NaN with too few) and `ci95_these` of a mean over prompts.

    They are not clipped to a range. common: intervals by errors that are the same for every prompt, which `these` already
    includes. level: of both intervals."""
    like = NOTHING
    if len(values_P) >= ENOUGH:
        resampled = bootstrap_t(values_P, level, seed)
        shift = mean - float(np.mean(values_P))  # correcting the mean shares may differ from the mean of corrected shares
        like = hull(combine(mean, (resampled[0] + shift, resampled[1] + shift), *common), these)
    return {"ci95": like, "ci95_these": these}


def cut(found: dict, limits: Interval) -> dict:
    return {key: within_range(pair, *limits) for key, pair in found.items()}


def both(mean: float, values_P, these: Interval, limits: Interval, seed: int, common: Sequence[Interval] = ()) -> dict:
    """Return the 95 % intervals of `ends`, clipped to the range of the quantity."""
    return cut(ends(mean, values_P, these, seed, common), limits)


def of_all(found: dict) -> dict:
    """Return both intervals under the names of those that hold for all classes at once."""
    return {"ci95_all": found["ci95"], "ci95_all_these": found["ci95_these"]}


def error_of_each(K: int) -> float:
    """Return the error of one class's interval with which those of K classes hold at once in 95 % of audits (Bonferroni).

    Two classes need no adjustment, because their intervals mirror each other."""
    return 0.05 if K == 2 else 0.05 / K


def mean_over_prompts(values_P, variance_P, limits: Interval, seed: int) -> dict:
    """Return the mean of a per-prompt number and both intervals; a plug-in number's are for its expectation at n images."""
    values = np.asarray(values_P, float)
    if not len(values):
        return {"mean": math.nan, "ci95": NOTHING, "ci95_these": NOTHING}
    mean = float(values.mean())
    these = normal_interval(mean, float(np.sum(variance_P)) / len(values) ** 2)
    return {"mean": mean} | both(mean, values, these, limits, seed)


def image_variance(statistic: Callable, shares_PK, target_PK, n_P, seed: int) -> np.ndarray:
    """Return the image variance [P] of statistic(shares [..., P, K], target_PK), by simulation at the given shares."""
    n, P = np.asarray(n_P, int), len(shares_PK)
    drawn = np.random.default_rng(seed).multinomial(n, shares_PK, size=(max(20, 2000 // P), P)) / n[:, None]
    return statistic(drawn, target_PK).var(0)


def student_interval(values, limits: Interval = (-math.inf, math.inf)) -> Interval:
    """Return Student's interval of the mean over the population of prompts; NaN for fewer than two values."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return NOTHING
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return within_range((values.mean() - half, values.mean() + half), *limits)


def over_seeds(interval: Interval, by_seed: Sequence[float]) -> Interval:
    """Return an approximate interval over prompts and training seeds, from one over prompts of the mean over S seeds.

    The half-width of each side and t_{S-1, .975} sd / sqrt(S) of the seeds' values are added in quadrature. One seed changes
    nothing."""
    if len(by_seed) < 2:
        return interval
    return combine(float(np.mean(by_seed)), interval, student_interval(by_seed))


def ratio_interval(numerator, denominator) -> Interval:
    """Return Student's interval of a ratio of means over prompts, by its linearisation (d - R b) / mean b."""
    top, bottom = np.asarray(numerator, float), np.asarray(denominator, float)
    ratio = top.mean() / bottom.mean()
    low, high = student_interval((top - ratio * bottom) / bottom.mean())
    return ratio + low, ratio + high
