"""Count U-Net evaluations, time stages, measure peak memory, and capture the arguments of a replay."""

import ctypes
import gc
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fairdiff.training.step
from fairdiff.training.step import Trainee


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Callable], Callable]) -> Iterator[None]:
    """Replace `owner.name` by make(owner.name) inside the block."""
    original = vars(owner).get(name)
    setattr(owner, name, make(getattr(owner, name)))
    try:
        yield
    finally:
        if original is None:  # it was an attribute of the class
            delattr(owner, name)
        else:
            setattr(owner, name, original)


@contextmanager
def counted(unet: nn.Module) -> Iterator[Counter]:
    """Count forward equivalents of a U-Net by kind: forward without graph, forward with graph, recompute, backward.

    A forward of one sample counts 1. A backward counts 1 too: with frozen weights it computes gradients of activations
    only, which costs as much as a forward (gradients of all weights would double that).
    A forward inside a running backward is a recomputation by gradient checkpointing.
    """
    counts: Counter = Counter()

    def before(module, args, kwargs):
        inside = torch._C._current_graph_task_id() != -1
        counts["recompute" if inside else "graph" if torch.is_grad_enabled() else "sample"] += len(args[0])

    def after(module, args, kwargs, output):
        if output.sample.requires_grad and torch._C._current_graph_task_id() == -1:
            size = len(args[0])
            output.sample.register_hook(lambda grad: counts.update(backward=size))

    handles = [
        unet.register_forward_pre_hook(before, with_kwargs=True),
        unet.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Stopwatch:
    """Measure exclusive seconds by stage: the time of an inner stage does not count for the outer one."""

    synchronise: Callable[[], None]
    seconds: Counter = field(default_factory=Counter)
    stack: list[str] = field(default_factory=list)
    last: float = 0.0

    def _credit(self) -> None:
        self.synchronise()
        now = time.perf_counter()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.last
        self.last = now

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._credit()
        self.stack.append(name)
        try:
            yield
        finally:
            self._credit()
            self.stack.pop()

    def timing(self, name: str, outermost: bool = False) -> Callable[[Callable], Callable]:
        """Return a decorator that times a function; outermost: only if no other stage runs inside the whole step."""

        def make(function: Callable) -> Callable:
            def timed(*args, **kwargs):
                if outermost and len(self.stack) > 1:
                    return function(*args, **kwargs)
                with self.stage(name):
                    return function(*args, **kwargs)

            return timed

        return make


@contextmanager
def staged(trainee: Trainee, synchronise: Callable[[], None]) -> Iterator[Stopwatch]:
    """Time every stage of fairdiff.training.step.training_step with the returned stopwatch."""
    watch, perception, step = Stopwatch(synchronise), trainee.perception, fairdiff.training.step
    places = [
        (step, "initial_noise", "noise"),
        (step, "embed_prompt", "text forward"),
        (trainee.model, "sample", "sampling"),
        (type(trainee.originals), "get", "originals"),
        (trainee.model, "decode", "decode forward"),
        (perception, "detector", "detect"),
        (perception, "classifier", "judge"),
        (perception, "embedder", "face embedder"),
        (step, "label_faces", "transport"),
        (step, "batch_terms", "losses"),
        (step, "gradient_at", "losses backward"),
        (step, "gradient_weights", "weights of the steps"),
        (step, "replay", "replay"),
    ]
    places += [(e, "image", f"encoder {i}") for i, e in enumerate(perception.encoders)]
    with ExitStack() as stack:
        for owner, name, label in places:
            if isinstance(getattr(owner, name), nn.Module):  # torch forbids replacing a module by a function
                owner, name = getattr(owner, name), "forward"
            if getattr(owner, name) is not None:
                stack.enter_context(replaced(owner, name, watch.timing(label)))
        # the replay calls backward too; only the outermost call is the text encoder's
        stack.enter_context(replaced(torch.autograd, "backward", watch.timing("text backward", outermost=True)))
        stack.enter_context(replaced(torch.autograd, "grad", watch.timing("decode backward", outermost=True)))
        yield watch


@contextmanager
def captured_replay() -> Iterator[list[tuple]]:
    """Replace the replay of training steps inside the block by a function that stores its arguments."""
    calls: list[tuple] = []
    with replaced(fairdiff.training.step, "replay", lambda _: lambda *args: calls.append(args)):
        yield calls


def peak_memory(device: str, task: Callable[[], None]) -> float:
    """Return the MiB that a task needs in addition to the memory in use before it.

    On a GPU torch's allocator counts it. On a CPU it is the process's high-water mark, so run every task in a new process.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        task()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # reuse of freed memory would not be counted
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux: resets the high-water mark
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    task()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def spread(values: list[float]) -> list[float]:
    """Return [median, smallest, largest]."""
    ordered = torch.tensor(values, dtype=torch.float64)
    return [float(ordered.quantile(0.5)), float(ordered.min()), float(ordered.max())]
