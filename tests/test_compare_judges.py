"""The two judges are compared before training: swapped labels give a one-line error, and training is not changed."""

import shutil

import pytest
import torch
from test_bad_input import assert_nothing_half_written, call
from tiny import NoFaces, composed, make_trainee
from tiny_judges import change_tensor

from classifiers.attributes import load_attribute_net
from fairdiff import builder
from fairdiff.builder.audit import build_audit
from fairdiff.errors import FairDiffError
from fairdiff.plan import make_plan
from fairdiff.portraits import weights
from fairdiff.prompts import Prompt
from fairdiff.training.judges import compare_judges


def renamed(folder, order) -> str:
    """Write the embedded training judge with its outputs (female, male, then four races) in another order."""
    shutil.copytree(weights("judge"), folder)
    rows = [*order, *range(len(order), 8)]
    for key in ("trunk.fc.weight", "trunk.fc.bias"):
        change_tensor(folder / "model.safetensors", key, lambda tensor: tensor[rows])
    return str(folder)


def judges(*overrides):
    """Return the trainee, the audit judge and the prompts of a command."""
    config = composed("cache=null", *overrides)
    plan, model = make_plan(config), builder.build_model(config)
    perception = builder.build_perception(config, plan)
    audit = build_audit(config, plan, model, None, perception.classifier)
    return builder.build_trainee(config, plan, model, perception), audit.measurer.judge, plan.train


@pytest.mark.slow
def test_two_swapped_labels_end_before_training_as_one_line(tmp_path, monkeypatch, capsys):
    overrides = [f"judge.path={renamed(tmp_path / 'judge', [1, 0])}", "sampler.train_steps=[2,2]"]
    line = call(overrides, tmp_path / "run", monkeypatch, capsys)
    assert line.startswith("error: judge, audit.judge: they agree on ") and "% with female as male, male as female" in line
    assert int(line.split("agree on ")[1].split(" %")[0]) < 20
    assert_nothing_half_written(tmp_path / "run")


@pytest.mark.slow
def test_an_attribute_is_named_whose_classes_are_swapped_among_others(tmp_path):
    swapped = renamed(tmp_path / "judge", [0, 1, 3, 2, 4, 5])
    with pytest.raises(FairDiffError, match=r"\(race\), and on .* with White as Black, Black as White; allowed") as error:
        compare_judges(*judges("attribute=[gender,race]", f"judge.path={swapped}"), 4)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_judges_that_agree_are_one_line_and_leave_no_trace():
    trainee, audit_judge, prompts = judges()
    state, before = torch.get_rng_state(), [p.detach().clone() for p in trainee.adapter.parameters()]
    (line,) = compare_judges(trainee, audit_judge, prompts, 2)
    assert line.startswith("judges: training judge and audit judge agree on ") and " faces of reference images" in line
    assert int(line.split(" agree on ")[1].split(" %")[0]) > 80
    assert torch.equal(state, torch.get_rng_state()) and trainee.originals.rows == {} and not trainee.originals.sampled
    assert all(torch.equal(p, q) for p, q in zip(before, trainee.adapter.parameters(), strict=True))


def test_one_and_the_same_judge_is_not_compared(tiny_model):
    trainee = make_trainee(tiny_model)
    trainee.perception.classifier = load_attribute_net(weights("judge"))
    assert compare_judges(trainee, load_attribute_net(weights("judge")), [], 4) == []


def test_a_detector_that_finds_nobody_says_so(tiny_model):
    trainee = make_trainee(tiny_model, detector=NoFaces())
    trainee.perception.classifier = load_attribute_net(weights("judge"))
    prompts = [Prompt(f"a {subject}", "occupation", subject) for subject in ("nurse", "chef")]
    (line,) = compare_judges(trainee, load_attribute_net(weights("audit_judge")), prompts, 2)
    assert "the first reference images show no face" in line


def test_each_judge_sees_crops_of_its_own_and_says_so(tmp_path):
    """Each judge may have its own crop, by default the detector's. The audit's crop does not change the training key."""

    model = builder.build_model(composed())  # which no setting of judges changes

    def built(*overrides):
        config = composed("cache=null", *overrides)
        plan = make_plan(config)
        perception = builder.build_perception(config, plan)
        training = builder.training_fingerprint(config, plan, model, perception)
        audit = build_audit(config, plan, model, training, perception.classifier)
        crops = ((perception.crop_size, perception.expand), (audit.measurer.crop_size, audit.measurer.expand))
        return crops, training, audit.plan.hashes["judge"], audit.spec.provenance["crop"]

    usual = built()
    assert usual[0] == ((64, 1.6), (64, 1.6)) and usual[3] == "64 pixels, 1.6 times the face"
    same = built("judge.crop_size=64", "audit.judge.expand=1.6")
    assert same[0] == usual[0] and same[2] == usual[2]
    with pytest.raises(FairDiffError, match="was measured with detector.crop_size=64, found 48"):
        built("audit.judge.crop_size=48")
    shutil.copytree(weights("audit_judge"), tmp_path / "uncounted", ignore=shutil.ignore_patterns("calibration.json"))
    own = (f"audit.judge.path={tmp_path / 'uncounted'}", "audit.judge.crop_size=48", "audit.judge.expand=2")
    crops, training, judged, said = built(*own)
    assert crops == ((64, 1.6), (48, 2)) and training == usual[1] and judged != usual[2]
    assert said == "48 pixels, 2 times the face"
    crops, training, judged, _ = built("judge.expand=2")
    assert crops == ((64, 2), (64, 1.6)) and training != usual[1] and judged == usual[2]
