"""Third-party face embedders, each with the alignment and the normalisation that it was trained with.

| weights | network | faces |
|---|---|---|
| a file of arcface_torch (insightface) | `IResNet` | 112 x 112, five landmarks on ArcFace's template |
| a file of facenet-pytorch | its InceptionResnetV1 | 160 x 160, the detector's box with a margin of 14 of these pixels |
| a folder or hub id of Hugging Face, also of timm models | any image encoder | the crop that the judges get |

insightface licenses its weights for non-commercial research only (its README, "License"), and this project contains none.
ValueErrors of one line name the file.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from facenet_pytorch.models.inception_resnet_v1 import InceptionResnetV1
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers.crop import align, crop, resample
from classifiers.hub import load_hub_encoder
from classifiers.identity import load_face_embedder
from classifiers.iresnet import SIDE, iresnet_like
from classifiers.pixels import Pixels, first_words, freeze
from classifiers.types import Boxes, Embedder
from classifiers.weights import fill

ARCFACE = Pixels((SIDE, SIDE), "bilinear", None, 1.0, (0.5,) * 3, (0.5,) * 3)
FACENET_SIDE, FACENET_MARGIN = 160, 14  # as in facenet-pytorch's examples/lfw_evaluate.ipynb
FACENET = Pixels((FACENET_SIDE, FACENET_SIDE), "bilinear", None, 255.0, (127.5,) * 3, (128.0,) * 3)
FILES = (".pt", ".pth", ".safetensors", ".onnx")


class ForeignEmbedder(nn.Module):
    """An `Embedder` of three parts: `cut` crops faces from images, `pixels` normalises them, `net` embeds them."""

    def __init__(self, net: nn.Module, cut: Callable[[Tensor, Boxes], Tensor], pixels: Pixels, config: dict):
        super().__init__()
        self.net, self.cut, self.pixels = freeze(net), cut, pixels
        with torch.no_grad():
            dim = self.net(pixels(torch.full((1, 3, 64, 64), 0.5))).shape[1]
        self.config = config | {"dim": dim, "pixels": pixels.about()}

    def align(self, image_BCHW: Tensor, boxes: Boxes) -> Tensor:
        return self.cut(image_BCHW, boxes)

    def forward(self, aligned_FCHW: Tensor) -> Tensor:
        if not len(aligned_FCHW):
            return aligned_FCHW.new_zeros(0, self.config["dim"])
        return F.normalize(self.net(self.pixels(aligned_FCHW)), dim=1)


def load_embedder(path: str | Path, crop_size: int, expand: float) -> Embedder:
    """Load a frozen embedder from a file of weights, a folder or a hub id; the content determines its type.

    crop_size, expand: those of the judges' crops.
    """
    place = Path(path)
    if place.is_file():
        return _of_file(place)
    if place.suffix in FILES:
        raise ValueError(f"{place}: no such file")
    if place.is_dir() and not _of_hub(place):
        return load_face_embedder(place, crop_size)
    encoder = load_hub_encoder(str(path))
    cut = partial(crop, size=crop_size, expand=expand)
    return ForeignEmbedder(
        encoder,
        cut,
        Pixels(None, "bilinear", None, 1.0, (0.0,) * 3, (1.0,) * 3),
        {
            "encoder": encoder.config,
            "faces": ["crop", crop_size, expand],
        },
    )


def _of_hub(folder: Path) -> bool:
    """Return whether a folder's config.json is one of Hugging Face or timm; False if it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and bool({"model_type", "pretrained_cfg"} & config.keys())


def _of_file(file: Path) -> ForeignEmbedder:
    if file.suffix == ".onnx":
        raise ValueError(f"{file}: is an ONNX graph, which gives no gradient; allowed: the PyTorch weights of the network")
    tensors = read_tensors(file)
    if "conv2d_1a.conv.weight" in tensors:
        net, cut, pixels, name = InceptionResnetV1(), facenet_faces, FACENET, "facenet"
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("logits.")}  # the training head
    elif "layer1.0.prelu.weight" in tensors:
        try:
            net = iresnet_like(tensors)
        except (KeyError, IndexError) as error:
            raise ValueError(f"{file}: has no {first_words(error)}, allowed: all tensors of an iresnet") from None
        cut, pixels, name = partial(align, size=SIDE), ARCFACE, "arcface"
    else:
        raise ValueError(
            f"{file}: found tensors such as {min(tensors)}, allowed: those of arcface_torch's iresnet "
            "(layer1.0.prelu.weight) or of facenet-pytorch's InceptionResnetV1 (conv2d_1a.conv.weight)"
        )
    # only training uses these, and old files lack them
    counts = {key: tensor for key, tensor in net.state_dict().items() if key.endswith("num_batches_tracked")}
    fill(net, counts | tensors, str(file))
    return ForeignEmbedder(net, cut, pixels, {"faces": name})


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of a flat state dict saved by torch, without running code in it."""
    try:
        if file.suffix == ".safetensors":
            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # missing, truncated, another format, or needs code
        raise ValueError(f"{file}: cannot read it without running code ({first_words(error)})") from None
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{file}: holds no flat dict of tensors, allowed: a state dict")
    if other := [key for key in tensors if not isinstance(key, str)]:
        raise ValueError(f"{file}: {other[0]!r} is no name")
    return tensors


def facenet_faces(image_BCHW: Tensor, boxes: Boxes) -> Tensor:
    """Crop faces [F, 3, 160, 160] like facenet-pytorch's `extract_face`: box with margin, cut at the frame, then resized.

    The margin is in final pixels: 14 of 160 of them are 14 / (160 - 14) of the box.
    """
    box_F4 = boxes.box_F4.to(image_BCHW.dtype)
    half_F2 = (box_F4[:, 2:] - box_F4[:, :2]) * (FACENET_MARGIN / (FACENET_SIDE - FACENET_MARGIN) / 2)
    height, width = image_BCHW.shape[-2:]
    frame_2 = box_F4.new_tensor([width, height])
    low_F2, high_F2 = (box_F4[:, :2] - half_F2).clamp(min=0), torch.minimum(box_F4[:, 2:] + half_F2, frame_2)
    return resample(image_BCHW, boxes.row_F, torch.cat([low_F2, high_F2], 1), FACENET_SIDE)
