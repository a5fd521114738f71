"""The output of a training run: metrics.jsonl with one line per step, and a progress bar with loss terms and bias."""

import json
import math
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from fairdiff.errors import FairDiffError
from fairdiff.files import append_line, write_text

PICTURES = "pictures"  # folder of the image grids in a run folder


def make_console(speaks: bool = True) -> Console:
    """Return the console, 120 columns wide if the output is no terminal; it prints nothing unless `speaks`."""
    if not speaks:
        return Console(quiet=True)
    return Console() if sys.stdout.isatty() else Console(width=120)


def progress(console: Console) -> Progress:
    """Return a progress bar with elapsed and remaining time and a free text `note`, which alone is broken into lines."""
    whole = Column(no_wrap=True)
    return Progress(
        TextColumn("{task.description}", table_column=whole),
        BarColumn(bar_width=min(24, console.width // 10), table_column=whole),
        MofNCompleteColumn(table_column=whole),
        TimeElapsedColumn(table_column=whole),
        TextColumn("left", table_column=whole),
        TimeRemainingColumn(table_column=whole),
        TextColumn("{task.fields[note]}", table_column=Column()),
        console=console,
    )


class Metrics:
    """Append-only writer of metrics.jsonl; a resumed run first removes the lines of steps after its checkpoint."""

    def __init__(self, path: Path, finished_steps: int):
        self.path = path
        rows = [row for row in read_metrics(path) if row["step"] < finished_steps]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, row: dict) -> None:
        """Append one line; values that are not finite become null."""
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in row.items()}
        append_line(self.path, json.dumps(clean))


def read_metrics(path: Path) -> list[dict]:
    """Return all rows of a metrics.jsonl, [] if there is no file; a last line truncated by a crash is left out.

    Raises FairDiffError for any other line that is no row.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")  # bytes, because a line may be truncated within a character
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif number < len(lines):
            raise FairDiffError(
                f"{path}, line {number}: is no row of a training (a table with a step); remove the line, it only costs "
                "the report a point of its curves"
            )
    return rows
