"""min_w kappa CE(f(x), y) + (1 - kappa) CE(-m, y),  m = beta m_CROWN + (1 - beta) m_IBP <= z_y - z  on B(x, eps)

CROWN-IBP (Zhang et al. 2020, arXiv 1906.06316): bounds in front of each activation by interval arithmetic in one
forward pass; from them a line above and one below each ReLU; the margins as a linear function of the image by one
backward pass through these lines, and its minimum over the ball. At the start of training m_CROWN is the tighter bound
by far; the nets that result have tight intervals, so beta falls from 1 to 0 over the ramp of eps, and interval bounds
certify them.

The line below an open ReLU has slope 1 or 0, whichever leaves the smaller area (CROWN's adaptive choice). Activations
other than ReLU pass the constants of their box, and a max-pool whose winner is open passes its largest upper bound.
eps, kappa and the start are as in `ibp`; the paper has kappa 1 to 1/2, or 0 throughout, and 200 epochs on MNIST.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from bench.noise.interval import Run, margins
from defenses._certified import CertifiedTraining


@dataclass
class CrownIBP(CertifiedTraining):
    """Training on linear bounds of K - 1 margins. Costs 3 (K + 2) forward passes F an image on the ramp, then 9F."""

    cost: ClassVar[str] = "9F to 3 (K + 2) F"
    revision: ClassVar[int] = 1
    recipe: ClassVar[dict[str, Any]] = {
        "optimizer": "adam",
        "lr": 5e-4,
        "weight_decay": 0.0,
        "schedule": "step",
        "epochs": 200,
        "batch_size": 256,
    }

    def bounds(self, found: Run, y: Tensor, share: float) -> Tensor:
        interval = margins(found, y, "interval")
        if share == 1:
            return interval
        return (1 - share) * margins(found, y, "crown") + share * interval
