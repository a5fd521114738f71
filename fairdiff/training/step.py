"""ONE training step of distributional alignment with the factorised gradient.

    1  sample B images of one prompt without a graph, keep every U-Net input z_t
    2  look at them: detect faces, classify; optimal transport to the target labels each face
    3  the terms' gradients at the pictures x, in micro-batches: L = L_align + w_img m L_img + w_face L_face;
       balance them, add them up, and pull the sum through the decoder once: g = dL/dz_0 = (dx/dz_0)^T sum_k f_k dL_k/dx
    4  replay chosen (image, t) pairs: dL/dtheta += w_t J_theta(eps_t; sg(z_t))^T g
    5  one text-encoder backward with the accumulated gradient of the prompt embedding

Source: Shen et al., ICLR 2024; the factorised form is stated in fairdiff/diffusion/sampling.py.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from classifiers.types import Boxes
from fairdiff.diffusion.adapters import Adapter
from fairdiff.diffusion.load import DiffusionModel
from fairdiff.diffusion.sampling import (
    Guidance,
    Upstream,
    choose_steps,
    gradient_weights,
    initial_noise,
    replay,
    sample_with_graph,
)
from fairdiff.objective.balance import Balance, shares_of
from fairdiff.objective.losses import Damping
from fairdiff.objective.perception import Judges, Seen
from fairdiff.objective.targets import Labels, Target, Targets, assign
from fairdiff.objective.terms import Part, align_term, face_term, gradient_at, image_term
from fairdiff.training.originals import Originals


@dataclass(frozen=True)
class Objective:
    """What is asked: the targets, the terms' weights (0 = measured only, None = absent) and the labels' confidence."""

    target: Targets
    damping: dict[str, Damping]
    confidence: float
    draws: int
    weigh_classes: bool
    align: float | None
    image: float | None
    face: float | None
    confident_class: float

    def class_weights(self, target: Target) -> dict[str, Tensor]:
        """What each class of a label [K] weighs in the alignment loss: all 1 for the paper's plain cross-entropy."""
        weights = {a: torch.from_numpy(target.class_weights(a)) for a in target.attributes}
        return weights if self.weigh_classes else {a: torch.ones_like(w) for a, w in weights.items()}


@dataclass(frozen=True)
class Method:
    """How it is done: guidance scale s, gradient type, replayed evaluations K (None = T), micro-batch sizes.

    detach: of `autograd`; last: the k steps of `truncated`.
    """

    guidance: float
    gradient: str
    evaluations: int | None
    detach: bool
    decode_batch: int
    replay_batch: int
    last: int | None = None


@dataclass(frozen=True)
class Batch:
    """One prompt, B indices into its noise pool, the number T of sampler steps, and a generator for this step.

    people: whether its pictures are to show people, see `Prompt.people`.
    """

    prompt: str
    indices: list[int]
    steps: int
    noise_seed: int
    generator: torch.Generator
    people: bool = True


@dataclass
class StepResult:
    """Mean of each term over the images, the judge's shares per attribute, faces found and labels kept.

    people: whether the batch was of a prompt of people. grad_share: each weighted (and balanced) term's norm at the
    images, divided by the sum of these norms.
    """

    terms: dict[str, float]
    shares: dict[str, list[float]]
    faces: int
    kept: int
    trouble: str = ""
    people: bool = True
    grad_share: dict[str, float] = field(default_factory=dict)


@dataclass
class Trainee:
    """The model under training with all that a step needs of it."""

    model: DiffusionModel
    adapter: Adapter
    judges: Judges
    originals: Originals
    objective: Objective
    method: Method
    balance: Balance | None = None

    def without_people(self) -> "Trainee":
        """The same for a prompt that shows nobody: its pictures shall stay what they are, nothing else is asked."""
        return replace(self, objective=replace(self.objective, align=None, face=None), balance=None)


def training_step(trainee: Trainee, batch: Batch) -> StepResult:
    """Accumulate the adapter's gradient of one batch; without any confident label the image and face terms are left.

    Of a prompt without people only the preservation term counts; whatever face is seen there is none.
    """
    trainee = trainee if batch.people else trainee.without_people()
    model, method, objective = trainee.model, trainee.method, trainee.objective
    noise = initial_noise(batch.prompt, batch.noise_seed, batch.indices, model.latent_shape).to(model.unet.device)
    originals = trainee.originals.sampled_rows(batch.prompt, batch.indices, batch.steps)

    text = embed_prompt(trainee, batch.prompt)  # 1
    literal = method.gradient in ("autograd", "truncated")
    if literal:
        live = Guidance(*text, method.guidance)
        final = sample_with_graph(
            model.unet, model.scheduler, live, noise, batch.steps, method.detach, last=method.last
        )
    else:
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in text]
        guidance = Guidance(*leaves, method.guidance)
        trajectory = model.sample(guidance, noise, batch.steps)
        final = trajectory.final

    latents = final.detach().split(method.decode_batch)  # 2
    with torch.no_grad():
        pictures = [model.decode(z) for z in latents]
        seen = [trainee.judges.see(x, None if batch.people else Boxes.none(x)) for x in pictures]
    if not all(s.logits[a].isfinite().all() for s in seen for a in objective.target.attributes):
        return StepResult({}, {}, sum(len(s.faces.row_F) for s in seen), 0, "the judge's logits are not finite")
    labels, shares, class_weights = Labels.none(objective.target.attributes), {}, {}
    if batch.people:
        target = objective.target.of(batch.prompt)
        labels, shares = label_faces(seen, target, objective.draws, batch.generator)
        class_weights = objective.class_weights(target)
    device = final.device
    whole = Part(
        *originals,
        {a: torch.from_numpy(c).to(device) for a, c in labels.classes.items()},
        {a: torch.from_numpy(labels.kept(a, objective.confidence)).to(device) for a in labels.classes},
        {a: w.to(device) for a, w in class_weights.items()},
    )
    faces = sum(len(s.faces.row_F) for s in seen)
    kept = sum(int(k.sum()) for k in whole.kept.values())
    result = StepResult({}, shares, faces, kept, people=batch.people)

    result.terms, parts = term_gradients(trainee, seen, whole, len(final))  # 3
    total = add_up(parts, trainee.balance, result, trainee.originals.share)
    if total is None:
        return result
    pairs = zip(latents, total.split(method.decode_batch), strict=True)
    grad = torch.cat([pull_back(model, z, g) for z, g in pairs])

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


def term_gradients(
    trainee: Trainee, seen: list[Seen], whole: Part, images: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Each term's value, and w_k dL_k/dx [B, 3, H, W] of each term with a weight; weight 0 is measured without graph.

    Gradients are taken apart at the pictures, where one costs no more than its own judge's backward: at the latents
    each would cost a backward through the decoder, whose Jacobian is the same for all.
    """
    values: dict[str, float] = {}
    grads: dict[str, list[Tensor]] = {}
    image_row, face_row = 0, 0
    for before in seen:
        image_rows = slice(image_row, image_row + len(before.image_BCHW))
        face_rows = slice(face_row, face_row + len(before.faces.row_F))
        image_row, face_row = image_rows.stop, face_rows.stop
        pixels = before.image_BCHW.requires_grad_()
        now = trainee.judges.see(pixels, before.faces.boxes)
        terms = batch_terms(trainee, now, whole.rows(image_rows, face_rows), images)
        for name, weight in active_terms(trainee.objective):
            values[name] = values.get(name, 0.0) + terms[name].item()
            if weight:
                grads.setdefault(name, []).append(gradient_at(weight * terms[name], pixels))
        del now, terms  # else this graph lives until the next one is built
    return values, {name: torch.cat(parts) for name, parts in grads.items()}


def batch_terms(trainee: Trainee, now: Seen, part: Part, images: int) -> dict[str, Tensor]:
    """This micro-batch's share of each term that is not absent, without a graph where the weight is 0."""
    judges, objective = trainee.judges, trainee.objective
    terms = {
        "align": partial(align_term, now, part, images),
        "image": partial(image_term, judges, objective.damping, now, part, images),
        "face": partial(face_term, judges, objective.confident_class, now, part, images),
    }
    values = {}
    for name, weight in active_terms(objective):
        with torch.set_grad_enabled(weight > 0 and torch.is_grad_enabled()):
            values[name] = terms[name]()
    return values


def add_up(
    parts: dict[str, Tensor], balance: Balance | None, result: StepResult, compared: float = 1.0
) -> Tensor | None:
    """sum_k f_k w_k dL_k/dx, its shares noted in `result`; None if there is nothing to learn or it is not finite.

    compared: the share s of pictures that have an original. Weighed by 1 / s, the gradients of so many pictures have a norm
    larger by 1 / sqrt(s) than all of them would have, which is taken out of the norms.
    """
    factor = {"align": 1.0, "image": compared**0.5, "face": compared**0.5}
    norms = {name: factor[name] * float(part.norm()) for name, part in parts.items()}
    if not np.isfinite(list(norms.values())).all():
        result.trouble = "the gradient at the pictures is not finite"
    if not parts or result.trouble:
        return None
    factors = balance.factors(norms) if balance else dict.fromkeys(norms, 1.0)
    result.grad_share = shares_of({name: factors[name] * norm for name, norm in norms.items()})
    return sum(factors[name] * part for name, part in parts.items())


def pull_back(model: DiffusionModel, latent_BCHW: Tensor, grad_BCHW: Tensor) -> Tensor:
    """(dx/dz_0)^T grad [b, C, h, w]: the gradient at the pictures through the decoder, once for all terms."""
    z = latent_BCHW.detach().requires_grad_()
    return torch.autograd.grad(model.decode(z), z, grad_BCHW)[0]


def label_faces(
    seen: list[Seen], target: Target, draws: int, generator: torch.Generator
) -> tuple[Labels, dict[str, list[float]]]:
    """Transport labels of all faces of the batch, and the mean class probabilities per attribute."""
    probs = {a: torch.cat([s.logits[a] for s in seen]).softmax(1).double().cpu().numpy() for a in target.attributes}
    seed = int(torch.randint(2**62, (), generator=generator))
    labels = assign(probs, target, np.random.default_rng(seed), draws)
    shares = {a: p.mean(0).tolist() if len(p) else [] for a, p in probs.items()}
    return labels, shares
