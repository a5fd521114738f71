"""Tiny real judges for the training tests: a convolutional classifier and a pixel encoder, both differentiable."""

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from classifiers.attributes import MEAN, STD
from classifiers.crop import align
from classifiers.detect import WholeImage
from classifiers.identity import Bank
from classifiers.types import Boxes
from fairdiff.audit.axis import MetricSpec
from fairdiff.audit.metrics import compute_metrics
from fairdiff.cli.main import CONF, to_config
from fairdiff.config import Config
from fairdiff.diffusion.adapters import Lora, SoftTokens
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.objective.losses import Damping
from fairdiff.objective.perception import Perception
from fairdiff.objective.targets import Target, Targets
from fairdiff.training.originals import Originals
from fairdiff.training.step import Method, Objective, Trainee

CONVNEXT = {
    "architecture": "convnext_atto",
    "kwargs": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "kernel_sizes": 3},
    "image_size": 32,
    "mean": list(MEAN),
    "std": list(STD),
}  # of a judge or an embedder, less its outputs
WORDS = "a photo of the face nurse carpenter person chef , woman man".split()
CLASSES = {"gender": ("female", "male"), "race": ("White", "Black", "Indian", "Asian")}


class TinyClassifier(nn.Module):
    """A random frozen network with logits for two attributes."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.attributes = CLASSES
        self.register_buffer("kernel", torch.randn(8, 3, 4, 4, generator=generator))
        self.register_buffer("head", torch.randn(8, 6, generator=generator))

    def forward(self, crop_FCHW):
        hidden = F.conv2d(crop_FCHW - 0.5, self.kernel, stride=4).tanh().mean((2, 3)) @ self.head * 4
        return {"gender": hidden[:, :2], "race": hidden[:, 2:]}


class TinyEncoder:
    """Pooled pixels, L2-normalised."""

    def image(self, image_BCHW):
        return F.normalize(F.avg_pool2d(image_BCHW - 0.5, 4).flatten(1), dim=1)


class TinyEmbedder(nn.Module):
    """Pooled pixels of 16 x 16 faces, L2-normalised."""

    def align(self, image_BCHW, boxes):
        return align(image_BCHW, boxes, 16)

    def forward(self, aligned_FCHW):
        return F.normalize(F.avg_pool2d(aligned_FCHW - 0.4, 8).flatten(1), dim=1)


def tiny_bank() -> Bank:
    """Six faces of random embeddings."""
    return Bank(F.normalize(torch.randn(6, 12, generator=torch.Generator().manual_seed(5)), dim=1))


class NoFaces(WholeImage):
    """A detector that finds no face in any image."""

    def __call__(self, image_BCHW):
        return Boxes.none(image_BCHW)


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return a byte-pair tokenizer without merges, so that every letter is a token."""
    letters = sorted({c for w in WORDS for c in w} | set("abcdefghijklmnopqrstuvwxyz"))
    vocab = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=40)


def with_tensors(folder: Path, to: Path, component: str, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a model folder in which the tensors of one component's file are changed in place."""
    shutil.copytree(folder, to)
    (file,) = (to / component).glob("*.safetensors")
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})
    return to


def with_json(folder: Path, to: Path, file: str, **changes: object) -> Path:
    """A copy of a model folder in which keys of one JSON file have other values."""
    shutil.copytree(folder, to)
    known = json.loads((to / file).read_text())
    (to / file).write_text(json.dumps(known | changes))
    return to


def with_scheduler(folder: Path, to: Path, scheduler) -> Path:
    """A copy of a model folder with another scheduler."""
    with_json(folder, to, "model_index.json", scheduler=["diffusers", type(scheduler).__name__])
    scheduler.save_pretrained(to / "scheduler")
    return to


def composed(*overrides: str) -> Config:
    """The configuration of train.py with these overrides."""
    with initialize_config_dir(CONF, version_base="1.3"):
        return to_config(compose("config", overrides=list(overrides)))


def make_trainee(model, kind="soft_tokens", attributes=("gender",), **changes) -> Trainee:
    """Return a trainee on a tiny model; `changes` overrides settings of objective and method."""
    generator = torch.Generator().manual_seed(3)
    if kind == "soft_tokens":
        adapter = SoftTokens(model, 3, "a photo")
    else:
        parts = {"lora_text": ["text_encoder"], "lora_unet": ["unet"], "lora_both": ["text_encoder", "unet"]}[kind]
        adapter = Lora(model, parts, 4, 4, generator)
    perception = Perception(
        changes.get("detector", WholeImage()), TinyClassifier(), [TinyEncoder()], TinyEmbedder(), tiny_bank(), 16, 1.0
    )

    def original(prompt, indices, steps):
        with adapter.off():
            noise = initial_noise(prompt, 0, indices, model.latent_shape).to(model.unet.device)
            return model.generator(2.0, steps)(prompt, noise)

    uniform = Target.from_marginals({a: [1 / len(CLASSES[a])] * len(CLASSES[a]) for a in attributes})
    objective = Objective(
        Targets(changes.get("target", uniform)),
        {a: Damping(0.2, 0.3) for a in attributes},
        confidence=0.8,
        weigh_classes=changes.get("weigh_classes", True),
        align=changes.get("align", 1.0),
        image=changes.get("image", 2.0),
        face=changes.get("face", 0.5),
        confident_class=0.9,
    )
    method = Method(
        guidance=2.0,
        gradient=changes.get("gradient", "unit"),
        evaluations=changes.get("evaluations"),
        decode_batch=changes.get("decode_batch", 100),
        replay_batch=changes.get("replay_batch", 100),
    )
    return Trainee(
        model, adapter, perception, Originals(perception, original, changes.get("folder"), block=4), objective, method
    )


def whole_audit() -> dict:
    """Return an audit with all parts: two families, three models, a joint, counted errors, prompts without people."""
    classes, rows = {"gender": ("female", "male"), "race": ("White", "Black")}, []
    rng = np.random.default_rng(0)
    for model, prompt, image in product(("before", "start", "after"), range(7), range(8)):
        people, names = prompt not in (4, 5), "gender.male" if prompt == 6 else ""
        share = {f"p.{a}.{c}": p for a in classes for c, p in zip(classes[a], rng.dirichlet([1, 1]), strict=True)}
        share |= {"wording.gender.0": image % 2, "wording.gender.1": 0}
        after = np.nan if model == "before" else 0.9
        rows.append({
            "model": model, "family": "sport" if prompt % 2 else "occupation", "people": people, "names": names,
            "prompt_index": prompt,
            "subject": f"s{prompt}", "prompt": f"a {prompt}", "image_index": image, "seed": 1, "found": people,
            "faces": -1, **share,
            "clip_t": 0.3, "clip_i": after, "dino": after, "between": 0.5, "model_hash": model, "judge_hash": "j",
        })  # fmt: skip
    spec = MetricSpec(
        classes, {"path": "x", "same_as_training_judge": False, "wordings": {"gender": [{}, {}]}},
        {"gender": np.array([0.5, 0.5])}, {name: np.array([[90, 10], [10, 90]]) for name in classes},
        provenance={"guidance": 7.5},
    )  # fmt: skip
    return compute_metrics(pd.DataFrame(rows), spec, {3.0: pd.DataFrame(rows)})
