"""FLUX's original layer names, which kohya's scripts and ComfyUI use for LoRA; several layers of diffusers are one there.

The names are those of Flux in black-forest-labs/flux, of which diffusers' converters (loaders/single_file_utils.py and
lora_conversion_utils.py) know the same.
"""

from collections.abc import Iterable

import torch

from fairdiff.diffusion.factors import Factors

SINGLE = "single_transformer_blocks."  # no other transformer here has these
BLOCKS = {  # original layer, of which {} is the block's number -> the layers here that hold its rows, one after the other
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
    """Every original layer of a FLUX transformer -> the layers here that hold its rows, in order; {} of another transformer.

    shapes: its layers' names and weights' shapes.
    """
    if not is_flux(shapes):
        return {}
    numbers = {int(layer.split(".")[1]) for layer in shapes if "transformer_blocks." in layer}
    every = {o.format(n): [layer.format(n) for layer in own] for n in sorted(numbers) for o, own in BLOCKS.items()}
    return {name: own for name, own in (every | OTHERS).items() if all(layer in shapes for layer in own)}


def original_shapes(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """The weights' shapes [out, in] of the original layers."""
    rows = {name: sum(shapes[layer][0] for layer in own) for name, own in originals(shapes).items()}
    return {name: [rows[name], shapes[own[0]][1]] for name, own in originals(shapes).items()}


def fused(part: dict[str, Factors], shapes: dict[str, list[int]]) -> dict[str, Factors]:
    """The factors of FLUX's layers as those of the original layers, which add the same.

    Of layers with A_i [r_i, in], B_i [out_i, r_i] and s_i = alpha_i / r_i that are one layer there: A is A_1 over A_2 and so
    on, B has blocks B_i s_i / s on its diagonal and alpha = s Σ r_i, with the s_i of largest size as s. Rows of layers
    without LoRA are zeros.
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
    """The factors of one original layer as those of the layers here, which add the same: its rows of B, and A for all.

    Of several layers each is without the part of A that its rows have zeros for, so that `fused` is undone; one with zeros
    only is left out.
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
