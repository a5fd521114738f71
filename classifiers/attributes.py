"""The judge of perceived attributes: a timm network with one head for all attributes, kept in a folder.

config.json: {"architecture": timm name, "kwargs": {...}, "image_size": n, "mean": [3], "std": [3],
"attributes": {"gender": ["female", "male"], ...}} beside model.safetensors (fp16 on disk, fp32 in memory).
"""

import json
import warnings
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class AttributeNet(nn.Module):
    """Crops [F, 3, h, w] in [0, 1] of any size -> logits {attribute: [F, K]}, with gradients to the pixels."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.attributes = {name: tuple(classes) for name, classes in config["attributes"].items()}
        outputs = sum(map(len, self.attributes.values()))
        self.trunk = make_trunk(config, outputs)

    def forward(self, crop_FCHW: Tensor) -> dict[str, Tensor]:
        logits = self.trunk(preprocess(crop_FCHW, self.config))
        parts = logits.split([len(classes) for classes in self.attributes.values()], dim=1)
        return dict(zip(self.attributes, parts, strict=True))


def make_trunk(config: dict, outputs: int) -> nn.Module:
    """The timm network of a config with `outputs` outputs, untrained."""
    return timm.create_model(config["architecture"], num_classes=outputs, **config["kwargs"])


def preprocess(image_BCHW: Tensor, config: dict) -> Tensor:
    """Resize to image_size (antialiased bilinear) and normalise with mean and std."""
    size = config["image_size"]
    if image_BCHW.shape[-2:] != (size, size):
        image_BCHW = F.interpolate(image_BCHW, (size, size), mode="bilinear", antialias=True)
    mean, std = (image_BCHW.new_tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (image_BCHW - mean) / std


def read_config(folder: Path, *keys: str) -> dict:
    """config.json of a network folder; ValueError naming the file and key for whatever is wrong with it."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    for key in ("architecture", "kwargs", "image_size", "mean", "std", *keys):
        if key not in config:
            raise ValueError(f"{path}: the key {key} is missing")
    return config


def load_weights(net: nn.Module, folder: Path) -> nn.Module:
    """Load model.safetensors strictly, in fp32, frozen and in eval mode; ValueError naming the file and the key."""
    path = Path(folder) / "model.safetensors"
    try:
        state = {name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()}
    except Exception as error:  # missing, truncated, not safetensors: each has its own kind
        raise ValueError(f"{path}: cannot be read: {error}") from error
    own = net.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or sorted(k for k in own if own[k].shape != state[k].shape)
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} weights do not fit config.json, the first is {wrong[0]}")
    if any(not value.isfinite().all() for value in state.values()):
        raise ValueError(f"{path}: holds weights that are not finite")
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def save_network(net: nn.Module, folder: Path) -> None:
    """Write config.json and model.safetensors (fp16) of a network that has a `config`, each under a temporary name."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {n: v.half() if v.is_floating_point() else v for n, v in net.state_dict().items()}
    temporary = folder / "model.tmp"
    save_file({name: value.cpu().contiguous() for name, value in state.items()}, temporary)
    temporary.replace(folder / "model.safetensors")
    temporary = folder / "config.tmp"
    temporary.write_text(json.dumps(net.config, indent=2) + "\n")
    temporary.replace(folder / "config.json")


def load_attribute_net(folder: str | Path) -> AttributeNet:
    """A frozen judge from its folder; ValueError in one line for a missing, truncated or misfitting file."""
    folder = Path(folder)
    config = read_config(folder, "attributes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = AttributeNet(config)
    except Exception as error:  # timm: unknown names and arguments
        raise ValueError(f"{folder / 'config.json'}: cannot build {config['architecture']}: {error}") from error
    return load_weights(net, folder)


def save_attribute_net(net: AttributeNet, folder: str | Path) -> None:
    """Write a judge in the folder format that `load_attribute_net` reads."""
    save_network(net, Path(folder))
