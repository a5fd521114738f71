"""Bad input gets one clear line on stderr, exit code 2, no traceback, and leaves nothing half-written."""

import copy
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tiny import composed
from tiny_judges import uncalibrated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402  (the entry script is no package)
from classifiers.calibration import CALIBRATION_FILE  # noqa: E402
from fairdiff import builder, jobs, run  # noqa: E402
from fairdiff.builder.calibration import build_confusion, not_corrected  # noqa: E402
from fairdiff.cli.main import CONF, main, to_config  # noqa: E402
from fairdiff.cli.messages import RENAMED  # noqa: E402
from fairdiff.config import PATHS  # noqa: E402
from fairdiff.config.laws import leaves  # noqa: E402
from fairdiff.errors import FairDiffError  # noqa: E402
from fairdiff.files import flat, write_text  # noqa: E402
from fairdiff.portraits import weights  # noqa: E402

# (override, what the line must name)
CASES = {
    "unknown key": (["model.pth=x"], ["model.pth", "allowed: model.path"]),
    "unknown top key": (["stepz=3"], ["stepz", "allowed: steps"]),
    "wrong type": (["steps=many"], ["steps: found many", "whole number"]),
    "null where a value is needed": (["steps=null"], ["steps"]),
    "unknown key with a plus": (["+audit.promts=3"], ["audit.promts", "allowed: audit.prompts"]),
    "new key of a mapping": (["judge=hf", "judge.mapping.height={tall: [x]}"], ["+judge.mapping.height="]),
    "new key deep in a mapping": (["judge=hf", "judge.mapping.gender.tall=[x]"], ["+judge.mapping.gender.tall="]),
    "family that is not there yet": (["prompts.families.sport=1"], ["+prompts.families.sport="]),
    "unknown group choice": (["adapter=loha"], ["adapter", "lora_text"]),
    "unknown attribute": (["attribute=[height]"], ["attribute: found height, allowed: age, gender, race"]),
    "no attribute": (["attribute=[]"], ["attribute"]),
    "bad syntax": (["steps"], ["steps"]),
    "shares do not sum to 1": (["target.gender.female=.9"], ["target.gender", "sum to 1.4"]),
    "unknown class": (["+target.gender.other=.1"], ["target.gender", "other", "female, male"]),
    "class in other letters": (["target.gender.Female=.7"], ["target.gender.Female", "allowed: target.gender.female"]),
    "a group written with a dot": (["audit.judge=hf"], ["judge@audit.judge=net, hf"]),
    "negative share": (["target.gender.female=-1", "target.gender.male=2"], ["target.gender.female", "[1e-06, 1]"]),
    "a share next to nothing": (["target.gender.female=1e-320", "target.gender.male=1"], ["target.gender.female", "1e-320"]),
    "target of an attribute that is not trained": (["+target.race.White=1"], ["target", "race", "gender"]),
    "target is no table": (["target.gender=half"], ["target.gender", "half"]),
    "target file is no text": (["target.file=[a.csv]"], ["target.file", "found ['a.csv']", "a path"]),
    "missing target file": (["target.file=nowhere.csv"], ["target.file", "nowhere.csv", "No such file"]),
    "starting adapter does not exist": (["adapter.path=./no/such"], ["adapter.path", "no/such", "no such file"]),
    "scale of no adapter": (["adapter.scale=.5"], ["adapter.scale", "0.5", "adapter.path"]),
    "zero prompts a step": (["prompts.per_step=0"], ["prompts.per_step", "greater than 0"]),
    "negative audit seed": (["audit.seed=-1"], ["audit.seed", "0 to"]),
    "no margin of equivalence": (["audit.equivalence=0"], ["audit.equivalence", "0.001 to 1"]),
    "zero steps": (["steps=0"], ["steps", "greater than 0"]),
    "pool smaller than the batch": (["noise_pool=3"], ["noise_pool", "global_batch = 24"]),
    "unknown gradient": (["gradient.type=magic"], ["gradient.type", "magic", "allowed: unit, reference, solver"]),
    "negative weight": (["loss.image=-1"], ["loss.image"]),
    "confidence out of range": (["loss.confidence=1.5"], ["loss.confidence"]),
    "share of originals and nothing else to learn": (
        ["loss.originals=.5", "loss.align=0"],
        ["loss.originals", "loss.align"],
    ),
    "share of originals out of range": (["loss.originals=0"], ["loss.originals", "(0, 1]"]),
    "bad sampler range": (["sampler.train_steps=[9,3]"], ["sampler.train_steps", "[9, 3]"]),
    "template without a gap": (["prompts.template=a photo"], ["prompts.template", "{}"]),
    "missing prompt file": (["prompts.train=nowhere.txt"], ["prompts.train", "nowhere.txt"]),
    "model folder below the home folder": (["model.path=~/no/such/model"], [f"{Path.home()}/no/such/model"]),
    "the same in marks": (["model.path='~/no/such/model'"], [f"{Path.home()}/no/such/model"]),
    "a path of each attribute below the home folder": (
        ["judge=hf", "judge.path={gender: ~/no/such}"],
        [f"{Path.home()}/no/such"],
    ),
    "prompts below the home folder": (["prompts.train=~/nowhere.txt"], [f"{Path.home()}/nowhere.txt"]),
    "spacing of no solver": (["sampler.spacing=karras"], ["sampler.spacing", "linspace, leading, trailing"]),
    "model folder does not exist": (["model.path=./no/such/model"], ["model.path", "no/such/model"]),
    "judge folder does not exist": (["judge.path=./no/such/judge"], ["judge.path", "no/such/judge"]),
    "judge of no kind": (["judge.type=clip"], ["judge.type", "net, hf, open_clip"]),
    "labels for a judge that has none to map": (["+judge.mapping.gender.female=[x]"], ["judge.mapping", "hf"]),
    "labels that are no list": (["judge=hf", "judge.mapping.gender.female=Female"], ["judge.mapping.gender", "Female"]),
    "labels that are no words": (["judge=hf", "judge.mapping.gender.female=[true]"], ["gender.female", "True (bool)"]),
    "prompts that are no words": (
        ["judge=open_clip", "judge.mapping.gender.female=[1]"],
        ["judge.mapping.gender.female", "found 1 (int)", "quote it"],
    ),
    "a phrase of a class that is no text": (
        ["attributes.gender.phrases.female=true"],
        ["attributes.gender.phrases", "words for each of female, male"],
    ),
    "hf judge without a model": (["judge=hf"], ["judge.path", "null", "gender"]),
    "a path each for a judge of one": (["judge.path={gender: x}"], ["judge.path", "judge.type=net: one path"]),
    "a path that is none": (["judge=hf", "judge.path={gender: 3}"], ["judge.path", "found 3", "a hub id"]),
    "hf judge folder does not exist": (
        ["judge=hf", "judge.path=./no/such"],
        ["judge.path", "no/such", "image classif"],
    ),
    "audit judge of an unknown tag": (
        ["judge@audit.judge=open_clip", "audit.judge.path=ViT-B-32/x"],
        ["audit.judge.path", "ViT-B-32/x", "laion2b_s34b_b79k"],
    ),
    "a class that is not in the plan": (
        ["judge=open_clip", "+judge.mapping.gender.other=[x]"],
        ["judge.mapping.gender", "other", "female, male"],
    ),
    "no bank of faces": (["features.identity=null"], ["features.identity", "null", "loss.face=null"]),
    "no such encoder": (["features.encoder=./no/such"], ["features.encoder", "no/such", "Hugging Face"]),
    "no such clip": (["features.clip=./no/such"], ["features.clip", "no/such", "open_clip_config.json"]),
    "unknown family": (["+prompts.families.animal=1"], ["prompts.families", "animal", "occupation, styled"]),
    "no family": (["~prompts.families.occupation"], ["prompts.families", "one or more families"]),
    "a family without people": (["+prompts.families.object=1"], ["prompts.families", "object", "occupation, styled"]),
    "nobody but objects": (["prompts.without_people=1"], ["prompts.without_people", "[0, 1)"]),
    "a split that is none": (["audit.split=dev"], ["audit.split", "test, validation"]),
    "negative margin of drift": (["audit.drift=-1"], ["audit.drift", "0.001 to 1"]),
    "no such device": (["model.device=gpu"], ["model.device", "found gpu", "cpu"]),
    "zero repeats": (["prompts.families.occupation=0"], ["prompts.families.occupation", "greater than 0"]),
    "sd15 without a GPU": (["model=sd15", "model.device=cuda"], ["model.device", "cuda", "cpu"]),
    "negative weight decay": (["optimizer.weight_decay=-1"], ["optimizer.weight_decay"]),
    "too many soft tokens": (["adapter=soft_tokens", "adapter.tokens=80"], ["adapter.tokens", "40"]),
    "share of the gradient below nothing": (["loss.face=-1"], ["loss.face", "found -1", "0 or more, or null"]),
    "balance of one term": (["loss.balance=face"], ["loss.balance: found face, allowed: true or false"]),
    "keys of a group at once": (["validation=5"], ["validation", "one by one"]),
    "unknown schedule": (["optimizer.schedule=step"], ["optimizer.schedule", "constant, linear, cosine"]),
    "validation that never comes": (["steps=9", "validation.every=10"], ["validation.every", "steps = 9"]),
    "validation without encoders": (["validation.every=10", "loss.image=null"], ["validation.every", "loss.image"]),
    "unknown solver": (["sampler.scheduler=pndm"], ["sampler.scheduler", "dpm, ddim, euler, unipc"]),
    "more steps than a schedule has": (["sampler.audit_steps=1000"], ["sampler.audit_steps", "1 to 999"]),
    "more training steps than that": (["sampler.train_steps=[6,1000]"], ["sampler.train_steps", "1 to 999"]),
    "a class surer than sure": (["loss.confident_class=90"], ["loss.confident_class", "0 to 1"]),
    "a group set to null": (["loss=null"], ["Config group override", "NoneType", "null is for its keys"]),
    "judge of an attribute that is none": (
        ["judge=hf", "judge.path={gender: x, rcae: y}"],
        ["judge.path", "rcae", "gender, race, age"],
    ),
    "an attribute's key misspelt": (["attributes.gender.keep_outsid=.3"], ["attributes.gender.keep_outside"]),
    "an attribute of one's own": (["attributes.glasses.classes=[a,b]"], ["attributes.glasses", "--config-dir"]),
    "an attribute of one's own, appended": (["+attributes.glasses.classes=[a,b]"], ["glasses", "--config-dir"]),
    "template that nothing is put into": (
        ["~prompts.families.occupation", "+prompts.families.styled=1", "prompts.template='{a} {}'"],
        ["prompts.template", "styled", "occupation"],
    ),
    "float32 of what is held in bfloat16": (
        ["model.dtype=bfloat16", "model.sampling_dtype=float32"],
        ["model.sampling_dtype", "float32 for both"],
    ),
    "bfloat16 of what is held in float16": (
        ["model.dtype=float16", "model.sampling_dtype=bfloat16"],
        ["model.sampling_dtype", "float16 here"],
    ),
    "float32 where auto became bfloat16": (
        ["model.dtype=auto", "model.sampling_dtype=float32"],
        ["model.sampling_dtype", "bfloat16 here"],
    ),
    "a word for a number": (["audit.fail_above=high"], ["audit.fail_above: found high, allowed: a number"]),
    "a number for yes or no": (["audit.keep_images=maybe"], ["audit.keep_images: found maybe, allowed: true or false"]),
    "a choice that there is not": (["model=sd51"], ["model: found sd51, allowed: flux, lcm, portraits, sd15"]),
    "a class that there is not": (
        ["target.gender.woman=.5"],
        ["target.gender.woman: there is no such key; allowed: target.gender.female, target.gender.male"],
    ),
    "unknown key with two pluses": (["++stepz=5"], ["stepz", "allowed: steps"]),
    "unknown key of what lies deeper": (["+audit.judge.foo=1"], ["audit.judge.foo", "allowed: audit.judge.type"]),
    "unknown key of Hydra's with a plus": (["+hydra.foo=1"], ["hydra.foo: there is no such key"]),
    "a key in other letters": (["prompts.négative=x"], ["prompts.négative", "allowed: prompts.negative"]),
    "labels of an attribute misspelt": (
        ["judge=hf", "+judge.mapping.gneder.female=[x]"],
        ["judge.mapping: found gneder, allowed: gender"],
    ),
    "an attribute twice": (["attribute=[gender,gender]"], ["attribute: found gender 2 times"]),
    "more replayed steps than there are": (
        ["gradient.evaluations=5"],
        ["gradient.evaluations: found 5", "train_steps, 4"],
    ),
    "a group chosen twice": (
        ["adapter=lora_text", "adapter=soft_tokens"],
        ["adapter: found adapter=lora_text and adapter=soft_tokens, allowed: one of them"],
    ),
    "path of a shell variable that is not set": (["adapter.path="], ["adapter.path: found an empty path", "or null"]),
    "quoted path of nothing": (["model.path=''"], ["model.path: found an empty path"]),
    "empty path of one attribute": (
        ["judge=hf", "judge.path={gender: ''}"],
        ["judge.path.gender: found an empty path"],
    ),
    "own folder of nothing": (["--config-dir="], ["--config-dir: found an empty path"]),
    "saved configuration of nothing": (["rerun="], ["rerun: found an empty path, allowed: a run folder"]),
    "saved configuration of nowhere": (["rerun=no/such"], ["rerun: no/such: found no config.yaml"]),
    "a pickle": (["--experimental-rerun=x.pickle"], ["--experimental-rerun", "any code", "rerun=<run folder>"]),
    "reference to no key": (["prompts.negative=${x}"], ["prompts.negative", "'x' not found"]),
    "a damping beyond nothing of the second attribute": (
        ["attribute=[gender,race]", "attributes.race.keep_face=2"],
        ["attributes.race.keep_face: found 2.0, allowed: 0 to 1"],
    ),
    "the same class twice": (
        ["attribute=[gender,race]", "attributes.race.classes=[a,a]"],
        ["attributes.race.classes", "two or more different names"],
    ),
    "nothing to learn from": (
        ["loss.align=0", "loss.image=null", "loss.face=0"],
        ["loss: found no weight above 0", "align, image and face"],
    ),
    "tokens of LoRA": (["adapter.tokens=5"], ["adapter.tokens: found with adapter.type=lora", "soft_tokens"]),
    "words of LoRA": (["adapter=lora_text", "adapter.initial_text=a"], ["adapter.initial_text", "with soft_tokens"]),
    "rank of soft tokens": (["adapter=soft_tokens", "adapter.rank=4"], ["adapter.rank: found with", "with lora"]),
    "parts of soft tokens": (["adapter=soft_tokens", "adapter.parts=[unet]"], ["adapter.parts", "with lora"]),
    "lora without parts": (["adapter=lora_text", "adapter.parts=[]"], ["adapter.parts", "text_encoder"]),
}


# (old override, the key or choice that its line must name)
OLD = {
    "adapter.alpha=4": "adapter.rank",
    "audit.batch_size=4": "micro_batch",
    "audit.judge=hf": "judge@audit.judge=net, hf",
    "audit.unrelated_images=4": "audit.images_per_prompt",
    "audit.unrelated_prompts=4": "audit.without_people",
    "+audit.unrelated_prompts=4": "audit.without_people",
    "audit/judge=hf": "judge@audit.judge=net, hf",
    "+audit.judge.paths.race=x": "audit.judge.path={<attribute>: <path>}",
    "checkpoint_every=4": "nothing",
    "decode_batch=4": "micro_batch",
    "++replay_batch=4": "micro_batch",
    "detector=portraits": "detector=mtcnn",
    "experiment=debias": "experiment=gender",
    "features=photos": "model=sd15",
    "gradient=solver": "gradient.type=unit, reference or solver",
    "gradient.detach=true": "nothing",
    "gradient.last=2": "nothing",
    "gradient.type=autograd": "nothing",
    "gradient.type=truncated": "nothing",
    "judge=embedded": "judge=net",
    "judge@audit.judge=embedded": "judge=net",
    "judge.paths={race: x}": "judge.path={<attribute>: <path>}",
    "+judge.paths.race=x": "judge.path={<attribute>: <path>}",
    "loss.balance.align=3": "loss.align",
    "loss.balance.face=.1": "loss.face",
    "loss.balance.image=.4": "loss.image",
    "loss.balance={align: 3, image: 1, face: 1}": "loss.align, loss.image, loss.face",
    "loss.draws=64": "nothing",
    "optimizer=adamw": "optimizer.schedule",
    "optimizer.max_grad_norm=1": "nothing",
    "optimizer.warmup=9": "optimizer.schedule",
    "prompts=occupations": "prompts.families",
    "prompts.train_limit=4": "prompts.train",
    "sampler=paper": "model=portraits or sd15",
    "target.joint=[1]": "target.file",
    "+target.joint=[1]": "target.file",
    "target.relaxation=.5": "target.<attribute>",
    "+target.relaxation=half": "target.<attribute>",
    "validation.sampler_steps=4": "sampler.audit_steps",
}  # fmt: skip


def call(overrides, folder, monkeypatch, capsys, task=train.task) -> str:
    """Run train.py's main, or another, in this process; return its one line on stderr."""
    monkeypatch.chdir(ROOT)
    quoted = [o.replace("template=a photo", "template='a photo'") for o in overrides]
    monkeypatch.setattr(sys, "argv", ["train.py", *quoted, f"hydra.run.dir={folder}", "cache=null"])
    with pytest.raises(SystemExit) as exit_info:
        task()
    captured = capsys.readouterr()
    assert exit_info.value.code == 2
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


def assert_nothing_half_written(folder: Path) -> None:
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("case", CASES)
def test_one_line_names_the_key_and_what_is_allowed(case, tmp_path, monkeypatch, capsys):
    overrides, words = CASES[case]
    monkeypatch.setattr(builder.model, "fast_dtype", lambda device: "bfloat16")  # whatever this machine can do
    line = call(overrides, tmp_path / "run", monkeypatch, capsys)
    assert all(word in line for word in words), line
    assert_nothing_half_written(tmp_path / "run")


@pytest.mark.parametrize("old", OLD)
def test_an_old_name_is_answered_by_the_new_one(old, tmp_path, monkeypatch, capsys):
    line = call([old], tmp_path / "run", monkeypatch, capsys)
    assert old.lstrip("+").removeprefix("judge@audit.").startswith(line.removeprefix("error: ").split(":")[0])
    assert OLD[old] in line.split("; in its place: ")[1], line
    assert_nothing_half_written(tmp_path / "run")


def test_every_old_name_is_tried_and_its_new_ones_are_keys():
    every = [key.split(".") for key in flat(asdict(composed()))]
    keys = {".".join(key[:length]) for key in every for length in range(1, len(key) + 1)}
    for old, new in RENAMED.items():
        assert any(tried.lstrip("+").startswith(old) for tried in OLD), old
        named = re.findall(r"(?<![\w.@/])[a-z]+(?:\.[a-z_]+)+", new)
        assert set(named) <= keys and old not in keys, (old, named)


def test_a_mistake_never_empties_a_finished_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.json").write_text('{"schema": 1, "training": "a"}')
    (tmp_path / "audits").mkdir()
    call(["resume=false", "model.path=./no/such/model"], tmp_path, monkeypatch, capsys)
    assert {p.name for p in tmp_path.iterdir()} == {"audits", "run.json"}


def test_the_docs_name_everything_that_starting_over_removes():
    page = (Path(__file__).parent.parent / "docs" / "how_to" / "resume.md").read_text(encoding="utf-8")
    sentence = page.split("This removes what the run wrote:")[1].split(". It never")[0]
    assert {name.rstrip("/") for name in re.findall("`([^`]+)`", sentence)} == set(run.OUTPUTS)


@pytest.mark.parametrize("name", run.OUTPUTS[:-1])
def test_a_folder_that_may_be_somebody_elses_is_not_emptied(name, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / name).write_text("mine")
    with pytest.raises(FairDiffError, match=f"holds {name} but no run.json, so it is left alone; choose another"):
        run.begin(tmp_path, asdict(composed("resume=false")), "a")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"notes.txt": "mine", name: "mine"}
    (tmp_path / name).unlink()
    run.begin(tmp_path, asdict(composed("resume=false")), "a")  # a note beside is left alone
    run.begin(tmp_path, asdict(composed("resume=false")), "b")  # and so is it once the folder is ours
    assert {p.name for p in tmp_path.iterdir()} == {"notes.txt", "config.yaml", "run.json"}
    assert run.read_state(tmp_path) == {"schema": 1, "training": "b"}


@pytest.fixture(scope="module")
def defaults():
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config")


def changed(cfg, key: str, value) -> str:
    """Return the error of the configuration for one changed value."""
    cfg = copy.deepcopy(cfg)
    OmegaConf.update(cfg, key, value)
    with pytest.raises(FairDiffError) as caught:
        to_config(cfg)
    return str(caught.value)


def test_every_number_of_the_configuration_is_one(defaults):
    numbers = [key for key, value in leaves(asdict(to_config(defaults))) if isinstance(value, float)]
    assert len(numbers) > 15 and "adapter.learning_rate" in numbers
    for key in numbers:
        for value in (math.nan, math.inf):
            assert changed(defaults, key, value).split(": ")[1].startswith(f"found {value}")


@pytest.mark.parametrize("key", PATHS)
def test_no_path_is_empty(key, defaults):
    for value in ("", "  "):
        assert (
            changed(defaults, key, value) == f"{key}: found an empty path, allowed: a path, or null where there is none"
        )


OWN = {  # a file of one's own experiment -> what the line says of it
    "without its first line": ("steps: 5\n", "experiment/own.yaml: its first line has to be `# @package _global_`"),
    "a key twice": ("# @package _global_\nsteps: 5\nsteps: 6\n", "experiment/own.yaml, line 3: found duplicate key steps"),
    "cut short": ("# @package _global_\nsteps: [5\n", "experiment/own.yaml, line 3: expected"),
    "no text": (b"# \xff\n", "experiment/own.yaml: cannot be read"),
    "a number": ("5\n", "experiment/own.yaml: cannot be read"),
    "an unknown key": ("# @package _global_\nstepz: 5\n", "'experiment/own'"),
    "an attribute twice": (
        "# @package _global_\ndefaults:\n  - gender\n  - override /attribute: [gender, gender]\n",
        "attribute: found gender 2 times",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OWN)
def test_a_mistake_in_a_file_of_ones_own_names_it(case, tmp_path, monkeypatch, capsys):
    text, says = OWN[case]
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "own.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    options = [f"--config-dir={tmp_path / 'own'}", "experiment=own"]
    assert says in call(options, tmp_path / "run", monkeypatch, capsys)


@pytest.mark.parametrize(
    "value", ["женщина", "niño", "日本", "don't", 'say "x"', "a photo of {}, smiling", "x;y", "\\!"]
)
def test_what_has_to_be_quoted_is_told_how(value, tmp_path, monkeypatch, capsys):
    """The message shows how to quote the value, so that the shell and Hydra read it as intended."""
    line = call([f"prompts.negative={value}"], tmp_path / "run", monkeypatch, capsys)
    (quoted,) = shlex.split(line.split("cannot be read without quotation marks; write ")[1])
    assert composed(quoted).prompts.negative == value


def test_empty_prompt_list(tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("\n\n")
    line = call([f"prompts.train={tmp_path / 'prompts.txt'}"], tmp_path / "run", monkeypatch, capsys)
    assert "prompts.txt" in line


def test_whole_prompts_are_not_put_into_the_template_unseen(tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("nurse\na photo of the face of a nurse, a person\n")
    line = call([f"prompts.train={tmp_path / 'prompts.txt'}"], tmp_path / "run", monkeypatch, capsys)
    assert "prompts.txt" in line and 'prompts.template="{}"' in line


@pytest.mark.slow
def test_a_state_that_is_none(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.json").write_text("[]")
    line = call([], tmp_path, monkeypatch, capsys)
    assert "run.json" in line and "choose another hydra.run.dir" in line


@pytest.mark.parametrize("text", ["[]", "{", '{"training": "a"}', '{"schema": 0, "training": "a"}'])
@pytest.mark.parametrize("resume", ["true", "false"])
def test_a_state_of_another_version_is_neither_gone_on_with_nor_removed(text, resume, tmp_path):
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    with pytest.raises(
        FairDiffError, match=r"run.json: is not the state of a run of this version; choose another hydra"
    ):
        run.begin(tmp_path, asdict(composed(f"resume={resume}")), "a")
    assert (tmp_path / "run.json").read_text() == text and (tmp_path / "config.yaml").read_text() == "steps: 3\n"


def test_a_run_that_begins_again_is_no_longer_finished(tmp_path):
    audit = SimpleNamespace(name="test-3x6-00000000")
    run.begin(tmp_path, asdict(composed()), "a")
    write_text(run.audit_folder(tmp_path, audit) / "report.html", "x")
    run.begin(tmp_path, asdict(composed()), "a")
    assert run.finished(tmp_path, audit)  # it goes on
    run.begin(tmp_path, asdict(composed("resume=false")), "a")
    assert not run.finished(tmp_path, audit) and run.read_state(tmp_path) == {"schema": 1, "training": "a"}


@pytest.mark.parametrize(
    "overrides,says", [([], "command goes on"), (["resume=False"], "without resume=false goes on")]
)
def test_after_an_interruption_the_advice_loses_nothing(overrides, says, tmp_path, monkeypatch, capsys):
    def interrupted(config, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["train.py", *overrides, f"hydra.run.dir={tmp_path}"])
    with pytest.raises(SystemExit) as exit_info:
        main(interrupted)()
    assert exit_info.value.code == 130 and says in capsys.readouterr().err


def test_a_full_device_is_one_line_that_says_what_takes_less(tmp_path, monkeypatch, capsys):
    def full(config, folder):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={tmp_path}"])
    with pytest.raises(SystemExit) as exit_info:
        main(full)()
    said = capsys.readouterr().err
    assert exit_info.value.code == 2 and said.count("\n") == 1
    assert "memory_gb" in said and "micro_batch" in said and "global_batch" not in said  # which would be another method


@pytest.mark.parametrize("allocate", [torch.empty, np.empty, bytearray])
def test_no_memory_left_is_one_line_that_says_what_takes_less(allocate, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={tmp_path}"])
    with pytest.raises(SystemExit) as exit_info:
        main(lambda config, folder: allocate(1 << 55))()
    said = capsys.readouterr().err
    assert exit_info.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: out of memory") and "micro_batch" in said


def test_an_error_of_ours_is_not_taken_for_one_of_memory(tmp_path, monkeypatch):
    def wrong(config, folder):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={tmp_path}"])
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        main(wrong)()


@pytest.mark.slow
def test_a_damaged_configuration_costs_the_refusal_only_its_detail(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.json").write_text('{"schema": 1, "training": "another"}')
    (tmp_path / "config.yaml").write_text("steps: [1\n")
    assert "holds a run with other settings; choose another" in call([], tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_an_adapter_of_another_kind_names_what_made_it(tmp_path, monkeypatch, capsys):
    save_file({"unet.x": torch.zeros(2)}, tmp_path / "pytorch_lora_weights.safetensors")
    made = {"options": "adapter.type=lora adapter.parts=['unet'] adapter.rank=8"}
    (tmp_path / "adapter.json").write_text(json.dumps(made))
    line = call(["adapter=soft_tokens", f"adapter.path={tmp_path}"], tmp_path / "run", monkeypatch, capsys)
    assert "soft_tokens.safetensors" in line and made["options"] in line


@pytest.mark.slow
def test_an_adapter_that_changes_nothing_is_not_audited(tmp_path, monkeypatch, capsys):
    """The adapter is new and not trained."""
    config = composed("adapter=lora_text", "cache=null")
    builder.build_adapter(config, builder.build_model(config)).save(tmp_path)
    options = ["adapter=lora_text", f"adapter.path={tmp_path}"]
    line = call(options, tmp_path / "run", monkeypatch, capsys, main(jobs.audit_job, "measure"))
    assert f"adapter.path: {tmp_path}: changes nothing in the images" in line
    assert_nothing_half_written(tmp_path / "run")


def test_a_home_folder_in_a_file_of_ones_own_is_the_home_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "experiment").mkdir()
    own = "# @package _global_\ndefaults: [gender]\nmodel: {path: ~/no/such/model}\n"
    (tmp_path / "experiment" / "own.yaml").write_text(own)
    line = call([f"--config-dir={tmp_path}", "experiment=own"], tmp_path / "run", monkeypatch, capsys)
    assert f"{Path.home()}/no/such/model" in line


def test_a_run_folder_below_the_home_folder_lies_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["train.py", "hydra.run.dir=~/runs/mine", "model.path=./no/such"])
        train.task()
    assert (tmp_path / "runs" / "mine").is_dir() and "model.path" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_weights(damage, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    shutil.copytree(weights("model"), model)
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:1000])
    line = call([f"model.path={model}"], tmp_path / "run", monkeypatch, capsys)
    assert "model.path" in line and str(model) in line
    assert_nothing_half_written(tmp_path / "run")


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"in_channels": 9}, "9 channels in and 4 out, its VAE 4"),
        ({"cross_attention_dim": 24}, "reads texts of width 24, its text encoder writes 16"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 32,
            },
            "conditioned on more than text (text_time)",
        ),
    ],
)
def test_a_model_that_paints_from_more_than_a_prompt(changes, says, tiny_folder, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    config = UNet2DConditionModel.load_config(model / "unet")
    UNet2DConditionModel.from_config({**config, **changes}).save_pretrained(model / "unet")
    line = call([f"model.path={model}"], tmp_path / "run", monkeypatch, capsys)
    assert f"model.path: {model}: its U-Net" in line and says in line


@pytest.mark.parametrize("key", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_do_not_know_of_each_other_are_refused(key, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(key, "2")
    said = call([], tmp_path / "run", monkeypatch, capsys)
    assert f"{key}: found 2, allowed: 1, or torchrun or accelerate launch" in said
    assert_nothing_half_written(tmp_path / "run")


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    "changes,arguments,says",
    [
        ({"RANK": None}, [], "RANK: found nothing, allowed: a number"),
        ({"LOCAL_RANK": "x"}, [], "LOCAL_RANK: found x, allowed: a number"),
        ({"MASTER_ADDR": None}, [], "MASTER_ADDR: 2 processes did not meet at None:1"),
        ({}, ["-m", "seed=0,1"], "--multirun: found 2 processes, allowed: 1"),
    ],
)
def test_what_a_launcher_has_to_say(changes, arguments, says, tmp_path, monkeypatch, capsys):
    for key, value in (LAUNCHED | changes).items():
        monkeypatch.delenv(key, raising=False) if value is None else monkeypatch.setenv(key, value)
    assert says in call(arguments, tmp_path / "run", monkeypatch, capsys)
    assert_nothing_half_written(tmp_path / "run")


def test_a_command_that_is_one_process_refuses_more(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    with pytest.raises(SystemExit) as stop:
        main(lambda config, folder: None)()
    assert stop.value.code == 2 and "WORLD_SIZE: found 2, allowed: 1" in capsys.readouterr().err


def test_several_processes_that_accelerate_does_not_start_are_refused(tmp_path, monkeypatch, capsys):
    """On a CPU `accelerate launch --num_processes 2` starts one process, with these in its environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "accelerate launch: has started one process" in call([], tmp_path / "run", monkeypatch, capsys)
    monkeypatch.delenv("MASTER_ADDR")  # as of --num_processes 1
    assert "steps" in call(["steps=0"], tmp_path / "run", monkeypatch, capsys)


def test_a_judge_with_other_classes(tmp_path, monkeypatch, capsys):
    judge = tmp_path / "judge"
    shutil.copytree(weights("judge"), judge)
    config = (judge / "config.json").read_text()
    assert '"female"' in config
    (judge / "config.json").write_text(config.replace('"female"', '"woman"'))
    line = call([f"judge.path={judge}"], tmp_path / "run", monkeypatch, capsys)
    assert "judge.path" in line and "woman" in line and "female" in line


YES, TEXT = ["'yes'", "'no'"], "allowed: text; quote it, for YAML reads an unquoted yes"


@pytest.mark.parametrize(
    "classes,target,mapping,says",
    [
        (["yes", "no"], YES, YES, "attributes.glasses.classes: found True (bool), "),
        (YES, ["yes", "no"], YES, "target.glasses: found True (bool), "),
        (YES, YES, ["yes", "no"], "judge.mapping.glasses: found True (bool), "),
        ([1, 2], ["'1'", "'2'"], ["'1'", "'2'"], "attributes.glasses.classes: found 1 (int), "),
        (["'1'", "'2'"], [1, 2], ["'1'", "'2'"], "target.glasses: found 1 (int), "),
        (["1e3", "010"], ["'1e3'", "'010'"], ["'1e3'", "'010'"], "attributes.glasses.classes: found 1000.0 (float), "),
        (["[a]", "b"], ["a", "b"], ["a", "b"], "attributes.glasses.classes: found ['a'] (list), "),
    ],
)
def test_what_yaml_does_not_read_as_text_is_to_be_quoted(classes, target, mapping, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "attribute").mkdir()
    (tmp_path / "attribute" / "glasses.yaml").write_text(
        "# @package _global_\n"
        f"attributes: {{glasses: {{classes: [{classes[0]}, {classes[1]}], keep_outside: 0.2, keep_face: 0.2}}}}\n"
        f"target: {{glasses: {{{target[0]}: 0.5, {target[1]}: 0.5}}}}\n"
        f"judge: {{mapping: {{glasses: {{{mapping[0]}: [x], {mapping[1]}: [y]}}}}}}\n"
    )
    own = [f"hydra.searchpath=[file://{tmp_path}]", "attribute=[glasses]", "judge=hf", "judge.path=nowhere"]
    line = call(own, tmp_path / "run", monkeypatch, capsys)
    assert line.startswith(f"error: {says}") and TEXT in line


@pytest.mark.parametrize("counts,says", [([[60, 40], [58, 42]], "cannot tell its classes apart"), ([[9, 1]], "(1, 2)")])
def test_a_judge_whose_error_cannot_be_undone_is_refused_before_training(counts, says, tmp_path, monkeypatch, capsys):
    judge = tmp_path / "judge"
    shutil.copytree(weights("audit_judge"), judge)
    known = json.loads((judge / CALIBRATION_FILE).read_text())
    known["attributes"]["gender"]["counts"] = counts
    (judge / CALIBRATION_FILE).write_text(json.dumps(known))
    line = call([f"audit.judge.path={judge}"], tmp_path / "run", monkeypatch, capsys)
    assert "audit.judge.path" in line and "gender" in line and says in line
    assert_nothing_half_written(tmp_path / "run")


@pytest.mark.parametrize(
    "overrides,says",
    [
        (["detector.expand=2.6"], "detector.expand=1.6, found 2.6"),
        (["detector.crop_size=96"], "detector.crop_size=64, found 96"),
        (["detector.input_size=80"], "detector.input_size=64, found 80"),
        (["detector=whole"], "detector.type=mtcnn, found whole"),
    ],
)
def test_a_calibration_of_other_crops_is_refused(overrides, says, tmp_path, monkeypatch, capsys):
    """A judge classifies other crops of the same faces differently, so its counted errors do not apply."""
    line = call(overrides, tmp_path / "run", monkeypatch, capsys)
    assert "audit.judge.path" in line and CALIBRATION_FILE in line and says in line
    assert_nothing_half_written(tmp_path / "run")
    assert "a calibration of these crops (scripts/calibrate.py), or audit.calibration=none" in line
    config = composed(*overrides, f"audit.judge.path={uncalibrated(tmp_path / 'judge')}")
    assert build_confusion(config, audit_judge(config)) == {} and not_corrected(config) is None  # never measured
    config = composed(*overrides, "audit.calibration=none")
    option, here = re.search(r"detector\.(\w+)=.*, found (.*)", says).groups()
    assert build_confusion(config, audit_judge(config)) == {}
    assert re.search(f"declined .*: it was measured with .*{option}=.*, not {here}", not_corrected(config))


def audit_judge(config):
    return builder.build_classifier(config.audit.judge, "audit.judge", "audit_judge", {"gender": ("female", "male")}, "cpu")


def test_a_calibration_of_the_crops_of_the_audit_is_applied():
    assert build_confusion(composed(), audit_judge(composed()))["gender"].sum() == 1500
    assert not_corrected(composed()) is None
    declined = composed("audit.calibration=none")  # of the same crops
    assert build_confusion(declined, audit_judge(declined)) == {}
    assert not_corrected(declined) == "the calibration of this judge was declined (audit.calibration=none)"


@pytest.mark.slow
def test_the_command_itself_prints_no_traceback(tmp_path):
    result = subprocess.run(
        [sys.executable, "train.py", "target.gender.female=.9", f"hydra.run.dir={tmp_path / 'run'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert [line for line in result.stderr.splitlines() if line.strip()] == [
        "error: target.gender: shares sum to 1.4, allowed: 1"
    ]


def test_an_interrupt_is_one_line(monkeypatch, capsys, tmp_path):
    def interrupted(config, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as exit_info:
        main(interrupted)()
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on from the last checkpoint\n"
