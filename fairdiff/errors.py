"""The one exception whose message is meant for the user."""


class FairDiffError(Exception):
    """Something the user can mend: one line naming the file or key, what was found and what is allowed.

    The mains print it on stderr without a traceback and exit with code 2.
    """
