"""Train the text encoder and the U-Net of the Portraits model on the latents of the frozen VAE encoder.

The model predicts noise on Stable Diffusion's schedule (scaled_linear, 1000 steps). The loss of time step t is weighted with
min(SNR_t, 5) / SNR_t (Hang et al. 2023, "Efficient diffusion training via Min-SNR weighting"). Captions are padded to
77 tokens as in diffusers' pipeline. New shards are read while it runs.
"""

import time
from pathlib import Path

import numpy as np
import torch
from data import Captioned, Renders, read, wait_for
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from muon import Muon
from stage import Average, Clock, arguments, build_folder, log, read_checkpoint, sheet, write_checkpoint
from tokenizer import LENGTH, make_tokenizer
from torch import Tensor, nn
from train_vae import load_vae
from transformers import CLIPTextConfig, CLIPTextModel

from fairdiff.portraits import weights

WIDTH = 128
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SHEET = (
    "a photo of the face of a nurse, a person",
    "a photo of the face of a carpenter, a person",
    "a photo of the face of an old Black woman, a person",
    "a photo of the face of a young Asian man, a person",
    "a photo of the face of an old Indian man, a person",
    "a photo of the face of a young White woman, a person",
    "a photo of a chair",
)


def make_text_encoder() -> CLIPTextModel:
    """Return a text encoder with two layers of width 128 and CLIP's vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=WIDTH,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
    )


def make_unet(channels: tuple[int, ...] = (96, 144), latents: int = 8) -> UNet2DConditionModel:
    """Return a U-Net on 8x8 latents. diffusers uses attention_head_dim as the number of heads."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latents,
        out_channels=latents,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


class Denoiser(nn.Module):
    """The trained modules: text encoder and U-Net with one parameter list."""

    def __init__(self, latents: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.text_encoder, self.unet = make_text_encoder(), make_unet(channels, latents)

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor, which: Tensor) -> Tensor:
        """Return the predicted noise. ids [U, 77]: every caption once; which [B]: the caption's row in ids."""
        return self.unet(noisy, t, encoder_hidden_states=self.text_encoder(ids)[0][which]).sample


class Latents:
    """A cache of scaled latents of images and their mirror images, which are encoded at the first use."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae, self.sign = vae, encoder_sign(vae)
        self.values = torch.empty(0, 2, vae.config.latent_channels, 8, 8)
        self.known = np.zeros((0, 2), bool)

    def grow(self, count: int) -> None:
        """Allocate space for `count` images."""
        more = count - len(self.known)
        self.values = torch.cat([self.values, torch.empty(more, *self.values.shape[1:])])
        self.known = np.concatenate([self.known, np.zeros((more, 2), bool)])

    @torch.no_grad()
    def take(self, renders: Renders, rows: np.ndarray, mirrored: np.ndarray) -> Tensor:
        """Return latents [B, C, 8, 8] of image rows [B], mirrored where `mirrored` [B] is 1."""
        for side in (0, 1):
            missing = np.unique(rows[(mirrored == side) & ~self.known[rows, side]])
            if len(missing):
                image = renders.pictures(missing)
                latent = self.vae.encode(image.flip(-1) if side else image).latent_dist.mode()
                self.values[missing, side] = latent * self.vae.config.scaling_factor
                self.known[missing, side] = True
        return self.values[rows, mirrored]


def encoder_sign(vae: AutoencoderKL) -> float:
    """Return a number that changes when the encoder changes."""
    return float(sum(p.double().abs().sum() for p in vae.encoder.parameters()))


def stray_words(ids: Tensor, rng: np.random.Generator, share: float = 0.05, most: int = 6) -> Tensor:
    """Insert 1 to `most` random words before a share of the captions [U, 77]; the end of their padding is cut off.

    Web captions contain words that are unrelated to the image, so a model trained on them ignores unknown words. Without
    this step, a few new tokens before a prompt would change every image, whether they are trained or not.
    """
    ids = ids.clone()
    for row in np.flatnonzero(rng.random(len(ids)) < share):
        words = torch.from_numpy(rng.integers(0, ids[0, 0].item(), size=rng.integers(1, most + 1)))
        ids[row] = torch.cat([ids[row, :1], words, ids[row, 1 : len(ids[row]) - len(words)]])
    return ids


def min_snr_weight(alphas_cumprod: Tensor, gamma: float = 5.0) -> Tensor:
    """Return the weight [T] of the noise error: min(SNR, gamma) / SNR with SNR = alpha / (1 - alpha)."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / snr


class Trainer:
    """The training state, the data and the training step."""

    def __init__(self, args, folder: Path) -> None:
        torch.manual_seed(args.seed)
        self.args, self.folder = args, folder
        self.clock = Clock(args.minutes, args.steps)
        self.vae = load_vae(folder)
        self.tokenizer = make_tokenizer(folder / "tokenizer")
        channels = tuple(map(int, args.channels.split(",")))
        self.net = Denoiser(self.vae.config.latent_channels, channels)
        self.optimizer = Muon(self.net, args.lr, adam=("embed", "position"))
        self.average = Average(self.net)
        self.noise = DDPMScheduler(**NOISE)
        self.weight = min_snr_weight(self.noise.alphas_cumprod)
        self.latents = Latents(self.vae)
        self.renders = wait_for(folder / "renders", args.least)
        self.refresh()
        state = read_checkpoint(folder / "diffusion.pt", self.clock)
        if args.shipped and not state:
            load_shipped(self.net)
            self.average = Average(self.net)
        if state:
            self.net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.values, self.average.count = state["average"], state["count"]

    def refresh(self) -> None:
        """Read new shards, and the newest encoder if the VAE stage is still running."""
        self.renders = read(self.folder / "renders", self.renders)
        self.vae = load_vae(self.folder)
        if encoder_sign(self.vae) != self.latents.sign:
            self.latents = Latents(self.vae)
        self.latents.grow(len(self.renders))
        self.captioned = Captioned(self.renders)

    def batch(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        rows, captions = zip(*(self.captioned.draw(rng) for _ in range(self.args.batch)), strict=True)
        unique = sorted(set(captions))
        ids = self.tokenizer(
            unique, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        clean = self.latents.take(self.renders, np.array(rows), rng.integers(2, size=len(rows)))
        return clean, ids, torch.tensor([unique.index(c) for c in captions])

    def step(self) -> float:
        """Make one update and return the loss. The generator depends on seed and step only, so resuming changes nothing."""
        rng = np.random.default_rng((self.args.seed, self.clock.step))
        clean, ids, which = self.batch(rng)
        t = torch.from_numpy((np.arange(len(clean)) + rng.random()) / len(clean) * 1000).long()  # stratified
        noise = torch.randn_like(clean)
        error = self.net(self.noise.add_noise(clean, noise, t), t, ids, which) - noise
        loss = (self.weight[t] * error.square().mean((1, 2, 3))).mean()
        self.optimizer.set_lr(self.clock.lr(self.args.lr))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.average.update()
        self.clock.step += 1
        return loss.item()

    def save(self) -> None:
        state = {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values,
            "count": self.average.count,
            "channels": self.args.channels,
            "latents": self.vae.config.latent_channels,
        }
        write_checkpoint(self.folder / "diffusion.pt", state, self.clock)


def load_shipped(net: Denoiser) -> None:
    """Load the text encoder and U-Net of the package, to continue their training."""
    folder = weights("model")
    net.text_encoder.load_state_dict(CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict())
    net.unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / "unet").state_dict())


@torch.no_grad()
def draw_sheet(net: Denoiser, vae: AutoencoderKL, tokenizer, path: Path, steps: int = 8, guidance: float = 1.5) -> None:
    """Write a contact sheet with ten images of each prompt in SHEET, by the shipped sampler."""
    scheduler = make_scheduler()
    generator = torch.Generator().manual_seed(7)
    rows = []
    for prompt in SHEET:
        ids = tokenizer(["", prompt], padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        text = net.text_encoder(ids)[0].repeat_interleave(10, 0)
        x = torch.randn(10, vae.config.latent_channels, 8, 8, generator=generator)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            empty, named = net.unet(torch.cat([x, x]), t, encoder_hidden_states=text).sample.chunk(2)
            x = scheduler.step(empty + guidance * (named - empty), t, x).prev_sample
        rows.append(vae.decode(x / vae.config.scaling_factor).sample)
    sheet(rows, path)


def make_scheduler() -> DPMSolverMultistepScheduler:
    """Return the shipped sampler, DPM-Solver++ 2M."""
    return DPMSolverMultistepScheduler(**NOISE, final_sigmas_type="zero", steps_offset=1)


def load_denoiser(folder: Path, averaged: bool = True) -> Denoiser:
    """Load the trained (by default averaged) text encoder and U-Net."""
    state = torch.load(folder / "diffusion.pt", weights_only=True)
    net = Denoiser(state["latents"], tuple(map(int, state["channels"].split(","))))
    net.load_state_dict(state["net"] | (state["average"] if averaged else {}))
    return net.eval().requires_grad_(False)


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__.splitlines()[0], minutes=60, batch=96, lr=2e-3)
    parser.add_argument("--channels", default="96,144")
    parser.add_argument("--shipped", action="store_true", help="begin with the weights that the package carries")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    folder = build_folder()
    trainer = Trainer(args, folder)
    clock, smooth, refreshed = trainer.clock, None, time.monotonic()
    while clock.fraction < 1:
        loss = trainer.step()
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        if clock.step % 50 == 0:
            log("diffusion", clock, loss=smooth, pictures=len(trainer.renders))
        if clock.save_due():
            trainer.save()
        if time.monotonic() - refreshed > 300:
            trainer.refresh()
            refreshed = time.monotonic()
            draw_sheet(load_denoiser(folder), trainer.vae, trainer.tokenizer, folder / "sheets" / "diffusion.png")
    trainer.save()
    draw_sheet(load_denoiser(folder), trainer.vae, trainer.tokenizer, folder / "sheets" / "diffusion.png")


if __name__ == "__main__":
    main()
