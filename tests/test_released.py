"""The released adapters: converted, they generate what their factors say, here and in plain diffusers."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapters import PROMPT, make, picture
from test_full_size import TEXT, UNET
from tiny import composed
from transformers import CLIPTextConfig, CLIPTextModel

from fairdiff import build
from fairdiff.diffusion.adapters import LORA_FILE, TEXT_LAYERS, TEXT_ROOT, UNET_LAYERS
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.released import convert, read_released
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.errors import FairDiffError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from convert import main  # noqa: E402

FILES = {"text_encoder": "text_encoder_lora_EMA.pth", "unet": "unet_lora_EMA.pth"}


def released_name(part: str, key: str) -> str:
    """How the authors' code names a factor that peft calls `key`."""
    layer, factor, _ = key.rsplit(".", 2)
    factor = {"lora_A": "down", "lora_B": "up"}[factor]
    if part == "text_encoder":
        return f"{TEXT_ROOT}{layer.removeprefix(TEXT_ROOT)}.lora_linear_layer.{factor}.weight"
    attention, projection = layer.removesuffix(".0").rsplit(".", 1)
    return f"{attention}.processor.{projection}_lora.{factor}.weight"


def release(adapter, folder):
    """The files of an adapter of scale 1 as the authors' code would have written them."""
    files = []
    for part, module in adapter.modules.items():
        state = {released_name(part, k): v.clone() for k, v in get_peft_model_state_dict(module).items()}
        torch.save(state, folder / FILES[part])
        files.append(folder / FILES[part])
    return files


@pytest.mark.parametrize("kind", ["lora_text", "lora_unet", "lora_both"])
def test_released_lora_paints_the_same_here_and_in_plain_diffusers(tiny_folder, tmp_path, kind):
    model = load_model(tiny_folder)
    made = make(model, kind)
    files = release(made, tmp_path)
    made.rescale(0.5)  # alpha / rank is 2 in `make`; what the files hold has scale 1
    wanted = picture(model, made)
    folder = tmp_path / "released"
    main([*map(str, files), str(folder)])
    config = composed(f"adapter={kind}", f"adapter.path={folder}", "adapter.rank=4")
    other = load_model(tiny_folder)
    assert torch.allclose(picture(other, build.build_adapter(config, other)), wanted, atol=1e-6)
    about = json.loads((folder / "adapter.json").read_text())
    assert about["options"].endswith("adapter.rank=4") and about["padding"] == "longest"

    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder)
    noise = initial_noise(PROMPT, 0, range(2), model.latent_shape)
    theirs = pipeline(
        [PROMPT] * 2, guidance_scale=3.0, num_inference_steps=3, latents=noise, output_type="pt"
    ).images  # fmt: skip
    assert torch.allclose(wanted, theirs, atol=1e-4)


def test_released_soft_tokens_lose_their_dummy_row(tiny_folder, tmp_path):
    model = load_model(tiny_folder)
    made = make(model, "soft_tokens")
    rows = torch.cat([torch.full((1, 16), 9.0), made.embedding.soft.detach()])
    state = {"token_embedding.weight": rows, "position_embedding.weight": torch.zeros(40, 16)}
    torch.save(state | {"position_ids": torch.arange(40)[None]}, tmp_path / "prefix_embedding_EMA.pth")
    about = convert([tmp_path / "prefix_embedding_EMA.pth"], tmp_path / "released")
    assert about["options"] == "adapter.type=soft_tokens adapter.tokens=3" and about["prompt_prefix"] == "<fairdiff> "
    other = load_model(tiny_folder)
    config = composed(
        "adapter=soft_tokens", "adapter.tokens=3", f"adapter.path={tmp_path / 'released'}", "adapter.initial_text=chef"
    )
    assert torch.equal(picture(other, build.build_adapter(config, other)), picture(model, made))


def test_the_released_names_are_the_layers_of_stable_diffusion(tmp_path):
    """144 and 256 tensors, each a factor of a layer that LoRA is on here, at SD 1.5's size."""
    with torch.device("meta"):
        modules = {"text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)), "unet": UNet2DConditionModel(**UNET)}
    blocks = [f"text_model.encoder.layers.{i}" for i in range(12)]
    text = [f"{b}.{x}" for b in blocks for x in (*(f"self_attn.{p}" for p in TEXT_LAYERS[:4]), "mlp.fc1", "mlp.fc2")]
    places = [f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)]
    places += [f"up_blocks.{i}.attentions.{j}" for i in (1, 2, 3) for j in range(3)] + ["mid_block.attentions.0"]
    attentions = [f"{place}.transformer_blocks.0.attn{n}.processor" for place in places for n in (1, 2)]
    unet = [f"{attention}.to_{x}_lora" for attention in attentions for x in ("q", "k", "v", "out")]
    names = {
        "text_encoder": [f"{layer}.lora_linear_layer.{f}.weight" for layer in text for f in ("down", "up")],
        "unet": [f"{layer}.{f}.weight" for layer in unet for f in ("down", "up")],
    }
    assert [len(names[part]) for part in FILES] == [144, 256]
    for part, ends in (("text_encoder", TEXT_LAYERS), ("unet", UNET_LAYERS)):
        torch.save({name: torch.zeros(1, 1) for name in names[part]}, tmp_path / FILES[part])
        found, factors = read_released(tmp_path / FILES[part])
        layers = {name for name, _ in modules[part].named_modules() if name.endswith(tuple(f".{e}" for e in ends))}
        wanted = {f"{layer}.{f}.weight" for layer in layers for f in ("lora_A", "lora_B")}
        assert found == part and {name.removeprefix(TEXT_ROOT) for name in factors} == wanted


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


LAYER = "text_model.encoder.layers.0.mlp.fc1.lora_linear_layer"


@pytest.mark.parametrize(
    "state,says",
    [
        (Code(), "cannot read it without running code"),
        ([torch.zeros(1)], "holds no flat dict of tensors"),
        ({"weight": torch.zeros(1)}, "no released adapter: weight"),
        ({f"{LAYER}.up.weight": torch.zeros(4, 2), "x": torch.zeros(1)}, "1 keys are none of text_encoder's LoRA, .* x$"),
        ({f"{LAYER}.up.weight": torch.zeros(4, 2)}, "fc1.lora_B.weight has no .*fc1.lora_A.weight"),
        ({f"{LAYER}.up.weight": torch.zeros(4, 2), f"{LAYER}.down.weight": torch.zeros(3, 4)}, r"ranks \[2, 3\]"),
        ({f"{LAYER}.up.weight": torch.zeros(4)}, f"1 keys are none of text_encoder's LoRA, the first is {LAYER}"),
        ({f"{LAYER}.up.weight": torch.full((4, 2), torch.nan)}, "is not finite"),
        ({3: torch.zeros(1)}, "3 is no name"),
        ({"token_embedding.weight": torch.zeros(1, 4)}, r"is \(1, 4\), allowed: a dummy row and tokens"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, monkeypatch, state, says):
    monkeypatch.chdir(tmp_path)
    torch.save(state, "adapter.pth")
    with pytest.raises(FairDiffError, match=says) as caught:
        convert([tmp_path / "adapter.pth"], tmp_path / "released")
    assert "adapter.pth" in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.pth"]  # nothing was run, nothing is left behind


def test_what_does_not_go_together_is_refused_in_one_line(tiny_folder, tmp_path):
    (file,) = release(make(load_model(tiny_folder), "lora_text"), tmp_path)
    torch.save({"token_embedding.weight": torch.zeros(6, 16)}, tmp_path / "prefix.pth")
    for files, folder, says in [
        ([file, file], "released", "as another of these files does"),
        ([file, tmp_path / "prefix.pth"], "released", "convert one"),
        ([file], "there", "exists already"),
        ([tmp_path / "missing.pth"], "released", "missing.pth"),
    ]:
        (tmp_path / "there").mkdir(exist_ok=True)
        with pytest.raises(FairDiffError, match=says) as caught:
            convert(files, tmp_path / folder)
        assert "\n" not in str(caught.value) and not (tmp_path / "released").exists()


def test_files_name_the_text_encoder_as_every_pipeline_does(tiny_folder, tmp_path):
    """With the `text_model.` that transformers 5 dropped; files without it, of earlier versions, load all the same."""
    model, other = load_model(tiny_folder), load_model(tiny_folder)
    made = make(model, "lora_text")
    made.save(tmp_path)
    state = load_file(tmp_path / LORA_FILE)
    assert all(key.startswith(f"text_encoder.{TEXT_ROOT}") for key in state)
    with safe_open(tmp_path / LORA_FILE, "pt") as file:
        about = file.metadata()
    save_file({key.replace(TEXT_ROOT, ""): value for key, value in state.items()}, tmp_path / LORA_FILE, about)
    again = make(other, "lora_text", seed=2)
    again.load(tmp_path)
    assert torch.equal(picture(model, made), picture(other, again))
