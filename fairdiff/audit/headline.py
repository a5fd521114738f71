"""The result of an audit in plain words: the verdict, what its margin means, and the change. It computes no number.

Verdict and change are about the distance D, which is corrected if the judge's errors were counted and can be corrected.
"""

import math

from fairdiff.audit.estimand import ends_of, ends_of_all, verdict_of
from fairdiff.audit.wording import attribute_order, distance_of, interval, last_model, number, signed, targeted

ANSWERS = {"within": "yes", "beyond": "no", "undecided": "cannot tell"}
EXPLAINED = {  # (change, verdict after) that seem to contradict each other -> explanation
    ("fell", "beyond"): "It fell, but it is still above the margin.",
    ("fell", "undecided"): "It fell, but the audit cannot tell whether it fell far enough.",
    ("rose", "within"): "It rose, but it is still within the margin.",
}
UNCHANGED = {  # (verdict before, verdict after) without a clear change -> explanation
    ("within", "within"): "It was also within the margin before.",
    ("undecided", "within"): "Before, the audit could not tell on which side of the margin it was.",
    (
        "beyond",
        "within",
    ): "It was above the margin before. The change alone is too small to be clear, but both verdicts are.",
    ("beyond", "beyond"): "It was also above the margin before.",
    ("undecided", "beyond"): "Before, the audit could not tell on which side of the margin it was.",
    (
        "within",
        "beyond",
    ): "It was within the margin before. The change alone is too small to be clear, but both verdicts are.",
}


def headline(audit: dict) -> str:
    """Return the verdicts in one line, or the bias if no attribute has a target."""
    return "; ".join(verdicts(audit))


def verdicts(audit: dict) -> list[str]:
    """Return a line per target, such as "Female and male each within 45 to 55 %: no", or the bias if there is no target."""
    parts = []
    for name in targeted(audit):
        verdict = verdict_of(audit, last_model(audit)["attributes"][name]["target"])
        few = f", for these {audit['prompts']} prompts" if audit["prompts"] < audit["prompts_needed"] else ""
        parts.append(f"{question(audit, name)}: {ANSWERS[verdict['verdict']]}{few}")
    if not parts:
        found = {name: last_model(audit)["attributes"][name]["bias"] for name in attribute_order(audit)}
        parts = [f"{n} bias is {number(b['mean'], 2)} {interval(ends_of(b), _two)}".rstrip() for n, b in found.items()]
        parts[-1] += ", no target was set"
    return [part[0].upper() + part[1:] for part in parts]


def question(audit: dict, name: str) -> str:
    """Return the statement that the verdict answers: for two classes the margin of their shares, for more the margin of D.
    With more classes, D may lie above the margin although no single class does."""
    target = last_model(audit)["attributes"][name]["target"]
    if len(target["shares"]) == 2:
        return margin(audit, name)
    return f"{name} within D {number(target['delta'], 2)} of its target"


def margin(audit: dict, name: str) -> str:
    """Return what D <= delta means for the shares of a prompt.

    Two classes: it is equivalent to |p_k - t_k| <= delta sqrt(t_0 t_1). More classes: it implies, for each class,
    |p_k / t_k - 1| <= delta sqrt((1 - t_k) / t_k), the widest range of a single class.
    """
    target = last_model(audit)["attributes"][name]["target"]
    every = {tuple(item["target"]["shares"].values()) for item in last_model(audit)["attributes"][name]["per_prompt"]}
    if len(every) > 1 or not all(target["shares"].values()):
        return f"{name} within a distance of {number(target['delta'], 2)} of each prompt's target"
    halves = {cls: target["delta"] * math.sqrt(t * (1 - t)) for cls, t in target["shares"].items()}
    ends = {cls: (max(t - halves[cls], 0), min(t + halves[cls], 1)) for cls, t in target["shares"].items()}
    names = list(target["shares"])
    if len(names) == 2 and target["uniform"]:
        return f"{names[0]} and {names[1]} each within {_span(ends[names[0]])}"
    if target["uniform"]:
        share = 1 / len(names)
        return f"each {name} within {_span([end / share for end in ends[names[0]]])} of its target share"
    alike: dict[str, list[str]] = {}
    for cls in names:
        alike.setdefault(_span(ends[cls]), []).append(cls)
    return ", ".join(f"{_listed(some)} within {span}" for span, some in alike.items())


def four_fifths(audit: dict, name: str) -> dict:
    """Return whether each class has at least four fifths of its target share (`answer`), and the flagged classes with ratios.

    "no" uses intervals that hold for all classes at once. "yes" uses the separate intervals: if a class is below, all
    intervals lie above at most as often as the interval of this class does (intersection-union test, Berger 1982).
    """
    entry = last_model(audit)["attributes"][name]
    ratios = {cls: found["ratio"] for cls, found in shares_of(entry).items() if found["ratio"]["value"] is not None}
    known = [pair for pair in map(ends_of, ratios.values()) if pair and pair[0] is not None]
    answer = "cannot tell"
    if any(pair and pair[0] is not None and pair[1] < 0.8 for pair in map(ends_of_all, ratios.values())):
        answer = "no"
    elif ratios and len(known) == len(ratios) and all(pair[0] >= 0.8 for pair in known):
        answer = "yes"
    return {"answer": answer, "below": [(cls, ratio) for cls, ratio in ratios.items() if ratio["flagged"]]}


def shares_of(entry: dict) -> dict:
    """Return the shares of the classes, corrected if they could be."""
    return (entry.get("corrected") or {}).get("shares") or entry["shares"]


def rms(entry: dict) -> dict:
    """Return D with its intervals and its name, corrected if it could be."""
    two = len(entry["target"]["shares"]) == 2 and entry["target"]["uniform"]
    found = (entry.get("corrected") or {}).get("distance") or entry["target"]["distance"]
    return found | {"name": "RMS gap" if two else "RMS distance"}


def change_of(audit: dict, name: str) -> dict | None:
    """Return the change of D: the first model, the paired change of D^2, its kind ("fell", "rose" or "no clear change"), and
    an explanation beside the verdict, which may be empty. None without a pair of models."""
    pair, first = (audit["trained"], "start") if audit["trained"] else (audit["paired"], "before")
    if not pair:
        return None
    entries = {model: entry["attributes"][name] for model, entry in audit["models"].items()}
    found = pair["attributes"][name]
    found = (found.get("corrected") or found)["squared_distance"]
    low, high = (ends_of(found) or [None, None])[:2]
    kind = "no clear change" if low is None or low <= 0 <= high else "fell" if high < 0 else "rose"
    verdicts = [verdict_of(audit, entries[model]["target"])["verdict"] for model in (first, "after")]
    explained = (
        UNCHANGED.get(tuple(verdicts), "") if kind == "no clear change" else EXPLAINED.get((kind, verdicts[1]), "")
    )
    return {"first": first, "squared": found, "kind": kind, "explained": explained}


def changes(audit: dict) -> list[str]:
    """Return a sentence on D for each attribute with a target: its values, its change, and how that fits the verdict."""
    lines = []
    for name in targeted(audit):
        entries = {model: entry["attributes"][name] for model, entry in audit["models"].items()}
        values = {model: _with_ends(rms(entry)) for model, entry in entries.items()}
        label, change = f"{name} {rms(entries['before'])['name']}", change_of(audit, name)
        if change is None:
            lines.append(f"The {label} is {values['before']}.")
            continue
        how = " by training" if change["first"] == "start" else ""
        from_to = f"from {values[change['first']]} to {values['after']}"
        said = (
            f"{change['kind']} {from_to}{how}"
            if change["kind"] != "no clear change"
            else (f"shows no clear change{how}: {from_to}")
        )
        frozen = f"; the frozen model has {values['before']}" if how else ""
        squared = change["squared"]
        paired = f" Paired change of its square: {signed(squared['difference'])} {interval(ends_of(squared))}."
        lines.append(f"The {label} {said}{frozen}.{paired} {change['explained']}".rstrip())
    return lines


def bias_line(audit: dict, name: str) -> str:
    """Return a sentence with the bias (or total variation) of every model with intervals, its change and its noise floor."""
    entries = {model: distance_of(entry["attributes"][name]) for model, entry in audit["models"].items()}
    values = " → ".join(f"{number(d['mean'])} {interval(ends_of(d))}".rstrip() for d in entries.values())
    distance = distance_of(last_model(audit)["attributes"][name])
    what = " (total variation: the share of pictures that would have to change)" if distance["key"] != "bias" else ""
    text = f"{distance['name'][0].upper()}{distance['name'][1:]}{what}, mean over prompts, noise included: {values}."
    for key, first, by in (("paired", "before", "Change"), ("trained", "start", "By training")):
        if audit[key]:
            found = audit[key]["attributes"][name][distance["key"]]
            equal = "" if _faces(audit, first, name) == _faces(audit, "after", name) else ", at equal numbers of faces,"
            text += f" {by}{equal} {signed(found['difference'])} {interval(ends_of(found))}."
    return f"{text} The noise floor is {number(distance['floor'])} (computed)."


def _faces(audit: dict, model: str, name: str) -> list[int]:
    return [item["faces"] for item in audit["models"][model]["attributes"][name]["per_prompt"]]


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _with_ends(entry: dict) -> str:
    return f"{number(entry['value'], 2)} {interval(ends_of(entry), _two)}".rstrip()


def _two(value: float | None) -> str:
    return number(value, 2)


def _span(ends) -> str:
    low, high = (f"{100 * end:.1f}".removesuffix(".0") for end in ends)
    return f"{low} to {high}\u00a0%"
