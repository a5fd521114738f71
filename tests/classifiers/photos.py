"""Real photographs that registry packages ship, as image_1CHW."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor


def photo(package: str, path: str) -> Tensor:
    """One image as float RGB in [0, 1], [1, 3, H, W]; skips the test if the package does not ship it."""
    spec = find_spec(package)
    file = Path(spec.origin).parent / path if spec else None
    if file is None or not file.exists():
        pytest.skip(f"{package} ships no {path} here")
    with Image.open(file) as picture:
        pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).float() / 255


def piece(height: int, width: int) -> Tensor:
    """A piece [1, 3, height, width] of a photograph of people, in whole grey levels."""
    return photo("insightface", "data/images/t1.jpg")[..., 200 : 200 + height, 300 : 300 + width]
