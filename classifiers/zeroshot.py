"""Load open_clip models, and classify face crops zero-shot by prompts for each class."""

import logging
import warnings
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers.hub import Classes, check_mapping
from classifiers.pixels import Pixels, first_words, freeze, quiet
from classifiers.weights import refuse_complex, require_finite


class ZeroShotClassifier(nn.Module):
    """A zero-shot `Classifier`: logit_k = s cos(image, text_k), where text_k is the mean direction of the class's prompts.

    s is the model's logit scale. Source: Radford et al., ICML 2021, section 3.1. Gradients reach the pixels.
    wordings: the prompts of each wording (`split_wordings`), for attributes with more than one.
    """

    def __init__(self, model: nn.Module, tokenizer: Callable, pixels: Pixels, mapping: Classes, requested: Mapping):
        super().__init__()
        self.model, self.pixels = freeze(model), pixels
        self.attributes = {name: tuple(classes) for name, classes in requested.items()}
        for name, classes in self.attributes.items():
            text_KD = torch.stack([self._direction(tokenizer, mapping[name][c]) for c in classes])
            self.register_buffer(f"text_{name}", text_KD)
            _refuse_equal(name, classes, text_KD)
        wordings = {name: split_wordings(mapping[name], classes) for name, classes in self.attributes.items()}
        self.wordings = {name: parts for name, parts in wordings.items() if len(parts) > 1}
        for name, parts in self.wordings.items():
            text_WKD = torch.stack(
                [torch.stack([self._direction(tokenizer, p) for p in part.values()]) for part in parts]
            )
            self.register_buffer(f"wordings_{name}", text_WKD, persistent=False)  # not used by `forward`
        prompts = {name: {c: list(mapping[name][c]) for c in classes} for name, classes in self.attributes.items()}
        self.config = {"pixels": pixels.about(), "prompts": prompts}
        self.eval()

    @torch.no_grad()
    def _direction(self, tokenizer: Callable, prompts: list[str]) -> Tensor:
        return F.normalize(self.model.encode_text(tokenizer(list(prompts)), normalize=True).mean(0), dim=0)

    def forward(self, crop_FCHW: Tensor) -> dict[str, Tensor]:
        """Return logits [F, K] per attribute of crops [F, 3, H, W] in [0, 1] with any H and W; F may be 0."""
        if not len(crop_FCHW):
            return {name: crop_FCHW.new_zeros(0, len(classes)) for name, classes in self.attributes.items()}
        image_FD = self.model.encode_image(self.pixels(crop_FCHW), normalize=True) * self.model.logit_scale.exp()
        return {name: image_FD @ self.get_buffer(f"text_{name}").T for name in self.attributes}

    @torch.no_grad()
    def labels_by_wording(self, crop_FCHW: Tensor) -> dict[str, Tensor]:
        """Return the most probable class [F, W] of one or more crops by each wording alone, per attribute."""
        image_FD = self.model.encode_image(self.pixels(crop_FCHW), normalize=True)
        texts = {name: self.get_buffer(f"wordings_{name}") for name in self.wordings}
        return {name: torch.einsum("fd,wkd->fwk", image_FD, text_WKD).argmax(2) for name, text_WKD in texts.items()}


def split_wordings(prompts: Mapping[str, list[str]], classes: tuple[str, ...]) -> list[dict[str, list[str]]]:
    """Split an attribute's prompts into W wordings, each class -> prompts; W is the length of the shortest list.

    Wording j has the j-th of W equal parts of each list: [a photo of a woman, a female person] and [a photo of a man, a male
    person] are two wordings. A class with three times as many prompts as the shortest list has three in each.
    """
    count = min(len(prompts[c]) for c in classes)
    parts = {c: [part.tolist() for part in np.array_split(np.array(prompts[c], object), count)] for c in classes}
    return [{c: parts[c][j] for c in classes} for j in range(count)]


def _refuse_equal(name: str, classes: tuple[str, ...], text_KD: Tensor) -> None:
    """Raise ValueError for two classes with equal text features, which no image can tell apart."""
    for i, j in combinations(range(len(classes)), 2):
        if torch.allclose(text_KD[i], text_KD[j], atol=1e-6):
            raise ValueError(
                f"mapping.{name}: the prompts of {classes[i]} and {classes[j]} read alike, allowed: others, none longer "
                "than the model reads"
            )


def load_zero_shot(path: str | None, mapping: Classes, requested: Mapping[str, tuple[str, ...]]) -> ZeroShotClassifier:
    """Load a zero-shot judge; path: as for `load_open_clip`. ValueErrors begin with the option."""
    if not path:
        raise ValueError("path: found null, allowed: an open_clip folder or architecture/tag")
    check_mapping(mapping, requested)  # before gigabytes are downloaded
    return ZeroShotClassifier(*load_open_clip(path), mapping, requested)


def load_open_clip(path: str | Path) -> tuple[nn.Module, Callable, Pixels]:
    """Load (model, tokenizer, pixels) from a folder with open_clip_config.json, or by "architecture/pretrained tag".

    The model is frozen. Whole images are resized to its input size. ValueErrors have one line and begin with `path`.
    """
    if Path(path).is_dir():
        name, tag = f"local-dir:{path}", None
    else:
        name, _, tag = str(path).partition("/")
        if (name, tag) not in open_clip.list_pretrained():
            known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) if tag else ""
            raise ValueError(
                f"path: found {path}, allowed: a folder with open_clip_config.json, or an architecture and one of its "
                f"pretrained tags{f' ({known})' if known else ' as in ViT-H-14/laion2b_s32b_b79k'}"
            )
    quiet()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # open_clip warns of the activation of models it does not know
            logging.disable(logging.ERROR)  # and logs the error it also raises
            refuse_complex(Path(path))
            # weights such as OpenAI's need another activation than their architecture's default
            quick = bool(tag) and bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
            model = open_clip.create_model(name, pretrained=tag, require_pretrained=True, force_quick_gelu=quick)
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        raise ValueError(f"path: {path}: cannot load an open_clip model ({first_words(error)})") from None
    finally:
        logging.disable(logging.NOTSET)
    require_finite(model.state_dict(), f"path: {path}")
    about = open_clip.get_model_preprocess_cfg(model)
    try:
        size = about["size"]
        size = (size, size) if isinstance(size, int) else tuple(size)
        pixels = Pixels(size, about["interpolation"], None, 1.0, tuple(about["mean"]), tuple(about["std"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: {path}: preprocess_cfg: {first_words(error)}") from None
    return freeze(model), tokenizer, pixels
