"""Write audit.json and report.html again from the records of finished audits.

python scripts/report.py RUN          a run folder (all of its audits), or one audit folder
"""

import argparse
from pathlib import Path

from fairdiff import run
from fairdiff.cli.ending import ending
from fairdiff.cli.main import fail
from fairdiff.errors import FairDiffError


@ending()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="RUN")
    folder = parser.parse_args(argv).folder
    here = folder / "request.json"
    audits = [folder] if here.exists() else sorted(path.parent for path in folder.glob("audits/*/request.json"))
    if not audits:
        parser.error(f"{folder}: found no finished audit, allowed: a run folder or one of its audits/<name>")
    try:
        for audit in audits:
            run.report(audit)
            print(f"report: {audit / 'report.html'}")
    except (FairDiffError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
