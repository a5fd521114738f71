"""One whole training step on a GPU: Stable Diffusion 1.5's and XL's shapes, every solver, LoRA and soft tokens, both halves.

Without CUDA the same step runs on tiny networks in float32. The tests of full shape have never been run: no GPU was at hand.
"""

import math

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from test_exports import TEXT_XL, UNET_XL
from test_full_size import SCHEDULER, TEXT, UNET, VAE
from test_sdxl import xl_folder  # noqa: F401 (a fixture)
from tiny import make_trainee
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fairdiff import fingerprint
from fairdiff.diffusion.load import DiffusionModel, load_model
from fairdiff.diffusion.single_file import clip_tokenizer
from fairdiff.diffusion.solvers import FLOW, SOLVERS, make_solver
from fairdiff.training.step import Batch, training_step

PROMPT = "a photo of the face of a nurse"
KINDS = [("sd15", "lora_both"), ("sd15", "soft_tokens"), ("sdxl", "lora_both"), ("sdxl", "soft_tokens")]
NOISE_SOLVERS = [name for name, solver in SOLVERS.items() if solver is not FLOW]


def whole_step(model: DiffusionModel, kind: str, solver: str, dtype: torch.dtype, device: str) -> None:
    """A step of two images and three sampler steps: the adapter learns in float32, and nothing else changes."""
    model.scheduler = make_solver(solver, model.scheduler.config, "zero", "trailing")
    model.lower_precision(dtype)
    model.sampling_dtype = dtype
    model.to(device)
    trainee = make_trainee(model, kind, decode_batch=1, replay_batch=2)
    trainee.perception.classifier.to(device)
    trainee.perception.bank = trainee.perception.bank.to(device)
    frozen = [p for module in (*model.text_encoders, model.unet, model.vae) for p in module.parameters()]
    own = {id(p) for p in trainee.adapter.parameters()}
    before = fingerprint.of_tensors(p for p in frozen if id(p) not in own)
    result = training_step(trainee, Batch(PROMPT, [0, 1], 3, 0, torch.Generator().manual_seed(0)))
    assert result.faces == 2 and not result.skipped
    assert set(result.terms) == {"align", "image", "face"} and all(map(math.isfinite, result.terms.values()))
    grads = [p.grad for p in trainee.adapter.parameters() if p.grad is not None]
    assert {(g.dtype, g.device.type) for g in grads} == {(torch.float32, device)}
    assert all(g.isfinite().all() for g in grads) and any(g.any() for g in grads)
    assert before == fingerprint.of_tensors(p for p in frozen if id(p) not in own)


@pytest.mark.parametrize("family,kind,solver", [*((*both, "dpm") for both in KINDS),
                                                *((*KINDS[0], solver) for solver in NOISE_SOLVERS[1:])])  # fmt: skip
def test_a_whole_step_of_tiny_networks(family, kind, solver, tiny_folder, xl_folder):  # noqa: F811
    model = load_model({"sd15": tiny_folder, "sdxl": xl_folder}[family])
    whole_step(model, kind, solver, torch.float32, "cpu")


def full_model(family: str) -> DiffusionModel:
    """The networks of a family at full shape with random weights, made on the GPU and frozen."""
    torch.manual_seed(0)
    more = {}
    with torch.device("cuda"):
        text, vae = CLIPTextModel(CLIPTextConfig(**TEXT)), AutoencoderKL(**VAE)
        if family == "sdxl":
            unet = UNet2DConditionModel(**UNET_XL)
            second = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_XL | {"projection_dim": 1280}))
            more = {"kind": StableDiffusionXLPipeline, "text_encoder_2": second, "tokenizer_2": clip_tokenizer(pad="!")}
        else:
            unet = UNet2DConditionModel(**UNET | {"sample_size": 64})
    for module in (text, unet, vae, *([more["text_encoder_2"]] if more else [])):
        module.requires_grad_(False).eval()
    return DiffusionModel(clip_tokenizer(), text, unet, vae, DDIMScheduler(**SCHEDULER, clip_sample=False), **more)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("solver", NOISE_SOLVERS)
@pytest.mark.parametrize("family,kind", KINDS)
def test_a_whole_step_of_full_shape_on_a_gpu(family, kind, solver, dtype):
    whole_step(full_model(family), kind, solver, dtype, "cuda")
    torch.cuda.empty_cache()
