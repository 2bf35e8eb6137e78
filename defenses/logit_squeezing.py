"""min_w E[ CE(f(x + sigma n), (1 - a) onehot(y) + a / K) + beta * ||f(x + sigma n)||^2 ], n ~ N(0, I)

Label smoothing and logit squeezing (Shafahi et al. 2019, arXiv 1910.11585; squeezing after Kannan et al. 2018, arXiv
1803.06373): regularizers said to mimic adversarial training without adversarial images, in part with Gaussian noise.

A control, not a defense to trust: small logits flatten the loss, and attacks that climb cross-entropy then report a
robustness that stronger ones do not find (Mosbach et al. 2018, arXiv 1810.12042). The squeeze is the mean over images
of the squared L2 norm.
Only the abstract was read: the defaults are ours. Either part alone: set `beta` or `smoothing` to 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn

from bench.core.defense import Batch, Defense, Losses


@dataclass
class LogitSqueezing(Defense):
    """Soft labels and small logits. Costs 3 forward passes F an image."""

    uses_threat: ClassVar[bool] = False
    cost: ClassVar[str] = "3F"
    adaptive_attacks: ClassVar[str] = "standard attacks are adaptive: a plain differentiable net is deployed"
    revision: ClassVar[int] = 1
    supports_recipe: ClassVar[tuple[str, ...]] = ("bf16", "fp16")

    smoothing: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of the label spread evenly over all K classes (a)."""
    beta: Annotated[float, Ge(0)] = 0.05
    """Weight of the squared norm of the logits."""
    sigma: Annotated[float, Ge(0)] = 0.0
    """Standard deviation of Gaussian noise on the training images, in pixel units ([0,1]); not clipped."""

    def inner(self, net: nn.Module, batch: Batch) -> Tensor:
        """The images, under one fresh draw of noise each where sigma > 0; no adversary takes part."""
        return batch.x + self.sigma * torch.randn_like(batch.x) if self.sigma else batch.x

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean cross-entropy with soft labels, and beta times the mean squared norm of the logits."""
        logits = net(adv)
        ce = F.cross_entropy(logits, batch.y, label_smoothing=self.smoothing)
        return {"ce": ce, "squeeze": self.beta * logits.square().sum(1).mean()}
