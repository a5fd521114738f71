"""Tiny judges and encoders for photographs from the configuration: they work, differ, and have different keys."""

import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from test_main_job import launch
from tiny_judges import change_tensor, save_dinov2, save_open_clip, save_vit

from classifiers.hub import HubClassifier
from classifiers.zeroshot import ZeroShotClassifier
from fairdiff import builder
from fairdiff.builder.audit import build_audit
from fairdiff.cli.main import CONF, to_config
from fairdiff.errors import FairDiffError
from fairdiff.objective.features import ClipEncoder, HubEncoder
from fairdiff.plan import make_plan
from fairdiff.portraits import weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    (root / "clip").mkdir()
    return {
        "judge": save_vit(root / "judge", ["Female", "Male"]), "clip": save_open_clip(root / "clip"),
        "encoder": save_dinov2(root / "encoder"),
    }  # fmt: skip


@pytest.fixture
def configure(folders, tiny_folder):
    def configure(*overrides):
        given = [
            "model=sd15", f"model.path={tiny_folder}", "model.device=cpu", "detector=whole", "adapter.tokens=2",
            "adapter.initial_text=a photo", f"judge.path={folders['judge']}", f"audit.judge.path={folders['clip']}",
            f"features.clip={folders['clip']}", f"features.encoder={folders['encoder']}",
            f"features.identity={weights('identity')}",
        ]  # fmt: skip
        with initialize_config_dir(CONF, version_base="1.3"):
            return to_config(compose("config", [*given, *overrides]))

    return configure


def test_judges_for_photographs_look_with_gradient(configure):
    config = configure()
    perception = builder.build_perception(config, make_plan(config))
    assert isinstance(perception.classifier, HubClassifier) and isinstance(perception.encoders[1], HubEncoder)
    image = torch.rand(2, 3, 60, 60, generator=torch.Generator().manual_seed(0)).requires_grad_()
    seen, features = perception.classify_faces(image), perception.features(image)
    assert seen.logits["gender"].shape == (2, 2) and [f.shape for f in features] == [(2, 16), (2, 16)]
    for value in (seen.logits["gender"][0, 0], features[0][0, 0], features[1][0, 0]):
        grad = torch.autograd.grad(value, image, retain_graph=True)[0]
        assert grad[0].abs().sum() > 0 and grad[1].abs().sum() == 0


@pytest.mark.parametrize(
    "other",
    [
        "judge.mapping.gender={female:[Male],male:[Female]}",
        "judge=open_clip",
        "features.encoder=embedded",
        "features.clip=embedded",
    ],
)
def test_who_looks_is_part_of_the_key_of_the_originals(configure, folders, other):
    overrides = [other] + ([f"judge.path={folders['clip']}"] if other == "judge=open_clip" else [])
    config, changed = configure(), configure(*overrides)
    model = builder.build_model(config)
    perceptions = [builder.build_perception(c, make_plan(c)) for c in (config, config, changed)]
    keys = [builder.originals_fingerprint(c, model, p) for c, p in zip((config, config, changed), perceptions, strict=True)]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    "other", ["audit.judge.mapping.gender.male=[a bearded person]", "judge@audit.judge=hf", "features.encoder=embedded"]
)
def test_who_looks_is_part_of_the_key_of_the_audit(configure, folders, other):
    overrides = [other] + ([f"audit.judge.path={folders['judge']}"] if other == "judge@audit.judge=hf" else [])
    config, changed = configure(), configure(*overrides)
    model = builder.build_model(config)
    judge = builder.build_perception(config, make_plan(config)).classifier
    audits = [build_audit(c, make_plan(c), model, None, judge) for c in (config, changed)]
    assert audits[0].plan.hashes["judge"] != audits[1].plan.hashes["judge"]
    assert isinstance(audits[0].measurer.judge, ZeroShotClassifier)
    assert [a.spec.judge["same_as_training_judge"] for a in audits] == [False, other == "judge@audit.judge=hf"]
    assert audits[0].spec.judge["path"] == f"open_clip: {folders['clip']}"
    assert audits[0].name != audits[1].name  # so that neither writes over the other


def test_the_encoder_sees_the_whole_picture(folders):
    """A mark in the corner that a centre crop would cut off moves the features."""
    encoder = HubEncoder(folders["encoder"])
    image = torch.full((1, 3, 64, 64), 0.5)
    marked = image.clone()
    marked[..., :3, :3] = 1
    assert encoder.pixels.size == (28, 28) and encoder.pixels.crop is None
    assert not torch.allclose(encoder.image(image), encoder.image(marked), atol=1e-6)
    assert encoder.image(image).norm() == pytest.approx(1)


def test_clip_and_encoder_paths_that_are_none_are_one_line(tmp_path):
    with pytest.raises(FairDiffError, match="^features.clip: path: found .*nowhere, allowed: a folder"):
        ClipEncoder(tmp_path / "nowhere")
    with pytest.raises(FairDiffError, match="^features.encoder: found .*nowhere, allowed: a folder or hub id") as error:
        HubEncoder(str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)


def test_what_else_makes_an_encoder_is_part_of_its_key(tmp_path):
    """The same weights with another activation have another key."""
    for name in ("clip", "other clip"):
        (tmp_path / name).mkdir()
        save_open_clip(tmp_path / name)
    about = tmp_path / "other clip" / "open_clip_config.json"
    about.write_text(about.read_text().replace('"embed_dim"', '"quick_gelu": true, "embed_dim"'))
    clips = [ClipEncoder(tmp_path / name) for name in ("clip", "clip", "other clip")]
    assert clips[0].config == clips[1].config != clips[2].config
    save_dinov2(tmp_path / "dino")
    one = HubEncoder(str(tmp_path / "dino"))
    about = tmp_path / "dino" / "config.json"
    about.write_text(about.read_text().replace('"gelu"', '"relu"'))
    assert one.config != HubEncoder(str(tmp_path / "dino")).config


@pytest.mark.parametrize("path,quick", [("ViT-B-32/openai", True), ("ViT-B-32/laion2b_s34b_b79k", False)])
def test_weights_get_the_activation_they_were_trained_with(path, quick, monkeypatch):
    requested = {}

    def instead_of_a_download(name, **options):
        requested.update(options)
        raise OSError("no network here")

    monkeypatch.setattr("open_clip.create_model", instead_of_a_download)
    with pytest.raises(FairDiffError, match="no network here"):
        ClipEncoder(path)
    assert requested["force_quick_gelu"] is quick


def test_audits_of_another_size_never_overwrite_what_others_share(configure):
    def shared(*overrides):
        config = configure(*overrides)
        return build_audit(config, make_plan(config), builder.build_model(config), None, None).plan.shared

    assert shared() == shared("audit.prompts=3", "micro_batch=5")
    assert len({shared(), shared("audit.images_per_prompt=160"), shared("audit.seed=1")}) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=gender_race_age", "loss.face=null"],
        [
            "experiment=race", "target.file=labour", "judge=open_clip", "judge.path={clip}", "judge@audit.judge=hf",
            "audit.judge.path={race}",
        ],
        ["experiment=gender_tokens", "validation.every=1", "validation.prompts=2", "prompts.negative=hat"],
    ],
)  # fmt: skip
def test_the_whole_command_for_photographs_trains_audits_and_saves(overrides, folders, tiny_folder, tmp_path, monkeypatch):
    """train.py model=sd15 as the README has it, with tiny random weights in the formats of the real ones."""
    labels = ["Female", "Male"]
    races = ["White", "Black", "Indian", "East Asian", "Southeast Asian", "Middle Eastern", "Latino_Hispanic"]
    ages = ["0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70"]
    own = {"gender": labels, "race": races, "age": ages}
    judges = {name: save_vit(tmp_path / name, its) for name, its in own.items()}
    for path in judges.values():  # so unsure that any two agree as far as they know
        change_tensor(Path(path) / "model.safetensors", "classifier.weight", lambda t: t * 1e-2)
    (tmp_path / "clip").mkdir()
    clip = save_open_clip(tmp_path / "clip")
    change_tensor(Path(clip) / "open_clip_model.safetensors", "logit_scale", torch.zeros_like)
    judge = "judge.path={" + ",".join(f"{name}:'{path}'" for name, path in judges.items()) + "}"
    more = [o.replace("{clip}", clip).replace("{race}", judges["race"]) for o in overrides]
    tokens = "experiment=gender_tokens" in overrides
    size = ["adapter.tokens=2", "adapter.initial_text=a photo"] if tokens else ["adapter.rank=4"]
    monkeypatch.setattr(sys, "argv", ["train.py"])
    launch(
        tmp_path / "run", "model=sd15", f"model.path={tiny_folder}", "model.device=cpu", "detector=whole", judge,
        f"audit.judge.path={clip}", f"features.clip={folders['clip']}",
        f"features.encoder={folders['encoder']}", f"features.identity={weights('identity')}", "loss.confidence=.5",
        "adapter.learning_rate=1e-2", *size, *more,
    )  # fmt: skip
    (folder,) = (tmp_path / "run" / "audits").iterdir()
    assert (folder / "report.html").exists() and list((tmp_path / "run" / "adapter").glob("*.safetensors"))
    audit = json.loads((folder / "audit.json").read_text())
    records = pd.read_parquet(folder / "records.parquet")
    for name in audit["models"]["after"]["attributes"]:
        requested = records[[c for c in records if c.startswith(f"p.{name}.")]]
        assert requested.shape[1] > 1 and (requested.sum(axis=1) - 1).abs().max() < 1e-2
        entry = audit["models"]["after"]["attributes"][name]
        low, high = entry["bias"]["ci95_these"]
        assert 0 <= low <= entry["bias"]["mean"] <= high <= 1
    before, after = (records[records.model == model] for model in ("before", "after"))
    assert len(before) == len(after) > 0


def test_an_attribute_of_ones_own_is_a_file_in_ones_own_folder(folders, tmp_path, tiny_folder):
    """The steps are those of the tutorial."""
    text = (Path(CONF).parent / "docs" / "tutorials" / "own_attribute.md").read_text()
    block = re.search(r'```yaml title="own/attribute/glasses.yaml"\n(.*?)```', text, re.S)
    (tmp_path / "own" / "attribute").mkdir(parents=True)
    (tmp_path / "own" / "attribute" / "glasses.yaml").write_text(block[1])
    judge = save_vit(tmp_path / "judge", ["Glasses", "No glasses"])
    given = [
        f"hydra.searchpath=[file://{tmp_path / 'own'}]", "model=sd15", "attribute=[gender,glasses]", "model.device=cpu",
        f"model.path={tiny_folder}", f"judge.path={{gender:'{folders['judge']}',glasses:'{judge}'}}", "detector=whole",
        f"audit.judge.path={folders['clip']}", f"features.clip={folders['clip']}", f"features.encoder={folders['encoder']}",
        "loss.face=null", "adapter.tokens=2", "adapter.initial_text=a photo", "target.glasses={with:.2,without:.8}",
    ]  # fmt: skip
    with initialize_config_dir(CONF, version_base="1.3"):
        config = to_config(compose("config", given))
    plan = make_plan(config)
    perception = builder.build_perception(config, plan)
    image = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    logits = perception.classify_faces(image).logits
    assert {name: found.shape for name, found in logits.items()} == {"gender": (3, 2), "glasses": (3, 2)}
    audit = build_audit(config, plan, builder.build_model(config), None, perception.classifier)
    assert audit.measurer.judge.attributes["glasses"] == ("with", "without")
