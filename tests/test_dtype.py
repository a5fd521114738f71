"""model.dtype: the frozen parts in bfloat16, the adapter in float32; in float32 everything is as without the option."""

import pytest
import torch
from tiny import make_trainee

from fairdiff.adapters import CastLinear
from fairdiff.models import fingerprint, load_model
from fairdiff.sampling import call_unet, initial_noise
from fairdiff.step import Batch, training_step


def gradient(folder, kind, dtype):
    model = load_model(folder)
    model.lower_precision(dtype)
    trainee = make_trainee(model, kind)
    for p in trainee.adapter.parameters():
        p.data.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    training_step(trainee, Batch("a nurse", list(range(6)), 3, 0, torch.Generator().manual_seed(0)))
    assert {p.grad.dtype for p in trainee.adapter.parameters()} == {torch.float32}
    return model, torch.cat([p.grad.flatten() for p in trainee.adapter.parameters()])


def test_float32_is_bit_for_bit_what_it_was(tiny_folder):
    model = load_model(tiny_folder)
    before = fingerprint(model.unet, model.vae)
    model.lower_precision(torch.float32)
    assert fingerprint(model.unet, model.vae) == before
    noise, text = initial_noise("a", 0, range(2), model.latent_shape), model.encode("a").expand(2, -1, -1)
    direct = model.unet(noise, torch.tensor(500), encoder_hidden_states=text).sample
    assert torch.equal(call_unet(model.unet, noise, torch.tensor(500), text), direct)
    make_trainee(model, "lora_both")
    assert not any(isinstance(m, CastLinear) for m in model.unet.modules())


@pytest.mark.parametrize("kind", ["soft_tokens", "lora_both"])
def test_a_step_in_bfloat16_has_about_the_same_gradient(tiny_folder, kind):
    _, exact = gradient(tiny_folder, kind, torch.float32)
    model, rough = gradient(tiny_folder, kind, torch.bfloat16)
    assert model.unet.dtype == model.vae.dtype == torch.bfloat16 and model.text_encoder.dtype == torch.float32
    assert 0 < (exact - rough).norm() / exact.norm() < 0.3
