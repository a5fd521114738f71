"""Build the frozen model from settings: folder or file, precision, size and solver."""

from pathlib import Path

import torch
from diffusers import FluxPipeline

from fairdiff.config import EXPORTS, Config, SamplerConfig
from fairdiff.diffusion.denoise import guided
from fairdiff.diffusion.export import FORMATS, OF_FLOWS
from fairdiff.diffusion.folder import FAMILIES
from fairdiff.diffusion.load import DiffusionModel, check_device, fast_dtype, load_model, solver_of
from fairdiff.diffusion.solvers import solver_coefficients
from fairdiff.errors import FairDiffError
from fairdiff.portraits import weights


def precisions(config: Config) -> tuple[torch.dtype, torch.dtype]:
    """(dtype, sampling_dtype) with "auto" resolved for the device."""
    device, held, sampled = config.model.device, config.model.dtype, config.model.sampling_dtype
    held = fast_dtype(device) if held == "auto" else held
    if sampled == "auto":
        sampled = fast_dtype(device) if held == "float32" else held
        sampled = "float32" if (held, sampled) == ("float32", "float16") else sampled  # its VAE would overflow
    if held not in ("float32", sampled):
        raise FairDiffError(
            f"model.sampling_dtype: found {sampled}, but model.dtype is {held} here; allowed: auto, or float32 for both"
        )
    return getattr(torch, held), getattr(torch, sampled)


def model_path(config: Config) -> str | Path:
    """The folder or hub id of the model."""
    return config.model.path or weights("model")


def build_model(config: Config) -> DiffusionModel:
    check_device(config.model.device)
    held, sampled = precisions(config)
    path = model_path(config)
    model = load_model(path, config.model.padding)
    options = config.sampler
    formats = OF_FLOWS.get(model.kind, FORMATS)
    if wrong := [kind for kind in config.export if kind not in formats]:
        allowed = ", ".join(kind for kind in formats if kind in EXPORTS["lora"])
        raise FairDiffError(f"export: found {wrong[0]}, allowed with {FAMILIES[model.kind]}: {allowed}")
    model.size = image_size(options, model)
    try:
        solver = solver_of(model, options.scheduler, options.final_sigmas, options.spacing)
        for steps in {*options.train_steps, options.audit_steps}:
            solver_coefficients(solver, steps)
    except FairDiffError as error:
        raise FairDiffError(f"model.path: {path}, with the settings of sampler: {error}") from error
    scales = [options.guidance, *config.audit.guidance]
    if config.prompts.negative and not any(guided(model.unet, scale) for scale in scales):
        raise FairDiffError(
            f"prompts.negative: found '{config.prompts.negative}', which nothing reads without classifier-free guidance "
            f"(sampler.guidance={options.guidance:g}); allowed here: ''"
        )
    model.scheduler = solver
    model.clip_skip = clip_skip(config.model.clip_skip, model)
    model.negative = config.prompts.negative
    model.sampling_dtype = sampled
    _ = model.weights_fingerprint  # taken as loaded, in float32, so that a run's identity is the same on every device
    model.lower_precision(held)
    model.to(config.model.device)  # last: float32 weights of a large model are more than a small device holds
    return model


def image_size(options: SamplerConfig, model: DiffusionModel) -> tuple[int, int] | None:
    """Requested (height, width) in pixels, None where they are the model's own."""
    own = model.image_size
    for key, pixels in (("height", options.height), ("width", options.width)):
        if pixels and pixels % model.multiple:
            near = max(round(pixels / model.multiple), 1) * model.multiple
            raise FairDiffError(
                f"sampler.{key}: found {pixels}, allowed with this model: multiples of {model.multiple}, such as {near}"
            )
    size = options.height or own[0], options.width or own[1]
    return None if size == own else size


def clip_skip(skip: int | None, model: DiffusionModel) -> int:
    """The number of skipped layers; at least one layer must remain."""
    if skip is None:
        return 0
    if model.kind is FluxPipeline:
        raise FairDiffError(f"model.clip_skip: found {skip}, allowed with FLUX, which reads no words of CLIP: null")
    clips = [encoder for encoder in model.text_encoders if encoder is not model.t5]
    most = min(clip.config.num_hidden_layers for clip in clips) - len(clips)  # two leave one layer out anyway
    if skip > most:
        raise FairDiffError(f"model.clip_skip: found {skip}, allowed with this model: 1 to {most}, or null")
    return skip
