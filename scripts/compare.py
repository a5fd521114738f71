"""Finished runs beside each other: a line for each with its intervals, and means over seeds.

python scripts/compare.py outputs/gender                    every run below a folder, such as a sweep's
python scripts/compare.py outputs/a/seed0 outputs/b/seed0   some runs
python scripts/compare.py outputs/gender --picture sweep.png   and a picture: bias against drift
"""

import argparse
from pathlib import Path

from fairdiff.audit.compare import comparison_tables, draw, find_audits
from fairdiff.cli.ending import ending
from fairdiff.cli.main import fail
from fairdiff.errors import FairDiffError
from fairdiff.training.tracking import make_console


@ending()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="folder", help="a run's folder, or one with runs below it")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="to be drawn; needs matplotlib")
    args = parser.parse_args(argv)
    try:
        audits = find_audits(args.folders)
        tables = comparison_tables(audits)
        if args.picture:
            draw(audits, args.picture)
    except ModuleNotFoundError:
        fail(FairDiffError("--picture: matplotlib is not installed, allowed: pip install 'fairdiff[results]'"))
    except (FairDiffError, OSError) as error:
        fail(error)
    console = make_console()
    for table in tables:
        console.print(table)
    console.print("Labels are perceived presentation in pictures, never identity.")


if __name__ == "__main__":
    main()
