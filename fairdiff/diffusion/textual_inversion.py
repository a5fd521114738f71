"""Read textual inversions of diffusers, A1111, ComfyUI and kohya's scripts: files with token embeddings [N, D]."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fairdiff.diffusion.adapter_files import check_matrix
from fairdiff.errors import FairDiffError

A1111_KEY = "emb_params"  # A1111 and ComfyUI read a file's single tensor by any name; this name is the usual one
XL_KEYS = ("clip_l", "clip_g")  # tensor names for Stable Diffusion XL's two text encoders, in files of every tool
OLD_EOS = 2  # eos_token_id in configurations of CLIP from before 2023; it is not the true id


def tensor_names(state: dict[str, object]) -> list[str]:
    """Return the names of a file's tensors, one for each text encoder in order; [] if it is not a textual inversion."""
    if len(state) == 1:
        return list(state)
    return list(XL_KEYS) if state.keys() == set(XL_KEYS) else []


def pool_at_the_end(encoder: nn.Module, tokenizer: object) -> None:
    """Make CLIP pool a text at its end token, although added tokens have higher ids than the end token.

    If the configuration has eos_token_id=2, as for Stable Diffusion XL, transformers pools at the highest id. Without added
    tokens that is the first end token, so nothing changes. ComfyUI and A1111 pool at the end token too.
    """
    for module in encoder.modules():
        if vars(module).get("eos_token_id") == OLD_EOS:
            module.eos_token_id = tokenizer.eos_token_id


def read_embedding(path: Path) -> tuple[list[Tensor], str | None]:
    """Return the embeddings [N, D] of a textual inversion in float32, and its initial words, None if the file lacks them.

    There is one matrix. For Stable Diffusion XL there is one for each text encoder, by XL_KEYS, with equal N.
    A file holds one tensor by the token's name (diffusers) or any other, or `string_to_param` (A1111's .pt), a
    dict or a ParameterDict.
    Raises FairDiffError in one line for a file that cannot be read without running code, for several other tensors, and for
    a tensor that is not a matrix of finite real numbers.
    """
    about: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
        else:
            with torch.serialization.safe_globals([nn.ParameterDict]):  # used by the authors of textual inversion
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # missing, truncated, another format, or code that would have to be run
        reason = " ".join(str(error).split())[:200]
        raise FairDiffError(f"{path}: cannot read it without running code: {reason}") from error
    inside = state.get("string_to_param") if isinstance(state, dict) else None
    if isinstance(inside, nn.ParameterDict):
        inside = vars(inside).get("_parameters")
    state = inside if isinstance(inside, dict) else state
    return embeddings_of(state, str(path)), about.get("initial_text")


def embeddings_of(state: object, where: str) -> list[Tensor]:
    """Return the embeddings of `read_embedding` from a file's tensors by name; `where` begins the errors."""
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FairDiffError(f"{where}: holds no tensors by name; allowed: a textual inversion")
    if not (names := tensor_names(state)):
        some = ", ".join(sorted(map(str, state))[:2])
        raise FairDiffError(
            f"{where}: holds {len(state)} tensors ({some}); allowed: one, a textual inversion of one text encoder, or clip_l "
            "and clip_g, one of Stable Diffusion XL; LoRA is of adapter.type=lora"
        )
    rows = [_matrix(state[name], where, name) for name in names]
    if len({len(own) for own in rows}) > 1:
        counts = " and ".join(f"{len(own)} tokens of {name}" for own, name in zip(rows, names, strict=True))
        raise FairDiffError(f"{where}: holds {counts}, allowed: as many of each")
    return rows


def _matrix(value: Tensor, where: str, name: str) -> Tensor:
    value = value.detach().float() if value.is_floating_point() else value
    value = value[None] if value.ndim == 1 else value
    check_matrix(value, f"{where}: {name}")
    if not value.any(1).all():
        raise FairDiffError(f"{where}: a token of {name} holds nothing but zeros, which no training leaves")
    return value.contiguous()
