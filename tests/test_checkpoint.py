"""A damaged checkpoint costs ten steps and never a run; its content is checked before any of it is used."""

import copy
import io

import pytest
import torch
from full_disk import full_disk

from fairdiff.errors import FairDiffError
from fairdiff.objective.balance import Balance
from fairdiff.training import checkpoint
from fairdiff.training.validation import Best


def learner(steps: int) -> tuple[list, dict]:
    """Return two parameters and all objects with state, after some steps."""
    generator = torch.Generator().manual_seed(1)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (1, 4))]
    optimizer = torch.optim.AdamW(parameters, 0.1)
    ema, best, balance = checkpoint.Ema(parameters, 0.9), Best(), Balance({"align": 0.7, "image": 0.3})
    for step in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        ema.update(step)
        balance.factors({"align": step + 1.0, "image": 2.0})
        best.update(
            step + 1, {"validation.distance.gender": 1 / (step + 1), "validation.semantics": 1}, 0.5, ema.shadow
        )
    return parameters, {"ema": ema, "optimizer": optimizer, "best": best, "balance": balance}


def content(tree) -> object:
    """Return the states as plain values, to compare them bit by bit."""
    if isinstance(tree, torch.Tensor):
        return tree.tolist()
    if isinstance(tree, list):
        return [content(item) for item in tree]
    state = tree if isinstance(tree, dict) else tree.state_dict() if hasattr(tree, "state_dict") else None
    return tree if state is None else {key: content(item) for key, item in state.items()}


def load(folder, said=None, steps=0):
    parts = learner(steps)[1]
    return checkpoint.load(folder, "key", parts, [].append if said is None else said.append), parts


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 4 and 5."""
    for steps in (3, 4, 5):
        checkpoint.save(tmp_path, steps, "key", learner(steps)[1])
    return tmp_path


def rewrite(path, change) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def put(*path, value):
    """Return a function that sets the value at a path of keys in the state."""

    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


def nan(*path):
    def change(state):
        for key in path:
            state = state[key]
        state.view(-1)[0] = float("nan")

    return change


# a change of the state, and what the line must say of it
DAMAGES = {
    "no step": (lambda s: s.pop("step"), "the checkpoint has no step"),
    "no fingerprint": (lambda s: s.pop("fingerprint"), "the checkpoint has no fingerprint"),
    "no part": (lambda s: s.pop("balance"), "the checkpoint has no balance"),
    "no key of a part": (lambda s: s["best"].pop("misses"), "best has no misses"),
    "no term": (lambda s: s["balance"]["sums"].pop("image"), "balance.sums has no image"),
    "no moments": (lambda s: s["optimizer"]["state"][1].pop("exp_avg_sq"), "optimizer.state.1 has no exp_avg_sq"),
    "no optimiser": (put("optimizer", value=None), "optimizer is no table"),
    "no averages of the best": (put("best", "averages", value=[]), "best.averages is no list of 2"),
    "no step of the best": (put("best", "step", value=None), "best.averages is no list of 0"),
    "fewer parameters": (lambda s: s["ema"]["parameters"].pop(), "ema.parameters is no list of 2"),
    "a part of another kind": (put("ema", value=[1]), "ema is no table"),
    "negative step": (put("step", value=-4), "step is -4, expected a number from 0"),
    "half a step": (put("step", value=4.5), "step is 4.5"),
    "step of no number": (put("step", value=None), "step is None"),
    "step of yes": (put("step", value=True), "step is True"),
    "fingerprint of no text": (put("fingerprint", value=3), "fingerprint is 3, expected a text"),
    "best of no number": (put("best", "score", value="low"), "best.score is 'low'"),
    "score of nan": (put("best", "score", value=float("nan")), "best.score is nan"),
    "negative norm": (put("balance", "mass", value=-1.0), "balance.mass is -1.0"),
    "wrong shape": (put("ema", "shadow", 0, value=torch.zeros(2, 3)), "is [2, 3], expected a tensor of shape [3, 2]"),
    "a shape that would be spread": (put("ema", "parameters", 1, value=torch.zeros(1, 1)), "ema.parameters.1 is [1, 1]"),
    "shape of a moment": (put("optimizer", "state", 0, "exp_avg", value=torch.zeros(1)), "optimizer.state.0.exp_avg is [1]"),
    "shape of the best": (put("best", "averages", 1, value=torch.zeros(4)), "best.averages.1 is [4]"),
    "whole numbers": (put("ema", "shadow", 0, value=torch.zeros(3, 2).int()), "ema.shadow.0 is [3, 2]"),
    "complex numbers": (put("ema", "shadow", 0, value=torch.zeros(3, 2).cfloat()), "ema.shadow.0 is [3, 2]"),
    "no tensor": (put("ema", "shadow", 0, value=[0.0]), "ema.shadow.0 is list"),
    "nan": (nan("ema", "parameters", 0), "ema.parameters.0 holds values that are not finite"),
    "nan in a moment": (nan("optimizer", "state", 1, "exp_avg_sq"), "optimizer.state.1.exp_avg_sq holds values"),
    "nan in the best": (nan("best", "averages", 0), "best.averages.0 holds values"),
}  # fmt: skip
CUTS = {
    "emptied": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "its last byte": lambda data: data[:-1],
}
CUTS |= {"another file": lambda data: b"PNG" * 999, "no table": lambda data: saved([1, 2])}


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def damage(path, name) -> str:
    """Damage a checkpoint, and return the words that the error must contain."""
    if name in CUTS:
        path.write_bytes(CUTS[name](path.read_bytes()))
        return "is no checkpoint" if name == "no table" else "cannot be read ("
    rewrite(path, DAMAGES[name][0])
    return DAMAGES[name][1]


def test_what_was_saved_comes_back_whatever_the_parts_held(folder):
    for steps in (0, 2, 9):
        step, parts = load(folder, steps=steps)
        assert step == 5 and content(parts) == content(learner(5)[1])


def test_before_anything_was_learnt_there_is_nothing_to_remember(tmp_path):
    checkpoint.save(tmp_path, 0, "key", learner(0)[1])
    step, parts = load(tmp_path, steps=3)
    assert step == 0 and content(parts) == content(learner(0)[1])


@pytest.mark.parametrize("name", [*DAMAGES, *CUTS])
def test_of_a_damaged_checkpoint_the_one_before_it_is_taken_and_that_is_said(name, folder):
    says, said = damage(folder / checkpoint.NAME, name), []
    step, parts = load(folder, said)
    assert step == 4 and content(parts) == content(learner(4)[1])
    (line,) = said
    assert line.startswith(f"warning: {folder / checkpoint.NAME}: ") and says in line and "\n" not in line
    assert line.endswith("the checkpoint before it is taken, of step 4")
    said.clear()
    assert load(folder, said)[0] == 4 and not said  # a save does not keep the damaged one in place of the good one


@pytest.mark.parametrize("name", ["nan", "cut short", "no step"])
def test_without_a_good_one_nothing_is_taken(name, folder):
    says = damage(folder / checkpoint.NAME, name)
    damage(folder / checkpoint.PREVIOUS, "emptied")
    parts = learner(2)[1]
    with pytest.raises(FairDiffError) as caught:
        checkpoint.load(folder, "key", parts, [].append)
    said = str(caught.value)
    assert says in said and f"{folder / checkpoint.PREVIOUS}: cannot be read" in said and "resume=false" in said
    assert content(parts) == content(learner(2)[1])
    (folder / checkpoint.PREVIOUS).unlink()
    with pytest.raises(FairDiffError, match="checkpoint.pt: .*; start over with resume=false"):
        load(folder)


def test_a_parameter_without_a_gradient_has_no_moments(folder):
    rewrite(folder / checkpoint.NAME, lambda s: s["optimizer"]["state"].pop(1))
    said = []
    step, parts = load(folder, said)
    assert step == 5 and list(parts["optimizer"].state_dict()["state"]) == [0] and not said


def test_another_runs_checkpoint_is_not_taken_for_a_damaged_one(folder):
    with pytest.raises(FairDiffError, match="other settings"):
        checkpoint.load(folder, "another key", learner(0)[1], [].append)


def test_killed_between_two_names_the_one_before_is_there(folder):
    (folder / checkpoint.NAME).unlink()
    said = []
    assert load(folder, said)[0] == 4 and not said


def test_settings_are_the_runs_own_and_not_the_files(folder):
    rewrite(folder / checkpoint.NAME, lambda s: s["optimizer"]["param_groups"][0].update(weight_decay=float("nan")))
    _, parts = load(folder)
    assert content(parts) == content(learner(5)[1])


def test_a_full_disk_leaves_both_checkpoints_as_they_were(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    parts = copy.deepcopy(learner(6)[1])
    for room in (0, 10, len(before[checkpoint.NAME]) // 2, len(before[checkpoint.NAME]) - 1):
        with full_disk(room), pytest.raises(FairDiffError, match="checkpoint.pt: cannot be written"):
            checkpoint.save(folder, 6, "key", parts)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    checkpoint.save(folder, 6, "key", parts)
    assert load(folder)[0] == 6 and (folder / checkpoint.PREVIOUS).read_bytes() == before[checkpoint.NAME]
