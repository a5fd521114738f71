"""Build an audit of existing images: judge, records, metrics and report are the same, but nothing is generated."""

from functools import partial

import torch

from fairdiff import fingerprint
from fairdiff.audit.axis import software_versions
from fairdiff.audit.generate import AuditPlan, Generate
from fairdiff.builder import build_clip, build_encoder
from fairdiff.builder.audit import (
    Audit,
    audit_name,
    build_audit_judge,
    build_measurer,
    build_spec,
    encoder_paths,
    looking_in_words,
    naming_own_encoders,
)
from fairdiff.config import Config
from fairdiff.diffusion.load import check_device
from fairdiff.diffusion.memory import Pieces
from fairdiff.distributed import ALONE, World
from fairdiff.errors import FairDiffError
from fairdiff.pictures import Given
from fairdiff.plan import Plan
from fairdiff.prompts import Prompt

NOT_AT_HAND = "not at hand: "


def build_audit_of_pictures(config: Config, plan: Plan, given: Given, world: World = ALONE) -> Audit:
    """The audit of pictures by the classifier of `audit.judge`, and by the encoders that are at hand."""
    check_device(config.model.device)
    judge = build_audit_judge(config, plan)
    _check_names(given.prompts, dict(judge.attributes))
    encoders, about_encoders = encoders_at_hand(config)
    measurer, looking_hash = build_measurer(config, judge, encoders)
    spec = build_spec(config, plan, judge, None, provenance(config, plan, given) | about_encoders)
    every = [len(given.files["before", prompt.text]) for prompt in plan.audit]
    audit_plan = AuditPlan(
        prompts=plan.audit,
        named=plan.named,
        without_people=plan.without_people,
        attributes=spec.attributes,
        images_per_prompt=max(every),
        few_images=0,  # each has its own number
        batch_size=Pieces.of(config.micro_batch).sample,
        seed=config.audit.seed,
        latent_shape=(),
        hashes={model: fingerprint.of_values(given.digests(model)) for model in given.models} | {"judge": looking_hash},
        world=world,
        given=given.batches(Pieces.of(config.micro_batch).sample),
    )
    name = audit_name(f"pictures-{len(plan.audit)}x{max(every)}", audit_plan, spec, [given.unreadable, given.left_out])
    return Audit(audit_plan, {}, measurer, spec, name, numbers_alone)


def build_readers(given: Given, guidance: None = None) -> dict[str, Generate]:
    """Functions that read the pictures of each model, instead of generators."""
    return {model: partial(_read, given, model) for model in given.models}


def _read(given: Given, model: str, prompt: str, number_B: torch.Tensor) -> torch.Tensor:
    return given.read(model, prompt, number_B.tolist())


def numbers_alone(prompt: str, seed: int, indices, shape: tuple[int, ...]) -> torch.Tensor:
    """The numbers of given pictures, in the place of the noise."""
    return torch.tensor(list(indices))


def provenance(config: Config, plan: Plan, given: Given) -> dict:
    """What the report says of the pictures and of what looked at them."""
    about = {
        "software": software_versions(),
        "pictures": config.images,
        "manifest": config.manifest or "none",
        "pictures_read": len(given.about),
        "pictures_unreadable": dict(given.unreadable),
        "prompts_left_out": list(given.left_out),
        "target": "; ".join(plan.target_lines),
    } | looking_in_words(config)
    return about | ({"pairs": f"by {given.pairing}"} if given.pairing else {})


def encoders_at_hand(config: Config) -> tuple[list, dict[str, str]]:
    """CLIP and the image encoder, None for one that cannot be loaded, and what the report says of them."""
    encoders, about = [], {}
    clip, encoder = encoder_paths(config)
    asked = {"CLIP": (build_clip, clip), "image encoder": (build_encoder, encoder)}
    for name, (load, path) in asked.items():
        try:
            with naming_own_encoders(config):
                encoders.append(load(path, config.model.device))
            about[name] = path
        except FairDiffError as error:
            encoders.append(None)
            about[name] = f"{NOT_AT_HAND}{error}"
    return encoders, about


def _check_names(prompts: tuple[Prompt, ...], attributes: dict[str, tuple[str, ...]]) -> None:
    """FairDiffError for a prompt that names a class which the judge does not know."""
    for prompt in prompts:
        name, _, cls = prompt.names.partition(".")
        if prompt.names and cls not in attributes.get(name, ()):
            known = ", ".join(f"{key}.{value}" for key, values in attributes.items() for value in values)
            raise FairDiffError(f"images: {prompt.text!r}: names: found {prompt.names}, allowed: {known}")
