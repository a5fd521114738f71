"""Import adapters from files of any tool, one or several at once, to train or audit them."""

from pathlib import Path

import torch
from torch import Tensor

from fairdiff.diffusion.adapter_files import LORA_FILE, SOFT_TOKENS_FILE
from fairdiff.diffusion.adapters import Lora, SoftTokens, modules_of
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.lora_files import combined, read_lora, shapes_of
from fairdiff.diffusion.textual_inversion import read_embedding
from fairdiff.errors import FairDiffError

FILES = (".safetensors", ".pt", ".bin")  # how the names of files end; other paths are folders


def file_of(path: Path, name: str) -> Path:
    """A path as it is if it is a file's, else the file of this name in the folder."""
    return path if path.suffix in FILES else path / name


def import_lora(model: DiffusionModel, paths: list[Path], scales: list[float]) -> Lora:
    """The sum of LoRA files or folders, each `scale` times, on the layers that they are of.

    A layer has the ranks of all files together and alpha = rank, so that training goes on with what the files add.
    """
    shapes = shapes_of(modules_of(model, "text_encoder") | modules_of(model, "unet"))
    files = [read_lora(file_of(path, LORA_FILE), shapes) for path in paths]
    return Lora.of_files(model, combined(files, scales))


def import_soft_tokens(
    model: DiffusionModel, paths: list[Path], scales: list[float], initial_text: str
) -> SoftTokens:
    """The tokens of textual inversions one after the other before the prompt, each `scale` times as far from its words.

    initial_text: the words of files that do not say which they started from.
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
    """FairDiffError unless these are embeddings [N, D] of each text encoder of the adapter's model."""
    widths = [soft.shape[1] for soft in adapter.parameters()]
    if len(rows) != len(widths):
        raise FairDiffError(f"{path}: holds tokens of {len(rows)} text encoders, the model has {len(widths)} that read them")
    for own, width in zip(rows, widths, strict=True):
        if own.shape[1] != width:
            raise FairDiffError(f"{path}: its embeddings have width {own.shape[1]}, the text encoder {width}")
