"""The released adapters: converted, they generate what their factors say, here and in plain diffusers."""

import json
import os
import re
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

from fairdiff import builder
from fairdiff.diffusion.adapter_files import LORA_FILE, TEXT_ROOT
from fairdiff.diffusion.adapters import Lora, SoftTokens
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.released import RANK, TOKENS, convert, released_names
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.errors import FairDiffError
from fairdiff.portraits import weights

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from export import main  # noqa: E402

FILES = {"text_encoder": "text_encoder_lora_EMA.pth", "unet": "unet_lora_EMA.pth"}
PARTS = {"lora_text": ["text_encoder"], "lora_unet": ["unet"], "lora_both": ["text_encoder", "unet"]}


def released_name(part: str, key: str) -> str:
    """Return the name in the authors' code of a factor that peft calls `key`."""
    layer, factor, _ = key.rsplit(".", 2)
    factor = {"lora_A": "down", "lora_B": "up"}[factor]
    if part == "text_encoder":
        return f"{TEXT_ROOT}{layer.removeprefix(TEXT_ROOT)}.lora_linear_layer.{factor}.weight"
    attention, projection = layer.removesuffix(".0").rsplit(".", 1)
    return f"{attention}.processor.{projection}_lora.{factor}.weight"


def release(model, kind, folder):
    """Return an adapter like the authors', of rank 50 and scale 1, and write the files of their code."""
    generator = torch.Generator().manual_seed(1)
    if kind == "soft_tokens":
        adapter = SoftTokens(model, TOKENS, "a photo")
        position = model.text_encoder.state_dict()["embeddings.position_embedding.weight"].clone()
        dummy = torch.full((1, position.shape[1]), 9.0)
    else:
        adapter = Lora(model, PARTS[kind], RANK, RANK, generator)
    for p in adapter.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
    if kind == "soft_tokens":
        state = {"token_embedding.weight": torch.cat([dummy, adapter.embeddings[0].soft.detach()])}
        state |= {"position_embedding.weight": position, "position_ids": torch.arange(len(position))[None]}
        torch.save(state, folder / "prefix_embedding_EMA.pth")
        return adapter, [folder / "prefix_embedding_EMA.pth"]
    for part, module in adapter.modules.items():
        state = {released_name(part, k): v.clone() for k, v in get_peft_model_state_dict(module).items()}
        torch.save(state, folder / FILES[part])
    return adapter, [folder / FILES[part] for part in PARTS[kind]]


@pytest.mark.parametrize("kind", ["lora_text", "lora_unet", "lora_both"])
def test_released_lora_paints_the_same_here_and_in_plain_diffusers(tiny_folder, tmp_path, kind):
    model = load_model(tiny_folder)
    made, files = release(model, kind, tmp_path)
    wanted = picture(model, made)
    folder = tmp_path / "released"
    main([*map(str, files), "--as", "diffusers", "--to", str(folder), "--model", str(tiny_folder)])
    config = composed(f"adapter={kind}", f"adapter.path={folder}", f"adapter.rank={RANK}")
    other = load_model(tiny_folder)
    assert torch.allclose(picture(other, builder.build_adapter(config, other)), wanted, atol=1e-6)
    about = json.loads((folder / "adapter.json").read_text())
    assert about["options"].endswith("adapter.rank=50") and about["padding"] == "longest"
    assert {
        "scheduler": "DPMSolverMultistepScheduler",
        "spacing": "linspace",
        "sampler_steps": 30,
    }.items() <= about.items()
    assert about["final_sigmas"] == "sigma_min" and about["guidance"] == 7.5

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
    made, files = release(model, "soft_tokens", tmp_path)
    about = convert(files, tmp_path / "released", tiny_folder)
    assert about["options"] == "adapter.type=soft_tokens adapter.tokens=5" and about["prompt_prefix"] == "<fairdiff> "
    other = load_model(tiny_folder)
    config = composed("adapter=soft_tokens", f"adapter.path={tmp_path / 'released'}", "adapter.initial_text=chef")
    assert torch.equal(picture(other, builder.build_adapter(config, other)), picture(model, made))


def test_the_released_names_and_shapes_are_those_of_stable_diffusion():
    """144 and 256 tensors of rank 50, each a factor of a layer that LoRA is on here, at SD 1.5's size."""
    with torch.device("meta"):
        modules = {"text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)), "unet": UNet2DConditionModel(**UNET)}
    widths = {f"mlp.{name}": width for name, width in (("fc1", (768, 3072)), ("fc2", (3072, 768)))}
    widths |= {f"self_attn.{name}_proj": (768, 768) for name in ("q", "k", "v", "out")}
    text = {f"text_model.encoder.layers.{i}.{name}": width for i in range(12) for name, width in widths.items()}
    places = {f"down_blocks.{i}.attentions.{j}": 320 * 2**i for i in range(3) for j in range(2)}
    places |= {f"up_blocks.{i}.attentions.{j}": 1280 // 2 ** (i - 1) for i in (1, 2, 3) for j in range(3)}
    places |= {"mid_block.attentions.0": 1280}
    unet = {
        f"{place}.transformer_blocks.0.attn{n}.processor.to_{x}_lora": (768 if n == 2 and x in "kv" else width, width)
        for place, width in places.items() for n in (1, 2) for x in ("q", "k", "v", "out")
    }  # fmt: skip
    wanted = {
        "text_encoder": {f"{k}.lora_linear_layer.{f}.weight": s for k, w in text.items() for f, s in factors(w)},
        "unet": {f"{k}.{f}.weight": s for k, w in unet.items() for f, s in factors(w)},
    }
    for part, count in (("text_encoder", 144), ("unet", 256)):
        found = released_names(part, modules[part])
        assert {name: shape for name, (_, shape) in found.items()} == wanted[part] and len(found) == count
        assert all(released_name(part, ours) == theirs for theirs, (ours, _) in found.items())


def factors(width):
    inside, outside = width
    return [("down", [50, inside]), ("up", [outside, 50])]


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "state,says",
    [
        (Code(), "cannot read it without running code"),
        ([torch.zeros(1)], "holds no flat dict of tensors"),
        ({}, "holds no flat dict of tensors"),
        ({"weight": torch.zeros(1)}, "no released adapter: weight"),
        ({3: torch.zeros(1)}, "3 is no name"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, monkeypatch, tiny_folder, state, says):
    monkeypatch.chdir(tmp_path)
    torch.save(state, "adapter.pth")
    with pytest.raises(FairDiffError, match=says) as caught:
        convert([tmp_path / "adapter.pth"], tmp_path / "released", tiny_folder)
    assert "adapter.pth" in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.pth"]  # nothing was run, nothing is left behind


def drop(*parts):
    """Return a function that removes the tensors whose names contain all of these parts."""
    return lambda state: {k: v for k, v in state.items() if not all(part in k for part in parts)}


def change(name, to):
    """Return a function that replaces the tensors whose name ends with `name`."""
    return lambda state: state | {k: to(v) for k, v in state.items() if k.endswith(name)}


PREFIX_KEY = "token_embedding.weight"
TEXT_KEY = "layers.1.mlp.fc1.lora_linear_layer.up.weight"
UNET_KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight"
DAMAGED = {  # kind of file, what is done to its tensors, what is said
    "a factor less": ("lora_text", drop(TEXT_KEY), r"1 missing \(.*layers\.1\.mlp\.fc1.*up.weight\); .* the 24 tensors"),
    "a pair less": ("lora_text", drop("layers.0.self_attn.q_proj"), "2 missing .*q_proj.*down.weight, .*q_proj.*up.weight"),
    "a layer less": ("lora_text", drop("layers.1."), "12 missing"),
    "no feed-forward": ("lora_text", drop("mlp"), "8 missing"),
    "a layer more": (
        "lora_text",
        lambda state: state | {k.replace("layers.1", "layers.2"): v for k, v in state.items() if "layers.1" in k},
        r"12 unexpected \(text_model.encoder.layers.2",
    ),
    "another width": ("lora_text", change(TEXT_KEY, lambda v: v[:20]), r"1 misshapen \(.*: \[20, 50\] for \[24, 50\]\)"),
    "another rank": ("lora_text", lambda state: {k: v[:4, :4] for k, v in state.items()}, "24 misshapen"),
    "all zeros": ("lora_text", lambda state: {k: 0 * v for k, v in state.items()}, "24 tensors hold nothing but zeros"),
    "no up": ("lora_both", change("up.weight", torch.zeros_like), "tensors hold nothing but zeros"),
    "not finite": ("lora_text", change(TEXT_KEY, lambda v: v.fill_(torch.nan)), "fc1.*up.weight holds numbers that are not"),
    "complex": ("lora_text", change(TEXT_KEY, lambda v: v.to(torch.complex64)), "fc1.*up.weight is complex64"),
    "a place of the unet less": ("lora_unet", drop("mid_block"), "16 missing"),
    "another width of the unet": ("lora_unet", change(UNET_KEY, lambda v: v[:, :8]), r"\[50, 8\] for \[50, 16\]"),
    "module. before": (
        "lora_unet",
        lambda state: {f"module.{k}": v for k, v in state.items()},
        r"missing .* unexpected \(module\.down_blocks",
    ),
    "no dummy row": ("soft_tokens", change(PREFIX_KEY, lambda v: v[1:]), r"\[5, 16\] for \[6, 16\].*a dummy row"),
    "another width of tokens": ("soft_tokens", change(PREFIX_KEY, lambda v: v[:, :8]), r"\[6, 8\] for \[6, 16\]"),
    "no position embedding": ("soft_tokens", drop("position_embedding"), r"1 missing \(position_embedding.weight\)"),
    "another position embedding": (
        "soft_tokens",
        change("position_embedding.weight", lambda v: v.flip(0)),
        r"position_embedding.weight differs by \d+% from that of the text_encoder",
    ),
    "tokens of zeros": ("soft_tokens", change(PREFIX_KEY, lambda v: v * torch.eye(6)[:, :1]), "but zeros"),
    "tokens and more": ("soft_tokens", lambda state: state | {"x": torch.ones(2, 2)}, r"1 unexpected \(x\)"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_file_that_is_not_whole_is_refused_by_the_names_of_its_tensors(damage, tiny_folder, tmp_path):
    kind, to, says = DAMAGED[damage]
    _, files = release(load_model(tiny_folder), kind, tmp_path)
    torch.save(to(torch.load(files[-1], weights_only=True)), files[-1])
    with pytest.raises(FairDiffError, match=f"{files[-1].name}: .*{says}") as caught:
        convert(files, tmp_path / "released", tiny_folder)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*released*"))


def test_a_file_for_another_model_is_refused(tiny_folder, tmp_path):
    """Stable Diffusion 1.5's for the embedded model, which has other widths."""
    _, files = release(load_model(tiny_folder), "lora_unet", tmp_path)
    with pytest.raises(FairDiffError, match=f"misshapen .* on the unet of {re.escape(str(weights('model')))}"):
        convert(files, tmp_path / "released", weights("model"))
    with pytest.raises(FairDiffError, match="^--model: cannot load .*no/such"):
        convert(files, tmp_path / "released", tmp_path / "no/such")


def test_half_precision_of_the_position_embedding_is_the_models_own(tiny_folder, tmp_path):
    _, files = release(load_model(tiny_folder), "soft_tokens", tmp_path)
    halved = change("position_embedding.weight", lambda v: v.half())(torch.load(files[0], weights_only=True))
    torch.save(halved, files[0])
    convert(files, tmp_path / "released", tiny_folder)


def test_what_does_not_go_together_is_refused_in_one_line(tiny_folder, tmp_path):
    _, (file,) = release(load_model(tiny_folder), "lora_text", tmp_path)
    _, (prefix,) = release(load_model(tiny_folder), "soft_tokens", tmp_path)
    for files, folder, says in [
        ([file, file], "released", "as another of these files does"),
        ([file, prefix], "released", "convert one"),
        ([file], "there", "exists already"),
        ([tmp_path / "missing.pth"], "released", "missing.pth"),
    ]:
        (tmp_path / "there").mkdir(exist_ok=True)
        with pytest.raises(FairDiffError, match=says) as caught:
            convert(files, tmp_path / folder, tiny_folder)
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
