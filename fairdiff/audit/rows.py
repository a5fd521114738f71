"""Helpers for rows of records that all parts of audit.json use: means over prompts, and an entry for each family or axis.

P prompts. What is measured on images has one mean for each prompt, and Student's interval over them.
"""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from fairdiff.audit.attribute import average
from fairdiff.audit.axis import Axis
from fairdiff.audit.suite import student_interval


def mean_over_prompts(values: np.ndarray, limits: tuple[float, float] = (-math.inf, math.inf)) -> dict:
    """Mean over prompts of what is measured on images [P], with Student's interval."""
    return {"mean": average(values), "ci95": student_interval(values, limits)}


def difference_over_prompts(values: np.ndarray) -> dict:
    """As `mean_over_prompts`, for paired differences, after minus before."""
    return {"difference": average(values), "ci95": student_interval(values)}


def prompt_means(values: pd.Series, rows: pd.DataFrame) -> np.ndarray:
    """Mean of each prompt [P]; a prompt without any value takes no part."""
    return values.groupby(rows.prompt_index).mean().dropna().to_numpy()


def by_family(family_P: pd.Series) -> dict[str, np.ndarray]:
    """Which prompts [P] belong to each family; {} for a single one, whose numbers are those of all prompts."""
    names = list(dict.fromkeys(family_P))
    return {name: (family_P == name).to_numpy() for name in names} if len(names) > 1 else {}


def grouped(axes: list[Axis], measure: Callable[[Axis], dict]) -> dict[str, dict]:
    """measure(axis) of every axis, attributes and combinations apart."""
    result: dict[str, dict] = {"attributes": {}, "joint": {}}
    for axis in axes:
        result["attributes" if len(axis.members) == 1 else "joint"][axis.name] = measure(axis)
    return result
