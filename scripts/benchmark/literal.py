"""The reference algorithm, literally: three sampling passes, the last with a graph over time.

Source: Shen et al., ICLR 2024, section 4 and its public code (sail-sg/finetune-fair-diffusion), retold:
    1  sample B pictures without a graph, micro-batch by micro-batch, to set the targets
    2  sample the B originals again with the frozen model
    3  sample the B pictures a third time with a graph over all T steps, every U-Net call checkpointed, its input
       detached, its noise gradient multiplied by k_t; decode, detect, judge, and go back through the whole chain
The prompt is encoded anew in every micro-batch of every pass.
"""

import torch

from fairdiff.sampling import (
    Guidance,
    gradient_weights,
    initial_noise,
    sample_with_graph,
    solver_coefficients,
)
from fairdiff.step import Batch, StepResult, Trainee, active_terms, batch_terms, embed_prompt, label_faces
from fairdiff.terms import Counts, Part


def literal_step(trainee: Trainee, batch: Batch, micro_batch: int) -> StepResult:
    """Accumulate the adapter's gradient of one batch as the reference does, with the losses of fairdiff.step."""
    model, objective = trainee.model, trainee.objective
    noise = initial_noise(batch.prompt, batch.noise_seed, batch.indices, model.latent_shape).to(model.unet.device)
    noises = noise.split(micro_batch)

    with torch.no_grad():  # 1
        seen = []
        for z in noises:
            guidance = Guidance(*embed_prompt(trainee, batch.prompt), trainee.method.guidance)
            final = model.sample(guidance, z, batch.steps).final
            seen.append(trainee.judges.see(model.decode(final)))
    target = objective.target.of(batch.prompt)
    labels, shares = label_faces(seen, target, objective.draws, batch.generator)
    kept = {a: labels.kept(a, objective.confidence) for a in labels.classes}
    weights = {a: w.to(noise.device) for a, w in objective.class_weights(target).items()}
    counts = Counts(len(noise), sum(len(s.faces.row_F) for s in seen), {a: int(k.sum()) for a, k in kept.items()})
    result = StepResult({}, shares, counts.faces, sum(counts.kept.values()))
    if result.kept == 0:
        return result

    originals = []  # 2
    for rows in torch.tensor(batch.indices).split(micro_batch):
        images = trainee.originals.generate(batch.prompt, rows.tolist(), batch.steps)
        originals.append(trainee.originals.measure(images))

    face_row = 0  # 3
    k_T = gradient_weights("reference", model.scheduler, batch.steps) / solver_coefficients(
        model.scheduler, batch.steps
    )
    for z, before, original in zip(noises, seen, originals, strict=True):
        faces = slice(face_row, face_row + len(before.faces.row_F))
        guidance = Guidance(*embed_prompt(trainee, batch.prompt), trainee.method.guidance)
        final = sample_with_graph(model.unet, model.scheduler, guidance, z, batch.steps, detach=True, scale_T=k_T)
        image = model.decode(final)
        trainee.judges.detector(image.detach())  # the reference looks for the faces again; they are where they were
        now = trainee.judges.see(image, before.faces.boxes)
        part = Part(
            original,
            torch.ones(len(z), device=z.device),
            {a: torch.from_numpy(labels.classes[a][faces]).to(z.device) for a in labels.classes},
            {a: torch.from_numpy(kept[a][faces]).to(z.device) for a in kept},
            weights,
        )
        terms = batch_terms(trainee, now, part, counts)
        weighted = [weight * terms[name] for name, weight in active_terms(objective) if weight and name in terms]
        sum(weighted, start=0 * final.sum()).backward()
        for name, value in terms.items():
            result.terms[name] = result.terms.get(name, 0.0) + value.item()
        face_row = faces.stop
    return result
