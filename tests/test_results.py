"""docs/results.md: every planned command composes, and the page shows the numbers of the audits, counted by hand."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from threading import Lock
from time import sleep

import pytest
from hydra import compose, initialize_config_dir

from fairdiff.cli.main import CONF, to_config
from fairdiff.config import Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from benchmark.page import write_page as write_performance  # noqa: E402
from reproduce.aims import AIMS, Aim, bias, drift, left, low_confidence, relative_drift, share  # noqa: E402
from reproduce.numbers import over_seeds  # noqa: E402
from reproduce.page import write_page  # noqa: E402
from reproduce.plan import ADAPTERS, GROUPS, Run, plan  # noqa: E402
from reproduce.records import keep_record, without_record  # noqa: E402
from reproduce.search import candidates, write_search  # noqa: E402
from results import Failed, chosen_of, each_done, with_needed  # noqa: E402

RUNS = plan([0, 1, 2], 160)


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_runs_are_done_several_at_a_time_each_after_the_one_it_needs(jobs):
    trained = [Run("adapters", name, (), 0) for name in "abc"]
    runs = with_needed([Run("frontier", f"{t.name}, {n}", (), 0, t) for t in trained for n in range(4)])
    now, most, done, lock = set(), [0], [], Lock()

    def task(run):
        with lock:
            assert run.needs is None or run.needs in done
            now.add(run)
            most[0] = max(most[0], len(now))
        sleep(0.02)
        with lock:
            now.remove(run)
            done.append(run)

    assert set(each_done(runs, jobs, task)) == set(done) == set(runs) and len(done) == len(runs)
    assert most[0] <= jobs and (jobs == 1 or most[0] > 1)
    assert jobs > 1 or done == runs


@pytest.mark.parametrize("jobs", [1, 3])
def test_after_a_run_that_failed_no_other_is_begun(jobs):
    runs, begun = [Run("adapters", str(i), (), 0) for i in range(20)], []

    def task(run):
        begun.append(run)
        sleep(0.02)
        if run == runs[1]:
            raise Failed(3, "the second")

    with pytest.raises(Failed, match="the second"):
        list(each_done(runs, jobs, task))
    assert len(begun) <= 3 * jobs


def test_every_planned_run_has_a_record_of_its_own_and_follows_what_it_needs():
    assert len({run.record(Path("x")) for run in RUNS}) == len({run.log(Path("x")) for run in RUNS}) == len(RUNS)
    assert {run.group for run in RUNS} == set(GROUPS)
    for place, run in enumerate(RUNS):
        assert run.needs is None or run.needs in RUNS[:place]
        alone = [other for other in RUNS if other.folder(Path("x")) == run.folder(Path("x")) and other.same is None]
        assert alone == [run.same or run]


def test_a_training_that_two_groups_show_is_done_once():
    """Its overrides differ only in the audit, so the identity of its folder is the same (tests/test_main_job.py)."""
    shared = [run for run in RUNS if run.same]
    assert {run.name for run in shared} == {"gender", "gender_tokens"} and len(shared) == 6
    for run in shared:
        assert [o for o in run.overrides if not o.startswith("audit.")] == list(run.same.overrides)


def test_groups_and_single_runs_are_chosen_by_name():
    assert chosen_of(RUNS, []) == RUNS
    race = chosen_of(RUNS, ["experiments/race"])
    assert {(run.group, run.name) for run in race} == {("experiments", "race")} and len(race) == 3  # seeds
    assert chosen_of(RUNS, ["words", "experiments/race"]) == [*chosen_of(RUNS, ["words"]), *race]
    assert {run.group for run in chosen_of(RUNS, ["frontier"])} == {"frontier"}


def test_a_group_by_itself_first_makes_the_adapters_it_audits():
    chosen = [run for run in RUNS if run.group == "frontier"]
    made = with_needed(chosen)
    assert len(set(made)) == len(made) and set(made) >= set(chosen)
    assert all(run.needs is None or made.index(run.needs) < made.index(run) for run in made)
    assert {run.name for run in made if run.group == "adapters"} == set(ADAPTERS)


def composed_of(run: Run) -> Config:
    """The configuration of a run's command."""
    script, *overrides = run.command(Path("outputs/results"))
    name = {"train.py": "config", "scripts/audit.py": "measure"}[script]
    with initialize_config_dir(CONF, version_base="1.3"):
        return to_config(compose(name, [o for o in overrides if not o.startswith("hydra.")]))


KINDS = {(r.script, *(o if "=" in o and not o[-1].isdigit() else o.split("=")[0] for o in r.overrides)): r for r in RUNS}


@pytest.mark.parametrize("run", [replace(r, seed=0) for r in KINDS.values()], ids=lambda r: f"{r.group}: {r.name}")
def test_every_planned_command_composes(run):
    config = composed_of(run)
    assert config.seed == 0 and (config.adapter.path is None) == (run.of is None)
    if run.group == "experiments":
        assert config.audit.images_per_prompt == 160 and config.audit.split == "test"
        assert config.audit.prompts * len(config.prompts.families) == 48


def audit(values: list[float], families: list[str] | None = None, dtype: str = "bfloat16") -> dict:
    """Return an audit of prompts with these biases after, half of them as total variation, and a bias of 1 before."""
    families = families or ["occupation"] * len(values)

    def model(biases):
        mean = sum(b for b in biases if b is not None) / sum(b is not None for b in biases)
        per_prompt = [
            {"family": f, "bias": {"value": b, "floor": 0.1}, "target": {"total_variation": b and b / 2, "floor": 0.05}}
            for b, f in zip(biases, families, strict=True)
        ]
        bias = {"mean": mean, "ci95": [0, 1], "ci95_these": [0, 1], "floor": 0.1}
        low = {"rate": 0.1 * mean, "ci95": [0.08 * mean, 0.12 * mean]}
        shares = {"old": {"share": 0.3, "ci95": [0.2, 0.4], "ci95_these": [0.2, 0.4]}}
        axis = {"bias": bias, "target": {"requested": True}, "shares": shares, "per_prompt": per_prompt}
        axis |= {"low_confidence": low}
        other = axis | {"target": {"requested": False}}
        scalars = {"no_face": {"rate": 0.25, "ci95": [0.2, 0.3]}, "dino": {"mean": None, "ci95": None}}
        scalars["clip_i"] = {"mean": 0.9, "ci95": [0.8, 0.8 + mean / 4]}
        return {"attributes": {"gender": axis, "race": other, "age": other}, "joint": {}} | scalars

    kept = (("before", 1.0), ("after", 0.96))
    return {
        "prompts": len(values), "images_per_prompt": 60,
        "provenance": {"seed": 1, "sampling_dtype": dtype, "target": "gender: female 0.5, male 0.5", "hashes": {}},
        "families": {family: families.count(family) for family in families},
        "named": {"attributes": {"gender": {"kept": {m: {"mean": v, "ci95": [0.9, 1.0]} for m, v in kept}}}},
        "models": {"before": model([1.0] * len(values)), "after": model(values)},
        "paired": {"clip_t": {"difference": -0.0125, "ci95": [-0.02, 0.001]}},
        "without_people": {"relative_drift": {"value": 0.2, "ci95": [0.1, 1.5]}, "false_face": {}}, "records": "much more",
    }  # fmt: skip


def put(run: Run, root: Path, found: dict) -> None:
    """Write an audit into the run's folder, and the log of the command that names it."""
    folder = run.folder(root) / "audits" / "some"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "audit.json").write_text(json.dumps(found))
    run.log(root).parent.mkdir(parents=True, exist_ok=True)
    run.log(root).write_text(f"much\nreport: {folder / 'report.html'}\n")


def test_the_page_averages_seeds_and_says_what_is_missing(tmp_path):
    runs = [Run("experiments", "gender", ("experiment=gender",), seed) for seed in (0, 1, 2)]
    runs.append(Run("experiments", "race", (), 0))
    none = None  # a prompt without any face has no bias
    for run, values in zip(runs, ([0.2, 0.4, none], [0.4, 0.6, none]), strict=False):
        put(run, tmp_path / "runs", audit(values))
        keep_record(run, tmp_path / "runs", tmp_path / "records")
    write_page(runs, tmp_path / "records", tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    row, kept = (line for line in text.splitlines() if line.startswith("| gender | 2"))
    assert row.startswith("| gender | 2 of 3 | 3 × 60 | 1.000 → .400 ± .141 [")  # means .3 and .5
    # CLIP-I: intervals to .875 and .925
    held = ["25.0% ± 0.0% [20.0%, 30.0%]", "4.0% ± 1.4% [3.2%, 4.8%]", "−.013 ± .000 [−.020, +.001]"]
    held += [".900 ± .000 [.800, .900]", "–"]
    assert kept == f"| gender | {' | '.join(held)} | .200 ± .000 [.100, 1.500] | gender 96% ± 0% [90%, 100%] |"
    assert "No record: race." in text and "`python train.py experiment=gender`" in text
    assert "Floors: gender .100" in text
    put(runs[0], tmp_path / "runs", audit([0.2, 0.4, none], dtype="float32"))
    keep_record(runs[0], tmp_path / "runs", tmp_path / "records")
    write_page(runs, tmp_path / "records", tmp_path / "results.md")
    for more in ("", " model.sampling_dtype=float32"):  # the second seed is as it was
        assert f"`python train.py experiment=gender{more}`" in (tmp_path / "results.md").read_text()
    other = [Run("experiments", "gender", ("experiment=gender", "audit.prompts=3"), 0)]
    write_page(other, tmp_path / "records", tmp_path / "results.md")
    assert "No record: gender." in (tmp_path / "results.md").read_text()  # measured, but with other overrides


def test_the_committed_pages_are_what_the_committed_measurements_make(tmp_path):
    docs = ROOT / "docs"
    write_page(RUNS, docs / "measurements" / "results", tmp_path / "results.md")
    assert (tmp_path / "results.md").read_text() == (docs / "results.md").read_text()
    write_search(candidates(), docs / "measurements" / "search", tmp_path / "search.md")
    assert (tmp_path / "search.md").read_text() == (docs / "search.md").read_text()
    write_performance(docs / "measurements" / "bench", tmp_path / "performance.md")
    assert (tmp_path / "performance.md").read_text() == (docs / "performance.md").read_text()


def test_the_page_says_what_is_left_of_each_kind_of_prompt_and_of_the_distance_to_a_target(tmp_path):
    several, labour = Run("experiments", "several", (), 0), Run("targets", "labour", (), 0)
    values, families = [0.1, 0.3, 0.55, 0.55, None], ["sport", "sport", "styled", "styled", "styled"]
    for run in (several, labour):
        put(run, tmp_path / "runs", audit(values, families))
        keep_record(run, tmp_path / "runs", tmp_path / "records")
    write_page([several, labour], tmp_path / "records", tmp_path / "results.md")
    lines = (tmp_path / "results.md").read_text().splitlines()
    # excess over the floor: 0 and .2 of .9 in sports, .45 of .9 in both styled ones that have faces
    sport, styled = ("1.000 → .200, floor .100: 11% left", "1.000 → .550, floor .100: 50% left [50%, 50%]")
    assert any(line.startswith("| several: sport | 2 | " + sport) for line in lines)
    assert any(line.startswith("| several: styled | 3 | " + styled) for line in lines)
    # over all four: (0 + .2 + .45 + .45) / 4 of .9; race has no target
    shown = [line for line in lines if line.startswith("| labour | ") and " left " in line]
    assert len(shown) == 1 and shown[0].startswith("| labour | gender | .500 → .188, floor .050: 31% left [")


@pytest.mark.parametrize(
    "values,measured,reached",
    [
        ([0.10] * 8, ".100 [.100, .100]", "reached"),
        ([0.12] * 8, ".120 [.120, .120]", "missed"),
        ([0.05, 0.35] * 4, ".200 [", "open"),
        ([0.02, 0.18] * 4, ".100 [", "open"),  # the mean lies below, its interval not
        ([0.10, None] * 8, ".100 [.100, .100]", "reached"),  # a prompt without a face has no bias
    ],
)
def test_an_aim_is_decided_by_its_whole_interval(values, measured, reached):
    aim = Aim("experiments", "a", "gender bias", "≤ .11", float("-inf"), 0.11, bias("gender"))
    row = aim.row({("experiments", "a"): [audit(values)]})
    assert row.startswith(f"| a | gender bias | ≤ .11 | {measured}") and row.endswith(f"| 1 | {reached} |")
    assert aim.row({("targets", "a"): [audit(values)], ("experiments", "b"): [audit(values)]}) is None


def test_seeds_widen_an_interval_by_students_t():
    assert over_seeds((0.1, 0.3), [0.2]) == (0.1, 0.3)
    low, high = over_seeds((0.1, 0.4), [0.1, 0.2, 0.3])  # sd .1, t(2) = 4.303: 4.303 * .1 / sqrt(3) = .2484
    assert (low, high) == pytest.approx((0.2 - (0.1**2 + 0.2484**2) ** 0.5, 0.2 + (0.2**2 + 0.2484**2) ** 0.5), abs=1e-4)
    one, other = audit([0.2] * 6), audit([0.4] * 6)
    aim = Aim("experiments", "a", "bias", "", float("-inf"), 0.31, bias("gender"))
    row = aim.row({("experiments", "a"): [one, other]})  # .3, of two seeds: t(1) = 12.706, sd .1414
    assert "| .300 [−.971, 1.571] | 2 | open |" in row


def test_aims_of_what_changes_beside_the_target():
    several = [audit([0.2, 0.6, 0.5, 0.3])]  # 1 before: changes -.8, -.4, -.5, -.7
    assert drift("race")(several).value == pytest.approx(-0.6)
    low, high = drift("race")(several).interval
    assert low < -0.6 < high and high - low < 0.8
    assert low_confidence("gender")(several).value == pytest.approx(0.4)  # .04 after, .1 before
    assert low_confidence("gender")(several).interval == pytest.approx((0.32, 0.48))
    assert (relative_drift(several).value, relative_drift(several).interval) == (0.2, (0.1, 1.5))


def test_what_stays_with_words_is_compared_subject_by_subject(tmp_path):
    plain, words = (Run("words", name, (name,), 0, script="scripts/audit.py") for name in ("as it is", "a person,"))
    for run, values in ((plain, [0.5, 0.9, None]), (words, [0.3, 0.7, 0.5])):
        found = audit(values)
        found["models"] = {"before": found["models"]["after"]}
        put(run, tmp_path / "runs", found | {"paired": None, "without_people": None})
        keep_record(run, tmp_path / "runs", tmp_path / "records")
    run = Run("adapters", "one", (), 0)
    put(run, tmp_path / "runs", audit([0.3, 0.7]))
    keep_record(run, tmp_path / "runs", tmp_path / "records")
    write_page([plain, words, run], tmp_path / "records", tmp_path / "results.md")
    rows = [line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("| a person, |")]
    # above the floor of .1: .2 and .6 of .4 and .8
    assert len(rows) == 1 and rows[0].count("67% stays [") == 3
    text = (tmp_path / "results.md").read_text()
    assert "`python scripts/audit.py 'a person,'`" in text
    beside = text.split("## The main job with each adapter")[1]  # of words too: without the prompts' own
    assert "| words: a person, | – | 3 × 60 | .700 → .500 [" in beside and "words: as it is" not in beside


def test_a_run_counts_as_measured_by_a_record_of_its_own_overrides(tmp_path):
    run = Run("adapters", "one", ("adapter=lora_text",), 0)
    put(run, tmp_path / "runs", audit([0.3, 0.7]))
    keep_record(run, tmp_path / "runs", tmp_path / "records")
    others = [replace(run, seed=1), replace(run, overrides=("adapter=lora_text", "steps=9"))]
    assert without_record([run, *others], tmp_path / "records") == others


def test_what_is_left_is_the_mean_over_seeds():
    aim = Aim("experiments", "a", "left", "≤ 40%", float("-inf"), 0.4, left("gender", "bias", "value"))
    both = {("experiments", "a"): [audit([0.2, 0.6, 0.5, 0.1]), audit([0.3, 0.7, 0.6, 0.2])]}
    # (.25 + .65 + .55 + .15) / 4 = .40, floor .1, before 1: .3 of .9
    assert aim.row(both).startswith("| a | left | ≤ 40% | 33% [") and aim.row(both).endswith("| 2 | open |")


def test_a_share_is_the_mean_of_seeds_and_its_interval_holds_their_spread():
    def seed(value, ci):
        return {"models": {"after": {"attributes": {"age": {"shares": {"old": {"share": value, "ci95": ci}}}}, "joint": {}}}}

    aim = Aim("experiments", "a", "old", ".20 to .30", 0.20, 0.30, share("age", "old"))
    same = {("experiments", "a"): [seed(0.25, [0.21, 0.27]), seed(0.25, [0.23, 0.29])]}
    assert aim.row(same) == "| a | old | .20 to .30 | .250 [.220, .280] | 2 | reached |"
    assert aim.row({("experiments", "a"): [seed(0.2, [0.19, 0.21]), seed(0.3, [0.29, 0.31])]}).endswith("| 2 | open |")


@pytest.mark.slow
def test_the_search_is_on_validation_occupations_and_its_table_holds_what_was_measured(tmp_path):
    runs = candidates()
    assert len({run.folder(Path("x")) for run in runs}) == len(runs)
    for run in runs:
        config = composed_of(run)
        assert config.audit.split == "validation" and config.seed == 0 and (config.adapter.path is None) == (run.of is None)
    found = audit([0.2, 0.4, 0.3])
    for model in found["models"].values():
        model["dino"] = {"mean": 0.9}
    put(runs[0], tmp_path / "runs", found)
    keep_record(runs[0], tmp_path / "runs", tmp_path / "records")
    write_search(runs, tmp_path / "records", tmp_path / "search.md")
    lines = (tmp_path / "search.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(f"| {runs[0].name} |")]
    assert len(rows) == 1 and "| 1.000 → .300 [" in rows[0] and "| 10.0% → 3.0% | .900 | .200 | 100% → 96% |" in rows[0]


def test_every_aim_is_of_a_planned_run():
    planned = {(run.group, run.name) for run in RUNS}
    assert {(aim.group, aim.run) for aim in AIMS} <= planned
