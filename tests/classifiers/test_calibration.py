import json

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from classifiers.calibration import (
    calibrate,
    confusion,
    load_calibration,
    reliability,
    save_calibration,
    temperature,
)

DETECTOR = {"type": "mtcnn", "input_size": 64, "crop_size": 48, "expand": 1.6}


def labelled(n: int, classes: int, sharpness: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax at temperature `sharpness` is exactly the chance of the label."""
    rng = np.random.default_rng(0)
    honest = rng.normal(size=(n, classes)) * 2
    cumulative = softmax(honest, axis=1).cumsum(1)
    return honest * sharpness, (rng.random((n, 1)) > cumulative).sum(1).clip(max=classes - 1)


def test_confusion_counts_rows_by_truth():
    counts = confusion(np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 0, 0]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 0]]


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 3.0])
def test_temperature_finds_the_sharpness_and_no_other_does_better(sharpness):
    logits, true = labelled(20_000, 4, sharpness)
    found = temperature(logits, true)
    assert found == pytest.approx(sharpness, rel=0.05)

    def loss(t):
        return -log_softmax(logits / t, axis=1)[np.arange(len(true)), true].mean()

    assert loss(found) <= min(loss(found * 1.05), loss(found / 1.05))


def test_ece_is_the_gap_between_confidence_and_accuracy():
    probs = np.repeat([[0.9, 0.1]], 10, 0)
    true = np.array([0] * 6 + [1] * 4)
    result = reliability(probs, true, bins=10)
    assert result.ece == pytest.approx(0.3)
    assert result.count.tolist() == [0] * 8 + [10, 0] and np.isnan(result.accuracy[0])
    assert result.accuracy[8] == pytest.approx(0.6) and result.confidence[8] == pytest.approx(0.9)


def test_honest_logits_are_calibrated_and_sharp_ones_become_so_at_their_temperature():
    logits, true = labelled(20_000, 2, 3.0)
    sharp = reliability(softmax(logits, axis=1), true).ece
    cooled = reliability(softmax(logits / temperature(logits, true), axis=1), true).ece
    assert sharp > 0.05 and cooled < 0.015


def test_calibrate_leaves_unlabelled_faces_out_and_survives_the_disk(tmp_path):
    logits, true = labelled(500, 2, 2.0)
    half = true.copy()
    half[::2] = -1
    attributes = {"gender": ("female", "male"), "age": ("young", "old")}
    result = calibrate({"gender": logits, "age": logits}, {"gender": true, "age": half}, attributes)
    assert result["gender"].counts.sum() == 500 and result["age"].counts.sum() == 250
    assert result["gender"].accuracy == pytest.approx((logits.argmax(1) == true).mean())
    save_calibration(result, DETECTOR, tmp_path / "calibration.json")
    loaded, detector = load_calibration(tmp_path / "calibration.json")
    assert detector == DETECTOR
    assert loaded["age"].classes == ("young", "old") and loaded["age"].ece == result["age"].ece
    np.testing.assert_array_equal(loaded["age"].counts, result["age"].counts)


def saved(**changes) -> str:
    gender = {"classes": ["a", "b"], "counts": [[9, 1], [2, 8]], "temperature": 1.0, "ece": 0.1} | changes
    return json.dumps({"detector": DETECTOR, "attributes": {"gender": gender}})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ""),
        ("[]", ""),
        ("[" * 100_000, ""),
        ("\x00\x01", ""),
        ('{"gender": {"classes": ["a"]}}', "detector: found None, allowed: type, input_size, crop_size, expand"),
        (json.dumps({"detector": DETECTOR | {"expand": "wide"}, "attributes": {}}), "detector: found .*wide"),
        (json.dumps({"detector": DETECTOR}), "attributes"),
        (saved(counts=[[9, -1], [2, 8]]), "counts: found .*, allowed: rows of numbers of faces"),
        (saved(counts=[[0.9, 0.1], [0.2, 0.8]]), "counts: found .*, allowed: rows of numbers of faces"),
        (saved(counts=[["many"]]), "many"),
        (saved(counts=None), r"gender\.counts: found None"),
        (saved(counts=[["9", "1"], ["2", "8"]]), r"gender\.counts: found \[\['9'"),
        (saved(counts=[[1e300, 1], [2, 8]]), r"gender\.counts: found \[\[1e\+300, .* to 1e\+12"),
        (saved(counts=[[True, 1], [2, 8]]), r"gender\.counts: found \[\[True"),
        (saved(counts=[[float("nan"), 1], [2, 8]]), r"gender\.counts: found \[\[nan"),
        (saved(counts=[[9, 1], [2]]), r"gender\.counts: found \[\[9, 1\], \[2\]\]"),
        (saved(counts=[]), r"gender\.counts: found \[\]"),
        (saved(classes="ab"), r"gender\.classes: found 'ab', allowed: a list of two names"),
        (saved(classes=[["a"], ["b"]]), r"gender\.classes: found \[\['a'\]"),
        (saved(classes={"a": 1, "b": 2}), r"gender\.classes: found \{'a'"),
        (saved(classes=["a", "a"]), r"gender\.classes: found .*, allowed: different names"),
        (saved(classes=["a"]), r"gender\.classes: found \['a'\]"),
        (saved(temperature="x"), r"gender\.temperature: found 'x', allowed: a number greater than 0"),
        (saved(temperature=0), r"gender\.temperature: found 0"),
        (saved(temperature=True), r"gender\.temperature: found True"),
        (saved(ece=2), r"gender\.ece: found 2, allowed: a number in \[0, 1\]"),
        (saved(ece=None), r"gender\.ece: found None"),
        (saved(judge=7), r"gender\.judge: found 7"),
        (json.dumps({"detector": DETECTOR | {"crop_size": True}, "attributes": {}}), "detector: found .*True"),
        (json.dumps({"detector": DETECTOR | {"crop_size": -3}, "attributes": {}}), r"detector\.crop_size: found -3"),
        (json.dumps({"detector": DETECTOR | {"expand": float("nan")}, "attributes": {}}), r"detector\.expand: found nan"),
        (json.dumps({"detector": DETECTOR, "attributes": {"gender": []}}), ""),
        (json.dumps({"detector": DETECTOR, "attributes": []}), ""),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, says):
    file = tmp_path / "calibration.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"calibration\.json: is no calibration .*{says}") as error:
        load_calibration(file)
    assert "\n" not in str(error.value)
