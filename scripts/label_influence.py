"""Find the training labels that widen a classifier's gap between groups, and measure the effect of relabelling them.

python scripts/label_influence.py              the check against retraining, and all cells; repeat it to continue
python scripts/label_influence.py --render     only the page; --publish writes docs/studies

The data are renders of Portraits (scripts/build_portraits/make_data.py --images 4000) with flipped gender labels, and the
classifier is trained on them by cross-entropy, as in scripts/label_errors.py. The groups are Black and all other races. Then
all layers but the last are frozen. Influence needs faces with trusted labels: the validation faces. The numbers for the page
are kept in outputs/reproduced/measurements/studies/label_influence.json.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from harness.label_influence_page import RATES, SEEDS, SHARES, WAYS, key_of, page
from harness.labelled_renders import FOLDER, KINDS, Faces, flipped, read_renders, require_renders
from harness.publish import add_study, conclude, read_record
from label_errors import pixels_of, trained
from rich.progress import track
from scipy.stats import mannwhitneyu, spearmanr
from torch import nn

from classifiers.influence import (
    calibration_error,
    curvature,
    expected_error,
    fitted,
    gap_between,
    gradient,
    influence,
    one_group,
    other_labels,
    probabilities,
)
from fairdiff.cli.ending import ending
from fairdiff.errors import FairDiffError
from fairdiff.files import write_json

TRAIN, VALIDATION, TEST, SMALL = 1500, 600, 1400, 200
DAMPING = 1e-2
ROUND = 0.02  # share of the training faces that is relabelled in one round
CHECKED = {"gap in error": expected_error, "gap in calibration": calibration_error}


@dataclass(frozen=True)
class Part:
    """Some faces: features [N, D], true gender [N], group [N]."""

    features_ND: np.ndarray
    true_N: np.ndarray
    group_N: np.ndarray

    def rows(self, rows: np.ndarray) -> "Part":
        return Part(self.features_ND[rows], self.true_N[rows], self.group_N[rows])


@dataclass(frozen=True)
class Judge:
    """A fitted last layer with its training faces, their labels y and predicted probabilities, and the Hessian H."""

    train: Part
    y_NK: np.ndarray
    weights_DK: np.ndarray
    probs_NK: np.ndarray
    H: np.ndarray

    def influence_on(self, metric, faces: Part) -> np.ndarray:
        """Predict the change [N] of the metric on `faces` if each training face got the other label."""
        slope = gradient(metric, self.weights_DK, faces.features_ND, faces.true_N)
        return influence(self.H, slope, self.train.features_ND, other_labels(self.probs_NK, self.y_NK) - self.y_NK)


def judge_of(train: Part, y_NK: np.ndarray, start: Judge | None = None) -> Judge:
    """Fit the last layer to convergence. Starting from the weights of `start` gives the same result in less time."""
    weights_DK = fitted(train.features_ND, y_NK, DAMPING, None if start is None else start.weights_DK)
    probs_NK = probabilities(weights_DK, train.features_ND)
    return Judge(train, y_NK, weights_DK, probs_NK, curvature(probs_NK, train.features_ND, DAMPING))


def split(everything: Faces, seed: int) -> tuple[Faces, Faces, Faces]:
    """Return the training, validation and test faces."""
    order = np.random.default_rng([31, seed]).permutation(len(everything.gender_N))
    ends = np.cumsum([TRAIN, VALIDATION, TEST])
    return tuple(everything.rows(order[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True))


@torch.no_grad()
def hidden(net: nn.Module, faces: Faces) -> Part:
    """Return the faces with the input of a classifier's last layer and a constant 1 as features."""
    inner_ND = net[:-1](pixels_of(faces)).double().numpy()
    return Part(np.concatenate([inner_ND, np.ones((len(inner_ND), 1))], 1), faces.gender_N, faces.group_N)


def begun(parts: tuple[Faces, Faces, Faces], label_N: np.ndarray, seed: int) -> tuple[Part, Part, Part]:
    """Train a classifier on the training faces with these labels, and return the features of all parts by `hidden`."""
    net = trained(pixels_of(parts[0]), label_N, seed)
    return tuple(hidden(net, faces) for faces in parts)


def check(faces: tuple[Faces, Faces, Faces], seed: int) -> dict[str, dict[str, float]]:
    """Return Spearman's correlation of predicted and true changes if one of SMALL faces is relabelled or left out."""
    label_N = flipped(faces[0], 0.2, "uniform", np.random.default_rng([32, seed]))
    train, validation, _ = begun(faces, label_N, seed)
    small, y_NK = train.rows(np.arange(SMALL)), np.eye(2)[label_N[:SMALL]]
    judge = judge_of(small, y_NK)
    other_NK = other_labels(judge.probs_NK, y_NK)
    found: dict[str, dict[str, float]] = {name: {} for name in CHECKED}
    for what, goal_NK in (("relabelled", other_NK), ("left out", judge.probs_NK)):
        again = []
        for i in range(SMALL):
            # a label equal to the prediction has gradient 0 for the present weights only; without its row it stays 0
            rows = np.delete(np.arange(SMALL), i) if what == "left out" else np.arange(SMALL)
            labels = y_NK.copy()
            labels[i] = goal_NK[i]
            own = DAMPING * SMALL / len(rows)  # keeps the ratio of damping to the faces' summed loss
            again.append(fitted(small.features_ND[rows], labels[rows], own, judge.weights_DK))
        for name, metric in CHECKED.items():
            gap = gap_between(metric, validation.group_N)
            slope = gradient(gap, judge.weights_DK, validation.features_ND, validation.true_N)
            predicted = influence(judge.H, slope, small.features_ND, goal_NK - y_NK)
            true = [gap(probabilities(w, validation.features_ND), validation.true_N)[0] for w in again]
            found[name][what] = float(spearmanr(predicted, true).statistic)
    return found


def scores(way: str, judge: Judge, validation: Part, rng: np.random.Generator) -> np.ndarray:
    """Return how suspect each training label is [N]. For an influence: the predicted decrease by the other label."""
    metrics: dict[str, Callable] = {n: gap_between(m, validation.group_N) for n, m in CHECKED.items()}
    metrics["error of all"] = expected_error
    if way == "gap in error, no harm":
        each = [one_group(expected_error, validation.group_N, group) for group in (0, 1)]
        harm_N = np.max([judge.influence_on(metric, validation) for metric in each], 0) > 0
        return np.where(harm_N, 0, np.maximum(scores("gap in error", judge, validation, rng), 0))
    if way == "random":
        return rng.random(len(judge.y_NK))
    if way == "loss":
        return -np.log(np.maximum((judge.probs_NK * judge.y_NK).sum(1), 1e-300))
    return -judge.influence_on(metrics[way], validation)


def measured(judge: Judge, faces: Part) -> dict[str, float]:
    """Return the accuracy, and the absolute gaps between groups in error rate and calibration error."""
    probs_FK = probabilities(judge.weights_DK, faces.features_ND)
    wrong_F = probs_FK.argmax(1) != faces.true_N
    rates = [wrong_F[faces.group_N == group].mean() for group in (0, 1)]
    calibration = gap_between(calibration_error, faces.group_N)(probs_FK, faces.true_N)[0]
    gap = float(abs(rates[0] - rates[1]))
    return {"accuracy": 1 - float(wrong_F.mean()), "error gap": gap, "calibration gap": calibration}


def mended(way: str, judge: Judge, validation: Part, test: Part, rng: np.random.Generator) -> dict:
    """Relabel the most suspect faces and fine-tune, in rounds with a new ranking after each.

    No label is changed twice. By influence, only labels whose change is predicted to help are changed. Returns test numbers
    at each of SHARES, and for the round with the least gap in expected error on the validation faces (`stopped`).
    """
    count, touched_N, steps = int(ROUND * TRAIN), np.zeros(TRAIN, bool), round(SHARES[-1] / ROUND)
    gap, true_NK = gap_between(expected_error, validation.group_N), np.eye(2)[judge.train.true_N]
    wrong_N, path, best = (judge.y_NK != true_NK).any(1), [], None
    for step in range(steps + 1):
        least = gap(probabilities(judge.weights_DK, validation.features_ND), validation.true_N)[0]
        right = float(wrong_N[touched_N].mean()) if touched_N.any() else None
        now = measured(judge, test) | {"relabelled": float(touched_N.mean()), "of them wrong": right}
        if best is None or least < best[0]:
            best = least, now
        if any(abs(step * ROUND - share) < ROUND / 2 for share in SHARES):
            path.append(now)
        score_N = np.where(touched_N, -np.inf, scores(way, judge, validation, rng))
        chosen = np.argsort(-score_N, kind="stable")[:count]
        chosen = chosen[score_N[chosen] > 0]
        touched_N[chosen] = True
        y_NK = judge.y_NK.copy()
        y_NK[chosen] = other_labels(judge.probs_NK, judge.y_NK)[chosen]
        judge = judge_of(judge.train, y_NK, judge)
    return {"path": path, "stopped": best[1]}


def cell(faces: tuple[Faces, Faces, Faces], kind: str, rate: float, seed: int) -> dict:
    """Return for each ranking the AUC of "is mislabelled" and the effect of relabelling; also numbers with true labels.

    With true labels, too, only the last layer is fitted.
    """
    label_N = flipped(faces[0], rate, kind, np.random.default_rng([33, seed, int(100 * rate), KINDS.index(kind)]))
    train, validation, test = begun(faces, label_N, seed)
    judge, wrong_N = judge_of(train, np.eye(2)[label_N]), label_N != train.true_N
    found = {"true labels": measured(judge_of(train, np.eye(2)[train.true_N]), test), "as labelled": measured(judge, test)}
    for way in WAYS:
        rng = np.random.default_rng([34, seed])
        score_N = scores(way, judge, validation, rng)
        area = mannwhitneyu(score_N[wrong_N], score_N[~wrong_N]).statistic / (wrong_N.sum() * (~wrong_N).sum())
        found[way] = {"area": float(area)} | mended(way, judge, validation, test, rng)
    return found


def measure(renders: Path, kept_in: Path) -> None:
    """Compute what the record lacks, and write the record after each part."""
    require_renders(renders)
    record = read_record(kept_in) if kept_in.exists() else {"check": {}, "cells": {}}
    faces = read_renders(renders)
    people, needed = len(faces.gender_N), TRAIN + VALIDATION + TEST
    if people < needed:
        raise FairDiffError(f"--renders: found {people} people, allowed: {needed} or more, as make_data.py --images 4000 has")
    for seed in track(SEEDS, "against training again"):
        if str(seed) not in record["check"]:
            record["check"][str(seed)] = check(split(faces, seed), seed)
            write_json(kept_in, record)
    for seed, kind, rate in track(list(product(SEEDS, KINDS, RATES)), "cells"):
        if (key := key_of(kind, rate, seed)) not in record["cells"]:
            record["cells"][key] = cell(split(faces, seed), kind, rate, seed)
            write_json(kept_in, record)


@ending("interrupted; the same command goes on")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--renders", type=Path, default=FOLDER, help="folder of shards")
    add_study(parser, "label_influence")
    args = parser.parse_args(argv)
    command = "python scripts/label_influence.py"
    conclude(args, "label_influence", lambda kept: measure(args.renders, kept), lambda found: page(found, command))


if __name__ == "__main__":
    main()
