"""Means over prompts and their paired differences as cells of a table."""

from collections.abc import Callable, Sequence

import numpy as np
from reproduce.numbers import mean_interval

from fairdiff.audit.wording import interval, number, signed

Form = Callable[[float], str]


def mean_cell(values: Sequence[float | None] | np.ndarray, form: Form = number) -> str:
    """Mean over prompts with its interval; prompts without a value are left out, and "–" without any prompt."""
    known = np.array(values, float)
    known = known[~np.isnan(known)]
    if not len(known):
        return "–"
    ends = mean_interval(known)
    return f"{form(float(known.mean()))} {interval(list(ends), form) if len(known) > 1 else ''}".strip()


def differences(one: Sequence[float | None], other: Sequence[float | None]) -> np.ndarray:
    """Of each prompt [P]; NaN where either has none."""
    return np.array(one, float) - np.array(other, float)


def apart_cell(one: Sequence[float | None], other: Sequence[float | None]) -> str:
    """The paired difference over the same prompts and noise."""
    return mean_cell(differences(one, other), signed)
