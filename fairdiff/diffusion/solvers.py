"""The solvers, their time steps, and their linear coefficients c_t in z_0 = a z_T + sum_t c_t y_t for predictions y_t.

y_t is what the model predicts, see fairdiff/diffusion/sampling.py.
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
NOISIEST = (1, 1000)  # noise over image at the last time step: 14.6 of Stable Diffusion, 157 of DDPM's linear betas


def make_solver(kind: str, config: dict, final_sigmas: str, spacing: str, tokens: int = 0):
    """A linear solver on a model's own noise schedule.

    final_sigmas: "zero" or "sigma_min" (dpm, unipc). spacing: "linspace", "leading" or "trailing"; folders say one or the
    other, by which version of diffusers wrote them, and images differ. Noise levels of another solver's own (Karras's and
    the like) are not taken over from the folder either. tokens: `denoise.image_tokens` of a flow model. FairDiffError for a
    schedule that is none.
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
    own = {"timestep_spacing": spacing, "image_tokens": tokens}
    try:
        solver = FLOW.from_config({key: value for key, value in config.items() if key not in own})
    except Exception as error:
        raise FairDiffError(f"scheduler {FLOW.__name__}: {_first_words(error)}") from error
    solver.register_to_config(**own)
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


def time_steps(scheduler, steps: int, device) -> Tensor:
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


def step_generators(noise_BCHW: Tensor) -> list[torch.Generator]:
    """One for each image, from which a solver that adds noise draws it step after step.

    Seeded by SHA-256 of the image's initial noise, which (seed, prompt, index) give: so what is added depends on these and
    the step, whatever the batch and the device. `generator=` of a plain pipeline takes the list.
    """
    rows = noise_BCHW.detach().float().cpu().contiguous().numpy()
    digests = [hashlib.sha256(row.tobytes()).digest() for row in rows]
    return [torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")) for digest in digests]


def added_noise(scheduler, noise: Tensor) -> dict[str, list[torch.Generator]]:
    return {"generator": step_generators(noise)} if isinstance(scheduler, NOISY) else {}


def solver_coefficients(scheduler, steps: int) -> Tensor:
    """c_t [T] of z_0 = a z_T + sum_t c_t y_t, read off the scheduler by autograd through it alone; finite."""
    require_linear(scheduler)
    scheduler = copy.deepcopy(scheduler)
    timesteps = time_steps(scheduler, steps, "cpu")
    with torch.enable_grad():
        predicted = [torch.zeros(1, 1, 1, 1, requires_grad=True) for _ in timesteps]
        latent = torch.zeros(1, 1, 1, 1)
        added = added_noise(scheduler, latent)  # not from the global stream
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
    sigma = time_steps(copy.deepcopy(scheduler), steps, "cpu") / config["num_train_timesteps"]
    k = 1 / (shift - (shift - 1) * sigma) ** 2
    return c * k / k.log().mean().exp()
