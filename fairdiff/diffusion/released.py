"""Convert the adapters that the paper's authors released to the formats that this project and diffusers load.

Their files are flat dicts of float32 tensors (github.com/sail-sg/finetune-fair-diffusion, Shen et al., ICLR 2024). They
hold LoRA for the text encoder or the U-Net without an alpha (so the scale is 1), or the soft tokens and a copy of the
model's position embeddings. They are meant for Stable Diffusion 1.5, guidance 7.5 and prompts that are not padded. (LoRA
was trained with a mask for the negative prompt, which `model.padding=longest` applies; the soft tokens had no mask.)

The tensors that a file must hold follow from the layers of its model. For Stable Diffusion 1.5 these are 144 LoRA tensors
for the text encoder, 256 for the U-Net, and tokens [6, 768].
"""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from fairdiff.diffusion.adapter_files import (
    SOFT_TOKENS_FILE,
    TEXT_ROOT,
    TOKEN,
    check_matrix,
    layers_of,
    save_lora,
    uniform,
)
from fairdiff.diffusion.folder import component_on_no_device, differences, read_component, some
from fairdiff.errors import FairDiffError
from fairdiff.files import atomic_path, write_json

RANK, TOKENS = 50, 5  # in every released file
FACTOR = {"down": "lora_A", "up": "lora_B"}
PREFIX = ("token_embedding.weight", "position_embedding.weight", "position_ids")
MARKS = {"text_encoder": ".lora_linear_layer.", "unet": ".processor."}  # occurs in every tensor name of that part's file
CONTRACT = {  # the authors' own evaluation
    "scheduler": "DPMSolverMultistepScheduler",
    "final_sigmas": "sigma_min",
    "spacing": "linspace",
    "sampler_steps": 30,
    "guidance": 7.5,
    "negative_prompt": "",
    "padding": "longest",
}


def convert(files: list[Path], folder: Path, model: str | Path) -> dict[str, object]:
    """Write released files as one adapter folder: LoRA of the text encoder, of the U-Net or of both, or the soft tokens.

    model: a folder or hub id of the adapter's model. Returns the contents of `adapter.json`. Raises FairDiffError, in one
    line that names the file, if it cannot be read without running code in it, if its tensors are not exactly those of a
    released adapter for this model, or if the folder exists.
    """
    if folder.exists():
        raise FairDiffError(f"{folder}: exists already, allowed: a new folder")
    parts: dict[str, dict[str, Tensor]] = {}
    for file in files:
        name, state = read_released(file, model)
        if name in parts:
            raise FairDiffError(f"{file}: holds {name}, as another of these files does")
        parts[name] = state
    if "soft_tokens" in parts and len(parts) > 1:
        raise FairDiffError(
            f"{', '.join(map(str, files))}: soft tokens and LoRA are adapters of their own; convert one"
        )
    about = CONTRACT | {"source": [file.name for file in files]}
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        if "soft_tokens" in parts:
            save_file(parts["soft_tokens"], temporary / SOFT_TOKENS_FILE)
            about |= {"type": "soft_tokens", "options": f"adapter.type=soft_tokens adapter.tokens={TOKENS}"}
            about |= {"load_with": "load_textual_inversion", "prompt_prefix": f"{TOKEN} "}
        else:
            settings = {name: uniform(name, RANK, RANK) for name in parts}
            save_lora(temporary, parts, settings, StableDiffusionPipeline)
            names = [name for name in ("text_encoder", "unet") if name in parts]
            options = f"adapter.type=lora adapter.parts=[{','.join(names)}] adapter.rank={RANK}"
            about |= {"type": "lora", "options": options, "load_with": "load_lora_weights", "prompt_prefix": ""}
        write_json(temporary / "adapter.json", about)
    return about


def read_released(file: Path, model: str | Path) -> tuple[str, dict[str, Tensor]]:
    """Return ("text_encoder" or "unet", LoRA factors by peft's names) or ("soft_tokens", {token: [N, D]})."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # missing, cut short, another format, or code that would have to be run
        raise FairDiffError(
            f"{file}: cannot read it without running code: {' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise FairDiffError(f"{file}: holds no flat dict of tensors")
    if other := [key for key in state if not isinstance(key, str)]:
        raise FairDiffError(f"{file}: {other[0]!r} is no name")
    if PREFIX[0] in state:
        return "soft_tokens", {TOKEN: _soft_tokens(file, state, model)}
    for part, mark in MARKS.items():
        if any(mark in key for key in state):
            return part, _factors(file, state, part, model)
    raise FairDiffError(f"{file}: no released adapter: {next(iter(state))}")


def released_names(part: str, module: nn.Module) -> dict[str, tuple[str, list[int]]]:
    """Return the tensors of a part's file: the authors' name of each LoRA factor -> peft's name and the shape."""
    ends = tuple(f".{end}" for end in layers_of(part))
    found = {}
    for name, layer in module.named_modules():
        if not name.endswith(ends):
            continue
        shapes = {"down": [RANK, layer.in_features], "up": [layer.out_features, RANK]}
        attention, _, projection = name.removesuffix(".0").rpartition(".")
        theirs = f"{TEXT_ROOT}{name.removeprefix(TEXT_ROOT)}.lora_linear_layer"
        theirs = f"{attention}.processor.{projection}_lora" if part == "unet" else theirs
        found |= {f"{theirs}.{f}.weight": (f"{name}.{FACTOR[f]}.weight", shape) for f, shape in shapes.items()}
    return found


def _factors(file: Path, state: dict[str, Tensor], part: str, model: str | Path) -> dict[str, Tensor]:
    names = released_names(part, _of_model(component_on_no_device, part, model))
    allowed = f"allowed: exactly the {len(names)} tensors of LoRA of rank {RANK} on the {part} of {model}"
    _require_tensors(file, state, {key: shape for key, (_, shape) in names.items()}, allowed)
    return {names[key][0]: value.float().contiguous() for key, value in state.items()}


def _soft_tokens(file: Path, state: dict[str, Tensor], model: str | Path) -> Tensor:
    """Return the soft tokens [N, D] without the dummy row that precedes them in the file."""
    encoder = _of_model(read_component, "text_encoder", model).state_dict()
    (position,) = (value for key, value in encoder.items() if key.endswith("embeddings.position_embedding.weight"))
    shapes = {PREFIX[0]: [1 + TOKENS, position.shape[1]], PREFIX[1]: list(position.shape)}
    weights = {key: value for key, value in state.items() if key != PREFIX[2]}
    allowed = f"allowed: a dummy row and {TOKENS} tokens, and the position embedding, of the text_encoder of {model}"
    _require_tensors(file, weights, shapes, allowed)
    other = float((weights[PREFIX[1]] - position).norm() / position.norm())
    if other > 0.01:  # half precision differs by less
        raise FairDiffError(
            f"{file}: its position_embedding.weight differs by {other:.0%} from that of the text_encoder of {model}, which "
            "it should be a copy of"
        )
    rows = weights[PREFIX[0]].float()[1:].contiguous()
    if not rows.any(1).all():
        raise FairDiffError(
            f"{file}: a token of token_embedding.weight holds nothing but zeros, which no training leaves"
        )
    return rows


def _require_tensors(file: Path, state: dict[str, Tensor], shapes: dict[str, list[int]], allowed: str) -> None:
    """Raise FairDiffError unless the file holds exactly tensors of these names and shapes, none of them all zeros."""
    both = state.keys() & shapes.keys()
    misshapen = [f"{k}: {list(state[k].shape)} for {shapes[k]}" for k in both if list(state[k].shape) != shapes[k]]
    if wrong := differences(shapes.keys() - state.keys(), state.keys() - shapes.keys(), misshapen):
        raise FairDiffError(f"{file}: {wrong}; {allowed}")
    for key, value in state.items():
        check_matrix(value, f"{file}: {key}")
    if empty := sorted(key for key, value in state.items() if not value.any()):
        raise FairDiffError(f"{file}: {len(empty)} tensors hold nothing but zeros ({some(empty)})")


def _of_model(read, part: str, model: str | Path) -> nn.Module:
    try:
        return read(part, model)
    except FairDiffError as error:
        raise FairDiffError(f"--model: {error}") from error
