"""Image classifiers as ONNX graphs, for audits: onnxruntime gives no gradient, so none can be trained against.

A graph names no labels. Its columns are called by their numbers, "0", "1", ..., or with several outputs "output:0"; `mapping`
gives each column to a class of some attribute, as labels of Hugging Face classifiers (`hub`). ValueErrors of one line begin
with the option (`path`, `mapping`, `graph`).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from classifiers.hub import Classes, check_labels, places_of
from classifiers.pixels import Pixels, first_words

# How a graph wants its pixels, and what its outputs are: (scale x - mean) / std of x in [0, 1]
GRAPH = {"scale": 1.0, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "channels": "rgb", "outputs": "logits"}
LEAST = 1e-12  # of a probability, whose logarithm is taken


class OnnxGraph:
    """One graph: crops [F, 3, H, W] in [0, 1] to its columns [F, C], side by side those of all outputs."""

    def __init__(self, place: str, options: Mapping):
        runtime = _runtime()
        file = Path(place)
        if not file.is_file():
            raise ValueError(f"path: found {place}, allowed: a file of an ONNX graph (.onnx)")
        self.data = file.read_bytes()
        settings = runtime.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = torch.get_num_threads(), 4
        try:  # from its bytes: what lies beside the file would be in no fingerprint
            self.session = runtime.InferenceSession(self.data, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own kinds
            raise ValueError(f"path: {place}: onnxruntime cannot read this graph ({first_words(error)})") from None
        self.input, self.batch, self.last, size = _input(place, self.session.get_inputs())
        self.bgr, self.probabilities = options["channels"] == "bgr", options["outputs"] == "probabilities"
        self.pixels = Pixels(size, "bilinear", None, options["scale"], tuple(options["mean"]), tuple(options["std"]))
        self.labels = self._labels(place)
        self.about = self.pixels.about() | {"channels": options["channels"], "outputs": options["outputs"]}

    def _labels(self, place: str) -> list[str]:
        """What each column is called, after one image has gone through."""
        try:
            found = self._run(self.pixels(torch.full((self.batch or 1, 3, 64, 64), 0.5)))
        except Exception as error:  # onnxruntime's own kinds
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
        """Logits of the columns [F, C]: the logarithm where the graph gives probabilities."""
        pieces = crop_FCHW.split(self.batch or len(crop_FCHW))
        columns = [np.concatenate(self._run(self.pixels(piece.float())), 1).astype(np.float32) for piece in pieces]
        found_FC = torch.from_numpy(np.concatenate(columns))
        return found_FC.clamp(min=LEAST).log() if self.probabilities else found_FC


class OnnxClassifier(nn.Module):
    """ONNX graphs as one `Classifier`, without gradients: a class is the sum of its columns' probabilities.

    requested: attribute -> classes in the order of the logits; source: attribute -> which of the graphs answers for it.
    """

    def __init__(self, graphs: list[OnnxGraph], source: dict[str, int], mapping: Classes, requested: Mapping):
        super().__init__()
        self.graphs, self.source = graphs, source
        self.attributes = {name: tuple(classes) for name, classes in requested.items()}
        self.columns = {
            name: [[graphs[source[name]].labels.index(str(label)) for label in mapping[name][c]] for c in classes]
            for name, classes in self.attributes.items()
        }
        for i, graph in enumerate(graphs):  # the files are the weights: fingerprints and devices are those of buffers
            self.register_buffer(f"graph_{i}", torch.frombuffer(bytearray(graph.data), dtype=torch.uint8))
        self.config = {"graphs": [graph.about for graph in graphs], "source": source, "columns": self.columns}
        self.config["attributes"] = self.attributes
        self.eval()

    @torch.no_grad()
    def forward(self, crop_FCHW: Tensor) -> dict[str, Tensor]:
        """Logits [F, K] per attribute of crops [F, 3, H, W] in [0, 1], any H and W, F = 0 included."""
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
    """A classifier from one file, or from one for each attribute. Every column must belong to a class of some attribute; one
    that is no class, such as an age in years, to an attribute that nobody requests."""
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
    """Name of the one input, its fixed batch size, whether its channels come last, and its fixed (height, width)."""
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
