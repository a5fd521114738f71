"""One step and the loop: micro-batches, literal autograd, terms, resuming, invalid batches."""

import io
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from full_disk import full_disk
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import NoFaces, make_trainee

from fairdiff import fingerprint
from fairdiff.diffusion.load import load_model
from fairdiff.errors import FairDiffError
from fairdiff.prompts import Prompt
from fairdiff.training import trainer
from fairdiff.training.step import Batch, training_step
from fairdiff.training.tracking import Metrics, progress, read_metrics
from fairdiff.training.trainer import Schedule, draw_batches, require_effect, slice_steps, train
from fairdiff.training.update import skip_reason

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from benchmark.literal import autograd_step  # noqa: E402

PROMPTS = [Prompt(f"a photo of the face of a {s}", "occupation", s) for s in ("nurse", "chef", "carpenter")]
QUIET = Console(quiet=True)


def schedule(**changes):
    settings = dict(
        steps=4, batch=8, noise_pool=8, sampler_steps=(3, 4), learning_rate=1e-2, weight_decay=0.01, ema=0.9, seed=0
    )
    return Schedule(**settings | changes)


def gradient(model, kind, step=training_step, **changes):
    trainee = make_trainee(model, kind, **changes)
    for p in trainee.adapter.parameters():
        p.data.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    result = step(trainee, draw_batches(PROMPTS, schedule(), 0)[0])
    grad = torch.cat([p.grad.flatten() for p in trainee.adapter.parameters()])
    return grad, result


@pytest.mark.parametrize("kind", ["soft_tokens", "lora_both"])
@pytest.mark.parametrize("attributes", [("gender",), ("gender", "race")])
def test_micro_batches_of_any_size_give_the_same_step(tiny_folder, kind, attributes):
    whole, result = gradient(load_model(tiny_folder), kind, attributes=attributes)
    parts, parted = gradient(load_model(tiny_folder), kind, attributes=attributes, decode_batch=3, replay_batch=5)
    assert result.kept > 0 and whole.norm() > 0
    assert torch.allclose(whole, parts, rtol=1e-3, atol=1e-6 * whole.abs().max())
    assert result.terms == pytest.approx(parted.terms, rel=1e-4)


@pytest.mark.parametrize("kind", ["soft_tokens", "lora_text", "lora_unet"])
def test_a_step_equals_the_literal_loop_with_detached_inputs(tiny_folder, kind):
    ours, _ = gradient(load_model(tiny_folder), kind, gradient="solver")
    literal, _ = gradient(load_model(tiny_folder), kind, partial(autograd_step, detach=True))
    assert (ours - literal).norm() / literal.norm() < 1e-4


def test_weight_zero_measures_and_none_leaves_out(tiny_folder):
    both, result = gradient(load_model(tiny_folder), "soft_tokens", image=0.0, face=0.0)
    absent, without = gradient(load_model(tiny_folder), "soft_tokens", image=None, face=None)
    assert set(result.terms) == {"align", "image", "face"} and set(without.terms) == {"align"}
    assert torch.allclose(both, absent)


def test_a_prompt_without_people_is_only_asked_to_stay_as_it_is(tiny_model):
    trainee = make_trainee(tiny_model, "lora_text", image=5.0)  # its detector sees a face in every image
    optimizer = torch.optim.Adam(trainee.adapter.parameters(), 3e-3)

    def step():
        optimizer.zero_grad()
        return training_step(
            trainee, Batch("a tree", [0, 1, 2, 3], 3, 0, torch.Generator().manual_seed(0), people=False)
        )

    assert step().terms["image"] == pytest.approx(0, abs=1e-6)  # the images are the originals
    for p in trainee.adapter.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    moved = step()
    assert set(moved.terms) == set(moved.grad_share) == {"image"} and moved.terms["image"] > 0
    assert moved.faces == 0 and moved.shares == {} and not skip_reason(moved, trainee.adapter.parameters())
    for _ in range(15):
        optimizer.step()
        last = step()
    assert last.terms["image"] < 0.5 * moved.terms["image"]


def test_prompts_without_people_are_trained_among_the_others(tiny_folder, tmp_path):
    trainee = make_trainee(load_model(tiny_folder), "lora_text")
    prompts = [*PROMPTS, Prompt("a tree", "object", "tree", people=False)]
    train(trainee, prompts, schedule(steps=4), tmp_path, "key", QUIET)
    rows = {row["prompts"][0]: row for row in read_metrics(tmp_path / "metrics.jsonl")}
    assert set(rows) == {p.text for p in prompts}
    shown = {key for key in rows["a tree"] if key.startswith(("loss.", "bias.", "grad_share."))}
    assert shown == {"loss.without_people"} and all("loss.align" in rows[p.text] for p in PROMPTS)


@pytest.mark.slow
def test_prompts_without_people_do_not_hide_that_nothing_else_is_learnt(tiny_folder, tmp_path):
    prompts = [Prompt("a tree", "object", "tree", people=False), PROMPTS[0]]
    for name, steps, says in (("long", 24, "10 steps in a row"), ("short", 4, "no step had a face with a label")):
        trainee = make_trainee(load_model(tiny_folder), "lora_text", detector=NoFaces())
        with pytest.raises(FairDiffError, match=says):
            train(trainee, prompts, schedule(steps=steps), tmp_path / name, "key", QUIET)


def test_a_step_touches_nothing_but_the_adapter(tiny_model):
    trainee = make_trainee(tiny_model, "lora_both")
    before = fingerprint.of_modules(tiny_model.vae)
    frozen = {n: p.clone() for n, p in tiny_model.unet.named_parameters() if "lora_" not in n}
    training_step(trainee, draw_batches(PROMPTS, schedule(), 0)[0])
    assert fingerprint.of_modules(tiny_model.vae) == before
    for name, parameter in tiny_model.unet.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, frozen[name]) and parameter.grad is None


def test_originals_are_sampled_once_and_survive_on_disk(tiny_folder, tmp_path):
    first = make_trainee(load_model(tiny_folder), folder=tmp_path)
    batch = Batch(PROMPTS[0].text, [0, 1, 2], 3, 0, torch.Generator().manual_seed(0))
    training_step(first, batch)
    training_step(first, Batch(PROMPTS[0].text, [2, 3], 3, 0, torch.Generator().manual_seed(0)))
    assert first.originals.sampled == 4
    second = make_trainee(load_model(tiny_folder), folder=tmp_path)
    again = second.originals.get(PROMPTS[0].text, [3, 1], 3)
    assert second.originals.sampled == 0
    fresh = make_trainee(load_model(tiny_folder)).originals.get(PROMPTS[0].text, [3, 1], 3)
    assert all(torch.allclose(again[k].float(), fresh[k].float(), atol=1e-5) for k in fresh)


def _without(path, *names):
    table = load_file(path)
    save_file({name: tensor for name, tensor in table.items() if name not in names}, path)


DAMAGED_CACHE = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "emptied": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "no index": lambda path: _without(path, "index"),
    "no feature": lambda path: _without(path, "feature.0"),
    "only an index": lambda path: save_file({"index": load_file(path)["index"]}, path),
    "an index of others": lambda path: save_file(load_file(path) | {"index": torch.arange(9)}, path),
    "another tensor": lambda path: save_file(load_file(path) | {"feature.9": torch.zeros(4, 2)}, path),
    "a scalar": lambda path: save_file(load_file(path) | {"found": torch.tensor(1.0)}, path),
}


@pytest.mark.parametrize("name", DAMAGED_CACHE)
def test_damaged_originals_are_only_made_anew(name, tiny_folder, tmp_path):
    first = make_trainee(load_model(tiny_folder), folder=tmp_path).originals
    known = first.get(PROMPTS[0].text, [0, 3], 3)
    (path,) = tmp_path.iterdir()
    DAMAGED_CACHE[name](path)
    for sampled in (4, 0):  # and are whole again on disk
        again = make_trainee(load_model(tiny_folder), folder=tmp_path).originals
        rows = again.get(PROMPTS[0].text, [0, 3], 3)
        assert again.sampled == sampled and rows.keys() == known.keys()
        assert all(torch.equal(rows[k], known[k]) for k in known)


def test_originals_on_a_full_disk_are_one_line(tiny_folder, tmp_path):
    originals = make_trainee(load_model(tiny_folder), folder=tmp_path).originals
    with full_disk(100), pytest.raises(FairDiffError, match="safetensors: cannot be written .File too large"):
        originals.get(PROMPTS[0].text, [0, 3], 3)
    assert not list(tmp_path.iterdir())


def test_what_is_measured_on_originals_leaves_the_device_once_however_many_there_are(tiny_folder, monkeypatch):
    counts, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: counts.append(1) or cpu(self))
    for block in (4, 12):
        trainee = make_trainee(load_model(tiny_folder))
        trainee.originals.block = block
        counts.clear()
        trainee.originals.get(PROMPTS[0].text, list(range(block)), 3)
        assert len(counts) <= 6, block  # once each of a feature, the box, found, two attributes and the face


def run(folder, out, steps=4, console=QUIET, **changes):
    trainee = make_trainee(load_model(folder), "lora_text", attributes=("gender", "race"))
    train(trainee, PROMPTS, schedule(steps=steps, **changes), out, "key", console)
    return torch.cat([p.detach().flatten() for p in trainee.adapter.parameters()])


@pytest.mark.slow
def test_a_resumed_run_is_bit_equal_to_an_unbroken_one(tiny_folder, tmp_path):
    unbroken = run(tiny_folder, tmp_path / "a", 4)
    run(tiny_folder, tmp_path / "b", 2)
    resumed = run(tiny_folder, tmp_path / "b", 4)
    assert torch.equal(unbroken, resumed)
    strip, again = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in "ab"
    )
    assert strip == again and [row["step"] for row in strip] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_some_steps_and_no_digit(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "CHECKPOINT_EVERY", 1)
    unbroken = run(tiny_folder, tmp_path / "a", 4)
    run(tiny_folder, tmp_path / "b", 3)
    path = tmp_path / "b/checkpoints/checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-100])
    console = Console(file=io.StringIO(), width=400)
    assert torch.equal(unbroken, run(tiny_folder, tmp_path / "b", 4, console))
    assert f"warning: {path}: cannot be read" in console.file.getvalue()
    assert "the checkpoint before it is taken, of step 2" in console.file.getvalue()
    assert [row["step"] for row in read_metrics(tmp_path / "b/metrics.jsonl")] == [0, 1, 2, 3]


ROWS = b'{"step": 0}\n{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("tail", [b'{"step": 3', b"{", b'{"prompts": ["caf\xc3', b"\0\0\0"])
def test_a_last_line_cut_short_is_left_out(tail, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(ROWS + tail)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    Metrics(tmp_path / "metrics.jsonl", 2).write({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_bytes() == ROWS


@pytest.mark.parametrize(
    "line", [b"", b"[1]", b'{"loss": 1}', b'{"step": "1"}', b'{"step": 1', b"\xff\xfe", b"[" * 99999], ids=range(7)
)
def test_a_damaged_line_among_others_is_named(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(ROWS.replace(b'{"step": 1}', line))
    for read in (read_metrics, lambda path: Metrics(path, 2)):
        with pytest.raises(FairDiffError, match=r"metrics.jsonl, line 2: is no row of a training .*; remove the line"):
            read(tmp_path / "metrics.jsonl")


@pytest.mark.slow
def test_another_seed_gives_another_adapter(tiny_folder, tmp_path):
    assert not torch.equal(run(tiny_folder, tmp_path / "a", 2), run(tiny_folder, tmp_path / "b", 2, seed=1))


def test_another_runs_checkpoint_is_refused(tiny_folder, tmp_path):
    run(tiny_folder, tmp_path, 2)
    trainee = make_trainee(load_model(tiny_folder), "lora_text", attributes=("gender", "race"))
    with pytest.raises(FairDiffError, match="other settings"):
        train(trainee, PROMPTS, schedule(steps=4), tmp_path, "other key", QUIET)


def test_fewer_steps_than_the_checkpoint_holds_are_refused(tiny_folder, tmp_path):
    run(tiny_folder, tmp_path, 3)
    with pytest.raises(FairDiffError, match="already holds 3"):
        run(tiny_folder, tmp_path, 2)


def test_a_share_of_the_originals_is_painted_and_weighs_for_all(tiny_folder):
    """In each block of 4, only the first 3 are generated, and the estimate of the sum over a pool is unbiased."""
    part, whole = (make_trainee(load_model(tiny_folder)).originals for _ in range(2))
    part.compared = 3
    pool = [6, 1, 0, 7, 3, 2, 5, 4]
    rows, weight_B = part.sampled_rows(PROMPTS[0].text, pool, 3)
    assert part.sampled == 6 and weight_B.tolist() == pytest.approx([4 / 3, 4 / 3, 4 / 3, 0, 0, 4 / 3, 4 / 3, 4 / 3])
    known, has_B = whole.get(PROMPTS[0].text, pool, 3), weight_B > 0
    for name, table in rows.items():
        assert torch.allclose(table[has_B].float(), known[name][has_B].float(), atol=1e-5)
        assert not table[~has_B].any()
    everything, ones = whole.sampled_rows(PROMPTS[0].text, pool, 3)
    assert ones.tolist() == [1] * 8 and all(torch.equal(everything[name], known[name]) for name in known)
    assert part.share == 0.75 and whole.share == 1
    nothing, zeros = part.sampled_rows(PROMPTS[0].text, [3, 7], 3)
    assert zeros.tolist() == [0, 0] and nothing["found"].shape == (2,) and part.sampled == 6
    later = part.get(PROMPTS[0].text, [7, 6], 3)  # what validations and shares of the model's own ask for
    assert part.sampled == 7 and torch.allclose(later["feature.0"], known["feature.0"][[3, 0]], atol=1e-5)


def test_a_step_compares_a_share_and_aligns_all(tiny_folder):
    """The image and face terms use the images with a reference image, the alignment term uses the whole batch."""

    def step(compared, indices):
        trainee = make_trainee(load_model(tiny_folder))
        for p in trainee.adapter.parameters():
            p.data.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
        trainee.originals.compared = compared
        return training_step(trainee, Batch(PROMPTS[0].text, indices, 3, 0, torch.Generator().manual_seed(0))).terms

    whole, part = step(None, [0, 1, 2, 3]), step(2, [0, 1, 2, 3])
    rest = step(2, [2, 3, 0, 1])  # the same batch in another order
    assert part["align"] == pytest.approx(whole["align"], rel=1e-4)
    assert part["image"] != pytest.approx(whole["image"], rel=1e-2)
    assert rest["image"] == pytest.approx(part["image"], rel=1e-3)
    assert rest["face"] == pytest.approx(part["face"], rel=1e-3)


def test_originals_do_not_depend_on_what_was_asked_before(tiny_folder):
    one, two = make_trainee(load_model(tiny_folder)), make_trainee(load_model(tiny_folder))
    two.originals.get(PROMPTS[0].text, [5], 3)
    a, b = (t.originals.get(PROMPTS[0].text, [1, 5, 6], 3) for t in (one, two))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_truncated_checkpoint_is_one_clear_line(tiny_folder, tmp_path):
    run(tiny_folder, tmp_path, 2)
    path = tmp_path / "checkpoints/checkpoint.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FairDiffError, match="checkpoint.pt: cannot be read"):
        run(tiny_folder, tmp_path, 4)


def test_batches_without_faces_keep_their_image_term_and_are_given_up_after_a_while(tiny_model, tmp_path):
    trainee = make_trainee(tiny_model, detector=NoFaces())
    start = trainee.adapter.parameters()[0].clone()
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(FairDiffError, match="10 steps in a row had no alignment loss"):
        train(trainee, PROMPTS, schedule(steps=19), tmp_path, "key", console)
    said = console.file.getvalue()
    assert said.count("warning: step ") == 10
    assert "no face was found in any image; only the image and face terms are trained" in said
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0]["kept"] == 0 and rows[0]["loss.image"] > 0 and rows[0]["grad_norm"] > 0
    assert not torch.equal(start, trainee.adapter.parameters()[0])


def test_a_run_that_never_aligned_a_face_is_an_error(tiny_model, tmp_path):
    trainee = make_trainee(tiny_model, detector=NoFaces())
    with pytest.raises(FairDiffError, match="no step had a face with a label"):
        train(trainee, PROMPTS, schedule(steps=2), tmp_path, "key", QUIET)


def test_a_gradient_of_exactly_zero_is_an_error(tiny_model, tmp_path):
    trainee = make_trainee(tiny_model, align=0.0, image=None, face=0.0)
    with pytest.raises(FairDiffError, match="exactly zero"):
        train(trainee, PROMPTS, schedule(), tmp_path, "key", QUIET)


def test_an_adapter_that_changes_nothing_is_an_error(tiny_model):
    trainee = make_trainee(tiny_model, "lora_text")  # its second factor starts at zero
    with pytest.raises(FairDiffError, match="changes nothing in the images"):
        require_effect(trainee, PROMPTS[0].text)
    for parameter in trainee.adapter.parameters():
        parameter.data += 0.1
    require_effect(trainee, PROMPTS[0].text)


def test_nan_is_skipped_not_applied(tiny_model, tmp_path):
    trainee = make_trainee(tiny_model)
    trainee.perception.classifier.head[0, 0] = float("nan")
    with pytest.raises(FairDiffError, match="in a row had no alignment loss, the last because: .*not finite"):
        train(trainee, PROMPTS, schedule(steps=19), tmp_path, "key", QUIET)


@pytest.mark.parametrize("per_step", [1, 2, 3])
def test_every_epoch_visits_every_prompt_once(per_step):
    plan = schedule(prompts=per_step)
    texts = [batch.prompt for step in range(9 // per_step) for batch in draw_batches(PROMPTS, plan, step)]
    for epoch in range(len(texts) // 3):
        assert sorted(texts[3 * epoch : 3 * epoch + 3]) == sorted(p.text for p in PROMPTS)


def test_a_prompts_noise_pool_goes_round_in_slices_as_the_cache_holds_it():
    plan = schedule(batch=3, noise_pool=7, prompts=3)  # 7 = 2 x 3 + 1: no whole third slice
    met = {p.text: [] for p in PROMPTS}
    for step in range(40):
        for batch in draw_batches(PROMPTS, plan, step):
            met[batch.prompt].append(batch.indices)
    for visits in met.values():
        assert visits[:2] == [[0, 1, 2], [3, 4, 5]]
        assert all(sorted(v) == visits[n % 2] for n, v in enumerate(visits))
        assert len({tuple(v) for v in visits}) == 2 * 6  # in every order
    assert len({tuple(map(tuple, visits)) for visits in met.values()}) == 3  # each prompt in its own order


def test_originals_of_a_slice_are_found_again_at_every_later_visit(tiny_folder):
    """The slice determines T, so nothing is sampled twice, and never more than the batch."""
    trainee = make_trainee(load_model(tiny_folder))
    trainee.originals.block, made, seen = 4, {}, set()
    plan = schedule(batch=4, noise_pool=12, prompts=3, sampler_steps=(2, 4))
    for step in range(8):
        for batch in draw_batches(PROMPTS, plan, step):
            before = trainee.originals.sampled
            trainee.originals.get(batch.prompt, batch.indices, batch.steps)
            made.setdefault((batch.prompt, *sorted(batch.indices)), []).append(trainee.originals.sampled - before)
            seen.add(batch.steps)
    assert len(made) == 9 and seen == {2, 3, 4}
    assert all(first == 4 and not any(later) and later for first, *later in made.values())


def test_the_steps_of_slices_are_uniform_and_know_only_prompt_seed_and_slice():
    plan = schedule(batch=24, noise_pool=480, sampler_steps=(19, 23))
    prompts = [Prompt(f"a {i}", "occupation", str(i)) for i in range(100)]
    drawn = [slice_steps(plan, prompt.text, part) for prompt in prompts for part in range(20)]
    assert all(320 < drawn.count(t) < 480 for t in range(19, 24)) and set(drawn) == set(range(19, 24))  # 400 +- 4.5 sd
    of = {b.prompt: b.steps for step in range(3) for b in draw_batches(PROMPTS, plan, step)}
    others = {b.prompt: b.steps for step in range(6) for b in draw_batches([*prompts[:3], *PROMPTS], plan, step)}
    assert all(others[p.text] == of[p.text] for p in PROMPTS)
    assert slice_steps(schedule(sampler_steps=(4, 4)), "a", 3) == 4


def test_a_prompt_that_stands_twice_meets_other_noise_the_second_time():
    prompts = [*PROMPTS, PROMPTS[0]]
    plan = schedule(batch=3, noise_pool=6, prompts=4)
    met = [b.indices for step in range(2) for b in draw_batches(prompts, plan, step) if b.prompt == PROMPTS[0].text]
    assert sorted(met[:2]) == [[0, 1, 2], [3, 4, 5]] and sorted(met[2] + met[3]) == list(range(6))


def test_the_progress_of_a_training_is_whole_in_80_columns():
    console = Console(width=80, record=True, force_terminal=True, file=io.StringIO())
    with progress(console) as bar:
        note = "align 1.119 image 0.031 face 0.112  bias gender 0.74 race 0.51 age 0.33"
        bar.add_task("training", total=120, completed=17, note=note)
    text = console.export_text()
    assert " 17/120 " in text and "0:00:00 left" in text and "…" not in text
    assert all(word in text for word in note.split())
