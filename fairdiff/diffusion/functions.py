"""Turn a user's function, or any text-to-image pipeline of diffusers, into the function that an audit calls."""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from classifiers.pictures import as_pixels
from fairdiff.diffusion.sampling import Generate
from fairdiff.errors import FairDiffError

# (prompts, seeds) -> a list of PIL images, or image_BCHW in [0, 1], with one image for each prompt and seed
Images = Callable[[list[str], list[int]], Sequence[Image.Image] | Tensor]
WANTED = "a function (prompts, seeds) -> images"


def seeds(prompt: str, seed: int, indices: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Return integer seeds [len(indices)] in [0, 2^31) instead of noise; that of image i depends on (seed, prompt, i)."""
    digests = [hashlib.sha256(f"{seed}|{prompt}|{index}".encode()).digest() for index in indices]
    return torch.tensor([int.from_bytes(digest[:4], "big") >> 1 for digest in digests])


def check_function(given: object, key: str) -> None:
    """Raise FairDiffError unless `given` is a function (not a class or pipeline) that takes two arguments."""
    if isinstance(given, type) or not callable(given) or isinstance(given, DiffusionPipeline):
        raise FairDiffError(f"{key}: found {_name(given)}, allowed: {WANTED}")
    try:
        signature = inspect.signature(given.forward if isinstance(given, nn.Module) else given)
    except ValueError:  # some functions in C have no signature
        return
    try:
        signature.bind([], [])
    except TypeError:
        raise FairDiffError(f"{key}: found {_name(given)}, which takes {signature}, allowed: {WANTED}") from None


def of_function(function: Images, key: str, device: str) -> Generate:
    """Return a function (prompt, seed_B) -> image_BCHW in [0, 1] on `device` that calls the user's function.

    It raises FairDiffError if the user's function does not return B images of one size.
    """

    def generate(prompt: str, seed_B: Tensor) -> Tensor:
        found = function([prompt] * len(seed_B), seed_B.tolist())
        return _tensor(found, len(seed_B), key).to(device)

    return generate


def of_pipeline(pipe: DiffusionPipeline, settings: dict[str, object]) -> Images:
    """Return a function of type Images that calls a pipeline, with one generator for each image, seeded by its seed."""

    def images(prompts: list[str], seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(prompt=prompts, generator=generators, output_type="pt", **settings).images.float()

    return images


def _tensor(found: object, count: int, key: str) -> Tensor:
    if isinstance(found, Tensor):
        if found.ndim != 4 or found.shape[:2] != (count, 3) or not found.is_floating_point():
            said = f"a tensor {tuple(found.shape)} of {found.dtype}"
            raise FairDiffError(f"{key}: returned {said}, allowed: [{count}, 3, height, width] of floats in [0, 1]")
        return found.detach().float()
    if not isinstance(found, list | tuple) or not all(isinstance(image, Image.Image) for image in found):
        raise FairDiffError(f"{key}: returned {_name(found)}, allowed: a list of PIL images, or a tensor of them")
    sizes = {image.size for image in found}
    if len(found) != count or len(sizes) > 1:
        said = f"{len(found)} images of {len(sizes)} sizes"
        raise FairDiffError(f"{key}: returned {said}, allowed: {count} of one size, one for each prompt and seed")
    try:
        pixels = np.stack([as_pixels(image) for image in found])
    except ValueError as error:
        raise FairDiffError(f"{key}: returned an image that is none: {error}") from error
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def _name(thing: object) -> str:
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    own = getattr(thing, "__name__", None)
    return f"the function {own}" if isinstance(own, str) else f"a {type(thing).__name__}"
