"""One picture file of any kind as upright RGB pixels, or the reason why not.

Pillow alone would clip 16 bits to white, show the hidden colours below transparent pixels, and warn or stop at some sizes.
"""

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# what people keep pictures in; a kind that this Pillow lacks (HEIC, JPEG XL) is named as unreadable, not passed over
SUFFIXES = frozenset(
    ".png .jpg .jpeg .jpe .jfif .webp .bmp .gif .tif .tiff .avif .jp2 .ppm .pgm .pbm .tga .heic .heif .jxl".split()
)
SMALLEST = 16  # pixels of the shorter side: less shows no face
NARROWEST = 8  # times as long as it is wide: detectors enlarge the shorter side
LARGEST = 4096  # pixels of the longer side; what is larger is reduced to it
MOST_PIXELS = Image.MAX_IMAGE_PIXELS  # Pillow's limit against files that unpack to fill the memory


@dataclass(frozen=True)
class About:
    """What is known of a file before it is looked at. size: (height, width) as it will be read. digest: SHA-256."""

    size: tuple[int, int]
    digest: str


def inspect(file: Path) -> About:
    """Size and hash of a picture that can be read to its end; ValueError with the reason, in a few words, if it cannot."""
    data = _bytes(file)
    height, width, _ = _pixels(data).shape
    return About((height, width), hashlib.sha256(data).hexdigest())


def read_picture(file: Path, longest: int = LARGEST) -> np.ndarray:
    """Pixels uint8 [H, W, 3] of the first frame: upright by EXIF, 16 bits scaled to 8, transparency over white.

    longest: pixels of the longer side, to which a larger one is reduced. ValueError with the reason, in a few words, for
    what cannot be read whole or is too small or too narrow.
    """
    return _pixels(_bytes(file), longest)


def as_pixels(picture: Image.Image) -> np.ndarray:
    """Pixels uint8 [H, W, 3] of a picture in memory, of any mode; ValueError for one without a known white."""
    picture.load()
    return np.array(_rgb(picture))


def eight_bits(image_CHW: Tensor) -> np.ndarray:
    """An image in [0, 1] as a PNG holds it, uint8 [H, W, 3]."""
    return (image_CHW.float().cpu().clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def _bytes(file: Path) -> bytes:
    try:
        if not Path(file).is_file():  # opening a pipe waits for a writer
            raise ValueError("no such file" if not Path(file).exists() else "no regular file")
        return Path(file).read_bytes()
    except OSError as error:
        raise ValueError(error.strerror or type(error).__name__) from None


def _pixels(data: bytes, longest: int = LARGEST) -> np.ndarray:
    if not data:
        raise ValueError("an empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as picture:
                _require_shape(*picture.size)
                picture.draft(None, (longest, longest))  # JPEG is decoded at an eighth or more of its size
                picture.load()
                found = _rgb(ImageOps.exif_transpose(picture))
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())[:120]) from None
    except UnidentifiedImageError:
        raise ValueError("no picture in a format that is known here") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"more than {MOST_PIXELS / 1e6:.0f} megapixels") from None
    except Exception as error:  # Pillow's formats each have their own for what is cut short or damaged
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
    """A loaded picture of any mode as RGB."""
    if picture.mode.startswith("I;16"):
        grey = np.asarray(picture).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError("32 bits a pixel, whose white is not known")
    if picture.has_transparency_data:
        over = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return picture.convert("RGB")
