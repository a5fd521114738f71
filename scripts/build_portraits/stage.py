"""Shared code of the training stages: the build folder, the clock, checkpoints, averages and contact sheets.

A stage that is run again continues: its checkpoint holds weights, averages, optimiser, torch's generator state, steps and
the seconds already spent. The build folder is ${FAIRDIFF_BUILD:-~/.cache/fairdiff/build}.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the stages run without installing the package


def build_folder() -> Path:
    """Return the folder of renders and stage states; it is created if missing."""
    folder = Path(os.environ.get("FAIRDIFF_BUILD", Path.home() / ".cache" / "fairdiff" / "build"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def arguments(description: str, minutes: float, batch: int, lr: float) -> argparse.ArgumentParser:
    """Return a parser with the options common to the stages; a stage may add its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--minutes", type=float, default=minutes, help="training time in all, resumed runs included")
    parser.add_argument("--steps", type=int, default=0, help="steps in all; replaces --minutes if not 0")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--least", type=int, default=1000, help="pictures to wait for before the first step")
    return parser


class Clock:
    """Steps and seconds of one stage over all its runs, and the used fraction of its budget."""

    def __init__(self, minutes: float, steps: int = 0, save_every: float = 120.0) -> None:
        self.minutes, self.steps, self.save_every = minutes, steps, save_every
        self.step, self.before = 0, 0.0
        self.start = self.saved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds so far; the time between two calls counts as a minute at most, since the process may have been paused."""
        now = time.monotonic()
        self.before += min(now - self.start, 60.0)
        self.start = now
        return self.before

    @property
    def fraction(self) -> float:
        """Used fraction of the budget, from 0; it may exceed 1."""
        seconds = self.seconds
        return self.step / self.steps if self.steps else seconds / (60 * self.minutes)

    def save_due(self) -> bool:
        """Return True every `save_every` seconds."""
        due = time.monotonic() - self.saved > self.save_every
        if due:
            self.saved = time.monotonic()
        return due

    def lr(self, peak: float, warmup: int = 100, decay: float = 0.4) -> float:
        """Return the learning rate: linear warm-up, constant, linear to peak / 100 over the last `decay` of the budget."""
        falling = min(1.0, (1 - min(self.fraction, 1.0)) / decay)
        return peak * min(1.0, (self.step + 1) / warmup) * max(falling, 0.01)


class Average:
    """Exponential moving average of parameters with a warm-up: decay_i = min(decay, (1 + i) / (10 + i))."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.module, self.decay, self.count = module, decay, 0
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        rate = 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        parameters = dict(self.module.named_parameters())
        names = list(self.values)
        torch._foreach_lerp_([self.values[n] for n in names], [parameters[n].data for n in names], rate)
        self.count += 1

    def state(self) -> dict[str, Tensor]:
        """Return the module's state dict with averaged parameters and unchanged buffers."""
        return {name: self.values.get(name, value).clone() for name, value in self.module.state_dict().items()}


def write_checkpoint(path: Path, state: dict[str, object], clock: Clock) -> None:
    """Write a checkpoint atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state | {"step": clock.step, "seconds": clock.seconds, "torch_rng": torch.get_rng_state()}, part)
    part.replace(path)


def read_checkpoint(path: Path, clock: Clock) -> dict[str, object] | None:
    """Read a checkpoint and restore the clock and torch's generator from it; return None if there is none."""
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)
    clock.step, clock.before = state["step"], state["seconds"]
    torch.set_rng_state(state["torch_rng"])
    return state


def log(name: str, clock: Clock, **numbers: float) -> None:
    """Print one line, and append one JSON line to logs/<name>.jsonl."""
    row = {"step": clock.step, "seconds": round(clock.seconds, 1)} | {k: round(float(v), 5) for k, v in numbers.items()}
    print(name, " ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    folder = build_folder() / "logs"
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def to_tensor(image: np.ndarray) -> Tensor:
    """Convert uint8 [B, H, W, 3] to float [B, 3, H, W] in [-1, 1], the range of Stable Diffusion's autoencoder."""
    return torch.from_numpy(image).permute(0, 3, 1, 2).float() / 127.5 - 1


def sheet(rows: list[Tensor], path: Path, zoom: int = 2) -> None:
    """Write rows of images [n, 3, H, W] in [-1, 1] as one PNG."""
    pixels = [((row.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy() for row in rows]
    page = np.concatenate([np.concatenate(list(row), 1) for row in pixels], 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(page).resize((page.shape[1] * zoom, page.shape[0] * zoom), Image.NEAREST).save(path)
