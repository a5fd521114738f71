"""Face embeddings of length 1, and a bank of real faces for nearest-neighbour search.

Shen et al. (arXiv 2311.07604), section 4.2: a face that has to change its class is pulled towards the nearest real face
instead of the face of its reference image. Shapes: D dimensions, N faces in the bank.
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
    """An `Embedder` in this project's format: aligned faces [F, 3, H, W] in [0, 1] to embeddings [F, D] of length 1.

    Gradients reach the pixels. `config` is as for `AttributeNet`, with `dim` (D) instead of `attributes`. side: pixels of
    the faces that `align` returns, before they are resized to `image_size` (None: `image_size`).
    """

    def __init__(self, config: dict, side: int | None = None):
        super().__init__()
        self.config, self.side = config, side or config["image_size"]
        self.trunk = make_trunk(config, config["dim"])

    def align(self, image_BCHW: Tensor, boxes: Boxes) -> Tensor:
        """Return faces [F, 3, side, side] with their landmarks on ArcFace's template."""
        return align(image_BCHW, boxes, self.side)

    def forward(self, aligned_FCHW: Tensor) -> Tensor:
        if not len(aligned_FCHW):
            return aligned_FCHW.new_zeros(0, self.config["dim"])
        return F.normalize(self.trunk(preprocess(aligned_FCHW, self.config)), dim=1)


def save_face_embedder(net: FaceEmbedder, folder: Path) -> None:
    """Write an embedder's folder; weights become fp16."""
    write_folder(net, net.config, Path(folder))


def load_face_embedder(folder: Path, side: int | None = None) -> FaceEmbedder:
    """Load a frozen embedder from its folder, in float32 and eval mode."""
    config = read_config(Path(folder), "dim")
    return fill_frozen(lambda: FaceEmbedder(config, side), Path(folder))


@dataclass(frozen=True)
class Bank:
    """Embeddings of N real faces, `embedding_ND`, with rows of length 1."""

    embedding_ND: Tensor

    def nearest(self, embedding_FD: Tensor) -> Tensor:
        """Return the most similar bank embedding (largest cosine) of each face, [F, D], without gradient."""
        return self.embedding_ND[(embedding_FD.detach() @ self.embedding_ND.T).argmax(1)]

    def to(self, device: torch.device | str) -> "Bank":
        return Bank(self.embedding_ND.to(device))


def save_bank(bank: Bank, file: Path, embedder: str, **about: str) -> None:
    """Write a bank as one safetensors file: `embedding` in fp16, with the embedder's fingerprint in the header.

    embedder: fingerprint of the embedder. about: further entries of the header.
    """
    write_rows(bank.embedding_ND, file, {"embedder": embedder, **about})


def write_rows(embedding_ND: Tensor, file: Path, about: dict) -> None:
    """Write embeddings as fp16 to a safetensors file, atomically; the same content gives the same bytes.

    about: content of the header. It has one key only, because safetensors writes several keys in a changing order.
    """
    header = {"about": json.dumps(about, sort_keys=True)}
    with written(file) as temporary:
        save_file({"embedding": embedding_ND.detach().cpu().half().contiguous()}, temporary, header)


def read_rows(file: Path) -> tuple[Tensor, dict]:
    """Return what `write_rows` wrote: embeddings as stored, and the header's content, {} in files of other tools.

    Errors of safetensors and of the file system are not caught.
    """
    with safe_open(file, "pt") as store:
        header = (store.metadata() or {}).get("about", "{}")
        about = json.loads(header)
        return store.get_tensor("embedding"), about if isinstance(about, dict) else {}


def load_bank(file: Path, dim: int, embedder: str) -> Bank:
    """Load a bank as float32 rows of length 1, and check its width `dim` and the fingerprint `embedder`.

    Raises ValueError, naming the file, if it is truncated or no bank, if it was made by another embedder, has no face or
    another width, or has a row that is all 0 or not finite.
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
