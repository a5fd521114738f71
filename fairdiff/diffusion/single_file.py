"""Read Stable Diffusion 1.x, 2.x or XL from one .safetensors file, as AUTOMATIC1111's web UI and ComfyUI do.

Its tensors have the names of the original code (CompVis/latent-diffusion, Stability-AI/generative-models), which diffusers'
`single_file_utils.py` converts. Nothing is downloaded: the sizes of all layers follow from the tensors' shapes. All other
settings are the same for all models of a kind: heads, activations, betas, tokenizer (unet/, vae/, text_encoder/ and
scheduler/ of stable-diffusion-v1-5, stable-diffusion-2-1 and stable-diffusion-xl-base-1.0 on the hub).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fairdiff.diffusion.folder import PLAIN, Pipeline, differences, one_line, some, unlike_stable_diffusion
from fairdiff.errors import FairDiffError
from fairdiff.files import read_given, read_yaml

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
UNET, VAE = "model.diffusion_model.", "first_stage_model."
Shapes = dict[str, list[int]]


@dataclass(frozen=True)
class Kind:
    """Settings of one kind of model.

    text: component -> prefix of its tensors' names. side: of the square latents. scaling: the VAE's scaling_factor."""

    text: dict[str, str]
    side: int
    scaling: float


KINDS = {
    "XL": Kind(
        {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
        128,
        0.13025,
    ),
    "2.x": Kind({"text_encoder": "cond_stage_model.model."}, 96, 0.18215),
    "1.x": Kind({"text_encoder": "cond_stage_model.transformer."}, 64, 0.18215),
}
OTHERS = {  # part of a tensor's name -> what a file with such tensors is
    "lora_": "a LoRA, not a whole model",
    "edm_mean": "a model of Playground's kind, trained on other noise levels",
    "control_model.": "a ControlNet",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "FLUX",
    "conditioner.embedders.0.model.": "the refiner of Stable Diffusion XL",
}
IGNORED = (  # prefixes of tensors that training and merging leave in files, and that no forward pass reads
    "cond_stage_model.logit_scale",
    "cond_stage_model.model.logit_scale",
    "cond_stage_model.transformer.logit_scale",
    "cond_stage_model.transformer.text_projection.",
    "conditioner.embedders.0.transformer.logit_scale",
    "conditioner.embedders.0.transformer.text_projection.",
    "conditioner.embedders.1.model.logit_scale",
    "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids",
    "first_stage_model.loss.",
    "first_stage_model.model_ema.",
)
UNUSED_LAYER = 23  # Stable Diffusion 2 uses the output of layer 22, so diffusers' text encoder has no layer 23


def is_single_file(path: str | Path) -> bool:
    """Return whether a path means a single file, which need not exist, and not a folder or hub id."""
    named = Path(path).suffix in (".safetensors", *PICKLES) and not Path(path).is_dir()
    return named or Path(path).is_file()


def read_single_file(path: str | Path) -> Pipeline:
    """Load the pipeline with all its components in float32 and every tensor from the file.

    Raises FairDiffError, in one line, for a pickle, for a file without a whole model of the three kinds, and for missing,
    unexpected and misshapen tensors.
    """
    path = Path(path)
    shapes = _header(path)
    name = _kind(path, shapes)
    kind = KINDS[name]
    with one_line(path):
        with _complete(path, name):
            parts = {
                "unet": _unet(path, _below(shapes, UNET), name),
                "vae": _vae(path, _below(shapes, VAE), kind.scaling),
                "scheduler": _scheduler(path, name, shapes),
            }
            for component, prefix in kind.text.items():
                parts[component] = _text_encoder(path, component, prefix, _below(shapes, prefix))
        noise = name == "2.x" and parts["scheduler"].config.prediction_type == "epsilon"
        parts["unet"].register_to_config(sample_size=64 if noise else kind.side)  # 64: Stable Diffusion 2 base
        if name == "XL":
            pads = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer(pad="!")}
            pipeline = StableDiffusionXLPipeline(**parts, **pads, **PLAIN[StableDiffusionXLPipeline])
        else:
            tokenizer = clip_tokenizer(pad="!") if name == "2.x" else clip_tokenizer()
            pipeline = StableDiffusionPipeline(**parts, tokenizer=tokenizer, **PLAIN[StableDiffusionPipeline])
        if why := unlike_stable_diffusion(pipeline):
            raise FairDiffError(f"{path}: {why}; allowed: a text-to-image model of Stable Diffusion 1.x's or XL's kind")
    return pipeline


def file_on_no_device(path: str | Path) -> dict[str, nn.Module]:
    """Build the text encoders and the U-Net of a file without weights, from its header alone."""
    path = Path(path)
    shapes = _header(path)
    name = _kind(path, shapes)
    with one_line(path), _complete(path, name), torch.device("meta"):
        texts = {part: _empty_encoder(part, prefix, _below(shapes, prefix)) for part, prefix in KINDS[name].text.items()}
        return texts | {"unet": _empty_unet(_below(shapes, UNET), name)}


@contextmanager
def _complete(path: Path, name: str) -> Iterator[None]:
    """Turn a missing tensor whose shape is needed (KeyError) into a FairDiffError that names the file."""
    try:
        yield
    except KeyError as error:
        raise FairDiffError(f"{path}: lacks the tensor {error}, which Stable Diffusion {name} has") from error


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """Return CLIP's byte-pair tokenizer with 49,408 tokens, from OpenAI's file in the package open_clip.

    pad: "!" for Stable Diffusion 2 and for XL's second text encoder, the end-of-text token for the others (from their
    tokenizer/tokenizer_config.json).
    """
    vocabulary, merges = _byte_pairs()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token=pad)


@cache
def _byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    from open_clip.tokenizer import SimpleTokenizer  # imported here because it takes a second and is rarely needed

    known = SimpleTokenizer()
    words = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return {words.get(token, token): i for token, i in known.encoder.items()}, list(known.bpe_ranks)


def _header(path: Path) -> Shapes:
    """Return the shape of every tensor in a file by name, without IGNORED ones, and without reading the tensors."""
    if path.suffix in PICKLES:
        raise FairDiffError(
            f"{path}: is a pickle, which can run code when it is read; allowed: .safetensors "
            "(docs/tutorials/stable_diffusion.md says how to convert it)"
        )
    if not path.is_file():
        raise FairDiffError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in _read(file.keys())}
    except Exception as error:  # cut short, not safetensors
        raise FairDiffError(f"{path}: cannot be read as a .safetensors file: {error}") from error


def _read(names: Iterable[str]) -> list[str]:
    """Return the names of tensors that are not IGNORED."""
    return [name for name in names if not name.startswith(IGNORED)]


def _kind(path: Path, shapes: Shapes) -> str:
    """Return which of `KINDS` a file is. Otherwise FairDiffError says what the file holds or lacks."""
    allowed = "allowed: a whole Stable Diffusion 1.x, 2.x or XL with U-Net, VAE and text encoder"
    for mark, what in OTHERS.items():
        if any(mark in name for name in shapes):
            raise FairDiffError(f"{path}: holds {what}; {allowed}")
    found = [name for name, kind in KINDS.items() if all(_below(shapes, prefix) for prefix in kind.text.values())]
    there = {"U-Net": _below(shapes, UNET), "VAE": _below(shapes, VAE), "text encoder": found}
    if lacking := [part for part, of_it in there.items() if not of_it]:
        names = some(sorted(shapes)) or "no tensors"
        raise FairDiffError(f"{path}: holds no {' and no '.join(lacking)} ({names}); {allowed}")
    return found[0]


def _below(shapes: Shapes, prefix: str) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _count(shapes: Shapes, prefix: str) -> int:
    """Return how many different names follow a prefix, up to the next dot: the number of blocks or layers."""
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})


def _tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        names = [name for name in _read(file.keys()) if name.startswith(prefix)]
        return {name: file.get_tensor(name).float() for name in names}


def _filled(path: Path, name: str, module: nn.Module, state: dict[str, Tensor], unknown: list[str]) -> nn.Module:
    """Assign the tensors to a module without weights. FairDiffError unless names and shapes are exactly the module's."""
    wanted = module.state_dict()
    wrong = [k for k in wanted.keys() & state.keys() if state[k].shape != wanted[k].shape]
    shapes = [f"{k}: {list(state[k].shape)} for {list(wanted[k].shape)}" for k in wrong]
    if wrong := differences(wanted.keys() - state.keys(), [*(state.keys() - wanted.keys()), *unknown], shapes):
        raise FairDiffError(f"{path}: the tensors of {name}: {wrong}; allowed: exactly those of a model of its kind")
    module.load_state_dict(state, assign=True)
    return module


def _unused(given: dict[str, Tensor], taken: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that a conversion dropped; it returns the others, or views of them."""
    places = {tensor.data_ptr() for tensor in taken.values()}
    return [name for name, tensor in given.items() if tensor.data_ptr() not in places]


def unet_config(shapes: Shapes, heads: int | None) -> dict:
    """Return UNet2DConditionModel's configuration from the tensors' shapes. heads: None for 64 channels a head."""
    levels: list[list[tuple[int, int]]] = [[]]  # for each resolution, the layers: (channels, depth of attention)
    for i in range(1, _count(shapes, "input_blocks.")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            levels.append([])
        else:
            channels = shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0]
            levels[-1].append((channels, _count(shapes, f"input_blocks.{i}.1.transformer_blocks.")))
    first = [level[0] for level in levels]
    kinds = ["CrossAttn" if depth else "" for _, depth in first]
    attention = next((name for name in sorted(shapes) if name.endswith(".0.attn2.to_k.weight")), "attn2.to_k.weight")
    config = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": [channels for channels, _ in first],
        "layers_per_block": len(levels[0]),
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "transformer_layers_per_block": [max(depth, 1) for _, depth in first],
        "attention_head_dim": heads or [channels // 64 for channels, _ in first],  # diffusers' name for the number of heads
        "cross_attention_dim": shapes[attention][1],
        "use_linear_projection": len(shapes["middle_block.1.proj_in.weight"]) == 2,
    }
    if "label_emb.0.0.weight" in shapes:
        wide = shapes["label_emb.0.0.weight"][1]
        config |= {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": wide}
        config |= {"addition_time_embed_dim": 256}
    return config


def _empty_unet(shapes: Shapes, name: str) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config(unet_config(shapes, 8 if name == "1.x" else None))


def _unet(path: Path, shapes: Shapes, name: str) -> UNet2DConditionModel:
    with init_empty_weights():
        unet = _empty_unet(shapes, name)
    return _converted(path, "the U-Net", unet, UNET, convert_ldm_unet_checkpoint)


def _converted(path: Path, name: str, module: nn.Module, prefix: str, convert: Callable) -> nn.Module:
    """Fill a module without weights with its tensors from the file, after diffusers' converter renamed them."""
    given = _tensors(path, prefix)
    state = convert(given, module.config)
    return _filled(path, name, module, state, _unused(given, state))


def vae_config(shapes: Shapes, scaling: float) -> dict:
    """Return AutoencoderKL's configuration from the tensors' shapes."""
    levels = _count(shapes, "encoder.down.")
    return {
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)],
        "layers_per_block": _count(shapes, "encoder.down.0.block."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "scaling_factor": scaling,
    }


def _vae(path: Path, shapes: Shapes, scaling: float) -> AutoencoderKL:
    with init_empty_weights():
        vae = AutoencoderKL.from_config(vae_config(shapes, scaling))
    return _converted(path, "the VAE", vae, VAE, convert_ldm_vae_checkpoint)


def text_config(shapes: Shapes, open_clip: bool) -> dict:
    """Return CLIPTextConfig's values from the tensors' shapes, by OpenCLIP's or transformers' names (no "text_model.")."""
    if open_clip:
        names = ("token_embedding.weight", "positional_embedding", "transformer.resblocks.", "mlp.c_fc.weight")
    else:
        tables = [f"embeddings.{table}_embedding.weight" for table in ("token", "position")]
        names = (*tables, "encoder.layers.", "mlp.fc1.weight")
    (words, width), positions, inner = shapes[names[0]], shapes[names[1]], shapes[f"{names[2]}0.{names[3]}"]
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": inner[0],
        "num_hidden_layers": _count(shapes, names[2]),
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": positions[0],
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "projection_dim": shapes.get("text_projection", [width, width])[1],
        **{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},  # as released: CLIP then pools at the highest token id
    }


def _empty_encoder(component: str, prefix: str, shapes: Shapes) -> nn.Module:
    open_clip, second = prefix.endswith(".model."), component == "text_encoder_2"
    if open_clip and not second:  # Stable Diffusion 2
        shapes = {k: v for k, v in shapes.items() if f".resblocks.{UNUSED_LAYER}." not in k and k != "text_projection"}
    config = text_config({k.removeprefix("text_model."): v for k, v in shapes.items()}, open_clip)
    return (CLIPTextModelWithProjection if second else CLIPTextModel)(CLIPTextConfig(**config))


def _text_encoder(path: Path, component: str, prefix: str, shapes: Shapes) -> nn.Module:
    given = _tensors(path, prefix)
    with init_empty_weights(include_buffers=False):
        encoder = _empty_encoder(component, prefix, shapes)
    if prefix.endswith(".model."):
        state = convert_open_clip_checkpoint(encoder, given, prefix)
    else:
        state = {k.removeprefix(prefix): v for k, v in given.items() if not k.endswith("position_ids")}
    root = "text_model." if hasattr(encoder, "text_model") else ""  # transformers 5 has it in one class only
    inside = {k: v for k, v in state.items() if not k.startswith("text_projection.")}
    state = {k: v for k, v in state.items() if k not in inside}
    state |= {root + k.removeprefix("text_model."): v for k, v in inside.items()}
    return _filled(path, f"the {component}", encoder, state, [])


def _scheduler(path: Path, name: str, shapes: Shapes) -> DDIMScheduler:
    """Return a scheduler with the noise schedule of all three kinds and the file's prediction type."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=_prediction(path, name, shapes),
        rescale_betas_zero_snr="ztsnr" in shapes,  # ComfyUI's mark for it is an empty tensor; such models are refused
    )


def _prediction(path: Path, name: str, shapes: Shapes) -> str:
    """Return "epsilon" or "v_prediction" by the file's empty tensor "v_pred" or by the .yaml beside the file.

    Stable Diffusion 2.x exists in both forms, whose tensors have the same shapes. The .yaml is the original code's
    configuration, which the web UI reads too.
    """
    if "v_pred" in shapes:
        return "v_prediction"
    beside, where = path.with_suffix(".yaml"), "model.params.parameterization"
    if not beside.exists():
        if name == "2.x":
            raise FairDiffError(
                f"{path}: no tensor of Stable Diffusion 2.x says whether it predicts velocity (768x768) or noise (512x512, "
                f"base); write {beside.name} beside it with 'model: {{params: {{parameterization: v}}}}', or eps for noise"
            )
        return "epsilon"
    found: object = read_yaml(read_given(beside, str(beside)), str(beside))
    for key in where.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    found = "eps" if found is None else found
    if found not in ("eps", "v"):
        raise FairDiffError(f"{beside}: {where}: found {found}, allowed: eps, v")
    return "epsilon" if found == "eps" else "v_prediction"
