"""ResNet-50 for small images: 3x3 stem without pooling, bottleneck stages of 3, 4, 6 and 3 blocks.

He, Zhang, Ren and Sun 2016 (arXiv:1512.03385)

Differs from the paper, whose net of 50 layers is for 224x224: stem as in resnet18, and where a block halves the side,
its 3x3 convolution has the stride and not its first 1x1, as in most code since. `width` is the number of channels
between the 1x1 convolutions of the first stage; blocks give four times as many, and each further stage doubles them.
"""

from torch import nn

from bench.models.common import Activation, Inputs, ResNet, require

revision = 1
settings_added_later = ("activation",)


def build(inputs: Inputs, *, width: int = 64, activation: Activation = "relu") -> nn.Module:
    """Images `b c h w` in [0,1] -> logits `b k`. Raises ValueError for a side below 8 or a width below 1."""
    require("resnet50", inputs, 8, width=width)
    widths = (4 * width, 8 * width, 16 * width, 32 * width)
    return ResNet(inputs, stem=width, widths=widths, blocks=(3, 4, 6, 3), activation=activation, bottleneck=True)
