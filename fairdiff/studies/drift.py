"""Drift: the effect of later fine-tuning for another purpose on a fair model.

The question is that of Qi et al. 2024 (arXiv 2310.03693) about aligned language models. Benign tuning is LoRA with the usual
denoising loss E |y(z_t, t) - y_t|^2, z_t = alpha_t z + sigma_t e, y_t the noise e or the velocity alpha_t e - sigma_t z, on
captioned pictures.

Shapes: N pictures, B of a step, latents z_NCHW scaled as the network reads them, P prompts, S counts of steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairdiff.audit.suite import resampled_weights
from fairdiff.diffusion.adapters import Lora
from fairdiff.diffusion.denoise import Guidance, call_unet
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.sampling import initial_noise


@dataclass(frozen=True)
class Pictures:
    """Captioned pictures as latents z_NCHW."""

    captions: tuple[str, ...]
    latent_NCHW: Tensor

    def __add__(self, other: "Pictures") -> "Pictures":
        return Pictures(self.captions + other.captions, torch.cat([self.latent_NCHW, other.latent_NCHW]))


@torch.no_grad()
def generated(
    model: DiffusionModel, texts: Sequence[tuple[str, str]], each: int, guidance: float, steps: int, seed: int
) -> Pictures:
    """Pictures that the model makes as it stands, `each` of every (text to generate from, caption to give them).

    Pictures of "a man" with the caption "a person" are skewed; the same text twice makes benign ones, or, of a fair model's
    training prompts, what a replay repeats.
    """
    captions, parts = [], []
    for text, caption in texts:
        noise = initial_noise(text, seed, range(each), model.latent_shape).to(model.unet.device)
        parts.append(model.sample(Guidance(*model.encode_pair(text), guidance), noise, steps).final.cpu())
        captions += [caption] * each
    return Pictures(tuple(captions), torch.cat(parts))


def denoising_loss(model: DiffusionModel, latent_BCHW: Tensor, captions: Sequence[str], draw: torch.Generator) -> Tensor:
    """The mean squared error of what the network predicts at random times, of pictures with their captions."""
    times = torch.randint(len(model.scheduler.alphas_cumprod), (len(latent_BCHW),), generator=draw)
    noise = torch.randn(latent_BCHW.shape, generator=draw).to(latent_BCHW)
    kept = model.scheduler.alphas_cumprod[times].to(latent_BCHW)[:, None, None, None]
    noised = kept.sqrt() * latent_BCHW + (1 - kept).sqrt() * noise
    velocity = model.scheduler.config.prediction_type == "v_prediction"
    wanted = kept.sqrt() * noise - (1 - kept).sqrt() * latent_BCHW if velocity else noise
    text = torch.cat([model.encode(caption, model.clip_skip) for caption in captions])
    predicted = call_unet(model.unet, noised, times.to(latent_BCHW.device), text)
    return (predicted - wanted).square().mean()


@dataclass(frozen=True)
class Tuning:
    """steps of AdamW at a rate, each with a batch of pictures drawn with the seed."""

    steps: int
    rate: float
    batch: int
    seed: int = 0


def tune(
    model: DiffusionModel, lora: Lora, pictures: Pictures, tuning: Tuning, on_step: Callable[[float], None] = lambda _: None
) -> None:
    """Go on training a LoRA, which may be new or a fair one, on pictures. `on_step` is given each step's loss."""
    draw = torch.Generator().manual_seed(tuning.seed)
    for parameter in lora.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=tuning.rate)
    for _ in range(tuning.steps):
        rows = torch.randint(len(pictures.captions), (tuning.batch,), generator=draw)
        latents = pictures.latent_NCHW[rows].to(model.unet.device)
        loss = denoising_loss(model, latents, [pictures.captions[i] for i in rows], draw)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_step(loss.item())


def lost(bias_DS: np.ndarray, fair_D: np.ndarray, base_D: np.ndarray) -> np.ndarray:
    """The part of the fairness that is lost [D, S]: 0 where the bias is the fair model's, 1 where it is the base model's.

    NaN without a gain, but for rounding.
    """
    gain = base_D - fair_D
    return (bias_DS - fair_D[:, None]) / np.where(gain > 1e-9, gain, np.nan)[:, None]


def half_life(steps_S: Sequence[float], lost_DS: np.ndarray) -> np.ndarray:
    """The steps [D] after which half of the fairness is lost, between two counts by a straight line; inf if never seen.

    NaN where there was no fairness to lose.
    """
    found = np.full(len(lost_DS), np.inf)
    for s in range(len(steps_S) - 1, -1, -1):  # the earliest crossing is written last
        now = lost_DS[:, s]
        if s == 0:
            found = np.where(now >= 0.5, steps_S[0], found)
            continue
        before = lost_DS[:, s - 1]
        step = steps_S[s - 1] + (0.5 - before) / np.where(now > before, now - before, 1) * (steps_S[s] - steps_S[s - 1])
        found = np.where((before < 0.5) & (now >= 0.5), step, found)
    return np.where(np.isnan(lost_DS).any(1), np.nan, found)


def half_life_of(steps_S: Sequence[float], bias_SP: np.ndarray, base_P: np.ndarray, seed: int) -> np.ndarray:
    """Half-life [1 + D] by the means over prompts, then by those of every resample of the prompts.

    bias_SP: of the tuned models, of which the first, at step 0, is the fair one.
    """
    prompts = len(base_P)
    weights = np.concatenate([np.full((1, prompts), 1 / prompts), resampled_weights(prompts, seed)])
    means = weights @ bias_SP.T
    return half_life(steps_S, lost(means, means[:, 0], weights @ base_P))
