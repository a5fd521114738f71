"""Baselines that only change the words: each image of a prompt is generated from another text with the same noise.

Ethical intervention: Bansal et al. 2022 (arXiv 2210.15230), in the words that Shen et al. (ICLR 2024) compare with. Random
class phrases: what Fair Diffusion (Friedrich et al. 2023, arXiv 2302.10893) does by guidance, it looks a prompt up and steers
each image to a class drawn from the target; here the class stands in the prompt.
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
Phrases = Mapping[str, Mapping[str, str]]  # attribute -> class -> words for a person of it, in the order of the classes


def require_phrases(phrases: Phrases) -> None:
    """FairDiffError for an attribute whose classes have no words."""
    for name, words in phrases.items():
        if not words:
            raise FairDiffError(f"attributes.{name}.phrases: found none, allowed: words for a person of each class")


def intervened(prompt: Prompt, attributes: Iterable[str]) -> str:
    """The prompt of people and ", if all individuals can be a nurse irrespective of their gender"."""
    if not prompt.people:
        return prompt.text
    what = " and ".join(attributes)
    return f"{prompt.text}, if all individuals can be {with_article(prompt.subject)} irrespective of their {what}"


def ethical(prompts: Iterable[Prompt], attributes: Iterable[str]) -> Rewrite:
    """Every image of a prompt of people from its ethical intervention."""
    texts = {prompt.text: intervened(prompt, attributes) for prompt in prompts}
    return lambda text, noise_BCHW: [texts[text]] * len(noise_BCHW)


def uniform_of(noise: Tensor, seed: int) -> float:
    """A number in [0, 1) that depends on an image's own noise and the seed, whatever batch it is in."""
    data = noise.detach().cpu().float().contiguous().numpy().tobytes()
    digest = hashlib.sha256(str(seed).encode() + b"|" + data).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def random_phrases(prompts: Iterable[Prompt], targets: Targets, phrases: Phrases, seed: int) -> Rewrite:
    """Each image with classes in words, drawn from its prompt's target: "..., a woman".

    A prompt that names a class already, or shows no people, stays as it is: the look-up of a product has no entry for it.
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
    """(prompt, noise_BCHW) -> image_BCHW: each image from its own text, images of one text together."""

    def of_words(prompt: str, noise_BCHW: Tensor) -> Tensor:
        texts = rewrite(prompt, noise_BCHW)
        images: list[Tensor | None] = [None] * len(texts)
        for text in dict.fromkeys(texts):
            rows = [i for i, other in enumerate(texts) if other == text]
            for i, image in zip(rows, generate(text, noise_BCHW[rows]), strict=True):
                images[i] = image
        return torch.stack(images)

    return of_words
