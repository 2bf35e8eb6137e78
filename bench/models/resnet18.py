"""ResNet-18 for small images: 3x3 stem without pooling, four stages of two basic blocks, ReLU after each sum.

He, Zhang, Ren and Sun 2016 (arXiv:1512.03385)

Differs from the paper, whose net of 18 layers is for 224x224: the stem is a 3x3 convolution of stride 1 instead of one
of 7x7 and stride 2 and a max-pool, as usual for 32x32. Shortcuts are the identity, or 1x1 convolutions where the shape
changes (option B). `width` is the number of channels of the first stage; each further stage doubles it.
"""

from torch import nn

from bench.models.common import Activation, Inputs, ResNet, require

revision = 1
settings_added_later = ("activation",)


def build(inputs: Inputs, *, width: int = 64, activation: Activation = "relu") -> nn.Module:
    """Images `b c h w` in [0,1] -> logits `b k`. Raises ValueError for a side below 8 or a width below 1."""
    require("resnet18", inputs, 8, width=width)
    widths = (width, 2 * width, 4 * width, 8 * width)
    return ResNet(inputs, stem=width, widths=widths, blocks=(2, 2, 2, 2), activation=activation)
