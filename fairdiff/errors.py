"""The one exception whose message is meant for the user."""

from contextlib import contextmanager


class FairDiffError(Exception):
    """Something the user can mend: one line naming the file or key, what was found and what is allowed.

    The mains print it on stderr without a traceback and exit with code 2.
    """


class NotWithinMargin(FairDiffError):
    """An audit was carried out, and what it found is not what `audit.fail_above` asks for; the mains exit with code 3."""


@contextmanager
def blame(key: str, joint: str = ": "):
    """Turn a library's ValueError or OSError into one line that names the configuration key."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise FairDiffError(f"{key}{joint}{' '.join(str(error).split())}") from error
