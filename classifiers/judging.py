"""Classify a folder of image files with a judge; progress is saved, and a later call continues from there.

Shapes: N files, K logits of an attribute. The logits of all attributes are side by side in `width` columns.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from classifiers.crop import cut
from classifiers.data import to_float
from classifiers.files import written
from classifiers.pictures import read_picture
from classifiers.types import Classifier, Detector

BLOCK = 32  # files in a batch of the judge
KEEP_EVERY = 20  # blocks after which progress is saved
LONGEST = 2048  # pixels: longer images are reduced first, because a photograph of 100 megapixels would take 2 GB
FACE, NO_FACE, UNREADABLE = 1, 2, 3


@dataclass
class Judged:
    """Results of the first `done` files: what was found (FACE, ...) [done], and logits [done, width], NaN without a face."""

    found_N: np.ndarray
    logits_NK: np.ndarray

    @property
    def done(self) -> int:
        return len(self.found_N)

    def counts(self) -> dict[str, int]:
        """Return the number of files with a face, without one, and unreadable."""
        kinds = {"found": FACE, "not_found": NO_FACE, "unreadable": UNREADABLE}
        return {name: int((self.found_N == kind).sum()) for name, kind in kinds.items()}

    def logits(self, attributes: dict[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
        """Return the logits [faces, K] per attribute of the files with a face."""
        faces_FK = self.logits_NK[self.found_N == FACE]
        ends = np.cumsum([len(classes) for classes in attributes.values()])[:-1]
        return dict(zip(attributes, np.split(faces_FK, ends, 1), strict=True))

    def __str__(self) -> str:
        found = self.counts()
        more = [f"{found['not_found']} without a face"] if found["not_found"] else []
        more += [f"{found['unreadable']} unreadable"] if found["unreadable"] else []
        return f"{found['found']} faces of {self.done} pictures" + (f"; {', '.join(more)}" if more else "")


def largest_face(
    file: Path, detector: Detector, crop_size: int, expand: float, device: str, aligned: bool = False
) -> tuple[int, Tensor | None]:
    """Return whether a file has a face, and the crop [1, 3, crop_size, crop_size] of its largest one, None without."""
    try:
        image_1CHW = to_float(read_picture(file, LONGEST)[None]).to(device)
    except ValueError:
        return UNREADABLE, None
    boxes = detector(image_1CHW)
    if not len(boxes.row_F):
        return NO_FACE, None
    return FACE, cut(image_1CHW, boxes, crop_size, expand, aligned)


Look = Callable[[Path], tuple[int, Tensor | None]]


def judge_files(files: list[Path], look: Look, judge: Classifier, part: Path, request: str) -> Iterator[Judged]:
    """Yield the results after each block of files, continuing from the file `part` if it has the same request.

    request: fingerprint of everything that the results depend on. A part of another request, or a damaged one, is ignored.
    Results are also saved if the work is interrupted.
    """
    width = sum(len(classes) for classes in judge.attributes.values())
    known = _read(part, request, width)
    kept = known.done
    yield known
    try:
        for first in range(known.done, len(files), BLOCK):
            known = _joined(known, *_answers(files[first : first + BLOCK], look, judge))
            if known.done - kept >= KEEP_EVERY * BLOCK:
                _write(part, request, known)
                kept = known.done
            yield known
    finally:
        if known.done > kept:
            _write(part, request, known)


@torch.no_grad()
def _answers(files: list[Path], look: Look, judge: Classifier) -> tuple[np.ndarray, np.ndarray]:
    """Return found [block] and logits [block, width] of some files."""
    seen = [look(file) for file in files]
    found_N = np.array([kind for kind, _ in seen], np.int8)
    width = sum(len(classes) for classes in judge.attributes.values())
    logits_NK = np.full((len(files), width), np.nan, np.float32)
    if crops := [piece for _, piece in seen if piece is not None]:
        logits = judge(torch.cat(crops))
        logits_FK = torch.cat([logits[name] for name in judge.attributes], 1).float().cpu().numpy()
        if not np.isfinite(logits_FK).all():
            raise ValueError("the judge gives logits that are not finite, allowed: finite ones")
        logits_NK[found_N == FACE] = logits_FK
    return found_N, logits_NK


def _joined(known: Judged, found_N: np.ndarray, logits_NK: np.ndarray) -> Judged:
    return Judged(np.concatenate([known.found_N, found_N]), np.concatenate([known.logits_NK, logits_NK]))


def _read(part: Path, request: str, width: int) -> Judged:
    with suppress(SafetensorError, OSError, ValueError, KeyError, TypeError):
        with safe_open(part, "np") as store:
            if json.loads(store.metadata()["about"])["request"] == request:
                return Judged(store.get_tensor("found"), store.get_tensor("logits"))
    return Judged(np.zeros(0, np.int8), np.zeros((0, width), np.float32))


def _write(part: Path, request: str, known: Judged) -> None:
    tensors = {"found": torch.from_numpy(known.found_N), "logits": torch.from_numpy(known.logits_NK)}
    with written(part) as temporary:
        save_file(tensors, temporary, {"about": json.dumps({"request": request})})
