"""Build an audit of images that user-supplied functions return."""

from collections.abc import Callable, Mapping

from fairdiff import fingerprint
from fairdiff.audit.axis import software_versions
from fairdiff.audit.generate import AuditPlan, Generate
from fairdiff.builder.audit import (
    FEW,
    Audit,
    audit_name,
    build_audit_judge,
    build_measurer,
    build_spec,
    looking_in_words,
)
from fairdiff.builder.pictures import encoders_at_hand
from fairdiff.config import Config
from fairdiff.diffusion.functions import Images, of_function, seeds
from fairdiff.diffusion.load import check_device
from fairdiff.diffusion.memory import Pieces
from fairdiff.plan import Plan


def build_audit_of_functions(config: Config, plan: Plan, about: Mapping[str, str]) -> Audit:
    """The audit of models that are functions, by `audit.judge` and the encoders that are at hand.

    about: what the report says of each model. Nothing is shared with other audits: a function has no hash.
    """
    check_device(config.model.device)
    judge = build_audit_judge(config, plan)
    encoders, about_encoders = encoders_at_hand(config)
    measurer, looking_hash = build_measurer(config, judge, encoders)
    spec = build_spec(config, plan, judge, None, provenance(config, plan, about) | about_encoders)
    images = config.audit.images_per_prompt
    audit_plan = AuditPlan(
        prompts=plan.audit,
        named=plan.named,
        without_people=plan.without_people,
        attributes=spec.attributes,
        images_per_prompt=images,
        few_images=min(FEW, images),
        batch_size=Pieces.of(config.micro_batch).sample,
        seed=config.audit.seed,
        latent_shape=(),
        hashes={model: fingerprint.of_values(name) for model, name in about.items()} | {"judge": looking_hash},
    )
    name = audit_name(f"function-{len(plan.audit)}x{images}", audit_plan, spec, [])
    return Audit(audit_plan, {}, measurer, spec, name, seeds)


def build_function_generators(config: Config, functions: Mapping[str, Images]) -> Callable[[None], dict[str, Generate]]:
    """The functions as what an audit calls; they have no guidance scale."""
    keys = {"before": "pipe", "after": "after"}
    found = {model: of_function(f, keys[model], config.model.device) for model, f in functions.items()}
    return lambda guidance: found


def provenance(config: Config, plan: Plan, about: Mapping[str, str]) -> dict:
    """What the report says of the functions and of what looked at their images."""
    return {
        "software": software_versions(),
        "model": "; ".join(f"{model}: {name}" for model, name in about.items()),
        "target": "; ".join(plan.target_lines),
    } | looking_in_words(config)
