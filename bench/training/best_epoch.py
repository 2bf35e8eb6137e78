"""Validation-based choice of an epoch's weights: never by test images, and the last weights are kept beside them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from bench.core.classifier import Classifier, frozen
from bench.core.pgd import ascend, attack_loss
from bench.core.rng import scope, seed
from bench.core.threat import Threat
from bench.data.images import Images, to_channels_last, to_float
from bench.training import sigterm as stopping

STEPS, REL_STEP_SIZE, BLOCK = 10, 0.25, 500
DROP = 0.2  # fall below the best that is noted as a sudden drop (catastrophic overfitting)


def validation_accuracy(model: Classifier, images: Images, threat: Threat | None, run_seed: int) -> float:
    """Share in [0,1] of `images` that the deployed decision gets right under PGD-10 (steps of eps / 4 on cross-entropy,
    one start uniform in the ball), or without an attack where `threat` is None.

    Starts and draws depend on the run's seed only, so epochs are compared on the same ones. Neither the caller's
    generators nor BatchNorm's statistics move.
    """
    right = torch.zeros((), dtype=torch.int64, device=images.x.device)
    surrogate = model.surrogate()
    with frozen(model):
        for start in range(0, len(images.x), BLOCK):
            stopping.point()
            x, y = to_channels_last(to_float(images.x[start : start + BLOCK])), images.y[start : start + BLOCK]
            with scope(seed(run_seed, "validation", start)):
                if threat is not None:
                    x = _attacked(surrogate, x, y, threat)
                with torch.no_grad():
                    right += (model.predict(x) == y).sum()
    return int(right) / len(images.x)


def _attacked(surrogate: torch.nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    objective = attack_loss("ce", y)
    return ascend(lambda z: objective(surrogate(z)), x, threat, steps=STEPS, rel_step_size=REL_STEP_SIZE)


def content_hash(images: Images) -> str:
    """16 hex digits of SHA-256 over pixels and labels: on which images an epoch was chosen."""
    digest = hashlib.sha256(images.x.cpu().contiguous().numpy().data)
    digest.update(images.y.cpu().numpy().astype("<i8").data)
    return digest.hexdigest()[:16]


class Choice:
    """The best of the epochs offered, the first of equal ones, with a copy of its weights and buffers."""

    def __init__(self) -> None:
        self.best_epoch, self.best, self.last = 0, -1.0, -1.0
        self.dropped: int | None = None
        self.state: dict[str, Tensor] = {}

    def offer(self, epoch: int, accuracy: float, state: dict[str, Tensor]) -> None:
        """Take `state` where `accuracy` (share in [0,1]) is above all before it; note the first sudden drop."""
        self.last = accuracy
        if accuracy > self.best:
            self.best_epoch, self.best = epoch, accuracy
            self.state = {name: value.detach().clone() for name, value in state.items()}
        elif self.dropped is None and accuracy < self.best - DROP:
            self.dropped = epoch

    def state_dict(self) -> dict[str, Any]:
        """What was offered so far, the weights of the best epoch included."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        vars(self).update(state)

    def metrics(self) -> dict[str, float | int | None]:
        """What a record says of the choice; `sudden_drop_epoch`: the first one 20 points below the best, or None."""
        return {
            "best_epoch": self.best_epoch,
            "best_validation": self.best,
            "last_validation": self.last,
            "sudden_drop_epoch": self.dropped,
        }
