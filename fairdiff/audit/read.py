"""The reader of audit.json: it checks that all values used by tables exist and have the right type, or names the place."""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fairdiff.audit.metrics import SCHEMA
from fairdiff.audit.records import MODELS
from fairdiff.errors import FairDiffError
from fairdiff.files import read_given


@dataclass(frozen=True)
class Each:
    """A mapping with any keys, whose values all have one shape."""

    shape: Any


@dataclass(frozen=True)
class Maybe:
    """A shape whose key may be missing, and with `null` may also have the value null."""

    shape: Any
    null: bool = True


# leaves: the allowed values in words, which error messages quote
NUMBER, COUNT, FLAG, TEXT = "a number or null", "a whole number from 0", "true or false", "text"
REAL, WORDS = "a number", "text or null"
ENDS, VERDICT = "[low, high] or null", "within, beyond or undecided"

# shapes: a leaf, a mapping with at least these keys, or a list whose items have one shape
RATE = {"rate": NUMBER, "ci95": ENDS}
MEAN = {"mean": NUMBER, "ci95": ENDS}
CHANGE = {"difference": NUMBER, "ci95": ENDS}
THESE = {"ci95_these": ENDS}  # numbers from shares have one interval for each of the two estimands
DISTANCE = MEAN | THESE | {"floor": NUMBER, "worst_tenth": {"mean": NUMBER, "floor": NUMBER, "prompts": COUNT}}
D = {"value": NUMBER, "ci95": ENDS} | THESE
TARGET = {
    "requested": FLAG,
    "uniform": FLAG,
    "total_variation": DISTANCE,
    "distance": D,
    "delta": REAL,
    "verdict": VERDICT,
    "verdict_these": VERDICT,
    "reason": WORDS,
}
SHARE = {"share": NUMBER, "ci95": ENDS} | THESE
CORRECTED = {"distance": Maybe(D), "confusion": [[NUMBER]]}
AXIS = {"bias": DISTANCE, "shares": Each(SHARE), "target": TARGET, "corrected": Maybe(CORRECTED, null=False)}
PROMPT = {"prompt": TEXT, "family": TEXT, "counts": Each(COUNT), "target": {"shares": Each(REAL)}}
PROMPT_PARTS = ("attributes", "joint")  # parts of a model with numbers of each prompt
CERTAIN = {"off": COUNT, "open": COUNT, "within": COUNT}
MODEL = {
    "attributes": Each(
        AXIS | {"target": TARGET | {"prompts_certain": CERTAIN}, "low_confidence": RATE, "per_prompt": [PROMPT]}
    ),
    "joint": Each(AXIS | {"per_prompt": [PROMPT]}),
    "families": Each({"attributes": Each(AXIS)}),
    "no_face": RATE,
    "several_faces": RATE,
    **dict.fromkeys(("clip_t", "clip_i", "dino", "between_seeds"), MEAN),
}
CHANGED = dict.fromkeys(("bias", "total_variation", "squared_distance"), CHANGE | THESE)
CHANGED |= {"corrected": Maybe({"squared_distance": CHANGE | THESE}, null=False)}
DRIFT = CHANGE | THESE | {"shares": Each(CHANGE | THESE), "margin": NUMBER}
DRIFT |= {"stayed_within": TEXT, "stayed_within_these": TEXT}
PAIR = {
    "attributes": Each(CHANGED | {"drift": Maybe(DRIFT, null=False)}),
    "joint": Each(CHANGED),
    "families": Each({"attributes": Each(CHANGED)}),
    **dict.fromkeys(("no_face", "clip_t", "between_seeds"), CHANGE),
}
HASHES = {"judge": TEXT, "before": TEXT, "after": Maybe(TEXT)}
AUDIT = {
    "prompts": COUNT,
    "images_per_prompt": COUNT,
    "prompts_needed": COUNT,
    "left_out": [TEXT],
    "judge": {"path": TEXT},
    "attributes": Each([TEXT]),
    "families": Each(COUNT),
    "models": Each(MODEL),
    "paired": Maybe(PAIR),
    "trained": Maybe(PAIR),
    "named": Maybe({"attributes": Each({"kept": Each(MEAN), "change": Maybe(CHANGE)})}),
    "without_people": Maybe({"relative_drift": {"value": NUMBER, "ci95": ENDS}}),
    "provenance": {"target": Maybe(TEXT), "seed": COUNT, "image_size": Maybe(TEXT), "several_faces": TEXT}
    | {"hashes": HASHES},
}


def read_audit(path: Path) -> dict:
    """Return an audit of this version; FairDiffError for any other file."""
    try:
        return whole(read_shape(path, {}), path)
    except FairDiffError as error:
        again = path.parent / "request.json"  # together with the records, it suffices to compute the audit again
        advice = f"; scripts/report.py {path.parent} writes it again from the records" if again.exists() else ""
        raise FairDiffError(f"{error}{advice}") from error


def whole(audit: dict, path: Path) -> dict:
    """Return the audit with None for missing optional parts; FairDiffError, which names `path`, if it is no audit."""
    if audit.get("schema") != SCHEMA:
        raise FairDiffError(f"{path}: is no audit: found schema {_named(audit.get('schema'))}, allowed: {SCHEMA}")
    _check(audit, AUDIT, f"{path}: ")
    audit = {key: None for key, shape in AUDIT.items() if isinstance(shape, Maybe)} | audit
    _check_names(audit, path)
    return audit


def read_shape(path: Path, shape: Any) -> dict:
    """Return the mapping in a JSON file; FairDiffError, which names the place, unless it has at least this shape."""
    try:
        found = json.loads(read_given(path, str(path)))
    except (ValueError, RecursionError) as error:
        why = "too deeply nested" if isinstance(error, RecursionError) else f"no JSON ({error})"
        raise FairDiffError(f"{path}: is no audit: it is {why}") from error
    if not isinstance(found, dict):
        raise FairDiffError(f"{path}: is no audit: found {_named(found)}, allowed: a mapping")
    _check(found, shape, f"{path}: ")
    return found


def _check(found: Any, shape: Any, place: str) -> None:
    """Raise FairDiffError unless the value `found` at `place` has the shape."""
    below = place if place.endswith(": ") else f"{place}."
    match shape:
        case Maybe(shape=inner, null=null):
            if found is not None or not null:
                _check(found, inner, place)
        case str():
            if not _is(found, shape):
                raise FairDiffError(f"{place}: found {_named(found)}, allowed: {shape}")
        case [inner]:
            if not isinstance(found, list):
                raise FairDiffError(f"{place}: found {_named(found)}, allowed: a list")
            for number, item in enumerate(found):
                _check(item, inner, f"{place}[{number}]")
        case _:
            if not isinstance(found, dict):
                raise FairDiffError(f"{place}: found {_named(found)}, allowed: a mapping")
            shapes = dict.fromkeys(found, shape.shape) if isinstance(shape, Each) else shape
            for key, inner in shapes.items():
                if key in found:
                    _check(found[key], inner, f"{below}{key}")
                elif not isinstance(inner, Maybe):
                    raise FairDiffError(f"{below}{key}: is missing, the file is damaged or no audit of this version")


def _is(found: Any, kind: str) -> bool:
    number = isinstance(found, int | float) and not isinstance(found, bool)
    match kind:
        case "a number or null":
            return found is None or _is(found, REAL)
        case "a number":
            return number and -1e300 < found < 1e300  # no NaN, nothing too large
        case "a whole number from 0":
            return number and isinstance(found, int) and found >= 0
        case "true or false":
            return isinstance(found, bool)
        case "text":
            return isinstance(found, str)
        case "text or null":
            return found is None or isinstance(found, str)
        case "within, beyond or undecided":
            return found in ("within", "beyond", "undecided")
    return found is None or (isinstance(found, list) and len(found) == 2 and all(_is(end, NUMBER) for end in found))


def _named(found: Any) -> str:
    """Return the words for a value in an error message: JSON for leaves, the type for mappings and lists."""
    return {dict: "a mapping", list: "a list"}.get(type(found)) or json.dumps(found, ensure_ascii=False)[:60]


def _check_names(audit: dict, path: Path) -> None:
    """Raise FairDiffError unless "before" exists and all parts have its attributes, combinations and families."""
    models = audit["models"]
    if "before" not in models or not {*models} <= {*MODELS}:
        raise FairDiffError(f"{path}: models: found {', '.join(models) or 'none'}, allowed: before, start, after")
    changes = {key: audit[key] for key in ("paired", "trained") if audit[key] is not None}
    wanted = _names(models["before"])
    for place, part in ({f"models.{name}": model for name, model in models.items()} | changes).items():
        if _names(part) != wanted:
            raise FairDiffError(f"{path}: {place}: has other attributes, combinations or families than models.before")
    _check_counts(audit, path)
    drifts = [{name for name in part["attributes"] if "drift" in part["attributes"][name]} for part in changes.values()]
    if drifts and drifts[0] != drifts[-1]:
        raise FairDiffError(f"{path}: trained: has a drift of other attributes than paired")


def _check_counts(audit: dict, path: Path) -> None:
    """Raise FairDiffError unless all models have the same prompts, with counts and a target for the attribute's classes."""
    classes = {name: [*classes] for name, classes in audit["attributes"].items()}
    prompts = None
    for place, model in audit["models"].items():
        for part in PROMPT_PARTS:
            for name, entry in model[part].items():
                some = [classes.get(member, []) for member in name.split("×")]
                wanted = {"×".join(combined) for combined in product(*some)}
                found = [p["prompt"] for p in entry["per_prompt"]]
                prompts = prompts or found
                if found != prompts or any(
                    {*p["counts"]} != wanted or {*p["target"]["shares"]} != wanted for p in entry["per_prompt"]
                ):
                    where = f"models.{place}.{part}.{name}.per_prompt"
                    raise FairDiffError(f"{path}: {where}: has other prompts than before or other classes than {name}")


def _names(part: dict) -> list:
    families = {family: {*entry["attributes"]} for family, entry in part["families"].items()}
    return [{*part["attributes"]}, {*part["joint"]}, families]
