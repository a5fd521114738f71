"""Face embeddings and the bank of real faces that face realism pulls towards."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from classifiers.attributes import load_weights, make_trunk, preprocess, read_config, save_network

BANK_FILE = "bank.safetensors"


class Embedder(nn.Module):
    """Pictures [F, 3, h, w] in [0, 1] -> L2-normalised embeddings [F, D]; config as in classifiers.attributes, plus dim."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.trunk = make_trunk(config, config["dim"])

    def forward(self, image_FCHW: Tensor) -> Tensor:
        if len(image_FCHW) == 0:
            return image_FCHW.new_zeros(0, self.config["dim"])
        return F.normalize(self.trunk(preprocess(image_FCHW, self.config)), dim=1)


def load_embedder(folder: str | Path) -> Embedder:
    """A frozen embedder from its folder; ValueError in one line for whatever is wrong with it."""
    return load_weights(Embedder(read_config(Path(folder), "dim")), Path(folder))


def save_embedder(net: Embedder, folder: str | Path) -> None:
    """Write an embedder in the folder format that `load_embedder` reads."""
    save_network(net, Path(folder))


@dataclass
class Bank:
    """Embeddings [N, D] of real faces, L2-normalised."""

    embedding_ND: Tensor

    def nearest(self, embedding_FD: Tensor) -> Tensor:
        """The bank's embedding of largest cosine for each face, [F, D]."""
        return self.embedding_ND[(embedding_FD @ self.embedding_ND.T).argmax(1)]

    def to(self, device: str) -> "Bank":
        return Bank(self.embedding_ND.to(device))


def load_bank(folder: str | Path) -> Bank:
    """The bank beside an embedder; ValueError if it is missing or empty."""
    path = Path(folder) / BANK_FILE
    try:
        embedding = load_file(path)["embedding"].float()
    except Exception as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if embedding.ndim != 2 or len(embedding) == 0:
        raise ValueError(f"{path}: embedding has shape {tuple(embedding.shape)}, allowed: [N, D] with N > 0")
    return Bank(F.normalize(embedding, dim=1))


def save_bank(embedding_ND: Tensor, folder: str | Path) -> None:
    """Write a bank (fp16) beside its embedder."""
    temporary = Path(folder) / "bank.tmp"
    save_file({"embedding": embedding_ND.half().cpu().contiguous()}, temporary)
    temporary.replace(Path(folder) / BANK_FILE)
