"""Load an adapter into a user's diffusers pipeline, and sample images from such a pipeline as a plain function.

The pipeline keeps its device and its precision. Nothing in this module trains.
"""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fairdiff import fingerprint
from fairdiff.diffusion.adapter_files import LORA_FILE, SOFT_TOKENS_FILE, TOKEN, read_about, read_tensors
from fairdiff.diffusion.catalogue import catalogue, converted
from fairdiff.diffusion.folder import Pipeline
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.sampling import Generate
from fairdiff.diffusion.solvers import SOLVERS, make_solver
from fairdiff.diffusion.textual_inversion import A1111_KEY, XL_KEYS, embeddings_of, pool_at_the_end
from fairdiff.errors import FairDiffError

KEY = "load_adapter"  # errors begin with it
FACTOR = re.compile(r"[._]lora_?(?:linear_layer\.)?(?:A|B|down|up)[._]|[._](?:down|up)\.weight$")


@dataclass
class LoadedAdapter:
    """An adapter in a pipeline.

    prefix: the soft tokens, to be put before every prompt; "" for LoRA or while the adapter is off. settings: arguments of
    the pipeline's call in the adapter's audit, {} if its folder does not say. about: adapter.json, {} without one.
    """

    pipe: Pipeline = field(repr=False)
    name: str
    scale: float
    token: str = ""
    settings: dict[str, object] = field(default_factory=dict)
    about: dict = field(default_factory=dict, repr=False)
    enabled: bool = True

    @property
    def prefix(self) -> str:
        return f"{self.token} " if self.token and self.enabled else ""

    @contextmanager
    def off(self) -> Iterator[None]:
        """Switch this adapter off; other adapters in the pipeline are not changed."""
        self.enabled = False
        _set_scale(self.pipe, self.name, 0.0)
        try:
            yield
        finally:
            self.enabled = True
            _set_scale(self.pipe, self.name, self.scale)


def load_adapter(pipe: Pipeline, path_or_name: str | Path, scale: float = 1.0) -> LoadedAdapter:
    """Load an adapter into a pipeline of diffusers, and set the solver that it was audited with.

    path_or_name: an adapter's folder or its adapter.json, a run folder, a LoRA or textual-inversion file (safetensors), or a
    name of the catalogue. scale: 1 is the adapter as saved, 0 the model without it (with soft tokens: their initial words).
    Warns (UserWarning) if the adapter was trained on another base model or on prompts that are not padded.
    Raises FairDiffError for a file that cannot be read, or that does not fit the pipeline completely.
    """
    if not isinstance(pipe, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise FairDiffError(f"{KEY}: found a {type(pipe).__name__}, allowed: StableDiffusionPipeline, or that of XL")
    file, about = _find(path_or_name)
    state, metadata = read_tensors(file)
    if "scheduler" in about:
        pipe.scheduler = _solver(pipe, file, about)
    if "base_model_hash" in about:
        _compare_base(pipe, file, about)
    if about.get("padding") == "longest":
        _warn(f"{file}: was trained on prompts that are not padded, and a pipeline pads them: images differ a little")
    settings = _settings(pipe, about)
    if any(FACTOR.search(key) for key in state):
        return LoadedAdapter(pipe, _load_lora(pipe, file, state, scale), scale, "", settings, about)
    token = _load_tokens(pipe, file, state, metadata, scale)
    return LoadedAdapter(pipe, token, scale, token, settings, about)


def _settings(pipe: Pipeline, about: dict) -> dict[str, object]:
    """Return arguments of the pipeline's call. Given only one of height and width, it would ignore it, so both are set."""
    height, width = size_of(view(pipe), about) or (None, None)
    settings = {"guidance_scale": about.get("guidance"), "num_inference_steps": about.get("sampler_steps")}
    settings |= {"negative_prompt": about.get("negative_prompt") or None, "height": height, "width": width}
    settings |= {"clip_skip": about.get("clip_skip")}
    if about.get("clip_skip"):
        allow_clip_skip(pipe)
    return {key: value for key, value in settings.items() if value is not None}


def allow_clip_skip(pipe: Pipeline) -> None:
    """Set `text_model` of the text encoder to itself: diffusers 0.42 reads this name, which transformers 5 dropped."""
    encoder = pipe.text_encoder
    if isinstance(pipe, StableDiffusionPipeline) and not hasattr(encoder, "text_model"):
        vars(encoder)["text_model"] = encoder  # not registered as a submodule, so the tensors keep their names


def size_of(model: DiffusionModel, about: dict) -> tuple[int, int] | None:
    """Return the (height, width) in adapter.json, None if they are the model's own."""
    own = model.image_size
    size = about.get("height") or own[0], about.get("width") or own[1]
    return None if size == own else size


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)  # where load_adapter is called


def _find(path_or_name: str | Path) -> tuple[Path, dict]:
    """Return the weights file and the contents of its adapter.json, {} without one."""
    path = Path(path_or_name)
    if not path.exists():
        if str(path_or_name) not in catalogue():
            raise FairDiffError(
                f"{KEY}: found {path_or_name}, allowed: an adapter's or a run's folder, a safetensors file, or one of "
                f"{', '.join(catalogue())}"
            )
        path = converted(str(path_or_name))
    path = path.parent if path.name == "adapter.json" else path
    path = path / "adapter" if (path / "adapter" / "adapter.json").exists() else path
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        own = [file for file in files if file.name in (LORA_FILE, SOFT_TOKENS_FILE)] or files
        if len(own) != 1:
            names = ", ".join(file.name for file in own) or "none"
            raise FairDiffError(f"{KEY}: {path}: found {names}, allowed: a folder with one safetensors file")
        return own[0], read_about(path, KEY)
    if path.suffix != ".safetensors":
        raise FairDiffError(
            f"{KEY}: found {path}, allowed: a safetensors file; scripts/export.py reads the paper's .pth files"
        )
    return path, read_about(path.parent, KEY) if path.name in (LORA_FILE, SOFT_TOKENS_FILE) else {}


def view(pipe: Pipeline) -> DiffusionModel:
    """Return the pipeline's components as a `DiffusionModel`, for its fingerprint and sizes. Nothing is changed."""
    parts = (pipe.tokenizer, pipe.text_encoder, pipe.unet, pipe.vae, pipe.scheduler)
    model = DiffusionModel(*parts, sampling_dtype=pipe.unet.dtype)
    if isinstance(pipe, StableDiffusionXLPipeline):
        model.kind = StableDiffusionXLPipeline
        model.tokenizer_2, model.text_encoder_2 = pipe.tokenizer_2, pipe.text_encoder_2
        model.empty_is_zero = pipe.config.force_zeros_for_empty_prompt
    return model


def _solver(pipe: Pipeline, file: Path, about: dict):
    kinds = {solver.__name__: kind for kind, solver in SOLVERS.items()}
    kind, options = kinds.get(str(about["scheduler"])), [about.get(key) for key in ("final_sigmas", "spacing")]
    if kind is None or None in options:
        found = ", ".join(f"{key}: {about.get(key)}" for key in ("scheduler", "final_sigmas", "spacing"))
        raise FairDiffError(f"{KEY}: {file.parent / 'adapter.json'}: found {found}, allowed: one of {', '.join(kinds)}")
    return make_solver(kind, pipe.scheduler.config, *options)


def _compare_base(pipe: Pipeline, file: Path, about: dict) -> None:
    """Warn if the pipeline's model is not the adapter's base model. Weights not in float32 are compared by name only."""
    base, named = about.get("base_model", "another model"), str(pipe.config.get("_name_or_path", ""))
    if pipe.unet.dtype != torch.float32:
        if named != base:
            _warn(f"{file}: was trained on {base}; this pipeline's weights are {pipe.unet.dtype} and were not compared")
        return
    model = view(pipe)
    model.padding, model.negative = about.get("padding", ""), about.get("negative_prompt", "")
    model.size, model.clip_skip = size_of(model, about), about.get("clip_skip") or 0
    if model.fingerprint(precision=False) != about["base_model_hash"]:
        _warn(f"{file}: was trained on {base}, and this pipeline's weights, tokenizer or configuration differ from it")


def _modules(pipe: Pipeline) -> list[nn.Module]:
    return [module for module in pipe.components.values() if isinstance(module, nn.Module)]


def _layers(pipe: Pipeline, name: str) -> list[LoraLayer]:
    every = (layer for module in _modules(pipe) for layer in module.modules())
    return [layer for layer in every if isinstance(layer, LoraLayer) and name in layer.lora_A]


def _set_scale(pipe: Pipeline, name: str, scale: float) -> None:
    for layer in _layers(pipe, name):
        layer.set_scale(name, scale)


@contextmanager
def _one_line(file: Path) -> Iterator[None]:
    """Turn an error of the libraries into one line that names the file, and silence their log messages."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # several adapters are intended
            yield
    except Exception as error:  # each library raises its own classes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise FairDiffError(f"{KEY}: {file}: does not fit this pipeline: {reason}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _load_lora(pipe: Pipeline, file: Path, state: dict[str, Tensor], scale: float) -> str:
    """Load LoRA and return its name in the pipeline. Active adapters stay active, which diffusers would switch off."""
    known = {name for names in pipe.get_list_adapters().values() for name in names}
    name = next(n for n in ("fairdiff", *(f"fairdiff_{i}" for i in range(2, 1000))) if n not in known)
    before = pipe.get_active_adapters()
    with _one_line(file):
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    layers = _layers(pipe, name)
    held = sum(bool(FACTOR.search(key)) for key in state)
    if 2 * len(layers) != held:
        pipe.delete_adapters(name)
        raise FairDiffError(f"{KEY}: {file}: holds {held} LoRA factors, {2 * len(layers)} of them fit this pipeline")
    for layer in (layer for n in [*before, name] for layer in _layers(pipe, n)):
        layer.set_adapter([n for n in [*before, name] if n in layer.lora_A])
    for module in _modules(pipe):
        module.requires_grad_(False)
    _set_scale(pipe, name, scale)
    return name


def _load_tokens(pipe: Pipeline, file: Path, state: dict[str, Tensor], metadata: dict, scale: float) -> str:
    """Load soft tokens into each text encoder and return the token that represents them in prompts."""
    readers = [(pipe.tokenizer, pipe.text_encoder)]
    readers += [(pipe.tokenizer_2, pipe.text_encoder_2)] if isinstance(pipe, StableDiffusionXLPipeline) else []
    every, name = embeddings_of(state, f"{KEY}: {file}"), next(iter(state))
    found, widths = [rows.shape[1] for rows in every], [e.get_input_embeddings().embedding_dim for _, e in readers]
    if found != widths:
        raise FairDiffError(f"{KEY}: {file}: holds tokens of width {found}, one for each text encoder, allowed: {widths}")
    token = TOKEN if file.name == SOFT_TOKENS_FILE else f"<{file.stem}>"
    token = token if name in (A1111_KEY, *XL_KEYS) else name  # in other files the tensor's name is the token
    known, first = pipe.tokenizer.get_vocab(), token
    for i in range(2, 1000):
        if token not in known:
            break
        token = f"{first.removesuffix('>')}-{i}>"
    for rows, (tokenizer, encoder) in zip(every, readers, strict=True):
        if scale != 1:
            rows = torch.lerp(_initial(tokenizer, encoder, file, metadata, rows), rows, scale)
        with _one_line(file):
            pipe.load_textual_inversion({token: rows}, token=token, tokenizer=tokenizer, text_encoder=encoder)
        pool_at_the_end(encoder, tokenizer)
    return token


def _initial(tokenizer, encoder: nn.Module, file: Path, metadata: dict, rows: Tensor) -> Tensor:
    """Return the embeddings [N, D] of the initial words of soft tokens, which correspond to scale 0."""
    if "initial_text" not in metadata:
        raise FairDiffError(f"{KEY}: {file}: scale: it does not say from which words its tokens started, allowed: 1")
    words = tokenizer(metadata["initial_text"], add_special_tokens=False).input_ids
    table = encoder.get_input_embeddings().weight.detach().cpu().float()
    return table[[words[i % len(words)] for i in range(len(rows))]].to(rows)


def generator(pipe: Pipeline, settings: dict[str, object], prefix: str = "") -> Generate:
    """Return a function (prompt, noise_BCHW) -> image_BCHW in [0, 1] that calls the pipeline.

    settings: arguments of its call. A solver that adds noise draws it from a generator seeded by the image's initial noise,
    so an image is the same in every batch.
    """

    if settings.get("clip_skip"):
        allow_clip_skip(pipe)

    @torch.no_grad()
    def generate(prompt: str, noise_BCHW: Tensor) -> Tensor:
        seeds = [int(fingerprint.of_named({"noise": noise}), 16) % 2**63 for noise in noise_BCHW]
        with _without_bar(pipe):
            images = pipe(
                prefix + prompt,
                num_images_per_prompt=len(noise_BCHW),
                latents=noise_BCHW.to(pipe.unet.dtype),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
                **settings,
            ).images
        return images.float()

    return generate


@contextmanager
def _without_bar(pipe: Pipeline) -> Iterator[None]:
    kept = vars(pipe).get("_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**kept)
