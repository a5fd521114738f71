"""The run folder: what lies in it, when it is finished, and what is printed about it.

config.yaml  metrics.jsonl  checkpoints/  adapter/  records/  records.parquet  audit.json  report.html  run.json
"""

import json
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from rich.console import Console

from fairdiff import build
from fairdiff import plan as asked
from fairdiff.audit.generate import run_audit
from fairdiff.audit.metrics import compute_metrics
from fairdiff.audit.records import load_records
from fairdiff.audit.report import render_report, summary_table
from fairdiff.build_audit import Audit
from fairdiff.config import Config
from fairdiff.diffusion.adapters import Adapter, at_origin
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.sampling import Generate, initial_noise
from fairdiff.errors import FairDiffError
from fairdiff.files import write_json, write_text
from fairdiff.prompts import Prompt
from fairdiff.training.step import Trainee
from fairdiff.training.tracking import progress, read_metrics

OUTPUTS = (
    "metrics.jsonl",
    "checkpoints",
    "adapter",
    "records",
    "records.parquet",
    "audit.json",
    "report.html",
    "run.json",
)


def check(folder: Path, config: Config, training: str) -> None:
    """Refuse a folder that holds a run of other settings; touches nothing."""
    if config.resume and read_state(folder).get("training", training) != training:
        raise FairDiffError(
            f"{folder}: holds a run with other settings{differences(folder, config)}; choose another hydra.run.dir or "
            "start over with resume=false"
        )


def differences(folder: Path, config: Config, most: int = 4) -> str:
    """" (steps: 45 there, 60 asked for)": the keys in which config.yaml differs; "" where none are known.

    A config.yaml that is missing or damaged only costs the message its detail: run.json says whether settings agree.
    """
    path = folder / "config.yaml"
    try:
        there = flat(yaml.safe_load(path.read_text())) if path.exists() else {}
    except (yaml.YAMLError, UnicodeDecodeError):
        there = {}
    wanted = flat(yaml.safe_load(yaml.safe_dump(asdict(config))))  # tuples and the like as they come back from a file
    keys = [k for k in there | wanted if k == "steps" or k.split(".")[0] not in build.NOT_TRAINING]
    found = [k for k in keys if there.get(k) != wanted.get(k)]
    if not there or not found:
        return ""
    shown = [f"{key}: {there.get(key)} there, {wanted.get(key)} asked for" for key in found[:most]]
    return f" ({'; '.join(shown)}{f' and {len(found) - most} more' if len(found) > most else ''})"


def flat(tree, prefix: str = "") -> dict:
    """{"a.b": value} of nested mappings."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, item in tree.items() for k, v in flat(item, f"{prefix}.{key}" if prefix else str(key)).items()}


def warn_about_adapter(config: Config, console: Console) -> None:
    """Say where an audit asks for something else than the adapter was trained for."""
    about = build.read_about(Path(config.adapter.path))
    wanted = {"guidance": config.sampler.guidance, "negative_prompt": config.prompts.negative}
    wanted |= {"padding": config.model.padding, "target": asked.target_lines(config)}
    for key, value in wanted.items():
        if key in about and about[key] != value:
            console.print(f"warning: adapter.path: trained with {key} {about[key]!r}, audited with {value!r}", markup=False)


def warn_about_prompts(
    model: DiffusionModel, prefix: str, trained: list[Prompt], audited: list[Prompt], console: Console
) -> None:
    """Say which audited prompts are trained on, and which prompts lose their end.

    Behind soft tokens they lose it sooner than without, which would pass for the adapter's doing.
    """
    if known := asked.not_held_out(trained, audited):
        some = ", ".join(known[:3]) + (", ..." if len(known) > 3 else "")
        line = f"warning: {len(known)} of {len(audited)} audited prompts are trained on ({some})"
        console.print(f"{line}; they say nothing about others", markup=False)
    if cut := model.overlong(prefix, list(dict.fromkeys(prompt.text for prompt in [*trained, *audited]))):
        most = model.tokenizer.model_max_length
        line = f"warning: the end of {len(cut)} prompts lies beyond the {most} tokens that are read, as of {cut[0]!r}"
        console.print(line, markup=False)


def begin(folder: Path, config: Config, training: str) -> None:
    """Make the folder this run's, emptied if asked. Only called once everything has been built."""
    if not config.resume:
        for name in OUTPUTS:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_text(folder / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))
    write_json(folder / "run.json", {"training": training})  # not finished until its end, whatever it said


def read_state(folder: Path) -> dict:
    """run.json, {} if there is none."""
    path = folder / "run.json"
    try:
        state = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        state = None
    if not isinstance(state, dict):
        raise FairDiffError(f"{path}: is no state of a run; start over with resume=false")
    return state


def finished(folder: Path, config: Config, training: str, setup: Audit) -> bool:
    """Whether exactly this training and this audit have been completed."""
    if not config.resume:
        return False
    done = read_state(folder).get("finished") == [training, config.steps, setup.fingerprint]
    return done and (folder / "report.html").exists()


def print_budget(config: Config, trainee: Trainee, prompts: list[Prompt], audit: Audit, console: Console) -> None:
    """What is about to be done, in pictures and steps."""
    each = config.prompts.per_step
    parameters = sum(p.numel() for p in trainee.adapter.parameters())
    models = ["before", "after"] if trainee.adapter.origin is None else ["before", "start", "after"]
    console.print(f"target: {'; '.join(asked.target_lines(config))}")
    console.print(
        f"adapter: {trainee.adapter.kind}, {parameters:,} parameters, learning rate {config.adapter.learning_rate:g}"
    )
    console.print(
        f"budget: {config.steps} steps of {each} prompts with {config.global_batch} pictures each, "
        f"{min(config.steps * each, len(prompts))} of {len(prompts)} training prompts, "
        f"at most {most_originals(config, len(prompts))} originals (cached), "
        f"audit of {len(models) * audit.plan.images_per_model} pictures ({len(audit.plan.prompts)} prompts, "
        f"{', '.join(models)})"
    )


def most_originals(config: Config, prompts: int) -> int:
    """How many originals a run of so many training prompts can paint: whole blocks of a batch, validation included."""
    block, visits = config.global_batch, config.steps * config.prompts.per_step
    each = build.compared_pictures(config)  # of a block
    low, high = config.sampler.train_steps
    slices = min(visits, prompts) * (config.noise_pool // block) * min(high - low + 1, config.steps)
    found = min(visits, slices) * each  # a slice a visit, each once for every T
    watched = len(asked.validated(config))
    found += watched * -(-config.validation.images // block) * block
    if config.target["relaxation"]:  # every prompt's own shares, at the middle of the training steps
        found += (min(visits, prompts) + watched) * -(-build.own_pictures(config) // block) * block
    return found


def save_adapter(folder: Path, config: Config, training: str, trainee: Trainee) -> None:
    """adapter/: weights in diffusers' format beside adapter.json, which says how to use them."""
    temporary, target = folder / "adapter.tmp", folder / "adapter"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    trainee.adapter.save(temporary)
    about = {
        "type": trainee.adapter.kind,
        "options": " ".join(f"adapter.{key}={value}" for key, value in build.adapter_options(config).items()),
        "load_with": "load_textual_inversion" if trainee.adapter.kind == "soft_tokens" else "load_lora_weights",
        "prompt_prefix": "<fairdiff> " if trainee.adapter.kind == "soft_tokens" else "",
        "guidance": config.sampler.guidance,
        "negative_prompt": config.prompts.negative,
        "padding": config.model.padding,
        "target": asked.target_lines(config),
        "training": training,
    }
    write_json(temporary / "adapter.json", about)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def painters(config: Config, model: DiffusionModel, adapter: Adapter | None) -> dict[str, Generate]:
    """ "before": the frozen model; "after": with the adapter, if there is one.

    "start": with the adapter as it was before training, where that changes images: initial words, a loaded adapter.
    """
    paint = (config.sampler.guidance, config.sampler.audit_steps)

    def before(prompt: str, noise: torch.Tensor) -> torch.Tensor:
        with adapter.off() if adapter else nullcontext():
            return model.generator(*paint)(prompt, noise.to(model.unet.device))

    def after(prompt: str, noise: torch.Tensor) -> torch.Tensor:
        return model.generator(*paint, adapter.prefix)(prompt, noise.to(model.unet.device))

    def start(prompt: str, noise: torch.Tensor) -> torch.Tensor:
        with at_origin(adapter):
            return after(prompt, noise)

    if adapter is None:
        return {"before": before}
    return {"before": before} | ({} if adapter.origin is None else {"start": start}) | {"after": after}


def audit(
    folder: Path, config: Config, training: str, generators: dict[str, Generate], setup: Audit, console: Console
) -> None:
    """Paint the same prompts and noise with each model, measure, and write records, audit.json and report.html."""
    with progress(console) as bar:
        task = bar.add_task("audit", total=len(generators) * setup.plan.images_per_model, note="pictures")
        run_audit(setup.plan, generators, setup.measurer, initial_noise, folder, lambda n: bar.update(task, advance=n))
    metrics = compute_metrics(load_records(folder / "records.parquet"), setup.spec)
    write_json(folder / "audit.json", metrics)
    history = read_metrics(folder / "metrics.jsonl")
    render_report(folder, metrics, about(config, generators, bool(history)), history)
    done = {"finished": [training, config.steps, setup.fingerprint], "at": time.strftime("%F %T")}
    write_json(folder / "run.json", read_state(folder) | done)


def about(config: Config, generators: dict[str, Generate], trained: bool) -> dict[str, list[str]]:
    """What was asked, as lines for the report: of the adapter where there is one, of its training where it was here."""
    lines = {"target": asked.target_lines(config)}
    if "after" in generators:
        lines["adapter"] = [f"{key}: {value}" for key, value in build.adapter_options(config).items()]
    if trained:
        keys = ["steps", "global_batch", "noise_pool", "seed", "prompts", "loss", "gradient", "optimizer"]
        keys += ["validation"] if config.validation.every else []
        settings = flat({key: asdict(config)[key] for key in keys})
        lines["training"] = [f"{key}: {value}" for key, value in settings.items() if value not in (None, "")]
    lines["sampler"] = [f"{key}: {value}" for key, value in asdict(config.sampler).items()]
    return lines


def conclude(folder: Path, console: Console) -> None:
    """Print the table; the last line names the report."""
    console.print(summary_table(json.loads((folder / "audit.json").read_text())))
    print(f"report: {folder / 'report.html'}")
