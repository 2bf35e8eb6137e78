"""LeNet-5 with ReLU and max-pooling: convolutions 6 and 16 of 5x5, then 120 and 84 units.

LeCun, Bottou, Bengio and Haffner 1998 (doi 10.1109/5.726791)

Pooling precedes ReLU. The two commute, so that the function is the usual one, but noise that is Gaussian before the
activation is still Gaussian at the pool.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.common import Inputs, Normalize, require


class LeNet5(nn.Module):
    """61 706 parameters at 1 x 28 x 28 and 10 classes."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        side = (inputs.size // 2 - 4) // 2
        self.normalise = Normalize(inputs)
        self.conv1 = nn.Conv2d(inputs.channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(16 * side * side, 120)
        self.fc2 = nn.Linear(120, 84)
        self.head = nn.Linear(84, inputs.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.pool(self.conv1(self.normalise(x))))
        x = F.relu(self.pool(self.conv2(x)))
        x = F.relu(self.fc1(x.flatten(1)))
        return self.head(F.relu(self.fc2(x)))


def build(inputs: Inputs) -> nn.Module:
    """Images `b c h w` in [0,1] -> logits `b k`. Raises ValueError for a side below 14 or an odd one."""
    require("lenet5", inputs, 14)
    if inputs.size % 2:
        raise ValueError(f"lenet5 needs an even side of at least 14 pixels, got {inputs.size}")
    return LeNet5(inputs)
