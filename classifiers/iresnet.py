"""ArcFace's network: the improved residual network of insightface's arcface_torch, in the size of given weights.

Deng et al., CVPR 2019; the names of the tensors are those of arcface_torch's `backbones/iresnet.py`.
"""

import torch
from torch import Tensor, nn

SIDE = 112  # pixels of its aligned faces; the four layers halve it to 7 x 7
LAYERS = ("layer1", "layer2", "layer3", "layer4")


class Block(nn.Module):
    """A residual block: batch norm, convolution, batch norm, PReLU, convolution, batch norm, plus the input."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x_FCHW: Tensor) -> Tensor:
        y_FCHW = self.conv1(self.bn1(x_FCHW))
        y_FCHW = self.bn3(self.conv2(self.prelu(self.bn2(y_FCHW))))
        return y_FCHW + (x_FCHW if self.downsample is None else self.downsample(x_FCHW))


class IResNet(nn.Module):
    """Map faces [F, 3, 112, 112], (RGB - 0.5) / 0.5, to embeddings [F, dim], not normalised.

    widths: channels of the first convolution and of the four layers. depths: blocks of the layers ([3, 4, 14, 3]: r50).
    """

    def __init__(self, widths: list[int], depths: list[int], dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.prelu = nn.PReLU(widths[0])
        for name, inputs, outputs, depth in zip(LAYERS, widths[:-1], widths[1:], depths, strict=True):
            blocks = [Block(inputs, outputs, 2), *(Block(outputs, outputs, 1) for _ in range(depth - 1))]
            self.add_module(name, nn.Sequential(*blocks))
        self.bn2 = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1] * (SIDE // 16) ** 2, dim)
        self.features = nn.BatchNorm1d(dim)

    def forward(self, aligned_FCHW: Tensor) -> Tensor:
        x_FCHW = self.prelu(self.bn1(self.conv1(aligned_FCHW)))
        for name in LAYERS:
            x_FCHW = self.get_submodule(name)(x_FCHW)
        return self.features(self.fc(torch.flatten(self.bn2(x_FCHW), 1)))


def iresnet_like(tensors: dict[str, Tensor]) -> IResNet:
    """Return an untrained network of the size of a file's tensors; the tensors may still not fit it.

    Raises KeyError or IndexError if tensors that determine the size are missing.
    """
    depths = [len({key.split(".")[1] for key in tensors if key.startswith(f"{layer}.")}) for layer in LAYERS]
    widths = [tensors[f"{name}.weight"].shape[0] for name in ("conv1", *(f"{layer}.0.conv1" for layer in LAYERS))]
    return IResNet(widths, depths, tensors["fc.weight"].shape[0])
