"""Stable Diffusion 1.5 and its perception networks with random weights: real shapes and cost, nothing to download.

Sources of the shapes: the component configurations of Stable Diffusion 1.5 (unet/, vae/, text_encoder/,
scheduler/); CLIP ViT-H/14, DINOv2 ViT-B/14, MobileNetV3-Large as in Shen et al., ICLR 2024.
"""

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmark.config import RandomConfig
from classifiers.attributes import AttributeNet
from classifiers.detect import MTCNNDetector
from classifiers.identity import Bank, FaceEmbedder
from classifiers.types import Boxes
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.single_file import clip_tokenizer
from fairdiff.diffusion.solvers import make_solver
from fairdiff.objective.perception import Perception

VOCABULARY = 49408
NORMALISE = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def make_model(shapes: RandomConfig, dtype: torch.dtype, device: str) -> DiffusionModel:
    """Return a frozen model in eval mode: text encoder in float32, U-Net and VAE in `dtype`."""
    torch.manual_seed(0)
    with torch.device(device):  # 860 million random numbers are drawn on the device itself
        unet = UNet2DConditionModel(
            sample_size=shapes.latent,
            block_out_channels=tuple(shapes.unet),
            cross_attention_dim=shapes.text[0],
            attention_head_dim=8,
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )
        vae = AutoencoderKL(
            block_out_channels=tuple(shapes.vae),
            layers_per_block=2,
            sample_size=8 * shapes.latent,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=VOCABULARY,
                hidden_size=shapes.text[0],
                intermediate_size=4 * shapes.text[0],
                num_hidden_layers=shapes.text[1],
                num_attention_heads=max(1, shapes.text[0] // 64),
                projection_dim=shapes.text[0],
                bos_token_id=VOCABULARY - 2,
                eos_token_id=VOCABULARY - 1,
            )
        )
    for module in (unet, vae, text):
        module.requires_grad_(False).eval().to(device)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    betas = DPMSolverMultistepScheduler(**schedule).config
    model = DiffusionModel(clip_tokenizer(), text, unet, vae, make_solver("dpm", betas, "sigma_min", "linspace"))
    model.lower_precision(dtype)
    return model


class RandomEncoder:
    """A timm network with random weights instead of CLIP or DINOv2."""

    def __init__(self, architecture: str, size: int, device: str):
        kwargs = {"img_size": size} if architecture.startswith("vit") else {}
        config = {"architecture": architecture, "kwargs": kwargs, "image_size": size, "dim": 512, **NORMALISE}
        with torch.device(device):
            self.model = frozen(FaceEmbedder(config), device)

    def image(self, image_BCHW: Tensor) -> Tensor:
        return self.model(image_BCHW)


class MiddleDetector:
    """MTCNN for its cost only; the boxes that it returns on noise are replaced by the middle of every image."""

    def __init__(self, size: int, device: str):
        self.mtcnn = MTCNNDetector(input_size=size).to(device)

    def __call__(self, image_BCHW: Tensor) -> Boxes:
        self.mtcnn(image_BCHW)
        batch, _, height, width = image_BCHW.shape
        box_4 = torch.tensor([width / 4, height / 4, width * 3 / 4, height * 3 / 4], device=image_BCHW.device)
        rows = torch.arange(batch, device=image_BCHW.device)
        return Boxes(rows, box_4.repeat(batch, 1), None, (batch, height, width))


def frozen(net: AttributeNet | FaceEmbedder, device: str):
    return net.eval().requires_grad_(False).to(device)


def make_perception(
    shapes: RandomConfig, attributes: dict[str, tuple[str, ...]], dtype: torch.dtype, device: str
) -> Perception:
    """Return random detector, classifier, CLIP, DINOv2 and face embedder, with a bank of 1,000 random faces."""
    torch.manual_seed(1)
    judge = {"architecture": shapes.judge, "kwargs": {}, "image_size": shapes.judge_size, **NORMALISE}
    face = {"architecture": shapes.identity, "kwargs": {}, "image_size": shapes.identity_size, **NORMALISE, "dim": 512}
    classifier = frozen(AttributeNet(judge | {"attributes": attributes}), device)
    encoders = [RandomEncoder(a, shapes.encoder_size, device) for a in (shapes.clip, shapes.dino)]
    embedder = frozen(FaceEmbedder(face), device)
    bank = Bank(nn.functional.normalize(torch.randn(1000, 512, device=device), dim=1))
    detector = MiddleDetector(shapes.detect_size, device)
    return Perception(detector, classifier, encoders, embedder, bank, shapes.judge_size, 1.6, dtype)
