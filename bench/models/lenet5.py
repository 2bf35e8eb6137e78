"""LeNet-5 with ReLU and max-pooling (or another `activation`): convolutions 6 and 16 of 5x5, then 120 and 84 units.

LeCun, Bottou, Bengio and Haffner 1998 (doi 10.1109/5.726791)

Pooling precedes the activation. It commutes with ReLU and softplus, which never fall, so that the function is the usual
one, but noise that is Gaussian before the activation is still Gaussian at the pool. SiLU and GELU fall below zero (left
of -1.28 and -.75), so with these it is another net than one that pools their output.
"""

from torch import Tensor, nn

from bench.models.common import Activation, Inputs, Normalize, activation_layer, require

settings_added_later = ("activation",)


class LeNet5(nn.Module):
    """61 706 parameters at 1 x 28 x 28 and 10 classes."""

    def __init__(self, inputs: Inputs, activation: Activation) -> None:
        super().__init__()
        self.activation = activation_layer(activation)
        side = (inputs.size // 2 - 4) // 2
        self.normalise = Normalize(inputs)
        self.conv1 = nn.Conv2d(inputs.channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(16 * side * side, 120)
        self.fc2 = nn.Linear(120, 84)
        self.head = nn.Linear(84, inputs.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.pool(self.conv1(self.normalise(x))))
        x = self.activation(self.pool(self.conv2(x)))
        x = self.activation(self.fc1(x.flatten(1)))
        return self.head(self.activation(self.fc2(x)))


def build(inputs: Inputs, *, activation: Activation = "relu") -> nn.Module:
    """Images `b c h w` in [0,1] -> logits `b k`. Raises ValueError for a side below 14 or an odd one."""
    require("lenet5", inputs, 14)
    if inputs.size % 2:
        raise ValueError(f"lenet5 needs an even side of at least 14 pixels, got {inputs.size}")
    return LeNet5(inputs, activation)
