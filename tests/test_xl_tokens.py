"""Soft tokens of Stable Diffusion XL: both text encoders have their own, and every tool reads both in one file."""

import json

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from test_adapters import PROMPT, make, picture
from test_exports import plain, plain_picture
from test_sampling import factorised, literal
from test_sdxl import xl_folder  # noqa: F401 (a fixture)
from tiny import composed, make_trainee

import fairdiff
from fairdiff import builder
from fairdiff.audit.card import XL_TOKENS
from fairdiff.diffusion.adapter_files import SOFT_TOKENS_FILE
from fairdiff.diffusion.adapters import SoftTokens
from fairdiff.diffusion.export import A1111_FILE, export
from fairdiff.diffusion.imports import import_soft_tokens
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.errors import FairDiffError
from fairdiff.training.step import Batch, training_step


def loaded(folder, file, end=True):
    """Return the pipeline with the file loaded as in the model card; end=False omits the last line of that code."""
    pipe = plain(folder, StableDiffusionXLPipeline, add_watermarker=False)
    lines = XL_TOKENS.replace("soft_tokens.safetensors", str(file)).splitlines()
    assert "eos_token_id" in lines[-1]
    exec("\n".join(lines if end else lines[:-1]), {"pipe": pipe})
    return pipe


def test_plain_diffusers_paints_the_same_and_off_is_the_frozen_model(xl_folder, tmp_path):  # noqa: F811
    frozen, model = load_model(xl_folder), load_model(xl_folder)
    adapter = make(model, "soft_tokens")
    assert [tuple(p.shape) for p in adapter.parameters()] == [(3, 8), (3, 16)]
    ours, noise = picture(model, adapter), initial_noise(PROMPT, 0, range(2), model.latent_shape)
    with adapter.off():
        assert torch.equal(picture(model, adapter), frozen.generator(3.0, 3)(PROMPT, noise))
    adapter.save(tmp_path)
    pipe = loaded(xl_folder, tmp_path / SOFT_TOKENS_FILE)
    assert torch.allclose(plain_picture(pipe, f"<fairdiff> {PROMPT}"), ours, atol=1e-4)
    assert torch.allclose(plain_picture(pipe), frozen.generator(3.0, 3)(PROMPT, noise), atol=1e-4)
    pipe = loaded(xl_folder, tmp_path / SOFT_TOKENS_FILE, end=False)  # pools at the last token, which no prompt reaches
    assert not torch.allclose(plain_picture(pipe, f"<fairdiff> {PROMPT}"), ours, atol=1e-3)


def test_exports_are_imports_and_both_encoders_count(xl_folder, tmp_path):  # noqa: F811
    model = load_model(xl_folder)
    adapter = make(model, "soft_tokens")
    adapter.save(tmp_path)
    ours = picture(model, adapter)
    for kind, name in (("diffusers", SOFT_TOKENS_FILE), ("a1111", A1111_FILE)):
        export(tmp_path, kind, tmp_path / kind, xl_folder)
        state = load_file(tmp_path / kind / name)
        assert state.keys() == {"clip_l", "clip_g"} and torch.equal(state["clip_g"], adapter.parameters()[1])
        other = load_model(xl_folder)
        imported = import_soft_tokens(other, [tmp_path / kind / name], [1.0], "chef")
        assert torch.equal(picture(other, imported), ours) and torch.equal(imported.origin[1], adapter.origin[1])
        with torch.no_grad():
            imported.parameters()[1].neg_()
        assert not torch.allclose(picture(other, imported), ours, atol=1e-3)
    assert json.loads((tmp_path / "a1111" / "adapter.json").read_text())["prompt_prefix"] == "fairdiff "
    export(tmp_path / "a1111" / A1111_FILE, "diffusers", tmp_path / "half", xl_folder, 0.5)
    adapter.rescale(0.5)
    half = load_file(tmp_path / "half" / SOFT_TOKENS_FILE)
    assert all(torch.allclose(half[k], p) for k, p in zip(adapter.keys, adapter.parameters(), strict=True))
    again = SoftTokens(load_model(xl_folder), 3, "chef")
    again.load(tmp_path / "half")
    assert again.initial_text == "a photo" and torch.equal(again.parameters()[0], half["clip_l"])


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_load_adapter_does_it_all(xl_folder, tmp_path, scale):  # noqa: F811
    model = load_model(xl_folder)
    adapter = make(model, "soft_tokens")
    adapter.save(tmp_path)
    adapter.rescale(scale)
    pipe = plain(xl_folder, StableDiffusionXLPipeline, add_watermarker=False)
    one = fairdiff.load_adapter(pipe, tmp_path / SOFT_TOKENS_FILE, scale)
    assert one.prefix == "<fairdiff> "
    assert torch.allclose(plain_picture(pipe, one.prefix + PROMPT), picture(model, adapter), atol=1e-4)


def test_gradients_reach_the_tokens_of_both_encoders_as_autograds_do(xl_folder):  # noqa: F811
    model = load_model(xl_folder)
    adapter = make(model, "soft_tokens")
    ours = factorised(model, adapter, model.scheduler, "unit", steps=4)
    oracle = literal(model, adapter, model.scheduler, "unit", steps=4)
    assert oracle.norm() > 0 and (ours - oracle).norm() / oracle.norm() <= 1e-5
    trainee = make_trainee(load_model(xl_folder), "soft_tokens")
    training_step(trainee, Batch(PROMPT, [0, 1], 3, 0, torch.Generator().manual_seed(0)))
    assert all(p.grad is not None and p.grad.abs().sum(1).gt(0).all() for p in trainee.adapter.parameters())


def test_files_of_another_kind_are_one_line(xl_folder, tiny_folder, tmp_path):  # noqa: F811
    save_file({"clip_l": torch.ones(2, 8), "clip_g": torch.ones(2, 16)}, tmp_path / "good.safetensors")
    save_file({"clip_l": torch.ones(2, 8), "clip_g": torch.ones(3, 16)}, tmp_path / "uneven.safetensors")
    save_file({"clip_l": torch.ones(2, 16), "clip_g": torch.ones(2, 16)}, tmp_path / "wide.safetensors")
    save_file({"<one>": torch.ones(2, 8)}, tmp_path / "one.safetensors")
    save_file({"clip_g": torch.ones(2, 8), "other": torch.ones(2, 8)}, tmp_path / "other.safetensors")
    pipe = plain(xl_folder, StableDiffusionXLPipeline, add_watermarker=False)
    for name, folder, says in [
        ("uneven", xl_folder, "holds 2 tokens of clip_l and 3 tokens of clip_g, allowed: as many of each"),
        ("wide", xl_folder, "its embeddings have width 16, the text encoder 8"),
        ("one", xl_folder, "holds tokens of 1 text encoders, the model has 2 that read them"),
        ("other", xl_folder, r"holds 2 tensors \(clip_g, other\); allowed: one, .* or clip_l and clip_g"),
        ("good", tiny_folder, "holds tokens of 2 text encoders, the model has 1 that read them"),
    ]:
        config = composed("adapter=soft_tokens", f"adapter.path={tmp_path / name}.safetensors")
        with pytest.raises(FairDiffError, match=f"^adapter.path: .*{name}.safetensors: {says}"):
            builder.build_adapter(config, load_model(folder))
        if folder == xl_folder:
            with pytest.raises(FairDiffError, match=f"^load_adapter: .*{name}.safetensors: holds"):
                fairdiff.load_adapter(pipe, tmp_path / f"{name}.safetensors")
