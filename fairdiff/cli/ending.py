"""End commands without a traceback after Ctrl-C or a closed pipe, and print on terminals with any encoding."""

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Replacements for characters that the terminal's encoding lacks
PLAIN = str.maketrans({"−": "-", "–": "-", "×": "x", "→": "->", "±": "+-", "≤": "<=", "\u00a0": " "})


@contextmanager
def ending(interrupted: str = "interrupted") -> Iterator[None]:
    """Wrap a command: after Ctrl-C print `interrupted` and exit with 130; after a closed output pipe exit with 1."""
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
    """Replace characters that an encoding lacks, by PLAIN or else by a backslash escape (a codecs error handler)."""
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def any_terminal() -> None:
    """Make stdout accept every text, also in an encoding such as ASCII, Latin-1 or Windows-1252."""
    codecs.register_error("fairdiff.plainly", _plainly)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="fairdiff.plainly")


def reader_is_gone(more: str = "") -> bool:
    """Return whether standard output is a pipe whose reader has gone, as after `| head`.

    more: text to write for the test, needed after a failed write, which leaves the buffer empty. If the reader has gone,
    stdout is redirected to os.devnull, because Python's flush at exit would fail.
    """
    try:
        sys.stdout.write(more)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
