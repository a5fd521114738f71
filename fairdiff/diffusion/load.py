"""Load a text-to-image model from a diffusers folder or one file, reduced to the parts that training and sampling need."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from classifiers.hub import architecture
from fairdiff import fingerprint
from fairdiff.diffusion.denoise import Guidance, guided, image_tokens, pooled_width, reads_scale, with_pooled, with_row
from fairdiff.diffusion.folder import FAMILIES, read_pipeline
from fairdiff.diffusion.sampling import Generate, Trajectory, sample
from fairdiff.diffusion.single_file import is_single_file, read_single_file
from fairdiff.diffusion.solvers import make_solver
from fairdiff.diffusion.t5 import T5_TOKENS, t5_reader
from fairdiff.errors import FairDiffError

FLOW_SPACING = {StableDiffusion3Pipeline: "linspace", FluxPipeline: "trailing"}  # spacing of the sampler steps


@dataclass
class DiffusionModel:
    """The frozen components of a model, with the functions that encode a prompt, sample latents and decode images.

    padding: "max_length" pads prompts as diffusers' pipelines do; "longest" does not pad a single prompt.
    sample_batch, decode_batch: images computed at once. They do not change the images. negative: the negative prompt.
    sampling_dtype: autocast dtype without gradients, for a U-Net and a VAE held in float32. Networks held in a lower
    precision always compute in it, so that sampling and replay compute alike.
    tokenizer_2, text_encoder_2: the second pair of Stable Diffusion XL and 3. empty_is_zero: without a negative prompt, the
    unconditional embeddings are zeros (XL only). t5: FLUX has one, Stable Diffusion 3 may have one.
    unet: Stable Diffusion 3 and FLUX have a transformer here. kind: the pipeline class of diffusers.
    size: (height, width) of the images in pixels, None for the model's own. clip_skip: how many of CLIP's last layers are
    skipped for a prompt, counted as in diffusers. The negative prompt uses all layers, also as in diffusers.
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
    t5_tokenizer: object | None = None
    t5: nn.Module | None = None
    kind: type = StableDiffusionPipeline
    size: tuple[int, int] | None = None
    clip_skip: int = 0

    @property
    def clips(self) -> list[nn.Module]:
        """The CLIP text encoders: Stable Diffusion and FLUX have one, SDXL and Stable Diffusion 3 two."""
        return [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]

    @property
    def text_encoders(self) -> list[nn.Module]:
        """All text encoders: the CLIPs, then T5 if there is one."""
        return self.clips if self.t5 is None else [*self.clips, self.t5]

    @property
    def is_flow(self) -> bool:
        """Whether the model is Stable Diffusion 3 or FLUX, which have a transformer instead of a U-Net."""
        return self.kind in T5_TOKENS

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents at `size`, by default at the denoiser's resolution (FLUX: its VAE's)."""
        flux = self.kind is FluxPipeline
        channels = self.vae.config.latent_channels if flux else self.unet.config.in_channels
        if self.size:
            height, width = (pixels // self.pixels for pixels in self.size)
            return channels, height, width
        side = self.vae.config.sample_size // self.pixels if flux else self.unet.config.sample_size
        side = side if isinstance(side, int) else side[0]  # some folders have [side, side]
        return channels, side, side

    @property
    def pixels(self) -> int:
        """How many pixels of the image one latent covers, in height and in width."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def multiple(self) -> int:
        """Heights and widths in pixels must be multiples of this; transformers read latents in squares of 2x2."""
        return self.pixels * (2 if self.is_flow else 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        _, height, width = self.latent_shape
        return height * self.pixels, width * self.pixels

    def encode(self, prompt: str, skip: int = 0) -> Tensor:
        """Return the text embedding [1, L, D] of one prompt, with a graph if a text encoder or its embedding is trained.

        skip: how many of CLIP's last layers are skipped.
        SDXL: the penultimate layers of both encoders side by side, and one more row, see `denoise.with_pooled`.
        Stable Diffusion 3: these padded to T5's width, then T5's output or zeros, and a row with both pooled embeddings.
        FLUX: T5's output and a row with the pooled embedding.
        """
        if self.kind is StableDiffusionPipeline:
            return self._words(self._tokens(prompt).input_ids, skip)
        pairs = ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2))
        read = [
            encoder(self._tokens(prompt, tokenizer=tokenizer).input_ids, output_hidden_states=True)
            for tokenizer, encoder in pairs
            if encoder is not None
        ]
        if self.kind is FluxPipeline:
            return with_row(self._read_by_t5(prompt), read[0].pooler_output)
        words = torch.cat([one.hidden_states[-2 - skip] for one in read], 2)
        if self.kind is StableDiffusionXLPipeline:
            return with_pooled(words, read[1].text_embeds, self.image_size)
        more = self._read_by_t5(prompt)
        words = torch.nn.functional.pad(words, (0, more.shape[2] - words.shape[2]))
        return with_row(torch.cat([words, more], 1), torch.cat([one.text_embeds for one in read], 1))

    def _words(self, ids: Tensor, skip: int) -> Tensor:
        """Return the embedding for Stable Diffusion 1.x and 2.x. The final layer norm is applied with `skip` too."""
        if not skip:
            return self.text_encoder(ids)[0]
        hidden = self.text_encoder(ids, output_hidden_states=True).hidden_states[-1 - skip]
        return self.text_encoder.final_layer_norm(hidden)

    def _read_by_t5(self, prompt: str) -> Tensor:
        return self._t5_words(prompt).to(self.unet.device, self.text_encoder.dtype)

    @cached_property
    def _t5_words(self) -> Callable[[str], Tensor]:
        shape = T5_TOKENS[self.kind], self.unet.config.joint_attention_dim
        return t5_reader(self.t5_tokenizer, self.t5, shape)

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
        """Return the conditional and the unconditional embedding [1, L, D], of the same length L.

        "max_length": both are padded to the tokenizer's length without a mask, as diffusers' pipelines do. "longest": the
        negative prompt is padded to the prompt's length *with* its mask, as the released adapters were trained; if it is
        longer, the prompt is padded to its length without a mask.
        """
        if self.empty_is_zero and not self.negative:
            cond = self.encode(prompt, self.clip_skip)
            width = pooled_width(self.unet)
            return cond, with_pooled(torch.zeros_like(cond[:, :-1]), cond.new_zeros(1, width), self.image_size)
        if self.padding == "max_length":
            return self.encode(prompt, self.clip_skip), self.encode(self.negative)
        both = self._tokens(prompt, self.negative)
        cond = self._words(both.input_ids[:1], self.clip_skip)
        return cond, self.text_encoder(both.input_ids[1:], attention_mask=both.attention_mask[1:])[0]

    def token_ids(self, prompts: list[str]) -> list[list[int]]:
        """Return each prompt's token ids for the text encoder that reads most, truncated one token after its limit."""
        tokenizer = self.t5_tokenizer or self.tokenizer
        return tokenizer(prompts, truncation=True, max_length=self.most_tokens + 1).input_ids  # no warning if truncated

    @property
    def most_tokens(self) -> int:
        """The largest number of tokens that a text encoder of the model reads."""
        return self.tokenizer.model_max_length if self.t5 is None else T5_TOKENS[self.kind]

    def overlong(self, prefix: str, prompts: list[str]) -> list[str]:
        """Return the prompts that, after `prefix`, are too long for every text encoder."""
        ids = self.token_ids([prefix + text for text in prompts])
        return [text for text, tokens in zip(prompts, ids, strict=True) if len(tokens) > self.most_tokens]

    def read_as_one(self, prompts: list[str]) -> list[tuple[str, str]]:
        """Return pairs (earlier, later) of prompts with the same tokens, such as ("a nurse", "A  Nurse")."""
        first: dict[tuple[int, ...], str] = {}
        read = [tuple(ids[: self.most_tokens]) for ids in self.token_ids(prompts)]
        return [(first[ids], text) for ids, text in zip(read, prompts, strict=True) if first.setdefault(ids, text) != text]

    @cached_property
    def weights_fingerprint(self) -> str:
        """Hash of the frozen weights as loaded. Take it before they change precision and before an adapter is added."""
        return fingerprint.of_modules(*self.text_encoders, self.unet, self.vae)

    def fingerprint(self, precision: bool = True) -> str:
        """Hash all that the images depend on: weights, configurations, solver, tokenizers, negative prompt, precision."""
        about = [architecture(m) for m in (*self.text_encoders, self.unet, self.vae, self.scheduler)]
        texts = [reads(t) for t in (self.tokenizer, self.tokenizer_2, self.t5_tokenizer) if t is not None]
        texts = fingerprint.Said(f"[{', '.join(texts)}]")
        options = [self.padding, self.negative, self.empty_is_zero]
        if precision:
            options += [str(self.unet.dtype), *([str(self.sampling_dtype)] if self.unet.dtype == torch.float32 else [])]
        options += [{"size": self.size}] if self.size else []
        options += [{"clip_skip": self.clip_skip}] if self.clip_skip else []
        return fingerprint.of_values(self.weights_fingerprint, about, texts, options)

    def effective_guidance(self, scale: float) -> float:
        """Return the guidance scale if it has an effect, else 1."""
        return scale if guided(self.unet, scale) or reads_scale(self.unet) else 1.0

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Decode scaled latents to images [B, 3, H, W] in [0, 1], in the latents' precision."""
        scaled = latent_BCHW / self.vae.config.scaling_factor
        if self.vae.config.shift_factor is not None:
            scaled = scaled + self.vae.config.shift_factor
        with self._cast(not torch.is_grad_enabled()):
            image = self.vae.decode(scaled.to(self.vae.dtype)).sample.to(latent_BCHW.dtype)
        return (image / 2 + 0.5).clamp(0, 1)

    def sample(self, guidance: Guidance, noise: Tensor, steps: int) -> Trajectory:
        """Run `sampling.sample` from noise [B, C, H, W] in `sampling_dtype`; the latents keep the noise's precision."""
        with self._cast(True):
            parts = [sample(self.unet, self.scheduler, guidance, z, steps) for z in noise.split(self.sample_batch)]
        return parts[0] if len(parts) == 1 else _joined(parts)

    @contextmanager
    def _cast(self, on: bool) -> Iterator[None]:
        first = next(self.unet.parameters())  # all parameters have its precision, see `denoise.call_unet`
        if not on or self.sampling_dtype == torch.float32 or first.dtype != torch.float32:
            yield
            return
        with warnings.catch_warnings(), torch.autocast(first.device.type, torch.bfloat16):
            # autocast leaves RMSNorm's weights in float32, and torch warns that this is slower
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
            yield

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Convert the frozen U-Net, VAE and T5 to another precision. CLIP runs once a step and is not converted.

        For float16 the VAE and T5 are not converted either: T5 and the VAE of Stable Diffusion XL would overflow
        (transformers' `_keep_in_fp32_modules`, diffusers' `force_upcast`).
        """
        others = [] if dtype == torch.float16 else [self.vae, self.t5]
        for module in (self.unet, *(other for other in others if other is not None)):
            nn.Module.to(module, dtype)  # diffusers' own `to` would warn about layers to keep in float32; there are none
        vars(self).pop("_t5_words", None)  # its cached embeddings have the old precision

    def to(self, device: str) -> None:
        """Move the networks to a device without changing their precision; T5 is not moved, see the module `t5`."""
        for module in (*self.clips, self.unet, self.vae):
            nn.Module.to(module, device)

    def generator(self, guidance_scale: float, steps: int, prefix: str = "") -> Generate:
        """Return a function (prompt, noise_BCHW) -> image_BCHW. It puts `prefix` before prompts and uses LoRA that is on."""

        @torch.no_grad()
        def generate(prompt: str, noise: Tensor) -> Tensor:
            guidance = Guidance(*self.encode_pair(prefix + prompt), guidance_scale)
            final = self.sample(guidance, noise, steps).final
            return torch.cat([self.decode(latent) for latent in final.split(self.decode_batch)])

        return generate


def _joined(parts: list[Trajectory]) -> Trajectory:
    """Concatenate the trajectories of several batches."""
    inputs = [torch.cat(some) for some in zip(*(part.inputs for part in parts), strict=True)]
    return Trajectory(inputs, parts[0].timesteps, torch.cat([part.final for part in parts]))


def solver_of(model: DiffusionModel, kind: str, final_sigmas: str, spacing: str):
    """Return `solvers.make_solver` for the model's own noise schedule and image size."""
    tokens = image_tokens(model.unet, model.latent_shape)
    return make_solver(kind, model.scheduler.config, final_sigmas, spacing, tokens)


def load_model(path: str | Path, padding: str = "max_length") -> DiffusionModel:
    """Load a diffusers folder, a hub id (both of a kind in `folder.FAMILIES`) or a .safetensors file, frozen, in float32.

    The model is on the CPU. Lower its precision before `DiffusionModel.to` moves it. Raises FairDiffError that says what is
    missing or wrong.
    """
    try:
        pipeline = read_single_file(path) if is_single_file(path) else read_pipeline(path)
    except FairDiffError as error:
        raise FairDiffError(f"model.path: {error}") from error
    parts, kind = pipeline.components, type(pipeline)
    model = DiffusionModel(
        pipeline.tokenizer,
        pipeline.text_encoder,
        parts.get("unet", parts.get("transformer")),
        pipeline.vae,
        pipeline.scheduler,
        padding,
        kind=kind,
    )
    if kind in (StableDiffusionXLPipeline, StableDiffusion3Pipeline):
        model.tokenizer_2, model.text_encoder_2 = pipeline.tokenizer_2, pipeline.text_encoder_2
    if kind in T5_TOKENS:
        number = "2" if kind is FluxPipeline else "3"
        model.t5_tokenizer, model.t5 = parts[f"tokenizer_{number}"], parts[f"text_encoder_{number}"]
        model.scheduler = solver_of(model, "flow_euler", "zero", FLOW_SPACING[kind])
    if kind is StableDiffusionXLPipeline:
        model.empty_is_zero = pipeline.config.force_zeros_for_empty_prompt
    if padding != "max_length" and kind is not StableDiffusionPipeline:
        raise FairDiffError(f"model.padding: found {padding}, allowed with {FAMILIES[kind]} ({path}): max_length")
    for module in (*model.text_encoders, model.unet, model.vae):
        module.requires_grad_(False).eval().float()
        if any(not p.isfinite().all() for p in module.parameters()):
            raise FairDiffError(f"model.path: {path} holds weights that are not finite in {type(module).__name__}")
    return model


def check_device(name: str) -> None:
    """Raise FairDiffError if this machine does not have the device."""
    allowed = ["cpu"]
    if torch.cuda.is_available():
        allowed += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name not in allowed:
        raise FairDiffError(f"model.device: found {name}, but this machine has none; allowed: {', '.join(allowed)}")


def fast_dtype(device: str) -> str:
    """Return "bfloat16" if the device has instructions for it, else "float16" for a GPU and "float32" for a CPU."""
    if device.startswith("cuda"):
        able = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if able else "float16"
    able = any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return "bfloat16" if able else "float32"


def reads(tokenizer) -> str:
    """Return as JSON the settings of a tokenizer that decide token ids, without padding and truncation (set by calls)."""
    others = (tokenizer.special_tokens_map, tokenizer.model_max_length, tokenizer.padding_side)
    return f"[{', '.join([_rules(tokenizer.backend_tokenizer.to_str()), *map(fingerprint.said, others)])}]"


@lru_cache(maxsize=4)
def _rules(text: str) -> str:
    """Normalise a tokenizer's JSON. Cached: a vocabulary has 49,408 tokens, and a job takes several fingerprints."""
    rules = json.loads(text)
    return fingerprint.said({key: value for key, value in rules.items() if key not in ("padding", "truncation")})
