"""Pre-activation ResNet-18 for small images: 3x3 stem without pooling, four stages of two blocks.

He, Zhang, Ren and Sun 2016 (arXiv:1603.05027)

With a last BatchNorm before pooling, as in the code of Rice, Wong and Kolter 2020 (arXiv:2002.11569). `width` is
the number of channels of the first stage; each further stage doubles it.
"""

from torch import nn

from bench.models.common import Activation, Inputs, PreActResNet, require

settings_added_later = ("activation",)


def build(inputs: Inputs, *, width: int = 64, activation: Activation = "relu") -> nn.Module:
    """Images `b c h w` in [0,1] -> logits `b k`. Raises ValueError for a side below 8 or a width below 1."""
    require("preact_resnet18", inputs, 8, width=width)
    widths = (width, 2 * width, 4 * width, 8 * width)
    return PreActResNet(inputs, stem=width, widths=widths, blocks=2, activation=activation)
