"""What a run tells: one JSON line a step in metrics.jsonl, and a progress display with loss terms and current bias."""

import json
import math
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from fairdiff.errors import FairDiffError
from fairdiff.files import append_line, write_text

PICTURES = "pictures"  # folder of the grids in a run folder


def make_console(speaks: bool = True) -> Console:
    """The terminal; 120 columns where the output goes to a file, which has no width of its own. Nothing unless it speaks."""
    if not speaks:
        return Console(quiet=True)
    return Console() if sys.stdout.isatty() else Console(width=120)


def progress(console: Console) -> Progress:
    """A progress display with elapsed and remaining time and a free text `note`, which alone is broken into lines."""
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
    """Append-only metrics.jsonl; resuming drops the lines of steps that the checkpoint has not seen."""

    def __init__(self, path: Path, finished_steps: int):
        self.path = path
        rows = [row for row in read_metrics(path) if row["step"] < finished_steps]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, row: dict) -> None:
        """One line; values that are not finite become null."""
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in row.items()}
        append_line(self.path, json.dumps(clean))


def read_metrics(path: Path) -> list[dict]:
    """All rows of a metrics.jsonl, [] if there is none; a last line cut short by a crash is left out.

    FairDiffError for any other line that is no row.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")  # a line may be cut within a character
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
