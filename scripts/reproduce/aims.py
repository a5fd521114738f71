"""What was to be reached, set before measuring, beside what the records say."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fairdiff.audit.intervals import mean_interval
from reproduce.numbers import entry, excess, mean_interval_of, number, per_prompt, percent, signed

Audits = dict[tuple[str, str], list[dict]]  # of (group, run), one a seed


@dataclass(frozen=True)
class Found:
    """A measured number with its interval over prompts, and how it is written."""

    value: float
    interval: tuple[float, float]
    show: Callable[[float], str] = number

    def __str__(self) -> str:
        return f"{self.show(self.value)} [{', '.join(map(self.show, self.interval))}]"


@dataclass(frozen=True)
class Aim:
    """`what` of a run shall lie in [low, high]; find: from the audits of its seeds, and of the run `beside`."""

    group: str
    run: str
    what: str
    says: str
    low: float
    high: float
    find: Callable[..., Found]
    beside: str | None = None

    def row(self, audits: Audits) -> str | None:
        """A line of the table, None where a record is missing."""
        needed = [audits.get((self.group, name)) for name in (self.run, self.beside) if name]
        if not all(needed):
            return None
        found = self.find(*needed)
        verdict = "yes" if self.low <= found.value <= self.high else "no"
        if verdict == "no" and found.interval[0] <= self.high and found.interval[1] >= self.low:
            verdict = "its interval does"
        return f"| {self.run} | {self.what} | {self.says} | {found} | {len(needed[0])} | {verdict} |"


def _with_interval(mean: float, prompts: np.ndarray, audits: list[dict], show=number) -> Found:
    low, high = mean_interval(prompts[~np.isnan(prompts)], seed=audits[0]["provenance"]["seed"])
    return Found(mean, (low, high), show)


def bias(axis: str) -> Callable[[list[dict]], Found]:
    def find(audits: list[dict]) -> Found:
        axes = [entry(a, "after")[axis] for a in audits]
        return _with_interval(float(np.mean([e["bias"]["mean"] for e in axes])), per_prompt(axes), audits)

    return find


def more_than(axis: str) -> Callable[[list[dict], list[dict]], Found]:
    """How much more bias than in the run beside it, paired over prompts, each the mean over its seeds."""

    def find(audits: list[dict], others: list[dict]) -> Found:
        mine, theirs = (per_prompt([entry(a, "after")[axis] for a in some]) for some in (audits, others))
        difference = mine - theirs
        return _with_interval(float(np.nanmean(difference)), difference, audits, signed)

    return find


def share(axis: str, cls: str) -> Callable[[list[dict]], Found]:
    def find(audits: list[dict]) -> Found:
        shares = [entry(a, "after")[axis]["shares"][cls] for a in audits]
        return Found(float(np.mean([s["share"] for s in shares])), mean_interval_of(shares))

    return find


def left(axis: str, part: str, key: str, family: str | None = None) -> Callable[[list[dict]], Found]:
    def find(audits: list[dict]) -> Found:
        found = excess(audits, axis, part, key, family)
        return Found(found.left, (found.low, found.high), percent)

    return find


def _at_most(group: str, run: str, what: str, high: float, find, beside: str | None = None) -> Aim:
    says = f"≤ {high:.2f}".replace("0.", ".")
    return Aim(group, run, what, says, float("-inf"), high, find, beside)


def _part_left(group: str, run: str, what: str, high: float, find) -> Aim:
    return Aim(group, run, f"{what} left", f"≤ {high:.0%}", float("-inf"), high, find)


E = "experiments"
AIMS = [
    _at_most(E, "gender", "gender bias", 0.11, bias("gender")),
    _at_most(E, "gender_race", "gender bias", 0.13, bias("gender")),
    _at_most(E, "gender_race", "race bias", 0.10, bias("race")),
    _at_most(E, "gender_race", "gender×race bias", 0.06, bias("gender×race")),
    Aim(E, "gender_race_age", 'share of "old"', ".25 ± .04", 0.21, 0.29, share("age", "old")),
    *(
        _at_most(E, "gender_race_age", f"{a} bias more than in gender_race", 0.03, more_than(a), "gender_race")
        for a in ("gender", "race")
    ),
    *(
        _part_left(E, "multi_concept", f"{f}: gender bias", 0.4, left("gender", "bias", "value", f))
        for f in ("occupation", "styled", "descriptor", "sport")
    ),
    *(
        _part_left("targets", "labour statistics", f"{a}: total variation", 0.5, left(a, "target", "total_variation"))
        for a in ("gender", "race", "gender×race")
    ),
]


def aims_table(audits: Audits) -> list[str]:
    """The table of all aims whose records there are, [] without any."""
    rows = [row for aim in AIMS if (row := aim.row(audits))]
    if not rows:
        return []
    head = "| run | what | aim | measured | seeds | reached |\n|---|---|---|---|---|---|\n"
    said = "\n\nLeft: of what there was before in excess of its floor. [Why aims are missed](#what-they-say).\n"
    return ["\n## Aims\n\nSet before measuring, for 160 pictures a prompt.\n\n", head, "\n".join(rows), said]
