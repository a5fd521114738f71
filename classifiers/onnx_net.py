"""Image classifiers as ONNX graphs. They are for audits only, because onnxruntime gives no gradient for training.

A graph has no label names. Its columns have the labels "0", "1", ..., or with several outputs "output:0"; `mapping` assigns
each of them to a class of some attribute, as in `hub`. ValueErrors of one line begin with the option (`path`, `mapping`,
`graph`).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from classifiers.hub import Classes, check_labels, places_of
from classifiers.pixels import Pixels, first_words

# Defaults of the graph's options: its input is (scale x - mean) / std of x in [0, 1]
GRAPH = {"scale": 1.0, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "channels": "rgb", "outputs": "logits"}
LEAST = 1e-12  # lower bound of probabilities before the logarithm


class OnnxGraph:
    """One graph: crops [F, 3, H, W] in [0, 1] to columns [F, C], those of all outputs side by side."""

    def __init__(self, place: str, options: Mapping):
        runtime = _runtime()
        file = Path(place)
        if not file.is_file():
            raise ValueError(f"path: found {place}, allowed: a file of an ONNX graph (.onnx)")
        self.data = file.read_bytes()
        settings = runtime.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = torch.get_num_threads(), 4
        try:  # from bytes, since external data beside the file would not be in the fingerprint
            self.session = runtime.InferenceSession(self.data, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own types
            raise ValueError(f"path: {place}: onnxruntime cannot read this graph ({first_words(error)})") from None
        self.input, self.batch, self.last, size = _input(place, self.session.get_inputs())
        self.bgr, self.probabilities = options["channels"] == "bgr", options["outputs"] == "probabilities"
        self.pixels = Pixels(size, "bilinear", None, options["scale"], tuple(options["mean"]), tuple(options["std"]))
        self.labels = self._labels(place)
        self.about = self.pixels.about() | {"channels": options["channels"], "outputs": options["outputs"]}

    def _labels(self, place: str) -> list[str]:
        """Return the label of each column, after a run on one image."""
        try:
            found = self._run(self.pixels(torch.full((self.batch or 1, 3, 64, 64), 0.5)))
        except Exception as error:  # onnxruntime's own types
            raise ValueError(f"path: {place}: the graph cannot read an image ({first_words(error)})") from None
        names = [output.name for output in self.session.get_outputs()]
        for name, array in zip(names, found, strict=True):
            if array.ndim != 2 or array.dtype.kind != "f":
                said = f"{array.ndim} dimensions of {array.dtype}"
                raise ValueError(f"path: {place}: its output {name} has {said}, allowed: [faces, columns] of floats")
        columns = [(name, k) for name, array in zip(names, found, strict=True) for k in range(array.shape[1])]
        return [str(k) if len(names) == 1 else f"{name}:{k}" for name, k in columns]

    def _run(self, image_BCHW: Tensor) -> list[np.ndarray]:
        array = (image_BCHW.flip(1) if self.bgr else image_BCHW).cpu().numpy()
        array = np.ascontiguousarray(array.transpose(0, 2, 3, 1) if self.last else array)
        kind = np.float16 if self.session.get_inputs()[0].type == "tensor(float16)" else np.float32
        return self.session.run(None, {self.input: array.astype(kind)})

    def __call__(self, crop_FCHW: Tensor) -> Tensor:
        """Return the logits of the columns [F, C], the logarithm if the graph outputs probabilities."""
        pieces = crop_FCHW.split(self.batch or len(crop_FCHW))
        columns = [np.concatenate(self._run(self.pixels(piece.float())), 1).astype(np.float32) for piece in pieces]
        found_FC = torch.from_numpy(np.concatenate(columns))
        return found_FC.clamp(min=LEAST).log() if self.probabilities else found_FC


class OnnxClassifier(nn.Module):
    """A `Classifier` of one or several ONNX graphs, without gradients; a class sums its columns' probabilities.

    requested: attribute -> classes in the order of the logits. source: attribute -> index of its graph.
    """

    def __init__(self, graphs: list[OnnxGraph], source: dict[str, int], mapping: Classes, requested: Mapping):
        super().__init__()
        self.graphs, self.source = graphs, source
        self.attributes = {name: tuple(classes) for name, classes in requested.items()}
        self.columns = {
            name: [[graphs[source[name]].labels.index(str(label)) for label in mapping[name][c]] for c in classes]
            for name, classes in self.attributes.items()
        }
        for i, graph in enumerate(graphs):  # the files count as weights in fingerprints, which hash buffers
            self.register_buffer(f"graph_{i}", torch.frombuffer(bytearray(graph.data), dtype=torch.uint8))
        self.config = {"graphs": [graph.about for graph in graphs], "source": source, "columns": self.columns}
        self.config["attributes"] = self.attributes
        self.eval()

    @torch.no_grad()
    def forward(self, crop_FCHW: Tensor) -> dict[str, Tensor]:
        """Return logits [F, K] per attribute of crops [F, 3, H, W] in [0, 1] with any H and W; F may be 0."""
        if not len(crop_FCHW):
            return {name: crop_FCHW.new_zeros(0, len(classes)) for name, classes in self.attributes.items()}
        columns = {i: self.graphs[i](crop_FCHW).to(crop_FCHW.device) for i in sorted(set(self.source.values()))}
        return {
            name: torch.stack([columns[self.source[name]][:, some].logsumexp(1) for some in places], 1)
            for name, places in self.columns.items()
        }


def load_onnx(
    path: str | Mapping[str, str] | None, mapping: Classes, options: Mapping, requested: Mapping[str, tuple[str, ...]]
) -> OnnxClassifier:
    """Load a classifier from one file, or from one for each attribute.

    Every column must belong to a class of some attribute. A column that is no class, such as an age in years, can belong to
    an attribute that is not requested.
    """
    where = places_of(path, mapping, requested, "a file of an ONNX graph (.onnx)")
    places = list(dict.fromkeys(where.values()))
    graphs = [OnnxGraph(place, GRAPH | dict(options)) for place in places]
    for place, graph in zip(places, graphs, strict=True):
        check_labels(place, graph.labels, {name for name in requested if where[name] == place}, mapping)
    return OnnxClassifier(graphs, {name: places.index(place) for name, place in where.items()}, mapping, requested)


def _runtime():
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("type: onnx needs onnxruntime, which is not installed: pip install 'fairdiff[onnx]'") from None
    return onnxruntime


def _input(place: str, inputs: list) -> tuple[str, int | None, bool, tuple[int, int] | None]:
    """Return the input's name, fixed batch size or None, whether channels come last, and fixed (height, width) or None."""
    if len(inputs) != 1 or inputs[0].type not in ("tensor(float)", "tensor(float16)") or len(inputs[0].shape) != 4:
        said = ", ".join(f"{one.name}: {one.type} {one.shape}" for one in inputs)
        raise ValueError(f"path: {place}: found the inputs {said}, allowed: one of floats with four dimensions, an image")
    batch, *rest = (side if isinstance(side, int) and side > 0 else None for side in inputs[0].shape)
    last = rest[2] == 3 and rest[0] != 3
    channels, sides = (rest[2], rest[:2]) if last else (rest[0], rest[1:])
    if channels not in (3, None) or (None in sides and sides != [None, None]):
        raise ValueError(f"path: {place}: found an input of {inputs[0].shape}, allowed: three channels, a fixed size or any")
    if batch not in (1, None):
        raise ValueError(f"path: {place}: found a fixed batch of {batch}, allowed: 1, or any number")
    return inputs[0].name, batch, last, None if None in sides else (sides[0], sides[1])
