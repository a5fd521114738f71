"""Laws of localising: components add up to the adapter, scores are gradients by gates, sparse adapters are plain LoRA."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from rich.console import Console
from tiny import make_trainee

from fairdiff.diffusion.adapters import Lora
from fairdiff.diffusion.load import load_model
from fairdiff.diffusion.lora_files import Factors, read_lora, shapes_of
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.errors import FairDiffError
from fairdiff.prompts import Prompt
from fairdiff.studies.localize import (
    common_places,
    components,
    first,
    gate_gradients,
    held_at_zero,
    kept,
    orders,
    overlap,
    split,
)
from fairdiff.studies.page import write_html
from fairdiff.training.step import Batch, training_step
from fairdiff.training.trainer import Schedule, train

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from harness.localize_page import kept_share, page  # noqa: E402


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


def test_overlap_is_one_of_an_order_with_itself_and_within_chance_of_independent_ones():
    names = [("unet", f"layer{i}", j) for i in range(20) for j in range(4)]
    shuffled = orders(dict.fromkeys(names, 1.0), dict.fromkeys(names, 1.0), 1)["random"]
    for same in (True, False):
        assert overlap(names, names, 0.2, same)[0] == 1
        assert overlap(names, names[::-1], 0.2, same)[0] == 0
        found, (low, high) = overlap(names, shuffled, 0.25, same)
        assert 0 < low <= found <= high < 0.5
    n, k = 80, 20  # of components: k^2 / n are in both by chance
    expected = (k * k / n) / (2 * k - k * k / n)
    low, high = overlap(names, shuffled, 0.25, True)[1]
    assert low < expected < high
    within = [(p, layer, (j + 1) % 4) for p, layer, j in names]  # others of the same layers
    assert overlap(names, within, 0.25, False)[0] == 1
    assert overlap(names[::4], within[::4], 1.0, True)[0] == 0


def record(effects):
    """What scripts/localize.py keeps: of each order and share the bias of four prompts before and after."""
    before = [0.9, 0.8, 0.7, 0.6]

    def point(share, kept):
        return {
            "share": share, "components": round(8 * share), "before": {"gender": before}, "floor": {"gender": 0.1},
            "after": {"gender": [b - kept * fall for b, fall in zip(before, (0.5, 0.4, 0.3, 0.4), strict=True)]},
            "dino": 0.9, "size": [4, 24],
        }  # fmt: skip

    points = {order: [point(*one) for one in some] for order, some in effects.items()}
    names = [["unet", f"up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_{k}", i] for k in "qv" for i in (0, 1)]
    names += [["text_encoder", "encoder.layers.0.mlp.fc1", i] for i in range(4)]
    return {
        "run": "outputs/<run>", "split": "validation", "settings": ["audit.prompts=4"], "batches": 2, "points": points,
        "components": [[*name, 1.0, 0.5 if name[0] == "unet" else 0.25] for name in names],
        "overlaps": [{"of": ["gender", "race"], "same": True, "rows": [[0.2, 0.5, [0.0, 0.1], 0.8]]}], "retrained": [],
    }  # fmt: skip


def test_the_share_of_the_effect_that_is_kept_is_one_of_the_whole_and_none_of_nothing():
    kept_of = record({"whole": [(1.0, 1.0)], "score": [(0.1, 0.0), (0.5, 0.95)], "size": [(0.5, -0.2)]})["points"]
    (whole,) = kept_of["whole"]
    assert kept_share(whole, whole, "gender") == (1, (pytest.approx(1), pytest.approx(1)))
    shares = [kept_share(p, whole, "gender")[0] for p in (*kept_of["score"], *kept_of["size"])]
    assert shares == pytest.approx([0, 0.95, -0.2])
    assert kept_share(whole, kept_of["score"][0], "gender") == (None, None)
    noisy = copy.deepcopy(whole)
    noisy["after"]["gender"] = [0.5, 0.3, 0.4, None]  # a prompt without a face counts in neither
    share, (low, high) = kept_share(noisy, whole, "gender")
    assert low < share < high and share == pytest.approx((0.4 + 0.5 + 0.3) / 1.2)


def test_the_page_names_the_smallest_adapter_that_keeps_the_effect(tmp_path):
    found = page(record({"whole": [(1.0, 1.0)], "score": [(0.25, 0.5), (0.5, 0.95)], "random": [(0.125, 0.99)]}), "python x")
    write_html(found, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text("utf-8")
    assert "first 50.0\u00a0% by score, 4 components" in html  # chance is no choice
    assert "<svg" in html and "up_blocks.1" in html and "nan" not in html.lower().replace("finance", "")
    rows = {tuple(row[:2]): row[2] for row in found.sections[2].rows}
    assert rows == {("unet up_blocks.1", "attn2.to_q"): "33.3\u00a0%", ("unet up_blocks.1", "attn2.to_v"): "33.3\u00a0%",
                    ("text_encoder layers.0", "mlp.fc1"): "33.3\u00a0%"}  # fmt: skip


PROMPTS = [Prompt(f"a photo of the face of a {s}", "occupation", s) for s in ("nurse", "chef", "carpenter")]


def trained(tiny_folder, folder, splits, chosen, steps=3):
    """The factors of a LoRA after some steps of the trainer with these components held at zero, from its file."""
    trainee = make_trainee(load_model(tiny_folder), "lora_both", image=None, face=None)
    schedule = Schedule(
        steps=steps, batch=8, noise_pool=8, sampler_steps=(3, 3), learning_rate=1e-2, weight_decay=0.01, ema=0.9, seed=0
    )
    with held_at_zero(trainee.adapter, splits, chosen):
        train(trainee, PROMPTS, schedule, folder, "same", Console(quiet=True))
    trainee.adapter.save(folder)
    model = load_model(tiny_folder)
    shapes = shapes_of({"unet": model.unet, "text_encoder": model.text_encoder})
    return trainee, read_lora(folder / "pytorch_lora_weights.safetensors", shapes)


@pytest.mark.slow
def test_what_is_held_at_zero_is_in_no_update_and_the_rest_still_learns(tiny_folder, tmp_path):
    _, plain = trained(tiny_folder, tmp_path / "plain", {}, [])
    splits = split(plain)
    chosen = first(orders(components(splits), components(splits), 0)["size"], 0.4)
    trainee, held = trained(tiny_folder, tmp_path / "held", splits, chosen)
    moved = 0
    for part, some in held.items():
        for layer, own in some.items():
            rows = [i for p, name, i in chosen if (p, name) == (part, layer)]
            delta, one = own.delta().double(), splits[part, layer]
            assert (one.up[:, rows].T @ delta).abs().max() < 1e-6 if rows else True
            assert (delta @ one.down[rows].T).abs().max() < 1e-6 if rows else True
            moved += bool(delta.norm() > 1e-4)
            if rows:  # and without this it would have been there
                assert (one.up[:, rows].T @ plain[part][layer].delta().double()).abs().max() > 1e-4
    assert moved > 5
    assert not any("parametrizations" in name for m in trainee.adapter.modules.values() for name, _ in m.named_modules())


@pytest.mark.slow
def test_training_with_components_held_goes_on_as_if_it_had_not_stopped(tiny_folder, tmp_path):
    _, plain = trained(tiny_folder, tmp_path / "plain", {}, [], steps=1)
    splits = split(plain)
    chosen = list(components(splits))[::2]
    _, once = trained(tiny_folder, tmp_path / "once", splits, chosen, steps=3)
    trained(tiny_folder, tmp_path / "twice", splits, chosen, steps=2)
    _, twice = trained(tiny_folder, tmp_path / "twice", splits, chosen, steps=3)
    for part, some in once.items():
        for layer, own in some.items():
            assert torch.equal(own.delta(), twice[part][layer].delta())


def test_held_components_that_the_adapter_has_not_are_refused(learnt):
    with pytest.raises(FairDiffError, match="adapter: has no layer unet nowhere"):
        with held_at_zero(learnt.adapter, {}, [("unet", "nowhere", 0)]):
            pass


def test_updates_have_all_layers_in_common_with_themselves_and_none_with_those_of_others():
    sizes = {("unet", "a", 0): 3.0, ("unet", "a", 1): 4.0, ("unet", "b", 0): 5.0}
    assert common_places(sizes, {c: 7 * s for c, s in sizes.items()}) == pytest.approx(1)
    assert common_places(sizes, {("text_encoder", "a", 0): 1.0}) == 0
    assert common_places(sizes, {("unet", "b", 0): 2.0}) == pytest.approx(0.5)


def test_another_way_is_found_where_retraining_brings_the_effect_back():
    kept_of = record({"whole": [(1.0, 1.0)], "score": [(0.25, 0.2), (0.25, 0.9)]})
    removed, anew = kept_of["points"]["score"]
    kept_of["points"].pop("score")
    row = {"order": "score", "share": 0.25, "components": 2, "removed": removed, "retrained": anew, "common": 0.5}
    kept_of["retrained"] = [row, row | {"order": "random", "removed": anew, "retrained": removed}]
    (section,) = [s for s in page(kept_of, "python x").sections if s.title.endswith("another way?")]
    first_row, second = section.rows
    space = "\u00a0%"
    assert first_row[:2] == [f"first 25.0{space} by score", "2"] and first_row[5] == "yes" and second[5] == "no"
    assert first_row[2:5] == [f"{v}{space} [{v}{space}, {v}{space}]" for v in ("20.0", "90.0", "70.0")]
    assert second[0] == f"first 25.0{space} at random" and second[4].startswith("−70.0")
    overlap_rows = page(kept_of, "python x").sections[-1].rows
    assert overlap_rows == [[f"20.0{space}", "0.500", "[0.000, 0.100]", "0.800"]]
