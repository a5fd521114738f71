"""model.dtype: the frozen parts in bfloat16, the adapter in float32; in float32 everything is as without the option."""

import pytest
import torch
from tiny import composed, make_trainee

from fairdiff import builder, fingerprint
from fairdiff.diffusion.adapters import CastLinear
from fairdiff.diffusion.denoise import Guidance, call_unet
from fairdiff.diffusion.half import scaled_replay
from fairdiff.diffusion.load import fast_dtype, load_model
from fairdiff.diffusion.sampling import Trajectory, Upstream, initial_noise, replay
from fairdiff.plan import make_plan
from fairdiff.training.step import Batch, training_step


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
    before = fingerprint.of_modules(model.unet, model.vae)
    model.lower_precision(torch.float32)
    assert fingerprint.of_modules(model.unet, model.vae) == before
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


@pytest.mark.parametrize("kind", ["soft_tokens", "lora_both"])
def test_a_step_in_float16_has_about_the_same_gradient_in_float32(tiny_folder, kind):
    _, exact = gradient(tiny_folder, kind, torch.float32)
    model, rough = gradient(tiny_folder, kind, torch.float16)
    assert model.unet.dtype == torch.float16 and model.vae.dtype == model.text_encoder.dtype == torch.float32
    assert 0 < (exact - rough).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("size,gain", [(1.0, 1.0), (1e-9, 1.0), (1e9, 1.0), (1.0, 5e5)])
def test_the_replay_in_float16_loses_neither_small_gradients_nor_large_ones(tiny_folder, size, gain):
    """gain: factor of the last layer, with which the first scale overflows and the replay is repeated."""
    found = []
    for dtype in (torch.float32, torch.float16):
        model = load_model(tiny_folder)
        model.unet.conv_out.weight.mul_(gain)
        model.lower_precision(dtype)
        adapter = make_trainee(model, "lora_unet").adapter
        text = Guidance(*(t.detach().requires_grad_() for t in model.encode_pair("a")), 2.0)
        latent = initial_noise("a", 0, range(2), model.latent_shape)
        upstream = Upstream(size * 1e-3 * latent, torch.ones(1), torch.zeros(2, 1, dtype=torch.long))
        run = scaled_replay if dtype == torch.float16 else replay
        text.cond.grad = torch.full_like(text.cond, size * gain)  # what is there stays
        run(model.unet, Trajectory([latent], torch.tensor([500]), latent), text, upstream, micro_batch=2)
        leaves = [text.cond.grad - size * gain, text.uncond.grad]
        leaves += [p.grad for p in adapter.parameters() if p.grad is not None]
        found.append(torch.cat([leaf.flatten() for leaf in leaves]))
    exact, rough = found
    assert rough.dtype == torch.float32 and 0 < (exact - rough).norm() / exact.norm() < 0.02


def test_sampling_computes_as_the_replay_does_where_less_is_held(tiny_folder):
    """Sampling and replay agree bit for bit: autocast is not used for weights that already have the precision."""
    for dtype in (torch.bfloat16, torch.float16):
        model = load_model(tiny_folder)
        model.sampling_dtype = dtype
        model.lower_precision(dtype)
        guidance = Guidance(*(t.detach() for t in model.encode_pair("a")), 1.0)
        trajectory = model.sample(guidance, initial_noise("a", 0, range(2), model.latent_shape), 2)
        seen = []
        hook = model.unet.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.sample.float()))
        model.sample(guidance, initial_noise("a", 0, range(2), model.latent_shape), 2)
        hook.remove()
        again = call_unet(model.unet, trajectory.inputs[1], trajectory.timesteps[1], guidance.cond.expand(2, -1, -1))
        assert torch.equal(seen[1], again)


def test_judges_multiply_in_the_models_precision_and_answer_in_float32():
    """The embedded judges have about the same outputs and image gradients in both precisions."""
    image = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = composed(f"model.dtype={dtype}", "detector=whole")
        perception = builder.build_perception(config, make_plan(config))
        assert perception.dtype == getattr(torch, dtype)
        pixels = image.clone().requires_grad_()
        seen = perception.classify_faces(pixels)
        answers = [seen.logits["gender"], *perception.features(pixels), perception.embed(perception.align(seen))]
        assert {a.dtype for a in answers} == {torch.float32}
        (grad,) = torch.autograd.grad(answers[0][:, 0].sum(), pixels)
        found[dtype] = [*(a.detach() for a in answers), grad]
    for exact, rough in zip(found["float32"], found["bfloat16"], strict=True):
        assert 0 < (exact - rough).norm() / exact.norm() < 0.3


def test_photographs_are_trained_on_in_half_precision_where_the_device_has_it(monkeypatch):
    for able, wanted in (({"avx512_bf16": True}, "bfloat16"), ({}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        for overrides, dtype in (
            (["model=sd15", "model.device=cpu"], wanted),
            (["model=sdxl", "model.device=cpu", "model.dtype=float32"], "float32"),
            ([], "float32"),
        ):
            assert builder.precisions(composed(*overrides))[0] == getattr(torch, dtype)


@pytest.mark.parametrize(
    "able,wanted",
    [
        ({"avx2": True, "avx512_bf16": False, "l1d_cache_size": 32768}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"architecture": "arm64", "bf16": True}, "float32"),  # nobody has measured it there
    ],
)
def test_auto_is_bfloat16_only_where_the_processor_has_it(monkeypatch, able, wanted):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert fast_dtype("cpu") == wanted
    for requested, found in (("auto", wanted), ("float32", "float32"), ("bfloat16", "bfloat16")):
        config = composed(f"model.sampling_dtype={requested}")
        assert config.model.sampling_dtype == requested  # a run's identity does not know the processor
        assert builder.precisions(config) == (torch.float32, getattr(torch, found))
    assert composed().model.sampling_dtype == "auto"
    for held in ("bfloat16", "float16"):
        assert builder.precisions(composed(f"model.dtype={held}")) == (getattr(torch, held),) * 2


def test_a_runs_identity_is_the_same_on_a_device_that_holds_its_weights_otherwise(monkeypatch):
    """It depends on the files and the word `auto`, not on the resulting precision; the fingerprint of the model does."""
    config, found = composed("model.dtype=auto"), []
    plan = make_plan(config)
    for fast in ("float32", "bfloat16"):
        monkeypatch.setattr(builder.model, "fast_dtype", lambda device, fast=fast: fast)
        model, perception = builder.build_model(config), builder.build_perception(config, plan)
        assert model.unet.dtype == model.sampling_dtype == getattr(torch, fast)
        found.append((builder.training_fingerprint(config, plan, model, perception), model.fingerprint()))
    (one, here), (other, there) = found
    assert one == other and here != there


@pytest.mark.slow
def test_pictures_sampled_in_bfloat16_are_those_in_float32_whatever_the_batch():
    """The difference is a root mean square over an image in grey levels, for the embedded model."""
    prompt, pictures = "a photo of the face of a nurse, a person", {}
    for dtype in ("float32", "bfloat16"):
        model = builder.build_model(composed(f"model.sampling_dtype={dtype}"))
        noise = initial_noise(prompt, 0, range(4), model.latent_shape)
        for batch in (4, 2):
            generate = model.generator(1.5, 6)
            pictures[dtype, batch] = torch.cat([generate(prompt, part) for part in noise.split(batch)])

    def levels(a, b):
        return 255 * (pictures[a] - pictures[b]).square().flatten(1).mean(1).sqrt()

    between = levels(("float32", 4), ("bfloat16", 4))
    assert between.min() > 0 and between.median() < 1 and between.max() < 3
    assert levels(("float32", 4), ("float32", 2)).max() < 0.01
    assert levels(("bfloat16", 4), ("bfloat16", 2)).max() < 1


@pytest.mark.parametrize("kind", ["soft_tokens", "lora_both"])
def test_only_what_has_no_gradient_is_sampled_in_bfloat16(tiny_folder, kind):
    model = load_model(tiny_folder)
    model.sampling_dtype = torch.bfloat16
    trainee, seen = make_trainee(model, kind), []
    for module in (model.unet.conv_out, model.vae.decoder.conv_out):
        module.register_forward_hook(lambda _, args, out: seen.append((torch.is_grad_enabled(), out.dtype)))
    result = training_step(trainee, Batch("a nurse", list(range(4)), 3, 0, torch.Generator().manual_seed(0)))
    assert result.kept > 0
    assert set(seen) == {(False, torch.bfloat16), (True, torch.float32)}
    noise = initial_noise("a", 0, range(2), model.latent_shape)
    trajectory = model.sample(Guidance(*trainee.model.encode_pair("a"), 2.0), noise, 3)
    assert {z.dtype for z in [*trajectory.inputs, trajectory.final]} == {torch.float32}
