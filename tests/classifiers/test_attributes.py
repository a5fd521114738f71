import json

import pytest
import torch
from tiny_judges import change_tensor
from torch.nn import functional as F

from classifiers.attributes import MEAN, STD, AttributeNet, load_attribute_net, save_attribute_net

ATTRIBUTES = {"gender": ["female", "male"], "race": ["White", "Black", "Indian", "Asian"]}


def config(**changes) -> dict:
    kwargs = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "kernel_sizes": 3}
    whole = {
        "architecture": "convnext_atto",
        "kwargs": kwargs,
        "image_size": 32,
        "mean": list(MEAN),
        "std": list(STD),
        "attributes": ATTRIBUTES,
    }
    return whole | changes


@pytest.fixture
def net() -> AttributeNet:
    torch.manual_seed(0)
    return AttributeNet(config()).eval()


@pytest.fixture
def folder(net, tmp_path):
    save_attribute_net(net, tmp_path / "judge")
    return tmp_path / "judge"


@pytest.fixture
def crops() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_loaded_judge_is_the_rounded_net_frozen_in_single_precision(net, folder, crops):
    loaded = load_attribute_net(folder)
    halved = net.half().float()
    for name, logits in halved(crops).items():
        assert logits.shape == (3, len(ATTRIBUTES[name]))
        assert torch.equal(loaded(crops)[name], logits)
    assert not loaded.training and {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.attributes == {name: tuple(classes) for name, classes in ATTRIBUTES.items()}


def test_any_crop_size_is_resized_inside_and_no_crop_gives_no_row(net, crops):
    large = crops.repeat_interleave(3, 2).repeat_interleave(3, 3)
    by_hand = F.interpolate(large, (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(net(large)["race"], net(by_hand)["race"])
    assert net(crops[:0])["race"].shape == (0, 4)


def test_mean_and_std_are_applied_per_channel(net, crops):
    other = AttributeNet(config(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])).eval()
    other.load_state_dict(net.state_dict())
    moved = (crops - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(other(crops)["race"], net(moved * 0.25 + 0.5)["race"], atol=1e-5, rtol=1e-4)


def test_gradient_reaches_the_pixels_of_its_own_row_only(net, crops):
    net.requires_grad_(False)
    crops.requires_grad_()
    net(crops)["gender"][1].sum().backward()
    assert (crops.grad.abs().sum((1, 2, 3)) > 0).tolist() == [False, True, False]


def test_other_classes_than_asked_are_an_error_naming_the_key(folder):
    load_attribute_net(folder, {"gender": ("female", "male")})
    with pytest.raises(ValueError, match=r"config.json: attributes.gender is \['female', 'male'\], requested"):
        load_attribute_net(folder, {"gender": ("male", "female")})
    with pytest.raises(ValueError, match="attributes.age"):
        load_attribute_net(folder, {"age": ("young", "old")})


def rewrite(folder, **changes):
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda f: rewrite(f, std=None), "config.json: key 'std' is absent"),
        (lambda f: rewrite(f, sdt=1), "config.json: key 'sdt' is unknown"),
        (lambda f: rewrite(f, architecture="convnext_femtoo"), "config.json: timm cannot build it"),
        (lambda f: rewrite(f, kwargs={"no_such": 1}), "config.json: timm cannot build it"),
        (lambda f: rewrite(f, attributes={"gender": ["female", "male"]}), "trunk.head.fc.* has shape"),
        (
            lambda f: rewrite(f, kwargs={"depths": [2, 1, 1, 1], "dims": [8] * 4, "kernel_sizes": 3}),
            "key .* is missing",
        ),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: not JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json: not JSON"),
        (lambda f: rewrite(f, architecture=7), "config.json: architecture: found 7, allowed: the name of a timm"),
        (lambda f: rewrite(f, kwargs=[]), r"config.json: kwargs: found \[\], allowed: a mapping"),
        (lambda f: rewrite(f, kwargs={"depths": "many"}), "config.json: timm cannot build it"),
        (lambda f: rewrite(f, image_size="32"), 'config.json: image_size: found "32", allowed: a whole number above 0'),
        (lambda f: rewrite(f, image_size=0), "config.json: image_size: found 0"),
        (lambda f: rewrite(f, mean=0.5), "config.json: mean: found 0.5, allowed: three numbers"),
        (lambda f: rewrite(f, mean=[0.5, 0.5, float("nan")]), "config.json: mean: found .*NaN"),
        (lambda f: rewrite(f, std=[0.5, 0, 0.5]), "config.json: std: found .*, allowed: three numbers above 0"),
        (lambda f: rewrite(f, attributes=["gender"]), "config.json: attributes: found .*, allowed: name: .two or more"),
        (lambda f: rewrite(f, attributes={"gender": "female"}), "config.json: attributes: found"),
        (lambda f: rewrite(f, attributes={"gender": ["female", "female"]}), "config.json: attributes: found"),
        (lambda f: rewrite(f, attributes={"gender": [True, False]}), "config.json: attributes: found"),
        (
            lambda f: weight(f, lambda t: t * float("inf")),
            "model.safetensors: trunk.head.fc.bias holds NaN or infinity",
        ),
        (
            lambda f: weight(f, lambda t: t.to(torch.complex64)),
            "model.safetensors: trunk.head.fc.bias holds torch.complex64",
        ),
        (
            lambda f: weight(f, lambda t: (t * 9).to(torch.int8)),
            "model.safetensors: trunk.head.fc.bias holds torch.int8",
        ),
        (lambda f: weight(f, lambda t: t.sum()), r"trunk.head.fc.bias has shape \[\]"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
        (lambda f: truncate(f / "model.safetensors"), "model.safetensors: truncated"),
    ],
)
def test_a_spoilt_folder_is_one_line_naming_file_and_key(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        load_attribute_net(folder)
    assert "\n" not in str(error.value)


def weight(folder, change):
    change_tensor(folder / "model.safetensors", "trunk.head.fc.bias", change)


def test_a_network_that_reads_images_of_another_size_is_known_when_it_is_loaded(tmp_path):
    kwargs = {"img_size": 48, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    save_attribute_net(AttributeNet(config(architecture="vit_tiny_patch16_224", kwargs=kwargs)), tmp_path)
    with pytest.raises(ValueError, match="config.json: image_size: the network cannot read it .*32") as error:
        load_attribute_net(tmp_path)
    assert "\n" not in str(error.value)
    rewrite(tmp_path, image_size=48)
    load_attribute_net(tmp_path)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def test_weights_that_half_precision_cannot_hold_are_not_saved(net, tmp_path):
    net.trunk.head.fc.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match="trunk.head.fc.weight: not finite"):
        save_attribute_net(net, tmp_path / "judge")
    assert not (tmp_path / "judge").exists()
