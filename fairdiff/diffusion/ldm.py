"""Convert diffusers' names of layers and weights to those of Stable Diffusion's original code, which A1111 and ComfyUI use.

Source: the inverse of diffusers' converter (loaders/single_file_utils.py), and CompVis' latent-diffusion,
ldm/modules/diffusionmodules/openaimodel.py and model.py.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fairdiff.diffusion.adapter_files import TEXT_ROOT
from fairdiff.errors import FairDiffError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP = "cond_stage_model.transformer.text_model."  # Stable Diffusion 1.x
OPEN_CLIP = "cond_stage_model.model."  # Stable Diffusion 2.x
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}  # in the VAE
RESBLOCK = {  # in OpenCLIP's text encoder
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OUTER = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_UNET = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MID = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_VAE = re.compile(r"((?:en|de)coder)\.(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)")


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """Return diffusers' name -> original name for all layers or parameters of a whole U-Net.

    input_blocks and output_blocks number the residual blocks (each with the attention after it) and the downsamplers. An
    upsampler belongs to the last output block of its resolution.
    """
    names = list(names)
    each = 1 + max(int(m[4]) for n in names if (m := _UNET.match(n)) and m[1] == "down" and m[3] == "resnets")
    attended = {m[2] for n in names if (m := _UNET.match(n)) and m[1] == "up" and m[3] == "attentions"}
    return {name: _unet_name(name, each, attended) for name in names}


def _unet_name(name: str, each: int, attended: set[str]) -> str:
    for ours, theirs in ENDS.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    if found := _MID.fullmatch(name):
        place = 2 * int(found[2]) + (found[1] == "attentions")
        return f"middle_block.{place}.{_inner(found[1], found[3])}"
    found = _UNET.fullmatch(name)
    if not found:
        raise FairDiffError(f"{name} is no layer of the U-Net of Stable Diffusion 1.x, 2.x or XL")
    way, block, kind, number, inner = found.groups()
    place = int(block) * (each + 1) + int(number)
    match kind:
        case "downsamplers":
            return f"input_blocks.{1 + int(block) * (each + 1) + each}.0.{inner.replace('conv', 'op', 1)}"
        case "upsamplers":
            return f"output_blocks.{int(block) * (each + 1) + each}.{2 if block in attended else 1}.{inner}"
    side = f"input_blocks.{1 + place}" if way == "down" else f"output_blocks.{place}"
    return f"{side}.{int(kind == 'attentions')}.{_inner(kind, inner)}"


def _inner(kind: str, name: str) -> str:
    """Return the original name inside a residual block. Inside an attention block the names are the same."""
    first, dot, rest = name.partition(".")
    return RESNET[first] + dot + rest if kind == "resnets" else name


def vae_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the VAE's weights by their original names. Matrices of its attention become 1x1 convolutions."""
    ups = 1 + max(int(m[3]) for n in state if (m := _VAE.fullmatch(n)) and m[2] == "up")
    found = {}
    for name, value in state.items():
        theirs = _vae_name(name, ups)
        found[theirs] = value[..., None, None] if ".attn_1." in theirs and value.ndim == 2 else value
    return found


def _vae_name(name: str, ups: int) -> str:
    found = _VAE.fullmatch(name)
    if not found:
        return name.replace("conv_norm_out", "norm_out")
    part, way, block, kind, number, inner = found.groups()
    inner = inner.replace("conv_shortcut", "nin_shortcut")
    if kind == "attentions":
        inner = next(theirs + inner.removeprefix(ours) for ours, theirs in ATTENTION.items() if inner.startswith(ours))
        return f"{part}.mid.attn_{1 + int(number)}.{inner}"
    if way is None:
        return f"{part}.mid.block_{1 + int(number)}.{inner}"
    place = f"{part}.{way}.{int(block) if way == 'down' else ups - 1 - int(block)}"
    return f"{place}.block.{number}.{inner}" if kind == "resnets" else f"{place}.{way}sample.{inner}"


def open_clip_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a text encoder's weights in OpenCLIP's layout: one matrix for q, k and v, and a transposed projection."""
    found = {OUTER[name]: value for name, value in state.items() if name in OUTER}
    if "text_projection.weight" in state:
        found["text_projection"] = state["text_projection.weight"].T.contiguous()
    for name, value in state.items():
        if not (layer := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)):
            continue
        root, inner, end = f"transformer.resblocks.{layer[1]}", layer[2], layer[3]
        if inner in RESBLOCK:
            found[f"{root}.{RESBLOCK[inner]}.{end}"] = value
        elif inner == "self_attn.q_proj":
            three = [state[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            found[f"{root}.attn.in_proj_{end}"] = torch.cat(three)
    return found


def single_file_state(text_encoders: list[nn.Module], unet: nn.Module, vae: nn.Module) -> dict[str, Tensor]:
    """Return all weights of Stable Diffusion 1.x, 2.x or XL by the names in single-file checkpoints.

    A single text encoder with quick_gelu gets CLIP's layout, otherwise OpenCLIP's. XL's first one gets CLIP's layout, its
    second one OpenCLIP's.
    """
    texts = [
        {name.removeprefix(TEXT_ROOT): value for name, value in encoder.state_dict().items()} for encoder in text_encoders
    ]
    names = unet_names(unet.state_dict())
    found = {UNET + names[name]: value for name, value in unet.state_dict().items()}
    found |= {VAE + name: value for name, value in vae_state(vae.state_dict()).items()}
    if len(texts) == 2:
        clip, open_clip = (XL_CLIP, texts[0]), (XL_OPEN_CLIP, texts[1])
    else:
        like_openai = text_encoders[0].config.hidden_act == "quick_gelu"
        clip, open_clip = (CLIP, texts[0] if like_openai else {}), (OPEN_CLIP, {} if like_openai else texts[0])
    found |= {clip[0] + name: value for name, value in clip[1].items()}
    return found | {open_clip[0] + name: value for name, value in open_clip_state(open_clip[1]).items()}
