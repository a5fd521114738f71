"""Measure the variance of a step's gradient: over the choice of replayed (image, step) pairs, and over batches.

For a given batch, the gradient is a sum over pairs, sum_{b,t} G[b, t]. A choice of K of T steps for each image estimates it
by (T/K) sum over the chosen pairs. So all G[b, t] are computed once, and a choice only costs their sum.
Relative variance: E |estimate - mean|^2 / |mean of the full gradient over batches|^2.
B images, T steps, P parameters, D draws.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmark.config import BenchConfig
from benchmark.instruments import captured_replay, spread
from benchmark.world import draw, make_trainee, sampler_steps
from fairdiff.diffusion.denoise import Guidance
from fairdiff.diffusion.sampling import Upstream, choose_steps, replay
from fairdiff.training.step import Batch, Rollout, Trainee, embed_prompt, pull_back_text, training_step


def pair_gradients(trainee: Trainee, batch: Batch) -> Tensor:
    """Return G [B, T, P], the contribution of each (image, step) pair to the adapter's gradient, by `replay` itself.

    It is 0 if no face of the batch has a confident label.
    """
    parameters = trainee.adapter.parameters()
    size, steps = len(batch.indices), batch.steps
    everything = replace(trainee, method=replace(trainee.method, evaluations=None))
    out = torch.zeros(size, steps, sum(p.numel() for p in parameters))
    with captured_replay() as calls:
        training_step(everything, batch)
    if not calls:
        return out
    unet, trajectory, guidance, upstream, _ = calls[0]
    for image in range(size):
        rows = slice(image, image + 1)
        own = replace(trajectory, inputs=[z[rows] for z in trajectory.inputs])
        for step in range(steps):
            for p in parameters:
                p.grad = None
            text = embed_prompt(trainee, batch.prompt)
            leaves = [t.detach().requires_grad_(t.requires_grad) for t in text]
            rollout = Rollout(text, Guidance(*leaves, guidance.scale), own)
            one = Upstream(upstream.grad[rows], upstream.weights, torch.tensor([[step]]))
            replay(unet, own, rollout.guidance, one, 1)
            pull_back_text(rollout)
            out[image, step] = _flat(parameters) / steps  # replay multiplies by T / K with K = 1
    return out


def total_gradient(trainee: Trainee, batch: Batch) -> Tensor:
    """Return the gradient [P] of a batch with every step replayed."""
    parameters = trainee.adapter.parameters()
    for p in parameters:
        p.grad = None
    training_step(replace(trainee, method=replace(trainee.method, evaluations=None)), batch)
    return _flat(parameters)


def _flat(parameters: list[torch.nn.Parameter]) -> Tensor:
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([g.flatten().cpu() for g in grads])


def stratified(batch: int, steps: int, k: int, generator: torch.Generator) -> Tensor:
    """Our choice: systematic over the steps, with offsets stratified over the batch."""
    return choose_steps(batch, steps, k, generator)


def systematic(batch: int, steps: int, k: int, generator: torch.Generator) -> Tensor:
    """A random offset and stride T/K, independent for each image."""
    return torch.cat([choose_steps(1, steps, k, generator) for _ in range(batch)])


def uniform(batch: int, steps: int, k: int, generator: torch.Generator) -> Tensor:
    """K of T without replacement, independent for each image."""
    return torch.rand(batch, steps, generator=generator).argsort(1)[:, :k]


def shared(batch: int, steps: int, k: int, generator: torch.Generator) -> Tensor:
    """K of T without replacement, the same for the whole batch."""
    return torch.randperm(steps, generator=generator)[:k].expand(batch, k)


CHOICES: dict[str, Callable[[int, int, int, torch.Generator], Tensor]] = {
    "stratified": stratified,
    "systematic": systematic,
    "uniform": uniform,
    "shared": shared,
}


@dataclass(frozen=True)
class EstimatorError:
    """The error of the estimate of sum_{b,t} G[b, t] over some draws. square: E |error|^2. bias: |mean error|^2.

    lambda_N: without bias the mean error is normal, so |mean error|^2 = sum_n lambda_n z_n^2 with standard normal z_n.
    """

    square: float
    bias: float
    lambda_N: Tensor

    @property
    def ratio(self) -> float:
        """|mean error|^2 divided by its expectation without bias."""
        return self.bias / float(self.lambda_N.sum())


def estimator_error(pairs_BTP: Tensor, k: int, choose: Callable, draws: int, seed: int = 0) -> EstimatorError:
    """Return the error of (T/K) sum over chosen pairs of G [B, T, P], with `draws` draws of `choose` (see CHOICES).

    It works with the Gram matrix of the B T pairs, so the cost of a draw does not depend on P.
    """
    batch, steps, _ = pairs_BTP.shape
    flat = pairs_BTP.flatten(0, 1).double()
    gram = flat @ flat.T
    generator = torch.Generator().manual_seed(1000 * seed + k)
    weight = torch.full((draws, batch, steps), -1.0, dtype=torch.float64)  # weight of each pair in (estimate - truth)
    for row in weight:
        row.scatter_add_(1, choose(batch, steps, k, generator), torch.full((batch, k), steps / k, dtype=torch.float64))
    weight = weight.flatten(1)
    values, vectors = torch.linalg.eigh(gram)
    error = weight @ (vectors * values.clamp(min=0).sqrt())  # coordinates with the gradients' inner products
    mean = error.mean(0)
    lambda_N = torch.linalg.svdvals(error - mean).square() / (draws - 1) / draws
    return EstimatorError(float(error.square().sum(1).mean()), float(mean @ mean), lambda_N)


def disagreement(trainee: Trainee, config: BenchConfig) -> dict:
    """Return cosines of full gradients: of two batches of the same prompt, and of batches of different prompts.

    first: the largest share of sum |g|^2 over prompts in a single direction. Batches have the smallest size.
    """
    size, count = min(config.sizes), config.batches
    later = list(range(size, 2 * size))
    batches = [[draw(config, n, size), replace(draw(config, n, size), indices=later)] for n in range(count)]
    grads = torch.stack([torch.stack([total_gradient(trainee, b) for b in pair]) for pair in batches]).double()
    unit = torch.nn.functional.normalize(grads, dim=-1)
    own = (unit[:, 0] * unit[:, 1]).sum(-1)
    cosines = unit[:, 0] @ unit[:, 0].T
    other = cosines[~torch.eye(count, dtype=torch.bool)]
    energy = torch.linalg.eigvalsh(grads[:, 0] @ grads[:, 0].T)
    return {
        "B": size,
        "prompts": count,
        "own": spread(own.tolist()),
        "other": spread(other.tolist()),
        "opposed": float((other < 0).double().mean()),
        "first": float(energy[-1] / energy.sum()),
    }


def measure_variance(config: BenchConfig) -> dict:
    """Return the relative variance by K and choice for a given batch, that of the full gradient by B, and the bias."""
    trainee = make_trainee(config)
    steps = sampler_steps(config)
    full = {size: [] for size in config.sizes}
    squares = []
    found: dict[tuple[str, int], list[EstimatorError]] = {}
    for number in range(config.batches):
        for size in config.sizes:
            if size != max(config.sizes):
                full[size].append(total_gradient(trainee, same_prompt(config, number, size)))
                continue
            pairs = pair_gradients(trainee, same_prompt(config, number, size))
            full[size].append(pairs.sum((0, 1)))
            squares.append(pairs.double().square().sum(2).mean(0))
            for name, choose in CHOICES.items():
                for k in config.evaluations:
                    if k <= steps:
                        entry = estimator_error(pairs, k, choose, config.draws, number)  # seeded by the batch
                        found.setdefault((name, k), []).append(entry)
    by_size = {size: torch.stack(rows).double() for size, rows in full.items()}
    largest = by_size[max(config.sizes)]
    scale = signal(largest)
    rows = []
    for (name, k), entries in found.items():
        error = sum(entry.square for entry in entries) / len(entries)
        rows.append({"choice": name, "K": k, "variance": error / scale, "bias_over_noise": None})
        if error > 1e-9 * scale:  # with every step replayed, the error is only rounding
            ratio = sum(entry.ratio for entry in entries) / len(entries)
            rows[-1]["bias_over_noise"] = {"ratio": ratio, "limit": without_bias(entries)}
    sizes = [
        {"B": size, "variance": float(total.var(0).sum()) / scale if len(total) > 1 else None}
        for size, total in by_size.items()
    ]
    return {
        "rows": rows,
        "sizes": sizes,
        "batches": config.batches,
        "draws": config.draws,
        "T": steps,
        "by_step": by_step(torch.stack(squares).mean(0)),
        "prompts": disagreement(trainee, config),
    }


def without_bias(entries: list[EstimatorError], level: float = 0.95, draws: int = 20_000) -> float:
    """Return the value that the mean of the ratios stays below with probability `level` if there is no bias."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(draws, dtype=torch.float64)
    for entry in entries:
        z_DN = torch.randn(draws, len(entry.lambda_N), generator=generator, dtype=torch.float64)
        total += z_DN.square() @ (entry.lambda_N / entry.lambda_N.sum())
    return float((total / len(entries)).quantile(level))


def by_step(square_T: Tensor) -> dict:
    """Return each step's contribution, and what drawing steps in proportion to it would save.

    norms: sqrt(E |G[b, t]|^2) divided by its mean over t. even_over_best: sum_t p_t^-1 E|G_t|^2 for p = K/T, divided by the
    same for p_t ~ |G_t|: T sum |G_t|^2 / (sum |G_t|)^2 >= 1.
    """
    norm = square_T.sqrt()
    return {
        "norms": (norm / norm.mean()).tolist(),
        "even_over_best": float(len(norm) * square_T.sum() / norm.sum() ** 2),
    }


def same_prompt(config: BenchConfig, number: int, size: int) -> Batch:
    """Return batch `number` of one prompt with noises of its own, so the variance over batches is that of the noise alone."""
    batch = draw(config, 0, size)
    return replace(batch, indices=list(range(number * size, (number + 1) * size)))


def signal(total_NP: Tensor) -> float:
    """Estimate |E g|^2 without bias: |mean|^2 minus the variance of the mean, at least a hundredth of |mean|^2."""
    square = float(total_NP.mean(0).square().sum())
    noise = float(total_NP.var(0).sum()) / len(total_NP) if len(total_NP) > 1 else 0.0
    return max(square - noise, 0.01 * square)
