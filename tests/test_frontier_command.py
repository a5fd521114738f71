"""scripts/frontier.py on toy audits: `--done` finds what scripts/baselines.py has measured, and generates nothing."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_judges import uncalibrated

from fairdiff import run
from fairdiff.diffusion.adapters import Lora
from fairdiff.diffusion.load import load_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import baselines  # noqa: E402
import frontier  # noqa: E402


@pytest.fixture
def lora(tiny_folder, tmp_path) -> Path:
    made, draw = Lora(load_model(tiny_folder), ["unet"], 2, 2, torch.Generator()), torch.Generator()
    for parameter in made.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=draw.manual_seed(parameter.numel())))
    made.save(folder := tmp_path / "lora")
    return folder


def test_every_baseline_is_a_setting_of_its_curve(lora):
    """The same name and key, or the frontier would measure it again: 1 and 1.0 are one strength."""
    known = {m.name: m.key for some in frontier.curves([f"ours={lora}"]).values() for m in some}
    some = baselines.chosen([], [f"ours={lora}"])
    assert len(some) == 5
    for method in some:
        assert [(type(v), v) for v in known[method.name]] == [(type(v), v) for v in method.key], method.name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_done_takes_what_baselines_have_measured_and_generates_nothing(
    lora, tiny_folder, tmp_path, monkeypatch, capsys
):
    settings = [
        f"model.path={tiny_folder}", "model.device=cpu", f"audit.judge.path={uncalibrated(tmp_path / 'judge')}",
        "features.clip=embedded", "features.encoder=embedded", "features.identity=embedded", "detector=whole",
        "prompts.template='a photo of the face of {a} {}'", "sampler.audit_steps=2", "cache=null", "audit.prompts=2",
        "audit.images_per_prompt=3", "audit.named=1", "audit.without_people=1",
    ]  # fmt: skip
    places = ["--folder", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")]
    adapter = ["--adapter", f"ours={lora}"]
    with pytest.raises(SystemExit):
        frontier.main([*places, "--done", "--set", *settings])
    assert "--done: found no finished audit of these settings" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()
    baselines.main(["UCE", *places, *adapter, "--set", *settings])
    measured = sorted((tmp_path / "out" / "validation").rglob("audit.json"))
    monkeypatch.setattr(run, "carry_out", None)  # --done has no use for it
    frontier.main([*places, *adapter, "--done", "--set", *settings])
    found = json.loads((tmp_path / "docs" / "measurements" / "studies" / "frontier.json").read_text("utf-8"))
    assert {name: [p["label"] for p in some] for name, some in found["curves"].items()} == {"UCE": ["UCE"], "ours": ["ours"]}
    for (name, (point,)), file in zip(found["curves"].items(), measured, strict=True):
        audit = json.loads(file.read_text("utf-8"))["models"]["after"]
        rows = audit["attributes"]["gender"]["per_prompt"]
        assert sorted(point["bias"]) == pytest.approx(sorted(row["bias"]["value"] for row in rows), abs=1e-6), name
        assert sum(point["semantics"]) / 2 == pytest.approx(audit["dino"]["mean"], abs=1e-6), name
    assert sorted((tmp_path / "out" / "validation").rglob("audit.json")) == measured
    text = (tmp_path / "docs" / "studies" / "frontier.md").read_text("utf-8")
    frontier.main([*places, "--render"])
    assert text == (tmp_path / "docs" / "studies" / "frontier.md").read_text("utf-8") and "| UCE |" in text
