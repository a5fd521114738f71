"""Gradients by autograd through the sampler: the literal reference algorithm, and our step without the replay.

Source: Shen et al., ICLR 2024, section 4 and its public code (sail-sg/finetune-fair-diffusion). `literal_step` does this:
    1  sample B images without a graph, micro-batch by micro-batch, to set the targets
    2  sample the B reference images with the frozen model
    3  sample the B images again with a graph over all T steps, every U-Net call checkpointed, its input detached,
       its noise gradient multiplied by k_t; decode, detect, classify, and backpropagate through the whole chain
The prompt is encoded again in every micro-batch of every pass.
"""

import torch
from torch import Tensor

from benchmark.published import Constants, Generated, Original, published_terms
from fairdiff.diffusion.denoise import Guidance
from fairdiff.diffusion.sampling import Graph, initial_noise, sample
from fairdiff.diffusion.solvers import gradient_weights, solver_coefficients
from fairdiff.objective.perception import FaceBatch
from fairdiff.training.step import Batch, StepResult, Trainee, embed_prompt, label_batch, label_faces, latent_gradient


def autograd_step(trainee: Trainee, batch: Batch, detach: bool = False, last: int | None = None) -> StepResult:
    """Accumulate the gradient of one batch of people by autograd through the sampler steps instead of the replay.

    detach: detach the U-Net's inputs; then the gradient is that of the replay with the solver's weights. last: backpropagate
    through the last k steps only (DRaFT-K). All else is as in the training step.
    """
    model = trainee.model
    noise = initial_noise(batch.prompt, batch.noise_seed, batch.indices, model.latent_shape).to(model.unet.device)
    guidance = Guidance(*embed_prompt(trainee, batch.prompt), trainee.method.guidance)
    final = sample(model.unet, model.scheduler, guidance, noise, batch.steps, Graph(detach, last=last)).final
    faces, part, result = label_batch(trainee, batch, final)
    grad = latent_gradient(trainee, faces, part, final, result)
    if grad is not None:
        final.backward(grad)
    return result


def literal_step(trainee: Trainee, batch: Batch, micro_batch: int) -> StepResult:
    """Accumulate the adapter's gradient of one batch by the reference algorithm with the published loss."""
    model, objective = trainee.model, trainee.objective
    noise = initial_noise(batch.prompt, batch.noise_seed, batch.indices, model.latent_shape).to(model.unet.device)
    noises = noise.split(micro_batch)

    with torch.no_grad():  # 1
        seen = []
        for z in noises:
            guidance = Guidance(*embed_prompt(trainee, batch.prompt), trainee.method.guidance)
            final = model.sample(guidance, z, batch.steps).final
            seen.append(trainee.perception.classify_faces(model.decode(final)))
    target = objective.target.of(batch.prompt)
    labels, shares = label_faces(seen, target, batch.generator)
    kept = {a: labels.kept(a, objective.confidence) for a in labels.classes}
    faces = sum(len(s.faces.row_F) for s in seen)
    result = StepResult({}, shares, faces, sum(int(k.sum()) for k in kept.values()))

    originals = []  # 2
    for rows in torch.tensor(batch.indices).split(micro_batch):
        images = trainee.originals.generate(batch.prompt, rows.tolist(), batch.steps)
        originals.append(trainee.originals.measure(images))

    constants = Constants(
        len(noise),
        {a: d.keep_outside for a, d in objective.damping.items()},
        {a: d.keep_face for a, d in objective.damping.items()},
        objective.confident_class,
        trainee.perception.bank.embedding_ND if trainee.perception.bank else None,
    )
    known = [{a: int(labels.classes[a][f]) if kept[a][f] else None for a in kept} for f in range(faces)]
    face_row = 0  # 3
    k_T = gradient_weights("reference", model.scheduler, batch.steps) / solver_coefficients(model.scheduler, batch.steps)
    graph = Graph(detach=True, scale_T=k_T)
    for z, before, original in zip(noises, seen, originals, strict=True):
        guidance = Guidance(*embed_prompt(trainee, batch.prompt), trainee.method.guidance)
        final = sample(model.unet, model.scheduler, guidance, z, batch.steps, graph).final
        image = model.decode(final)
        trainee.perception.detector(image.detach())  # the reference detects again; the faces have not moved
        now = trainee.perception.classify_faces(image, before.faces.boxes)
        labelled = known[face_row : face_row + len(now.faces.row_F)]
        face_row += len(labelled)
        terms = published_terms(
            image, trainee.perception.features, generated_of(trainee, now, labelled), originals_of(original), constants
        )
        weighted = (weight * terms[name] for name, weight in objective.terms.items() if weight)
        sum(weighted, start=0 * final.sum()).backward()
        for name in objective.terms:
            result.terms[name] = result.terms.get(name, 0.0) + terms[name].item()
    return result


def generated_of(trainee: Trainee, now: FaceBatch, labels: list[dict[str, int | None]]) -> list[Generated]:
    """Convert the images of a micro-batch for the published loss; labels: those of each face."""
    images = [Generated(None, {}, {}, None, None) for _ in now.image_BCHW]
    face_FD = mirrored_FD = [None] * len(labels)
    if trainee.perception.embedder is not None:
        aligned_FCHW = trainee.perception.align(now)
        face_FD = trainee.perception.embed(aligned_FCHW)
        mirrored_FD = trainee.perception.embed(aligned_FCHW.flip(-1))
    for face, row in enumerate(now.faces.row_F.tolist()):
        logits = {a: now.logits[a][face] for a in labels[face]}
        box = tuple(now.faces.box_F4[face].tolist())
        images[row] = Generated(box, logits, labels[face], face_FD[face], mirrored_FD[face])
    return images


def originals_of(rows: dict[str, Tensor]) -> list[Original]:
    """Convert the rows of `Originals.measure` for the published loss."""
    found = []
    for i, has_face in enumerate(rows["found"].tolist()):
        probs = {name.removeprefix("probs."): t[i] for name, t in rows.items() if name.startswith("probs.")}
        features = [t[i] for name, t in rows.items() if name.startswith("feature.")]
        box = tuple(rows["box"][i].tolist()) if has_face else None
        found.append(Original(box, probs, features, rows["face"][i] if "face" in rows else None))
    return found
