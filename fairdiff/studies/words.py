"""Baselines that only change the prompt: each image is generated from another text with the same noise.

Ethical intervention: Bansal et al. 2022 (arXiv 2210.15230), in the wording that Shen et al. (ICLR 2024) compare with. Random
attribute phrases: Fair Diffusion (Friedrich et al. 2023, arXiv 2302.10893) looks up a prompt and guides each image to a class
drawn from the target. Here the drawn class is put into the prompt.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from fairdiff.diffusion.sampling import Generate
from fairdiff.errors import FairDiffError
from fairdiff.objective.targets import Targets
from fairdiff.prompts import Prompt, with_article, with_phrase

# (prompt, noise_BCHW) -> the text of each image
Rewrite = Callable[[str, Tensor], list[str]]
Phrases = Mapping[str, Mapping[str, str]]  # attribute -> class -> attribute phrase, in the order of the classes


def require_phrases(phrases: Phrases) -> None:
    """Raise FairDiffError for an attribute without phrases."""
    for name, words in phrases.items():
        if not words:
            raise FairDiffError(f"attributes.{name}.phrases: found none, allowed: words for a person of each class")


def intervened(prompt: Prompt, attributes: Iterable[str]) -> str:
    """Return a prompt of people with ", if all individuals can be a nurse irrespective of their gender" appended."""
    if not prompt.people:
        return prompt.text
    what = " and ".join(attributes)
    return f"{prompt.text}, if all individuals can be {with_article(prompt.subject)} irrespective of their {what}"


def ethical(prompts: Iterable[Prompt], attributes: Iterable[str]) -> Rewrite:
    """Return a rewrite of prompts of people to their ethical interventions."""
    texts = {prompt.text: intervened(prompt, attributes) for prompt in prompts}
    return lambda text, noise_BCHW: [texts[text]] * len(noise_BCHW)


def uniform_of(noise: Tensor, seed: int) -> float:
    """Return a number in [0, 1) that depends on an image's noise and the seed only, and not on its batch."""
    data = noise.detach().cpu().float().contiguous().numpy().tobytes()
    digest = hashlib.sha256(str(seed).encode() + b"|" + data).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def random_phrases(prompts: Iterable[Prompt], targets: Targets, phrases: Phrases, seed: int) -> Rewrite:
    """Return a rewrite that adds the phrases of classes drawn for each image from its prompt's target: "..., a woman".

    Prompts that name a class or show no people are not changed, as Fair Diffusion's look-up would not find them.
    """
    require_phrases(phrases)
    names, known = list(phrases), {prompt.text: prompt for prompt in prompts}

    def rewrite(text: str, noise_BCHW: Tensor) -> list[str]:
        prompt = known[text]
        if prompt.names or not prompt.people:
            return [text] * len(noise_BCHW)
        shares = targets.of(text).marginal(*names)
        upper = np.cumsum(shares.ravel())
        drawn = [np.searchsorted(upper, uniform_of(noise, seed), side="right") for noise in noise_BCHW]
        return [_named(prompt, shares.shape, min(int(place), shares.size - 1)) for place in drawn]

    def _named(prompt: Prompt, shape: tuple[int, ...], place: int) -> str:
        for name, cls in zip(names, np.unravel_index(place, shape), strict=True):
            prompt = with_phrase(prompt, list(phrases[name].values())[cls], name)
        return prompt.text

    return rewrite


def with_words(rewrite: Rewrite, generate: Generate) -> Generate:
    """Return a generator that rewrites the text of each image, and generates images with the same text together."""

    def of_words(prompt: str, noise_BCHW: Tensor) -> Tensor:
        texts = rewrite(prompt, noise_BCHW)
        images: list[Tensor | None] = [None] * len(texts)
        for text in dict.fromkeys(texts):
            rows = [i for i, other in enumerate(texts) if other == text]
            for i, image in zip(rows, generate(text, noise_BCHW[rows]), strict=True):
                images[i] = image
        return torch.stack(images)

    return of_words
