"""The trained adapters: soft tokens before the prompt, or LoRA on the text encoder, the U-Net or both.

Every adapter can be switched off (`off()`), so the frozen model needs no second copy. Every adapter is saved in a format
that diffusers loads, with `load_textual_inversion` or `load_lora_weights`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fairdiff.diffusion.adapter_files import (
    LORA_FILE,
    TEXT_ROOT,
    check_matrices,
    lora_settings,
    read_tensors,
    save_lora,
    uniform,
)
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.lora_files import Layers, settings_of
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.diffusion.soft_tokens import SoftTokens
from fairdiff.errors import FairDiffError


def modules_of(model: DiffusionModel, part: str) -> dict[str, nn.Module]:
    """Return the modules of one of `adapter.parts` by their names in files, without T5: pipelines load no LoRA for it."""
    if part == "unet":
        return {"transformer" if model.is_flow else "unet": model.unet}
    named = {"text_encoder": model.text_encoder, "text_encoder_2": model.text_encoder_2}
    return {name: module for name, module in named.items() if module is not None}


class Lora:
    """LoRA with one rank and scale alpha/rank on the layers of `layers_of`: of the text encoder, the U-Net or both.

    Stable Diffusion XL and 3 have two text encoders besides T5, and both get LoRA. "unet" also means the transformer of
    Stable Diffusion 3 and FLUX. `of_files` makes LoRA from files, on the layers that the files contain.
    """

    kind = "lora"
    prefix = ""
    origin: list[Tensor] | None = None  # not needed: untrained LoRA does not change the model, see `at_origin`

    def __init__(self, model: DiffusionModel, parts: list[str], rank: int, alpha: float, generator: torch.Generator):
        names = [name for part in parts for name in modules_of(model, part)]
        self._hang(model, {name: uniform(name, rank, alpha) for name in names})
        for parameter in self.parameters():
            if parameter.any():  # peft drew the down-projection from the global generator: draw it from the given one
                noise = torch.randn(parameter.shape, generator=generator) / rank
                parameter.data.copy_(noise)

    @classmethod
    def of_files(cls, model: DiffusionModel, layers: Layers) -> "Lora":
        """Make LoRA with the factors read from files, on linear or convolutional layers, each with its own rank."""
        lora = cls.__new__(cls)
        lora._hang(model, {name: settings_of(part) for name, part in layers.items()})
        for name, module in lora.modules.items():
            for layer, inner in module.named_modules():
                if isinstance(inner, LoraLayer):
                    factors = layers[name].get(layer.removeprefix(TEXT_ROOT))
                    if factors is None:  # peft matches the endings of layer names
                        raise FairDiffError(f"{name}.{layer} ends as a layer of the file does and has no LoRA in it")
                    inner.lora_A["default"].weight.data.copy_(factors.down)
                    inner.lora_B["default"].weight.data.copy_(factors.up)
        return lora

    def _hang(self, model: DiffusionModel, settings: dict[str, dict]) -> None:
        """Add LoRA to the modules of a model. settings: the arguments of peft's LoraConfig for each module."""
        self.settings = settings
        named = modules_of(model, "text_encoder") | modules_of(model, "unet")
        self.modules = {name: named[name] for name in settings}
        self.pipeline = model.kind
        for name, module in self.modules.items():
            config = LoraConfig(**settings[name], init_lora_weights="gaussian")
            inject_adapter_in_model(config, module)  # not through transformers, which accepts only some versions of peft
            keep_in_float32(module)

    def parameters(self) -> list[nn.Parameter]:
        return [p for m in self.modules.values() for n, p in m.named_parameters() if ".lora_" in n]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Switch the adapter off: the model is the frozen one. peft clears requires_grad then, so the flags are restored."""
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
        """Multiply the weight update (alpha / rank) B A by `scale`: 0 gives the frozen model, 1 changes nothing."""
        for module in self.modules.values():
            for name, parameter in module.named_parameters():
                if ".lora_B." in name:
                    parameter.data.mul_(scale)

    def save(self, folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors` for `load_lora_weights` of the model's pipeline."""
        state = {name: get_peft_model_state_dict(module) for name, module in self.modules.items()}
        save_lora(folder, state, self.settings, self.pipeline)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raise FairDiffError naming the key for a missing, extra or misshapen one."""
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
            found = settings.get(f"{name}.lora_alpha", rank), rank  # diffusers' default without metadata: alpha = rank
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
    """A linear layer with float32 weights that computes in the input's precision; the weights get a float32 gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


class CastConv2d(nn.Conv2d):
    """A convolution with float32 weights that computes in the input's precision, like `CastLinear`."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype), None)


def in_float32(factor: nn.Linear | nn.Conv2d) -> nn.Module:
    """Return a LoRA factor as a `CastLinear` or `CastConv2d` with the same weights."""
    device = factor.weight.device
    if isinstance(factor, nn.Linear):
        cast = CastLinear(factor.in_features, factor.out_features, bias=False, device=device)
    else:
        shape = (factor.in_channels, factor.out_channels, factor.kernel_size, factor.stride, factor.padding)
        cast = CastConv2d(*shape, bias=False, device=device)
    cast.weight.data.copy_(factor.weight)
    return cast


def keep_in_float32(module: nn.Module) -> None:
    """Hold the LoRA factors of a module in float32; peft would give them the lower precision of the base layer."""
    for layer in (m for m in module.modules() if isinstance(m, LoraLayer)):
        if layer.get_base_layer().weight.dtype == torch.float32:
            continue
        layer.cast_input_dtype_enabled = False  # otherwise peft computes in float32 and copies every activation
        for factors in (layer.lora_A, layer.lora_B):
            for name, linear in factors.items():
                factors[name] = in_float32(linear)


Adapter = SoftTokens | Lora


@contextmanager
def at_origin(adapter: Adapter) -> Iterator[None]:
    """Set the adapter to its state before training, `origin` (which must not be None), and restore it afterwards."""
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
    """Return whether an image of two sampler steps differs in any bit between adapter on and off."""
    noise = initial_noise(prompt, 0, [0], model.latent_shape).to(model.unet.device)
    on = model.generator(guidance, 2, adapter.prefix)(prompt, noise)
    with adapter.off():
        return not torch.equal(on, model.generator(guidance, 2)(prompt, noise))
