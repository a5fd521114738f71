"""Folders for pages and their records: by default outputs/reproduced, with --publish the documentation."""

import argparse
from pathlib import Path

from fairdiff.files import write_bytes

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"  # published pages; only --publish writes here
OWN = ROOT / "outputs" / "reproduced"  # has the same layout as DOCS


def add_place(parser: argparse.ArgumentParser) -> None:
    """Add the options that set args.docs, the folder of the pages and, in `measurements`, of their records."""
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--docs", type=Path, default=OWN, help="folder of the page and its records; default: %(default)s")
    place.add_argument("--publish", dest="docs", action="store_const", const=DOCS, help="write the published page in docs")


def records_in(docs: Path, name: str, seeded: bool = True) -> Path:
    """Return the file or folder of records `name`. seeded: in OWN, missing records are copied from the published ones."""
    kept, published = docs / "measurements" / name, DOCS / "measurements" / name
    if seeded and docs == OWN:
        for file in [published] if published.is_file() else sorted(published.rglob("*.json")):
            own = kept / file.relative_to(published)
            if not own.exists():
                write_bytes(own, file.read_bytes())
    return kept
