"""The page of scripts/drift.py from its record."""

import numpy as np
from reproduce.numbers import percentile_interval

from fairdiff.audit.wording import interval, number, percent
from fairdiff.studies.drift import half_life_of
from fairdiff.studies.page import Page, Point, Section, curves_chart
from harness.cells import apart_cell, mean_cell

LEAD = (
    "What ordinary fine-tuning, which is about something else, does to a fair model. Labels are perceived presentation in "
    "images, never identity."
)
NOT_SHOWN = (
    "Other pictures for tuning: these are the model's own, so that a benign one is as easy to learn as can be.",
    "Spread over seeds of the fair training and of the tuning: there is one of each.",
    "Harm itself: an unsafe rate is what the detector reads, and on Portraits of harmless stand-ins, for the path alone.",
)
UNSAFE = ("asked for", "people")  # the prompts of which an unsafe rate is counted
TEXT = (
    "[low, high]: 95 % over prompts. To fair, to base: paired differences over the same prompts and noise. Bias: 0 is parity "
    "between classes. Image encoder: similarity to the base model's image, in DINO's place. Unsafe: the share of images in "
    "which the detector finds what is to be avoided, of prompts that ask for it and of prompts of people."
)


def page(found: dict, command: str) -> Page:
    """found: what scripts/drift.py has measured."""
    arms = found["arms"]
    head = ["arm", f"{found['attribute']} bias", "to fair", "image encoder"]
    head += [cell for kind in UNSAFE for cell in (f"unsafe: {kind}", "to base")]
    rows = [_row(name, arm, arms) for name, arm in arms.items()]
    text = ["Steps until half of the gain in bias is lost, over the steps of the grid."]
    lives = Section("Half-life of fairness", text, ["tuning", "half-life", "95 %"], *_lives(arms, found["attribute"]))
    about = {"prompts": f"{found['split']}, {found['prompts']} × {found['images']} images"}
    about |= {"settings": " ".join(found["settings"]), "seed of the tuning": str(found["seed"])}
    about |= {"detector": found["detector"]}
    return Page("Drift", LEAD, [Section("Arms", [TEXT], head, rows), lives], NOT_SHOWN, command, about)


def _row(name: str, arm: dict, arms: dict[str, dict]) -> list[str]:
    semantics = arm["semantics"]
    cells = [name, mean_cell(arm["bias"]), "" if name == "fair" else apart_cell(arm["bias"], arms["fair"]["bias"])]
    cells.append(f"{number(semantics['mean'])} {interval(semantics['ci95'])}".strip())
    for kind in UNSAFE:
        rates, base = arm["unsafe"][kind], arms["base"]["unsafe"][kind]
        cells += [mean_cell(rates), "" if name == "base" else apart_cell(rates, base)]
    return cells


def _lives(arms: dict[str, dict], attribute: str) -> tuple[list[list[str]], list[str]]:
    """Rows of half-lives of the arms that begin fair, by pictures, rate and batch, and the chart of bias over steps."""
    groups: dict[tuple, list[tuple[int, list]]] = {}
    for arm in arms.values():
        if "tuning" in arm and arm["tuning"]["arm"] in ("fair then tuned", "replay"):
            t = arm["tuning"]
            groups.setdefault((t["arm"], t["pictures"], t["rate"], t["batch"]), []).append((t["steps"], arm["bias"]))
    rows, curves = [], {}
    for (arm, pictures, rate, batch), some in groups.items():
        name = f"{arm}, {pictures}, rate {rate:g}, batch {batch}"
        steps, biases = zip(*sorted([(0, arms["fair"]["bias"]), *some], key=lambda one: one[0]), strict=True)
        biases, base = np.array(biases, float), np.array(arms["base"]["bias"], float)
        known = ~np.isnan(biases).any(0) & ~np.isnan(base)
        if not known.any():
            rows.append([name, "–", "no prompt has a face in every model"])
            continue
        rows.append([name, *_life(half_life_of(steps, biases[:, known], base[known], 0), steps[-1], int(known.sum()))])
        means = biases[:, known].mean(1)
        curves[name] = [Point(s, float(m), tip=f"{name}: {s} steps") for s, m in zip(steps, means, strict=True)]
    chart = [curves_chart(curves, f"{attribute} bias", "steps of the tuning")] if curves else []
    return rows, chart


def _life(lives: np.ndarray, last: int, prompts: int) -> list[str]:
    """The half-life and its interval; where it is not seen in all resamples, in how many it is."""
    if np.isnan(lives[0]):
        return ["–", "the fair model has no less bias than the base"]
    value = f"{lives[0]:.0f} steps" if np.isfinite(lives[0]) else f"more than {last} steps"
    seen = np.isfinite(lives[1:])  # neither a resample without a gain, nor one that keeps half of it
    if seen.all() and prompts > 1:
        low, high = percentile_interval(lives[1:], prompts)
        return [value, interval([max(low, 0.0), high], lambda steps: number(steps, 0))]
    return [value, f"half is lost in {percent(float(seen.mean()), 0)} of the resamples"]
