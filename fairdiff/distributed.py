"""Several processes of one run: how they share the work, exchange data and end together.

torchrun and `accelerate launch` say in environment variables who is who. A process that is alone runs the same code: what
it tells the others comes back as it is. Numbers and small objects go by gloo on the CPU, which notices at once when a
process has ended; tensors on GPUs are summed by NCCL, after an exchange by gloo has shown that everybody is there.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from fairdiff.errors import FairDiffError

# for a process that says nothing and has not ended, which would be noticed at once: on slow machines the images of a prompt
# that another one audits may take so long
PATIENCE = timedelta(hours=3)
LINGER = 10  # seconds in which the others can ask the first process, where no launcher does, whether the error has been told
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")  # numbers; MASTER_ADDR is a name


class Lost(FairDiffError):
    """Another process has ended or stopped answering."""


@dataclass(frozen=True)
class World:
    """One of `size` processes, number `rank` from 0. The first one speaks, and writes all files.

    `gather`, `of_first`, `add_up` and `require_same` are exchanges: all processes call them, in the same order. What
    decides about an exchange must therefore be known to all. They raise Lost instead of waiting for nobody.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """The slice of `count` items for this process; the parts are in order, and their sizes differ by at most 1."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def share(self, items: Sequence) -> Sequence:
        """This process's part of what all have."""
        return items[self.rows(len(items))]

    def gather(self, value: Any) -> list:
        """The value of every process, in their order."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        with _exchange(self.size):
            dist.all_gather_object(found, value)
        return found

    def of_first(self, value: Any) -> Any:
        """The value of the first process; whatever the others give."""
        if self.size == 1:
            return value
        found = [value if self.first else None]
        with _exchange(self.size):
            dist.broadcast_object_list(found)
        return found[0]

    def add_up(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sum of each tensor over processes, the same bits on all; tensors of one type and device."""
        if self.size == 1 or not tensors:
            return tensors
        self.gather(None)  # NCCL would wait for a process that has ended
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _exchange(self.size):
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def require_same(self, what: str, value: Callable[[], str]) -> None:
        """FairDiffError, beginning with `what`, if this text differs between processes; not asked for by one alone."""
        if self.size == 1:
            return
        found = self.gather(value())
        other = next((rank for rank, text in enumerate(found) if text != found[0]), None)
        if other is not None:
            raise FairDiffError(
                f"{what}: found {found[0]} in process 0 and {found[other]} in process {other}, allowed: the same in all; "
                "do all machines have the same files, versions and kind of processor?"
            )


ALONE = World()


@contextmanager
def _exchange(size: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's errors of connections and time limits are RuntimeErrors
        raise Lost(
            f"one of {size} processes has ended or stopped answering ({_first_words(error)}); the same command goes on "
            "from the last checkpoint (without resume=false)"
        ) from error


def _first_words(error: Exception) -> str:
    text = " ".join(str(error).split()).split("] ", 1)[-1]  # behind torch's own place in its source
    return text.split(". ")[0][:100]


@contextmanager
def started(device: str) -> Iterator[World]:
    """This process among those that a launcher started; alone without one.

    device: "cuda" becomes the GPU of the process's number on its machine. An error in one process ends all, and one of them
    tells it: it leaves this block in that process only, the others end with SystemExit.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield World()
        return
    world, store = _join(device)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so launchers end what is left of a run
    try:
        yield world
    except BaseException as error:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # it is ending
        with _without_pages():
            tells = _is_to_tell(store)
            _leave(world, store)
        if tells:
            sys.stderr = sys.__stderr__  # fairdiff.start has it lead nowhere in all but the first
            raise
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None
    signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()


def _join(device: str) -> tuple[World, dist.Store]:
    """Meet the other processes at MASTER_ADDR; FairDiffError if that is not possible."""
    rank, size, local, _ = map(_number, VARIABLES)
    backend = "gloo"
    if device.startswith("cuda") and torch.cuda.is_available():  # else building the model says what is missing
        _take_gpu(device, local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=PATIENCE)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ['MASTER_PORT']}"
        raise FairDiffError(
            f"MASTER_ADDR: {size} processes did not meet at {where} ({_first_words(error)}); start them with torchrun or "
            "accelerate launch"
        ) from error
    return World(rank, size), store


def _number(key: str) -> int:
    found = os.environ.get(key)
    if found is None or not found.isdigit():
        raise FairDiffError(f"{key}: found {found or 'nothing'}, allowed: a number, as torchrun and accelerate launch set it")
    return int(found)


def _take_gpu(device: str, local: int) -> None:
    """Make "cuda" this process's own GPU."""
    if device != "cuda":
        raise FairDiffError(f"model.device: found {device} with several processes, allowed: cuda, one each, or cpu")
    if local >= torch.cuda.device_count():
        raise FairDiffError(
            f"LOCAL_RANK: found {local} on a machine with {torch.cuda.device_count()} GPUs, allowed: one process for each GPU"
        )
    torch.cuda.set_device(local)


def _is_to_tell(store: dist.Store) -> bool:
    """Whether no other process has told or is telling how the run ends."""
    store.set_timeout(timedelta(seconds=10))
    try:
        return store.add("told", 1) == 1
    except RuntimeError:  # the process that held the store has ended, perhaps without a word
        return True


@contextmanager
def _without_pages() -> Iterator[None]:
    """Standard error leads nowhere: torch writes a page of its stack there where a connection is closed."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _leave(world: World, store: dist.Store) -> None:
    """Close the connections, by which the others learn of it, and stay as long as they may ask the store."""
    with suppress(RuntimeError):
        dist.destroy_process_group()
        left = store.add("left", 1)
        until = time.monotonic() + LINGER
        held_here = world.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        while held_here and left < world.size and time.monotonic() < until:
            time.sleep(0.05)
            left = store.add("left", 0)
