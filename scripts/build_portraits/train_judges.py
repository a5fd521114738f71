"""Train the two attribute judges on face crops of renders with `classifiers.training.fit`.

The judges differ in seed, architecture and images (people with even and with odd numbers). Crops are as in a run: MTCNN's
box, `expand` times as wide. If a VAE exists, half of them come from its reconstructions, because generated images are
equally soft.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from data import Renders, wait_for
from diffusers import AutoencoderKL
from stage import Clock, build_folder, log, to_tensor
from train_vae import load_vae

from classifiers.attributes import MEAN, STD, AttributeNet, save_attribute_net
from classifiers.calibration import CALIBRATION_FILE, calibrate, save_calibration
from classifiers.data import LabelledFaces, find_faces
from classifiers.detect import MTCNNDetector
from classifiers.training import FitPlan, fit, predict
from fairdiff.portraits import occupations

CROP, INPUT = 64, 64


@dataclass(frozen=True)
class Plan:
    """One judge: its network, its half of the people (person number modulo 2), its seed."""

    architecture: str
    kwargs: dict
    half: int
    seed: int


PLANS = {
    "judge": Plan("resnet10t", {"channels": (24, 48, 96, 128), "stem_width": 16}, 0, 11),
    "audit_judge": Plan("densenet121", {"growth_rate": 16, "block_config": (2, 3, 4, 3)}, 1, 23),
}


def faces_of(renders: Renders, rows: np.ndarray) -> LabelledFaces:
    """Return the faces in these rows, by the detector of a run."""
    found, boxes = find_faces(renders["image"][rows], MTCNNDetector(input_size=INPUT))
    return LabelledFaces(renders["image"][rows[found]], boxes, renders.labels(rows[found]))


@torch.no_grad()
def reconstructed(images: np.ndarray, vae: AutoencoderKL) -> np.ndarray:
    """Return the autoencoder's reconstructions of the images."""
    parts = []
    for first in range(0, len(images), 128):
        image = to_tensor(images[first : first + 128])
        again = vae.decode(vae.encode(image).latent_dist.sample()).sample.clamp(-1, 1)
        parts.append(((again + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def balanced(renders: Renders, rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return at most `count` rows, as balanced over the 16 cells of gender, race and age as the renders allow."""
    labels = renders.labels(rows)
    cell = labels["gender"] * 8 + labels["race"] * 2 + labels["age"]
    weight = 1 / np.bincount(cell, minlength=16)[cell]
    return rng.choice(rows, size=min(count, len(rows)), replace=False, p=weight / weight.sum())


def train(name: str, args: argparse.Namespace, renders: Renders, folder: Path) -> dict[str, float]:
    """Fit one judge, save it, and return its accuracies on held-out renders, original and reconstructed."""
    plan, clock = PLANS[name], Clock(60)
    people = renders.rows(0, people=True)
    rng = np.random.default_rng(plan.seed)
    faces = faces_of(renders, balanced(renders, people[renders["person"][people] % 2 == plan.half], args.pictures, rng))
    held_out = faces_of(renders, renders.rows(1, people=True)[: args.held_out])
    vae = load_vae(folder) if (folder / "vae.pt").exists() else None
    images = faces.images
    if vae is not None:
        half = len(faces) // 2
        images = np.concatenate([reconstructed(images[:half], vae), images[half:]])
    torch.manual_seed(plan.seed)
    config = {"architecture": plan.architecture, "kwargs": plan.kwargs, "image_size": CROP, "mean": MEAN, "std": STD}
    net = AttributeNet(config | {"attributes": occupations.CLASSES})

    def progress(step: int, loss: float) -> None:
        clock.step = step
        if step % 50 == 0:
            log(name, clock, loss=loss)

    fit_plan = FitPlan(args.steps, args.batch, seed=plan.seed, checkpoint=folder / f"{name}.pt")
    fit(net, images, faces.labels, fit_plan, progress=progress, boxes=faces.boxes)
    save_attribute_net(net, folder / name)
    shown_as = {"render": held_out.images} | ({"vae": reconstructed(held_out.images, vae)} if vae else {})
    result = {}
    for kind, shown in shown_as.items():  # the last kind is used: it is most like generated images
        calibrations = calibrate(predict(net, shown, held_out.boxes, fit_plan.expand), held_out.labels, net.attributes)
        result |= {f"{key}_{kind}": calibration.accuracy for key, calibration in calibrations.items()}
    detector = {"type": "mtcnn", "input_size": INPUT, "crop_size": CROP, "expand": fit_plan.expand}
    save_calibration(calibrations, detector, folder / name / CALIBRATION_FILE)
    log(name, clock, **result)
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--judges", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=12000, help="crops for each judge")
    parser.add_argument("--held-out", type=int, default=1500)
    parser.add_argument("--least", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    folder = build_folder()
    renders = wait_for(folder / "renders", args.least)
    for name in args.judges:
        train(name, args, renders, folder)


if __name__ == "__main__":
    sys.exit(main())
