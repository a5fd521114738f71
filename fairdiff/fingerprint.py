"""Fingerprints: short hashes of settings, weights and files, so that nothing made with others is taken for one's own."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

LENGTH = 16  # hex digits


def of_values(*parts) -> str:
    """The SHA-256 of anything JSON can say (other kinds as text), its first hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:LENGTH]


def of_modules(*modules: nn.Module) -> str:
    """The SHA-256 of all parameters and buffers, in order."""
    digest = hashlib.sha256()
    for module in modules:
        for tensor in module.state_dict().values():
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())  # numpy has no bfloat16
    return digest.hexdigest()[:LENGTH]


def of_files(files: Iterable[Path]) -> str:
    """The SHA-256 of the contents of files, whatever they are called."""
    return of_values(*(hashlib.sha256(file.read_bytes()).hexdigest() for file in files))
