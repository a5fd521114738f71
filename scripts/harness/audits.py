"""Audit any method with the prompts, noise and attribute classifier of `train.py`'s audits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fairdiff import builder, describe, fingerprint, run
from fairdiff.audit.generate import Generate
from fairdiff.builder.audit import build_audit
from fairdiff.cli.compose import composed
from fairdiff.config import Config
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.lock import locked
from fairdiff.plan import Plan, make_plan
from fairdiff.training.tracking import make_console

Generators = Callable[[float], dict[str, Generate]]  # guidance -> "before", "after"


@dataclass(frozen=True)
class Method:
    """A method to audit. name: names its folder and its row. key: all that its images depend on besides the settings.

    begin: (settings, plan, model without an adapter, folder for the files that it computes) -> its generators.
    """

    name: str
    key: tuple
    begin: Callable[[Config, Plan, DiffusionModel, Path], Generators]

    @property
    def place(self) -> str:
        """The folder name of the method."""
        return "".join(c if c.isalnum() or c in ".-" else "_" for c in self.name)


def prompt_biases(audit: dict, model: str, attribute: str) -> list[float | None]:
    """Return the bias of every prompt in an audit.json, None for a prompt without a face."""
    return [row["bias"]["value"] for row in audit["models"][model]["attributes"][attribute]["per_prompt"]]


def audited(settings: list[str], method: Method, root: Path, done: bool = False) -> Path | None:
    """Audit a method in `root`/<name> unless that is done, and return the folder with audit.json and records.

    settings: overrides of `train.py`. Audits share the images "before" through the setting `cache`. done: generate nothing,
    and return None if the audit is not finished.
    """
    config, _ = composed(settings)
    plan, folder = make_plan(config), root / method.place
    model = builder.build_model(config)
    audit = build_audit(config, plan, model, fingerprint.of_values(method.key), None)  # before an adapter is added
    if done:
        return run.audit_folder(folder, audit) if run.finished(folder, audit) else None
    with locked(folder):
        if not run.finished(folder, audit):
            lines = describe.report_lines(config, plan, adapter=False, trained=False) | {"method": [method.name]}
            run.carry_out(folder, audit, method.begin(config, plan, model, folder), lines, make_console())
    return run.audit_folder(folder, audit)
