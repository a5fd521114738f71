"""Sizes other than the model's own, and skipped layers of the text encoder, agree with diffusers' pipelines."""

import json
import sys

import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from test_main_job import train
from test_sdxl import xl_folder  # noqa: F401
from tiny import composed, make_trainee

from fairdiff import builder
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.errors import FairDiffError
from fairdiff.training.step import Batch, training_step

PROMPT = "a photo of the face of a nurse"


@pytest.fixture(params=["sd", "xl"])
def folder(request, tiny_folder, xl_folder):  # noqa: F811
    return tiny_folder if request.param == "sd" else xl_folder


def plain(folder):
    """The pipeline of diffusers, on which a transformers without `text_model` in it counts layers too."""
    xl = "XL" in json.loads((folder / "model_index.json").read_text())["_class_name"]
    if xl:
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        pipeline.text_encoder.__dict__["text_model"] = pipeline.text_encoder  # diffusers 0.42 asks for its old name
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(folder, noise, **more):
    return plain(folder)(
        PROMPT, guidance_scale=3.0, num_inference_steps=3, latents=noise, output_type="pt", **more
    ).images  # fmt: skip


@pytest.mark.parametrize("size", [(24, 16), (8, 40)])
def test_images_of_other_sizes_are_those_of_the_plain_pipeline(folder, size):
    model = load_model(folder)
    key, native = model.fingerprint(), model.latent_shape
    model.size = size
    assert model.fingerprint() != key and model.latent_shape == (4, size[0] // 4, size[1] // 4) != native
    assert model.image_size == size
    noise = initial_noise(PROMPT, 0, [0], model.latent_shape)
    ours = model.generator(3.0, 3)(PROMPT, noise)
    assert ours.shape == (1, 3, *size) and ours.std() > 0.01
    assert torch.allclose(ours, generate(folder, noise, height=size[0], width=size[1]), atol=1e-4)


@pytest.mark.parametrize("negative", ["", "a woman"])
def test_layers_are_left_out_as_the_plain_pipeline_does(folder, negative):
    model = load_model(folder)
    model.negative, noise = negative, initial_noise(PROMPT, 0, [0], model.latent_shape)
    key, all_layers = model.fingerprint(), model.generator(3.0, 3)(PROMPT, noise)
    model.clip_skip = 1
    ours = model.generator(3.0, 3)(PROMPT, noise)
    assert model.fingerprint() != key and not torch.allclose(ours, all_layers, atol=1e-4)
    more = {"negative_prompt": negative} if negative else {}
    assert torch.allclose(ours, generate(folder, noise, clip_skip=1, **more), atol=1e-4)


def built(folder, *options):
    return builder.build_model(composed(f"model.path={folder}", "cache=null", *options))


@pytest.mark.parametrize(
    "option,says",
    [
        ("sampler.height=18", "sampler.height: found 18, allowed with this model: multiples of 4, such as 16"),
        ("sampler.width=1", "sampler.width: found 1, allowed with this model: multiples of 4, such as 4"),
        ("sampler.width=0", "sampler.width: found 0, allowed: greater than 0"),
        ("model.clip_skip=2", "model.clip_skip: found 2, allowed with this model: 1 to 1, or null"),
        ("model.clip_skip=-1", "model.clip_skip: found -1, allowed: greater than 0"),
    ],
)
def test_what_a_model_cannot_do_is_one_line(tiny_folder, option, says):
    with pytest.raises(FairDiffError, match=f"^{says}$"):
        built(tiny_folder, option)


def test_only_what_is_set_is_in_a_runs_identity_and_in_what_a_cache_is_keyed_by(tiny_folder):
    """Setting the model's own size explicitly changes nothing."""
    plain_key = built(tiny_folder).fingerprint()
    assert built(tiny_folder, "sampler.height=16", "sampler.width=16").fingerprint() == plain_key
    different = [["sampler.height=24"], ["sampler.width=24"], ["model.clip_skip=1"]]
    assert len({plain_key, *(built(tiny_folder, *options).fingerprint() for options in different)}) == 4


def test_a_step_on_other_than_square_images_with_a_layer_less(folder):
    """Boxes, masks and crops of the losses have the images' own height and width."""
    model = load_model(folder)
    model.size, model.clip_skip = (24, 16), 1
    trainee = make_trainee(model, "lora_both")
    for p in trainee.adapter.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    result = training_step(trainee, Batch(PROMPT, [0, 1, 2, 3], 3, 0, torch.Generator().manual_seed(0)))
    assert result.kept > 0
    learnt = {name for name, p in named(trainee.adapter) if p.grad is not None and p.grad.norm() > 0}
    assert any(name.startswith("unet") for name in learnt) and any(".layers.0." in name for name in learnt)
    if model.text_encoder_2:  # Stable Diffusion's empty prompt reads every layer, as XL's pooled embedding does
        assert {name.split(".layers.")[1][0] for name in learnt if name.startswith("text_encoder.")} == {"0"}


def named(adapter):
    return [(f"{n}.{k}", p) for n, m in adapter.modules.items() for k, p in m.named_parameters() if ".lora_" in k]


@pytest.mark.slow
def test_train_py_trains_and_audits_images_that_are_not_square(tmp_path, monkeypatch):
    """The embedded model, whose faces the detector finds in wider images too."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    sys.argv += ["steps=1", "global_batch=8", "cache=null", "sampler.width=96", "model.clip_skip=1", "audit.prompts=1"]
    sys.argv += ["audit.images_per_prompt=8", "audit.named=null", "audit.without_people=1", "sampler.audit_steps=3"]
    sys.argv += ["prompts.named=0", "prompts.without_people=0", f"hydra.run.dir={tmp_path / 'run'}"]
    train.task()
    (audit,) = (tmp_path / "run" / "audits").iterdir()
    boxes = pd.read_parquet(audit / "records.parquet").query("found")
    assert len(boxes) > 10 and boxes.x1.max() > 64 and boxes.y1.max() < 80
    about = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert (about["height"], about["width"], about["clip_skip"]) == (64, 96, 1)
    found = json.loads((audit / "audit.json").read_text())["provenance"]
    assert (found["image_size"], found["clip_skip"]) == ("96×64", 1)
