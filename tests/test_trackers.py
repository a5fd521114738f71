"""A tracker gets the rows of metrics.jsonl, shares with their targets, and images; training is not changed by it."""

import sys

import pytest
import torch
from PIL import Image
from test_trainer import PROMPTS, QUIET, schedule
from tiny import composed, make_trainee

from fairdiff import builder
from fairdiff.cli.command_line import run_name
from fairdiff.diffusion.load import load_model
from fairdiff.errors import FairDiffError
from fairdiff.plan import make_plan
from fairdiff.training import pictures, trackers
from fairdiff.training.tracking import read_metrics
from fairdiff.training.trainer import train


def trained(model, folder, steps, tracker):
    trainee = make_trainee(model, "lora_text")
    train(trainee, PROMPTS, schedule(steps=steps, tracker=tracker), folder, "f", QUIET)
    return torch.cat([p.detach().flatten() for p in trainee.adapter.parameters()])


@pytest.fixture(scope="module")
def plain(tiny_folder, tmp_path_factory):
    """Return the folder of a training of three steps without a tracker, and its parameters."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, trained(load_model(tiny_folder), folder, 3, None)


@pytest.mark.slow
def test_tensorboard_hears_every_row_and_training_is_the_same(plain, tiny_folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(load_model(tiny_folder), tmp_path / "run", 2, "tensorboard")
    tracked = trained(load_model(tiny_folder), tmp_path / "run", 3, "tensorboard")  # goes on
    assert torch.equal(plain[1], tracked)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"images": 0, "scalars": 0}).Reload()
    for key in ("loss.align", "loss.image", "grad_norm", "bias.gender"):
        points = {event.step: event.value for event in found.Scalars(key)}
        assert points == pytest.approx({row["step"]: row[key] for row in rows}, rel=1e-5), key
    for step in range(3):
        shares = [found.Scalars(f"share.gender.{cls}")[step].value for cls in ("female", "male")]
        assert sum(shares) == pytest.approx(1)
        assert abs(shares[0] - shares[1]) == pytest.approx(rows[step]["bias.gender"], abs=1e-6)
    assert {event.value for event in found.Scalars("target.gender.female")} == {0.5}
    images = found.Images("before and after")
    assert [(image.step, image.width, image.height) for image in images] == [
        (step, 16 * pictures.IMAGES, 16 * 2 * len(PROMPTS)) for step in (0, 1, 2)
    ]


def test_a_grid_shows_the_frozen_model_above_the_adapter(tiny_model):
    trainee = make_trainee(tiny_model, "lora_text")
    grids = pictures.Grids(trainee, ["a nurse", "a nurse", "a chef"], 2, 0)
    rows = grids.grid().split(16, 1)
    assert len(rows) == 4 and torch.allclose(rows[0], rows[1], atol=1e-5)  # new LoRA changes nothing
    for p in trainee.adapter.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    after = grids.grid().split(16, 1)
    assert torch.allclose(rows[0], after[0], atol=1e-5) and not torch.allclose(rows[1], after[1], atol=1e-3)


def test_a_run_keeps_a_few_grids_and_training_does_not_notice(plain, tiny_folder, tmp_path, monkeypatch):
    folder, with_grids = plain
    kept = sorted(path.name for path in (folder / "pictures").iterdir())
    assert kept == ["step_000001.png", "step_000002.png", "step_000003.png"]
    with Image.open(folder / "pictures" / kept[-1]) as image:
        assert image.size == (16 * pictures.IMAGES, 16 * 2 * len(PROMPTS))
    for row in read_metrics(folder / "metrics.jsonl"):
        shares = [row[f"share.gender.{cls}"] for cls in ("female", "male")]
        assert abs(shares[0] - shares[1]) == pytest.approx(row["bias.gender"], abs=1e-6)
        assert row["target.gender.female"] == 0.5
    monkeypatch.setattr(pictures, "due", lambda step, steps: False)
    assert torch.equal(with_grids, trained(load_model(tiny_folder), tmp_path / "without", 3, None))
    assert not (tmp_path / "without" / "pictures").exists()


@pytest.mark.parametrize(("steps", "grids"), [(1, 1), (8, 8), (120, 8), (121, 8), (10_000, 8)])
def test_a_run_has_eight_grids_or_one_for_each_step(steps, grids):
    made = [step for step in range(steps) if pictures.due(step, steps)]
    assert len(made) == grids and made[-1] == steps - 1


def test_a_tracker_that_is_not_there_is_one_line(monkeypatch):
    config = composed("tracker=wandb")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(FairDiffError, match=r"^tracker: wandb is not installed, allowed: pip install 'fairdiff\[wandb\]'"):
        builder.build_schedule(config, make_plan(config))
    with pytest.raises(FairDiffError, match="^tracker: found mlflow, allowed: tensorboard, wandb"):
        composed("tracker=mlflow")
    trackers.require_installed(None)


STARTED = """
def init({}):
    started.append({{k: v for k, v in locals().items() if v is not None}})
    return Run()

class Run:
    def finish(self): pass

started = []
finish = Run().finish
"""
SIGNATURES = {  # of their documentation, shortened
    "wandb": "entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, group=None, resume=None",
    "trackio": "project, name=None, group=None, space_id=None, config=None, resume='never'",
}


@pytest.mark.parametrize("kind", SIGNATURES)
def test_names_groups_and_tags_reach_the_tracker_and_a_run_keeps_its_identity(kind, tmp_path, monkeypatch):
    (tmp_path / f"{kind}.py").write_text(STARTED.format(SIGNATURES[kind]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, kind, raising=False)
    folder, mine = tmp_path / "a" / "b" / "c", {"project": "faces", "group": "five"}
    trackers.require_installed(kind, mine)
    for options in ({}, mine):
        with trackers.open_tracker(kind, folder, "print", 0, options):
            pass
    usual, own = sys.modules.pop(kind).started
    assert (usual["project"], own["project"], own["group"]) == ("fairdiff", "faces", "five") and "group" not in usual
    assert usual["name"] == own["name"] and usual["name"].startswith("a/b/c") and own["resume"] == "allow"
    assert kind == "trackio" or own["id"] == "print"
    for key in ("resume", "colour"):
        with pytest.raises(FairDiffError, match=f"^tracker_options: found {key}, allowed with tracker={kind}: .*project"):
            trackers.require_installed(kind, {key: 1})


def test_tensorboard_is_started_with_what_is_asked(tmp_path):
    pytest.importorskip("tensorboard")
    config = composed("tracker=tensorboard", "tracker_options={filename_suffix: .mine, flush_secs: 5}")
    options = builder.build_schedule(config, make_plan(config)).tracker_options
    assert options == {"filename_suffix": ".mine", "flush_secs": 5}
    with trackers.open_tracker("tensorboard", tmp_path, "print", 0, options) as tracker:
        tracker.log({"step": 0, "loss": 1.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert file.name.endswith(".mine") and file.stat().st_size > 0
    config = composed("tracker=tensorboard", "+tracker_options.tags=[a]")
    with pytest.raises(FairDiffError, match="^tracker_options: found tags, allowed with tracker=tensorboard: max_queue, "):
        builder.build_schedule(config, make_plan(config))


def test_options_are_a_table_of_a_tracker_and_of_no_other_run():
    for overrides, says in [
        (["tracker_options={tags: [a]}"], "found tags without a tracker, allowed: null"),
        (["tracker=tensorboard", "tracker_options=faces"], "found faces, allowed: a table, or null"),
    ]:
        with pytest.raises(FairDiffError, match=f"^tracker_options: {says}"):
            composed(*overrides)
    assert run_name(["tracker=wandb", "tracker_options={project: faces}", "+tracker_options.name=a"]) == "default"
