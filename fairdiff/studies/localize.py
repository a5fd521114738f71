"""Which parts of a LoRA cause its effect: singular components with scores, and sparse adapters made of some of them.

A layer's LoRA adds c B A, c = alpha / r. Its singular value decomposition c B A = sum_i s_i u_i v_i' makes r components,
whatever basis training left. The score of one is the first-order change of the loss without it, the gradient by a gate m_i
before it: |<s_i u_i v_i', dL/dW>|, mean over calibration batches (the SNIP score of Lee et al. 2019, taken for weights that
carry a behaviour by Wei et al., "Assessing the Brittleness of Safety Alignment", ICML 2024). From dL/dB = c G A' it is
|u_i' (dL/dB) B' u_i|, so LoRA's own gradient suffices.

Another training may take another way, the "alternative pathways" of "Towards Understanding the Fragility of Multilingual LLMs
against Fine-Tuning Attacks" (2024): `held_at_zero` keeps chosen components out of an update while it is trained.
"""

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fairdiff.diffusion.adapter_files import TEXT_ROOT
from fairdiff.diffusion.adapters import Lora
from fairdiff.diffusion.lora_files import Factors, Layers
from fairdiff.errors import FairDiffError

Place = tuple[str, str]  # "unet" or "text_encoder", and the layer in it
Component = tuple[str, str, int]  # and which of the layer's, from the largest


@dataclass(frozen=True)
class Split:
    """One layer's components: up [out, r] of columns u_i, sizes [r] of s_i falling, down [r, in] of rows v_i'.

    shape: of `Factors.down` behind r.
    """

    up: Tensor
    sizes: Tensor
    down: Tensor
    shape: tuple[int, ...]


def split(layers: Layers) -> dict[Place, Split]:
    """The singular components of every layer, through QR of the thin factors."""
    found = {}
    for part, some in layers.items():
        for layer, factors in some.items():
            down = factors.down.double().flatten(1)
            left, right = torch.linalg.qr(factors.up.double().flatten(1)), torch.linalg.qr(down.T)
            inner = factors.alpha / factors.rank * left.R @ right.R.T
            u, sizes, v = torch.linalg.svd(inner, full_matrices=False)
            found[part, layer] = Split(left.Q @ u, sizes, v @ right.Q.T, tuple(factors.down.shape[1:]))
    return found


def components(splits: dict[Place, Split]) -> dict[Component, float]:
    """Every component and its size s_i, the Frobenius norm of what it adds."""
    return {(*place, i): float(size) for place, one in splits.items() for i, size in enumerate(one.sizes)}


def kept(splits: dict[Place, Split], chosen: Iterable[Component]) -> Layers:
    """The adapter of these components alone: each layer has as many ranks as it has components, one without any is gone."""
    layers: Layers = {}
    for (part, layer), rows in _by_place(chosen).items():
        one = splits[part, layer]
        root = one.sizes[rows].sqrt()
        up, down = one.up[:, rows] * root, one.down[rows] * root[:, None]
        up, down = up.float().contiguous(), down.float().reshape(len(rows), *one.shape).contiguous()
        if len(one.shape) > 1:  # a convolution
            up = up[..., None, None]
        layers.setdefault(part, {})[layer] = Factors(down, up, float(len(rows)))
    return layers


def _by_place(chosen: Iterable[Component]) -> dict[Place, list[int]]:
    places: dict[Place, list[int]] = {}
    for part, layer, i in sorted(chosen):
        places.setdefault((part, layer), []).append(i)
    return places


def gate_gradients(adapter: Lora, splits: dict[Place, Split]) -> dict[Component, float]:
    """dL/dm_i = u_i' (dL/dB) B' u_i of every component, from the gradients that a step has left in the adapter."""
    found = {}
    for place, layer in _layers(adapter):
        if place in splits:
            b = layer.lora_B["default"].weight
            found |= {(*place, i): value for i, value in enumerate(_gates(splits[place].up, b))}
    return found


def _layers(adapter: Lora) -> Iterator[tuple[Place, LoraLayer]]:
    for part, module in adapter.modules.items():
        for name, layer in module.named_modules():
            if isinstance(layer, LoraLayer):
                yield (part, name.removeprefix(TEXT_ROOT)), layer


def _gates(up: Tensor, b: Tensor) -> list[float]:
    if b.grad is None:
        return [0.0] * up.shape[1]
    weight, grad = b.detach().double().flatten(1).cpu(), b.grad.double().flatten(1).cpu()
    return ((up.T @ grad) * (up.T @ weight)).sum(1).tolist()


class Without(nn.Module):
    """A factor [rows, ...] without some directions: (1 - Q Q') F of its rows' side, or F (1 - Q Q') of its columns'.

    basis: Q [D, k], orthonormal columns.
    """

    def __init__(self, basis: Tensor, of_rows: bool):
        super().__init__()
        self.register_buffer("basis", basis)
        self.of_rows = of_rows

    def forward(self, factor: Tensor) -> Tensor:
        flat, basis = factor.flatten(1), self.basis.to(factor)
        part = basis @ (basis.T @ flat) if self.of_rows else (flat @ basis) @ basis.T
        return (flat - part).view_as(factor)


@contextmanager
def held_at_zero(adapter: Lora, splits: dict[Place, Split], chosen: Iterable[Component]) -> Iterator[None]:
    """Whatever is trained within the block, the update has none of the chosen components, and neither have its files later.

    With the chosen u_i and v_i of a layer as columns of U and V its update is c (1 - U U') B A (1 - V V'): it writes nothing
    where they write and reads nothing where they read. Gradients are those of the factors behind these projections.
    FairDiffError for a layer that the adapter has not.
    """
    rows = _by_place(chosen)
    layers = {place: layer for place, layer in _layers(adapter) if place in rows}
    if missing := rows.keys() - layers.keys():
        raise FairDiffError(f"adapter: has no layer {' '.join(min(missing))}, allowed: layers whose components are held")
    held = []
    for place, layer in layers.items():
        one, some = splits[place], rows[place]
        for factors, basis, of_rows in ((layer.lora_B, one.up[:, some], True), (layer.lora_A, one.down[some].T, False)):
            factor = factors["default"]
            parametrize.register_parametrization(factor, "weight", Without(basis.to(factor.weight), of_rows))
            held.append(factor)
    try:
        yield
    finally:
        for factor in held:
            parametrize.remove_parametrizations(factor, "weight", leave_parametrized=True)


def common_places(one: dict[Component, float], other: dict[Component, float]) -> float:
    """sum_l min(p_l, q_l) in [0, 1], p_l and q_l the shares of layer l in the squared norm of two updates, by their sizes."""

    def shares(sizes: dict[Component, float]) -> dict[Place, float]:
        found: dict[Place, float] = {}
        for (part, layer, _), size in sizes.items():
            found[part, layer] = found.get((part, layer), 0.0) + size**2
        total = sum(found.values())
        return {place: square / total for place, square in found.items()}

    p, q = shares(one), shares(other)
    return sum(min(p[place], q[place]) for place in p.keys() & q.keys())


def orders(sizes: dict[Component, float], scores: dict[Component, float], seed: int) -> dict[str, list[Component]]:
    """The components from the first to keep to the last: by score, by size, and at random as what chance alone gives."""
    names = sorted(sizes)
    shuffled = np.random.default_rng(seed).permutation(len(names))
    return {
        "score": sorted(names, key=lambda c: (-scores[c], c)),
        "size": sorted(names, key=lambda c: (-sizes[c], c)),
        "random": [names[i] for i in shuffled],
    }


def first(order: list[Component], share: float) -> list[Component]:
    """The first `share` of an order, at least one component."""
    return order[: max(1, round(share * len(order)))]


def overlap(
    one: list[Component], other: list[Component], share: float, same: bool
) -> tuple[float, tuple[float, float]]:
    """Jaccard overlap of the first `share` of either order, and the 95 % range of independent orders of the same components.

    same: both are orders of one adapter's components. Of two adapters the layers are compared, weighed by how many of their
    components are among the first: sum_l min(a_l, b_l) / sum_l max(a_l, b_l), a_l and b_l the counts in layer l.
    """

    def counts(some: Iterable[Component]) -> dict[Hashable, int]:
        found: dict[Hashable, int] = {}
        for component in some:
            place = component if same else component[:2]
            found[place] = found.get(place, 0) + 1
        return found

    def jaccard(a: dict, b: dict) -> float:
        places = a.keys() | b.keys()
        least = sum(min(a.get(p, 0), b.get(p, 0)) for p in places)
        return least / sum(max(a.get(p, 0), b.get(p, 0)) for p in places)

    rng = np.random.default_rng(0)
    a, names = counts(first(one, share)), sorted(other)
    size = len(first(other, share))
    chance = [jaccard(a, counts(names[i] for i in rng.permutation(len(names))[:size])) for _ in range(400)]
    low, high = np.quantile(chance, [0.025, 0.975])
    return jaccard(a, counts(first(other, share))), (float(low), float(high))
