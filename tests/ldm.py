"""Rename a pipeline's tensors to the names of the original code, which AUTOMATIC1111's web UI loads from one file.

The names are those of CompVis/latent-diffusion (openaimodel.py, model.py) and of OpenCLIP's text encoder.
"""

import re

import torch
from torch import Tensor, nn

ENDS = {  # of a residual block of the U-Net
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTER = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name: str, layers: int, attentions: set[str]) -> str:
    """attentions: the up blocks with attention, such as "0"."""
    module, end = name.rsplit(".", 1)
    if module in OUTER:
        return f"{OUTER[module]}.{end}"
    if found := re.match(r"mid_block\.(\w+\.\d)\.(.+)", name):
        return f"middle_block.{MIDDLE[found[1]]}.{inner(*found.groups())}"
    side, block, part, j, rest = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name).groups()
    i = int(block) * (layers + 1)
    if part == "downsamplers":
        return f"input_blocks.{i + layers + 1}.0.op.{end}"
    if part == "upsamplers":
        return f"output_blocks.{i + layers}.{2 if block in attentions else 1}.conv.{end}"
    place = f"input_blocks.{i + int(j) + 1}" if side == "down" else f"output_blocks.{i + int(j)}"
    return f"{place}.{0 if part == 'resnets' else 1}.{inner(part, rest)}"


def inner(part: str, rest: str) -> str:
    if not part.startswith("resnets"):
        return rest
    module, end = rest.rsplit(".", 1)
    return f"{ENDS[module]}.{end}"


def vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    name = name.replace(".resnets.", ".block.").replace("samplers.0.conv", "sample.conv")
    if "mid_block.attentions.0." in name:
        name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
        for theirs, ours in ATTENTION.items():
            name = name.replace(f".{theirs}.", f".{ours}.")
    return name


def of_unet(unet: nn.Module) -> dict[str, Tensor]:
    attentions = {name.split(".")[1] for name in unet.state_dict() if re.match(r"up_blocks\.\d\.attentions", name)}
    layers = unet.config.layers_per_block
    return {f"model.diffusion_model.{unet_name(k, layers, attentions)}": v for k, v in unet.state_dict().items()}


def of_vae(vae: nn.Module) -> dict[str, Tensor]:
    named = {vae_name(k, len(vae.config.block_out_channels)): v for k, v in vae.state_dict().items()}
    convolution = {k for k, v in named.items() if ".attn_1." in k and v.ndim == 2}  # the original's are 1x1
    return {f"first_stage_model.{k}": v[..., None, None] if k in convolution else v for k, v in named.items()}


def of_clip(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    return {f"{prefix}text_model.{k}": v for k, v in state.items()}


def of_open_clip(encoder: nn.Module, prefix: str, unused_layer: int | None = None) -> dict[str, Tensor]:
    """unused_layer: the last layer of Stable Diffusion 2, which the original file has and diffusers does not."""
    state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    embeddings = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight")
    found = {"token_embedding.weight": state[embeddings[0]], "positional_embedding": state[embeddings[1]]}
    found |= {f"ln_final.{end}": state[f"final_layer_norm.{end}"] for end in ("weight", "bias")}
    found["logit_scale"] = torch.tensor(4.6)
    if "text_projection.weight" in state:
        found["text_projection"] = state["text_projection.weight"].T.contiguous()
    for i in range(encoder.config.num_hidden_layers):
        found |= resblock(state, f"encoder.layers.{i}.", f"transformer.resblocks.{i}.")
    if unused_layer is not None:
        found |= resblock(state, "encoder.layers.0.", f"transformer.resblocks.{unused_layer}.")
        found["text_projection"] = torch.eye(encoder.config.hidden_size)
    return {prefix + name: value for name, value in found.items()}


def resblock(state: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    found = {}
    for end in ("weight", "bias"):
        qkv = [state[f"{theirs}self_attn.{p}_proj.{end}"] for p in "qkv"]
        found[f"{ours}attn.in_proj_{end}"] = torch.cat(qkv)
        for a, b in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2")):
            found[f"{ours}{b}.{end}"] = state[f"{theirs}{a}.{end}"]
        for a, b in (("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
            found[f"{ours}{b}.{end}"] = state[f"{theirs}{a}.{end}"]
    return found


def checkpoint(pipeline) -> dict[str, Tensor]:
    """Return the tensors of a Stable Diffusion 1.x, 2.x or XL in the original layout, with some extra ones of such files."""
    state = of_unet(pipeline.unet) | of_vae(pipeline.vae)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    state |= {"betas": betas, "alphas_cumprod": (1 - betas).cumprod(0)}
    if hasattr(pipeline, "text_encoder_2"):
        state |= of_clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        state |= of_open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    elif pipeline.text_encoder.config.hidden_act == "gelu":
        state |= of_open_clip(pipeline.text_encoder, "cond_stage_model.model.", unused_layer=23)
    else:
        state |= of_clip(pipeline.text_encoder, "cond_stage_model.transformer.")
        ids = torch.arange(pipeline.text_encoder.config.max_position_embeddings)[None]
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = ids
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
