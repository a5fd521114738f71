"""Labour-statistics targets for the titles of the occupations.

`python -m fairdiff.portraits.labour` writes the table, `target.file=labour` reads it. How the statistic's columns become
our classes: `distribution.labour_shares`; its source and year: `data/README.md`. Age is in no column of the statistic, so it
keeps `target.age`.
"""

import csv
import io
from pathlib import Path

from fairdiff.files import write_text
from fairdiff.portraits import distribution, occupations

FILE = Path(__file__).parent / "data" / "labour.csv"


def table() -> str:
    """The CSV's text: a row per title, shares of gender and race of its occupation rounded to four digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    shares = [distribution.labour_shares(occupations.occupation_of(title)) for title in occupations.TITLES]
    writer.writerow(["subject"] + [f"{name}.{cls}" for name in shares[0] for cls in occupations.CLASSES[name]])
    for title, row in zip(occupations.TITLES, shares, strict=True):
        writer.writerow([title] + [f"{share:.4f}" for name in row for share in row[name]])
    return text.getvalue()


if __name__ == "__main__":
    write_text(FILE, table())
    print(FILE)
