"""The replay in float16 with loss scaling, for devices without bfloat16."""

import math
from dataclasses import replace

from fairdiff.diffusion.denoise import Guidance
from fairdiff.diffusion.sampling import Trajectory, Upstream, replay

TRIES = 8  # each with a quarter of the scale before


def scaled_replay(unet, trajectory: Trajectory, guidance: Guidance, upstream: Upstream, micro_batch: int) -> None:
    """`replay` with g multiplied by S before the denoiser's backward, and what it leaves divided by S in float32.

    S is a power of two that brings the largest upstream gradient to 1 to 2, float16's middle. Where a gradient is then not
    finite, S is divided by 4 and the replay repeated; after TRIES it is left as it is, so that the step is refused. S follows
    from the step alone: nothing is to be kept. Source: loss scaling, Micikevicius et al., ICLR 2018 (arXiv 1710.03740).
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
    """The power of two that brings the largest gradient of a prediction to [1, 2); 1 where there is none to scale."""
    factor = steps / upstream.chosen.shape[1] * max(abs(guidance), abs(1 - guidance))
    largest = float(upstream.grad.abs().max()) * float(upstream.weights.abs().max()) * factor
    return 2.0 ** -math.floor(math.log2(largest)) if 0 < largest < math.inf else 1.0
