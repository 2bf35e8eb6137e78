"""min_w E[ max_{||d|| <= eps} CE(f(x), y) + <d, grad_x CE(f(x), y)> ] = min_w E[ CE(f(x), y) + eps * ||grad_x CE||_* ]

Robust training with a linearized inner problem (Shaham et al. 2018, arXiv 1511.05432): the maximum over the ball of
the loss to first order, which is eps times the dual norm of its gradient (Linf -> L1, L2 -> L2, L1 -> Linf).

`alternate` is the paper's scheme, one ascent step to the maximizer d* and one descent step there for each update;
`penalty` minimizes the right-hand side itself, by differentiating the gradient (`input_gradient_penalty` at x). They
agree to O(eps^2), in loss and gradient. The norm is taken image by image. d* is clipped to [0,1] in `alternate` only:
the penalty knows no box. Where BatchNorm trains, the penalty holds the batch's statistics constant, which costs a
second pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from bench.core.classifier import BatchNormMode, frozen
from bench.core.defense import Batch, Defense, Losses
from bench.core.pgd import ascend, attack_loss
from defenses._input_gradients import penalized_cross_entropy


@dataclass
class RobustTraining(Defense):
    """The first-order worst case. `alternate` costs 5F an image, `penalty` 6F, or 9F where BatchNorm trains."""

    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2", "L1")
    cost: ClassVar[str] = "5F"
    adaptive_attacks: ClassVar[str] = "standard attacks are adaptive: a plain differentiable net is deployed"
    revision: ClassVar[int] = 1
    supports_recipe: ClassVar[tuple[str, ...]] = ("label_smoothing", "bf16", "fp16")

    variant: Literal["alternate", "penalty"] = "alternate"
    """Train at the maximizer of the linearized loss, or on the linearized loss itself (double backpropagation)."""
    attack_bn_mode: BatchNormMode = "eval"
    """BatchNorm during the ascent step of `alternate`: running statistics (eval), batch statistics (train), or these
    with no trace left."""

    def inner(self, net: nn.Module, batch: Batch) -> Tensor:
        """x + d*, one full step along the dual vector of the gradient, clipped to the box; x itself for `penalty`."""
        if self.variant == "penalty":
            return batch.x
        objective = attack_loss("ce", batch.y)
        with frozen(net, self.attack_bn_mode) as target:
            return ascend(
                lambda x: objective(target(x)), batch.x, self.threat, steps=1, rel_step_size=1.0, start="zero"
            )

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean cross-entropy at `adv`; for `penalty` also eps times the mean dual norm of the input gradient."""
        if self.variant == "alternate":
            return {"ce": F.cross_entropy(net(adv), batch.y, label_smoothing=batch.smoothing)}
        return penalized_cross_entropy(net, batch, batch.x, self.threat)
