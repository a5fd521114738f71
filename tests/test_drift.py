"""Drift: tuning is ordinary training of the LoRA alone, and a half-life is that of a known decay."""

import numpy as np
import pytest
import torch

from fairdiff.diffusion.adapters import Lora
from fairdiff.diffusion.denoise import call_unet
from fairdiff.diffusion.load import load_model
from fairdiff.studies import drift

TEXTS = [("a photo of a chef", "a photo of a chef"), ("a photo of a man", "a photo of a person")]


def new_lora(model) -> Lora:
    return Lora(model, ["unet"], 2, 2, torch.Generator().manual_seed(0))


def test_the_loss_is_the_models_own_error_on_noise_and_on_velocity(tiny_model):
    pictures = drift.generated(tiny_model, TEXTS, 2, 2.0, 2, 0)
    assert pictures.captions == ("a photo of a chef",) * 2 + ("a photo of a person",) * 2
    latent, times = pictures.latent_NCHW, None
    for kind in ("epsilon", "v_prediction"):
        tiny_model.scheduler.register_to_config(prediction_type=kind)
        found = drift.denoising_loss(tiny_model, latent, pictures.captions, torch.Generator().manual_seed(1))
        draw = torch.Generator().manual_seed(1)
        times = torch.randint(1000, (4,), generator=draw)
        noise = torch.randn(latent.shape, generator=draw)
        total = 0.0
        for i, t in enumerate(times):  # one by one, as diffusers adds noise and takes velocities
            a = tiny_model.scheduler.alphas_cumprod[t]
            z = a.sqrt() * latent[i] + (1 - a).sqrt() * noise[i]
            wanted = noise[i] if kind == "epsilon" else a.sqrt() * noise[i] - (1 - a).sqrt() * latent[i]
            said = call_unet(tiny_model.unet, z[None], t[None], tiny_model.encode(pictures.captions[i]))[0]
            total += float((said - wanted).square().mean()) / 4
        assert found.item() == pytest.approx(total, rel=1e-5), kind


@pytest.mark.slow
def test_tuning_learns_its_pictures_in_the_lora_alone_and_the_same_way_each_time(tiny_folder):
    states, losses = [], []
    for _ in range(2):
        model = load_model(tiny_folder)
        pictures = drift.generated(model, TEXTS, 2, 2.0, 2, 0)
        lora = new_lora(model)
        base = {n: p.clone() for n, p in model.unet.named_parameters() if ".lora_" not in n}
        losses = []
        drift.tune(model, lora, pictures, drift.Tuning(30, 2e-2, 4), losses.append)
        assert all(torch.equal(p, base[n]) for n, p in model.unet.named_parameters() if ".lora_" not in n)
        states.append([p.detach().clone() for p in lora.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True)) and len(losses) == 30
    assert np.mean(losses[-8:]) < np.mean(losses[:8])
    kept = [p.detach().clone() for p in lora.parameters()]
    drift.tune(model, lora, pictures, drift.Tuning(0, 1.0, 4))
    assert all(torch.equal(a, b) for a, b in zip(kept, lora.parameters(), strict=True))


def test_pictures_join_for_a_replay(tiny_model):
    one, two = (drift.generated(tiny_model, [text], 1, 2.0, 2, 0) for text in TEXTS)
    both = one + two
    assert both.captions == one.captions + two.captions and both.latent_NCHW.shape[0] == 2


def test_the_half_life_of_an_exponential_loss_is_its_own():
    steps = np.arange(0, 200, 2)
    base, fair, life = np.array([0.9, 0.7, 0.8]), np.array([0.3, 0.1, 0.2]), 37.0
    bias = fair + (base - fair) * (1 - 0.5 ** (steps[:, None] / life))
    found = drift.half_life_of(steps, bias, base, 0)
    assert found == pytest.approx(np.full(len(found), life), abs=0.02)


def test_a_loss_that_is_not_seen_is_endless_and_one_of_nothing_undefined():
    steps = [0, 10, 20]
    parts = np.array([[0.0, 0.3, 0.4], [0.0, 0.4, 0.6], [0.6, 0.2, 0.9], [0.0, 1.0, 0.2]])
    assert drift.half_life(steps, parts).tolist() == pytest.approx([np.inf, 15.0, 0.0, 5.0])
    same = drift.lost(np.array([[0.5, 0.6]]), np.array([0.5]), np.array([0.5]))
    assert np.isnan(drift.half_life([0, 1], same)).all()
