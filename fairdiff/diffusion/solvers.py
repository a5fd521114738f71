"""The supported solvers, their time steps, and the coefficients of predictions in z_0 = a z_T + sum_t c_t y_t.

y_t is the model's prediction, see fairdiff/diffusion/sampling.py.
"""

import copy
import hashlib
import inspect
import math

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

from fairdiff.errors import FairDiffError

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
OWN_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
NOISIEST = (1, 1000)  # allowed sigma / alpha at the last time step: Stable Diffusion has 14.6, DDPM's linear betas 157


def make_solver(kind: str, config: dict, final_sigmas: str, spacing: str, tokens: int = 0):
    """Return a linear solver with the noise schedule of a model.

    final_sigmas: "zero" or "sigma_min" (dpm, unipc). spacing: "linspace", "leading" or "trailing". The folder's own value
    is not used: it depends on the version of diffusers that wrote the folder, and images differ. Karras's and similar noise
    levels (OWN_LEVELS) in the folder are not used either. tokens: `denoise.image_tokens` for a flow model. Raises
    FairDiffError for an invalid schedule.
    """
    flow = "beta_schedule" not in config
    if flow != (SOLVERS[kind] is FLOW):
        allowed = "flow_euler" if flow else ", ".join(name for name, solver in SOLVERS.items() if solver is not FLOW)
        what = "a flow-matching model" if flow else "a model of noise or its velocity"
        raise FairDiffError(f"sampler.scheduler: found {kind}, allowed with {what}: {allowed}")
    if flow:
        return _flow_solver(config, spacing, tokens)
    own = inspect.signature(SOLVERS[kind].__init__).parameters
    extra = {"timestep_spacing": spacing} | {key: False for key in OWN_LEVELS if key in own}
    extra |= {"final_sigmas_type": final_sigmas} if kind in ("dpm", "unipc") else {}
    if kind == "dpm":
        extra["algorithm_type"] = "dpmsolver++"
    if kind in ("ddim", "lcm"):
        extra["clip_sample"] = False
    try:
        solver = SOLVERS[kind].from_config(dict(config), **extra)
    except Exception as error:  # a value of a wrong type, an unknown beta_schedule, an unsupported combination
        raise FairDiffError(f"scheduler {SOLVERS[kind].__name__}: {_first_words(error)}") from error
    require_linear(solver)
    noisiest = float(((1 - solver.alphas_cumprod[-1]) / solver.alphas_cumprod[-1]).sqrt())
    if not NOISIEST[0] <= noisiest <= NOISIEST[1]:  # true for NaN as well
        raise FairDiffError(
            f"scheduler {type(solver).__name__}: its beta_schedule, beta_start, beta_end and num_train_timesteps end at "
            f"{noisiest:.4g} times as much noise as image, allowed: {NOISIEST[0]} to {NOISIEST[1]}"
        )
    return solver


def _flow_solver(config: dict, spacing: str, tokens: int) -> FLOW:
    """Return Euler with a flow model's noise schedule. Its configuration also holds what `time_steps` needs.

    linspace: levels from the schedule's first to its last, as in Stable Diffusion 3's pipeline. trailing: T levels
    1, (T - 1) / T, ..., 1 / T, as in FLUX's pipeline. The schedule's shift is applied to them afterwards.
    """
    if spacing not in ("linspace", "trailing"):
        raise FairDiffError(f"sampler.spacing: found {spacing}, allowed with flow_euler: linspace, trailing")
    own = {"timestep_spacing": spacing, "image_tokens": tokens}
    try:
        solver = FLOW.from_config({key: value for key, value in config.items() if key not in own})
    except Exception as error:
        raise FairDiffError(f"scheduler {FLOW.__name__}: {_first_words(error)}") from error
    solver.register_to_config(**own)
    require_linear(solver)
    return solver


def require_linear(scheduler) -> None:
    """Raise FairDiffError if z_0 is not a linear function of the predictions (clipping, thresholding).

    Noise n_t that a solver adds between steps is allowed: z_0 = a z_T + sum_t c_t y_t + sum_t b_t n_t.
    Options of other solvers in its configuration have no effect and are not checked.
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


def time_steps(scheduler, steps: int, device) -> Tensor:
    try:
        if isinstance(scheduler, FLOW):
            trailing = scheduler.config["timestep_spacing"] == "trailing"
            sigmas = np.linspace(1, 1 / steps, steps) if trailing else None
            scheduler.set_timesteps(steps, device=device, sigmas=sigmas, mu=_mu(scheduler.config))
        else:
            scheduler.set_timesteps(steps, device=device)
    except Exception as error:  # a schedule with fewer steps, or options that need more arguments
        raise FairDiffError(
            f"scheduler {type(scheduler).__name__}: cannot take {steps} steps: {_first_words(error)}"
        ) from error
    if len(scheduler.timesteps) != steps:
        raise FairDiffError(f"scheduler {type(scheduler).__name__}: takes {len(scheduler.timesteps)} steps for {steps}")
    return scheduler.timesteps.clone()


def _mu(config: dict) -> float | None:
    """Return mu of a schedule, which is linear in the number of image tokens; None for a schedule with a fixed shift.

    Source: Esser et al. 2024 (arXiv 2403.03206), section 5.3.2, as implemented in diffusers' FluxPipeline.
    """
    if not config["use_dynamic_shifting"]:
        return None
    fewest, most = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (most - fewest)
    return config["base_shift"] + slope * (config["image_tokens"] - fewest)


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def step_generators(noise_BCHW: Tensor) -> list[torch.Generator]:
    """Return one generator for each image, from which a solver that adds noise draws it at each step.

    Each is seeded by SHA-256 of the image's initial noise. So the added noise depends on (seed, prompt, index) and the step,
    not on the batch or the device. diffusers' pipelines take the list as `generator=`.
    """
    rows = noise_BCHW.detach().float().cpu().contiguous().numpy()
    digests = [hashlib.sha256(row.tobytes()).digest() for row in rows]
    return [torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")) for digest in digests]


def added_noise(scheduler, noise: Tensor) -> dict[str, list[torch.Generator]]:
    return {"generator": step_generators(noise)} if isinstance(scheduler, NOISY) else {}


def solver_coefficients(scheduler, steps: int) -> Tensor:
    """Return c_t [T] of z_0 = a z_T + sum_t c_t y_t, finite, by autograd through the scheduler without the U-Net."""
    require_linear(scheduler)
    scheduler = copy.deepcopy(scheduler)
    timesteps = time_steps(scheduler, steps, "cpu")
    with torch.enable_grad():
        predicted = [torch.zeros(1, 1, 1, 1, requires_grad=True) for _ in timesteps]
        latent = torch.zeros(1, 1, 1, 1)
        added = added_noise(scheduler, latent)  # leaves the global generator unchanged
        for y, t in zip(predicted, timesteps, strict=True):
            if not isinstance(scheduler, FLOW):
                scheduler.scale_model_input(latent, t)  # Euler warns if it is not called; the result is not needed
            latent = scheduler.step(y, t, latent, **added).prev_sample
        coefficients = torch.stack([g.reshape(()) for g in torch.autograd.grad(latent, predicted)])
    if not coefficients.isfinite().all():
        raise FairDiffError(f"scheduler {type(scheduler).__name__}: its coefficients of {steps} steps are not finite")
    return coefficients


def gradient_weights(mode: str, scheduler, steps: int) -> Tensor:
    """Return the weights w_t [T] of the gradients of the predictions y_t.

    unit: mean(c) at every step (A_t = 1 of the paper, with the sign of the solver). solver: c_t (B_t = I only).
    reference: c_t k_t with k_t proportional to sqrt(abar_t) sqrt(1 - abar_t) / beta_t, geometric mean 1 (released code).
    unit and reference weight the gradient of the *noise*, with c_t of a model that predicts noise. For a model that predicts
    velocity, d eps / d theta = alpha_t d v / d theta (its inputs are detached), so w_t is multiplied by alpha_t. Flow models:
    see `_flow_weights`.
    """
    if mode == "solver":
        return solver_coefficients(scheduler, steps)
    if isinstance(scheduler, FLOW):
        return _flow_weights(mode, scheduler, steps)
    of_noise = type(scheduler).from_config(scheduler.config, prediction_type="epsilon")
    c = solver_coefficients(of_noise, steps)
    times = time_steps(copy.deepcopy(scheduler), steps, "cpu").long()
    abar, beta = scheduler.alphas_cumprod[times], scheduler.betas[times]
    noise_by_prediction = abar.sqrt() if scheduler.config.prediction_type == "v_prediction" else torch.ones(steps)
    if mode == "unit":
        return c.mean() * noise_by_prediction
    if mode == "reference":
        k = (abar * (1 - abar)).sqrt() / beta
        return c * k / k.log().mean().exp() * noise_by_prediction
    raise ValueError(f"gradient.type: found {mode}, allowed: unit, reference, solver")


def _flow_weights(mode: str, scheduler, steps: int) -> Tensor:
    """Return w_t [T] for a flow's velocity, whose coefficients are the steps: c_t = sigma_{t+1} - sigma_t, sum -1.

    unit: mean(c). Equal weights for the noise eps = z + (1 - sigma) v do not exist: its coefficient c_t / (1 - sigma_t) is
    infinite at sigma = 1, where z is the noise whatever the model predicts. So the velocity has equal weights.
    reference: k_t of the released code is the inverse of the speed at which the noise level sigma(t) = sqrt((1 - abar) /
    abar) changes over the training time. A flow with shift s has sigma(u) = s u / (1 + (s - 1) u), so k_t is proportional
    to 1 / sigma'(u) = s / (s - (s - 1) sigma)^2, with geometric mean 1.
    """
    c = solver_coefficients(scheduler, steps)
    if mode == "unit":
        return c.mean().expand(steps)
    if mode != "reference":
        raise ValueError(f"gradient.type: found {mode}, allowed: unit, reference, solver")
    config, mu = scheduler.config, _mu(scheduler.config)
    exponential = config["time_shift_type"] == "exponential"
    shift = config["shift"] if mu is None else math.exp(mu) if exponential else mu
    sigma = time_steps(copy.deepcopy(scheduler), steps, "cpu") / config["num_train_timesteps"]
    k = 1 / (shift - (shift - 1) * sigma) ** 2
    return c * k / k.log().mean().exp()
