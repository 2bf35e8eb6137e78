"""The defenses that differentiate an input gradient, on nets with each activation: by finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import NONE, threat

from bench.core.defense import Batch, Defense
from bench.models import lenet5
from bench.models.common import Activation, Inputs
from defenses.dual_margin import DualMargin
from defenses.input_gradient_penalty import InputGradientPenalty
from defenses.jacobian_penalty import JacobianPenalty
from defenses.noisy import Noisy
from defenses.robust_training import RobustTraining

DEFENSES: dict[str, Defense] = {
    "noisy": Noisy(NONE, sigma=0.5, probes=0),
    "noisy diag": Noisy(NONE, sigma=0.5, structure="diag"),
    "noisy adjoint": Noisy(NONE, sigma=0.5, structure="adjoint", probes=0),
    "noisy ungated": Noisy(NONE, sigma=0.5, structure="ungated", probes=0),
    "jacobian_penalty": JacobianPenalty(NONE, lam=0.3, probes=0),
    "input_gradient_penalty": InputGradientPenalty(threat(), strength=2.0),
    "dual_margin": DualMargin(threat()),
    "dual_margin L2": DualMargin(threat("L2")),
    "robust_training": RobustTraining(threat(), variant="penalty"),
}


@pytest.mark.parametrize("name", DEFENSES)
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "softplus"])
def test_the_gradient_in_the_weights(name: str, activation: Activation) -> None:
    """Of the whole loss along a random direction of all weights, in float64."""
    torch.manual_seed(0)
    defense = DEFENSES[name]
    net: Any = defense.wrap(lenet5.build(Inputs(1, 14, 4, (0.5,), (0.5,)), activation=activation)).double()
    data = Batch(torch.rand(3, 1, 14, 14, dtype=torch.float64), torch.tensor([0, 1, 2]), torch.arange(3), 0, 0.5)
    weights = [p for p in net.parameters() if p.requires_grad]
    way = [torch.randn_like(w) for w in weights]

    def value() -> torch.Tensor:
        return torch.stack(list(defense.loss(net, data, data.x).values())).sum()

    slopes = torch.autograd.grad(value(), weights)
    exact = sum(float((s * d).sum()) for s, d in zip(slopes, way, strict=True))
    ends = []
    for step in (1e-7, -2e-7):
        for w, d in zip(weights, way, strict=True):
            w.data.add_(d, alpha=step)
        ends.append(float(value().detach()))
    assert exact != 0
    assert (ends[0] - ends[1]) / 2e-7 == pytest.approx(exact, rel=1e-4)
