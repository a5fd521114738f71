"""Print the signed gaps of occupations before and after debiasing, and whether runs leave the same occupations uneven.

python scripts/signed_gaps.py outputs/gender/default/seed0 outputs/gender/default/seed1

Each folder is a run or one of its audits. The signed gap of an occupation is its share of faces of the first class minus
that of the second, in [-1, 1], by perceived presentation. For each run, the command fits the least-squares line after = a +
b before over occupations, and prints b and the standard deviation of the residuals r. For each pair of runs it prints the
correlation of r, and the correlation of r from disjoint halves of the images, which share no noise (the even images of one
run with the odd ones of the other, and vice versa).
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from fairdiff.cli.ending import ending
from fairdiff.cli.main import fail


def signed_gaps(records: pd.DataFrame, attribute: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return by occupation [P] the gap before, and a list of gaps after: in all images, in the even and in the odd ones.

    Raises ValueError unless `attribute` has two classes.
    """
    classes = Counter(c.split(".")[1] for c in records if c.startswith("p."))
    if classes[attribute] != 2:
        two = ", ".join(a for a, k in classes.items() if k == 2) or "none here"
        raise ValueError(f"--attribute {attribute}: has {classes[attribute]} classes; allowed, with two: {two}")
    first, second = (c for c in records if c.startswith(f"p.{attribute}."))
    faces = records[records.people & (records.names == "") & records.found].sort_values("prompt")
    faces = faces.assign(gap=np.sign(faces[first] - faces[second]), half=faces.image_index % 2)
    before, after = (faces[faces.model == model] for model in ("before", "after"))
    parts = [after, after[after.half == 0], after[after.half == 1]]
    return before.groupby("prompt").gap.mean().to_numpy(), [p.groupby("prompt").gap.mean().to_numpy() for p in parts]


def records_of(folder: Path) -> Path:
    """Return the records file of an audit folder, or of a run folder with one audit. ValueError for any other folder."""
    if (folder / "records.parquet").exists():
        return folder / "records.parquet"
    found = sorted(folder.glob("audits/*/records.parquet"))
    if len(found) != 1:
        names = "".join(f", {path.parent}" for path in found)
        raise ValueError(f"{folder}: found {len(found)} audits, allowed: a run with one, or the folder of an audit{names}")
    return found[0]


def residuals(before: np.ndarray, after: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the slope of the least-squares line after = a + b before, and the residuals [P]."""
    slope, offset = np.polyfit(before, after, 1)
    return float(slope), after - offset - slope * before


@ending()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="folder", help="of a finished run, before and after")
    parser.add_argument("--attribute", default="gender")
    args = parser.parse_args(argv)
    found = {}
    for folder in args.folders:
        try:
            before, parts = signed_gaps(pd.read_parquet(records_of(folder)), args.attribute)
        except (OSError, ValueError) as error:
            fail(error)
        fits = [residuals(before, part) for part in parts]
        found[folder] = [rest for _, rest in fits]
        print(f"{folder}: slope {fits[0][0]:.2f}, residuals {fits[0][1].std(ddof=1):.3f}, {len(before)} occupations")
    for number, (one, (whole, even, odd)) in enumerate(found.items()):
        for two, (other, other_even, other_odd) in list(found.items())[number:]:
            halves = (np.corrcoef(even, other_odd)[0, 1] + np.corrcoef(odd, other_even)[0, 1]) / 2
            print(f"{one}, {two}: {np.corrcoef(whole, other)[0, 1]:.2f}, between disjoint halves {halves:.2f}")


if __name__ == "__main__":
    main()
