"""Choose the settings of the embedded model: train each candidate, audit it on validation occupations, write a table.

python scripts/search.py                 all candidates; the same command goes on
python scripts/search.py --jobs 2        two at a time
python scripts/search.py --render        only write docs/search.md anew

Test occupations take no part. Runs lie under outputs/search; what the table needs of each is kept in
docs/measurements/search.
"""

import argparse
from pathlib import Path

from reproduce.records import keep_record
from reproduce.search import candidates, write_search
from results import ROOT, Failed, carry_out, each_done


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help="of candidates, or how they begin; default: all")
    parser.add_argument("--jobs", type=int, choices=range(1, 65), default=1, metavar="N", help="runs at a time")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "search")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "search.md")
    parser.add_argument("--render", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    every = candidates()
    chosen = [run for run in every if not args.names or run.name.startswith(tuple(args.names))]
    if not chosen:
        parser.error(f"names: found {', '.join(args.names)}, allowed: {', '.join(run.name for run in every)}")
    records = args.page.parent / "measurements" / "search"
    try:
        for run in each_done([] if args.render else chosen, args.jobs, lambda r: carry_out(r, args.folder, args.jobs)):
            keep_record(run, args.folder, records)
            write_search(every, records, args.page)
    except Failed as failure:
        code, line = failure.args
        parser.exit(code, f"{line}\n")
    write_search(every, records, args.page)
    print(f"report: {args.page}")


if __name__ == "__main__":
    main()
