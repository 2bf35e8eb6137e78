"""Fully connected network on the flattened image, with ReLU or another `activation`.

Rosenblatt 1958, Rumelhart, Hinton and Williams 1986 (doi 10.1038/323533a0); as in scikit-learn's digits examples.

`depth` counts hidden layers; 0 is a linear classifier, whose exact margin is known in closed form.
"""

from torch import Tensor, nn

from bench.models.common import Activation, Inputs, Normalize, activation_layer, require

settings_added_later = ("activation",)


class MLP(nn.Module):
    """`depth` hidden layers of `width` units with the activation, then `head`."""

    def __init__(self, inputs: Inputs, width: int, depth: int, activation: Activation) -> None:
        super().__init__()
        self.normalise = Normalize(inputs)
        layers, features = list[nn.Module](), inputs.channels * inputs.size**2
        for _ in range(depth):
            layers += [nn.Linear(features, width), activation_layer(activation)]
            features = width
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(features, inputs.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.normalise(x).flatten(1)))


def build(inputs: Inputs, *, width: int = 256, depth: int = 2, activation: Activation = "relu") -> nn.Module:
    """Images `b c h w` in [0,1] -> logits `b k`. Raises ValueError for a width below 1 or a negative depth."""
    require("mlp", inputs, 1, width=width)
    if depth < 0:
        raise ValueError(f"mlp: depth is {depth}; expected at least 0")
    return MLP(inputs, width, depth, activation)
