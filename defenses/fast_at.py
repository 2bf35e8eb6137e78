"""min_w E[ CE(f(x'), y) ], x' = Pi(x + d0 + 1.25 eps * sign(grad CE(f(x + d0), y))), d0 ~ U(-eps, eps)

Fast adversarial training, FGSM with a random start (Wong et al. 2020, arXiv 2001.03994), and its unclipped successor
N-FGSM (de Jorge et al. 2022, arXiv 2202.01181).

`n_fgsm` draws d0 from U(-k eps, k eps), k = 2, takes a step of eps and, as published, does *not* project the sum onto
the ball: its training images reach (k + 1) eps from x. Both clip to [0,1], before the gradient is taken and after. One
step can overfit within an epoch (100 % under FGSM, 0 % under PGD), so a guard counts accuracy under PGD-5 (steps of eps
/ 4, eval mode, no random start: no draw of training changes) at the first batch of each epoch and after the last step.
More than `max_drop` below the best so far, the weights of the last good check return and no step follows. Wong's code
checks in train mode, and against the check before. The recipe is Wong's but that the rate peaks at 30 % of training,
not halfway (schedule=cyclic); N-FGSM took 30 epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from bench.core.classifier import BatchNormMode, frozen
from bench.core.defense import Batch, Defense, Losses, Updater
from bench.core.pgd import ascend, attack_loss

_GOOD = "good."  # prefix of the saved weights within the state


@dataclass
class FastAT(Defense):
    """One step from a random start. Costs 5 forward passes F an image; the guard 11F for one batch an epoch."""

    norms: ClassVar[tuple[str, ...]] = ("Linf",)
    cost: ClassVar[str] = "5F"
    adaptive_attacks: ClassVar[str] = "standard attacks are adaptive: a plain differentiable net is deployed"
    revision: ClassVar[int] = 1
    supports_recipe: ClassVar[tuple[str, ...]] = ("label_smoothing", "bf16", "fp16")
    recipe: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd",
        "lr": 0.2,
        "weight_decay": 5e-4,
        "schedule": "one_cycle",
        "epochs": 15,
        "batch_size": 128,
    }

    variant: Literal["fgsm_rs", "n_fgsm"] = "fgsm_rs"
    """Noise and result within the ball, or stronger noise and no projection."""
    rel_step_size: Annotated[float, Gt(0)] | None = None
    """Step in units of eps; null is the paper's, 1.25 (fgsm_rs) or 1 (n_fgsm)."""
    noise: Annotated[float, Ge(0)] = 2.0
    """k of n_fgsm: noise in units of eps."""
    guard: bool = True
    """Detect catastrophic overfitting, and restore earlier weights."""
    max_drop: Annotated[float, Gt(0), Le(1)] = 0.2
    """Drop of the accuracy under PGD-5 below its best, as a fraction, that the guard treats as overfitting."""
    attack_bn_mode: BatchNormMode = "train"
    """BatchNorm during the attack: running statistics (eval), batch statistics (train), or these with no trace left."""

    def __post_init__(self) -> None:
        self._budget = self.threat  # the guard measures against all of it, whatever a warm-up makes of `threat`
        self._epoch, self._progress = -1, 1.0
        self._best = torch.zeros(())  # accuracy under PGD-5
        self._loss: Tensor | None = None  # of the weights rolled back to, once stopped
        self._good: dict[str, Tensor] = {}
        self._checks = self._skipped = 0

    @property
    def restored_older_weights(self) -> bool:
        """True once the guard restored the last good weights and stopped training."""
        return self._loss is not None

    def inner(self, net: nn.Module, batch: Batch) -> Tensor:
        """Images one step away from a random start; for n_fgsm these may leave the ball."""
        x, eps, within = batch.x, self.threat.radius, self.variant == "fgsm_rs"
        reach = eps if within else self.noise * eps
        step = eps * (self.rel_step_size or (1.25 if within else 1.0))
        start = (x + torch.empty_like(x).uniform_(-reach, reach)).clamp(0, 1).requires_grad_()
        with frozen(net, self.attack_bn_mode) as target:
            loss = F.cross_entropy(target(start), batch.y, reduction="sum")
            (grad,) = torch.autograd.grad(loss, start)
        moved = start.detach() + step * grad.sign()
        return self.threat.project_to_image(x, moved) if within else moved.clamp(0, 1)

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean cross-entropy on the adversarial images `adv`."""
        return {"ce": F.cross_entropy(net(adv), batch.y, label_smoothing=batch.smoothing)}

    def step(self, net: nn.Module, updater: Updater, batch: Batch) -> Losses:
        """One update; none once the guard has stopped training: the loss is then constant."""
        if self.guard and self._epoch not in (-1, batch.epoch):
            self._check(net, batch)
        stride = batch.progress - self._progress  # of one batch, from the second one on
        self._epoch, self._progress = batch.epoch, batch.progress
        if self._loss is not None:
            self._skipped += 1
            return {"ce": self._loss}
        terms = super().step(net, updater, batch)
        if self.guard and stride > 0 and batch.progress + 1.5 * stride > 1:
            self._check(net, batch)  # after the last update
        return terms

    def _check(self, net: nn.Module, batch: Batch) -> None:
        """Save the weights, or restore the saved ones and stop, depending on the accuracy under PGD-5 on this batch."""
        if self._loss is not None:
            return
        self._checks += 1
        objective = attack_loss("ce", batch.y)
        with frozen(net) as target:
            adv = ascend(
                lambda x: objective(target(x)), batch.x, self._budget, steps=5, rel_step_size=0.25, start="zero"
            )
            with torch.no_grad():
                accuracy = (target(adv).argmax(1) == batch.y).double().mean()
        if self._good and bool(accuracy < self._best - self.max_drop):
            net.load_state_dict(self._good)
            with frozen(net) as target, torch.no_grad():
                self._loss = F.cross_entropy(target(adv), batch.y)
            return
        self._best = torch.maximum(self._best.to(accuracy), accuracy)
        self._good = {name: value.detach().clone() for name, value in net.state_dict().items()}

    def metrics(self, net: nn.Module) -> dict[str, Tensor]:
        """Whether the guard stopped training, the best accuracy under PGD-5, the number of checks and of skipped
        steps."""
        own = {"stopped": self._loss is not None, "checks": self._checks, "skipped_steps": self._skipped}
        found = {f"guard_{name}": torch.tensor(float(value)) for name, value in own.items()}
        return {**found, "guard_best": self._best}

    def state_dict(self) -> dict[str, Tensor]:
        """The guard: position in training, counts, best accuracy, last good weights, and whether it has stopped."""
        position = {"epoch": torch.tensor(self._epoch), "progress": torch.tensor(self._progress, dtype=torch.float64)}
        position["counts"] = torch.tensor([self._checks, self._skipped])
        stopped = {} if self._loss is None else {"stopped": self._loss}
        return {**position, "best": self._best, **stopped, **{_GOOD + n: v for n, v in self._good.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""
        self._epoch, self._progress = int(state["epoch"]), float(state["progress"])
        self._checks, self._skipped = state["counts"].tolist()
        self._best, self._loss = state["best"], state.get("stopped")
        self._good = {n.removeprefix(_GOOD): v for n, v in state.items() if n.startswith(_GOOD)}
