"""Choose the settings of the embedded model: train each candidate, audit it on validation occupations, write a table.

python scripts/search.py                 all candidates; repeat it to continue
python scripts/search.py --jobs 2        two at a time
python scripts/search.py --render        write only the page
python scripts/search.py --publish       write docs/search.md and its records instead

Test occupations are not used. Run folders are in outputs/search. The page is written to outputs/reproduced/search.md. Numbers
of each run are kept beside it in measurements/search. New runs are added to a copy of the published ones or replace them.
"""

import argparse
from pathlib import Path

from reproduce.place import ROOT, add_place, records_in
from reproduce.records import keep_record
from reproduce.search import candidates, write_search
from results import Failed, carry_out, each_done, with_needed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help="of candidates, or how they begin; default: all")
    parser.add_argument("--jobs", type=int, choices=range(1, 65), default=1, metavar="N", help="runs at a time")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "search")
    add_place(parser)
    parser.add_argument("--render", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    every = candidates()
    chosen = [run for run in every if not args.names or run.name.startswith(tuple(args.names))]
    if not chosen:
        parser.error(f"names: found {', '.join(args.names)}, allowed: {', '.join(run.name for run in every)}")
    records, page = records_in(args.docs, "search"), args.docs / "search.md"
    needed = [] if args.render else with_needed(chosen)
    try:
        for run in each_done(needed, args.jobs, lambda r: carry_out(r, args.folder, args.jobs)):
            keep_record(run, args.folder, records)
            write_search(every, records, page)
    except Failed as failure:
        code, line = failure.args
        parser.exit(code, f"{line}\n")
    write_search(every, records, page)
    print(f"report: {page}")


if __name__ == "__main__":
    main()
