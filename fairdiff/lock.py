"""Lock a run folder, so that only one run at a time works in it.

The operating system releases the lock when the process ends, also after a crash, so a leftover file blocks no other run.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from fairdiff.errors import FairDiffError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

NAME = ".lock"
FAR = 1 << 30  # Windows locks bytes, which others then cannot read: the locked byte lies behind the text


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder, made if it is missing; FairDiffError that names the holder if another process has locked it."""
    file = _acquire(folder)
    try:
        yield
    finally:
        if file is not None:
            _release(file, folder / NAME)


def _acquire(folder: Path) -> int | None:
    """Return the open and locked file.

    If the file system has no locks or cannot be written, returns None and prints a warning: a finished run can still be
    shown there.
    """
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _open(path)
    except BlockingIOError as error:
        raise FairDiffError(
            f"{folder}: {_holder(path)} works in it; wait until it is done or choose another hydra.run.dir"
        ) from error
    except OSError as error:
        if isinstance(error, PermissionError) and path.exists():
            raise FairDiffError(
                f"{path}: belongs to somebody else's run; if that has ended, remove the file"
            ) from error
        print(f"warning: {folder}: cannot be locked ({error.strerror}); start no second run in it", flush=True)
        return None


def _open(path: Path) -> int:
    """Return the open and locked file; BlockingIOError if another process has locked it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(file)
            if _is_at(file, path):  # otherwise its holder has just removed it
                about = {"host": socket.gethostname(), "process": os.getpid()}
                about["since"] = datetime.now().astimezone().isoformat(" ", "seconds")
                with suppress(OSError):  # on a full disk the lock works without its text
                    os.truncate(file, 0)
                    os.write(file, json.dumps(about).encode())
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    os.lseek(file, FAR, os.SEEK_SET)
    try:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        raise BlockingIOError(error.errno, error.strerror) from error
    os.lseek(file, 0, os.SEEK_SET)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _release(file: int, path: Path) -> None:
    """Remove the file and release the lock. Windows cannot remove a file that any process has open."""
    with suppress(OSError):
        if fcntl is not None and _is_at(file, path):
            path.unlink()
    os.close(file)
    with suppress(OSError):
        if fcntl is None:
            path.unlink()


def _holder(path: Path) -> str:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return f"process {about['process']} on {about['host']}, since {about['since']},"
    except (OSError, ValueError, KeyError, TypeError):  # its holder is just writing or removing it
        return "another process"
