"""Reference images o_i of a finite noise pool, reduced to the features that the losses compare with, cached on disk.

o_i depends on (prompt, noise, number of sampler steps) only, so each is sampled once for all runs that share the model
and the perception.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from fairdiff.distributed import ALONE, World
from fairdiff.files import write_bytes
from fairdiff.objective.perception import Perception

SCHEMA = 1  # raised when the same settings fill the cache with something else (tests/test_schemas.py)


@dataclass
class Originals:
    """A store of rows `name -> [pool, ...]` per (prompt, steps); missing rows are made by `generate` and kept.

    generate: (prompt, indices, steps) -> images of the model with the adapter off. folder: None keeps them in memory.
    block: how many pool indices are made at once. compared: of how many of each block, its first, a training batch is
    given, None for all; they are made apart from the rest. at_once: how many images are looked at together. world: the
    processes that make a block together, each some of its images; all then have the same rows, and the first one reads and
    writes the files.
    """

    perception: Perception
    generate: Callable[[str, list[int], int], Tensor]
    folder: Path | None
    block: int = 24
    compared: int | None = None
    rows: dict[str, dict[int, dict[str, Tensor]]] = field(default_factory=dict)
    sampled: int = 0
    device: str = "cpu"
    world: World = ALONE
    at_once: int = 64

    def get(self, prompt: str, indices: list[int], steps: int) -> dict[str, Tensor]:
        """Features `feature.<i>`, `box` [B, 4], `found`, `probs.<attribute>` and `face` of the given pool indices.

        Where rows are missing all processes call it, with the same arguments.
        """
        known, path = self._known(prompt, steps)
        missing = sorted({self.made_with(i) for i in indices if i not in known}, key=lambda block: block[0])
        for block in map(list, missing):
            made = self._made(prompt, block, steps)
            known.update({i: {n: t[row].clone() for n, t in made.items()} for row, i in enumerate(block)})
            self.sampled += len(block)
        if missing and self.world.first:
            _write(path, known)
        return {name: torch.stack([known[i][name] for i in indices]).to(self.device) for name in known[indices[0]]}

    def _made(self, prompt: str, block: list[int], steps: int) -> dict[str, Tensor]:
        """The measurements of a block, of which each process generates a part."""
        own = self.world.share(block)
        looks = [self.measure(images) for images in self.generate(prompt, own, steps).split(self.at_once)] if own else []
        parts = sum(self.world.gather([{n: t.cpu() for n, t in look.items()} for look in looks]), [])
        return {n: torch.cat([part[n] for part in parts]) for n in parts[0]}

    def _known(self, prompt: str, steps: int) -> tuple[dict[int, dict[str, Tensor]], Path | None]:
        """The known rows of a prompt, and the path where they are stored."""
        key = hashlib.sha256(f"{steps}|{prompt}".encode()).hexdigest()[:24]
        path = self.folder / f"{key}.safetensors" if self.folder else None
        if key not in self.rows:
            data = self.world.of_first(_bytes(path) if self.world.first else None)
            self.rows[key] = _read(data, self.names)
        return self.rows[key], path

    @property
    def names(self) -> set[str]:
        """The names of the tensors that `measure` returns."""
        seen = self.perception
        names = {"box", "found"} | ({"face"} if seen.embedder is not None else set())
        names |= {f"feature.{i}" for i in range(len(seen.encoders))}
        return names | {f"probs.{attribute}" for attribute in seen.classifier.attributes}

    @property
    def share(self) -> float:
        """The share of a block that is compared."""
        return (self.compared or self.block) / self.block

    def made_with(self, index: int) -> range:
        """The pool indices that are generated together with this one: always the same, so no row depends on earlier calls."""
        start = index // self.block * self.block
        first, end = start + (self.compared or self.block), start + self.block
        return range(start, first) if index < first else range(first, end)

    def sampled_rows(self, prompt: str, indices: list[int], steps: int) -> tuple[dict[str, Tensor], Tensor]:
        """`get` for the compared indices, with zeros for the others; and the weight of each image [B]: 1 / share, or 0.

        Indices are exchangeable, so the weighted sum over the compared images is an unbiased estimate of the sum over all
        (Horvitz and Thompson 1952), and only a fixed part of the pool is ever sampled.
        """
        first = self.compared or self.block
        inside = [i for i in indices if i % self.block < first]
        has_B = torch.tensor([i in inside for i in indices])
        rows = self.get(prompt, inside or [next(iter(self._known(prompt, steps)[0]), 0)], steps)
        spread = {name: t.new_zeros(len(indices), *t.shape[1:]) for name, t in rows.items()}
        for name, table in spread.items():
            table[has_B.to(table.device)] = rows[name][: int(has_B.sum())]
        return spread, (has_B / self.share).to(self.device)

    @torch.no_grad()
    def measure(self, image_BCHW: Tensor) -> dict[str, Tensor]:
        """The features that the losses compare with, one row for each image."""
        seen = self.perception.classify_faces(image_BCHW)
        out = {f"feature.{i}": f for i, f in enumerate(self.perception.features(image_BCHW))}
        out |= {f"probs.{a}": seen.probs_BK(a) for a in seen.logits}
        out |= {"box": seen.box_B4(), "found": seen.faces.found_B}
        if self.perception.embedder is not None:
            embedding = self.perception.embed(self.perception.align(seen))
            out["face"] = embedding.new_zeros(len(image_BCHW), embedding.shape[1])
            out["face"][seen.faces.row_F] = embedding
        return out


def _bytes(path: Path | None) -> bytes:
    """The content of a file, b"" if it is missing or unreadable."""
    try:
        return path.read_bytes() if path else b""
    except OSError:
        return b""


def _read(data: bytes, names: set[str]) -> dict[int, dict[str, Tensor]]:
    """The rows of a file, {} if it is empty or damaged: it is only a cache, so what it held is made anew."""
    try:
        table = from_bytes(data)
    except SafetensorError:
        return {}
    index = table.pop("index", torch.zeros(0)).flatten().tolist()
    if set(table) != names or any(tensor.shape[:1] != (len(index),) for tensor in table.values()):
        return {}
    return {i: {name: tensor[row] for name, tensor in table.items()} for row, i in enumerate(index)}


def _write(path: Path | None, rows: dict[int, dict[str, Tensor]]) -> None:
    if path is None:
        return
    table = {name: torch.stack([row[name] for row in rows.values()]) for name in next(iter(rows.values()))}
    table["index"] = torch.tensor(list(rows))
    write_bytes(path, to_bytes(table))
