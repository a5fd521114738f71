"""audit.json as text and table rows, for the report and the terminal. It computes no number."""

from fairdiff.audit.estimand import FEW, SEVERAL_REFUSED, TAGS, ends_of, stayed_of, verdict_of, why_not_corrected
from fairdiff.audit.records import MODELS


def distance_of(entry: dict) -> dict:
    """Return the main plug-in number of an attribute: bias, or total variation if the requested target is not uniform.

    Bias is the distance to parity, so it does not fit any other target. `key` is the name of the number in `paired`.
    """
    target = entry["target"]
    if not target["requested"] or target["uniform"]:
        return {"key": "bias", "name": "bias", "short": "bias", **entry["bias"]}
    names = {"key": "total_variation", "name": "distance to target", "short": "distance"}
    return names | target["total_variation"]


def comparison(audit: dict) -> dict[str, list[dict]]:
    """Return the table rows by group: name, each model and change as (value, ci95 or None), floor, verdict, format, note.

    "trained" is the change from "start" to "after", (None, None) if one of these models is missing.
    """
    wanted = targeted(audit)
    groups = {
        "attributes": [_distance_row(audit, ("attributes", name)) for name in attribute_order(audit)],
        "combinations": [row for name in last_model(audit)["joint"] for row in _combination_rows(audit, name)],
    }
    groups["worst prompts"] = [row(audit, name) for name in wanted for row in (_worst_row, _certain_row)]
    for family in last_model(audit)["families"]:
        paths = [("families", family, "attributes", name) for name in wanted]
        groups[f"{family} prompts"] = [_distance_row(audit, path, f"{family}: ") for path in paths]
    groups["distance D to the target, with the noise of the pictures removed"] = [
        row for name in wanted for row in _target_rows(audit, name)
    ]
    drifts = audit["paired"]["attributes"] if audit["paired"] else {}
    groups["attributes without a target"] = [
        row for name, entry in drifts.items() if "drift" in entry for row in _drift_rows(audit, name, entry["drift"])
    ]
    if audit["named"] is not None:
        groups["prompts that name a class"] = [_kept_row(audit, name) for name in audit["named"]["attributes"]]
    groups["pictures"] = [_confidence_row(audit, name) for name in wanted] + _image_rows(audit)
    return groups


def _row(audit: dict, name: str, get, change=None, *, floor=None, form=None, note: str = "") -> dict:
    """Return a row. get: model -> (value, ci95). change: `paired` or `trained` -> the change's entry; None: no change."""
    cells = {m: get(audit["models"][m]) if m in audit["models"] else (None, None) for m in MODELS}
    for key, pair in (("change", audit["paired"]), ("trained", audit["trained"])):
        found = change(pair) if pair and change else None
        cells[key] = (found["difference"], ends_of(found)) if found else (None, None)
    return {"name": name, **cells, "floor": floor, "verdict": "", "format": form or number, "note": note}


def _at(tree: dict, path: tuple[str, ...]) -> dict:
    for key in path:
        tree = tree[key]
    return tree


def _distance_row(audit: dict, path: tuple[str, ...], prefix: str = "") -> dict:
    """Return the row with `distance_of` the attribute or combination that is at `path` in every model."""
    distance = distance_of(_at(last_model(audit), path))
    return _row(
        audit,
        f"{prefix}{path[-1]} {distance['short']}",
        lambda model: _pair(distance_of(_at(model, path))),
        lambda pair: _at(pair, path)[distance["key"]],
        floor=distance["floor"],
    )


def _combination_rows(audit: dict, name: str) -> list[dict]:
    """Return the rows of a combination: `distance_of` it, and if it has a target also D with its verdict."""
    entry = last_model(audit)["joint"][name]
    rows = [_distance_row(audit, ("joint", name))]
    if entry["target"]["requested"]:
        known = (entry.get("corrected") or {}).get("distance")
        note = "corrected for the judge's errors" if known else "uncorrected: errors are not undone for combinations"
        verdict = verdict_of(audit, entry["target"])["verdict"]
        few = FEW if audit["prompts"] < audit["prompts_needed"] else ""

        def get(model: dict) -> tuple:
            found = model["joint"][name]
            return _pair((found.get("corrected") or {}).get("distance") or found["target"]["distance"])

        rows.append(_row(audit, f"{name} D", get, floor=0.0, note=note) | {"verdict": TAGS[verdict] + few})
    return rows


def _worst_row(audit: dict, name: str) -> dict:
    path = ("attributes", name)
    distance = distance_of(_at(last_model(audit), path))
    worst = distance["worst_tenth"]
    return _row(
        audit,
        f"{name} worst",
        lambda model: _pair(distance_of(_at(model, path))["worst_tenth"]),
        floor=worst["floor"],
        note=f"{distance['short']}, mean of {worst['prompts']}",
    )


def _certain_row(audit: dict, name: str) -> dict:
    """Return the row with the number of prompts that are certainly off target."""

    def off(model: dict) -> tuple:
        return model["attributes"][name]["target"]["prompts_certain"]["off"], None

    row = _row(audit, f"{name} off", off, form=count, note="prompts certainly off, by intervals that hold for all at once")
    return row | {"verdict": f"of {audit['prompts']}"}


def _kept_row(audit: dict, name: str) -> dict:
    """Return the row with the share of faces that show the class that their prompt names."""
    entry = audit["named"]["attributes"][name]
    cells = {model: _pair(kept) for model, kept in entry["kept"].items()}
    change = entry.get("change")
    row = _row(audit, f"{name} kept", lambda _: (None, None), form=percent, note="faces that show the named class")
    return row | cells | {"change": (change["difference"], change["ci95"]) if change else (None, None)}


def _target_rows(audit: dict, name: str) -> list[dict]:
    """Return the rows of D, uncorrected and, if the judge's errors were counted, corrected."""
    note = "root mean square over prompts; for two classes at parity the gap between their shares"
    paths = {f"{name} D": ("target", "distance")}
    if "corrected" in last_model(audit)["attributes"][name]:
        paths[f"{name} D corr."] = ("corrected", "distance")
    rows = []
    for label, path in paths.items():

        def get(model: dict, path: tuple = path) -> tuple:
            entry = model["attributes"][name].get(path[0], {}).get(path[1])
            return _pair(entry) if entry else (None, None)

        rows.append(
            _row(audit, label, get, floor=0.0, note=note if path[0] == "target" else "corrected for the judge's errors")
        )
    return rows


def _drift_rows(audit: dict, name: str, drift: dict) -> list[dict]:
    """Return the row of the verdict with the change of bias, then one per class (of two classes only the first)."""
    row = _row(
        audit,
        f"{name} within ±{number(drift['margin'], 2)}",
        lambda _: (None, None),
        lambda pair: pair["attributes"][name]["drift"],
        note="change of its bias; the verdict also uses the intervals of the classes' shares",
    )
    few = len(ends_of(drift) or []) > 2
    rows = [row | {"verdict": stayed_of(drift) + (FEW if few else "")}]
    for cls in list(drift["shares"])[: 1 if len(drift["shares"]) == 2 else None]:

        def share(model: dict, cls: str = cls) -> tuple:
            entry = model["attributes"][name]["shares"].get(cls)
            return (entry["share"], ends_of(entry)) if entry else (None, None)

        def moved(pair: dict, cls: str = cls) -> dict | None:
            return pair["attributes"][name]["drift"]["shares"].get(cls)

        rows.append(_row(audit, f"{name}: {cls}", share, moved, note="uncorrected mean share"))
    return rows


def _confidence_row(audit: dict, name: str) -> dict:
    rate = ("attributes", name, "low_confidence")
    note = "faces whose most probable class has a probability below .9"
    return _row(audit, f"{name} low conf.", lambda model: _rate(_at(model, rate)), form=percent, note=note)


def _image_rows(audit: dict) -> list[dict]:
    """Return the rows of numbers that are measured on whole images."""
    several = audit["provenance"]["several_faces"].split(",")[0]
    rows = [
        _row(audit, "no face", lambda m: _rate(m["no_face"]), lambda p: p["no_face"], form=percent),
        _row(audit, "several faces", lambda m: _rate(m["several_faces"]), form=percent, note=several),
        _row(audit, "CLIP-T", lambda m: _pair(m["clip_t"]), lambda p: p["clip_t"], note="similarity of image and prompt"),
    ]
    after = "after" in audit["models"]
    if after:
        note = "similarity of after and before, over pairs"
        rows.append(_row(audit, "CLIP-I", lambda m: _pair(m["clip_i"]), note=note))
        rows.append(_row(audit, "image encoder", lambda m: _pair(m["dino"]), note=f"DINO in the paper; {note}"))
    rows.append(
        _row(
            audit,
            "between seeds",
            lambda m: _pair(m["between_seeds"]),
            lambda p: p["between_seeds"],
            note="variety: 1 − cosine of two images of one prompt",
        )
    )
    if after and audit["without_people"] is not None:
        drift = audit["without_people"]["relative_drift"]
        note = "distance to the image before, divided by the distance between two seeds"
        row = _row(audit, "no people: drift", lambda _: (None, None), note=note)
        rows.append(row | {"after": (drift["value"], drift["ci95"])})
    return rows


def targeted(audit: dict) -> list[str]:
    """Return the attributes with a target."""
    entries = last_model(audit)["attributes"]
    return [name for name in attribute_order(audit) if entries[name]["target"]["requested"]]


def not_measured(audit: dict) -> list[str]:
    """Return a line for each quantity that was not measured although a reader might think so."""
    last = last_model(audit)
    refused = audit["provenance"]["several_faces"] == SEVERAL_REFUSED
    lines = [
        "Identity. Labels are perceived presentation, as a classifier reads it from pictures. Nobody in them has a gender, "
        "race or age to be right or wrong about, and two genders and a few races are a coarse classification.",
        "Pictures of several people." if refused else "Anyone but the largest face of a picture.",
        "Other prompts, guidance scales, samplers and prompt languages than those listed here. An adapter can be fair "
        "at one guidance scale and unfair at another.",
        "Whether different groups are shown alike in dress, pose, setting, dignity or picture quality.",
        "Realism of the pictures (FID or human ratings).",
    ]
    same = audit["judge"].get("same_as_training_judge")
    if same:
        lines.insert(
            0,
            "An independent opinion: the judge of this audit also trained the adapter, so it overstates the result.",
        )
    else:
        known = "not the training judge" if same is False else "perhaps the training judge"
        lines.append(f"Disagreement between judges: a single audit judge ({known}) labelled all pictures.")
    if audit["prompts"] < audit["prompts_needed"]:
        lines.append(
            f"Prompts like these: intervals marked {FEW} and verdicts hold for these {audit['prompts']} prompts with new "
            f"noise. Statements about other prompts need at least {audit['prompts_needed']}."
        )
    else:
        lines.append("A bias that only one prompt in a hundred has: no sample of prompts shows it reliably.")
    raw = [name for name, entry in last["attributes"].items() if "corrected" not in entry]
    if raw:
        why = why_not_corrected(audit, raw)
        lines.append(f"The judge's own error for {', '.join(raw)}: shares are uncorrected, because {why}.")
    if len(raw) < len(last["attributes"]):
        lines.append(
            "Whether the judge makes the same errors on generated faces as on labelled faces: the correction assumes so."
        )
    if "after" in audit["models"] and not audit["provenance"].get("encoders", "").startswith("others"):
        lines.append("Semantics by encoders other than those of the image term of training.")
    if audit["provenance"].get("CLIP", "embedded") != "embedded" and last["clip_t"]["mean"] is not None:
        lines.append(
            "Whether CLIP-T falls because pictures got worse or because they got fairer: CLIP was trained on captioned "
            "photographs with similar biases."
        )
    if any(last[key]["mean"] is None for key in ("clip_t", *(["dino"] if "after" in audit["models"] else []))):
        lines.append("The numbers of an encoder that was not available (shown as –).")
    bystanders = [name for name, entry in last["attributes"].items() if not entry["target"]["requested"]]
    if bystanders:
        lines.append(f"Success for {', '.join(bystanders)}: measured, but without a target.")
    return lines


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with a true minus sign, "–" if it is undefined."""
    return "–" if value is None else f"{value:z.{digits}f}".replace("-", "−")


def count(value: float | None) -> str:
    """Format a count; a mean of counts has one decimal."""
    return "–" if value is None else number(value, 0 if value == int(value) else 1)


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else number(100 * value, digits) + "\u00a0%"


def signed(value: float | None, form=number) -> str:
    """Format a change, always with its sign."""
    return ("+" if value is not None and value >= 0 else "") + form(value)


def interval(ends: list | None, form=number) -> str:
    """Format an interval as [low, high], or "" if it is undefined, with the mark that `ends_of` may have added."""
    return "" if ends is None or ends[0] is None else f"[{form(ends[0])}, {form(ends[1])}]{''.join(ends[2:])}"


def last_model(audit: dict) -> dict:
    """Return the model that the report is about: "after" if it was audited, else "before"."""
    return audit["models"].get("after") or audit["models"]["before"]


def attribute_order(audit: dict) -> list[str]:
    """Return the attributes in their given order, those with a target first."""
    entries = last_model(audit)["attributes"]
    return sorted(entries, key=lambda name: not entries[name]["target"]["requested"])


def _pair(entry: dict) -> tuple:
    return entry["mean"] if "mean" in entry else entry["value"], ends_of(entry)


def _rate(entry: dict) -> tuple:
    return entry["rate"], entry["ci95"]
