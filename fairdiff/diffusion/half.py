"""The replay in float16, for devices without bfloat16, with loss scaling against underflow and overflow of gradients."""

import math
from dataclasses import replace

from fairdiff.diffusion.denoise import Guidance
from fairdiff.diffusion.sampling import Trajectory, Upstream, replay

TRIES = 8  # each with a quarter of the previous scale


def scaled_replay(unet, trajectory: Trajectory, guidance: Guidance, upstream: Upstream, micro_batch: int) -> None:
    """Run `replay` with g multiplied by S, and divide the resulting gradients by S in float32.

    S is the power of two that brings the largest upstream gradient into [1, 2), the middle of float16's range. If a gradient
    is not finite, S is divided by 4 and the replay is repeated. After TRIES the gradient is left as it is, and the step is
    refused. S depends on this step only, so it is not saved. Source: Micikevicius et al., ICLR 2018 (arXiv 1710.03740).
    """
    leaves = [leaf for leaf in (*unet.parameters(), guidance.cond, guidance.uncond) if leaf.requires_grad]
    before = [leaf.grad for leaf in leaves]
    scale = first_scale(upstream, len(trajectory.timesteps), guidance.scale)
    for _ in range(TRIES):
        for leaf in leaves:
            leaf.grad = None
        replay(unet, trajectory, guidance, replace(upstream, grad=upstream.grad * scale), micro_batch)
        if all(leaf.grad.isfinite().all() for leaf in leaves if leaf.grad is not None):
            break
        scale /= 4
    for leaf, grad in zip(leaves, before, strict=True):
        if leaf.grad is not None:
            leaf.grad = leaf.grad / scale if grad is None else grad + leaf.grad / scale
        else:
            leaf.grad = grad


def first_scale(upstream: Upstream, steps: int, guidance: float) -> float:
    """Return the power of two that brings the largest gradient of a prediction into [1, 2); 1 if it is 0 or not finite."""
    factor = steps / upstream.chosen.shape[1] * max(abs(guidance), abs(1 - guidance))
    largest = float(upstream.grad.abs().max()) * float(upstream.weights.abs().max()) * factor
    return 2.0 ** -math.floor(math.log2(largest)) if 0 < largest < math.inf else 1.0
