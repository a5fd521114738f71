"""The adapters that the paper's authors released, in the formats that this project and plain diffusers load.

Their files are flat dicts of float32 tensors (github.com/sail-sg/finetune-fair-diffusion, Shen et al., ICLR 2024):
LoRA of the text encoder or the U-Net without an alpha, so of scale 1, or the soft tokens beside a copy of the model's
position embeddings. They stand for Stable Diffusion 1.5 with prompts that are not padded and guidance 7.5. (The soft
tokens were trained beside an unconditional text without a mask, which `model.padding=longest` masks, as LoRA was.)
"""

import re
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from fairdiff.diffusion.adapters import SOFT_TOKENS_FILE, TOKEN, save_lora
from fairdiff.errors import FairDiffError
from fairdiff.files import write_json

TEXT_KEY = re.compile(r"(text_model\..+\.(?:[qkv]_proj|out_proj|fc[12]))\.lora_linear_layer\.(down|up)\.weight")
UNET_KEY = re.compile(r"(.+\.attn[12])\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight")
PREFIX_KEYS = {"token_embedding.weight", "position_embedding.weight", "position_ids"}
FACTOR = {"down": "lora_A", "up": "lora_B"}


def convert(files: list[Path], folder: Path) -> dict[str, object]:
    """Write released files as one adapter folder: one of the text encoder, one of the U-Net, both, or the soft tokens.

    Returns what `adapter.json` says. Raises FairDiffError, in one line that names the file, for what cannot be read
    without running its code, for keys of another kind, for factors that do not fit together and for a folder that exists.
    """
    if folder.exists():
        raise FairDiffError(f"{folder}: exists already, allowed: a new folder")
    parts: dict[str, dict[str, Tensor]] = {}
    for file in files:
        name, state = read_released(file)
        if name in parts:
            raise FairDiffError(f"{file}: holds {name}, as another of these files does")
        parts[name] = state
    if "soft_tokens" in parts and len(parts) > 1:
        raise FairDiffError(
            f"{', '.join(map(str, files))}: soft tokens and LoRA are adapters of their own; convert one"
        )
    rank = 0 if "soft_tokens" in parts else _rank(parts, files)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    about = {"padding": "longest", "guidance": 7.5, "negative_prompt": "", "source": [file.name for file in files]}
    if "soft_tokens" in parts:
        save_file(parts["soft_tokens"], temporary / SOFT_TOKENS_FILE)
        count = len(parts["soft_tokens"][TOKEN])
        about |= {"type": "soft_tokens", "options": f"adapter.type=soft_tokens adapter.tokens={count}"}
        about |= {"load_with": "load_textual_inversion", "prompt_prefix": f"{TOKEN} "}
    else:
        save_lora(temporary, parts, rank, rank, StableDiffusionPipeline)
        names = [name for name in ("text_encoder", "unet") if name in parts]
        options = f"adapter.type=lora adapter.parts=[{','.join(names)}] adapter.rank={rank}"
        about |= {"type": "lora", "options": options, "load_with": "load_lora_weights", "prompt_prefix": ""}
    write_json(temporary / "adapter.json", about)
    temporary.rename(folder)
    return about


def read_released(file: Path) -> tuple[str, dict[str, Tensor]]:
    """("text_encoder" or "unet", its LoRA factors as peft names them) or ("soft_tokens", {token: [N, D]})."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # missing, cut short, another format, or code that would have to be run
        raise FairDiffError(
            f"{file}: cannot read it without running code: {' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise FairDiffError(f"{file}: holds no flat dict of tensors")
    for key, value in state.items():
        if not isinstance(key, str) or not value.isfinite().all():
            raise FairDiffError(f"{file}: {key!r} is no name, or what it names is not finite")
    if "token_embedding.weight" in state and set(state) <= PREFIX_KEYS:
        rows = state["token_embedding.weight"]
        if rows.ndim != 2 or len(rows) < 2:
            raise FairDiffError(
                f"{file}: token_embedding.weight is {tuple(rows.shape)}, allowed: a dummy row and tokens"
            )
        return "soft_tokens", {TOKEN: rows[1:].float().contiguous()}
    for name, pattern, rename in (("text_encoder", TEXT_KEY, _text_name), ("unet", UNET_KEY, _unet_name)):
        found = {key: pattern.fullmatch(key) for key in state}
        if any(found.values()):
            other = [key for key, match in found.items() if match is None]
            other += [key for key, match in found.items() if match and state[key].ndim != 2]
            if other:
                raise FairDiffError(f"{file}: {len(other)} keys are none of {name}'s LoRA, the first is {other[0]}")
            return name, {rename(match): state[key].float().contiguous() for key, match in found.items()}
    raise FairDiffError(f"{file}: no released adapter: {next(iter(state))}")


def _text_name(match: re.Match[str]) -> str:
    return f"{match[1]}.{FACTOR[match[2]]}.weight"


def _unet_name(match: re.Match[str]) -> str:
    return f"{match[1]}.to_{match[2].replace('out', 'out.0')}.{FACTOR[match[3]]}.weight"


def _rank(parts: dict[str, dict[str, Tensor]], files: list[Path]) -> int:
    """The one rank of all factors; each layer must have both."""
    where, ranks = ", ".join(map(str, files)), set()
    for factors in parts.values():
        for name, value in factors.items():
            other = name.replace(".lora_A.", ".lora_X.").replace(".lora_B.", ".lora_A.").replace(".lora_X.", ".lora_B.")
            if other not in factors:
                raise FairDiffError(f"{where}: {name} has no {other}")
            ranks.add(value.shape[0 if ".lora_A." in name else 1])
    if len(ranks) > 1:
        raise FairDiffError(f"{where}: factors of ranks {sorted(ranks)}, allowed: one rank")
    return ranks.pop()
