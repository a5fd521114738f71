"""A disk on which no file has room for more than some bytes, for the laws of writing."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

resource = pytest.importorskip("resource", reason="limits of Unix")


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Writing beyond `room` bytes of any file is an OSError of the system, whichever library writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
