"""MobileNetV2 for small images: 17 inverted residual blocks with depthwise convolutions, linear at their end, ReLU6.

Sandler, Howard, Zhu, Zhmoginov and Chen 2018 (arXiv:1801.04381)

Differs from the paper, whose net is for 224x224, as in the form usual for CIFAR-10: the stem and the stage of 24
channels have stride 1 instead of 2, so 32x32 ends at 4x4 (the stages of 32, 64 and 160 channels halve the side); a
block of stride 1 whose channels change has a 1x1 convolution with BatchNorm as shortcut, where the paper has none; the
first block has a 1x1 convolution before the depthwise one, though it expands nothing; no dropout. That form often has
ReLU; this one has the paper's ReLU6. `width` multiplies the channels, which are rounded to multiples of 8; the last
convolution keeps 1280 for a width below 1, as in the paper.

A block ends without activation, so in training the next BatchNorm removes its bias: those biases hardly learn.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.common import Inputs, Normalize, conv_bn, require

revision = 1

# expansion, channels, blocks, stride of the first block
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nn.Module):
    """1x1 convolution to `expansion` times the channels, 3x3 depthwise, 1x1 back without activation, each with BN; a
    shortcut where the side stays."""

    def __init__(self, channels: int, out: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = expansion * channels
        self.expand = conv_bn(channels, hidden, 1)
        self.depthwise = conv_bn(hidden, hidden, 3, stride, groups=hidden)
        self.project = conv_bn(hidden, out, 1)
        self.shortcut = conv_bn(channels, out, 1) if stride == 1 and channels != out else None
        self.residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))
        if not self.residual:
            return out
        return out + (x if self.shortcut is None else self.shortcut(x))


class MobileNetV2(nn.Module):
    """Stem of 32 channels, the stages, a 1x1 convolution to 1280 channels, global average pooling, `head`."""

    def __init__(self, inputs: Inputs, width: float) -> None:
        super().__init__()
        self.normalise = Normalize(inputs)
        channels, last = _rounded(32 * width), _rounded(1280 * max(1.0, width))
        self.stem = conv_bn(inputs.channels, channels, 3)
        layers = list[nn.Module]()
        for expansion, paper, blocks, stride in _STAGES:
            for block in range(blocks):
                out = _rounded(paper * width)
                layers.append(InvertedResidual(channels, out, expansion, stride if block == 0 else 1))
                channels = out
        self.blocks = nn.Sequential(*layers)
        self.last = conv_bn(channels, last, 1)
        self.head = nn.Linear(last, inputs.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu6(self.stem(self.normalise(x))))
        return self.head(F.relu6(self.last(x)).mean((2, 3)))


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, at least 8 and not below nine tenths of `channels`, as in the authors' code."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near if near >= 0.9 * channels else near + 8


def build(inputs: Inputs, *, width: float = 1.0) -> nn.Module:
    """Images `b c h w` in [0,1] -> logits `b k`. Raises ValueError for a side below 8 or a width not above 0."""
    require("mobilenet_v2", inputs, 8)
    if not width > 0:
        raise ValueError(f"mobilenet_v2: width is {width}; expected a factor above 0")
    return MobileNetV2(inputs, width)
