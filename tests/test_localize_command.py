"""scripts/localize.py on a tiny run: the whole command, interrupted while it trains again, and resumed."""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import composed
from tiny_judges import audit_settings

from fairdiff import builder
from fairdiff.diffusion.load import load_model
from fairdiff.plan import make_plan
from fairdiff.run import begin, save_adapter
from fairdiff.studies.localize import components
from fairdiff.training.trainer import train

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import localize as command  # noqa: E402
from harness import retrain  # noqa: E402


@pytest.fixture(scope="module")
def settings(tiny_folder, tmp_path_factory) -> list[str]:
    """Of audits."""
    folder = tmp_path_factory.mktemp("localize")
    return audit_settings(tiny_folder, folder)


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory) -> Path:
    """A run of two steps for two attributes, without its audit."""
    config = composed(
        *settings, "attribute=[gender,race]", "steps=2", "global_batch=8", "noise_pool=8", "sampler.train_steps=[2,2]",
        "loss.confidence=.5", "adapter.rank=2", "adapter.learning_rate=1e-2", "loss.face=null", "validation.every=null",
    )  # fmt: skip
    folder, plan = tmp_path_factory.mktemp("runs") / "gender_race" / "default" / "seed0", make_plan(config)
    model, perception = builder.build_model(config), builder.build_perception(config, plan)
    training = builder.training_fingerprint(config, plan, model, perception)
    trainee = builder.build_trainee(config, plan, model, perception)
    begin(folder, asdict(config), training)
    train(trainee, list(plan.train), builder.build_schedule(config, plan), folder, training, Console(quiet=True))
    save_adapter(folder, trainee.adapter, {})
    return folder


@pytest.mark.slow
def test_a_training_with_nothing_held_at_zero_is_the_run_itself(run, tmp_path):
    anew = retrain.retrained(run, {}, [], tmp_path)
    model = load_model(command.saved(run / "config.yaml", []).model.path)
    one, other = (command._splits(folder, model) for folder in (run / "adapter", anew))
    assert one.keys() == other.keys() and all(torch.equal(one[p].sizes, other[p].sizes) for p in one)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_command_goes_on_where_it_stopped_and_keeps_what_its_page_needs(
    run, settings, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(command, "SHARES", (0.5, 0.9))
    ask = [str(run), "--retrain", "0.4", "--batches", "2", "--set", *settings]
    ask += ["--docs", str(tmp_path / "docs"), "--folder", str(tmp_path / "out")]
    calls, own = [], retrain.train

    def interrupt(*args):
        calls.append(args[3])  # its folder
        own(*args)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(retrain, "train", interrupt)
    with pytest.raises(SystemExit) as end:
        command.main(ask)
    assert end.value.code == 130 and "the same command goes on" in capfd.readouterr().err
    scores = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("scores-*.json")}
    audits = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("report.html")}
    assert len(scores) == 1 and len(audits) == 8  # the whole, two shares in three orders, and one without
    command.main(ask)
    assert len(calls) == 3 and calls[0] == calls[1] != calls[2]  # the interrupted one went on
    later = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert (scores | audits).items() <= later.items()

    found = json.loads((tmp_path / "docs" / "measurements" / "studies" / "localize.json").read_text("utf-8"))
    sizes = {tuple(row[:3]): row[3] for row in found["components"]}
    (folder,) = (tmp_path / "out").glob("*gender_race*")
    model = load_model(command.saved(run / "config.yaml", []).model.path)
    assert components(command._splits(run / "adapter", model)) == pytest.approx(sizes)
    assert [(row["order"], row["share"]) for row in found["retrained"]] == [("score", 0.4), ("random", 0.4)]
    for row in found["retrained"]:
        assert row["components"] == round(0.4 * len(sizes)) and 0 < row["common"] < 1
        assert row["removed"]["dino"] != row["retrained"]["dino"]  # images of another adapter
        for attribute in ("gender", "race"):
            assert row["removed"]["before"][attribute] == row["retrained"]["before"][attribute]
    without = command._splits(folder / "adapters" / "without-score-0.4", model)
    assert len(components(without)) == len(sizes) - round(0.4 * len(sizes))
    (overlap,) = found["overlaps"]
    assert overlap["of"] == ["gender", "race"] and [row[0] for row in overlap["rows"]] == [0.5]
    assert all(0 <= value <= 1 and low <= high and 0 <= again <= 1 for _, value, (low, high), again in overlap["rows"])
    html = (folder.parent / "localize.html").read_text("utf-8")
    assert html.count("does training find another way?") == 2 and "Overlap of the parts for gender and for race" in html


@pytest.mark.slow
def test_the_smallest_adapter_that_keeps_the_effect_is_exported(run, tmp_path):
    """By a record in which half of the components by size keep it, beside one that does not."""
    before = {"gender": [0.9, 0.8, 0.7]}

    def point(share: float, kept: float) -> dict:
        after = {"gender": [b - kept * fall for b, fall in zip(before["gender"], (0.4, 0.3, 0.2), strict=True)]}
        return {"share": share, "components": round(10 * share), "before": before, "after": after}

    (tmp_path / "adapters").mkdir()
    shutil.copytree(run / "adapter", tmp_path / "adapters" / "size-0.5")
    points = {"whole": [point(1, 1)], "score": [point(0.2, 0.5), point(0.7, 1)], "size": [point(0.5, 0.95)]}
    command.copy_smallest(points, tmp_path)
    file = command.LORA_FILE
    assert (tmp_path / "sparse" / file).read_bytes() == (run / "adapter" / file).read_bytes()
    command.copy_smallest({"whole": [point(1, 1)], "score": [point(0.2, 0.5)]}, tmp_path)
    assert not (tmp_path / "sparse").exists()  # of another measurement


@pytest.mark.parametrize(
    "options,said",
    [
        ([], "run: found none, allowed: the folder of a finished run with LoRA, or --render"),
        (["/nowhere"], "/nowhere: holds no config.yaml with adapter/"),
        (["/nowhere", "--retrain", "1"], "--retrain: found 1, allowed: above 0, below 1"),
        (["/nowhere", "--batches", "1"], "--batches: found 1, allowed: 2 or more"),
        (["--render"], "no such file, allowed: one that this command has written"),
    ],
)
def test_what_cannot_be_is_one_line(options, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([*options, "--docs", str(tmp_path), "--folder", str(tmp_path / "out")])
    assert end.value.code == 2 and said in (line := capsys.readouterr().err) and line.count("\n") == 1
