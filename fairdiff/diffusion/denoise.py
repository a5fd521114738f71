"""One call of the denoiser (a U-Net or a transformer), with guidance and all conditioning.

What is predicted is the noise, the velocity of diffusion or that of a flow; the solver knows which. What a network reads of
a prompt travels as one tensor, words and what stands beside them, so that one gradient flows to all of it.

Shapes: B images, latents_BCHW, text embeddings cond_1LD (one prompt) or cond_BLD.
"""

import math
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """Text embeddings and guidance scale s: y = y_u + s (y_c - y_u), or y_c alone, see `guided`."""

    cond: Tensor
    uncond: Tensor
    scale: float


def guided(unet, scale: float) -> bool:
    """Whether classifier-free guidance is used: the scale is above 1, and the network does not take it as an input.

    As diffusers' pipelines take it. Networks that read it are distilled from guided ones (Meng et al. 2023, arXiv
    2210.03142): latent consistency models, FLUX.1 dev.
    """
    return scale > 1 and not reads_scale(unet)


def reads_scale(unet) -> bool:
    """Whether the guidance scale is an input of the network."""
    return bool(unet.config.get("time_cond_proj_dim") or unet.config.get("guidance_embeds"))


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
    """What the network predicts [B, C, H, W], in the latents' precision, computed in its own (bfloat16 on a GPU).

    timestep: of the solver, one or [B]. text: [B, L, D] of `DiffusionModel.encode`. scale: of guidance, for a network that
    reads it.
    """
    call = {SD3Transformer2DModel: _call_sd3, FluxTransformer2DModel: _call_flux}.get(type(unet), _call_unet)
    dtype = next(unet.parameters()).dtype  # that of all; for `unet.dtype` diffusers looks through every module
    return call(unet, latent.to(dtype), timestep, text.to(dtype), scale).to(latent.dtype)


def _call_unet(unet, latent: Tensor, timestep: Tensor, text: Tensor, scale: float) -> Tensor:
    more = {}
    if reads_scale(unet):
        more["timestep_cond"] = scale_embedding(scale, unet.config.time_cond_proj_dim).to(text).expand(len(text), -1)
    if unet.config.addition_embed_type == "text_time":
        text, row = split_row(text)
        width = pooled_width(unet)
        more["added_cond_kwargs"] = {"text_embeds": row[:, :width], "time_ids": row[:, width : width + SIZES]}
    return unet(latent, timestep, encoder_hidden_states=text, **more).sample


def _call_sd3(transformer, latent: Tensor, timestep: Tensor, text: Tensor, scale: float) -> Tensor:
    words, row = split_row(text)
    pooled = row[:, : pooled_width(transformer)]
    times = timestep.expand(len(latent))
    return transformer(latent, encoder_hidden_states=words, pooled_projections=pooled, timestep=times).sample


def _call_flux(transformer, latent: Tensor, timestep: Tensor, text: Tensor, scale: float) -> Tensor:
    """FLUX reads each 2x2 square of latents as one token, its place in `img_ids`, and time from 0 to 1."""
    batch, _, height, width = latent.shape
    words, row = split_row(text)
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], 2).flatten(0, 1).to(latent)
    predicted = transformer(
        torch.nn.functional.pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2),
        encoder_hidden_states=words,
        pooled_projections=row[:, : pooled_width(transformer)],
        timestep=timestep.expand(batch).to(latent.dtype) / 1000,
        guidance=latent.new_full([batch], scale, dtype=torch.float32) if reads_scale(transformer) else None,
        txt_ids=words.new_zeros(words.shape[1], 3),
        img_ids=places,
    ).sample
    squares = predicted.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return torch.nn.functional.pixel_shuffle(squares, 2)


def scale_embedding(scale: float, width: int) -> Tensor:
    """Sine and cosine of 1000 (s - 1) at falling frequencies [1, width], as a latent consistency model reads s.

    Source: Luo et al. 2023 (arXiv 2310.04378), section 4.2; their w is s - 1.
    """
    half = width // 2
    frequencies = torch.exp(-torch.arange(half) * (math.log(10000.0) / (half - 1)))
    angles = 1000 * (scale - 1) * frequencies[None]
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


SIZES = 6  # height and width of the original, of its crop's corner, and of the image


def with_row(words_1LD: Tensor, row_1R: Tensor) -> Tensor:
    """Words and one row more [1, L + 1, D] of what stands beside them, R <= D: the pooled embedding first, then zeros."""
    row = torch.nn.functional.pad(row_1R, (0, words_1LD.shape[2] - row_1R.shape[1]))
    return torch.cat([words_1LD, row[:, None]], 1)


def split_row(text_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """The words [B, L, D] and the row [B, D] of `with_row`."""
    return text_BLD[:, :-1], text_BLD[:, -1]


def with_pooled(words_1LD: Tensor, pooled_1P: Tensor, size: tuple[int, int]) -> Tensor:
    """What Stable Diffusion XL is conditioned on: `with_row` of the pooled embedding and the sizes of an uncropped image of
    (height, width) pixels; P + 6 <= D (1286 and 2048). Source: Podell et al. 2023 (arXiv 2307.01952), sections 2.1 and 2.2.
    """
    return with_row(words_1LD, torch.cat([pooled_1P, words_1LD.new_tensor([[*size, 0, 0, *size]])], 1))


def pooled_width(unet) -> int:
    """P, how wide a pooled embedding this network reads."""
    if isinstance(unet, SD3Transformer2DModel | FluxTransformer2DModel):
        return unet.config.pooled_projection_dim
    return unet.config.projection_class_embeddings_input_dim - SIZES * unet.config.addition_time_embed_dim


def image_tokens(unet, shape: tuple[int, int, int]) -> int:
    """How many tokens a transformer reads of latents [C, H, W]: of 2x2 latents each, 0 of a U-Net."""
    if not isinstance(unet, SD3Transformer2DModel | FluxTransformer2DModel):
        return 0
    side = unet.config.patch_size if isinstance(unet, SD3Transformer2DModel) else 2
    return (shape[1] // side) * (shape[2] // side)
