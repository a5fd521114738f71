"""Laws of the adapters: off is the frozen model, on/off/on is the same, plain diffusers loads what is saved."""

import json
import re
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import composed, make_trainee

from fairdiff import builder, describe
from fairdiff.diffusion.adapter_files import LORA_FILE, SOFT_TOKENS_FILE, TOKEN, read_about
from fairdiff.diffusion.adapters import Lora, SoftTokens
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.errors import FairDiffError
from fairdiff.plan import make_plan
from fairdiff.portraits import weights
from fairdiff.training.step import Batch, training_step

PROMPT = "a photo of the face of a nurse"
KINDS = ["soft_tokens", "lora_text", "lora_unet", "lora_both"]


def make(model, kind, seed=1, perturb=True):
    generator = torch.Generator().manual_seed(seed)
    if kind == "soft_tokens":
        adapter = SoftTokens(model, 3, "a photo")
    else:
        parts = {"lora_text": ["text_encoder"], "lora_unet": ["unet"], "lora_both": ["text_encoder", "unet"]}[kind]
        adapter = Lora(model, parts, 4, 8, generator)  # alpha is not rank: its scale must survive saving
    if perturb:
        for p in adapter.parameters():
            p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
    return adapter


def picture(model, adapter):
    noise = initial_noise(PROMPT, 0, range(2), model.latent_shape)
    return model.generator(3.0, 3, adapter.prefix)(PROMPT, noise)


@pytest.mark.parametrize("kind", KINDS)
def test_off_is_the_frozen_model_and_on_comes_back_bit_equal(tiny_model, tiny_folder, kind):
    frozen = load_model(tiny_folder)
    adapter = make(tiny_model, kind)
    before = picture(tiny_model, adapter)
    flags = [p.requires_grad for p in adapter.parameters()]
    with adapter.off():
        off = picture(tiny_model, adapter)
    noise = initial_noise(PROMPT, 0, range(2), frozen.latent_shape)
    assert torch.allclose(off, frozen.generator(3.0, 3)(PROMPT, noise), atol=1e-6)
    assert torch.equal(before, picture(tiny_model, adapter))
    assert not torch.allclose(before, off, atol=1e-4)
    assert flags == [p.requires_grad for p in adapter.parameters()] and all(flags)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_built_before_off_still_trains_the_adapter(tiny_model, kind):
    """peft clears requires_grad when it is switched off. A graph built before then gave no gradient and no error."""
    adapter = make(tiny_model, kind)
    embedding = tiny_model.encode(adapter.prefix + PROMPT)
    latent = torch.zeros(1, *tiny_model.latent_shape)
    eps = tiny_model.unet(latent, torch.tensor(5), encoder_hidden_states=embedding).sample
    with adapter.off():
        tiny_model.encode(PROMPT)
    eps.sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in adapter.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_scale_one_changes_nothing_and_zero_is_where_it_started(tiny_model, kind):
    adapter = make(tiny_model, kind)
    before = picture(tiny_model, adapter)
    adapter.rescale(1.0)
    assert torch.allclose(before, picture(tiny_model, adapter), atol=1e-6)
    adapter.rescale(0.5)
    half = picture(tiny_model, adapter)
    adapter.rescale(0.0)
    none = picture(tiny_model, adapter)
    if kind == "soft_tokens":
        assert torch.equal(adapter.embeddings[0].soft, adapter.origin[0])
    else:
        with adapter.off():
            assert torch.allclose(none, picture(tiny_model, adapter), atol=1e-6)
    assert 0 < (half - none).norm() < (before - none).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_learns(tiny_model, kind):
    adapter = make(tiny_model, kind)
    own = {id(p) for p in adapter.parameters()}
    for module in (tiny_model.text_encoder, tiny_model.unet, tiny_model.vae):
        assert all(p.requires_grad == (id(p) in own) for p in module.parameters())


@pytest.mark.parametrize("kind", ["lora_text", "lora_unet", "lora_both"])
def test_a_fresh_lora_changes_nothing(tiny_model, kind):
    adapter = make(tiny_model, kind, perturb=False)
    with adapter.off():
        off = picture(tiny_model, adapter)
    assert torch.allclose(picture(tiny_model, adapter), off, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapter_loads_back_bit_equal(tiny_folder, tmp_path, kind):
    one, two = load_model(tiny_folder), load_model(tiny_folder)
    first = make(one, kind)
    first.save(tmp_path)
    second = make(two, kind, seed=2)
    second.load(tmp_path)
    assert torch.equal(picture(one, first), picture(two, second))


@pytest.mark.parametrize("kind", KINDS)
def test_plain_diffusers_loads_the_adapter_and_paints_the_same_picture(tiny_folder, tmp_path, kind):
    model = load_model(tiny_folder)
    adapter = make(model, kind)
    adapter.save(tmp_path)
    noise = initial_noise(PROMPT, 0, range(1), model.latent_shape)
    ours = model.generator(3.0, 3, adapter.prefix)(PROMPT, noise)

    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    prompt = PROMPT
    if kind == "soft_tokens":
        pipeline.load_textual_inversion(tmp_path / SOFT_TOKENS_FILE)
        prompt = f"{TOKEN} {PROMPT}"
    else:
        pipeline.load_lora_weights(tmp_path)
    theirs = pipeline(
        prompt, guidance_scale=3.0, num_inference_steps=3, latents=noise, output_type="pt"
    ).images  # fmt: skip
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_pipeline_takes_a_second_adapter_under_another_name(tiny_folder, tmp_path):
    """Each adapter generates the same as alone, as docs/how_to/ship.md says."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    noise, ours = initial_noise(PROMPT, 0, range(1), (4, 4, 4)), []
    for seed, name in enumerate([TOKEN, "<second>"]):
        model = load_model(tiny_folder)
        adapter = make(model, "soft_tokens", seed)
        adapter.save(tmp_path)
        ours.append(model.generator(3.0, 3, adapter.prefix)(PROMPT, noise))
        pipeline.load_textual_inversion(tmp_path / SOFT_TOKENS_FILE, **({"token": name} if seed else {}))
    options = {"guidance_scale": 3.0, "num_inference_steps": 3, "latents": noise, "output_type": "pt"}
    theirs = [pipeline(f"{name} {PROMPT}", **options).images for name in (TOKEN, "<second>")]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))
    assert not torch.allclose(*ours, atol=1e-3)


def test_a_model_that_was_saved_with_soft_tokens_takes_no_others(tiny_folder, tmp_path):
    make(load_model(tiny_folder), "soft_tokens").save(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.load_textual_inversion(tmp_path / SOFT_TOKENS_FILE)
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(
        FairDiffError, match="^model.path: its tokenizer already knows <fairdiff>, .* the model without it"
    ):
        make(load_model(tmp_path / "model"), "soft_tokens")


def test_plain_diffusers_paints_with_the_shipped_model_as_the_readme_says():
    pipeline = StableDiffusionPipeline.from_pretrained(weights("model"))
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(PROMPT, guidance_scale=1.5, num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (64, 64, 3) and picture.std() > 0.05


@pytest.mark.parametrize("kind,file", [("soft_tokens", SOFT_TOKENS_FILE), ("lora_unet", LORA_FILE)])
def test_strict_loading_names_the_file_and_the_key(tiny_model, tmp_path, kind, file):
    adapter = make(tiny_model, kind)
    with pytest.raises(FairDiffError, match=file):
        adapter.load(tmp_path)
    adapter.save(tmp_path)
    state = load_file(tmp_path / file)
    name = next(iter(state))
    with safe_open(tmp_path / file, "pt") as saved:
        about = saved.metadata()
    save_file({f"{k}.wrong" if k == name else k: v for k, v in state.items()}, tmp_path / file, about)
    with pytest.raises(FairDiffError, match=re.escape(name.removeprefix("unet."))):
        adapter.load(tmp_path)
    adapter.save(tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:40])
    with pytest.raises(FairDiffError, match="cannot read"):
        adapter.load(tmp_path)


@pytest.mark.parametrize("kind", ["soft_tokens", "lora_both"])
def test_training_starts_from_the_adapter_of_adapter_path(tiny_folder, tmp_path, kind):
    """The first images and the class shares of the first step are those of the saved adapter."""
    one, two = load_model(tiny_folder), load_model(tiny_folder)
    saved = make_trainee(one, kind)
    for p in saved.adapter.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4)))
    saved.adapter.save(tmp_path)
    size = ["adapter.tokens=3", "adapter.initial_text=chef"] if kind == "soft_tokens" else ["adapter.rank=4"]
    config = composed(f"adapter={kind}", *size, f"adapter.path={tmp_path}", "cache=null", "seed=1")
    started = builder.build_trainee(config, make_plan(config), two, saved.perception)
    assert torch.equal(picture(one, saved.adapter), picture(two, started.adapter))
    started = replace(started, method=saved.method)
    first = [training_step(t, Batch(PROMPT, [0, 1], 3, 0, torch.Generator().manual_seed(0))) for t in (saved, started)]
    assert first[0].shares == first[1].shares and first[0].faces == 2


@pytest.mark.parametrize(
    "overrides,says",
    [
        (["adapter=soft_tokens"], r"soft_tokens\.safetensors: no such file, found pytorch_lora_weights\.safetensors"),
        (["adapter=lora_text", "adapter.rank=4"], "no part of this adapter"),
        (["adapter=lora_both", "adapter.rank=2"], r"\(alpha, rank\) of text_encoder is \(4, 4\), this .* \(2, 2\)"),
    ],
)
def test_a_starting_adapter_of_another_shape_is_one_line(tiny_folder, tmp_path, overrides, says):
    make_trainee(load_model(tiny_folder), "lora_both").adapter.save(tmp_path)
    with pytest.raises(FairDiffError, match=says) as caught:
        builder.build_adapter(composed(*overrides, f"adapter.path={tmp_path}"), load_model(tiny_folder))
    assert str(caught.value).startswith(f"adapter.path: {tmp_path}") and "\n" not in str(caught.value)


def test_a_lora_for_more_parts_than_the_adapter_is_refused(tiny_folder, tmp_path):
    make(load_model(tiny_folder), "lora_both").save(tmp_path)
    with pytest.raises(FairDiffError, match="no part of this adapter"):
        make(load_model(tiny_folder), "lora_text").load(tmp_path)


def test_a_lora_that_does_not_say_its_alpha_has_the_one_diffusers_takes(tiny_folder, tmp_path):
    made = Lora(load_model(tiny_folder), ["unet"], 4, 4, torch.Generator().manual_seed(0))
    made.save(tmp_path)
    save_file(load_file(tmp_path / LORA_FILE), tmp_path / LORA_FILE)  # without metadata, as many scripts write it
    Lora(load_model(tiny_folder), ["unet"], 4, 4, torch.Generator()).load(tmp_path)
    with pytest.raises(FairDiffError, match=r"\(alpha, rank\) of unet is \(4, 4\), this adapter has \(8, 4\)"):
        Lora(load_model(tiny_folder), ["unet"], 4, 8, torch.Generator()).load(tmp_path)


def test_soft_tokens_remember_the_words_they_started_from(tiny_folder, tmp_path):
    SoftTokens(load_model(tiny_folder), 3, "chef").save(tmp_path)
    other = SoftTokens(load_model(tiny_folder), 3, "nurse")
    nurse = other.origin[0].clone()
    other.load(tmp_path)
    assert other.initial_text == "chef" and not torch.equal(other.origin[0], nurse)
    other.rescale(0.0)
    assert torch.equal(other.embeddings[0].soft, other.origin[0])


ODD = {
    "not finite": (lambda value: value.fill_(torch.nan), "holds numbers that are not finite"),
    "complex": (
        lambda value: value.to(torch.complex64),
        r"is complex64 of shape \[\d+, \d+\], allowed: a matrix of real",
    ),
    "whole numbers": (lambda value: value.int(), r"is int32 of shape"),
    "rank 0": (lambda value: value[:0], r"is float32 of shape \[0, \d+\], allowed: a matrix of real numbers"),
    "a number": (lambda value: value.sum(), r"is float32 of shape \[\], allowed: a matrix of real numbers"),
    "a row": (lambda value: value[0], r"is float32 of shape \[\d+\], allowed: a matrix of real numbers"),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind,file", [("soft_tokens", SOFT_TOKENS_FILE), ("lora_both", LORA_FILE)])
def test_tensors_that_are_no_matrix_of_finite_real_numbers_are_refused_by_name(kind, file, odd, tiny_model, tmp_path):
    adapter, (change, says) = make(tiny_model, kind), ODD[odd]
    adapter.save(tmp_path)
    state = load_file(tmp_path / file)
    name = sorted(state)[-1]
    save_file(state | {name: change(state[name].clone())}, tmp_path / file)
    with pytest.raises(FairDiffError, match=rf"{file}: {re.escape(name)} {says}") as caught:
        adapter.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text,says",
    [
        ("{", "its lora_adapter_metadata is no JSON"),
        ("[" * 100_000, "its lora_adapter_metadata is no JSON"),
        ("[1]", "its lora_adapter_metadata is list, allowed: a table"),
        ('{"unet.r": [4], "unet.lora_alpha": 8}', r"\(alpha, rank\) of unet is \(8, \[4\]\)"),
        ('{"unet.alpha_pattern": {"to_q": 1}}', "has unet.alpha_pattern, allowed: one rank and alpha"),
        ('{"unet.use_rslora": true}', "has unet.use_rslora, allowed: one rank and alpha"),
    ],
)
def test_settings_of_a_lora_that_are_none_are_refused(text, says, tiny_model, tmp_path):
    adapter = make(tiny_model, "lora_unet")
    adapter.save(tmp_path)
    save_file(load_file(tmp_path / LORA_FILE), tmp_path / LORA_FILE, {"lora_adapter_metadata": text})
    with pytest.raises(FairDiffError, match=f"{LORA_FILE}: .*{says}") as caught:
        adapter.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content,says", [(b"[]", "found list, allowed: a table"), (b"{", "not JSON"), (b"\xff", "not UTF-8")]
)
def test_what_stands_beside_an_adapter_is_a_table(content, says, tmp_path):
    (tmp_path / "adapter.json").write_bytes(content)
    with pytest.raises(FairDiffError, match=f"^adapter.path: .*adapter.json: .*{says}"):
        read_about(tmp_path)


@pytest.mark.parametrize("kind", ["soft_tokens", "lora_both"])
def test_an_adapter_that_changes_nothing_is_not_audited(kind, tiny_folder, tmp_path):
    """An adapter of zeros is refused, unless the scale of a LoRA is 0."""
    adapter = make(load_model(tiny_folder), kind)
    adapter.save(tmp_path)
    options = [f"adapter={kind}", "adapter.tokens=3" if kind == "soft_tokens" else "adapter.rank=4"]
    options += [f"adapter.path={tmp_path}", f"model.path={tiny_folder}", "cache=null"]
    if kind != "soft_tokens":  # `make` has another alpha than the configuration
        save_file(load_file(tmp_path / LORA_FILE), tmp_path / LORA_FILE)
    config = composed(*options)
    builder.build_saved_adapter(config, make_plan(config, training=False), load_model(tiny_folder))
    for file in tmp_path.glob("*.safetensors"):
        save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file)
    with pytest.raises(FairDiffError, match="^adapter.path: .*(changes nothing in the images|nothing but zeros)"):
        builder.build_saved_adapter(config, make_plan(config, training=False), load_model(tiny_folder))
    if kind != "soft_tokens":
        config = composed(*options, "adapter.scale=0")
        builder.build_saved_adapter(config, make_plan(config, training=False), load_model(tiny_folder))


@pytest.mark.parametrize("kind", ["dpm", "euler"])
def test_what_stands_beside_an_adapter_says_how_its_images_are_sampled(kind, tiny_folder):
    config = composed(f"model.path={tiny_folder}", f"sampler.scheduler={kind}", "sampler.spacing=trailing")
    about = describe.about_adapter(config, make_plan(config), builder.build_model(config), "key")
    wanted = {"final_sigmas": "zero", "spacing": "trailing", "sampler_steps": config.sampler.audit_steps}
    wanted["scheduler"] = {"dpm": "DPMSolverMultistepScheduler", "euler": "EulerDiscreteScheduler"}[kind]
    assert wanted.items() <= about.items()


def test_an_audit_that_samples_otherwise_than_training_says_so(tmp_path):
    config = composed(f"adapter.path={tmp_path}")
    about = {"scheduler": "DPMSolverMultistepScheduler", "spacing": "leading", "final_sigmas": "sigma_min"}
    (tmp_path / "adapter.json").write_text(json.dumps(about))
    said = describe.adapter_warnings(config, make_plan(config, training=False), builder.build_model(config))
    assert [line.split("trained with ")[1].split(" ")[0] for line in said] == ["spacing", "final_sigmas"]
