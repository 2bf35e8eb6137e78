"""min_w E[ CE(f(x + sigma N(0, I)), y) ], deployed as argmax_c P(f(x + sigma N(0, I)) = c)

Randomized smoothing (Cohen et al. 2019, arXiv 1902.02918): training on Gaussian noise, prediction by a vote of noisy
passes that abstains where the lead is not significant, and a certificate of L2 robustness.

One fresh draw for each image and step; the noise is added in pixel space, before normalization, and not clipped. The
deployed vote takes 100 draws (the paper's PREDICT leaves the number open); `certify` draws its own. The paper has sigma
.12, .25, .5 and 1, alpha .001. Its rate drops every 30 of 90 epochs, that of `recipe` at half and three quarters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Gt, Lt
from torch import Tensor, nn

from bench.core.defense import Batch, Defense, Losses
from bench.core.smoothing import Smoothed


@dataclass
class Smoothing(Defense):
    """Gaussian augmentation and a vote. Costs 3 forward passes F an image in training, n_vote at prediction."""

    uses_threat: ClassVar[bool] = False
    predictor: ClassVar[str] = "smoothed"
    cost: ClassVar[str] = "3F"
    adaptive_attacks: ClassVar[str] = "closed_form, eot"
    revision: ClassVar[int] = 1
    supports_recipe: ClassVar[tuple[str, ...]] = ("label_smoothing", "bf16", "fp16")
    recipe: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 1e-4,
        "schedule": "step",
        "epochs": 90,
        "batch_size": 400,
    }
    test_settings: ClassVar[dict[str, Any]] = {"n_vote": 20}

    sigma: Annotated[float, Gt(0)] = 0.25
    """Standard deviation of the noise in training and in the vote, in pixel units ([0,1])."""
    n_vote: Annotated[int, Gt(0)] = 100
    """Draws of the deployed vote."""
    alpha: Annotated[float, Gt(0), Lt(1)] = 0.001
    """Probability that the deployed vote returns another class than the ideal vote."""

    def inner(self, net: nn.Module, batch: Batch) -> Tensor:
        """The images under one fresh draw of noise each; no adversary takes part."""
        return batch.x + self.sigma * torch.randn_like(batch.x)

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean cross-entropy on the noisy images `adv`."""
        return {"ce": F.cross_entropy(net(adv), batch.y, label_smoothing=batch.smoothing)}

    def deploy(self, net: nn.Module) -> Smoothed:
        """The smoothed classifier with the noise of training."""
        return Smoothed(net, self.sigma, self.n_vote, self.alpha)
