"""Target shares from labour statistics for the titles of the occupations.

`python -m fairdiff.portraits.labour` writes the table, and `target.file=labour` reads it. `distribution.labour_shares` turns
columns of the statistics into our classes; `data/README.md` has their source and year. The statistics have no ages, so age
keeps `target.age`.
"""

import csv
import io
from pathlib import Path

from fairdiff.files import write_text
from fairdiff.portraits import distribution, occupations

FILE = Path(__file__).parent / "data" / "labour.csv"


def table() -> str:
    """Return the text of the CSV: for each title, the gender and race shares of its occupation, rounded to four digits."""
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
