"""The commands fairdiff-train, -audit, -view and -compare. Slow imports wait until Ctrl-C is handled without a traceback."""

import os
import signal
import sys
from importlib import import_module


def train() -> None:
    """Run the command fairdiff-train."""
    _command("fairdiff.jobs", "train_command")


def audit() -> None:
    """Run the command fairdiff-audit."""
    _command("fairdiff.jobs", "audit_command")


def view() -> None:
    """Run the command fairdiff-view."""
    _command("fairdiff.view.server", "main")


def compare() -> None:
    """Run the command fairdiff-compare."""
    _command("fairdiff.compare.command", "main")


def _command(module: str, name: str) -> None:
    """Import a module, which takes seconds, and call a function of it; Ctrl-C during the import only ends the process."""
    before = signal.signal(signal.SIGINT, _interrupted)
    if not _first():  # print everything once; fairdiff.distributed restores stderr for an error of this process
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    command = getattr(import_module(module), name)
    signal.signal(signal.SIGINT, before)
    command()


def _first() -> bool:
    """Return whether this is the only process, or the first that torchrun or accelerate launch started."""
    return os.environ.get("RANK", "0") == "0"


def _interrupted(*_: object) -> None:
    if _first():
        os.write(2, b"interrupted\n")
    os._exit(130)  # nothing has begun, and an import could catch an exception
