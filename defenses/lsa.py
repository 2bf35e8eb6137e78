"""min_w E[ CE(f(x + r), y) ], r = eps dual vector of grad(z_k - z_y), k = argmin_j (z_y - z_j) / ||grad(z_y - z_j)||_*

Learning with a strong adversary (Huang et al. 2015, arXiv 1511.03034): the class scores, not the loss, are linearized;
the adversary goes for the class whose linear boundary is nearest in the threat's norm. Training on x + r alone.

`linearise=loss` is the paper's simpler adversary, the dual vector of the loss gradient. A misclassified image has a
negative distance and is moved on toward the worst class. Ours, as the details were not read: eval mode during the
attack, x + r clipped to [0,1], the budgets. The K - 1 products run one after the other: a batched (vmap) backward was
slower on CPU, see bench.noise.logit_moments. `layer=head` perturbs the input of `net.head` instead, in the training
pass itself, at almost no cost; nothing but weight decay then stops a net from outgrowing the constant budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from bench.core.classifier import BatchNormMode, frozen
from bench.core.defense import Batch, Defense, Losses
from bench.noise.losses import competitors, pair_rows


@dataclass
class LSA(Defense):
    """Nearest linearized boundary. Costs K + 3 forward passes F an image, 5 (loss) or 3 (head)."""

    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2", "L1")
    cost: ClassVar[str] = "(K + 3) F"
    adaptive_attacks: ClassVar[str] = "standard attacks are adaptive: a plain differentiable net is deployed"
    revision: ClassVar[int] = 1
    supports_recipe: ClassVar[tuple[str, ...]] = ("label_smoothing", "bf16", "fp16")

    linearise: Literal["scores", "loss"] = "scores"
    """What the adversary takes to first order: each class score, or the loss."""
    layer: Literal["input", "head"] = "input"
    """What is perturbed: the image, or the representation that enters `net.head`."""
    head_eps: Annotated[float, Ge(0)] = 0.1
    """Budget where layer=head, in units of the representation and in the threat's norm; eps bounds the image only."""
    attack_bn_mode: BatchNormMode = "eval"
    """BatchNorm during the attack on the image: running statistics (eval), batch statistics (train), or these with no
    trace left."""

    def check(self, net: nn.Module, x: Tensor, classes: int) -> None:
        if self.layer == "head" and not isinstance(getattr(net, "head", None), nn.Module):
            raise ValueError(f"{type(net).__name__} has no layer 'head' to perturb the input of; use layer=input")

    def inner(self, net: nn.Module, batch: Batch) -> Tensor:
        """x + r in ball and box; x itself where the representation is perturbed."""
        if self.layer == "head":
            return batch.x
        with frozen(net, self.attack_bn_mode) as target:
            push = self._push(target, batch.x, batch.y)
        return self.threat.project_to_image(batch.x, batch.x + self.threat.radius * push)

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean cross-entropy at the perturbed images, or with a perturbed representation."""
        if self.layer == "input":
            return {"ce": F.cross_entropy(net(adv), batch.y, label_smoothing=batch.smoothing)}
        head = net.head
        assert isinstance(head, nn.Module)

        def perturb(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            return args[0] + self.head_eps * self._push(head.forward, args[0], batch.y)  # no hook within the hook

        handle = head.register_forward_pre_hook(perturb)
        try:
            return {"ce": F.cross_entropy(net(adv), batch.y, label_smoothing=batch.smoothing)}
        finally:
            handle.remove()

    def _push(self, scores: Callable[[Tensor], Tensor], at: Tensor, y: Tensor) -> Tensor:
        """The perturbation of norm 1 at `at`, a constant of the same shape."""
        at = at.detach().requires_grad_()
        with torch.enable_grad():
            logits = scores(at)
            if self.linearise == "loss":
                loss = F.cross_entropy(logits, y, reduction="sum")
                return self.threat.steepest_direction(torch.autograd.grad(loss, at)[0])
            rivals = competitors(logits, y, 0)
            pairs = pair_rows(logits, y, rivals)  # e_y - e_j
            slopes = [torch.autograd.grad(logits, at, row, retain_graph=True)[0] for row in pairs]
        gaps = logits.detach().gather(1, y[:, None]) - logits.detach().gather(1, rivals)
        sizes = torch.stack([self.threat.dual_norm(slope) for slope in slopes], 1)
        nearest = (gaps / sizes.clamp_min(1e-12)).argmin(1)
        chosen = torch.stack(slopes)[nearest, torch.arange(len(y), device=y.device)]
        return self.threat.steepest_direction(-chosen)
