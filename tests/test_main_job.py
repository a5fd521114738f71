"""The main job end to end on the embedded model, small: every file, the schema, resuming, and the last line."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from test_upload import server  # noqa: E402, F401 (a fixture)
from tiny import composed  # noqa: E402

import train  # noqa: E402
from fairdiff import builder, hub  # noqa: E402
from fairdiff.jobs import audit_command as measure  # noqa: E402
from fairdiff.training.tracking import read_metrics  # noqa: E402

report = runpy.run_path(str(ROOT / "scripts" / "report.py"))["main"]

SMALL = [
    "steps=2", "global_batch=8", "noise_pool=8", "sampler.train_steps=[2,2]", "sampler.audit_steps=2", "cache=null",
    "audit.prompts=3", "audit.images_per_prompt=4", "audit.named=1", "audit.without_people=2",
]  # fmt: skip
# a tiny model of another kind with the embedded judges and encoders
BESIDE_EMBEDDED = [
    "model.device=cpu", "adapter.learning_rate=1e-2", "~judge", "~judge@audit.judge", "features.clip=embedded",
    "features.encoder=embedded", "features.identity=embedded", "detector=whole", "loss.confidence=.5",
    "prompts.template='a photo of the face of {a} {}'",
]  # fmt: skip


def launch(folder, *overrides):
    sys.argv = ["train.py", *SMALL, *overrides, f"hydra.run.dir={folder}"]
    train.task()


def only_audit(folder: Path) -> Path:
    """The folder of the only audit of a run."""
    (found,) = (folder / "audits").iterdir()
    return found


def contents(folder: Path) -> dict:
    """Return the content of every file below a folder; tensors for safetensors, whose header has no fixed order."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {
        name: {k: t.tolist() for k, t in load_file(p).items()} if p.suffix == ".safetensors" else p.read_bytes()
        for name, p in files.items()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "gender"
    before = sys.argv
    launch(folder)
    yield folder
    sys.argv = before


@pytest.fixture(scope="module")
def constant(tmp_path_factory):
    """Return the folder of a run with a constant learning rate, which can continue with more steps."""
    folder = tmp_path_factory.mktemp("run") / "constant"
    before = sys.argv
    launch(folder, "optimizer.schedule=constant")
    yield folder
    sys.argv = before


@pytest.mark.slow
def test_a_run_is_whole_where_the_hub_refuses_it(finished, server, capsys):  # noqa: F811
    """A failed upload does not affect the rest of the run."""
    before, audit = contents(finished), only_audit(finished)
    server.full = True
    with pytest.raises(SystemExit) as ended:
        launch(finished, "hub=me/fair")
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and f"report: {audit / 'report.html'}" in out
    assert f"`python scripts/push.py {finished} me/fair` tries again" in err.splitlines()[-1]
    assert contents(finished) == before
    server.full = False
    assert hub.push(finished, "me/fair") == f"{server.url}/me/fair"
    files = {**{p.name: p for p in (finished / "adapter").iterdir()}, **{n: audit / n for n in ("audit.json", "report.html")}}
    assert server.held == {name: path.read_bytes() for name, path in files.items()} and "README.md" in files


@pytest.mark.slow
def test_the_run_folder_holds_everything(finished):
    names = {p.name for p in finished.iterdir()}
    assert names == {"config.yaml", "run.json", "adapter", "metrics.jsonl", "pictures", "checkpoints", "audits"}
    names = {p.name for p in only_audit(finished).iterdir()}
    assert names == {"records", "records.parquet", "request.json", "audit.json", "report.html", "summary.md"}
    state = json.loads((finished / "run.json").read_text())
    assert state == {"schema": 1, "training": json.loads((finished / "adapter" / "adapter.json").read_text())["training"]}
    names = {p.name for p in (finished / "adapter").iterdir()}
    assert names == {"pytorch_lora_weights.safetensors", "adapter.json", "README.md"}
    assert not [p for p in finished.rglob("*") if ".tmp" in p.name]


@pytest.mark.slow
def test_adapter_json_names_the_frozen_model_without_the_adapter(finished):
    about = json.loads((finished / "adapter" / "adapter.json").read_text())
    frozen = builder.build_model(composed(*SMALL))
    assert about["base_model_hash"] == frozen.fingerprint(precision=False)
    assert (about["type"], about["guidance"], about["sampler_steps"]) == ("lora", 1.5, 2)


@pytest.mark.slow
def test_audit_json_has_the_promised_schema(finished):
    audit = json.loads((only_audit(finished) / "audit.json").read_text())
    assert audit["schema"] == "fairdiff.audit/7" and audit["prompts"] == 3 and audit["images_per_prompt"] == 4
    for name, model in audit["models"].items():
        gender = model["attributes"]["gender"]
        assert set(gender["bias"]) >= {"mean", "ci95", "sd_over_prompts", "floor"}
        assert sum(s["share"] for s in gender["shares"].values()) == pytest.approx(1)
        assert set(model["joint"]["gender×race"]["bias"]) >= {"mean", "ci95", "sd_over_prompts", "floor"}
        assert 0 <= model["no_face"]["rate"] <= 1 and "mean" in model["clip_t"]
        if name == "after":
            assert 0 < model["clip_i"]["mean"] <= 1 and 0 < model["dino"]["mean"] <= 1
    records = pd.read_parquet(only_audit(finished) / "records.parquet")
    assert len(records) == 2 * (3 * 4 + 2 * 4 + 2 * 4)  # prompts, both classes of one, prompts without people


@pytest.mark.slow
def test_the_same_command_again_says_so_and_changes_nothing(finished, capsys):
    stamps = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    launch(finished)
    out = capsys.readouterr().out.strip().splitlines()
    assert "finished" in " ".join(out)
    assert out[-1] == f"report: {only_audit(finished) / 'report.html'}"
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == stamps


@pytest.mark.slow
def test_the_configuration_is_what_the_command_says_beforehand(finished, capsys):
    sys.argv = ["train.py", *SMALL, "--cfg", "job", "--resolve"]
    train.task()
    assert capsys.readouterr().out == (finished / "config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [["audit.prompts=2", "audit.images_per_prompt=3"], ["audit.seed=1", "micro_batch=3", "cache={cache}", "audit.prompts=1"]],
)
def test_another_audit_of_the_same_training_trains_nothing_and_lies_beside_it(finished, overrides, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    first, before = only_audit(run), contents(run)
    launch(run, *(o.format(cache=tmp_path / "cache") for o in overrides))
    after = contents(run)
    audits = sorted((run / "audits").iterdir())
    assert len(audits) == 2 and first in audits
    assert capsys.readouterr().out.strip().endswith(f"report: {next(a for a in audits if a != first) / 'report.html'}")
    changed = [name for name in before if after[name] != before[name]]
    assert sorted(changed) == ["adapter/README.md", "config.yaml"]  # the model card is of the newest audit


@pytest.mark.slow
def test_more_steps_of_a_constant_rate_go_on_in_the_same_folder(constant, tmp_path):
    """The result is the same as with all steps requested at once, and each number of steps has its own audit."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(constant, run)
    first = only_audit(run)
    launch(run, "optimizer.schedule=constant", "steps=3")
    launch(whole, "optimizer.schedule=constant", "steps=3")
    assert contents(run / "adapter") == contents(whole / "adapter") != contents(constant / "adapter")
    rows, at_once = ([r | {"seconds": 0} for r in read_metrics(f / "metrics.jsonl")] for f in (run, whole))
    assert [row["step"] for row in rows] == [0, 1, 2] and rows == at_once
    second = only_audit(whole)
    assert {a.name for a in (run / "audits").iterdir()} == {first.name, second.name}
    numbers = [json.loads((f / "audit.json").read_text())["models"] for f in (run / "audits" / second.name, second)]
    assert numbers[0] == numbers[1]
    assert contents(first) == contents(only_audit(constant))


@pytest.mark.slow
def test_more_steps_of_a_falling_rate_are_another_training(tmp_path, capsys):
    launch(tmp_path / "run", "optimizer.schedule=linear")
    with pytest.raises(SystemExit) as exit_info:
        launch(tmp_path / "run", "optimizer.schedule=linear", "steps=3")
    assert exit_info.value.code == 2 and "(steps: 2 there, 3 requested)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("which", ["run", "audit"])
def test_the_report_is_made_again_from_the_records(finished, which, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    audit = only_audit(run)
    for name in ("audit.json", "report.html"):
        (audit / name).unlink()
    report([str(run if which == "run" else audit)])
    assert capsys.readouterr().out == f"report: {audit / 'report.html'}\n"
    assert contents(run) == contents(finished)


def test_a_report_of_no_audit_or_of_a_damaged_one_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        report([str(tmp_path)])
    assert exit_info.value.code == 2 and "found no finished audit, allowed: a run folder" in capsys.readouterr().err
    (tmp_path / "audits" / "x").mkdir(parents=True)
    (tmp_path / "audits" / "x" / "request.json").write_text('{"spec": {}}')
    with pytest.raises(SystemExit) as exit_info:
        report([str(tmp_path)])
    said = capsys.readouterr().err
    assert exit_info.value.code == 2 and said.count("\n") == 1 and "request.json: cannot be read as the request" in said


@pytest.mark.slow
def test_another_configuration_never_lands_on_a_finished_run(finished, capsys):
    with pytest.raises(SystemExit) as exit_info:
        launch(finished, "adapter=soft_tokens")
    said = capsys.readouterr().err
    assert exit_info.value.code == 2 and "other settings" in said
    assert "adapter.type: lora there, soft_tokens requested" in said


@pytest.mark.slow
def test_the_report_is_one_file_without_requests(finished):
    page = (only_audit(finished) / "report.html").read_text()
    assert "perceived presentation" in page
    assert 'src="http' not in page and 'href="http' not in page
    assert "type: lora" in page and "global_batch: 8" in page  # the settings
    assert "initial_text: " not in page and "validation." not in page  # of LoRA, not validated
    assert "by training" not in page  # a new LoRA changes nothing before it is trained


@pytest.mark.slow
def test_what_the_initial_words_do_is_told_from_what_training_does(tmp_path):
    """The start is the model with the initial tokens; training at a rate of 1e-9 leaves its numbers unchanged."""
    words = ["adapter=soft_tokens", "adapter.initial_text='an old man'", "audit.named=null", "audit.without_people=1"]
    launch(tmp_path / "a", *words, "adapter.learning_rate=.1")
    launch(tmp_path / "b", *words, "adapter.learning_rate=1e-9")
    one, other = (json.loads((only_audit(tmp_path / run) / "audit.json").read_text()) for run in "ab")
    assert list(one["models"]) == ["before", "start", "after"] and one["trained"]["pairs"] == 3 * 4
    assert one["models"]["start"]["dino"] == other["models"]["start"]["dino"] != one["models"]["after"]["dino"]
    assert other["models"]["after"]["dino"]["mean"] == pytest.approx(other["models"]["start"]["dino"]["mean"], abs=1e-3)
    assert "by training" in (only_audit(tmp_path / "a") / "report.html").read_text()


AUDIT = [o for o in SMALL if o.startswith(("audit.", "sampler.", "cache"))]


@pytest.mark.slow
def test_an_audit_of_a_saved_adapter_says_where_it_asks_for_something_else(finished, tmp_path, capsys):
    """The adapter was trained for equal shares; its numbers before and after equal those of its own run's audit."""
    sys.argv = ["audit.py", *AUDIT, f"adapter.path={finished / 'adapter'}", f"hydra.run.dir={tmp_path}"]
    sys.argv += ["target.gender.female=.7", "target.gender.male=.3"]
    measure()
    out = " ".join(capsys.readouterr().out.split())
    assert "warning: adapter.path: trained with target ['gender: female 0.5, male 0.5']" in out
    own, again = (json.loads((only_audit(folder) / "audit.json").read_text()) for folder in (finished, tmp_path))
    for model in ("before", "after"):
        assert own["models"][model]["attributes"]["gender"]["bias"] == again["models"][model]["attributes"]["gender"]["bias"]


@pytest.mark.slow
def test_an_audit_without_an_adapter_shows_none(tmp_path, capsys):
    sys.argv = ["audit.py", *AUDIT, f"hydra.run.dir={tmp_path}"]
    measure()
    out = capsys.readouterr().out
    assert "before and after" not in out and "warning" not in out
    assert "type: lora" not in (only_audit(tmp_path) / "report.html").read_text()
