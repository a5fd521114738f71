"""The JSON schema of audit.json (draft 2020-12), which scripts/reference.py writes to docs/reference/audit.schema.json.

Objects may have further keys: a later version with the same schema number may add keys, but removes none.
"""

from fairdiff.audit.metrics import SCHEMA
from fairdiff.audit.records import MODELS

NUMBER: dict = {"type": ["number", "null"]}
COUNT: dict = {"type": "integer", "minimum": 0}
FLAG: dict = {"type": "boolean"}
TEXT: dict = {"type": "string"}
MAYBE_TEXT: dict = {"type": ["string", "null"]}
ENDS: dict = {"type": ["array", "null"], "items": NUMBER, "minItems": 2, "maxItems": 2}
VERDICT: dict = {"enum": ["within", "beyond", "undecided"]}
STAYED: dict = {"enum": ["yes", "no", "cannot tell"]}


def _object(required: dict, optional: dict | None = None) -> dict:
    return {"type": "object", "properties": required | (optional or {}), "required": [*required]}


def _each(schema: dict) -> dict:
    return {"type": "object", "additionalProperties": schema}


def _list(schema: dict) -> dict:
    return {"type": "array", "items": schema}


def _ref(name: str) -> dict:
    return {"$ref": f"#/$defs/{name}"}


def _or_null(schema: dict) -> dict:
    return {"anyOf": [schema, {"type": "null"}]}


def _interval_of(value: str, both: bool = True) -> dict:
    """Return the properties of a number with this name and its intervals, for both estimands or only one."""
    return {value: NUMBER, "ci95": ENDS} | ({"ci95_these": ENDS} if both else {})


AT_ONCE: dict = {"ci95_all": ENDS, "ci95_all_these": ENDS}  # intervals that hold for all classes at once
CERTAIN: dict = {"off": COUNT, "open": COUNT, "within": COUNT, "corrected": FLAG, "reason": MAYBE_TEXT}
STATE: dict = {"enum": ["off", "open", "within"]}


def _prompt() -> dict:
    return _object(
        {"prompt_index": COUNT, "prompt": TEXT, "subject": TEXT, "family": TEXT, "images": COUNT, "faces": COUNT}
        | {"counts": _each(COUNT), "shares": _each(_object(_interval_of("share", False)))}
        | {
            "bias": _object(
                _interval_of("value", False) | {"floor": NUMBER, "missing_face_bounds": ENDS}, {"corrected_ci95": ENDS}
            ),
            "target": _object(
                {"shares": _each(NUMBER)}
                | {"distance": _object({"value": NUMBER, "ci95_all": ENDS, "state": STATE})}
                | dict.fromkeys(("total_variation", "floor", "p", "p_holm"), NUMBER)
            ),
        }
    )


def _definitions() -> dict[str, dict]:
    plug_in = _interval_of("mean") | {"floor": NUMBER}
    worst = {"worst_tenth": _object({"mean": NUMBER, "floor": NUMBER, "prompts": COUNT}), "maximum": NUMBER}
    bias = plug_in | worst | {"sd_over_prompts": NUMBER, "missing_face_bounds": ENDS, "prompts": COUNT}
    share = _interval_of("share") | {"ratio": _object(_interval_of("value") | AT_ONCE | {"flagged": FLAG})}
    change = _object(_interval_of("difference"))
    axis = {"bias": _object(bias), "shares": _each(_object(share)), "target": _ref("target")}
    corrected = {name: _object(plug_in) for name in ("bias", "total_variation")}
    corrected |= {"shares": _each(_object(share)), "distance": _object(_interval_of("value"))}
    grouped = {"attributes": _each(_ref("axis")), "joint": _each(_ref("axis"))}
    changes = {"attributes": _each(_ref("change")), "joint": _each(_ref("change"))}
    means = {key: _object(_interval_of("mean", False)) for key in ("clip_t", "clip_i", "dino", "between_seeds")}
    steps = {key: _object(_interval_of("difference", False)) for key in ("no_face", "clip_t", "between_seeds")}
    counted = _object(_interval_of("rate", False) | {"images": COUNT})
    wording = _object({"prompts": _each(_list(TEXT)), "shares": _each(NUMBER)})
    return {
        "target": _object(
            {"shares": _each(NUMBER), "requested": FLAG, "uniform": FLAG, "total_variation": _object(plug_in | worst)}
            | {"distance": _object(_interval_of("value")), "delta": NUMBER, "corrected": FLAG}
            | {"verdict": VERDICT, "verdict_these": VERDICT, "reason": MAYBE_TEXT},
            {"prompts_rejected": COUNT, "prompts_certain": _object(CERTAIN, {"images_for_within": _or_null(COUNT)})},
        ),
        "axis": _object(
            axis,
            {"corrected": _object({"refused": MAYBE_TEXT, "confusion": _list(_list(NUMBER))}, corrected)}
            | {"per_prompt": _list(_ref("prompt")), "low_confidence": _object(_interval_of("rate", False))}
            | {"wordings": _object({"range": _each(ENDS), "each": _list(wording)})},
        ),
        "prompt": _prompt(),
        "model": _object(
            {"images": COUNT}
            | grouped
            | {"families": _each(_object({"prompts": COUNT} | grouped)), "no_face": counted, "several_faces": counted}
            | means
        ),
        "change": _object(
            {"bias": change, "total_variation": change, "squared_distance": change},
            {"corrected": _object({"squared_distance": change}), "class_changed": NUMBER}
            | {
                "drift": _object(
                    _interval_of("difference")
                    | {"shares": _each(_object(_interval_of("difference") | AT_ONCE))}
                    | {"margin": NUMBER, "stayed_within": STAYED, "stayed_within_these": STAYED}
                )
            },
        ),
        "changes": _object({"pairs": COUNT} | changes | {"families": _each(_object(changes))} | steps),
    }


def _named() -> dict:
    kept = _object(
        {"kept": _each(_object(_interval_of("mean", False))), "classes": _each(_each(NUMBER))},
        {"change": _object(_interval_of("difference", False))},
    )
    prompts = _list(_object({"prompt": TEXT, "subject": TEXT, "names": TEXT}))
    return _object({"prompts": COUNT, "images_per_prompt": COUNT, "attributes": _each(kept), "per_prompt": prompts})


def _without_people() -> dict:
    prompt = {"prompt_index": COUNT, "prompt": TEXT, "subject": TEXT, "drift": NUMBER, "between_seeds": NUMBER}
    mean = _object(_interval_of("mean", False))
    return _object(
        {"prompts": COUNT, "images_per_prompt": COUNT, "drift": mean, "between_seeds": mean}
        | {"relative_drift": _object(_interval_of("value", False))}
        | {"false_face": _each(_object(_interval_of("rate", False))), "per_prompt": _list(_object(prompt))}
    )


def _guidance() -> dict:
    found = _object(_interval_of("mean") | {"floor": NUMBER})
    attribute = _object({"bias": found, "total_variation": found})
    return _list(_object({"scale": NUMBER, "models": _each(_each(attribute))}))


def schema() -> dict:
    """Return the JSON schema of audit.json."""
    top = {
        "schema": {"const": SCHEMA},
        "prompts": COUNT,
        "images_per_prompt": COUNT,
        "prompts_needed": COUNT,
        "left_out": _list(TEXT),
        "judge": _object(
            {"path": TEXT}, {"same_as_training_judge": FLAG, "not_corrected": TEXT, "prompts": {}, "wordings": {}}
        ),
        "attributes": _each({"type": "array", "items": TEXT, "minItems": 2}),
        "families": _each(COUNT),
        "models": _object({"before": _ref("model")}, {model: _ref("model") for model in MODELS}),
        "paired": _or_null(_ref("changes")),
        "trained": _or_null(_ref("changes")),
        "named": _or_null(_named()),
        "without_people": _or_null(_without_people()),
        "guidance": _or_null(_guidance()),
        "sample_size": _object({"half_width_0.10": COUNT, "prompts": COUNT, "images_per_prompt": _each(NUMBER)}),
        "provenance": {
            "type": "object",
            "properties": {
                "seed": COUNT,
                "hashes": _each(TEXT),
                "several_faces": TEXT,
                "labels": TEXT,
                "pictures_unreadable": _each(TEXT),
                "prompts_left_out": _list(TEXT),
            },
            "required": ["seed", "hashes", "several_faces", "labels"],
        },
        "estimands": _each(TEXT),
    }
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"{SCHEMA}: audit.json of FairDiff"}
    return head | _object(top) | {"$defs": _definitions()}
