"""A store of face crops on disk, from which training reads without holding it in memory.

Shapes: N files, F <= N faces, S the side of a stored face in pixels.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from classifiers.files import written
from classifiers.judging import BLOCK, Look

# A stored face is wider than the judge's crop, because augmentation moves the box by 8 % and widens it by 15 %.
MARGIN = 1.25


def stored_side(size: int) -> int:
    """Return the side S of a stored face for a judge whose crops have `size` pixels."""
    return round(MARGIN * size)


def stored_boxes(faces: int, size: int, expand: float) -> np.ndarray:
    """Return the detector's box in each stored face, float [F, 4]; `expand` times the box has `size` pixels."""
    middle, half = stored_side(size) / 2, size / expand / 2
    return np.tile(np.array([middle - half, middle - half, middle + half, middle + half], np.float32), (faces, 1))


def store_faces(files: list[Path], look: Look, side: int, folder: Path, request: str) -> Iterator[tuple[int, int]]:
    """Yield (files done, faces found) after each block, continuing a store of the same request in `folder`.

    look: file -> whether it has a face, and its face [1, 3, side, side]. request: fingerprint of all that faces depend on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = _state(folder, request)
    mode, shape = ("r+" if state["done"] else "w+"), (len(files), side, side, 3)
    images = np.lib.format.open_memmap(folder / "faces.npy", mode, np.uint8, shape)
    yield state["done"], len(state["rows"])
    for first in range(state["done"], len(files), BLOCK):
        for row in range(first, min(first + BLOCK, len(files))):
            _, face_1CSS = look(files[row])
            if face_1CSS is not None:
                pixels = (face_1CSS[0].permute(1, 2, 0) * 255).round().clamp(0, 255).byte().cpu().numpy()
                images[len(state["rows"])] = pixels
                state["rows"].append(row)
        images.flush()
        state["done"] = min(first + BLOCK, len(files))
        _write(folder, state)
        yield state["done"], len(state["rows"])


def read_faces(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the stored faces, uint8 [F, S, S, 3] mapped from disk, and the index of each one's file [F]."""
    rows_F = np.array(json.loads((folder / "faces.json").read_text(encoding="utf-8"))["rows"], np.int64)
    return np.load(folder / "faces.npy", mmap_mode="c")[: len(rows_F)], rows_F


def _state(folder: Path, request: str) -> dict:
    with suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads((folder / "faces.json").read_text(encoding="utf-8"))
        if state["request"] == request and (folder / "faces.npy").exists():
            return state
    return {"request": request, "done": 0, "rows": []}


def _write(folder: Path, state: dict) -> None:
    with written(folder / "faces.json") as part:
        part.write_text(json.dumps(state), encoding="utf-8")
