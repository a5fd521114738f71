"""Laws of localising: components add up to the adapter, scores are gradients by gates, sparse adapters are plain LoRA."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import make_trainee

from fairdiff.diffusion.adapters import Lora
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.lora_files import Factors, read_lora, shapes_of
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.studies.localize import (
    components,
    first,
    gate_gradients,
    kept,
    orders,
    overlap,
    split,
)
from fairdiff.training.step import Batch, training_step


def factors(*shape, rank=3, alpha=2.0, seed=0):
    out, *rest = shape
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, *[1] * (len(rest) - 1), generator=generator)
    return Factors(torch.randn(rank, *rest, generator=generator), up, alpha)


LAYERS = {"unet": {"a": factors(7, 5), "conv": factors(6, 4, 3, 3, seed=1)}, "text_encoder": {"q": factors(8, 8, seed=2)}}


def test_all_components_together_are_the_adapter():
    splits = split(LAYERS)
    whole = kept(splits, components(splits))
    for part, some in LAYERS.items():
        for layer, own in some.items():
            assert torch.allclose(whole[part][layer].delta(), own.delta(), atol=1e-5)
            assert whole[part][layer].down.shape == own.down.shape and whole[part][layer].up.shape == own.up.shape


def test_components_are_orthogonal_so_that_their_squared_sizes_add_up():
    splits = split(LAYERS)
    sizes = components(splits)
    for part, layer, i in sizes:
        (alone,) = (f.delta() for some in kept(splits, [(part, layer, i)]).values() for f in some.values())
        assert alone.norm() == pytest.approx(sizes[part, layer, i], rel=1e-5)
    for part, some in LAYERS.items():
        for layer, own in some.items():
            squares = sum(s**2 for (p, q, _), s in sizes.items() if (p, q) == (part, layer))
            assert squares**0.5 == pytest.approx(float(own.delta().norm()), rel=1e-5)


def test_a_subset_has_a_rank_a_component_and_no_empty_layer():
    splits = split(LAYERS)
    some = kept(splits, [("unet", "a", 2), ("unet", "a", 0)])
    assert {part: {n: f.rank for n, f in layers.items()} for part, layers in some.items()} == {"unet": {"a": 2}}
    assert kept(splits, []) == {}


@pytest.fixture
def learnt(tiny_folder):
    """A trainee whose LoRA has moved, and what a step leaves in it."""
    trainee = make_trainee(load_model(tiny_folder), "lora_both", image=None, face=None)
    for p in trainee.adapter.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    return trainee


@pytest.fixture
def splits(learnt, tiny_folder, tmp_path):
    """Its components, from the file it saves."""
    model = load_model(tiny_folder)
    learnt.adapter.save(tmp_path)
    shapes = shapes_of({"unet": model.unet, "text_encoder": model.text_encoder})
    return split(read_lora(tmp_path / "pytorch_lora_weights.safetensors", shapes))


def test_scores_are_the_gradient_of_the_loss_by_a_gate_before_each_component(learnt, splits):
    training_step(learnt, Batch("a photo of the face of a nurse", list(range(6)), 3, 0, torch.Generator().manual_seed(0)))
    found = gate_gradients(learnt.adapter, splits)
    assert found.keys() == components(splits).keys()
    checked = 0
    for part, module in learnt.adapter.modules.items():
        for name, layer in module.named_modules():
            one = splits.get((part, name.removeprefix("text_model.")))
            if one is None or layer.lora_B["default"].weight.grad is None:
                continue
            a, b = (factor["default"].weight.detach().double() for factor in (layer.lora_A, layer.lora_B))
            grad = layer.lora_B["default"].weight.grad.double()
            gates = [found[part, name.removeprefix("text_model."), i] for i in range(len(one.sizes))]
            assert sum(gates) == pytest.approx(float((grad * b).sum()), rel=1e-3, abs=1e-9)  # all at once: a scale of B
            # dL/dB = c G A', so G v = dL/dB a / c where v = A' a
            along = grad @ torch.linalg.lstsq(a.T, one.down.T).solution / layer.scaling["default"]
            assert gates == pytest.approx((one.sizes * (one.up * along).sum(0)).tolist(), rel=1e-2, abs=1e-8)
            checked += any(gates)
    assert checked > 5


def test_a_sparse_adapter_is_a_plain_lora_of_the_same_images(splits, tiny_folder, tmp_path):
    chosen = first(orders(components(splits), components(splits), 0)["size"], 0.3)
    model = load_model(tiny_folder)
    sparse = Lora.of_files(model, kept(splits, chosen))
    (tmp_path / "sparse").mkdir()
    sparse.save(tmp_path / "sparse")
    noise = initial_noise("a nurse", 0, range(2), model.latent_shape)
    ours = model.generator(2.0, 3)("a nurse", noise)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path / "sparse")
    again = load_model(tiny_folder)
    plain = copy.copy(again)
    plain.unet, plain.text_encoder = pipe.unet, pipe.text_encoder
    assert torch.allclose(plain.generator(2.0, 3)("a nurse", noise), ours, atol=1e-4)
    assert not torch.allclose(again.generator(2.0, 3)("a nurse", noise), ours, atol=1e-3)


def test_orders_are_what_they_say_and_chance_is_seeded():
    sizes = {("unet", "a", i): float(i) for i in range(10)}
    scores = {c: -s for c, s in sizes.items()}
    found = orders(sizes, scores, 3)
    assert found["size"][0] == ("unet", "a", 9) and found["score"][0] == ("unet", "a", 0)
    assert sorted(found["random"]) == sorted(sizes) and found["random"] == orders(sizes, scores, 3)["random"]
    assert found["random"] != orders(sizes, scores, 4)["random"]
    assert len(first(found["size"], 0.25)) == 2 and len(first(found["size"], 0.001)) == 1


def test_overlap_is_one_of_an_order_with_itself_and_chance_between_independent_ones():
    names = [("unet", f"layer{i}", j) for i in range(20) for j in range(4)]
    assert overlap(names, names, 0.2)[0] == 1
    assert overlap(names, names[::-1], 0.2)[0] == 0
    shuffled = orders(dict.fromkeys(names, 1.0), dict.fromkeys(names, 1.0), 1)["random"]
    found, chance = overlap(names, shuffled, 0.25)
    assert 0 < chance < 0.5 and found == pytest.approx(chance, abs=0.15)
