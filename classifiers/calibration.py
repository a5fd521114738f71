"""The calibration of a judge on labelled faces: confusion counts, temperature and reliability.

Shapes: N labelled faces, K classes. Confusion is stored as counts and not as rates, so that it can be resampled when shares
are corrected with it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from classifiers.files import written

CALIBRATION_FILE = "calibration.json"  # beside a judge's weights
# Options that determine the crops a judge gets, on which its errors depend: detector, its input size, and the side of the
# crops in pixels and in face boxes. `align` (true or absent) marks crops that are aligned by five landmarks.
CROPS = {"type": str, "input_size": int, "crop_size": int, "expand": float}
MOST_FACES = 10**12  # more than anybody labels, and small enough that counts do not overflow


def confusion(true_N: np.ndarray, predicted_N: np.ndarray, classes: int) -> np.ndarray:
    """Return the confusion counts C[true, predicted], int64 [K, K]."""
    counts_KK = np.zeros((classes, classes), np.int64)
    np.add.at(counts_KK, (np.asarray(true_N), np.asarray(predicted_N)), 1)
    return counts_KK


def temperature(logits_NK: np.ndarray, true_N: np.ndarray) -> float:
    """Return the T in [1/20, 20] that minimises the mean negative log-likelihood of softmax(logits / T).

    T above 1 means that the judge is over-confident. Source: Guo et al., "On Calibration of Modern Neural Networks", 2017.
    """
    logits_NK, rows = np.asarray(logits_NK, float), np.arange(len(true_N))

    def loss(log_t: float) -> float:
        return -log_softmax(logits_NK / np.exp(log_t), axis=1)[rows, true_N].mean()

    return float(np.exp(minimize_scalar(loss, bounds=(-np.log(20), np.log(20)), method="bounded").x))


@dataclass(frozen=True)
class Reliability:
    """Confidence of the top class and accuracy in equal-width bins; an empty bin has count 0 and NaN for both.

    `ece` = sum_b n_b / N |accuracy_b - confidence_b|, the expected calibration error, in [0, 1]; 0 is calibrated.
    """

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float


def reliability(probs_NK: np.ndarray, true_N: np.ndarray, bins: int = 15) -> Reliability:
    """Return the reliability in equal-width bins (low, high] over [0, 1]."""
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
    """The calibration of a judge for one attribute: class names, counts C[true, predicted], temperature, ECE.

    bins: the reliability diagram. groups: attribute -> class -> (right, faces) among the faces with this label; the entry of
    the attribute itself has its accuracy per class. judge: fingerprint of the judge. The last three may be None, and files
    of other tools have none of them.
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
    """Return the calibration of each labelled attribute from logits [N, K] and labels [N]; -1 means unlabelled.

    Raises ValueError if a class of an attribute has no labelled face, because its errors cannot be counted.
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
    """Return (right, faces) among the faces of each class."""
    return {c: (int(right_N[group_N == k].sum()), int((group_N == k).sum())) for k, c in enumerate(classes)}


def save_calibration(calibrations: dict[str, Calibration], detector: dict, file: Path, about: dict | None = None) -> None:
    """Write calibrations as JSON. detector: options of the crops on which they were measured, with the keys of CROPS.

    about: further content of the file, such as the judge and the faces.
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
    """Return (calibrations without bins and groups, detector) from a file of `save_calibration`; ValueError, naming the
    file, if it is none."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        detector = _crops(content.get("detector"))
        calibrations = {name: _calibration(name, c) for name, c in content["attributes"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: is no calibration ({type(error).__name__}: {error})") from error
    return calibrations, detector


def _crops(found: object) -> dict:
    """Return the options of the crops on which a judge was measured; ValueError unless every key of CROPS is valid."""
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
    """Return the calibration of one attribute; ValueError that names an invalid entry."""
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
    """Return counts, int64 [rows, columns]; the caller checks that both equal the number of classes."""
    rows = found if isinstance(found, list) and found and all(isinstance(row, list) and row for row in found) else []
    cells = [cell for row in rows for cell in row]
    even = len({len(row) for row in rows}) == 1
    if not even or not all(_is(cell, float) and 0 <= cell <= MOST_FACES and cell % 1 == 0 for cell in cells):
        raise ValueError(f"{name}.counts: found {_short(found)}, allowed: rows of numbers of faces, 0 to {MOST_FACES:.0e}")
    return np.array(rows, float).astype(np.int64)


def _is(value: object, kind: type) -> bool:
    """Return whether a JSON value has a type; true and false do not count as numbers, and an int counts as a float."""
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def _short(value: object) -> str:
    """Return the repr of a value, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
