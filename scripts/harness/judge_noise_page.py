"""Build the page of scripts/judge_noise.py from its record."""

import shlex
from collections.abc import Callable

import numpy as np

from fairdiff.audit.intervals import rate_interval
from fairdiff.audit.suite import over_seeds, student_interval, within_range
from fairdiff.audit.wording import interval, number, percent, signed
from fairdiff.studies.page import Page, Point, Section, curves_chart

RATES, SEEDS, JUDGE_STEPS = (0.0, 0.1, 0.2, 0.3, 0.4), (0,), 700  # defaults of the command
AUDIT = ("audit.split=validation", "audit.prompts=16", "audit.images_per_prompt=60")
ATTRIBUTE, CLEAN = "gender", "none"
MARGIN = 0.1  # the page says whether bias is worse by less than this
LEAD = (
    "This page shows how much label noise in the training judge debiasing tolerates. Adapters are trained with judges "
    "of increasing label noise, and each is audited by a judge without wrong labels. Labels are perceived "
    "presentation in images, never identity."
)
METHOD = (
    "A share of the gender labels of rendered faces is flipped. The network of the embedded training judge is "
    "retrained on them. `train.py` trains an adapter with that judge, with all else unchanged, and the embedded audit "
    "judge audits it. The noisy judge also chooses the state of the adapter that is kept. The seeds of labels, judge "
    "and adapter are the same at every rate. Labels that are wrong at a lower rate are also wrong at a higher one.",
    "Uniform: every face is equally likely to be wrong. By group: 1.5 times as likely for faces rendered as Black, a "
    "sixth of all. Only a class: only faces of that class are wrong, with the same share of all faces.",
    "Bias is the mean over prompts of the gap between classes; 0 is parity. A change is after minus before with the "
    "same prompts and noise. Against the clean judge is the bias after minus that of the adapter whose judge had true "
    "labels. [low, high] is a 95 % interval over prompts (Student's), and also over seeds if there are several.",
)
NOT_SHOWN = (
    "Errors that depend on how a face looks, as human errors do: here they are random.",
    "Larger judges and more faces, and weights for labels that look wrong (`scripts/train_classifier.py --rockafellian`).",
    "Errors of the audit judge: see `scripts/reading_errors.py`.",
    "Other models: the numbers are for the embedded model, whose bias was made on purpose.",
)
Estimate = tuple[float, tuple[float, float]]


def key_of(kind: str, rate: float, seed: int) -> str:
    return f"{kind}/{rate:g}/{seed}"


def noises(record: dict) -> list[tuple[str, float]]:
    """Return the measured (kind, rate) pairs: true labels first, then by kind and rate."""
    found = {(kind, float(rate)) for kind, rate, _ in (key.split("/") for key in record["cells"])}
    return sorted(found, key=lambda noise: (noise[0] != CLEAN, *noise))


def cells(record: dict, kind: str, rate: float) -> dict[int, dict]:
    """Return seed -> cell for one kind and rate."""
    start = key_of(kind, rate, 0).removesuffix("0")
    return {int(k.removeprefix(start)): cell for k, cell in sorted(record["cells"].items()) if k.startswith(start)}


def biases(cell: dict, model: str, attribute: str = ATTRIBUTE) -> np.ndarray:
    """Return the bias of each prompt [P], NaN for a prompt without a face."""
    return np.array(cell["bias"][attribute][model], float)


def change(cell: dict, attribute: str = ATTRIBUTE) -> np.ndarray:
    return biases(cell, "after", attribute) - biases(cell, "before", attribute)


def estimate(values_SP: list[np.ndarray]) -> Estimate | None:
    """Return the mean over prompts and seeds with its interval over prompts, widened by the spread over seeds."""
    some = np.array(values_SP)
    seen = some[:, ~np.isnan(some).any(0)]
    if not seen.size:
        return None
    return float(seen.mean()), over_seeds(student_interval(seen.mean(0)), seen.mean(1))


def level(found: list[np.ndarray]) -> Estimate | None:
    """Return `estimate` for a bias, with the interval limited to [0, 1]."""
    if (some := estimate(found)) is None:
        return None
    return some[0], within_range(some[1], 0.0, 1.0)


def after_of(record: dict, kind: str, rate: float) -> Estimate | None:
    return level([biases(cell, "after") for cell in cells(record, kind, rate).values()])


def changed(record: dict, kind: str, rate: float, attribute: str = ATTRIBUTE) -> Estimate | None:
    """Return the change of an attribute's bias by the adapters of one kind and rate."""
    return estimate([change(cell, attribute) for cell in cells(record, kind, rate).values()])


def against_clean(record: dict, kind: str, rate: float) -> Estimate | None:
    """Return the bias after minus that with the clean judge of the same seed, None without a clean judge."""
    clean, own = cells(record, CLEAN, 0), cells(record, kind, rate)
    both = [biases(own[s], "after") - biases(clean[s], "after") for s in own if s in clean]
    return estimate(both) if both else None


def falls(found: Estimate | None) -> str:
    """Say whether bias is lower than before, by the interval of the change."""
    if found is None or np.isnan(found[1][0]):
        return "cannot tell"
    return "yes" if found[1][1] < 0 else "no, higher" if found[1][0] > 0 else "cannot tell"


def worse(found: Estimate | None) -> str:
    """Say whether bias is worse than with the clean judge, by the interval of the difference."""
    if found is None or np.isnan(found[1][0]):
        return "cannot tell"
    return "yes" if found[1][0] > 0 else f"not by {number(MARGIN, 1)}" if found[1][1] < MARGIN else "cannot tell"


def up_to(record: dict, kind: str, holds: Callable[[float], bool]) -> float | None:
    """Return the highest measured rate of a kind up to which `holds` is true at all measured rates, None without one."""
    last = None
    for rate in [rate for k, rate in noises(record) if k == kind]:
        if not holds(rate):
            break
        last = rate
    return last


def conclusions(record: dict) -> list[str]:
    """Return one paragraph for each kind of noise, derived from the intervals only."""
    lines = []
    if (clean := changed(record, CLEAN, 0)) is not None:
        said = {"yes": "lowers", "no, higher": "raises", "cannot tell": "does not certainly change"}[falls(clean)]
        lines.append(f"The adapter of the clean judge {said} bias: {_cell(clean, signed)}.")
    for kind in dict.fromkeys(kind for kind, _ in noises(record) if kind != CLEAN):
        rates = [rate for k, rate in noises(record) if k == kind]
        lower = up_to(record, kind, lambda rate, k=kind: falls(changed(record, k, rate)) == "yes")
        near = up_to(record, kind, lambda rate, k=kind: worse(against_clean(record, k, rate)).startswith("not"))
        bad = [rate for rate in rates if worse(against_clean(record, kind, rate)) == "yes"]
        words = [_until(lower, rates, "bias is certainly lower than before")]
        if cells(record, CLEAN, 0):
            words.append(_until(near, rates, f"it is certainly less than {number(MARGIN, 1)} above that of the clean judge"))
            at = ", ".join(percent(rate, 0) for rate in bad) or "no measured rate"
            words.append(f"It is certainly above it at {at}.")
        measured = ", ".join(percent(rate, 0) for rate in rates)
        lines.append(" ".join([f"Wrong labels, {kind} (measured: {measured}).", *words]))
    seeds = {int(key.rpartition("/")[2]) for key in record["cells"]}
    if len(seeds) == 1:
        lines.append("Each rate has one training only: another seed may shift its result by more than the interval.")
    return lines


def _until(rate: float | None, rates: list[float], what: str) -> str:
    """Return "Up to 20 % ...", or a sentence that the lowest rate already does not show it."""
    if rate is None:
        return f"Already at {percent(rates[0], 0)} it cannot be said that {what}."
    return f"Up to {percent(rate, 0)}{', the most that was measured,' if rate == rates[-1] else ''} {what}."


def page(record: dict) -> Page:
    found = noises(record)
    sections = [Section("In words", conclusions(record)), Section("Method", METHOD), _judges(record), _generator(record)]
    sections.append(_others(record))
    first = next(iter(record["cells"].values()))
    prompts, images = first["size"]
    about = {"audit": f"{prompts} × {images} images", "seeds": ", ".join(map(str, _seeds(record)))}
    about |= {"steps of a judge, of an adapter": f"{record['about']['judge_steps']}, {record['about']['steps']}"}
    about |= {"faces to train a judge, held out": f"{first['judge']['faces']}, {first['judge']['right']['all'][1]}"}
    about |= {"renders": record["about"]["renders"], "noises": str(len(found))}
    return Page("Noisy training judges", LEAD, sections, NOT_SHOWN, command_of(record), about)


def command_of(record: dict) -> str:
    """Return the commands that write this record, with non-default options; kinds with the same rates share one."""
    about, found = record["about"], noises(record)
    rates: dict[tuple[float, ...], list[str]] = {}
    clean = [rate for kind, rate in found if kind == CLEAN]
    for kind in dict.fromkeys(kind for kind, _ in found if kind != CLEAN) or ["uniform"]:
        rates.setdefault((*clean, *(rate for k, rate in found if k == kind)), []).append(kind)
    options = [] if (seeds := _seeds(record)) == [*SEEDS] else ["--seeds", *map(str, seeds)]
    if about["judge_steps"] != JUDGE_STEPS:
        options += ["--judge-steps", str(about["judge_steps"])]
    if own := [setting for setting in about["settings"] if setting not in AUDIT]:
        options += ["--set", *own]
    commands = []
    for some, kinds in rates.items():
        asked = [] if some == RATES else ["--rates", *(f"{rate:g}" for rate in some)]
        asked += [] if kinds == ["uniform"] else ["--kinds", *kinds]
        commands.append(shlex.join(["python", "scripts/judge_noise.py", *asked, *options]))
    return "; ".join(commands)


def _seeds(record: dict) -> list[int]:
    return sorted({int(key.rpartition("/")[2]) for key in record["cells"]})


def _name(kind: str, rate: float) -> str:
    return "none" if kind == CLEAN else f"{percent(rate, 0)}, {kind}"


def _cell(found: Estimate | None, form=number) -> str:
    if found is None:
        return "–"
    mean, ends = found
    return f"{form(mean)} {'' if np.isnan(ends[0]) else interval(list(ends))}".rstrip()


def _judges(record: dict) -> Section:
    """Return the section with the accuracy on held-out faces with true labels, in total and by group."""
    groups = list(next(iter(record["cells"].values()))["judge"]["right"])
    rows = []
    for kind, rate in noises(record):
        judges = [cell["judge"] for cell in cells(record, kind, rate).values()]
        row = [_name(kind, rate), percent(float(np.mean([j["wrong"] for j in judges])))]
        for group in groups:
            right, faces = np.mean([j["right"][group] for j in judges], 0)
            ends = rate_interval(round(right), round(faces)) if faces else [None, None]
            row.append(f"{number(right / faces if faces else None)} {interval(list(ends))}".rstrip())
        rows.append([*row, number(float(np.mean([j["sure"] for j in judges])))])
    text = ["Accuracy on held-out renders with true labels, with Wilson's interval. Sure is the mean top probability."]
    return Section("The judges", text, ["noise", "wrong labels", *groups, "sure"], rows)


def _generator(record: dict) -> Section:
    """Return the section with bias before and after, its change, the difference to the clean judge, and the chart."""
    rows, curves = [], {}
    before = level([biases(cell, "before") for cell in record["cells"].values()])
    for kind, rate in noises(record):
        after, clean = after_of(record, kind, rate), against_clean(record, kind, rate)
        fall = changed(record, kind, rate)
        apart = ["–", "–"] if kind == CLEAN else [_cell(clean, signed), worse(clean)]
        trainings = str(len(cells(record, kind, rate)))
        rows.append([_name(kind, rate), trainings, _cell(after), _cell(fall, signed), falls(fall), *apart])
        if after is not None:
            ends = [None, None] if np.isnan(after[1][0]) else [*after[1]]
            point = Point(100 * rate, after[0], *ends, tip=f"{_name(kind, rate)}: {_cell(after)}")
            for name in dict.fromkeys(k for k, _ in noises(record)) if kind == CLEAN else [kind]:
                curves.setdefault(name, []).append(point)
    if len(curves) > 1:
        curves.pop(CLEAN, None)  # it is already the first point of each curve
    floor = float(np.mean([cell["floor"] for cell in record["cells"].values()]))
    last = max(rate for _, rate in noises(record))
    lines = {"before": before, "with the clean judge": after_of(record, CLEAN, 0) if cells(record, CLEAN, 0) else None}
    curves |= {name: [Point(100 * x, found[0], tip=name) for x in (0, last)] for name, found in lines.items() if found}
    chart = curves_chart(curves, f"{ATTRIBUTE} bias after", "wrong labels of the training judge, %", floor)
    head = ["noise", "trainings", "bias after", "change", "lower than before", "against the clean judge", "worse than it"]
    text = [
        f"Before: {_cell(before)}; noise floor {number(floor)}. Worse: yes, where the whole interval lies above 0; not by "
        f"{number(MARGIN, 1)}, where it lies below that."
    ]
    return Section("The generator", text, head, rows, [chart])


def _others(record: dict) -> Section:
    others = [name for name in next(iter(record["cells"].values()))["bias"] if name != ATTRIBUTE]
    rows = []
    for kind, rate in noises(record):
        some = list(cells(record, kind, rate).values())
        row = [_name(kind, rate), *(_cell(changed(record, kind, rate, name), signed) for name in others)]
        row += [_shares(some, "low_confidence"), _shares(some, "no_face")]
        row.append(number(float(np.mean([cell["dino"] for cell in some]))))
        kept = [cell["run"]["kept"] / max(cell["run"]["faces"], 1) for cell in some]
        rows.append([*row, percent(float(np.mean(kept))), number(float(np.mean([cell["run"]["steps"] for cell in some])), 0)])
    head = ["noise", *(f"change of {name} bias" for name in others), "low confidence", "no face", "image encoder"]
    text = [
        "Low confidence is the share of faces with a top probability for gender below .9, before → after. No face is "
        "the share of images without a face. Image encoder is the similarity to the image before with the same noise. "
        "Labels kept is the share of training faces with a confident label."
    ]
    return Section("What else changes", text, [*head, "labels kept", "steps"], rows)


def _shares(some: list[dict], what: str) -> str:
    """Return before → after with the interval after, all as means over seeds."""
    (start, _, _), ends = (np.mean([cell[what][model] for cell in some], 0) for model in ("before", "after"))
    return f"{percent(start)} → {percent(ends[0])} {interval([*ends[1:]], percent)}"
