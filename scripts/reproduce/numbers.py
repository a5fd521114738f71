"""Compute numbers from the records of one run's seeds, and format them for the page."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from fairdiff.audit.suite import over_seeds


def entry(audit: dict, model: str) -> dict:
    """Return the entries of all attributes and combinations of one model."""
    return audit["models"][model]["attributes"] | audit["models"][model]["joint"]


def percentile_interval(draws, size: int, level: float = 0.95) -> tuple[float, float]:
    """Return bootstrap percentiles widened for small samples: alpha/2 -> Phi(sqrt(n/(n-1)) t_{n-1}(alpha/2)).

    Source: Hesterberg 2015. draws: [D]. size: the number n of resampled units (prompts); NaN for n < 2. For n < 6 it is
    Student's interval, mean -+ t_{n-1}(alpha/2) sqrt(n/(n-1)) sd of the draws, because no resample lies beyond the units,
    and [min, max] of n covers a symmetric mean with 1 - 2^(1-n) only. It may exceed the range of the quantity.
    """
    if size < 2:
        return math.nan, math.nan
    quantile = math.sqrt(size / (size - 1)) * student.ppf((1 - level) / 2, size - 1)
    if size < 6:
        centre, half = np.mean(draws), -quantile * np.std(draws)
        return float(centre - half), float(centre + half)
    tail = norm.cdf(quantile)
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def resampled_prompts(prompts: int, draws: int, seed: int) -> np.ndarray:
    """Return bootstrap samples of prompt indices [draws, prompts]; quantities with the same seed stay paired."""
    return np.random.default_rng(seed).integers(prompts, size=(draws, prompts))


def mean_interval(values, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the interval of the population mean of a per-prompt quantity, by resampling prompts only.

    For a plug-in bias the estimand is its expectation *at this n*, including the noise floor. For differences between two
    models with the same prompts and noise this is the paired bootstrap.
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        return math.nan, math.nan
    return percentile_interval(values[resampled_prompts(len(values), draws, seed)].mean(1), len(values))


def ends(found: dict) -> tuple[float, float]:
    """Return the interval of a record's number over prompts, or for these prompts if there are too few."""
    low, high = found["ci95"]
    return found["ci95_these"] if low is None else (low, high)


def per_prompt(axes: list[dict]) -> np.ndarray:
    """Return each prompt's bias of one attribute, as mean over seeds; NaN for a prompt without any face."""
    values = np.array([[p["bias"]["value"] for p in axis["per_prompt"]] for axis in axes], float)
    return np.ma.masked_invalid(values).mean(0).filled(np.nan)


@dataclass(frozen=True)
class Excess:
    """A distance in excess of its noise floor: means over prompts and seeds, and the share left, with its interval."""

    before: float
    after: float
    floor: float
    left: float
    low: float
    high: float

    def __str__(self) -> str:
        means = f"{number(self.before)} → {number(self.after)}, floor {number(self.floor)}"
        return f"{means}: {percent(self.left)} left [{percent(self.low)}, {percent(self.high)}]"


def excess(audits: list[dict], axis: str, part: str, key: str, family: str | None = None) -> Excess:
    """Return the excess of `part` ("bias", "target") of an attribute, over all prompts or those of a family."""

    def values(model: str, what: str) -> np.ndarray:
        rows = [entry(a, model)[axis]["per_prompt"] for a in audits]
        return np.array([[p[part][what] for p in each if family in (None, p["family"])] for each in rows], float).mean(
            0
        )

    before, after = (values(model, key) for model in ("before", "after"))
    floors = [values(model, "floor") for model in ("before", "after")]
    seen = ~np.isnan(before + after)  # prompts without a face are left out
    was, now = (before - floors[0])[seen], (after - floors[1])[seen]
    draws = resampled_prompts(len(was), 2000, audits[0]["provenance"]["seed"])
    low, high = percentile_interval(now[draws].mean(1) / was[draws].mean(1), len(was))
    means = [float(v[seen].mean()) for v in (before, after, floors[1])]
    left = float(now.mean() / was.mean())
    if len(audits) > 1:
        by_seed = [excess([audit], axis, part, key, family).left for audit in audits]
        low, high = over_seeds((low, high), by_seed)
    return Excess(*means, left, float(low), float(high))


def stays(audit: dict, plain: dict, axis: str) -> tuple[float, float, float]:
    """Return the share of the frozen model's bias in excess of its floor that remains with other words: value, low, high.

    It is sum_P (bias with words - floor) / sum_P (bias without - floor) over the same subjects, which are resampled.
    """

    def above(one: dict) -> np.ndarray:
        biases = [prompt["bias"] for prompt in entry(one, "before")[axis]["per_prompt"]]
        return np.array([b["value"] for b in biases], float) - np.array([b["floor"] for b in biases], float)

    now, was = above(audit), above(plain)
    seen = ~np.isnan(now + was)
    draws = resampled_prompts(int(seen.sum()), 2000, plain["provenance"]["seed"])
    boot = now[seen][draws].mean(1) / was[seen][draws].mean(1)
    low, high = percentile_interval(boot, int(seen.sum()))
    return float(now[seen].mean() / was[seen].mean()), float(low), float(high)


def number(value: float) -> str:
    return _short(f"{value:.3f}")


def signed(value: float) -> str:
    return _short(f"{value:+.3f}")


def _short(text: str) -> str:
    return text.replace("0.", ".", 1).replace("-", "−")


def percent(value: float, digits: int = 0) -> str:
    return f"{round(value, 2 + digits) + 0.0:.{digits}%}".replace("-", "−")


def seeds_mean(values: list[float], write: Callable[[float], str] = number) -> str:
    """Return as text the mean over seeds ± their standard deviation."""
    spread = f" ± {write(float(np.std(values, ddof=1))).lstrip('+')}" if len(values) > 1 else ""
    return write(float(np.mean(values))) + spread


def seeds_spread(means: list[float], prompts: np.ndarray, seed: int) -> str:
    """Return as text `seeds_mean` of a bias and its interval over prompts and seeds, within [0, 1]."""
    low, high = np.clip(over_seeds(mean_interval(prompts[~np.isnan(prompts)], seed=seed), means), 0, 1)
    return f"{seeds_mean(means)} [{number(low)}, {number(high)}]"


def mean_interval_of(entries: list[dict]) -> tuple[float, float]:
    """Return the mean of the intervals `ci95` of several seeds.

    Audits of several seeds have the same prompts, so their intervals share the variance between prompts, and each has its
    own variance of images. So their mean is no narrower than an interval of the mean over seeds.
    """
    low, high = np.mean([ends(e) for e in entries], axis=0)
    return float(low), float(high)


def seeds_interval(entries: list[dict], key: str, write: Callable[[float], str] = number) -> str:
    """Return as text the mean over seeds of entries {key, ci95} ± their standard deviation, and their mean interval."""
    known = [e for e in entries if e[key] is not None]
    if not known:
        return "–"
    return f"{seeds_mean([e[key] for e in known], write)} [{', '.join(map(write, mean_interval_of(known)))}]"
