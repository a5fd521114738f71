"""Hugging Face judges on tiny random classifiers: the processor's own preprocessing, gradients, merged classes."""

import numpy as np
import pytest
import torch
from photos import piece
from PIL import Image
from tiny_judges import change_json, change_tensor, save_timm, save_vit
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    LevitImageProcessor,
    TimmWrapperForImageClassification,
    ViTForImageClassification,
    ViTImageProcessor,
)

from classifiers.hub import load_hub_classifier
from classifiers.pixels import processor_pixels

RACES = ["White", "Black", "Indian", "East Asian", "Southeast Asian", "Middle Eastern", "Latino_Hispanic"]
MAPPING = {
    "gender": {"female": ["Female"], "male": ["Male"]},
    "race": {
        "White": ["White", "Middle Eastern", "Latino_Hispanic"], "Black": ["Black"], "Indian": ["Indian"],
        "Asian": ["East Asian", "Southeast Asian"],
    },
}  # fmt: skip
CLASSES = {"gender": ("female", "male"), "race": ("White", "Black", "Indian", "Asian")}
PROCESSORS = {
    "vit": ViTImageProcessor(size={"height": 32, "width": 32}),
    "clip": CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    "convnext": ConvNextImageProcessor(size={"shortest_edge": 32}),
    "plain": ViTImageProcessor(size={"height": 32, "width": 24}, do_rescale=False, do_normalize=False, resample=3),
}


@pytest.fixture(scope="module")
def gender(tmp_path_factory):
    return save_vit(tmp_path_factory.mktemp("hub") / "gender", ["Female", "Male"])


@pytest.fixture(scope="module")
def race(tmp_path_factory):
    return save_vit(tmp_path_factory.mktemp("hub") / "race", RACES)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """One head that holds two attributes side by side."""
    return save_vit(tmp_path_factory.mktemp("hub") / "both", ["Female", "Male", *RACES])


@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocessing_is_that_of_the_models_own_processor(name, tmp_path):
    PROCESSORS[name].save_pretrained(tmp_path)
    image = piece(90, 70)[0]
    theirs = PROCESSORS[name](images=(image * 255).round().byte(), return_tensors="pt")["pixel_values"]
    ours = processor_pixels(str(tmp_path), True)(image[None])
    assert ours.shape == theirs.shape
    # they round to whole grey levels after resizing: at most about one level apart
    level = (1 if name == "plain" else 1 / 255) / min(processor_pixels(str(tmp_path), True).std)
    assert (ours - theirs).abs().max() <= 1.5 * level and (ours - theirs).abs().mean() <= 0.5 * level


TIMM = {"input_size": [3, 48, 48], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}


@pytest.mark.parametrize(
    "more",
    [
        {"interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"},
        {"interpolation": "bilinear", "crop_pct": 0.87, "crop_mode": "center"},  # 55 to 48: the margin is odd
        {"interpolation": "bicubic", "crop_pct": 0.8, "crop_mode": "squash"},
        {},
    ],
)
def test_a_timm_classifier_sees_what_its_configuration_declares(more, tmp_path):
    path = save_timm(tmp_path, ["Female", "Male"], **TIMM, **more)
    image = piece(90, 90)
    picture = Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())
    theirs = AutoImageProcessor.from_pretrained(path)(images=picture, return_tensors="pt")["pixel_values"]
    ours = processor_pixels(path, True)(image)
    assert ours.shape == theirs.shape and (ours - theirs).abs().mean() <= 0.5 / 255 / min(TIMM["std"])
    net = TimmWrapperForImageClassification.from_pretrained(path).eval()
    judge = load_hub_classifier(path, MAPPING, {"gender": CLASSES["gender"]})
    torch.testing.assert_close(judge(image)["gender"], net(pixel_values=theirs).logits, atol=0.03, rtol=0)
    assert (judge(image)["gender"] - net(pixel_values=image * 255).logits).abs().max() > 0.3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: change_json(f / "config.json", pretrained_cfg=...), "has no readable image processor"),
        (lambda f: change_json(f / "config.json", pretrained_cfg={}), "has no readable image processor"),
        (
            lambda f: change_json(f / "config.json", pretrained_cfg={"tag": "a1"}),
            "found no input_size in pretrained_cfg",
        ),
        (
            lambda f: change_json(f / "config.json", pretrained_cfg=TIMM | {"mean": None}),
            "found no mean in pretrained_cfg",
        ),
        (
            lambda f: change_json(f / "config.json", pretrained_cfg=TIMM | {"crop_mode": "border"}),
            "found crop_mode border",
        ),
        (
            lambda f: change_json(f / "config.json", pretrained_cfg=TIMM | {"interpolation": "lanczos"}),
            "interpolation lanczos",
        ),
    ],
)
def test_a_timm_classifier_that_declares_nothing_is_refused(spoil, message, tmp_path):
    path = save_timm(tmp_path, ["Female", "Male"], **TIMM)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=f"^path: .*{message}") as error:
        load_hub_classifier(path, MAPPING, {"gender": CLASSES["gender"]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("processor", [EfficientNetImageProcessor, LevitImageProcessor])
def test_a_processor_that_does_more_than_it_declares_is_refused(processor, tmp_path):
    """One normalises twice, one resizes to 256 / 224 of what it declares."""
    processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^path: .*its image processor gives .* grey levels") as error:
        processor_pixels(str(tmp_path), True)
    assert "\n" not in str(error.value)


def weights_of(change):
    return lambda folder: change_tensor(folder / "model.safetensors", "classifier.weight", change)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: change_json(f / "config.json", id2label={1: "Female", 2: "Male"}),
            "id2label: found the keys 1, 2, .*0 to 1",
        ),
        (
            lambda f: change_json(f / "config.json", id2label={0: "Female", 2: "Male"}),
            "id2label: found the keys 0, 2, .*0 to 1",
        ),
        (
            lambda f: change_json(f / "config.json", id2label={0: "Male", 1: "Male"}),
            "id2label: found Male more than once",
        ),
        (lambda f: change_json(f / "config.json", id2label={0: "Female", 1: "Male", 2: "?"}), r"shape \[2\].*\[3\]"),
        (lambda f: change_json(f / "config.json", id2label=["Female", "Male"]), "allowed: a folder or hub id"),
        (lambda f: change_json(f / "config.json", hidden_size="wide"), "allowed: a folder or hub id"),
        (lambda f: (f / "config.json").write_text("[]"), "allowed: a folder or hub id"),
        (lambda f: (f / "preprocessor_config.json").write_text("[]"), "no readable image processor"),
        (
            lambda f: (f / "preprocessor_config.json").write_text("{}"),
            "found none of its steps, allowed: do_center_crop",
        ),
        (
            lambda f: change_json(f / "preprocessor_config.json", image_mean=[0.5]),
            r"found .*mean \(0.5,\).*three numbers",
        ),
        (lambda f: change_json(f / "preprocessor_config.json", image_std=[0, 1, 1]), "std .*allowed: .*std above 0"),
        (lambda f: change_json(f / "preprocessor_config.json", resample="bicubic"), "its image processor: .*bicubic"),
        (lambda f: change_json(f / "preprocessor_config.json", size={"height": 0, "width": 9}), r"size \(0, 9\)"),
        (
            lambda f: change_json(f / "preprocessor_config.json", size={"height": 40, "width": 40}),
            "cannot read what its image",
        ),
        (weights_of(lambda t: t * float("nan")), "classifier.weight holds NaN or infinity"),
        (weights_of(lambda t: t.to(torch.complex64)), "classifier.weight is complex"),
        (weights_of(lambda t: t.sum()), r"classifier.weight has shape \[\].*\[2, 16\]"),
    ],
)
def test_a_spoilt_folder_is_one_line(spoil, message, tmp_path):
    path = save_vit(tmp_path, ["Female", "Male"])
    spoil(tmp_path)
    with pytest.raises(ValueError, match=f"^path: .*{message}") as error:
        load_hub_classifier(path, MAPPING, {"gender": CLASSES["gender"]})
    assert "\n" not in str(error.value)


def test_one_model_for_each_attribute_or_one_for_all(gender, race, both):
    crops = piece(48, 48).repeat(3, 1, 1, 1)
    apart = load_hub_classifier({"gender": gender, "race": race}, MAPPING, CLASSES)
    for (name, classes), path in zip(CLASSES.items(), (gender, race), strict=True):
        alone = load_hub_classifier(path, MAPPING, {name: classes})
        assert apart(crops)[name].shape == (3, len(classes))
        assert torch.equal(apart(crops)[name], alone(crops)[name])
    one, twice = (load_hub_classifier(path, MAPPING, CLASSES) for path in (both, {"gender": both, "race": both}))
    assert one(crops)["race"].shape == (3, 4) and torch.equal(one(crops)["race"], twice(crops)["race"])
    assert len(apart.nets) == 2 and len(one.nets) == len(twice.nets) == 1
    assert apart.attributes == CLASSES and apart(crops[:0])["race"].shape == (0, 4)
    assert not apart.training and not any(p.requires_grad for p in apart.parameters())


def test_a_class_is_the_sum_of_its_labels_probabilities(race, both):
    crops = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    net = ViTForImageClassification.from_pretrained(race).eval()
    by_label = dict(zip(RACES, net((crops - 0.5) / 0.5).logits.softmax(1).T, strict=True))
    merged = load_hub_classifier(race, MAPPING, {"race": CLASSES["race"]})(crops)["race"].softmax(1)
    for k, cls in enumerate(CLASSES["race"]):
        torch.testing.assert_close(merged[:, k], sum(by_label[label] for label in MAPPING["race"][cls]))
    # side by side in one head: the labels of the other attribute take no part
    logits = ViTForImageClassification.from_pretrained(both).eval()((crops - 0.5) / 0.5).logits
    pair = load_hub_classifier(both, MAPPING, CLASSES)(crops)["gender"].softmax(1)
    torch.testing.assert_close(pair, logits[:, :2].softmax(1))


def test_the_classes_come_in_the_asked_order(race):
    crops = piece(32, 32)
    turned = {"race": tuple(reversed(CLASSES["race"]))}
    one, other = (load_hub_classifier(race, MAPPING, wanted) for wanted in ({"race": CLASSES["race"]}, turned))
    assert torch.equal(one(crops)["race"].flip(1), other(crops)["race"])
    assert one.config != other.config  # so that neither can be taken for the other


def test_gradient_reaches_the_pixels_of_its_own_row_only(both):
    crops = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    load_hub_classifier(both, MAPPING, CLASSES)(crops)["race"][1, 0].backward()
    assert (crops.grad.abs().sum((1, 2, 3)) > 0).tolist() == [False, True, False]


def test_gradient_is_that_of_finite_differences(gender):
    net = load_hub_classifier(gender, MAPPING, {"gender": CLASSES["gender"]}).double()
    crops = torch.rand(1, 3, 40, 40, dtype=torch.double, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    step = torch.randn(crops.shape, dtype=torch.double, generator=torch.Generator().manual_seed(2)) * 1e-5
    leaf = crops.clone().requires_grad_()
    slope = (torch.autograd.grad(net(leaf)["gender"][0, 0], leaf)[0] * step).sum()
    rise = (net(crops + step)["gender"][0, 0] - net(crops - step)["gender"][0, 0]) / 2
    np.testing.assert_allclose(slope, rise, rtol=1e-4)


def altered(**changes):
    return MAPPING | {name: MAPPING[name] | classes for name, classes in changes.items()}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (altered(gender={"male": ["male"]}), r"^mapping.gender.male: found male, allowed: Female, Male, White, .*both"),
        (altered(gender={"male": ["Female"]}), r"^mapping.gender.male: found Female, .* belongs to female"),
        (altered(gender={"other": ["Male"]}), r"^mapping.gender: found other, allowed: female, male"),
        (altered(race={"Asian": []}), r"^mapping.race.Asian: found nothing"),
        (altered(race={"Asian": ["East Asian"]}), r"^mapping: no class has the label Southeast Asian of .*both"),
        ({"gender": MAPPING["gender"]}, r"^mapping: found gender, but race is requested"),
    ],
)
def test_a_wrong_mapping_is_one_line_with_key_found_and_allowed(both, mapping, message):
    with pytest.raises(ValueError, match=message) as error:
        load_hub_classifier(both, mapping, CLASSES)
    assert "\n" not in str(error.value)


def test_a_model_that_is_none_is_one_line(tmp_path, gender):
    wanted = {"gender": CLASSES["gender"]}
    with pytest.raises(ValueError, match="^path: found null"):
        load_hub_classifier(None, MAPPING, wanted)
    with pytest.raises(ValueError, match="^path: found null, allowed: .* for race"):
        load_hub_classifier({"gender": gender}, MAPPING, CLASSES)
    with pytest.raises(ValueError, match="^path: found height, allowed: gender, race"):
        load_hub_classifier({"gender": gender, "height": gender}, MAPPING, wanted)
    with pytest.raises(ValueError, match="^path: found .*nowhere, allowed"):
        load_hub_classifier(str(tmp_path / "nowhere"), MAPPING, wanted)
    sigmoid = save_vit(tmp_path / "sigmoid", ["Female", "Male"], problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="multi_label_classification model .* allowed: single_label"):
        load_hub_classifier(sigmoid, MAPPING, wanted)
    headless = tmp_path / "headless"
    ViTForImageClassification.from_pretrained(gender).vit.save_pretrained(headless)
    with pytest.raises(ValueError, match="has no weights for classifier"):
        load_hub_classifier(str(headless), MAPPING, wanted)
    flipped = save_vit(tmp_path / "nearest", ["Female", "Male"])
    ViTImageProcessor(resample=0).save_pretrained(flipped)
    with pytest.raises(ValueError, match=r"found resample 0, allowed: 2 \(bilinear\)"):
        load_hub_classifier(flipped, MAPPING, wanted)


def test_a_convolutional_classifier_serves_as_well(tmp_path):
    config = ConvNextConfig(
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        id2label={0: "Female", 1: "Male"},
        label2id={"Female": 0, "Male": 1},
    )
    ConvNextForImageClassification(config).save_pretrained(tmp_path)
    PROCESSORS["convnext"].save_pretrained(tmp_path)
    net = load_hub_classifier(str(tmp_path), MAPPING, {"gender": CLASSES["gender"]})
    assert net(piece(64, 64))["gender"].shape == (1, 2)
