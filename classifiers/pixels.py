"""The preprocessing of a network: resize, centre crop and normalisation of tensors, so that gradients reach the images."""

import math
from dataclasses import asdict, dataclass, replace

import huggingface_hub
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor

RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as image processors store them
KNOWN = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}


@dataclass(frozen=True)
class Pixels:
    """Preprocess images in [0, 1] to a network's input: resize (antialiased), centre crop, (scale x - mean) / std.

    size: (height, width), or one number for the shorter side, or None for no resizing. crop: (height, width) or None.
    rounded: round half of an odd crop margin as torchvision does; otherwise it is truncated as transformers does.
    """

    size: tuple[int, int] | int | None
    mode: str
    crop: tuple[int, int] | None
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rounded: bool = False

    def __post_init__(self):
        if self.mode not in RESAMPLE.values():
            raise ValueError(f"found interpolation {self.mode}, allowed: {', '.join(RESAMPLE.values())}")
        sides = [*(self.size if isinstance(self.size, tuple) else (self.size,)), *(self.crop or ())]
        if not all(side is None or (isinstance(side, int) and side > 0) for side in sides):
            raise ValueError(f"found size {self.size} and crop {self.crop}, allowed: whole numbers above 0")
        numbers = [self.scale, *self.mean, *self.std]
        if len(numbers) != 7 or not all(map(math.isfinite, numbers)) or min(self.scale, *self.std) <= 0:
            raise ValueError(
                f"found scale {self.scale}, mean {self.mean}, std {self.std}, allowed: three numbers each, std above 0"
            )

    def __call__(self, image_BCHW: Tensor) -> Tensor:
        """Return the network's input [B, 3, h, w] of images [B, 3, H, W]."""
        height, width = image_BCHW.shape[-2:]
        size = self.size
        if isinstance(size, int):
            short = min(height, width)
            size = (int(size * height / short), int(size * width / short))
        if size is not None and size != (height, width):
            image_BCHW = F.interpolate(image_BCHW, size, mode=self.mode, antialias=True).clamp(0, 1)
        if self.crop is not None:
            half = round if self.rounded else int
            top, left = (half((n - c) / 2) for n, c in zip(image_BCHW.shape[-2:], self.crop, strict=True))
            image_BCHW = image_BCHW[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (image_BCHW.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (image_BCHW * self.scale - mean) / std

    def whole(self) -> "Pixels":
        """Return a preprocessing that crops nothing: it resizes the whole image to the network's input size."""
        size = self.crop or self.size
        return replace(self, size=(size, size) if isinstance(size, int) else size, crop=None)

    def about(self) -> dict:
        """Return the fields for fingerprints; the newer `rounded` only if set, so that older fingerprints stay valid."""
        return {key: value for key, value in asdict(self).items() if key != "rounded" or value}


def processor_pixels(path: str, local: bool) -> Pixels:
    """Return the preprocessing of a Hugging Face model's image processor, after comparing both on one image.

    Raises ValueError if its configuration has no known steps, has unsupported steps, or if the two differ on the image.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(path, local_files_only=local)
        settings = processor.to_dict()
        stated = processor.get_image_processor_dict(path, local_files_only=local)[0]  # without defaults
    except Exception as error:  # the hub, JSON and transformers raise several types
        raise ValueError(f"path: {path} has no readable image processor ({first_words(error)})") from None
    try:
        if "data_config" in settings:
            pixels = _of_timm(settings["data_config"], stated["pretrained_cfg"])
        elif KNOWN & stated.keys():
            pixels = _of_transformers(settings)
        else:
            raise ValueError(f"found none of its steps, allowed: {', '.join(sorted(KNOWN))}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"path: {path}: its image processor: {first_words(error)}") from None
    _compare(path, processor, pixels)
    return pixels


def _of_transformers(settings: dict) -> Pixels:
    """Return the preprocessing of a processor with switches for its steps (`do_resize` and so on)."""
    more = sorted(k for k, v in settings.items() if k.startswith("do_") and v and k not in KNOWN)
    if more or settings.get("rescale_offset"):
        raise ValueError(f"found {(more or ['rescale_offset'])[0]}, allowed: {', '.join(sorted(KNOWN))}")
    size, crop, mode = None, None, "bilinear"
    if settings.get("do_center_crop"):
        crop = (settings["crop_size"]["height"], settings["crop_size"]["width"])
    if settings.get("do_resize"):
        size, mode = _size(settings["size"]), RESAMPLE.get(int(settings["resample"]))
        if mode is None:
            raise ValueError(f"found resample {settings['resample']}, allowed: 2 (bilinear), 3 (bicubic)")
        if settings.get("crop_pct") and isinstance(size, int):  # ConvNeXt: below 384 resize to more, then crop
            size, crop = (int(size / settings["crop_pct"]), (size, size)) if size < 384 else ((size, size), None)
    if crop is not None and size is not None and min(crop) > (size if isinstance(size, int) else min(size)):
        raise ValueError(f"found a crop of {crop} from {size}, allowed: at most what is there")
    scale = 255 * settings["rescale_factor"] if settings.get("do_rescale") else 255.0
    normal = settings.get("do_normalize")
    mean, std = (settings["image_mean"], settings["image_std"]) if normal else ((0.0,) * 3, (1.0,) * 3)
    return Pixels(size, mode, crop, scale, tuple(mean), tuple(std))


def _of_timm(data: dict, stated: dict) -> Pixels:
    """Return the preprocessing of a timm model in Hugging Face form.

    stated: `pretrained_cfg` of its config.json. data: the same, completed by timm.
    """
    if lost := [key for key in ("input_size", "mean", "std") if not stated.get(key)]:
        raise ValueError(f"found no {lost[0]} in pretrained_cfg of config.json, allowed: input_size, mean and std")
    channels, height, width = data["input_size"]
    size: tuple[int, int] | int = (math.floor(height / data["crop_pct"]), math.floor(width / data["crop_pct"]))
    if data["crop_mode"] == "center" and height == width:
        size = size[0]  # one number is the shorter side
    elif data["crop_mode"] != "squash":
        raise ValueError(f"found crop_mode {data['crop_mode']}, allowed: center of square images, squash")
    if channels != 3:
        raise ValueError(f"found {channels} channels, allowed: 3")
    return Pixels(
        size, data["interpolation"], (height, width), 1.0, tuple(data["mean"]), tuple(data["std"]), rounded=True
    )


def _compare(path: str, processor, pixels: Pixels) -> None:
    """Raise ValueError unless both give the same for a smooth image, on average within two of 256 grey levels."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    image_1CHW = (F.interpolate(coarse, (256, 256), mode="bilinear") * 255).round()
    picture = Image.fromarray(image_1CHW[0].byte().permute(1, 2, 0).numpy())
    try:
        theirs = torch.as_tensor(processor(images=picture, return_tensors="pt")["pixel_values"]).float()
    except Exception as error:  # processors may raise any type
        raise ValueError(f"path: {path}: its image processor fails on an image ({first_words(error)})") from None
    ours = pixels(image_1CHW / 255)
    if ours.shape != theirs.shape:
        found = f"an input of {list(theirs.shape[1:])}, read {list(ours.shape[1:])}"
    else:
        levels = ((ours - theirs) * ours.new_tensor(pixels.std).view(3, 1, 1)).abs().mean() / pixels.scale * 255
        if levels <= 2:
            return
        found = f"pixels that are {levels:.0f} of 256 grey levels from those read"
    raise ValueError(
        f"path: {path}: its image processor gives {found} in its configuration, allowed: one that only resizes, crops, "
        "rescales and normalises"
    )


def _size(size: dict) -> tuple[int, int] | int:
    given = {key: value for key, value in dict(size).items() if value is not None}
    if given.keys() == {"height", "width"}:
        return given["height"], given["width"]
    if given.keys() == {"shortest_edge"}:
        return given["shortest_edge"]
    raise ValueError(f"found size {given}, allowed: height and width, or shortest_edge")


def quiet() -> None:
    """Turn off progress bars, advice and retry messages of the hub, so that an error is one line."""
    huggingface_hub.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def first_words(error: Exception) -> str:
    """Return the beginning of an error's message on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def freeze(net: torch.nn.Module) -> torch.nn.Module:
    """Put a network into float32 and eval mode, without gradients of its parameters, and return it."""
    return net.float().eval().requires_grad_(False)
