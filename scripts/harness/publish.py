"""What the commands of studies do at their end: from the record that is kept to the pages."""

import json
from pathlib import Path

from reproduce.place import records_in

from fairdiff.errors import FairDiffError
from fairdiff.files import write_json
from fairdiff.studies.page import Page, write_html, write_markdown


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
