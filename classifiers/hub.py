"""Networks from Hugging Face: image encoders, and image classifiers whose labels are merged into the requested classes.

Errors that a user can correct are `ValueError`s of one line that begin with the option (`path`, `mapping`).
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, TimmWrapperModel

from classifiers.pixels import Pixels, first_words, freeze, processor_pixels, quiet
from classifiers.weights import refuse_complex, require_finite

Classes = Mapping[str, Mapping[str, list[str]]]  # attribute -> class -> labels (or prompts)


class HubClassifier(nn.Module):
    """A `Classifier` of one or several Hugging Face image classifiers; gradients reach the pixels.

    The probability of a class is the sum of its labels' probabilities: logit_k = logsumexp of the labels' logits. So a joint
    classifier ("young woman", "old woman", ...) or a head with several attributes side by side can be used.
    requested: attribute -> classes in the order of the logits. source: attribute -> index of its net.
    """

    def __init__(
        self,
        nets: list[nn.Module],
        pixels: list[Pixels],
        source: dict[str, int],
        mapping: Classes,
        requested: Mapping[str, tuple[str, ...]],
    ):
        super().__init__()
        self.nets, self.pixels, self.source = nn.ModuleList(freeze(net) for net in nets), pixels, source
        self.attributes = {name: tuple(classes) for name, classes in requested.items()}
        self.columns: dict[str, list[list[int]]] = {}
        for name, classes in self.attributes.items():
            place = {label: i for i, label in labels_of(self.nets[source[name]]).items()}
            self.columns[name] = [[place[str(label)] for label in mapping[name][c]] for c in classes]
        self.config = {
            "pixels": [p.about() for p in pixels],
            "source": source,
            "columns": self.columns,
            "nets": [architecture(net) for net in nets],
            "attributes": self.attributes,
        }
        self.eval()

    def forward(self, crop_FCHW: Tensor) -> dict[str, Tensor]:
        """Return logits [F, K] per attribute of crops [F, 3, H, W] in [0, 1] with any H and W; F may be 0."""
        if not len(crop_FCHW):
            return {name: crop_FCHW.new_zeros(0, len(classes)) for name, classes in self.attributes.items()}
        used = sorted(set(self.source.values()))
        logits = {i: self.nets[i](pixel_values=self.pixels[i](crop_FCHW)).logits for i in used}
        return {
            name: torch.stack([logits[self.source[name]][:, k].logsumexp(1) for k in columns], 1)
            for name, columns in self.columns.items()
        }


def load_hub_classifier(
    path: str | Mapping[str, str] | None, mapping: Classes, requested: Mapping[str, tuple[str, ...]]
) -> HubClassifier:
    """Load a classifier from one folder or hub id, or from one for each attribute.

    Every label of a model must belong to a class of some attribute, so that none is forgotten. ValueErrors name the key.
    """
    where = places_of(path, mapping, requested, "a folder or hub id of an image classifier")
    places = list(dict.fromkeys(where.values()))
    nets, pixels = [], []
    for place in places:
        net, pixel = _load(place)
        check_labels(place, list(labels_of(net).values()), {n for n in requested if where[n] == place}, mapping)
        nets.append(net)
        pixels.append(pixel)
    return HubClassifier(nets, pixels, {name: places.index(place) for name, place in where.items()}, mapping, requested)


def places_of(
    path: str | Mapping[str, str] | None, mapping: Classes, requested: Mapping[str, tuple[str, ...]], what: str
) -> dict[str, str]:
    """Return attribute -> path of its model, from one path or one for each attribute. ValueErrors name the key."""
    check_mapping(mapping, requested)
    paths = path if isinstance(path, Mapping) else dict.fromkeys(requested, path)
    if unknown := [name for name in paths if name not in mapping]:
        raise ValueError(f"path: found {unknown[0]}, allowed: {', '.join(mapping)}")
    if lost := [name for name in requested if not paths.get(name)]:
        raise ValueError(f"path: found null, allowed: {what} for {lost[0]}")
    return {name: paths[name] for name in requested}


def load_hub_labels(place: str) -> tuple[nn.Module, Pixels, list[str]]:
    """Load a classifier from a folder or hub id; return it, its preprocessing and its labels in the order of its logits."""
    net, pixels = _load(place)
    labels = labels_of(net)
    return net, pixels, [labels[i] for i in sorted(labels)]


def check_mapping(mapping: Classes, requested: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ValueError unless every requested class has labels (or prompts), and there are no other classes."""
    for name, classes in requested.items():
        if name not in mapping:
            raise ValueError(f"mapping: found {', '.join(mapping) or 'nothing'}, but {name} is requested")
        for cls in mapping[name]:
            if cls not in classes:
                raise ValueError(f"mapping.{name}: found {cls}, allowed: {', '.join(classes)}")
        for cls in classes:
            if not mapping[name].get(cls):
                raise ValueError(f"mapping.{name}.{cls}: found nothing, allowed: one or more")


def check_labels(place: str, labels: list[str], requested: set[str], mapping: Classes) -> None:
    """Raise ValueError unless all mapped labels exist, belong to one class per attribute, and cover the model's labels."""
    for name in sorted(requested):
        seen: dict[str, str] = {}
        for cls, given in mapping[name].items():
            for label in map(str, given):
                if label not in labels:
                    raise ValueError(f"mapping.{name}.{cls}: found {label}, allowed: {', '.join(labels)} (of {place})")
                if label in seen:
                    raise ValueError(f"mapping.{name}.{cls}: found {label}, which already belongs to {seen[label]}")
                seen[label] = cls
    used = {str(label) for classes in mapping.values() for given in classes.values() for label in given}
    if left := [label for label in labels if label not in used]:
        raise ValueError(f"mapping: no class has the label {left[0]} of {place}, allowed: every label in some class")


def labels_of(net: nn.Module) -> dict[int, str]:
    """Return column -> label."""
    return {int(i): str(label) for i, label in net.config.id2label.items()}


def architecture(component) -> dict:
    """Return what a component's output depends on besides its weights: its class and configuration.

    Left out are the keys that begin with an underscore: the files' place and version, and the names of defaulted values in
    an order that changes between processes. The precision of the files is left out too, because it is not used.
    """
    left_out = ("transformers_version", "architectures", "dtype", "torch_dtype")
    config = component.config if isinstance(component.config, dict) else component.config.to_dict()
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in left_out}
    return {"class": type(component).__name__} | kept


def _load(place: str) -> tuple[nn.Module, Pixels]:
    local = Path(place).exists()
    quiet()
    try:
        refuse_complex(Path(place))
        net, found = AutoModelForImageClassification.from_pretrained(
            place,
            use_safetensors=True,
            local_files_only=local,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the check below names them
        )
    except Exception as error:  # transformers, safetensors and the hub raise several types
        raise ValueError(
            f"path: found {place}, allowed: a folder or hub id of a Hugging Face image classifier with safetensors "
            f"({first_words(error)})"
        ) from None
    if lost := sorted(found["missing_keys"]):  # they would be random
        raise ValueError(f"path: {place} has no weights for {lost[0]}; allowed: a whole image classifier")
    for key, stored, built in sorted(found["mismatched_keys"]):
        raise ValueError(f"path: {place}: {key} has shape {list(stored)}, of its config.json {list(built)}")
    require_finite(net.state_dict(), f"path: {place}")
    if net.config.problem_type not in (None, "single_label_classification") or net.config.num_labels < 2:
        raise ValueError(
            f"path: {place} is a {net.config.problem_type} model with {net.config.num_labels} outputs, "
            "allowed: single_label_classification with two or more"
        )
    _check_columns(place, labels_of(net))
    pixels = processor_pixels(place, local)
    _try(place, net, pixels)
    return net, pixels


def _check_columns(place: str, labels: dict[int, str]) -> None:
    """Raise ValueError unless every column of the logits has one label and no label has two columns."""
    if sorted(labels) != list(range(len(labels))):
        keys = ", ".join(map(str, sorted(labels)))
        raise ValueError(
            f"path: {place}: config.json: id2label: found the keys {keys}, allowed: 0 to {len(labels) - 1}, one a column"
        )
    if twice := [label for label, times in Counter(labels.values()).items() if times > 1]:
        raise ValueError(
            f"path: {place}: config.json: id2label: found {twice[0]} more than once, allowed: different labels"
        )


@torch.no_grad()
def _try(place: str, net: nn.Module, pixels: Pixels) -> None:
    """Run the classifier on one image, so that parts that do not fit are found before long work."""
    try:
        net.eval()(pixel_values=pixels(torch.full((1, 3, 64, 64), 0.5)))
    except Exception as error:  # architectures raise several types
        raise ValueError(
            f"path: {place}: the classifier cannot read what its image processor makes of an image ({first_words(error)})"
        ) from None


class HubEncoder(nn.Module):
    """A Hugging Face image encoder, also a timm model in Hugging Face form: images to features [B, D], not normalised.

    The whole image is resized to the size to which the model's own processor would crop (DINOv2: 224). The feature is the
    pooled output of a timm model, or the mean over a map of features, or the first output token after the last norm layer.
    """

    def __init__(self, model: nn.Module, pixels: Pixels):
        super().__init__()
        self.model, self.pixels = freeze(model), pixels
        with torch.no_grad():
            output = model(pixel_values=pixels(torch.full((1, 3, 64, 64), 0.5)))
        kinds = {3: "token", 4: "mean"}
        self.feature = "pooled" if isinstance(model, TimmWrapperModel) else kinds[output.last_hidden_state.ndim]
        self.config = pixels.about() | {"net": architecture(model)}
        if self.feature != "token":  # the others are newer; keeps older fingerprints valid
            self.config["feature"] = self.feature

    def forward(self, image_BCHW: Tensor) -> Tensor:
        output = self.model(pixel_values=self.pixels(image_BCHW))
        match self.feature:
            case "pooled":
                return output.pooler_output
            case "mean":
                return output.last_hidden_state.mean((2, 3))
        return output.last_hidden_state[:, 0]


def load_hub_encoder(path: str) -> HubEncoder:
    """Load a frozen encoder from a folder or hub id and run it on one image; ValueErrors of one line name the path."""
    local = Path(path).exists()
    quiet()
    try:
        model, found = AutoModel.from_pretrained(
            path, use_safetensors=True, local_files_only=local, dtype=torch.float32, output_loading_info=True
        )
        encoder = HubEncoder(model, processor_pixels(path, local).whole())
    except Exception as error:  # transformers, safetensors and the hub raise several types
        raise ValueError(
            f"found {path}, allowed: a folder or hub id of a Hugging Face image encoder with safetensors "
            f"({first_words(error)})"
        ) from error
    if lost := sorted(k for k in found["missing_keys"] if not k.startswith("pooler.")):  # the pooler is not used
        raise ValueError(f"{path} has no weights for {lost[0]}; allowed: a whole model")
    require_finite(model.state_dict(), path)
    return encoder
