"""Noisy training judges: which labels are flipped, what the page says of intervals, and the command from end to end."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_judges import audit_settings

from classifiers.detect import WholeImage
from fairdiff.audit.records import load_records
from fairdiff.cli.compose import saved

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import judge_noise as command  # noqa: E402
from harness import judge_noise_page, noisy_judges  # noqa: E402
from harness.judge_noise_page import conclusions, estimate, falls, key_of, page, worse  # noqa: E402
from harness.noisy_judges import KINDS, flipped  # noqa: E402


@pytest.fixture(scope="module")
def labels() -> dict[str, np.ndarray]:
    """Return the labels of 3000 faces, a sixth of which are in the smaller group."""
    rng = np.random.default_rng(0)
    return {"gender": rng.integers(0, 2, 3000), "race": rng.choice(4, 3000, p=[0.4, 1 / 6, 0.2, 0.4 - 1 / 6])}


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_share_is_flipped_where_the_kind_says_and_more_noise_keeps_what_was_wrong(labels, kind):
    true_N, group_N, wrong = labels["gender"], labels["race"] == 1, {}
    for rate in (0.0, 0.1, 0.2, 0.4):
        wrong_N = wrong[rate] = flipped(labels, kind, rate, 3) != true_N
        assert abs(wrong_N.sum() - rate * len(true_N)) <= 2  # of four kinds of faces each is rounded
        for gender in (0, 1):
            own = true_N == gender
            wanted = {"only female": (gender == 0) / own.mean(), "only male": (gender == 1) / own.mean()}.get(kind, 1) * rate
            assert abs(wrong_N[own].sum() - wanted * own.sum()) <= 3 if kind != "by group" else True
        in_group = 1.5 * rate if kind == "by group" else None
        assert in_group is None or abs(wrong_N[group_N].sum() - in_group * group_N.sum()) <= 1
    assert all((wrong[high] >= wrong[low]).all() for low, high in ((0.1, 0.2), (0.2, 0.4))) and not wrong[0.0].any()
    assert ((flipped(labels, kind, 0.2, 4) != true_N) != wrong[0.2]).any()  # another seed, other faces


def cell(before: list[float], after: list[float], **more: object) -> dict:
    """Return the record of one training."""
    race = {"before": [0.5, 0.4, 0.6], "after": [0.52, 0.4, 0.61]}
    right = {"all": [95, 100], "Black": [15, 17], "other races": [80, 83], "female": [48, 50], "male": [47, 50]}
    rates = {"before": [0.02, 0.01, 0.04], "after": [0.05, 0.03, 0.08]}
    return {
        "judge": {"wrong": 0.2, "faces": 400, "right": right, "sure": 0.8},
        "run": {"faces": 200, "kept": 150, "steps": 20},
        "bias": {"gender": {"before": before, "after": after}, "race": race},
        "floor": 0.1, "low_confidence": rates, "no_face": rates, "dino": 0.9, "size": [3, 20], "judges_differ": True,
    } | more  # fmt: skip


def record_of(cells: dict[str, dict]) -> dict:
    settings = [*judge_noise_page.AUDIT, "adapter=lora_text"]
    return {"about": {"renders": "r", "settings": settings, "judge_steps": 700, "steps": 20}, "cells": cells}


BEFORE = [0.7, 0.8, 0.6]
CLEAN = [0.2, 0.3, 0.1]


def moved(by: float, spread: float = 0.01) -> list[float]:
    """Return the bias after, larger than with the clean judge by `by`, plus minus the spread."""
    return [value + by + d for value, d in zip(CLEAN, (-spread, 0.0, spread), strict=True)]


def test_the_words_follow_the_intervals():
    assert falls((-0.3, (-0.5, -0.1))) == "yes" and falls((0.3, (0.1, 0.5))) == "no, higher"
    assert falls((-0.1, (-0.3, 0.1))) == falls(None) == falls((-0.1, (np.nan, np.nan))) == "cannot tell"
    assert worse((0.2, (0.1, 0.3))) == "yes" and worse((0.0, (-0.05, 0.05))) == "not by 0.1"
    assert worse((0.05, (-0.1, 0.2))) == worse(None) == "cannot tell"
    mean, (low, high) = estimate([np.array([0.1, 0.2, np.nan]), np.array([0.3, 0.4, 0.5])])
    assert mean == pytest.approx(0.25) and low < 0.15 and high > 0.35  # over seeds too; a prompt without a face is left out


def test_the_conclusion_says_up_to_where_bias_falls_and_from_where_it_is_worse():
    cells = {key_of("none", 0, 0): cell(BEFORE, CLEAN)}
    for rate, by, spread in ((0.1, 0.0, 0.01), (0.2, 0.2, 0.01), (0.3, 0.5, 0.4)):
        cells[key_of("uniform", rate, 0)] = cell(BEFORE, moved(by, spread))
    first, words, seed = conclusions(record_of(cells))
    assert first.startswith("The adapter of the clean judge lowers bias: −0.500")
    assert "Up to 20\u00a0% bias is certainly lower than before." in words
    assert "Up to 10\u00a0% it is certainly less than 0.1 above that of the clean judge." in words
    assert words.endswith("It is certainly above it at 20\u00a0%.") and seed.startswith("Each rate has one training")
    cells = {key: kept for key, kept in cells.items() if "0.1" not in key and "0.2" not in key}
    assert "Already at 30\u00a0% it cannot be said that bias is certainly lower" in conclusions(record_of(cells))[1]
    both = {key.removesuffix("0") + "1": kept for key, kept in cells.items()} | cells
    assert not any("one training" in line for line in conclusions(record_of(both)))
    alone = conclusions(record_of({key_of("only male", 0.1, 2): cell(BEFORE, moved(0.0))}))
    assert "clean judge" not in alone[0] and "the most that was measured" in alone[0]


def test_the_page_draws_every_noise_between_before_and_the_clean_judge():
    cells = {key_of("none", 0, 0): cell(BEFORE, CLEAN), key_of("uniform", 0.4, 0): cell(BEFORE, moved(0.2))}
    made = page(record_of(cells | {key_of("only male", 0.2, 0): cell(BEFORE, moved(0.1))}))
    words, method, judges, generator, others = made.sections
    assert [row[0] for row in generator.rows] == ["none", "20\u00a0%, only male", "40\u00a0%, uniform"]
    assert generator.rows[0][5:] == ["–", "–"] and generator.rows[2][4:] == ["yes", "+0.200 [0.175, 0.225]", "yes"]
    assert generator.rows[0][1:3] == ["1", "0.200 [0.000, 0.448]"]  # no end of a bias is below 0
    (chart,) = generator.charts
    for name in ("only male", "uniform", "before", "with the clean judge"):
        assert f">{name}</text>" in chart
    assert chart.count("<circle") == 4 + 2 + 2 + 2 + 2 and "wrong labels of the training judge" in chart
    assert judges.rows[0][2].startswith("0.950 [") and others.rows[0][1].startswith("+0.010")
    options = "--rates 0 0.2 --kinds 'only male'", "--rates 0 0.4"
    commands = [f"python scripts/judge_noise.py {some} --set adapter=lora_text" for some in options]
    assert made.written_by == "; ".join(commands)


@pytest.fixture(scope="module")
def renders(tmp_path_factory) -> Path:
    """A shard of 150 pictures: people whose gender is the brightness of one side, and one without people."""
    rng = np.random.default_rng(0)
    gender, folder = rng.integers(0, 2, 150), tmp_path_factory.mktemp("renders")
    image = rng.integers(0, 80, (150, 64, 64, 3))
    image[:, :, 32:] += (gender * 90)[:, None, None, None]
    columns = {"race": np.arange(150) % 4, "age": rng.integers(0, 2, 150), "person": np.arange(150)}
    columns |= {"split": np.arange(150) % 5 == 0}
    gender[-1] = -1
    np.savez(folder / "shard_00000.npz", image=image.astype(np.uint8), gender=gender, **columns)
    return folder


@pytest.mark.slow
def test_noisy_judges_train_and_the_clean_one_audits_and_going_on_trains_nothing_again(
    renders, tiny_folder, tmp_path, monkeypatch, capfd
):
    settings = audit_settings(tiny_folder, tmp_path)
    settings += ["global_batch=4", "noise_pool=4", "sampler.train_steps=[2,2]", "loss.confidence=.5", "adapter.rank=2"]
    settings += ["adapter.learning_rate=1e-2", "loss.face=null", "validation.every=null", "audit.named=1"]
    ask = ["--rates", "0.4", "0", "--steps", "2", "--judge-steps", "2", "--renders", str(renders), "--set", *settings]
    ask += ["--docs", str(tmp_path / "docs"), "--folder", str(tmp_path / "out")]
    calls, own, fits = [], command.train_job, []
    fit = noisy_judges.fit
    monkeypatch.setattr(noisy_judges, "fit", lambda *args, **more: fits.append(args[2]["gender"]) or fit(*args, **more))

    def interrupt(config, folder):
        calls.append(folder)
        own(config, folder)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "train_job", interrupt)
    with pytest.raises(SystemExit) as end:
        command.main(ask)
    assert end.value.code == 130 and "the same command goes on" in capfd.readouterr().err and len(fits) == 2
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.safetensors")}
    command.main(ask)
    assert len(calls) == 3 and calls[1] == calls[2] and len(fits) == 2  # of the clean cell nothing was asked again
    assert files == {file: file.stat().st_mtime_ns for file in files}

    found = json.loads((tmp_path / "docs" / "measurements" / "studies" / "judge_noise.json").read_text("utf-8"))
    clean, noisy = (found["cells"][key] for key in ("none/0/0", "uniform/0.4/0"))
    wrong = noisy["judge"]["wrong"]
    assert clean["judge"]["wrong"] == 0 and (fits[0] != fits[1]).mean() == wrong == pytest.approx(0.4, abs=0.04)
    runs = calls[0], calls[1]
    paths = [Path(saved(run / "config.yaml", []).judge.path) for run in runs]
    weights = [(path / "model.safetensors").read_bytes() for path in paths]
    adapters = [next((run / "adapter").glob("*.safetensors")).read_bytes() for run in runs]
    assert weights[0] != weights[1] and adapters[0] != adapters[1]  # another judge, another adapter
    records = [load_records(next(run.glob("audits/*/records.parquet"))) for run in runs]
    assert records[0].judge_hash.nunique() == 1 and (records[0].judge_hash == records[1].judge_hash).all()
    assert clean["judges_differ"] and noisy["judges_differ"]  # no audit by the judge that trained
    assert clean["bias"]["gender"]["before"] == noisy["bias"]["gender"]["before"]
    assert set(noisy["bias"]) == {"gender", "race", "age"} and noisy["run"]["steps"] == 2
    assert "| 40\u00a0%, uniform |" in (tmp_path / "docs" / "studies" / "judge_noise.md").read_text("utf-8")
    assert "<svg" in (tmp_path / "out" / "judge_noise.html").read_text("utf-8")
    with pytest.raises(SystemExit):
        command.main([*ask, "--judge-steps", "3"])
    assert "holds cells of judge_steps 2, found 3, allowed: the same" in capfd.readouterr().err


@pytest.mark.parametrize(
    "options,said",
    [
        (["--rates", "0.5"], "--rates: found 0.5, allowed: from 0, below 0.5"),
        (["--seeds", "-1"], "--seeds: found -1, allowed: 0 or more"),
        (["--judge-steps", "0"], "--judge-steps: found 0, allowed: 1 or more"),
        (["--renders", "/nowhere"], "--renders: found no shards in /nowhere, allowed: a folder of"),
        (["--render"], "no such file, allowed: one that this command has written"),
        (["--set", "judge.path=x"], "--set: found judge.path=x, allowed: settings but judge.path, seed, hydra.run.dir"),
    ],
)
def test_what_cannot_be_is_one_line(options, said, renders, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--renders", str(renders), *options, "--docs", str(tmp_path), "--folder", str(tmp_path / "out")])
    assert end.value.code == 2 and said in (line := capsys.readouterr().err) and line.count("\n") == 1


def test_renders_with_too_few_faces_are_one_line(renders, tmp_path):
    with np.load(renders / "shard_00000.npz") as shard:
        columns = {name: shard[name] for name in shard.files}
    np.savez(tmp_path / "shard_00000.npz", **(columns | {"split": np.ones(150, int)}))
    with pytest.raises(command.FairDiffError, match="0 faces to train, allowed: faces of both genders"):
        noisy_judges.read_faces(tmp_path, WholeImage())
