"""Group audits that differ only in seeds, of training or of the audit, and compute means over them with intervals."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fairdiff.audit.suite import over_seeds, within_range
from fairdiff.compare.audits import SEED, Audited

FEW_SETTINGS = 3  # groups that differ in more settings are named by their folders


@dataclass(frozen=True)
class Group:
    """Audits that differ only in seeds. name: the settings in which groups differ, or a folder.

    settings: the settings in which groups differ, {} if they are not known.
    """

    name: str
    members: tuple[Audited, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A number of one audit. ends: its 95 % interval or None. these: the interval is for these prompts, not for others."""

    seed: int | None
    audit_seed: int
    value: float
    ends: tuple[float, float] | None
    these: bool


def grouped(audits: Sequence[Audited]) -> list[Group]:
    """Group audits, sorted by settings, or in the order of audits if settings are unknown or differ in many keys."""
    groups = list(_by_seed(audits).values())
    known = all(audit.settings for audit in audits)
    first = [{key: _without_seed(value) for key, value in some[0].settings.items()} for some in groups]
    keys = {key: None for settings in first for key in settings}
    keys = [key for key in keys if len({repr(settings.get(key)) for settings in first}) > 1] if known else []
    chosen = [{key: settings.get(key) for key in keys} for settings in first]
    names = [", ".join(f"{key}={said(value)}" for key, value in settings.items()) for settings in chosen]
    made = list(zip(groups, names, chosen, strict=True))
    if not 0 < len(keys) <= FEW_SETTINGS or len({*names}) < len(groups):
        count = Counter(map(_folder, groups))
        folders = [_folder(some) if count[_folder(some)] == 1 else some[0].name for some in groups]
        made = list(zip(groups, folders, chosen, strict=True))
    else:
        made.sort(key=lambda one: [_order(value) for value in one[2].values()])
    return [Group(name, tuple(some), settings) for some, name, settings in made]


def _by_seed(audits: Sequence[Audited]) -> dict[tuple, list[Audited]]:
    """Group audits so that no two in a group have the same seeds: by settings, and where that is not enough by folders."""
    known = all(audit.settings for audit in audits)
    groups: dict[tuple, list[Audited]] = {}
    for audit in audits:
        settings = repr(sorted((key, repr(_without_seed(value))) for key, value in audit.settings.items()))
        groups.setdefault((audit.last, settings if known else _unseeded(audit)), []).append(audit)
    for finer in (_unseeded, lambda audit: audit.name):
        split: dict[tuple, list[Audited]] = {}
        for key, some in groups.items():
            twice = len({(audit.seed, audit.audit_seed) for audit in some}) < len(some)
            for audit in some:
                split.setdefault((*key, finer(audit)) if twice else key, []).append(audit)
        groups = split
    return groups


def _unseeded(audit: Audited) -> str:
    return re.sub(r"audit\.seed=\d+,?", "", SEED.sub(r"\1seed*", audit.name)).strip("/,")


def _without_seed(value: Any) -> Any:
    """Return a setting with the training seed in paths replaced by seed*."""
    if isinstance(value, list):
        return [_without_seed(item) for item in value]
    return SEED.sub(r"\1seed*", value) if isinstance(value, str) else value


def _folder(members: Sequence[Audited]) -> str:
    """Return the name of the members' folder without the part that names the seed."""
    if len(members) == 1:
        return members[0].name
    name = SEED.sub("", members[0].name).strip("/")
    return name if name and all(SEED.sub("", one.name).strip("/") == name for one in members) else _unseeded(members[0])


def said(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _order(value: Any) -> tuple:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, value, "") if number else (1, 0, said(value))


def mean_of(figures: Sequence[Figure], limits: tuple[float, float] = (-math.inf, math.inf)) -> dict | None:
    """Return the mean over training seeds of each seed's mean over its audits, its interval and spread; None of no figures.

    An interval covers the variation of prompts and of noise. Audits with one audit seed share the noise, and all audits
    share the prompts. So their half-widths are averaged, which is never too narrow. For `these` prompts, half-widths of
    different audit seeds are independent and are combined in quadrature. Several training seeds widen the interval by
    Student's interval of their means, so that it is for trainings like these. spread: standard deviation over the means of
    training seeds, or over the audits of one training; None of a single one.
    """
    if not figures:
        return None
    if len(figures) == 1:  # the audit's own number
        (one,) = figures
        return {"value": one.value, "ci95": one.ends and list(one.ends), "these": one.these, "spread": None}
    by_seed: dict[int | None, list[float]] = {}
    for one in figures:
        by_seed.setdefault(one.seed, []).append(one.value)
    means = [float(np.mean(values)) for values in by_seed.values()]
    mean, several = float(np.mean(means)), means if len(means) > 1 else [one.value for one in figures]
    these = any(one.these for one in figures)
    ends = None
    if all(one.ends is not None for one in figures):
        halves: dict[int, np.ndarray] = {}
        for one in figures:
            weight = 1 / (len(means) * len(by_seed[one.seed]))
            half = weight * np.abs(np.array(one.ends) - one.value)
            halves[one.audit_seed] = halves.get(one.audit_seed, 0) + half
        low, high = (np.hypot.reduce if these else np.sum)(list(halves.values()), axis=0)
        ends = within_range(over_seeds((mean - float(low), mean + float(high)), means), *limits)
    spread = float(np.std(several, ddof=1)) if len(several) > 1 else None
    return {"value": mean, "ci95": ends and list(ends), "these": these, "spread": spread}
