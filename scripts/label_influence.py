"""Which training labels widen a judge's gap between groups, and what relabelling them does.

python scripts/label_influence.py              the check against training again, and all cells; the same command goes on
python scripts/label_influence.py --render     only the page; --publish writes docs/studies

Renders of Portraits (scripts/build_portraits/make_data.py --images 4000) whose gender labels are flipped, as in
scripts/label_errors.py, and its judge, trained on them by cross-entropy. Groups: race, Black against the others. Then all but
the last layer is frozen. Influence needs faces with trusted labels: the validation faces. What the page needs is kept in
outputs/reproduced, in measurements/studies/label_influence.json.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from harness.label_influence_page import RATES, SEEDS, SHARES, WAYS, key_of, page
from harness.labelled_renders import FOLDER, KINDS, Faces, flipped, has_renders, read_renders
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
ROUND = 0.02  # of the training faces are relabelled at once
CHECKED = {"gap in error": expected_error, "gap in calibration": calibration_error}


@dataclass(frozen=True)
class Part:
    """Features [N, D], true gender [N], group [N]."""

    features_ND: np.ndarray
    true_N: np.ndarray
    group_N: np.ndarray

    def rows(self, rows: np.ndarray) -> "Part":
        return Part(self.features_ND[rows], self.true_N[rows], self.group_N[rows])


@dataclass(frozen=True)
class Judge:
    """A fitted last layer, with the training labels y it was fitted to, its answers to the training faces, and H."""

    train: Part
    y_NK: np.ndarray
    weights_DK: np.ndarray
    probs_NK: np.ndarray
    H: np.ndarray

    def influence_on(self, metric, faces: Part) -> np.ndarray:
        """Predicted change [N] of the metric on other faces by the other label of each training face."""
        slope = gradient(metric, self.weights_DK, faces.features_ND, faces.true_N)
        return influence(self.H, slope, self.train.features_ND, other_labels(self.probs_NK, self.y_NK) - self.y_NK)


def judge_of(train: Part, y_NK: np.ndarray, start: Judge | None = None) -> Judge:
    """Fitted to the end; `start`: fine-tuned from there, which has the same end and takes less time."""
    weights_DK = fitted(train.features_ND, y_NK, DAMPING, None if start is None else start.weights_DK)
    probs_NK = probabilities(weights_DK, train.features_ND)
    return Judge(train, y_NK, weights_DK, probs_NK, curvature(probs_NK, train.features_ND, DAMPING))


def split(everything: Faces, seed: int) -> tuple[Faces, Faces, Faces]:
    """Training, validation and test faces."""
    order = np.random.default_rng([31, seed]).permutation(len(everything.gender_N))
    ends = np.cumsum([TRAIN, VALIDATION, TEST])
    return tuple(everything.rows(order[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True))


@torch.no_grad()
def hidden(net: nn.Module, faces: Faces) -> Part:
    """What a judge's last layer sees, and a constant."""
    inner_ND = net[:-1](pixels_of(faces)).double().numpy()
    return Part(np.concatenate([inner_ND, np.ones((len(inner_ND), 1))], 1), faces.gender_N, faces.group_N)


def begun(parts: tuple[Faces, Faces, Faces], label_N: np.ndarray, seed: int) -> tuple[Part, Part, Part]:
    """The faces as the last layer sees them, of a judge trained on these labels of the training faces."""
    net = trained(pixels_of(parts[0]), label_N, seed)
    return tuple(hidden(net, faces) for faces in parts)


def check(faces: tuple[Faces, Faces, Faces], seed: int) -> dict[str, dict[str, float]]:
    """Spearman's correlation of predicted and true changes: each of `SMALL` faces relabelled, or left out, alone."""
    label_N = flipped(faces[0], 0.2, "uniform", np.random.default_rng([32, seed]))
    train, validation, _ = begun(faces, label_N, seed)
    small, y_NK = train.rows(np.arange(SMALL)), np.eye(2)[label_N[:SMALL]]
    judge = judge_of(small, y_NK)
    other_NK = other_labels(judge.probs_NK, y_NK)
    found: dict[str, dict[str, float]] = {name: {} for name in CHECKED}
    for what, goal_NK in (("relabelled", other_NK), ("left out", judge.probs_NK)):
        again = []
        for i in range(SMALL):
            # a face whose label is what the judge says of it pulls nowhere; the next line follows it as it changes
            rows = np.delete(np.arange(SMALL), i) if what == "left out" else np.arange(SMALL)
            labels = y_NK.copy()
            labels[i] = goal_NK[i]
            own = DAMPING * SMALL / len(rows)  # as much of it a face as before
            again.append(fitted(small.features_ND[rows], labels[rows], own, judge.weights_DK))
        for name, metric in CHECKED.items():
            gap = gap_between(metric, validation.group_N)
            slope = gradient(gap, judge.weights_DK, validation.features_ND, validation.true_N)
            predicted = influence(judge.H, slope, small.features_ND, goal_NK - y_NK)
            true = [gap(probabilities(w, validation.features_ND), validation.true_N)[0] for w in again]
            found[name][what] = float(spearmanr(predicted, true).statistic)
    return found


def scores(way: str, judge: Judge, validation: Part, rng: np.random.Generator) -> np.ndarray:
    """How suspect each training label is [N]; of an influence the predicted fall of its number by the other label."""
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
    """Accuracy, and between groups the absolute gap in the error rate and in the calibration error."""
    probs_FK = probabilities(judge.weights_DK, faces.features_ND)
    wrong_F = probs_FK.argmax(1) != faces.true_N
    rates = [wrong_F[faces.group_N == group].mean() for group in (0, 1)]
    calibration = gap_between(calibration_error, faces.group_N)(probs_FK, faces.true_N)[0]
    gap = float(abs(rates[0] - rates[1]))
    return {"accuracy": 1 - float(wrong_F.mean()), "error gap": gap, "calibration gap": calibration}


def mended(way: str, judge: Judge, validation: Part, test: Part, rng: np.random.Generator) -> dict:
    """Relabel and fine-tune: rounds in which the most suspect labels are changed, ranked anew after each.

    No label is changed twice, and by influence none whose change is not predicted to help. Test numbers at each of `SHARES`,
    and where the gap in the expected error of the validation faces was least (`stopped`).
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
    """By way of ranking: area under "is mislabelled", and what relabelling does; beside them the true labels.

    True labels: of the last layer alone, as all relabelling is.
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
    """Everything that the record lacks; written after each part."""
    if not has_renders(renders):
        raise FairDiffError(
            f"--renders: found no shards in {renders}, allowed: a folder of scripts/build_portraits/make_data.py"
        )
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
