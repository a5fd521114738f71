"""Start several processes of one run like a launcher, as children of the test's process, which has imported everything."""

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from fairdiff.distributed import World, started

LIMIT = 120  # seconds
STORES: list[TCPStore] = []


@dataclass(frozen=True)
class Ended:
    """The end of a process: its exit code (negative: the signal) and its output."""

    code: int
    out: str
    err: str


def start(size: int, folder: Path, task: Callable[[int], Any]) -> list[int]:
    """Start `size` children that call task(rank) with torchrun's variables, and return their ids; output goes to files."""
    folder.mkdir(parents=True, exist_ok=True)
    store, pids = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), []  # which outlives the children
    STORES.append(store)
    sys.stdout.flush()
    for rank in range(size):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads; those of OpenBLAS allow a fork
            pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
        names |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        os.environ.update({name: str(value) for name, value in names.items()})
        _child(folder, rank, task)
    return pids


def _child(folder: Path, rank: int, task: Callable[[int], Any]) -> None:
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        sys.__stderr__ = sys.stderr
        task(rank)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.__stderr__.flush()
        os._exit(code)


def end(pids: list[int], folder: Path) -> list[Ended]:
    """Wait for the processes and return their ends; AssertionError if that takes too long."""
    until, codes = time.monotonic() + LIMIT, {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(found[1])
        if time.monotonic() > until:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, 9)
                    os.waitpid(pid, 0)
            raise AssertionError(f"{[rank for rank, pid in enumerate(pids) if pid not in codes]} did not end: {said(folder)}")
        time.sleep(0.01)
    texts = [[(folder / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(len(pids))]
    return [Ended(codes[pid], *text) for pid, text in zip(pids, texts, strict=True)]


def said(folder: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()}" for path in sorted(folder.glob("*.*")))


def results(size: int, folder: Path, task: Callable[[World], Any]) -> list[Any]:
    """Return the result of task(world) in each of `size` processes; it may contain tensors, numbers and texts."""

    def child(rank: int) -> None:
        with started("cpu") as world:
            torch.save(task(world), folder / f"{rank}.pt")

    ended = end(start(size, folder, child), folder)
    assert [e.code for e in ended] == [0] * size, said(folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]
