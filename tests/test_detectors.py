"""Detectors of unwanted images: by words, by a classifier's labels, and by a safety checker as diffusers runs it."""

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tiny_judges import save_vit
from transformers import CLIPConfig, CLIPImageProcessor

from classifiers.hub import load_hub_labels
from fairdiff.studies import detectors

LABELS = ["drawing", "nsfw", "photo"]


@pytest.fixture(scope="module")
def image_BCHW() -> torch.Tensor:
    return torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def save_checker(folder: Path) -> StableDiffusionSafetyChecker:
    """A small safety checker whose concepts are found in some of the images, with its processor."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    net = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8)).eval()
    for name, parameter in net.named_parameters():
        if name.endswith("_embeds"):
            parameter.data = torch.randn(parameter.shape)
    net.concept_embeds_weights.data.fill_(0.66)
    net.special_care_embeds_weights.data.fill_(0.3)
    net.save_pretrained(folder / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "feature_extractor"
    )
    return net


def test_a_safety_checker_finds_the_images_that_diffusers_own_call_blackens(tmp_path, image_BCHW):
    net = save_checker(tmp_path)
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "feature_extractor")
    pixels = processor(list(image_BCHW), return_tensors="pt", do_rescale=False).pixel_values
    _, says = net(pixels, [image for image in image_BCHW.clone()])
    assert 0 < sum(says) < len(says)  # else any rule would pass
    detect = detectors.by_safety_checker(str(tmp_path), "cpu")
    assert detect(image_BCHW).tolist() == [float(one) for one in says]


def test_a_classifier_gives_its_unwanted_labels_their_probability_together(tmp_path, image_BCHW):
    place = save_vit(tmp_path / "vit", LABELS)
    net, pixels, labels = load_hub_labels(place)
    assert labels == LABELS
    with torch.no_grad():
        probs = net.eval()(pixel_values=pixels(image_BCHW)).logits.softmax(1)
    found = detectors.by_labels(place, ["nsfw", "drawing"], "cpu")(image_BCHW)
    assert torch.allclose(found, probs[:, 0] + probs[:, 1], atol=1e-6)


def test_what_a_user_names_wrongly_is_one_line(tmp_path):
    place = save_vit(tmp_path / "vit", LABELS)
    with pytest.raises(ValueError, match="found gore, allowed: drawing, nsfw, photo"):
        detectors.by_labels(place, ["gore"], "cpu")
    with pytest.raises(ValueError, match="found every label"):
        detectors.by_labels(place, LABELS, "cpu")
    with pytest.raises(ValueError, match="allowed: a pipeline's folder with safety_checker and feature_extractor"):
        detectors.by_safety_checker(place, "cpu")
    save_checker(tmp_path)
    (tmp_path / "safety_checker" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="allowed: a pipeline's folder with its safety checker as safetensors"):
        detectors.by_safety_checker(str(tmp_path), "cpu")


def test_a_detector_by_words_gives_the_unwanted_their_share(tiny_model):
    class Clip:
        def text(self, texts):
            return torch.eye(3)[: len(texts)]

        def image(self, image):
            return torch.nn.functional.one_hot(image[:, 0, 0, 0].long(), 3).float()

    detect = detectors.by_words(Clip(), ["bad"], ["good", "fine"])
    images = torch.tensor([0.0, 1.0, 2.0, 0.0]).view(4, 1, 1, 1)
    assert detect(images).round().tolist() == [1, 0, 0, 1]
    rates = detectors.unsafe_rates(lambda prompt, noise: images, tiny_model.latent_shape, detect, ["a", "b"], 4)
    assert rates == [0.5, 0.5]
