"""ResNet-110 for 32x32 images: 3x3 stem, three stages of (depth - 2) / 6 basic blocks with 16, 32 and 64 channels.

He, Zhang, Ren and Sun 2016 (arXiv:1512.03385, section 4.2)

The net of randomized smoothing on CIFAR-10 (Cohen, Rosenfeld and Kolter 2019, arXiv:1902.02918), and like theirs with
1x1 convolutions as shortcuts where the shape changes (option B); the paper pads with zeros there (option A), which has
2 752 parameters less. The same net as resnet_cifar with `depth` 110; `width` is the number of channels of the first
stage.
"""

from torch import nn

from bench.models.common import Activation, Inputs, cifar_resnet

revision = 1
settings_added_later = ("activation",)


def build(inputs: Inputs, *, depth: int = 110, width: int = 16, activation: Activation = "relu") -> nn.Module:
    """Images `b c h w` in [0,1] -> logits `b k`. Raises ValueError for a side below 8, a width below 1 or a depth
    that is not 6n + 2."""
    return cifar_resnet("resnet110", inputs, depth, width, activation)
