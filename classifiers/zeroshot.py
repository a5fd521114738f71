"""open_clip models: loading, and zero-shot judges that compare a face crop with prompts for each class."""

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
    """A `Classifier` by prompts: logit_k = s cos(image, text_k), text_k the mean direction of the class's prompts.

    s is the model's own temperature. Radford et al., ICML 2021, section 3.1. Gradients reach the pixels.
    wordings: of attributes with more than one, each wording's prompts (`split_wordings`).
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
            self.register_buffer(f"wordings_{name}", text_WKD, persistent=False)  # no part of what it answers
        prompts = {name: {c: list(mapping[name][c]) for c in classes} for name, classes in self.attributes.items()}
        self.config = {"pixels": pixels.about(), "prompts": prompts}
        self.eval()

    @torch.no_grad()
    def _direction(self, tokenizer: Callable, prompts: list[str]) -> Tensor:
        return F.normalize(self.model.encode_text(tokenizer(list(prompts)), normalize=True).mean(0), dim=0)

    def forward(self, crop_FCHW: Tensor) -> dict[str, Tensor]:
        """Logits [F, K] per attribute of crops [F, 3, H, W] in [0, 1], any H and W, F = 0 included."""
        if not len(crop_FCHW):
            return {name: crop_FCHW.new_zeros(0, len(classes)) for name, classes in self.attributes.items()}
        image_FD = self.model.encode_image(self.pixels(crop_FCHW), normalize=True) * self.model.logit_scale.exp()
        return {name: image_FD @ self.get_buffer(f"text_{name}").T for name in self.attributes}

    @torch.no_grad()
    def labels_by_wording(self, crop_FCHW: Tensor) -> dict[str, Tensor]:
        """What each wording alone would say: the most probable class [F, W] of one or more crops, by attribute."""
        image_FD = self.model.encode_image(self.pixels(crop_FCHW), normalize=True)
        texts = {name: self.get_buffer(f"wordings_{name}") for name in self.wordings}
        return {name: torch.einsum("fd,wkd->fwk", image_FD, text_WKD).argmax(2) for name, text_WKD in texts.items()}


def split_wordings(prompts: Mapping[str, list[str]], classes: tuple[str, ...]) -> list[dict[str, list[str]]]:
    """The W wordings of an attribute's prompts, each class -> its prompts; W is the length of the shortest list.

    The j-th of W equal parts of each list is wording j: [a photo of a woman, a female person] and [a photo of a man,
    a male person] are two. A class of three groups has three prompts in each.
    """
    count = min(len(prompts[c]) for c in classes)
    parts = {c: [part.tolist() for part in np.array_split(np.array(prompts[c], object), count)] for c in classes}
    return [{c: parts[c][j] for c in classes} for j in range(count)]


def _refuse_equal(name: str, classes: tuple[str, ...], text_KD: Tensor) -> None:
    """ValueError for two classes that no image can tell apart."""
    for i, j in combinations(range(len(classes)), 2):
        if torch.allclose(text_KD[i], text_KD[j], atol=1e-6):
            raise ValueError(
                f"mapping.{name}: the prompts of {classes[i]} and {classes[j]} read alike, allowed: others, none longer "
                "than the model reads"
            )


def load_zero_shot(path: str | None, mapping: Classes, requested: Mapping[str, tuple[str, ...]]) -> ZeroShotClassifier:
    """A zero-shot judge from `load_open_clip`'s path; ValueErrors begin with the option."""
    if not path:
        raise ValueError("path: found null, allowed: an open_clip folder or architecture/tag")
    check_mapping(mapping, requested)  # before gigabytes are fetched
    return ZeroShotClassifier(*load_open_clip(path), mapping, requested)


def load_open_clip(path: str | Path) -> tuple[nn.Module, Callable, Pixels]:
    """(model, tokenizer, pixels), frozen: from a folder with open_clip_config.json, or "architecture/pretrained tag".

    Images are squeezed to the model's size as a whole. ValueError of one line that begins with `path`.
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
            # weights such as OpenAI's want another activation than the architecture of their name
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
