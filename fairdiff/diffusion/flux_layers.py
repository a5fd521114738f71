"""Convert LoRA between FLUX's layers in diffusers and the original layers, which kohya's scripts and ComfyUI use.

An original layer can hold several layers of diffusers. The names are those of Flux in black-forest-labs/flux. diffusers'
converters (loaders/single_file_utils.py and lora_conversion_utils.py) use the same ones.
"""

from collections.abc import Iterable

import torch

from fairdiff.diffusion.factors import Factors

SINGLE = "single_transformer_blocks."  # no other supported transformer has these
BLOCKS = {  # original layer ({} is the block's number) -> the layers of diffusers that hold its rows, in order
    "double_blocks.{}.img_attn.qkv": [f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"],
    "double_blocks.{}.txt_attn.qkv": [f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks.{}.img_attn.proj": ["transformer_blocks.{}.attn.to_out.0"],
    "double_blocks.{}.txt_attn.proj": ["transformer_blocks.{}.attn.to_add_out"],
    "double_blocks.{}.img_mlp.0": ["transformer_blocks.{}.ff.net.0.proj"],
    "double_blocks.{}.img_mlp.2": ["transformer_blocks.{}.ff.net.2"],
    "double_blocks.{}.txt_mlp.0": ["transformer_blocks.{}.ff_context.net.0.proj"],
    "double_blocks.{}.txt_mlp.2": ["transformer_blocks.{}.ff_context.net.2"],
    "double_blocks.{}.img_mod.lin": ["transformer_blocks.{}.norm1.linear"],
    "double_blocks.{}.txt_mod.lin": ["transformer_blocks.{}.norm1_context.linear"],
    "single_blocks.{}.linear1": [*(f"{SINGLE}{{}}.attn.to_{x}" for x in "qkv"), SINGLE + "{}.proj_mlp"],
    "single_blocks.{}.linear2": [SINGLE + "{}.proj_out"],
    "single_blocks.{}.modulation.lin": [SINGLE + "{}.norm.linear"],
}
LAST = "final_layer.adaLN_modulation.1"  # shift, then scale; `norm_out.linear` has scale, then shift
OTHERS = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
    LAST: ["norm_out.linear"],
}


def is_flux(layers: Iterable[str]) -> bool:
    return any(layer.startswith(SINGLE) for layer in layers)


def originals(shapes: dict[str, list[int]]) -> dict[str, list[str]]:
    """Return original layer -> the layers of diffusers that hold its rows, in order; {} for another transformer than FLUX's.

    shapes: the weights' shapes of the transformer's layers by name.
    """
    if not is_flux(shapes):
        return {}
    numbers = {int(layer.split(".")[1]) for layer in shapes if "transformer_blocks." in layer}
    every = {o.format(n): [layer.format(n) for layer in own] for n in sorted(numbers) for o, own in BLOCKS.items()}
    return {name: own for name, own in (every | OTHERS).items() if all(layer in shapes for layer in own)}


def original_shapes(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return the weights' shapes [out, in] of the original layers."""
    rows = {name: sum(shapes[layer][0] for layer in own) for name, own in originals(shapes).items()}
    return {name: [rows[name], shapes[own[0]][1]] for name, own in originals(shapes).items()}


def fused(part: dict[str, Factors], shapes: dict[str, list[int]]) -> dict[str, Factors]:
    """Convert the factors of diffusers' layers to equivalent factors of FLUX's original layers.

    Layers with A_i [r_i, in], B_i [out_i, r_i] and s_i = alpha_i / r_i become one layer: A stacks the A_i, B has the blocks
    B_i s_i / s on its diagonal, and alpha = s Σ r_i, where s is the s_i of largest size. Rows of layers without LoRA are 0.
    """
    found = {}
    for name, own in originals(shapes).items():
        held = {layer: part[layer] for layer in own if layer in part}
        if not held:
            continue
        first = max(held.values(), key=lambda f: abs(f.alpha / f.rank))
        scale, rank = first.alpha / first.rank, sum(f.rank for f in held.values())
        up, row, column = torch.zeros(sum(shapes[layer][0] for layer in own), rank), 0, 0
        for layer in own:
            if layer in held:
                f = held[layer]
                ratio = f.alpha / f.rank / scale if scale else 1.0
                up[row : row + len(f.up), column : column + f.rank] = f.up * ratio
                column += f.rank
            row += shapes[layer][0]
        up = torch.cat(up.chunk(2)[::-1]) if name == LAST else up
        found[name] = Factors(torch.cat([f.down for f in held.values()]), up, first.alpha * (rank / first.rank))
    return found


def apart(name: str, factors: Factors, shapes: dict[str, list[int]]) -> dict[str, Factors]:
    """Convert the factors of one original layer to equivalent factors of diffusers' layers: each gets its rows of B, and A.

    If there are several layers, each loses the rows of A whose columns in its part of B are 0, which undoes `fused`. A
    layer whose part of B is 0 is left out.
    """
    own = originals(shapes)[name]
    up = torch.cat(factors.up.chunk(2)[::-1]) if name == LAST else factors.up
    if len(own) == 1 or not up.any():
        return {layer: Factors(factors.down, rows, factors.alpha) for layer, rows in _rows(up, own, shapes)}
    found = {}
    for layer, rows in _rows(up, own, shapes):
        if (used := rows.any(0)).any():
            alpha = factors.alpha * int(used.sum()) / factors.rank
            found[layer] = Factors(factors.down[used], rows[:, used], alpha)
    return found


def _rows(up: torch.Tensor, own: list[str], shapes: dict[str, list[int]]) -> list[tuple[str, torch.Tensor]]:
    return list(zip(own, up.split([shapes[layer][0] for layer in own]), strict=True))
