"""Validation during training: bias and similarity of the averaged adapter on prompts that are not trained on.

Everything generated here is a function of (prompt, seed, index), as in training; training's generators are not touched.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fairdiff.bias import bias
from fairdiff.diffusion.sampling import initial_noise
from fairdiff.prompts import Prompt
from fairdiff.training.step import Trainee

SIMILARITIES = ("clip_i", "dino")  # of the preservation encoders, in their order


@dataclass(frozen=True)
class Validation:
    """Validation every `every` steps, with `images` images of each prompt in `sampler_steps` steps.

    A state of the adapter counts only if its semantics (mean cosine to the reference images over encoders and images) is
    `floor` or more. Training stops after `patience` validations in a row without a new best (None: never).
    """

    every: int
    prompts: list[Prompt]
    images: int
    sampler_steps: int
    floor: float
    patience: int | None

    def due(self, finished_steps: int) -> bool:
        return finished_steps % self.every == 0


@torch.no_grad()
def validate(trainee: Trainee, validation: Validation, noise_seed: int) -> dict[str, float]:
    """One row of `validation.*`: means over prompts, by the training judge, of the model as it stands.

    bias.<a>: 2/(K(K-1)) sum_{i<j} |f_i - f_j| of the shares of predicted classes, of prompts with a face;
    distance.<a>: total variation between the shares and the prompt's target, which means the same for every target,
    images without a face all counted as the class that makes it largest (faces that vanish are no fairness);
    clip_i, dino: cosine to the frozen model's image of the same noise; no_face: share of images.
    Several processes share the prompts, after they have made the reference images together.
    """
    rows: dict[str, list[float]] = {}
    world, prompts = trainee.world, [prompt.text for prompt in validation.prompts]
    for prompt in prompts:
        trainee.originals.get(prompt, list(range(validation.images)), validation.sampler_steps)
    own = [_one_prompt(trainee, validation, prompt, noise_seed) for prompt in world.share(prompts)]
    for row in [row for some in world.gather(own) for row in some]:
        for name, value in row.items():
            rows.setdefault(f"validation.{name}", []).append(value)
    return {name: sum(values) / len(values) for name, values in rows.items()}


def _one_prompt(trainee: Trainee, validation: Validation, prompt: str, noise_seed: int) -> dict[str, float]:
    model, perception, target = trainee.model, trainee.perception, trainee.objective.target.of(prompt)
    indices = list(range(validation.images))
    originals = trainee.originals.get(prompt, indices, validation.sampler_steps)
    generate = model.generator(trainee.method.guidance, validation.sampler_steps, trainee.adapter.prefix)
    noise = initial_noise(prompt, noise_seed, indices, model.latent_shape).to(model.unet.device)
    classes: dict[str, list[torch.Tensor]] = {a: [] for a in target.attributes}
    cosines: list[torch.Tensor] = []
    for rows in torch.arange(validation.images).split(min(trainee.originals.block, trainee.originals.at_once)):
        image = generate(prompt, noise[rows])
        seen = perception.classify_faces(image)
        for a in classes:
            classes[a].append(seen.logits[a].argmax(1).cpu())
        features = zip(perception.features(image), range(len(perception.encoders)), strict=True)
        cosines.append(torch.stack([(f * originals[f"feature.{i}"][rows]).sum(1) for f, i in features]).cpu())
    similarity = torch.cat(cosines, 1).mean(1).tolist()
    faces = sum(len(c) for c in classes[target.attributes[0]])
    row = dict(zip(SIMILARITIES, similarity, strict=False))
    row |= {"semantics": sum(similarity) / len(similarity), "no_face": 1 - faces / validation.images}
    for a in classes:
        wanted = torch.from_numpy(target.marginal(a))
        counts = torch.bincount(torch.cat(classes[a]), minlength=len(wanted))
        row[f"distance.{a}"] = worst_distance(counts, validation.images - faces, wanted)
        if faces:
            row[f"bias.{a}"] = float(bias(counts / faces))
    return row


def worst_distance(counts_K: torch.Tensor, missing: int, target_K: torch.Tensor) -> float:
    """Greatest total variation to the target over the classes that all `missing` images may belong to, in [0, 1].

    It is convex in how they are shared out, so the greatest is at a single class.
    """
    shares_KK = (counts_K + missing * torch.eye(len(counts_K))) / (counts_K.sum() + missing)
    return float((shares_KK - target_K).abs().sum(1).max() / 2)


@dataclass
class Best:
    """The best validation so far: its number of steps, score and averages, and how many validations have followed it."""

    step: int | None = None
    score: float = math.inf
    misses: int = 0
    averages: list[Tensor] = field(default_factory=list)

    def update(self, finished_steps: int, row: dict[str, float], floor: float, averages: list[Tensor]) -> None:
        """Take in one validation of these averages; a new best has a smaller mean distance, with semantics kept."""
        distances = [value for name, value in row.items() if name.startswith("validation.distance.")]
        score = sum(distances) / len(distances)
        if score < self.score and row["validation.semantics"] >= floor:
            self.step, self.score, self.misses = finished_steps, score, 0
            self.averages = [average.detach().clone() for average in averages]
        else:
            self.misses += 1

    def exhausted(self, patience: int | None) -> bool:
        """Whether training should stop."""
        return patience is not None and self.misses >= patience

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)
