"""Where pages of numbers and the records they are made of go: a folder of the user's own, or the documentation."""

import argparse
from pathlib import Path

from fairdiff.files import write_bytes

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"  # what is published; only --publish writes here
OWN = ROOT / "outputs" / "reproduced"  # of the shape of DOCS


def add_place(parser: argparse.ArgumentParser) -> None:
    """The options that set args.docs: the folder of the pages, and of their records in `measurements`."""
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--docs", type=Path, default=OWN, help="folder of the page and its records; default: %(default)s")
    place.add_argument("--publish", dest="docs", action="store_const", const=DOCS, help="write the published page in docs")


def records_in(docs: Path, name: str, seeded: bool = True) -> Path:
    """The file or folder of records `name`. seeded: in OWN, published records are copied to where it has none."""
    kept, published = docs / "measurements" / name, DOCS / "measurements" / name
    if seeded and docs == OWN:
        for file in [published] if published.is_file() else sorted(published.rglob("*.json")):
            own = kept / file.relative_to(published)
            if not own.exists():
                write_bytes(own, file.read_bytes())
    return kept
