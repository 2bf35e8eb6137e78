"""min_w E_n[CE(f(x; z + s n), y)], n ~ N(0, I), by draws

Sampled noise injection: the control of closed-form noise injection (Arous et al. 2023, arXiv 2312.08877), with the
same Gaussian noise at the same site, drawn by reparameterization instead of integrated, and the net deployed without.

Not a published method: it separates what the noise does from what the closed-form loss does. Unlike random
self-ensemble (Liu et al. 2018, arXiv 1712.00673) there is one site, and no noise in deployment. All draws of a batch
share one forward pass, so BatchNorm sees the noisy statistics and its buffers move once a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor, nn

from bench.core.defense import Batch, Defense, Losses
from bench.core.rng import normal_like
from bench.noise.injection import edit_site, first_weight


@dataclass
class NoisySampled(Defense):
    """Cross-entropy under sampled noise at one site."""

    uses_threat: ClassVar[bool] = False
    cost: ClassVar[str] = "3 draws F"
    adaptive_attacks: ClassVar[str] = "standard attacks are adaptive: its noise acts in training only"
    revision: ClassVar[int] = 2
    supports_recipe: ClassVar[tuple[str, ...]] = ("label_smoothing", "bf16", "fp16")
    test_settings: ClassVar[dict[str, Any]] = {"sigma": 0.3}

    sigma: Annotated[float, Gt(0)] = 0.6
    """Noise standard deviation, in units of the quantity at the site (pixels in [0,1] at the input)."""
    site: Literal["first", "input"] = "first"
    """Where the noise enters: pre-activation of the first convolution or linear layer, or the image."""
    draws: Annotated[int, Ge(1)] = 1
    """Draws an image and step; the loss is their mean."""

    def __post_init__(self) -> None:
        self._signal: Tensor | None = None  # std of the noise-free quantity at the site in the last step

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        def add_noise(z: Tensor) -> Tensor:
            self._signal = z.detach().std()
            return z + self.sigma * normal_like(z)

        x, y = batch.x.repeat(self.draws, 1, 1, 1), batch.y.repeat(self.draws)
        with edit_site(net, self.site, add_noise):
            logits = net(x)
        return {"ce": F.cross_entropy(logits, y, label_smoothing=batch.smoothing)}

    def metrics(self, net: nn.Module) -> dict[str, Tensor]:
        weight = first_weight(net)
        found = {"sigma": weight.new_tensor(self.sigma), "w1_norm": weight.norm()}
        return found if self._signal is None else {**found, "snr": self._signal / self.sigma}
