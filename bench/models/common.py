"""Parts shared by architectures: inputs, normalization, activations, and residual nets with activation before or after
the sum."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bench.terminal import counted

Activation = Literal["relu", "silu", "gelu", "softplus"]
MAY_LACK = "bench_may_lack"  # attribute of a net: names in its state that a checkpoint need not have
_ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}


class Inputs(NamedTuple):
    """The data a net is built for: images `channels x size x size` in [0,1], number of `classes`, and per-channel
    `mean` and `std` (in units of [0,1]) that the net normalizes with."""

    channels: int
    size: int
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Normalize(nn.Module):
    """(x - mean) / std per channel, with buffers of shape `1 c 1 1`; the image itself where mean is 0 and std is 1."""

    mean: Tensor
    std: Tensor

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        if not len(inputs.mean) == len(inputs.std) == inputs.channels or min(inputs.std) <= 0:
            raise ValueError(
                f"mean {inputs.mean} and std {inputs.std}: expected {counted(inputs.channels, 'value')}, std above 0"
            )
        self.register_buffer("mean", torch.tensor(inputs.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(inputs.std).view(1, -1, 1, 1))
        # computed once and not from the buffers, whose values would need a synchronization and would stop a tracer
        self.identity = all(m == 0 for m in inputs.mean) and all(s == 1 for s in inputs.std)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.identity else (x - self.mean) / self.std


def activation_layer(name: Activation) -> nn.Module:
    """max(z, 0); z sigmoid(z) (SiLU); z Phi(z) (GELU, exact); or log(1 + exp(z)) (softplus): the last three are smooth,
    with a slope of at most 1.10, 1.13 and 1."""
    return _ACTIVATIONS[name]()


def stages(
    block: Callable[[int, int, int], nn.Module], channels: int, widths: tuple[int, ...], blocks: tuple[int, ...]
) -> nn.Sequential:
    """The stages of a residual net: for each of the `widths` so many `blocks`, made from channels in, channels out and
    stride. Each stage but the first halves the side."""
    layers = list[nn.Module]()
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for place in range(count):
            layers.append(block(channels, width, 2 if stage > 0 and place == 0 else 1))
            channels = width
    return nn.Sequential(*layers)


class PreActBlock(nn.Module):
    """BN - activation - conv - BN - activation - conv plus a shortcut; where the shape changes, the shortcut is a 1x1
    convolution of the first activation's output."""

    def __init__(self, channels: int, out: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation_layer(activation)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        changes = stride != 1 or channels != out
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        hidden = self.activation(self.bn2(self.conv1(active)))
        return self.conv2(hidden) + skip


class PreActResNet(nn.Module):
    """Stem convolution, `stages` of `blocks` PreActBlocks each, BN - activation, global average pooling, `head`."""

    def __init__(
        self, inputs: Inputs, *, stem: int, widths: tuple[int, ...], blocks: int, activation: Activation
    ) -> None:
        super().__init__()
        self.activation = activation_layer(activation)
        self.normalise = Normalize(inputs)
        self.stem = nn.Conv2d(inputs.channels, stem, 3, padding=1, bias=False)
        self.blocks = stages(partial(PreActBlock, activation=activation), stem, widths, (blocks,) * len(widths))
        self.bn = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], inputs.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.bn(self.blocks(self.stem(self.normalise(x)))))
        return self.head(x.mean((2, 3)))  # not adaptive_avg_pool2d: its backward pass is not deterministic on CUDA


def conv_bn(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution, padded so that only the stride shrinks the side, and BatchNorm. No bias: BatchNorm removes it."""
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or as a `bottleneck` 1x1, 3x3, 1x1 with a quarter of the channels between, each with BN,
    plus a shortcut, then the activation. Where the shape changes, the shortcut is a 1x1 convolution with BN (option B).
    """

    def __init__(self, channels: int, out: int, stride: int, bottleneck: bool, activation: Activation) -> None:
        super().__init__()
        self.activation = active = activation_layer(activation)
        if bottleneck:
            inner = out // 4
            first = [conv_bn(channels, inner, 1), active, conv_bn(inner, inner, 3, stride)]
            self.branch = nn.Sequential(*first, active, conv_bn(inner, out, 1))
        else:
            self.branch = nn.Sequential(conv_bn(channels, out, 3, stride), active, conv_bn(out, out, 3))
        changes = stride != 1 or channels != out
        self.shortcut = conv_bn(channels, out, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.shortcut is None else self.shortcut(x)
        return self.activation(self.branch(x) + skip)


class ResNet(nn.Module):
    """Stem convolution with BN and activation, `stages` of ResidualBlocks, global average pooling, `head`."""

    def __init__(
        self,
        inputs: Inputs,
        *,
        stem: int,
        widths: tuple[int, ...],
        blocks: tuple[int, ...],
        activation: Activation,
        bottleneck: bool = False,
    ) -> None:
        super().__init__()
        self.activation = activation_layer(activation)
        self.normalise = Normalize(inputs)
        self.stem = conv_bn(inputs.channels, stem, 3)
        self.blocks = stages(partial(ResidualBlock, bottleneck=bottleneck, activation=activation), stem, widths, blocks)
        self.head = nn.Linear(widths[-1], inputs.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.activation(self.stem(self.normalise(x))))
        return self.head(x.mean((2, 3)))


def he_normal(net: nn.Module) -> nn.Module:
    """The net with convolutions from N(0, 2 / (k k out)), zero biases of linear layers: as in the Wide ResNet code."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / (height * width * module.out_channels)))
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return net


def cifar_resnet(name: str, inputs: Inputs, depth: int, width: int, activation: Activation) -> nn.Module:
    """The ResNet of He et al. 2016, section 4.2, of `depth` 6n + 2 layers; see resnet_cifar. Raises ValueError in one
    line with the architecture's `name`."""
    require(name, inputs, 8, width=width)
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"{name}: depth is {depth}; expected 6n + 2, such as 8, 14, 20, 32, 56 or 110")
    widths, blocks = (width, 2 * width, 4 * width), ((depth - 2) // 6,) * 3
    return he_normal(ResNet(inputs, stem=width, widths=widths, blocks=blocks, activation=activation))


def require(name: str, inputs: Inputs, side: int, **settings: int) -> None:
    """Reject images with a side below `side` pixels and settings below 1. Raises ValueError in one line."""
    if inputs.size < side:
        raise ValueError(f"{name} needs images of at least {side} x {side} pixels, got {inputs.size}")
    for setting, value in settings.items():
        if value < 1:
            raise ValueError(f"{name}: {setting} is {value}; expected at least 1")
