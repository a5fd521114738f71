"""The model card shows the numbers of audit.json, and the hub can read it."""

from functools import cache

import numpy as np
import pytest
from huggingface_hub import ModelCard
from tiny import composed, whole_audit

from fairdiff.audit.card import LICENCES, XL_TOKENS, model_card
from fairdiff.audit.wording import number
from fairdiff.builder.audit import training_judge
from fairdiff.diffusion.folder import hub_id

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
ABOUT = {
    "type": "lora", "base_model": SD15, "classes": {"gender": ["female", "male"]},
    "target": ["gender: female 0.5, male 0.5"], "guidance": 7.5, "sampler_steps": 30, "negative_prompt": "",
    "scheduler": "DPMSolverMultistepScheduler", "spacing": "linspace", "final_sigmas": "zero", "prompt_prefix": "",
    "load_with": "load_lora_weights",
}  # fmt: skip


AUDIT = cache(whole_audit)


def card(**changes) -> str:
    about = ABOUT | changes
    counts = {"gender": np.array([[90, 10], [20, 80]])}
    return model_card(AUDIT(), about, "mine", counts, hub_id(about["base_model"]))


def test_numbers_are_those_of_the_audit():
    text, audit = card(), AUDIT()
    for model in ("before", "after"):
        bias = audit["models"][model]["attributes"]["gender"]["bias"]
        ends = ", ".join(map(number, bias["ci95_these"]))  # of few prompts
        assert f"{number(bias['mean'])} [{ends}]*" in text and "with an asterisk they hold for these prompts only" in text
    drift = audit["paired"]["attributes"]["race"]["drift"]
    assert f"| {drift['stayed_within']}* |" in text and "No target was set for race" in text
    assert "| female | 90 | 10 |\n| male | 20 | 80 |" in text  # the training judge
    assert "| female | 90 | 10 |\n| male | 10 | 90 |" in text  # the audit judge
    assert "never anybody's identity" in text and "guidance_scale=7.5, num_inference_steps=30)" in text


def test_the_hub_reads_the_card():
    data = ModelCard(card()).data
    assert (data.license, data.base_model) == ("creativeml-openrail-m", ABOUT["base_model"])
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image") and "lora" in data.tags
    embedded = ModelCard(card(base_model="embedded Portraits model")).data
    assert embedded.license == LICENCES["embedded Portraits model"] and embedded.base_model is None
    mine = card(base_model="/my/model")
    assert ModelCard(mine).data.license_name == "of-the-base-model" and "see `/my/model`" in mine
    tokens = card(type="soft_tokens", prompt_prefix="<fairdiff> ", load_with="load_textual_inversion")
    assert "pipe('<fairdiff> ' + prompt" in tokens and '("soft_tokens.safetensors")' in tokens
    two = card(type="soft_tokens", pipeline="StableDiffusionXLPipeline", prompt_prefix="<fairdiff> ")
    assert XL_TOKENS in two and "pipe('<fairdiff> ' + prompt" in two and "load_lora_weights" not in two


@pytest.mark.parametrize(
    "base,hub,licence",
    [
        (f"{SD15}@fp16", SD15, "creativeml-openrail-m"),
        ("runwayml/stable-diffusion-v1-5", SD15, "creativeml-openrail-m"),
        ("black-forest-labs/FLUX.1-schnell", "black-forest-labs/FLUX.1-schnell", "apache-2.0"),
        ("stabilityai/sdxl-turbo", "stabilityai/sdxl-turbo", "other"),
        ("models/mine.safetensors", None, "other"),
    ],
)
def test_the_base_model_is_its_name_on_the_hub_and_its_licence_only_where_it_is_known(base, hub, licence):
    text = card(base_model=base)
    data = ModelCard(text).data
    assert (data.base_model, data.license) == (hub, licence) and f"on the base model `{base}`" in text


def test_a_folder_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("models/sd15") == "models/sd15"
    (tmp_path / "models" / "sd15").mkdir(parents=True)
    assert hub_id("models/sd15") is None and hub_id(str(tmp_path)) is None and hub_id("embedded Portraits model") is None


def test_what_only_plain_diffusers_loads_is_loaded_so(tmp_path):
    """The code also sets the size and the clip skip of the audit."""
    assert "fairdiff.load_adapter" in card() and "fairdiff.load_adapter" in card(pipeline="StableDiffusionXLPipeline")
    flux = card(pipeline="FluxPipeline", scheduler="FlowMatchEulerDiscreteScheduler")
    assert "fairdiff" not in flux.split("## How to load")[1].split("##")[0] and 'pipe.load_lora_weights(".")' in flux
    assert "num_inference_steps=30, height=768, width=512, clip_skip=1)" in card(height=768, width=512, clip_skip=1)


def test_the_training_judge_comes_with_its_errors_where_they_are_known():
    name, confusion = training_judge(composed())
    assert name == "embedded training judge" and confusion["gender"].shape == (2, 2)
    assert training_judge(composed("judge=open_clip")) == ("open_clip: ViT-L-14/laion2b_s32b_b82k", {})
