"""Train the decoder of the autoencoder alone (phase 2), for sharper images from unchanged latents.

The loss is the weighted L1 plus a perceptual term (distance between features of the self-supervised encoder's layers, as in
LPIPS: Zhang et al. 2018) and a hinge loss against a small patch discriminator (as in VQGAN: Esser et al. 2021). Noise is
added to the latents, because those of the diffusion model are not exact.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from data import wait_for
from muon import Muon
from stage import Average, Clock, arguments, build_folder, log, read_checkpoint, sheet, write_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from train_vae import attention_map, is_encoder, load_vae, pyramid_loss

from classifiers.attributes import preprocess
from classifiers.identity import load_face_embedder

NOISE = 0.04  # as a fraction of the latents' standard deviation
PERCEPTUAL, ADVERSARIAL = 0.15, 0.02
DISCRIMINATOR_AT = 0.35  # fraction of the budget after which the adversarial loss is added


class Features(nn.Module):
    """Normalised feature maps of the self-supervised encoder's stem and first two stages."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.net = load_face_embedder(folder)

    def forward(self, image_BCHW: Tensor) -> list[Tensor]:
        trunk = self.net.trunk
        x = trunk.act1(trunk.bn1(trunk.conv1(preprocess(image_BCHW / 2 + 0.5, self.net.config))))
        maps = [x]
        x = trunk.maxpool(x)
        for layer in (trunk.layer1, trunk.layer2):
            x = layer(x)
            maps.append(x)
        return [F.normalize(m, dim=1) for m in maps]


def perceptual_loss(features: Features, again: Tensor, image: Tensor) -> Tensor:
    """Return the squared distance of unit feature vectors, mean over the maps, in [0, 4]."""
    with torch.no_grad():
        target = features(image)
    pairs = zip(features(again), target, strict=True)
    return sum((a - b).square().sum(1).mean() for a, b in pairs) / len(target)


def make_discriminator() -> nn.Sequential:
    """Return a discriminator of patches of about 22 pixels, with spectral normalisation."""
    widths, layers = (3, 24, 48, 64), []
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.utils.parametrizations.spectral_norm(nn.Conv2d(a, b, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.utils.parametrizations.spectral_norm(nn.Conv2d(widths[-1], 1, 3, 1, 1)))


class Trainer:
    """The training state of phase 2, the data and the training step."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        torch.manual_seed(args.seed)
        self.args, self.folder, self.clock = args, folder, Clock(args.minutes, args.steps)
        self.vae = load_vae(folder)
        for name, p in self.vae.named_parameters():
            p.requires_grad_(not is_encoder(name))
        self.optimizer = Muon(self.vae, args.lr)
        self.average = Average(self.vae, 0.998)
        self.features, self.critic = Features(folder / "encoder"), make_discriminator()
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), 4e-4, betas=(0.5, 0.9))
        self.renders = wait_for(folder / "renders", args.least)
        self.rows = self.renders.rows()
        state = read_checkpoint(folder / "vae_decoder.pt", self.clock)
        if state:
            self.vae.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.values, self.average.count = state["average"], state["count"]
            self.critic.load_state_dict(state["critic"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])

    def step(self) -> dict[str, float]:
        rng = np.random.default_rng((self.args.seed, self.clock.step))
        image = self.renders.pictures(self.rows[rng.integers(len(self.rows), size=self.args.batch)])
        image = image.flip(-1) if rng.random() < 0.5 else image
        with torch.no_grad():
            latent = self.vae.encode(image).latent_dist.sample()
            latent = latent + NOISE * latent.std() * torch.randn_like(latent)
        again = self.vae.decode(latent).sample
        perceptual = perceptual_loss(self.features, again, image)
        loss = pyramid_loss((again - image) * attention_map(image)) + PERCEPTUAL * perceptual
        if self.clock.fraction > DISCRIMINATOR_AT:
            loss = loss - ADVERSARIAL * self.critic(again).mean()
        self.optimizer.set_lr(self.clock.lr(self.args.lr))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.vae.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.average.update()
        critic = self.teach_critic(image, again.detach())
        self.clock.step += 1
        return {"l1": (again - image).detach().abs().mean().item(), "perceptual": perceptual.item(), "critic": critic}

    def teach_critic(self, image: Tensor, again: Tensor) -> float:
        """Update the discriminator by the hinge loss and return it. It starts a little before its loss is used."""
        if self.clock.fraction < DISCRIMINATOR_AT * 0.8:
            return float("nan")
        loss = F.relu(1 - self.critic(image)).mean() + F.relu(1 + self.critic(again)).mean()
        self.critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.critic_optimizer.step()
        return loss.item()

    @torch.no_grad()
    def save(self) -> None:
        state = {
            "net": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values,
            "count": self.average.count,
            "critic": self.critic.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
        }
        write_checkpoint(self.folder / "vae_decoder.pt", state, self.clock)
        vae, rows = load_vae(self.folder), self.renders.rows(1)[:96]
        image = self.renders.pictures(rows if len(rows) else self.rows[:96])
        again = vae.decode(vae.encode(image).latent_dist.mode()).sample.clamp(-1, 1)
        sheet([image[:12], again[:12], image[12:24], again[12:24]], self.folder / "sheets" / "decoder.png")
        log(
            "decoder",
            self.clock,
            held_out_l1=(again - image).abs().mean(),
            held_out_perceptual=perceptual_loss(self.features, again, image),
        )


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__.splitlines()[0], minutes=20, batch=12, lr=7e-4).parse_args(argv)
    torch.set_num_threads(args.threads)
    trainer = Trainer(args, build_folder())
    while trainer.clock.fraction < 1:
        numbers = trainer.step()
        if trainer.clock.step % 50 == 0:
            log("decoder", trainer.clock, **numbers)
        if trainer.clock.save_due():
            trainer.save()
    trainer.save()


if __name__ == "__main__":
    sys.exit(main())
