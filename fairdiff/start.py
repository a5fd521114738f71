"""Entry points of fairdiff-train, -audit, -view and -compare. They import little, so that Ctrl-C is caught from the start."""

import os
import signal
import sys
from importlib import import_module


def train() -> None:
    """The command fairdiff-train."""
    _command("fairdiff.jobs", "train_command")


def audit() -> None:
    """The command fairdiff-audit."""
    _command("fairdiff.jobs", "audit_command")


def view() -> None:
    """The command fairdiff-view."""
    _command("fairdiff.view.server", "main")


def compare() -> None:
    """The command fairdiff-compare."""
    _command("fairdiff.compare.command", "main")


def _command(module: str, name: str) -> None:
    """Import a module, which takes seconds, and call a function of it; Ctrl-C meanwhile just ends the process."""
    before = signal.signal(signal.SIGINT, _interrupted)
    if not _first():  # what is to be said is said once; fairdiff.distributed has an error told that is this process's own
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    command = getattr(import_module(module), name)
    signal.signal(signal.SIGINT, before)
    command()


def _first() -> bool:
    """Whether this is the first of the processes that torchrun or accelerate launch started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _interrupted(*_: object) -> None:
    if _first():
        os.write(2, b"interrupted\n")
    os._exit(130)  # nothing has begun, and an exception could be swallowed by what is being imported
