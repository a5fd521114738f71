"""Classification errors: their effect on shares in closed form, and the commands of both studies of label errors."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import whole_audit

from fairdiff.audit.axis import MetricSpec, axes_of
from fairdiff.audit.distance import squared_distance
from fairdiff.studies.reading_errors import audited, counts_of, error_rates, kinds, misread, nearer, transition

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import label_errors  # noqa: E402
import label_influence  # noqa: E402
import reading_errors  # noqa: E402

CLASSES = ("female", "male")
SPEC = MetricSpec({"gender": CLASSES}, {"path": "x"}, {"gender": np.array([0.5, 0.5])}, provenance={})


def suite(prompts: int, images: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return prompt and label of faces, a share of which is of the second class."""
    rng = np.random.default_rng(seed)
    return np.repeat(np.arange(prompts), images), (rng.random(prompts * images) < share).astype(int)


def distance_of(prompt_N, label_N, prompts: int, spec: MetricSpec = SPEC) -> float:
    counts = counts_of(prompt_N, label_N, prompts, 2)
    return audited(counts, np.bincount(prompt_N), axes_of(spec, prompts)[0], spec)["distance"]


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_uniform_misreading_shrinks_d_by_twice_its_rate_and_counting_it_brings_d_back(rate):
    prompt_N, label_N = suite(40, 400, 0.8, 0)
    chance_N = error_rates("uniform", label_N, np.zeros(len(label_N), bool), rate, CLASSES)
    read_N = misread(label_N, chance_N, 2, np.random.default_rng(1))
    was, now = (distance_of(prompt_N, some, 40) for some in (label_N, read_N))
    assert now / was == pytest.approx(1 - 2 * rate, abs=0.02)
    counted = replace(SPEC, confusion={"gender": np.eye(2) * 50_000 @ transition(label_N, chance_N, 2)})
    assert distance_of(prompt_N, read_N, 40, counted) == pytest.approx(was, abs=0.02)


def test_errors_in_one_class_move_d_either_way():
    prompt_N, label_N = suite(40, 400, 0.6, 0)  # D = .2
    found = {}
    for kind in ("only male", "only female"):
        chance_N = error_rates(kind, label_N, np.zeros(len(label_N), bool), 0.05, CLASSES)
        assert chance_N.mean() == pytest.approx(0.05) and not chance_N[label_N != CLASSES.index(kind.split()[1])].any()
        found[kind] = distance_of(prompt_N, misread(label_N, chance_N, 2, np.random.default_rng(1)), 40)
    assert found["only male"] == pytest.approx(0.1, abs=0.02) and found["only female"] == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("K", [2, 4])
def test_chances_are_the_rate_on_average_and_no_face_is_never_misread(K):
    rng, classes = np.random.default_rng(K), tuple("abcd"[:K])
    label_N, group_N = rng.integers(-1, K, 40_000), rng.random(40_000) < 0.2
    group_N &= label_N >= 0
    for kind in kinds(classes):
        chance_N = error_rates(kind, label_N, group_N, 0.1, classes)
        read_N = misread(label_N, chance_N, K, np.random.default_rng(0))
        assert chance_N[label_N >= 0].mean() == pytest.approx(0.1) and (read_N[label_N < 0] == -1).all()
        assert (read_N != label_N)[label_N >= 0].mean() == pytest.approx(0.1, abs=0.01)
        E_KK = transition(label_N, chance_N, K)
        seen = np.array([[(read_N[label_N == j] == k).mean() for k in range(K)] for j in range(K)])
        assert E_KK.sum(1) == pytest.approx(np.ones(K)) and seen == pytest.approx(E_KK, abs=0.03)
    by_group = error_rates("by group", label_N, group_N, 0.1, classes)
    assert by_group[group_N].mean() == pytest.approx(0.15)
    assert (misread(label_N, np.zeros(40_000), K, rng) == label_N).all()


def test_a_nearer_generator_has_the_distance_it_is_given_and_the_same_prompts_off():
    rng = np.random.default_rng(0)
    counts_PK, target_PK = rng.multinomial(100, [0.7, 0.2, 0.1], 20), np.full((20, 3), 1 / 3)
    for distance in (0.0, 0.1, 0.3):
        shares_PK = nearer(counts_PK, target_PK, distance)
        assert shares_PK.sum(1) == pytest.approx(np.ones(20)) and shares_PK.min() >= 0
        assert np.sqrt(squared_distance(shares_PK, target_PK).mean()) == pytest.approx(distance)


@pytest.fixture
def audit(tmp_path) -> Path:
    """The folder of an audit of 6 prompts, two attributes, as `audit.json`, its records and its request."""
    made, rng, rows = whole_audit(), np.random.default_rng(0), []
    for model, prompt, image in np.ndindex(2, 6, 20):
        p, q = rng.random() * 0.7, rng.random()
        rows.append({
            "model": ("before", "after")[model], "family": "x", "people": True, "names": "", "prompt_index": prompt,
            "subject": f"s{prompt}", "prompt": f"a {prompt}", "image_index": image, "seed": 1, "found": image > 0,
            "faces": -1,
            "p.gender.female": p, "p.gender.male": 1 - p, "p.race.White": q, "p.race.Black": 1 - q, "clip_t": 0.3,
            "clip_i": 0.9, "dino": 0.9, "between": 0.5, "model_hash": "m", "judge_hash": "j",
        })  # fmt: skip
    spec = MetricSpec(
        {"gender": CLASSES, "race": ("White", "Black")}, {"path": "x"}, {"gender": np.array([0.5, 0.5])}, provenance={}
    )
    pd.DataFrame(rows).to_parquet(tmp_path / "records.parquet")
    (tmp_path / "request.json").write_text(json.dumps({"spec": spec.to_json(), "lines": {}}), "utf-8")
    (tmp_path / "audit.json").write_text(json.dumps(made), "utf-8")
    return tmp_path


def test_the_command_goes_on_where_it_was_and_begins_anew_for_another_audit(audit, tmp_path, monkeypatch, capsys):
    for name, value in {"RATES": (0.1,), "SEEDS": (0, 1), "DISTANCES": (0.1,), "VERDICT_SEEDS": (0,)}.items():
        monkeypatch.setattr(reading_errors, name, value)
        monkeypatch.setattr(f"harness.reading_errors_page.{name}", value)
    places = ["--docs", str(tmp_path / "docs"), "--folder", str(tmp_path / "out")]
    kept_in = tmp_path / "docs" / "measurements" / "studies" / "reading_errors.json"
    page = tmp_path / "docs" / "studies" / "reading_errors.md"
    reading_errors.main([str(audit), *places])
    whole, text = kept_in.read_text("utf-8"), page.read_text("utf-8")
    for line in ("| as read |", "| 10 % uniform |", "## What this does not show"):
        assert line.replace("10 % uniform", "10\u00a0%, uniform") in text
    assert "only female" in text and "by group" in text and (tmp_path / "out" / "reading_errors.html").exists()
    part = json.loads(whole)
    first = next(iter(part["numbers"]))
    del part["numbers"][first], part["verdicts"]
    kept_in.write_text(json.dumps(part | {"verdicts": {}}), "utf-8")
    reading_errors.main([str(audit), *places])
    again = json.loads(kept_in.read_text("utf-8"))
    assert again == json.loads(whole) and page.read_text("utf-8") == text
    reading_errors.main([str(audit), *places, "--attribute", "race"])
    assert json.loads(kept_in.read_text("utf-8"))["about"]["attribute"] == "race"
    reading_errors.main(["--render", *places])
    capsys.readouterr()
    for options, said in (
        ([], "AUDIT: found none, allowed: the folder of a finished audit, or --render"),
        ([str(audit), "--attribute", "age"], "--attribute: found age, allowed: gender, race"),
    ):
        with pytest.raises(SystemExit) as end:
            reading_errors.main([*options, *places])
        assert end.value.code == 2 and said in capsys.readouterr().err


@pytest.fixture
def renders(tmp_path) -> Path:
    """A shard of 90 pictures: people whose gender is the brightness of one side, and one without people."""
    rng = np.random.default_rng(0)
    gender, race = rng.integers(0, 2, 90), np.where(rng.random(90) < 0.3, 1, 0)
    image = rng.integers(0, 80, (90, 32, 32, 3))
    image[:, :, 16:] += (gender * 60)[:, None, None, None]
    gender[-1] = -1
    np.savez(tmp_path / "shard_00000.npz", image=image.astype(np.uint8), gender=gender, race=race)
    return tmp_path


def test_the_influence_command_goes_on_and_relabels_what_is_wrong(renders, tmp_path, monkeypatch, capsys):
    sizes = {"TRAIN": 40, "VALIDATION": 25, "TEST": 24, "SMALL": 12, "ROUND": 0.1}
    both = {"RATES": (0.3,), "SEEDS": (0, 1), "SHARES": (0.0, 0.1, 0.2)}
    for name, value in (sizes | both).items():
        monkeypatch.setattr(label_influence, name, value)
    monkeypatch.setattr("label_errors.HIDDEN", 8)
    monkeypatch.setattr("label_errors.STEPS", 60)
    for name, value in both.items():
        monkeypatch.setattr(f"harness.label_influence_page.{name}", value)
    options = ["--renders", str(renders), "--docs", str(tmp_path / "docs"), "--folder", str(tmp_path / "out")]
    kept_in = tmp_path / "docs" / "measurements" / "studies" / "label_influence.json"
    label_influence.main(options)
    whole = json.loads(kept_in.read_text("utf-8"))
    text = (tmp_path / "docs" / "studies" / "label_influence.md").read_text("utf-8")
    for way in label_influence.WAYS:
        assert f"| {way} |" in text
    for cell in whole["cells"].values():
        loss, chance = cell["loss"], cell["random"]
        assert len(loss["path"]) == 3 and loss["path"][1]["relabelled"] == pytest.approx(0.1)
        assert loss["area"] > 0.5 and set(chance["stopped"]) >= {"accuracy", "error gap", "calibration gap"}
        assert cell["loss"]["path"][0] == chance["path"][0]  # nothing is changed yet
    part = json.loads(json.dumps(whole))
    del part["cells"][first := next(iter(part["cells"]))], part["check"]["0"]
    kept_in.write_text(json.dumps(part), "utf-8")
    label_influence.main(options)
    assert json.loads(kept_in.read_text("utf-8")) == whole and first in whole["cells"]
    (renders / "shard_00000.npz").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        label_influence.main(options)
    assert "--renders: found no shards in" in (line := capsys.readouterr().err) and line.count("\n") == 1
    label_influence.main([*options, "--render"])


def test_label_errors_goes_on_with_the_same_faces_only(renders, tmp_path, monkeypatch, capsys):
    for name, value in {"RATES": (0.3,), "SEEDS": (0,), "TRAIN": 40, "TEST": 40, "HIDDEN": 8, "STEPS": 20}.items():
        monkeypatch.setattr(label_errors, name, value)
    ask = ["--renders", str(renders), "--docs", str(tmp_path / "docs"), "--methods", "relaxed, adversarial"]
    label_errors.main(ask)
    kept = tmp_path / "docs" / "measurements" / "label_errors.json"
    first = json.loads(kept.read_text("utf-8"))
    assert set(first) == {"renders", *(f"relaxed, adversarial/{kind}/0.3/0" for kind in label_errors.KINDS)}
    label_errors.main([*ask, "cross-entropy"])
    assert json.loads(kept.read_text("utf-8")).items() > first.items()  # others join, what was there stays
    with np.load(renders / "shard_00000.npz") as shard:
        np.savez(renders / "shard_00001.npz", **shard)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        label_errors.main(ask)
    assert f"holds other faces than {kept} is of, allowed: the same, or no such file" in capsys.readouterr().err


@pytest.mark.parametrize("command,name", [(reading_errors, "reading_errors"), (label_influence, "label_influence")])
def test_committed_pages_are_what_render_writes(command, name, tmp_path):
    kept = ROOT / "docs" / "measurements" / "studies" / f"{name}.json"
    (folder := tmp_path / "docs" / "measurements" / "studies").mkdir(parents=True)
    (folder / kept.name).write_bytes(kept.read_bytes())
    command.main(["--render", "--docs", str(tmp_path / "docs"), "--folder", str(tmp_path / "out")])
    page = tmp_path / "docs" / "studies" / f"{name}.md"
    assert page.read_text("utf-8") == (ROOT / "docs" / "studies" / f"{name}.md").read_text("utf-8")
