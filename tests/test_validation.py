"""The loop around the step: learning rate, averages, validation, best state, early stopping, resuming."""

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_trainer import PROMPTS, schedule
from tiny import NoFaces, composed, make_trainee

from fairdiff.diffusion.load import load_model
from fairdiff.objective.balance import Balance
from fairdiff.prompts import Prompt
from fairdiff.training import trainer
from fairdiff.training.checkpoint import Ema
from fairdiff.training.tracking import read_metrics
from fairdiff.training.trainer import learning_rate, train
from fairdiff.training.validation import Best, Validation, validate, worst_distance

QUIET = Console(quiet=True)
HELD_OUT = [Prompt(f"a photo of the face of a {s}", "occupation", s) for s in ("person",)]


def validation(**changes):
    settings = dict(every=1, prompts=HELD_OUT, images=4, sampler_steps=2, floor=-1.0, patience=None)
    return Validation(**settings | changes)


def state(trainee):
    return torch.cat([p.detach().flatten() for p in trainee.adapter.parameters()])


def run(folder, out, balance=False, stop_at=None, **changes):
    """Train in `out`; stop_at: the step at which the run is interrupted from outside."""
    trainee = make_trainee(load_model(folder), "lora_text")
    trainee.balance = Balance({"align": 0.5, "image": 0.3, "face": 0.2}) if balance else None
    if stop_at is not None:
        make = trainee.originals.get
        texts = {p.text for p in PROMPTS}
        seen = []

        def get(prompt, indices, steps):
            seen.append(prompt) if prompt in texts else None
            if len(seen) > stop_at:
                raise KeyboardInterrupt
            return make(prompt, indices, steps)

        trainee.originals.get = get
    train(trainee, PROMPTS, schedule(**changes), out, "key", QUIET)
    return state(trainee)


def rows(out):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(out / "metrics.jsonl")]


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_the_learning_rate_falls_as_named(decay):
    plan = schedule(steps=10, decay=decay, learning_rate=2.0)
    rates = [learning_rate(plan, step) for step in range(10)]
    half = {"constant": 2.0, "linear": 1.0, "cosine": 1.0}[decay]
    assert rates[0] == 2.0 and rates[5] == pytest.approx(half)
    last = {"constant": 2.0, "linear": 0.2, "cosine": 1 + math.cos(math.pi * 0.9)}[decay]
    assert rates[9] == pytest.approx(last) and last > 0


def test_the_optimiser_uses_the_scheduled_rate(tiny_folder, tmp_path, monkeypatch):
    """AdamW's first step moves every parameter by the learning rate, whatever the gradient's size."""
    for rate in (0.04, 0.004):
        monkeypatch.setattr(trainer, "learning_rate", lambda *_, rate=rate: rate)
        trainee = make_trainee(load_model(tiny_folder))
        start, plan = state(trainee), schedule(steps=1, learning_rate=0.04, weight_decay=0.0, ema=0.0)
        train(trainee, PROMPTS, plan, tmp_path / str(rate), "key", QUIET)
        assert (state(trainee) - start).abs().max().item() == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(
    "step,decay", [(0, 0.1), (8, 0.5), (59, 60 / 69), (2239, 2240 / 2249), (2240, 0.996), (9999, 0.996)]
)
def test_averages_warm_up(step, decay):
    parameter = torch.zeros(1, dtype=torch.double)
    ema = Ema([parameter], 0.996)
    parameter += 1
    ema.update(step)
    assert ema.shadow[0].item() == pytest.approx(1 - decay, abs=1e-9) and decay <= 0.996


def test_averages_in_place_give_the_parameters_back():
    parameter = torch.nn.Parameter(torch.zeros(3))
    ema = Ema([parameter], 0.5)
    parameter.data += 1 / 3
    with ema.in_place():
        assert torch.equal(parameter.data, torch.zeros(3))
    assert torch.equal(parameter.data, torch.zeros(3) + 1 / 3)


def scored(distance, semantics):
    row = {"validation.distance.gender": distance, "validation.distance.race": distance}
    return row | {"validation.semantics": semantics, "validation.bias.gender": 9.0}


def test_the_best_is_the_least_distance_that_keeps_semantics():
    best, seen = Best(), []
    for step, (distance, semantics) in enumerate([(0.5, 0.9), (0.2, 0.6), (0.4, 0.8), (0.4, 0.9), (0.1, 0.69)], 1):
        best.update(step, scored(distance, semantics), 0.7, [torch.full((2,), float(step))])
        seen.append(best.step)
    assert seen == [1, 1, 3, 3, 3]
    assert [average.tolist() for average in best.averages] == [[3, 3]]
    assert (best.step, best.score, best.misses) == (3, 0.4, 2)
    assert best.exhausted(2) and not best.exhausted(3) and not best.exhausted(None)


def test_validation_measures_by_hand_what_it_says(tiny_model):
    trainee = make_trainee(tiny_model, "lora_text", attributes=("gender", "race"))
    row = validate(trainee, validation(images=7), 0)
    assert row["validation.semantics"] == row["validation.clip_i"] == pytest.approx(1, abs=1e-4)  # LoRA starts at zero
    assert row["validation.no_face"] == 0
    assert row["validation.bias.gender"] == pytest.approx(2 * row["validation.distance.gender"])  # two classes, uniform
    assert 0 <= row["validation.distance.race"] <= 0.75
    assert row == validate(trainee, validation(images=7), 0)


def test_validation_without_any_face_has_no_shares_and_the_greatest_distance(tiny_model):
    row = validate(make_trainee(tiny_model, detector=NoFaces()), validation(), 0)
    assert row["validation.no_face"] == 1 and not [k for k in row if "bias" in k]
    assert row["validation.distance.gender"] == pytest.approx(0.5)  # all of one class, half of either is the target


def test_the_distance_takes_missing_faces_for_the_worst_class():
    half = torch.tensor([0.5, 0.5])
    assert worst_distance(torch.tensor([6, 4]), 0, half) == pytest.approx(0.1)
    assert worst_distance(torch.tensor([3, 2]), 5, half) == pytest.approx(0.3)  # 8 of 10 of the first class
    every = [worst_distance(torch.tensor([4, 4]), missing, half) for missing in range(9)]
    assert every == sorted(every) and every[0] == 0
    counts, target, missing = torch.tensor([5, 1, 2]), torch.tensor([0.2, 0.5, 0.3]), 4
    split = [torch.tensor([a, b, missing - a - b]) for a in range(5) for b in range(5 - a)]
    by_hand = max(float((((counts + m) / 12) - target).abs().sum() / 2) for m in split)
    assert worst_distance(counts, missing, target) == pytest.approx(by_hand)


def test_it_is_the_averages_that_are_validated(tiny_folder, tmp_path):
    """With floor 1.5 no step is best, so the last averages remain; validating them must give the numbers of the row."""
    trainee, watch = make_trainee(load_model(tiny_folder), "lora_text"), validation(floor=1.5)
    train(trainee, PROMPTS, schedule(steps=1, learning_rate=0.1, validation=watch), tmp_path, "key", QUIET)
    (row,) = rows(tmp_path)
    assert validate(trainee, watch, 0) == {k: v for k, v in row.items() if k.startswith("validation.")}


@pytest.mark.slow
def test_validation_never_touches_training_and_the_best_remains(tiny_folder, tmp_path):
    plain = run(tiny_folder, tmp_path / "plain", steps=3)
    watched = run(tiny_folder, tmp_path / "watched", steps=3, validation=validation())
    seen = rows(tmp_path / "watched")
    training = [{k: v for k, v in row.items() if not k.startswith("validation.")} for row in seen]
    assert training == rows(tmp_path / "plain")
    scores = [row["validation.distance.gender"] for row in seen]
    best = scores.index(min(scores))
    expected = plain if best == 2 else run(tiny_folder, tmp_path / "short", steps=best + 1)
    assert torch.equal(watched, expected)
    kept = torch.load(tmp_path / "watched/checkpoints/checkpoint.pt", weights_only=True)["best"]
    assert kept["step"] == best + 1 and torch.equal(torch.cat([t.flatten() for t in kept["averages"]]), watched)


def test_training_stops_after_patience_and_stays_stopped(tiny_folder, tmp_path):
    hopeless = validation(floor=1.5, patience=2)
    stopped = run(tiny_folder, tmp_path, steps=9, validation=hopeless)
    assert len(rows(tmp_path)) == 2
    assert torch.equal(stopped, run(tiny_folder, tmp_path, steps=9, validation=hopeless))
    assert len(rows(tmp_path)) == 2


@pytest.mark.slow
def test_an_interrupted_run_with_everything_on_ends_bit_equal(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "CHECKPOINT_EVERY", 1)
    everything = dict(steps=3, balance=True, decay="cosine", validation=validation(every=2))
    unbroken = run(tiny_folder, tmp_path / "a", **everything)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_folder, tmp_path / "b", stop_at=2, **everything)
    assert len(rows(tmp_path / "b")) == 2
    assert torch.equal(run(tiny_folder, tmp_path / "b", **everything), unbroken)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    a, b = (torch.load(tmp_path / n / "checkpoints/checkpoint.pt", weights_only=True) for n in "ab")
    averages = [state["best"].pop("averages") for state in (a, b)]
    assert averages[0] and all(map(torch.equal, *averages))
    assert a["best"] == b["best"] and a["balance"] == b["balance"] and a["balance"]["mass"] > 0


def test_the_floor_of_portraits_is_between_images_that_broke_and_those_that_did_not():
    """In the committed records of the search, a rate of 2.4e-2 breaks the images, and 240 steps of text drift too far."""
    root = Path(__file__).resolve().parent.parent / "docs" / "measurements" / "search" / "search"

    def semantics(path):
        after = json.loads(path.read_text())["models"]["after"]
        return (after["clip_i"]["mean"] + after["dino"]["mean"]) / 2

    every = {path.parent.name: semantics(path) for path in root.glob("*/seed0.json")}
    lost = [every.pop(name) for name in ("text_rate_2.4e-2", "text_240_steps")]
    assert len(every) >= 5 and max(lost) < composed().validation.floor < min(every.values())
    assert composed("model=sd15").validation.floor == 0.5  # the paper's .62 to .74 of photographs pass
