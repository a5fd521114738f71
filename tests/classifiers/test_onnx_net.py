"""An ONNX judge says what the same network says in torch, whatever its layout, and misfits are one line."""

from itertools import product

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from classifiers.detect import WholeImage
from classifiers.onnx_net import GRAPH, OnnxGraph, load_onnx
from fairdiff import builder, fingerprint
from fairdiff.audit.measure import Measurer, measure
from fairdiff.builder.judges import build_classifier
from fairdiff.config import JudgeConfig

CLASSES = {"gender": ("female", "male")}
MAPPING = {"gender": {"female": ["0", 2], "male": ["1"]}}
FACES = torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(2))
WEIGHTS = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)) * 4


def export(file, weights=WEIGHTS, shape=("N", 3, None, None), last=False, softmax=False, outputs=None, kind=None) -> str:
    """A graph that averages the pixels and multiplies; columns are split over `outputs`, {name: columns}."""
    names = outputs or {"scores": weights.shape[1]}
    shape = [shape[0], *shape[2:], 3] if last else list(shape)
    nodes, image, ends, at = [], "image", [], 0
    if last:
        nodes.append(helper.make_node("Transpose", ["image"], ["first"], perm=[0, 3, 1, 2]))
        image = "first"
    nodes += [helper.make_node("GlobalAveragePool", [image], ["mean"]), helper.make_node("Flatten", ["mean"], ["flat"])]
    initial = []
    for name, columns in names.items():
        matrix = weights[:, at : at + columns].numpy()
        initial.append(numpy_helper.from_array(np.ascontiguousarray(matrix), f"w_{name}"))
        nodes.append(helper.make_node("MatMul", ["flat", f"w_{name}"], [f"raw_{name}" if softmax else name]))
        nodes += [helper.make_node("Softmax", [f"raw_{name}"], [name], axis=1)] if softmax else []
        ends.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, columns]))
        at += columns
    start = helper.make_tensor_value_info("image", kind or TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "g", [start], ends, initial)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(file))
    return str(file)


def by_hand(faces, weights=WEIGHTS) -> torch.Tensor:
    """Logits of female (columns 0 and 2) and male in torch."""
    columns = faces.mean((2, 3)) @ weights
    return torch.stack([columns[:, [0, 2]].logsumexp(1), columns[:, 1]], 1)


SHAPES = [("N", 3, None, None), (1, 3, 24, 24)]


@pytest.mark.parametrize(("last", "softmax", "shape"), [*product([False, True], [False, True], SHAPES)])
def test_a_graph_answers_as_the_same_network_in_torch(tmp_path, last, softmax, shape):
    """Probabilities are logits up to a number a face, which changes no probability."""
    file = export(tmp_path / "a.onnx", shape=shape, last=last, softmax=softmax)
    judge = load_onnx(file, MAPPING, {"outputs": "probabilities" if softmax else "logits"}, CLASSES)
    found, wanted = judge(FACES)["gender"], by_hand(FACES)
    assert torch.allclose(found.softmax(1), wanted.softmax(1), atol=1e-5)
    assert softmax or torch.allclose(found, wanted, atol=1e-4)
    assert torch.allclose(judge(FACES[3:])["gender"], found[3:], atol=1e-6) and judge(FACES[:0])["gender"].shape == (0, 2)


def test_pixels_are_scaled_and_channels_turned_as_it_wants(tmp_path):
    options = {"scale": 255, "mean": [10.0, 20, 30], "std": [50.0, 60, 70], "channels": "bgr"}
    judge = load_onnx(export(tmp_path / "a.onnx", WEIGHTS / 9), MAPPING, options, CLASSES)
    pixels = (FACES * 255 - torch.tensor(options["mean"]).view(3, 1, 1)) / torch.tensor(options["std"]).view(3, 1, 1)
    assert torch.allclose(judge(FACES)["gender"], by_hand(pixels.flip(1), WEIGHTS / 9), atol=1e-4)


def test_a_fixed_size_is_what_the_graph_is_given(tmp_path):
    graph = OnnxGraph(export(tmp_path / "a.onnx", shape=("N", 3, 8, 12)), GRAPH)
    assert graph.pixels.size == (8, 12) and graph(FACES).shape == (5, 3)


def test_of_several_outputs_columns_have_the_names_and_of_several_files_each_has_its_attribute(tmp_path):
    mapping = {"gender": {"female": ["sex:0"], "male": ["sex:1"]}, "years": {"number": ["age:0"]}}
    file = export(tmp_path / "a.onnx", outputs={"sex": 2, "age": 1})
    found = load_onnx(file, mapping, {}, CLASSES)(FACES)["gender"]
    assert torch.allclose(found, FACES.mean((2, 3)) @ WEIGHTS[:, :2], atol=1e-5)
    both = CLASSES | {"age": ("young", "old")}
    other = export(tmp_path / "b.onnx", -WEIGHTS)
    paths = {"gender": export(tmp_path / "c.onnx"), "age": other}
    judge = load_onnx(paths, MAPPING | {"age": {"young": [0, 2], "old": [1]}}, {}, both)
    assert torch.allclose(judge(FACES)["age"], by_hand(FACES, -WEIGHTS), atol=1e-4)
    assert torch.allclose(judge(FACES)["gender"], by_hand(FACES), atol=1e-4)


def test_the_files_and_how_they_are_read_are_in_the_fingerprint(tmp_path):
    def hashes(weights=WEIGHTS, mapping=MAPPING, **options):
        judge = load_onnx(export(tmp_path / "x.onnx", weights), mapping, options, CLASSES)
        return fingerprint.of_values(fingerprint.of_frozen(judge), judge.config), builder.judge_fingerprint(judge, "gender")

    swapped = {"gender": {"female": ["1"], "male": ["0", "2"]}}
    different = [hashes(), hashes(WEIGHTS * 2), hashes(mapping=swapped), hashes(scale=2.0), hashes(channels="bgr")]
    for kind in zip(*different, strict=True):
        assert len(set(kind)) == len(different)
    assert hashes() == different[0]


@pytest.mark.parametrize(
    ("made", "path", "mapping", "says"),
    [
        ({}, None, MAPPING, r"path: found null, allowed: a file of an ONNX graph \(.onnx\) for gender"),
        ({}, "nowhere.onnx", MAPPING, "path: found nowhere.onnx, allowed: a file"),
        ({}, "text", MAPPING, "path: .*text.onnx: onnxruntime cannot read this graph"),
        ({"shape": (4, 3, 24, 24)}, "", MAPPING, "path: .* fixed batch of 4, allowed: 1"),
        ({"shape": ("N", 4, 24, 24)}, "", MAPPING, "path: .*(three channels|cannot read)"),
        ({"shape": ("N", 3, 24, None)}, "", MAPPING, "path: .* a fixed size or any"),
        ({"kind": TensorProto.UINT8}, "", MAPPING, "path: "),
        ({}, "", {}, "mapping: found nothing, but gender is requested"),
        ({}, "", {"gender": {"female": ["0"], "male": ["1"]}}, "mapping: no class has the label 2 of .*x.onnx"),
        ({}, "", {"gender": {"female": ["0", "2"], "male": ["7"]}}, "mapping.gender.male: found 7, allowed: 0, 1, 2"),
        ({}, "", {"gender": {"female": ["0", "2"], "male": ["1", "2"]}}, "mapping.gender.male: found 2, which already"),
        ({}, "", {"gender": {"female": ["0", "1", "2"]}}, "mapping.gender.male: found nothing"),
    ],
)
def test_misfits_are_one_line_that_names_the_option(tmp_path, made, path, mapping, says):
    file = export(tmp_path / "x.onnx", **made)
    (tmp_path / "text.onnx").write_text("no graph")
    path = {"": file, "text": str(tmp_path / "text.onnx")}.get(path, path)
    with pytest.raises(ValueError, match=f"^{says}") as error:
        load_onnx(path, mapping, {}, CLASSES)
    assert "\n" not in str(error.value)


def test_it_judges_an_audit_and_is_built_from_settings(tmp_path):
    config = JudgeConfig("onnx", export(tmp_path / "a.onnx"), MAPPING)
    judge = build_classifier(config, "audit.judge", "audit_judge", CLASSES, "cpu")
    found = measure(Measurer(WholeImage(), judge, None, None, 16, 1.0), FACES, "x")
    assert found.found_B.all() and np.allclose(found.probs["gender"].sum(1), 1)
    assert next(judge.buffers()).device.type == "cpu"  # what `Audit.waiting` asks for
