"""T5 stays in CPU memory and encodes each text once; its output is the same to the bit for all callers."""

import pytest
import torch
from tiny import make_trainee
from tiny_flow import flux, sd3

from fairdiff.diffusion import t5
from fairdiff.diffusion.denoise import Guidance, predict
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.memory import Parts, bytes_of
from fairdiff.training.step import Batch, training_step

PROMPTS = ["a photo of the face of a nurse", "a chef"]


@pytest.fixture(scope="module", params=[sd3, flux], ids=["sd3", "flux"])
def folder(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("t5"))


def counted(model) -> list[int]:
    """Return a list that receives the number of texts of each pass of T5."""
    passes = []
    model.t5.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    return passes


def test_it_runs_once_for_each_text_of_a_training(folder):
    """Steps, reference images, validation and the unconditional branch need the same texts."""
    trainee = make_trainee(load_model(folder), "lora_unet")
    passes = counted(trainee.model)
    for seed, prompt in enumerate([PROMPTS[0], *PROMPTS]):
        training_step(trainee, Batch(prompt, [0, 1, 2, 3], 2, seed, torch.Generator().manual_seed(0)))
        trainee.model.generator(3.0, 2)(prompt, torch.zeros(1, *trainee.model.latent_shape))
    assert passes == [1] * len({*PROMPTS, ""})


def test_what_is_kept_is_what_it_says(folder, monkeypatch):
    """This also holds after texts were evicted, and after callers changed the returned tensors."""
    monkeypatch.setattr(t5, "KEPT_TEXTS", 2)
    model = load_model(folder)
    passes, first = counted(model), {}
    for text in [*PROMPTS, *PROMPTS, "", *PROMPTS]:
        with torch.no_grad():
            found = model.encode(text)
        assert torch.equal(found, first.setdefault(text, found.clone()))
        assert found[0, -2].any() and not found.zero_().any()  # the last of T5's words, of a copy
    assert len(passes) == 2 + 1 + 2  # "" took the place of the one that was read longest ago, and so on


def test_another_precision_forgets_what_was_read_in_the_old_one(folder):
    model, fresh = load_model(folder), load_model(folder)
    before = model.encode(PROMPTS[0])
    for each in (model, fresh):
        each.lower_precision(torch.bfloat16)
    after = model.encode(PROMPTS[0])
    assert torch.equal(after, fresh.encode(PROMPTS[0])) and not torch.equal(after, before)


def test_it_stays_with_the_processor_and_is_not_counted_on_another_device(folder):
    """The meta device has shapes and no values, so moving T5 there would lose its weights."""
    model = load_model(folder)
    look = Parts(model, lambda image: None, images=2, steps=2)
    here, words = look.held, model._t5_words(PROMPTS[0])
    model.to("meta")
    there = Parts(model, lambda image: None, images=2, steps=2)
    assert here - there.held == bytes_of([model.t5]) > 0
    guidance = Guidance(*model.encode_pair(PROMPTS[1]), 3.0)
    noise = torch.zeros(2, *model.latent_shape, device="meta")
    assert predict(model.unet, noise, torch.tensor(500.0, device="meta"), guidance).shape == noise.shape
    assert {p.device.type for p in model.t5.parameters()} == {"cpu"} and torch.equal(model._t5_words(PROMPTS[0]), words)
    moved = {p.device.type for m in (*model.clips, model.unet, model.vae) for p in m.parameters()}
    assert moved == {"meta"} == {text.device.type for text in (guidance.cond, guidance.uncond)}
