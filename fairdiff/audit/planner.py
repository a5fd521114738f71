"""How many images of how many prompts let a generator that is on target be found on target."""

import numpy as np

from fairdiff.audit.distance import extreme_shares, mean_moments, quantile, upper_tail
from fairdiff.audit.judge import Judge

MOST = 100_000  # images a prompt; where they are not enough none are


def power(prompts: int, images: int, target_K, delta: float, judge: Judge | None = None) -> float:
    """P("within" on these prompts) of a generator exactly on target: that X is below its quantile .025 at the margin."""
    target, n = np.tile(np.asarray(target_K, float), (prompts, 1)), np.full(prompts, images)
    limit = quantile(0.025, *mean_moments(extreme_shares(target, delta**2), target, n, judge))
    return 1 - upper_tail(limit, *mean_moments(target, target, n, judge))


def images_needed(prompts: int, target_K, delta: float, judge: Judge | None = None, wanted: float = 0.8) -> int | None:
    """Fewest images of each of so many prompts, each with a face, for this power, to 2 %.

    None where no number of images gives it: the errors of the judge were counted on too few faces.
    """
    low, high = 2, 4
    while power(prompts, high, target_K, delta, judge) < wanted:
        low, high = high, 2 * high
        if high > MOST:
            return None
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if power(prompts, middle, target_K, delta, judge) >= wanted else (middle, high)
    return high
