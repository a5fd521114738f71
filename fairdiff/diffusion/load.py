"""A text-to-image model, from a folder in diffusers' format or one file, reduced to what training and sampling need."""

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

FLOW_SPACING = {StableDiffusion3Pipeline: "linspace", FluxPipeline: "trailing"}  # of their sampler steps


@dataclass
class DiffusionModel:
    """Frozen components, and the two functions that touch them: text to embedding, latents to image.

    padding: "max_length" pads prompts as a plain diffusers pipeline does, "longest" not at all for one prompt.
    sample_batch, decode_batch: images at once; what is made does not depend on them.
    negative: the text of the unconditional branch. sampling_dtype: in which a U-Net and a VAE that are held in float32
    multiply where no gradient is taken (by autocast: all else they do in float32). Held in less they work in that throughout,
    so that sampling and replay compute alike.
    Stable Diffusion XL has a second tokenizer and text encoder; empty_is_zero: without a negative text its unconditional
    embeddings are zeros. Stable Diffusion 3 may have a T5 beside the two, FLUX has one beside the one, and both have a
    transformer in the U-Net's place. kind: the pipeline that diffusers runs it with.
    size: (height, width) of the images in pixels, None for the model's own. clip_skip: how many of CLIP's last layers a
    prompt leaves out, as diffusers counts them; the unconditional branch has all, as there.
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
        """The text encoders but for T5: one of Stable Diffusion and FLUX, two of SDXL and Stable Diffusion 3."""
        return [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]

    @property
    def text_encoders(self) -> list[nn.Module]:
        """The CLIPs, and T5 behind them."""
        return self.clips if self.t5 is None else [*self.clips, self.t5]

    @property
    def is_flow(self) -> bool:
        """Whether it is Stable Diffusion 3 or FLUX, whose transformer stands in the U-Net's place."""
        return self.kind in T5_TOKENS

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents at `size`, or at the network's own resolution; FLUX's is its VAE's."""
        flux = self.kind is FluxPipeline
        channels = self.vae.config.latent_channels if flux else self.unet.config.in_channels
        if self.size:
            height, width = (pixels // self.pixels for pixels in self.size)
            return channels, height, width
        side = self.vae.config.sample_size // self.pixels if flux else self.unet.config.sample_size
        side = side if isinstance(side, int) else side[0]  # some folders write it twice
        return channels, side, side

    @property
    def pixels(self) -> int:
        """Image pixels per latent, in height and in width."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def multiple(self) -> int:
        """Of pixels, that heights and widths are: transformers read latents in squares of 2x2."""
        return self.pixels * (2 if self.is_flow else 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        _, height, width = self.latent_shape
        return height * self.pixels, width * self.pixels

    def encode(self, prompt: str, skip: int = 0) -> Tensor:
        """Text embedding [1, L, D] of one prompt; carries a graph where the text side has something to learn.

        skip: last layers of CLIP to leave out.
        Of SDXL: both encoders' last but one layer side by side, and a row more, see `denoise.with_pooled`. Of Stable
        Diffusion 3: these padded to the width of T5's words, T5's or zeros behind them, and a row of both pooled embeddings.
        Of FLUX: T5's words and a row of the pooled embedding.
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
        """Of Stable Diffusion 1.x and 2.x; the last layer norm follows whichever layer is read."""
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
        """Conditional and unconditional embeddings [1, L, D] of one length L.

        "max_length": both padded to the tokenizer's length without a mask, as a plain pipeline does. "longest": the
        prompt as it is, the empty prompt padded to its length *with* its mask, as the released adapters were trained;
        a negative prompt that is longer pads the prompt (without a mask).
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
        """What the text encoder that reads most sees of each prompt, and one token more where the prompt goes on."""
        tokenizer = self.t5_tokenizer or self.tokenizer
        return tokenizer(prompts, truncation=True, max_length=self.most_tokens + 1).input_ids  # nothing warns of its length

    @property
    def most_tokens(self) -> int:
        """How many tokens of a prompt are read by the text encoder that reads most."""
        return self.tokenizer.model_max_length if self.t5 is None else T5_TOKENS[self.kind]

    def overlong(self, prefix: str, prompts: list[str]) -> list[str]:
        """The prompts whose end no text encoder sees behind `prefix`."""
        ids = self.token_ids([prefix + text for text in prompts])
        return [text for text, tokens in zip(prompts, ids, strict=True) if len(tokens) > self.most_tokens]

    def read_as_one(self, prompts: list[str]) -> list[tuple[str, str]]:
        """Each prompt that the model cannot tell from one before it, behind that one: ("a nurse", "A  Nurse")."""
        first: dict[tuple[int, ...], str] = {}
        read = [tuple(ids[: self.most_tokens]) for ids in self.token_ids(prompts)]
        return [(first[ids], text) for ids, text in zip(read, prompts, strict=True) if first.setdefault(ids, text) != text]

    @cached_property
    def weights_fingerprint(self) -> str:
        """A hash of the frozen weights as loaded, computed once before precision changes and before an adapter is added."""
        return fingerprint.of_modules(*self.text_encoders, self.unet, self.vae)

    def fingerprint(self, precision: bool = True) -> str:
        """A hash of all that images depend on: weights, configurations, solver, tokenizers, negative text, precision."""
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
        """The guidance scale that images really depend on: 1 for every scale without guidance."""
        return scale if guided(self.unet, scale) or reads_scale(self.unet) else 1.0

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] from scaled latents, in the latents' precision whatever the VAE's is."""
        scaled = latent_BCHW / self.vae.config.scaling_factor
        if self.vae.config.shift_factor is not None:
            scaled = scaled + self.vae.config.shift_factor
        with self._cast(not torch.is_grad_enabled()):
            image = self.vae.decode(scaled.to(self.vae.dtype)).sample.to(latent_BCHW.dtype)
        return (image / 2 + 0.5).clamp(0, 1)

    def sample(self, guidance: Guidance, noise: Tensor, steps: int) -> Trajectory:
        """`sampling.sample` from noise [B, C, H, W] in `sampling_dtype`; latents stay in the noise's precision."""
        with self._cast(True):
            parts = [sample(self.unet, self.scheduler, guidance, z, steps) for z in noise.split(self.sample_batch)]
        return parts[0] if len(parts) == 1 else _joined(parts)

    @contextmanager
    def _cast(self, on: bool) -> Iterator[None]:
        first = next(self.unet.parameters())  # as all others; see `denoise.call_unet`
        if not on or self.sampling_dtype == torch.float32 or first.dtype != torch.float32:
            yield
            return
        with warnings.catch_warnings(), torch.autocast(first.device.type, torch.bfloat16):
            # RMSNorm's weights stay float32, as autocast leaves them; torch says that this is slower
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
            yield

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Hold the frozen U-Net, VAE and T5 in another precision; CLIP, run once a step, stays as it is.

        In float16 the VAE and T5 stay too: that of Stable Diffusion XL and T5 overflow in it (diffusers' `force_upcast`, and
        transformers' `_keep_in_fp32_modules`).
        """
        others = [] if dtype == torch.float16 else [self.vae, self.t5]
        for module in (self.unet, *(other for other in others if other is not None)):
            nn.Module.to(module, dtype)  # diffusers' own `to` warns of layers to keep in float32, of which there are none
        vars(self).pop("_t5_words", None)  # what it keeps is of the other precision

    def to(self, device: str) -> None:
        """Move the networks to a device, in the precision that they have; T5 stays where it is, see `t5`."""
        for module in (*self.clips, self.unet, self.vae):
            nn.Module.to(module, device)

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


def solver_of(model: DiffusionModel, kind: str, final_sigmas: str, spacing: str):
    """`solvers.make_solver` on the noise schedule of the model's folder, for images of the model's size."""
    tokens = image_tokens(model.unet, model.latent_shape)
    return make_solver(kind, model.scheduler.config, final_sigmas, spacing, tokens)


def load_model(path: str | Path, padding: str = "max_length") -> DiffusionModel:
    """Load a diffusers folder or hub id of a kind that `folder.FAMILIES` lists, or a .safetensors file, frozen and in fp32.

    It lies in the processor's memory, and moves with `DiffusionModel.to` once its precision is lowered. Raises FairDiffError
    naming what is missing.
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


def reads(tokenizer) -> str:
    """All that decides which numbers a text becomes, as JSON; without padding and truncation, which calls set."""
    others = (tokenizer.special_tokens_map, tokenizer.model_max_length, tokenizer.padding_side)
    return f"[{', '.join([_rules(tokenizer.backend_tokenizer.to_str()), *map(fingerprint.said, others)])}]"


@lru_cache(maxsize=4)
def _rules(text: str) -> str:
    """A vocabulary has 49,408 words, and a job asks for several fingerprints of its model."""
    rules = json.loads(text)
    return fingerprint.said({key: value for key, value in rules.items() if key not in ("padding", "truncation")})
