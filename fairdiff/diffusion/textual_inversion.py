"""Textual inversions of diffusers, A1111 and ComfyUI: token embeddings [N, D] in one file."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fairdiff.diffusion.adapter_files import check_matrix
from fairdiff.errors import FairDiffError

A1111_KEY = "emb_params"  # A1111 and ComfyUI take the one tensor of a file under any name; this one is the custom


def read_embedding(path: Path) -> tuple[Tensor, str | None]:
    """The embeddings [N, D] of a textual inversion in float32, and the words they started from where the file says so.

    A file holds one tensor under the token's name (diffusers) or another, or `string_to_param` (A1111's .pt), a
    dict or a ParameterDict.
    FairDiffError, one line: unreadable without running code, several tensors, no matrix of finite real numbers.
    """
    about: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
        else:
            with torch.serialization.safe_globals([nn.ParameterDict]):  # as the method's authors saved it
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # missing, truncated, another format, or code that would have to be run
        reason = " ".join(str(error).split())[:200]
        raise FairDiffError(f"{path}: cannot read it without running code: {reason}") from error
    inside = state.get("string_to_param") if isinstance(state, dict) else None
    if isinstance(inside, nn.ParameterDict):
        inside = vars(inside).get("_parameters")
    state = inside if isinstance(inside, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FairDiffError(f"{path}: holds no tensors by name; allowed: a textual inversion")
    if len(state) != 1:
        some = ", ".join(sorted(map(str, state))[:2])
        raise FairDiffError(
            f"{path}: holds {len(state)} tensors ({some}); allowed: one, a textual inversion of one text encoder; LoRA is of "
            "adapter.type=lora"
        )
    ((name, value),) = state.items()
    value = value.detach().float() if value.is_floating_point() else value
    value = value[None] if value.ndim == 1 else value
    check_matrix(value, f"{path}: {name}")
    if not value.any(1).all():
        raise FairDiffError(f"{path}: a token of {name} holds nothing but zeros, which no training leaves")
    return value.contiguous(), about.get("initial_text")
