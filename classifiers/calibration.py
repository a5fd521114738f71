"""How far to trust a judge: confusion counts, temperature, reliability, all from labelled predictions.

N labelled faces, K classes. Counts are kept as counts, so that whoever corrects shares with them can also resample them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from classifiers.files import written

CALIBRATION_FILE = "calibration.json"  # beside a judge's weights
# What cuts the crops that a judge is asked about: the detector, its input size, the side of the crops in pixels and in
# face boxes; `align` (true or absent) for crops on five landmarks. On other crops a judge errs otherwise.
CROPS = {"type": str, "input_size": int, "crop_size": int, "expand": float}
MOST_FACES = 10**12  # more than anybody labels, and far from where counts overflow


def confusion(true_N: np.ndarray, predicted_N: np.ndarray, classes: int) -> np.ndarray:
    """Counts C[true, predicted], int64 [K, K]."""
    counts_KK = np.zeros((classes, classes), np.int64)
    np.add.at(counts_KK, (np.asarray(true_N), np.asarray(predicted_N)), 1)
    return counts_KK


def temperature(logits_NK: np.ndarray, true_N: np.ndarray) -> float:
    """T > 0 that minimises the mean negative log-likelihood of softmax(logits / T); above 1 = over-confident.

    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017. Sought in [1/20, 20].
    """
    logits_NK, rows = np.asarray(logits_NK, float), np.arange(len(true_N))

    def loss(log_t: float) -> float:
        return -log_softmax(logits_NK / np.exp(log_t), axis=1)[rows, true_N].mean()

    return float(np.exp(minimize_scalar(loss, bounds=(-np.log(20), np.log(20)), method="bounded").x))


@dataclass(frozen=True)
class Reliability:
    """Top-class confidence against accuracy in equal-width bins; an empty bin has count 0 and NaN elsewhere.

    `ece` = sum_b n_b / N |accuracy_b - confidence_b|, the expected calibration error, in [0, 1]; 0 is calibrated.
    """

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float


def reliability(probs_NK: np.ndarray, true_N: np.ndarray, bins: int = 15) -> Reliability:
    """Bins of (low, high] over [0, 1]."""
    confidence_N, hit_N = probs_NK.max(1), probs_NK.argmax(1) == true_N
    edges = np.linspace(0, 1, bins + 1)
    bin_N = np.clip(np.searchsorted(edges, confidence_N, side="left") - 1, 0, bins - 1)
    count = np.bincount(bin_N, minlength=bins)
    share = np.where(count, count, np.nan)
    confidence = np.bincount(bin_N, confidence_N, bins) / share
    accuracy = np.bincount(bin_N, hit_N, bins) / share
    ece = float(np.nansum(count * np.abs(accuracy - confidence)) / count.sum())
    return Reliability(edges, count, confidence, accuracy, ece)


@dataclass(frozen=True)
class Calibration:
    """One attribute of one judge on labelled faces: class names, counts C[true, predicted], temperature, ECE.

    bins: of the reliability diagram. groups: attribute -> class -> (right, faces) among faces labelled so; of the attribute
    itself the accuracy on each class. judge: a fingerprint of what answered. All None in files that other tools wrote.
    """

    classes: tuple[str, ...]
    counts: np.ndarray
    temperature: float
    ece: float
    bins: Reliability | None = None
    groups: dict[str, dict[str, tuple[int, int]]] | None = None
    judge: str | None = None

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.counts) / self.counts.sum())


def calibrate(
    logits: dict[str, np.ndarray], labels: dict[str, np.ndarray], attributes: dict[str, tuple[str, ...]]
) -> dict[str, Calibration]:
    """Per labelled attribute, from logits [N, K] and labels [N]; faces with label -1 are left out of that attribute.

    ValueError for an attribute of which a class has no labelled face: its errors cannot be counted.
    """
    result = {}
    for name, classes in attributes.items():
        if name not in labels:
            continue
        known = labels[name] >= 0
        logits_NK, true_N = logits[name][known].astype(float), labels[name][known]
        faces_K = np.bincount(true_N, minlength=len(classes))
        if not faces_K.all():
            raise ValueError(f"{name}: no face is labelled {classes[int(faces_K.argmin())]}, allowed: faces of every class")
        counts = confusion(true_N, logits_NK.argmax(1), len(classes))
        bins = reliability(np.exp(log_softmax(logits_NK, axis=1)), true_N)
        right_N = logits_NK.argmax(1) == true_N
        groups = {
            other: _by_class(right_N, labels[other][known], attributes[other]) for other in attributes if other in labels
        }
        result[name] = Calibration(classes, counts, temperature(logits_NK, true_N), bins.ece, bins, groups)
    return result


def _by_class(right_N: np.ndarray, group_N: np.ndarray, classes: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """(right, faces) among the faces of each class."""
    return {c: (int(right_N[group_N == k].sum()), int((group_N == k).sum())) for k, c in enumerate(classes)}


def save_calibration(calibrations: dict[str, Calibration], detector: dict, file: Path, about: dict | None = None) -> None:
    """JSON beside the judge's weights; `detector`: the crops on which they were measured, with the keys of CROPS.

    about: more for the file: what judge, what faces.
    """
    attributes = {name: _content(calibration) for name, calibration in calibrations.items()}
    content = {**(about or {}), "detector": detector, "attributes": attributes}
    with written(file) as part:
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _content(c: Calibration) -> dict:
    content = {"classes": c.classes, "counts": c.counts.tolist(), "temperature": c.temperature, "ece": c.ece}
    if c.bins is not None:
        bins = {"edges": c.bins.edges, "count": c.bins.count, "confidence": c.bins.confidence, "accuracy": c.bins.accuracy}
        content["reliability"] = {
            key: [None if np.isnan(x) else x for x in values.tolist()] for key, values in bins.items()
        }
    if c.groups is not None:
        content["groups"] = {
            name: {cls: {"right": right, "faces": faces} for cls, (right, faces) in group.items()}
            for name, group in c.groups.items()
        }
    return content if c.judge is None else content | {"judge": c.judge}


def load_calibration(file: Path) -> tuple[dict[str, Calibration], dict]:
    """(calibrations without bins and groups, detector) of `save_calibration`; ValueError naming the file if it is something
    else."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        detector = _crops(content.get("detector"))
        calibrations = {name: _calibration(name, c) for name, c in content["attributes"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: is no calibration ({type(error).__name__}: {error})") from error
    return calibrations, detector


def _crops(found: object) -> dict:
    """The crops on which a judge was measured; ValueError unless every key of CROPS is there and of its kind."""
    if not isinstance(found, dict) or not all(_is(found.get(key), kind) for key, kind in CROPS.items()):
        raise ValueError(
            f"detector: found {_short(found)}, allowed: {', '.join(CROPS)} of the crops on which it was measured"
        )
    for key in CROPS:
        if key != "type" and not 0 < found[key] < MOST_FACES:
            raise ValueError(f"detector.{key}: found {found[key]}, allowed: greater than 0")
    if not isinstance(found.get("align", False), bool):
        raise ValueError(f"detector.align: found {_short(found['align'])}, allowed: true or false")
    return {key: found[key] for key in CROPS} | ({"align": True} if found.get("align") else {})


def _calibration(name: str, c: dict) -> Calibration:
    """One attribute of a file; ValueError naming what is none."""
    classes = c["classes"]
    if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(cls, str) and cls for cls in classes):
        raise ValueError(f"{name}.classes: found {_short(classes)}, allowed: a list of two names or more")
    if len(set(classes)) < len(classes):
        raise ValueError(f"{name}.classes: found {_short(classes)}, allowed: different names")
    if not _is(c["temperature"], float) or not 0 < c["temperature"] < np.inf:
        raise ValueError(f"{name}.temperature: found {_short(c['temperature'])}, allowed: a number greater than 0")
    if not _is(c["ece"], float) or not 0 <= c["ece"] <= 1:
        raise ValueError(f"{name}.ece: found {_short(c['ece'])}, allowed: a number in [0, 1]")
    judge = c.get("judge")
    if not isinstance(judge, str | None):
        raise ValueError(f"{name}.judge: found {_short(judge)}, allowed: the fingerprint of a judge")
    return Calibration(tuple(classes), _counts(name, c["counts"]), c["temperature"], c["ece"], judge=judge)


def _counts(name: str, found: object) -> np.ndarray:
    """int64 [rows, columns]; whether they are as many as the classes is for who applies them."""
    rows = found if isinstance(found, list) and found and all(isinstance(row, list) and row for row in found) else []
    cells = [cell for row in rows for cell in row]
    even = len({len(row) for row in rows}) == 1
    if not even or not all(_is(cell, float) and 0 <= cell <= MOST_FACES and cell % 1 == 0 for cell in cells):
        raise ValueError(f"{name}.counts: found {_short(found)}, allowed: rows of numbers of faces, 0 to {MOST_FACES:.0e}")
    return np.array(rows, float).astype(np.int64)


def _is(value: object, kind: type) -> bool:
    """Whether a value of a JSON file is of a kind; true and false are no numbers, and a whole number is a float too."""
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def _short(value: object) -> str:
    """What was found, not more than fits on a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
