"""Every result of docs/results.md: train, audit, and write the page of whatever has been measured so far.

python scripts/results.py                        all groups, by estimate nine hours on two cores; the same goes on
python scripts/results.py adapters --seeds 0     one group
python scripts/results.py --render               only write the page anew

Each run is one `train.py` or `scripts/audit.py` command, which resumes by itself, reprints what is finished and refuses a
folder of other settings (or of another model): delete that folder to measure anew. They lie under outputs/results.
What the page needs of each audit is kept in docs/measurements/results, so that one's own runs join or replace those of
others there.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from reproduce.page import write_page
from reproduce.plan import GROUPS, Run, plan
from reproduce.records import keep_record

ROOT = Path(__file__).resolve().parent.parent


def with_needed(runs: list[Run]) -> list[Run]:
    """These runs, each after the one whose adapter it audits."""
    return list(dict.fromkeys(one for run in runs for one in (run.of, run) if one is not None))


def carry_out(run: Run, folder: Path) -> None:
    """Run one command."""
    command = [sys.executable, *run.command(folder)]
    print("$ python", " ".join(command[1:]), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="group", help=f"of {', '.join(GROUPS)}; default: all")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the experiments (others: the first)"
    )
    parser.add_argument("--images", type=int, default=160, help="pictures a prompt in the experiments")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--render", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    unknown = [group for group in args.groups if group not in GROUPS]
    if unknown:
        parser.error(f"groups: found {', '.join(unknown)}, allowed: {', '.join(GROUPS)}")
    runs = plan(args.seeds, args.images)
    shown = plan(list(dict.fromkeys([*args.seeds, 0, 1, 2])), args.images)
    records = args.page.parent / "measurements" / "results"
    chosen = [run for run in runs if not args.groups or run.group in args.groups]
    for run in [] if args.render else with_needed(chosen):
        try:
            carry_out(run, args.folder)
        except subprocess.CalledProcessError as error:
            parser.exit(error.returncode, f"{run.group}/{run.name}, seed {run.seed}: the command above failed\n")
        keep_record(run, args.folder, records)
        write_page(shown, records, args.page)
    write_page(shown, records, args.page)
    print(f"report: {args.page}")


if __name__ == "__main__":
    main()
