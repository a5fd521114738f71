"""T5, the largest text encoder of Stable Diffusion 3 and FLUX. It is never trained, so its output is cached.

It runs on the CPU: T5-XXL has 4.8 billion weights, more than the denoiser of Stable Diffusion 3.5 medium. It runs once for
a prompt, but the denoiser runs twice for each image and step.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from torch import Tensor, nn

T5_TOKENS = {StableDiffusion3Pipeline: 256, FluxPipeline: 512}  # L, the tokens that the pipeline reads
KEPT_TEXTS = 256  # in bfloat16 these take 0.5 GB for Stable Diffusion 3 and 1 GB for FLUX


def t5_reader(tokenizer, t5: nn.Module | None, shape: tuple[int, int]) -> Callable[[str], Tensor]:
    """Return a function text -> T5's output [1, L, D] on T5's device and in its precision; it caches KEPT_TEXTS texts.

    shape: (L, D). Without T5 the output is zeros. Texts are padded without a mask. Both follow diffusers' pipelines.
    """
    if t5 is None:
        return lambda text: torch.zeros(1, *shape)

    @lru_cache(KEPT_TEXTS)
    @torch.no_grad()
    def words(text: str) -> Tensor:
        ids = tokenizer([text], padding="max_length", max_length=shape[0], truncation=True, return_tensors="pt").input_ids
        return t5(ids.to(t5.device))[0]

    return words
