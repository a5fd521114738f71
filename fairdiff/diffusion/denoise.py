"""One call of the denoiser: classifier-free guidance, and what Stable Diffusion XL is conditioned on beside words.

Shapes: B images, latents_BCHW, text embeddings cond_1LD (one prompt) or cond_BLD.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """Text embeddings and guidance scale s: y = y_u + s (y_c - y_u), or y_c alone, see `guided`."""

    cond: Tensor
    uncond: Tensor
    scale: float


def guided(unet, scale: float) -> bool:
    """Whether predictions are made of two: neither at a scale of 1 or less, nor of a network that reads the scale itself.

    As diffusers' pipelines take it. Networks that read it are distilled from guided ones (Meng et al. 2023, arXiv
    2210.03142): latent consistency models.
    """
    return scale > 1 and not reads_scale(unet)


def reads_scale(unet) -> bool:
    """Whether the guidance scale is an input of the network."""
    return bool(unet.config.time_cond_proj_dim)


def halves(unet, guidance: Guidance) -> list[tuple[Tensor, float]]:
    """The embeddings that a prediction is made of, each with its factor: [(cond, s), (uncond, 1 - s)] or [(cond, 1)]."""
    if not guided(unet, guidance.scale):
        return [(guidance.cond, 1.0)]
    return [(guidance.cond, guidance.scale), (guidance.uncond, 1 - guidance.scale)]


def predict(unet, latent: Tensor, timestep: Tensor, guidance: Guidance) -> Tensor:
    """Guided prediction y_u + s (y_c - y_u) [B, C, H, W], of noise or velocity; one batch of 2B, or y_c of B."""
    batch = len(latent)
    cond = guidance.cond.expand(batch, -1, -1)
    if not guided(unet, guidance.scale):
        return call_unet(unet, latent, timestep, cond, guidance.scale)
    text = torch.cat([guidance.uncond.expand(batch, -1, -1), cond])
    uncond, cond = call_unet(unet, torch.cat([latent, latent]), timestep, text).chunk(2)
    return uncond + guidance.scale * (cond - uncond)


def call_unet(unet, latent: Tensor, timestep: Tensor, text: Tensor, scale: float = 1.0) -> Tensor:
    """What the U-Net predicts [B, C, H, W], in the latents' precision, computed in the U-Net's own (bfloat16 on a GPU).

    scale: of guidance, for a U-Net that reads it.
    """
    text, more = text.to(unet.dtype), {}
    if reads_scale(unet):
        more["timestep_cond"] = scale_embedding(scale, unet.config.time_cond_proj_dim).to(text).expand(len(text), -1)
    if unet.config.addition_embed_type == "text_time":
        text, more["added_cond_kwargs"] = split_pooled(unet, text)
    return unet(latent.to(unet.dtype), timestep, encoder_hidden_states=text, **more).sample.to(latent.dtype)


def scale_embedding(scale: float, width: int) -> Tensor:
    """Sine and cosine of 1000 (s - 1) at falling frequencies [1, width], as a latent consistency model reads s.

    Source: Luo et al. 2023 (arXiv 2310.04378), section 4.2; their w is s - 1.
    """
    half = width // 2
    frequencies = torch.exp(-torch.arange(half) * (math.log(10000.0) / (half - 1)))
    angles = 1000 * (scale - 1) * frequencies[None]
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


SIZES = 6  # height and width of the original, of its crop's corner, and of the image


def with_pooled(words_1LD: Tensor, pooled_1P: Tensor, size: tuple[int, int]) -> Tensor:
    """What Stable Diffusion XL is conditioned on as one tensor [1, L + 1, D], so that one gradient flows to all of it.

    Its last row holds the pooled embedding and the sizes of an uncropped image of (height, width) pixels, then zeros;
    P + 6 <= D (1286 and 2048). Source: Podell et al. 2023 (arXiv 2307.01952), sections 2.1 and 2.2.
    """
    sizes = words_1LD.new_tensor([[*size, 0, 0, *size]])
    row = torch.cat([pooled_1P, sizes], 1)
    row = torch.nn.functional.pad(row, (0, words_1LD.shape[2] - row.shape[1]))
    return torch.cat([words_1LD, row[:, None]], 1)


def split_pooled(unet, text_BLD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The words and the further conditions of `with_pooled`, as diffusers' U-Net takes them."""
    row, width = text_BLD[:, -1], pooled_width(unet)
    return text_BLD[:, :-1], {"text_embeds": row[:, :width], "time_ids": row[:, width : width + SIZES]}


def pooled_width(unet) -> int:
    """P, how wide a pooled embedding this U-Net of SDXL's kind reads."""
    return unet.config.projection_class_embeddings_input_dim - SIZES * unet.config.addition_time_embed_dim
