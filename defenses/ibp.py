"""min_w kappa CE(f(x), y) + (1 - kappa) CE(z^, y),  z^_j - z^_y >= max over B(x, eps) of z_j - z_y, by intervals

Interval bound propagation (Gowal et al. 2018, arXiv 1810.12715): a box of images goes through the layers, center and
radius through linear ones, both ends through monotone activations; the last layer is merged with the margins. The net
is trained to be right at the worst corner of what is left, so that the same bounds certify it (`interval`).

eps rises from 0 and kappa falls from 1 to 1/2, linearly over `ramp`; the paper has 2000 steps at eps 0 before its ramp
of 10 000, and trains MNIST at eps .2 for .1 and .4 for .3. From usual weights deep nets stay at a constant prediction:
`initial=small` is the start of Shi et al. (2021, arXiv 2102.06700), without their two regularizers and their added
BatchNorm. Clean images go through the net by themselves, as the center of a box behind an activation is another point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from bench.noise.interval import Run, margins
from defenses._certified import CertifiedTraining


@dataclass
class IBP(CertifiedTraining):
    """Training on interval bounds. A box costs two passes: 9 forward passes F an image."""

    cost: ClassVar[str] = "9F"
    revision: ClassVar[int] = 1
    recipe: ClassVar[dict[str, Any]] = {
        "optimizer": "adam",
        "lr": 1e-3,
        "weight_decay": 0.0,
        "schedule": "step",
        "epochs": 100,
        "batch_size": 100,
    }

    def bounds(self, found: Run, y: Tensor, share: float) -> Tensor:
        return margins(found, y, "interval")
