"""Shared options of the study commands, and their last part: write the pages from the record."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from reproduce.place import ROOT, add_place, records_in

from fairdiff.cli.main import fail
from fairdiff.errors import FairDiffError
from fairdiff.files import write_json
from fairdiff.studies.page import Page, write_html, write_markdown


def add_study(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options of every study: its folder below outputs, the place of its page, and --render."""
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / name, help="of its report; default: %(default)s")
    add_place(parser)
    parser.add_argument("--render", action="store_true", help="measure nothing")


def conclude(
    args: argparse.Namespace, name: str, measure: Callable[[Path], bool | None], made: Callable[[dict], Page]
) -> None:
    """Measure into the study's record unless --render is given, and write its pages. Errors of the user end with one line.

    measure: writes the record to this path. It returns False if another process completes it and writes the pages.
    """
    try:
        kept = record_of(args.docs, name)
        if not args.render and measure(kept) is False:
            return
        found = read_record(kept)
        report = publish(made(found), found, name, args.docs, args.folder)
    except (FairDiffError, OSError) as error:
        fail(error)
    print(f"report: {report}")


def record_of(docs: Path, name: str) -> Path:
    """Return the file with a study's numbers for its page."""
    return records_in(docs, f"studies/{name}.json")


def read_record(file: Path) -> dict:
    """Read the record. FairDiffError if nothing was measured yet."""
    if not file.exists():
        raise FairDiffError(f"{file}: no such file, allowed: one that this command has written; leave out --render")
    return json.loads(file.read_text(encoding="utf-8"))


def publish(page: Page, found: dict, name: str, docs: Path, folder: Path) -> Path:
    """Write studies/<name>.md in docs, and <name>.html and <name>.json in the folder; return the path of the HTML."""
    write_markdown(page, docs / "studies" / f"{name}.md")
    write_json(folder / f"{name}.json", found)
    report = folder / f"{name}.html"
    write_html(page, report)
    return report
