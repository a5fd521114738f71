"""Disturbances of a run for scripts/torture.py, in the run's process: killed at a write, loss of power, a full disk."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path


def nobody_reads() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def at_write(place: int, act: Callable[[str, int | None], None]) -> None:
    """Call act(event, file) at the `place`-th write event and at every later one.

    Events: "sync" before fsync of a file or folder, "name" before and "named" after a rename.
    """
    fsync, replace, events = os.fsync, os.replace, iter(range(1, sys.maxsize))

    def event(kind: str, handle: int | None = None) -> None:
        if next(events) >= place:
            act(kind, handle)

    def synchronise(handle: int) -> None:
        event("sync", handle)
        fsync(handle)
        if isinstance(act, PowerLoss):
            act.learn(Path(os.readlink(f"/proc/self/fd/{handle}")))

    def rename(source, target) -> None:
        event("name")
        replace(source, target)
        event("named")

    os.fsync, os.replace = synchronise, rename


def count_writes(file: Path) -> None:
    """Write the number of events so far to a file at each event."""
    events = iter(range(1, sys.maxsize))
    at_write(1, lambda kind, handle: file.write_bytes(b"%d" % next(events)))


def full(kind: str, handle: int | None) -> None:
    if kind == "sync":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def stop() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill(kind: str, handle: int | None) -> None:
    stop()


def cut(kind: str, handle: int | None) -> None:
    """Truncate a new file to half, or an appended file by 9 bytes, and kill the process."""
    if kind == "sync" and not os.path.isdir(where := f"/proc/self/fd/{handle}"):
        size = os.fstat(handle).st_size
        os.truncate(where, size // 2 if ".tmp" in os.readlink(where) else max(size - 9, 0))
    stop()


class PowerLoss:
    """The worst state of some folders after a loss of power: every file has its content of the last fsync.

    names: whether the file names are those of the last fsync too; otherwise they are the new ones. A disk may do either.
    """

    def __init__(self, names: bool, *folders: Path):
        self.content: dict[int, bytes] = {}
        self.listed: dict[int, dict[str, tuple[int, bool]]] = {}
        self.names, self.folders = names, folders
        for folder in folders:
            for path in (folder, *folder.rglob("*")):
                self.learn(path)

    def learn(self, path: Path) -> None:
        """Record the current content of a path as the content on the disk."""
        if path.is_dir():
            self.listed[path.stat().st_ino] = _entries(path)
        else:
            self.content[path.stat().st_ino] = path.read_bytes()

    def __call__(self, kind: str, handle: int | None) -> None:
        for folder in self.folders:
            self.restore(folder, folder.stat().st_ino)
        stop()

    def restore(self, folder: Path, inode: int) -> None:
        known = self.listed.get(inode, {}) if self.names else _entries(folder)
        for path in folder.iterdir():
            if path.name not in known:  # moved, because its content may have another name on the disk
                path.rename(self.folders[0].parent / f"lost-{time.monotonic_ns()}")
        for name, (inner, is_folder) in known.items():
            if is_folder:
                (folder / name).mkdir(exist_ok=True)
                self.restore(folder / name, inner)
            else:
                (folder / name).write_bytes(self.content.get(inner, b""))


def _entries(folder: Path) -> dict[str, tuple[int, bool]]:
    return {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(folder)}
