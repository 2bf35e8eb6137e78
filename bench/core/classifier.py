"""The deployed model: a map from images in [0,1] to logits, with its own prediction rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

BatchNormMode = Literal["eval", "train", "train_frozen_stats"]


def predicted(logits: Tensor) -> Tensor:
    """The class of the largest logit (b k), shape b; -1, which is always an error, where a logit is NaN: `argmax` takes
    NaN for the largest."""
    return logits.argmax(1).masked_fill(logits.isnan().any(1), -1)


class Classifier(nn.Module):
    """A deployed model. Images `x` are `b c h w` in [0,1]; `net` contains the normalization.

    `stochastic` is True if two forward passes on the same image differ. It is independent of `module.training`, because
    attack libraries force eval mode. `smoothed` is True if the model can certify.
    """

    stochastic: bool = False
    smoothed: bool = False

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Logits `b k` of one forward pass (one noise draw, if the model is stochastic)."""
        logits: Tensor = self.net(x)
        return logits

    def predict(self, x: Tensor) -> Tensor:
        """Predicted labels, shape b; -1 means that the model abstains or gives NaN, which counts as an error."""
        return predicted(self(x))

    def decisive(self) -> nn.Module | None:
        """The net whose largest logit is the prediction, so that bounds of its logits prove something; None where a
        subclass predicts otherwise."""
        own = (type(self).forward, type(self).predict) == (Classifier.forward, Classifier.predict)
        return self.net if own and not self.stochastic else None

    def surrogate(self) -> nn.Module:
        """The differentiable model that gradient attacks use; one noise draw per pass at most (EOT averages over them).

        A defense whose forward pass is not differentiable must override it.
        """
        return self


@contextmanager
def keep_buffers(net: nn.Module) -> Iterator[None]:
    """Context manager that restores every buffer (BatchNorm's running statistics) bit for bit."""
    saved = [(buffer, buffer.detach().clone()) for buffer in net.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


@contextmanager
def frozen(net: nn.Module, bn_mode: BatchNormMode = "eval") -> Iterator[nn.Module]:
    """Context manager that yields the model to attack: parameters have no gradient, so that an attack step costs two
    passes instead of three.

    `bn_mode` is BatchNorm's mode during the attack: "eval" (running statistics), "train" (batch statistics, running
    ones are updated), "train_frozen_stats" (batch statistics, running ones restored afterwards). The training mode of
    each module and `requires_grad` of each parameter are restored.
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
    """Counts the images of all forward and backward passes through a model: a cost that is independent of hardware."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # libraries "restore" this flag: without it they put the model in train mode
        self.forwards = 0
        self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        logits: Tensor = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        return logits

    def spend(self, forwards: int, backwards: int) -> None:
        """Count passes (in images) that were made through parts of the model without this wrapper."""
        self.forwards += forwards
        self.backwards += backwards

    def columns(self, x: Tensor) -> dict[str, Tensor]:
        """Columns `forwards` and `backwards` (float32, shape b): passes per image, the mean over the images `x`."""
        counts = {"forwards": self.forwards, "backwards": self.backwards}
        size = (len(x),)
        return {
            n: torch.full(size, count / len(x), dtype=torch.float32, device=x.device) for n, count in counts.items()
        }

    def _count_backward(self, grad: Tensor) -> None:
        self.backwards += len(grad)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)
