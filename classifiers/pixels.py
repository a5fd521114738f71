"""How a network wants its images: resize, centre crop, normalisation, all in tensors, so that gradients pass."""

from dataclasses import asdict, dataclass, replace

import huggingface_hub
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor

RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as image processors store them
KNOWN = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}


@dataclass(frozen=True)
class Pixels:
    """Images in [0, 1] to a network's input: resize (antialiased), centre crop, (scale x - mean) / std.

    size: (height, width), or one number for the shorter side; None leaves it. crop: (height, width) or None.
    """

    size: tuple[int, int] | int | None
    mode: str
    crop: tuple[int, int] | None
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image_BCHW: Tensor) -> Tensor:
        """Network input [B, 3, h, w] of images [B, 3, H, W]."""
        height, width = image_BCHW.shape[-2:]
        size = self.size
        if isinstance(size, int):
            short = min(height, width)
            size = (int(size * height / short), int(size * width / short))
        if size is not None and size != (height, width):
            image_BCHW = F.interpolate(image_BCHW, size, mode=self.mode, antialias=True).clamp(0, 1)
        if self.crop is not None:
            top, left = (int((n - c) / 2) for n, c in zip(image_BCHW.shape[-2:], self.crop, strict=True))
            image_BCHW = image_BCHW[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (image_BCHW.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (image_BCHW * self.scale - mean) / std

    def whole(self) -> "Pixels":
        """The same for an image of which nothing may be cut off: squeezed to the network's own size."""
        size = self.crop or self.size
        return replace(self, size=(size, size) if isinstance(size, int) else size, crop=None)

    def about(self) -> dict:
        """For fingerprints."""
        return asdict(self)


def processor_pixels(path: str, local: bool) -> Pixels:
    """What the image processor beside a Hugging Face model does; ValueError if it does more than can be done here."""
    try:
        settings = AutoImageProcessor.from_pretrained(path, local_files_only=local).to_dict()
    except Exception as error:  # the hub, JSON and transformers each have their own kinds
        raise ValueError(f"path: {path} has no readable image processor ({first_words(error)})") from None
    more = sorted(k for k, v in settings.items() if k.startswith("do_") and v and k not in KNOWN)
    if more or settings.get("rescale_offset"):
        raise ValueError(
            f"path: the image processor of {path} asks for {(more or ['rescale_offset'])[0]}, "
            f"allowed: {', '.join(sorted(KNOWN))}"
        )
    size, crop, mode = None, None, "bilinear"
    if settings.get("do_center_crop"):
        crop = (settings["crop_size"]["height"], settings["crop_size"]["width"])
    if settings.get("do_resize"):
        size, mode = _size(path, settings["size"]), RESAMPLE.get(int(settings["resample"]))
        if mode is None:
            raise ValueError(f"path: {path}: found resample {settings['resample']}, allowed: 2 (bilinear), 3 (bicubic)")
        if settings.get("crop_pct") and isinstance(size, int):  # ConvNeXt: below 384 resize to more, then crop
            size, crop = (int(size / settings["crop_pct"]), (size, size)) if size < 384 else ((size, size), None)
    if crop is not None and size is not None and min(crop) > (size if isinstance(size, int) else min(size)):
        raise ValueError(f"path: {path}: its image processor crops {crop} from {size}, allowed: at most what is there")
    scale = 255 * settings["rescale_factor"] if settings.get("do_rescale") else 255.0
    normal = settings.get("do_normalize")
    mean, std = (settings["image_mean"], settings["image_std"]) if normal else ((0.0,) * 3, (1.0,) * 3)
    return Pixels(size, mode, crop, scale, tuple(mean), tuple(std))


def _size(path: str, size: dict) -> tuple[int, int] | int:
    given = {key: value for key, value in dict(size).items() if value is not None}
    if given.keys() == {"height", "width"}:
        return given["height"], given["width"]
    if given.keys() == {"shortest_edge"}:
        return given["shortest_edge"]
    raise ValueError(f"path: {path}: found size {given}, allowed: height and width, or shortest_edge")


def quiet() -> None:
    """No progress bars and no retry messages of the hub: what goes wrong is one line."""
    huggingface_hub.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def first_words(error: Exception) -> str:
    """The beginning of a library's message, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def freeze(net: torch.nn.Module) -> torch.nn.Module:
    """Single precision, eval mode, nothing to learn."""
    return net.float().eval().requires_grad_(False)
