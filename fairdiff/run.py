"""The run folder: write its files, find what is finished, and remove earlier outputs.

config.yaml  run.json  metrics.jsonl  pictures/  checkpoints/  adapter/     one training run
exports/<format>/     the adapter for other tools
audits/<name>/  records/  records.parquet  request.json  audit.json  summary.md  report.html     each of its audits
audits/<name>/guidance/<scale>/  records/  records.parquet                           at further guidance scales
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml
from rich.console import Console

from fairdiff.audit.axis import MetricSpec
from fairdiff.audit.card import Confusion, model_card
from fairdiff.audit.generate import Generate, run_audit
from fairdiff.audit.metrics import compute_metrics
from fairdiff.audit.read import read_audit
from fairdiff.audit.records import ANEW, load_records
from fairdiff.audit.report import render_report, summary_table
from fairdiff.audit.summary import not_within, summary
from fairdiff.builder.audit import Audit
from fairdiff.diffusion.adapters import Adapter
from fairdiff.diffusion.export import export
from fairdiff.diffusion.folder import hub_id
from fairdiff.errors import FairDiffError, NotWithinMargin
from fairdiff.files import atomic_path, flat, read_yaml, remove_leftovers, require_writable, write_json, write_text
from fairdiff.training import checkpoint
from fairdiff.training.step import Trainee
from fairdiff.training.tracking import PICTURES, progress, read_metrics

SCHEMA = 1  # version of run.json
OUTPUTS = ("config.yaml", "metrics.jsonl", "pictures", "checkpoints", "adapter", "exports", "audits", "tensorboard", "wandb")
OUTPUTS += ("run.json",)  # removed last, because it marks the folder as a run folder
# keys and groups of settings that change neither the training nor the images of a run
NO_RESULT = ("audit", "export", "hub", "resume", "cache", "plan", "tracker", "tracker_options", "micro_batch", "memory_gb")
NO_RESULT += ("model.device",)


def begin(folder: Path, settings: dict, training: str) -> None:
    """Begin a run in a folder; FairDiffError if it holds a run of other settings, or files of another origin.

    settings: the nested configuration. training: the run's fingerprint. Without `resume` the outputs of an earlier run are
    removed. Call it only after everything has been built.
    """
    state = read_state(folder)
    there = [name for name in OUTPUTS if (folder / name).exists()]
    if there and not state:
        raise FairDiffError(
            f"{folder}: holds {there[0]} but no run.json, so it is left alone; choose another hydra.run.dir"
        )
    if not settings["resume"]:
        empty(folder)
    elif state and state.get("training") != training:
        raise FairDiffError(
            f"{folder}: holds a run with other settings{differences(folder, settings)}; choose another hydra.run.dir or "
            "start over with resume=false"
        )
    checkpoint.require_enough(folder, checkpoint.finished_steps(folder / "checkpoints"), settings["steps"])
    for part in (folder, folder / "checkpoints", *(folder / "audits").rglob("*")):
        remove_leftovers(part, 0)
    write_json(folder / "run.json", {"schema": SCHEMA, "training": training})  # first: it marks a run folder
    write_text(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def empty(folder: Path) -> None:
    """Remove the outputs of a run, and no other files."""
    for path in (folder / name for name in OUTPUTS):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def read_state(folder: Path) -> dict:
    """Return the content of run.json, {} if there is none; FairDiffError if it is not a run's state of this version."""
    path = folder / "run.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        state = None
    if not isinstance(state, dict) or (state and state.get("schema") != SCHEMA):
        raise FairDiffError(f"{path}: is not the state of a run of this version; choose another hydra.run.dir")
    return state


def saved_settings(folder: Path) -> dict:
    """Return {"sampler.guidance": 5.0, ...} from a run folder's config.yaml; {} if it is missing or damaged, since it only
    adds detail to a message."""
    path = folder / "config.yaml"
    try:
        found = read_yaml(path.read_text(encoding="utf-8"), str(path)) if path.exists() else {}
    except (FairDiffError, UnicodeDecodeError):
        return {}
    return flat(found) if isinstance(found, dict) else {}


def differences(folder: Path, settings: dict, most: int = 4) -> str:
    """Return the keys in which config.yaml differs, " (steps: 45 there, 60 requested)", or "" if none are known."""
    there = saved_settings(folder)
    wanted = flat(yaml.safe_load(yaml.safe_dump(settings)))  # converts tuples as reading a file does
    keys = [k for k in there | wanted if k not in NO_RESULT and k.split(".")[0] not in NO_RESULT]
    found = [k for k in keys if there.get(k) != wanted.get(k)]
    if not there or not found:
        return ""
    shown = [f"{key}: {there.get(key)} there, {wanted.get(key)} requested" for key in found[:most]]
    return f" ({'; '.join(shown)}{f' and {len(found) - most} more' if len(found) > most else ''})"


def require_caches(audit: Audit, trainee: Trainee | None) -> None:
    """Raise FairDiffError if a cache folder shared with other runs cannot be written; call it before generating images."""
    shared = [plan.shared and plan.shared / "before" for plan in (audit.plan, *audit.others.values())]
    for folder in (*shared, trainee and trainee.originals.folder):
        if folder is not None:
            require_writable(folder, "cache")


def save_adapter(folder: Path, adapter: Adapter, about: dict) -> None:
    """Write adapter/: the weights in diffusers' format, and adapter.json, which says how to use them."""
    with atomic_path(folder / "adapter") as temporary:
        temporary.mkdir()
        adapter.save(temporary)
        write_json(temporary / "adapter.json", about)


def export_adapter(folder: Path, formats: list[str], model: str | Path) -> None:
    """Write exports/<format>/ from the saved adapter, which was trained on this model."""
    for kind in formats:
        export(folder / "adapter", kind, folder / "exports" / kind, model)


def save_card(folder: Path, audit: Audit, judge: str, confusion: Confusion) -> None:
    """Write adapter/README.md from this audit and adapter.json, unless it exists; `save_adapter` removes an old one.

    judge, confusion: name and confusion counts of the training judge.
    """
    card = folder / "adapter" / "README.md"
    if card.exists():
        return
    about = json.loads((folder / "adapter" / "adapter.json").read_text(encoding="utf-8"))
    numbers = read_audit(audit_folder(folder, audit) / "audit.json")
    write_text(card, model_card(numbers, about, judge, confusion, hub_id(about["base_model"])))


def audit_folder(folder: Path, audit: Audit) -> Path:
    return folder / "audits" / audit.name


def finished(folder: Path, audit: Audit) -> bool:
    """Return whether this audit has been completed in this folder; its name has a hash of everything it depends on."""
    return (audit_folder(folder, audit) / "report.html").exists()


def carry_out(
    folder: Path,
    audit: Audit,
    generators_at: Callable[[float | None], dict[str, Generate]],
    lines: dict[str, list[str]],
    console: Console,
) -> None:
    """Generate the same prompts and noise with each model, measure, and write records, audit.json and the reports.

    generators_at: guidance scale -> generators of the models; for given pictures, None -> functions that read them.
    """
    where, own = audit_folder(folder, audit), audit.spec.provenance.get("guidance")
    plans = {own: (audit.plan, where)} | {s: (plan, where / "guidance" / f"{s:g}") for s, plan in audit.others.items()}
    total = sum(plan.count(generators_at(scale)) for scale, (plan, _) in plans.items())
    with progress(console) as bar:
        task = bar.add_task("audit", total=total, note="images")
        for scale, (plan, place) in plans.items():
            generators = generators_at(scale)
            run_audit(plan, generators, audit.measurer, audit.noise, place, lambda n: bar.update(task, advance=n))
    if audit.plan.world.first:
        write_json(where / "request.json", {"spec": audit.spec.to_json(), "lines": lines})
        report(where)


def report(where: Path) -> None:
    """Write audit.json, summary.md and report.html of an audit folder from its records and its run's training files."""
    folder = where.resolve().parent.parent
    history = read_metrics(folder / "metrics.jsonl")
    path = where / "request.json"
    try:
        request = json.loads(path.read_text(encoding="utf-8"))
        spec = MetricSpec.from_json(request["spec"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FairDiffError(
            f"{path}: cannot be read as the request of an audit ({type(error).__name__}); {ANEW}"
        ) from error
    records = load_records(where / "records.parquet")
    at_guidance = {float(path.name): load_records(path / "records.parquet") for path in where.glob("guidance/*")}
    metrics = compute_metrics(records, spec, at_guidance)
    write_json(where / "audit.json", metrics)
    write_text(where / "summary.md", summary(metrics, request["lines"]))
    render_report(where, metrics, request["lines"], history, folder / PICTURES)


def conclude(folder: Path, audit: Audit, console: Console, fail_above: float | None = None) -> None:
    """Print the summary table and the report's path. Raises NotWithinMargin if `fail_above` is set and not met."""
    where = audit_folder(folder, audit)
    numbers = read_audit(where / "audit.json")
    console.print(summary_table(numbers))
    print(f"report: {where / 'report.html'}", flush=True)
    if fail_above is not None and (found := not_within(numbers)):
        raise NotWithinMargin(f"audit.fail_above={fail_above:g}: {'; '.join(found)}")
