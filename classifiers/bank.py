"""Embed a folder of pictures into a bank of real faces: detect, align and embed the one face of each as in training.

Progress is saved every few pictures in `<bank>.part`, and a later call continues from there.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from classifiers.data import to_float
from classifiers.identity import read_rows, write_rows
from classifiers.pictures import SUFFIXES, read_picture
from classifiers.types import Detector, Embedder

KEEP_EVERY = 50  # pictures after which progress is saved


@dataclass
class Collected:
    """Progress after `done` pictures: embeddings [D] of those that show one face, and counts of the others by reason."""

    done: int = 0
    rows: list[Tensor] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def stacked(self) -> Tensor:
        """Return the embeddings [N, D]; there must be one or more."""
        return torch.stack(self.rows)

    def __str__(self) -> str:
        others = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        return f"{len(self.rows)} faces of {self.done} pictures" + (f"; left out: {others}" if others else "")


def pictures_in(folder: Path) -> list[Path]:
    """Return the image files below a folder, sorted by relative path; ValueError if there is none."""
    files = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not files:
        raise ValueError(f"{folder}: found no pictures, allowed: a folder that holds some ({', '.join(sorted(SUFFIXES))})")
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


@torch.no_grad()
def embedding_of(file: Path, detector: Detector, embedder: Embedder, device: str) -> Tensor | str:
    """Return the embedding [D] of the one face of a picture, or the reason why it is left out."""
    try:
        pixels = read_picture(file)
    except ValueError:
        return "unreadable"
    image_1CHW = to_float(pixels[None]).to(device)
    boxes = detector(image_1CHW)
    if not len(boxes.row_F):
        return "without a face"
    if boxes.count_F.item() > 1:
        return "with several faces"
    return embedder(embedder.align(image_1CHW, boxes))[0].cpu()


def collect(
    files: list[Path], embed: Callable[[Path], Tensor | str], part: Path, request: str, dim: int
) -> Iterator[Collected]:
    """Yield the progress after each picture, continuing from the file `part` if it has the same request.

    request: a fingerprint of everything that the embeddings depend on. A part of another request, or a damaged one, is
    ignored.
    """
    known = _read(part, request)
    yield known
    for file in files[known.done :]:
        found = embed(file)
        if isinstance(found, str):
            known.left_out[found] += 1
        else:
            known.rows.append(found)
        known.done += 1
        if known.done % KEEP_EVERY == 0 or known.done == len(files):
            _write(part, request, known, dim)
        yield known


def _read(part: Path, request: str) -> Collected:
    try:
        rows_ND, about = read_rows(part)
        if about["request"] != request:
            return Collected()
        return Collected(about["done"], list(rows_ND.float()), Counter(about["left_out"]))
    except (SafetensorError, OSError, KeyError, ValueError):
        return Collected()


def _write(part: Path, request: str, known: Collected, dim: int) -> None:
    rows_ND = known.stacked() if known.rows else torch.zeros(0, dim)
    write_rows(rows_ND, part, {"request": request, "done": known.done, "left_out": known.left_out})
