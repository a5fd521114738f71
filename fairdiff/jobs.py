"""The two jobs, training and audit: configuration -> plan -> build -> train -> audit -> report."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial, wraps
from pathlib import Path

from rich.console import Console

from fairdiff import builder, describe, hub, run
from fairdiff.audit.size import size_lines
from fairdiff.builder.audit import build_audit, build_generators, spec_to_plan_by, training_judge
from fairdiff.builder.pictures import build_audit_of_pictures, build_readers
from fairdiff.cli.main import main
from fairdiff.config import Config
from fairdiff.distributed import World, started
from fairdiff.errors import FairDiffError
from fairdiff.lock import locked
from fairdiff.pictures import Given, read_pictures
from fairdiff.plan import Plan, make_plan, plan_of_prompts
from fairdiff.training.judges import compare_judges
from fairdiff.training.tracking import make_console
from fairdiff.training.trainer import train


def together(job: Callable[[Config, Path, World], None]) -> Callable[[Config, Path], None]:
    """Run a job in all processes of a run, with the run folder locked against other runs."""

    @wraps(job)
    def job_together(config: Config, folder: Path) -> None:
        with started(config.model.device) as world, locked(folder) if world.first else nullcontext():
            world.gather("the folder is ours")  # the others wait here until the folder is locked
            job(config, folder, world)

    return job_together


@together
def train_job(config: Config, folder: Path, world: World) -> None:
    """Train an adapter, then audit the model without and with it; a finished run is only shown."""
    console = make_console(world.first)
    if config.plan:
        raise FairDiffError("plan: found true, allowed: false in training; scripts/audit.py plans an audit")
    if config.images is not None:
        raise FairDiffError(f"images: found {config.images}, allowed: null in training; scripts/audit.py audits pictures")
    plan = make_plan(config)
    if config.hub is not None and world.first:
        hub.require_access(config.hub)
    model, perception = builder.build_model(config), builder.build_perception(config, plan)
    training = builder.training_fingerprint(config, plan, model, perception)
    audit = build_audit(config, plan, model, training, perception.classifier, world)
    world.require_same("settings, files and weights, by the name of their audit", lambda: audit.name)

    if world.of_first(config.resume and run.finished(folder, audit)):
        console.print(f"this run is finished; resume=false starts over ({folder})")
    else:
        about = describe.about_adapter(config, plan, model, training)  # before soft tokens are added to the tokenizer
        trainee = builder.build_trainee(config, plan, model, perception, world)
        if world.first:
            run.require_caches(audit, trainee)
        judges = compare_judges(trainee, audit.measurer.judge, plan.train, config.sampler.train_steps[1])
        if world.first:
            run.begin(folder, asdict(config), training)
            budget = describe.budget(config, plan, trainee, audit)
            for line in budget + judges + describe.warnings(plan, model, trainee.adapter.prefix):
                console.print(line, markup=False)
        with audit.waiting():
            train(trainee, list(plan.train), builder.build_schedule(config, plan), folder, training, console)
        if world.first:
            run.save_adapter(folder, trainee.adapter, about)
        lines = describe.report_lines(config, plan, adapter=True, trained=True)
        run.carry_out(folder, audit, partial(build_generators, config, model, trainee.adapter), lines, console)
    if world.first:
        run.save_card(folder, audit, *training_judge(config))
        run.export_adapter(folder, config.export, builder.model_path(config))
        run.conclude(folder, audit, console, config.audit.fail_above)
        if config.hub is not None:
            console.print(f"hub: {hub.push(folder, config.hub, run.audit_folder(folder, audit))}", markup=False)


def audit_job(config: Config, folder: Path) -> None:
    """Run an audit, or with `plan` print how large an audit must be, without building a model or a judge."""
    if config.plan:
        plan_audit(config)
    else:
        _audit(config, folder)


def plan_audit(config: Config) -> None:
    """Print how many images and prompts an audit with these settings needs."""
    plan = _plan_of_pictures(config)[0] if config.images is not None else make_plan(config, training=False)
    for line in size_lines(spec_to_plan_by(config, plan), len(plan.audit)):
        print(line)


@together
def _audit(config: Config, folder: Path, world: World) -> None:
    """Audit a model, a model without and with a saved adapter, or pictures in a folder, without training."""
    console = make_console(world.first)
    if config.images is not None:
        _audit_pictures(config, folder, world, console)
        return
    plan = make_plan(config, training=False)
    model = builder.build_model(config)
    adapter_hash = builder.adapter_fingerprint(config)
    audit = build_audit(config, plan, model, adapter_hash, None, world)
    world.require_same("settings, files and weights, by the name of their audit", lambda: audit.name)

    if world.of_first(config.resume and run.finished(folder, audit)):
        console.print(f"this audit is finished; resume=false starts over ({folder})")
    else:
        adapter = builder.build_saved_adapter(config, plan, model) if config.adapter.path else None
        if world.first:
            warnings = describe.adapter_warnings(config, plan, model) if adapter else []
            for line in warnings + describe.warnings(plan, model, adapter.prefix if adapter else ""):
                console.print(line, markup=False)
            run.require_caches(audit, None)
            run.begin(folder, asdict(config), f"none: {adapter_hash}")
        lines = describe.report_lines(config, plan, adapter=adapter is not None, trained=False)
        run.carry_out(folder, audit, partial(build_generators, config, model, adapter), lines, console)
    if world.first:
        run.conclude(folder, audit, console, config.audit.fail_above)


def _audit_pictures(config: Config, folder: Path, world: World, console: Console) -> None:
    """Audit the pictures of `images`; no text-to-image model is loaded."""
    plan, given = _plan_of_pictures(config)
    audit = build_audit_of_pictures(config, plan, given, world)
    world.require_same("settings, pictures and weights, by the name of their audit", lambda: audit.name)

    if world.of_first(config.resume and run.finished(folder, audit)):
        console.print(f"this audit is finished; resume=false starts over ({folder})")
    else:
        if world.first:
            for line in describe.picture_warnings(config, given, audit):
                console.print(line, markup=False)
            run.begin(folder, asdict(config), "none: pictures")
        lines = describe.picture_lines(config, plan, given)
        run.carry_out(folder, audit, partial(build_readers, given), lines, console)
    if world.first:
        run.conclude(folder, audit, console, config.audit.fail_above)


def _plan_of_pictures(config: Config) -> tuple[Plan, Given]:
    """Return the plan of an audit of the pictures of `images`, and the pictures."""
    given = read_pictures(config.images, config.manifest)
    return plan_of_prompts(config, given.prompts), given


# the console commands fairdiff-train and fairdiff-audit
train_command = main(train_job, several=True)
audit_command = main(audit_job, "measure", several=True)
