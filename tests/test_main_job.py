"""The main job end to end on the embedded model, small: every file, the schema, resuming, and the last line."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

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
    assert {p.name for p in (finished / "adapter").iterdir()} == {"soft_tokens.safetensors", "adapter.json"}
    assert not [p for p in finished.rglob("*") if ".tmp" in p.name]


@pytest.mark.slow
def test_audit_json_has_the_promised_schema(finished):
    audit = json.loads((finished / "audit.json").read_text())
    assert audit["schema"] == "fairdiff.audit/1" and audit["prompts"] == 3 and audit["images_per_prompt"] == 6
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
        launch(finished, "adapter=lora_text")
    assert exit_info.value.code == 2 and "other settings" in capsys.readouterr().err


@pytest.mark.slow
def test_the_report_is_one_file_without_requests(finished):
    page = (finished / "report.html").read_text()
    assert "perceived presentation" in page
    assert 'src="http' not in page and 'href="http' not in page
