"""Tiny random models in the formats of judges and encoders for photographs."""

import json
import shutil
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from classifiers.calibration import CALIBRATION_FILE
from fairdiff.portraits import weights

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
PIXELS = {
    "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic", "resize_mode": "squash",
}  # fmt: skip


def save_vit(folder: Path, labels: list[str], **more) -> str:
    """Save a Hugging Face image classifier of width 16 with its processor; the seed depends on the number of labels."""
    torch.manual_seed(len(labels))
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8,
        id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}, **more,
    )  # fmt: skip
    net = ViTForImageClassification(config)
    torch.nn.init.normal_(net.classifier.weight)
    net.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def save_timm(folder: Path, labels: list[str], **declared) -> str:
    """A timm classifier in Hugging Face form, which declares its preprocessing in `pretrained_cfg` of its config.json."""
    torch.manual_seed(0)
    config = TimmWrapperConfig(
        architecture="convnext_atto", model_args={"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}, num_labels=len(labels),
        id2label=dict(enumerate(labels)), pretrained_cfg=declared,
    )  # fmt: skip
    net = TimmWrapperForImageClassification(config)
    torch.nn.init.normal_(net.timm_model.head.fc.weight)
    net.save_pretrained(folder)
    return str(folder)


def change_json(file: Path, **changes) -> None:
    """Set keys of a JSON file, or remove those with the value `...`."""
    content = (json.loads(file.read_text()) if file.exists() else {}) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def change_tensor(file: Path, key: str, change) -> None:
    """Replace one tensor of a safetensors file by change(tensor)."""
    tensors = load_file(file)
    tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, file, {"format": "pt"})


def uncalibrated(folder: Path) -> str:
    """Copy the embedded audit judge without its calibration, for crops other than those of the calibration."""
    shutil.copytree(weights("audit_judge"), folder, ignore=shutil.ignore_patterns(CALIBRATION_FILE))
    return str(folder)


def save_open_clip(folder: Path) -> str:
    """Save an open_clip model with its configuration and the real vocabulary."""
    torch.manual_seed(0)
    vision, text = open_clip.CLIPVisionCfg(**MODEL["vision_cfg"]), open_clip.CLIPTextCfg(**MODEL["text_cfg"])
    model = open_clip.CLIP(MODEL["embed_dim"], vision, text)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    about = {"model_cfg": MODEL, "preprocess_cfg": PIXELS}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return str(folder)


def save_dinov2(folder: Path) -> str:
    """Save a DINOv2 encoder with DINOv2's processor: it resizes the shorter side, then crops the centre."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return str(folder)


def audit_settings(model: Path, folder: Path) -> list[str]:
    """Return overrides of a small audit of a tiny model by the embedded judge: three images of two prompts, in `folder`."""
    return [
        f"model.path={model}", "model.device=cpu", "model.sampling_dtype=float32",
        f"audit.judge.path={uncalibrated(folder / 'judge')}",
        "features.clip=embedded", "features.encoder=embedded", "features.identity=embedded", "detector=whole",
        "prompts.template='a photo of the face of {a} {}'", "sampler.audit_steps=2", f"cache={folder / 'cache'}",
        "audit.prompts=2", "audit.images_per_prompt=3",
    ]  # fmt: skip
