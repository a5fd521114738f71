"""Export a saved adapter to the formats of other tools: each is a folder with the file that the tool loads and adapter.json.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fairdiff.diffusion.adapter_files import LORA_FILE, SOFT_TOKENS_FILE, TEXT_ROOT, TOKEN, read_about, save_lora
from fairdiff.diffusion.flux_layers import fused
from fairdiff.diffusion.folder import CLASSES, FAMILIES, adaptable, components_on_no_device, read_pipeline
from fairdiff.diffusion.imports import FILES, check_widths
from fairdiff.diffusion.ldm import single_file_state
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.lora_files import Layers, Shapes, kohya_names, read_lora, settings_of, shapes_of
from fairdiff.diffusion.single_file import file_on_no_device, is_single_file, read_single_file
from fairdiff.diffusion.soft_tokens import SoftTokens
from fairdiff.diffusion.textual_inversion import A1111_KEY, XL_KEYS, read_embedding, tensor_names
from fairdiff.errors import FairDiffError
from fairdiff.files import atomic_path, write_json

FORMATS = ("diffusers", "kohya", "a1111", "merged", "merged_file")
KOHYA_FILE, A1111_FILE, MERGED_FILE = "fairdiff_lora.safetensors", "fairdiff.safetensors", "fairdiff_merged.safetensors"
OF_FLOWS = {  # fewer formats: kohya's names for Stable Diffusion 3 are not settled, and neither is written as a single file
    StableDiffusion3Pipeline: ("diffusers", "merged"),
    FluxPipeline: ("diffusers", "kohya", "merged"),
}
LOAD_WITH = {"merged": "from_pretrained", "merged_file": "from_single_file"}  # replaces `load_with` in adapter.json
PIPELINES = {  # (has a transformer, has two text encoders that LoRA can be on) -> the pipeline
    (False, False): StableDiffusionPipeline,
    (False, True): StableDiffusionXLPipeline,
    (True, False): FluxPipeline,
    (True, True): StableDiffusion3Pipeline,
}
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def export(source: Path, kind: str, to: Path, model: str | Path, scale: float = 1.0, dtype: str = "float32") -> None:
    """Write an adapter as the folder `to` in one of FORMATS; an existing folder is replaced.

    source: an adapter folder, or a LoRA or textual-inversion file of any tool. model: folder, hub id or file of the
    adapter's model; "diffusers" and "kohya" read only its configurations or its header. scale: the strength in the written
    weights, W + scale (alpha/r) B A. Soft tokens are moved to `scale` times their distance from their initial words.

    kohya: LoRA with `.alpha` for A1111, ComfyUI and kohya's scripts; for FLUX on its original layers (`flux_layers`).
    a1111: soft tokens for A1111 and ComfyUI, used by the file's name. merged: the model with LoRA added to its weights, as a
    diffusers folder. merged_file: the same as one file with original names. Stable Diffusion 3 and FLUX have OF_FLOWS only.
    Raises FairDiffError for an adapter that the format cannot hold and for numbers beyond the precision's range.
    """
    folder = source.parent if source.suffix in FILES else source
    file = source if source.suffix in FILES else _weights(source)
    soft = file.name == SOFT_TOKENS_FILE or not _is_lora(file)
    allowed = ("diffusers", "a1111") if soft else ("diffusers", "kohya", "merged", "merged_file")
    if kind not in allowed:
        what = "soft tokens" if soft else "LoRA"
        raise FairDiffError(f"{file}: {kind} is no format of {what}, allowed: {', '.join(allowed)}")
    cast = _caster(file, DTYPES[dtype])
    about = read_about(folder) | {"export": {"format": kind, "scale": scale, "dtype": dtype}}
    with atomic_path(to) as temporary:
        temporary.mkdir()
        if soft:
            _save_tokens(kind, temporary, _scaled_tokens(file, model, scale), cast)
            about["prompt_prefix"] = f"{Path(A1111_FILE).stem} " if kind == "a1111" else f"{TOKEN} "
        elif kind in LOAD_WITH:
            _save_merged(file, kind, temporary, model, scale, cast)
            about["load_with"] = LOAD_WITH[kind]
        else:
            shapes = shapes_of((file_on_no_device if is_single_file(model) else components_on_no_device)(model))
            _require_format(kind, _pipeline_of(shapes), model)
            layers = _scaled(read_lora(file, shapes), scale)
            (_save_kohya if kind == "kohya" else _save_diffusers)(temporary, layers, shapes, cast)
        write_json(temporary / "adapter.json", about)


def _weights(folder: Path) -> Path:
    """Return the weights file of an adapter folder."""
    found = [folder / name for name in (LORA_FILE, SOFT_TOKENS_FILE) if (folder / name).is_file()]
    if len(found) != 1:
        raise FairDiffError(f"{folder}: holds no adapter; allowed: a run folder, an adapter folder or a file")
    return found[0]


def _pipeline_of(shapes: Shapes) -> type:
    return PIPELINES["transformer" in shapes, "text_encoder_2" in shapes]


def _require_format(kind: str, pipeline: type, model: str | Path) -> None:
    if kind not in (allowed := OF_FLOWS.get(pipeline, FORMATS)):
        raise FairDiffError(f"{model}: {kind} is no format of {FAMILIES[pipeline]}, allowed: {', '.join(allowed)}")


def _is_lora(file: Path) -> bool:
    """Return whether the tensor names of a file are not those of a textual inversion."""
    if file.suffix != ".safetensors":
        return False
    try:
        with safe_open(file, "pt") as opened:
            return not tensor_names(dict.fromkeys(opened.keys()))
    except Exception as error:  # missing, truncated, not safetensors
        raise FairDiffError(f"{file}: cannot read the adapter: {' '.join(str(error).split())}") from error


def _caster(file: Path, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def cast(value: Tensor) -> Tensor:
        found = value.detach().to(dtype).contiguous()
        if not found.isfinite().all():
            raise FairDiffError(f"{file}: holds numbers beyond the range of {dtype}; allowed: --dtype float32")
        return found

    return cast


def _scaled(layers: Layers, scale: float) -> Layers:
    """Return the layers with the up factors multiplied by `scale`: some tools ignore alpha, but none ignores a factor."""
    return {m: {name: replace(f, up=scale * f.up) for name, f in part.items()} for m, part in layers.items()}


def _save_kohya(folder: Path, layers: Layers, shapes: Shapes, cast: Callable[[Tensor], Tensor]) -> None:
    """Write `<name>.lora_down.weight`, `.lora_up.weight` and the true `.alpha` of each layer, for FLUX by original layers."""
    if "transformer" in layers:
        layers = layers | {"transformer": fused(layers["transformer"], shapes["transformer"])}
    names, state = kohya_names(shapes), {}
    for module, part in layers.items():
        for layer, factors in part.items():
            name = names[module, layer]
            state[f"{name}.lora_down.weight"] = cast(factors.down)
            state[f"{name}.lora_up.weight"] = cast(factors.up)
            state[f"{name}.alpha"] = torch.tensor(factors.alpha)
    save_file(state, folder / KOHYA_FILE, _kohya_metadata(layers, shapes))


def _kohya_metadata(layers: Layers, shapes: Shapes) -> dict[str, str]:
    """Return the metadata that kohya's scripts write. A1111 lists a LoRA by its model version (its Lora/network.py)."""
    every = [factors for part in layers.values() for factors in part.values()]
    ranks, alphas = {factors.rank for factors in every}, {factors.alpha for factors in every}
    flux, second = "transformer" in shapes, shapes["text_encoder"]["encoder.layers.0.mlp.fc1"][1] == 1024  # 2.x only
    version = "flux1" if flux else "sdxl_base_v1-0" if "text_encoder_2" in shapes else "sd_v2" if second else "sd_v1"
    return {
        "format": "pt",
        "ss_network_module": "networks.lora_flux" if flux else "networks.lora",
        "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(*alphas) if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": version,
        "ss_v2": str(version == "sd_v2"),
    }


def _save_diffusers(folder: Path, layers: Layers, shapes: Shapes, cast: Callable[[Tensor], Tensor]) -> None:
    state = {
        module: {f"{layer}.lora_A.weight": cast(factors.down) for layer, factors in part.items()}
        | {f"{layer}.lora_B.weight": cast(factors.up) for layer, factors in part.items()}
        for module, part in layers.items()
    }
    save_lora(folder, state, {module: settings_of(part) for module, part in layers.items()}, _pipeline_of(shapes))


def _save_merged(
    file: Path, kind: str, folder: Path, model: str | Path, scale: float, cast: Callable[[Tensor], Tensor]
) -> None:
    """Write the whole model with the weights W + scale (alpha/r) B A, computed in float32."""
    pipeline = (read_single_file if is_single_file(model) else read_pipeline)(model)
    _require_format(kind, type(pipeline), model)
    modules = {name: pipeline.components[name] for name in adaptable(type(pipeline))}
    for name, part in read_lora(file, shapes_of(modules)).items():
        inner = {layer.removeprefix(TEXT_ROOT): found for layer, found in modules[name].named_modules()}
        for layer, factors in part.items():
            inner[layer].weight.data.add_(factors.delta(), alpha=scale)
    parts = [pipeline.components[name] for name in CLASSES[type(pipeline)]]
    for part in parts:
        for tensor in part.parameters() if part is not None else ():  # Stable Diffusion 3 may have no T5
            tensor.data = cast(tensor)
    if kind == "merged":
        pipeline.save_pretrained(folder)
        return
    encoders = [module for name, module in modules.items() if name != "unet"]
    state = single_file_state(encoders, pipeline.unet, pipeline.vae)
    save_file({name: cast(value).clone() for name, value in state.items()}, folder / MERGED_FILE, {"format": "pt"})


def _scaled_tokens(file: Path, model: str | Path, scale: float) -> tuple[list[Tensor], dict[str, str]]:
    """Return the scaled embeddings [N, D] of each text encoder, and the metadata: the initial text, if the file has it."""
    rows, text = read_embedding(file)
    if scale == 1:
        return rows, {"initial_text": text} if text else {}
    if not text:
        raise FairDiffError(f"{file}: does not say which words its tokens started from; allowed: --scale 1")
    tokens = SoftTokens(load_model(model), len(rows[0]), text)
    check_widths(file, rows, tokens)
    for soft, own in zip(tokens.parameters(), rows, strict=True):
        soft.data.copy_(own)
    tokens.rescale(scale)
    return [soft.detach() for soft in tokens.parameters()], {"initial_text": text}


def _save_tokens(
    kind: str, folder: Path, tokens: tuple[list[Tensor], dict[str, str]], cast: Callable[[Tensor], Tensor]
) -> None:
    """Write the soft tokens; those for Stable Diffusion XL have the same tensor names for every tool."""
    rows, about = tokens
    one, file = (TOKEN, SOFT_TOKENS_FILE) if kind == "diffusers" else (A1111_KEY, A1111_FILE)
    names = [one] if len(rows) == 1 else XL_KEYS
    save_file({name: cast(own) for name, own in zip(names, rows, strict=True)}, folder / file, about)
