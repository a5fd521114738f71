"""One call of the denoiser (a U-Net or a transformer): guidance, and everything that it is conditioned on.

The denoiser predicts the noise, or the velocity of diffusion or of a flow; the solver knows which. One tensor holds all
of a prompt that the denoiser reads, the token embeddings and the pooled embedding, so one gradient reaches all of it.

Shapes: B images, latents_BCHW, text embeddings cond_1LD (one prompt) or cond_BLD.
"""

import math
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """Text embeddings and guidance scale s of a prediction: y = y_u + s (y_c - y_u), or y_c alone, see `guided`."""

    cond: Tensor
    uncond: Tensor
    scale: float


def guided(unet, scale: float) -> bool:
    """Return whether predictions use classifier-free guidance, by the rule of diffusers' pipelines.

    They do for a scale above 1, unless the network reads the scale itself. Such networks are distilled from guided ones
    (Meng et al. 2023, arXiv 2210.03142): latent consistency models, FLUX.1 dev.
    """
    return scale > 1 and not reads_scale(unet)


def reads_scale(unet) -> bool:
    """Return whether the guidance scale is an input of the network."""
    return bool(unet.config.get("time_cond_proj_dim") or unet.config.get("guidance_embeds"))


def halves(unet, guidance: Guidance) -> list[tuple[Tensor, float]]:
    """Return the embeddings of a prediction with their factors: [(cond, s), (uncond, 1 - s)], or [(cond, 1)] unguided."""
    if not guided(unet, guidance.scale):
        return [(guidance.cond, 1.0)]
    return [(guidance.cond, guidance.scale), (guidance.uncond, 1 - guidance.scale)]


def predict(unet, latent: Tensor, timestep: Tensor, guidance: Guidance) -> Tensor:
    """Return the prediction [B, C, H, W]: y_u + s (y_c - y_u) from one batch of 2B, or y_c from B without guidance."""
    batch = len(latent)
    cond = guidance.cond.expand(batch, -1, -1)
    if not guided(unet, guidance.scale):
        return call_unet(unet, latent, timestep, cond, guidance.scale)
    text = torch.cat([guidance.uncond.expand(batch, -1, -1), cond])
    uncond, cond = call_unet(unet, torch.cat([latent, latent]), timestep, text).chunk(2)
    return uncond + guidance.scale * (cond - uncond)


def call_unet(unet, latent: Tensor, timestep: Tensor, text: Tensor, scale: float = 1.0) -> Tensor:
    """Return the network's prediction [B, C, H, W] in the latents' precision, computed in its own (bfloat16 on a GPU).

    timestep: the solver's time step, a scalar or [B]. text: [B, L, D] from `DiffusionModel.encode`. scale: the guidance
    scale, for a network that reads it.
    """
    call = {SD3Transformer2DModel: _call_sd3, FluxTransformer2DModel: _call_flux}.get(type(unet), _call_unet)
    dtype = next(unet.parameters()).dtype  # all have this one, and diffusers' `unet.dtype` would search every module
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
    """Call FLUX, which reads each 2x2 square of latents as one token, its position in `img_ids`, and time in [0, 1]."""
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
    """Return the embedding [1, width] of the guidance scale s that a latent consistency model reads.

    It is the sine and cosine of 1000 (s - 1) at falling frequencies. Source: Luo et al. 2023 (arXiv 2310.04378), section
    4.2, where w is s - 1.
    """
    half = width // 2
    frequencies = torch.exp(-torch.arange(half) * (math.log(10000.0) / (half - 1)))
    angles = 1000 * (scale - 1) * frequencies[None]
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


SIZES = 6  # numbers: height and width of the original image, top and left of the crop, height and width of the image


def with_row(words_1LD: Tensor, row_1R: Tensor) -> Tensor:
    """Return the token embeddings with row_1R, padded with zeros to D, appended as one more row: [1, L + 1, D], R <= D."""
    row = torch.nn.functional.pad(row_1R, (0, words_1LD.shape[2] - row_1R.shape[1]))
    return torch.cat([words_1LD, row[:, None]], 1)


def split_row(text_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the token embeddings [B, L, D] and the row [B, D] that `with_row` joined."""
    return text_BLD[:, :-1], text_BLD[:, -1]


def with_pooled(words_1LD: Tensor, pooled_1P: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the conditioning of Stable Diffusion XL: `with_row` of the pooled embedding and the sizes of an uncropped image.

    size: (height, width) in pixels. P + 6 <= D (1286 and 2048). Source: Podell et al. 2023 (arXiv 2307.01952), sections 2.1
    and 2.2.
    """
    return with_row(words_1LD, torch.cat([pooled_1P, words_1LD.new_tensor([[*size, 0, 0, *size]])], 1))


def pooled_width(unet) -> int:
    """Return P, the width of the pooled embedding that the network reads."""
    if isinstance(unet, SD3Transformer2DModel | FluxTransformer2DModel):
        return unet.config.pooled_projection_dim
    return unet.config.projection_class_embeddings_input_dim - SIZES * unet.config.addition_time_embed_dim


def image_tokens(unet, shape: tuple[int, int, int]) -> int:
    """Return the number of tokens that a transformer makes of latents [C, H, W], one from each patch; 0 for a U-Net."""
    if not isinstance(unet, SD3Transformer2DModel | FluxTransformer2DModel):
        return 0
    side = unet.config.patch_size if isinstance(unet, SD3Transformer2DModel) else 2
    return (shape[1] // side) * (shape[2] // side)
