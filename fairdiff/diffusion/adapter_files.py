"""Adapter files in the formats that diffusers loads with `load_textual_inversion` and `load_lora_weights`."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fairdiff.errors import FairDiffError
from fairdiff.files import read_given

TOKEN = "<fairdiff>"
SOFT_TOKENS_FILE = "soft_tokens.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]  # section 5 of the paper
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
TRANSFORMER_LAYERS = [*UNET_LAYERS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]  # image and text layers
TEXT_ROOT = "text_model."  # used in files; transformers 5 dropped it from the layer names of Stable Diffusion's text encoder
UNLIKE = ("rank_pattern", "alpha_pattern", "use_rslora")  # peft's settings for layers with different ranks or scales


def layers_of(part: str) -> list[str]:
    """Return the endings of the names of the layers that LoRA is trained on."""
    return {"unet": UNET_LAYERS, "transformer": TRANSFORMER_LAYERS}.get(part, TEXT_LAYERS)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of an adapter file."""
    if not path.exists():
        beside = sorted(p.name for p in path.parent.glob("*.safetensors"))
        raise FairDiffError(f"{path}: no such file, found {', '.join(beside) or 'no adapter'} in that folder")
    try:
        state = load_file(path)
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
    except Exception as error:  # truncated, not safetensors
        raise FairDiffError(f"{path}: cannot read the adapter: {error}") from error
    return state, about


def check_matrices(path: Path, state: dict[str, Tensor]) -> None:
    """Raise FairDiffError unless each tensor of a file is a matrix of finite real numbers."""
    for name, value in state.items():
        check_matrix(value, f"{path}: {name}")


def read_about(adapter: Path, key: str = "adapter.path") -> dict:
    """Read adapter.json from an adapter's folder or from beside its file, {} if there is none; `key` begins the errors."""
    path = (adapter.parent if adapter.is_file() else adapter) / "adapter.json"
    try:
        about = json.loads(read_given(path, f"{key}: {path}")) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise FairDiffError(f"{key}: {path}: is not JSON") from error
    if not isinstance(about, dict):
        raise FairDiffError(f"{key}: {path}: found {type(about).__name__}, allowed: a table")
    return about


def check_matrix(value: Tensor, where: str) -> None:
    """Raise FairDiffError, beginning with `where`, unless the tensor is a matrix of finite real numbers."""
    if value.ndim != 2 or not value.numel() or not value.is_floating_point():
        kind = str(value.dtype).removeprefix("torch.")
        raise FairDiffError(f"{where} is {kind} of shape {list(value.shape)}, allowed: a matrix of real numbers")
    if not value.float().isfinite().all():
        raise FairDiffError(f"{where} holds numbers that are not finite")


def lora_metadata(path: Path, about: dict[str, str]) -> dict:
    """Return the `lora_adapter_metadata` that diffusers writes (rank, alpha), by "<part>.<key>", {} if there is none."""
    try:
        settings = json.loads(about.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError) as error:
        raise FairDiffError(f"{path}: its lora_adapter_metadata is no JSON") from error
    if not isinstance(settings, dict):
        raise FairDiffError(f"{path}: its lora_adapter_metadata is {type(settings).__name__}, allowed: a table")
    return settings


def lora_settings(path: Path, about: dict[str, str]) -> dict:
    """Return `lora_metadata` of a file. Raise FairDiffError unless all layers have one rank and alpha."""
    settings = lora_metadata(path, about)
    for key, value in settings.items():
        if key.rpartition(".")[2] in UNLIKE and value:
            raise FairDiffError(
                f"{path}: its lora_adapter_metadata has {key}, allowed: one rank and alpha for all layers; "
                "adapter.path takes the file itself with its own"
            )
    return settings


def uniform(part: str, rank: int, alpha: float) -> dict:
    """Return the arguments of peft's LoraConfig for the layers of `layers_of`, with one rank and alpha."""
    usual = {"r": rank, "lora_alpha": alpha, "target_modules": layers_of(part)}
    return usual | {"rank_pattern": {}, "alpha_pattern": {}}


def save_lora(
    folder: Path, state: dict[str, dict[str, Tensor]], settings: dict[str, dict], pipeline: type, name: str = LORA_FILE
) -> None:
    """Write the LoRA factors of each module under peft's names, for `load_lora_weights` of the pipeline class.

    settings: the arguments of peft's LoraConfig for each module. Without them diffusers would assume alpha = rank.
    """
    given: dict[str, dict] = {}
    for part, factors in state.items():
        root = TEXT_ROOT if part.startswith("text_encoder") else ""
        given[f"{part}_lora_layers"] = {root + key.removeprefix(root): value for key, value in factors.items()}
        given[f"{part}_lora_adapter_metadata"] = settings[part]
    pipeline.save_lora_weights(folder, weight_name=name, **given)
