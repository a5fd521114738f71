"""Stable Diffusion 1.5 at its full size with random weights, through one whole training step at small latents."""

import math

import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from tiny import make_trainee
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fairdiff.diffusion.load import DiffusionModel
from fairdiff.portraits import weights
from fairdiff.training.step import Batch, training_step

# the configurations that Stable Diffusion 1.5 is published with; only the latents are smaller than its 64 x 64
UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
VAE = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
    "sample_size": 512, "scaling_factor": 0.18215,
}  # fmt: skip
TEXT = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "projection_dim": 768,
    "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407,
}  # fmt: skip
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def filled(build) -> nn.Module:
    """The module with cheap random weights: normal with variance 1 / fan-in, norms 1, biases 0.

    One block of normal numbers serves for all, a hundred times as fast as drawing each; its length is prime, so that
    rows are not repeated.
    """
    with torch.device("meta"):
        module = build()
    module.to_empty(device="cpu")
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            flat = parameter.data.view(-1)
            for start in range(0, len(flat), len(block)):
                part = flat[start : start + len(block)]
                torch.mul(block[: len(part)], 1 / math.sqrt(parameter[0].numel()), out=part)
        else:
            parameter.data.fill_(float(name.endswith("weight")))
    for name, buffer in module.named_buffers():  # what to_empty left undefined
        assert name.endswith("position_ids"), name
        buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return module.requires_grad_(False).eval()


@pytest.fixture
def model() -> DiffusionModel:
    tokenizer = CLIPTokenizer.from_pretrained(weights("model") / "tokenizer")
    assert len(tokenizer) == TEXT["vocab_size"] and tokenizer.model_max_length == 77
    return DiffusionModel(
        tokenizer,
        filled(lambda: CLIPTextModel(CLIPTextConfig(**TEXT))),
        filled(lambda: UNet2DConditionModel(**UNET)),
        filled(lambda: AutoencoderKL(**VAE)),
        DPMSolverMultistepScheduler(**SCHEDULER, final_sigmas_type="sigma_min"),
        padding="longest",
    )


def sums(model: DiffusionModel) -> list[float]:
    """Return the sum of each frozen tensor, to detect changes."""
    modules = (model.text_encoder, model.unet, model.vae)
    return [float(p.detach().sum()) for m in modules for n, p in m.named_parameters() if ".lora_" not in n]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # forty seconds of one core, but 5.6 GB must be touched on a machine that may be busy
def test_a_whole_step_of_the_real_architecture_trains_the_adapter_and_nothing_else(model):
    parameters = [sum(p.numel() for p in m.parameters()) for m in (model.unet, model.text_encoder, model.vae)]
    assert [round(n / 1e6) for n in parameters] == [860, 123, 84]
    before = sums(model)
    trainee = make_trainee(model, "lora_text", evaluations=1, decode_batch=2, replay_batch=2)
    adapter = trainee.adapter.parameters()
    assert len(adapter) == 12 * 6 * 2  # q, k, v, out, fc1, fc2 of every layer, down and up
    start = [p.detach().clone() for p in adapter]

    prompt = "a photo of the face of a carpenter, a person"
    optimizer = torch.optim.AdamW(adapter, 5e-5)
    result = training_step(trainee, Batch(prompt, [0, 1, 2], 2, 0, torch.Generator().manual_seed(1)))
    assert result.faces == 3 and result.kept > 0 and set(result.terms) == {"align", "image", "face"}
    assert all(math.isfinite(value) for value in result.terms.values())
    up = [p for m in trainee.adapter.modules.values() for n, p in m.named_parameters() if ".lora_B." in n]
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in up)  # "down" has none while "up" is 0
    optimizer.step()
    assert any(not torch.equal(p, q) for p, q in zip(adapter, start, strict=True))
    assert sums(model) == before
    assert all(p.grad is None for m in (model.unet, model.vae) for p in m.parameters())
