"""Files of adapters, in the formats that plain diffusers loads: `load_textual_inversion` and `load_lora_weights`."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fairdiff.errors import FairDiffError

TOKEN = "<fairdiff>"
SOFT_TOKENS_FILE = "soft_tokens.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]  # section 5 of the paper
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
TRANSFORMER_LAYERS = [*UNET_LAYERS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]  # of images, and of texts
TEXT_ROOT = "text_model."  # in files; transformers 5 dropped it from the names inside Stable Diffusion's text encoder
UNLIKE = ("rank_pattern", "alpha_pattern", "use_rslora")  # what peft writes of a LoRA whose layers are scaled otherwise


def layers_of(part: str) -> list[str]:
    """The ends of the names of the layers that LoRA is on."""
    return {"unet": UNET_LAYERS, "transformer": TRANSFORMER_LAYERS}.get(part, TEXT_LAYERS)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an adapter file, each a matrix of finite real numbers, and what stands beside them."""
    if not path.exists():
        beside = sorted(p.name for p in path.parent.glob("*.safetensors"))
        raise FairDiffError(f"{path}: no such file, found {', '.join(beside) or 'no adapter'} in that folder")
    try:
        state = load_file(path)
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
    except Exception as error:  # truncated, not safetensors
        raise FairDiffError(f"{path}: cannot read the adapter: {error}") from error
    for name, value in state.items():
        check_matrix(value, f"{path}: {name}")
    return state, about


def check_matrix(value: Tensor, where: str) -> None:
    """FairDiffError, beginning with `where`, unless it is a matrix of finite real numbers."""
    if value.ndim != 2 or not value.numel() or not value.is_floating_point():
        kind = str(value.dtype).removeprefix("torch.")
        raise FairDiffError(f"{where} is {kind} of shape {list(value.shape)}, allowed: a matrix of real numbers")
    if not value.float().isfinite().all():
        raise FairDiffError(f"{where} holds numbers that are not finite")


def lora_settings(path: Path, about: dict[str, str]) -> dict:
    """What a LoRA file says of rank and alpha, by "<part>.<key>", as diffusers writes it; {} if it says nothing."""
    try:
        settings = json.loads(about.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError) as error:
        raise FairDiffError(f"{path}: its lora_adapter_metadata is no JSON") from error
    if not isinstance(settings, dict):
        raise FairDiffError(f"{path}: its lora_adapter_metadata is {type(settings).__name__}, allowed: a table")
    for key, value in settings.items():
        if key.rpartition(".")[2] in UNLIKE and value:
            raise FairDiffError(
                f"{path}: its lora_adapter_metadata has {key}, allowed: one rank and alpha for all layers"
            )
    return settings


def save_lora(folder: Path, state: dict[str, dict[str, Tensor]], rank: int, alpha: float, pipeline: type) -> None:
    """Write the LoRA factors of each module, named as peft does, as `load_lora_weights` of a pipeline's class reads them."""
    given: dict[str, dict] = {}
    for name, factors in state.items():
        root = TEXT_ROOT if name.startswith("text_encoder") else ""
        given[f"{name}_lora_layers"] = {root + key.removeprefix(root): value for key, value in factors.items()}
        about = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": layers_of(name),
            "rank_pattern": {},
            "alpha_pattern": {},
        }
        given[f"{name}_lora_adapter_metadata"] = about  # without it diffusers takes alpha = rank
    pipeline.save_lora_weights(folder, **given)
