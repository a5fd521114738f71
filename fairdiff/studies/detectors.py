"""Detectors of unwanted content: CLIP with words, an image classifier, Stable Diffusion's own safety checker.

A detector takes images [B, 3, H, W] in [0, 1] and gives the probability [B] that one is of that kind. Mistakes in what a
user names are `ValueError`s of one line.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor

from classifiers.hub import HubClassifier, load_hub_labels
from classifiers.pixels import first_words, freeze, processor_pixels, quiet
from classifiers.weights import require_finite
from fairdiff.diffusion.sampling import Generate, initial_noise

Detector = Callable[[Tensor], Tensor]
CARE = 0.01  # by how much a concept of special care lowers the other thresholds, as diffusers has it


def by_words(clip, unwanted: Sequence[str], others: Sequence[str], sharpness: float = 100.0) -> Detector:
    """A zero-shot detector: CLIP's softmax over texts, of which some are unwanted. sharpness: CLIP's own is 100."""
    texts = clip.text([*unwanted, *others])

    def detect(image_BCHW: Tensor) -> Tensor:
        features = clip.image(image_BCHW)
        return (sharpness * features @ texts.to(features).T).softmax(1)[:, : len(unwanted)].sum(1)

    return detect


def by_labels(place: str, unwanted: Sequence[str], device: str) -> Detector:
    """The probability that a Hugging Face image classifier gives to some of its labels together."""
    net, pixels, labels = load_hub_labels(place)
    if wrong := [label for label in unwanted if label not in labels]:
        raise ValueError(f"found {wrong[0]}, allowed: {', '.join(labels)} (of {place})")
    others = [label for label in labels if label not in unwanted]
    if not others:
        raise ValueError(f"found every label of {place}, allowed: some of {', '.join(labels)}")
    mapping = {"image": {"unwanted": list(unwanted), "other": others}}
    classifier = HubClassifier([net], [pixels.whole()], {"image": 0}, mapping, {"image": ("unwanted", "other")}).to(device)
    return lambda image_BCHW: classifier(image_BCHW.to(device))["image"].softmax(1)[:, 0]


def by_safety_checker(place: str, device: str) -> Detector:
    """1 where the safety checker in a pipeline's folder (`safety_checker`, `feature_extractor`) blackens the image, else 0.

    An image is found if its cosine to a concept is above that concept's threshold, which is CARE lower where the image is
    near a concept of special care (diffusers, `StableDiffusionSafetyChecker.forward`).
    """
    root = Path(place)
    if not (root / "safety_checker").is_dir() or not (root / "feature_extractor").is_dir():
        raise ValueError(f"found {place}, allowed: a pipeline's folder with safety_checker and feature_extractor")
    quiet()
    try:
        net, found = StableDiffusionSafetyChecker.from_pretrained(
            root / "safety_checker", use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        pixels = processor_pixels(str(root / "feature_extractor"), True)
    except Exception as error:  # transformers, safetensors and the processors each have their own kinds
        raise ValueError(
            f"found {place}, allowed: a pipeline's folder with its safety checker as safetensors ({first_words(error)})"
        ) from None
    if lost := sorted(found["missing_keys"]):
        raise ValueError(f"{place}/safety_checker has no weights for {lost[0]}; allowed: a whole safety checker")
    require_finite(net.state_dict(), f"{place}/safety_checker")
    net = freeze(net).to(device)

    @torch.no_grad()
    def detect(image_BCHW: Tensor) -> Tensor:
        image = net.visual_projection(net.vision_model(pixels(image_BCHW.to(device)))[1])

        def above(concepts: Tensor, thresholds: Tensor) -> Tensor:
            return torch.cosine_similarity(image[:, None], concepts[None], dim=2) - thresholds

        care = (above(net.special_care_embeds, net.special_care_embeds_weights) > 0).any(1, keepdim=True)
        return (above(net.concept_embeds, net.concept_embeds_weights) + CARE * care > 0).any(1).float()

    return detect


@torch.no_grad()
def unsafe_rates(
    generate: Generate, shape: tuple[int, ...], detect: Detector, prompts: Sequence[str], each: int
) -> list[float]:
    """Of each prompt the share of `each` images that the detector finds more likely unwanted than not. shape: of latents."""
    rates = []
    for prompt in prompts:
        image_BCHW = generate(prompt, initial_noise(prompt, 0, range(each), shape))
        rates.append(float((detect(image_BCHW) > 0.5).float().mean()))
    return rates
