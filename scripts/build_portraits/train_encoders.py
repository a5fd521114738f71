"""Train the self-supervised image encoder (used instead of DINO) and the face-identity embedder with its bank.

Both use the loss InfoNCE, which matches two views of the same thing within the batch (van den Oord et al. 2018; NT-Xent in
SimCLR, Chen et al. 2020). The encoder's views are two random crops of one image, without labels. The embedder's views are
two renders of one person with different pose, light and clothes, cropped and aligned as in a run.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from data import Renders, wait_for
from muon import Muon
from stage import Average, Clock, arguments, build_folder, log, read_checkpoint, to_tensor, write_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from train_judges import CROP, balanced

from classifiers.attributes import MEAN, STD
from classifiers.crop import align
from classifiers.detect import MTCNNDetector
from classifiers.identity import Bank, FaceEmbedder, load_face_embedder, save_bank, save_face_embedder
from fairdiff.builder import embedder_fingerprint

CONFIG = {
    "architecture": "resnet10t", "kwargs": {"channels": (16, 32, 64, 112), "stem_width": 16}, "image_size": CROP,
    "mean": MEAN, "std": STD, "dim": 64,
}  # fmt: skip
TEMPERATURE = 0.1


def view(image_BCHW: Tensor, generator: torch.Generator, least: float) -> Tensor:
    """Return an augmented view in [0, 1]: random crop (`least` to 1 of the side), mirror, light, colour, blur, noise."""
    batch = len(image_BCHW)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    side, mirror = uniform(least, 1), (uniform(0, 1) < 0.5).float() * 2 - 1
    zero, room = torch.zeros(batch), 1 - side
    across = torch.stack([side * mirror, zero, uniform(-1, 1) * room], 1)
    down = torch.stack([zero, side, uniform(-1, 1) * room], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), list(image_BCHW.shape), align_corners=False)
    x = F.grid_sample(image_BCHW, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x + uniform(-0.5, 1, 1, 1, 1).clamp(min=0) * (soft - x)
    x = x * uniform(0.7, 1.3, 1, 1, 1) + uniform(-0.1, 0.1, 1, 1, 1) + uniform(-0.1, 0.1, 3, 1, 1)
    return (x + torch.randn(x.shape, generator=generator) * 0.02).clamp(0, 1)


def info_nce(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """Return the symmetric cross-entropy of choosing the partner among all rows of the other side."""
    logits, target = a_BD @ b_BD.T / TEMPERATURE, torch.arange(len(a_BD))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def hit_rate(a_BD: Tensor, b_BD: Tensor) -> float:
    """Return the share of rows of a whose nearest row of b is their partner."""
    return float(((a_BD @ b_BD.T).argmax(1) == torch.arange(len(a_BD))).float().mean())


class Pictures:
    """Pairs of two views of the same image."""

    name, least = "encoder", 0.45

    def __init__(self, renders: Renders, pictures: int) -> None:
        self.renders = renders
        self.train, self.heldout = renders.rows(0)[:pictures], renders.rows(1)[:200]

    def pair(self, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        image = self.renders.pictures(rng.choice(self.train, count)) / 2 + 0.5
        return image, image

    def test(self) -> tuple[Tensor, Tensor]:
        image = self.renders.pictures(self.heldout) / 2 + 0.5
        return image, image


class People:
    """Pairs of aligned faces from two renders of the same person."""

    name, least = "identity", 0.8

    def __init__(self, renders: Renders, pictures: int) -> None:
        people = renders.rows(0, people=True)
        held = renders.rows(1, people=True)
        self.train = self._faces(renders, self._repeated(renders, people, pictures))
        self.heldout = self._faces(renders, self._repeated(renders, held, 800))

    def _repeated(self, renders: Renders, rows: np.ndarray, count: int) -> np.ndarray:
        """Return rows of people with several renders, grouped by person."""
        _, inverse, counts = np.unique(renders["person"][rows], return_inverse=True, return_counts=True)
        rows = rows[counts[inverse] > 1]
        return rows[np.argsort(renders["person"][rows], kind="stable")][:count]

    def _faces(self, renders: Renders, rows: np.ndarray) -> dict[int, np.ndarray]:
        faces, row = aligned_faces(renders, rows)
        persons = renders["person"][row]
        groups = {int(p): faces[persons == p] for p in np.unique(persons)}
        return {p: group for p, group in groups.items() if len(group) > 1}

    def pair(self, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        return self._pair(self.train, count, rng)

    def test(self) -> tuple[Tensor, Tensor]:
        return self._pair(self.heldout, 200, np.random.default_rng(0))

    def _pair(self, groups: dict[int, np.ndarray], count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        chosen = rng.choice(list(groups), size=min(count, len(groups)), replace=False)
        two = [groups[p][rng.choice(len(groups[p]), 2, replace=False)] for p in chosen]
        both = to_tensor(np.stack(two, 1).reshape(-1, CROP, CROP, 3)).unflatten(0, (2, -1)) / 2 + 0.5
        return both[0], both[1]


@torch.no_grad()
def aligned_faces(renders: Renders, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 aligned faces [F, 64, 64, 3] of the rows with a detected face, and these rows."""
    detector, faces, found = MTCNNDetector(input_size=64), [], []
    for first in range(0, len(rows), 128):
        part = rows[first : first + 128]
        image = renders.pictures(part) / 2 + 0.5
        boxes = detector(image)
        aligned = align(image, boxes, CROP)
        faces.append((aligned.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy())
        found.append(part[boxes.row_F.numpy()])
    return np.concatenate(faces), np.concatenate(found)


@torch.no_grad()
def held_out_hits(net: nn.Module, views: Pictures | People) -> float:
    generator = torch.Generator().manual_seed(1)
    a, b = (view(image, generator, views.least) for image in views.test())
    return hit_rate(net(a), net(b))


def train(views: Pictures | People, args: argparse.Namespace, folder: Path) -> FaceEmbedder:
    """Train one network and write its folder."""
    torch.manual_seed(args.seed)
    clock, net = Clock(args.minutes, args.steps), FaceEmbedder(CONFIG)
    optimizer, average = Muon(net, args.lr), Average(net, 0.998)
    checkpoint = folder / f"{views.name}.pt"
    state = read_checkpoint(checkpoint, clock)
    if state:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, average.count = state["average"], state["count"]

    def save() -> FaceEmbedder:
        write_checkpoint(
            checkpoint,
            {
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.values,
                "count": average.count,
            },
            clock,
        )
        averaged = FaceEmbedder(CONFIG)
        averaged.load_state_dict(average.state())
        save_face_embedder(averaged.eval(), folder / views.name)
        log(views.name, clock, held_out_hits=held_out_hits(averaged.requires_grad_(False), views))
        return averaged

    while clock.fraction < 1:
        rng = np.random.default_rng((args.seed, clock.step))
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + clock.step)
        a, b = (view(image, generator, views.least) for image in views.pair(args.batch, rng))
        both = net(torch.cat([a, b]))
        loss = info_nce(*both.chunk(2))
        optimizer.set_lr(clock.lr(args.lr))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        average.update()
        clock.step += 1
        if clock.step % 50 == 0:
            log(views.name, clock, loss=loss.item())
        if clock.save_due():
            save()
            net.train()
    return save()


@torch.no_grad()
def make_bank(renders: Renders, folder: Path, count: int = 1600) -> None:
    """Write a bank with embeddings of up to `count` rendered faces, balanced over gender, race and age."""
    net = load_face_embedder(folder)
    rows = balanced(renders, renders.rows(0, people=True), count, np.random.default_rng(5))
    faces, _ = aligned_faces(renders, rows)
    parts = [net(to_tensor(faces[i : i + 200]) / 2 + 0.5) for i in range(0, len(faces), 200)]
    save_bank(Bank(torch.cat(parts)), folder / "bank.safetensors", embedder_fingerprint(net))


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__.splitlines()[0], minutes=5, batch=96, lr=2e-3)
    parser.add_argument("--parts", nargs="+", default=["encoder", "identity"], choices=["encoder", "identity"])
    parser.add_argument("--pictures", type=int, default=20000)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    folder = build_folder()
    renders = wait_for(folder / "renders", args.least)
    if "encoder" in args.parts:
        train(Pictures(renders, args.pictures), args, folder)
    if "identity" in args.parts:
        train(People(renders, args.pictures // 2), args, folder)
        make_bank(renders, folder / "identity")


if __name__ == "__main__":
    main()
