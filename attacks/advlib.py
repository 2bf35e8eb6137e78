"""x' = argmin over z in [0,1]^d with f(z) != y of ||z - x||_q, searched by adv_lib.METHOD(f, x, y, steps)

Adversarial Library, version 0.2.8: attacks that look for the smallest perturbation. FMN (Pintor et al. 2021, arXiv
2102.12827), DDN (Rony et al. 2019, arXiv 1811.09600) and sigma-zero (Cinà et al. 2025, arXiv 2402.01879), scored here
as accuracy at eps with the median distance beside it: an image found outside the ball is not broken.

`fmn` minimizes the threat's norm, `ddn` L2; `fmn_l0` and `sigma_zero` minimize the number of changed values (L0), and
what they find is measured in the threat's norm and by its pixels.

Differs from calling the package: DDN does not round to 256 levels. Begun at the image, FMN in Linf, L2 and L1 estimates
the boundary by a tangent until it has once crossed it; on nets of ReLUs it then often ends at the boundary and never
beyond, which would count as robust. The images of a deterministic model that it leaves so are begun a second time, at
the nearest image of the block in another class, the paper's own start. FMN in L0 fails in the package once every image
of a batch is broken by one value; a last image whose class nothing changes keeps it going. The package imports visdom,
a server of plots, for a callback that is not used here; where visdom is missing it is imported without.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor, nn

from bench.core.attack import Attack, Columns, Context
from bench.core.classifier import Classifier, predicted
from bench.core.extras import imported

NORMS = {"fmn": ("Linf", "L2", "L1"), "ddn": ("L2",)}  # the others count values, whatever the threat's norm is
ORDER = {"Linf": float("inf"), "L2": 2, "L1": 1}


@dataclass
class AdvLib(Attack):
    """One minimal-norm attack of adv-lib. Column `distance`: size of what was found in the threat's norm, else inf; and
    `pixels` (`fmn_l0`, `sigma_zero`): how many of them changed, else inf."""

    cost: ClassVar[str] = "2 steps F to 4 steps F"
    revision: ClassVar[int] = 1
    test_settings: ClassVar[dict[str, Any]] = {"steps": 10}

    method: Literal["fmn", "fmn_l0", "ddn", "sigma_zero"] = "fmn"
    """The attack."""
    steps: Annotated[int, Gt(0)] = 100
    """Gradient steps; of a second start of FMN too."""

    def __post_init__(self) -> None:
        _package()  # what it lacks is told before anything is trained
        # each method has its own norms; the class lists all of them, for the planner reads its source
        vars(self)["norms"] = NORMS.get(self.method, type(self).norms)

    def unsupported_reason(self, model: Classifier) -> str | None:
        reason = super().unsupported_reason(model)
        return f"{self.method}: {reason}" if reason else None

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        """What was found inside the ball; the image itself where nothing was."""
        found, broken = self._found(model, x, y)
        if self.method == "fmn" and not model.stochastic:
            again, start = _starts(model, x, y, ~broken)
            if len(again):
                found[again] = self._run(model, x[again], y[again], start)
                broken[again] = _broken(model, found[again], y[again])
        size = self.threat.norm_of(found - x)
        inside = broken & (size <= self.threat.radius)
        columns = {"distance": torch.where(broken, size, float("inf"))}
        if self.method not in NORMS:
            pixels = (found != x).any(1).flatten(1).sum(1).to(size)
            columns["pixels"] = torch.where(broken, pixels, float("inf"))
        return torch.where(inside.view(-1, *[1] * (x.dim() - 1)), found, x), columns

    def _found(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The attack begun at the images, and which it has broken."""
        if self.method == "fmn_l0":
            found = self._run(_OneMore(model), *(torch.cat([part, part[-1:]]) for part in (x, y)))[:-1]
        else:
            found = self._run(model, x, y)
        return found, _broken(model, found, y)

    def _run(self, model: nn.Module, x: Tensor, y: Tensor, start: Tensor | None = None) -> Tensor:
        """What the package gives, in the box (a sum of floats may leave it by a rounding)."""
        attacks = _package()
        if self.method == "ddn":
            found = attacks.ddn(model, x, y, steps=self.steps, levels=None)
        elif self.method == "sigma_zero":
            found = attacks.sigma_zero(model, x, y, num_steps=self.steps)
        else:
            norm = 0 if self.method == "fmn_l0" else ORDER[self.threat.norm]
            found = attacks.fmn(model, x, y, norm=norm, steps=self.steps, starting_points=start)
        return found.detach().clamp(0, 1)


class _OneMore(nn.Module):
    """The model on a batch whose last image stays in its class: the logits of a model that sees none of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.label: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        if self.label is None:  # the package asks about the clean images first
            self.label = logits[-1:].detach().argmax(1)
        constant = nn.functional.one_hot(self.label, logits.shape[1]).to(logits)
        return torch.cat([logits[:-1], constant])


def _broken(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Which images the model gets wrong, bool of shape b."""
    with torch.no_grad():
        return predicted(model(x)) != y


def _starts(model: nn.Module, x: Tensor, y: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The places of wanted images for which another image is in a class other than their label, and the nearest one."""
    with torch.no_grad():
        other = predicted(model(x)) != y[wanted, None]
    apart = torch.cdist(x[wanted].flatten(1), x.flatten(1)).masked_fill(~other, float("inf"))
    nearest, at = apart.min(1)
    near = nearest.isfinite()
    return wanted.nonzero().flatten()[near], x[at[near]]


def _package() -> Any:
    """adv_lib.attacks. Raises ImportError with what it lacks."""
    with _without_plots():
        return imported("adv_lib.attacks", "pip install --no-deps adv-lib")


@contextlib.contextmanager
def _without_plots() -> Iterator[None]:
    """Context in which `import visdom` succeeds where it is not installed; afterwards it is as before."""
    if find_spec("visdom"):
        yield
        return
    sys.modules["visdom"] = ModuleType("visdom")
    try:
        yield
    finally:
        del sys.modules["visdom"]
