"""Comparisons of audits: they keep each audit's numbers, pair differences, average over seeds and say why they refuse."""

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from scipy.stats import t as student
from tiny_world import TinyGenerator

from fairdiff.audit.axis import MetricSpec
from fairdiff.audit.estimand import ends_of
from fairdiff.audit.generate import run_audit
from fairdiff.audit.metrics import compute_metrics
from fairdiff.compare.audits import find_audits
from fairdiff.compare.groups import Figure, grouped, mean_of
from fairdiff.compare.numbers import compared
from fairdiff.errors import FairDiffError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import compare  # noqa: E402


@pytest.fixture
def audited(plan, measurer, noise, tmp_path, tmp_path_factory, made={}):  # noqa: B006, one of each for all tests
    """Write runs/<name>/audits/some of a model and an adapter (None for none) with these offsets; return the audit."""

    def make(offset: float | None, seed: int, base: float) -> Path:
        hashes = {"before": f"b{base}", "after": f"a{base} {offset}", "judge": "j0"}
        folder = tmp_path_factory.mktemp("audit")
        tiny = {"before": TinyGenerator(base)} | ({} if offset is None else {"after": TinyGenerator(offset)})
        records = run_audit(replace(plan, seed=seed, hashes=hashes), tiny, measurer, noise, folder, lambda n: None)
        spec = MetricSpec(plan.attributes, {"path": "colours"}, {"gender": [0.5, 0.5]}, {"gender": [[90, 10], [10, 90]]})
        audit = json.loads(json.dumps(compute_metrics(records, spec), allow_nan=False))
        (folder / "audit.json").write_text(json.dumps(audit))
        return folder

    def audited(name: str, offset: float | None, seed: int = 7, base: float = 1.0, settings: dict | None = None) -> dict:
        if (offset, seed, base) not in made:
            made[offset, seed, base] = make(offset, seed, base)
        run = tmp_path / "runs" / name
        shutil.copytree(made[offset, seed, base], run / "audits" / "some", dirs_exist_ok=True)
        if settings is not None:
            (run / "config.yaml").write_text(yaml.safe_dump(settings))
        return json.loads((run / "audits" / "some" / "audit.json").read_text())

    return audited


def rows(found: dict, name: str) -> dict[str, dict]:
    """Return the rows of one number, by group."""
    (entry,) = (entry for entry in found["numbers"] if entry["name"] == name)
    return entry["rows"]


def said(arguments: list, capsys) -> str:
    """Return the only line of output of a comparison that ends with code 2."""
    with pytest.raises(SystemExit) as stop:
        compare.main([str(one) for one in arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_every_audit_keeps_its_own_numbers(audited, tmp_path):
    audits = {"fair": audited("fair", 0.1), "skewed": audited("skewed", 0.6)}
    found = compared(find_audits([tmp_path / "runs"]))
    for name, audit in audits.items():
        row = rows(found, "gender bias")[name]
        for model in ("before", "after"):
            bias = audit["models"][model]["attributes"]["gender"]["bias"]
            assert row[model]["value"] == pytest.approx(bias["mean"])
            assert row[model]["ci95"] == pytest.approx(ends_of(bias)[:2])
        assert row["change"]["value"] == pytest.approx(audit["paired"]["attributes"]["gender"]["bias"]["difference"])
    step = rows(found, "gender bias")["skewed"]["difference"]
    means = [audits[name]["models"]["after"]["attributes"]["gender"]["bias"]["mean"] for name in ("fair", "skewed")]
    assert step["value"] == pytest.approx(means[1] - means[0]) and step["value"] > 0
    assert rows(found, "gender bias")["fair"]["difference"] is None  # the reference
    json.dumps(found, allow_nan=False)


def test_every_number_has_an_interval_but_those_that_say_why_not(audited, tmp_path):
    audited("fair", 0.1)
    audited("skewed", 0.6)
    found = compared(find_audits([tmp_path / "runs"]))
    for entry in found["numbers"]:
        for row in entry["rows"].values():
            cells = [row[key] for key in ("before", "after", "change", "difference") if row[key] is not None]
            if not entry["name"].endswith((" worst", " off")):  # the page gives the reason for these
                assert all(cell["ci95"] for cell in cells), entry["name"]


def test_audits_with_a_target_for_a_combination_are_compared_too(audited, tmp_path):
    """The change of a combination's D^2 is that of the audit, and the difference of the same images is 0."""
    audited("one", 0.1)
    file = tmp_path / "runs" / "one" / "audits" / "some" / "audit.json"
    records = pd.read_parquet(file.with_name("records.parquet"))
    classes = {name: tuple(found) for name, found in json.loads(file.read_text())["attributes"].items()}
    joint = "×".join(classes)
    size = math.prod(map(len, classes.values()))
    audit = compute_metrics(records, MetricSpec(classes, {"path": "colours"}, {joint: [1 / size] * size}))
    file.write_text(json.dumps(audit, allow_nan=False))
    shutil.copytree(tmp_path / "runs" / "one", tmp_path / "runs" / "two")
    found = rows(compared(find_audits([tmp_path / "runs"])), f"{joint} D²")
    change = audit["paired"]["joint"][joint]["squared_distance"]
    assert found["one"]["change"]["value"] == pytest.approx(change["difference"]) != 0
    assert found["two"]["difference"]["value"] == 0


def test_the_same_pictures_differ_by_nothing(audited, tmp_path):
    audited("one", 0.1)
    shutil.copytree(tmp_path / "runs" / "one", tmp_path / "runs" / "two")
    found = compared(find_audits([tmp_path / "runs"]))
    assert found["groups"][1]["paired"] == [["the same pictures", ""]]
    steps = {entry["name"]: entry["rows"]["two"]["difference"] for entry in found["numbers"]}
    assert steps["gender bias"] and steps["gender D²"] and steps["no face"] and steps["CLIP-T"]
    for step in (step for step in steps.values() if step):
        assert step["value"] == 0 and step["ci95"] == [0, 0]


def test_common_noise_shrinks_the_interval_of_a_difference(audited, tmp_path):
    """The same audits are compared with their records, without them (so images cannot be paired), and with other noise."""
    audited("a", 0.6)
    audited("b", 0.8)
    step = {}
    step["noise"] = rows(compared(find_audits([tmp_path / "runs"])), "gender bias")["b"]["difference"]
    (tmp_path / "runs" / "b" / "audits" / "some" / "records.parquet").unlink()
    found = compared(find_audits([tmp_path / "runs"]))
    step["prompts"] = rows(found, "gender bias")["b"]["difference"]
    assert found["groups"][1]["paired"] == [["prompts", "an audit has no records.parquet beside audit.json"]]
    width = {name: one["ci95"][1] - one["ci95"][0] for name, one in step.items()}
    assert width["noise"] < 0.75 * width["prompts"]
    assert step["noise"]["value"] == step["prompts"]["value"]
    audited("b", 0.8, seed=8)
    assert compared(find_audits([tmp_path / "runs"]))["groups"][1]["paired"] == [["prompts", "other audit seeds (7 and 8)"]]


def test_a_mean_over_seeds_is_that_of_a_hand(audited):
    trained = [Figure(0, 7, 0.2, (0.1, 0.3), True), Figure(1, 7, 0.4, (0.2, 0.7), True)]
    more = student.ppf(0.975, 1) * 0.1  # t sd / sqrt(2), sd = .2 / sqrt(2)
    found = mean_of(trained)
    assert found["value"] == pytest.approx(0.3) and found["spread"] == pytest.approx(0.2 / math.sqrt(2))
    assert found["ci95"] == pytest.approx([0.3 - math.hypot(0.15, more), 0.3 + math.hypot(0.2, more)])
    assert mean_of(trained, (0.0, 1.0))["ci95"] == [0.0, 1.0]
    noises = [replace(one, seed=None, audit_seed=number) for number, one in enumerate(trained)]
    assert mean_of(noises)["ci95"] == pytest.approx([0.3 - math.hypot(0.05, 0.1), 0.3 + math.hypot(0.05, 0.15)])
    like = [replace(one, these=False) for one in noises]  # the prompts are common to both
    assert mean_of(like)["ci95"] == pytest.approx([0.15, 0.5])
    assert mean_of([replace(noises[0], ends=None), noises[1]])["ci95"] is None and mean_of([]) is None
    one = mean_of(trained[:1])
    assert (one["ci95"], one["spread"]) == (pytest.approx([0.1, 0.3]), None)


def test_seeds_of_trainings_and_of_audits_are_groups(audited, tmp_path):
    trained = [audited(f"fair/seed{seed}", 0.1 + seed / 10) for seed in (0, 1)]
    audited("skewed/audit.seed=7", 0.6)
    audited("skewed/audit.seed=8", 0.6, seed=8)
    found = compared(find_audits([tmp_path / "runs"]))
    seeds = {group["name"]: (group["training_seeds"], group["audit_seeds"]) for group in found["groups"]}
    assert [*seeds.values()] == [([0, 1], [7]), ([], [7, 8])]
    first, second = seeds
    values = [audit["models"]["after"]["attributes"]["gender"]["bias"] for audit in trained]
    row = rows(found, "gender bias")[first]
    ends = [ends_of(value)[:2] for value in values]
    wanted = mean_of([Figure(s, 7, v["mean"], e, True) for s, (v, e) in enumerate(zip(values, ends, strict=True))], (0, 1))
    assert row["after"] == wanted and len(row["audits"]) == 2
    assert row["before"]["spread"] is None  # both trainings began with the same pictures
    step = rows(found, "gender bias")[second]["difference"]
    means = [rows(found, "gender bias")[name]["after"]["value"] for name in (first, second)]
    assert step["ci95"] and abs(step["value"] - (means[1] - means[0])) < 0.2  # part of the noise differs


def test_no_seed_is_twice_in_a_mean(audited, tmp_path):
    settings = {"seed": 0, "steps": 9, "audit": {"seed": 7}}
    for name in ("a/seed0", "a/seed1", "b/seed0"):
        audited(name, 0.1, settings=settings)
    groups = grouped(find_audits([tmp_path / "runs"]))
    assert [[one.name for one in group.members] for group in groups] == [["a/seed0", "a/seed1"], ["b/seed0"]]


@pytest.fixture
def sweep(audited, tmp_path) -> Path:
    """Write a sweep of guidance 10, 1 and 5 with two seeds each, and return its folder."""
    for guidance in (10.0, 1.0, 5.0):
        for seed in (0, 1):
            settings = {"seed": seed, "sampler": {"guidance": guidance, "audit_steps": 12}, "audit": {"seed": 7}}
            name = f"sampler.guidance={guidance:g}/seed{seed}"
            (tmp_path / "runs" / name / "adapter").mkdir(parents=True)
            audited(name, 0.1 + guidance / 20, base=1 + guidance / 20, settings=settings)
    return tmp_path / "runs"


def test_a_sweep_is_one_table_over_its_setting(sweep, capsys):
    compare.main([str(sweep), "--picture", str(sweep / "sweep.png")])
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"report: {sweep / 'comparison.html'}" and "perceived presentation" in out
    found = json.loads((sweep / "comparison.json").read_text())
    assert found["settings"] == {"sampler.guidance": [1.0, 5.0, 10.0]}
    assert [group["name"] for group in found["groups"]] == [f"sampler.guidance={value}" for value in (1, 5, 10)]
    assert all(group["training_seeds"] == [0, 1] for group in found["groups"])
    html = (sweep / "comparison.html").read_text()
    assert "3 values of sampler.guidance" in html and html.count("<svg") == 2 and "http" not in html
    for row in rows(found, "gender bias").values():
        for key in ("before", "after"):
            assert f"{row[key]['value']:.3f}" in html and f"{row[key]['value']:.3f}" in out
    from PIL import Image

    with Image.open(sweep / "sweep.png") as image:
        assert image.size == (960, 720)


def test_any_of_them_may_be_the_reference(sweep, capsys):
    compare.main([str(sweep), "--against", str(sweep / "sampler.guidance=5"), "--out", str(sweep / "other")])
    found = json.loads((sweep / "other" / "comparison.json").read_text())
    assert found["reference"] == "sampler.guidance=5"
    assert [bool(row["difference"]) for row in rows(found, "gender bias").values()] == [True, False, True]
    capsys.readouterr()
    line = said([sweep / "sampler.guidance=1", "--against", sweep / "sampler.guidance=5"], capsys)
    assert "--against" in line and "allowed: one of the compared folders" in line


def test_models_stand_side_by_side_with_adapters(audited, tmp_path):
    audited("model.path=x", None, base=1.2)
    audited("model.path=y", None, base=0.4)
    for seed in (0, 1):
        audited(f"adapter/seed{seed}", 0.1 + seed / 10, base=1.2)
    found = compared(find_audits([tmp_path / "runs"]), find_audits([tmp_path / "runs" / "model.path=x"]))
    steps = {name: row["difference"] for name, row in rows(found, "gender bias").items()}
    assert steps["model.path=x"] is None and steps["model.path=y"]["value"] < 0
    assert len(steps) == 3 and steps["adapter"]["spread"] is not None  # both seeds are compared with one model


def change(audit: dict, kind: str) -> None:
    """Change the part of the audit that `kind` names."""
    models, gender = audit["models"].values(), audit["models"]["after"]["attributes"]["gender"]
    match kind:
        case "attributes":
            for part in (*models, audit["paired"]):
                del part["attributes"]["age"], part["joint"]["gender×age"]
            del audit["attributes"]["age"]
        case "classes":
            text = json.dumps(audit, ensure_ascii=False).replace('"young"', '"child"').replace("×young", "×child")
            audit |= json.loads(text)
        case "prompts":
            text = json.dumps(audit).replace("nurse", "cook")
            audit |= json.loads(text)
        case "targets":
            for model in models:
                for prompt in model["attributes"]["gender"]["per_prompt"]:
                    prompt["target"]["shares"] = {"female": 0.7, "male": 0.3}
        case "no target":
            gender["target"]["requested"] = False
        case "margin":
            gender["target"]["delta"] = 0.05
        case "pictures":
            audit["images_per_prompt"] = 60
        case "judge":
            audit["judge"]["path"], audit["provenance"]["hashes"]["judge"] = "other", "j1"
        case "faces":
            audit["provenance"]["several_faces"] = "none"
        case "crop":
            audit["provenance"] |= {"crop": "64 pixels", "hashes": audit["provenance"]["hashes"] | {"judge": "j1"}}
        case "errors":
            gender["corrected"]["confusion"] = [[80, 20], [20, 80]]


REASONS = {
    "attributes": "other attributes (gender, there gender, age)",
    "classes": "other classes of age (child, old, there young, old)",
    "prompts": "other prompts (3, there 3, 2 in common)",
    "targets": "other target of gender (female 0.7, male 0.3, there female",
    "no target": "gender has a target in one of them only", "margin": "other margin of the verdict (0.05, there 0.1)",
    "pictures": "other number of pictures of a prompt (60, there 24)", "judge": "other judge (other, there colours)",
    "faces": "other count of several faces (none; there: ",
    "crop": "other crop", "errors": "other counted errors of the judge",
}  # fmt: skip


def test_what_does_not_compare_is_refused_with_its_reason(audited, tmp_path, capsys):
    audited("a", 0.1)
    text = json.dumps(audited("b", 0.1))
    places = [tmp_path / "runs" / name / "audits" / "some" for name in "ab"]
    for kind, reason in REASONS.items():
        other = json.loads(text)
        change(other, kind)
        (places[1] / "audit.json").write_text(json.dumps(other))
        line = said([tmp_path / "runs"], capsys)
        assert line.startswith(f"error: {places[1]}: cannot be compared with {places[0]}: {reason}"), line
    assert not list((tmp_path / "runs").glob("comparison*"))


def test_what_is_no_audit_ends_as_one_line(tmp_path, capsys):
    with pytest.raises(FairDiffError, match="found no finished run"):
        find_audits([tmp_path])
    for text in ("{", "[]", '{"schema": "other/1"}'):
        (tmp_path / "audit.json").write_text(text)
        assert "audit.json: is no audit" in said([tmp_path], capsys)


def test_audits_have_the_names_of_their_runs(audited, tmp_path):
    for name in ("a/run", "b/run", "b/run/seed7"):
        audited(name, 0.1)
    shutil.copytree(tmp_path / "runs" / "a/run/audits/some", tmp_path / "runs" / "a/run/audits/more")
    names = [one.name for one in find_audits([tmp_path / "runs" / "a", tmp_path / "runs" / "b"])]
    assert names == ["a/run/audits/more", "a/run/audits/some", "b/run", "b/run/seed7"]
    (alone,) = find_audits([tmp_path / "runs" / "b" / "run" / "seed7" / "audits" / "some"])
    assert (alone.name, alone.seed) == ("seed7", 7)


def test_names_are_text_on_the_page(audited, tmp_path, capsys):
    for name in ("<b>bold & [red]", "<script>alert(1)<|script>"):
        audited(name, 0.1 if "b>" in name else 0.3)
    compare.main([str(tmp_path / "runs")])
    html = (tmp_path / "runs" / "comparison.html").read_text()
    assert "<b>" not in html and "<script" not in html and "&lt;b&gt;bold &amp; [red]" in html
    assert "[red]" in capsys.readouterr().out.replace("\n", "")


def test_long_names_stand_once_above_the_table_of_a_terminal(audited, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for name, rate, negative in (("a", 0.001, None), ("b", 0.002, "a hat")):
        audited(name, rate * 100, settings={"adapter": {"learning_rate": rate}, "prompts": {"negative": negative}})
    compare.main([str(tmp_path / "runs")])
    out = capsys.readouterr().out
    text = " ".join(re.sub(r"\x1b\[[\d;]*m", "", out).split())
    assert "(1): adapter.learning_rate=0.001" in text and ". The reference is (1)" in text
    assert "=None" not in (tmp_path / "runs" / "comparison.html").read_text()
    assert text.count("learning_rate=0.002") == 2  # its number's meaning, and what it has in common with the other
