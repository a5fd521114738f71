"""Files of adapters, in the formats that plain diffusers loads: `load_textual_inversion` and `load_lora_weights`."""

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
TRANSFORMER_LAYERS = [*UNET_LAYERS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]  # of images, and of texts
TEXT_ROOT = "text_model."  # in files; transformers 5 dropped it from the names inside Stable Diffusion's text encoder
UNLIKE = ("rank_pattern", "alpha_pattern", "use_rslora")  # what peft writes of a LoRA whose layers are scaled otherwise


def layers_of(part: str) -> list[str]:
    """The ends of the names of the layers that LoRA is on."""
    return {"unet": UNET_LAYERS, "transformer": TRANSFORMER_LAYERS}.get(part, TEXT_LAYERS)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an adapter file, and what stands beside them."""
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
    """FairDiffError unless each tensor of a file is a matrix of finite real numbers."""
    for name, value in state.items():
        check_matrix(value, f"{path}: {name}")


def read_about(adapter: Path, key: str = "adapter.path") -> dict:
    """adapter.json in the folder of a saved adapter or beside its file, {} if there is none; `key` begins the errors."""
    path = (adapter.parent if adapter.is_file() else adapter) / "adapter.json"
    try:
        about = json.loads(read_given(path, f"{key}: {path}")) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise FairDiffError(f"{key}: {path}: is not JSON") from error
    if not isinstance(about, dict):
        raise FairDiffError(f"{key}: {path}: found {type(about).__name__}, allowed: a table")
    return about


def check_matrix(value: Tensor, where: str) -> None:
    """FairDiffError, beginning with `where`, unless it is a matrix of finite real numbers."""
    if value.ndim != 2 or not value.numel() or not value.is_floating_point():
        kind = str(value.dtype).removeprefix("torch.")
        raise FairDiffError(f"{where} is {kind} of shape {list(value.shape)}, allowed: a matrix of real numbers")
    if not value.float().isfinite().all():
        raise FairDiffError(f"{where} holds numbers that are not finite")


def lora_metadata(path: Path, about: dict[str, str]) -> dict:
    """What a LoRA file says of rank and alpha, by "<part>.<key>", as diffusers writes it; {} if it says nothing."""
    try:
        settings = json.loads(about.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError) as error:
        raise FairDiffError(f"{path}: its lora_adapter_metadata is no JSON") from error
    if not isinstance(settings, dict):
        raise FairDiffError(f"{path}: its lora_adapter_metadata is {type(settings).__name__}, allowed: a table")
    return settings


def lora_settings(path: Path, about: dict[str, str]) -> dict:
    """`lora_metadata` of a file whose layers all have one rank and alpha; FairDiffError for another."""
    settings = lora_metadata(path, about)
    for key, value in settings.items():
        if key.rpartition(".")[2] in UNLIKE and value:
            raise FairDiffError(
                f"{path}: its lora_adapter_metadata has {key}, allowed: one rank and alpha for all layers; "
                "adapter.path takes the file itself with its own"
            )
    return settings


def uniform(part: str, rank: int, alpha: float) -> dict:
    """peft's LoraConfig of the layers that LoRA is trained on, of one rank and alpha."""
    usual = {"r": rank, "lora_alpha": alpha, "target_modules": layers_of(part)}
    return usual | {"rank_pattern": {}, "alpha_pattern": {}}


def save_lora(
    folder: Path, state: dict[str, dict[str, Tensor]], settings: dict[str, dict], pipeline: type, name: str = LORA_FILE
) -> None:
    """Write the LoRA factors of each module, named as peft does, as `load_lora_weights` of a pipeline's class reads them.

    settings: of each module peft's LoraConfig; a file that does not say it has alpha = rank to diffusers.
    """
    given: dict[str, dict] = {}
    for part, factors in state.items():
        root = TEXT_ROOT if part.startswith("text_encoder") else ""
        given[f"{part}_lora_layers"] = {root + key.removeprefix(root): value for key, value in factors.items()}
        given[f"{part}_lora_adapter_metadata"] = settings[part]
    pipeline.save_lora_weights(folder, weight_name=name, **given)
