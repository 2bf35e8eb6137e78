"""VGG-11 with BatchNorm for small images: eight 3x3 convolutions, five max-pools, one linear layer.

Simonyan and Zisserman 2015 (arXiv:1409.1556, configuration A)

Differs from the paper, whose net is for 224x224: BatchNorm (Ioffe and Szegedy 2015, arXiv:1502.03167) after each
convolution, one linear layer instead of three, no dropout, as usual for 32x32. Convolutions have no bias, which
BatchNorm would remove; the usual form has these 2 752 parameters. Pools of a single pixel, at the end of the net for
images below 32 pixels, are left out; from 64 pixels on, the output of the last pool is averaged. Pooling precedes the
activation (see lenet5). `width` is the number of channels of the first convolution.
"""

from torch import Tensor, nn

from bench.models.common import Activation, Inputs, Normalize, activation_layer, conv_bn, require

revision = 1
settings_added_later = ("activation",)

# channels of each convolution in units of the width, and whether a pool follows
_LAYERS = ((1, True), (2, True), (4, False), (4, True), (8, False), (8, True), (8, False), (8, True))


class VGG11(nn.Module):
    """Convolutions with BatchNorm, max-pool where one follows, and activation; the mean over what is left, `head`."""

    def __init__(self, inputs: Inputs, width: int, activation: Activation) -> None:
        super().__init__()
        self.normalise = Normalize(inputs)
        layers, channels, side = list[nn.Module](), inputs.channels, inputs.size
        for multiple, pooled in _LAYERS:
            layers.append(conv_bn(channels, multiple * width, 3))
            if pooled and side > 1:
                layers.append(nn.MaxPool2d(2))
                side //= 2
            layers.append(activation_layer(activation))
            channels = multiple * width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, inputs.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(self.normalise(x)).mean((2, 3)))


def build(inputs: Inputs, *, width: int = 64, activation: Activation = "relu") -> nn.Module:
    """Images `b c h w` in [0,1] -> logits `b k`. Raises ValueError for a side below 8 or a width below 1."""
    require("vgg11", inputs, 8, width=width)
    return VGG11(inputs, width, activation)
