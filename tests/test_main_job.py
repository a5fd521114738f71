"""The main job end to end on the embedded model, small: every file, the schema, resuming, and the last line."""

import json
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from fairdiff.cli import main  # noqa: E402

measure = main(runpy.run_path(str(ROOT / "scripts" / "audit.py"))["job"], "measure")

SMALL = [
    "steps=2", "global_batch=8", "noise_pool=8", "sampler.train_steps=[3,3]", "sampler.audit_steps=3", "cache=null",
    "audit.prompts=3", "audit.images_per_prompt=6", "audit.unrelated_prompts=2", "audit.unrelated_images=3",
]  # fmt: skip


def launch(folder, *overrides):
    sys.argv = ["train.py", *SMALL, *overrides, f"hydra.run.dir={folder}"]
    train.task()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "debias"
    before = sys.argv
    launch(folder)
    yield folder
    sys.argv = before


@pytest.mark.slow
def test_the_run_folder_holds_everything(finished):
    names = {p.name for p in finished.iterdir()}
    assert names >= {
        "config.yaml", "adapter", "records.parquet", "audit.json", "metrics.jsonl", "checkpoints", "report.html"
    }  # fmt: skip
    assert {p.name for p in (finished / "adapter").iterdir()} == {"pytorch_lora_weights.safetensors", "adapter.json"}
    assert not [p for p in finished.rglob("*") if ".tmp" in p.name]


@pytest.mark.slow
def test_audit_json_has_the_promised_schema(finished):
    audit = json.loads((finished / "audit.json").read_text())
    assert audit["schema"] == "fairdiff.audit/2" and audit["prompts"] == 3 and audit["images_per_prompt"] == 6
    for name, model in audit["models"].items():
        gender = model["attributes"]["gender"]
        assert set(gender["bias"]) >= {"mean", "ci95", "sd_over_prompts", "floor"}
        assert sum(s["share"] for s in gender["shares"].values()) == pytest.approx(1)
        assert set(model["joint"]["gender×race"]["bias"]) >= {"mean", "ci95", "sd_over_prompts", "floor"}
        assert 0 <= model["no_face"]["rate"] <= 1 and "mean" in model["clip_t"]
        if name == "after":
            assert 0 < model["clip_i"]["mean"] <= 1 and 0 < model["dino"]["mean"] <= 1
    records = pd.read_parquet(finished / "records.parquet")
    assert len(records) == 2 * (3 * 6 + 2 * 3)


@pytest.mark.slow
def test_the_same_command_again_says_so_and_changes_nothing(finished, capsys):
    stamp = (finished / "audit.json").stat().st_mtime_ns
    launch(finished)
    out = capsys.readouterr().out.strip().splitlines()
    assert "finished" in " ".join(out)
    assert out[-1] == f"report: {finished / 'report.html'}"
    assert (finished / "audit.json").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_another_configuration_never_lands_on_a_finished_run(finished, capsys):
    with pytest.raises(SystemExit) as exit_info:
        launch(finished, "adapter=soft_tokens")
    said = capsys.readouterr().err
    assert exit_info.value.code == 2 and "other settings" in said and "adapter.type: lora there, soft_tokens asked" in said


@pytest.mark.slow
def test_the_report_is_one_file_without_requests(finished):
    page = (finished / "report.html").read_text()
    assert "perceived presentation" in page
    assert 'src="http' not in page and 'href="http' not in page
    assert "type: lora" in page and "global_batch: 8" in page  # what was asked
    assert "initial_text: " not in page and "validation." not in page  # of LoRA, not validated
    assert "by training" not in page  # a new LoRA changes nothing before it is trained


@pytest.mark.slow
def test_what_the_initial_words_do_is_told_from_what_training_does(tmp_path):
    """The start is the tokens as they were: audited again without training they show the same."""
    launch(tmp_path / "a", "adapter=soft_tokens", "adapter.initial_text='an old man'", "adapter.learning_rate=.1")
    launch(tmp_path / "b", "adapter=soft_tokens", "adapter.initial_text='an old man'", "adapter.learning_rate=1e-9")
    one, other = (json.loads((tmp_path / run / "audit.json").read_text()) for run in "ab")
    assert list(one["models"]) == ["before", "start", "after"] and one["trained"]["pairs"] == 3 * 6
    assert one["models"]["start"]["dino"] == other["models"]["start"]["dino"] != one["models"]["after"]["dino"]
    assert other["models"]["after"]["dino"]["mean"] == pytest.approx(other["models"]["start"]["dino"]["mean"], abs=1e-3)
    assert "by training" in (tmp_path / "a" / "report.html").read_text()


AUDIT = [o for o in SMALL if o.startswith(("audit.", "sampler.", "cache"))]


@pytest.mark.slow
def test_an_audit_of_a_saved_adapter_says_where_it_asks_for_something_else(finished, tmp_path, capsys):
    """The adapter was made for half and half; its numbers before and after are those of its own run's audit."""
    sys.argv = ["audit.py", *AUDIT, f"adapter.path={finished / 'adapter'}", f"hydra.run.dir={tmp_path}"]
    sys.argv += ["target.gender.female=.7", "target.gender.male=.3"]
    measure()
    out = " ".join(capsys.readouterr().out.split())
    assert "warning: adapter.path: trained with target ['gender: female 0.5, male 0.5']" in out
    own, again = (json.loads((folder / "audit.json").read_text()) for folder in (finished, tmp_path))
    for model in ("before", "after"):
        assert own["models"][model]["attributes"]["gender"]["bias"] == again["models"][model]["attributes"]["gender"]["bias"]


@pytest.mark.slow
def test_an_audit_without_an_adapter_shows_none(tmp_path, capsys):
    sys.argv = ["audit.py", *AUDIT, f"hydra.run.dir={tmp_path}"]
    measure()
    out = capsys.readouterr().out
    assert "before and after" not in out and "warning" not in out
    assert "type: lora" not in (tmp_path / "report.html").read_text()
