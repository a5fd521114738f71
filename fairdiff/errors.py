"""The exceptions whose messages are meant for the user."""

from contextlib import contextmanager


class FairDiffError(Exception):
    """An error that the user can correct. Its message is one line: the file or key, what was found, what is allowed.

    The mains print it on stderr without a traceback and exit with code 2.
    """


class NotWithinMargin(FairDiffError):
    """A completed audit did not meet the margin of `audit.fail_above`; the mains exit with code 3."""


@contextmanager
def blame(key: str, joint: str = ": "):
    """Turn a ValueError or OSError into a FairDiffError of one line that names the configuration key."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise FairDiffError(f"{key}{joint}{' '.join(str(error).split())}") from error
