"""The inner maximization that adversarial training methods share: x' = argmax_{x' in B(x, eps)} l(f(x'), y)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Gt
from torch import Tensor, nn

from bench.core.classifier import BatchNormMode, frozen
from bench.core.defense import Batch, Defense
from bench.core.pgd import Start, ascend, attack_loss, check_reach


@dataclass
class AdversarialTraining(Defense):
    """Base of the defenses whose adversarial images come from projected gradient ascent (Madry et al. 2018).

    A subclass defines `loss`, and `objective` where the ascent maximizes something else than cross-entropy to the true
    label. It repeats a setting below to change its default, and its explanation with it.
    """

    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2")
    adaptive_attacks: ClassVar[str] = "standard attacks are adaptive: a plain differentiable net is deployed"
    supports_recipe: ClassVar[tuple[str, ...]] = ("label_smoothing", "bf16", "fp16")
    test_settings: ClassVar[dict[str, Any]] = {"steps": 2, "rel_step_size": 0.5}

    steps: Annotated[int, Gt(0)] = 10
    """Gradient steps of the inner maximization."""
    rel_step_size: Annotated[float, Gt(0)] = 0.25
    """Step size in units of eps."""
    start: Start = "uniform"
    """First iterate: uniform in the ball, 0.001 N(0,1) around the image, or the image itself (zero)."""
    attack_bn_mode: BatchNormMode = "eval"
    """BatchNorm during the attack: running statistics (eval), batch statistics (train), or batch statistics without
    an update of the running ones (train_frozen_stats)."""

    def __post_init__(self) -> None:
        check_reach(self.steps, self.rel_step_size)

    def objective(self, target: nn.Module, batch: Batch) -> Callable[[Tensor], Tensor]:
        """What the ascent maximizes: a map from logits (b k) to a loss for each image (b).

        `target` is the network under attack, with frozen parameters. Default: cross-entropy to the true label.
        """
        return attack_loss("ce", batch.y)

    def inner(self, net: nn.Module, batch: Batch) -> Any:
        """Adversarial images (b c h w): the last iterate of projected gradient ascent on `objective`."""
        with frozen(net, self.attack_bn_mode) as target:
            objective = self.objective(target, batch)
            return ascend(
                lambda x: objective(target(x)),
                batch.x,
                self.threat,
                steps=self.steps,
                rel_step_size=self.rel_step_size,
                start=self.start,
            )
