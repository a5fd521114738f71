"""Compare two attribute classifiers on the same images: how often they disagree, and the audit's numbers under both.

python scripts/two_judges.py ONE/audits/NAME OTHER/audits/NAME

The two audits have the same model, adapter, prompts and noise, and differ in audit.judge. Labels are perceived presentation.
A result that holds under one classifier only may be an effect of that classifier. [Brackets] are 95 % intervals for these
prompts with new noise.
"""

import argparse
import math
from pathlib import Path

import pandas as pd

from classifiers.agreement import agreement
from fairdiff.audit import suite
from fairdiff.audit.read import read_audit
from fairdiff.audit.records import load_records, probability_columns
from fairdiff.cli.ending import ending
from fairdiff.cli.main import fail, told
from fairdiff.errors import FairDiffError

IMAGE = ["model", "prompt", "image_index", "seed"]


def paired(one: Path, other: Path) -> pd.DataFrame:
    """Return a row for each image of people, with the columns of both audits (_x, _y). FairDiffError if images differ."""
    parts = [load_records(folder / "records.parquet") for folder in (one, other)]
    parts = [rows[rows.people & (rows.names == "")] for rows in parts]
    both = parts[0].merge(parts[1], on=IMAGE)
    made = (both.model_hash_x == both.model_hash_y).all()
    if not len(both) or not made or len(both) != max(map(len, parts)):
        raise FairDiffError(
            f"{other}: its images are others than those of {one} ({len(both)} of {max(map(len, parts))} in common"
            f"{'' if made else ', made by another model'}); allowed: audits that differ in audit.judge only"
        )
    return both


def disagreement(rows: pd.DataFrame, name: str, classes: tuple[str, ...], seed: int) -> dict:
    """Return the mean over prompts of the share of faces with different labels and its interval, the number of faces, and
    the pairs of classes whose labels may be swapped."""
    columns = probability_columns({name: classes})
    faces = rows[rows.found_x & rows.found_y]
    probs = [faces[[f"{column}_{side}" for column in columns]].to_numpy() for side in "xy"]
    differ = pd.Series(probs[0].argmax(1) != probs[1].argmax(1), index=faces.index)
    by_prompt = differ.groupby(faces.prompt).agg(["mean", "size"])
    smoothed = (by_prompt["mean"] * by_prompt["size"] + 0.5) / (by_prompt["size"] + 1)  # so 0 seen is not variance 0
    variance = smoothed * (1 - smoothed) / by_prompt["size"]
    found = suite.mean_over_prompts(by_prompt["mean"], variance, (0.0, 1.0), seed)
    result = agreement(*probs)
    pairs = [f"{classes[i]} as {classes[j]}" for i, j in result.renamed] if result.at_odds else []
    return found | {"faces": len(faces), "renamed": pairs}


def number(entry: dict | None, key: str) -> str:
    """Return as text a value and its interval for these prompts."""
    if entry is None or entry.get(key) is None:
        return "undefined"
    low, high = entry["ci95_these"]
    return f"{entry[key]:.3f} [{low:.3f}, {high:.3f}]" if low is not None else f"{entry[key]:.3f}"


def numbers(entry: dict) -> dict[str, str]:
    """Return bias, D and shares of one attribute of an audit as classified, and D corrected for the classifier's errors."""
    corrected = entry.get("corrected") or {}
    undone = number(corrected.get("distance"), "value") if corrected.get("distance") else "judge never measured"
    lines = {"bias": number(entry["bias"], "mean"), "D as judged": number(entry["target"]["distance"], "value")}
    lines |= {"D corrected": undone, "verdict": entry["target"]["verdict"]}
    return lines | {f"share {cls}": number(share, "share") for cls, share in entry["shares"].items()}


def report(one: Path, other: Path) -> list[str]:
    """Return lines: for each model and attribute of both audits the disagreement, then each number under both."""
    audits, rows = [read_audit(folder / "audit.json") for folder in (one, other)], paired(one, other)
    names = [audit["judge"]["path"] for audit in audits]
    lines = [f"judges: {names[0]} | {names[1]}"]
    if rows.judge_hash_x.iloc[0] == rows.judge_hash_y.iloc[0]:
        raise FairDiffError(f"{other}: has the judge of {one}, allowed: another audit.judge")
    for model in dict.fromkeys(rows.model):
        here = rows[rows.model == model]
        entries = [audit["models"][model]["attributes"] for audit in audits]
        for name, classes in audits[0]["attributes"].items():
            if audits[1]["attributes"].get(name) != classes:
                continue
            found = disagreement(here, name, tuple(classes), audits[0]["provenance"]["seed"])
            low, high = found["ci95_these"]
            known = "no face" if math.isnan(found["mean"]) else f"{found['mean']:.3f} [{low:.3f}, {high:.3f}]"
            lines.append(f"\n{model}, {name}: they disagree on {known} of {found['faces']} faces")
            if found["renamed"]:
                lines.append(f"  at odds: labels may be swapped ({', '.join(found['renamed'])})")
            first, second = (numbers(entry[name]) for entry in entries)
            lines += [f"  {key:<18} {first[key]:<24} | {second[key]}" for key in first]
    return lines


@ending()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("one", type=Path, help="the folder of an audit, with audit.json and records.parquet")
    parser.add_argument("other", type=Path)
    args = parser.parse_args(argv)
    try:
        print("\n".join(report(args.one, args.other)))
    except Exception as error:
        fail(told(error))


if __name__ == "__main__":
    main()
