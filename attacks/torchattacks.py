"""x' = torchattacks.METHOD(f, eps, ...)(x, y)

Torchattacks (Kim 2020, arXiv 2010.01950), version 3.5: any image attack of that package, as a second opinion beside
our own. Each counts as what it is there: some bound the perturbation by eps, some look for the smallest one.

Differs from calling the package: eps is the threat's; `alpha`, fixed there for 8/255, becomes 2.5 eps / steps unless
given, and SPSA's `lr` is at least 2.5 eps / nb_iter; seed and number of classes are set, JSMA's target class too; the
mode of every submodule is restored (the package leaves all in train mode); prints are muted. Gray images go as the
first of three channels where a kernel has three. CW starts 1e-6 inside the box, where its gradient is not 0, and CW and
EAD see logits shifted to be positive, which they require. A minimal-norm attack is scored as accuracy at eps:
an image found outside the ball is not broken; those that count pixels (L0) are measured in the threat's norm. Its
AutoAttack, APGD, FAB and Square are not those of their authors, which `autoattack` runs.
"""

from __future__ import annotations

import contextlib
import difflib
import io
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attacks._torchattacks import BOUNDED, L0, MINIMAL, POSITIVE, REFUSED, THREE, ModelAdapter, build, check, modes_kept
from bench.core.attack import Attack, Columns, Context
from bench.core.classifier import Classifier, predicted


@dataclass
class TorchAttacks(Attack):
    """One attack of torchattacks. Column `distance` (minimal-norm methods): size of what was found, else inf; and
    `pixels` (those that count pixels): how many of them changed, else inf."""

    cost: ClassVar[str] = "4F to 200F"
    revision: ClassVar[int] = 2
    needed_classes: ClassVar[dict[str, int]] = {"APGDT": 4, "dlr": 3}
    test_settings: ClassVar[dict[str, Any]] = {"method": "MIFGSM", "kwargs": {"steps": 2}}

    method: str = "MIFGSM"
    """Name of the attack as in the package: FGSM, MIFGSM, DIFGSM, PGDL2, CW, DeepFool, ..."""
    kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Arguments of its constructor other than model, norm and eps; the package's defaults otherwise."""

    def __post_init__(self) -> None:
        known = [*BOUNDED, *MINIMAL, *REFUSED]
        if self.method not in known:
            near = difflib.get_close_matches(self.method.upper(), known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"torchattacks has no attack '{self.method}'{hint}")
        if self.method not in REFUSED:
            check(self.method, self.kwargs)
            # each method has its own norms; the class lists all of them, for the planner reads its source
            vars(self)["norms"] = BOUNDED.get(self.method) or MINIMAL[self.method]

    def unsupported_reason(self, model: Classifier) -> str | None:
        if self.method in REFUSED:
            return f"{self.method} {REFUSED[self.method]}"
        reason = super().unsupported_reason(model)
        return f"{self.method}: {reason}" if reason else None

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        """What the attack returns; for minimal-norm ones only what lies inside the ball, and `distance`."""
        reason = REFUSED.get(self.method)
        if reason:
            raise ValueError(f"{self.method} {reason}")
        with modes_kept(model), contextlib.redirect_stdout(io.StringIO()):
            with torch.no_grad():
                classes = model(x[:1]).shape[1]
            found = self._found(model, x, y, classes, ctx.seed % 2**31)
            if self.method not in MINIMAL:
                return found, {}
            with torch.no_grad():
                broken = predicted(model(found)) != y
        size = self.threat.norm_of(found - x)
        broken &= size.isfinite()
        inside = broken & (size <= self.threat.radius)
        x_adv = torch.where(inside.view(-1, *[1] * (x.dim() - 1)), found, x)
        columns = {"distance": torch.where(broken, size, float("inf"))}
        if self.method in L0:
            pixels = (found != x).any(1).flatten(1).sum(1).to(size)
            columns["pixels"] = torch.where(broken, pixels, float("inf"))
        return x_adv, columns

    def _found(self, model: nn.Module, x: Tensor, y: Tensor, classes: int, seed: int) -> Tensor:
        """What the package gives for the model and images as this method needs them."""
        gray = self.method in THREE and x.shape[1] == 1
        if self.method in THREE and x.shape[1] not in (1, 3):
            raise ValueError(f"{self.method} needs images of 1 or 3 channels, got {x.shape[1]}")
        seen = ModelAdapter(model, gray, self.method in POSITIVE).eval()
        eps = self.threat.radius
        if self.method in MINIMAL:  # of those only FAB takes eps, as the largest that it reports
            eps = self.threat.norm_of(torch.ones_like(x[:1])).item()
        attack = build(self.method, self.kwargs, seen, self.threat.norm, eps, seed, classes)
        attack.set_device(x.device)
        if self.method == "JSMA":  # the class after the true one of ten is what it aims at by itself
            attack.set_mode_targeted_by_function(lambda _, labels: (labels + 1) % classes, quiet=True)
        images = x.expand(-1, 3, -1, -1) if gray else x
        images = images.clamp(1e-6, 1 - 1e-6) if self.method == "CW" else images.clone()
        found: Tensor = attack(images, y).detach()
        return found[:, :1] if gray else found
