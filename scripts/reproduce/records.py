"""Small records with the numbers of an audit for docs/results.md, kept beside the page; a clone adds its own runs."""

import json
from collections.abc import Iterable
from pathlib import Path

from fairdiff.files import write_text
from reproduce.plan import Run

AXES = ("gender", "race", "age", "gender×race")


def keep_record(run: Run, root: Path, records: Path) -> None:
    """Write the record of a run whose audit is below `root`."""
    kept = record(json.loads(run.audit(root).read_text(encoding="utf-8"))) | {"overrides": run.overrides}
    text = json.dumps(kept, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    write_text(run.record(records), text + "\n")


def read_records(runs: Iterable[Run], records: Path) -> dict[Run, dict]:
    """Return the existing records of these runs, without records of other overrides, such as another number of images."""
    found = {run: json.loads(run.record(records).read_text(encoding="utf-8")) for run in runs if run.record(records).exists()}
    return {run: kept for run, kept in found.items() if tuple(kept["overrides"]) == run.overrides}


def without_record(runs: list[Run], records: Path) -> list[Run]:
    """Return the runs that have no record of these overrides."""
    measured = read_records(runs, records)
    return [run for run in runs if run not in measured]


def record(audit: dict) -> dict:
    """Return the parts of audit.json that the page shows, in the same structure, with numbers to six decimals."""
    kept = {key: audit[key] for key in ("prompts", "images_per_prompt", "families")}
    kept["provenance"] = {key: audit["provenance"][key] for key in ("seed", "sampling_dtype", "target", "hashes")}
    kept["models"] = {name: _model(model) for name, model in audit["models"].items()}
    kept["named"] = audit["named"] and {name: e["kept"] for name, e in audit["named"]["attributes"].items()}
    if audit["paired"]:
        kept["paired"] = {"clip_t": audit["paired"]["clip_t"]}
        kept["without_people"] = {key: audit["without_people"][key] for key in ("relative_drift", "false_face")}
    return _rounded(kept)


def _model(model: dict) -> dict:
    kept = {group: {a: _axis(model[group][a]) for a in model[group] if a in AXES} for group in ("attributes", "joint")}
    return kept | {"no_face": model["no_face"], "clip_i": model["clip_i"], "dino": model["dino"]}


def _axis(axis: dict) -> dict:
    rows = [
        {
            "family": p["family"],
            "bias": {key: p["bias"][key] for key in ("value", "floor")},
            "target": {key: p["target"][key] for key in ("total_variation", "floor")},
        }
        for p in axis["per_prompt"]
    ]
    return ({"low_confidence": axis["low_confidence"]} if "low_confidence" in axis else {}) | {
        "bias": {key: axis["bias"][key] for key in ("mean", "ci95", "ci95_these", "floor")},
        "target": {"requested": axis["target"]["requested"]},
        "shares": {cls: {k: entry[k] for k in ("share", "ci95", "ci95_these")} for cls, entry in axis["shares"].items()},
        "per_prompt": rows,
    }


def _rounded(value):
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
