"""What is attacked and served: a map from images in [0,1] to logits, with its own prediction rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

BatchNormMode = Literal["eval", "train", "train_frozen_stats"]


class Classifier(nn.Module):
    """A deployed model. Images `x` are `b c h w` in [0,1]; normalisation lives inside `net`.

    `stochastic` tells attacks and scoring that two forward passes differ; a switch of its own, never
    `module.training`, because attack libraries force eval mode. `smoothed` marks a model that can certify.
    """

    stochastic: bool = False
    smoothed: bool = False

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Logits `b k` of one pass (of one draw, where the model is stochastic)."""
        logits: Tensor = self.net(x)
        return logits

    def predict(self, x: Tensor) -> Tensor:
        """The deployed decision, labels of shape b; -1 means the model abstains, which counts as an error."""
        return self(x).argmax(1)

    def surrogate(self) -> nn.Module:
        """The differentiable model that gradient attacks climb; it draws at most once a pass (EOT does the averaging).

        A defense whose forward pass is not differentiable owes an override.
        """
        return self


@contextmanager
def keep_buffers(net: nn.Module) -> Iterator[None]:
    """Restore every buffer (BatchNorm's running statistics) afterwards, bit for bit."""
    saved = [(buffer, buffer.detach().clone()) for buffer in net.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


@contextmanager
def frozen(net: nn.Module, bn_mode: BatchNormMode = "eval") -> Iterator[nn.Module]:
    """Yield the model to attack: parameters give no gradient, so an attack step costs two passes, not three.

    `bn_mode` is how the paper attacks: "eval" (running statistics), "train" (batch statistics, running ones move),
    "train_frozen_stats" (batch statistics, running ones restored). Mode of each module and gradient flag of each
    parameter are restored afterwards.
    """
    modes = [(module, module.training) for module in net.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in net.parameters()]
    try:
        net.train(bn_mode != "eval")
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        if bn_mode == "train_frozen_stats":
            with keep_buffers(net):
                yield net
        else:
            yield net
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


class Counted(nn.Module):
    """Counts, in images, the forward and backward passes through a model: hardware-independent cost."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # a library that "restores" this flag must not put the model in train mode
        self.forwards = 0
        self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        logits: Tensor = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        return logits

    def spend(self, forwards: int, backwards: int) -> None:
        """Count passes (in images) that were made through the parts of the model, past this wrapper."""
        self.forwards += forwards
        self.backwards += backwards

    def _count_backward(self, grad: Tensor) -> None:
        self.backwards += len(grad)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)
