"""ResNet for 32x32 images: 3x3 stem, three stages of (depth - 2) / 6 basic blocks with 16, 32 and 64 channels.

He, Zhang, Ren and Sun 2016 (arXiv:1512.03385, section 4.2)

The paper's ResNet-20 by default; `depth` 8 and 14 are smaller, 32, 44, 56 and 110 (resnet110) its deeper nets. `width`
is the number of channels of the first stage. Differs from the paper: where the shape changes, the shortcut is a 1x1
convolution with BatchNorm (option B, as resnet110 has it) where the paper pads with zeros (option A), which has 2 752
parameters less; convolutions from N(0, 2 / (k k out)) and ReLU are the paper's, another `activation` is not.
"""

from torch import nn

from bench.models.common import Activation, Inputs, cifar_resnet


def build(inputs: Inputs, *, depth: int = 20, width: int = 16, activation: Activation = "relu") -> nn.Module:
    """Images `b c h w` in [0,1] -> logits `b k`. Raises ValueError for a side below 8, a width below 1 or a depth
    that is not 6n + 2."""
    return cifar_resnet("resnet_cifar", inputs, depth, width, activation)
