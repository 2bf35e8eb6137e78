"""Training under Gaussian noise in closed form: what the defenses share besides the terms of their loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from bench.core.classifier import Classifier
from bench.core.defense import Batch, Defense, Losses
from bench.noise import diagnostics, losses
from bench.noise.gaussian_noise import KnownNoise, NoiseFreeDeployment, NoiseScale, constant_variance
from bench.noise.injection import first_weight
from bench.noise.logit_moments import LogitMoments, Passes, logit_moments, passes


@dataclass
class ClosedFormTraining(Defense):
    """Base of the defenses that minimize a closed form of the noisy logits' moments and deploy the net without noise.

    A subclass defines `terms` and `covariance_rows`. It repeats a setting below to change its explanation.
    """

    uses_threat: ClassVar[bool] = False
    predictor: ClassVar[str] = "deterministic"
    adaptive_attacks: ClassVar[str] = "closed_form"
    settings_added_later: ClassVar[tuple[str, ...]] = (
        "scale", "noise_at", "param", "sigma_lr", "draws", "joint", "w_ece", "check_every",
    )  # fmt: skip
    retired_settings: ClassVar[dict[str, Any]] = {
        "relu": "laplace", "scale": "absolute", "noise_at": "pre_bn", "draws": 16, "joint": "product", "w_ece": 0.0,
    }  # fmt: skip
    retired_results: ClassVar[str] = "docs/findings/noisy.md"
    test_settings: ClassVar[dict[str, Any]] = {"sigma": 0.3}

    sigma: Annotated[float, Gt(0)] = 0.6
    """Noise standard deviation s, in units of the quantity at the site (pixels in [0,1] at the input)."""
    learn_sigma: bool = False
    """Train s too, with a learning rate of its own and without weight decay."""
    param: Literal["softplus", "exp"] = "softplus"
    """How a learned s stays positive; exp makes its steps proportional to s."""
    sigma_lr: Annotated[float, Gt(0)] = 0.1
    """Learning rate of s relative to that of the weights."""
    site: Literal["first", "input"] = "first"
    """Where the noise enters: the output of the first convolution or linear layer, or the image."""
    structure: Literal["jacobian", "diag", "adjoint", "ungated"] = "jacobian"
    """Covariance of the logits: s^2 J J^T, element-wise variances, their backward recursion, or that recursion with
    every activation's slope set to 1 (the literal Laplace reading)."""
    check_every: Annotated[int, Ge(0)] = 2
    """Compare the closed form with 256 noise draws on 64 images at the end of every so many epochs; 0 = never."""

    def __post_init__(self) -> None:
        self._last: Batch | None = None  # the images of the log
        self._floored: Tensor | None = None  # share of rivals in the last step whose variance q is at its floor

    def terms(
        self, net: nn.Module, x: Tensor, y: Tensor, sigma: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, LogitMoments]:
        """The weighted terms of the loss (b each) at noise scale `sigma`, q of each rival (r b), and the moments."""
        raise NotImplementedError(f"{type(self).__name__} must define terms")

    def covariance_rows(self, classes: int) -> int:
        """Rows of the logits' covariance that `terms` reads, for the cost of an attack on the loss."""
        raise NotImplementedError(f"{type(self).__name__} must define covariance_rows")

    def moments(self, net: nn.Module, x: Tensor, sigma: Tensor) -> LogitMoments:
        """Moments of the logits of images `x` (b c h w) at noise scale `sigma`."""
        return logit_moments(net, x, [constant_variance(sigma)], [self.site], self.structure)

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """The mean over the batch of each term."""
        terms, q, _ = self.terms(net, batch.x, batch.y, scale(net))
        self._last, self._floored = batch, (q.detach() < losses.Q_MIN).float().mean()
        return {name: value.mean() for name, value in terms.items()}

    def wrap(self, net: nn.Module) -> nn.Module:
        net.noise = NoiseScale(self.sigma, self.learn_sigma, self.param)
        return net

    def param_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        own = list(net.noise.parameters())  # type: ignore[union-attr]
        rest = [p for p in net.parameters() if not any(p is q for q in own)]
        return [{"params": rest}, *([{"params": own, "lr_scale": self.sigma_lr, "weight_decay": 0.0}] if own else [])]

    def deploy(self, net: nn.Module) -> Classifier:
        """The noise-free net, which still gives an adaptive attack the noise and the loss of its training."""
        return NoiseFreeDeployment(net, self)

    def known_noise(self, net: nn.Module) -> KnownNoise:
        """The noise at its present scale."""
        return KnownNoise(net, [constant_variance(scale(net))], [self.site])

    def closed_form_loss(self, net: nn.Module, x: Tensor, y: Tensor, factor: float) -> tuple[Tensor, Passes]:
        """The sum of the weighted terms for each image (b) with `factor` times the noise, and its cost."""
        terms, _, moments = self.terms(net, x, y, factor * scale(net))
        rows = self.covariance_rows(moments.mean.shape[1])
        return torch.stack(list(terms.values())).sum(0), passes(self.structure, rows)

    def metrics(self, net: nn.Module) -> dict[str, Tensor]:
        """sigma and ||W1|| at the end of an epoch; after a step also floor_hits and bench.noise.diagnostics."""
        found = {"sigma": scale(net).detach(), "w1_norm": first_weight(net).norm()}
        if self._last is None or self._floored is None:
            return found
        draws = self.check_every > 0 and (self._last.epoch + 1) % self.check_every == 0
        return found | {"floor_hits": self._floored} | diagnostics.measure(self, net, self._last, found["sigma"], draws)


def scale(net: nn.Module) -> Tensor:
    """The noise scale s that a wrapped net stores, a scalar."""
    assert isinstance(net.noise, NoiseScale)
    return net.noise.sigma()
