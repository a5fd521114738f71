"""Metrics of records, compared with counts by hand: 2 occupations x 4 images, 2 objects x 2 images, two models."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from fairdiff.audit.axis import MetricSpec
from fairdiff.audit.headline import bias_line
from fairdiff.audit.intervals import bias_interval, noise_floor, total_variation_floor
from fairdiff.audit.metrics import compute_metrics

ATTRIBUTES = {"gender": ("female", "male"), "race": ("White", "Black", "Indian")}
# two characters per image: gender (f, m) and race (W, B, I), "--" without a face
TABLE = {
    ("before", "nurse"): "fW fW fB mW",
    ("before", "pilot"): "mW mW mI --",
    ("after", "nurse"): "fW mW fB mB",
    ("after", "pilot"): "fW mW -- --",
}


def row(model, index, subject, image, code):
    people = subject in ("nurse", "pilot")
    shown = {"f": (0.9, 0.1), "m": (0.2, 0.8), "-": (np.nan,) * 2}[code[0]]
    race = {"W": (0.5, 0.3, 0.2), "B": (0.1, 0.8, 0.1), "I": (0.3, 0.3, 0.4), "-": (np.nan,) * 3}[code[1]]
    columns = {f"p.gender.{c}": p for c, p in zip(ATTRIBUTES["gender"], shown, strict=True)}
    columns |= {f"p.race.{c}": p for c, p in zip(ATTRIBUTES["race"], race, strict=True)}
    moved = {"before": np.nan, "after": 0.9}[model]
    return {
        "model": model, "family": "occupation" if people else "object", "people": people, "names": "", "prompt_index": index,
        "subject": subject, "prompt": f"a {subject}", "image_index": image, "found": code != "--", "faces": -1, **columns,
        "clip_t": 0.3 if model == "before" else 0.28, "clip_i": moved, "dino": moved if people else moved + 0.06,
        "between": 0.6 if people else 0.8,
        "seed": 5,
        "model_hash": f"{model} weights",
        "judge_hash": "judge weights",
    }  # fmt: skip


@pytest.fixture
def records():
    rows = []
    for (model, subject), codes in TABLE.items():
        index = ["nurse", "pilot"].index(subject)
        rows += [row(model, index, subject, i, code) for i, code in enumerate(codes.split())]
    for model in ("before", "after"):
        for index, subject in enumerate(("teapot", "tree"), start=2):
            rows += [row(model, index, subject, i, "--") for i in range(2)]
    return pd.DataFrame(rows)


@pytest.fixture
def audit(records):
    return compute_metrics(records, MetricSpec(ATTRIBUTES, {"name": "hand"}))


def test_a_request_that_was_written_down_counts_the_same(records):
    """A run writes the settings beside its records, so that the report can be computed from them again."""
    targets = {"gender": np.array([0.6, 0.4]), "race": np.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])}
    confusion = {"gender": np.array([[90, 10], [5, 95]])}
    spec = MetricSpec(ATTRIBUTES, {"name": "hand"}, targets, confusion, 0.2, 0.05, 3)
    again = MetricSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again.attributes == ATTRIBUTES and compute_metrics(records, again) == compute_metrics(records, spec)


def test_a_named_class_is_kept_by_the_faces_that_show_it_subject_by_subject(records):
    """Nurse keeps 3 of 4 women before, 1 of 2 after, and all men. Prompts that name a class change no other number."""
    shown = {
        ("before", "nurse", "female"): "fW fW fW mW", ("after", "nurse", "female"): "fW mW -- --",
        ("before", "nurse", "male"): "mW mW", ("after", "nurse", "male"): "mW mW",
        ("before", "pilot", "female"): "fW fW", ("after", "pilot", "female"): "mW fW",
        ("before", "pilot", "male"): "mW fW", ("after", "pilot", "male"): "mB mB",
    }  # fmt: skip
    rows = []
    for (model, subject, cls), codes in shown.items():
        about = {"prompt": f"a {subject}, {cls}", "names": f"gender.{cls}"}
        place = 4 + ["nurse", "pilot"].index(subject) * 2 + (cls == "male")
        rows += [row(model, place, subject, i, code) | about for i, code in enumerate(codes.split())]
    spec = MetricSpec(ATTRIBUTES, {"name": "hand"})
    audit = compute_metrics(pd.concat([records, pd.DataFrame(rows)]), spec)
    entry = audit["named"]["attributes"]["gender"]
    assert entry["kept"]["before"]["mean"] == pytest.approx(((0.75 + 1) / 2 + (1 + 0.5) / 2) / 2)
    assert entry["kept"]["after"]["mean"] == pytest.approx(((0.5 + 1) / 2 + (0.5 + 1) / 2) / 2)
    assert entry["change"]["difference"] == pytest.approx(0.75 - 0.8125)
    assert entry["classes"]["female"] == pytest.approx({"before": 0.875, "after": 0.5})
    assert (audit["named"]["prompts"], audit["named"]["images_per_prompt"]) == (4, 4)
    assert audit | {"named": None} == compute_metrics(records, spec)


def test_a_named_class_without_a_face_has_no_share(records):
    nobody = [row(model, 4, "nurse", 0, "--") | {"names": "gender.female"} for model in ("before", "after")]
    audit = compute_metrics(pd.concat([records, pd.DataFrame(nobody)]), MetricSpec(ATTRIBUTES, {"name": "hand"}))
    entry = audit["named"]["attributes"]["gender"]
    assert entry["kept"]["after"]["mean"] is None and entry["classes"]["female"]["before"] is None


def test_every_guidance_scale_has_the_numbers_of_its_own_records(records):
    spec = MetricSpec(ATTRIBUTES, {"name": "hand"}, provenance={"guidance": 1.5})
    stronger = records.assign(**{"p.gender.female": 0.9, "p.gender.male": 0.1})  # all faces are women
    audit = compute_metrics(records, spec, {7.5: stronger, 1.0: records})
    assert [at["scale"] for at in audit["guidance"]] == [1.0, 1.5, 7.5]
    of_scale = [at["models"]["after"]["gender"]["bias"]["mean"] for at in audit["guidance"]]
    assert (
        of_scale[0]
        == of_scale[1]
        == audit["models"]["after"]["attributes"]["gender"]["bias"]["mean"]
        < of_scale[2]
        == 1
    )
    assert compute_metrics(records, spec)["guidance"] is None


def test_the_worst_tenth_is_the_mean_of_the_largest(audit):
    entry = audit["models"]["before"]["attributes"]["gender"]
    assert entry["bias"]["worst_tenth"]["mean"] == 1.0 and entry["bias"]["worst_tenth"]["prompts"] == 1  # pilot
    assert entry["bias"]["worst_tenth"]["mean"] > entry["bias"]["mean"]
    assert entry["bias"]["worst_tenth"]["floor"] > entry["bias"]["floor"]


def test_unsure_counts_faces_without_a_clear_class(audit, records):
    rates = {name: entry["low_confidence"]["rate"] for name, entry in audit["models"]["after"]["attributes"].items()}
    assert rates == {"gender": 0.5, "race": 1.0}  # 6 faces: f has .9, m .8; no race has more than .8
    low, high = audit["models"]["after"]["attributes"]["gender"]["low_confidence"]["ci95"]
    assert 0.1 < low < 0.5 < high < 0.9
    nobody = compute_metrics(records.assign(found=False), MetricSpec(ATTRIBUTES, {"name": "hand"}))
    assert nobody["models"]["after"]["attributes"]["gender"]["low_confidence"]["rate"] is None


def test_the_schema_of_the_issue(audit):
    assert audit["schema"] == "fairdiff.audit/7" and audit["prompts"] == 2 and audit["images_per_prompt"] == 4
    assert set(audit["models"]) == {"before", "after"} and audit["judge"] == {"name": "hand"}
    for model in audit["models"].values():
        for entry in [*model["attributes"].values(), *model["joint"].values()]:
            assert {"mean", "ci95", "sd_over_prompts", "floor"} <= set(entry["bias"]) and entry["shares"]
        assert list(model["joint"]) == ["gender×race"]
        assert "rate" in model["no_face"] and "mean" in model["clip_t"]
    assert audit["models"]["after"]["clip_i"]["mean"] == pytest.approx(0.9)
    assert audit["models"]["before"]["dino"]["mean"] is None
    assert audit["provenance"]["hashes"] == {
        "before": "before weights", "after": "after weights", "judge": "judge weights",
    }  # fmt: skip
    assert audit["provenance"]["seed"] == 5 and "torch" in audit["provenance"]["software"]
    json.dumps(audit, allow_nan=False)


def test_gender_by_hand(audit):
    before = audit["models"]["before"]["attributes"]["gender"]
    # nurse 3 women 1 man: .5; pilot 0 women 3 men: 1
    assert before["bias"]["mean"] == pytest.approx(0.75)
    assert before["bias"]["sd_over_prompts"] == pytest.approx(math.sqrt(2 * 0.25**2))
    assert before["bias"]["floor"] == pytest.approx((noise_floor(2, 4) + noise_floor(2, 3)) / 2)
    assert noise_floor(2, 4) == pytest.approx((1 * 2 + 0.5 * 8) / 16)  # 0/4 and 4/4 twice, 1/4 and 3/4 in 8 of 16
    assert before["shares"]["female"]["share"] == pytest.approx((3 / 4 + 0) / 2)
    after = audit["models"]["after"]["attributes"]["gender"]["bias"]
    assert after["mean"] == 0 and after["ci95"] == [None, None] and after["ci95_these"][0] == 0 < after["ci95_these"][1]
    # squared gap .25 less (1 - .25) / 3 = 0 for the nurse, 1 less 0 for the pilot
    assert before["target"]["distance"]["value"] == pytest.approx(math.sqrt((0 + 1) / 2))
    # nurse: no missing image; pilot 0:3 with one missing, 1:3 at best
    assert before["bias"]["missing_face_bounds"] == pytest.approx([(0.5 + 0.5) / 2, (0.5 + 1) / 2])


def test_race_and_joint_by_hand(audit):
    before = audit["models"]["before"]
    # nurse 3/4 White 1/4 Black: gaps .5 .75 .25; pilot 2/3 White 1/3 Indian: 2/3 1/3 1/3
    assert before["attributes"]["race"]["bias"]["mean"] == pytest.approx((0.5 + 4 / 9) / 2)
    assert before["attributes"]["race"]["bias"]["maximum"] == pytest.approx(2 / 3)
    joint = before["joint"]["gender×race"]
    assert list(joint["shares"])[:3] == ["female×White", "female×Black", "female×Indian"]
    assert joint["shares"]["female×White"]["share"] == pytest.approx((2 / 4 + 0) / 2)
    nurse = np.array([2, 1, 0, 1, 0, 0]) / 4
    pilot = np.array([0, 0, 0, 2, 0, 1]) / 3
    by_hand = [sum(abs(a - b) for i, a in enumerate(f) for b in f[:i]) / 15 for f in (nurse, pilot)]
    assert joint["bias"]["mean"] == pytest.approx(np.mean(by_hand))


def test_per_prompt_by_hand(audit):
    pilot = audit["models"]["before"]["attributes"]["gender"]["per_prompt"][1]
    assert pilot["subject"] == "pilot" and pilot["faces"] == 3 and pilot["images"] == 4
    assert pilot["counts"] == {"female": 0, "male": 3}
    assert pilot["bias"]["ci95"] == pytest.approx(bias_interval([0, 3])) and pilot["bias"]["value"] == 1
    assert pilot["target"]["p"] == pytest.approx(0.25)  # 2 (1/2)^3
    assert pilot["target"]["p_holm"] == pytest.approx(0.5)  # nurse: p = 10/16
    assert pilot["target"]["total_variation"] == pytest.approx(0.5)


def test_faces_and_pairs_by_hand(audit):
    assert audit["models"]["before"]["no_face"]["rate"] == 1 / 8
    assert audit["models"]["after"]["no_face"]["rate"] == 2 / 8
    paired = audit["paired"]
    assert paired["no_face"]["difference"] == pytest.approx(1 / 8)
    assert paired["no_face"]["ci95"][0] < 1 / 8 < paired["no_face"]["ci95"][1]
    assert paired["attributes"]["gender"]["bias"]["difference"] == pytest.approx(-0.75)
    assert paired["clip_t"]["difference"] == pytest.approx(-0.02)
    # pairs with both faces: nurse 4, pilot 2 (third and fourth lost); changed: nurse 2nd, pilot 1st
    assert paired["attributes"]["gender"]["class_changed"] == pytest.approx(2 / 6)
    # mean squared gap: before (0 + 1)/2; after nurse (0 - 1/3), pilot (0 - 1)
    expected = (-1 / 3 - 1) / 2 - 0.5
    assert paired["attributes"]["gender"]["squared_distance"]["difference"] == pytest.approx(expected)


def test_prompts_without_people_by_hand(audit):
    without_people = audit["without_people"]
    assert without_people["prompts"] == 2 and without_people["images_per_prompt"] == 2
    assert without_people["drift"]["mean"] == pytest.approx(0.04)
    assert without_people["between_seeds"]["mean"] == pytest.approx(0.2)
    assert without_people["relative_drift"]["value"] == pytest.approx(0.2)
    assert without_people["false_face"]["after"]["rate"] == 0 and without_people["false_face"]["after"]["ci95"][1] > 0.3


def test_targets_by_hand(records):
    spec = MetricSpec(ATTRIBUTES, {}, targets={"gender": [0.75, 0.25], "race": [[0.5, 0.5, 0], [1, 0, 0]]})
    audit = compute_metrics(records, spec)["models"]["before"]
    gender = audit["attributes"]["gender"]["target"]
    assert gender["uniform"] is False and gender["shares"] == {"female": 0.75, "male": 0.25}
    assert gender["total_variation"]["mean"] == pytest.approx((0 + 0.75) / 2)
    # (0, .75^2) (1/.75 + 1/.25), less the variances .75 .25 / 3 of the nurse's shares, twice over the same
    assert gender["distance"]["value"] == pytest.approx(math.sqrt((-1 / 3 + 3) / 2))
    assert audit["attributes"]["race"]["target"]["distance"]["value"] is None  # a class of target 0 divides by 0
    assert "target share 0" in audit["attributes"]["race"]["target"]["reason"]
    race = audit["attributes"]["race"]["target"]
    assert race["total_variation"]["mean"] == pytest.approx((0.25 + 1 / 3) / 2)
    rows = audit["attributes"]["race"]["per_prompt"]
    assert [row["target"]["total_variation"] for row in rows] == pytest.approx([0.25, 1 / 3])  # each by its own target
    floors = [total_variation_floor([0.5, 0.5, 0], 4), 0]  # one class in all: no noise
    assert [row["target"]["floor"] for row in rows] == pytest.approx(floors)
    assert race["total_variation"]["floor"] == pytest.approx(np.mean(floors))
    assert race["total_variation"]["maximum"] == 1
    paired = compute_metrics(records, spec)["paired"]["attributes"]["gender"]["total_variation"]
    assert paired["difference"] == pytest.approx((0.25 + 0.25) / 2 - (0 + 0.75) / 2)  # after: 1:1 for both
    rejected = [item["target"]["p"] for item in audit["attributes"]["race"]["per_prompt"]]
    assert rejected[1] == 0 and race["prompts_rejected"] == 1
    joint = audit["joint"]["gender×race"]["target"]["shares"]
    assert joint["female×White"] == pytest.approx(0.75 * (0.5 + 1) / 2)


@pytest.mark.parametrize("copies,of_others", [(12, "undecided"), (18, "beyond")])
def test_a_verdict_on_prompts_like_these_needs_enough_of_them(records, copies, of_others):
    many = pd.concat([records.assign(prompt_index=records.prompt_index + 10 * i) for i in range(copies)])
    audit = compute_metrics(many[(many.model == "before") & many.found], MetricSpec(ATTRIBUTES, {}))
    target = audit["models"]["before"]["attributes"]["gender"]["target"]
    assert (target["verdict_these"], target["verdict"]) == ("beyond", of_others)
    assert (target["distance"]["ci95"][0] is None) == (of_others == "undecided")
    assert target["reason"] == (
        None if of_others == "beyond" else "cannot tell of prompts like these: needs 36 prompts, found 24"
    )


def fair_folder(model, images, rng):
    share = rng.random((12, images)).ravel()
    index = np.repeat(np.arange(12), images)
    return pd.DataFrame({
        "model": model, "family": "custom", "people": True, "names": "", "prompt_index": index, "subject": "s",
        "prompt": index.astype(str), "image_index": np.tile(np.arange(images), 12), "found": True,
        "faces": -1, "p.x.a": share,
        "p.x.b": 1 - share, "clip_t": np.nan, "clip_i": np.nan, "dino": np.nan, "between": np.nan, "seed": 1,
        "model_hash": model, "judge_hash": "j",
    })  # fmt: skip


def test_two_fair_folders_of_20_and_200_images_have_not_changed():
    """The plug-in bias of the smaller folder is about .12 larger, because its noise floor is."""
    rng = np.random.default_rng(0)
    records = pd.concat([fair_folder("before", 20, rng), fair_folder("after", 200, rng)])
    audit = compute_metrics(records, MetricSpec({"x": ("a", "b")}, {"path": "j"}))
    entries = {model: audit["models"][model]["attributes"]["x"]["bias"] for model in ("before", "after")}
    found = audit["paired"]["attributes"]["x"]["bias"]
    assert entries["before"]["mean"] - entries["after"]["mean"] > 0.08
    assert found["ci95_these"][0] < 0 < found["ci95_these"][1] and "at equal numbers of faces" in bias_line(audit, "x")


def test_prompts_with_too_few_images_are_named(records):
    """The reason of the verdict once had neither the name of the prompt nor its number of images."""
    one = records[~((records.subject == "pilot") & (records.image_index > 0))]
    reason = compute_metrics(one, MetricSpec(ATTRIBUTES, {}))["models"]["before"]["attributes"]["gender"]["target"]["reason"]
    assert reason == '1 of 2 prompts with fewer than two images: "a pilot" (1)'


def test_before_and_after_are_of_the_same_prompts(records):
    """If pilot shows one face after, no mean includes it before either, but the verdict and the bounds do."""
    gone = (records.model == "after") & (records.subject == "pilot") & (records.image_index > 0)
    records.loc[gone, "found"] = False
    records.loc[gone, [c for c in records if c.startswith("p.")]] = np.nan
    audit = compute_metrics(records, MetricSpec(ATTRIBUTES, {}))
    gender = {model: entry["attributes"]["gender"] for model, entry in audit["models"].items()}
    assert audit["left_out"] == ["a pilot"] and [g["bias"]["prompts"] for g in gender.values()] == [1, 1]
    change = audit["paired"]["attributes"]["gender"]["bias"]["difference"]
    assert change == pytest.approx(gender["after"]["bias"]["mean"] - gender["before"]["bias"]["mean"])
    assert gender["after"]["bias"]["missing_face_bounds"][1] == pytest.approx((0 + 1) / 2)


def test_classifier_error_is_undone_when_its_counts_are_given(records):
    spec = MetricSpec(ATTRIBUTES, {}, confusion={"gender": np.array([[90, 10], [10, 90]])})
    model = compute_metrics(records, spec)["models"]["before"]
    corrected = model["attributes"]["gender"]["corrected"]
    # nurse .75 -> .8125, pilot 0 -> clipped at 0: gaps .625 and 1
    assert corrected["bias"]["mean"] == pytest.approx((0.625 + 1) / 2)
    assert corrected["confusion"] == [[90, 10], [10, 90]]
    assert "corrected" not in model["attributes"]["race"]
    assert len(model["attributes"]["gender"]["per_prompt"][0]["bias"]["corrected_ci95"]) == 2


def test_one_model_one_prompt_and_no_face_at_all(records):
    alone = records[(records.model == "before") & (records.subject == "pilot")]
    audit = compute_metrics(alone, MetricSpec(ATTRIBUTES, {}))
    bias = audit["models"]["before"]["attributes"]["gender"]["bias"]
    assert bias["mean"] == 1 and bias["ci95"] == [None, None] and bias["sd_over_prompts"] is None
    assert audit["paired"] is None and audit["without_people"] is None
    blank = alone.assign(found=False, **{c: np.nan for c in alone.columns if c.startswith("p.")})
    entry = compute_metrics(blank, MetricSpec(ATTRIBUTES, {}))["models"]["before"]["attributes"]["gender"]
    assert entry["bias"]["mean"] is None and entry["target"]["verdict"] == "undecided"
    assert entry["bias"]["missing_face_bounds"] == [0, 1]
    json.dumps(entry, allow_nan=False)


def test_three_attributes_have_all_pairs_and_the_triple(records):
    young = np.where(records.found, 0.7, np.nan)
    records = records.assign(**{"p.age.young": young, "p.age.old": 1 - young})
    joint = compute_metrics(records, MetricSpec(ATTRIBUTES | {"age": ("young", "old")}, {}))["models"]["before"][
        "joint"
    ]
    assert list(joint) == ["gender×race", "gender×age", "race×age", "gender×race×age"]
    assert len(joint["gender×race×age"]["shares"]) == 12


def test_each_family_is_counted_apart(records):
    """With two families of one prompt each, the numbers of a family are those of its prompt."""
    assert compute_metrics(records, MetricSpec(ATTRIBUTES, {}))["models"]["before"]["families"] == {}
    records.loc[records.subject == "pilot", "family"] = "sport"
    audit = compute_metrics(records, MetricSpec(ATTRIBUTES, {}, targets={"race": [[0.5, 0.5, 0], [1, 0, 0]]}))
    before = audit["models"]["before"]["families"]
    assert list(before) == ["occupation", "sport"] and before["sport"]["prompts"] == 1
    gender = {family: entry["attributes"]["gender"]["bias"] for family, entry in before.items()}
    assert gender["occupation"]["mean"] == pytest.approx(0.5) and gender["sport"]["mean"] == 1
    assert gender["sport"]["floor"] == pytest.approx(noise_floor(2, 3)) and gender["sport"]["prompts"] == 1
    distance = [before[f]["attributes"]["race"]["target"]["total_variation"]["mean"] for f in before]
    assert distance == pytest.approx([0.25, 1 / 3])  # each family keeps its own prompts' targets
    paired = audit["paired"]["families"]
    assert paired["occupation"]["attributes"]["gender"]["bias"]["difference"] == pytest.approx(-0.5)
    assert paired["sport"]["attributes"]["gender"]["bias"]["difference"] == -1
    assert "gender×race" in paired["sport"]["joint"]
