"""Read a picture file of any format as upright RGB pixels, or raise ValueError with the reason.

Pillow alone would clip 16 bits to white, show the hidden colours of transparent pixels, and warn or fail at some sizes.
"""

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# common formats; those that the installed Pillow lacks (HEIC, JPEG XL) are reported as unreadable instead of ignored
SUFFIXES = frozenset(
    ".png .jpg .jpeg .jpe .jfif .webp .bmp .gif .tif .tiff .avif .jp2 .ppm .pgm .pbm .tga .heic .heif .jxl".split()
)
SMALLEST = 16  # least pixels of the shorter side: smaller pictures show no face
NARROWEST = 8  # largest ratio of the sides, since detectors enlarge the shorter side
LARGEST = 4096  # pixels of the longer side, to which larger pictures are reduced
MOST_PIXELS = Image.MAX_IMAGE_PIXELS  # Pillow's limit against decompression bombs


@dataclass(frozen=True)
class About:
    """Properties of a picture file. size: (height, width) as `read_picture` returns it. digest: SHA-256 of the file."""

    size: tuple[int, int]
    digest: str


def inspect(file: Path) -> About:
    """Return the size and hash of a picture; ValueError with a short reason if it cannot be read to its end."""
    data = _bytes(file)
    height, width, _ = _pixels(data).shape
    return About((height, width), hashlib.sha256(data).hexdigest())


def read_picture(file: Path, longest: int = LARGEST) -> np.ndarray:
    """Return the pixels uint8 [H, W, 3] of the first frame: upright by EXIF, 16 bits scaled to 8, transparency over white.

    longest: pixels of the longer side, to which larger pictures are reduced. Raises ValueError with a short reason if the
    picture cannot be read to its end, or is too small or too narrow.
    """
    return _pixels(_bytes(file), longest)


def as_pixels(picture: Image.Image) -> np.ndarray:
    """Return the pixels uint8 [H, W, 3] of a picture in memory; ValueError for modes whose white is not known."""
    picture.load()
    return np.array(_rgb(picture))


def eight_bits(image_CHW: Tensor) -> np.ndarray:
    """Round an image in [0, 1] to 8 bits, uint8 [H, W, 3], as in a PNG."""
    return (image_CHW.float().cpu().clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def _bytes(file: Path) -> bytes:
    try:
        if not Path(file).is_file():  # opening a pipe would wait for a writer
            raise ValueError("no such file" if not Path(file).exists() else "no regular file")
        return Path(file).read_bytes()
    except OSError as error:
        raise ValueError(error.strerror or type(error).__name__) from None


def _pixels(data: bytes, longest: int = LARGEST) -> np.ndarray:
    if not data:
        raise ValueError("an empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as picture:
                _require_shape(*picture.size)
                picture.draft(None, (longest, longest))  # lets JPEG be decoded at a reduced size
                picture.load()
                found = _rgb(ImageOps.exif_transpose(picture))
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())[:120]) from None
    except UnidentifiedImageError:
        raise ValueError("no picture in a format that is known here") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"more than {MOST_PIXELS / 1e6:.0f} megapixels") from None
    except Exception as error:  # Pillow's formats raise several types for damaged files
        raise ValueError(f"damaged ({' '.join(str(error).split())[:80] or type(error).__name__})") from None
    if max(found.size) > longest:
        found.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return np.array(found)


def _require_shape(width: int, height: int) -> None:
    short, long = sorted((width, height))
    if short < SMALLEST:
        raise ValueError(f"{width}×{height} pixels, allowed: {SMALLEST} or more each way")
    if long > NARROWEST * short:
        raise ValueError(f"{width}×{height} pixels, allowed: at most {NARROWEST} times as long as wide")


def _rgb(picture: Image.Image) -> Image.Image:
    """Convert a loaded picture of any mode to RGB."""
    if picture.mode.startswith("I;16"):
        grey = np.asarray(picture).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError("32 bits a pixel, whose white is not known")
    if picture.has_transparency_data:
        over = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return picture.convert("RGB")
