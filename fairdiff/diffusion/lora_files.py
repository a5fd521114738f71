"""Read LoRA files of diffusers, peft and kohya's scripts as low-rank factors of a model's layers, and name layers for them.

The layers of the model decide what a file may hold, by all the names that these tools give a layer. A tensor that is not
a factor of a known layer in a fitting shape is an error. No tensor is ignored.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fairdiff.diffusion.adapter_files import TEXT_ROOT, lora_metadata
from fairdiff.diffusion.factors import Factors, Layers, Shapes
from fairdiff.diffusion.flux_layers import apart, original_shapes, originals
from fairdiff.diffusion.ldm import unet_names
from fairdiff.errors import FairDiffError
from fairdiff.files import read_given

ENDS = {  # ending of a tensor's name -> which part of LoRA it is
    ".lora_A.weight": "down", ".lora_B.weight": "up",  # peft
    ".lora_down.weight": "down", ".lora_up.weight": "up",  # kohya
    ".lora.down.weight": "down", ".lora.up.weight": "up",  # diffusers before peft
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",  # the first versions of diffusers, after `processor.`
    ".alpha": "alpha",
}  # fmt: skip
OTHER = re.compile(r"hada_|lokr_|lora_mid|dora_scale|lora_magnitude_vector|oft_|\.(diff|diff_b|w_norm|b_norm)$")
PEFT = "base_model.model."  # begins every name in a file that peft saved; the file does not say for which module
PEFT_CONFIG = "adapter_config.json"  # beside such a file: rank, alpha and their patterns
DENOISERS = ("unet", "transformer")
ALLOWED = "LoRA of linear and convolutional layers of this model"


def shapes_of(modules: Mapping[str, nn.Module]) -> Shapes:
    """Return the layers of a model that LoRA can be on with their weights' shapes. Call it before adding an adapter."""
    return {
        name: {
            layer.removeprefix(TEXT_ROOT): list(inner.weight.shape)
            for layer, inner in module.named_modules()
            if isinstance(inner, nn.Linear | nn.Conv2d)
        }
        for name, module in modules.items()
    }


def kohya_names(shapes: Shapes) -> dict[tuple[str, str], str]:
    """Return (module, layer) -> its name in files of kohya's scripts, which A1111 and ComfyUI read too.

    Stable Diffusion XL: the U-Net's layers have their original names, and the text encoders are numbered (networks/lora.py
    and sdxl_original_unet.py of kohya-ss/sd-scripts). FLUX: the transformer has its original layers (networks/lora_flux.py
    there; `flux_layers`), and CLIP is text encoder 1. Stable Diffusion 3: its transformer has no such names.
    """
    xl = "text_encoder_2" in shapes
    root = "lora_te1" if xl or "transformer" in shapes else "lora_te"
    roots = {"text_encoder": root, "text_encoder_2": "lora_te2"}
    unet = shapes.get("unet", {})
    own = {("unet", layer): name for layer, name in (unet_names(unet) if xl else dict(zip(unet, unet, strict=True))).items()}
    own |= {("transformer", name): name for name in originals(shapes.get("transformer", {}))}
    found = {place: f"lora_unet_{name.replace('.', '_')}" for place, name in own.items()}
    for module in shapes.keys() - set(DENOISERS):
        for layer in shapes[module]:
            root = "" if layer == "text_projection" else TEXT_ROOT
            found[module, layer] = f"{roots[module]}_{root}{layer}".replace(".", "_")
    return found


def _known_names(shapes: Shapes) -> dict[str, tuple[str, str]]:
    """Return every name that a file may give a layer -> (module, layer), without kohya's names for Stable Diffusion 3.

    For FLUX it includes the original layers, as ("transformer", original layer), and ComfyUI's names of these and of CLIP.
    """
    unet, flux = "unet" in shapes, originals(shapes.get("transformer", {}))
    found = {name: place for place, name in kohya_names(shapes).items()} if unet or flux else {}
    found |= {f"diffusion_model.{name}": ("transformer", name) for name in flux}
    original = unet_names(shapes["unet"]) if unet else {}
    for module, layers in shapes.items():
        for layer in layers:
            root = "" if module in DENOISERS or layer == "text_projection" else TEXT_ROOT
            names = [f"{module}.{layer}", f"{module}.{root}{layer}", f"{module}.{layer.removesuffix('.0')}"]
            if module == "unet":
                names += [f"lora_unet_{name.replace('.', '_')}" for name in (layer, original[layer])]
            elif module == "text_encoder" and (unet or flux):  # diffusers' converter numbers it for every model
                names += [f"lora_te{number}_{root}{layer}".replace(".", "_") for number in ("", "1")]
                names += [f"text_encoders.clip_l.transformer.{root}{layer}"] if flux else []
            for name in names:
                found.setdefault(name, (module, layer))
    return found


def read_lora(path: Path, shapes: Shapes) -> Layers:
    """Read the factors in a LoRA file by module and layer, in float32.

    A layer's alpha is its `.alpha`, else that of `lora_adapter_metadata`, else its rank, as in diffusers. For a file saved
    by peft it comes from `adapter_config.json` beside the file.
    Raises FairDiffError in one line for a file that is unreadable or not finite, a tensor that fits no layer (how many, and
    the first), a missing factor, and factors that fit neither each other nor their layer.
    """
    try:
        state = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:  # missing, truncated, a pickle
        reason = " ".join(str(error).split())[:200]
        raise FairDiffError(f"{path}: cannot read it as a safetensors file: {reason}") from error
    said = lora_metadata(path, metadata)
    if state and all(key.startswith(PEFT) for key in state):
        state, said = _of_peft(path, {key.removeprefix(PEFT): value for key, value in state.items()}, shapes)
    names, parts, left = _known_names(shapes), {}, []
    for key, value in state.items():
        side, place = _side(key), names.get(_layer(key).replace(".processor.", "."))
        if not side or place is None:
            left.append(key)
        elif value.is_complex() or not value.float().isfinite().all():
            raise FairDiffError(f"{path}: {key} holds numbers that are not finite, or no real ones")
        elif side in parts.setdefault(place, {}):
            raise FairDiffError(f"{path}: {key} is of {'.'.join(place)}, whose {side} it holds under another name too")
        else:
            parts[place][side] = value.float()
    if left:
        raise FairDiffError(_unknown(path, sorted(left), len(state)))
    if not parts:
        raise FairDiffError(f"{path}: holds no tensors; allowed: {ALLOWED}")
    found: Layers = {module: {} for module in shapes if any(place[0] == module for place in parts)}
    fused = original_shapes(shapes.get("transformer", {}))
    for module, layer in parts:
        shape = shapes[module].get(layer) or fused[layer]
        own = {layer: _factors(path, (module, layer), parts[module, layer], shape, said)}
        own = own if layer in shapes[module] else apart(layer, own[layer], shapes[module])
        if twice := own.keys() & found[module].keys():
            raise FairDiffError(f"{path}: holds {module}.{min(twice)} twice, by itself and as a part of another layer")
        found[module] |= own
    return found


def _of_peft(path: Path, state: dict[str, Tensor], shapes: Shapes) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors named for the one module whose layers they fit, and the settings of peft's adapter_config.json.

    Tensors that fit no module are returned unchanged; the caller then finds no layer for them.
    """
    names, fitting = _known_names(shapes), []
    for module in shapes:
        layers = [(names.get(f"{module}.{_layer(key)}"), _side(key), value.shape) for key, value in state.items()]
        if all(_fits(shapes, place, side, shape) for place, side, shape in layers):
            fitting.append(module)
    if len(fitting) > 1:
        raise FairDiffError(
            f"{path}: fits {' and '.join(fitting)} alike and does not name its module; allowed: names that begin with it"
        )
    if not fitting:
        return state, {}
    beside = path.parent / PEFT_CONFIG
    if not beside.is_file():
        raise FairDiffError(f"{path}: was saved by peft, and {PEFT_CONFIG}, which says its alpha, is not beside it")
    try:
        settings = json.loads(read_given(beside, str(beside)))
    except (ValueError, RecursionError) as error:
        raise FairDiffError(f"{beside}: is not JSON") from error
    if not isinstance(settings, dict):
        raise FairDiffError(f"{beside}: found {type(settings).__name__}, allowed: a table")
    (module,) = fitting
    return {f"{module}.{k}": v for k, v in state.items()}, {f"{module}.{k}": v for k, v in settings.items()}


def _layer(key: str) -> str:
    """Return the layer's part of a tensor's name."""
    return key.removesuffix(next((end for end in ENDS if key.endswith(end)), ""))


def _side(key: str) -> str:
    """Return "down", "up" or "alpha" by the ending of a tensor's name, "" for another ending."""
    return next((what for end, what in ENDS.items() if key.endswith(end)), "")


def _fits(shapes: Shapes, place: tuple[str, str] | None, side: str, shape: torch.Size) -> bool:
    """Return whether a factor of this shape can belong to the layer."""
    if place is None or side not in ("down", "up"):
        return False
    weight = shapes[place[0]][place[1]]
    return list(shape[1:]) == weight[1:] if side == "down" else len(shape) > 0 and shape[0] == weight[0]


def _unknown(path: Path, left: list[str], total: int) -> str:
    """Return a message with the number of tensors that fit no layer, and the reason if a name reveals it."""
    other = next((key for key in left if OTHER.search(key)), None)
    why = f"; {other} is of another kind of adapter (LoHa, LoKr, DoRA, OFT or whole weights)" if other else ""
    return f"{path}: {len(left)} of {total} tensors fit no layer, the first is {left[0]}{why}; allowed: {ALLOWED}"


def _factors(path: Path, place: tuple[str, str], parts: dict[str, Tensor], shape: list[int], said: dict) -> Factors:
    """Return the factors of one layer after checking their shapes and alpha. said: rank and alpha from the metadata."""
    module, layer = place
    where = f"{path}: {module}.{layer}"
    if not {"down", "up"} <= parts.keys():
        raise FairDiffError(f"{where} has only {', '.join(parts)}, allowed: both factors")
    down, up = parts["down"], parts["up"]
    if len(shape) == 4 and (down.ndim, up.ndim) == (2, 2) and shape[2:] == [1, 1]:  # some tools write 1x1 convolutions so
        down, up = down[..., None, None], up[..., None, None]
    if len(shape) == 2 and (down.ndim, up.ndim) == (4, 4) and down.shape[2:] == up.shape[2:] == (1, 1):
        down, up = down.flatten(1), up.flatten(1)
    rank = len(down) if down.ndim else 0
    wanted = [rank, *shape[1:]], [shape[0], rank, *[1] * (len(shape) - 2)]
    if not rank or (list(down.shape), list(up.shape)) != wanted:
        raise FairDiffError(f"{where}: found factors {list(down.shape)} and {list(up.shape)}, its weight is {shape}")
    alpha = _alpha(module, layer, rank, said)
    if "alpha" in parts:
        alpha = parts["alpha"].item() if parts["alpha"].numel() == 1 else None
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise FairDiffError(f"{where}: its alpha is no finite number")
    return Factors(down, up, float(alpha))


def _alpha(module: str, layer: str, rank: int, said: dict) -> object:
    """Return a layer's alpha from the metadata, by peft's rules; rank-stabilised LoRA gets alpha √r, to be divided by r."""
    if f"{module}.r" not in said:
        return rank
    patterns = said.get(f"{module}.alpha_pattern") or {}
    name = layer if module in DENOISERS else f"{TEXT_ROOT}{layer}"
    key = name if name in patterns else get_pattern_key(patterns, name) if patterns else name
    alpha = patterns.get(key, patterns.get(layer, said.get(f"{module}.lora_alpha", rank)))
    return alpha * math.sqrt(rank) if said.get(f"{module}.use_rslora") and isinstance(alpha, int | float) else alpha


def combined(files: list[Layers], scales: list[float]) -> Layers:
    """Return the sum of several files, each multiplied by its scale: concatenated factors with alpha = rank."""
    modules = dict.fromkeys(module for file in files for module in file)
    found: Layers = {}
    for module in modules:
        found[module] = {}
        for layer in dict.fromkeys(layer for file in files for layer in file.get(module, {})):
            own = [(f[module][layer], s) for f, s in zip(files, scales, strict=True) if layer in f.get(module, {})]
            down = torch.cat([factors.down for factors, _ in own])
            up = torch.cat([scale * factors.alpha / factors.rank * factors.up for factors, scale in own], 1)
            found[module][layer] = Factors(down, up, len(down))
    return found


def settings_of(layers: dict[str, Factors]) -> dict:
    """Return the arguments of peft's LoraConfig for one module: the commonest rank and alpha, and patterns for the others."""
    ranks, alphas = Counter(f.rank for f in layers.values()), Counter(f.alpha for f in layers.values())
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]

    def pattern(of: dict[str, float], usual: float) -> dict[str, float]:
        """Return one pattern for each value, because peft tries every pattern on every layer."""
        groups: dict[float, list[str]] = {}
        for name, value in of.items():
            groups.setdefault(value, []).append(re.escape(name))
        return {"|".join(names): value for value, names in groups.items() if value != usual}

    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(layers),
        "rank_pattern": pattern({name: f.rank for name, f in layers.items()}, rank),
        "alpha_pattern": pattern({name: f.alpha for name, f in layers.items()}, alpha),
    }
