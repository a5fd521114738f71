"""Laws of the benchmark: what is counted is what is computed, the literal reference has our gradient, pages render."""

import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from tiny import composed, make_trainee

from fairdiff import builder
from fairdiff.cli.main import CONF, to_config
from fairdiff.config import Config
from fairdiff.diffusion.denoise import Guidance
from fairdiff.diffusion.load import load_model
from fairdiff.errors import FairDiffError
from fairdiff.plan import make_plan
from fairdiff.training.step import Batch, training_step
from fairdiff.training.tracking import make_console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from benchmark import compiled, learning, page, results, steps, variance, world  # noqa: E402
from benchmark.config import use_schema  # noqa: E402
from benchmark.instruments import captured_replay, counted, staged  # noqa: E402
from benchmark.learning import Learner, first_below, summary  # noqa: E402
from benchmark.literal import autograd_step, literal_step  # noqa: E402
from benchmark.variance import CHOICES, by_step, estimator_error, pair_gradients, total_gradient, without_bias  # noqa: E402

PROMPT = "a photo of the face of a nurse"
TINY = [
    "model=sd15_random", "random.latent=8", "random.unet=[32,32,32,32]", "random.vae=[32,32,32,32]", "random.text=[32,1]",
    "random.steps=2", "random.clip=vit_tiny_patch16_224", "random.dino=vit_tiny_patch16_224",
    "random.judge=mobilenetv3_small_050", "random.identity=resnet18", "random.encoder_size=32", "random.judge_size=32",
    "random.identity_size=32", "random.detect_size=24", "global_batch=4", "noise_pool=4",
]  # fmt: skip


def batch(size=4, steps=6):
    return Batch(PROMPT, list(range(size)), steps, 0, torch.Generator().manual_seed(0))


def trainee_of(folder, kind, **changes):
    trainee = make_trainee(load_model(folder), kind, **changes)
    for p in trainee.adapter.parameters():
        p.data.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    return trainee


def evaluations(b, t, k=None, cold=False, halves=2):
    """Return the U-Net evaluations of a step with guidance; k=None: the reference. halves: 1 for soft tokens."""
    once = 2 * b * t
    return 5 * once if k is None else once * (2 if cold else 1) + 2 * halves * b * k


def test_the_formula_is_the_designs_table():
    assert [evaluations(24, 21, k) for k in (None, 21, 7, 3)] == [5040, 3024, 1680, 1296]


@pytest.mark.slow
@pytest.mark.parametrize("kind,halves", [("lora_both", 2), ("soft_tokens", 1)])
def test_counted_evaluations_are_those_of_the_formula(tiny_folder, kind, halves):
    trainee = trainee_of(tiny_folder, kind)
    ours = [world.Variant("ours", k, cold) for k, cold in ((6, False), (2, True), (1, False))]
    for variant in [world.Variant("reference", literal=True), *ours]:
        world.warm_up(trainee, batch())
        with counted(trainee.model.unet) as counts:
            world.run_variant(trainee, batch(), variant, 3)
        expected = evaluations(4, 6, variant.evaluations, variant.cold, halves)
        assert counts.total() == expected, (variant, counts)
        if variant.literal:
            assert counts == {"sample": 2 * 48, "graph": 48, "recompute": 48, "backward": 48}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["soft_tokens", "lora_both"])
def test_the_literal_reference_has_our_gradient(tiny_folder, kind):
    grads, results = [], []
    for literal in (True, False):
        trainee = trainee_of(tiny_folder, kind, gradient="reference", attributes=("gender", "race"))
        step = (lambda t, b: literal_step(t, b, 3)) if literal else training_step
        results.append(step(trainee, batch(8, 4)))
        grads.append(torch.cat([p.grad.flatten() for p in trainee.adapter.parameters()]))
    assert grads[0].norm() > 0 and (grads[0] - grads[1]).norm() / grads[0].norm() <= 1e-4
    assert results[0].terms == pytest.approx(results[1].terms, rel=1e-4)


@pytest.mark.parametrize("kind", ["soft_tokens", "lora_both"])
def test_truncated_at_every_step_is_autograd_and_at_fewer_is_another_gradient(tiny_folder, kind):
    grads = []
    for last in (None, 4, 1):
        trainee = trainee_of(tiny_folder, kind)
        assert autograd_step(trainee, batch(4, 4), last=last).kept > 0
        grads.append(torch.cat([p.grad.flatten() for p in trainee.adapter.parameters()]))
    assert torch.equal(grads[0], grads[1]) and grads[2].norm() > 0
    assert (grads[2] - grads[0]).norm() / grads[0].norm() > 0.01


@pytest.mark.slow
def test_pairs_add_up_and_choices_are_unbiased(tiny_folder):
    trainee = trainee_of(tiny_folder, "soft_tokens")
    pairs = pair_gradients(trainee, batch(4, 5))
    total = total_gradient(trainee, batch(4, 5))
    assert (pairs.sum((0, 1)) - total).norm() / total.norm() < 1e-4
    scale = float(total.double().square().sum())
    for name, choose in CHOICES.items():
        whole, some = estimator_error(pairs, 5, choose, 5), [estimator_error(pairs, 2, choose, 400, s) for s in range(40)]
        assert whole.square <= 1e-9 * scale < some[0].square, name
        assert sum(e.ratio for e in some) / 40 < without_bias(some, 0.999), name
        assert sum(e.ratio > without_bias([e]) for e in some) <= 7, name  # 2 of 40; more than 7 in 5 of 10,000
    def mostly_early(b, t, k, generator):
        early = torch.arange(k).expand(b, k)
        return early if torch.rand((), generator=generator) < 0.2 else CHOICES["uniform"](b, t, k, generator)

    biased = estimator_error(pairs, 2, mostly_early, 400)
    assert biased.ratio > without_bias([biased])  # the measure sees it
    smooth = torch.linspace(1, 2, 8).view(1, 8, 1).expand(4, 8, 3)  # where it is smooth in t, spreading out pays
    ours, theirs = (estimator_error(smooth, 2, CHOICES[c], 400).square for c in ("stratified", "shared"))
    assert ours < theirs / 10


def test_what_drawing_in_proportion_would_save_is_the_ratio_of_second_moments():
    square = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)
    found = by_step(square)
    best = square.sqrt() / square.sqrt().sum()
    assert found["even_over_best"] == pytest.approx(float((square / (1 / 3)).sum() / (square / best).sum()))
    assert found["norms"] == pytest.approx([12 / 7, 6 / 7, 3 / 7])
    assert by_step(torch.ones(4))["even_over_best"] == pytest.approx(1)


def test_the_stopwatch_leaves_the_step_as_it_is(tiny_folder):
    grads = []
    for timed in (False, True):
        trainee = trainee_of(tiny_folder, "lora_text", evaluations=2)
        if timed:
            with staged(trainee, lambda: None) as watch, watch.stage("rest"):
                training_step(trainee, batch())
        else:
            training_step(trainee, batch())
        grads.append(torch.cat([p.grad.flatten() for p in trainee.adapter.parameters()]))
    assert torch.equal(*grads)
    seen = {"sampling", "originals", "decode forward", "detect", "judge", "encoder 0", "transport", "losses", "replay"}
    assert {*watch.seconds} >= seen | {"decode backward", "text backward", "rest"}
    assert all(s >= 0 for s in watch.seconds.values())
    with captured_replay() as calls:
        training_step(trainee, batch())
    assert len(calls) == 1 and len(calls[0][1].inputs) == 6


@pytest.fixture
def tiny_config():
    use_schema()

    def make(*overrides):
        with initialize_config_dir(CONF, version_base="1.3"):
            cfg = compose("bench", [*TINY, *overrides])
            cfg.device = "cpu"
        return world.finish(to_config(cfg))

    yield make
    ConfigStore.instance().store(name="schema", node=Config)


@pytest.mark.slow
def test_a_random_model_of_any_size_takes_a_step_in_bfloat16(tiny_config):
    config = tiny_config("adapter=lora_both")
    trainee = world.make_trainee(config)
    assert (trainee.model.unet.dtype, world.sampler_steps(config)) == (torch.bfloat16, 2)
    with counted(trainee.model.unet) as counts:
        result = world.run_variant(trainee, world.draw(config, 0), world.Variant("ours", 1), 2)
    assert result.kept > 0 and counts.total() == evaluations(4, 2, 1, cold=True)
    grads = [p.grad for p in trainee.adapter.parameters() if p.grad is not None]
    assert {g.dtype for g in grads} == {torch.float32} and sum(g.norm() for g in grads) > 0


def test_bad_parts_are_one_line(tiny_config):
    for override, words in {
        "part=[speed]": "part: found speed",
        "part=[ablation]": "nothing to learn",
        "ablation=[{type:magic}]": "gradient.type",
        "ablation=[{typ:unit}]": "ablation: found",
        "ablation=[{type:literal,last:2}]": "ablation: found",
        "ablation=[{type:truncated,last:0}]": "ablation: found",
        "time_to_bias=[{type:truncated}]": "gradient.type: found truncated",
        "micro_batches=[4,0]": "micro_batches",
    }.items():
        with pytest.raises(FairDiffError, match=words):
            tiny_config(override)


LEARNERS = [
    {"type": "unit", "evaluations": 1}, {"type": "literal"}, {"type": "autograd"}, {"type": "truncated", "last": 1},
]  # fmt: skip


@pytest.mark.parametrize("learner", LEARNERS, ids=learning.name_of)
def test_a_learner_goes_on_where_it_stopped(learner, tiny_config, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "make_trainee", lambda *_: make_trainee(load_model(tiny_folder)))
    config = tiny_config("steps=2", "watch.prompts=1", "watch.images=4", "sampler.audit_steps=2", "part=[]")

    def run(folder, turns):
        own = Learner(config, learner, folder)
        for until in turns:
            own.advance(until)
        return own

    unbroken = run(tmp_path / "a", [0, 1, 2])
    run(tmp_path / "b", [0, 1])
    resumed = run(tmp_path / "b", [0, 1, 2])
    for p, q in zip(unbroken.parameters, resumed.parameters, strict=True):
        assert torch.equal(p, q)
    rows = [[(r["step"], r["bias"]) for r in own.history()] for own in (unbroken, resumed)]
    assert rows[0] == rows[1] and [step for step, _ in rows[0]] == [0, 1, 2]


@pytest.mark.parametrize("literal", [True, False])
def test_a_step_of_which_nothing_is_learnt_is_not_measured(tiny_folder, literal):
    """With two faces and equal targets, transport gives a class probability of .75, which is not confident."""
    variant = world.Variant("one", evaluations=1, literal=literal)
    assert world.run_variant(trainee_of(tiny_folder, "lora_text"), batch(4), variant, 2).terms
    with pytest.raises(FairDiffError, match=r"global_batch: found 2 pictures"):
        world.run_variant(trainee_of(tiny_folder, "lora_text"), batch(2), variant, 2)


def test_compiled_blocks_are_the_frozen_networks_and_each_is_compiled_whole(tiny_folder):
    """This holds in both memory formats, and the model is not changed."""
    model, torch_counts = load_model(tiny_folder), torch._dynamo.utils.counters["stats"]
    latent, guidance = torch.randn(2, *model.latent_shape), Guidance(*model.encode_pair(PROMPT), 2.0)
    for last in (False, True):
        torch.compiler.reset()
        own = compiled.variant(model, last, True, "eager")
        parts = [*own.unet.modules(), *own.vae.decoder.modules()]
        blocks = [m for m in parts if m._compiled_call_impl is not None]
        assert {type(m).__name__ for m in blocks} == {"BasicTransformerBlock", "ResnetBlock2D"}
        assert own.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last) == last
        before = torch_counts["unique_graphs"]
        with torch.no_grad():
            assert torch.allclose(own.sample(guidance, latent, 2).final, model.sample(guidance, latent, 2).final, atol=1e-5)
            assert torch.allclose(own.decode(latent), model.decode(latent), atol=1e-5)
        assert torch_counts["unique_graphs"] >= before + 2
    assert all(m._compiled_call_impl is None for m in model.unet.modules())


def test_without_a_compiler_for_the_processor_it_says_so(tiny_config, monkeypatch):
    monkeypatch.setenv("CXX", "g++-of-nowhere")
    with pytest.raises(FairDiffError, match=r"^part: found compile, but this machine has no C\+\+ compiler g\+\+-of-nowhere"):
        compiled.measure_compile(tiny_config("part=[compile]"))
    compiled.require_compiler("cuda")


def test_a_random_model_too_needs_a_device_there_is(tiny_config):
    with pytest.raises(FairDiffError, match=r"model\.device: found cuda:99"):
        config = replace(tiny_config(), device="cuda:99")
        world.make_world(config, make_plan(config))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_judges_of_random_weights_multiply_as_those_of_a_run_would(tiny_config, dtype):
    config, real = tiny_config(f"model.dtype={dtype}"), composed(f"model.dtype={dtype}")
    _, perception = world.make_world(config, make_plan(config))
    assert perception.dtype == builder.build_perception(real, make_plan(real)).dtype == getattr(torch, dtype)
    assert {p.dtype for p in perception.classifier.parameters()} == {torch.float32}


@pytest.mark.parametrize("repeats", [1, 2])
def test_what_a_learner_is_watched_on_it_never_trains_on(repeats, tiny_config):
    config = tiny_config(f"prompts.families.occupation={repeats}")
    prompts = list(make_plan(config).train)
    train, held = learning.hold_out(prompts, 10)
    assert len(held) == len({p.text for p in held}) == 10
    assert not {p.text for p in held} & {p.text for p in train} and len(train) == len(prompts) - 10 * repeats
    assert learning.hold_out(held, 4) == (held[:6], held[6:])


def test_a_measurement_is_kept_and_never_mixed_with_another(tiny_config, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learning, "make_trainee", lambda *_: make_trainee(load_model(tiny_folder)))
    sizes = [
        "part=[]", "steps=1", "watch.prompts=1", "watch.images=2", "sampler.audit_steps=2", "seeds=[0]",
        "time_to_bias=[{type:literal},{type:unit,evaluations:1}]", "thresholds=[1]",
    ]  # fmt: skip
    for _ in range(2):
        results.measure("time_to_bias", tiny_config(*sizes), tmp_path / "m", make_console())
    assert "measured 20" in capsys.readouterr().out
    with pytest.raises(FairDiffError, match="other settings"):
        results.measure("time_to_bias", tiny_config(*sizes, "literal_batch=3"), tmp_path / "m", make_console())
    page.write_page(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| reference, literally | 1 | 1 of 1 | 0 [0, 0] |" in text and "| unit K=1 | 1 |" in text
    assert "Not finished" not in text
    runs = {path: path.read_text() for path in (tmp_path / "m").rglob("metrics.jsonl")}
    results.measure("time_to_bias", tiny_config(*sizes[:-1], "thresholds=[.9,2]"), tmp_path / "m", make_console())
    measured = results.read(tmp_path / "m" / "time_to_bias.json")["result"]
    assert {row["threshold"] for row in measured["rows"]} == {0.9, 2} and len(runs) == 2
    assert runs == {path: path.read_text() for path in (tmp_path / "m").rglob("metrics.jsonl")}  # none was trained again


@pytest.mark.slow
def test_every_short_part_measures_and_renders(tiny_config, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(results.SHORT, "compile", partial(compiled.measure_compile, backend="eager"))  # without g++
    for module in (steps, variance):
        monkeypatch.setattr(module, "make_trainee", lambda *_: make_trainee(load_model(tiny_folder)))
    monkeypatch.setattr(steps, "memory_apart", lambda *_: 1.0)  # processes of their own take seconds each
    sizes = ["random.steps=3", "repeats=1", "sizes=[3,4]", "lengths=[2]", "batches=2", "evaluations=[1,3]", "draws=5"]
    config = tiny_config(*sizes, "micro_batches=[2]", "warmup=0", "model.dtype=float32")
    for part in results.SHORT:
        results.measure(part, config, tmp_path / "m", make_console())
    measured = {part: results.read(tmp_path / "m" / f"{part}.json")["result"] for part in results.SHORT}
    totals = {r["variant"]: r["total"] for r in measured["steps"]["rows"]}
    assert totals["reference, literally"] == evaluations(4, 3) and totals["ours, K = 1"] == evaluations(
        4, 3, 1, halves=1
    )
    assert totals["ours, K = 2, cold"] == evaluations(4, 3, 2, cold=True, halves=1)
    assert 0.5 < measured["steps"]["backward_per_forward"] < 2 and measured["throughput"]["rows"][0]["tflop"] > 0
    rows = {r["contestant"]: r for r in measured["audit"]["rows"]}
    assert rows["ours, in its precision"]["apart"] < 1e-4 and min(rows["ours"]["images_per_second"]) > 0  # the same images
    rows = {(r["forward"], r["variant"]): r for r in measured["compile"]["rows"]}
    assert len(rows) == 2 * len(compiled.VARIANTS) and min(min(r["seconds"]) for r in rows.values()) > 0
    assert {r["apart"] for (_, name), r in rows.items() if name == compiled.EAGER} == {0}
    assert {name for (_, name), r in rows.items() if r["compilation"] is not None} == {"torch.compile", "both"}
    page.write_page(tmp_path, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text().count("Not measured yet") == 2


def test_time_to_a_bias_is_linear_between_looks():
    history = [{"step": s, "seconds": 2.0 * s, "bias": b} for s, b in ((0, 0.8), (10, 0.6), (20, 0.1), (30, 0.3))]
    assert first_below(history, 0.6, "step") == 10
    assert first_below(history, 0.2, "step") == pytest.approx(18)
    assert first_below(history, 0.2, "seconds") == pytest.approx(36)
    assert first_below(history, 0.05, "step") is None and first_below(history, 0.9, "step") == 0


def test_the_command_of_a_measurement_is_the_same_wherever_it_was_written():
    wanted = ["adapter=lora_unet", "part=[ablation]", "ablation=[{type: unit}]"]
    here, there = ([*wanted, f"hydra.run.dir={d}/few", f"report={d}/page.md"] for d in ("/a", "/b/c"))
    command = results.command_of(here, "few")
    assert command == results.command_of(there, "few")
    assert shlex.split(command) == ["python", "scripts/bench.py", *wanted, "hydra.run.dir=outputs/bench/few"]
    assert results.command_of(wanted, "portraits-lora_unet-cpu") == shlex.join(["python", "scripts/bench.py", *wanted])


def test_the_page_says_what_was_measured_and_what_was_not(tiny_config):
    config = tiny_config("part=[]", "thresholds=[.5]")
    runs = {
        name: {
            str(seed): [{"step": s, "seconds": cost * s, "bias": 0.8 - s / 20} for s in (0, 6, 12)] for seed in (0, 1)
        }
        for name, cost in (("reference, literally", 3.0), ("unit K=3", 1.0))
    }
    measured = {
        "part": "time_to_bias", "complete": False, "command": "python scripts/bench.py", "settings": world.describe(config),
        "conditions": world.conditions(config), "result": summary(runs, config),
    }  # fmt: skip
    text = page.render([measured])
    assert "| unit K=3 | 0.5 | 2 of 2 | 6 [6, 6] | 1× [1, 1] | 6 [6, 6] | 3× [3, 3] |" in text
    assert "**Not finished.**" in text and text.count("Not measured yet: `python scripts/bench.py") == 8
    assert all(f"## {title}" in text for title, _ in page.COMMANDS.values())
