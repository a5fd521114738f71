"""Textual inversions of diffusers, A1111, ComfyUI and kohya's scripts: token embeddings [N, D] in one file."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fairdiff.diffusion.adapter_files import check_matrix
from fairdiff.errors import FairDiffError

A1111_KEY = "emb_params"  # A1111 and ComfyUI take the one tensor of a file under any name; this one is the custom
XL_KEYS = ("clip_l", "clip_g")  # of Stable Diffusion XL's text encoders in order, in files of every tool
OLD_EOS = 2  # what configurations of CLIP from before 2023 call the end of a text, whatever it is


def tensor_names(state: dict[str, object]) -> list[str]:
    """The names of a file's tensors, one for each text encoder in order; [] of a file that is no textual inversion."""
    if len(state) == 1:
        return list(state)
    return list(XL_KEYS) if state.keys() == set(XL_KEYS) else []


def pool_at_the_end(encoder: nn.Module, tokenizer: object) -> None:
    """Let CLIP pool a text where it ends although tokens were added, whose ids are above that of the end.

    With a configuration that says eos_token_id=2, as those of Stable Diffusion XL do, transformers pools at the highest id.
    Without added tokens that is the first end, so that nothing changes. ComfyUI and A1111 pool at the end.
    """
    for module in encoder.modules():
        if vars(module).get("eos_token_id") == OLD_EOS:
            module.eos_token_id = tokenizer.eos_token_id


def read_embedding(path: Path) -> tuple[list[Tensor], str | None]:
    """The embeddings [N, D] of a textual inversion in float32, and the words they started from where the file says so.

    One matrix, or of Stable Diffusion XL one for each text encoder, as long as each other, under XL_KEYS.
    A file holds one tensor under the token's name (diffusers) or another, or `string_to_param` (A1111's .pt), a
    dict or a ParameterDict.
    FairDiffError, one line: unreadable without running code, several other tensors, no matrix of finite real numbers.
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
    return embeddings_of(state, str(path)), about.get("initial_text")


def embeddings_of(state: object, where: str) -> list[Tensor]:
    """What `read_embedding` gives of a file's tensors by name; `where` begins its errors."""
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
