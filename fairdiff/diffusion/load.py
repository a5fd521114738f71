"""A Stable Diffusion model in diffusers' own folder format, reduced to what training and sampling need."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from classifiers.hub import architecture
from fairdiff import fingerprint
from fairdiff.diffusion.denoise import Guidance, pooled_width, with_pooled
from fairdiff.diffusion.folder import read_pipeline
from fairdiff.diffusion.sampling import Generate, Trajectory, sample
from fairdiff.errors import FairDiffError


@dataclass
class DiffusionModel:
    """Frozen components, and the two functions that touch them: text to embedding, latents to image.

    padding: "max_length" pads prompts as a plain diffusers pipeline does, "longest" not at all for one prompt.
    sample_batch, decode_batch: images at once; what is made does not depend on them.
    negative: the text of the unconditional branch. sampling_dtype: in which a U-Net and a VAE that are held in float32
    multiply where no gradient is taken (by autocast: all else they do in float32). Held in less they work in that throughout,
    so that sampling and replay compute alike.
    Stable Diffusion XL has a second tokenizer and text encoder; empty_is_zero: without a negative text its unconditional
    embeddings are zeros.
    """

    tokenizer: object
    text_encoder: nn.Module
    unet: nn.Module
    vae: nn.Module
    scheduler: object
    padding: str = "max_length"
    sample_batch: int = 64
    decode_batch: int = 64
    negative: str = ""
    sampling_dtype: torch.dtype = torch.float32
    tokenizer_2: object | None = None
    text_encoder_2: nn.Module | None = None
    empty_is_zero: bool = False

    @property
    def text_encoders(self) -> list[nn.Module]:
        """The one of Stable Diffusion, the two of SDXL."""
        return [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents at the U-Net's own resolution."""
        size = self.unet.config.sample_size
        size = size if isinstance(size, int) else size[0]  # some folders write it twice
        return self.unet.config.in_channels, size, size

    def encode(self, prompt: str) -> Tensor:
        """Text embedding [1, L, D] of one prompt; carries a graph where the text side has something to learn.

        Of SDXL: both encoders' last but one layer side by side, and a row more, see `denoise.with_pooled`.
        """
        if self.text_encoder_2 is None:
            return self.text_encoder(self._tokens(prompt).input_ids)[0]
        one, two = (
            encoder(self._tokens(prompt, tokenizer=tokenizer).input_ids, output_hidden_states=True)
            for tokenizer, encoder in zip((self.tokenizer, self.tokenizer_2), self.text_encoders, strict=True)
        )
        words = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], 2)
        return with_pooled(words, two.text_embeds, self._side)

    @property
    def _side(self) -> int:
        """Of the images, in pixels."""
        return self.latent_shape[-1] * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _tokens(self, *prompts: str, tokenizer=None):
        tokenizer = tokenizer or self.tokenizer
        return tokenizer(
            list(prompts),
            padding=self.padding,
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.unet.device)

    def encode_pair(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional embeddings [1, L, D] of one length L.

        "max_length": both padded to the tokenizer's length without a mask, as a plain pipeline does. "longest": the
        prompt as it is, the empty prompt padded to its length *with* its mask, as the released adapters were trained;
        a negative prompt that is longer pads the prompt (without a mask).
        """
        if self.empty_is_zero and not self.negative:
            cond = self.encode(prompt)
            width = pooled_width(self.unet)
            return cond, with_pooled(torch.zeros_like(cond[:, :-1]), cond.new_zeros(1, width), self._side)
        if self.padding == "max_length":
            return self.encode(prompt), self.encode(self.negative)
        both = self._tokens(prompt, self.negative)
        cond = self.text_encoder(both.input_ids[:1])[0]
        return cond, self.text_encoder(both.input_ids[1:], attention_mask=both.attention_mask[1:])[0]

    def token_ids(self, prompts: list[str]) -> list[list[int]]:
        """What the text encoder reads of each prompt, and one token more where the prompt goes on."""
        most = self.tokenizer.model_max_length
        return self.tokenizer(prompts, truncation=True, max_length=most + 1).input_ids  # nothing warns of its length

    def overlong(self, prefix: str, prompts: list[str]) -> list[str]:
        """The prompts whose end the text encoder does not see behind `prefix`."""
        ids = self.token_ids([prefix + text for text in prompts])
        return [text for text, tokens in zip(prompts, ids, strict=True) if len(tokens) > self.tokenizer.model_max_length]

    def read_as_one(self, prompts: list[str]) -> list[tuple[str, str]]:
        """Each prompt that the model cannot tell from one before it, behind that one: ("a nurse", "A  Nurse")."""
        first: dict[tuple[int, ...], str] = {}
        most = self.tokenizer.model_max_length
        read = [tuple(ids[:most]) for ids in self.token_ids(prompts)]
        return [(first[ids], text) for ids, text in zip(read, prompts, strict=True) if first.setdefault(ids, text) != text]

    @cached_property
    def weights_fingerprint(self) -> str:
        """Of the frozen weights as they were loaded: taken once, before they change precision and an adapter is hung."""
        return fingerprint.of_modules(*self.text_encoders, self.unet, self.vae)

    def fingerprint(self, precision: bool = True) -> str:
        """Of everything that makes its images: weights, configurations, solver, tokenizers, negative text, precision."""
        about = [architecture(m) for m in (*self.text_encoders, self.unet, self.vae, self.scheduler)]
        texts = [reads(t) for t in (self.tokenizer, self.tokenizer_2) if t is not None]
        options = [self.padding, self.negative, self.empty_is_zero]
        if precision:
            options += [str(self.unet.dtype), *([str(self.sampling_dtype)] if self.unet.dtype == torch.float32 else [])]
        return fingerprint.of_values(self.weights_fingerprint, about, texts, options)

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] from scaled latents, in the latents' precision whatever the VAE's is."""
        scaled = latent_BCHW / self.vae.config.scaling_factor
        with self._cast(not torch.is_grad_enabled()):
            image = self.vae.decode(scaled.to(self.vae.dtype)).sample.to(latent_BCHW.dtype)
        return (image / 2 + 0.5).clamp(0, 1)

    def sample(self, guidance: Guidance, noise: Tensor, steps: int) -> Trajectory:
        """`sampling.sample` from noise [B, C, H, W] in `sampling_dtype`; latents stay in the noise's precision."""
        with self._cast(True):
            parts = [sample(self.unet, self.scheduler, guidance, z, steps) for z in noise.split(self.sample_batch)]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _cast(self, on: bool) -> torch.autocast:
        lower = self.sampling_dtype != torch.float32 and self.unet.dtype == torch.float32
        return torch.autocast(self.unet.device.type, torch.bfloat16, enabled=on and lower)

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Hold the frozen U-Net and VAE in another precision; the text encoder, run once a step, stays as it is.

        In float16 the VAE stays too: that of Stable Diffusion XL overflows in it (diffusers' `force_upcast`).
        """
        for module in (self.unet,) if dtype == torch.float16 else (self.unet, self.vae):
            nn.Module.to(module, dtype)  # diffusers' own `to` warns of layers to keep in float32, of which there are none

    def generator(self, guidance_scale: float, steps: int, prefix: str = "") -> Generate:
        """A plain function (prompt, noise_BCHW) -> image_BCHW of the model as it stands now, adapter on or off."""

        @torch.no_grad()
        def generate(prompt: str, noise: Tensor) -> Tensor:
            guidance = Guidance(*self.encode_pair(prefix + prompt), guidance_scale)
            final = self.sample(guidance, noise, steps).final
            return torch.cat([self.decode(latent) for latent in final.split(self.decode_batch)])

        return generate


def _joined(parts: list[Trajectory]) -> Trajectory:
    """The trajectories of several batches as that of all images."""
    inputs = [torch.cat(some) for some in zip(*(part.inputs for part in parts), strict=True)]
    return Trajectory(inputs, parts[0].timesteps, torch.cat([part.final for part in parts]))


def load_model(path: str | Path, padding: str = "max_length", device: str = "cpu") -> DiffusionModel:
    """Load a diffusers folder or hub id of Stable Diffusion 1.x's or XL's kind, frozen and in fp32.

    Raises FairDiffError naming what is missing.
    """
    try:
        pipeline = read_pipeline(path)
    except FairDiffError as error:
        raise FairDiffError(f"model.path: {error}") from error
    model = DiffusionModel(
        pipeline.tokenizer, pipeline.text_encoder, pipeline.unet, pipeline.vae, pipeline.scheduler, padding
    )
    if isinstance(pipeline, StableDiffusionXLPipeline):
        model.tokenizer_2, model.text_encoder_2 = pipeline.tokenizer_2, pipeline.text_encoder_2
        model.empty_is_zero = pipeline.config.force_zeros_for_empty_prompt
        if padding != "max_length":
            raise FairDiffError(
                f"model.padding: found {padding}, allowed with Stable Diffusion XL ({path}): max_length"
            )
    for module in (*model.text_encoders, model.unet, model.vae):
        module.requires_grad_(False).eval().float().to(device)
        if any(not p.isfinite().all() for p in module.parameters()):
            raise FairDiffError(f"model.path: {path} holds weights that are not finite in {type(module).__name__}")
    return model


def check_device(name: str) -> None:
    """FairDiffError for a device that this machine has not."""
    allowed = ["cpu"]
    if torch.cuda.is_available():
        allowed += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name not in allowed:
        raise FairDiffError(f"model.device: found {name}, but this machine has none; allowed: {', '.join(allowed)}")


def fast_dtype(device: str) -> str:
    """ "bfloat16" where the device has instructions for it, else "float16" on a GPU and "float32" on a processor."""
    if device.startswith("cuda"):
        able = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if able else "float16"
    able = any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return "bfloat16" if able else "float32"


def reads(tokenizer) -> list:
    """All that decides which numbers a text becomes; without padding and truncation, which calls set."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    return [rules, tokenizer.special_tokens_map, tokenizer.model_max_length, tokenizer.padding_side]
