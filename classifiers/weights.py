"""What a file of weights may hold: real, finite numbers. ValueErrors of one line name the file and the tensor."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


def require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """ValueError, beginning with `where`, for a tensor with NaN or infinity."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ValueError(f"{where}: {key} holds NaN or infinity, allowed: finite numbers")


def fill(net: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load tensors into a network, strictly; ValueError, beginning with `where`, for any that does not fit.

    Every key present, none left over, every shape and kind of number as built, all finite.
    """
    expected = net.state_dict()
    if wrong := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"{where}: key {wrong[0]!r} is {'missing' if wrong[0] in expected else 'unknown'}")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(f"{where}: {key} has shape {list(tensor.shape)}, built {list(expected[key].shape)}")
        if tensor.is_floating_point() != expected[key].is_floating_point():  # complex ones are no floats either
            raise ValueError(f"{where}: {key} holds {tensor.dtype}, built {expected[key].dtype}")
    require_finite(tensors, where)
    net.load_state_dict(tensors)


def refuse_complex(folder: Path) -> None:
    """ValueError for a complex tensor in a safetensors file of a folder: libraries drop the imaginary part.

    Reads the headers only, and passes over files that cannot be read, which their loader names.
    """
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as store:
                kinds = {key: store.get_slice(key).get_dtype() for key in store.keys()}
        except (SafetensorError, OSError):
            continue
        if wrong := [key for key, kind in kinds.items() if kind.startswith("C")]:
            raise ValueError(f"{file}: {wrong[0]} is complex, allowed: real numbers")
