"""Images with several faces: the largest counts, or the image is refused; records and report give the number of faces."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from json_schema import closed, faults
from tiny import composed
from tiny_world import BrightSquare, TinyGenerator

from classifiers.crop import align, crop
from classifiers.types import Boxes
from fairdiff.audit.axis import MetricSpec
from fairdiff.audit.estimand import SEVERAL_REFUSED
from fairdiff.audit.generate import run_audit
from fairdiff.audit.measure import Measurer, measure
from fairdiff.audit.metrics import compute_metrics
from fairdiff.audit.schema import schema
from fairdiff.audit.wording import comparison, not_measured
from fairdiff.builder import build_encoders
from fairdiff.builder.audit import looking_in_words, naming_own_encoders
from fairdiff.builder.calibration import read_confusion
from fairdiff.builder.judges import crop_of, detector_fingerprint
from fairdiff.errors import FairDiffError


class Crowd(BrightSquare):
    """A detector of the bright square, with landmarks; it counts two more faces if the green channel of the face is dark."""

    def __call__(self, image_BCHW):
        boxes = super().__call__(image_BCHW)
        several_F = image_BCHW[boxes.row_F, 1, 8, 8] < 0.75
        point_F52 = torch.tensor([[6.0, 6], [10, 6], [8, 8], [6, 10], [10, 10]]).expand(len(boxes.row_F), 5, 2)
        return Boxes(boxes.row_F, boxes.box_F4, point_F52, boxes.size, 1 + 2 * several_F.long())


class Shown:
    """A judge that keeps the crops that it was given."""

    attributes = {"gender": ("female", "male")}

    def __call__(self, crop_FCHW):
        self.crops = crop_FCHW
        return {"gender": crop_FCHW.mean((2, 3))[:, :2]}


@pytest.fixture
def images(noise):
    return TinyGenerator(0.0, 0.3)("a person", noise("a person", 1, range(40), (3, 4, 4)))


def test_a_refused_picture_is_one_without_a_face_and_the_others_stay_as_they_were(images, measurer):
    measurer = replace(measurer, detector=Crowd())
    every, some = (measure(replace(measurer, refuse_several=refuse), images, "x") for refuse in (False, True))
    several = every.faces_B > 1
    assert several.any() and (every.faces_B == 1).any() and (every.faces_B == 0).any()
    assert np.array_equal(every.faces_B, some.faces_B)  # the number of faces is recorded in both cases
    assert np.array_equal(some.found_B, every.found_B & ~several) and (every.faces_B == 0)[~every.found_B].all()
    assert np.isnan(some.probs["gender"][several]).all() and np.isnan(some.box_B4[several]).all()
    same = some.found_B
    assert np.array_equal(some.probs["gender"][same], every.probs["gender"][same])
    assert np.array_equal(some.clip_t_B, every.clip_t_B)


def test_a_detector_that_does_not_count_says_so(images, measurer):
    found = measure(replace(measurer, refuse_several=True), images, "x")
    assert set(found.faces_B.tolist()) == {-1, 0} and np.array_equal(found.faces_B < 0, found.found_B)


def test_the_rate_is_recorded_told_and_published(plan, measurer, noise, tmp_path):
    models = {"before": TinyGenerator(0.0), "after": TinyGenerator(0.5)}
    audits = {}
    for name, detector in (("counts", Crowd()), ("does not", BrightSquare())):
        records = run_audit(plan, models, replace(measurer, detector=detector), noise, tmp_path / name, lambda n: None)
        audits[name] = compute_metrics(records, MetricSpec(plan.attributes, {"path": "j"}, {"gender": [0.5, 0.5]}))
        people = records[records.people & (records.model == "after")]
        entry = audits[name]["models"]["after"]["several_faces"]
        if name == "counts":
            assert entry["images"] == (people.faces > 1).sum() > 0 and entry["rate"] == (people.faces > 1).mean()
            assert entry["ci95"][0] < entry["rate"] < entry["ci95"][1]
        else:
            assert entry["rate"] is None
        row = [row for row in comparison(audits[name])["pictures"] if row["name"] == "several faces"][0]
        assert row["after"] == (entry["rate"], entry["ci95"]) and row["note"] == "the largest face of a picture counts"
        assert not faults(audits[name], closed(schema()), closed(schema()))
        assert "Anyone but the largest face of a picture." in not_measured(audits[name])


def test_refusing_is_told_and_changes_the_audits_name():
    said = looking_in_words(composed("audit.faces=refuse"))["several_faces"]
    assert said == SEVERAL_REFUSED
    assert "several_faces" not in looking_in_words(composed())
    with pytest.raises(FairDiffError, match="^audit.faces: found all, allowed: largest, refuse"):
        composed("audit.faces=all")
    with pytest.raises(FairDiffError, match="^audit.faces: found refuse, allowed with detector=whole"):
        composed("audit.faces=refuse", "detector=whole")


def test_an_aligned_judge_sees_the_template_and_another_the_box(images):
    judge, boxes = Shown(), Crowd()(images)
    measure(Measurer(Crowd(), judge, None, None, 12, 1.3, aligned=True), images, "x")
    assert torch.equal(judge.crops, align(images, boxes, 12))
    measure(Measurer(Crowd(), judge, None, None, 12, 1.3), images, "x")
    assert torch.equal(judge.crops, crop(images, boxes, 12, 1.3))


def test_the_alignment_is_in_the_crop_the_fingerprint_the_page_and_the_calibration():
    plain, aligned = composed("audit.calibration=none"), composed("audit.judge.align=true", "audit.calibration=none")
    assert not crop_of(plain, plain.audit.judge).align and crop_of(aligned, aligned.audit.judge).align
    assert not crop_of(aligned, aligned.judge).align  # the training judge has its own crop
    hashes = {detector_fingerprint(config, None, config.audit.judge) for config in (plain, aligned)}
    assert len(hashes) == 2
    assert looking_in_words(aligned)["crop"] == "64 pixels, aligned on five landmarks"
    with pytest.raises(FairDiffError, match=r"judge\.align=False, found True: .*audit\.calibration=none"):
        read_confusion(composed("audit.judge.align=true"))
    with pytest.raises(FairDiffError, match="^judge.expand: found 2.0 beside judge.align"):
        composed("audit.judge.align=true", "audit.judge.expand=2")
    with pytest.raises(FairDiffError, match="^audit.judge.align: found true, allowed with detector=whole"):
        composed("audit.judge.align=true", "detector=whole")


def test_encoders_of_the_audit_are_its_own_where_they_are_given(tmp_path):
    same, own = composed(), composed("audit.clip=other/clip", "audit.encoder=other/encoder")
    assert looking_in_words(same)["encoders"].startswith("those of `features`")
    assert looking_in_words(own)["encoders"].startswith("others")
    assert looking_in_words(composed("audit.clip=other/clip"))["encoders"].startswith("those")  # both must differ
    for key in ("clip", "encoder"):
        with pytest.raises(FairDiffError, match=f"^audit.{key}: "), naming_own_encoders(own):
            build_encoders(*(str(tmp_path) if name == key else "embedded" for name in ("clip", "encoder")), "cpu")


def test_an_onnx_judge_is_refused_in_training_and_its_settings_are_checked():
    with pytest.raises(FairDiffError, match="^judge.type: found onnx, which has no gradient, allowed in training: net, hf"):
        composed("judge=onnx")
    config = composed("judge@audit.judge=insightface", "audit.judge.path=genderage.onnx")
    crop = crop_of(config, config.audit.judge)
    assert (crop.crop_size, crop.expand) == (96, 1.5) and config.audit.judge.graph["scale"] == 255
    for override, says in (
        ("audit.judge.graph.scale=0", "judge.graph.scale: found 0, allowed: a number above 0"),
        ("audit.judge.graph.std=[1,1]", r"judge.graph.std: found \[1, 1\], allowed: three numbers above 0"),
        ("audit.judge.graph.channels=grey", "judge.graph.channels: found grey, allowed: rgb, bgr"),
        ("audit.judge.graph.outputs=x", "judge.graph.outputs: found x, allowed: logits, probabilities"),
    ):
        with pytest.raises(FairDiffError, match=f"^{says}"):
            composed("judge@audit.judge=onnx", override)
    with pytest.raises(FairDiffError, match="^judge.graph: only onnx judges have it"):
        composed("+audit.judge.graph.scale=2")
