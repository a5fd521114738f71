"""The low-rank factors that LoRA adds to a layer, as stored in its files."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """What LoRA adds to the weight of a layer, (alpha / r) B A, where A, `down`, reads it and B, `up`, writes it.

    down: [r, in], up: [out, r]; of a convolution [r, in, h, w] and [out, r, 1, 1].
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    def delta(self) -> Tensor:
        """(alpha / r) B A in float32, in the shape of the layer's weight."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.alpha / self.rank * product).unflatten(1, self.down.shape[1:])


# "text_encoder", "text_encoder_2", "unet", "transformer" -> layer, without TEXT_ROOT -> its factors, or its weight's shape
Layers = dict[str, dict[str, Factors]]
Shapes = dict[str, dict[str, list[int]]]
