"""Fingerprints: short hashes of settings, weights and files, which tell whether a cached result still applies."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

LENGTH = 16  # hex digits
_FROZEN: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class Said(str):
    """A part that is JSON already, of what is long and asked for several times; see `said`."""


def said(part) -> str:
    """A part as JSON, other kinds as text."""
    return part if isinstance(part, Said) else json.dumps(part, sort_keys=True, default=str)


def of_values(*parts) -> str:
    """The SHA-256 of anything JSON can say (other kinds as text), its first hex digits."""
    return hashlib.sha256(f"[{', '.join(map(said, parts))}]".encode()).hexdigest()[:LENGTH]


def of_modules(*modules: nn.Module) -> str:
    """The SHA-256 of all parameters and buffers, in order."""
    return of_tensors(tensor for module in modules for tensor in module.state_dict().values())


def of_frozen(module: nn.Module) -> str:
    """`of_modules` of one that never changes, read once in its life: encoders of gigabytes are asked for several times."""
    if module not in _FROZEN:
        _FROZEN[module] = of_modules(module)
    return _FROZEN[module]


def of_named(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names and tensors, in whatever order a file lists them."""
    names = sorted(tensors)
    return of_values(names, of_tensors(tensors[name] for name in names))


def of_tensors(tensors: Iterable[Tensor]) -> str:
    """The SHA-256 of tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())  # as bytes: numpy has no bfloat16
    return digest.hexdigest()[:LENGTH]


def of_files(files: Iterable[Path]) -> str:
    """The SHA-256 of the contents of files, whatever they are called."""
    return of_values(*(hashlib.sha256(file.read_bytes()).hexdigest() for file in files))
