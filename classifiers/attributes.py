"""Classifiers of perceived presentation (judges): face crops to logits per attribute.

On disk a net is a folder: `config.json` has its architecture, `model.safetensors` has fp16 weights. Loading is strict.
Errors that a user can correct are `ValueError`s of one line that name the file and the key.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers.files import written
from classifiers.weights import fill

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
KEYS = ("architecture", "kwargs", "image_size", "mean", "std")


class AttributeNet(nn.Module):
    """A `Classifier` with one timm trunk and one linear head for all attributes.

    `config` is the content of config.json: timm `architecture` and `kwargs`, `image_size` in pixels, `mean` and `std`
    per RGB channel of [0, 1], `attributes` name -> class names in the order of the logits.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.attributes = {name: tuple(classes) for name, classes in config["attributes"].items()}
        self.trunk = make_trunk(config, sum(map(len, self.attributes.values())))

    def forward(self, crop_FCHW: Tensor) -> dict[str, Tensor]:
        """Return logits [F, K] per attribute of crops [F, 3, H, W] in [0, 1] with any H and W; F may be 0."""
        if not len(crop_FCHW):
            return {name: crop_FCHW.new_zeros(0, len(classes)) for name, classes in self.attributes.items()}
        logits = self.trunk(preprocess(crop_FCHW, self.config))
        parts = logits.split([len(classes) for classes in self.attributes.values()], 1)
        return dict(zip(self.attributes, parts, strict=True))


def make_trunk(config: dict, outputs: int) -> nn.Module:
    """Build the untrained timm model of a config, with `outputs` numbers per image."""
    # JSON has no tuples, but some timm models require them
    kwargs = {key: tuple(value) if isinstance(value, list) else value for key, value in config["kwargs"].items()}
    return timm.create_model(config["architecture"], pretrained=False, num_classes=outputs, **kwargs)


def preprocess(image_FCHW: Tensor, config: dict) -> Tensor:
    """Resize to image_size (antialiased bilinear), then (x - mean) / std."""
    size = (config["image_size"], config["image_size"])
    if image_FCHW.shape[-2:] != size:
        image_FCHW = F.interpolate(image_FCHW, size, mode="bilinear", antialias=True)
    mean, std = (image_FCHW.new_tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (image_FCHW - mean) / std


def save_attribute_net(net: AttributeNet, folder: Path) -> None:
    """Write a net's folder; weights become fp16."""
    write_folder(net, net.config, Path(folder))


def load_attribute_net(folder: Path, attributes: dict[str, tuple[str, ...]] | None = None) -> AttributeNet:
    """Load a frozen judge from its folder, in float32 and eval mode.

    attributes: those that the caller needs; each must be in the config with exactly these classes in this order.
    """
    config = read_config(Path(folder), "attributes")
    for name, classes in (attributes or {}).items():
        found = tuple(config["attributes"].get(name, ()))
        if found != tuple(classes):
            raise ValueError(
                f"{Path(folder) / 'config.json'}: attributes.{name} is {list(found)}, requested {list(classes)}"
            )
    return fill_frozen(lambda: AttributeNet(config), Path(folder))


def write_folder(net: nn.Module, config: dict, folder: Path) -> None:
    """Write config.json and model.safetensors (floating-point tensors as fp16), each atomically."""
    tensors = {}
    for key, tensor in net.state_dict().items():
        half = tensor.detach().cpu().half() if tensor.is_floating_point() else tensor.detach().cpu()
        if not torch.isfinite(half).all():
            raise ValueError(f"{key}: not finite in half precision, cannot be saved")
        tensors[key] = half.contiguous()
    with written(folder / "model.safetensors") as part:
        save_file(tensors, part)
    with written(folder / "config.json") as part:
        part.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read_config(folder: Path, extra: str) -> dict:
    """Read and check config.json; it must have exactly the keys KEYS and `extra`."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (ValueError, RecursionError) as error:  # no text, no JSON, or nested too deep
        raise ValueError(f"{file}: not JSON ({first_line(error)})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: found a {type(config).__name__}, allowed: a mapping")
    keys = {*KEYS, extra}
    if wrong := sorted(keys ^ config.keys()):
        raise ValueError(f"{file}: key {wrong[0]!r} is {'absent' if wrong[0] in keys else 'unknown'}")
    for key, value in config.items():
        allowed, holds = LAWS[key]
        if not holds(value):
            raise ValueError(f"{file}: {key}: found {json.dumps(value)[:80]}, allowed: {allowed}")
    return config


def _is_size(value) -> bool:
    return type(value) is int and value > 0


def _is_triple(value) -> bool:
    return (
        isinstance(value, list) and len(value) == 3 and all(type(x) in (int, float) and math.isfinite(x) for x in value)
    )


def _are_classes(value) -> bool:
    return isinstance(value, list) and len({str(c) for c in value if isinstance(c, str)}) == len(value) > 1


LAWS = {  # key -> the allowed values in words, and a function that checks a value
    "architecture": ("the name of a timm architecture", lambda value: isinstance(value, str)),
    "kwargs": ("a mapping of timm's arguments", lambda value: isinstance(value, dict)),
    "image_size": ("a whole number above 0", _is_size),
    "mean": ("three numbers", _is_triple),
    "std": ("three numbers above 0", lambda value: _is_triple(value) and min(value) > 0),
    "attributes": (
        "name: [two or more different class names]",
        lambda value: isinstance(value, dict) and len(value) > 0 and all(map(_are_classes, value.values())),
    ),
    "dim": ("a whole number above 0", _is_size),
}


def fill_frozen(build: Callable[[], nn.Module], folder: Path):
    """Return `build()` with the folder's weights, frozen. All keys and shapes must match and all values must be finite.

    The network is run on one image, so that an image_size that it cannot take is found here.
    """
    try:
        net = build()
    except Exception as error:  # timm raises several types for unknown architectures, arguments and values
        raise ValueError(f"{folder}/config.json: timm cannot build it ({first_line(error)})") from None
    file = folder / "model.safetensors"
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated or not a safetensors file ({first_line(error)})") from None
    fill(net, tensors, str(file))
    net.eval().requires_grad_(False)
    try:
        net(torch.full((1, 3, 8, 8), 0.5))
    except Exception as error:  # torch and timm raise several types
        raise ValueError(
            f"{folder}/config.json: image_size: the network cannot read it ({first_line(error)})"
        ) from None
    return net


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
