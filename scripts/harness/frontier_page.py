"""Build the page of scripts/frontier.py from its record."""

import numpy as np
from reproduce.numbers import mean_interval, percentile_interval

from fairdiff.audit.suite import ENOUGH
from fairdiff.audit.wording import interval, number, percent, signed
from fairdiff.studies.curves import Outcome, hull, least_bias, most_semantics, of_means
from fairdiff.studies.page import Page, Point, Section, curves_chart

LEAD = (
    "This page shows the bias and semantics that each method reaches, and its cost. Single settings are not "
    "comparable, so it compares methods at equal semantics and at equal bias. Labels are perceived presentation in "
    "images, never identity."
)
NAMES = {"dino": "image encoder", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}
PARTS, SHARES = (0.1, 0.3, 1.0), (0.25, 0.5, 0.9)  # shares of the largest loss of semantics, and of the largest gain in bias
NOT_SHOWN = (
    "Other noise: every method was audited with the same noises of one seed.",
    "Whether this encoder measures semantics as a person would.",
    "Training cost: the cost here is that of one image that is used.",
    "Untried settings of a method: curves contain the measured ones and their random mixtures.",
)


def page(found: dict, command: str) -> Page:
    """Return the page. found: the record of scripts/frontier.py."""
    nothing = _outcome(found["nothing"])
    curves = {name: [nothing, *map(_outcome, points)] for name, points in found["curves"].items()}
    means = {name: of_means(points, found["seed"]) for name, points in curves.items()}
    prompts, what = len(nothing.bias_P), NAMES[found["semantics"]]
    few = f" With fewer than {ENOUGH} prompts bands are rough, and too narrow for other prompts." if prompts < ENOUGH else ""
    bands = f"[low, high]: 95 % bands, paired bootstrap over {prompts} prompts.{few}"
    sections = [
        _points(curves, means, found, what),
        *_levels(means, prompts, bands),
        _quotas(found, prompts),
    ]
    about = {"prompts": f"{found['split']}, {prompts} × {found['images']} images", "settings": " ".join(found["settings"])}
    return Page("Frontier", LEAD, sections, NOT_SHOWN, command, about)


def _outcome(point: dict) -> Outcome:
    values = (np.array(point[key], float) for key in ("bias", "semantics"))
    return Outcome(point["label"], *values)


def _points(curves: dict, means: dict, found: dict, what: str) -> Section:
    """Return the section with every measured setting, and whether a mixture of others beats it."""
    rows, chart, size = [], {}, len(found["nothing"]["bias"])
    for name, points in curves.items():
        x, y = means[name]
        corners, marks = hull(x[0], y[0]), []
        for place, point in enumerate(points):
            ends = [percentile_interval(values[1:, place], size) for values in (y, x)]
            if place or not rows:
                own = point.label if point.label.startswith(name) or not place else f"{name}: {point.label}"
                cells = [f"{number(v[0, place])} {interval(list(e))}" for v, e in zip((y, x), ends, strict=True)]
                rows.append([own, *cells, "yes" if place in corners else "no"] if place else [own, *cells, "–"])
            marks.append(Point(x[0, place], y[0, place], *ends[0], f"{name}: {point.label}"))
        chart[name] = sorted((marks[i] for i in corners), key=lambda m: m.x)
    picture = curves_chart(chart, f"{found['attribute']} bias", f"semantics ({what})")
    text = [
        f"Bias of {found['attribute']} is 0 at parity. Semantics ({what}) is a mean over prompts. A setting is on "
        "its frontier if no random mixture of the method's other settings, or of one and nothing, has as little bias with as "
        "much semantics."
    ]
    return Section("Settings", text, ["setting", "bias", "semantics", "on its frontier"], rows, [picture])


def _levels(means: dict, prompts: int, bands: str) -> list[Section]:
    least_x = min(x[0].min() for x, _ in means.values())
    top, before = next((x[0, 0], y[0, 0]) for x, y in means.values())
    best = min(y[0].min() for _, y in means.values())
    at_semantics = [float(top - (top - least_x) * part) for part in PARTS]
    at_bias = [float(before - (before - best) * share) for share in SHARES]
    text = "The least bias of each method at this level of semantics or more, with mixtures of its settings. "
    equal = _section("At equal semantics", text + bands, means, (least_bias, at_semantics, prompts))
    text = "The most semantics that each method keeps at this bias or less; – if it never gets there. "
    return [equal, _section("At equal bias", text + bands, means, (most_semantics, at_bias, prompts))]


def _section(title: str, text: str, means: dict, how: tuple) -> Section:
    """Return a table of methods by level: the value, and its difference to the best there, both with paired bands."""
    find, levels, prompts = how
    less = find is least_bias
    head = ["method", *(part for v in levels for part in (f"at {number(v)}", "to the best"))]
    rows = {name: [name] for name in [*means, "envelope"]}
    for level in levels:
        reached = {name: find(x, y, level) for name, (x, y) in means.items()}
        known = {name: v for name, v in reached.items() if not np.isnan(v[0])}
        order = sorted(known, key=lambda name: known[name][0] if less else -known[name][0])
        for name, values in reached.items():
            apart = values - known[order[0]] if known and name != order[0] else None
            rows[name] += [_banded(values, prompts), "" if apart is None else _banded(apart, prompts, signed)]
        every = np.stack([*reached.values()])
        every = np.where(np.isnan(every), np.inf if less else -np.inf, every)
        outer = every.min(0) if less else every.max(0)
        rows["envelope"] += [_banded(np.where(np.isinf(outer), np.nan, outer), prompts), ""]
    return Section(title, [text], head, [*rows.values()])


def _banded(values: np.ndarray, prompts: int, form=number) -> str:
    """Return the value and its band, or the share of resamples that reach the level if it is below .975."""
    if np.isnan(values[0]):
        return "–"
    draws = values[1:][~np.isnan(values[1:])]
    part = len(draws) / (len(values) - 1)
    if part < 0.975:
        return f"{form(float(values[0]))} (reached in {percent(part, 0)} of the resamples)"
    return f"{form(float(values[0]))} {interval(list(percentile_interval(draws, prompts)))}"


def _quotas(found: dict, prompts: int) -> Section:
    rows = []
    for entry in found["quotas"]:
        costs, seed = entry["costs"], found["seed"]
        cells = [f"± {entry['tolerance']:g}"]
        for key in ("costs", "bias", "true_bias"):
            known = len(entry[key]) > 0
            cells.append(f"{number(float(np.mean(entry[key])))} {interval(_ends(entry[key], seed))}" if known else "–")
        rows.append([*cells, f"{len(costs)} of {prompts}"])
    text = [
        "A quota samples M images and keeps n whose shares are within the tolerance of the target. It trains nothing, "
        "and kept images are those of the frozen model, so semantics do not change. The cost is M / n sampled images "
        "for one kept image, mean over prompts; images without a face are not kept. Bias as judged is what the quota "
        "controls. True bias includes the judge's counted errors (Bayes' rule). Prompts counts those for which the "
        "quota keeps any image.",
    ]
    head = ["tolerance of each share", "cost M / n", "bias as judged", "true bias", "prompts"]
    return Section("A quota instead", text, head, rows)


def _ends(values: list[float], seed: int) -> list[float] | None:
    low, high = mean_interval(values, seed=seed)
    return None if np.isnan(low) else [low, high]
