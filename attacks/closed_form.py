"""x_{t+1} = Pi(x_t + a * argmax_{||d|| <= 1} <grad_x L(m(x_t), S(x_t), y), d>), m + N(0, S) = logits under the noise

Attack through the closed form of a random model: projected gradient ascent (Madry et al. 2018, arXiv 1706.06083) on a
loss of the analytic mean m and covariance S of the noisy logits, an idea of Arous et al. (2023, arXiv 2312.08877). One
gradient stands for the average over draws of expectation over transformation (EOT, Athalye et al. 2018, arXiv
1707.07397). The noise must be Gaussian at known sites: on the image (smoothing), before layers (rse), on weights (pni).
A net deployed without its training noise (noisy) is attacked through that noise and evaluated without it.

m and S come from moments (exact rectified ones, as in assumed density filtering) or from the noise-free net's Jacobian.
Noise on weights is shared by all positions of a convolution: adjoint and jacobian keep that correlation to first order,
diag ignores it, like every other correlation. Reconstruction: losses, defaults and structure are ours.

For a stochastic model the iterate of highest loss L is used, because one misclassified draw may be chance. A
deterministic model classifies each iterate, for one forward pass more.

Passes a step, forward + backward, by the work of convolutions and matrix products (r: `rivals`, all K - 1 for 0; K for
ece_bound): diag 2 + 2, adjoint 2 + (2 + 3r), jacobian 1 + (1 + 3r); with noise on weights 3 + 3, 4 + (4 + 6r) and
1 + (1 + 6r). An EOT step of S draws is S + S.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from bench.core.attack import Attack, Columns, Context
from bench.core.classifier import Classifier, Counted, predicted
from bench.core.pgd import Best, Start, check_reach, start_delta
from bench.noise import losses as expected
from bench.noise.gaussian_noise import NoiseFreeDeployment, known_noise
from bench.noise.logit_moments import LogitMoments, passes

_Objective = Callable[[Tensor, Tensor], Tensor]  # images, labels -> loss of each


@dataclass
class ClosedForm(Attack):
    """Projected gradient attack on the closed form of a model's noise."""

    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2")
    uses_noise_model: ClassVar[bool] = True
    cost: ClassVar[str] = "(6 steps (1 + rivals) restarts + 2) F = 242F"
    revision: ClassVar[int] = 1
    test_settings: ClassVar[dict[str, Any]] = {"steps": 3, "rel_step_size": 0.5, "restarts": 2}

    steps: Annotated[int, Gt(0)] = 20
    """Gradient steps of each restart."""
    rel_step_size: Annotated[float, Gt(0)] = 0.1
    """Step size in units of eps."""
    restarts: Annotated[int, Gt(0)] = 1
    """Random restarts; the strongest iterate of all counts."""
    loss: Literal["margin", "log_win", "ece_bound", "training"] = "margin"
    """What is maximized: the largest expected margin in units of its standard deviation, -log of the probability that
    the true class wins, a bound of the expected cross-entropy, or the loss that the model itself was trained on."""
    structure: Literal["auto", "diag", "adjoint", "jacobian"] = "auto"
    """Covariance of the logits: element-wise, by backward recursion, or from the noise-free Jacobian, whose mean is the
    noise-free net; auto: adjoint, and jacobian where that net is deployed. loss=training has that of the training."""
    rivals: Annotated[int, Ge(0)] = 1
    """Strongest other classes in margin and log_win; 0 = all."""
    noise: Annotated[float, Ge(0)] = 1.0
    """Factor on every standard deviation of the noise; 0 is the noise-free net."""
    start: Start = "uniform"
    """First iterate: uniform in the ball, 0.001 N(0,1) around the image, or the image itself."""

    def __post_init__(self) -> None:
        check_reach(self.steps, self.rel_step_size)
        if self.start == "zero" and self.restarts > 1:
            raise ValueError("start=zero makes all restarts equal; use start=uniform or restarts=1")

    def unsupported_reason(self, model: Classifier) -> str | None:
        reason = super().unsupported_reason(model)
        if reason is None and known_noise(model) is None:
            return "no Gaussian noise at known sites"
        if reason is None and self.loss == "training" and not isinstance(model, NoiseFreeDeployment):
            return "was not trained on a closed-form loss"
        return reason

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        """The strongest iterate of each sample over all restarts; no further columns."""
        counted = model if isinstance(model, Counted) else Counted(model)
        objective = self._objective(counted)
        best = Best(x)
        for restart in range(self.restarts):
            rows = (~best.wrong).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            self._climb(counted, objective, x[rows], y[rows], best, rows)
            note = "" if counted.stochastic else f"{int(best.wrong.sum())} of {len(x)} broken"
            ctx.report(restart + 1, self.restarts, note)
        return best.x_adv, {}

    def _climb(self, model: Counted, objective: _Objective, x: Tensor, y: Tensor, best: Best, rows: Tensor) -> None:
        """One restart on the samples `rows`, offering every iterate to `best`."""
        threat, step_size = self.threat, self.rel_step_size * self.threat.radius
        x_adv = threat.project_to_image(x, x + start_delta(self.start, x, threat))
        wrong = torch.zeros_like(y, dtype=torch.bool)  # of a stochastic model: unknown
        for step in range(self.steps + 1):
            last = step == self.steps
            x_adv.requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                loss = objective(x_adv, y)
            point = x_adv.detach()
            if not model.stochastic:
                with torch.no_grad():
                    wrong = predicted(model(point)) != y
            best.update(point, loss.detach(), wrong, rows)
            if not last:
                (grad,) = torch.autograd.grad(loss.sum(), x_adv)
                x_adv = threat.project_to_image(x, point + step_size * threat.steepest_direction(grad))

    def _objective(self, model: Counted) -> _Objective:
        """The loss of a model that the attack applies to (`unsupported_reason`); it counts its passes itself."""
        target, noise = model.model, known_noise(model.model)
        if noise is None:
            raise ValueError("no Gaussian noise at known sites")
        structure = self.structure
        if structure == "auto":
            structure = "jacobian" if isinstance(target, NoiseFreeDeployment) else "adjoint"

        def objective(x: Tensor, y: Tensor) -> Tensor:
            if self.loss == "training":
                assert isinstance(target, NoiseFreeDeployment)  # by unsupported_reason
                loss, cost = target.training_noise.closed_form_loss(target.net, x, y, self.noise)
            else:
                moments = noise.moments(x, structure, "laplace" if structure == "jacobian" else "adf", self.noise)
                loss, rows = self._loss(moments, y)
                cost = passes(structure, rows, noise.on_weights)
            backwards = cost.value + (cost.gradient if x.requires_grad else 0)
            model.spend(cost.forwards * len(x), backwards * len(x))
            return loss

        return objective

    def _loss(self, moments: LogitMoments, y: Tensor) -> tuple[Tensor, int]:
        """The loss of each image, shape b, and how many rows of the covariance it read."""
        mean = moments.mean
        if self.loss == "ece_bound":
            return expected.cross_entropy_bound(mean, moments.covariance(), y), mean.shape[1]
        rivals = expected.competitors(mean, y, self.rivals)
        q = moments.quadratic(expected.pair_rows(mean, y, rivals))
        loss = expected.margin_ratio if self.loss == "margin" else expected.log_joint_loss
        return loss(mean, q, y, rivals), rivals.shape[1]
