"""Helpers for all parts of audit.json: means over prompts of image measurements, and grouping by family and axis.

P prompts. A number measured on images is averaged within each prompt first. Its interval is Student's over prompts.
"""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from fairdiff.audit.attribute import average
from fairdiff.audit.axis import Axis
from fairdiff.audit.suite import student_interval


def mean_over_prompts(values: np.ndarray, limits: tuple[float, float] = (-math.inf, math.inf)) -> dict:
    """Return the mean of the prompts' values [P] of an image measurement, with Student's interval."""
    return {"mean": average(values), "ci95": student_interval(values, limits)}


def difference_over_prompts(values: np.ndarray) -> dict:
    """Return the mean of paired differences [P], after minus before, with Student's interval."""
    return {"difference": average(values), "ci95": student_interval(values)}


def prompt_means(values: pd.Series, rows: pd.DataFrame) -> np.ndarray:
    """Return the mean of each prompt [P], without prompts that have no value."""
    return values.groupby(rows.prompt_index).mean().dropna().to_numpy()


def by_family(family_P: pd.Series) -> dict[str, np.ndarray]:
    """Return which prompts [P] belong to each family; {} if there is one family only, which equals all prompts."""
    names = list(dict.fromkeys(family_P))
    return {name: (family_P == name).to_numpy() for name in names} if len(names) > 1 else {}


def grouped(axes: list[Axis], measure: Callable[[Axis], dict]) -> dict[str, dict]:
    """Return measure(axis) of every axis by name, attributes and combinations ("joint") separately."""
    result: dict[str, dict] = {"attributes": {}, "joint": {}}
    for axis in axes:
        result["attributes" if len(axis.members) == 1 else "joint"][axis.name] = measure(axis)
    return result
