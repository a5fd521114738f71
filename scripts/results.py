"""Reproduce docs/results.md: train, audit, and write the page with all results so far.

python scripts/results.py                        all groups; repeat it to continue
python scripts/results.py adapters --seeds 0     one group
python scripts/results.py --jobs 2               two runs at a time, faster on two cores: about six hours
python scripts/results.py --missing              only runs without a record
python scripts/results.py --render               write only the page
python scripts/results.py --publish              write docs/results.md and its records instead

Each run is one `train.py` or `scripts/audit.py` command. It resumes by itself, prints finished results again and refuses a
folder with other settings or another model: delete that folder to measure again. The run folders are in outputs/results,
each beside a log of its output.
The page is written to outputs/reproduced/results.md. Numbers of each audit are kept beside it in measurements/results. That
folder starts as a copy of the published records, and new runs are added or replace them.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from reproduce.page import write_page
from reproduce.place import ROOT, add_place, records_in
from reproduce.plan import GROUPS, Run, plan
from reproduce.records import keep_record, without_record


def with_needed(runs: list[Run]) -> list[Run]:
    """Return these runs and the runs that they need, each after the one that it needs."""
    return list(dict.fromkeys(one for run in runs for one in (run.needs, run) if one is not None))


def label(run: Run) -> str:
    """Return how the command line names a run of any seed."""
    return f"{run.group}/{run.name}"


def chosen_of(runs: list[Run], names: list[str]) -> list[Run]:
    """Return the runs whose group or label is among the names, all of them for no names."""
    return [run for run in runs if not names or {run.group, label(run)} & {*names}]


class Failed(Exception):
    """A run whose command ended with an error: its exit code and a line about it."""


def carry_out(run: Run, folder: Path, jobs: int) -> None:
    """Run one command with its share of the cores, and write its output to a log file."""
    command, log = [sys.executable, *run.command(folder)], run.log(folder)
    print("$ python", " ".join(command[1:]), flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONIOENCODING": "utf-8"}
    with log.open("a", encoding="utf-8") as out:
        code = subprocess.run(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT).returncode
    if code:
        raise Failed(code, f"{run.group}/{run.name}, seed {run.seed}: failed, see {log}")


def each_done(runs: list[Run], jobs: int, task: Callable[[Run], None]) -> Iterator[Run]:
    """Call the task for every run in order, `jobs` at a time, and yield each run when it is done.

    A run waits for the run that it needs, which precedes it in the list. After an error no other run is started.
    """
    begun: dict[Run, Future] = {}

    def after_needed(run: Run) -> Run:
        if run.needs in begun:
            begun[run.needs].result()
        task(run)
        return run

    with ThreadPoolExecutor(jobs) as pool:
        for run in runs:
            begun[run] = pool.submit(after_needed, run)
        try:
            for future in as_completed(begun.values()):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "groups", nargs="*", metavar="group", help=f"of {', '.join(GROUPS)}, or group/run; default: all"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the experiments (others: the first)"
    )
    parser.add_argument("--images", type=int, default=160, help="pictures a prompt in the experiments")
    parser.add_argument("--jobs", type=int, choices=range(1, 65), default=1, metavar="N", help="runs at a time")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "results")
    add_place(parser)
    parser.add_argument("--missing", action="store_true", help="only runs without a record")
    parser.add_argument("--render", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    runs = plan(args.seeds, args.images)
    known = {*GROUPS, *map(label, runs)}
    unknown = [group for group in args.groups if group not in known]
    if unknown:
        parser.error(f"groups: found {', '.join(unknown)}, allowed: {', '.join(GROUPS)}, or one run as experiments/race")
    shown = plan(list(dict.fromkeys([*args.seeds, 0, 1, 2])), args.images)
    records, page = records_in(args.docs, "results"), args.docs / "results.md"
    chosen = chosen_of(runs, args.groups)
    if args.missing:
        chosen = without_record(chosen, records)
    needed = [] if args.render else with_needed(chosen)
    try:
        for run in each_done(needed, args.jobs, lambda run: carry_out(run, args.folder, args.jobs)):
            keep_record(run, args.folder, records)
            write_page(shown, records, page)
    except Failed as failure:
        code, line = failure.args
        parser.exit(code, f"{line}\n")
    except OSError as error:
        parser.exit(2, f"error: {error}\n")
    write_page(shown, records, page)
    print(f"report: {page}")


if __name__ == "__main__":
    main()
