"""LoRA of FLUX under kohya's names, on the layers of its authors' code: against diffusers' reader and W + (alpha/r) B A."""

import re

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import swap_scale_shift
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_exports import in_peft
from test_flow import PROMPT, generate, lora, noise_of, plain
from test_full_size import TEXT
from tiny_flow import flux
from transformers import CLIPTextConfig, CLIPTextModel

from fairdiff.diffusion.adapter_files import LORA_FILE
from fairdiff.diffusion.export import KOHYA_FILE, export
from fairdiff.diffusion.factors import Factors
from fairdiff.diffusion.flux_layers import apart, fused, original_shapes, originals
from fairdiff.diffusion.imports import import_lora
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.lora_files import kohya_names, read_lora, shapes_of
from fairdiff.errors import FairDiffError

BY_DIFFUSERS_WRONGLY = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")  # drops their module
LINEAR1 = "single_blocks.0.linear1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return flux(tmp_path_factory.mktemp("flux"))


def shapes_in(folder):
    model = load_model(folder)
    return shapes_of({"text_encoder": model.text_encoder, "transformer": model.unet})


def random_factors(shapes, names, same_scale, generator):
    """LoRA on these layers, each of its own rank; (alpha / r) is 3/2 everywhere or each its own."""
    found = {}
    for i, name in enumerate(names):
        rank, (out, into) = 1 + i % 3, shapes[name]
        down, up = (0.3 * torch.randn(*size, generator=generator) for size in ((rank, into), (out, rank)))
        found[name] = Factors(down, up, 1.5 * rank if same_scale else 1.0 + i % 4)
    return found


def tensors(name, f):
    return {f"{name}.lora_down.weight": f.down, f"{name}.lora_up.weight": f.up, f"{name}.alpha": torch.tensor(f.alpha)}


def write_kohya(path, layers, shapes):
    """`layers` of the transformer by original name."""
    names, state = kohya_names(shapes), {}
    for module, part in layers.items():
        for layer, f in part.items():
            state |= tensors(names[module, layer], f)
    save_file(state, path)


@pytest.mark.parametrize("same_scale", [True, False])
def test_at_full_width_diffusers_reads_of_every_layer_what_it_adds(tmp_path, same_scale):
    """Every linear layer of CLIP and of two blocks of each kind of FLUX.1-dev, the second with gaps."""
    with torch.device("meta"):
        net = FluxTransformer2DModel(guidance_embeds=True, num_layers=2, num_single_layers=2)
        modules = {"text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)), "transformer": net}
    shapes, generator = shapes_of(modules), torch.Generator().manual_seed(0)
    assert {layer for own in originals(shapes["transformer"]).values() for layer in own} == shapes["transformer"].keys()
    gaps = re.compile(r"blocks\.1\.(attn\.(to_k|add_k_proj|add_v_proj)|proj_mlp)$")
    part = [name for name in shapes["transformer"] if not gaps.search(name)]
    layers = {
        "text_encoder": random_factors(shapes["text_encoder"], shapes["text_encoder"], same_scale, generator),
        "transformer": random_factors(shapes["transformer"], part, same_scale, generator),
    }
    as_one = fused(layers["transformer"], shapes["transformer"])
    write_kohya(tmp_path / "kohya.safetensors", layers | {"transformer": as_one}, shapes)
    state = load_file(tmp_path / "kohya.safetensors")
    ranks = [f.rank for layer, f in layers["transformer"].items() if layer in originals(shapes["transformer"])[LINEAR1]]
    assert state["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (3 * 3072 + 4 * 3072, sum(ranks))
    assert len(ranks) == 4 and "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha" in state

    state = {k: v for k, v in state.items() if not any(word in k for word in BY_DIFFUSERS_WRONGLY)}
    found = FluxPipeline.lora_state_dict(state)
    found = in_peft(found) | {k: v for k, v in found.items() if k.startswith("transformer.")}
    again = read_lora(tmp_path / "kohya.safetensors", shapes)
    assert {m: set(p) for m, p in again.items()} == {m: set(p) for m, p in layers.items()}
    for module, layer, f in ((m, n, f) for m, p in layers.items() for n, f in p.items()):
        x = torch.randn(f.down.shape[1], generator=generator)
        wanted, back = f.alpha / f.rank * (f.up @ (f.down @ x)), again[module][layer]
        close = {"rtol": 1e-4, "atol": 1e-5 * wanted.abs().max()}
        assert torch.equal(back.down, f.down) and (back.alpha / back.rank == 1.5 or not same_scale)
        assert torch.allclose(back.alpha / back.rank * (back.up @ (back.down @ x)), wanted, **close), layer
        if "layers." in layer or "blocks." in layer:
            down, up = (found.pop(f"{module}.{layer}.lora_{side}.weight") for side in "AB")
            assert torch.allclose(up @ (down @ x), wanted, **close), layer
    assert not any(value.any() for key, value in found.items() if "lora_B" in key)  # rows of layers without LoRA


def test_what_is_exported_paints_in_plain_diffusers_and_comes_back_to_the_bit(folder, tmp_path):
    """On double blocks and CLIP through the pipeline, whose reader takes linear1 at full width only; on all as an import."""
    model = load_model(folder)
    noise = noise_of(model)
    bare = model.generator(3.0, 3)(PROMPT, noise)
    adapter = lora(model, "lora_both")
    adapter.save(tmp_path)
    ours = model.generator(3.0, 3)(PROMPT, noise)
    export(tmp_path / LORA_FILE, "kohya", tmp_path / "kohya", folder)
    other = load_model(folder)
    import_lora(other, [tmp_path / "kohya" / KOHYA_FILE], [1.0])
    before, after = (read_lora(file, shapes_in(folder)) for file in (tmp_path / LORA_FILE, tmp_path / "kohya" / KOHYA_FILE))
    assert {m: set(p) for m, p in before.items()} == {m: set(p) for m, p in after.items()}
    for f, back in ((f, after[m][n]) for m, p in before.items() for n, f in p.items()):
        assert torch.equal(f.down, back.down) and torch.equal(f.up, back.up) and f.alpha == back.alpha == 8
    assert torch.allclose(other.generator(3.0, 3)(PROMPT, noise), ours, atol=1e-6)
    assert (ours - bare).abs().max() > 1e-2
    with safe_open(tmp_path / "kohya" / KOHYA_FILE, "pt") as file:
        said = file.metadata()
    assert (said["ss_network_module"], said["ss_base_model_version"]) == ("networks.lora_flux", "flux1")

    state = load_file(tmp_path / "kohya" / KOHYA_FILE)
    save_file({k: v for k, v in state.items() if "single_blocks" not in k}, tmp_path / "double.safetensors")
    pipeline, other = plain("flux", folder), load_model(folder)
    pipeline.load_lora_weights(tmp_path / "double.safetensors")
    import_lora(other, [tmp_path / "double.safetensors"], [1.0])
    wanted = other.generator(3.0, 3)(PROMPT, noise)
    assert torch.allclose(generate(pipeline, noise, 3.0), wanted, atol=1e-4) and not torch.allclose(wanted, ours, atol=1e-3)


@pytest.mark.parametrize("start", ["lora_unet_", "diffusion_model."])
def test_a_file_of_any_rank_is_what_it_adds_to_the_authors_own_weights(folder, tmp_path, start):
    """Oracle: W + (alpha/r) B A on each layer of theirs, whose rows are then those of the pipeline's layers."""
    shapes, generator = shapes_in(folder), torch.Generator().manual_seed(3)
    wide = original_shapes(shapes["transformer"])
    layers = random_factors(wide, wide, False, generator)
    state = {}
    for name, f in layers.items():
        name = start + (name.replace(".", "_") if start == "lora_unet_" else name)
        state |= tensors(name, f)
    save_file(state, tmp_path / "any.safetensors")
    model, pipeline = load_model(folder), plain("flux", folder)
    import_lora(model, [tmp_path / "any.safetensors"], [0.5])
    inner = dict(pipeline.transformer.named_modules())
    for name, own in originals(shapes["transformer"]).items():
        f = layers[name]
        added = f.alpha / f.rank * f.up @ f.down
        added = swap_scale_shift(added) if "adaLN" in name else added
        start_row = 0
        for layer in own:
            weight = inner[layer].weight.data
            weight.add_(added[start_row : start_row + len(weight)], alpha=0.5)
            start_row += len(weight)
        assert start_row == len(added)
    noise = noise_of(model)
    assert torch.allclose(model.generator(3.0, 3)(PROMPT, noise), generate(pipeline, noise, 3.0), atol=1e-4)
    shared = read_lora(tmp_path / "any.safetensors", shapes)["transformer"]
    q, k = (shared[f"transformer_blocks.0.attn.to_{x}"] for x in "qk")
    assert torch.equal(q.down, k.down) and not torch.equal(q.up, k.up)


NAME = "lora_unet_double_blocks_0_img_attn_qkv"
WRONG = {
    "a block more": ({"lora_unet_double_blocks_7_img_attn_proj.lora_up.weight": torch.ones(16, 2)},
                     "1 of 4 tensors fit no layer, the first is lora_unet_double_blocks_7_img_attn_proj.lora_up.weight"),
    "T5": ({"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight": torch.ones(16, 2)},
           "1 of 4 tensors fit no layer, the first is lora_te3_encoder_block_0"),
    "narrow": ({f"{NAME}.lora_up.weight": torch.ones(16, 2)},
               r"transformer.double_blocks.0.img_attn.qkv: found factors \[2, 16\] and \[16, 2\], its weight is \[48, 16\]"),
    "both": ({"transformer.transformer_blocks.0.attn.to_k.lora_A.weight": torch.ones(2, 16),
              "transformer.transformer_blocks.0.attn.to_k.lora_B.weight": torch.ones(16, 2)},
             "holds transformer.transformer_blocks.0.attn.to_k twice"),
    "two names": ({"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, 16)},
                  "is of transformer.double_blocks.0.img_attn.qkv, whose down it holds under another name too"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_fits_in_part_is_one_line(folder, tmp_path, wrong):
    more, says = WRONG[wrong]
    good = {"lora_down.weight": torch.ones(2, 16), "lora_up.weight": torch.ones(48, 2), "alpha": torch.tensor(1.0)}
    save_file({f"{NAME}.{end}": value for end, value in good.items()} | more, tmp_path / "x.safetensors")
    with pytest.raises(FairDiffError, match=f"^{re.escape(str(tmp_path))}.*{says}") as caught:
        read_lora(tmp_path / "x.safetensors", shapes_in(folder))
    assert "\n" not in str(caught.value)


def test_factors_of_nothing_but_zeros_are_kept(folder):
    """A new LoRA has B = 0, and keeps A of each layer, so that it can be trained."""
    shapes = shapes_in(folder)["transformer"]
    name = "double_blocks.0.img_attn.qkv"
    found = apart(name, Factors(torch.ones(2, 16), torch.zeros(48, 2), 4.0), shapes)
    assert list(found) == originals(shapes)[name] and all(f.rank == 2 and f.alpha == 4 for f in found.values())
