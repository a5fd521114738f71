"""Train a run again with the trainer of `train.py`, with some components of its LoRA held at zero."""

from collections.abc import Iterable
from pathlib import Path

from fairdiff import builder, describe, fingerprint
from fairdiff import run as run_folder
from fairdiff.cli.compose import saved
from fairdiff.diffusion.adapter_files import LORA_FILE
from fairdiff.lock import locked
from fairdiff.plan import make_plan
from fairdiff.studies.localize import Component, Place, Split, held_at_zero
from fairdiff.training.tracking import make_console
from fairdiff.training.trainer import train


def retrained(run: Path, splits: dict[Place, Split], chosen: Iterable[Component], root: Path) -> Path:
    """Train with the settings, seed and steps of `run` and the chosen components at zero, and return the adapter's folder.

    splits: the components of the run's own LoRA. The folder below `root` is named by a hash of all that the result depends
    on. An interrupted training continues.
    """
    config = saved(run / "config.yaml", ["tracker=null"])
    plan, held = make_plan(config), sorted(chosen)
    model, perception = builder.build_model(config), builder.build_perception(config, plan)
    training = builder.training_fingerprint(config, plan, model, perception)
    own = fingerprint.of_files([run / "adapter" / LORA_FILE])
    identity = fingerprint.of_values("held at zero", training, config.steps, held, own if held else None)
    folder = root / identity[:8]
    with locked(folder):
        if not (folder / "adapter" / LORA_FILE).is_file():
            about = describe.about_adapter(config, plan, model, identity)
            trainee = builder.build_trainee(config, plan, model, perception)
            with held_at_zero(trainee.adapter, splits, held):
                schedule = builder.build_schedule(config, plan)
                train(trainee, list(plan.train), schedule, folder, identity, make_console())
            run_folder.save_adapter(folder, trainee.adapter, about)
    return folder / "adapter"
