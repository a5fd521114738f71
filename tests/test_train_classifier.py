"""scripts/train_classifier.py: it trains a judge on labelled faces, measures it on held-out ones, and runs accept it."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import CONVNEXT, composed

from classifiers import faces as faces_module
from classifiers import training
from classifiers.attributes import load_attribute_net
from classifiers.crop import expand_box
from classifiers.faces import MARGIN, read_faces, store_faces, stored_boxes, stored_side
from classifiers.labels import read_labels
from classifiers.training import jitter_boxes
from fairdiff import builder
from fairdiff.builder.calibration import build_confusion

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import train_classifier  # noqa: E402

FACES = 240
SETTINGS = ["detector=whole", "detector.crop_size=32", "attribute=[gender,age]"]
NET = ["--architecture", CONVNEXT["architecture"], "--kwargs", json.dumps(CONVNEXT["kwargs"]), "--batch", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures that are red or blue (gender) and striped or plain (age) under noise; one of them is broken."""
    folder, rng = tmp_path_factory.mktemp("faces"), np.random.default_rng(0)
    rows = [("image", "gender", "age")]
    for i in range(FACES):
        gender, age = rng.integers(0, 2, 2)
        pixels = rng.integers(90, 160, (40, 40, 3), dtype=np.uint8)
        pixels[..., 2 * gender] = 230
        pixels[::4] = pixels[::4] if age else 20
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append((f"{i}.png", ("female", "male")[gender], ("young", "old")[age]))
    (folder / "3.png").write_bytes(b"\x89PNG cut short")
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder


def call(capsys, *args: object) -> tuple[int, str, str]:
    try:
        train_classifier.main([str(a) for a in args])
        code = 0
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    judge = tmp_path_factory.mktemp("judge") / "first"
    train_classifier.main([str(a) for a in (folder, judge, *SETTINGS, "--steps", 90, *NET)])
    return judge


def test_it_learns_reports_held_out_faces_by_group_and_a_run_takes_it(folder, trained, capsys):
    assert {p.name for p in trained.iterdir()} == {
        "config.json", "model.safetensors", "training.json", "calibration.json", "calibration.md", "calibration.png",
    }  # fmt: skip
    classes = {"gender": ("female", "male"), "age": ("young", "old")}
    held_out = read_labels(folder, classes).with_held_out().of_split("val")
    content = json.loads((trained / "calibration.json").read_text())
    gender = content["attributes"]["gender"]
    counts = np.array(gender["counts"])
    assert counts.sum() == content["faces"]["found"] == len(held_out)
    assert np.trace(counts) / counts.sum() > 0.85
    assert {*gender["groups"]} == {"gender", "age"}
    about = json.loads((trained / "training.json").read_text())
    assert sum(about["faces"]["gender"].values()) == FACES - len(held_out) - 1  # one is broken
    config = composed(*SETTINGS, "judge@audit.judge=net", f"audit.judge.path={trained}")
    judge = builder.build_classifier(config.audit.judge, "audit.judge", "audit_judge", classes, "cpu")
    np.testing.assert_array_equal(build_confusion(config, judge)["gender"], counts)
    assert "made before" in call(capsys, folder, trained, *SETTINGS, "--steps", 90, *NET)[1]
    code, _, err = call(capsys, folder, trained, *SETTINGS, "--steps", 91, *NET)
    assert code == 2 and "holds a judge of other faces or options" in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--rockafellian"]])
def test_same_seed_same_weights_and_a_break_changes_no_bit(folder, tmp_path, monkeypatch, capsys, more):
    args = [*SETTINGS, "--steps", 12, *NET, *more]
    monkeypatch.setattr(faces_module, "BLOCK", 50)
    plan = training.FitPlan  # saved every few steps, so that there is something to go on from
    monkeypatch.setattr(train_classifier, "FitPlan", lambda *a, **k: plan(*a, **k | {"save_every": 4}))
    monkeypatch.setattr(train_classifier, "Relaxation", lambda share: training.Relaxation(share, every=2))
    assert call(capsys, folder, tmp_path / "one", *args)[0] == 0

    loss, calls = training.label_loss, []

    def until_killed(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(training, "label_loss", until_killed)
    code, _, err = call(capsys, folder, tmp_path / "two", *args)
    assert code == 130 and err == "interrupted; the same command goes on\n"
    assert call(capsys, folder, tmp_path / "two", *args)[0] == 0
    assert len(calls) == 7 + 12 - 4  # six steps, the break, and all from the fourth on
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    for name in ("calibration.json", "training.json"):
        first, second = ((tmp_path / judge / name).read_text() for judge in ("one", "two"))
        assert first.replace(str(tmp_path / "one"), str(tmp_path / "two")) == second
    about = json.loads((tmp_path / "one" / "training.json").read_text())
    assert ("dropped" in about) == bool(more)
    if more:
        assert set(about["dropped"]["gender"]["age"]) == {"young", "old"}


def test_another_seed_is_another_judge(folder, trained, tmp_path, capsys):
    assert call(capsys, folder, tmp_path / "x", *SETTINGS, "--steps", 1, "--seed", 1, *NET)[0] == 0
    first = load_attribute_net(trained).state_dict()
    second = load_attribute_net(tmp_path / "x").state_dict()
    assert not any(torch.equal(first[key], second[key]) for key in first if first[key].ndim > 1)


def test_jitter_stays_within_the_stored_faces():
    size, expand = 32, 1.6
    boxes = stored_boxes(4, size, expand)
    wide = expand_box(torch.from_numpy(boxes), expand)
    assert torch.allclose(wide[:, 2] - wide[:, 0], torch.tensor(float(size)))
    rows = np.arange(4).repeat(500)
    moved = jitter_boxes(np.zeros((4, 1, 1, 3)), boxes, rows, expand, torch.Generator().manual_seed(0))
    beyond = max(-moved.min(), moved.max() - stored_side(size))
    assert beyond < 0.02 * size and (moved.max() > stored_side(size) - 2)  # no wider than it must be
    assert MARGIN * size == stored_side(size)


def test_a_store_goes_on_and_leaves_another_request_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(faces_module, "BLOCK", 2)
    files, looked = [Path(str(i)) for i in range(7)], []

    def look(file):
        looked.append(int(str(file)))
        return (1, torch.full((1, 3, 4, 4), looked[-1] / 255)) if looked[-1] != 2 else (2, None)

    work = store_faces(files, look, 4, tmp_path, "one")
    assert [next(work), next(work), next(work)] == [(0, 0), (2, 2), (4, 3)]
    work.close()
    assert list(store_faces(files, look, 4, tmp_path, "one"))[-1] == (7, 6)
    assert looked == [*range(7)]
    images, rows = read_faces(tmp_path)
    assert rows.tolist() == [0, 1, 3, 4, 5, 6] and images[:, 0, 0, 0].tolist() == rows.tolist()
    assert next(store_faces(files, look, 4, tmp_path, "two")) == (0, 0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--architecture", "resnet19"], "error: --architecture, --kwargs: timm cannot build resnet19"),
        (["--kwargs", "{"], "error: --kwargs: is not JSON"),
        (["attribute=[race]"], "error: folder: {folder}: found labels.csv without a label of race"),
        (["attribute=[gender,race]"], "error: folder: race: no face to train on is labelled White"),
    ],
)
def test_what_cannot_be_is_one_line(args, message, folder, tmp_path, capsys):
    settings = [s for s in SETTINGS if not (s.startswith("attribute") and args[0].startswith("attribute"))]
    code, _, err = call(capsys, folder, tmp_path / "x", *settings, "--steps", 1, *NET, *args)
    assert code == 2 and err.startswith(message.format(folder=folder)) and err.count("\n") == 1
