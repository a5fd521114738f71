"""The descriptions that a run prints or writes: its budget, warnings, adapter.json, and the settings on the report."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path

from fairdiff.audit.axis import software_versions
from fairdiff.audit.card import EMBEDDED
from fairdiff.builder import adapter_options, compared_images
from fairdiff.builder.audit import Audit
from fairdiff.builder.pictures import NOT_AT_HAND
from fairdiff.config import Config
from fairdiff.diffusion.adapter_files import read_about
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.memory import GIB, USED, Pieces
from fairdiff.diffusion.solvers import SOLVERS
from fairdiff.files import flat
from fairdiff.pictures import Given
from fairdiff.plan import Plan
from fairdiff.prompts import wrong_article
from fairdiff.training.step import Trainee


def budget(config: Config, plan: Plan, trainee: Trainee, audit: Audit) -> list[str]:
    """Return lines that say how many steps and images the run will take."""
    each, prompts = config.prompts.per_step, len(plan.train)
    parameters = sum(p.numel() for p in trainee.adapter.parameters())
    models = ["before", "after"] if trainee.adapter.origin is None else ["before", "start", "after"]
    return [
        f"target: {'; '.join(plan.target_lines)}",
        f"adapter: {trainee.adapter.kind}, {parameters:,} parameters, learning rate {config.adapter.learning_rate:g}",
        f"training: {config.steps} steps, {each} × {config.global_batch} images each, "
        f"{min(config.steps * each, prompts)} of {prompts} training prompts, "
        f"at most {most_originals(config, plan)} reference images (cached)",
        f"audit: {len(models) * audit.plan.images_per_model} images, {len(audit.plan.prompts)} prompts, "
        f"models {', '.join(models)}",
        *memory_lines(config, trainee.pieces),
    ]


def memory_lines(config: Config, pieces: Pieces | None) -> list[str]:
    """Return a line with the batch sizes planned from `memory_gb`, and a warning if even the smallest need more memory."""
    if pieces is None or pieces.peak is None:
        return []
    lines = [
        f"memory: about {pieces.peak / GIB:.1f} of {config.memory_gb:g} GB, {pieces.sample} images sampled, {pieces.decode} "
        f"decoded and {pieces.replay} steps replayed at once"
        + "".join(f", {name} with gradient checkpointing" for name in sorted(pieces.checkpointed))
    ]
    if pieces.peak > USED * GIB * config.memory_gb:
        lines.append(f"warning: memory_gb: found {config.memory_gb:g}, needed about {pieces.peak / GIB / USED:.0f}")
    return lines


def most_originals(config: Config, plan: Plan) -> int:
    """Return how many reference images a run samples at most, including those of validation; they come in whole blocks."""
    block, visits = config.global_batch, config.steps * config.prompts.per_step
    slices = len(plan.train) * (config.noise_pool // block)
    found = min(visits, slices) * compared_images(config)  # each visit uses one slice with its own T
    return found + len(plan.validation) * -(-config.validation.images // block) * block


def warnings(plan: Plan, model: DiffusionModel, prefix: str) -> list[str]:
    """Return warnings about prompts: trained on and audited, equal after tokenizing, a wrong article, or truncated.

    Soft tokens before a prompt can push its end out of the text encoder's window. This would look like an effect of the
    adapter.
    """
    lines = []
    if known := plan.not_held_out:
        some = ", ".join(known[:3]) + (", ..." if len(known) > 3 else "")
        line = f"warning: {len(known)} of {len(plan.audit)} audited prompts are also training prompts ({some})"
        lines.append(f"{line}; their numbers say nothing about other prompts")
    audited = [prompt.text for prompt in [*plan.audit, *plan.without_people]]
    if same := model.read_as_one(audited):
        line = f"warning: {len(same)} of {len(audited)} audited prompts are the same to the model as another one"
        lines.append(f"{line} ({same[0][1]!r} and {same[0][0]!r}); intervals treat them as different prompts")
    every = dict.fromkeys([*plan.train, *plan.validation, *plan.audit])
    if odd := [prompt.text for prompt in every if wrong_article(prompt)]:
        line = f"warning: {len(odd)} prompts have the wrong article, such as {odd[0]!r}"
        lines.append(f"{line}; in English templates use {{a}} {{}}, which chooses a or an")
    texts = list(dict.fromkeys(prompt.text for prompt in [*plan.train, *plan.audit]))
    if cut := model.overlong(prefix, texts):
        most = model.most_tokens
        lines.append(
            f"warning: {len(cut)} prompts are cut off, because the model reads {most} tokens only, such as {cut[0]!r}"
        )
    return lines


def adapter_warnings(config: Config, plan: Plan, model: DiffusionModel) -> list[str]:
    """Return warnings about settings of the audit that differ from those the adapter was trained with."""
    height, width = model.size or (None, None)
    wanted = {"guidance": config.sampler.guidance, "negative_prompt": config.prompts.negative}
    wanted |= {"padding": config.model.padding, "target": list(plan.target_lines)}
    wanted |= {"scheduler": SOLVERS[config.sampler.scheduler].__name__, "spacing": config.sampler.spacing}
    wanted |= {"final_sigmas": config.sampler.final_sigmas, "clip_skip": config.model.clip_skip}
    wanted |= {"height": height, "width": width}
    abouts = [read_about(Path(path)) for path in config.adapter.paths]
    return [
        f"warning: adapter.path: trained with {key} {about[key]!r}, audited with {value!r}"
        for about in abouts
        for key, value in wanted.items()
        if key in about and about[key] != value
    ]


def picture_warnings(config: Config, given: Given, audit: Audit) -> list[str]:
    """Return warnings about an audit of given pictures: unreadable files, copies, an unsuited judge, missing metrics."""
    lines = [f"warning: {line}" for line in unreadable_lines(given)]
    if copies := given.copies:
        some = f"{copies[0][1]} is {copies[0][0]}"
        lines.append(f"warning: {len(copies)} pictures are copies of another of the same prompt ({some}); all are counted")
    if config.audit.judge.type == "net" and config.audit.judge.path is None:
        lines.append(
            "warning: the embedded judge has only seen renders of Portraits; for photographs use model=sd15, or "
            "judge@audit.judge with your own classifier"
        )
    names = {"CLIP": "CLIP-T and CLIP-I are", "image encoder": "drift and variety are"}
    missing = {key: audit.spec.provenance[key] for key in names if audit.spec.provenance[key].startswith(NOT_AT_HAND)}
    return lines + [f"warning: {names[key]} not measured: {why}" for key, why in missing.items()]


def unreadable_lines(given: Given, most: int = 20) -> list[str]:
    """Return lines that name the unreadable pictures (`most` of them) and the prompts that are left out because of them."""
    count = len(given.unreadable)
    lines = [f"{count} of {count + len(given.about)} pictures could not be read and are left out"] if count else []
    lines += [f"{file}: {reason}" for file, reason in given.unreadable[:most]]
    lines += [f"and {count - most} more, which are listed in audit.json"] if count > most else []
    if given.left_out:
        lines.append(f"prompts left out, because a model has no picture of them: {'; '.join(given.left_out)}")
    return lines


def picture_lines(config: Config, plan: Plan, given: Given) -> dict[str, list[str]]:
    """Return the settings of an audit of given pictures as lines for the report."""
    sizes = Counter(given.about[file].size for files in given.files.values() for file in files.values())
    folders = config.images if isinstance(config.images, list) else [config.images]
    lines = {"target": list(plan.target_lines), "pictures": [f"folder: {folder}" for folder in folders]}
    counts = [len(files) for files in given.files.values()]
    lines["pictures"] += [f"{sum(counts)} pictures, {min(counts)} to {max(counts)} of each prompt"]
    lines["pictures"] += [f"sizes: {', '.join(f'{w} × {h} ({n})' for (h, w), n in sizes.most_common(5))}"]
    lines["pictures"] += [f"before and after are paired by {given.pairing}"] if given.pairing else []
    return lines | ({"left out": unreadable_lines(given)} if given.unreadable or given.left_out else {})


def about_adapter(config: Config, plan: Plan, model: DiffusionModel, training: str) -> dict:
    """Return the content of adapter.json: everything needed to use the adapter, and how it was made."""
    soft, (height, width) = config.adapter.type == "soft_tokens", model.size or (None, None)
    return {
        "type": config.adapter.type,
        "options": " ".join(f"adapter.{key}={value}" for key, value in adapter_options(config).items()),
        "load_with": "load_textual_inversion" if soft else "load_lora_weights",
        "prompt_prefix": "<fairdiff> " if soft else "",
        "base_model": config.model.path or EMBEDDED,
        "pipeline": model.kind.__name__,
        "base_model_hash": model.fingerprint(precision=False),
        "scheduler": type(model.scheduler).__name__,
        "final_sigmas": config.sampler.final_sigmas,
        "spacing": config.sampler.spacing,
        "sampler_steps": config.sampler.audit_steps,
        "guidance": config.sampler.guidance,
        "negative_prompt": config.prompts.negative,
        "padding": config.model.padding,
        "clip_skip": config.model.clip_skip,
        "height": height,  # both or neither: a pipeline that gets only one uses its own default of both
        "width": width,
        "template": config.prompts.template,
        "classes": {name: list(classes) for name, classes in plan.attributes.items()},
        "target": list(plan.target_lines),
        "training": training,
        "software": software_versions(),
    }


def report_lines(config: Config, plan: Plan, adapter: bool, trained: bool) -> dict[str, list[str]]:
    """Return the settings as lines for the report, with those of the adapter and of its training if there is one."""
    lines = {"target": list(plan.target_lines)}
    if adapter:
        lines["adapter"] = [f"{key}: {value}" for key, value in adapter_options(config).items()]
    if trained:
        keys = ["steps", "global_batch", "noise_pool", "seed", "prompts", "loss", "gradient", "optimizer"]
        keys += ["validation"] if config.validation.every else []
        settings = flat({key: asdict(config)[key] for key in keys})
        lines["training"] = [f"{key}: {value}" for key, value in settings.items() if value not in (None, "")]
    sampler = {key: value for key, value in asdict(config.sampler).items() if value is not None}
    lines["sampler"] = [f"{key}: {value}" for key, value in sampler.items()]
    return lines
