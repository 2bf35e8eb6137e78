"""From a loss to new weights: parameter groups, learning-rate schedule, loss scaling, clipping, precision of passes."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bench.core.defense import Defense, Losses, total_loss
from bench.training.recipe import Recipe

# learning rate over its peak, from progress in [0,1]
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda p: 1.0,
    "step": lambda p: 1.0 if p < 0.5 else 0.1 if p < 0.75 else 0.01,
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    "one_cycle": lambda p: max(p / 0.3, 1e-3) if p < 0.3 else max((1 - p) / 0.7, 1e-3),
    "cyclic": lambda p: 1 - abs(2 * p - 1),  # Wong et al. 2020: 0, the peak halfway, 0
}


@dataclass
class Optimization:
    """The defense's Updater: one optimizer step on the sum of the terms, then one step of the schedule.

    `factor` maps progress in [0,1], counted in optimizer steps, to the fraction of each group's peak rate; `total` is
    the number of steps of the whole training. `clip` is the largest L2 norm of the whole gradient (0: no limit). A
    `scaler` scales the loss of fp16 passes and skips a step whose gradient overflows. `on_update` is called after each
    update, once the weights are unperturbed.
    """

    optimizer: torch.optim.Optimizer
    factor: Callable[[float], float]
    total: int
    clip: float = 0.0
    scaler: torch.amp.GradScaler | None = None
    on_update: Callable[[], None] | None = None
    steps: int = 0
    skipped: int = 0
    _pending: bool = False

    def __post_init__(self) -> None:
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._clipped = torch.zeros((), dtype=torch.int64, device=self._parameters[0].device)
        self._tick()

    def descend(self, terms: Losses) -> None:
        """Minimize the sum of the terms by one step. Before a second one in the same step of the defense, the weights
        must be unperturbed: the average reads them then."""
        self.flush_to_average()
        self.optimizer.zero_grad(set_to_none=True)
        loss = total_loss(terms)
        if self.scaler is None:
            loss.backward()
            self._clip()
            self.optimizer.step()
        else:
            before = self.scaler.get_scale()
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            self._clip()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.skipped += self.scaler.get_scale() < before
        self.steps += 1
        self._pending = True
        self._tick()

    def flush_to_average(self) -> None:
        """Report the last update to the average, once; the weights must be unperturbed."""
        if self._pending and self.on_update is not None:
            self.on_update()
        self._pending = False

    @property
    def clipped(self) -> int:
        """Number of steps whose gradient was clipped. Synchronizes the device: do not call it at every step."""
        return int(self._clipped)

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes; learning rates follow from the number of steps."""
        inner = {str(place): values for place, values in self.optimizer.state_dict()["state"].items()}
        counts = {"steps": self.steps, "skipped": self.skipped, "clipped": self._clipped}
        return {"optimizer": inner, "scaler": self.scaler and self.scaler.state_dict(), **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        inner = {int(place): values for place, values in state["optimizer"].items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": inner})
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.steps, self.skipped, self._clipped = state["steps"], state["skipped"], state["clipped"]
        self._tick()

    def _clip(self) -> None:
        if self.clip:
            norm = nn.utils.clip_grad_norm_(self._parameters, self.clip)
            self._clipped += (norm > self.clip) & norm.isfinite()

    def _tick(self) -> None:
        share = self.factor(min(self.steps / self.total, 1.0))
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * share


def build_updater(defense: Defense, net: nn.Module, recipe: Recipe, steps_per_epoch: int) -> Optimization:
    """Optimizer and schedule of the recipe for the defense's parameter groups.

    A group's `lr_scale` multiplies the rate; its own `weight_decay` replaces the recipe's. Progress is counted in
    optimizer steps, so that a defense that replays a batch advances the schedule too.
    """
    groups = _groups(defense, net, recipe)
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    else:
        optimizer = torch.optim.Adam(groups, lr=recipe.lr)
    shape, warmup = SCHEDULES[recipe.schedule], recipe.lr_warmup

    def factor(progress: float) -> float:
        return shape(progress) * (progress / warmup if progress < warmup else 1.0)

    total = steps_per_epoch * recipe.epochs * defense.updates_per_batch
    scaler = torch.amp.GradScaler(_device(net)) if recipe.precision == "fp16" else None
    return Optimization(optimizer, factor, total, recipe.grad_clip, scaler)


def _groups(defense: Defense, net: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The defense's groups with rate and decay. `weight_decay_on: weights` excludes biases and scales of normalization
    layers from the recipe's decay, but not from a decay of the group's own."""
    groups = []
    for group in defense.param_groups(net):
        own = {name: value for name, value in group.items() if name != "lr_scale"}
        full = {"weight_decay": recipe.weight_decay, **own, "lr": recipe.lr * group.get("lr_scale", 1)}
        selective = recipe.weight_decay_on == "weights" and "weight_decay" not in group
        undecayed = _biases_and_norms(net) if selective else set()
        for decay, found in ((full["weight_decay"], False), (0.0, True)):
            params = [p for p in full["params"] if (id(p) in undecayed) == found]
            if params:
                groups.append({**full, "params": params, "weight_decay": decay})
    return groups


def _biases_and_norms(net: nn.Module) -> set[int]:
    """Ids of every bias, and of all parameters of normalization layers, selected by type."""
    found = {id(p) for name, p in net.named_parameters() if name.rpartition(".")[2] == "bias"}
    for module in net.modules():
        if isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm)):
            found |= {id(p) for p in module.parameters(recurse=False)}
    return found


def _device(net: nn.Module) -> str:
    return next(net.parameters()).device.type


@contextmanager
def autocast_forward(net: nn.Module, precision: str) -> Iterator[None]:
    """Context in which each forward pass of `net` runs under autocast to `precision` (bf16, fp16) and returns fp32
    logits.

    Weights, gradients, losses and what a defense computes from logits stay fp32. `precision` fp32 changes nothing.
    """
    if precision == "fp32":
        yield
        return
    plain, device = net.forward, _device(net)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16

    def forward(*args: Any) -> Tensor:
        with torch.autocast(device, dtype):
            logits: Tensor = plain(*args)
        return logits.float()

    net.forward = forward
    try:
        yield
    finally:
        del net.forward  # restores the method of the class
