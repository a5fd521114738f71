"""One sampler, its linear coefficients, and the replay that turns an image gradient into an adapter gradient.

Shapes: B images, T sampler steps, latents_BCHW, cond_1LD (one prompt) or cond_BLD.
Source of the factorised form: z_0 is linear in the predictions y_t once the U-Net's inputs are detached (adjusted
direct fine-tuning, Shen et al., ICLR 2024, section 4.3), z_0 = a z_T + sum_t c_t y_t, hence
dL/dtheta = sum_t w_t J_theta(y_t; sg(z_t))^T g with g = dL/dz_0.
y_t is what the model predicts: the noise eps; the velocity v of eps = alpha_t v + sigma_t z_t (Salimans and Ho 2022,
arXiv 2202.00512), alpha_t^2 = abar_t, sigma_t^2 = 1 - abar_t; or the velocity v = eps - x of a flow z = (1 - sigma) x +
sigma eps (Liu et al. 2022, arXiv 2209.03003), eps = z + (1 - sigma) v.
"""

import copy
import hashlib
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fairdiff.diffusion.denoise import Guidance, call_unet, halves, predict
from fairdiff.errors import FairDiffError

# (prompt, noise_BCHW) -> image_BCHW in [0, 1]
Generate = Callable[[str, Tensor], Tensor]


def initial_noise(prompt: str, seed: int, indices: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise [len(indices), *shape], image i the same for every batch size and process.

    Each image has its own generator, seeded by SHA-256 of (seed, prompt, index).
    """
    rows = []
    for index in indices:
        digest = hashlib.sha256(f"{seed}|{prompt}|{index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows)


def step_generators(noise_BCHW: Tensor) -> list[torch.Generator]:
    """One for each image, from which a solver that adds noise draws it step after step.

    Seeded by SHA-256 of the image's initial noise, which (seed, prompt, index) give: so what is added depends on these and
    the step, whatever the batch and the device. `generator=` of a plain pipeline takes the list.
    """
    rows = noise_BCHW.detach().float().cpu().contiguous().numpy()
    digests = [hashlib.sha256(row.tobytes()).digest() for row in rows]
    return [torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")) for digest in digests]


@dataclass(frozen=True)
class Trajectory:
    """The U-Net's inputs (T tensors BCHW, scaled as the solver wants them), its time steps [T] and z_0."""

    inputs: list[Tensor]
    timesteps: Tensor
    final: Tensor


SOLVERS = {
    "dpm": DPMSolverMultistepScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "lcm": LCMScheduler,
    "flow_euler": FlowMatchEulerDiscreteScheduler,
}
FLOW = FlowMatchEulerDiscreteScheduler
NOISY = (EulerAncestralDiscreteScheduler, LCMScheduler)  # they add noise after a step


PREDICTIONS = ("epsilon", "v_prediction")
NOISIEST = (1, 1000)  # noise over image at the last time step: 14.6 of Stable Diffusion, 157 of DDPM's linear betas


def make_solver(kind: str, config: dict, final_sigmas: str, spacing: str, tokens: int = 0):
    """A linear solver on a model's own noise schedule.

    final_sigmas: "zero" or "sigma_min" (dpm, unipc). spacing: "linspace", "leading" or "trailing"; folders say one or the
    other, by which version of diffusers wrote them, and images differ. tokens: `denoise.image_tokens` of a flow model.
    FairDiffError for a schedule that is none.
    """
    flow = "beta_schedule" not in config
    if flow != (SOLVERS[kind] is FLOW):
        allowed = "flow_euler" if flow else ", ".join(name for name, solver in SOLVERS.items() if solver is not FLOW)
        what = "a flow-matching model" if flow else "a model of noise or its velocity"
        raise FairDiffError(f"sampler.scheduler: found {kind}, allowed with {what}: {allowed}")
    if flow:
        return _flow_solver(config, spacing, tokens)
    extra = {"timestep_spacing": spacing}
    extra |= {"final_sigmas_type": final_sigmas} if kind in ("dpm", "unipc") else {}
    if kind == "dpm":
        extra["algorithm_type"] = "dpmsolver++"
    if kind in ("ddim", "lcm"):
        extra["clip_sample"] = False
    try:
        solver = SOLVERS[kind].from_config(dict(config), **extra)
    except Exception as error:  # of a value of another type, an unknown beta_schedule, a combination it does not offer
        raise FairDiffError(f"scheduler {SOLVERS[kind].__name__}: {_first_words(error)}") from error
    require_linear(solver)
    noisiest = float(((1 - solver.alphas_cumprod[-1]) / solver.alphas_cumprod[-1]).sqrt())
    if not NOISIEST[0] <= noisiest <= NOISIEST[1]:  # nor if it is NaN
        raise FairDiffError(
            f"scheduler {type(solver).__name__}: its beta_schedule, beta_start, beta_end and num_train_timesteps end at "
            f"{noisiest:.4g} times as much noise as image, allowed: {NOISIEST[0]} to {NOISIEST[1]}"
        )
    return solver


def _flow_solver(config: dict, spacing: str, tokens: int) -> FLOW:
    """Euler on a flow's own schedule. What `_set_timesteps` needs beside it stands in its configuration too.

    linspace: from the schedule's first noise level to its last, as Stable Diffusion 3's pipeline. trailing: T levels
    1, (T - 1) / T, ..., 1 / T, as FLUX's pipeline; both before the schedule's shift.
    """
    if spacing not in ("linspace", "trailing"):
        raise FairDiffError(f"sampler.spacing: found {spacing}, allowed with flow_euler: linspace, trailing")
    try:
        solver = FLOW.from_config({**config, "timestep_spacing": spacing, "image_tokens": tokens})
    except Exception as error:
        raise FairDiffError(f"scheduler {FLOW.__name__}: {_first_words(error)}") from error
    require_linear(solver)
    return solver


def require_linear(scheduler) -> None:
    """Refuse solvers whose z_0 is not a linear function of the predictions (clipping, thresholding).

    Noise that a solver adds by itself changes nothing in that: z_0 = a z_T + sum_t c_t y_t + sum_t b_t n_t.
    What its configuration holds of another solver's options has no effect on it.
    """
    name = type(scheduler).__name__
    if type(scheduler) not in SOLVERS.values():
        raise FairDiffError(f"scheduler {name}: allowed: {', '.join(s.__name__ for s in SOLVERS.values())}")
    own = inspect.signature(type(scheduler).__init__).parameters
    config = {key: value for key, value in scheduler.config.items() if key in own}
    for key in ("stochastic_sampling", "invert_sigmas"):
        if config.get(key):
            raise FairDiffError(f"scheduler {name}: {key} is on, allowed: false in the model's scheduler_config.json")
    if type(scheduler) is FLOW:
        return
    if config["prediction_type"] not in PREDICTIONS:
        allowed = ", ".join(PREDICTIONS)
        raise FairDiffError(f"scheduler {name}: prediction_type is {config['prediction_type']}, allowed: {allowed}")
    for key in ("clip_sample", "thresholding"):
        if config.get(key):
            raise FairDiffError(
                f"scheduler {name}: {key} is on, but a linear solver is needed; allowed: {key} false in the model's "
                "scheduler_config.json, or a sampler.scheduler without it"
            )
    if str(config.get("algorithm_type", "")).startswith("sde"):
        raise FairDiffError(
            f"scheduler {name}: algorithm_type {config['algorithm_type']} adds noise; allowed: dpmsolver++"
        )


def _timesteps(scheduler, steps: int, device) -> Tensor:
    try:
        if isinstance(scheduler, FLOW):
            trailing = scheduler.config["timestep_spacing"] == "trailing"
            sigmas = np.linspace(1, 1 / steps, steps) if trailing else None
            scheduler.set_timesteps(steps, device=device, sigmas=sigmas, mu=_mu(scheduler.config))
        else:
            scheduler.set_timesteps(steps, device=device)
    except Exception as error:  # of a schedule of fewer steps, or with options that ask for more than a number of steps
        raise FairDiffError(
            f"scheduler {type(scheduler).__name__}: cannot take {steps} steps: {_first_words(error)}"
        ) from error
    if len(scheduler.timesteps) != steps:
        raise FairDiffError(f"scheduler {type(scheduler).__name__}: takes {len(scheduler.timesteps)} steps for {steps}")
    return scheduler.timesteps.clone()


def _mu(config: dict) -> float | None:
    """mu of a schedule whose shift is linear in the number of image tokens, None of one with a fixed shift.

    Source: Esser et al. 2024 (arXiv 2403.03206), section 5.3.2, as diffusers' pipeline of FLUX takes it.
    """
    if not config["use_dynamic_shifting"]:
        return None
    fewest, most = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (most - fewest)
    return config["base_shift"] + slope * (config["image_tokens"] - fewest)


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@dataclass(frozen=True)
class Graph:
    """A graph over the sampler steps themselves, the oracle of `replay`: each U-Net call is checkpointed.

    detach: cut the U-Net's inputs (B_t = I). scale_T multiplies the gradient of step t's prediction. last: only the last k
    steps have a graph (DRaFT-K: Clark et al., ICLR 2024, arXiv 2309.17400), None for all (DRaFT). With detach and
    scale_t = w_t / c_t this gives the gradient of `replay`.
    """

    detach: bool = False
    scale_T: Tensor | None = None
    last: int | None = None


def sample(unet, scheduler, guidance: Guidance, noise: Tensor, steps: int, graph: Graph | None = None) -> Trajectory:
    """Sample z_0 from noise [B, C, H, W] in T = steps solver steps, keeping every U-Net input."""
    scheduler = copy.deepcopy(scheduler)
    timesteps = _timesteps(scheduler, steps, noise.device)
    flow, inputs, added = isinstance(scheduler, FLOW), [], _added_noise(scheduler, noise)
    latent = noise if flow else noise * scheduler.init_noise_sigma  # of these timesteps: Euler's depends on them
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


def _added_noise(scheduler, noise: Tensor) -> dict[str, list[torch.Generator]]:
    return {"generator": step_generators(noise)} if isinstance(scheduler, NOISY) else {}


def _recorded(unet, step: tuple[int, Tensor], guidance: Guidance, model_input: Tensor, graph: Graph) -> Tensor:
    """The prediction of step (number, time) with a graph, its forward done again in the backward."""
    i, t = step

    def call(x, cond, uncond):
        return predict(unet, x, t, Guidance(cond, uncond, guidance.scale))

    model_input = model_input.detach() if graph.detach else model_input
    predicted = checkpoint(call, model_input, guidance.cond, guidance.uncond, use_reentrant=False)
    if graph.scale_T is not None and predicted.requires_grad:
        predicted.register_hook(lambda grad, k=float(graph.scale_T[i]): grad * k)
    return predicted


def solver_coefficients(scheduler, steps: int) -> Tensor:
    """c_t [T] of z_0 = a z_T + sum_t c_t y_t, read off the scheduler by autograd through it alone; finite."""
    require_linear(scheduler)
    scheduler = copy.deepcopy(scheduler)
    timesteps = _timesteps(scheduler, steps, "cpu")
    with torch.enable_grad():
        predicted = [torch.zeros(1, 1, 1, 1, requires_grad=True) for _ in timesteps]
        latent = torch.zeros(1, 1, 1, 1)
        added = _added_noise(scheduler, latent)  # not from the global stream
        for y, t in zip(predicted, timesteps, strict=True):
            if not isinstance(scheduler, FLOW):
                scheduler.scale_model_input(latent, t)  # euler warns without; its inputs do not matter here
            latent = scheduler.step(y, t, latent, **added).prev_sample
        coefficients = torch.stack([g.reshape(()) for g in torch.autograd.grad(latent, predicted)])
    if not coefficients.isfinite().all():
        raise FairDiffError(f"scheduler {type(scheduler).__name__}: its coefficients of {steps} steps are not finite")
    return coefficients


def gradient_weights(mode: str, scheduler, steps: int) -> Tensor:
    """w_t [T] by which the gradient of step t's prediction is multiplied.

    unit: mean(c) at every step (A_t = 1 of the paper, with the sign of the solver); solver: c_t (B_t = I only);
    reference: c_t k_t with k_t proportional to sqrt(abar_t) sqrt(1 - abar_t) / beta_t, geometric mean 1 (released code).
    unit and reference weigh the gradient of the *noise*, with the c of a model that predicts it. Of one that predicts
    velocity that gradient is alpha_t times its own, since its inputs are detached. Of a flow see `_flow_weights`.
    """
    if mode == "solver":
        return solver_coefficients(scheduler, steps)
    if isinstance(scheduler, FLOW):
        return _flow_weights(mode, scheduler, steps)
    of_noise = type(scheduler).from_config(scheduler.config, prediction_type="epsilon")
    c = solver_coefficients(of_noise, steps)
    times = _timesteps(copy.deepcopy(scheduler), steps, "cpu").long()
    abar, beta = scheduler.alphas_cumprod[times], scheduler.betas[times]
    noise_by_prediction = abar.sqrt() if scheduler.config.prediction_type == "v_prediction" else torch.ones(steps)
    if mode == "unit":
        return c.mean() * noise_by_prediction
    if mode == "reference":
        k = (abar * (1 - abar)).sqrt() / beta
        return c * k / k.log().mean().exp() * noise_by_prediction
    raise ValueError(f"gradient.type: found {mode}, allowed: unit, reference, solver")


def _flow_weights(mode: str, scheduler, steps: int) -> Tensor:
    """w_t [T] of a flow's velocity, whose coefficient is the step itself: c_t = sigma_{t+1} - sigma_t, their sum -1.

    unit: mean(c). Of the noise eps = z + (1 - sigma) v the gradient is (1 - sigma) times the velocity's, and its c is
    c_t / (1 - sigma_t): infinite at sigma = 1, where z is the noise whatever is predicted. So the velocity weighs the same at
    every step.
    reference: the released code's k_t is the inverse of how fast the noise level changes over the training time, of
    sigma(t) = sqrt((1 - abar) / abar) there. A flow's is sigma(u) = s u / (1 + (s - 1) u) with shift s, so k_t is
    proportional to 1 / sigma'(u) = s / (s - (s - 1) sigma)^2, geometric mean 1.
    """
    c = solver_coefficients(scheduler, steps)
    if mode == "unit":
        return c.mean().expand(steps)
    if mode != "reference":
        raise ValueError(f"gradient.type: found {mode}, allowed: unit, reference, solver")
    config, mu = scheduler.config, _mu(scheduler.config)
    exponential = config["time_shift_type"] == "exponential"
    shift = config["shift"] if mu is None else math.exp(mu) if exponential else mu
    sigma = _timesteps(copy.deepcopy(scheduler), steps, "cpu") / config["num_train_timesteps"]
    k = 1 / (shift - (shift - 1) * sigma) ** 2
    return c * k / k.log().mean().exp()


def choose_steps(batch: int, steps: int, evaluations: int | None, generator: torch.Generator) -> Tensor:
    """Which of T steps each image replays: long [B, K], by systematic sampling with inclusion probability K/T.

    Offsets are stratified over the batch, so the whole batch covers the steps evenly. K = T (or None) takes all.
    """
    if evaluations is None or evaluations >= steps:
        return torch.arange(steps).expand(batch, steps)
    shift = torch.rand((), generator=generator)
    offset = (shift + torch.randperm(batch, generator=generator) / batch) % 1
    points = (offset[:, None] + torch.arange(evaluations)) * (steps / evaluations)
    return points.floor().long().clamp(max=steps - 1)


@dataclass(frozen=True)
class Upstream:
    """What flows into `replay`: dL/dz_0 [B, C, H, W], step weights w_t [T] and the chosen steps [B, K]."""

    grad: Tensor
    weights: Tensor
    chosen: Tensor


def replay(unet, trajectory: Trajectory, guidance: Guidance, upstream: Upstream, micro_batch: int) -> None:
    """Accumulate sum_t w_t J(y_t; sg(z_t))^T g into every leaf that the U-Net and the text embeddings reach.

    One forward and backward per chosen (image, step) pair, in micro-batches of any size: memory is constant in T.
    `guidance.cond` and `.uncond` are [1, L, D] leaves or constants; the unconditional half runs only if something
    in it needs a gradient. The factor T/K makes the estimate unbiased.
    """
    batch, count = upstream.chosen.shape
    steps = len(trajectory.timesteps)
    image = torch.arange(batch).repeat_interleave(count)
    step = upstream.chosen.reshape(-1)
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
