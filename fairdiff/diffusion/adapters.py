"""What is trained: soft tokens before the prompt, or LoRA on the text encoder, the U-Net or both.

Every adapter can be switched off (`off()`), so that the frozen model is the same model and never a second copy, and
saved in the formats that plain diffusers loads: `load_textual_inversion` and `load_lora_weights`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fairdiff.diffusion.load import DiffusionModel
from fairdiff.errors import FairDiffError

TOKEN = "<fairdiff>"
SOFT_TOKENS_FILE = "soft_tokens.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]  # section 5 of the paper
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_ROOT = "text_model."  # in files; transformers 5 dropped it from the names inside Stable Diffusion's text encoder
MODULES = {"text_encoder": ["text_encoder", "text_encoder_2"], "unet": ["unet"]}  # of each of `adapter.parts`


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
        if model.text_encoder_2:  # which takes the token of highest id for the end of the text that it pools there
            raise FairDiffError("adapter.type: found soft_tokens, allowed with Stable Diffusion XL: lora")
        self.tokenizer, self.count = model.tokenizer, tokens
        self.names = [TOKEN] + [f"{TOKEN}_{i}" for i in range(1, tokens)]
        base = model.text_encoder.get_input_embeddings()
        if model.tokenizer.add_tokens(self.names) != tokens or len(model.tokenizer) != base.num_embeddings + tokens:
            raise FairDiffError(f"adapter: the tokenizer already knows {TOKEN} or does not match the text encoder")
        self.start_from(initial_text, base)
        self.embedding = SoftTokenEmbedding(base, self.origin[0].clone())
        model.text_encoder.set_input_embeddings(self.embedding)
        self.enabled = True

    def start_from(self, text: str, base: nn.Embedding) -> None:
        """Take the embeddings of these words for where the tokens started."""
        known = self.tokenizer(text, add_special_tokens=False).input_ids
        if not known:
            raise FairDiffError(f"adapter.initial_text: found '{text}', allowed: at least one word")
        self.initial_text = text
        self.origin = [base.weight[[known[i % len(known)] for i in range(self.count)]].detach().clone()]

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
        state = _read(folder / SOFT_TOKENS_FILE)
        soft = self.embedding.soft
        if set(state) != {TOKEN} or state[TOKEN].shape != soft.shape:
            found = {k: tuple(v.shape) for k, v in state.items()}
            raise FairDiffError(
                f"{folder / SOFT_TOKENS_FILE}: found {found}, expected {{'{TOKEN}': {tuple(soft.shape)}}}"
            )
        with safe_open(folder / SOFT_TOKENS_FILE, "pt") as file:
            text = (file.metadata() or {}).get("initial_text", self.initial_text)
        self.start_from(text, self.embedding.base)  # `rescale` measures from there
        soft.data.copy_(state[TOKEN])


class Lora:
    """LoRA of one rank on attention and feed-forward layers of the text encoder, the U-Net or both; scale alpha/rank.

    The text encoder of Stable Diffusion XL is two.
    """

    kind = "lora"
    prefix = ""
    origin: list[Tensor] | None = None  # a new one changes nothing, see `at_origin`

    def __init__(self, model: DiffusionModel, parts: list[str], rank: int, alpha: float, generator: torch.Generator):
        names = [name for part in parts for name in MODULES[part]]
        self.modules = {name: module for name in names if (module := getattr(model, name)) is not None}
        self.pipeline = StableDiffusionXLPipeline if model.text_encoder_2 else StableDiffusionPipeline
        self.rank, self.alpha = rank, alpha
        for name, module in self.modules.items():
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=_layers(name), init_lora_weights="gaussian")
            inject_adapter_in_model(config, module)  # not through transformers, which wants a peft of its own choice
            keep_in_float32(module)
        for parameter in self.parameters():
            if parameter.any():  # peft drew the down-projection from the global stream: draw it from ours
                noise = torch.randn(parameter.shape, generator=generator) / rank
                parameter.data.copy_(noise)

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
        save_lora(folder, state, self.rank, self.alpha, self.pipeline)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; a missing, extra or misshapen key is an error naming it."""
        path = folder / LORA_FILE
        state = _read(path)
        left = sorted(k for k in state if k.split(".", 1)[0] not in self.modules)
        if left:
            raise FairDiffError(f"{path}: holds {len(left)} keys for no part of this adapter, the first is {left[0]}")
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        for name in self.modules:
            ranks = [len(v) for k, v in state.items() if k.startswith(f"{name}.") and ".lora_A." in k]
            rank = about.get(f"{name}.r", min(ranks, default=self.rank))
            found = about.get(f"{name}.lora_alpha", rank), rank  # as diffusers takes it where the file does not say
            if found != (self.alpha, self.rank):
                raise FairDiffError(
                    f"{path}: (alpha, rank) of {name} is {found}, this adapter has {(self.alpha, self.rank)}"
                )
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


def keep_in_float32(module: nn.Module) -> None:
    """Hold the LoRA factors of a module of lower precision in float32 (peft gives them the base layer's precision)."""
    for layer in (m for m in module.modules() if isinstance(m, LoraLayer)):
        if layer.get_base_layer().weight.dtype == torch.float32:
            continue
        layer.cast_input_dtype_enabled = False  # else peft computes in float32 and copies every activation
        for factors in (layer.lora_A, layer.lora_B):
            for name, linear in factors.items():
                cast = CastLinear(linear.in_features, linear.out_features, bias=False, device=linear.weight.device)
                cast.weight.data.copy_(linear.weight)
                factors[name] = cast


def _layers(name: str) -> list[str]:
    return UNET_LAYERS if name == "unet" else TEXT_LAYERS


def save_lora(folder: Path, state: dict[str, dict[str, Tensor]], rank: int, alpha: float, pipeline: type) -> None:
    """Write the LoRA factors of each module, named as peft does, as `load_lora_weights` of a pipeline's class reads them."""
    given: dict[str, dict] = {}
    for name, factors in state.items():
        root = "" if name == "unet" else TEXT_ROOT
        given[f"{name}_lora_layers"] = {root + key.removeprefix(root): value for key, value in factors.items()}
        about = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": _layers(name),
            "rank_pattern": {},
            "alpha_pattern": {},
        }
        given[f"{name}_lora_adapter_metadata"] = about  # without it diffusers takes alpha = rank
    pipeline.save_lora_weights(folder, **given)


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


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        beside = sorted(p.name for p in path.parent.glob("*.safetensors"))
        raise FairDiffError(f"{path}: no such file, found {', '.join(beside) or 'no adapter'} in that folder")
    try:
        return load_file(path)
    except Exception as error:  # missing, truncated, not safetensors
        raise FairDiffError(f"{path}: cannot read the adapter: {error}") from error
