"""Check weights from files: numbers must be real and finite. ValueErrors of one line name the file and the tensor."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


def require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError, beginning with `where`, for a tensor with NaN or infinity."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ValueError(f"{where}: {key} holds NaN or infinity, allowed: finite numbers")


def fill(net: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load tensors into a network strictly; ValueError, beginning with `where`, for any that does not fit.

    Keys, shapes and number types must be those of the network, and all values finite.
    """
    expected = net.state_dict()
    if wrong := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"{where}: key {wrong[0]!r} is {'missing' if wrong[0] in expected else 'unknown'}")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(f"{where}: {key} has shape {list(tensor.shape)}, built {list(expected[key].shape)}")
        if tensor.is_floating_point() != expected[key].is_floating_point():  # true for complex tensors too
            raise ValueError(f"{where}: {key} holds {tensor.dtype}, built {expected[key].dtype}")
    require_finite(tensors, where)
    net.load_state_dict(tensors)


def refuse_complex(folder: Path) -> None:
    """Raise ValueError for a complex tensor in a folder's safetensors files: libraries would drop the imaginary part.

    Only headers are read. Unreadable files are skipped, since their loader reports them.
    """
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as store:
                kinds = {key: store.get_slice(key).get_dtype() for key in store.keys()}
        except (SafetensorError, OSError):
            continue
        if wrong := [key for key, kind in kinds.items() if kind.startswith("C")]:
            raise ValueError(f"{file}: {wrong[0]} is complex, allowed: real numbers")
