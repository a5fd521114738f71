"""Train the autoencoder of the Portraits model (AutoencoderKL, factor 8, eight latent channels).

This is phase 1: encoder and decoder learn by a weighted L1 of pixels, of their differences and of two smaller sizes, with a
small KL term. Phase 2 is train_decoder.py. It does not change the encoder, so the latents of the diffusion stage stay valid.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from data import read, wait_for
from diffusers import AutoencoderKL
from muon import Muon
from stage import Average, Clock, arguments, build_folder, log, read_checkpoint, sheet, write_checkpoint
from torch import Tensor
from torch.nn import functional as F

from fairdiff.portraits import weights

CHANNELS = (16, 32, 64, 96)  # narrow at full resolution, where layers cost most of the time
LATENTS = 8
KL_WEIGHT = 2e-4  # of the KL per latent number; the L1 is about .05


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        3,
        3,
        ("DownEncoderBlock2D",) * 4,
        ("UpDecoderBlock2D",) * 4,
        CHANNELS,
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=8,
        sample_size=64,
    )


def pyramid_loss(difference: Tensor) -> Tensor:
    """Return the L1 of pixels + 1/2 the L1 of their differences + 1/2 the L1 at half and at quarter size."""
    loss = difference.abs().mean()
    across, down = difference[..., 1:] - difference[..., :-1], difference[..., 1:, :] - difference[..., :-1, :]
    loss = loss + 0.5 * (across.abs().mean() + down.abs().mean())
    for _ in range(2):
        difference = F.avg_pool2d(difference, 2)
        loss = loss + 0.5 * difference.abs().mean()
    return loss


def attention_map(image: Tensor) -> Tensor:
    """Return weights [B, 1, H, W] of the pixel errors, about 1 on average, larger for faces and low contrast.

    They are 0.3 / (0.15 + local standard deviation), and twice that in the middle, where the face is. Plain L1 would be
    dominated by brick walls, so wrinkles and the features of dark faces, which have low contrast, would not be learnt.
    """
    grey = image.mean(1, keepdim=True)
    mean, square = (F.avg_pool2d(x, 9, 1, 4, count_include_pad=False) for x in (grey, grey.square()))
    weight = 0.3 / (0.15 + (square - mean.square()).clamp(min=0).sqrt())
    side = torch.linspace(-1, 1, image.shape[-1])
    return weight * (1 + (-4 * (side[:, None] ** 2 + side[None] ** 2)).exp())


def load_vae(folder: Path) -> AutoencoderKL:
    """Load the averaged autoencoder with the decoder of phase 2 (if there is one) and the scaling factor, frozen.

    If none was trained on this machine, the package's autoencoder is loaded.
    """
    if not (folder / "vae.pt").exists():
        return AutoencoderKL.from_pretrained(weights("model") / "vae").float().eval().requires_grad_(False)
    state = torch.load(folder / "vae.pt", weights_only=True)
    vae = make_vae()
    values = state["net"] | state["average"]
    if (folder / "vae_decoder.pt").exists():
        second = torch.load(folder / "vae_decoder.pt", weights_only=True)
        values |= {name: value for name, value in second["average"].items() if not is_encoder(name)}
    vae.load_state_dict(values)
    vae.register_to_config(scaling_factor=state["scaling_factor"])
    return vae.eval().requires_grad_(False)


def is_encoder(name: str) -> bool:
    return name.startswith(("encoder.", "quant_conv."))


class Trainer:
    """The training state of phase 1, the data and the training step."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        torch.manual_seed(args.seed)
        self.args, self.folder = args, folder
        self.clock = Clock(args.minutes, args.steps)
        self.vae = make_vae().to(memory_format=torch.channels_last)
        self.optimizer = Muon(self.vae, args.lr)
        self.average = Average(self.vae, 0.998)
        self.renders = wait_for(folder / "renders", args.least)
        self.rows = self.renders.rows()
        state = read_checkpoint(folder / "vae.pt", self.clock)
        if state:
            self.vae.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.values, self.average.count = state["average"], state["count"]

    def refresh(self) -> None:
        """Read new shards."""
        self.renders = read(self.folder / "renders", self.renders)
        self.rows = self.renders.rows()

    def pictures(self) -> Tensor:
        rng = np.random.default_rng((self.args.seed, self.clock.step))
        rows = self.rows[rng.integers(len(self.rows), size=self.args.batch)]
        image = self.renders.pictures(rows)
        flip = torch.from_numpy(rng.random(len(rows)) < 0.5)[:, None, None, None]
        return torch.where(flip, image.flip(-1), image).contiguous(memory_format=torch.channels_last)

    def step(self) -> dict[str, float]:
        image = self.pictures()
        posterior = self.vae.encode(image).latent_dist
        difference = self.vae.decode(posterior.sample()).sample - image
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = pyramid_loss(difference * attention_map(image)) + KL_WEIGHT * kl
        self.optimizer.set_lr(self.clock.lr(self.args.lr))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step()
        self.average.update()
        self.clock.step += 1
        return {"l1": difference.detach().abs().mean().item(), "kl": kl.item()}

    @torch.no_grad()
    def averaged(self) -> AutoencoderKL:
        vae = copy.deepcopy(self.vae).eval()
        vae.load_state_dict(self.average.state())
        return vae

    @torch.no_grad()
    def save(self) -> None:
        """Write a checkpoint with the scaling factor 1 / std of the latents, and a sheet; log the held-out error."""
        vae = self.averaged()
        rows = self.renders.rows(1)[:96]
        image = self.renders.pictures(rows if len(rows) else self.rows[:96])
        latents = vae.encode(image).latent_dist
        again = vae.decode(latents.mode()).sample.clamp(-1, 1)
        state = {
            "net": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values,
            "count": self.average.count,
            "scaling_factor": 1 / latents.mode().std().item(),
        }
        write_checkpoint(self.folder / "vae.pt", state, self.clock)
        sheet([image[:12], again[:12], image[12:24], again[12:24]], self.folder / "sheets" / "vae.png")
        log(
            "vae",
            self.clock,
            heldout_l1=(again - image).abs().mean(),
            latent_std=latents.mean.std(),
            noise_std=latents.std.mean(),
        )


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__.splitlines()[0], minutes=25, batch=12, lr=2e-3)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    trainer, smooth = Trainer(args, build_folder()), None
    while trainer.clock.fraction < 1:
        l1 = trainer.step()
        smooth = l1["l1"] if smooth is None else 0.98 * smooth + 0.02 * l1["l1"]
        if trainer.clock.step % 50 == 0:
            log("vae", trainer.clock, l1=smooth, kl=l1["kl"], pictures=len(trainer.renders))
        if trainer.clock.save_due():
            trainer.save()
            trainer.refresh()
    trainer.save()


if __name__ == "__main__":
    main()
