"""Wide residual network (WRN-34-10 by default): 16-channel stem, three stages of (depth - 4) / 6 blocks.

Zagoruyko and Komodakis 2016 (arXiv:1605.07146)

WRN-34-10 is the net of TRADES (Zhang et al. 2019, arXiv:1901.08573) and of most CIFAR-10 robustness papers since.
`width` is the widening factor k: the stages have 16k, 32k and 64k channels. No dropout.
"""

from torch import nn

from bench.models.common import Activation, Inputs, PreActResNet, he_normal, require

settings_added_later = ("activation",)


def build(inputs: Inputs, *, depth: int = 34, width: int = 10, activation: Activation = "relu") -> nn.Module:
    """Images `b c h w` in [0,1] -> logits `b k`. Raises ValueError for a side below 8, a width below 1 or a depth
    that is not 6n + 4."""
    require("wide_resnet", inputs, 8, width=width)
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"wide_resnet: depth is {depth}; expected 6n + 4, such as 10, 16, 28, 34 or 70")
    widths = (16 * width, 32 * width, 64 * width)
    blocks = (depth - 4) // 6
    return he_normal(PreActResNet(inputs, stem=16, widths=widths, blocks=blocks, activation=activation))
