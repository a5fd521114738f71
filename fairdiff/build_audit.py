"""From the configuration to an audit: what is painted, who looks, and what is asked of the counts."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from classifiers.calibration import CALIBRATION_FILE, load_calibration
from fairdiff import build
from fairdiff import plan as asked
from fairdiff.audit.axis import MetricSpec, groups_of, software_versions
from fairdiff.audit.correction import check_confusion
from fairdiff.audit.generate import AuditPlan
from fairdiff.audit.measure import Measurer
from fairdiff.build import (
    Judge,
    build_classifier,
    build_detector,
    build_encoders,
    eyes_key,
)
from fairdiff.config import Config, JudgeConfig
from fairdiff.diffusion.load import DiffusionModel, digest, fingerprint
from fairdiff.errors import FairDiffError, blame
from fairdiff.portraits import weights


def build_confusion(config: Config, attributes: dict[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
    """The audit judge's confusion counts [K, K] per attribute, {} if no calibration lies beside its weights."""
    judge = config.audit.judge
    file = (Path(judge.path) if judge.path else weights("audit_judge")) / CALIBRATION_FILE
    if judge.type != "net" or not file.exists():
        return {}
    with blame("audit.judge.path"):
        calibrations = load_calibration(file)
    for name, calibration in calibrations.items():
        if attributes.get(name) != calibration.classes:
            raise FairDiffError(
                f"audit.judge.path: {file}: {name} has the classes {calibration.classes}, the judge {attributes.get(name)}"
            )
        with blame("audit.judge.path", f": {file}: {name}: "):
            check_confusion(calibration.counts, len(calibration.classes))
    return {name: calibration.counts for name, calibration in calibrations.items()}


@dataclass(frozen=True)
class Audit:
    """An audit ready to run: what is painted, who looks at it, and what is counted."""

    plan: AuditPlan
    measurer: Measurer
    spec: MetricSpec

    @property
    def fingerprint(self) -> str:
        """A short hash of what is painted, who looks and what is asked of the counts."""
        plan, spec = self.plan, self.spec
        texts = [[(p.text, p.family, p.subject) for p in some] for some in (plan.prompts, plan.unrelated)]
        sizes = [plan.images_per_prompt, plan.unrelated_images, plan.seed, spec.delta, spec.drift]
        tables = [{k: v.tolist() for k, v in table.items()} for table in (spec.targets, spec.confusion)]
        return digest(plan.hashes, texts, sizes, tables)


def _name(judge: JudgeConfig) -> str:
    """What the report calls a judge."""
    if judge.type == "net":
        return judge.path or "embedded audit judge"
    return f"{judge.type}: " + ", ".join(sorted({judge.path or "", *judge.paths.values()} - {""}))


def build_audit(config: Config, model: DiffusionModel, after: str | None, training_judge: Judge | None) -> Audit:
    """The audit of a model, with a judge of its own (`audit.judge`) and both encoders.

    after: a hash of the adapter's making. Build the audit before an adapter is hung on the model, so that the hashes
    are those of the frozen weights.
    """
    judge = build_classifier(config.audit.judge, "audit.judge", "audit_judge", config)
    clip, encoder = build_encoders(config.features.clip, config.features.encoder, config.model.device)
    attributes = {name: judge.attributes[name] for name in judge.attributes}
    detector = build_detector(config)
    crop = config.detector
    prompts = asked.audited(config)
    groups = groups_of([name for name in attributes if name in config.attributes])
    about_judge: dict = {"path": _name(config.audit.judge)}
    if training_judge is not None:  # else nobody knows here what trained the adapter, if there is one
        about_judge["same_as_training_judge"] = fingerprint(judge) == fingerprint(training_judge)
    frozen = digest(model.fingerprint(), config.sampler.guidance, config.sampler.audit_steps)
    confusion = build_confusion(config, attributes)
    looking = [fingerprint(judge), judge.config]
    looking += [item for e in (clip, encoder) for item in (fingerprint(e.model), e.config)]
    hashes = {
        "before": frozen,
        "start": digest(frozen, build.adapter_options(config), build.adapter_fingerprint(config)),
        "after": digest(frozen, after, config.steps),
        "judge": digest(looking, eyes_key(config, detector)),
    }
    sizes = (config.audit.images_per_prompt, config.audit.unrelated_images, config.audit.seed)
    shared = digest(hashes["before"], hashes["judge"], *sizes)  # else audits of two sizes would overwrite each other
    plan = AuditPlan(
        prompts=prompts,
        unrelated=asked.unrelated(config),
        attributes=attributes,
        images_per_prompt=config.audit.images_per_prompt,
        unrelated_images=config.audit.unrelated_images,
        batch_size=config.audit.batch_size,
        seed=config.audit.seed,
        latent_shape=model.latent_shape,
        hashes=hashes,
        shared=Path(config.cache) / "audits" / shared if config.cache else None,
    )
    spec = MetricSpec(
        attributes=attributes,
        judge=about_judge,
        targets=asked.targets(config, prompts).audited(groups, [p.text for p in prompts]),
        confusion=confusion,
        delta=config.audit.equivalence,
        drift=config.audit.drift,
        seed=config.audit.seed,
        provenance={
            "software": software_versions(),
            "model": config.model.path or "embedded Portraits model",
            "sampling_dtype": config.model.sampling_dtype,
            "guidance": config.sampler.guidance,
            "sampler_steps": config.sampler.audit_steps,
            "scheduler": type(model.scheduler).__name__,
            "padding": config.model.padding,
            "negative_prompt": config.prompts.negative or "none",
            "target": "; ".join(asked.target_lines(config)),
            "CLIP": config.features.clip,
            "image encoder": config.features.encoder,
            "detector": config.detector.type,
        },
    )
    return Audit(plan, Measurer(detector, judge, clip, encoder, crop.crop_size, crop.expand), spec)
