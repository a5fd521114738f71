"""The targets of the study, which were set before measuring, and the measured values from the records."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from reproduce.numbers import (
    entry,
    excess,
    mean_interval,
    mean_interval_of,
    number,
    over_seeds,
    per_prompt,
    percent,
    signed,
)
from reproduce.plan import EXPERIMENTS

Audits = dict[tuple[str, str], list[dict]]  # (group, run) -> audits, one per seed


@dataclass(frozen=True)
class Found:
    """A measured number with its interval over prompts and seeds, and its number format."""

    value: float
    interval: tuple[float, float]
    show: Callable[[float], str] = number

    def __str__(self) -> str:
        return f"{self.show(self.value)} [{', '.join(map(self.show, self.interval))}]"


@dataclass(frozen=True)
class Aim:
    """A target: the number `what` of a run must lie in [low, high]. find: computes it from the audits of all seeds."""

    group: str
    run: str
    what: str
    says: str
    low: float
    high: float
    find: Callable[[list[dict]], Found]

    def row(self, audits: Audits) -> str | None:
        """Return a line of the table, None without a record."""
        needed = audits.get((self.group, self.run))
        if not needed:
            return None
        found = self.find(needed)
        verdict = "open"
        if self.low <= found.interval[0] and found.interval[1] <= self.high:
            verdict = "reached"
        elif found.interval[0] > self.high or found.interval[1] < self.low:
            verdict = "missed"
        return f"| {self.run} | {self.what} | {self.says} | {found} | {len(needed)} | {verdict} |"


def _with_interval(by_seed: list[float], prompts: np.ndarray, audits: list[dict], show=number) -> Found:
    """Return the mean over seeds with its interval over seeds and prompts. prompts: values [P], means over seeds."""
    interval = mean_interval(prompts[~np.isnan(prompts)], seed=audits[0]["provenance"]["seed"])
    return Found(float(np.mean(by_seed)), over_seeds(interval, by_seed), show)


def bias(axis: str) -> Callable[[list[dict]], Found]:
    def find(audits: list[dict]) -> Found:
        axes = [entry(a, "after")[axis] for a in audits]
        return _with_interval([e["bias"]["mean"] for e in axes], per_prompt(axes), audits)

    return find


def drift(axis: str) -> Callable[[list[dict]], Found]:
    """Return a function that finds the change of the bias, after minus before, paired over prompts."""

    def find(audits: list[dict]) -> Found:
        changes = [per_prompt([entry(a, "after")[axis]]) - per_prompt([entry(a, "before")[axis]]) for a in audits]
        return _with_interval([float(np.nanmean(c)) for c in changes], np.mean(changes, 0), audits, signed)

    return find


def low_confidence(axis: str) -> Callable[[list[dict]], Found]:
    """Return a function that finds the low-confidence rate after, divided by that before, with Wilson's interval."""

    def find(audits: list[dict]) -> Found:
        before = float(np.mean([entry(a, "before")[axis]["low_confidence"]["rate"] for a in audits]))
        after = [entry(a, "after")[axis]["low_confidence"] for a in audits]
        rates = [e["rate"] / before for e in after]
        low, high = np.mean([e["ci95"] for e in after], axis=0) / before
        return Found(float(np.mean(rates)), over_seeds((float(low), float(high)), rates), lambda v: f"{v:.2f} ×")

    return find


def relative_drift(audits: list[dict]) -> Found:
    """Return the relative drift of images without people: distance to those before / distance between two seeds."""
    ratios = [a["without_people"]["relative_drift"] for a in audits]
    values = [ratio["value"] for ratio in ratios]
    return Found(float(np.mean(values)), over_seeds(mean_interval_of(ratios), values))


def share(axis: str, cls: str) -> Callable[[list[dict]], Found]:
    def find(audits: list[dict]) -> Found:
        shares = [entry(a, "after")[axis]["shares"][cls] for a in audits]
        values = [s["share"] for s in shares]
        return Found(float(np.mean(values)), over_seeds(mean_interval_of(shares), values))

    return find


def left(axis: str, part: str, key: str, family: str | None = None) -> Callable[[list[dict]], Found]:
    def find(audits: list[dict]) -> Found:
        found = excess(audits, axis, part, key, family)
        return Found(found.left, (found.low, found.high), percent)

    return find


def _at_most(group: str, run: str, what: str, high: float, find) -> Aim:
    return Aim(group, run, what, f"≤ {high:.2f}".replace("0.", "."), float("-inf"), high, find)


def _stays(group: str, run: str, axis: str) -> Aim:
    return Aim(group, run, f"change of {axis} bias", "within ± .06", -0.06, 0.06, drift(axis))


def _part_left(group: str, run: str, what: str, high: float, find) -> Aim:
    return Aim(group, run, f"{what} left", f"≤ {high:.0%}", float("-inf"), high, find)


E = "experiments"
AIMS = [
    _at_most("adapters", "lora_both", "gender bias", 0.20, bias("gender")),
    _stays("adapters", "lora_both", "race"),
    _stays("adapters", "lora_both", "age"),
    Aim("adapters", "lora_both", "low-confidence faces (gender)", "≤ 2 ×", 0, 2, low_confidence("gender")),
    _at_most(E, "gender", "gender bias", 0.13, bias("gender")),
    _stays(E, "gender", "race"),
    _stays(E, "gender", "age"),
    _part_left(E, "gender_tokens", "gender bias", 0.5, left("gender", "bias", "value")),
    _at_most(E, "gender_race", "gender bias", 0.14, bias("gender")),
    _at_most(E, "gender_race", "race bias", 0.09, bias("race")),
    _at_most(E, "gender_race", "gender×race bias", 0.06, bias("gender×race")),
    Aim(E, "gender_race_age", 'share of "old"', ".25 ± .03", 0.22, 0.28, share("age", "old")),
    *(
        _part_left("targets", "labour statistics", f"{a}: total variation", 0.4, left(a, "target", "total_variation"))
        for a in ("gender", "race", "gender×race")
    ),
    *(
        _part_left(E, "multi_concept", f"{f}: {a} bias", 0.3, left(a, "bias", "value", f))
        for f in ("occupation", "styled", "descriptor", "sport")
        for a in ("gender", "race")
    ),
    *(_at_most(E, name, "relative drift without people", 0.25, relative_drift) for name in EXPERIMENTS),
]


def aims_table(audits: Audits) -> list[str]:
    """Return the table of all targets with a record, [] without any."""
    rows = [row for aim in AIMS if (row := aim.row(audits))]
    if not rows:
        return []
    head = "| run | number | aim | measured | seeds | result |\n|---|---|---|---|---|---|\n"
    said = "\n\nLeft is the share of the value before, in excess of its noise floor, that remains.\n"
    rule = "An aim is reached if the whole interval over prompts and seeds meets it, and missed if the whole fails it."
    return [f"\n## Aims\n\nThe aims were set before measuring. {rule}\n\n", head, "\n".join(rows), said]
