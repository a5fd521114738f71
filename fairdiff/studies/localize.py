"""Where in an adapter the effect sits: its update in singular components, each with a score, and sparse adapters of some.

A layer's LoRA adds c B A, c = alpha / r. Its singular value decomposition c B A = sum_i s_i u_i v_i' makes r components,
whatever basis training left. The score of one is the first-order change of the loss without it, the gradient by a gate m_i
before it: |<s_i u_i v_i', dL/dW>|, mean over calibration batches (the SNIP score of Lee et al. 2019, taken for weights that
carry a behaviour by Wei et al., "Assessing the Brittleness of Safety Alignment", ICML 2024). From dL/dB = c G A' it is
|u_i' (dL/dB) B' u_i|, so LoRA's own gradient suffices.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from fairdiff.diffusion.adapter_files import TEXT_ROOT
from fairdiff.diffusion.adapters import Lora
from fairdiff.diffusion.lora_files import Factors, Layers

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
    places: dict[Place, list[int]] = {}
    for part, layer, i in sorted(chosen):
        places.setdefault((part, layer), []).append(i)
    layers: Layers = {}
    for (part, layer), rows in places.items():
        one = splits[part, layer]
        root = one.sizes[rows].sqrt()
        up, down = one.up[:, rows] * root, one.down[rows] * root[:, None]
        up, down = up.float().contiguous(), down.float().reshape(len(rows), *one.shape).contiguous()
        if len(one.shape) > 1:  # a convolution
            up = up[..., None, None]
        layers.setdefault(part, {})[layer] = Factors(down, up, float(len(rows)))
    return layers


def gate_gradients(adapter: Lora, splits: dict[Place, Split]) -> dict[Component, float]:
    """dL/dm_i = u_i' (dL/dB) B' u_i of every component, from the gradients that a step has left in the adapter."""
    found = {}
    for part, module in adapter.modules.items():
        for name, layer in module.named_modules():
            place = (part, name.removeprefix(TEXT_ROOT))
            if isinstance(layer, LoraLayer) and place in splits:
                b = layer.lora_B["default"].weight
                found |= {(*place, i): value for i, value in enumerate(_gates(splits[place].up, b))}
    return found


def _gates(up: Tensor, b: Tensor) -> list[float]:
    if b.grad is None:
        return [0.0] * up.shape[1]
    weight, grad = b.detach().double().flatten(1).cpu(), b.grad.double().flatten(1).cpu()
    return ((up.T @ grad) * (up.T @ weight)).sum(1).tolist()


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


def overlap(one: list[Component], other: list[Component], share: float) -> tuple[float, float]:
    """Jaccard overlap of the layers that hold the first `share` of either order, weighed by how many of their components
    do, and what it is on average between independent orders of the same components.

    sum_l min(a_l, b_l) / sum_l max(a_l, b_l), a_l and b_l the counts in layer l.
    """

    def counts(some: Iterable[Component]) -> dict[Place, int]:
        found: dict[Place, int] = {}
        for part, layer, _ in some:
            found[part, layer] = found.get((part, layer), 0) + 1
        return found

    def jaccard(a: dict, b: dict) -> float:
        places = a.keys() | b.keys()
        least = sum(min(a.get(p, 0), b.get(p, 0)) for p in places)
        return least / sum(max(a.get(p, 0), b.get(p, 0)) for p in places)

    rng = np.random.default_rng(0)
    a, names = counts(first(one, share)), sorted(other)
    size = len(first(other, share))
    chance = [jaccard(a, counts(names[i] for i in rng.permutation(len(names))[:size])) for _ in range(200)]
    return jaccard(a, counts(first(other, share))), float(np.mean(chance))
