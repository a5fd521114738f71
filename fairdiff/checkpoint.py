"""Checkpoints that describe themselves: adapter, EMA, optimiser and step, written atomically and never unpickled.

Randomness needs no state: every step draws from its own generator, seeded by (seed, step).
"""

from pathlib import Path

import torch
from torch import Tensor

from fairdiff.errors import FairDiffError
from fairdiff.files import atomic_path

NAME = "checkpoint.pt"


class Ema:
    """Exponential moving average with diffusers' warm-up: decay_i = min(decay, (1 + i) / (10 + i)) at step i."""

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


def save(folder: Path, step: int, fingerprint: str, ema: Ema, optimizer: torch.optim.Optimizer) -> None:
    """Write the state after `step` finished steps."""
    state = {
        "step": step,
        "fingerprint": fingerprint,
        "parameters": [p.detach() for p in ema.parameters],
        "ema": ema.shadow,
        "optimizer": optimizer.state_dict(),
    }
    with atomic_path(folder / NAME) as temporary:
        torch.save(state, temporary)


def load(folder: Path, fingerprint: str, ema: Ema, optimizer: torch.optim.Optimizer) -> int:
    """Restore a run and return its finished steps, 0 if there is none; another run's checkpoint is an error."""
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
    for parameter, saved in zip(ema.parameters, state["parameters"], strict=True):
        parameter.data.copy_(saved)
    for shadow, saved in zip(ema.shadow, state["ema"], strict=True):
        shadow.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
