"""The sampler, and the replay that turns an image gradient into an adapter gradient.

Shapes: B images, T sampler steps, latents_BCHW, cond_1LD (one prompt) or cond_BLD.
If the U-Net's inputs are detached, z_0 is linear in the predictions y_t: z_0 = a z_T + sum_t c_t y_t (adjusted direct
fine-tuning, Shen et al., ICLR 2024, section 4.3). Hence dL/dtheta = sum_t w_t J_theta(y_t; sg(z_t))^T g, g = dL/dz_0.
y_t is the model's prediction, one of these:
- the noise eps;
- the velocity v with eps = alpha_t v + sigma_t z_t, alpha_t^2 = abar_t, sigma_t^2 = 1 - abar_t (Salimans and Ho 2022,
  arXiv 2202.00512);
- the velocity v = eps - x of a flow z = (1 - sigma) x + sigma eps, so eps = z + (1 - sigma) v (Liu et al. 2022, arXiv
  2209.03003).
"""

import copy
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fairdiff.diffusion.denoise import Guidance, call_unet, halves, predict
from fairdiff.diffusion.solvers import FLOW, added_noise, time_steps

# (prompt, noise_BCHW) -> image_BCHW in [0, 1]
Generate = Callable[[str, Tensor], Tensor]


def initial_noise(prompt: str, seed: int, indices: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Return standard normal noise [len(indices), *shape]; that of image i is the same for every batch size and process.

    Each image has its own generator, seeded by SHA-256 of (seed, prompt, index).
    """
    rows = []
    for index in indices:
        digest = hashlib.sha256(f"{seed}|{prompt}|{index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows)


@dataclass(frozen=True)
class Trajectory:
    """The U-Net's inputs (T tensors BCHW, scaled by the solver), its time steps [T] and the final latents z_0."""

    inputs: list[Tensor]
    timesteps: Tensor
    final: Tensor


@dataclass(frozen=True)
class Graph:
    """Options for a graph through the sampler steps, with each U-Net call checkpointed. Tests compare `replay` with it.

    detach: detach the U-Net's inputs (B_t = I). scale_T: factors [T] of the gradients of the predictions. last: only the
    last k steps have a graph (DRaFT-K: Clark et al., ICLR 2024, arXiv 2309.17400), None for all steps (DRaFT). With detach
    and scale_t = w_t / c_t the gradient equals that of `replay`.
    """

    detach: bool = False
    scale_T: Tensor | None = None
    last: int | None = None


def sample(unet, scheduler, guidance: Guidance, noise: Tensor, steps: int, graph: Graph | None = None) -> Trajectory:
    """Sample z_0 from noise [B, C, H, W] in T = steps solver steps, and keep every U-Net input."""
    scheduler = copy.deepcopy(scheduler)
    timesteps = time_steps(scheduler, steps, noise.device)
    flow, inputs, added = isinstance(scheduler, FLOW), [], added_noise(scheduler, noise)
    latent = noise if flow else noise * scheduler.init_noise_sigma  # after time_steps: Euler's value depends on them
    for i, t in enumerate(timesteps):
        with torch.set_grad_enabled(graph is not None and i >= steps - (graph.last or steps)):
            model_input = latent if flow else scheduler.scale_model_input(latent, t)
            inputs.append(model_input.detach())
            if graph is None:
                predicted = predict(unet, model_input, t, guidance)
            else:
                predicted = _recorded(unet, (i, t), guidance, model_input, graph)
            latent = scheduler.step(predicted, t, latent, **added).prev_sample
    return Trajectory(inputs, timesteps, latent)


def _recorded(unet, step: tuple[int, Tensor], guidance: Guidance, model_input: Tensor, graph: Graph) -> Tensor:
    """Return the prediction of step (number, time) with a graph; its forward pass is recomputed in the backward pass."""
    i, t = step

    def call(x, cond, uncond):
        return predict(unet, x, t, Guidance(cond, uncond, guidance.scale))

    model_input = model_input.detach() if graph.detach else model_input
    predicted = checkpoint(call, model_input, guidance.cond, guidance.uncond, use_reentrant=False)
    if graph.scale_T is not None and predicted.requires_grad:
        predicted.register_hook(lambda grad, k=float(graph.scale_T[i]): grad * k)
    return predicted


def choose_steps(batch: int, steps: int, evaluations: int | None, generator: torch.Generator) -> Tensor:
    """Choose the steps that each image replays, long [B, K], by systematic sampling with inclusion probability K/T.

    The offsets are stratified over the batch, so the batch covers the steps evenly. All T steps are chosen if K is None or
    at least T.
    """
    if evaluations is None or evaluations >= steps:
        return torch.arange(steps).expand(batch, steps)
    shift = torch.rand((), generator=generator)
    offset = (shift + torch.randperm(batch, generator=generator) / batch) % 1
    points = (offset[:, None] + torch.arange(evaluations)) * (steps / evaluations)
    return points.floor().long().clamp(max=steps - 1)


@dataclass(frozen=True)
class Upstream:
    """The inputs of `replay`: the gradient dL/dz_0 [B, C, H, W], step weights w_t [T] and the chosen steps [B, K]."""

    grad: Tensor
    weights: Tensor
    chosen: Tensor


def replay(unet, trajectory: Trajectory, guidance: Guidance, upstream: Upstream, micro_batch: int) -> None:
    """Accumulate sum_t w_t J(y_t; sg(z_t))^T g into the gradients of the U-Net's parameters and of the text embeddings.

    Each chosen (image, step) pair has one forward and one backward pass, in micro-batches of any size, so memory does not
    grow with T. `guidance.cond` and `.uncond` are [1, L, D] leaves or constants. Each half runs only if its embedding or the
    U-Net needs a gradient. The factor T/K makes the estimate unbiased.
    Images whose g is exactly 0 are skipped. If all are 0, one is replayed anyway: every leaf then gets a gradient (zeros),
    as in the other processes.
    """
    steps, count = len(trajectory.timesteps), upstream.chosen.shape[1]
    pulls = upstream.grad.flatten(1).any(1).cpu()  # NaN counts as not zero
    pulls[0] |= not pulls.any()
    image = pulls.nonzero()[:, 0].repeat_interleave(count)
    step = upstream.chosen[pulls].reshape(-1)
    weight = upstream.weights.to(upstream.grad)[step] * (steps / count)
    unet_learns = any(p.requires_grad for p in unet.parameters())
    for text, factor in halves(unet, guidance):
        if not (unet_learns or text.requires_grad):
            continue
        for rows in torch.arange(len(image)).split(micro_batch):
            latent = torch.stack([trajectory.inputs[s][i] for i, s in zip(image[rows], step[rows], strict=True)])
            grad = upstream.grad[image[rows]] * (weight[rows] * factor).view(-1, 1, 1, 1)
            times = trajectory.timesteps[step[rows]]
            predicted = call_unet(unet, latent, times, text.expand(len(rows), -1, -1), guidance.scale)
            predicted.backward(grad)
