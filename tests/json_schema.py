"""A validator of the part of JSON Schema that audit.schema.json uses."""

from typing import Any

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "number": (int, float)}
TYPES |= {"integer": int}
KNOWN = {"type", "properties", "required", "additionalProperties", "items", "minItems", "maxItems", "minimum", "enum"}
KNOWN |= {"const", "anyOf", "$ref", "$defs", "$schema", "title"}


def faults(value: Any, schema: dict, root: dict, place: str = "$") -> list[str]:
    """Return the places at which a value does not match the schema."""
    assert set(schema) <= KNOWN, set(schema) - KNOWN
    if "$ref" in schema:
        return faults(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, place)
    if "anyOf" in schema:
        each = [faults(value, one, root, place) for one in schema["anyOf"]]
        return [] if [] in each else each[0]
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return [f"{place}: is {type(value).__name__}"]
    found = []
    if "const" in schema and value != schema["const"] or "enum" in schema and value not in schema["enum"]:
        found.append(f"{place}: is {value}")
    if isinstance(value, int) and value < schema.get("minimum", value):
        found.append(f"{place}: is {value}")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            found.append(f"{place}: has {len(value)} items")
        found += [f for i, v in enumerate(value) for f in faults(v, schema.get("items", {}), root, f"{place}[{i}]")]
    if isinstance(value, dict):
        found += [f"{place}.{key}: is missing" for key in schema.get("required", []) if key not in value]
        for key, item in value.items():
            below = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
            found += [f"{place}.{key}: is not known"] if below is False else faults(item, below, root, f"{place}.{key}")
    return found


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def closed(schema: Any) -> Any:
    """Return the schema without additional keys, except in `provenance`, which may have any."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(item) for key, item in schema.items()}
    if "properties" in schema and "seed" not in schema["properties"]:
        inner["additionalProperties"] = False
    return inner
