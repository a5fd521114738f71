"""How noisy a step's gradient is: over the replayed (image, step) pairs, and over batches.

Given a batch, the gradient is a sum over pairs, sum_{b,t} G[b, t], and a choice of K of T steps an image estimates it by
(T/K) sum over the chosen pairs. So all G[b, t] are computed once, and any number of choices costs only their sums.
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
    """G [B, T, P]: what each (image, step) pair adds to the adapter's gradient, by the real step and the real replay.

    All zero if no face of the batch got a label.
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
            out[image, step] = _flat(parameters) / steps  # replay weighs one step of T by T
    return out


def total_gradient(trainee: Trainee, batch: Batch) -> Tensor:
    """The gradient [P] of a batch with every step replayed."""
    parameters = trainee.adapter.parameters()
    for p in parameters:
        p.grad = None
    training_step(replace(trainee, method=replace(trainee.method, evaluations=None)), batch)
    return _flat(parameters)


def _flat(parameters: list[torch.nn.Parameter]) -> Tensor:
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([g.flatten().cpu() for g in grads])


def stratified(batch: int, steps: int, k: int, generator: torch.Generator) -> Tensor:
    """Ours: systematic over the steps, offsets spread over the batch."""
    return choose_steps(batch, steps, k, generator)


def systematic(batch: int, steps: int, k: int, generator: torch.Generator) -> Tensor:
    """A random offset and stride T/K for each image by itself."""
    return torch.cat([choose_steps(1, steps, k, generator) for _ in range(batch)])


def uniform(batch: int, steps: int, k: int, generator: torch.Generator) -> Tensor:
    """K of T without replacement for each image by itself."""
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
    """Of the estimate of sum_{b,t} G[b, t] over some draws: E |error|^2 and |mean error|^2.

    lambda_N: without bias the mean error is normal, so that |mean error|^2 is sum_n lambda_n z_n^2, z_n standard normal.
    """

    square: float
    bias: float
    lambda_N: Tensor

    @property
    def ratio(self) -> float:
        """|mean error|^2 over its expectation without bias."""
        return self.bias / float(self.lambda_N.sum())


def estimator_error(pairs_BTP: Tensor, k: int, choose: Callable, draws: int, seed: int = 0) -> EstimatorError:
    """The error of (T/K) sum over chosen pairs, `choose` (see CHOICES) drawn `draws` times, on G [B, T, P].

    Everything in the space of the Gram matrix of the B T pairs, so that P does not matter.
    """
    batch, steps, _ = pairs_BTP.shape
    flat = pairs_BTP.flatten(0, 1).double()
    gram = flat @ flat.T
    generator = torch.Generator().manual_seed(1000 * seed + k)
    weight = torch.full((draws, batch, steps), -1.0, dtype=torch.float64)  # of each pair in (estimate - truth)
    for row in weight:
        row.scatter_add_(1, choose(batch, steps, k, generator), torch.full((batch, k), steps / k, dtype=torch.float64))
    weight = weight.flatten(1)
    values, vectors = torch.linalg.eigh(gram)
    error = weight @ (vectors * values.clamp(min=0).sqrt())  # as vectors whose products are those of the gradients
    mean = error.mean(0)
    lambda_N = torch.linalg.svdvals(error - mean).square() / (draws - 1) / draws
    return EstimatorError(float(error.square().sum(1).mean()), float(mean @ mean), lambda_N)


def disagreement(trainee: Trainee, config: BenchConfig) -> dict:
    """Do prompts agree? Cosines of full gradients: of two batches of one prompt, and of batches of different prompts.

    first: the share of sum |g|^2 over prompts that lies in a single direction. Batches of the smallest size.
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
    """Relative variance against K and choice, given the batch; of the full gradient against B; and the bias."""
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
                        entry = estimator_error(pairs, k, choose, config.draws, number)  # draws of its own
                        found.setdefault((name, k), []).append(entry)
    by_size = {size: torch.stack(rows).double() for size, rows in full.items()}
    largest = by_size[max(config.sizes)]
    scale = signal(largest)
    rows = []
    for (name, k), entries in found.items():
        error = sum(entry.square for entry in entries) / len(entries)
        rows.append({"choice": name, "K": k, "variance": error / scale, "bias_over_noise": None})
        if error > 1e-9 * scale:  # every step replayed leaves rounding only, and no ratio of it
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
    """What the mean of the ratios stays below with this probability if there is no bias."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(draws, dtype=torch.float64)
    for entry in entries:
        z_DN = torch.randn(draws, len(entry.lambda_N), generator=generator, dtype=torch.float64)
        total += z_DN.square() @ (entry.lambda_N / entry.lambda_N.sum())
    return float((total / len(entries)).quantile(level))


def by_step(square_T: Tensor) -> dict:
    """How much each step contributes, sqrt(E |G[b, t]|^2) over its mean over t, and what drawing in proportion would save.

    even_over_best: sum_t p_t^-1 E|G_t|^2 for p = K/T over the same for p_t ~ |G_t|: T sum |G_t|^2 / (sum |G_t|)^2 >= 1.
    """
    norm = square_T.sqrt()
    return {
        "norms": (norm / norm.mean()).tolist(),
        "even_over_best": float(len(norm) * square_T.sum() / norm.sum() ** 2),
    }


def same_prompt(config: BenchConfig, number: int, size: int) -> Batch:
    """Disjoint noises of one prompt, so that the variance over batches is that of the noise alone."""
    batch = draw(config, 0, size)
    return replace(batch, indices=list(range(number * size, (number + 1) * size)))


def signal(total_NP: Tensor) -> float:
    """|E g|^2 without bias: |mean|^2 less the variance of the mean; at least a hundredth of |mean|^2."""
    square = float(total_NP.mean(0).square().sum())
    noise = float(total_NP.var(0).sum()) / len(total_NP) if len(total_NP) > 1 else 0.0
    return max(square - noise, 0.01 * square)
