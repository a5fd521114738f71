"""Models that predict velocity, as Stable Diffusion 2.1 does, by the same code: held against diffusers' own pipeline."""

import json
import sys

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from test_main_job import BESIDE_EMBEDDED, launch
from tiny import composed, with_scheduler
from tiny_judges import uncalibrated

from fairdiff import builder
from fairdiff.diffusion.denoise import call_unet
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.sampling import initial_noise

PROMPT = "a photo of the face of a nurse"


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """The tiny model with the scheduler of the released one; its U-Net's random output then means velocity."""
    released = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction",
    )  # fmt: skip
    return with_scheduler(tiny_folder, tmp_path_factory.mktemp("velocity") / "model", released)


def plain(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, noise):
    return pipeline(PROMPT, guidance_scale=3.0, num_inference_steps=3, latents=noise, output_type="pt").images


def test_images_are_those_of_the_plain_pipeline_and_not_those_of_predicted_noise(folder, tiny_folder):
    model = load_model(folder)
    noise = initial_noise(PROMPT, 0, range(1), model.latent_shape)
    ours = model.generator(3.0, 3)(PROMPT, noise)
    assert torch.allclose(ours, generate(plain(folder), noise), atol=1e-4)
    assert not torch.allclose(ours, load_model(tiny_folder).generator(3.0, 3)(PROMPT, noise), atol=1e-2)


@pytest.mark.parametrize("kind", ["dpm", "ddim", "euler", "unipc"])
def test_every_solver_takes_what_the_folder_says_is_predicted(folder, kind):
    options = ["model=sd21", f"model.path={folder}", "model.device=cpu", "model.dtype=float32", "judge.path=x"]
    model = builder.build_model(composed(*options, f"sampler.scheduler={kind}"))
    assert model.scheduler.config.prediction_type == "v_prediction"
    noise = initial_noise(PROMPT, 0, range(1), model.latent_shape)
    images = model.generator(3.0, 3)(PROMPT, noise)
    model.scheduler = type(model.scheduler).from_config(model.scheduler.config, prediction_type="epsilon")
    assert not torch.allclose(images, model.generator(3.0, 3)(PROMPT, noise), atol=1e-2)


@pytest.mark.slow
def test_train_py_trains_audits_and_saves_what_the_plain_pipeline_loads(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    launch(
        tmp_path / "run", *BESIDE_EMBEDDED, "model=sd21", f"model.path={folder}", "adapter=lora_both",
        f"audit.judge.path={uncalibrated(tmp_path / 'judge')}",
    )  # fmt: skip
    (audits,) = (tmp_path / "run" / "audits").iterdir()
    assert json.loads((audits / "audit.json").read_text())["models"]["after"]["dino"]["mean"] < 1
    pipeline = plain(folder)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    bare = generate(pipeline, noise)
    pipeline.load_lora_weights(tmp_path / "run" / "adapter")
    assert not torch.allclose(bare, generate(pipeline, noise), atol=1e-6)


def test_the_shapes_of_the_released_model_fit():
    """Its U-Net's configuration (stabilityai/stable-diffusion-2-1, unet/config.json), on no device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=96, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20), use_linear_projection=True,
        )  # fmt: skip
        predicted = call_unet(unet, torch.empty(2, 4, 96, 96), torch.tensor(500), torch.empty(2, 77, 1024))
    assert sum(p.numel() for p in unet.parameters()) == 865_910_724 and predicted.shape == (2, 4, 96, 96)
