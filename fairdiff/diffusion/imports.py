"""Import adapters from one or several files of any tool, for further training or an audit."""

from pathlib import Path

import torch
from torch import Tensor

from fairdiff.diffusion.adapter_files import LORA_FILE, SOFT_TOKENS_FILE
from fairdiff.diffusion.adapters import Lora, SoftTokens, modules_of
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.lora_files import combined, read_lora, shapes_of
from fairdiff.diffusion.textual_inversion import read_embedding
from fairdiff.errors import FairDiffError

FILES = (".safetensors", ".pt", ".bin")  # a path with one of these endings is a file; all other paths are folders


def file_of(path: Path, name: str) -> Path:
    """Return the path itself if its ending is in FILES, else the file `name` in that folder."""
    return path if path.suffix in FILES else path / name


def import_lora(model: DiffusionModel, paths: list[Path], scales: list[float]) -> Lora:
    """Return one LoRA with the sum of several LoRA files or folders, each multiplied by its scale.

    The rank of a layer is the sum of the files' ranks, and alpha = rank. Training continues from this sum.
    """
    shapes = shapes_of(modules_of(model, "text_encoder") | modules_of(model, "unet"))
    files = [read_lora(file_of(path, LORA_FILE), shapes) for path in paths]
    return Lora.of_files(model, combined(files, scales))


def import_soft_tokens(
    model: DiffusionModel, paths: list[Path], scales: list[float], initial_text: str
) -> SoftTokens:
    """Return soft tokens that join the tokens of several textual inversions, in order.

    scales: each file's tokens are moved to `scale` times their distance from their initial words. initial_text: the initial
    words for files that do not name theirs.
    """
    read = [read_embedding(file_of(path, SOFT_TOKENS_FILE)) for path in paths]
    adapter, start = SoftTokens(model, sum(len(rows[0]) for rows, _ in read), initial_text), 0
    for path, (rows, text), scale in zip(paths, read, scales, strict=True):
        check_widths(path, rows, adapter)
        own = slice(start, start := start + len(rows[0]))
        words = adapter.words(text or initial_text, len(rows[0]))
        for soft, origin, here, there in zip(adapter.parameters(), adapter.origin, words, rows, strict=True):
            origin[own] = here
            soft.data[own] = torch.lerp(here, there.to(here), scale)
    return adapter


def check_widths(path: Path, rows: list[Tensor], adapter: SoftTokens) -> None:
    """Raise FairDiffError unless `rows` has embeddings [N, D] of the right width for each text encoder of the model."""
    widths = [soft.shape[1] for soft in adapter.parameters()]
    if len(rows) != len(widths):
        raise FairDiffError(f"{path}: holds tokens of {len(rows)} text encoders, the model has {len(widths)} that read them")
    for own, width in zip(rows, widths, strict=True):
        if own.shape[1] != width:
            raise FairDiffError(f"{path}: its embeddings have width {own.shape[1]}, the text encoder {width}")
