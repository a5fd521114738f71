"""Several processes compute the same step as one, whatever their number, and refuse, stop and resume together."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from ranks import end, results, said, start
from rich.console import Console
from safetensors.torch import load_file
from tiny import make_trainee
from tiny_judges import uncalibrated

from fairdiff import builder, jobs
from fairdiff import start as commands
from fairdiff.diffusion.load import load_model
from fairdiff.distributed import World
from fairdiff.errors import FairDiffError
from fairdiff.lock import locked
from fairdiff.objective.balance import Balance
from fairdiff.prompts import Prompt
from fairdiff.training import trainer
from fairdiff.training.step import Batch, label_batch, pull_back_text, replay_batch, sample_batch, training_step
from fairdiff.training.tracking import read_metrics
from fairdiff.training.trainer import Schedule, train
from fairdiff.training.update import gather
from fairdiff.training.validation import Validation

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
PROMPTS = [Prompt(f"a photo of the face of a {s}", "occupation", s) for s in ("nurse", "chef", "carpenter")]
QUIET = Console(quiet=True)
ALONE = World()


@pytest.mark.parametrize("count", [0, 1, 7, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_thing_is_one_processs_and_they_are_in_order(count, size):
    items = list(range(count))
    shares = [World(rank, size).share(items) for rank in range(size)]
    assert sum(shares, []) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_exchanges_give_all_the_same(tmp_path):
    def task(world):
        tensors = [torch.full((2, 3), world.rank + 1.0), torch.arange(4.0) * world.rank]
        added = world.add_up(tensors)
        return world.gather(world.rank), world.of_first(f"of {world.rank}"), added

    for ranks, first, added in results(3, tmp_path, task):
        assert ranks == [0, 1, 2] and first == "of 0"
        assert torch.equal(added[0], torch.full((2, 3), 6.0)) and torch.equal(added[1], torch.arange(4.0) * 3)


def trainee_of(folder: Path, world: World = ALONE, **changes):
    """Return a trainee with all features that must not depend on the process: K of T steps, reference share, balance."""
    trainee = make_trainee(load_model(folder), "lora_both", attributes=("gender", "race"), evaluations=2, **changes)
    for p in trainee.adapter.parameters():
        p.data.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    trainee.world = trainee.originals.world = world
    trainee.originals.block, trainee.originals.compared = 8, 5
    trainee.balance = Balance({"align": 0.5, "image": 0.3, "face": 0.2})
    return trainee


def batch():
    return Batch(PROMPTS[0].text, [6, 1, 0, 7, 3, 2, 5, 4], 3, 0, torch.Generator().manual_seed(0))


def one_step(trainee) -> dict:
    """Return the noise and the labels of this process's images, and the summed gradient of a step."""
    rollout = sample_batch(trainee, batch())
    _, part, _ = label_batch(trainee, batch(), rollout.trajectory.final)
    result = training_step(trainee, batch())
    grads = trainee.world.add_up([p.grad for p in trainee.adapter.parameters()])
    found = {"noise": rollout.trajectory.inputs[0], "compared": part.compared, "said": vars(result)}
    found |= {f"label.{a}": label for a, label in part.labels.items()} | {f"kept.{a}": k for a, k in part.kept.items()}
    return found | {"gradient": torch.cat([g.flatten() for g in grads])}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_a_step_is_the_same_for_any_number_of_processes_and_any_micro_batch(size, tiny_folder, tmp_path):
    whole = one_step(trainee_of(tiny_folder))
    assert whole["said"]["kept"] > 0 and set(whole["said"]["grad_share"]) == {"align", "image", "face"}
    parts = results(size, tmp_path, lambda world: one_step(trainee_of(tiny_folder, world)))
    for name in (name for name in whole if name not in ("gradient", "said")):  # bit by bit
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name]), name
    for found in (one_step(trainee_of(tiny_folder, decode_batch=1, replay_batch=1)), *parts):
        assert (found["gradient"] - whole["gradient"]).norm() / whole["gradient"].norm() < 1e-5
        for name in ("terms", "grad_share", "shares"):
            assert flat(found["said"][name]) == pytest.approx(flat(whole["said"][name]), rel=1e-4)
        assert [found["said"][name] for name in ("faces", "kept")] == [whole["said"][name] for name in ("faces", "kept")]
    assert all(torch.equal(part["gradient"], parts[0]["gradient"]) for part in parts)


def test_a_process_whose_images_have_no_gradient_takes_part_with_zeros(tiny_folder, tmp_path):
    """Its all-reduce has as many tensors as that of the others, so the sum is the gradient of one process."""

    def task(world):
        trainee = trainee_of(tiny_folder, world)
        rollout = sample_batch(trainee, batch())
        grad = torch.randn(8, *trainee.model.latent_shape, generator=torch.Generator().manual_seed(0))
        grad[4:] = 0
        replay_batch(trainee, batch(), rollout, grad[world.rows(8)])
        pull_back_text(rollout)
        grads = [p.grad for p in trainee.adapter.parameters()]
        return [g is None for g in grads], torch.cat([g.flatten() for g in world.add_up([g for g in grads if g is not None])])

    (_, whole), both = task(ALONE), results(2, tmp_path, task)
    for lacks, found in both:
        assert lacks == both[0][0] and (found - whole).norm() / whole.norm() < 1e-5


def flat(table: dict) -> dict:
    lists = {k: values if isinstance(values, list) else [values] for k, values in table.items()}
    return {f"{k}.{i}": v for k, values in lists.items() for i, v in enumerate(values)}


def trained(folder: Path, out: Path, steps: int, world: World = ALONE) -> torch.Tensor:
    """Return the parameters after so many steps of a run in `out`, with a validation at the second."""
    trainee = trainee_of(folder, world)
    watch = Validation(2, PROMPTS, 6, 3, -1.0, None)
    plan = Schedule(
        steps=steps, batch=8, noise_pool=8, sampler_steps=(3, 3), learning_rate=1e-2, weight_decay=0.01, ema=0.9, seed=0,
        prompts=2, validation=watch,
    )  # fmt: skip
    train(trainee, PROMPTS, plan, out, "key", QUIET)
    world.gather("done")  # the first process has written the last checkpoint
    state = torch.load(out / "checkpoints" / "checkpoint.pt", weights_only=True)
    return torch.cat([p.flatten() for p in state["ema"]["parameters"]])


@pytest.mark.slow
def test_three_steps_and_going_on_with_another_number_of_processes(tiny_folder, tmp_path):
    start_at = torch.cat([p.detach().flatten() for p in trainee_of(tiny_folder).adapter.parameters()])
    whole = trained(tiny_folder, tmp_path / "one", 3)
    first, second = results(2, tmp_path / "a", lambda world: trained(tiny_folder, tmp_path / "two", 3, world))
    trained(tiny_folder, tmp_path / "other", 2)
    (other, *_) = results(3, tmp_path / "b", lambda world: trained(tiny_folder, tmp_path / "other", 3, world))
    assert torch.equal(first, second)
    for found in (first, other):
        assert (found - whole).norm() < 1e-3 * (whole - start_at).norm()
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two", "other")]
    for row, *others in zip(*rows, strict=True):
        for again in others:
            assert list(again) == list(row)
            numbers = {k: v for k, v in row.items() if k not in ("prompts", "seconds")}
            assert {k: again[k] for k in numbers} == pytest.approx(numbers, rel=2e-3, abs=1e-4)
    assert "validation.semantics" in rows[0][1]


@pytest.mark.slow
def test_fewer_steps_than_are_done_are_refused_by_every_process(tiny_folder, tmp_path):
    """When only the first one refused, the others waited for it."""
    trained(tiny_folder, tmp_path / "run", 2)

    def task(world):
        with pytest.raises(FairDiffError, match="steps: found 1, .* already holds 2") as caught:
            trained(tiny_folder, tmp_path / "run", 1, world)
        return str(caught.value)

    first, second = results(2, tmp_path / "a", task)
    assert first == second


def test_what_goes_wrong_in_one_process_is_refused_by_all(tiny_folder, tmp_path):
    def task(world):
        trainee = trainee_of(tiny_folder, world)
        good = trainee.perception.classifier.head.clone()

        def bad_gradient(trainee, batch):
            result = training_step(trainee, batch)
            if world.rank == 1:
                trainee.adapter.parameters()[0].grad[0] = float("nan")
            return result

        def says(update):
            grads = [p.grad for p in trainee.adapter.parameters()]
            return [len(update.good), [reason for _, reason in update.skipped], grads.count(None) == len(grads), update.norm]

        found = [says(gather(trainee, [batch()], bad_gradient))]
        if world.rank == 1:
            trainee.perception.classifier.head[0] = float("nan")
        found.append(says(gather(trainee, [batch()])))
        trainee.perception.classifier.head.copy_(good)
        return [*found, says(gather(trainee, [batch()]))]

    first, second = results(2, tmp_path, task)
    assert first == second
    gradient, logits, after = first
    assert gradient[:3] == [0, ["the gradient norm is nan"], True]
    assert logits[:3] == [0, ["the classifier's logits are not finite"], True]
    assert after[:3] == [1, [], False] and after[3] > 0


def test_other_settings_in_one_process_are_named(tmp_path):
    def child(rank):
        with jobs.started("cpu") as world:
            world.require_same("steps", lambda: str(rank))

    ended = end(start(2, tmp_path, child), tmp_path)
    assert sum("steps: found 0 in process 0 and 1 in process 1" in e.err for e in ended) == 1, said(tmp_path)


# the whole command


@pytest.fixture(scope="module")
def settings(tiny_folder, tmp_path_factory):
    """Overrides of a small run of the tiny model."""
    folder = tmp_path_factory.mktemp("settings")
    (folder / "train.txt").write_text("nurse\nchef\n")
    (folder / "test.txt").write_text("carpenter\nperson\nnurse\n")
    return [
        "steps=3", "global_batch=4", "noise_pool=4", "sampler.train_steps=[2,2]", "sampler.audit_steps=2",
        "adapter=lora_text", "audit.images_per_prompt=2", "audit.without_people=1", "audit.named=null",
        f"model.path={tiny_folder}", "detector=whole", "loss.face=null", "prompts.template='a photo of {}'",
        f"audit.judge.path={uncalibrated(folder / 'judge')}", f"cache={folder / 'cache'}",
        *(f"prompts.{name}={folder / f'{name}.txt'}" for name in ("train", "test")),
    ]  # fmt: skip


def command(settings, folder, name="train", disturb=lambda rank: None):
    """Return a task for `start` that runs the command as a launcher does, with a checkpoint after every step."""

    def child(rank):
        trainer.CHECKPOINT_EVERY = 1
        sys.argv = [f"{name}.py", *settings, f"hydra.run.dir={folder}"]
        disturb(rank)
        getattr(commands, name)()

    return child


def run(size, tmp_path, task):
    ended = end(start(size, tmp_path / "said", task), tmp_path / "said")
    return ended, said(tmp_path / "said")


def left(folder: Path) -> dict:
    """Return the output of a run by file, with its times set to 0."""
    files = [p for part in ("adapter", "audits") for p in sorted((folder / part).rglob("*")) if p.is_file()]
    found = {
        p.relative_to(folder).as_posix(): {k: t.tolist() for k, t in load_file(p).items()}
        if p.suffix == ".safetensors"
        else p.read_bytes()
        for p in files
    }
    return found | {"metrics": [row | {"seconds": 0} for row in read_metrics(folder / "metrics.jsonl")]}


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory):
    """Return the output of an uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(settings, folder, folder / "run")
    return left(folder / "run")


def finish(settings, tmp_path, folder):
    ended, text = run(2, tmp_path, command(settings, folder))
    assert [e.code for e in ended] == [0, 0] and not any(e.err for e in ended) and not ended[1].out, text
    assert ended[0].out.strip().endswith("report.html"), text


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_dies_ends_all_in_one_line_and_the_same_command_goes_on(who, settings, undisturbed, tmp_path):
    def dies(rank):
        rate = trainer.learning_rate

        def learning_rate(schedule, step):
            if rank == who and step == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return rate(schedule, step)

        trainer.learning_rate = learning_rate

    ended, text = run(2, tmp_path, command(settings, tmp_path / "run", disturb=dies))
    assert [ended[who].code, ended[1 - who].code] == [-signal.SIGKILL, 2], text
    (line,) = "".join(e.err for e in ended).splitlines()
    assert line.startswith("error: one of 2 processes has ended") and "goes on from the last checkpoint" in line, text
    finish(settings, tmp_path, tmp_path / "run")
    assert left(tmp_path / "run") == undisturbed
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize("who", [0, 1])
def test_an_error_of_one_process_is_one_line_and_code_2_of_all(who, settings, tmp_path):
    def fails(rank):
        def build_perception(*_):
            raise FairDiffError("judge.path: found x, allowed: y")

        if rank == who:
            builder.build_perception = build_perception

    ended, text = run(3, tmp_path, command(settings, tmp_path / "run", disturb=fails))
    assert [e.code for e in ended] == [2, 2, 2], text
    assert "".join(e.err for e in ended) == "error: judge.path: found x, allowed: y\n", text


def test_what_all_find_wrong_is_told_once(settings, tmp_path):
    for wrong, says in (("steps=0", "error: steps: found 0"), ("prompts.test=none.txt", "error: prompts.test")):
        ended, text = run(2, tmp_path, command([*settings, wrong], tmp_path / "run"))
        assert [e.code for e in ended] == [2, 2], text
        (line,) = "".join(e.err for e in ended).splitlines()
        assert line.startswith(says), text


def test_a_folder_that_somebody_works_in_is_refused_by_all(settings, tmp_path):
    with locked(tmp_path):
        ended, text = run(2, tmp_path, command(settings, tmp_path))
    assert [e.code for e in ended] == [2, 2] and not ended[1].err, text
    assert len(ended[0].err.splitlines()) == 1 and "works in it" in ended[0].err, text


@pytest.mark.slow
def test_an_audit_gives_the_same_files_for_any_number_of_processes(settings, tmp_path):
    for size in (1, 3):
        ended, text = run(size, tmp_path, command([*settings, "cache=null"], tmp_path / str(size), "audit"))
        assert [e.code for e in ended] == [0] * size and not any(e.err for e in ended), text
    one, three = left(tmp_path / "1"), left(tmp_path / "3")
    assert one == three and any(name.endswith("audit.json") for name in one)


def test_a_launchers_end_signal_is_one_line(settings, tmp_path):
    def ended_by_launcher(rank):
        def learning_rate(*_):
            os.kill(os.getpid(), signal.SIGTERM)
            return 0.0

        trainer.learning_rate = learning_rate

    ended, text = run(2, tmp_path, command(settings, tmp_path / "run", disturb=ended_by_launcher))
    assert {e.code for e in ended} <= {2, 130}, text
    (line,) = "".join(e.err for e in ended).splitlines()
    assert "the same command" in line, text


def test_too_small_a_batch_is_refused(settings, tmp_path):
    ended, text = run(2, tmp_path, command([*settings, "global_batch=1", "noise_pool=1"], tmp_path / "run"))
    (line,) = "".join(e.err for e in ended).splitlines()
    assert line.startswith("error: global_batch: found 1 for 2 processes"), text
