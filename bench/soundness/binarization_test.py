"""C19: binarization test. A head on the model's features has a known adversarial point; the attack has to find it.

After Zimmermann et al. 2022 (arXiv 2206.13991). For each image a two-class head on the input of the last linear layer
predicts 1 beyond a threshold along the direction from the features of random points in the ball to those of one point
at its border, and 0 before it. Only that one point is beyond it, so an adversarial point exists, and random search does
not find it. Theirs is fitted by logistic regression; here the direction is that of the two means, which needs no fit
and gives the same guarantee, checked for each image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from attacks.pgd import PGD
from bench.core.attack import Context
from bench.core.classifier import frozen, predicted
from bench.core.rng import scope, seed
from bench.core.threat import Threat
from bench.soundness.audit import BLOCK, LOSSES, Audit, first_line
from bench.soundness.checks import Check, Finding, NotMeasured
from bench.terminal import counted

INNER = 32  # random points in the ball that the head classifies as 0
CLOSE = 0.9  # position of the threshold between the best random point (0) and the known one (1)


class _Head(nn.Module):
    """Logits of two classes, `b 2`, from the input of the last linear layer of `model`, for a fixed batch."""

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.model, self.layer = model, layer
        self.origin = self.direction = self.threshold = torch.zeros(())

    def features(self, x: Tensor) -> Tensor:
        """Input of the layer when it runs last, `b d`; where it runs for parts of the batch, of all of them in turn."""
        seen: list[Tensor] = []
        with self.layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0])):
            self.model(x)
        parts = seen[-1:] if seen and len(seen[-1]) == len(x) else seen
        if not parts or any(part.dim() != 2 for part in parts) or sum(map(len, parts)) != len(x):
            raise NotMeasured("the last linear layer does not see one row of features for each image")
        return torch.cat(parts)

    def fit(self, x: Tensor, threat: Threat) -> Tensor:
        """Choose one point for each image; returns for which images (bool, shape b) the guarantee holds."""
        with torch.no_grad():
            points = [x, *(threat.project_to_image(x, x + threat.sample(x)) for _ in range(INNER))]
            inner = torch.stack([self.features(point) for point in points])  # 1 + INNER, b, d
            known = self.features(border(x, threat))
            self.origin = inner.mean(0)
            toward = known - self.origin
            self.direction = toward / toward.square().sum(1, keepdim=True).clamp_min(1e-20)  # the known point scores 1
            best = ((inner - self.origin) * self.direction).sum(2).amax(0)
            self.threshold = best + CLOSE * (1 - best)
        return (best < 1) & (toward.abs().amax(1) > 0)

    def forward(self, x: Tensor) -> Tensor:
        score = ((self.features(x) - self.origin) * self.direction).sum(1) - self.threshold
        return torch.stack([-score, score], dim=1)


def finds_known_points(check: Check, audit: Audit) -> Iterator[Finding]:
    """C19: PGD on cross-entropy or on the margin finds the known adversarial point of nearly every image."""
    audit.require_deterministic()
    threat, limit = audit.largest, 256 if audit.level == "quick" else 512
    if threat.norm not in PGD.norms:
        raise NotMeasured(f"pgd has no {threat.norm} version")
    hits = sure = 0
    with frozen(audit.model), scope(seed(audit.seed, "planted")):
        surrogate = audit.model.surrogate()
        head = _Head(surrogate, last_linear(surrogate, audit.x[:1]))
        for x in audit.x[:limit].split(BLOCK):
            holds = head.fit(x, threat)
            hits, sure = hits + int((holds & _broken(audit, head, x, threat)).sum()), sure + int(holds.sum())
    if sure < min(limit, len(audit.x)) / 2:
        raise NotMeasured(f"only {counted(sure, 'image')} with a known point: the features hardly change in the ball")
    yield check.finding(hits / sure, failure=f"{hits} of {counted(sure, 'known point')} found", eps=str(threat.eps))


def _broken(audit: Audit, head: _Head, x: Tensor, threat: Threat) -> Tensor:
    """Images whose head PGD fools, shape b. One restart: the heads belong to the rows of the whole batch."""
    y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    broken = y.bool()
    for loss in LOSSES:
        attack = PGD(threat, steps=audit.steps // 2, rel_step_size=0.1, loss=loss)
        try:
            found, _ = attack.perturb(head, x, y, Context(seed(audit.seed, "planted", loss)))
            threat.check(x, found)
        except (RuntimeError, ValueError) as error:
            raise NotMeasured(f"the attack failed: {first_line(error)}") from None
        with torch.no_grad():
            broken |= predicted(head(found)) != y
    return broken


def border(x: Tensor, threat: Threat) -> Tensor:
    """A random point as far out as ball and box allow: a corner (Linf), else a random direction at length eps."""
    push = torch.randn_like(x)
    if threat.norm == "Linf":
        push = push.sign()
    size = threat.norm_of(push).clamp_min(1e-12).view(-1, *[1] * (x.dim() - 1))
    return threat.project_to_image(x, x + push * (threat.radius / size))


def last_linear(model: nn.Module, x: Tensor) -> nn.Module:
    """The linear layer that runs last. Raises NotMeasured where there is none."""
    ran: list[nn.Module] = []
    with ExitStack() as hooks, torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                hooks.enter_context(layer.register_forward_hook(lambda layer, args, out: ran.append(layer)))
        model(x)
    if not ran:
        raise NotMeasured("the model has no linear layer to read features from")
    return ran[-1]
