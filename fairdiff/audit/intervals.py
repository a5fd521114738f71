"""Inference on a generator's shares from n images per prompt: noise floors, confidence regions, tests, sample sizes.

These are pure functions of counts. Shapes: P prompts, K classes of one attribute, counts_PK the faces of each class, n
their number, p the generator's true shares, t the target shares. bias(p) = 2/(K(K-1)) sum_{i<j} |p_i - p_j| (Shen et al.,
ICLR 2024, section 5), in [0, 2/K]. Intervals of a prompt are for its own p with the noise of its n images: Wilson or
Goodman regions, no bootstrap. Intervals over prompts are in `suite`, the distance to the target in `distance`.
"""

import math
from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
from scipy.special import xlogy
from scipy.stats import binom, binomtest, norm
from statsmodels.stats.proportion import multinomial_proportions_confint, proportion_confint

from fairdiff.bias import bias

Interval = tuple[float, float]


def mean_deviation(n, p) -> np.ndarray:
    """Return E|X - np| of X ~ Binomial(n, p), exactly: 2 v (1-p) P(X = v), v = floor(np) + 1 (de Moivre 1730)."""
    v = np.floor(np.asarray(n) * p) + 1
    return 2 * v * (1 - p) * binom.pmf(v, n, p)


@cache
def noise_floor(K: int, n: int) -> float:
    """Return the noise floor: the exact E[bias] of n images of a perfectly fair generator, about sqrt(2/(Kn)) sqrt(2/pi).

    Estimand: the expected plug-in bias at p = 1/K. Given m = n_i + n_j ~ Binomial(n, 2/K), n_i ~ Binomial(m, 1/2), so
    E|n_i - n_j| = sum_m P(m) 2 E|Bin(m, 1/2) - m/2|, the same for every pair. NaN for n = 0.
    """
    if n == 0:
        return math.nan
    m = np.arange(n + 1)
    return float((binom.pmf(m, n, 2 / K) * 2 * mean_deviation(m, 0.5)).sum() / n)


def total_variation(shares, target) -> np.ndarray:
    """Return half the sum of absolute differences to the target shares, over the last axis; in [0, 1], 0 on target."""
    return np.abs(np.asarray(shares, float) - target).sum(-1) / 2


def total_variation_floor(target, n: int) -> float:
    """Return the exact E[total variation to the target] of n images of a generator exactly on target, NaN for n = 0."""
    return _total_variation_floor(tuple(map(float, target)), int(n)) if n else math.nan


@lru_cache(maxsize=10_000)
def _total_variation_floor(target: tuple[float, ...], n: int) -> float:
    return float(mean_deviation(n, np.array(target)).sum() / (2 * n))


def share_region(counts, level: float = 0.95) -> np.ndarray:
    """Return a box [K, 2] that holds all true shares p of one prompt at once; its sides are [0, 1] if there is no face.

    K = 2: Wilson's (1927) score interval of p_1 and its complement. K > 2: Goodman's (1965) simultaneous intervals.
    """
    counts = np.asarray(counts)
    n = int(counts.sum())
    if n == 0:
        return np.tile([0.0, 1.0], (len(counts), 1))
    if len(counts) == 2:
        low, high = proportion_confint(counts[0], n, 1 - level, "wilson")
        return np.array([[low, high], [1 - high, 1 - low]])
    return multinomial_proportions_confint(counts, 1 - level, "goodman")


def bias_range(low, high) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the greatest bias [...] over the box [low, high] [..., K] within the simplex.

    The intersection must not be empty. Bias is symmetric and Schur-convex, so sorting the lower and the upper ends only
    widens the box (order statistics). It leaves the box unchanged if classes with more faces have both ends higher, so the
    range is exact for Wilson and Goodman. Least: the water-filling point p_k = clip(c, low_k, high_k) is majorised by every
    other (Marshall, Olkin & Arnold 2011, ch. 5). Greatest: on the ordered box, bias is linear with increasing weights, so
    the mass that is left fills the greatest class first.
    """
    low, high = np.sort(np.clip(low, 0, 1), -1), np.sort(np.clip(high, 0, 1), -1)
    left, right = np.zeros(low.shape[:-1]), np.ones(low.shape[:-1])
    for _ in range(60):
        level = (left + right) / 2
        short = np.clip(level[..., None], low, high).sum(-1) < 1
        left, right = np.where(short, level, left), np.where(short, right, level)
    even, skewed, spare = np.clip(right[..., None], low, high), low.copy(), 1 - low.sum(-1)
    for k in range(low.shape[-1] - 1, -1, -1):
        step = np.minimum(spare, high[..., k] - low[..., k])
        skewed[..., k] += step
        spare = spare - step
    return bias(even), bias(skewed)


def bias_interval(counts, level: float = 0.95) -> Interval:
    """Return the interval of one prompt's true bias(p), the range of bias over `share_region`; [0, 2/K] without a face.

    For K = 2 it is Wilson's interval mapped to |2p - 1|. A percentile bootstrap would have coverage 0 at the fair point.
    """
    least, most = bias_ends(share_region(counts, level))
    return float(least), float(most)


def bias_ends(box) -> np.ndarray:
    """Return the range of bias [..., 2] over each of many boxes [..., K, 2]."""
    box = np.asarray(box, float)
    return np.stack(bias_range(box[..., 0], box[..., 1]), -1)


def missing_face_bounds(counts, missing) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the greatest bias [...] that is possible if the `missing` [...] images without a face had one.

    counts [..., K]. These are bounds without sampling noise. Without any image they are the whole range [0, 2/K].
    """
    counts, missing = np.asarray(counts, float), np.asarray(missing, float)[..., None]
    total = counts.sum(-1, keepdims=True) + missing
    return bias_range(
        counts / np.maximum(total, 1), np.where(total > 0, (counts + missing) / np.maximum(total, 1), 1.0)
    )


def worst_tenth(values_P) -> np.ndarray:
    """Return the mean [...] of the largest tenth of the values over the last axis [..., P], rounded up to whole prompts."""
    values_P = np.asarray(values_P, float)
    return np.sort(values_P, -1)[..., -math.ceil(values_P.shape[-1] / 10) :].mean(-1)


def worst_tenth_floor(statistic: Callable, n_P, target_PK, draws: int = 400, seed: int = 0) -> float:
    """Return E[`worst_tenth` of a statistic of shares [..., K] and target] for a generator exactly on target at n_P faces.

    It is larger than the noise floor of the mean, because some prompts are off by chance. Monte Carlo; NaN without prompts.
    """
    if not len(n_P):
        return math.nan
    rng = np.random.default_rng(seed)
    drawn = [rng.multinomial(int(n), t, size=draws) / n for n, t in zip(n_P, target_PK, strict=True)]
    return float(
        worst_tenth(np.stack([statistic(shares, t) for shares, t in zip(drawn, target_PK, strict=True)], -1)).mean()
    )


def drift_verdict(each: list[Interval], at_once: list[Interval], margin: float) -> str:
    """Return whether all changes stayed within (-margin, margin): "yes" if every interval of `each` lies inside, "no" if an
    interval of `at_once` lies outside, else "cannot tell".

    each: separate 95 % intervals; they suffice for "yes", because a wrong "yes" needs a wrong interval of the one change
    that did not stay (intersection-union test, Berger 1982). at_once: intervals that hold simultaneously.
    """
    if all(-margin < low and high < margin for low, high in each):
        return "yes"
    return "no" if any(low > margin or high < -margin for low, high in at_once) else "cannot tell"


def rate_interval(count: int, n: int) -> Interval:
    """Return the Wilson interval of a rate over all images; estimand: these prompts, new noise. NaN for n = 0.

    Pooling the prompts overstates the variance a little, so the interval is not too narrow. A count of 0 gives an upper
    end above 0.
    """
    if n == 0:
        return math.nan, math.nan
    low, high = proportion_confint(count, n, 0.05, "wilson")
    return float(low), float(high)


def paired_rate_interval(only_before: int, only_after: int, n: int) -> Interval:
    """Return the interval of a rate's change, after minus before, over n pairs with the same noise (Bonett & Price 2012).

    It is an adjusted Wald interval: one pair is added to each discordant cell. NaN for n = 0.
    """
    if n == 0:
        return math.nan, math.nan
    lost, gained = (only_before + 1) / (n + 2), (only_after + 1) / (n + 2)
    half = norm.ppf(0.975) * math.sqrt((lost + gained - (gained - lost) ** 2) / (n + 2))
    return max(-1.0, gained - lost - half), min(1.0, gained - lost + half)


def _g_statistic(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    expected = counts.sum(-1, keepdims=True) * target
    return 2 * (xlogy(counts, counts) - xlogy(counts, np.where(counts > 0, expected, 1))).sum(-1)


@lru_cache(maxsize=64)
def _g_under_target(n: int, target: tuple[float, ...], draws: int, seed: int) -> np.ndarray:
    counts = np.random.default_rng(seed).multinomial(n, target, size=draws)
    return np.sort(_g_statistic(counts.astype(float), np.asarray(target)))


def judged_p_value(counts, null_BK, draws: int = 20_000, seed: int = 0) -> float:
    """Return the p-value of "this prompt's true shares are the target" for a judge with errors, whose C is uncertain.

    null_BK: target @ C_b, the judged shares on target for draws C_b given the labelled faces. The null distribution is the
    mixture over these draws (prior predictive: Box 1980). K = 2: exact, the probability of all counts that are no more likely
    than the observed ones. K > 2: Monte Carlo G test as in `target_p_value`. The p-value is 1 without a face.
    """
    counts, null = np.asarray(counts), np.asarray(null_BK, float)
    n = int(counts.sum())
    if n == 0:
        return 1.0
    if len(counts) == 2:
        likely = _predictive(n, null[:, 0].tobytes())
        return float(likely[likely <= likely[counts[0]] * (1 + 1e-7)].sum())
    expected = null.mean(0)
    drawn = _g_judged(n, null.tobytes(), len(counts), draws, seed)
    at_least = draws - np.searchsorted(drawn, _g_statistic(counts.astype(float), expected) - 1e-9)
    return float((1 + at_least) / (1 + draws))


@lru_cache(maxsize=256)
def _predictive(n: int, shares: bytes) -> np.ndarray:
    """Return the probabilities [n + 1] of 0 to n faces of the first class, averaged over its judged shares [B]."""
    return binom.pmf(np.arange(n + 1)[:, None], n, np.frombuffer(shares)).mean(1)


@lru_cache(maxsize=64)
def _g_judged(n: int, null: bytes, K: int, draws: int, seed: int) -> np.ndarray:
    rng, shares = np.random.default_rng(seed), np.frombuffer(null).reshape(-1, K)
    counts = rng.multinomial(n, shares[rng.integers(len(shares), size=draws)])
    return np.sort(_g_statistic(counts.astype(float), shares.mean(0)))


def target_p_value(counts, target, draws: int = 20_000, seed: int = 0) -> float:
    """Return the p-value of "this prompt's shares are the target": exact binomial for K = 2, Monte Carlo G test for K > 2.

    The Monte Carlo p-value is (1 + #{G* >= G}) / (1 + draws) (Davison & Hinkley 1997, 4.2.3). It is at least 1 / (1 + draws),
    so `draws_for` gives the number of draws. 1 without a face, 0 if a class of target share 0 has a face.
    """
    counts, target = np.asarray(counts), np.asarray(target, float)
    n = int(counts.sum())
    if n == 0:
        return 1.0
    if (counts[target == 0] > 0).any():
        return 0.0
    if len(counts) == 2:
        return _binomial_p_value(int(counts[0]), n, float(target[0]))
    null = _g_under_target(n, tuple(target / target.sum()), draws, seed)
    at_least = draws - np.searchsorted(null, _g_statistic(counts.astype(float), target) - 1e-9)
    return float((1 + at_least) / (1 + draws))


@lru_cache(maxsize=10_000)
def _binomial_p_value(count: int, n: int, share: float) -> float:
    return float(binomtest(count, n, share).pvalue)


def draws_for(prompts: int) -> int:
    """Return a number of draws whose least possible p-value is at most a fifth of Holm's first threshold, .05 / prompts."""
    return max(20_000, 100 * prompts)


def holm(p_values) -> np.ndarray:
    """Return Holm's (1979) step-down adjusted p-values: the maximum of (m - rank) p over all p not larger, at most 1.

    The rank counts from 0. The function of statsmodels is not used, because it runs the garbage collector at every call,
    which takes 40 ms to 1 s in a process with torch.
    """
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values)
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def images_for_half_width(h: float, K: int = 2, level: float = 0.95) -> int:
    """Return the images per prompt for an interval of half-width h of a near-zero gap between two shares: 2/K (z/h)^2."""
    return math.ceil(2 / K * (norm.ppf((1 + level) / 2) / h) ** 2)
