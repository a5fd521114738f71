"""What is trained: soft tokens before the prompt, or LoRA on the text encoder, the U-Net or both.

Every adapter can be switched off (`off()`), so that the frozen model is the same model and never a second copy, and
saved in the formats that plain diffusers loads: `load_textual_inversion` and `load_lora_weights`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from fairdiff.diffusion.adapter_files import (
    LORA_FILE,
    SOFT_TOKENS_FILE,
    TEXT_ROOT,
    TOKEN,
    check_matrices,
    lora_settings,
    read_tensors,
    save_lora,
    uniform,
)
from fairdiff.diffusion.folder import FAMILIES
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.lora_files import Layers, settings_of
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.errors import FairDiffError


def modules_of(model: DiffusionModel, part: str) -> dict[str, nn.Module]:
    """The modules of one of `adapter.parts` under their names in files. T5 is none: pipelines load no LoRA of it."""
    if part == "unet":
        return {"transformer" if model.t5 else "unet": model.unet}
    named = {"text_encoder": model.text_encoder, "text_encoder_2": model.text_encoder_2}
    return {name: module for name, module in named.items() if module is not None}


class SoftTokenEmbedding(nn.Module):
    """An embedding table whose ids beyond the vocabulary are trainable rows: soft [N, D]."""

    def __init__(self, base: nn.Embedding, soft: Tensor):
        super().__init__()
        self.base = base
        self.soft = nn.Parameter(soft)

    def forward(self, ids: Tensor) -> Tensor:
        size = self.base.num_embeddings
        if bool((ids < size).all()):  # no graph for texts without soft tokens: the empty prompt has no gradient
            return self.base(ids)
        known = self.base(ids.clamp(max=size - 1))
        new = self.soft[(ids - size).clamp(min=0)]
        return torch.where((ids < size)[..., None], known, new)


class SoftTokens:
    """N trainable embeddings before the prompt, on the conditional branch only (the paper: N = 5).

    They are a multi-vector textual inversion: `prefix` is what stands before every prompt while the adapter is on.
    They start as the embeddings of `initial_text`, repeated to N (`origin`): a model that has read captions of the web
    ignores words it does not know, and random vectors there have next to no gradient.
    """

    kind = "soft_tokens"

    def __init__(self, model: DiffusionModel, tokens: int, initial_text: str):
        if model.kind is not StableDiffusionPipeline:  # several tokenizers, and texts that are pooled at the highest id
            raise FairDiffError(f"adapter.type: found soft_tokens, allowed with {FAMILIES[model.kind]}: lora")
        self.tokenizer, self.count = model.tokenizer, tokens
        self.names = [TOKEN] + [f"{TOKEN}_{i}" for i in range(1, tokens)]
        base = model.text_encoder.get_input_embeddings()
        if TOKEN in model.tokenizer.get_vocab():
            raise FairDiffError(
                f"model.path: its tokenizer already knows {TOKEN}, the token of an adapter that was saved with the model; "
                "allowed: the model without it"
            )
        if model.tokenizer.add_tokens(self.names) != tokens or len(model.tokenizer) != base.num_embeddings + tokens:
            raise FairDiffError(
                f"model.path: its tokenizer has {len(model.tokenizer) - tokens} tokens, its text encoder "
                f"{base.num_embeddings}; allowed with adapter.type=soft_tokens: as many"
            )
        self.initial_text = initial_text
        self.origin = [self.words(initial_text, tokens, base)]
        self.embedding = SoftTokenEmbedding(base, self.origin[0].clone())
        model.text_encoder.set_input_embeddings(self.embedding)
        self.enabled = True

    def words(self, text: str, count: int, base: nn.Embedding) -> Tensor:
        """The embeddings [count, D] of these words, repeated."""
        known = self.tokenizer(text, add_special_tokens=False).input_ids
        if not known:
            raise FairDiffError(f"adapter.initial_text: found '{text}', allowed: at least one word")
        return base.weight[[known[i % len(known)] for i in range(count)]].detach().clone()

    @property
    def prefix(self) -> str:
        return " ".join(self.names) + " " if self.enabled else ""

    def parameters(self) -> list[nn.Parameter]:
        return [self.embedding.soft]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Prompts without the soft tokens."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def rescale(self, scale: float) -> None:
        """Go `scale` times as far from the initial words as now: 0 is the words, 1 changes nothing."""
        self.embedding.soft.data.copy_(torch.lerp(self.origin[0], self.embedding.soft.data, scale))

    def save(self, folder: Path) -> None:
        """Write `soft_tokens.safetensors`: one tensor [N, D] under the token's name."""
        state = {TOKEN: self.embedding.soft.detach().cpu().contiguous()}
        save_file(state, folder / SOFT_TOKENS_FILE, {"initial_text": self.initial_text})

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, the words they started from too; another shape or key is an error."""
        state, about = read_tensors(folder / SOFT_TOKENS_FILE)
        check_matrices(folder / SOFT_TOKENS_FILE, state)
        soft = self.embedding.soft
        if set(state) != {TOKEN} or state[TOKEN].shape != soft.shape:
            found = {k: tuple(v.shape) for k, v in state.items()}
            raise FairDiffError(
                f"{folder / SOFT_TOKENS_FILE}: found {found}, expected {{'{TOKEN}': {tuple(soft.shape)}}}"
            )
        if not state[TOKEN].any():  # images differ from those without tokens all the same
            raise FairDiffError(
                f"{folder / SOFT_TOKENS_FILE}: {TOKEN} holds nothing but zeros, which no training leaves"
            )
        self.initial_text = about.get("initial_text", self.initial_text)
        self.origin = [self.words(self.initial_text, self.count, self.embedding.base)]  # `rescale` measures from there
        soft.data.copy_(state[TOKEN])


class Lora:
    """LoRA on attention and feed-forward layers of the text encoder, the U-Net or both, of one rank and scale alpha/rank;
    or `of_files`, on the layers that files are of.

    The text encoder of Stable Diffusion XL and 3 is two, T5 not counted. A transformer stands in the U-Net's place.
    """

    kind = "lora"
    prefix = ""
    origin: list[Tensor] | None = None  # a new one changes nothing, see `at_origin`

    def __init__(self, model: DiffusionModel, parts: list[str], rank: int, alpha: float, generator: torch.Generator):
        names = [name for part in parts for name in modules_of(model, part)]
        self._hang(model, {name: uniform(name, rank, alpha) for name in names})
        for parameter in self.parameters():
            if parameter.any():  # peft drew the down-projection from the global stream: draw it from ours
                noise = torch.randn(parameter.shape, generator=generator) / rank
                parameter.data.copy_(noise)

    @classmethod
    def of_files(cls, model: DiffusionModel, layers: Layers) -> "Lora":
        """The factors of LoRA files on whatever layers, linear or convolutional, each of its own rank."""
        lora = cls.__new__(cls)
        lora._hang(model, {name: settings_of(part) for name, part in layers.items()})
        for name, module in lora.modules.items():
            for layer, inner in module.named_modules():
                if isinstance(inner, LoraLayer):
                    factors = layers[name].get(layer.removeprefix(TEXT_ROOT))
                    if factors is None:  # peft goes by the ends of names
                        raise FairDiffError(f"{name}.{layer} ends as a layer of the file does and has no LoRA in it")
                    inner.lora_A["default"].weight.data.copy_(factors.down)
                    inner.lora_B["default"].weight.data.copy_(factors.up)
        return lora

    def _hang(self, model: DiffusionModel, settings: dict[str, dict]) -> None:
        """Put LoRA of these settings, peft's LoraConfig of each module, on a model."""
        self.settings = settings
        named = modules_of(model, "text_encoder") | modules_of(model, "unet")
        self.modules = {name: named[name] for name in settings}
        self.pipeline = model.kind
        for name, module in self.modules.items():
            config = LoraConfig(**settings[name], init_lora_weights="gaussian")
            inject_adapter_in_model(config, module)  # not through transformers, which wants a peft of its own choice
            keep_in_float32(module)

    def parameters(self) -> list[nn.Parameter]:
        return [p for m in self.modules.values() for n, p in m.named_parameters() if ".lora_" in n]

    @contextmanager
    def off(self) -> Iterator[None]:
        """The frozen model. peft clears requires_grad when it switches off: the flags are restored with the adapter."""
        flags = [(p, p.requires_grad) for p in self.parameters()]
        layers = [m for module in self.modules.values() for m in module.modules() if isinstance(m, LoraLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def rescale(self, scale: float) -> None:
        """Multiply what LoRA adds, (alpha / rank) B A, by `scale`: 0 is the frozen model, 1 changes nothing."""
        for module in self.modules.values():
            for name, parameter in module.named_parameters():
                if ".lora_B." in name:
                    parameter.data.mul_(scale)

    def save(self, folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors` as the `load_lora_weights` of the model's pipeline reads it."""
        state = {name: get_peft_model_state_dict(module) for name, module in self.modules.items()}
        save_lora(folder, state, self.settings, self.pipeline)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; a missing, extra or misshapen key is an error naming it."""
        path = folder / LORA_FILE
        state, about = read_tensors(path)
        settings = lora_settings(path, about)
        check_matrices(path, state)
        left = sorted(k for k in state if k.split(".", 1)[0] not in self.modules)
        if left:
            raise FairDiffError(f"{path}: holds {len(left)} keys for no part of this adapter, the first is {left[0]}")
        for name in self.modules:
            ranks = [len(v) for k, v in state.items() if k.startswith(f"{name}.") and ".lora_A." in k]
            own = self.settings[name]["lora_alpha"], self.settings[name]["r"]
            rank = settings.get(f"{name}.r", min(ranks, default=own[1]))
            found = settings.get(f"{name}.lora_alpha", rank), rank  # as diffusers takes it where the file does not say
            if found != own:
                raise FairDiffError(f"{path}: (alpha, rank) of {name} is {found}, this adapter has {own}")
        for name, module in self.modules.items():
            current = get_peft_model_state_dict(module)
            names = {k.removeprefix(TEXT_ROOT): k for k in current}
            own = {k: current[inner] for k, inner in names.items()}
            part = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            part = {k.removeprefix(TEXT_ROOT): v for k, v in part.items()}
            if own.keys() != part.keys() or any(own[k].shape != v.shape for k, v in part.items()):
                wrong = sorted(own.keys() ^ part.keys())
                wrong += [k for k in own.keys() & part.keys() if own[k].shape != part[k].shape]
                raise FairDiffError(f"{path}: {len(wrong)} keys of {name} do not match, the first is {wrong[0]}")
            set_peft_model_state_dict(module, {names[k]: v for k, v in part.items()})


class CastLinear(nn.Linear):
    """float32 weights used in the precision of the input; what they learn from is a float32 gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


class CastConv2d(nn.Conv2d):
    """The same of a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype), None)


def in_float32(factor: nn.Linear | nn.Conv2d) -> nn.Module:
    """A factor as `CastLinear` or `CastConv2d`."""
    device = factor.weight.device
    if isinstance(factor, nn.Linear):
        cast = CastLinear(factor.in_features, factor.out_features, bias=False, device=device)
    else:
        shape = (factor.in_channels, factor.out_channels, factor.kernel_size, factor.stride, factor.padding)
        cast = CastConv2d(*shape, bias=False, device=device)
    cast.weight.data.copy_(factor.weight)
    return cast


def keep_in_float32(module: nn.Module) -> None:
    """Hold the LoRA factors of a module of lower precision in float32 (peft gives them the base layer's precision)."""
    for layer in (m for m in module.modules() if isinstance(m, LoraLayer)):
        if layer.get_base_layer().weight.dtype == torch.float32:
            continue
        layer.cast_input_dtype_enabled = False  # else peft computes in float32 and copies every activation
        for factors in (layer.lora_A, layer.lora_B):
            for name, linear in factors.items():
                factors[name] = in_float32(linear)


Adapter = SoftTokens | Lora


@contextmanager
def at_origin(adapter: Adapter) -> Iterator[None]:
    """The adapter as it was before training: its parameters are those of `origin`, which is not None."""
    parameters = adapter.parameters()
    trained = [p.detach().clone() for p in parameters]
    try:
        for parameter, value in zip(parameters, adapter.origin, strict=True):
            parameter.data.copy_(value)
        yield
    finally:
        for parameter, value in zip(parameters, trained, strict=True):
            parameter.data.copy_(value)


@torch.no_grad()
def changes_images(model: DiffusionModel, adapter: Adapter, prompt: str, guidance: float) -> bool:
    """Whether an image of two sampler steps is another, in any bit, with the adapter on and off."""
    noise = initial_noise(prompt, 0, [0], model.latent_shape).to(model.unet.device)
    on = model.generator(guidance, 2, adapter.prefix)(prompt, noise)
    with adapter.off():
        return not torch.equal(on, model.generator(guidance, 2)(prompt, noise))
