"""Save and load checkpoints: the step, the run's fingerprint and the state of every part of training that has one.

A checkpoint is one file that is written atomically, so all its parts are of the same step. It is loaded with
`weights_only`, so it runs no code. The previous checkpoint is kept. No random state is stored: every step draws from its
own generator, seeded by (seed, step).
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fairdiff.distributed import World
from fairdiff.errors import FairDiffError
from fairdiff.files import write_bytes

NAME, PREVIOUS = "checkpoint.pt", "previous.pt"


class Part(Protocol):
    """An object with a state of tensors, numbers and texts: the optimiser, the averages, the balance, the best so far."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class Ema:
    """Exponential moving average of the parameters with a warm-up: decay_i = min(decay, (1 + i) / (10 + i)).

    i is the training step, counted from 0. The warm-up of diffusers differs only in its decay of 0 at the first step.
    The warm-up is long: the decay is .1 at the first step, .87 at the 60th, and reaches the paper's .996 after 2,240.
    """

    def __init__(self, parameters: list[Tensor], decay: float):
        self.decay, self.parameters = decay, parameters
        self.shadow = [p.detach().clone() for p in parameters]

    def update(self, step: int) -> None:
        """Move the averages towards the parameters after optimiser step `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for shadow, parameter in zip(self.shadow, self.parameters, strict=True):
            shadow.lerp_(parameter.detach(), 1 - decay)

    def copy_to_parameters(self) -> None:
        """Overwrite the parameters with the averages (for the audit and the export)."""
        for shadow, parameter in zip(self.shadow, self.parameters, strict=True):
            parameter.data.copy_(shadow)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Use the averages as parameters within the context, then restore the parameters (for validation)."""
        kept = [p.detach().clone() for p in self.parameters]
        self.copy_to_parameters()
        try:
            yield
        finally:
            for parameter, value in zip(self.parameters, kept, strict=True):
                parameter.data.copy_(value)

    def state_dict(self) -> dict:
        return {"parameters": [p.detach() for p in self.parameters], "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        for parameter, shadow, saved, average in zip(
            self.parameters, self.shadow, state["parameters"], state["shadow"], strict=True
        ):
            parameter.data.copy_(saved)
            shadow.copy_(average)


def save(folder: Path, step: int, fingerprint: str, parts: dict[str, Part]) -> None:
    """Write the state of every part after `step` finished steps, and keep the previous checkpoint."""
    state = {"step": step, "fingerprint": fingerprint} | {name: part.state_dict() for name, part in parts.items()}
    write_bytes(folder / NAME, _packed(state), folder / PREVIOUS)


def _packed(state: dict) -> bytes:
    buffer = io.BytesIO()  # torch.save to a file would turn the OSError of a full disk into a RuntimeError
    torch.save(state, buffer)
    return buffer.getvalue()


def load_together(
    folder: Path, fingerprint: str, parts: dict[str, Part], say: Callable[[str], None], world: World
) -> int:
    """`load` in the first process and copy its state to the others, since all processes have the same state."""
    step = load(folder, fingerprint, parts, say) if world.first else 0
    if world.size > 1:
        own = {name: part.state_dict() for name, part in parts.items()}
        step, packed = world.of_first((step, _packed(own)))
        state = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    return step


def load(folder: Path, fingerprint: str, parts: dict[str, Part], say: Callable[[str], None]) -> int:
    """Restore every part and return the number of finished steps, 0 if there is no checkpoint.

    If the checkpoint cannot be read, the previous one is used and `say` gets a warning. Raises FairDiffError if neither can
    be read, or if a checkpoint belongs to another run.
    """
    errors = []
    for path in (folder / NAME, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            state = _read(path, fingerprint, parts)
        except ValueError as error:
            errors.append(f"{path}: {error}")
            continue
        if errors:
            path.replace(folder / NAME)  # otherwise the next save would overwrite it with the damaged one
            say(f"warning: {errors[0]}; the checkpoint before it is taken, of step {state['step']}")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["step"]
    if errors:
        raise FairDiffError(f"{'; '.join(errors)}; start over with resume=false")
    return 0


def finished_steps(folder: Path) -> int:
    """Return the step of the newest readable checkpoint without loading its tensors, 0 if there is none."""
    for path in (folder / NAME, folder / PREVIOUS):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
        except Exception:  # there is none, or `load` will say what is wrong with it
            continue
    return 0


def require_enough(folder: Path, done: int, steps: int) -> None:
    """Raise FairDiffError if a run folder already holds more steps than requested."""
    if done > steps:
        raise FairDiffError(f"steps: found {steps}, but {folder} already holds {done}; allowed: {done} or more")


def _read(path: Path, fingerprint: str, parts: dict[str, Part]) -> dict:
    """Return the state that `save` wrote; ValueError for any other file, FairDiffError for a checkpoint of another run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, another format, or a disk error
        raise ValueError(f"cannot be read ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise ValueError("is no checkpoint")
    if isinstance(state.get("fingerprint"), str) and state["fingerprint"] != fingerprint:
        raise FairDiffError(
            f"{path}: was written with other settings; choose another hydra.run.dir or start over with resume=false"
        )
    _compare(state, {"step": 0, "fingerprint": fingerprint} | _expected(state, parts))
    state["optimizer"]["param_groups"] = parts["optimizer"].state_dict()["param_groups"]  # settings come from this run
    return state


def _expected(state: dict, parts: dict[str, Part]) -> dict:
    """Return example states with the keys and shapes that the states of these parts have during training."""
    expected = {name: part.state_dict() for name, part in parts.items()}
    averages, count = expected["ema"]["shadow"], torch.tensor(0.0)
    moments = {i: {"step": count, "exp_avg": a, "exp_avg_sq": a} for i, a in enumerate(averages)}
    expected["optimizer"] = {"state": moments}
    if "best" in expected:
        best = state.get("best")
        none_yet = isinstance(best, dict) and best.get("step") is None
        expected["best"] |= {"step": None, "averages": []} if none_yet else {"step": 0, "averages": averages}
    return expected


def _compare(found: object, expected: object, where: str = "the checkpoint") -> None:
    """Raise ValueError, naming the place, if keys, lengths, types or shapes differ, or if a value cannot be in a checkpoint.

    Such values are NaN and infinity in tensors, and numbers that are negative or NaN.
    """
    match expected:
        case Tensor():
            if not isinstance(found, Tensor) or not found.is_floating_point() or found.shape != expected.shape:
                known = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"{where} is {known}, expected a tensor of shape {list(expected.shape)}")
            if not found.isfinite().all():
                raise ValueError(f"{where} holds values that are not finite")
        case dict():
            if not isinstance(found, dict):
                raise ValueError(f"{where} is no table")
            for key, value in expected.items():
                if key in found:
                    _compare(found[key], value, key if where == "the checkpoint" else f"{where}.{key}")
                elif where != "optimizer.state":  # parameters without a gradient have no entry there
                    raise ValueError(f"{where} has no {key}")
        case list():
            if not isinstance(found, list) or len(found) != len(expected):
                raise ValueError(f"{where} is no list of {len(expected)}")
            for place, value in enumerate(found):
                _compare(value, expected[place], f"{where}.{place}")
        case str():
            if not isinstance(found, str):
                raise ValueError(f"{where} is {found!r}, expected a text")
        case None:
            if found is not None:
                raise ValueError(f"{where} is {found!r}, expected None")
        case _:
            known = (int, float) if isinstance(expected, float) else (int,)
            if type(found) not in known or not found >= 0:
                raise ValueError(f"{where} is {found!r}, expected a number from 0")
