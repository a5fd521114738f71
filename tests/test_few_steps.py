"""Models distilled to a few steps, and solvers that add noise between them: held against diffusers' own pipelines."""

import copy
import json
import sys

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from test_main_job import BESIDE_EMBEDDED, launch
from test_sampling import PROMPT, factorised, literal, make_adapter
from tiny import composed, with_json, with_scheduler
from tiny_judges import uncalibrated

from fairdiff import builder
from fairdiff.diffusion.adapters import Lora
from fairdiff.diffusion.denoise import call_unet
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.sampling import initial_noise, sample
from fairdiff.diffusion.solvers import solver_coefficients, step_generators
from fairdiff.errors import FairDiffError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
TURBO = EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing")


@pytest.fixture(scope="module")
def lcm_folder(tiny_folder, tmp_path_factory):
    """Write a model like SimianLuo/LCM_Dreamshaper_v7: its pipeline, scheduler, and a U-Net that reads the guidance scale."""
    torch.manual_seed(2)
    config = UNet2DConditionModel.load_config(tiny_folder / "unet") | {"time_cond_proj_dim": 9}
    to = tmp_path_factory.mktemp("lcm")
    folder = with_scheduler(tiny_folder, to / "scheduled", LCMScheduler(**BETAS))
    folder = with_json(folder, to / "model", "model_index.json", _class_name="LatentConsistencyModelPipeline")
    unet = UNet2DConditionModel.from_config(config)
    unet.time_embedding.cond_proj.weight.data.normal_()  # so that images depend on the scale
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def turbo_folder(tiny_folder, tmp_path_factory):
    return with_scheduler(tiny_folder, tmp_path_factory.mktemp("turbo") / "model", TURBO)


def plain(kind, folder):
    pipeline = kind.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, noise, steps, guidance):
    """Generate in plain diffusers from the same initial and added noise."""
    return pipeline(
        [PROMPT] * len(noise), guidance_scale=guidance, num_inference_steps=steps, latents=noise, output_type="pt",
        generator=step_generators(noise),
    ).images  # fmt: skip


def noise_of(model, indices=(0, 1)):
    return initial_noise(PROMPT, 0, indices, model.latent_shape)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("guidance", [1.0, 8.5])
def test_a_consistency_model_paints_as_its_own_pipeline(lcm_folder, steps, guidance):
    model = load_model(lcm_folder)
    noise = noise_of(model)
    ours = model.generator(guidance, steps)(PROMPT, noise)
    for kind in (LatentConsistencyModelPipeline, StableDiffusionPipeline):
        assert torch.allclose(ours, generate(plain(kind, lcm_folder), noise, steps, guidance), atol=1e-4)
    assert not torch.allclose(ours, model.generator(3.0, steps)(PROMPT, noise), atol=1e-3)
    assert model.effective_guidance(1.0) == 1.0 and model.effective_guidance(0.5) == 0.5


@pytest.mark.parametrize("steps", [1, 4])
def test_a_turbo_model_paints_as_the_plain_pipeline_without_guidance(turbo_folder, steps):
    model = load_model(turbo_folder)
    theirs = generate(plain(StableDiffusionPipeline, turbo_folder), noise_of(model), steps, 0.0)
    assert torch.allclose(model.generator(0.0, steps)(PROMPT, noise_of(model)), theirs, atol=1e-4)


def test_added_noise_is_the_images_own_in_every_batch_and_leaves_the_global_stream_alone(lcm_folder):
    model = load_model(lcm_folder)
    before = torch.get_rng_state()
    sampled = model.generator(8.5, 4)
    together = sampled(PROMPT, noise_of(model, range(4)))
    alone = torch.cat([sampled(PROMPT, noise_of(model, [i])) for i in range(4)])
    solver_coefficients(model.scheduler, 4)
    assert torch.allclose(together, alone, atol=1e-5) and torch.equal(before, torch.get_rng_state())
    first, second = (g.initial_seed() for g in step_generators(noise_of(model)))
    assert first != second


@pytest.mark.parametrize("kind", ["soft_tokens", "lora_both"])
@pytest.mark.parametrize("mode", ["unit", "reference", "solver"])
@pytest.mark.parametrize("which", ["lcm", "turbo"])
def test_factorised_gradient_equals_literal_autograd(lcm_folder, turbo_folder, which, kind, mode):
    model = load_model(lcm_folder if which == "lcm" else turbo_folder)
    adapter = make_adapter(model, kind)
    ours = factorised(model, adapter, model.scheduler, mode, steps=4)
    oracle = literal(model, adapter, model.scheduler, mode, steps=4)
    assert oracle.norm() > 0 and (ours - oracle).norm() / oracle.norm() <= 1e-5


@pytest.mark.parametrize("solver", [LCMScheduler(**BETAS), TURBO])
def test_final_latent_is_linear_in_the_predictions_for_any_added_noise(solver):
    """The coefficients include c_skip and c_out of a consistency model's boundary condition."""
    solver, steps = copy.deepcopy(solver), 5
    coefficients = solver_coefficients(solver, steps)
    y = torch.randn(steps, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    finals = []
    for predicted in (y, torch.zeros_like(y)):
        solver.set_timesteps(steps)
        latent, generator = torch.ones(1, 1, 2, 2), torch.Generator().manual_seed(1)
        for each, t in zip(predicted, solver.timesteps, strict=True):
            solver.scale_model_input(latent, t)
            latent = solver.step(each, t, latent, generator=generator).prev_sample
        finals.append(latent)
    expected = (coefficients.view(-1, 1, 1, 1, 1) * y).sum(0)
    assert torch.allclose(finals[0] - finals[1], expected, atol=1e-4 * expected.norm())


def test_the_scale_is_read_and_no_second_prediction_is_made(lcm_folder):
    model = load_model(lcm_folder)
    calls = []
    model.unet.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    model.generator(8.5, 4)(PROMPT, noise_of(model))
    assert calls == [2] * 4
    latent, (cond, _) = noise_of(model), model.encode_pair(PROMPT)
    one, two = (call_unet(model.unet, latent, torch.tensor(500), cond.expand(2, -1, -1), s) for s in (1.0, 8.5))
    assert not torch.allclose(one, two, atol=1e-3)


@pytest.mark.parametrize("options", [["sampler.guidance=1"], ["sampler.guidance=0"]])
def test_a_negative_prompt_that_nothing_reads_is_one_line(tiny_folder, options):
    config = composed(f"model.path={tiny_folder}", "prompts.negative=a hat", *options)
    with pytest.raises(FairDiffError, match="prompts.negative: found 'a hat', which nothing reads without") as caught:
        builder.build_model(config)
    assert "\n" not in str(caught.value)


def test_more_steps_than_it_was_distilled_for_are_one_line(lcm_folder):
    with pytest.raises(FairDiffError, match="LCMScheduler: cannot take 60 steps") as caught:
        sample(None, load_model(lcm_folder).scheduler, None, torch.zeros(1, 4, 4, 4), 60)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_train_py_trains_audits_and_saves_what_the_plain_pipeline_loads(lcm_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    launch(
        tmp_path / "run", *BESIDE_EMBEDDED, "model=lcm", f"model.path={lcm_folder}", "adapter=lora_both",
        "model.dtype=float32", "steps=2", f"audit.judge.path={uncalibrated(tmp_path / 'judge')}",
    )  # fmt: skip
    (audits,) = (tmp_path / "run" / "audits").iterdir()
    assert json.loads((audits / "audit.json").read_text())["models"]["after"]["dino"]["mean"] < 1
    model = load_model(lcm_folder)
    adapter = Lora(model, ["text_encoder", "unet"], 50, 50, torch.Generator())
    adapter.load(tmp_path / "run" / "adapter")
    noise = noise_of(model)
    ours = model.generator(8.5, 2)(PROMPT, noise)
    pipeline = plain(LatentConsistencyModelPipeline, lcm_folder)
    bare = generate(pipeline, noise, 2, 8.5)
    pipeline.load_lora_weights(tmp_path / "run" / "adapter")
    theirs = generate(pipeline, noise, 2, 8.5)
    assert torch.allclose(ours, theirs, atol=1e-4) and not torch.allclose(bare, theirs, atol=1e-6)
