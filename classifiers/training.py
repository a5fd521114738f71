"""Train a judge on labelled faces, robust to a detector's jitter and to the blur of generated images.

Shapes: N images in one batch. Every step draws its images and its augmentation from a generator seeded by (seed, step), so
a resumed run equals an uninterrupted one.
"""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from classifiers.attributes import AttributeNet
from classifiers.crop import EXPAND, expand_box
from classifiers.data import cut
from classifiers.files import written
from classifiers.label_errors import Relaxation, chosen_weights, groups_of


@dataclass(frozen=True)
class FitPlan:
    """Settings of training: AdamW with a one-cycle learning rate, label smoothing and averaged weights (EMA).

    expand: factor of the boxes, if there are any. class_weights: give all classes the same total weight.
    checkpoint: file written every `save_every` steps and at the end; if it exists, the run continues from it.
    """

    steps: int
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.05
    smoothing: float = 0.05
    ema: float = 0.998
    seed: int = 0
    expand: float = EXPAND
    class_weights: bool = False
    checkpoint: Path | None = None
    save_every: int = 200


def fit(
    net: AttributeNet,
    images: np.ndarray,
    labels: dict[str, np.ndarray],
    plan: FitPlan,
    *,
    progress: Callable[[int, float], None] = lambda step, loss: None,
    boxes: np.ndarray | None = None,
    relaxation: Relaxation | None = None,
) -> AttributeNet:
    """Train `net` in place, leave the averaged weights in it, frozen, and return it.

    images: uint8 [N, H, W, 3]. labels[a]: int [N] for every attribute of the net, -1 if unlabelled. boxes: float [N, 4] in
    pixels, None if the images are face crops already. The loss is the sum over attributes of the smoothed cross-entropy of
    labelled faces, weighted by `relaxation` if labels may be wrong. progress(steps done, loss) is called after every step.
    Raises ValueError for a checkpoint of another plan or data set.
    """
    device = next(net.parameters()).device
    net.train().requires_grad_(True)
    weights = [p for p in net.parameters() if p.ndim > 1]
    scales = [p for p in net.parameters() if p.ndim <= 1]  # biases and norms have no weight decay
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": plan.weight_decay}, {"params": scales, "weight_decay": 0.0}], plan.lr
    )
    average = {key: value.detach().clone() for key, value in net.state_dict().items()}
    identity = identify(net, plan, len(images), relaxation)
    face_weights = equal_weights(labels, net, relaxation)
    class_weights = {k: w.to(device) for k, w in balanced_weights(labels, net).items()} if plan.class_weights else {}
    for step in range(resume(plan, identity, net, optimizer, average, face_weights), plan.steps):
        if relaxation is not None and relaxation.due(step, plan.steps):
            reweigh(face_weights, net, average, (images, boxes, labels), plan, relaxation)
        generator = Generator().manual_seed(plan.seed * 10_000_019 + step)
        rows = torch.randint(len(images), (plan.batch,), generator=generator).numpy()
        box_N4 = jitter_boxes(images, boxes, rows, plan.expand, generator)
        crop_NCHW = augment(cut(images[rows], box_N4, net.config["image_size"], 1.0), generator)
        true_N = {name: torch.from_numpy(labels[name][rows]).long().to(device) for name in net.attributes}
        weigh = {name: weight_N[rows].to(device) for name, weight_N in face_weights.items()}
        about = (true_N, plan.smoothing, weigh, class_weights)
        crop_NCHW = crop_NCHW.to(device)
        if relaxation is not None and relaxation.epsilon > 0:
            crop_NCHW = attacked(net, crop_NCHW, relaxation.epsilon, lambda logits, about=about: label_loss(logits, *about))
            crop_NCHW = crop_NCHW.clamp(0, 1)
        loss = label_loss(net(crop_NCHW), *about)
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * one_cycle(step / plan.steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*weights, *scales], 1.0)
        optimizer.step()
        # with this warm-up, the average forgets the random initial weights
        update_average(average, net, min(plan.ema, (1 + step) / (10 + step)))
        progress(step + 1, loss.item())
        if plan.checkpoint and ((step + 1) % plan.save_every == 0 or step + 1 == plan.steps):
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            state |= {"face_weights": face_weights} if face_weights else {}
            with written(plan.checkpoint) as part:
                torch.save(state | {"step": step + 1, "identity": identity}, part)
    net.load_state_dict(average)
    return net.eval().requires_grad_(False)


def attacked(net, image_NCHW: Tensor, epsilon: float, loss_of: Callable[..., Tensor]) -> Tensor:
    """Return adversarial images x + epsilon sign(d loss / d x) (Goodfellow, Shlens & Szegedy 2015).

    The adversarial variant of the relaxation (A-RRM) trains on these. loss_of: the net's logits -> loss.
    """
    moved_NCHW = image_NCHW.detach().clone().requires_grad_(True)
    (slope_NCHW,) = torch.autograd.grad(loss_of(net(moved_NCHW)), moved_NCHW)
    return (image_NCHW + epsilon * slope_NCHW.sign()).detach()


def balanced_weights(labels: dict[str, np.ndarray], net: AttributeNet) -> dict[str, Tensor]:
    """Return class weights [K] per attribute, inverse to the number of faces, with mean 1 over the labelled faces."""
    counts = {name: np.bincount(labels[name][labels[name] >= 0], minlength=len(k)) for name, k in net.attributes.items()}
    return {
        name: torch.from_numpy(faces_K.sum() / (len(faces_K) * np.maximum(faces_K, 1))).float()
        for name, faces_K in counts.items()
    }


def equal_weights(
    labels: dict[str, np.ndarray], net: AttributeNet, relaxation: Relaxation | None
) -> dict[str, Tensor]:
    """Return initial weights of 1 for each face [N] per attribute, {} without relaxation."""
    return {} if relaxation is None else {name: torch.ones(len(labels[name])) for name in net.attributes}


def reweigh(
    face_weights: dict[str, Tensor],
    net: AttributeNet,
    average: dict[str, Tensor],
    faces: tuple[np.ndarray, np.ndarray | None, dict[str, np.ndarray]],
    plan: FitPlan,
    relaxation: Relaxation,
) -> None:
    """Update the weights of the faces from the averaged network's predictions; labelled faces have a mean weight of 1.

    faces: images, boxes and labels, as in `fit`.
    """
    images, boxes, labels = faces
    judge = copy.deepcopy(net).eval()
    judge.load_state_dict(average)
    logits = predict(judge, images, boxes, plan.expand)
    for name, weight_N in face_weights.items():
        probs_NK = torch.from_numpy(logits[name]).softmax(1).numpy()
        new_N = chosen_weights(probs_NK, labels[name], groups_of(labels, name), relaxation)
        weight_N.lerp_(torch.from_numpy(new_N).float() * (labels[name] >= 0).sum(), relaxation.damping)


def identify(net: AttributeNet, plan: FitPlan, pictures: int, relaxation: Relaxation | None = None) -> dict:
    """Return what must be equal to continue a checkpoint: plan, relaxation, the net's config, the number of images."""
    options = {key: value for key, value in asdict(plan).items() if key not in ("checkpoint", "save_every")}
    options |= {} if relaxation is None else {"relaxation": asdict(relaxation)}
    return options | {"config": json.dumps(net.config), "pictures": pictures}


def resume(
    plan: FitPlan,
    identity: dict,
    net: AttributeNet,
    optimizer,
    average: dict[str, Tensor],
    face_weights: dict[str, Tensor],
) -> int:
    """Load the checkpoint if there is one, and return the number of finished steps."""
    if plan.checkpoint is None or not Path(plan.checkpoint).exists():
        return 0
    state = torch.load(plan.checkpoint, weights_only=True, map_location=next(net.parameters()).device)
    if "identity" not in state:
        raise ValueError(f"{plan.checkpoint}: not a checkpoint of this program's `fit`; remove it to start anew")
    for key, value in identity.items():
        if state["identity"].get(key) != value:
            raise ValueError(f"{plan.checkpoint}: written with {key} = {state['identity'].get(key)}, now {value}")
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    average.update(state["average"])
    face_weights.update(state.get("face_weights", {}))
    return state["step"]


def dropped_shares(checkpoint: Path, labels: dict[str, np.ndarray], attributes: dict) -> dict:
    """Return attribute -> other attribute -> class -> share of its faces whose final weight is below 0.5.

    checkpoint: that of a finished run; {} if it had no relaxation.
    """
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    return {
        name: {
            other: {
                cls: float((weight_N.numpy()[rows] < 0.5).mean())
                for k, cls in enumerate(attributes[other])
                if (rows := (labels[name] >= 0) & (labels[other] == k)).any()
            }
            for other in labels
        }
        for name, weight_N in state.get("face_weights", {}).items()
    }


def one_cycle(done: float) -> float:
    """Return the learning-rate factor at a fraction of the run: a cosine up to 1 over the first 15 %, then down to 0."""
    if done < 0.15:
        return 0.5 * (1 - math.cos(math.pi * (done + 0.01) / 0.16))
    return 0.5 * (1 + math.cos(math.pi * (done - 0.15) / 0.85))


def label_loss(
    logits: dict[str, Tensor],
    label_N: dict[str, Tensor],
    smoothing: float,
    weigh: dict[str, Tensor] | None = None,
    class_weights: dict[str, Tensor] | None = None,
) -> Tensor:
    """Return the sum over attributes of the mean cross-entropy of labelled faces; an attribute without labels adds 0.

    weigh: weights of the faces [N] per attribute, with mean 1 over all faces. class_weights: class weights [K] per attribute.
    """
    total = 0.0
    for name, logits_NK in logits.items():
        true_N, weight_K = label_N[name], (class_weights or {}).get(name)
        if not weigh:
            loss = F.cross_entropy(
                logits_NK, true_N, weight_K, ignore_index=-1, label_smoothing=smoothing, reduction="sum"
            )
        else:
            loss_N = F.cross_entropy(
                logits_NK, true_N, weight_K, ignore_index=-1, label_smoothing=smoothing, reduction="none"
            )
            loss = (loss_N * weigh[name]).sum()
        total = total + loss / (true_N >= 0).sum().clamp(min=1)
    return total


@torch.no_grad()
def update_average(average: dict[str, Tensor], net: AttributeNet, keep: float) -> None:
    """Update the exponential moving average of floating-point tensors, also of batch statistics; counters are copied."""
    for key, value in net.state_dict().items():
        if value.is_floating_point():
            average[key].lerp_(value, 1 - keep)
        else:
            average[key].copy_(value)


@torch.no_grad()
def predict(
    net: AttributeNet, images: np.ndarray, boxes: np.ndarray | None = None, expand: float = EXPAND, batch: int = 256
) -> dict[str, np.ndarray]:
    """Return logits [N, K] per attribute of whole images, or of the crops at their boxes."""
    device = next(net.parameters()).device
    parts = []
    for start in range(0, len(images), batch):
        rows = slice(start, start + batch)
        crop_NCHW = cut(images[rows], None if boxes is None else boxes[rows], net.config["image_size"], expand)
        parts.append(net(crop_NCHW.to(device)))
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in net.attributes}


def augment(crop_NCHW: Tensor, generator: Generator) -> Tensor:
    """Augment crops in [0, 1]: flip, rotate, blur, recolour, erase."""
    crop_NCHW = rotate(flip(crop_NCHW, generator), generator)
    crop_NCHW = recolour(blur(crop_NCHW, generator), generator)
    return erase(crop_NCHW, generator).clamp(0, 1)


def uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def jitter_boxes(
    images: np.ndarray, boxes: np.ndarray | None, rows: np.ndarray, expand: float, generator: Generator
) -> np.ndarray:
    """Return squares about the boxes, shifted by up to 8 % of the box and scaled by up to 15 %: more than detectors err."""
    if boxes is None:
        height, width = images.shape[1:3]
        box_N4, expand = torch.tensor([[0.0, 0.0, width, height]]).repeat(len(rows), 1), 1.0
    else:
        box_N4 = torch.from_numpy(boxes[rows]).float()
    side_N1 = (box_N4[:, 2:] - box_N4[:, :2]).amax(1, keepdim=True)
    shift_N2 = side_N1 * uniform((len(rows), 2), -0.08, 0.08, generator)
    box_N4 = expand_box(box_N4 + shift_N2.repeat(1, 2), expand)
    centre_N2, half_N2 = (box_N4[:, :2] + box_N4[:, 2:]) / 2, (box_N4[:, 2:] - box_N4[:, :2]) / 2
    half_N2 = half_N2 * uniform((len(rows), 1), -0.14, 0.14, generator).exp()
    return torch.cat([centre_N2 - half_N2, centre_N2 + half_N2], 1).numpy()


def flip(crop_NCHW: Tensor, generator: Generator) -> Tensor:
    """Mirror half of the images."""
    mirrored = uniform((len(crop_NCHW), 1, 1, 1), 0, 1, generator) < 0.5
    return torch.where(mirrored, crop_NCHW.flip(-1), crop_NCHW)


def rotate(crop_NCHW: Tensor, generator: Generator) -> Tensor:
    """Rotate each image by up to 0.15 rad."""
    angle_N = uniform((len(crop_NCHW),), -0.15, 0.15, generator)
    zero_N = torch.zeros_like(angle_N)
    row_N3 = torch.stack([angle_N.cos(), -angle_N.sin(), zero_N], 1)
    column_N3 = torch.stack([angle_N.sin(), angle_N.cos(), zero_N], 1)
    grid = F.affine_grid(torch.stack([row_N3, column_N3], 1), list(crop_NCHW.shape), align_corners=False)
    return F.grid_sample(crop_NCHW, grid, padding_mode="border", align_corners=False)


def blur(crop_NCHW: Tensor, generator: Generator) -> Tensor:
    """Blur 60 % of the images by a Gaussian with sigma up to 3 % of the side, as one matrix product per image and axis."""
    count, size = len(crop_NCHW), crop_NCHW.shape[-1]
    sigma_N = uniform((count,), 0, 0.03, generator) * size
    sigma_N = torch.where(uniform((count,), 0, 1, generator) < 0.6, sigma_N, 0).clamp(min=0.1)
    pixel = torch.arange(size, dtype=torch.float32)
    distance_SS = (pixel[:, None] - pixel).square()
    kernel_NSS = torch.softmax(-distance_SS / (2 * sigma_N.square())[:, None, None], 2).unsqueeze(1)
    return kernel_NSS @ crop_NCHW @ kernel_NSS.transpose(2, 3)


def recolour(crop_NCHW: Tensor, generator: Generator) -> Tensor:
    """Change brightness, contrast and saturation, and add a weak colour cast and noise.

    Brightness changes by at most 15 % and the cast by 6 %, because perceived race depends on skin tone.
    """
    shape = (len(crop_NCHW), 1, 1, 1)
    mean = crop_NCHW.mean((1, 2, 3), keepdim=True)
    grey = crop_NCHW.mean(1, keepdim=True)
    crop_NCHW = grey + (crop_NCHW - grey) * uniform(shape, 0.7, 1.3, generator)
    crop_NCHW = mean + (crop_NCHW - mean) * uniform(shape, 0.75, 1.25, generator)
    cast = uniform((shape[0], 3, 1, 1), 0.94, 1.06, generator)
    crop_NCHW = crop_NCHW * cast * uniform(shape, 0.85, 1.15, generator)
    sigma = uniform(shape, 0, 0.06, generator)
    return crop_NCHW + sigma * torch.randn(crop_NCHW.shape, generator=generator)


def erase(crop_NCHW: Tensor, generator: Generator) -> Tensor:
    """Cover a quarter of the images with one flat rectangle of up to 30 % of each side."""
    count, size = len(crop_NCHW), crop_NCHW.shape[-1]
    pixel = (torch.arange(size) + 0.5) / size
    centre_N2, half_N2 = uniform((count, 2), 0, 1, generator), uniform((count, 2), 0.03, 0.15, generator)
    inside_N2S = (pixel - centre_N2[..., None]).abs() < half_N2[..., None]
    chosen = uniform((count, 1, 1, 1), 0, 1, generator) < 0.25
    covered = chosen & inside_N2S[:, None, 1, :, None] & inside_N2S[:, None, 0, None, :]
    return torch.where(covered, uniform((count, 3, 1, 1), 0, 1, generator), crop_NCHW)
