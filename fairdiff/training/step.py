"""ONE training step of distributional alignment with the factorised gradient (Shen et al., ICLR 2024).

    1  sample      B images of one prompt without a graph; keep every U-Net input z_t
    2  label       detect faces, classify them; optimal transport to the target gives each face a label
    3  gradient    L = L_align + w_img m L_img + w_face L_face at the images x, term by term; balance the terms, add
                   them, pull the sum through the decoder once: g = dL/dz_0 = (dx/dz_0)^T sum_k f_k dL_k/dx
    4  replay      chosen (image, t) pairs: dL/dtheta += w_t J_theta(eps_t; sg(z_t))^T g
    5  text        one text-encoder backward with the accumulated gradient of the prompt embedding

`training_step` is this box. The factorised form is stated in fairdiff/diffusion/sampling.py. Of several processes each does
all five for its own images; labels, divisors, balance and the choice of t are those of the whole batch (`World`).
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from classifiers.types import Boxes
from fairdiff.diffusion.adapters import Adapter
from fairdiff.diffusion.denoise import Guidance
from fairdiff.diffusion.half import scaled_replay
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.memory import Pieces
from fairdiff.diffusion.sampling import Trajectory, Upstream, choose_steps, initial_noise, replay
from fairdiff.diffusion.solvers import gradient_weights
from fairdiff.distributed import ALONE, World
from fairdiff.objective.balance import Balance, shares_of
from fairdiff.objective.losses import Damping, Part, align_term, face_term, gradient_at, image_term
from fairdiff.objective.perception import FaceBatch, Perception
from fairdiff.objective.targets import Labels, Target, Targets, assign
from fairdiff.training.originals import Originals


@dataclass(frozen=True)
class Objective:
    """The training objective: targets, weights of the terms, and the confidence that labels need.

    align, image, face: weight of each term; 0 only measures it, None leaves it out. confidence: smallest confidence of a
    label that is trained on. weigh_classes: see `Target.class_weights`. damping: for each attribute, see `losses.Damping`.
    confident_class: smallest probability of the class of o at which the face term keeps its face.
    """

    target: Targets
    damping: dict[str, Damping]
    confidence: float
    weigh_classes: bool
    align: float | None
    image: float | None
    face: float | None
    confident_class: float

    def class_weights(self, target: Target) -> dict[str, Tensor]:
        """Weights [K] of the classes in the alignment loss; all 1 for the paper's plain cross-entropy."""
        weights = {a: torch.from_numpy(target.class_weights(a)) for a in target.attributes}
        return weights if self.weigh_classes else {a: torch.ones_like(w) for a, w in weights.items()}

    @property
    def terms(self) -> dict[str, float]:
        """The weight of every term that is not left out."""
        every = {"align": self.align, "image": self.image, "face": self.face}
        return {name: weight for name, weight in every.items() if weight is not None}


@dataclass(frozen=True)
class Method:
    """Settings of the gradient: guidance scale s, step weights w_t, replayed steps K (None = T), micro-batch sizes."""

    guidance: float
    gradient: str
    evaluations: int | None
    decode_batch: int
    replay_batch: int


@dataclass(frozen=True)
class Batch:
    """One prompt, B indices into its noise pool, the number T of sampler steps, and a generator for this step.

    people: whether the images should show people. named: whether the prompt names a class, see `Prompt`.
    """

    prompt: str
    indices: list[int]
    steps: int
    noise_seed: int
    generator: torch.Generator
    people: bool = True
    named: bool = False


@dataclass
class StepResult:
    """Mean of each term over the images, the classifier's shares for each attribute, numbers of detected faces and kept
    labels.

    skipped: why nothing is learnt from the batch, "" if something is. people, named: those of its `Batch`.
    grad_share: norm of each weighted (and balanced) term at the images, divided by the sum of these norms.
    """

    terms: dict[str, float]
    shares: dict[str, list[float]]
    faces: int
    kept: int
    skipped: str = ""
    people: bool = True
    named: bool = False
    grad_share: dict[str, float] = field(default_factory=dict)


@dataclass
class Trainee:
    """The model under training with everything that a step needs. world: the processes that share each batch's images.
    pieces: the micro-batches from which the sizes in `method` come.
    """

    model: DiffusionModel
    adapter: Adapter
    perception: Perception
    originals: Originals
    objective: Objective
    method: Method
    balance: Balance | None = None
    world: World = ALONE
    pieces: Pieces | None = None

    def without_people(self) -> "Trainee":
        """This trainee for a prompt without people, which has the image term only."""
        return replace(self, objective=replace(self.objective, align=None, face=None), balance=None)


@dataclass(frozen=True)
class Rollout:
    """The sampled batch: prompt embeddings (with their graph), the leaves that the U-Net read, its inputs and z_0."""

    text: tuple[Tensor, Tensor]
    guidance: Guidance
    trajectory: Trajectory


def training_step(trainee: Trainee, batch: Batch) -> StepResult:
    """Accumulate the adapter's gradient of one batch; with several processes, each adds the part of its own images.

    A batch without a confident label still has its image and face terms. A prompt without people has only the image term.
    """
    trainee = trainee if batch.people else trainee.without_people()
    rollout = sample_batch(trainee, batch)  # 1
    faces, part, result = label_batch(trainee, batch, rollout.trajectory.final)  # 2
    grad = latent_gradient(trainee, faces, part, rollout.trajectory.final, result)  # 3
    if grad is not None:
        replay_batch(trainee, batch, rollout, grad)  # 4
        pull_back_text(rollout)  # 5
    return result


def sample_batch(trainee: Trainee, batch: Batch) -> Rollout:
    """Part 1: this process's images without a graph.

    The embeddings are leaves, so that the text encoder has one backward a step.
    """
    model = trainee.model
    indices = trainee.world.share(batch.indices)
    noise = initial_noise(batch.prompt, batch.noise_seed, indices, model.latent_shape).to(model.unet.device)
    text = embed_prompt(trainee, batch.prompt)
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in text]
    guidance = Guidance(*leaves, trainee.method.guidance)
    return Rollout(text, guidance, model.sample(guidance, noise, batch.steps))


def label_batch(trainee: Trainee, batch: Batch, final: Tensor) -> tuple[list[FaceBatch], Part, StepResult]:
    """Part 2: decode and classify in micro-batches, then label all faces of the whole batch at once.

    Faces and part are those of this process's images, the result is that of the batch. A prompt without people has no
    faces, whatever a detector finds.
    """
    originals, compared = trainee.originals.sampled_rows(batch.prompt, batch.indices, batch.steps)
    with torch.no_grad():
        images = [trainee.model.decode(z) for z in final.detach().split(trainee.method.decode_batch)]
        faces = [trainee.perception.classify_faces(x, None if batch.people else Boxes.none(x)) for x in images]
    objective, world = trainee.objective, trainee.world
    attributes = objective.target.attributes
    labels, shares, class_weights = Labels.none(attributes), {}, {}
    finite = all(bool(f.logits[a].isfinite().all()) for f in faces for a in attributes)
    everybody = world.gather((finite, sum(len(f.faces.row_F) for f in faces)))
    finite, found = all(ok for ok, _ in everybody), [count for _, count in everybody]
    if batch.people and finite:
        target = objective.target.of(batch.prompt)
        labels, shares = label_faces(faces, target, batch.generator, world)
        class_weights = objective.class_weights(target)
    device = final.device
    part = Part(
        originals,
        compared,
        {a: torch.from_numpy(c).to(device) for a, c in labels.classes.items()},
        {a: torch.from_numpy(labels.kept(a, objective.confidence)).to(device) for a in labels.classes},
        {a: w.to(device) for a, w in class_weights.items()},
    )
    kept = sum(int(k.sum()) for k in part.kept.values())
    result = StepResult({}, shares, sum(found), kept, people=batch.people, named=batch.named)
    result.skipped = "" if finite else "the classifier's logits are not finite"
    before = sum(found[: world.rank])
    own = part.rows(world.rows(len(batch.indices)), slice(before, before + found[world.rank]))
    return faces, own, result


def latent_gradient(
    trainee: Trainee, faces: list[FaceBatch], part: Part, final: Tensor, result: StepResult
) -> Tensor | None:
    """Part 3: g = dL/dz_0 [b, C, h, w] of this process's images; the terms are written into `result`.

    None if there is nothing to learn.
    """
    if result.skipped:
        return None
    world = trainee.world
    values, parts = term_gradients(trainee, faces, part, sum(world.gather(len(final))))
    everybody = world.gather(values)
    result.terms = {name: sum(own[name] for own in everybody) for name in values}
    total = add_up(parts, trainee.balance, result, trainee.originals.share, world)
    if total is None:
        return None
    size = trainee.method.decode_batch
    pairs = zip(final.detach().split(size), total.split(size), strict=True)
    return torch.cat([pull_back(trainee.model, z, g) for z, g in pairs])


def replay_batch(trainee: Trainee, batch: Batch, rollout: Rollout, grad: Tensor) -> None:
    """Part 4: the U-Net's backward at the chosen (image, t) pairs, into its adapter and the embeddings' leaves."""
    model, method = trainee.model, trainee.method
    weights = gradient_weights(method.gradient, model.scheduler, batch.steps)
    chosen = choose_steps(len(batch.indices), batch.steps, method.evaluations, batch.generator)
    chosen = chosen[trainee.world.rows(len(batch.indices))]  # by an image's place in the batch, whoever replays it
    go = scaled_replay if model.unet.dtype == torch.float16 else replay
    go(model.unet, rollout.trajectory, rollout.guidance, Upstream(grad, weights, chosen), method.replay_batch)


def pull_back_text(rollout: Rollout) -> None:
    """Part 5: the accumulated gradient of the prompt embedding through the text encoder."""
    leaves = (rollout.guidance.cond, rollout.guidance.uncond)
    pairs = [(t, leaf.grad) for t, leaf in zip(rollout.text, leaves, strict=True) if leaf.grad is not None]
    if pairs:
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])


def embed_prompt(trainee: Trainee, prompt: str) -> tuple[Tensor, Tensor]:
    """Conditional and unconditional embeddings [1, L, D], each with a graph where the adapter learns in it."""
    return trainee.model.encode_pair(trainee.adapter.prefix + prompt)


def label_faces(
    faces: list[FaceBatch], target: Target, generator: torch.Generator, world: World = ALONE
) -> tuple[Labels, dict[str, list[float]]]:
    """Transport labels of all faces of the batch, and the mean class probabilities per attribute.

    faces: of this process's images; labels and shares are those of all processes' faces in their order.
    """
    own = {a: torch.cat([f.logits[a] for f in faces]).softmax(1).double().cpu().numpy() for a in target.attributes}
    everybody = world.gather(own)
    probs = {a: np.concatenate([some[a] for some in everybody]) for a in own}
    seed = int(torch.randint(2**62, (), generator=generator))
    labels = world.of_first(assign(probs, target, np.random.default_rng(seed)) if world.first else None)
    shares = {a: p.mean(0).tolist() if len(p) else [] for a, p in probs.items()}
    return labels, shares


def term_gradients(
    trainee: Trainee, faces: list[FaceBatch], whole: Part, images: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Each term's value, and w_k dL_k/dx [B, 3, H, W] of each term with a weight; weight 0 is measured without a graph.

    Gradients are taken apart at the images, where one costs no more than its own network's backward: at the latents
    each would cost a backward through the decoder, whose Jacobian is the same for all.
    """
    values: dict[str, float] = {}
    grads: dict[str, list[Tensor]] = {}
    image_row, face_row = 0, 0
    for before in faces:
        image_rows = slice(image_row, image_row + len(before.image_BCHW))
        face_rows = slice(face_row, face_row + len(before.faces.row_F))
        image_row, face_row = image_rows.stop, face_rows.stop
        pixels = before.image_BCHW.requires_grad_()
        now = trainee.perception.classify_faces(pixels, before.faces.boxes)
        terms = batch_terms(trainee, now, whole.rows(image_rows, face_rows), images)
        for name, weight in trainee.objective.terms.items():
            values[name] = values.get(name, 0.0) + terms[name].item()
            if weight:
                grads.setdefault(name, []).append(gradient_at(weight * terms[name], pixels))
        del now, terms  # else this graph lives until the next one is built
    return values, {name: torch.cat(parts) for name, parts in grads.items()}


def batch_terms(trainee: Trainee, now: FaceBatch, part: Part, images: int) -> dict[str, Tensor]:
    """This micro-batch's share of each term that is not left out, without a graph where the weight is 0."""
    perception, objective = trainee.perception, trainee.objective
    terms = {
        "align": partial(align_term, now, part, images),
        "image": partial(image_term, perception, objective.damping, now, part, images),
        "face": partial(face_term, perception, objective.confident_class, now, part, images),
    }
    values = {}
    for name, weight in objective.terms.items():
        with torch.set_grad_enabled(weight > 0 and torch.is_grad_enabled()):
            values[name] = terms[name]()
    return values


def add_up(
    parts: dict[str, Tensor],
    balance: Balance | None,
    result: StepResult,
    compared: float = 1.0,
    world: World = ALONE,
) -> Tensor | None:
    """sum_k f_k w_k dL_k/dx, its shares noted in `result`; None if there is nothing to learn or it is not finite.

    compared: the share s of images that have a reference image. Weighed by 1 / s, the gradients of so many images have a
    norm larger by 1 / sqrt(s) than those of all images would have; the norms are corrected for that. They are norms over
    the images of all processes.
    """
    factor = {"align": 1.0, "image": compared**0.5, "face": compared**0.5}
    everybody = world.gather({name: float(part.norm()) for name, part in parts.items()})
    norms = {name: factor[name] * math.hypot(*(own[name] for own in everybody)) for name in parts}
    if not np.isfinite(list(norms.values())).all():
        result.skipped = "the gradient at the images is not finite"
    if not parts or result.skipped:
        return None
    factors = balance.factors(norms) if balance else dict.fromkeys(norms, 1.0)
    result.grad_share = shares_of({name: factors[name] * norm for name, norm in norms.items()})
    return sum(factors[name] * part for name, part in parts.items())


def pull_back(model: DiffusionModel, latent_BCHW: Tensor, grad_BCHW: Tensor) -> Tensor:
    """(dx/dz_0)^T grad [b, C, h, w]: the gradient at the images through the decoder, once for all terms."""
    z = latent_BCHW.detach().requires_grad_()
    return torch.autograd.grad(model.decode(z), z, grad_BCHW)[0]
