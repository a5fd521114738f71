"""The methods of the studies, each as a `Method` to audit."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fairdiff import fingerprint
from fairdiff.builder.audit import build_generators
from fairdiff.config import Config
from fairdiff.diffusion.adapter_files import LORA_FILE, SOFT_TOKENS_FILE, read_about
from fairdiff.diffusion.imports import file_of, import_lora, import_soft_tokens
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.errors import FairDiffError
from fairdiff.files import atomic_path
from fairdiff.plan import Plan
from fairdiff.studies import edits, words
from harness.audits import Generators, Method

SCHEMA = 1  # to be raised when a method of the same name generates other images


def phrases_of(config: Config) -> dict[str, dict[str, str]]:
    """Return attribute -> class -> attribute phrase, in the order of the classes."""
    return {
        name: {cls: own.phrases[cls] for cls in own.classes} if own.phrases else {}
        for name, own in config.attributes.items()
    }


def _rewritten(config: Config, model: DiffusionModel, rewrite: words.Rewrite) -> Generators:
    return _with_words(rewrite, partial(build_generators, config, model, None))


def _with_words(rewrite: words.Rewrite, at: Generators) -> Generators:
    """Return generators whose "after" rewrites the prompts, for the model with the adapter if there is one."""

    def rewritten(guidance: float) -> dict:
        models = at(guidance)
        return {"before": models["before"], "after": words.with_words(rewrite, models.get("after", models["before"]))}

    return rewritten


def ethical() -> Method:
    """Return the ethical intervention, which appends its text to every prompt of people."""

    def begin(config: Config, plan: Plan, model: DiffusionModel, folder: Path) -> Generators:
        return _rewritten(config, model, words.ethical(_audited(plan), list(plan.attributes)))

    return Method("ethical intervention", ("ethical", SCHEMA), begin)


def random_phrases(seed: int = 0) -> Method:
    """Return the method that adds an attribute phrase, drawn from the target, to the prompt of every image."""

    def begin(config: Config, plan: Plan, model: DiffusionModel, folder: Path) -> Generators:
        return _rewritten(config, model, words.random_phrases(_audited(plan), plan.targets, phrases_of(config), seed))

    return Method("random phrases", ("random phrases", seed, SCHEMA), begin)


def reworded(name: str, key: tuple, rewrite: Callable[[Config, Plan], words.Rewrite], own: Method | None) -> Method:
    """Return the method that rewrites prompts. key: identifies the rewrite. own: the adapter's method, None for none."""

    def begin(config: Config, plan: Plan, model: DiffusionModel, folder: Path) -> Generators:
        at = own.begin(config, plan, model, folder) if own else partial(build_generators, config, model, None)
        return _with_words(rewrite(config, plan), at)

    return Method(name, ("reworded", *key, own.key if own else None, SCHEMA), begin)


def _audited(plan: Plan) -> list:
    return [*plan.audit, *plan.named, *plan.without_people]


def uce(strength: float = 1.0) -> Method:
    """Return UCE: closed-form cross-attention editing towards the target, on the training prompts."""

    def begin(config: Config, plan: Plan, model: DiffusionModel, folder: Path) -> Generators:
        edits.require_stable_diffusion(model)
        change = edits.uce(model, plan.train, plan.targets, phrases_of(config), strength)
        return _edited(config, model, change, folder)

    name = "UCE" if strength == 1 else f"UCE, strength {strength:g}"
    return Method(name, ("uce", float(strength), edits.RIDGE, SCHEMA), begin)


def debias_vl(strength: float = edits.STRENGTH) -> Method:
    """Return debiasVL: calibrated projection of the text embedding, on the training prompts."""

    def begin(config: Config, plan: Plan, model: DiffusionModel, folder: Path) -> Generators:
        edits.require_stable_diffusion(model)
        return _edited(config, model, edits.debias_vl(model, plan.train, phrases_of(config), strength), folder)

    name = "debiasVL" if strength == edits.STRENGTH else f"debiasVL, strength {strength:g}"
    return Method(name, ("debias_vl", float(strength), SCHEMA), begin)


def _edited(config: Config, model: DiffusionModel, change: torch.Tensor, folder: Path) -> Generators:
    """Save the edit as a LoRA in `folder`/adapter, and return the generators of the model with it."""
    with atomic_path(folder / "adapter") as temporary:
        temporary.mkdir()
        edits.save_edit(temporary, edits.fold(model, change))
    return partial(build_generators, config, model, import_lora(model, [folder / "adapter"], [1.0]))


def adapter(name: str, path: Path, scale: float = 1.0) -> Method:
    """Return the method that uses a saved adapter (file or folder), multiplied by `scale`."""
    soft = read_about(path).get("type") == "soft_tokens"
    file = file_of(path, SOFT_TOKENS_FILE if soft else LORA_FILE)
    if not file.is_file():
        raise FairDiffError(f"{file}: no such file, allowed: the folder or the file of an adapter")

    def begin(config: Config, plan: Plan, model: DiffusionModel, folder: Path) -> Generators:
        take = partial(import_soft_tokens, initial_text="a") if soft else import_lora
        return partial(build_generators, config, model, take(model, [path], [scale]))

    label = name if scale == 1 else f"{name}, scale {scale:g}"
    return Method(label, ("adapter", fingerprint.of_files([file]), float(scale), SCHEMA), begin)
