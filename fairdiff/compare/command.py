"""Compare finished audits of a sweep, of several models or of several seeds in a table, on a page and in a picture."""

import argparse
import os
import shlex
from pathlib import Path

from fairdiff.cli.ending import ending
from fairdiff.cli.main import fail
from fairdiff.compare.audits import find_audits
from fairdiff.compare.charts import draw
from fairdiff.compare.numbers import compared
from fairdiff.compare.page import page
from fairdiff.compare.table import comparison_table
from fairdiff.errors import FairDiffError
from fairdiff.files import write_json
from fairdiff.studies.page import write_html
from fairdiff.training.tracking import make_console

NAME = "comparison"  # stem of the written files


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("fairdiff-compare", description=__doc__)
    what = "a run's or an audit's folder, or one with runs below it, such as a sweep's"
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help=what)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="one of them: the reference; default: the first")
    where = f"of {NAME}.html and {NAME}.json; default: the folder that holds all FOLDERs"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=where)
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="the frontier, too; needs matplotlib")
    return parser.parse_args(argv)


@ending()
def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    try:
        audits = find_audits(args.folders)
        below = {audit.folder for audit in find_audits([args.against])} if args.against else set()
        against = [audit for audit in audits if audit.folder in below]
        if args.against and not against:
            raise FairDiffError(f"--against: found {args.against}, allowed: one of the compared folders")
        found = compared(audits, against)
        out = args.out or Path(os.path.commonpath([folder.absolute() for folder in args.folders]))
        write_json(out / f"{NAME}.json", found)
        words = [*map(str, args.folders), *(["--against", str(args.against)] if args.against else [])]
        write_html(page(found, shlex.join(["fairdiff-compare", *words])), out / f"{NAME}.html")
        if args.picture:
            draw(found, args.picture)
    except ModuleNotFoundError:
        fail(FairDiffError("--picture: matplotlib is not installed, allowed: pip install 'fairdiff[results]'"))
    except (FairDiffError, OSError) as error:
        fail(error)
    console = make_console()
    console.print(comparison_table(found))
    console.print("Labels are perceived presentation in pictures, never identity.")
    print(f"report: {out / f'{NAME}.html'}", flush=True)
