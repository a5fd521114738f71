"""Laws of the frozen model: how prompts are padded and encoded, and what its fingerprint knows."""

import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.sampling import initial_noise, make_solver

PROMPT = "a photo of the face of a nurse"


def test_the_empty_prompt_is_padded_to_the_prompts_length_with_its_mask(tiny_folder):
    model = load_model(tiny_folder, padding="longest")
    cond, uncond = model.encode_pair(PROMPT)
    assert cond.shape == uncond.shape and cond.shape[1] < model.tokenizer.model_max_length
    assert torch.allclose(uncond[:, :2], model.encode(""), atol=1e-5)  # causal: its own two tokens see no padding


@pytest.mark.parametrize("negative", ["a chef", "a chef, a carpenter, a woman, a man"])
@pytest.mark.parametrize("padding", ["max_length", "longest"])
def test_a_negative_prompt_takes_the_empty_ones_place(tiny_folder, padding, negative):
    model = load_model(tiny_folder, padding=padding)
    prompt, noise = "a nurse", initial_noise("a nurse", 0, [0], model.latent_shape)
    key, plain = model.fingerprint(), model.generator(3.0, 3)(prompt, noise)
    model.negative = negative
    cond, uncond = model.encode_pair(prompt)
    assert cond.shape == uncond.shape and model.fingerprint() != key
    generated = model.generator(3.0, 3)(prompt, noise)
    assert not torch.allclose(plain, generated, atol=1e-4)
    if padding == "max_length":
        pipeline = StableDiffusionPipeline.from_pretrained(
            tiny_folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline(
            prompt, negative_prompt=negative, guidance_scale=3.0, num_inference_steps=3, latents=noise,
            output_type="pt",
        ).images  # fmt: skip
        assert torch.allclose(generated, theirs, atol=1e-4)


def test_the_fingerprint_knows_the_model_and_not_where_it_lies_or_who_asks(tiny_folder, tmp_path):
    """diffusers notes which values were defaults in an order that changes from process to process."""
    moved = shutil.copytree(tiny_folder, tmp_path / "moved")
    here, there = load_model(tiny_folder), load_model(moved)
    assert here.fingerprint() == there.fingerprint()
    for kind in ("euler", "unipc"):
        solver = make_solver(kind, here.scheduler.config, "zero")
        noted = solver.config["_use_default_values"]
        assert len(noted) > 1
        here.scheduler, key = solver, here.fingerprint()
        there.scheduler = make_solver(kind, here.scheduler.config, "zero")
        solver._internal_dict = type(solver.config)(dict(solver.config) | {"_use_default_values": noted[::-1]})
        assert there.fingerprint() == here.fingerprint() != key
        there.scheduler = make_solver(kind, dict(there.scheduler.config) | {"beta_end": 0.02}, "zero")
        assert there.fingerprint() != here.fingerprint()


def test_the_fingerprint_knows_what_a_tokenizer_makes_of_a_text_and_not_what_was_asked_of_it(tiny_folder, tmp_path):
    """Without a mask what pads a prompt reaches the images."""
    model, key = load_model(tiny_folder), load_model(tiny_folder).fingerprint()
    model.encode_pair(PROMPT)
    model.overlong("", [PROMPT] * 2)  # padding and truncation are set by calls
    assert model.fingerprint() == key
    folder = shutil.copytree(tiny_folder, tmp_path / "padded")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.pad_token = "!" if "!" in tokenizer.get_vocab() else tokenizer.convert_ids_to_tokens(1)
    tokenizer.save_pretrained(folder / "tokenizer")
    other, noise = load_model(folder), initial_noise(PROMPT, 0, range(1), model.latent_shape)
    assert not torch.equal(*(m.generator(3.0, 3)(PROMPT, noise) for m in (model, other)))
    assert other.fingerprint() != key
