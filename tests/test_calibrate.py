"""scripts/calibrate.py: it counts errors on labelled faces, which the audit uses for this judge and no other."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import composed
from tiny_judges import save_open_clip, save_vit, uncalibrated

from classifiers import judging
from classifiers.attributes import load_attribute_net
from classifiers.data import find_faces
from classifiers.detect import MTCNNDetector
from classifiers.training import predict
from fairdiff import builder
from fairdiff.builder.calibration import build_confusion
from fairdiff.errors import FairDiffError
from fairdiff.portraits import weights

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import calibrate  # noqa: E402

SIDE, FACES = 64, 16  # of a rendered person, and how many of them, spread over the sheet
CLASSES = ("female", "male")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Rendered people of docs/images/renders.jpg."""
    with Image.open(ROOT / "docs" / "images" / "renders.jpg") as sheet:
        across, down = sheet.width // SIDE, sheet.height // SIDE
        tiles = np.linspace(0, across * down - 1, FACES).astype(int).tolist()
        places = [(SIDE * (i % across), SIDE * (i // across)) for i in tiles]
        return np.stack([np.asarray(sheet.convert("RGB").crop((x, y, x + SIDE, y + SIDE))) for x, y in places])


@pytest.fixture(scope="module")
def judged(images) -> np.ndarray:
    """Return the gender labels of the audit judge, computed with other functions than the command."""
    rows, boxes = find_faces(images, MTCNNDetector(input_size=64))
    assert len(rows) == FACES
    net = load_attribute_net(weights("audit_judge"))
    judged_N = predict(net, images, boxes)["gender"].argmax(1)
    assert 4 <= judged_N.sum() <= FACES - 4
    return judged_N


@pytest.fixture(scope="module")
def folder(images, judged, tmp_path_factory) -> Path:
    """Write faces whose labels agree with the judge except every fourth; one has no label, one no face, one is damaged."""
    folder = tmp_path_factory.mktemp("faces")
    labels = [CLASSES[k if i % 4 else 1 - k] for i, k in enumerate(judged)]
    rows = [("image", "gender")]
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append((f"{i}.png", labels[i] if i else ""))
    Image.new("RGB", (SIDE, SIDE), "grey").save(folder / "nobody.png")
    (folder / "broken.png").write_bytes(b"\x89PNG cut short")
    rows += [("nobody.png", "female"), ("broken.png", "male")]
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder


def call(capsys, *args: object) -> tuple[int, str, str]:
    try:
        calibrate.main([str(a) for a in args])
        code = 0
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


def confusion(*overrides: str) -> dict[str, np.ndarray]:
    config = composed(*overrides)
    classes = {name: tuple(a.classes) for name, a in config.attributes.items()}
    return build_confusion(config, builder.build_classifier(config.audit.judge, "audit.judge", "audit_judge", classes, "cpu"))


def test_it_counts_the_judges_errors_and_the_audit_takes_them(folder, judged, tmp_path, capsys):
    file = tmp_path / "new" / "judge.json"
    code, out, _ = call(capsys, folder, "--out", file)
    assert code == 0 and f"{FACES} faces of {FACES + 2} pictures; 1 without a face, 1 unreadable" in out
    right = [i % 4 != 0 for i in range(FACES)]
    expected = np.zeros((2, 2), int)
    for i in range(1, FACES):
        expected[judged[i] if right[i] else 1 - judged[i], judged[i]] += 1
    counts = confusion(f"audit.calibration={file}")
    assert list(counts) == ["gender"]
    np.testing.assert_array_equal(counts["gender"], expected)

    content = json.loads(file.read_text())
    gender = content["attributes"]["gender"]
    assert content["faces"] == {"found": FACES, "not_found": 1, "unreadable": 1}
    assert sum(group["faces"] for group in gender["groups"]["gender"].values()) == FACES - 1
    assert gender["temperature"] > 1  # a quarter of its answers is wrong and it is sure of all
    page = file.with_suffix(".md").read_text()
    assert "judge.png" in page and "1 unreadable" in page and "never identity" in page
    assert {p.name for p in file.parent.iterdir()} == {"judge.json", "judge.md", "judge.png"}
    with Image.open(file.with_suffix(".png")) as diagram:
        assert diagram.size[0] > 200
    assert call(capsys, folder, "--out", file)[1] == f"{file}: made before\n"


def test_another_judge_or_other_crops_refuse_it_in_one_line(folder, tmp_path, capsys):
    file = tmp_path / "judge.json"
    call(capsys, folder, "--out", file)
    for overrides, says in [
        ([f"audit.judge.path={weights('judge')}"], "gender was measured with another judge, weights or words"),
        (["detector.expand=2"], "measured with detector.expand=1.6, found 2.0"),
    ]:
        with pytest.raises(FairDiffError, match=rf"^audit\.calibration: .*judge\.json.* {says}") as error:
            confusion(f"audit.calibration={file}", *overrides)
        assert "\n" not in str(error.value)
    content = json.loads(file.read_text())
    del content["attributes"]["gender"]["judge"]
    file.write_text(json.dumps(content))
    with pytest.raises(FairDiffError, match="does not say with which judge"):  # nobody knows whose errors these are
        confusion(f"audit.calibration={file}")
    with pytest.raises(FairDiffError, match=r"^audit\.calibration: .*nowhere\.json"):
        confusion(f"audit.calibration={tmp_path / 'nowhere.json'}")


def test_judges_of_others_have_theirs_beside_them(folder, tmp_path, capsys):
    """The counts of a zero-shot judge also hold with a further attribute, but not with other words."""
    folders = {kind: tmp_path / kind for kind in ("hf", "open_clip")}
    for place in folders.values():
        place.mkdir()
    save_vit(folders["hf"], ["Female", "Male"])
    save_open_clip(folders["open_clip"])
    for kind, place in folders.items():
        judge = [f"judge@audit.judge={kind}", f"audit.judge.path={place}"]
        judge += ["audit.judge.mapping={gender: {female: [Female], male: [Male]}}"] if kind == "hf" else []
        code, out, err = call(capsys, folder, *judge)
        assert code == 0, err
        assert (place / "calibration.json").is_file()
        with_more = [*judge] if kind == "hf" else [*judge, "attribute=[gender,age]"]
        content = json.loads((place / "calibration.json").read_text())
        assert np.sum(content["attributes"]["gender"]["counts"]) == FACES - 1
        content["attributes"]["gender"]["counts"] = [[6, 1], [2, 6]]  # random judges are no better than chance
        (place / "calibration.json").write_text(json.dumps(content))
        assert confusion(*with_more)["gender"].tolist() == [[6, 1], [2, 6]]
    words = "audit.judge.mapping.gender={female: [a lady], male: [a gentleman]}"
    with pytest.raises(FairDiffError, match="another judge, weights or words"):
        confusion("judge@audit.judge=open_clip", f"audit.judge.path={folders['open_clip']}", words)


def test_broken_off_it_goes_on_and_writes_the_same_bits(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judging, "BLOCK", 5)
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    assert call(capsys, folder, "--out", whole)[0] == 0
    looked, look = [], judging.read_picture

    def until_killed(file, longest):
        looked.append(file.name)
        if len(looked) == 13:
            raise KeyboardInterrupt
        return look(file, longest)

    monkeypatch.setattr(judging, "read_picture", until_killed)
    code, _, err = call(capsys, folder, "--out", broken)
    assert code == 130 and err == "interrupted; the same command goes on\n" and not broken.exists()
    assert call(capsys, folder, "--out", broken)[0] == 0
    assert broken.read_bytes() == whole.read_bytes() and len(looked) == FACES + 2 + 3  # three of a block looked at twice


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{folder}"], "--out: found nothing, allowed with the embedded judge: a new file"),
        (["{folder}", "judge@audit.judge=open_clip"], "--out: found nothing, but this judge has no folder"),
        (["{empty}", "--out", "{new}"], "folder: {empty}: found no labels, allowed: a folder with labels.csv"),
        (["{folder}", "--out", "{new}", "--split", "val"], "folder: {folder}: found no splits, but split val is requested"),
        (["{folder}", "--out", "{new}", "audit.jugde.path=x"], "audit.jugde"),
        (["{one}", "--out", "{new}"], "folder: gender: no face is labelled male, allowed: faces of every class"),
        (["{nobody}", "--out", "{new}"], "folder: {nobody}: 0 faces of 1 pictures; 1 without a face; allowed: pictures of"),
    ],
)
def test_what_cannot_be_is_one_line(args, message, folder, tmp_path, capsys):
    names = {"folder": folder, "new": tmp_path / "new.json"} | {n: tmp_path / n for n in ("empty", "one", "nobody")}
    for name in ("empty", "one", "nobody"):
        names[name].mkdir()
    shutil.copy(folder / "1.png", names["one"])
    shutil.copy(folder / "nobody.png", names["nobody"])
    (names["one"] / "labels.csv").write_text("image,gender\n1.png,female\n")
    (names["nobody"] / "labels.csv").write_text("image,gender\nnobody.png,female\n")
    code, _, err = call(capsys, *(a.format(**names) for a in args))
    assert code == 2 and err.startswith(f"error: {message.format(**names)}") and err.count("\n") == 1
    assert not names["new"].exists()


def test_an_uncalibrated_judge_has_no_counts(tmp_path):
    assert confusion(f"audit.judge.path={uncalibrated(tmp_path / 'judge')}") == {}
