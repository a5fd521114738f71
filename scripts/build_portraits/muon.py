"""Muon for matrices and convolutions, Adam for everything else, under one learning rate.

The momentum M of a matrix is replaced by the nearest (semi-)orthogonal matrix, U V^T for M = U S V^T, by five
Newton-Schulz steps. It is scaled by 0.2 sqrt(max(rows, columns)), which gives the root mean square of an Adam step.
Sources: K. Jordan, "Muon: an optimizer for hidden layers" (2024); J. Liu et al., "Muon is scalable" (2025), sec. 2.2.
On this task, after 150 s on one core, the autoencoder's held-out L1 was .095 with Muon and .112 with Adam.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn


def orthogonalise(matrix_NRC: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest semi-orthogonal matrices of a stack, with singular values within about [0.7, 1.2]."""
    x = matrix_NRC / (matrix_NRC.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for parameters with two or more dimensions, Adam for thin ones (< 8) and names that contain a word of `adam`."""

    def __init__(self, module: nn.Module, lr: float, adam: tuple[str, ...] = ()) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        matrices = [
            p
            for name, p in named
            if p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= 8 and not any(word in name for word in adam)
        ]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        super().__init__([{"params": matrices, "muon": True}, {"params": rest, "muon": False}], {"lr": lr})

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                self._muon(parameters, group["lr"])
            else:
                self._adam(parameters, group["lr"])

    def _muon(self, parameters: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in parameters:
            average = self.state[p].setdefault("first", torch.zeros_like(p))
            average.lerp_(p.grad, 1 - momentum)
            ahead = p.grad.lerp(average, momentum).reshape(p.shape[0], -1)
            stacks[tuple(ahead.shape)].append((p, ahead))
        for (rows, columns), members in stacks.items():
            update = orthogonalise(torch.stack([ahead for _, ahead in members]))
            for (p, _), value in zip(members, update, strict=True):
                p.sub_(value.view_as(p), alpha=lr * 0.2 * max(rows, columns) ** 0.5)

    def _adam(self, parameters: list[Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        for p in parameters:
            state = self.state[p]
            if not state:
                state |= {"first": torch.zeros_like(p), "second": torch.zeros_like(p), "count": 0}
            state["count"] += 1
            state["first"].lerp_(p.grad, 1 - betas[0])
            state["second"].mul_(betas[1]).addcmul_(p.grad, p.grad, value=1 - betas[1])
            scale = (1 - betas[1] ** state["count"]) ** 0.5
            spread = state["second"].sqrt().div_(scale).add_(1e-8)
            p.addcdiv_(state["first"], spread, value=-lr / (1 - betas[0] ** state["count"]))
