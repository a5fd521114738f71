"""A real, tiny Stable Diffusion with random weights: the same classes as any other, small enough for the laws."""

import os
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tiny import tiny_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

from fairdiff.diffusion.load import DiffusionModel, load_model

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start: there is a process of tests on each core


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def browser():
    """Return headless Chromium: the system's, or the one that `playwright install chromium` fetched."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install 'fairdiff[test]'"
    )
    with sync_api.sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        path = path or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium was found: apt-get install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A diffusers folder: 16x16 images, 4x4 latents, two cross-attention levels, random weights of a fixed seed."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tiny_tokenizer(folder)
    size = len(tokenizer)
    text = CLIPTextConfig(
        vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=40, projection_dim=16, bos_token_id=size - 2, eos_token_id=size - 1,
        pad_token_id=size - 1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_loaded(tiny_folder) -> DiffusionModel:
    return load_model(tiny_folder)


@pytest.fixture
def tiny_model(tiny_loaded) -> DiffusionModel:
    """Return a copy of the tiny model for each test, which takes less than half the time of loading."""
    return deepcopy(tiny_loaded)
