"""Small convolutional network without BatchNorm: 32-32-64-64 channels of 3x3, two max-pools, 128 units.

Carlini and Wagner 2017 (arXiv:1608.04644); used for MNIST by Zhang et al. 2019 (TRADES, arXiv:1901.08573)

Differs from both: convolutions are padded, so that it works from 8x8 upwards, one hidden layer of 128 units instead of
two of 200, no dropout. ReLU by default, or another `activation`; pooling precedes it (see lenet5). `width` is the
number of channels of the first two convolutions, half that of the others.
"""

from torch import Tensor, nn

from bench.models.common import Activation, Inputs, Normalize, activation_layer, require

settings_added_later = ("activation", "width")


class SmallCNN(nn.Module):
    """Four convolutions, pooled after the second and the fourth; 467 818 parameters at 1 x 28 x 28, 10 classes."""

    def __init__(self, inputs: Inputs, activation: Activation, width: int) -> None:
        super().__init__()
        self.activation = activation_layer(activation)
        side = inputs.size // 4
        self.normalise = Normalize(inputs)
        self.conv1 = nn.Conv2d(inputs.channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.conv4 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(2 * width * side * side, 128)
        self.head = nn.Linear(128, inputs.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.conv1(self.normalise(x)))
        x = self.activation(self.pool(self.conv2(x)))
        x = self.activation(self.conv3(x))
        x = self.activation(self.pool(self.conv4(x)))
        return self.head(self.activation(self.fc(x.flatten(1))))


def build(inputs: Inputs, *, activation: Activation = "relu", width: int = 32) -> nn.Module:
    """Images `b c h w` in [0,1] -> logits `b k`. Raises ValueError for a side or a width that is too small."""
    require("small_cnn", inputs, 8, width=width)
    return SmallCNN(inputs, activation, width)
