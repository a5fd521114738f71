"""Format means over prompts and their paired differences as table cells."""

from collections.abc import Callable, Sequence

import numpy as np
from reproduce.numbers import mean_interval

from fairdiff.audit.wording import interval, number, signed

Form = Callable[[float], str]


def mean_cell(values: Sequence[float | None] | np.ndarray, form: Form = number) -> str:
    """Return the mean over prompts with its interval, without prompts that have no value; "–" if none has one."""
    known = np.array(values, float)
    known = known[~np.isnan(known)]
    if not len(known):
        return "–"
    ends = mean_interval(known)
    return f"{form(float(known.mean()))} {interval(list(ends), form) if len(known) > 1 else ''}".strip()


def differences(one: Sequence[float | None], other: Sequence[float | None]) -> np.ndarray:
    """Return the differences of each prompt [P], NaN if either has no value."""
    return np.array(one, float) - np.array(other, float)


def apart_cell(one: Sequence[float | None], other: Sequence[float | None]) -> str:
    """Return the mean paired difference with its interval; both have the same prompts and noise."""
    return mean_cell(differences(one, other), signed)
