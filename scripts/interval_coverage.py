"""Simulate audits to measure how often their intervals contain the true value and how often their verdict is wrong.

python scripts/interval_coverage.py                     up to 100 audits of every cell; repeat it to continue
python scripts/interval_coverage.py --worlds 400        up to 400
python scripts/interval_coverage.py --cells P44 judge   only cells whose name contains one of these words
python scripts/interval_coverage.py --render            only the page, from your records or else from the published ones
python scripts/interval_coverage.py --publish           continue and write docs/explanation/coverage.md and its record instead

Every audit draws its prompts from a population, the images of each prompt, and the labelled faces of the attribute
classifier. The results are in outputs/reproduced: measurements/coverage.json and the page explanation/coverage.md.
"""

import argparse
import json

from reproduce.coverage import CELLS, simulate, write_coverage
from reproduce.place import add_place, records_in
from rich.progress import track

from fairdiff.files import write_text

EVERY = 20  # the record is saved after this many audits of a cell


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=100, help="simulated audits of each cell")
    parser.add_argument("--cells", nargs="+", metavar="word", default=[""], help="of cells' names; default: all")
    add_place(parser)
    parser.add_argument("--render", action="store_true", help="simulate nothing")
    args = parser.parse_args(argv)
    kept = records_in(args.docs, "coverage.json", seeded=args.render)
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    chosen = [name for name in CELLS if any(word in name for word in args.cells)]
    if not chosen:
        parser.error(f"--cells: found {', '.join(args.cells)}, allowed: words of {', '.join(list(CELLS)[:3])}, ...")
    rounds = [] if args.render else [name for _ in range(0, args.worlds, EVERY) for name in chosen]
    for name in track(rounds, "simulated audits", disable=not rounds):
        done = found.get(name, {}).get("audits", 0)
        if done < args.worlds:
            found[name] = simulate(name, range(done, min(done + EVERY, args.worlds)), found.get(name))
            write_text(kept, json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"report: {write_coverage(found, args.docs / 'explanation' / 'coverage.md')}")


if __name__ == "__main__":
    main()
