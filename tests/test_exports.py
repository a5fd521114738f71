"""Exports: every tool that reads one gets W + scale (alpha/r) B A, held against the tools' own converters."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapters import PROMPT, make, picture
from test_full_size import TEXT, UNET, VAE
from test_sdxl import lora as xl_lora
from test_sdxl import xl_folder  # noqa: F401 (a fixture)
from tiny import composed, with_json
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fairdiff.diffusion import ldm
from fairdiff.diffusion.adapter_files import LORA_FILE, TEXT_ROOT, layers_of
from fairdiff.diffusion.export import A1111_FILE, KOHYA_FILE, MERGED_FILE, export
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.lora_files import Factors, kohya_names, read_lora, shapes_of
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.errors import FairDiffError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from export import main  # noqa: E402

UNET_2 = UNET | {
    "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
}  # fmt: skip
UNET_XL = {  # stabilityai/stable-diffusion-xl-base-1.0
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
TEXT_2 = TEXT | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "hidden_act": "gelu",
}  # fmt: skip
TEXT_XL = TEXT_2 | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def full_shape(family):
    """Return the text encoders and the U-Net of a released model, on the meta device."""
    with torch.device("meta"):
        match family:
            case "sd15":
                return {"text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)), "unet": UNet2DConditionModel(**UNET)}
            case "sd21":
                return {"text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT_2)), "unet": UNet2DConditionModel(**UNET_2)}
        two = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_XL | {"projection_dim": 1280}))
        one = CLIPTextModel(CLIPTextConfig(**TEXT))
        return {"text_encoder": one, "text_encoder_2": two, "unet": UNet2DConditionModel(**UNET_XL)}


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_original_names_of_the_released_unets_are_those_that_diffusers_converts_back(family):
    unet = full_shape(family)["unet"]
    state = unet.state_dict()
    names = ldm.unet_names(state)
    back = convert_ldm_unet_checkpoint({ldm.UNET + names[name]: value for name, value in state.items()}, unet.config)
    assert back.keys() == state.keys() and all(back[name] is value for name, value in state.items())


def test_original_names_of_the_vae_and_of_openclip_are_those_that_diffusers_converts_back():
    with torch.device("meta"):
        vae, two = AutoencoderKL(**VAE), full_shape("sdxl")["text_encoder_2"]
    state = vae.state_dict()
    found = {ldm.VAE + name: value for name, value in ldm.vae_state(state).items()}
    assert found[f"{ldm.VAE}encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    back = convert_ldm_vae_checkpoint(found, vae.config)
    assert {n: v.shape for n, v in back.items()} == {n: v.shape for n, v in state.items()}

    state = {name.removeprefix(TEXT_ROOT): value for name, value in two.state_dict().items()}
    state |= {name: torch.randn(value.shape) for name, value in state.items() if "layers.3." in name or "projection" in name}
    found = {ldm.XL_OPEN_CLIP + name: value for name, value in ldm.open_clip_state(state).items()}
    back = convert_open_clip_checkpoint(two, found, prefix=ldm.XL_OPEN_CLIP)
    back = {name.removeprefix(TEXT_ROOT): value for name, value in back.items() if "position_ids" not in name}
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert back[name].shape == value.shape
        assert value.is_meta or torch.equal(back[name], value), name


def random_layers(shapes, rank=4, alpha=6.0):
    """Return random LoRA factors at full shape for all layers that are trained here."""
    generator = torch.Generator().manual_seed(0)
    return {
        module: {
            name: Factors(
                torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator), alpha
            )
            for name, shape in part.items()
            if name.endswith(tuple(layers_of(module)))
        }
        for module, part in shapes.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_kohya_names_of_the_released_models_are_those_that_diffusers_reads_back(family, tmp_path):
    """At full shape, diffusers reads the factors and alpha of every layer of text encoders and U-Net, and nothing else."""
    modules = full_shape(family)
    shapes = shapes_of(modules)
    layers, names = random_layers(shapes), kohya_names(shapes)
    state = {}
    for module, part in layers.items():
        for layer, factors in part.items():
            state[f"{names[module, layer]}.lora_down.weight"] = factors.down
            state[f"{names[module, layer]}.lora_up.weight"] = factors.up
            state[f"{names[module, layer]}.alpha"] = torch.tensor(factors.alpha)
    roots = {"sd15": {"lora_te", "lora_unet"}, "sd21": {"lora_te", "lora_unet"}}
    begins = {"_".join(name.split("_")[:2]) for name in names.values()}
    assert begins == roots.get(family, {"lora_te1", "lora_te2", "lora_unet"})
    assert ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha" in state) == (family == "sdxl")
    save_file(state, tmp_path / "kohya.safetensors")

    pipeline = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    found, alphas = pipeline.lora_state_dict(state, unet_config=modules["unet"].config)[:2]
    assert len(alphas) == sum(map(len, layers.values())) and set(alphas.values()) == {6.0}
    found = in_peft(found)
    wanted = {f"{m}.{n}.lora_A.weight": f.down for m, p in layers.items() for n, f in p.items()}
    wanted |= {f"{m}.{n}.lora_B.weight": f.up for m, p in layers.items() for n, f in p.items()}
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())

    again = read_lora(tmp_path / "kohya.safetensors", shapes)
    assert again.keys() == layers.keys()
    for module, part in layers.items():
        assert again[module].keys() == part.keys()
        assert all(torch.equal(again[module][n].delta(), f.delta()) for n, f in part.items())


def in_peft(state):
    """Rename a state dict of diffusers' loader to peft's names, as its loaders of the components do."""
    found = {}
    for module in ("text_encoder", "text_encoder_2", "unet"):
        part = {k.removeprefix(f"{module}."): v for k, v in state.items() if k.startswith(f"{module}.")}
        if module == "unet":
            part = convert_unet_state_dict_to_peft(part)
        elif part:
            part = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part))
        found |= {f"{module}.{key.removeprefix(TEXT_ROOT)}": value for key, value in part.items()}
    return found


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(768, 3072), nn.Conv2d(320, 640, 3, padding=1), nn.Conv2d(1280, 1280, 1), nn.Linear(2048, 640, bias=False)],
    ids=str,
)
def test_what_factors_add_is_what_peft_adds_to_a_layer_of_full_shape(layer):
    model = nn.ModuleDict({"layer": layer})
    before = layer.weight.detach().clone()
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=12, target_modules=["layer"], init_lora_weights=False), model)
    wrapped = model["layer"]
    factors = Factors(wrapped.lora_A["default"].weight.detach(), wrapped.lora_B["default"].weight.detach(), 12)
    wrapped.merge()
    added = layer.weight.detach() - before
    assert factors.delta().shape == before.shape and added.norm() > 0
    assert (added - factors.delta()).norm() / added.norm() < 1e-5


@pytest.fixture
def saved(tiny_folder, tmp_path):
    """Save a LoRA of rank 4 and alpha 8 on all layers with adapter.json; return its folder, the model and the adapter."""
    model = load_model(tiny_folder)
    adapter = make(model, "lora_both")
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapter.save(folder)
    (folder / "adapter.json").write_text(json.dumps({"type": "lora", "guidance": 3.0, "load_with": "load_lora_weights"}))
    return folder, model, adapter


def plain(path, kind=StableDiffusionPipeline, **more):
    pipeline = kind.from_pretrained(path, **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_picture(pipeline, prompt=PROMPT):
    noise = initial_noise(PROMPT, 0, range(2), (4, 4, 4))
    options = {"guidance_scale": 3.0, "num_inference_steps": 3, "latents": noise, "output_type": "pt"}
    return pipeline([prompt] * 2, **options).images


def test_every_format_of_a_lora_paints_in_plain_diffusers_what_it_paints_here(saved, tiny_folder, tmp_path):
    """alpha is twice the rank, so a format that loses it would add half."""
    folder, model, adapter = saved
    ours = picture(model, adapter)
    adapter.rescale(0.5)
    half = picture(model, adapter)
    assert (ours - half).abs().max() > 1e-2
    for scale, wanted in ((1.0, ours), (0.5, half)):
        for kind, file in (("kohya", KOHYA_FILE), ("diffusers", LORA_FILE)):
            export(folder, kind, tmp_path / kind, tiny_folder, scale)
            pipeline = plain(tiny_folder)
            pipeline.load_lora_weights(tmp_path / kind / file)
            assert torch.allclose(plain_picture(pipeline), wanted, atol=1e-4), (kind, scale)
    about = json.loads((tmp_path / "kohya" / "adapter.json").read_text())
    assert about["guidance"] == 3.0 and about["export"] == {"format": "kohya", "scale": 0.5, "dtype": "float32"}
    with safe_open(tmp_path / "kohya" / KOHYA_FILE, "pt") as file:
        said = file.metadata()
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_base_model_version"]) == ("4", "8.0", "sd_v1")
    export(folder, "merged", tmp_path / "merged", tiny_folder, 0.5)
    assert torch.allclose(plain_picture(plain(tmp_path / "merged")), half, atol=1e-4)
    export(folder, "merged_file", tmp_path / "one", tiny_folder)
    pipeline = from_one_file(tmp_path / "one" / MERGED_FILE, tiny_folder)
    assert torch.allclose(plain_picture(pipeline), ours, atol=1e-4)


def from_one_file(file, folder, kind=StableDiffusionPipeline):
    """Load a single file in plain diffusers, with the scheduler and the tokenizers, which the file lacks."""
    more = {"safety_checker": None} if kind is StableDiffusionPipeline else {"add_watermarker": False}
    pipeline = kind.from_single_file(file, config=str(folder), local_files_only=True, **more)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = plain(folder, kind).scheduler
    return pipeline


def test_a_model_with_openclips_text_encoder_is_one_file_in_its_layout(tiny_folder, tmp_path):
    """Stable Diffusion 2.x has a plain GELU, and queries, keys and values in one matrix."""
    folder = with_json(tiny_folder, tmp_path / "model", "text_encoder/config.json", hidden_act="gelu")
    model = load_model(folder)
    adapter = make(model, "lora_both")
    adapter.save(tmp_path)
    export(tmp_path / LORA_FILE, "merged_file", tmp_path / "one", folder)
    state = load_file(tmp_path / "one" / MERGED_FILE)
    assert "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight" in state
    assert not any(key.startswith("cond_stage_model.transformer") for key in state)
    pipeline = from_one_file(tmp_path / "one" / MERGED_FILE, folder)
    assert torch.allclose(plain_picture(pipeline), picture(model, adapter), atol=1e-4)


def test_every_format_of_an_xl_lora_paints_in_plain_diffusers_what_it_paints_here(xl_folder, tmp_path):  # noqa: F811
    model = load_model(xl_folder)
    adapter = xl_lora(model, "lora_both")
    adapter.save(tmp_path)
    ours = picture(model, adapter)
    export(tmp_path / LORA_FILE, "kohya", tmp_path / "kohya", xl_folder)
    export(tmp_path / LORA_FILE, "merged_file", tmp_path / "one", xl_folder)
    names = load_file(tmp_path / "kohya" / KOHYA_FILE)
    assert {"_".join(name.split("_")[:2]) for name in names} == {"lora_te1", "lora_te2", "lora_unet"}
    with safe_open(tmp_path / "kohya" / KOHYA_FILE, "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"
    pipeline = plain(xl_folder, StableDiffusionXLPipeline, add_watermarker=False)
    pipeline.load_lora_weights(tmp_path / "kohya" / KOHYA_FILE)
    assert torch.allclose(plain_picture(pipeline), ours, atol=1e-4)
    pipeline = from_one_file(tmp_path / "one" / MERGED_FILE, xl_folder, StableDiffusionXLPipeline)
    assert torch.allclose(plain_picture(pipeline), ours, atol=1e-4)


def test_soft_tokens_for_a1111_are_one_matrix_that_plain_diffusers_loads_too(tiny_folder, tmp_path):
    model = load_model(tiny_folder)
    adapter = make(model, "soft_tokens")
    adapter.save(tmp_path)
    ours = picture(model, adapter)
    export(tmp_path, "a1111", tmp_path / "a1111", tiny_folder)
    (rows,) = (state := load_file(tmp_path / "a1111" / A1111_FILE)).values()
    assert set(state) == {"emb_params"} and torch.equal(rows, adapter.embeddings[0].soft)
    assert json.loads((tmp_path / "a1111" / "adapter.json").read_text())["prompt_prefix"] == "fairdiff "
    pipeline = plain(tiny_folder)
    pipeline.load_textual_inversion(tmp_path / "a1111" / A1111_FILE, token="<it>")
    assert torch.allclose(plain_picture(pipeline, f"<it> {PROMPT}"), ours, atol=1e-4)
    export(tmp_path, "diffusers", tmp_path / "half", tiny_folder, 0.5, "float16")
    (half,) = load_file(tmp_path / "half" / "soft_tokens.safetensors").values()
    adapter.rescale(0.5)
    assert torch.equal(half, adapter.embeddings[0].soft.half())


def test_half_precision_halves_the_factors_and_keeps_alpha(saved, tiny_folder, tmp_path):
    folder, _, _ = saved
    for dtype in ("float32", "float16"):
        export(folder, "kohya", tmp_path / dtype, tiny_folder, 1.0, dtype)
    full, half = (load_file(tmp_path / dtype / KOHYA_FILE) for dtype in ("float32", "float16"))
    assert full.keys() == half.keys()
    for name, value in full.items():
        wanted = value if name.endswith(".alpha") else value.half()
        assert half[name].dtype == wanted.dtype and torch.equal(half[name], wanted)
    with pytest.raises(FairDiffError, match="beyond the range of torch.float16; allowed: --dtype float32"):
        export(folder, "kohya", tmp_path / "large", tiny_folder, 1e9, "float16")
    assert not (tmp_path / "large").exists()


def test_the_command_exports_a_run_into_its_folder(saved, tiny_folder, tmp_path, capsys):
    """Again and again; other folders that exist are left alone."""
    for _ in range(2):
        main([str(tmp_path), "--as", "kohya", "--model", str(tiny_folder)])
    assert f"kohya: {tmp_path / 'exports' / 'kohya'}" in capsys.readouterr().out
    layers = read_lora(tmp_path / "exports" / "kohya" / KOHYA_FILE, shapes_of(full_tiny(tiny_folder)))
    assert {factors.alpha for part in layers.values() for factors in part.values()} == {8.0}
    model = ["--model", str(tiny_folder)]
    for argv, says in [
        ([str(tmp_path), "--as", "kohya"], r"--model: no value given, and .*adapter does not say"),
        ([str(tmp_path), "--as", "a1111", *model], "a1111 is no format of LoRA, allowed: diffusers, kohya, merged"),
        ([str(tmp_path), "--as", "kohya", "--to", str(tmp_path), *model], "--to: .*exists already"),
        ([str(tmp_path / "adapter" / LORA_FILE), "--as", "kohya", *model], "--to: no value given"),
        ([str(tmp_path), "x", "--as", "kohya", *model], "found 2 adapters, allowed: one"),
        ([str(tmp_path / "no"), "--as", "kohya"], "no: there is no such file or folder"),
        ([str(tmp_path / "exports"), "--as", "kohya", *model], "exports: holds no adapter"),
        ([str(tmp_path), "--as", "kohya", "--scale", "nan", *model], "--scale: found nan"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(argv)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1
        assert re.search(says, said), said


def full_tiny(folder):
    model = load_model(folder)
    return {"text_encoder": model.text_encoder, "unet": model.unet}


@pytest.mark.parametrize(
    "overrides,says",
    [
        (["adapter=soft_tokens", "export=[kohya]"], "export: found kohya, allowed: a1111"),
        (["adapter=lora_text", "export=[a1111]"], "export: found a1111, allowed: kohya, merged, merged_file"),
    ],
)
def test_formats_that_a_kind_of_adapter_has_not_are_refused_before_training(overrides, says):
    with pytest.raises(FairDiffError, match=f"^{says}$"):
        composed(*overrides)
