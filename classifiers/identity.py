"""Who it looks like: aligned faces to a unit vector, and a bank of real faces to look up the nearest in.

Shen et al. (arXiv 2311.07604), section 4.2: when a face has to change its class, it is pulled towards the nearest real
face instead of its own original. D dimensions, N faces in the bank.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers.attributes import fill_frozen, first_line, make_trunk, preprocess, read_config, write_folder
from classifiers.crop import align
from classifiers.files import written
from classifiers.types import Boxes
from classifiers.weights import require_finite


class FaceEmbedder(nn.Module):
    """An `Embedder` of one's own: aligned faces [F, 3, H, W] in [0, 1] to embeddings [F, D] of length 1; gradients pass.

    `config` as for a judge, with `dim` (D) in the place of `attributes`. side: of the faces that `align` cuts, in
    pixels, before they are resized to `image_size`; None for that size.
    """

    def __init__(self, config: dict, side: int | None = None):
        super().__init__()
        self.config, self.side = config, side or config["image_size"]
        self.trunk = make_trunk(config, config["dim"])

    def align(self, image_BCHW: Tensor, boxes: Boxes) -> Tensor:
        """Faces [F, 3, side, side] with their landmarks on ArcFace's template."""
        return align(image_BCHW, boxes, self.side)

    def forward(self, aligned_FCHW: Tensor) -> Tensor:
        if not len(aligned_FCHW):
            return aligned_FCHW.new_zeros(0, self.config["dim"])
        return F.normalize(self.trunk(preprocess(aligned_FCHW, self.config)), dim=1)


def save_face_embedder(net: FaceEmbedder, folder: Path) -> None:
    """Write the folder; weights become fp16."""
    write_folder(net, net.config, Path(folder))


def load_face_embedder(folder: Path, side: int | None = None) -> FaceEmbedder:
    """A frozen embedder from its folder, float32, in eval mode."""
    config = read_config(Path(folder), "dim")
    return fill_frozen(lambda: FaceEmbedder(config, side), Path(folder))


@dataclass(frozen=True)
class Bank:
    """Embeddings of N real faces: `embedding_ND` rows of length 1."""

    embedding_ND: Tensor

    def nearest(self, embedding_FD: Tensor) -> Tensor:
        """The most similar bank embedding (largest cosine) of each face, [F, D], without gradient."""
        return self.embedding_ND[(embedding_FD.detach() @ self.embedding_ND.T).argmax(1)]

    def to(self, device: torch.device | str) -> "Bank":
        return Bank(self.embedding_ND.to(device))


def save_bank(bank: Bank, file: Path, embedder: str, **about: str) -> None:
    """One safetensors file: `embedding` fp16, and in its header who embedded them.

    embedder: a fingerprint of what made the embeddings. about: more for the header.
    """
    write_rows(bank.embedding_ND, file, {"embedder": embedder, **about})


def write_rows(embedding_ND: Tensor, file: Path, about: dict) -> None:
    """Embeddings as fp16 in a safetensors file, written whole or not at all; the same bytes for the same content.

    about: what its header says, under one name: safetensors writes several in an order that changes.
    """
    header = {"about": json.dumps(about, sort_keys=True)}
    with written(file) as temporary:
        save_file({"embedding": embedding_ND.detach().cpu().half().contiguous()}, temporary, header)


def read_rows(file: Path) -> tuple[Tensor, dict]:
    """Inverse of `write_rows`, as stored; {} without a header of ours. Errors are those of safetensors and of the disk."""
    with safe_open(file, "pt") as store:
        header = (store.metadata() or {}).get("about", "{}")
        about = json.loads(header)
        return store.get_tensor("embedding"), about if isinstance(about, dict) else {}


def load_bank(file: Path, dim: int, embedder: str) -> Bank:
    """Inverse of `save_bank`, as float32 rows of length 1, of an embedder's `dim` and fingerprint.

    ValueError naming a file that is truncated or foreign, of another embedder, has no face, another width, or no
    directions in it.
    """
    try:
        found_ND, about = read_rows(file)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: truncated or not a bank of faces ({first_line(error)})") from None
    if about.get("embedder") != embedder:
        raise ValueError(
            f"{file}: made by the embedder {about.get('embedder', 'of an older version')}, this one is {embedder}; allowed: "
            "a bank that scripts/build_bank.py made with this embedder"
        )
    shape = list(found_ND.shape)
    if not found_ND.is_floating_point() or len(shape) != 2 or not shape[0] or shape[1] != dim:
        raise ValueError(
            f"{file}: embedding is {found_ND.dtype} of shape {shape}, allowed: floating numbers [faces, {dim}], one face or "
            "more, as wide as the embedder's dim"
        )
    require_finite({"embedding": found_ND}, str(file))
    embedding_ND = found_ND.float()
    if empty := (~embedding_ND.any(1)).nonzero().flatten().tolist():
        raise ValueError(f"{file}: embedding: row {empty[0]} is all 0, allowed: a direction in each row")
    return Bank(F.normalize(embedding_ND, dim=1))
