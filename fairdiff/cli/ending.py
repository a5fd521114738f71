"""How commands end: no traceback for Ctrl-C or a closed pipe, and output that every terminal can print."""

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# What a terminal shows where its encoding lacks a character
PLAIN = str.maketrans({"−": "-", "–": "-", "×": "x", "→": "->", "±": "+-", "≤": "<=", "\u00a0": " "})


@contextmanager
def ending(interrupted: str = "interrupted") -> Iterator[None]:
    """Decorator of a command: exit code 130 and this line after Ctrl-C, 1 and no output if the pipe is closed."""
    if sys.stdout is None:  # closed before the start, as by >&-
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    any_terminal()
    try:
        try:
            yield
        except KeyboardInterrupt:
            print(interrupted, file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:
            if not reader_is_gone("\n"):
                raise
            sys.exit(1)
    except SystemExit as end:
        if reader_is_gone() and not end.code:
            sys.exit(1)
        raise
    if reader_is_gone():
        sys.exit(1)


def _plainly(error: UnicodeEncodeError) -> tuple[str, int]:
    """What stands for characters that an encoding has not: "-" for a minus sign, an escape for an unknown one."""
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def any_terminal() -> None:
    """Let stdout take every text, in an encoding such as ASCII, Latin-1 or Windows-1252 too."""
    codecs.register_error("fairdiff.plainly", _plainly)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="fairdiff.plainly")


def reader_is_gone(more: str = "") -> bool:
    """Whether standard output is a closed pipe, as after `| head`.

    more: what is written to find out, after a failed write that has left nothing. If nobody reads, the output now leads
    nowhere, or Python's own flush at exit would complain.
    """
    try:
        sys.stdout.write(more)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
