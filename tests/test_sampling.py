"""Laws of sampling and of the factorised gradient, each held against literal autograd or finite differences."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from diffusers.utils import logging as diffusers_logging

from fairdiff.diffusion.adapters import Lora, SoftTokens
from fairdiff.diffusion.denoise import Guidance
from fairdiff.diffusion.sampling import Graph, Upstream, choose_steps, initial_noise, replay, sample
from fairdiff.diffusion.solvers import gradient_weights, make_solver, solver_coefficients
from fairdiff.errors import FairDiffError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SOLVERS = {
    "dpm": DPMSolverMultistepScheduler(**BETAS),
    "ddim": DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1),
    "dpm, velocity": DPMSolverMultistepScheduler(**BETAS, prediction_type="v_prediction"),
}
PROMPT = "a photo of the face of a nurse"


def make_adapter(model, kind):
    generator = torch.Generator().manual_seed(1)
    if kind == "soft_tokens":
        return SoftTokens(model, 3, "a photo")
    parts = {"lora_text": ["text_encoder"], "lora_unet": ["unet"], "lora_both": ["text_encoder", "unet"]}[kind]
    adapter = Lora(model, parts, 4, 4, generator)
    for p in adapter.parameters():  # off the saddle at zero, so that every factor has a gradient
        p.data.add_(0.05 * torch.randn(p.shape, generator=generator))
    return adapter


def loss_of(latent):
    return (latent.flatten(1) @ torch.linspace(-1, 1, latent[0].numel()) / 20).tanh().square().sum()


def guidance_of(model, adapter, scale=3.0):
    return Guidance(*model.encode_pair(adapter.prefix + PROMPT), scale)


def factorised(model, adapter, scheduler, mode, steps, chosen=None, micro_batch=3):
    live = guidance_of(model, adapter)
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in (live.cond, live.uncond)]
    noise = initial_noise(PROMPT, 0, range(2), model.latent_shape)
    guidance = Guidance(*leaves, live.scale)
    trajectory = sample(model.unet, scheduler, guidance, noise, steps)
    final = trajectory.final.requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(final), final)
    weights = gradient_weights(mode, scheduler, steps)
    chosen = choose_steps(2, steps, None, None) if chosen is None else chosen
    for p in adapter.parameters():
        p.grad = None
    replay(model.unet, trajectory, guidance, Upstream(grad, weights, chosen), micro_batch)
    pairs = [(t, leaf.grad) for t, leaf in zip((live.cond, live.uncond), leaves, strict=True) if leaf.grad is not None]
    torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
    return torch.cat([p.grad.flatten() for p in adapter.parameters()])


def literal(model, adapter, scheduler, mode, steps):
    noise = initial_noise(PROMPT, 0, range(2), model.latent_shape)
    scale = gradient_weights(mode, scheduler, steps) / solver_coefficients(scheduler, steps)
    graph = Graph(detach=True, scale_T=scale)
    final = sample(model.unet, scheduler, guidance_of(model, adapter), noise, steps, graph).final
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(final), adapter.parameters())])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["soft_tokens", "lora_text", "lora_unet", "lora_both"])
@pytest.mark.parametrize("mode", ["unit", "reference", "solver"])
def test_factorised_gradient_equals_literal_autograd(tiny_model, kind, solver, mode):
    adapter = make_adapter(tiny_model, kind)
    ours = factorised(tiny_model, adapter, SOLVERS[solver], mode, steps=4)
    oracle = literal(tiny_model, adapter, SOLVERS[solver], mode, steps=4)
    assert oracle.norm() > 0
    assert (ours - oracle).norm() / oracle.norm() <= 1e-5


@pytest.mark.parametrize("kind", ["soft_tokens", "lora_text", "lora_unet"])
def test_exact_gradient_agrees_with_finite_differences(tiny_model, kind):
    adapter = make_adapter(tiny_model, kind)
    for module in (tiny_model.unet, tiny_model.text_encoder):
        module.double()
    scheduler, noise = SOLVERS["ddim"], initial_noise(PROMPT, 0, range(1), tiny_model.latent_shape).double()

    def loss():
        guidance = guidance_of(tiny_model, adapter)
        return loss_of64(sample(tiny_model.unet, scheduler, guidance, noise, 3, Graph()).final)

    def loss_of64(latent):
        return (
            (latent.flatten(1) @ torch.linspace(-1, 1, latent[0].numel(), dtype=latent.dtype) / 20)
            .tanh()
            .square()
            .sum()
        )

    parameter = adapter.parameters()[-1]
    (grad,) = torch.autograd.grad(loss(), parameter)
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        values = []
        for step in (1e-4, -1e-4):
            parameter.add_(step * direction)
            values.append(loss().item())
            parameter.sub_(step * direction)
    assert (grad * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-4)


def exact(model, adapter, scheduler, steps, last):
    noise = initial_noise(PROMPT, 0, range(2), model.latent_shape)
    final = sample(model.unet, scheduler, guidance_of(model, adapter), noise, steps, Graph(last=last)).final
    return final, torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(final), adapter.parameters())])


@pytest.mark.parametrize("kind", ["soft_tokens", "lora_unet"])
def test_truncated_at_every_step_is_the_literal_loop(tiny_model, kind):
    adapter = make_adapter(tiny_model, kind)
    latent, full = exact(tiny_model, adapter, SOLVERS["dpm"], 4, None)
    same, every = exact(tiny_model, adapter, SOLVERS["dpm"], 4, 4)
    shorter, some = exact(tiny_model, adapter, SOLVERS["dpm"], 4, 2)
    noise = initial_noise(PROMPT, 0, range(2), tiny_model.latent_shape)
    plain = sample(tiny_model.unet, SOLVERS["dpm"], guidance_of(tiny_model, adapter), noise, 4).final
    assert torch.equal(every, full) and torch.equal(latent, same) and torch.equal(latent, shorter)
    assert torch.allclose(plain, latent, atol=1e-6) and latent.requires_grad and not plain.requires_grad
    assert (some - full).norm() / full.norm() > 0.01


def test_truncated_agrees_with_finite_differences_of_the_last_steps_alone(tiny_model):
    """Only the last two U-Net calls see the changed parameter."""
    adapter, steps, last = make_adapter(tiny_model, "lora_unet"), 4, 2
    tiny_model.unet.double()
    text = [t.double() for t in tiny_model.encode_pair(PROMPT)]
    noise = initial_noise(PROMPT, 0, range(1), tiny_model.latent_shape).double()
    direction_of = torch.linspace(-1, 1, noise.numel(), dtype=torch.double)
    parameter = adapter.parameters()[-1]
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).double()

    def loss(shift):
        calls = []

        def move(*_):
            calls.append(shift * direction if len(calls) >= steps - last else 0 * direction)
            parameter.data.add_(calls[-1])

        def move_back(*_):
            parameter.data.sub_(calls[-1])

        unet = tiny_model.unet
        hooks = [unet.register_forward_pre_hook(move), unet.register_forward_hook(move_back)]
        with torch.no_grad():
            final = sample(unet, SOLVERS["dpm"], Guidance(*text, 3.0), noise, steps).final
        for hook in hooks:
            hook.remove()
        return (final.flatten() @ direction_of).item()

    graph = Graph(last=last)
    final = sample(tiny_model.unet, SOLVERS["dpm"], Guidance(*text, 3.0), noise, steps, graph).final
    (grad,) = torch.autograd.grad(final.flatten() @ direction_of, parameter)
    difference = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert (grad * direction).sum().item() == pytest.approx(difference, rel=1e-4) and difference != 0


def test_images_without_a_gradient_are_not_replayed(tiny_model):
    """Only images with a gradient are replayed. If none has one, a single image is, so that gradients are 0 and not None."""
    adapter, rows = make_adapter(tiny_model, "lora_both"), []
    text = [t.detach().requires_grad_() for t in tiny_model.encode_pair(PROMPT)]
    guidance, noise = Guidance(*text, 3.0), initial_noise(PROMPT, 0, range(4), tiny_model.latent_shape)
    trajectory = sample(tiny_model.unet, SOLVERS["dpm"], Guidance(*(t.detach() for t in text), 3.0), noise, 3)
    chosen = choose_steps(4, 3, 2, torch.Generator().manual_seed(0))
    hook = tiny_model.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    leaves = [p for p in adapter.parameters() if p.requires_grad] + text

    def gradients(grad):
        """Return the gradient of each leaf, and the number of images in the U-Net's forward passes."""
        rows.clear()
        for leaf in leaves:
            leaf.grad = None
        replay(tiny_model.unet, trajectory, guidance, Upstream(grad, torch.ones(3), chosen), micro_batch=3)
        return [leaf.grad for leaf in leaves], sum(rows)

    pull = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    pull[[0, 2]] = 0
    found, count = gradients(pull)
    assert count == 2 * 2 * 2  # images, steps, halves
    faint, all_of_them = gradients(pull + 1e-30 * torch.eye(4)[[0, 2]].sum(0).view(4, 1, 1, 1))
    assert all_of_them == 2 * 4 * 2
    for one, other in zip(found, faint, strict=True):
        assert (one is None) == (other is None) and (one is None or (one - other).norm() <= 1e-5 * other.norm())
    nothing, count = gradients(torch.zeros_like(pull))
    hook.remove()
    assert count == 2 * 2 and [g is None for g in nothing] == [g is None for g in found]
    assert not any(g.any() for g in nothing if g is not None) and any(g is not None for g in nothing)


def test_micro_batches_of_replay_add_up(tiny_model):
    adapter = make_adapter(tiny_model, "lora_both")
    whole = factorised(tiny_model, adapter, SOLVERS["dpm"], "unit", 5, micro_batch=100)
    parts = factorised(tiny_model, adapter, SOLVERS["dpm"], "unit", 5, micro_batch=1)
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("steps,count", [(21, 7), (19, 4), (23, 6), (8, 3)])
def test_every_step_is_replayed_with_probability_k_over_t(steps, count):
    generator = torch.Generator().manual_seed(0)
    rounds, batch = 4000, 4
    chosen = torch.stack([choose_steps(batch, steps, count, generator) for _ in range(rounds)])
    assert all(len(set(row.tolist())) == count for row in chosen[0])
    share = torch.bincount(chosen.flatten(), minlength=steps) / (rounds * batch)
    assert (share - count / steps).abs().max() < 0.02


def test_truncated_replay_is_unbiased(tiny_model):
    """The mean over all equally likely systematic samples equals the full gradient, also where K does not divide T."""
    adapter = make_adapter(tiny_model, "soft_tokens")
    steps, count, cells = 5, 2, 10
    full = factorised(tiny_model, adapter, SOLVERS["dpm"], "unit", steps)
    offsets = (torch.arange(cells) + 0.5) / cells  # the sample changes only at multiples of 1/cells
    samples = [((o + torch.arange(count)) * steps / count).floor().long().expand(2, count) for o in offsets]
    mean = sum(factorised(tiny_model, adapter, SOLVERS["dpm"], "unit", steps, c) for c in samples) / cells
    assert (mean - full).norm() / full.norm() < 1e-4


@pytest.mark.parametrize("solver", SOLVERS)
def test_final_latent_is_linear_with_the_stated_coefficients(solver):
    scheduler, steps = SOLVERS[solver], 7
    scheduler.set_timesteps(steps)
    eps = torch.randn(steps, 1, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    latent = torch.zeros(1, 1, 1, 1)
    for e, t in zip(eps, scheduler.timesteps, strict=True):
        latent = scheduler.step(e, t, latent).prev_sample
    assert latent.item() == pytest.approx(
        (solver_coefficients(scheduler, steps) * eps.flatten()).sum().item(), rel=1e-4
    )


class Velocity(torch.nn.Module):
    """A U-Net that predicts the velocity of the noise that another one predicts: v = (eps - sigma z) / alpha."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.unet, self.abar = unet, scheduler.alphas_cumprod
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

    def forward(self, latent, timestep, **more):
        abar = self.abar[timestep.long()].reshape(-1, 1, 1, 1)
        eps = self.unet(latent, timestep, **more).sample
        return SimpleNamespace(sample=(eps - (1 - abar).sqrt() * latent) / abar.sqrt())


@pytest.mark.parametrize("kind", ["dpm", "ddim"])
@pytest.mark.parametrize("mode", ["unit", "reference"])
def test_a_model_of_velocity_gives_the_images_and_the_gradient_of_the_noise_that_it_means(tiny_model, kind, mode):
    noise_solver = SOLVERS[kind]
    solver = type(noise_solver).from_config(noise_solver.config, prediction_type="v_prediction")
    adapter = make_adapter(tiny_model, "lora_unet")
    expected = factorised(tiny_model, adapter, noise_solver, mode, 5)
    plain = sample(tiny_model.unet, noise_solver, guidance_of(tiny_model, adapter), noise_of(tiny_model), 5).final
    velocity = replace(tiny_model, unet=Velocity(tiny_model.unet, noise_solver))
    images = sample(velocity.unet, solver, guidance_of(tiny_model, adapter), noise_of(tiny_model), 5).final
    assert torch.allclose(images, plain, atol=1e-4)
    found = factorised(velocity, adapter, solver, mode, 5)
    assert (found - expected).norm() < 1e-3 * expected.norm()


def noise_of(model):
    return initial_noise(PROMPT, 0, range(2), model.latent_shape)


def test_unit_weights_descend():
    weights = gradient_weights("unit", SOLVERS["dpm"], 21)
    assert (weights < 0).all() and weights.sum().item() == pytest.approx(-14.6, abs=0.3)


def test_clipping_solvers_are_refused():
    with pytest.raises(FairDiffError, match="allowed: clip_sample false in the model's scheduler_config.json"):
        solver_coefficients(DDIMScheduler(**BETAS, clip_sample=True), 5)


def test_solvers_that_are_not_known_to_be_linear_are_refused():
    for solver in (DDPMScheduler(**BETAS), PNDMScheduler(**BETAS)):
        with pytest.raises(FairDiffError, match="allowed: DPMSolverMultistepScheduler"):
            solver_coefficients(solver, 5)


@pytest.mark.parametrize("kind", ["dpm", "ddim", "euler", "unipc", "euler_ancestral", "lcm"])
def test_every_offered_solver_is_linear_on_the_models_own_schedule(kind, caplog):
    solver = make_solver(kind, SOLVERS["dpm"].config, "zero", "linspace")
    assert solver.config.beta_end == BETAS["beta_end"]
    diffusers_logging.enable_propagation()
    try:
        coefficients = solver_coefficients(solver, 6)
    finally:
        diffusers_logging.disable_propagation()
    assert not caplog.records  # read at every step of training: a warning would flood the console
    assert coefficients.isfinite().all() and len(coefficients) == 6


def test_soft_tokens_leave_the_unconditional_branch_without_gradient(tiny_model):
    """Otherwise half of the U-Net calls of the replay would compute a gradient that is exactly zero."""
    adapter = make_adapter(tiny_model, "soft_tokens")
    cond, uncond = tiny_model.encode_pair(adapter.prefix + PROMPT)
    assert cond.requires_grad and not uncond.requires_grad


@pytest.mark.parametrize("off", [0.0, 1.0])
def test_without_guidance_images_and_gradients_are_of_the_prompt_alone(tiny_model, tiny_folder, off):
    """Plain pipelines do the same at these scales: the unconditional text is neither read nor trained."""
    noise = noise_of(tiny_model)[:1]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(PROMPT, guidance_scale=off, num_inference_steps=3, latents=noise, output_type="pt").images
    assert torch.allclose(tiny_model.generator(off, 3)(PROMPT, noise), theirs, atol=1e-4)
    solver = SOLVERS["dpm"]
    leaves = [t.detach().requires_grad_() for t in tiny_model.encode_pair(PROMPT)]
    guidance = Guidance(*leaves, off)
    trajectory = sample(tiny_model.unet, solver, guidance, noise, 3)
    upstream = Upstream(torch.ones_like(noise), solver_coefficients(solver, 3), choose_steps(1, 3, None, None))
    replay(tiny_model.unet, trajectory, guidance, upstream, 3)
    final = sample(tiny_model.unet, solver, Guidance(*leaves, 1.0), noise, 3, Graph(detach=True)).final
    (expected,) = torch.autograd.grad(final.sum(), leaves[0])
    assert torch.allclose(leaves[0].grad, expected, atol=1e-5 * expected.norm()) and leaves[1].grad is None
    assert tiny_model.effective_guidance(off) == 1.0 and tiny_model.effective_guidance(1.5) == 1.5


def test_noise_and_pictures_do_not_depend_on_the_batch(tiny_model):
    generate = tiny_model.generator(3.0, 4)
    shape = tiny_model.latent_shape
    together = generate(PROMPT, initial_noise(PROMPT, 7, range(4), shape))
    alone = torch.cat([generate(PROMPT, initial_noise(PROMPT, 7, [i], shape)) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.equal(initial_noise(PROMPT, 7, [0], shape), initial_noise(PROMPT, 8, [0], shape))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("kind", ["dpm", "ddim", "euler", "unipc", "euler_ancestral", "lcm"])
def test_the_first_input_has_unit_variance_for_every_solver_and_spacing(tiny_model, kind, spacing):
    """The U-Net was trained on such inputs at the noisiest step."""
    solver = make_solver(kind, BETAS, "zero", spacing)
    noise = torch.randn(8, *tiny_model.latent_shape, generator=torch.Generator().manual_seed(0))
    trajectory = sample(tiny_model.unet, solver, Guidance(*tiny_model.encode_pair(PROMPT), 1.0), noise, 6)
    assert trajectory.inputs[0].std() / noise.std() == pytest.approx(1, abs=0.06)
