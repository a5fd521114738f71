"""Fit a judge to labelled pictures, with augmentations that stand in for a detector's box and a blurry generator."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from classifiers.attributes import AttributeNet


@dataclass(frozen=True)
class FitPlan:
    """steps of `batch` pictures at peak rate lr (one-cycle); the checkpoint is written every save_every steps."""

    steps: int
    batch: int = 64
    lr: float = 3e-3
    weight_decay: float = 1e-2
    smoothing: float = 0.05
    seed: int = 0
    checkpoint: Path | None = None
    save_every: int = 200


def augment(image_BCHW: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random crop (scale, shift, roll, mirror), blur, colour and noise: [B, 3, h, w] -> [B, 3, size, size]."""
    batch = len(image_BCHW)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    scale, angle = uniform(0.72, 1.05), uniform(-0.12, 0.12)
    mirror = (uniform(0, 1) < 0.5).float() * 2 - 1
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cos * mirror, -sin, uniform(-0.12, 0.12)], 1)]
    rows.append(torch.stack([sin * mirror, cos, uniform(-0.12, 0.12)], 1))
    grid = F.affine_grid(torch.stack(rows, 1), [batch, 3, size, size], align_corners=False)
    x = F.grid_sample(image_BCHW, grid, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)
    mix = uniform(-0.3, 1.0, 1, 1, 1).clamp(min=0)
    x = x + mix * (blurred - x)
    x = (x - 0.5) * uniform(0.75, 1.25, 1, 1, 1) + 0.5 + uniform(-0.1, 0.1, 1, 1, 1) + uniform(-0.05, 0.05, 3, 1, 1)
    x = x + torch.randn(x.shape, generator=generator) * uniform(0, 0.06, 1, 1, 1)
    return x.clamp(0, 1)


def fit(
    net: AttributeNet,
    images: np.ndarray,
    labels: dict[str, np.ndarray],
    plan: FitPlan,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> AttributeNet:
    """Train in place on images uint8 [N, h, w, 3] and labels {attribute: int [N]}; resumes from plan.checkpoint.

    The loss is the sum of the attributes' cross-entropies. Step i draws from a generator seeded by (seed, i).
    """
    optimizer = torch.optim.AdamW(net.parameters(), plan.lr, weight_decay=plan.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.lr, total_steps=plan.steps + 1)
    start = _resume(net, optimizer, schedule, plan)
    net.train().requires_grad_(True)
    size = net.config["image_size"]
    target = {name: torch.from_numpy(np.asarray(v, dtype=np.int64)) for name, v in labels.items()}
    for step in range(start, plan.steps):
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
        rows = torch.randint(len(images), (plan.batch,), generator=generator)
        pictures = torch.from_numpy(images[rows.numpy()]).permute(0, 3, 1, 2).float() / 255
        logits = net(augment(pictures, size, generator))
        loss = sum(
            F.cross_entropy(logits[name], target[name][rows], label_smoothing=plan.smoothing) for name in target
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step + 1, loss.item())
        if plan.checkpoint and ((step + 1) % plan.save_every == 0 or step + 1 == plan.steps):
            state = {"step": step + 1, "net": net.state_dict(), "optimizer": optimizer.state_dict()}
            temporary = plan.checkpoint.with_suffix(".tmp")
            torch.save(state | {"schedule": schedule.state_dict()}, temporary)
            temporary.replace(plan.checkpoint)
    return net.eval().requires_grad_(False)


def _resume(net, optimizer, schedule, plan: FitPlan) -> int:
    if plan.checkpoint is None or not plan.checkpoint.exists():
        return 0
    state = torch.load(plan.checkpoint, weights_only=True)
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["step"]


@torch.no_grad()
def predict(net: AttributeNet, images: np.ndarray, batch: int = 256) -> dict[str, np.ndarray]:
    """Class probabilities {attribute: [N, K]} of images uint8 [N, h, w, 3]."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in net.attributes}
    for first in range(0, len(images), batch):
        pictures = torch.from_numpy(images[first : first + batch]).permute(0, 3, 1, 2).float() / 255
        for name, logits in net(pictures).items():
            parts[name].append(logits.softmax(1).numpy())
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def accuracy(net: AttributeNet, images: np.ndarray, labels: dict[str, np.ndarray]) -> dict[str, float]:
    """Share of pictures whose most probable class is the label, per attribute."""
    probs = predict(net, images)
    return {name: float((probs[name].argmax(1) == labels[name]).mean()) for name in labels}
