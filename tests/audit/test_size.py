"""`plan=true` computes how large an audit must be: audits of that size have the power, and it loads no model."""

import json
import re
import shutil
import sys

import numpy as np
import pytest

from classifiers.calibration import CALIBRATION_FILE
from fairdiff.audit.axis import MetricSpec
from fairdiff.audit.judge import judge_of
from fairdiff.audit.planner import images_needed, reach
from fairdiff.audit.size import size_lines
from fairdiff.audit.verdict import decide
from fairdiff.jobs import audit_command
from fairdiff.library import train
from fairdiff.portraits import weights

UNIFORM = {K: np.full(K, 1 / K) for K in (2, 4, 8)}


def found_on_target(images: int, target, missing: float, repeats: int = 60) -> float:
    """Return how often audits of 12 prompts find a generator on target "within", if a share of the images shows no face."""
    rng, hits, targets = np.random.default_rng(0), 0, np.tile(target, (12, 1))
    for _ in range(repeats):
        none = rng.binomial(images, missing, 12)
        counts = np.stack([rng.multinomial(images - m, target) for m in none])
        hits += decide(counts, none, targets, 0.1, None, 0)["verdict_these"] == "within"
    return hits / repeats


WITH_MISSING = [(UNIFORM[2], 0.02), (UNIFORM[2], 0.05), (UNIFORM[8], 0.02), ([0.7, 0.3], 0.02)]


@pytest.mark.parametrize(("target", "missing"), WITH_MISSING)
def test_the_allowance_for_missing_faces_is_enough_and_without_it_audits_fail(target, missing):
    """The bound .7 is two standard errors of 60 audits below .8."""
    assert found_on_target(images_needed(12, target, 0.1, missing=missing), target, missing) >= 0.7
    assert found_on_target(images_needed(12, target, 0.1), target, missing) < 0.5


def test_the_allowance_holds_for_prompts_like_these_too():
    """From 36 prompts on, the verdict that is shown is the one for prompts like these."""
    rng, targets = np.random.default_rng(1), np.tile(UNIFORM[2], (36, 1))
    images = images_needed(36, UNIFORM[2], 0.1, missing=0.02)
    hits = 0
    for _ in range(40):
        none = rng.binomial(images, 0.02, 36)
        women = rng.binomial(images - none, 0.5)
        counts = np.stack([women, images - none - women], 1)
        hits += decide(counts, none, targets, 0.1, None, 0)["verdict"] == "within"
    assert hits / 40 >= 0.65


def test_beyond_the_reach_of_the_margin_no_number_is_enough():
    """If a tenth of the images shows no face, the worst case alone gives D = .1 for two classes."""
    assert reach(UNIFORM[2]) == 1 and reach(UNIFORM[8]) == pytest.approx(np.sqrt(7))
    assert images_needed(36, UNIFORM[2], 0.1, missing=0.1) is None
    assert images_needed(36, UNIFORM[2], 0.1, missing=0.09) is not None
    assert images_needed(36, UNIFORM[8], 0.1, missing=0.04) is None


def lines_of(targets, confusion=None, prompts=36, **spec) -> str:
    shapes = {name: np.shape(t)[-1] for name, t in targets.items()}
    attributes = {name: tuple(f"c{k}" for k in range(K)) for name, K in shapes.items() if "×" not in name}
    return "\n".join(size_lines(MetricSpec(attributes, {"path": "j"}, targets, confusion or {}, **spec), prompts))


def test_the_numbers_are_those_of_the_planner_for_this_target_margin_and_judge():
    counts = np.array([[900, 100], [50, 950]])
    said = lines_of({"x": np.array([0.7, 0.3])}, {"x": counts}, 17, delta=0.2)
    assert "x (target c0 0.7, c1 0.3): needed to show D below 0.2" in said and "92.5 % right on 2000 labelled faces" in said
    for prompts in (12, 17, 100):
        images = images_needed(prompts, [0.7, 0.3], 0.2, judge_of(counts))
        assert f"{prompts} prompts{'*' if prompts < 36 else ''}: {images} images of each, {prompts * images} in all" in said
    assert said.count("for these prompts only") == 1 and said.count("prompts*:") == 3  # 12, 17, 24
    assert all(len(line) <= 80 for line in said.splitlines() if "in all" in line)


def test_of_targets_of_their_own_the_rarest_class_counts():
    table = np.tile([0.5, 0.5], (36, 1))
    table[3] = [0.9, 0.1]
    said = lines_of({"x": table})
    assert "c0 0.9, c1 0.1, the one of 2 targets with the rarest class" in said
    assert f"36 prompts: {images_needed(36, [0.9, 0.1], 0.1)} images of each" in said


def test_combinations_are_planned_and_attributes_without_a_target_are_not():
    targets = {"x": UNIFORM[2], "y": UNIFORM[2]}
    assert [line.split(" (")[0] for line in lines_of(targets).splitlines() if line[0] not in " *"] == ["x", "y", "x×y"]
    spec = MetricSpec({"x": ("a", "b"), "y": ("c", "d")}, {"path": "j"}, {"x": UNIFORM[2]})
    assert [line.split(" (")[0] for line in size_lines(spec, 36) if line[0] not in " *"] == ["x"]


@pytest.mark.parametrize(
    ("targets", "counts", "says"),
    [
        ({"x": np.array([1.0, 0.0])}, None, "no number of images shows it: a class has the target share 0"),
        ({"x": UNIFORM[2]}, [[55, 45], [45, 55]], "no number of images shows it: this judge hardly tells"),
        ({"x": UNIFORM[2]}, None, "taken for one that never errs: its errors were not counted"),
        ({"x": UNIFORM[2]}, [[45, 5], [5, 45]], "36 prompts: no number of images is enough"),
    ],
)
def test_what_cannot_be_shown_is_said(targets, counts, says):
    assert says in lines_of(targets, None if counts is None else {"x": np.array(counts)})


def test_so_many_labelled_faces_would_do():
    """The stated number of labelled faces is enough, and half of it is not."""
    counts = np.array([[45, 5], [5, 45]])
    said = lines_of({"x": UNIFORM[2]}, {"x": counts})
    faces = int(said.split("on too few faces: ")[1].split(" ")[0])
    assert images_needed(36, UNIFORM[2], 0.1, judge_of(counts * (faces // 100))) is not None
    assert images_needed(36, UNIFORM[2], 0.1, judge_of(counts * (faces // 200))) is None


def planned(monkeypatch, capsys, folder, *overrides) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["audit.py", "plan=true", f"hydra.run.dir={folder}", *overrides])
    try:
        audit_command()
        code = 0
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_builds_neither_model_nor_judge_and_writes_nothing(tmp_path, monkeypatch, capsys):
    """Model and judge have no weights here; the judge's folder contains its calibration only."""
    judge, nowhere = tmp_path / "judge", ["model.path=no/such/model", "features.clip=no/such"]
    judge.mkdir()
    shutil.copy(weights("audit_judge") / CALIBRATION_FILE, judge)
    own = [f"audit.judge.path={judge}", "target.gender.female=.7", "target.gender.male=.3", "audit.equivalence=.2"]
    code, out, err = planned(monkeypatch, capsys, tmp_path / "run", *own, *nowhere, "audit.prompts=7")
    counts = json.loads((judge / CALIBRATION_FILE).read_text())["attributes"]["gender"]["counts"]
    images = images_needed(7, [0.7, 0.3], 0.2, judge_of(counts, 20231113))
    assert (code, err) == (0, "") and f"7 prompts*: {images} images of each" in out
    assert not list((tmp_path / "run").glob("*"))


def test_a_plan_with_bad_settings_is_one_line(tmp_path, monkeypatch, capsys):
    for overrides, says in (
        (["detector=whole"], "audit.judge.path: .* was measured with detector.type=mtcnn, found whole"),
        (["audit.calibration=no/such"], "audit.calibration: .*no/such"),
        (["images=no/such"], "images: .*no/such"),
        (["plan=maybe"], "plan: found maybe, allowed: true or false"),
    ):
        code, out, err = planned(monkeypatch, capsys, tmp_path / "run", *overrides)
        assert code == 2 and out == "" and err.count("\n") == 1, err
        assert re.search(says, err), err
    with pytest.raises(Exception, match="^plan: found true, allowed: false in training"):
        train(["plan=true", f"hydra.run.dir={tmp_path / 'train'}"])
