"""The low-rank factors that a LoRA file holds for a layer."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The factors of LoRA's update (alpha / r) B A of a layer's weight: A is `down`, B is `up`.

    down: [r, in], up: [out, r]. A convolution has [r, in, h, w] and [out, r, 1, 1].
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    def delta(self) -> Tensor:
        """Return (alpha / r) B A in float32, in the shape of the layer's weight."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.alpha / self.rank * product).unflatten(1, self.down.shape[1:])


# module ("text_encoder", "text_encoder_2", "unet" or "transformer") -> layer without TEXT_ROOT -> factors, or weight's shape
Layers = dict[str, dict[str, Factors]]
Shapes = dict[str, dict[str, list[int]]]
