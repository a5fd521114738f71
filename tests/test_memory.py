"""The memory plan: micro-batches of any size give the same step, and the plan agrees with torch's profiler."""

from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny import composed, make_trainee
from tiny_flow import flux, sd3
from torch.profiler import ProfilerActivity, profile

from classifiers.detect import MTCNNDetector
from fairdiff import builder, fingerprint
from fairdiff.builder.audit import audit_pieces, build_audit
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.memory import GIB, USED, Need, Parts, Pieces, count, peak_bytes, plan_pieces
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.plan import make_plan
from fairdiff.training.judges import compare_judges
from fairdiff.training.step import Batch, label_batch, sample_batch, training_step

WHOLE = Pieces(100, 100, 100)
PIECES = [Pieces(1, 1, 1), Pieces(3, 2, 4, frozenset({"unet", "vae"}))]


def step(folder, kind, pieces):
    """Return images, latents, labels and the gradient of one step with these micro-batches."""
    model = load_model(folder)
    trainee = make_trainee(model, kind, decode_batch=pieces.decode, replay_batch=pieces.replay)
    trainee.originals.at_once = pieces.sample
    pieces.apply(model)
    for p in trainee.adapter.parameters():
        p.data.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))

    def batch():
        return Batch("a nurse", list(range(5)), 2, 0, torch.Generator().manual_seed(0))

    final = sample_batch(trainee, batch()).trajectory.final
    faces, part, _ = label_batch(trainee, batch(), final)
    training_step(trainee, batch())
    grad = torch.cat([p.grad.flatten() for p in trainee.adapter.parameters()])
    return final, torch.cat([f.image_BCHW for f in faces]), part, grad


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["soft_tokens", "lora_both"])
def test_pieces_of_any_size_give_the_same_images_labels_and_gradient(tiny_folder, kind):
    latents, images, part, grad = step(tiny_folder, kind, WHOLE)
    assert grad.norm() > 0 and part.kept["gender"].any()
    for pieces in PIECES:
        other_latents, other_images, other, parted = step(tiny_folder, kind, pieces)
        assert torch.allclose(latents, other_latents, atol=1e-5) and torch.allclose(images, other_images, atol=1e-5)
        assert torch.equal(part.labels["gender"], other.labels["gender"])
        assert torch.equal(part.kept["gender"], other.kept["gender"])
        assert (grad - parted).norm() / grad.norm() <= 1e-5


def test_no_more_is_done_at_once_than_planned(tiny_folder):
    model, rows = load_model(tiny_folder), []
    trainee = make_trainee(model, "lora_unet", decode_batch=2, replay_batch=5)
    Pieces(3, 2, 5).apply(model)
    for name, module in (("unet", model.unet), ("vae", model.vae.decoder)):
        module.register_forward_pre_hook(
            lambda _, args, name=name: rows.append((name, torch.is_grad_enabled(), len(args[0])))
        )
    training_step(trainee, Batch("a nurse", list(range(7)), 3, 0, torch.Generator().manual_seed(0)))
    most = {key: max(n for *found, n in rows if tuple(found) == key) for key in {row[:2] for row in rows}}
    assert most == {("unet", False): 2 * 3, ("vae", False): 2, ("unet", True): 5, ("vae", True): 2}


def wide_model(folder):
    """Return the tiny model with wider networks and 32x32 latents, whose activations dominate the memory."""
    model = load_model(folder)
    torch.manual_seed(0)
    model.unet = UNet2DConditionModel(
        sample_size=32, layers_per_block=1, block_out_channels=(32, 64), cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip
    model.vae = AutoencoderKL(
        block_out_channels=(16, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, sample_size=128,
    )  # fmt: skip
    for module in (model.unet, model.vae):
        module.requires_grad_(False).eval()
    return model


def profiled_peak(run) -> int:
    """Return the peak bytes of torch's CPU allocator, measured by its profiler, with workspaces of operations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def at_full_side(parts: Parts) -> Parts:
    """Return the same parts with latents of full size, as in a step."""

    class Full(Parts):
        half = property(lambda self: self.model.latent_shape)

    return Full(parts.model, parts.look, parts.images, parts.steps)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["soft_tokens", "lora_unet"])
@pytest.mark.parametrize("checkpointed", [frozenset(), frozenset({"unet", "vae"})])
def test_what_is_counted_at_half_the_side_is_what_the_profiler_sees_at_the_whole(tiny_folder, kind, checkpointed):
    model = wide_model(tiny_folder)
    make_trainee(model, kind)
    Pieces(100, 100, 100, checkpointed).apply(model)
    parts = Parts(model, lambda image: image.square().mean(), images=4, steps=2)
    whole = at_full_side(parts)
    for part in ("sample", "decode", "replay"):
        found = profiled_peak(partial(getattr(whole, part), 3))
        assert 0.9 < count(getattr(parts, part), 4).bytes(3) / found < 1.1, part


def test_a_checkpointed_network_needs_less_and_views_need_nothing(tiny_folder):
    model = wide_model(tiny_folder)
    parts, units = Parts(model, lambda image: None, images=4, steps=2), []
    for checkpointed in (frozenset(), frozenset({"unet", "vae"})):
        Pieces(1, 1, 1, checkpointed).apply(model)
        units.append([count(run).unit for run in (parts.replay, parts.decode)])
    assert all(less < 0.6 * more for more, less in zip(*units, strict=True))
    assert peak_bytes(lambda: torch.zeros(10).view(2, 5).t().add_(1)) == 40
    assert peak_bytes(lambda: [torch.zeros(10).sum() for _ in range(5)]) == 60


@pytest.mark.slow
def test_the_pieces_are_the_largest_that_fit_and_all_come_from_one_number(tiny_folder):
    model = wide_model(tiny_folder)
    make_trainee(model, "lora_unet")
    parts, found = Parts(model, lambda image: image.clone(), images=4, steps=2), []
    held = 1000 + parts.held
    for gb in (0.01, 0.2):
        plan = plan_pieces(parts, gb, 1000)
        room = USED * gb * GIB
        assert plan.peak <= room or min(plan.sample, plan.decode, plan.replay) == 1
        Pieces(1, 1, 1, plan.checkpointed).apply(model)
        need = count(parts.replay, 4)
        assert held + need.bytes(plan.replay + 1) > room
        assert plan.replay == 1 or held + need.bytes(plan.replay) <= room
        found.append(plan)
    assert found[0].checkpointed == {"unet", "vae"} and not found[1].checkpointed
    assert found[1] == plan_pieces(parts, 0.2, 1000)  # so that a resumed run is bit-equal
    assert (found[0].sample, found[0].decode, found[0].replay) == (1, 1, 1)
    assert min(found[1].sample, found[1].replay) > 1
    assert Need(10, 5).most(9) == 0 and Need(10, 5).most(24) == 2


@pytest.mark.parametrize("make", [sd3, flux])
def test_transformers_are_counted_at_sizes_whose_half_is_odd(make, tmp_path):
    """24 pixels are 6 latents, and half of that is not a whole number of patches."""
    model = load_model(make(tmp_path))
    model.size = 24, 16
    make_trainee(model, "lora_unet")
    parts = Parts(model, lambda image: image.clone(), images=2, steps=2)
    assert parts.half == (4, 2, 2)
    plan = plan_pieces(parts, 1, 0)
    assert min(plan.sample, plan.decode, plan.replay) > 1


@pytest.mark.slow
def test_weights_are_hashed_once_a_start(monkeypatch):
    config, found = composed("cache=/tmp/none", "adapter=lora_both"), []
    read = fingerprint.of_modules
    monkeypatch.setattr(fingerprint, "of_modules", lambda *modules: found.extend(modules) or read(*modules))
    plan, model = make_plan(config), builder.build_model(config)
    perception = builder.build_perception(config, plan)
    key = builder.training_fingerprint(config, plan, model, perception)
    audit = build_audit(config, plan, model, key, perception.classifier)
    trainee = builder.build_trainee(config, plan, model, perception)
    compare_judges(trainee, audit.measurer.judge, plan.train[:1], 1)
    frozen = [m for m in found if not isinstance(m, MTCNNDetector)]  # whose 2 MB belong to training and to the audit
    assert {model.unet, perception.classifier, audit.measurer.judge, perception.embedder} <= {*frozen}
    assert len(frozen) == len({*frozen})


@pytest.mark.slow
def test_the_embedded_model_works_in_the_pieces_of_memory_gb(monkeypatch):
    """Without memory_gb, it uses micro_batch."""
    for overrides, planned in (["micro_batch=4"], False), (["memory_gb=2"], True):
        config = composed(*overrides, "cache=null", "adapter=lora_both")
        plan, model = make_plan(config), builder.build_model(config)
        perception = builder.build_perception(config, plan)
        audit = build_audit(config, plan, model, "key", None)
        trainee = builder.build_trainee(config, plan, model, perception)
        method = trainee.method
        sizes = (model.sample_batch, model.decode_batch, method.replay_batch)
        assert method.decode_batch == model.decode_batch
        assert all(p.grad is None for p in trainee.adapter.parameters())
        if planned:
            assert min(sizes) > 12 and audit.plan.batch_size > 12
            assert audit.plan.batch_size == audit_pieces(config, builder.build_model(config), audit.measurer).sample
        else:
            assert sizes == (12, 4, 8) and audit.plan.batch_size == 12
        image = model.generator(1.5, 2)("a nurse", initial_noise("a nurse", 0, [0], model.latent_shape))
        assert image.isfinite().all()
