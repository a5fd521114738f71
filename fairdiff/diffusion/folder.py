"""Read a diffusers folder or hub id of Stable Diffusion 1.x, 2.x, XL or 3 or of FLUX completely, or refuse it.

diffusers and transformers initialise missing tensors randomly and drop unknown ones, with a warning. Here both are errors.
"""

import logging
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from fairdiff.diffusion.denoise import pooled_width
from fairdiff.errors import FairDiffError

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline | StableDiffusion3Pipeline | FluxPipeline
FAMILIES = {
    StableDiffusionPipeline: "Stable Diffusion",
    StableDiffusionXLPipeline: "Stable Diffusion XL",
    StableDiffusion3Pipeline: "Stable Diffusion 3",
    FluxPipeline: "FLUX",
}
CLASSES: dict[type, dict[str, type[nn.Module]]] = {
    StableDiffusionPipeline: {
        "text_encoder": CLIPTextModel,
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
    },
    StableDiffusionXLPipeline: {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
    },
    StableDiffusion3Pipeline: {
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
        "transformer": SD3Transformer2DModel,
        "vae": AutoencoderKL,
    },
    FluxPipeline: {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
        "transformer": FluxTransformer2DModel,
        "vae": AutoencoderKL,
    },
}
PLAIN = {  # arguments of the pipelines' constructors
    StableDiffusionPipeline: {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    StableDiffusionXLPipeline: {"add_watermarker": False},
    StableDiffusion3Pipeline: {"image_encoder": None, "feature_extractor": None},
    FluxPipeline: {"image_encoder": None, "feature_extractor": None},
}
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}  # Stable Diffusion 3 then reads zeros instead of T5's output
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}  # on the hub
_NO_FILE = re.compile("no file named|not appear to have|couldn't find (it|them) in the cached files")  # online, offline
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SHOWN = 3  # how many tensors of each kind a message names
SCHEDULES = {  # keys of a scheduler that say how its U-Net was trained
    "use_flow_sigmas": "noise levels of flow matching",
    "rescale_betas_zero_snr": "noise without any image at the first step",
}


def read_pipeline(path: str | Path) -> Pipeline:
    """Load a pipeline with all its components in float32 and every tensor from its file.

    Raises FairDiffError for a model that cannot be loaded, for missing, unexpected and misshapen tensors, and for a model
    that cannot be sampled from a prompt alone.
    """
    name, at, revision = str(path).partition("@")
    if name in MOVED and not Path(name).exists():
        print(f"warning: model.path: {name} is {MOVED[name]} now", flush=True)
        path = f"{MOVED[name]}{at}{revision}"
    with one_line(path):
        index = DiffusionPipeline.load_config(**_where(path))
        kind = _kind(index)
        found = {name: (index.get(name) or [None])[-1] for name in CLASSES[kind]}
        without = WITHOUT_T5 if "text_encoder_3" in found and not found["text_encoder_3"] else {}
        wanted = {name: component.__name__ for name, component in CLASSES[kind].items() if name not in without}
        for name in wanted:
            if found[name] != wanted[name]:
                raise FairDiffError(f"{path}: its model_index.json has {found[name]} for {name}, allowed: {wanted[name]}")
        read = {name: read_component(name, path, kind) for name in wanted}
        pipeline = kind.from_pretrained(**_where(path), **read, **without, **PLAIN[kind])
        flow = "transformer" in CLASSES[kind]
        if why := _unlike_flow(pipeline) if flow else unlike_stable_diffusion(pipeline):
            kinds = ", ".join(FAMILIES.values())
            raise FairDiffError(f"{path}: {why}; allowed: a text-to-image model of one of these kinds: {kinds}")
    return pipeline


def hub_id(path: str | Path) -> str | None:
    """Return the current hub name of a model without its revision; None for a local path or an impossible name."""
    name = str(path).partition("@")[0]
    if Path(path).exists() or Path(name).exists() or not _HUB_ID.fullmatch(name) or Path(name).suffix == ".safetensors":
        return None
    return MOVED.get(name, name)


def _kind(index: dict) -> type:
    """Return the pipeline class that a model_index.json names; others, as for LCMs, count as StableDiffusionPipeline."""
    return {kind.__name__: kind for kind in FAMILIES}.get(index.get("_class_name"), StableDiffusionPipeline)


def read_component(name: str, path: str | Path, kind: type = StableDiffusionPipeline) -> nn.Module:
    """Load one component of a pipeline. FairDiffError unless its tensors are exactly those of its config.json."""
    options: dict = {"dtype": torch.float32} if name.startswith("text_encoder") else {}  # transformers uses the file's dtype
    options |= {"use_safetensors": True, "output_loading_info": True}
    options |= {"ignore_mismatched_sizes": True}  # they are reported below, with the missing and unexpected ones
    read = partial(CLASSES[kind][name].from_pretrained, **_where(path), subfolder=name, **options)
    with one_line(path):
        local = Path(path).exists()
        module, found = read(variant=_variant(Path(path) / name)) if local else _any_variant(read, f"{name} of {path}")
    shapes = [f"{key}: {list(there)} for {list(here)}" for key, there, here in found["mismatched_keys"]]
    if wrong := differences(found["missing_keys"], found["unexpected_keys"], shapes):
        raise FairDiffError(f"{path}: the tensors of {name}: {wrong}; allowed: exactly those of its config.json")
    return module


def _variant(folder: Path) -> str | None:
    """Return "fp16" if a component's folder has its weights in this variant only, as many local folders do, else None."""
    files = list(folder.glob("*.safetensors"))
    return "fp16" if files and all(".fp16" in file.name for file in files) else None


def _any_variant(read: Callable, what: str) -> tuple[nn.Module, dict]:
    """Load a component of a hub id, in the variant "fp16" if there is no other. The hub's files are not listed first."""
    try:
        return read()
    except OSError as error:
        if not _NO_FILE.search(str(error)):
            raise
        lacking = error
    try:
        found = read(variant="fp16")
    except OSError:
        raise lacking from None
    print(f"warning: model.path: the {what} is read in half precision, for no other form was found", flush=True)
    return found


def component_on_no_device(name: str, path: str | Path, kind: type = StableDiffusionPipeline) -> nn.Module:
    """Build a text encoder, a U-Net or a transformer without weights, from its config.json alone."""
    component = CLASSES[kind][name]
    with one_line(path), torch.device("meta"):
        if name in ("unet", "transformer"):
            return component.from_config(component.load_config(**_where(path), subfolder=name))
        return component(component.config_class.from_pretrained(**_where(path), subfolder=name))


def components_on_no_device(path: str | Path) -> dict[str, nn.Module]:
    """Build the components of a folder or hub id that LoRA can be on, each by `component_on_no_device`."""
    with one_line(path):
        kind = _kind(DiffusionPipeline.load_config(**_where(path)))
    return {name: component_on_no_device(name, path, kind) for name in adaptable(kind)}


def adaptable(kind: type) -> list[str]:
    """Return the components of a pipeline that LoRA can be on, without T5: pipelines load no LoRA for it."""
    return [name for name, component in CLASSES[kind].items() if component not in (AutoencoderKL, T5EncoderModel)]


def _where(path: str | Path) -> dict:
    """Return the arguments of from_pretrained for a folder, a hub id or, as in timm, "name@revision"."""
    local = Path(path).exists()
    name, _, revision = (str(path), "", "") if local else str(path).partition("@")
    more = {"revision": revision} if revision else {}
    return {"pretrained_model_name_or_path": name, "local_files_only": local, **more}


def differences(missing: Iterable[str], unexpected: Iterable[str], misshapen: Iterable[str]) -> str:
    """Describe wrong tensors: how many of each kind and the names of some; "" if there are none."""
    kinds = {"missing": sorted(missing), "unexpected": sorted(unexpected), "misshapen": sorted(misshapen)}
    return ", ".join(f"{len(names)} {kind} ({some(names)})" for kind, names in kinds.items() if names)


def some(names: list[str]) -> str:
    """Return the first SHOWN names of a list as text."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


@contextmanager
def one_line(path: str | Path) -> Iterator[None]:
    """Turn any error into one FairDiffError that names the model, and silence the libraries' own messages.

    Their pipelines correct outdated scheduler settings (steps_offset 0, clip_sample) with long warnings.
    """
    diffusers.utils.logging.disable_progress_bar()  # loading takes seconds only
    transformers.utils.logging.disable_progress_bar()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The configuration file of this scheduler", FutureWarning)
            yield
    except FairDiffError:
        raise
    except Exception as error:  # diffusers, transformers, safetensors and the hub each raise their own classes
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise FairDiffError(f"cannot load {path} as a diffusers Stable Diffusion model: {reason}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def unlike_stable_diffusion(pipeline: Pipeline) -> str:
    """Return why a loaded U-Net model cannot be sampled from a prompt alone, "" if it can."""
    unet, vae, two = pipeline.unet.config, pipeline.vae.config, getattr(pipeline, "text_encoder_2", None)
    encoders = [encoder for encoder in (pipeline.text_encoder, two) if encoder is not None]
    if vae.latents_mean is not None or vae.latents_std is not None:
        return "its VAE shifts and scales each latent channel by itself (latents_mean, latents_std)"
    if not 0 < vae.scaling_factor < math.inf:
        return f"its VAE's scaling_factor is {vae.scaling_factor}"
    width = sum(encoder.config.hidden_size for encoder in encoders)
    if (unet.in_channels, unet.out_channels) != (vae.latent_channels,) * 2:
        return f"its U-Net has {unet.in_channels} channels in and {unet.out_channels} out, its VAE {vae.latent_channels}"
    if unet.class_embed_type or unet.addition_embed_type != ("text_time" if two else None):
        return f"its U-Net is conditioned on more than text ({unet.addition_embed_type or unet.class_embed_type})"
    if unet.cross_attention_dim != width:
        return f"its U-Net reads texts of width {unet.cross_attention_dim}, its text encoder writes {width}"
    if two and pooled_width(pipeline.unet) != two.config.projection_dim:
        pooled = two.config.projection_dim
        return f"its U-Net reads pooled texts of width {pooled_width(pipeline.unet)}, its text encoder writes {pooled}"
    return _odd_size(unet.sample_size) or _odd_scheduler(pipeline.scheduler)


def _unlike_flow(pipeline: Pipeline) -> str:
    """Return why a loaded flow-matching model cannot be sampled from a prompt alone, "" if it can."""
    net, vae, flux = pipeline.transformer.config, pipeline.vae.config, isinstance(pipeline, FluxPipeline)
    encoder = pipeline.text_encoder_2 if flux else pipeline.text_encoder_3
    t5 = encoder.config.d_model if encoder else net.joint_attention_dim
    clips = [pipeline.text_encoder] if flux else [pipeline.text_encoder, pipeline.text_encoder_2]
    pooled = sum(c.config.hidden_size if flux else c.config.projection_dim for c in clips)
    channels, scheduler = net.in_channels // 4 if flux else net.in_channels, pipeline.scheduler
    if not 0 < vae.scaling_factor < math.inf:
        return f"its VAE's scaling_factor is {vae.scaling_factor}"
    if channels != vae.latent_channels or net.out_channels not in (None, net.in_channels):
        return f"its transformer has {channels} channels of latents, its VAE {vae.latent_channels}"
    if net.joint_attention_dim != t5:
        return f"its transformer reads texts of width {net.joint_attention_dim}, its T5 writes {t5}"
    if net.pooled_projection_dim != pooled:
        reads = net.pooled_projection_dim
        return f"its transformer reads pooled texts of width {reads}, its text encoders write {pooled}"
    if not flux and sum(c.config.hidden_size for c in clips) > t5:
        return f"its CLIP text encoders together are wider than the words that its transformer reads, {t5}"
    if pooled > t5:
        return f"its pooled texts, of width {pooled}, are wider than its words, of width {t5}"
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return f"its scheduler is {type(scheduler).__name__}, not FlowMatchEulerDiscreteScheduler"
    size = vae.sample_size // 2 ** (len(vae.block_out_channels) - 1) if flux else net.sample_size
    if flux and size % 2:
        return f"its VAE's sample_size is {vae.sample_size}, of {size} latents, which cannot be read in pairs"
    return _odd_size(size)


def _odd_size(size: object) -> str:
    sides = size if isinstance(size, list | tuple) else [size, size]
    square = len(sides) == 2 and sides[0] == sides[1] and isinstance(sides[0], int)
    return "" if square and sides[0] > 0 else f"the sample_size of its latents is {size}, which is no square's"


def _odd_scheduler(scheduler) -> str:
    name = type(scheduler).__name__
    if not scheduler.config.get("beta_schedule"):
        return f"its scheduler {name} names no beta_schedule, the noise that a U-Net which predicts epsilon is trained on"
    predicts = scheduler.config.get("prediction_type", "epsilon")
    for key, what in SCHEDULES.items():
        if scheduler.config.get(key):
            why = f"does not go together with a U-Net that predicts {predicts}"
            if key == "rescale_betas_zero_snr" and predicts == "v_prediction":
                why = "no solver here starts from"
            return f"its scheduler {name} has {key}, {what}, which {why}"
    return ""
