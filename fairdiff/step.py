"""ONE training step of distributional alignment with the factorised gradient.

    1  sample B images of one prompt without a graph, keep every U-Net input z_t
    2  look at them: detect faces, classify; optimal transport to the target labels each face
    3  decode with a graph in micro-batches: L = L_align + w_img m L_img + w_face L_face;  g = dL/dz_0
    4  replay chosen (image, t) pairs: dL/dtheta += w_t J_theta(eps_t; sg(z_t))^T g
    5  one text-encoder backward with the accumulated gradient of the prompt embedding

Source: Shen et al., ICLR 2024; the factorised form is stated in fairdiff/sampling.py.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairdiff.adapters import Adapter
from fairdiff.judges import Judges, Seen
from fairdiff.losses import (
    Damping,
    alignment_loss,
    damp_gradient,
    intersect,
    preservation_loss,
    preservation_weight,
    realism_loss,
)
from fairdiff.models import DiffusionModel
from fairdiff.originals import Originals
from fairdiff.sampling import (
    Guidance,
    Upstream,
    choose_steps,
    gradient_weights,
    initial_noise,
    replay,
    sample,
    sample_with_graph,
)
from fairdiff.targets import Labels, Target, Targets, assign


@dataclass(frozen=True)
class Objective:
    """What is asked: the targets, the terms' weights (0 = measured only, None = absent) and the labels' confidence."""

    target: Targets
    damping: dict[str, Damping]
    confidence: float
    draws: int
    align: float
    image: float | None
    face: float | None
    confident_class: float


@dataclass(frozen=True)
class Method:
    """How it is done: guidance scale s, gradient type, replayed evaluations K (None = T), micro-batch sizes."""

    guidance: float
    gradient: str
    evaluations: int | None
    detach: bool
    decode_batch: int
    replay_batch: int


@dataclass(frozen=True)
class Batch:
    """One prompt, B indices into its noise pool, the number T of sampler steps, and a generator for this step."""

    prompt: str
    indices: list[int]
    steps: int
    noise_seed: int
    generator: torch.Generator


@dataclass
class StepResult:
    """Mean of each term over what it counts, the judge's shares per attribute, faces found and labels kept."""

    terms: dict[str, float]
    shares: dict[str, list[float]]
    faces: int
    kept: int
    trouble: str = ""


@dataclass
class Trainee:
    """The model under training with all that a step needs of it."""

    model: DiffusionModel
    adapter: Adapter
    judges: Judges
    originals: Originals
    objective: Objective
    method: Method


def training_step(trainee: Trainee, batch: Batch) -> StepResult:
    """Accumulate the adapter's gradient of one batch; without any kept label nothing is accumulated (kept = 0)."""
    model, method, objective = trainee.model, trainee.method, trainee.objective
    noise = initial_noise(batch.prompt, batch.noise_seed, batch.indices, model.latent_shape).to(model.unet.device)
    originals = trainee.originals.get(batch.prompt, batch.indices, batch.steps)

    text = embed_prompt(trainee, batch.prompt)  # 1
    literal = method.gradient == "autograd"
    if literal:
        live = Guidance(*text, method.guidance)
        final = sample_with_graph(model.unet, model.scheduler, live, noise, batch.steps, method.detach)
    else:
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in text]
        guidance = Guidance(*leaves, method.guidance)
        trajectory = sample(model.unet, model.scheduler, guidance, noise, batch.steps)
        final = trajectory.final

    latents = final.detach().split(method.decode_batch)  # 2
    with torch.no_grad():
        seen = [trainee.judges.see(model.decode(z)) for z in latents]
    if not all(s.logits[a].isfinite().all() for s in seen for a in objective.target.attributes):
        return StepResult({}, {}, sum(len(s.faces.row_F) for s in seen), 0, "the judge's logits are not finite")
    labels, shares = label_faces(seen, objective.target.of(batch.prompt), objective.draws, batch.generator)
    kept = {a: labels.kept(a, objective.confidence) for a in labels.classes}
    counts = {a: int(k.sum()) for a, k in kept.items()}
    result = StepResult({}, shares, sum(len(s.faces.row_F) for s in seen), sum(counts.values()))
    if result.kept == 0:
        return result

    grads, image_row, face_row = [], 0, 0  # 3
    for z, before in zip(latents, seen, strict=True):
        rows = slice(image_row, image_row + len(z))
        faces = slice(face_row, face_row + len(before.faces.row_F))
        z = z.requires_grad_()
        now = trainee.judges.see(model.decode(z), before.faces.boxes)
        part = Part(
            {name: tensor[rows] for name, tensor in originals.items()},
            {a: torch.from_numpy(labels.classes[a][faces]).to(z.device) for a in labels.classes},
            {a: torch.from_numpy(kept[a][faces]).to(z.device) for a in kept},
        )
        terms = batch_terms(trainee, now, part, counts, (len(final), result.faces))
        weighted = [weight * terms[name] for name, weight in active_terms(objective) if weight and name in terms]
        total = sum(weighted, start=0 * z.sum())
        grads.append(torch.autograd.grad(total, z)[0])
        for name, value in terms.items():
            result.terms[name] = result.terms.get(name, 0.0) + value.item()
        image_row, face_row = rows.stop, faces.stop
    grad = torch.cat(grads)

    if literal:
        final.backward(grad)
        return result
    weights = gradient_weights(method.gradient, model.scheduler, batch.steps)  # 4
    chosen = choose_steps(len(final), batch.steps, method.evaluations, batch.generator)
    replay(model.unet, trajectory, guidance, Upstream(grad, weights, chosen), method.replay_batch)
    pairs = [(t, leaf.grad) for t, leaf in zip(text, leaves, strict=True) if leaf.grad is not None]
    if pairs:  # 5
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
    return result


def embed_prompt(trainee: Trainee, prompt: str) -> tuple[Tensor, Tensor]:
    """Conditional and unconditional embeddings [1, L, D], each with a graph where the adapter learns in it."""
    return trainee.model.encode_pair(trainee.adapter.prefix + prompt)


def active_terms(objective: Objective) -> list[tuple[str, float]]:
    """(name, weight) of every term that is not absent."""
    terms = [("align", objective.align), ("image", objective.image), ("face", objective.face)]
    return [(name, weight) for name, weight in terms if weight is not None]


def label_faces(
    seen: list[Seen], target: Target, draws: int, generator: torch.Generator
) -> tuple[Labels, dict[str, list[float]]]:
    """Transport labels of all faces of the batch, and the mean class probabilities per attribute."""
    probs = {a: torch.cat([s.logits[a] for s in seen]).softmax(1).double().cpu().numpy() for a in target.attributes}
    seed = int(torch.randint(2**62, (), generator=generator))
    labels = assign(probs, target, np.random.default_rng(seed), draws)
    shares = {a: p.mean(0).tolist() if len(p) else [] for a, p in probs.items()}
    return labels, shares


@dataclass
class Part:
    """The rows of one micro-batch: originals [b, ...], labels and kept flags of its faces per attribute."""

    originals: dict[str, Tensor]
    labels: dict[str, Tensor]
    kept: dict[str, Tensor]


def batch_terms(
    trainee: Trainee, now: Seen, part: Part, kept_counts: dict[str, int], totals: tuple[int, int]
) -> dict[str, Tensor]:
    """This micro-batch's share of each term: sums divided by the *global* count of kept labels, images or faces."""
    objective, images, faces = trainee.objective, *totals
    terms = {"align": sum(
        alignment_loss(now.logits[a], part.labels[a], part.kept[a]).sum() / max(kept_counts[a], 1) for a in kept_counts
    )}  # fmt: skip
    if objective.image is not None:
        terms["image"] = image_term(trainee, now, part).sum() / images
    if objective.face is not None and len(now.faces.row_F):
        terms["face"] = face_term(trainee, now, part).sum() / max(faces, 1)
    return terms


def _stack(part: Part, row_F: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, kept flags and the original's classes, each [A, F]."""
    original = torch.stack([part.originals[f"probs.{a}"][row_F].argmax(1) for a in part.labels])
    return torch.stack(list(part.labels.values())), torch.stack(list(part.kept.values())), original


def image_term(trainee: Trainee, now: Seen, part: Part) -> Tensor:
    """m_i L_img,i [b], its gradient damped inside the intersection of the face boxes of x and o."""
    damping, row_F = trainee.objective.damping, now.faces.row_F
    both_F = part.originals["found"][row_F]
    weight = torch.ones(len(now.image_BCHW), device=row_F.device)
    keep_outside = torch.tensor([damping[a].keep_outside for a in part.labels], device=row_F.device)
    weight[row_F[both_F]] = preservation_weight(*_stack(part, row_F), keep_outside)[both_F]
    keep_face = min(damping[a].keep_face for a in part.labels)
    image = damp_gradient(now.image_BCHW, intersect(now.box_B4(), part.originals["box"]), keep_face)
    features = [part.originals[f"feature.{i}"] for i in range(len(trainee.judges.encoders))]
    return weight * preservation_loss(trainee.judges.features(image), features)


def face_term(trainee: Trainee, now: Seen, part: Part) -> Tensor:
    """L_face [F]; the target is o's own face where every label is o's confident class, else the nearest of the bank."""
    judges, row_F = trainee.judges, now.faces.row_F
    aligned = now.faces.aligned_FCHW
    embedding = judges.embedder(aligned)
    mirrored = judges.embedder(aligned.flip(-1))
    labels, kept, original = _stack(part, row_F)
    sure = torch.stack([part.originals[f"probs.{a}"][row_F].amax(1) for a in part.labels])
    same = (kept & (labels == original) & (sure >= trainee.objective.confident_class)).all(0)
    same &= part.originals["found"][row_F]
    target = torch.where(same[:, None], part.originals["face"][row_F], judges.bank.nearest(embedding.detach()))
    return realism_loss(embedding, mirrored, target)
