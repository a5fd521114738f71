"""The commands fairdiff-train, fairdiff-audit and fairdiff-view. Imports nothing heavy before Ctrl-C is no traceback."""

import os
import signal
import sys


def train() -> None:
    """The command fairdiff-train."""
    _command("train_command")


def audit() -> None:
    """The command fairdiff-audit."""
    _command("audit_command")


def view() -> None:
    """The command fairdiff-view."""
    before = signal.signal(signal.SIGINT, _interrupted)
    from fairdiff.view.server import main

    signal.signal(signal.SIGINT, before)
    main()


def _command(name: str) -> None:
    """Import the jobs, which takes seconds, and carry out one; Ctrl-C meanwhile just ends the process."""
    before = signal.signal(signal.SIGINT, _interrupted)
    if not _first():  # what is to be said is said once; fairdiff.distributed has an error told that is this process's own
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    from fairdiff import jobs

    signal.signal(signal.SIGINT, before)
    getattr(jobs, name)()


def _first() -> bool:
    """Whether this is the first of the processes that torchrun or accelerate launch started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _interrupted(*_: object) -> None:
    if _first():
        os.write(2, b"interrupted\n")
    os._exit(130)  # nothing has begun, and an exception could be swallowed by what is being imported
