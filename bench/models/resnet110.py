"""ResNet-110 for 32x32 images: 3x3 stem, three stages of (depth - 2) / 6 basic blocks with 16, 32 and 64 channels.

He, Zhang, Ren and Sun 2016 (arXiv:1512.03385, section 4.2)

The net of randomized smoothing on CIFAR-10 (Cohen, Rosenfeld and Kolter 2019, arXiv:1902.02918), and like theirs with
1x1 convolutions as shortcuts where the shape changes (option B); the paper pads with zeros there (option A), which has
2 752 parameters less. `depth` 20, 32, 44 and 56 are the paper's smaller nets; `width` is the number of channels of the
first stage.
"""

from torch import nn

from bench.models.common import Inputs, ResNet, he_normal, require

revision = 1


def build(inputs: Inputs, *, depth: int = 110, width: int = 16) -> nn.Module:
    """Images `b c h w` in [0,1] -> logits `b k`. Raises ValueError for a side below 8, a width below 1 or a depth
    that is not 6n + 2."""
    require("resnet110", inputs, 8, width=width)
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"resnet110: depth is {depth}; expected 6n + 2, such as 8, 20, 32, 56 or 110")
    return he_normal(ResNet(inputs, stem=width, widths=(width, 2 * width, 4 * width), blocks=((depth - 2) // 6,) * 3))
