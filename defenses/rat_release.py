"""min_w (1-a) CE(p, y) + a/2 [KL(q1||p') + KL(q1'||p)] + a/4 [KL(q2||p') + KL(q2||p)] + beta KL(p||p'), p' = p(x')

RAT as released (Jin et al. 2023, CVPR, arXiv 2303.10653): what its code computes. It holds no Taylor derivative; its
"first and second order" terms are label smoothing with targets that follow the batch's class-wise gradient gaps.

From s[c] = mean_b (p_b[c] - 1[y_b = c]) sum_j h_b[j], the row sums of the last layer's gradient of CE, clean (n) and
adversarial (a): t1 = |s|, t2 = s s. G(v) subtracts min v, divides by the sum, and gives a matrix T with T[c,c] = 1 - cc
and T[c,j] = cc v_j / sum_{k != c} v_k. The targets are the rows y of G(t1n - t1a) for q1, G(t1a - t1n) for q1' and
G(t2a - t2n) for q2, all constants. q2 serves twice where q1 has a mirror image, probably a slip: `fix_q2` mirrors it.
The code has cc = .8 for 10 and .98 for 100 classes and nothing else; 1 - 2/K meets both and is used for every K. Equal
gaps, which would divide by 0, give uniform targets; `smoothing=uniform` does so always, the control of equal mass.

Differs from the code: s by the formula instead of two backward passes; two train-mode passes instead of eight (only
BatchNorm's statistics see it); the layer is `head`, whatever its name; convolutions are found by type. Its noise of
1e-4 on them is absolute and serves for x' alone. The AWP variant is awp on this with noise_std = 0: x' without noise,
plain TRADES climbed, this loss at the perturbed weights. The ResNet-18 script has second = 0.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bench.core.defense import Batch, Losses
from bench.core.pgd import kl
from bench.core.weights import shifted
from defenses._randomized_trades import RandomizedTRADES, head_inputs, noise_like


@dataclass
class RATRelease(RandomizedTRADES):
    """TRADES with batch-adaptive soft labels. Costs 2 steps + 7 forward passes F an image."""

    cost: ClassVar[str] = "(2 steps + 7) F = 27F"
    revision: ClassVar[int] = 1

    alpha: Annotated[float, Ge(0), Le(1)] = 0.2
    """Weight moved from the cross-entropy to the soft labels."""
    second: Annotated[float, Ge(0)] = 0.5
    """Weight of the second-order soft labels relative to alpha."""
    cc: Annotated[float, Ge(0), Le(1)] | None = None
    """Mass that a soft label takes from the true class; none: 1 - 2/K for K classes."""
    smoothing: Literal["gap", "uniform"] = "gap"
    """How that mass is spread over the other classes: by gradient gaps, or evenly."""
    fix_q2: bool = False
    """Mirror the second-order target for the clean output, as the first-order one is."""
    noise_std: Annotated[float, Ge(0)] = 1e-4
    """Standard deviation, absolute, of the noise on the convolutions that x' is found with."""

    def inner(self, net: nn.Module, batch: Batch) -> Tensor:
        """Adversarial images of TRADES against one copy of the net with noisy convolutions (their biases too)."""
        noisy = [p for m in net.modules() if isinstance(m, _ConvNd) for p in m.parameters()] if self.noise_std else []
        with shifted([(p, self.noise_std * noise_like(p)) for p in noisy]):
            return super().inner(net, batch)

    def ascent_loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Plain TRADES, as in the released AWP script."""
        return super().loss(net, batch, adv)

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Cross-entropy on hard labels, on first- and second-order soft labels, and the divergence."""
        with head_inputs(net) as features:
            clean, moved = net(batch.x), net(adv)
        q1, q1_mirror, q2, q2_clean = self.targets(clean, moved, features[0], features[1], batch.y)
        first = 0.5 * (_cross(q1, moved) + _cross(q1_mirror, clean))
        second = 0.5 * (_cross(q2, moved) + _cross(q2_clean, clean))
        return {
            "ce": (1 - self.alpha) * F.cross_entropy(clean, batch.y, label_smoothing=batch.smoothing),
            "first": self.alpha * first,
            "second": self.alpha * self.second * second,
            "kl": self.beta * kl(clean, moved).mean(),
        }

    @torch.no_grad()
    def targets(self, clean: Tensor, moved: Tensor, h: Tensor, h_adv: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """The constants q1, q1', q2 and q2 for the clean output, each b k, from logits b k and features b p."""
        cc = 1 - 2 / clean.shape[1] if self.cc is None else self.cc
        s_clean, s_adv = head_slope(clean, h, y), head_slope(moved, h_adv, y)
        first, second = s_clean.abs() - s_adv.abs(), s_adv.square() - s_clean.square()
        gaps = (first, -first, second, -second if self.fix_q2 else second)
        return tuple(soft_labels(gap if self.smoothing == "gap" else torch.zeros_like(gap), cc)[y] for gap in gaps)


def head_slope(logits: Tensor, h: Tensor, y: Tensor) -> Tensor:
    """s (k): the last layer's weight gradient of mean cross-entropy, summed over the features of each class."""
    return ((logits.softmax(1) - F.one_hot(y, logits.shape[1])) * h.sum(1, keepdim=True)).mean(0)


def soft_labels(gap: Tensor, cc: float) -> Tensor:
    """The matrix T (k k, rows sum to 1) of gaps (k): row c keeps 1 - cc and spreads cc by the others' gaps."""
    other = 1 - torch.eye(len(gap), dtype=gap.dtype, device=gap.device)
    share = (gap - gap.min()) * other
    total = share.sum(1, keepdim=True)
    share = torch.where(total > 0, share / total.clamp_min(torch.finfo(gap.dtype).tiny), other / (len(gap) - 1))
    return cc * share + (1 - cc) * (1 - other)


def _cross(q: Tensor, logits: Tensor) -> Tensor:
    """Mean KL(q || softmax), with 0 log 0 = 0."""
    return F.kl_div(logits.log_softmax(1), q, reduction="batchmean")
