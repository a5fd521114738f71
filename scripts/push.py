"""Upload a run's adapter with its model card, its audit.json and its report to the Hugging Face hub.

python scripts/push.py RUN you/fair-adapter               needs a token: `hf auth login`
python scripts/push.py RUN you/fair-adapter --dry-run     list the files without uploading them
"""

import argparse
from pathlib import Path

from fairdiff import hub
from fairdiff.cli.ending import ending
from fairdiff.cli.main import fail
from fairdiff.errors import FairDiffError


@ending()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder of train.py")
    parser.add_argument("repo", metavar="REPO", help="you/name")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    try:
        files = hub.files_of(args.run)
        hub.require_name(args.repo, "repo")
        if not args.dry_run:
            hub.require_token("--dry-run")
            hub.push(args.run, args.repo)
        for name, path in files.items():
            print(f"{args.repo}/{name}: {path} ({path.stat().st_size:,} bytes)")
    except (FairDiffError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
