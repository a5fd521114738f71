"""A disk on which no file has room for more than some bytes, for the laws of writing."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

resource = pytest.importorskip("resource", reason="limits of Unix")


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Make the system raise OSError if any library writes more than `room` bytes to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
