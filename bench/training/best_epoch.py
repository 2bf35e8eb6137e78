"""Selection of the best epoch by validation accuracy, never by test images."""

from typing import Any

import torch
from torch import Tensor

from bench.core.classifier import Classifier, frozen
from bench.core.pgd import ascend, attack_loss
from bench.core.rng import scope, seed
from bench.core.threat import Threat
from bench.data.images import Images, to_channels_last, to_float
from bench.soundness.catalog import CHECKS
from bench.training import stop_signals

STEPS, REL_STEP_SIZE, BLOCK = 10, 0.25, 500
DROP = CHECKS["C26"].limits["F"]  # below the best accuracy, reported as catastrophic overfitting


def validation_accuracy(model: Classifier, images: Images, threat: Threat | None, run_seed: int) -> float:
    """Accuracy in [0,1] of the deployed model on `images` under PGD-10 (steps of eps / 4 on cross-entropy, one start
    uniform in the ball), or without an attack if `threat` is None.

    Starts and noise draws depend on the run's seed only, so that epochs are compared under equal conditions. The
    caller's generators and BatchNorm's statistics are unchanged.
    """
    correct = torch.zeros((), dtype=torch.int64, device=images.x.device)
    surrogate = model.surrogate()
    with frozen(model):
        for start in range(0, len(images.x), BLOCK):
            stop_signals.point()
            x, y = to_channels_last(to_float(images.x[start : start + BLOCK])), images.y[start : start + BLOCK]
            with scope(seed(run_seed, "validation", start)):
                if threat is not None:
                    x = _attacked(surrogate, x, y, threat)
                with torch.no_grad():
                    correct += (model.predict(x) == y).sum()
    return int(correct) / len(images.x)


def _attacked(surrogate: torch.nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    objective = attack_loss("ce", y)
    return ascend(lambda z: objective(surrogate(z)), x, threat, steps=STEPS, rel_step_size=REL_STEP_SIZE)


class BestEpoch:
    """The epoch with the best validation accuracy (the first of equal ones), with a copy of its weights and buffers."""

    def __init__(self) -> None:
        self.best_epoch, self.best, self.last = 0, -1.0, -1.0
        self.sudden_drop_epoch: int | None = None
        self.state: dict[str, Tensor] = {}

    def offer(self, epoch: int, accuracy: float, state: dict[str, Tensor]) -> None:
        """Copy `state` if `accuracy` (in [0,1]) is the best so far; record the first sudden drop."""
        self.last = accuracy
        if accuracy > self.best:
            self.best_epoch, self.best = epoch, accuracy
            self.state = {name: value.detach().clone() for name, value in state.items()}
        elif self.sudden_drop_epoch is None and accuracy < self.best - DROP:
            self.sudden_drop_epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """All accuracies so far and the weights of the best epoch, for checkpoints."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        vars(self).update(state)

    def metrics(self) -> dict[str, Any]:
        """Metrics for the record; `sudden_drop_epoch` is the first epoch that far below the best, or None."""
        return {
            "best_epoch": self.best_epoch,
            "best_validation": self.best,
            "last_validation": self.last,
            "sudden_drop_epoch": self.sudden_drop_epoch,
        }
