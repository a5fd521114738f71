"""Stable Diffusion XL by the same code: held against diffusers' own pipeline and against literal autograd."""

import copy
import json
import shutil
import sys

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from test_main_job import BESIDE_EMBEDDED, launch
from test_sampling import factorised, literal
from tiny import composed, make_trainee, tiny_tokenizer, with_scheduler, with_tensors
from tiny_judges import uncalibrated
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fairdiff import builder
from fairdiff.diffusion.adapters import Lora
from fairdiff.diffusion.denoise import call_unet, with_pooled
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.errors import FairDiffError
from fairdiff.training.step import Batch, training_step

PROMPT = "a photo of the face of a nurse"
PARTS = {"lora_text": ["text_encoder"], "lora_unet": ["unet"], "lora_both": ["text_encoder", "unet"]}


@pytest.fixture(scope="session")
def xl_folder(tmp_path_factory):
    """A tiny SDXL: two text encoders of unlike widths, a U-Net that also reads pooled text and sizes, random weights."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("xl")
    tokenizer = tiny_tokenizer(folder)
    size = len(tokenizer)

    def text(width, eos):
        return CLIPTextConfig(
            vocab_size=size, hidden_size=width, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=40, projection_dim=12, bos_token_id=size - 2, eos_token_id=eos,
            pad_token_id=size - 1,
        )  # fmt: skip

    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=24, attention_head_dim=2, norm_num_groups=4, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=12 + 6 * 8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(  # as released
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    StableDiffusionXLPipeline(
        vae, CLIPTextModel(text(8, size - 1)), CLIPTextModelWithProjection(text(16, 2)),  # 2: as the released one says
        tokenizer, tokenizer, unet, scheduler, add_watermarker=False,
    ).save_pretrained(folder / "model")  # fmt: skip
    return folder / "model"


def lora(model, kind, perturb=True):
    generator = torch.Generator().manual_seed(1)
    adapter = Lora(model, PARTS[kind], 4, 8, generator)
    for p in adapter.parameters() if perturb else ():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
    return adapter


def noise_of(model, count=1):
    return initial_noise(PROMPT, 0, range(count), model.latent_shape)


def plain(folder):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, noise, **more):
    return pipeline(
        PROMPT, guidance_scale=3.0, num_inference_steps=3, latents=noise, output_type="pt", **more
    ).images  # fmt: skip


@pytest.mark.parametrize("negative", ["", "a woman"])
@pytest.mark.parametrize("zeros", [True, False])
def test_pictures_are_those_of_the_plain_pipeline(xl_folder, tmp_path, negative, zeros):
    shutil.copytree(xl_folder, tmp_path / "model")
    index = json.loads((xl_folder / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": zeros}
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    model = load_model(tmp_path / "model")
    model.negative = negative
    noise = noise_of(model)
    theirs = generate(plain(tmp_path / "model"), noise, **({"negative_prompt": negative} if negative else {}))
    assert theirs.shape[-1] == 16 and theirs.std() > 0.01
    assert torch.allclose(model.generator(3.0, 3)(PROMPT, noise), theirs, atol=1e-4)


@pytest.mark.parametrize("kind", PARTS)
def test_plain_diffusers_loads_the_adapter_and_paints_the_same_picture(xl_folder, tmp_path, kind):
    model = load_model(xl_folder)
    noise = noise_of(model)
    bare = model.generator(3.0, 3)(PROMPT, noise)
    adapter = lora(model, kind)
    ours = model.generator(3.0, 3)(PROMPT, noise)
    with adapter.off():
        assert torch.allclose(model.generator(3.0, 3)(PROMPT, noise), bare, atol=1e-6)
    assert not torch.allclose(ours, bare, atol=1e-3)
    adapter.save(tmp_path)
    pipeline = plain(xl_folder)
    pipeline.load_lora_weights(tmp_path)
    assert torch.allclose(ours, generate(pipeline, noise), atol=1e-4)
    other = load_model(xl_folder)
    lora(other, kind, perturb=False).load(tmp_path)
    assert torch.equal(ours, other.generator(3.0, 3)(PROMPT, noise))


@pytest.mark.parametrize("kind", PARTS)
def test_factorised_gradient_equals_literal_autograd(xl_folder, kind):
    """The gradient passes both text encoders and the pooled embedding, without which it would differ."""
    model = load_model(xl_folder)
    adapter = lora(model, kind)
    used = [p for n, m in adapter.modules.items() for k, p in m.named_parameters() if ".lora_" in k and reached(n, k)]
    adapter.parameters = lambda: used
    ours = factorised(model, adapter, model.scheduler, "unit", steps=5)
    oracle = literal(model, adapter, model.scheduler, "unit", steps=5)
    assert oracle.norm() > 0 and (ours - oracle).norm() / oracle.norm() <= 1e-5


def reached(module: str, name: str) -> bool:
    """Return whether images depend on a factor; the last layer of the first text encoder is not used."""
    return not (module == "text_encoder" and ".layers.2." in name)


def test_the_pooled_embedding_is_trained_through(xl_folder):
    model = load_model(xl_folder)
    lora(model, "lora_text")
    cond, _ = model.encode_pair(PROMPT)
    (grad,) = torch.autograd.grad(
        model.unet(
            torch.ones(1, *model.latent_shape), torch.tensor(500), encoder_hidden_states=cond[:, :-1].detach(),
            added_cond_kwargs={"text_embeds": cond[:, -1, :12], "time_ids": cond[:, -1, 12:18]},
        ).sample.sum(),
        cond,
    )  # fmt: skip
    assert grad[:, -1, :12].norm() > 0 and not grad[:, :-1].any()
    assert cond[0, -1, 12:].tolist() == [16, 16, 0, 0, 16, 16] + [0] * 6


def test_a_step_trains_every_factor_that_pictures_depend_on(xl_folder):
    trainee = make_trainee(load_model(xl_folder), "lora_both")
    for p in trainee.adapter.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    result = training_step(trainee, Batch(PROMPT, [0, 1, 2, 3], 3, 0, torch.Generator().manual_seed(0)))
    assert result.kept > 0
    for name, module in trainee.adapter.modules.items():
        for key, p in module.named_parameters():
            if ".lora_" in key:
                assert (p.grad is not None and p.grad.norm() > 0) == reached(name, key), (name, key)


def test_what_makes_its_pictures_is_in_its_fingerprint(xl_folder):
    one, two, three = (load_model(xl_folder) for _ in range(3))
    next(two.text_encoder_2.parameters()).data.add_(1)
    three.empty_is_zero = not three.empty_is_zero
    four = load_model(xl_folder)
    four.tokenizer_2 = copy.deepcopy(four.tokenizer_2)
    four.tokenizer_2.pad_token = four.tokenizer_2.convert_ids_to_tokens(1)
    assert len({m.fingerprint() for m in (one, two, three, four, load_model(xl_folder))}) == 4


@pytest.mark.parametrize(
    "overrides,says",
    [
        (["model.padding=longest", "adapter=lora_text"], "model.padding: found longest, .*max_length"),
    ],
)
def test_what_it_cannot_do_is_one_line(xl_folder, overrides, says):
    config = composed(*overrides, f"model.path={xl_folder}", "cache=null")
    with pytest.raises(FairDiffError, match=says) as caught:
        builder.build_adapter(config, builder.build_model(config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "component,changes,says",
    [
        (
            "unet",
            {"projection_class_embeddings_input_dim": 58},
            "reads pooled texts of width 10, its text encoder writes 12",
        ),
        ("vae", {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}, "latents_mean"),
        ("scheduler", {}, "EDMDPMSolverMultistepScheduler names no beta_schedule"),
    ],
)
def test_others_of_its_kind_that_would_be_painted_wrongly_are_refused(xl_folder, tmp_path, component, changes, says):
    shutil.copytree(xl_folder, tmp_path / "model")
    if component == "unet":
        config = UNet2DConditionModel.load_config(xl_folder / "unet")
        UNet2DConditionModel.from_config({**config, **changes}).save_pretrained(tmp_path / "model" / "unet")
    elif component == "vae":
        file = tmp_path / "model" / "vae" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    else:
        shutil.rmtree(tmp_path / "model")
        with_scheduler(xl_folder, tmp_path / "model", EDMDPMSolverMultistepScheduler())
    with pytest.raises(FairDiffError, match=says) as caught:
        load_model(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_second_text_encoder_without_all_its_tensors_is_refused_by_their_names(xl_folder, tmp_path):
    def change(state):
        del state["text_projection.weight"]

    folder = with_tensors(xl_folder, tmp_path / "model", "text_encoder_2", change)
    with pytest.raises(
        FairDiffError, match=r"the tensors of text_encoder_2: 1 missing \(text_projection\.weight\); allowed"
    ):
        load_model(folder)


@pytest.mark.parametrize("kind", ["dpm", "ddim", "euler", "unipc"])
def test_options_of_the_folders_own_scheduler_that_the_chosen_solver_has_not_change_nothing(xl_folder, tmp_path, kind):
    """DDPM clips by default. XL's pipeline leaves it so, and diffusers keeps the key beside the solver's own."""
    ddpm = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    assert ddpm.config.clip_sample
    folder, options = with_scheduler(xl_folder, tmp_path / "model", ddpm), ["model=sdxl", "model.device=cpu"]
    options += ["model.dtype=float32", f"sampler.scheduler={kind}"]
    models = [builder.build_model(composed(*options, f"model.path={path}")) for path in (xl_folder, folder)]
    noise = noise_of(models[0])
    assert torch.equal(*(model.generator(3.0, 3)(PROMPT, noise) for model in models))


@pytest.mark.slow
def test_train_py_trains_audits_and_saves_what_the_plain_pipeline_loads(xl_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    launch(
        tmp_path / "run", *BESIDE_EMBEDDED, "model=sdxl", f"model.path={xl_folder}", "adapter=lora_both",
        f"audit.judge.path={uncalibrated(tmp_path / 'judge')}", "export=[kohya]",
    )  # fmt: skip
    (folder,) = (tmp_path / "run" / "audits").iterdir()
    assert (folder / "report.html").exists()
    audit = json.loads((folder / "audit.json").read_text())
    assert audit["models"]["after"]["dino"]["mean"] < 1 and audit["images_per_prompt"] == 4
    pipeline = plain(xl_folder)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    bare = generate(pipeline, noise)
    pipeline.load_lora_weights(tmp_path / "run" / "adapter")
    assert set(pipeline.get_list_adapters()) == {"text_encoder", "text_encoder_2", "unet"}
    trained = generate(pipeline, noise)
    assert not torch.allclose(bare, trained, atol=1e-6)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tmp_path / "run" / "exports" / "kohya" / "fairdiff_lora.safetensors")
    assert torch.allclose(trained, generate(pipeline, noise), atol=1e-6)


def test_the_shapes_of_the_released_model_fit():
    """Its U-Net's configuration (stabilityai/stable-diffusion-xl-base-1.0, unet/config.json), on no device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        text = with_pooled(torch.empty(1, 77, 2048), torch.empty(1, 1280), (1024, 1024))
        eps = call_unet(unet, torch.empty(2, 4, 128, 128), torch.tensor(500), text.expand(2, -1, -1))
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684 and eps.shape == (2, 4, 128, 128)
