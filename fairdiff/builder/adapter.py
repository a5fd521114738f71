"""Build an adapter from settings: a new one, a saved one, or files of other tools."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fairdiff import fingerprint
from fairdiff.config import Config
from fairdiff.config.training import OWN_KEYS
from fairdiff.diffusion.adapter_files import LORA_FILE, SOFT_TOKENS_FILE, read_about
from fairdiff.diffusion.adapters import Adapter, Lora, SoftTokens, changes_images
from fairdiff.diffusion.imports import FILES, file_of, import_lora, import_soft_tokens
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.lora_files import PEFT_CONFIG
from fairdiff.errors import FairDiffError
from fairdiff.plan import Plan


def adapter_fingerprint(config: Config) -> str | None:
    """A hash of the tensors of `adapter.path` and of its scale, independent of the order in the file's header.

    Of files that are taken as they are all of them counts: what stands beside the tensors says their alphas, in the file or,
    of peft's own, in one beside it.
    """
    options = config.adapter
    if options.path is None:
        return None
    if imported(config):
        name = SOFT_TOKENS_FILE if options.type == "soft_tokens" else LORA_FILE
        files = [file_of(Path(path), name) for path in options.paths]
        if missing := [file for file in files if not file.is_file()]:
            raise FairDiffError(f"adapter.path: {missing[0]}: no such file")
        files += [beside for file in files if (beside := file.parent / PEFT_CONFIG).is_file()]
        return fingerprint.of_values(fingerprint.of_files(files), options.scales)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(options.path).glob("*.safetensors")):
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise FairDiffError(f"adapter.path: {file}: cannot read the adapter: {error}") from error
    return fingerprint.of_values(fingerprint.of_named(tensors), options.scale)


@contextmanager
def _of_path() -> Iterator[None]:
    """Say of an error that it is about `adapter.path`."""
    try:
        yield
    except FairDiffError as error:
        raise FairDiffError(f"adapter.path: {error}") from error


def imported(config: Config) -> bool:
    """Whether `adapter.path` names a file or several paths, and not a single folder of a saved adapter."""
    return isinstance(config.adapter.path, list) or Path(config.adapter.path or "").suffix in FILES


def build_adapter(config: Config, model: DiffusionModel) -> Adapter:
    options = config.adapter
    if imported(config):
        return _import_adapter(config, model)
    if options.type == "soft_tokens":
        adapter = SoftTokens(model, options.tokens, options.initial_text)
    else:
        generator = torch.Generator().manual_seed(config.seed)
        adapter = Lora(model, options.parts, options.rank, options.rank, generator)
    if options.path:
        try:
            adapter.load(Path(options.path))
        except FairDiffError as error:
            made = read_about(Path(options.path)).get("options")
            hint = f"; it was made with {made}" if made else ""
            raise FairDiffError(f"adapter.path: {error}{hint}") from error
        adapter.rescale(options.scales[0])
    return adapter


def _import_adapter(config: Config, model: DiffusionModel) -> Adapter:
    options = config.adapter
    paths = [Path(path) for path in options.paths]
    with _of_path():
        if options.type == "soft_tokens":
            return import_soft_tokens(model, paths, options.scales, options.initial_text)
        return import_lora(model, paths, options.scales)


def build_saved_adapter(config: Config, plan: Plan, model: DiffusionModel) -> Adapter:
    """The adapter of `adapter.path` to audit, which must change images where its scale is not 0."""
    adapter = build_adapter(config, model)
    if any(config.adapter.scales) and not changes_images(model, adapter, plan.audit[0].text, config.sampler.guidance):
        raise FairDiffError(
            f"adapter.path: {config.adapter.path}: changes nothing in the images; allowed: a trained one"
        )
    return adapter


def adapter_options(config: Config) -> dict[str, object]:
    """The keys of `adapter` that its kind has; what is imported has the layers, ranks and tokens of its files."""
    own = {"soft_tokens": ("initial_text",), "lora": ()} if imported(config) else OWN_KEYS
    kept = ("type", *own[config.adapter.type], "learning_rate", *(("path", "scale") if config.adapter.path else ()))
    return {key: value for key, value in asdict(config.adapter).items() if key in kept}
