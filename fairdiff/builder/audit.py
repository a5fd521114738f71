"""Build an audit from configuration and plan: what it generates, measures and counts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from classifiers.calibration import CALIBRATION_FILE, load_calibration
from classifiers.zeroshot import ZeroShotClassifier
from fairdiff import builder, fingerprint
from fairdiff.audit.axis import MetricSpec, groups_of, software_versions
from fairdiff.audit.card import EMBEDDED
from fairdiff.audit.estimand import SEVERAL_REFUSED
from fairdiff.audit.generate import AuditPlan, Generate, Noise
from fairdiff.audit.measure import Measurer, measure
from fairdiff.audit.metrics import SCHEMA as METRICS_SCHEMA
from fairdiff.audit.records import SCHEMA as RECORDS_SCHEMA
from fairdiff.builder import Judge, build_classifier, build_detector, build_encoders, crop_of, detector_fingerprint
from fairdiff.builder.calibration import build_confusion, not_corrected, read_confusion
from fairdiff.config import Config, JudgeConfig
from fairdiff.diffusion.adapters import Adapter, at_origin
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.memory import Parts, Pieces, bytes_of, plan_pieces
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.distributed import ALONE, World
from fairdiff.errors import FairDiffError, blame
from fairdiff.plan import Plan
from fairdiff.portraits import weights

SAME_ENCODERS = "those of `features`, which an image term of training optimises"
FEW = 16  # images of each prompt without people, and of each that names a class


@dataclass(frozen=True)
class Audit:
    """An audit ready to run: what is generated, what looks at it, and what is counted. name: of its folder.

    others: the same prompts of people at further guidance scales. noise: what images are generated from.
    """

    plan: AuditPlan
    others: dict[float, AuditPlan]
    measurer: Measurer
    spec: MetricSpec
    name: str
    noise: Noise

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The audit judge in the machine's memory while the device trains."""
        judge = self.measurer.judge
        device = next(tensor.device for tensor in (*judge.parameters(), *judge.buffers()))
        judge.to("cpu")
        try:
            yield
        finally:
            judge.to(device)


def training_judge(config: Config) -> tuple[str, dict[str, np.ndarray]]:
    """The training judge for the model card: its name and its confusion counts, {} if unknown."""
    name, net = judge_name(config.judge, "embedded training judge"), config.judge.type == "net"
    file = Path(config.judge.path or weights("judge")) / CALIBRATION_FILE if net else None
    if file is None or not file.exists():
        return name, {}
    with blame("judge.path"):
        calibrations, _ = load_calibration(file)
    return name, {attribute: calibration.counts for attribute, calibration in calibrations.items()}


def judge_name(judge: JudgeConfig, embedded: str = "embedded audit judge") -> str:
    """The name of an attribute classifier in the report."""
    if judge.type == "net":
        return judge.path or embedded
    paths = judge.path.values() if isinstance(judge.path, dict) else [judge.path or ""]
    return f"{judge.type}: " + ", ".join(sorted(set(paths)))


def build_audit_judge(config: Config, plan: Plan) -> Judge:
    return build_classifier(config.audit.judge, "audit.judge", "audit_judge", plan.attributes, config.model.device)


def build_measurer(config: Config, judge: Judge, encoders: Sequence) -> tuple[Measurer, str]:
    """The measurer of an audit's images, and a hash of everything that its results depend on.

    encoders: those of `build_encoders`, None for one that is not at hand.
    """
    detector = build_detector(config)
    looking = [fingerprint.of_frozen(judge), judge.config]
    looking += [judge.wordings] if isinstance(judge, ZeroShotClassifier) and judge.wordings else []
    looking += [item for e in encoders if e for item in (fingerprint.of_frozen(e.model), e.config)]
    looking += ["one face"] if config.audit.faces == "refuse" else []
    crop = crop_of(config, config.audit.judge)
    hashed = fingerprint.of_values(looking, detector_fingerprint(config, detector, config.audit.judge))
    refuse = config.audit.faces == "refuse"
    return Measurer(detector, judge, *encoders, crop.crop_size, crop.expand, crop.align, refuse), hashed


def build_spec(
    config: Config, plan: Plan, judge: Judge, training_judge: Judge | None, provenance: dict
) -> MetricSpec:
    """The specification of what an audit counts, with facts about the judge for the report."""
    options, attributes = config.audit, dict(judge.attributes)
    groups = groups_of([name for name in attributes if name in plan.attributes])
    about_judge: dict = {"path": judge_name(options.judge)}
    if training_judge is not None:  # else nobody knows here what trained the adapter, if there is one
        same = fingerprint.of_frozen(judge) == fingerprint.of_frozen(training_judge)
        about_judge["same_as_training_judge"] = same
    if isinstance(judge, ZeroShotClassifier):
        about_judge |= {"prompts": judge.config["prompts"], "wordings": judge.wordings}
    if reason := not_corrected(config):
        about_judge["not_corrected"] = reason
    return MetricSpec(
        attributes=attributes,
        judge=about_judge,
        targets=plan.targets.audited(groups, [p.text for p in plan.audit]),
        confusion=build_confusion(config, judge),
        delta=options.margin,
        drift=options.drift,
        seed=options.seed,
        provenance=provenance,
    )


def spec_to_plan_by(config: Config, plan: Plan) -> MetricSpec:
    """The specification for planning an audit, without building models: attributes, targets, margin, counted errors."""
    return MetricSpec(
        attributes=plan.attributes,
        judge={"path": judge_name(config.audit.judge)},
        targets=plan.targets.audited(groups_of([*plan.attributes]), [p.text for p in plan.audit]),
        confusion=read_confusion(config),
        delta=config.audit.margin,
        seed=config.audit.seed,
    )


def build_audit(
    config: Config,
    plan: Plan,
    model: DiffusionModel,
    after: str | None,
    training_judge: Judge | None,
    world: World = ALONE,
) -> Audit:
    """The audit of a model, with a classifier of its own (`audit.judge`) and both encoders.

    after: a fingerprint of the adapter's making. Build the audit before an adapter is hung on the model, so that the
    hashes are those of the frozen weights.
    """
    options = config.audit
    judge = build_audit_judge(config, plan)
    with naming_own_encoders(config):
        encoders = build_encoders(*encoder_paths(config), config.model.device)
    measurer, looking_hash = build_measurer(config, judge, encoders)
    spec = build_spec(config, plan, judge, training_judge, provenance(config, plan, model))
    own = model.effective_guidance(config.sampler.guidance)
    scales = [own, *sorted({model.effective_guidance(scale) for scale in options.guidance} - {own})]
    started = [builder.adapter_options(config), builder.adapter_fingerprint(config)]
    hashes = {scale: record_hashes(config, model, scale, started, after) | {"judge": looking_hash} for scale in scales}
    few_images = min(FEW, options.images_per_prompt)
    shared = {scale: _shared_folder(config, found, few_images) for scale, found in hashes.items()}
    audit_plan = AuditPlan(
        prompts=plan.audit,
        named=plan.named,
        without_people=plan.without_people,
        attributes=spec.attributes,
        images_per_prompt=options.images_per_prompt,
        few_images=few_images,
        batch_size=audit_pieces(config, model, measurer).sample,
        seed=options.seed,
        latent_shape=model.latent_shape,
        hashes=hashes[own],
        shared=shared[own],
        world=world,
        keep=options.keep_images,
    )
    others = {
        scale: replace(audit_plan, named=(), without_people=(), hashes=hashes[scale], shared=shared[scale])
        for scale in scales[1:]
    }
    name = audit_name(f"{options.split}-{len(plan.audit)}x{options.images_per_prompt}", audit_plan, spec, [*others])
    name += "-kept" if options.keep_images else ""  # measured on 8 bits
    return Audit(audit_plan, others, measurer, spec, name, initial_noise)


def record_hashes(
    config: Config, model: DiffusionModel, scale: float, started: list, after: str | None
) -> dict[str, str]:
    """A hash for each model of all that its images depend on at a guidance scale. started: the adapter before training."""
    frozen = fingerprint.of_values(model.fingerprint(), scale, config.sampler.audit_steps)
    return {
        "before": frozen,
        "start": fingerprint.of_values(frozen, started),
        "after": fingerprint.of_values(frozen, after, config.steps),
    }


def _shared_folder(config: Config, hashes: dict[str, str], few_images: int) -> Path | None:
    """For records of the frozen model: one for each size, else audits of two sizes would overwrite each other; without
    images, so none for audits that keep them."""
    options = config.audit
    sizes = (options.images_per_prompt, few_images, options.seed)
    key = fingerprint.of_values(RECORDS_SCHEMA, hashes["before"], hashes["judge"], *sizes)
    return Path(config.cache) / "audits" / key if config.cache and not options.keep_images else None


def audit_pieces(config: Config, model: DiffusionModel, measurer: Measurer) -> Pieces:
    """The micro-batches of an audit, planned if `memory_gb` is given, and set on the model."""
    pieces = Pieces.of(config.micro_batch)
    if config.memory_gb is not None:
        looking = [measurer.detector, measurer.judge, measurer.clip.model, measurer.encoder.model]
        held = bytes_of(module for module in looking if isinstance(module, torch.nn.Module))
        look = torch.no_grad()(lambda image_BCHW: measure(measurer, image_BCHW, ""))
        pieces = plan_pieces(Parts(model, look), config.memory_gb, held)
    pieces.apply(model)
    return pieces


def audit_name(words: str, plan: AuditPlan, spec: MetricSpec, more: list) -> str:
    """The folder of an audit below its training: "test-24x60-3f9a2c1b", sizes in words and a hash of all it depends on."""
    every = (plan.prompts, plan.named, plan.without_people)
    texts = [[(p.text, p.family, p.subject, p.names) for p in some] for some in every]
    sizes = [plan.images_per_prompt, plan.few_images, plan.seed, spec.delta, spec.drift]
    tables = [{k: v.tolist() for k, v in table.items()} for table in (spec.targets, spec.confusion)]
    key = fingerprint.of_values(RECORDS_SCHEMA, METRICS_SCHEMA, plan.hashes, texts, sizes, tables, more)
    return f"{words}-{key[:8]}"


def crop_in_words(config: Config) -> str:
    """The audit judge's face crop in words."""
    crop = crop_of(config, config.audit.judge)
    return f"{crop.crop_size} pixels, " + ("aligned on five landmarks" if crop.align else f"{crop.expand:g} times the face")


def encoder_paths(config: Config) -> tuple[str, str]:
    """CLIP and the image encoder of the audit: its own, or those of `features`."""
    return config.audit.clip or config.features.clip, config.audit.encoder or config.features.encoder


@contextmanager
def naming_own_encoders(config: Config) -> Iterator[None]:
    """An error of an encoder that the audit has for itself names `audit.clip` or `audit.encoder`."""
    try:
        yield
    except FairDiffError as error:
        text = str(error)
        for name, own in (("clip", config.audit.clip), ("encoder", config.audit.encoder)):
            if own and text.startswith(f"features.{name}: "):
                raise FairDiffError(text.replace("features.", "audit.", 1)) from error
        raise


def looking_in_words(config: Config) -> dict[str, str]:
    """What the report says of what looks at the images of every kind of audit, but for the judge and the encoders."""
    apart = encoder_paths(config)[0] != config.features.clip and encoder_paths(config)[1] != config.features.encoder
    said = {"detector": config.detector.type, "crop": crop_in_words(config)}
    if config.audit.faces == "refuse":
        said["several_faces"] = SEVERAL_REFUSED
    return said | {"encoders": "others than those of `features`" if apart else SAME_ENCODERS}


def provenance(config: Config, plan: Plan, model: DiffusionModel) -> dict:
    """What the report says of the making of the images and of what looked at them."""
    return {
        "software": software_versions(),
        "model": config.model.path or EMBEDDED,
        "sampling_dtype": str(model.sampling_dtype).removeprefix("torch."),
        "guidance": config.sampler.guidance,
        "sampler_steps": config.sampler.audit_steps,
        "scheduler": type(model.scheduler).__name__,
        "padding": config.model.padding,
        "clip_skip": config.model.clip_skip or "none",
        "image_size": "×".join(map(str, model.image_size[::-1])),
        "negative_prompt": config.prompts.negative or "none",
        "target": "; ".join(plan.target_lines),
        "CLIP": encoder_paths(config)[0],
        "image encoder": encoder_paths(config)[1],
    } | looking_in_words(config)


def build_generators(
    config: Config, model: DiffusionModel, adapter: Adapter | None, guidance: float
) -> dict[str, Generate]:
    """At a guidance scale, "before": the frozen model; "after": with the adapter, if there is one.

    "start": with the adapter as it was before training, where that changes images: initial words, a loaded adapter.
    """
    options = (guidance, config.sampler.audit_steps)

    def before(prompt: str, noise: torch.Tensor) -> torch.Tensor:
        with adapter.off() if adapter else nullcontext():
            return model.generator(*options)(prompt, noise.to(model.unet.device))

    def after(prompt: str, noise: torch.Tensor) -> torch.Tensor:
        return model.generator(*options, adapter.prefix)(prompt, noise.to(model.unet.device))

    def start(prompt: str, noise: torch.Tensor) -> torch.Tensor:
        with at_origin(adapter):
            return after(prompt, noise)

    if adapter is None:
        return {"before": before}
    return {"before": before} | ({} if adapter.origin is None else {"start": start}) | {"after": after}
