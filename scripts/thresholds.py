"""Equalise a classifier's error rates over groups by randomised thresholds for each group.

python scripts/thresholds.py labelled.csv                                 columns group, score, label (1: the class)
python scripts/thresholds.py labelled.csv --constraint odds --tolerance .02
python scripts/thresholds.py labelled.csv --audit AUDIT --score gender.female --group race        also relabel an audit

The thresholds minimise the errors under the constraint that the groups' rates differ by at most the tolerance. The command
writes thresholds.json. With an audit folder it also prints the mean share of the class before and after, where the groups
are the predicted classes of another attribute.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from reproduce.numbers import mean_interval

from fairdiff.audit.records import load_records
from fairdiff.audit.wording import interval, number
from fairdiff.cli.ending import ending
from fairdiff.cli.main import fail
from fairdiff.errors import FairDiffError
from fairdiff.files import read_given, write_json
from fairdiff.studies.error_rates import CONSTRAINTS, Group, fair_thresholds, judged, rates, roc

DRAWS = 200  # resamples of the labelled faces


def read_labelled(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return group -> (scores, labels). FairDiffError for a missing column or an invalid cell."""
    rows = list(csv.DictReader(read_given(path, str(path)).splitlines()))
    found: dict[str, list[tuple[float, int]]] = {}
    for number_, row in enumerate(rows, 2):
        try:
            cell = float(row["score"]), {"0": 0, "1": 1}[row["label"].strip()]
            if not np.isfinite(cell[0]):
                raise ValueError
            found.setdefault(row["group"], []).append(cell)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            wanted = "columns group, score (a number) and label (0 or 1)"
            raise FairDiffError(f"{path}, line {number_}: found {dict(row)}, allowed: {wanted}") from error
    if not found:
        raise FairDiffError(f"{path}: holds no labelled faces")
    return {name: tuple(np.array(column) for column in zip(*cells, strict=True)) for name, cells in found.items()}


def groups_of(faces: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Group]:
    total = sum(len(label) for _, label in faces.values())
    return {name: roc(score, label, total) for name, (score, label) in faces.items()}


def gaps(faces: dict, weights: dict[str, np.ndarray], groups: dict[str, Group]) -> dict[str, float]:
    """Return the largest difference between groups in each rate, and the error rate, with these thresholds."""
    found = {}
    for name, (score, label) in faces.items():
        said = (score[:, None] >= groups[name].thresholds) @ weights[name]
        found[name] = [said[label == 1].mean(), said[label == 0].mean(), said.mean(), np.abs(said - label).mean()]
    table = np.array([*found.values()])
    spread = table[:, :3].max(0) - table[:, :3].min(0)
    mass = np.array([groups[name].mass for name in found])
    return dict(zip(("tpr", "fpr", "positive", "errors"), [*map(float, spread), float(mass @ table[:, 3])], strict=True))


def fitted(faces: dict, constraint: str, tolerance: float, seed: int) -> dict:
    """Return thresholds, rates, gaps, and expected gaps in new faces with their intervals.

    The latter come from thresholds fitted on one random half of the faces and measured on the other, DRAWS times."""
    groups, rng = groups_of(faces), np.random.default_rng(seed)
    weights = fair_thresholds(groups, constraint, tolerance)
    others: dict[str, list[float]] = {}
    for _ in range(DRAWS):
        order = {name: rng.permutation(len(label)) for name, (_, label) in faces.items()}
        one, two = (
            {n: (s[order[n][k::2]], label[order[n][k::2]]) for n, (s, label) in faces.items()} for k in (0, 1)
        )
        try:
            half = groups_of(one)
            groups_of(two)
        except FairDiffError:  # a half without both labels
            continue
        for key, value in gaps(two, fair_thresholds(half, constraint, tolerance), half).items():
            others.setdefault(key, []).append(value)
    return {
        "constraint": constraint,
        "tolerance": tolerance,
        "thresholds": {
            name: [
                [float(t) if np.isfinite(t) else None, float(w)]  # null: no face is positive
                for t, w in zip(g.thresholds, weights[name], strict=True)
                if w > 1e-9
            ]
            for name, g in groups.items()
        },
        "rates": {name: rates(groups[name], weights[name]) for name in groups},
        "gaps": gaps(faces, weights, groups),
        "gaps_in_new_faces": {key: [float(np.quantile(v, q)) for q in (0.5, 0.025, 0.975)] for key, v in others.items()},
    }


def relabelled(folder: Path, score: str, group: str, faces: dict, weights: dict[str, np.ndarray], seed: int) -> list[str]:
    """Return lines with the mean share of the class over prompts, at a threshold of .5 and by the fitted thresholds."""
    rows = load_records(folder / "records.parquet")
    rows = rows[rows.people & rows.found & (rows.names == "")]
    columns = [c for c in rows if c.startswith(f"p.{group}.")]
    if f"p.{score}" not in rows or not columns:
        raise FairDiffError(f"{folder}: has no {score} or {group}, allowed: attribute.class and attribute of the judge")
    groups, said = groups_of(faces), np.full(len(rows), -1)
    names, rng = np.array([c.split(".", 2)[2] for c in columns]), np.random.default_rng(seed)
    own = names[rows[columns].to_numpy().argmax(1)]
    if unknown := sorted(set(own) - set(groups)):
        raise FairDiffError(f"{folder}: found faces of {unknown[0]}, allowed: of the labelled groups {', '.join(groups)}")
    values = rows[f"p.{score}"].to_numpy(float)
    for name in groups:
        said[own == name] = judged(values[own == name], weights[name], groups[name], rng)
    lines = []
    for model in rows.model.unique():
        at = (rows.model == model).to_numpy()
        for how, labels in (("at .5", values >= 0.5), ("by the thresholds", said)):
            shares = rows.assign(said=labels)[at].groupby("prompt").said.mean().to_numpy(float)
            ends = interval(list(mean_interval(shares, seed=seed)))
            lines.append(f"{model}, {score} {how}: {number(float(shares.mean()))} {ends}")
    return lines


@ending()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labelled", type=Path)
    parser.add_argument("--constraint", choices=CONSTRAINTS, default="odds")
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest difference of the rates")
    parser.add_argument("--audit", type=Path, metavar="AUDIT", help="an audit's folder, whose records are labelled anew")
    parser.add_argument("--score", default="gender.female", metavar="ATTRIBUTE.CLASS")
    parser.add_argument("--group", default="race", metavar="ATTRIBUTE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, default=Path("outputs", "thresholds.json"))
    args = parser.parse_args(argv)
    try:
        if not 0 <= args.tolerance <= 1:
            raise FairDiffError(f"--tolerance: found {args.tolerance:g}, allowed: 0 to 1")
        faces = read_labelled(args.labelled)
        found = fitted(faces, args.constraint, args.tolerance, args.seed)
        write_json(args.to, found)
        for key, value in found["gaps"].items():
            new = found["gaps_in_new_faces"].get(key)
            print(f"{key}: {number(value)}" + (f"; in new faces {number(new[0])} {interval(new[1:])}" if new else ""))
        if args.audit:
            weights = fair_thresholds(groups_of(faces), args.constraint, args.tolerance)
            print("\n".join(relabelled(args.audit, args.score, args.group, faces, weights, args.seed)))
    except (FairDiffError, OSError) as error:
        fail(error)
    print(f"thresholds: {args.to}")


if __name__ == "__main__":
    main()
