"""Simulate audits of samples from populations of prompts, and tabulate how often their results are right."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.stats import binom

from fairdiff.audit import judge, suite
from fairdiff.audit.attribute import change, judge_for, mean_share, plug_in_bias, plug_in_mean
from fairdiff.audit.axis import Axis, MetricSpec
from fairdiff.audit.correction import corrected_share
from fairdiff.audit.distance import shrunken_shares, squared_distance
from fairdiff.audit.intervals import total_variation
from fairdiff.audit.verdict import decide, distance_interval
from fairdiff.bias import bias
from fairdiff.files import write_text

DRAWS = 2000, 1000  # resamples of prompts and of the judge's errors: 1/5 and 1/4 of a real audit's, to save time
MARGIN = 0.10
TYPES = 100  # equally frequent prompts in a population
KINDS = {  # name: (distribution of D^2 over prompts, D)
    "fair": ("even", 0.0),
    "even, at the margin": ("even", MARGIN),
    "uneven, at the margin": ("uneven", MARGIN),
    "one in ten, at the margin": ("tenth", MARGIN),
    "one in ten, .25": ("tenth", 0.25),
    "even, skewed": ("even", 0.5),
    "uneven, skewed": ("uneven", 0.5),
}


@dataclass(frozen=True)
class Cell:
    """One setting of the simulation: P prompts, n images, K classes, a kind of population.

    accuracy, labelled: of a judge with counted errors, its accuracy and number of labelled faces. factor: simulate only the
    change to a population whose deviations from the target are multiplied by it, with the same noise.
    """

    P: int
    n: int
    K: int
    kind: str
    accuracy: float = 1.0
    labelled: int = 0
    factor: float | None = None


FACTORS = (0.8, 0.2, 0.0, -0.5)  # multiply the deviations before


def _cells() -> dict[str, Cell]:
    raw = [Cell(P, n, K, kind) for P in (12, 24, 44, 100) for n in (24, 60, 160) for K in (2, 4, 8) for kind in KINDS]
    judged = [
        Cell(P, n, K, kind, accuracy, labelled)
        for P in (24, 44)
        for n in (60, 160)
        for K in (2, 4, 8)
        for accuracy in (0.8, 0.95)
        for labelled in (200, 2000)
        for kind in KINDS
    ]
    paired = [
        Cell(P, n, K, "uneven, skewed", factor=factor)
        for P in (12, 24, 44)
        for n in (24, 60)
        for K in (2, 4)
        for factor in FACTORS
    ]
    return {cell_name(cell): cell for cell in raw + judged + paired}


def cell_name(cell: Cell) -> str:
    judge = f" judge {cell.accuracy:g} of {cell.labelled}" if cell.labelled else ""
    change = f" to {cell.factor:g} of it, same noise" if cell.factor is not None else ""
    return f"P{cell.P} n{cell.n} K{cell.K}{judge}: {cell.kind}{change}"


CELLS = _cells()


@lru_cache(maxsize=4)
def population(kind: str, K: int) -> np.ndarray:
    """Return true shares [TYPES, K] of a population with uniform targets and the kind's mean D^2, as far as possible."""
    spread, D = KINDS[kind]
    rng = np.random.default_rng(0)
    even = np.full(TYPES, 1.0)
    squared = (
        D**2
        * {
            "even": even,
            "uneven": 2 * (rng.permutation(TYPES) + 0.5) / TYPES,
            "tenth": np.where(np.arange(TYPES) < TYPES // 10, 10.0, 0.0),
        }[spread]
    )
    shares = []
    for size in np.sqrt(squared):
        for _ in range(100):  # a random direction, or towards one class if it leaves the simplex
            step = rng.standard_normal(K) if spread != "even" else np.eye(K)[0]
            step -= step.mean()
            p = 1 / K + size * step / np.sqrt(K * (step**2).sum())
            if p.min() >= 0:
                break
        else:
            step = np.eye(K)[rng.integers(K)] - 1 / K
            p = 1 / K + min(size / np.sqrt(K - 1), 1) * step
        shares.append(p)
    return np.array(shares)


@lru_cache(maxsize=4)
def expected(kind: str, K: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `expected_of` for a population (cached)."""
    return expected_of(population(kind, K), n)


def expected_of(p: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the expected plug-in bias and total variation [TYPES] of n faces (Monte Carlo, 4000 draws)."""
    K = p.shape[1]
    f = np.random.default_rng(1).multinomial(n, p, size=(4000, len(p))) / n
    return bias(f).mean(0), total_variation(f, 1 / K).mean(0)


def confusion_rates(K: int, accuracy: float) -> np.ndarray:
    return np.full((K, K), (1 - accuracy) / max(K - 1, 1)) + np.eye(K) * (accuracy - (1 - accuracy) / max(K - 1, 1))


def simulate(name: str, worlds: range, before: dict | None) -> dict:
    """Simulate audits and add their counts to those before: {"audits": n, quantity: [held, printed], ...}."""
    suite.DRAWS, judge.DRAWS = DRAWS
    cell, total = CELLS[name], dict(before or {"audits": 0})
    for world in worlds:
        for key, (held, printed) in audit(cell, world).items():
            old = total.get(key, [0, 0])
            total[key] = [old[0] + held, old[1] + printed]
    total["audits"] = worlds.stop
    return total


def audit(cell: Cell, world: int) -> dict[str, tuple[int, int]]:
    """Simulate one audit; return for each quantity and estimand (contains the truth, has an interval) as 0 or 1."""
    if cell.factor is not None:
        return same_noise(cell, world)
    rng = np.random.default_rng([world, cell.P, cell.n, cell.K, list(KINDS).index(cell.kind), cell.labelled])
    K, types = cell.K, population(cell.kind, cell.K)
    drawn = rng.integers(TYPES, size=cell.P)
    C = confusion_rates(K, cell.accuracy)
    counts = rng.multinomial(cell.n, types[drawn] @ C)
    axis = Axis("x", tuple(str(k) for k in range(K)), ("x",), np.full((cell.P, K), 1 / K))
    confusion = {}
    if cell.labelled:
        confusion = {"x": np.stack([rng.multinomial(cell.labelled // K, row) for row in C])}
    spec = MetricSpec({"x": axis.classes}, {}, confusion=confusion, delta=MARGIN, provenance={})
    target, known, seed = axis.target_PK, judge_for(axis, spec), spec.seed
    squared = squared_distance(types, target[0])
    checks = {"distance": (distance_interval(counts, target, known, seed), squared, np.sqrt)}
    if known is not None:
        checks["share"] = (corrected_share(0, counts, target, known, seed), types[:, 0], float)
    else:
        assumed = shrunken_shares(counts, target)
        checks["share"] = (mean_share(counts[:, 0], counts.sum(1), assumed[:, 0], seed), types[:, 0], float)
        biases, variations = expected(cell.kind, K, cell.n)
        checks["bias"] = (plug_in_mean(plug_in_bias, counts, target, (0, 2 / K), spec), biases, float)
        checks["total variation"] = (plug_in_mean(total_variation, counts, target, (0, 1), spec), variations, float)
    result = {}
    for quantity, (found, truth, form) in checks.items():
        result |= _held(quantity, found, form(truth[drawn].mean()), form(truth.mean()))
    if not cell.labelled:
        result |= _changes(cell, rng, drawn, counts, axis, spec)
    if KINDS[cell.kind][1] in (0, MARGIN):
        said = decide(counts, np.zeros(cell.P), target, MARGIN, known, seed)
        off = KINDS[cell.kind][1] == 0 or squared[drawn].mean() >= MARGIN**2 * (1 - 1e-9)
        result["within, these"] = (int(off and said["verdict_these"] == "within"), int(off))
        result["within, like these"] = (int(said["verdict"] == "within"), int(cell.P >= suite.ENOUGH))
    return result


def _changes(cell: Cell, rng, drawn, counts, axis: Axis, spec: MetricSpec) -> dict:
    """Return the counts for the change from an uneven, skewed model to the cell's, on the same prompts."""
    first = population("uneven, skewed", cell.K)
    before = rng.multinomial(cell.n, first[drawn])
    pairs = before[:, :, None] * counts[:, None] / cell.n  # the images are independent
    plug_in = expected("uneven, skewed", cell.K, cell.n), expected(cell.kind, cell.K, cell.n)
    moved, shares = change([before, counts], pairs, axis, spec), (first, population(cell.kind, cell.K))
    return _change_held(moved, drawn, shares, plug_in, axis.target_PK[0])


def same_noise(cell: Cell, world: int) -> dict[str, tuple[int, int]]:
    """Simulate one change between models with the same noise: one uniform number per image decides its class in both."""
    rng = np.random.default_rng([world, cell.P, cell.n, cell.K, FACTORS.index(cell.factor), 77])
    both = paired_populations(cell.kind, cell.K, cell.factor)
    drawn, noise = rng.integers(TYPES, size=cell.P), rng.random((cell.P, cell.n, 1))
    kinds = [(noise > p[drawn].cumsum(1)[:, None, :-1]).sum(-1) for p in both]
    pairs = np.zeros((cell.P, cell.K, cell.K))
    np.add.at(pairs, (np.arange(cell.P)[:, None], *kinds), 1)
    axis = Axis("x", tuple(str(k) for k in range(cell.K)), ("x",), np.full((cell.P, cell.K), 1 / cell.K))
    spec = MetricSpec({"x": axis.classes}, {}, delta=MARGIN, provenance={})
    plug_in = tuple(_expected_paired(cell.kind, cell.K, cell.factor, cell.n, place) for place in (0, 1))
    moved = change([pairs.sum(2), pairs.sum(1)], pairs, axis, spec)
    return _change_held(moved, drawn, both, plug_in, axis.target_PK[0])


def paired_populations(kind: str, K: int, factor: float) -> tuple[np.ndarray, np.ndarray]:
    first = population(kind, K)
    return first, 1 / K + factor * (first - 1 / K)


@lru_cache(maxsize=4)
def _expected_paired(kind: str, K: int, factor: float, n: int, place: int) -> tuple[np.ndarray, np.ndarray]:
    return expected_of(paired_populations(kind, K, factor)[place], n)


def _change_held(moved: dict, drawn, shares, plug_in, target) -> dict:
    """Return the counts for a measured change. shares, plug_in: true shares and `expected_of` of both models."""
    result = {}
    for place, quantity in enumerate(("bias", "total_variation")):
        step = plug_in[1][place] - plug_in[0][place]
        result |= _held(f"change of {quantity.replace('_', ' ')}", moved[quantity], step[drawn].mean(), step.mean())
    step = squared_distance(shares[1], target) - squared_distance(shares[0], target)
    return result | _held("change of squared distance", moved["squared_distance"], step[drawn].mean(), step.mean())


def _held(quantity: str, found: dict, these: float, like: float) -> dict:
    result = {}
    for estimand, truth in (("ci95_these", these), ("ci95", like)):
        low, high = found[estimand]
        printed = bool(np.isfinite(low))
        held = printed and low - 1e-9 <= truth <= high + 1e-9
        result[f"{quantity}, {'these' if estimand == 'ci95_these' else 'like these'}"] = (int(held), int(printed))
    return result


HEAD = """# How often intervals hold

Written by `python scripts/interval_coverage.py`; repeat the command to add audits. It has simulated {audits} audits so far,
{least} to {most} in each of {cells} cells. Every audit samples prompts from a population of 100, their images, and the
judge's labelled faces. A 95 % interval should contain the truth in 95 of 100 audits; the aim is 93.5 or more. At the margin,
the verdict "on target" should occur in 5 of 100 audits or fewer. There are a fifth as many resamples as in a real audit.

At the margin means D = .10, skewed means D = .5. Uneven means D² from 0 to twice its mean. In "one in ten", a tenth of the
prompts has all of it. The target share of a class is 1/K. Changes start from an uneven, skewed model.

- **these** is for these prompts with new noise, **like** for prompts like these, from {enough} prompts on.
- Each number is the percentage of the audits in all cells of its column, followed by their number. *Least* is that of the
  worst cell, which is low by chance if it has few audits.
- If D is 0, an interval cannot lie below it, so it holds in more than 95 of 100.
"""


SAME_NOISE = """Each prompt's deviation from the target is multiplied by the factor of the column; below 0 it changes sides.
Each image keeps its random number, which decides its class before and after.

"""


def write_coverage(found: dict, page: Path) -> Path:
    """Write the page: tables by quantity and estimand, then the cells that fall short; return its path."""
    audits = [cell["audits"] for cell in found.values()] or [0]
    head = HEAD.format(
        audits=sum(audits),
        least=min(audits),
        most=max(audits),
        cells=len(audits),
        kinds=", ".join(KINDS),
        enough=suite.ENOUGH,
    )
    raw = {name: cell for name, cell in found.items() if not CELLS[name].labelled and CELLS[name].factor is None}
    paired = {name: cell for name, cell in found.items() if CELLS[name].factor is not None}
    judged = {name: cell for name, cell in found.items() if CELLS[name].labelled}
    parts = [head, "\n## As judged\n\n", *_held_table(raw, lambda c: f"{c.P} prompts")]
    parts += ["\n## Changes between models with the same noise\n\n", SAME_NOISE]
    parts += _held_table(paired, lambda c: f"to {c.factor:g}")
    parts += ["\n## With the judge's error undone\n\n"]
    parts += _held_table(judged, lambda c: f"accuracy {c.accuracy:g} of {c.labelled} faces")
    parts += ["\n## On target where D is the margin, and where it is 0\n\n", *_said_table(found)]
    parts += ["\n## Cells that fall short\n\n", *_short(found)]
    write_text(page, "".join(parts))
    return page


def _quantities(found: dict) -> list[str]:
    return list(dict.fromkeys(key for cell in found.values() for key in cell if key not in ("audits", *SAID)))


SAID = ("within, these", "within, like these")


def _sum(found: dict, key: str) -> tuple[int, int]:
    pairs = [cell[key] for cell in found.values() if cell.get(key, [0, 0])[1]]
    return sum(held for held, _ in pairs), sum(printed for _, printed in pairs)


def _held_table(found: dict, group) -> list[str]:
    groups = list(dict.fromkeys(group(cell) for name, cell in CELLS.items() if name in found))
    lines = ["| " + " | ".join(["interval", *groups, "least"]) + " |", "|---" * (len(groups) + 2) + "|"]
    for key in _quantities(found):
        cells = []
        for one in groups:
            held, printed = _sum({n: c for n, c in found.items() if group(CELLS[n]) == one}, key)
            cells.append(f"{100 * held / printed:.1f} ({printed})" if printed else "–")
        each = {name: cell[key][0] / cell[key][1] for name, cell in found.items() if cell.get(key, [0, 0])[1]}
        least = min(each, key=each.get, default=None)
        cells.append(f"{100 * each[least]:.0f}: {least}" if least else "–")
        lines.append("| " + " | ".join([key.replace("like these", "like"), *cells]) + " |")
    return ["\n".join(lines), "\n"]


def _said_table(found: dict) -> list[str]:
    lines = ["| population | judge | these | like |", "|---|---|---|---|"]
    for kind in KINDS:
        for known in (False, True):
            some = {n: c for n, c in found.items() if CELLS[n].kind == kind and bool(CELLS[n].labelled) == known}
            cells = [f"{100 * a / b:.1f} ({b})" if b else "–" for a, b in (_sum(some, key) for key in SAID)]
            if cells != ["–", "–"]:
                lines.append(f"| {kind} | {'error undone' if known else 'as judged'} | {' | '.join(cells)} |")
    return ["\n".join(lines), "\n"]


def _short(found: dict) -> list[str]:
    """Return the cells that miss the target by more than chance (binomial test at .01, not adjusted for their number)."""
    lines, tried = [], 0
    for name, cell in found.items():
        for key, counts in cell.items():
            if key == "audits" or not counts[1]:
                continue
            tried += 1
            said = key in SAID
            if said and KINDS[CELLS[name].kind][1] == 0:
                continue
            chance = binom.sf(counts[0] - 1, counts[1], 0.05) if said else binom.cdf(counts[0], counts[1], 0.935)
            if chance < 0.01:
                lines.append(f"- {name}: {key}: {counts[0]} of {counts[1]}\n")
    rule = f"These cells are worse than the aim at the 1 % level. {tried} were tested, so some are here by chance:"
    return [f"{rule}\n\n", *(lines or ["- none\n"])]
