"""Training judges of Portraits with partly wrong gender labels: faces, labels, training and errors.

Faces are renders of people with an even number, as for the embedded training judge. The embedded audit judge was trained on
none of them. Held-out faces are the renderer's own split. Shapes: N faces.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from classifiers.attributes import AttributeNet, load_attribute_net, read_config, save_attribute_net
from classifiers.data import LabelledFaces, find_faces
from classifiers.training import FitPlan, fit, predict
from classifiers.types import Detector
from fairdiff.errors import FairDiffError
from fairdiff.portraits import weights
from fairdiff.studies.reading_errors import error_rates
from harness.labelled_renders import GROUP

KINDS = ("uniform", "by group", "only female", "only male")
ATTRIBUTE = "gender"
CLASSES = ("female", "male")


def read_faces(folder: Path, detector: Detector) -> tuple[LabelledFaces, LabelledFaces]:
    """Return the training faces and the held-out faces with their true labels. FairDiffError for a folder with too few."""
    shards = [np.load(file) for file in sorted(folder.glob("shard_*.npz"))]
    column = {
        name: np.concatenate([shard[name] for shard in shards])
        for name in ("image", "gender", "race", "age", "person", "split")
    }
    own = {
        "train": (column["gender"] >= 0) & (column["split"] == 0) & (column["person"] % 2 == 0),
        "held out": (column["gender"] >= 0) & (column["split"] == 1),
    }
    found = []
    for name, chosen_N in own.items():
        rows = np.flatnonzero(chosen_N)
        seen, boxes = find_faces(column["image"][rows], detector) if len(rows) else (rows, np.zeros((0, 4)))
        labels = {a: column[a][rows[seen]].astype(np.int64) for a in ("gender", "race", "age")}
        if len(np.unique(labels["gender"])) < 2:
            raise FairDiffError(f"--renders: {folder} has {len(seen)} faces to {name}, allowed: faces of both genders")
        found.append(LabelledFaces(column["image"][rows[seen]], boxes, labels))
    return found[0], found[1]


def flipped(labels: dict[str, np.ndarray], kind: str, rate: float, seed: int) -> np.ndarray:
    """Return gender labels [N] of which a share `rate` is flipped.

    kind: a kind of `error_rates`, which gives the share of each gender and group. The number in each is exact, rounded to a
    face. With the same seed, faces flipped at a lower rate are also flipped at a higher one.
    """
    true_N, group_N = labels[ATTRIBUTE], labels["race"] == GROUP
    if not rate:
        return true_N
    chance_N = error_rates(kind, true_N, group_N, rate, CLASSES)
    place_N = np.random.default_rng([51, seed]).permutation(len(true_N))
    wrong_N = np.zeros(len(true_N), bool)
    for gender in (0, 1):
        for group in (False, True):
            rows = np.flatnonzero((true_N == gender) & (group_N == group))
            rows = rows[np.argsort(place_N[rows])]
            wrong_N[rows[: round(float(chance_N[rows[:1]].sum()) * len(rows))]] = True
    return np.where(wrong_N, 1 - true_N, true_N)


def make_judge(folder: Path, faces: LabelledFaces, label_N: np.ndarray, plan: FitPlan) -> None:
    """Train a judge with the embedded training judge's architecture on these gender labels, unless it exists.

    The other attributes have their true labels. An interrupted training continues from its checkpoint in the folder.
    """
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    net = AttributeNet(read_config(weights("judge"), "attributes"))
    plan = replace(plan, checkpoint=folder / "fit.pt")
    fit(net, faces.images, faces.labels | {ATTRIBUTE: label_N}, plan, boxes=faces.boxes)
    save_attribute_net(net, folder)  # it writes config.json last
    plan.checkpoint.unlink()


def errors_of(folder: Path, held_out: LabelledFaces, expand: float) -> dict:
    """Return a judge's results on held-out faces with true labels.

    right: [right, faces] in total and by group. sure: the mean top probability.
    """
    logits_NK = predict(load_attribute_net(folder), held_out.images, held_out.boxes, expand)[ATTRIBUTE]
    true_N, group_N = held_out.labels[ATTRIBUTE], held_out.labels["race"] == GROUP
    right_N = logits_NK.argmax(1) == true_N
    some = {"all": np.ones(len(true_N), bool), "Black": group_N, "other races": ~group_N}
    some |= {name: true_N == k for k, name in enumerate(CLASSES)}
    counts = {name: [int(right_N[rows].sum()), int(rows.sum())] for name, rows in some.items()}
    return {"right": counts, "sure": float(torch.from_numpy(logits_NK).softmax(1).amax(1).mean())}
