"""The commands fairdiff-train and fairdiff-audit. Imports nothing heavy before Ctrl-C is no traceback."""

import os
import signal


def train() -> None:
    """The command fairdiff-train."""
    _command("train_command")


def audit() -> None:
    """The command fairdiff-audit."""
    _command("audit_command")


def _command(name: str) -> None:
    """Import the jobs, which takes seconds, and carry out one; Ctrl-C meanwhile just ends the process."""
    before = signal.signal(signal.SIGINT, _interrupted)
    from fairdiff import jobs

    signal.signal(signal.SIGINT, before)
    getattr(jobs, name)()


def _interrupted(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)  # nothing has begun, and an exception could be swallowed by what is being imported
