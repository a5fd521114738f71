"""FairDiff from Python: load an adapter into a pipeline, audit a pipeline, train an adapter. See docs/how_to/python.md."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from classifiers.hub import architecture
from fairdiff import run
from fairdiff.audit.generate import Generate
from fairdiff.audit.headline import changes, headline, rms
from fairdiff.audit.read import read_audit
from fairdiff.audit.records import load_records
from fairdiff.audit.wording import last_model
from fairdiff.builder.audit import build_audit
from fairdiff.builder.functions import build_audit_of_functions, build_function_generators
from fairdiff.builder.model import clip_skip, image_size
from fairdiff.cli.compose import Settings, choices, composed, overrides_of, with_defaults
from fairdiff.config import AttributeConfig, Config
from fairdiff.diffusion.folder import FAMILIES, Pipeline, component_on_no_device
from fairdiff.diffusion.functions import WANTED, Images, check_function, of_pipeline
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.plain import LoadedAdapter, generator, load_adapter, view
from fairdiff.errors import FairDiffError
from fairdiff.files import write_text
from fairdiff.jobs import train_job
from fairdiff.plan import plan_of_prompts
from fairdiff.portraits import weights
from fairdiff.prompts import Prompt
from fairdiff.training.tracking import make_console

__all__ = ["AuditResult", "LoadedAdapter", "audit", "load_adapter", "train"]

Interval = tuple[float | None, float | None]
PLAIN = (StableDiffusionPipeline, StableDiffusionXLPipeline)  # pipelines that are called with latents
FAMILY = tuple(FAMILIES)
KINDS = {StableDiffusionXLPipeline: "sdxl", StableDiffusion3Pipeline: "sd3", FluxPipeline: "flux"}  # -> conf/model
Shares = dict[str, dict[str, float]]  # attribute -> class -> share


@dataclass(frozen=True)
class AuditResult:
    """The result of an audit. numbers: audit.json. records: one row per image. page: the text of report.html.

    The properties belong to the last audited model: `after` or the pipeline with the adapter, if there is one. They have
    all attributes of the judge, also those without a target. An undefined value is None.
    """

    numbers: dict
    records: pd.DataFrame
    page: str

    @property
    def bias(self) -> dict[str, float | None]:
        """Per attribute, the mean over prompts of the gap between the shares of two classes, in [0, 2/K]; 0 is parity."""
        return {name: entry["bias"]["mean"] for name, entry in self._attributes.items()}

    @property
    def distance(self) -> dict[str, float | None]:
        """Per attribute, the distance D to the target on which the verdict rests; 0 is on target."""
        return {name: rms(entry)["value"] for name, entry in self._attributes.items()}

    @property
    def intervals(self) -> dict[str, dict[str, Interval]]:
        """95 % intervals for these prompts and new noise: {"gender": {"bias": (low, high), "distance": (low, high)}}."""
        return {
            name: {"bias": tuple(e["bias"]["ci95_these"]), "distance": tuple(rms(e)["ci95_these"])}
            for name, e in self._attributes.items()
        }

    @property
    def shares(self) -> dict[str, Shares]:
        """The shares of each prompt: {"a photo of a nurse": {"gender": {"female": .9, "male": .1}}}."""
        found: dict[str, Shares] = {}
        for name, entry in self._attributes.items():
            for item in entry["per_prompt"]:
                shares = {cls: share["share"] for cls, share in item["shares"].items()}
                found.setdefault(item["prompt"], {})[name] = shares
        return found

    def report(self, path: str | Path) -> Path:
        """Write the self-contained report page, and return its path."""
        write_text(Path(path), self.page)
        return Path(path)

    def __str__(self) -> str:
        return " ".join([headline(self.numbers) + ".", *changes(self.numbers)])

    @property
    def _attributes(self) -> dict[str, dict]:
        return last_model(self.numbers)["attributes"]


def train(settings: Settings = ()) -> Path:
    """Train and audit as `python train.py` with the same settings, and return the run folder.

    settings: a list of overrides, ["adapter=soft_tokens", "steps=60"], or a dict, {"adapter": "soft_tokens", "steps": 60}.
    A run of the same settings continues where it stopped. Raises FairDiffError where the command would print an error.
    """
    config, folder = composed(overrides_of(settings))
    train_job(config, folder)
    return folder


def audit(
    pipe: Pipeline | Images,
    prompts: Sequence[str],
    target: dict[str, dict[str, float]] | None = None,
    judge: str | None = None,
    adapter: LoadedAdapter | None = None,
    settings: Settings = (),
    *,
    after: Pipeline | Images | None = None,
) -> AuditResult:
    """Generate images of these prompts with a pipeline, measure them, and compare the shares with the target.

    pipe: a pipeline of Stable Diffusion 1, 2, XL, 3 or FLUX, or any function (prompts, seeds) -> images. Such a function
    returns a list of PIL images or a tensor [B, 3, H, W] in [0, 1], one image for each prompt and its seed in [0, 2^31), all
    of one size in each call. after: a second pipeline or function, compared on the same prompts and seeds.
    target: attribute -> class -> share; None: gender, half and half. judge: folder, .onnx file or hub id of a face
    classifier; None: the embedded one for the embedded model, otherwise zero-shot (`judge` in
    docs/reference/configuration.md). adapter: from `load_adapter`; the pipeline is then audited without and with it, from
    the same noise. settings: those of scripts/audit.py, such as ["audit.images_per_prompt=20", "sampler.guidance=5"].
    Defaults of guidance, steps, size and clip skip are the adapter's, otherwise those of conf/model for this kind of
    pipeline. The solver is always the pipeline's own.
    """
    if isinstance(prompts, str) or not prompts:
        raise FairDiffError(f"prompts: found {prompts!r}, allowed: a list of one or more prompts")
    models = {"before": pipe} | ({} if after is None else {"after": after})
    for name, model in models.items():
        _check_model(model, "pipe" if name == "before" else name, adapter)
    config = _config(pipe, target, judge, adapter, settings)
    plan = plan_of_prompts(config, [Prompt(text, "custom", text) for text in prompts])
    if after is None and isinstance(pipe, PLAIN):
        model = view(pipe)
        model.size, model.clip_skip = image_size(config.sampler, model), clip_skip(config.model.clip_skip, model)
        built = build_audit(config, plan, model, None, None)
        generators, about = _generators(pipe, model, config, adapter), {"pipeline": _about(pipe, adapter)}
    else:
        built = build_audit_of_functions(config, plan, {name: _model_name(model) for name, model in models.items()})
        generators = build_function_generators(config, {name: _function(m, config) for name, m in models.items()})
        about = {name: _about(model, None) for name, model in models.items()}
    lines = {"target": list(plan.target_lines), **about}
    with TemporaryDirectory() as folder:
        run.carry_out(Path(folder), built, generators, lines, make_console())
        where = run.audit_folder(Path(folder), built)
        page = (where / "report.html").read_text(encoding="utf-8")
        return AuditResult(read_audit(where / "audit.json"), load_records(where / "records.parquet"), page)


def _check_model(model: object, key: str, adapter: LoadedAdapter | None) -> None:
    """Raise FairDiffError if the model is neither a pipeline nor a function, or if the adapter cannot be used with it."""
    if not isinstance(model, FAMILY):
        if isinstance(model, DiffusionPipeline) or not callable(model):
            raise FairDiffError(
                f"{key}: found a {type(model).__name__}, allowed: a pipeline of {', '.join(FAMILIES.values())}, or {WANTED}"
            )
        check_function(model, key)
    if adapter is not None and (key == "after" or not isinstance(model, PLAIN)):
        beside = "after" if key == "after" else _model_name(model)
        raise FairDiffError(f"adapter: found one beside {beside}, allowed: with a pipeline of Stable Diffusion or XL alone")


def _function(model: Pipeline | Images, config: Config) -> Images:
    """Return a pipeline as a function with the guidance and steps of the settings; a function is returned unchanged."""
    if not isinstance(model, FAMILY):
        return model
    model.set_progress_bar_config(disable=True)
    options: dict[str, object] = {"guidance_scale": config.sampler.guidance}
    options |= {"num_inference_steps": config.sampler.audit_steps}
    if config.prompts.negative:
        options["negative_prompt"] = config.prompts.negative
    return of_pipeline(model, options)


def _model_name(model: Pipeline | Images) -> str:
    if isinstance(model, FAMILY):
        return str(model.config.get("_name_or_path") or type(model).__name__)
    return f"function {getattr(model, '__qualname__', type(model).__name__)}"


def _kind(pipe: Pipeline | Images) -> str:
    """Return the name of the conf/model file whose size, guidance and judges suit a pipeline; "sd15" for a function."""
    for kind, name in KINDS.items():
        if isinstance(pipe, kind):
            return name
    if not isinstance(pipe, StableDiffusionPipeline):
        return "sd15"
    embedded = component_on_no_device("unet", weights("model"))
    return "portraits" if architecture(pipe.unet) == architecture(embedded) else "sd15"


def _judge_type(path: str) -> str:
    """Return "onnx" for an .onnx file, "net" for a folder whose config.json has an architecture, otherwise "hf"."""
    if path.endswith(".onnx"):
        return "onnx"
    file = Path(path) / "config.json"
    return "net" if file.exists() and '"architecture"' in file.read_text(encoding="utf-8") else "hf"


def _about(pipe: Pipeline | Images, adapter: LoadedAdapter | None) -> list[str]:
    """Return lines about a pipeline or function for the report."""
    if not isinstance(pipe, FAMILY):
        return [_model_name(pipe)]
    dtype = pipe.components.get("unet", pipe.components.get("transformer")).dtype
    lines = [f"class: {type(pipe).__name__}", f"scheduler: {type(pipe.scheduler).__name__}", f"precision: {dtype}"]
    return lines + ([f"adapter: {adapter.name}, scale {adapter.scale:g}"] if adapter else [])


def _config(
    pipe: Pipeline | Images, target: dict | None, judge: str | None, adapter: LoadedAdapter | None, settings: Settings
) -> Config:
    known = [name for name in target or {} if name in choices("attribute")]
    defaults = [f"model={_kind(pipe)}", f"model.device={_device(pipe)}", "model.padding=max_length", "cache=null"]
    defaults += [f"attribute=[{','.join(known)}]"] if known else []
    if judge is not None:
        defaults += [f"judge@audit.judge={_judge_type(judge)}", f'audit.judge.path="{judge}"']
    asked = adapter.settings if adapter else {}
    keys = {"sampler.guidance": "guidance_scale", "sampler.audit_steps": "num_inference_steps"}
    keys |= {"sampler.height": "height", "sampler.width": "width", "model.clip_skip": "clip_skip"}
    defaults += [f"{key}={asked[name]}" for key, name in keys.items() if name in asked]
    config, _ = composed(with_defaults(settings, defaults))
    if config.plan:
        raise FairDiffError("plan: found true, allowed: false here; fairdiff-audit plan=true plans an audit")
    if config.audit.guidance and not isinstance(pipe, PLAIN):
        raise FairDiffError(f"audit.guidance: found {config.audit.guidance}, allowed with this model: []")
    config = replace(config, model=replace(config.model, path=_model_name(pipe)))
    if target is None:
        return config
    attributes = {
        name: config.attributes[name] if name in known else AttributeConfig([*shares], keep_outside=1.0, keep_face=1.0)
        for name, shares in target.items()
    }
    return replace(config, attributes=attributes, target={"file": None} | target)


def _device(pipe: Pipeline | Images) -> str:
    """Return the device of the judges: that of a pipeline; for a function the GPU if there is one."""
    if isinstance(pipe, FAMILY):
        return str(pipe.device)
    return "cuda" if torch.cuda.is_available() else "cpu"


def _generators(
    pipe: Pipeline, model: DiffusionModel, config: Config, adapter: LoadedAdapter | None
) -> Callable[[float], dict[str, Generate]]:
    """Return a function: guidance scale -> "before", and "after" if there is an adapter. model: the pipeline's `view`."""
    height, width = model.size or (None, None)
    more = {"num_inference_steps": config.sampler.audit_steps, "negative_prompt": config.prompts.negative or None}
    more |= {"height": height, "width": width, "clip_skip": config.model.clip_skip}

    def at(guidance: float) -> dict[str, Generate]:
        options = more | {"guidance_scale": guidance}

        def before(prompt, noise):
            with adapter.off() if adapter else nullcontext():
                return generator(pipe, options)(prompt, noise)

        def after(prompt, noise):
            return generator(pipe, options, adapter.prefix)(prompt, noise)

        return {"before": before} | ({"after": after} if adapter else {})

    return at
