"""What the commands of studies have in common: where their pages go, and their end, from the record to the pages."""

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
    """The options of every study: its folder below outputs, the place of its page, and to measure nothing."""
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / name, help="of its report; default: %(default)s")
    add_place(parser)
    parser.add_argument("--render", action="store_true", help="measure nothing")


def conclude(
    args: argparse.Namespace, name: str, measure: Callable[[Path], bool | None], made: Callable[[dict], Page]
) -> None:
    """Measure into the study's record unless --render, then make its pages of it; what a user can mend ends as one line.

    measure: writes the record at this path; False where that is not all, and another process makes the pages.
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
    """The file in which a study keeps what its page needs."""
    return records_in(docs, f"studies/{name}.json")


def read_record(file: Path) -> dict:
    """The record; FairDiffError before anything was measured."""
    if not file.exists():
        raise FairDiffError(f"{file}: no such file, allowed: one that this command has written; leave out --render")
    return json.loads(file.read_text(encoding="utf-8"))


def publish(page: Page, found: dict, name: str, docs: Path, folder: Path) -> Path:
    """studies/<name>.md in docs, and in the folder <name>.html, which is returned, and <name>.json."""
    write_markdown(page, docs / "studies" / f"{name}.md")
    write_json(folder / f"{name}.json", found)
    report = folder / f"{name}.html"
    write_html(page, report)
    return report
