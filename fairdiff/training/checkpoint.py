"""A checkpoint that describes itself: step, fingerprint and the state of every part that learns or remembers.

One file, written atomically and never unpickled: parts of it cannot be of different steps.
Randomness needs no state: every step draws from its own generator, seeded by (seed, step).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fairdiff.errors import FairDiffError
from fairdiff.files import atomic_path

NAME = "checkpoint.pt"


class Part(Protocol):
    """What has a state of tensors, numbers and texts: the optimiser, the averages, the balance, the best so far."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class Ema:
    """Exponential moving average of the parameters with a warm-up: decay_i = min(decay, (1 + i) / (10 + i)).

    i is the training step, counted from 0; diffusers' warm-up is the same but for a decay of 0 at its first step. It
    lasts long: the decay is .1 at the first step, .87 at the 60th and the paper's .996 only after 2,240.
    """

    def __init__(self, parameters: list[Tensor], decay: float):
        self.decay, self.parameters = decay, parameters
        self.shadow = [p.detach().clone() for p in parameters]

    def update(self, step: int) -> None:
        """Move towards the parameters after optimiser step `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for shadow, parameter in zip(self.shadow, self.parameters, strict=True):
            shadow.lerp_(parameter.detach(), 1 - decay)

    def copy_to_parameters(self) -> None:
        """Put the averages in place of the parameters (for the audit and the export)."""
        for shadow, parameter in zip(self.shadow, self.parameters, strict=True):
            parameter.data.copy_(shadow)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages in place of the parameters for a while (for validation)."""
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
    """Write the state of every part after `step` finished steps."""
    state = {"step": step, "fingerprint": fingerprint} | {name: part.state_dict() for name, part in parts.items()}
    with atomic_path(folder / NAME) as temporary:
        torch.save(state, temporary)


def load(folder: Path, fingerprint: str, parts: dict[str, Part]) -> int:
    """Restore every part and return the finished steps, 0 if there are none; another run's checkpoint is an error."""
    path = folder / NAME
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:
        raise FairDiffError(f"{path}: cannot be read ({type(error).__name__}); start over with resume=false") from error
    if state["fingerprint"] != fingerprint:
        raise FairDiffError(
            f"{path}: was written with other settings; choose another hydra.run.dir or start over with resume=false"
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]
