"""Fingerprints: short hashes of settings, weights and files, so that a run never reuses results made with other ones."""

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
    """A part that is already JSON: long parts that are used several times are converted once, see `said`."""


def said(part) -> str:
    """Return a part as JSON; objects that JSON does not have become text."""
    return part if isinstance(part, Said) else json.dumps(part, sort_keys=True, default=str)


def of_values(*parts) -> str:
    """Return the first hex digits of the SHA-256 of these parts as JSON, see `said`."""
    return hashlib.sha256(f"[{', '.join(map(said, parts))}]".encode()).hexdigest()[:LENGTH]


def of_modules(*modules: nn.Module) -> str:
    """Return the hash of all parameters and buffers, in order."""
    return of_tensors(tensor for module in modules for tensor in module.state_dict().values())


def of_frozen(module: nn.Module) -> str:
    """Return `of_modules` of a module that never changes, computed once: some encoders have gigabytes."""
    if module not in _FROZEN:
        _FROZEN[module] = of_modules(module)
    return _FROZEN[module]


def of_named(tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of names and tensors, independent of their order."""
    names = sorted(tensors)
    return of_values(names, of_tensors(tensors[name] for name in names))


def of_tensors(tensors: Iterable[Tensor]) -> str:
    """Return the hash of tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())  # numpy has no bfloat16
    return digest.hexdigest()[:LENGTH]


def of_files(files: Iterable[Path]) -> str:
    """Return the hash of the contents of files, in order; their names do not count."""
    return of_values(*(hashlib.sha256(file.read_bytes()).hexdigest() for file in files))
